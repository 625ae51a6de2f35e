"""Wall clock of a chain of products in one program, beside the sum of the kernels' times.

    x, w[0] -> out[0] -> barrier -> x, w[1] -> out[1] -> barrier -> ...

The products are equal in size and share x; each has a w of its own, so that w comes from memory.
A barrier has each product wait for the result before it, for every implementation alike, and adds
no kernel. Programs are compiled under XLA's defaults, so CUDA graphs may launch them. There are
two:

- unrolled: each w is an argument of its own, and every result is returned;
- under `lax.scan` over the stacked w's, the last result in the carry. Where XLA copies each slice
  of the stack before the product reads it, the copy is part of the time. So is one fill of a
  result with zeros, of the whole loop.

A call is timed from Python until its results are there, so a share of one dispatch and of one
wait is in the time of a product.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq.bench.cases import FORMS, Case
from jaxqq.bench.check import error_share
from jaxqq.bench.measure import (
  Row,
  Settings,
  chained,
  normal,
  operand_specs,
  quartiles,
  reason,
  wall_seconds,
)
from jaxqq.bench.peers import CUBLAS, Implementation, Run

WAYS = ("chain", "scan")  # as the fields of `Row` begin
_WARM_UPS = 4  # XLA records a CUDA graph in one of the first calls
_MAX_CALLS = 50  # in each round
_MEMORY_SHARE = 0.8  # of what is free; the rest is for temporaries

Weights = list[tuple[jax.Array, ...]]  # of each product, all operands but x
Stacked = tuple[jax.Array, ...]


@functools.cache
def scanned(run: Run) -> Run:
  """A program that calls `run` on x and each slice of the stacked operands, in a `lax.scan`."""
  once = jax.jit(run)

  @jax.jit
  def call(x: jax.Array, stacked: Stacked) -> jax.Array:
    slices = (jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for w in stacked)
    out = jax.eval_shape(once, x, *slices)

    def step(carry: tuple[jax.Array, jax.Array], w: Stacked) -> tuple[Any, None]:
      x, _ = lax.optimization_barrier(carry)
      return (x, once(x, *w)), None

    return lax.scan(step, (x, jnp.zeros(out.shape, out.dtype)), stacked)[0][1]

  return call


@dataclasses.dataclass
class _Program:
  """A chain that is compiled, checked and warm."""

  call: Run
  args: tuple[Any, ...]
  calls: int  # in each round
  note: str
  seconds: list[float] = dataclasses.field(default_factory=list)


def with_chains(
  case: Case,
  implementations: Sequence[Implementation],
  rows: Sequence[Row],
  settings: Settings,
  progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
  """Adds the wall clock of chains to the rows of a case; what fails is said in `chain_note`.

  Args:
    case: what the rows are of. One that is no product has no chain.
    implementations: of the rows, in the same order. One whose row has no time is left out.
    rows: of `run_case`.
    settings: `chain` is the products of a chain, fewer where the memory does not suffice, as many
      for each implementation; `seconds` is how long all chains of the case are timed together.
    progress: is told what is being done.
  """
  named = {each.name: each for each, row in zip(implementations, rows, strict=True) if row.us}
  if not settings.chain or not FORMS[case.form].is_product or not named:
    return list(rows)
  programs: dict[tuple[str, str], _Program] = {}
  failures: dict[tuple[str, str], str] = {}
  share = settings.seconds / settings.rounds / (len(WAYS) * len(named))

  def attempt(keys: Iterable[tuple[str, str]], work: Callable[[], None]) -> None:
    try:
      work()
    except Exception as error:
      for key in keys:
        failures[key] = reason(error)
        programs.pop(key, None)

  operands = _Operands(case, settings.seed, [each.prepare for each in named.values()])
  products = min(settings.chain, operands.affordable())
  if products < min(2, settings.chain):
    note = "no chain: the memory holds too few sets of operands"
    return [dataclasses.replace(r, chain_note=note) if r.us else r for r in rows]
  keys = [(name, way) for name in named for way in WAYS]
  attempt(keys, lambda: operands.make(products))
  for key in (key for key in keys if key not in failures):
    progress(f"{case.name}: {' '.join(key)}, compiling")

    def start(key: tuple[str, str] = key) -> None:
      programs[key] = _start(case, named[key[0]], key[1], operands, share)

    attempt([key], start)
  for i in range(settings.rounds):
    progress(f"{case.name}: chains, round {i + 1} of {settings.rounds}")
    keys = list(programs)
    shift = i % max(1, len(keys))
    for key in keys[shift:] + keys[:shift]:
      program = programs[key]

      def sample(program: _Program = program) -> None:
        program.seconds += wall_seconds(program.call, program.args, program.calls)

      attempt([key], sample)
  found = [
    _with_times(row, products, settings.chain, programs, failures) if row.us else row
    for row in rows
  ]
  return _with_ratios(found)


class _Operands:
  """x, and a w for each product, prepared and stacked once for each way to prepare them."""

  def __init__(self, case: Case, seed: int, prepares: Sequence[Run]):
    self._case, self._seed = case, seed
    self._prepares = list(dict.fromkeys(prepares))
    self._weights: dict[Run, Weights] = {}
    self._stacked: dict[Run, Stacked] = {}

  def affordable(self) -> int:
    """How many products the memory has room for."""
    x, w = operand_specs(self._case)
    prepared = [jax.eval_shape(prepare, x, w)[1:] for prepare in self._prepares]
    of_weights = sum(_num_bytes(a) for arrays in prepared for a in arrays)
    out = FORMS[self._case.form].out
    of_out = _num_bytes(jax.ShapeDtypeStruct(self._case.shape(out), x.dtype))
    # What is prepared exists twice, once stacked. Results of two calls may be alive.
    each = _num_bytes(w) + 2 * of_weights + 2 * of_out
    stats = jax.devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", 16 << 30) - stats.get("bytes_in_use", 0)
    return int(_MEMORY_SHARE * free) // each

  def make(self, products: int) -> None:
    x, w = operand_specs(self._case)
    first = self._seed * 1_000_003
    self.x = normal(np.uint32(first), x.shape, self._case.dtype)
    unquantized = [
      normal(np.uint32(first + 1 + i), w.shape, self._case.dtype) for i in range(products)
    ]
    for prepare in self._prepares:
      self._weights[prepare] = [prepare(self.x, w)[1:] for w in unquantized]
    self.last = self.x, unquantized[-1]

  def weights(self, prepare: Run) -> Weights:
    return self._weights[prepare]

  def stacked(self, prepare: Run) -> Stacked:
    if prepare not in self._stacked:
      arrays = zip(*self._weights[prepare], strict=True)
      self._stacked[prepare] = jax.block_until_ready(tuple(jnp.stack(a) for a in arrays))
    return self._stacked[prepare]


def _num_bytes(a: jax.ShapeDtypeStruct) -> int:
  return a.size * a.dtype.itemsize


def _start(
  case: Case, implementation: Implementation, way: str, operands: _Operands, share: float
) -> _Program:
  """Compiles, checks the last product and warms up; `share` is the seconds of one round."""
  args: tuple[Any, ...]
  if way == "chain":
    call = chained(implementation.run, graphs=True)
    # x is an argument of each product, so that XLA cannot find work on it to be the same.
    args = ([(operands.x, *w) for w in operands.weights(implementation.prepare)],)
    last = call(*args)[-1]
  else:
    call, args = scanned(implementation.run), (operands.x, operands.stacked(implementation.prepare))
    last = call(*args)
  _, note = error_share(case, operands.last, last, quantized=implementation.quantized)
  del last
  seconds = min(wall_seconds(call, args, _WARM_UPS))
  calls = max(1, min(int(share / seconds), _MAX_CALLS))
  return _Program(call, args, calls, note)


def _with_times(
  row: Row,
  products: int,
  wanted: int,
  programs: dict[tuple[str, str], _Program],
  failures: dict[tuple[str, str], str],
) -> Row:
  notes = [] if products == wanted else [f"chains of {products}, for want of memory"]
  times: dict[str, Any] = {"chain": products}
  for way in WAYS:
    key = row.implementation, way
    if key in failures:
      notes.append(f"{way} failed: {failures[key]}")
    elif key in programs:
      program = programs[key]
      us = [1e6 * seconds / products for seconds in program.seconds]
      q1, median, q3 = quartiles(us)
      times |= {f"{way}_us": median, f"{way}_us_q1": q1, f"{way}_us_q3": q3}
      if program.note:
        notes.append(f"{way}: {program.note}")
  return dataclasses.replace(row, **times, chain_note="; ".join(notes))


def _with_ratios(rows: list[Row]) -> list[Row]:
  """How many times as fast as the same chain by cuBLAS."""
  base = next((row for row in rows if row.implementation == CUBLAS), None)
  if base is None:
    return rows
  return [
    dataclasses.replace(
      row,
      chain_ratio=_ratio(base.chain_us, row.chain_us),
      scan_ratio=_ratio(base.scan_us, row.scan_us),
    )
    for row in rows
  ]


def _ratio(base: float | None, us: float | None) -> float | None:
  return base / us if base and us else None
