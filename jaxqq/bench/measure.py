"""Times and errors of one case: operands that rotate through memory, implementations in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq.bench.cases import FORMS, Case
from jaxqq.bench.check import Taken, take
from jaxqq.bench.peers import COPY, CUBLAS, Implementation, Run

# Of kernels that a CUDA graph launches under a condition, CUPTI gives no times.
_NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}
L2_BYTES = 60 << 20  # of an H200, an H100 has 50 MB
MAX_COPIES = 32  # what one program may unroll
MAX_OUTPUT_BYTES = 4 << 30  # results that are alive at once


@dataclasses.dataclass(frozen=True)
class Timer:
  """How a call is timed, and whether its operands should rotate beyond a GPU's L2."""

  method: str
  sample: Callable[[Run, tuple[Any, ...], int], list[float]]  # (f, args, calls) -> seconds each
  rotate_bytes: int


@dataclasses.dataclass(frozen=True)
class Settings:
  seconds: float = 2.0  # of measuring, a case
  rounds: int = 5
  seed: int = 0
  chain: int = 24  # products in one program, for its wall clock; 0 measures none


@dataclasses.dataclass(frozen=True)
class Row:
  """One implementation of one case; what could not be found is None, and `note` says why."""

  name: str
  form: str
  mode: str
  m: int
  n: int
  k: int
  dtype: str
  implementation: str
  us: float | None = None  # median
  us_q1: float | None = None
  us_q3: float | None = None
  us_min: float | None = None
  us_max: float | None = None
  wall_us: float | None = None  # with the launches; far above `us`, something went unseen
  samples: int = 0
  copies: int = 0  # sets of operands that the calls went through
  tflops: float | None = None
  gbps: float | None = None
  ratio: float | None = None  # to cuBLAS bf16 in time, or to the copy in bytes per second
  error_share: float | None = None  # worst error / bound of the specification
  note: str = ""
  path: str = ""  # what `jaxqq.explain` says of it
  # Wall clock of a program of `chain` products, each, by `jaxqq.bench.chain`.
  chain: int = 0  # products
  chain_us: float | None = None  # unrolled, median, a product
  chain_us_q1: float | None = None
  chain_us_q3: float | None = None
  chain_ratio: float | None = None  # to the same chain by cuBLAS in bfloat16
  scan_us: float | None = None  # under `lax.scan` over the stacked w's
  scan_us_q1: float | None = None
  scan_us_q3: float | None = None
  scan_ratio: float | None = None
  chain_note: str = ""


def make_timer() -> Timer:
  """Device time where CUPTI works, else the clock on the wall, and says which."""
  backend = jax.devices()[0].client
  if "cuda" not in backend.platform_version.lower():
    return Timer(f"wall time ({backend.platform})", wall_seconds, 0)
  try:
    if not _cupti_seconds(jax.jit(jnp.negative), (jnp.ones(8),), 1):
      raise RuntimeError("it saw no kernel")
  except Exception as error:
    return Timer(f"wall time, since CUPTI failed: {reason(error)}", wall_seconds, 4 * L2_BYTES)
  return Timer("device time (CUPTI, sum of the kernels of a call)", _cupti_seconds, 4 * L2_BYTES)


def wall_seconds(f: Run, args: tuple[Any, ...], calls: int) -> list[float]:
  seconds = []
  for _ in range(calls):
    begin = time.perf_counter()
    jax.block_until_ready(f(*args))
    seconds.append(time.perf_counter() - begin)
  return seconds


def _cupti_seconds(f: Run, args: tuple[Any, ...], calls: int) -> list[float]:
  from jax.experimental.mosaic.gpu import profiler  # not in every jaxlib

  def measured(calls: int) -> list[float]:
    milliseconds: Any = profiler.measure(f, iterations=calls)(*args)[1]
    if milliseconds is None:
      raise RuntimeError("CUPTI saw no kernel of this call")
    return [1e-3 * t for t in (milliseconds if calls > 1 else [milliseconds])]

  try:
    return measured(calls)
  except RuntimeError as error:
    # The profiler tells calls apart by the order of kernels, which concurrent ones do not keep.
    if not any(word in str(error) for word in ("divisible", "consistent")):
      raise
    return [measured(1)[0] for _ in range(calls)]


@functools.cache
def chained(run: Run, *, graphs: bool = False) -> Any:
  """A program that calls `run` on each set of operands, one after the other.

  A barrier on the last result keeps XLA from merging or overlapping the calls, and every result
  is returned, so that none is dropped.

  Args:
    run: the work.
    graphs: whether XLA may launch the program as CUDA graphs, as it does by default.
  """
  once = jax.jit(run)  # traced and lowered once for all copies

  @functools.partial(jax.jit, compiler_options=None if graphs else _NO_GRAPHS)
  def call(copies: Sequence[tuple[jax.Array, ...]]) -> list[Any]:
    results: list[Any] = []
    for operands in copies:
      if results:
        operands, results[-1] = lax.optimization_barrier((operands, results[-1]))
      results.append(once(*operands))
    return results

  return call


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(seed: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape, dtype)


class _Operands:
  """Random operands of a case, made when first asked for and shared by its implementations."""

  def __init__(self, case: Case, seed: int):
    self._case, self._seed = case, seed
    self._made: list[tuple[jax.Array, ...]] = []

  def __getitem__(self, index: int) -> tuple[jax.Array, ...]:
    inputs = FORMS[self._case.form].inputs
    while len(self._made) <= index:
      first = self._seed * 1_000_003 + len(self._made) * len(inputs)
      self._made.append(
        tuple(
          normal(np.uint32(first + i), self._case.shape(dims), self._case.dtype)
          for i, dims in enumerate(inputs)
        )
      )
    return self._made[index]


@dataclasses.dataclass
class _Runner:
  """An implementation that is compiled and ran once."""

  call: Run
  args: tuple[Any, ...]
  copies: int
  calls: int  # in each round
  wall_seconds: float  # of a call
  taken: Taken | None  # of the last copy, for the check
  path: str
  seconds: list[float] = dataclasses.field(default_factory=list)
  error_share: float | None = None
  note: str = ""


def run_case(
  case: Case,
  implementations: Sequence[Implementation],
  timer: Timer,
  settings: Settings = Settings(),
  progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
  """Measures every implementation of a case; one that fails becomes a row that says so."""
  return run_cases({case: implementations}, timer, settings, progress)[case]


def run_cases(
  compared: Mapping[Case, Sequence[Implementation]],
  timer: Timer,
  settings: Settings = Settings(),
  progress: Callable[[str], None] = lambda text: None,
  turn: contextlib.AbstractContextManager[Any] | None = None,
) -> dict[Case, list[Row]]:
  """Measures every implementation of some cases; one that fails becomes a row that says so.

  Args:
    compared: cases that differ in their mode alone, and what is measured of each. An implementation
      of several cases, as cuBLAS is, is measured once for all.
    timer: how a call is timed.
    settings: how long and how often.
    progress: is told what is being done.
    turn: is entered for as long as the device is needed. The check is done after it.
  """
  owners: dict[Implementation, Case] = {}
  for case, implementations in compared.items():
    for each in implementations:
      owners.setdefault(each, case)
  share = settings.seconds * len(compared) / settings.rounds / len(owners)
  runs = _Runs()
  with turn or contextlib.nullcontext():
    _time(owners, timer, settings, share, progress, runs)
  for implementation, runner in list(runs.runners.items()):
    runs.attempt(implementation, functools.partial(_check, implementation, runner))
  return {
    case: _with_ratios([runs.row(case, each) for each in implementations])
    for case, implementations in compared.items()
  }


@dataclasses.dataclass
class _Runs:
  """What runs, and why the others do not."""

  runners: dict[Implementation, _Runner] = dataclasses.field(default_factory=dict)
  failures: dict[Implementation, str] = dataclasses.field(default_factory=dict)

  def attempt(self, implementation: Implementation, work: Callable[[], Any]) -> Any:
    try:
      return work()
    except Exception as error:
      self.failures[implementation] = reason(error)
      self.runners.pop(implementation, None)
      return None

  def row(self, case: Case, each: Implementation) -> Row:
    return _row(case, each, self.runners.get(each), self.failures.get(each, ""))


def _time(
  owners: Mapping[Implementation, Case],
  timer: Timer,
  settings: Settings,
  share: float,
  progress: Callable[[str], None],
  runs: _Runs,
) -> None:
  """Starts each implementation, and times all in turn; `share` is of the seconds of a round."""
  name = next(iter(owners.values())).name
  operands = _Operands(next(iter(owners.values())), settings.seed)
  for each, case in owners.items():
    progress(f"{case.name}: {each.name}, compiling")
    start = functools.partial(_start, case, each, operands, timer, share, len(owners))
    if runner := runs.attempt(each, start):
      runs.runners[each] = runner
  for i in range(settings.rounds):
    progress(f"{name}: round {i + 1} of {settings.rounds}")
    in_turn = list(runs.runners.items())
    shift = i % max(1, len(in_turn))  # nobody is always the one after the hottest
    for each, runner in in_turn[shift:] + in_turn[:shift]:
      seconds = runs.attempt(
        each, functools.partial(timer.sample, runner.call, runner.args, runner.calls)
      )
      runner.seconds += seconds or []
  for runner in runs.runners.values():
    runner.args = ()  # what lies in the device's memory


def _check(implementation: Implementation, runner: _Runner) -> None:
  if runner.taken is not None:
    found = runner.taken.error_share(quantized=implementation.quantized)
    runner.error_share, runner.note = found


def prepared(
  case: Case, implementation: Implementation, timer: Timer, implementations: int
) -> tuple[tuple[jax.ShapeDtypeStruct, ...], int]:
  """What an implementation starts from, and how many copies of it the calls go through.

  Args:
    case: the work.
    implementation: that does it.
    timer: says beyond how many bytes the operands rotate.
    implementations: how many of them share the memory.
  """
  specs = jax.eval_shape(implementation.prepare, *operand_specs(case))
  rotating = sum(a.size * a.dtype.itemsize for a in (specs[1:] or specs))
  memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 16 << 30)
  one_copy = case.num_bytes(packed=False) + case.num_bytes()
  affordable = memory // (2 * implementations * one_copy)
  wanted = -(-timer.rotate_bytes // max(1, rotating))
  return specs, max(1, min(max(2, wanted), MAX_COPIES, affordable))


def operand_specs(case: Case) -> list[jax.ShapeDtypeStruct]:
  """The unquantized operands of a case."""
  dtype = np.dtype(case.dtype)
  return [jax.ShapeDtypeStruct(case.shape(dims), dtype) for dims in FORMS[case.form].inputs]


def _start(
  case: Case,
  implementation: Implementation,
  operands: _Operands,
  timer: Timer,
  share: float,
  implementations: int,
) -> _Runner:
  """Compiles and runs once; `share` is the seconds that one round may take."""
  _, number = prepared(case, implementation, timer, implementations)
  copies = [implementation.prepare(*operands[i]) for i in range(number)]
  call, args = chained(implementation.run), (copies,)

  last = jax.block_until_ready(call(*args))[-1]
  taken = take(case, operands[number - 1], last) if implementation.checked else None
  del last
  seconds = min(wall_seconds(call, args, 2))
  most = max(1, MAX_OUTPUT_BYTES // (number * case.num_bytes()))
  calls = max(1, min(int(share / seconds), most, 50))
  path = implementation.explain(*copies[0]) if implementation.explain else ""
  return _Runner(call, args, number, calls, seconds, taken, path)


def _row(case: Case, implementation: Implementation, runner: _Runner | None, failure: str) -> Row:
  row = Row(case.name, **case.fields(), implementation=implementation.name)
  if runner is None or not runner.seconds:
    return dataclasses.replace(row, note=f"failed: {failure}")
  us = [1e6 * seconds / runner.copies for seconds in runner.seconds]
  q1, median, q3 = quartiles(us)
  return dataclasses.replace(
    row,
    us=median,
    us_q1=q1,
    us_q3=q3,
    us_min=min(us),
    us_max=max(us),
    wall_us=1e6 * runner.wall_seconds / runner.copies,
    samples=len(us),
    copies=runner.copies,
    tflops=case.flops / median * 1e-6 if case.flops else None,
    gbps=case.num_bytes(packed=implementation.packed) / median * 1e-3,
    error_share=runner.error_share,
    note=runner.note,
    path=runner.path,
  )


def quartiles(values: Sequence[float]) -> list[float]:
  """The first quartile, the median and the third quartile."""
  if len(values) == 1:
    return [*values] * 3
  return statistics.quantiles(values, n=4, method="inclusive")


def _with_ratios(rows: list[Row]) -> list[Row]:
  """How many times as fast as cuBLAS in this run; for quantize, the share of the copy's rate."""
  base = next((row for row in rows if row.implementation in (CUBLAS, COPY) and row.us), None)
  if base is None:
    return rows

  def ratio(row: Row) -> float | None:
    if not row.us or not row.gbps or not base.us or not base.gbps:
      return None
    return base.us / row.us if base.implementation == CUBLAS else row.gbps / base.gbps

  return [dataclasses.replace(row, ratio=ratio(row)) for row in rows]


def reason(error: Exception) -> str:
  """The first line of an error, short enough for a table."""
  text = next((line for line in str(error).splitlines() if line.strip()), "").strip()
  return f"{type(error).__name__}: {text}"[:200]
