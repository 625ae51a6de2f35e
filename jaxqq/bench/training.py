"""Training on one GPU: products of a linear layer and a block of Llama 3 8B, `--suite training`.

Implementations are bfloat16, jaxqq's modes with the quantized backward, and jaxqq's recipes. Times
are of the device, the kernels of a program together, and of the clock on the wall; programs are
launched without CUDA graphs, of whose kernels CUPTI gives no times.

As a check every result is compared with that in bfloat16. Quantization itself makes most of the
difference, so it says of a result whether it is nonsense, not whether it is exact.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxqq._formats import Mode
from jaxqq._kernels.plan import TURNED_OFF
from jaxqq.bench import kept
from jaxqq.bench.cases import MODES
from jaxqq.bench.markdown import TIMES, markdown_row
from jaxqq.bench.measure import (
  Settings,
  Timer,
  chained,
  make_timer,
  quartiles,
  reason,
  wall_seconds,
)
from jaxqq.bench.peers import Run
from jaxqq.bench.training_cells import (
  BFLOAT16,
  BLOCK,
  FORMS,
  MODEL,
  Arrays,
  Cell,
  Model,
  Way,
  ways_of,
)
from jaxqq.bench.turns import Program, in_turn, side_by_side

TOKENS = (8192,)
MOST_ERROR = 0.5  # of a result, relative to that in bfloat16
TABLE = "training"  # where a file has the rows
_SWITCHES = (TURNED_OFF,)  # of the environment: which kernels are off
_WALL = Timer("wall time", wall_seconds, 0)


# Measuring


@dataclasses.dataclass(frozen=True)
class Row:
  """One implementation of one cell; `note` says why there is no time, or what is wrong."""

  layer: str
  form: str
  tokens: int
  n: int
  k: int
  implementation: str
  ms: float | None = None  # of the device, median
  ms_q1: float | None = None
  ms_q3: float | None = None
  wall_ms: float | None = None
  wall_ms_q1: float | None = None
  wall_ms_q3: float | None = None
  samples: int = 0  # programs whose kernels were timed
  copies: int = 0  # sets of operands that a program goes through, each once
  ratio: float | None = None  # the time of bf16 of the same run / this one
  wall_ratio: float | None = None
  # ||difference|| / ||bf16's||, Frobenius; of a block's dw that of the worst weight.
  error_out: float | None = None
  error_dx: float | None = None
  error_dw: float | None = None
  note: str = ""
  path: str = ""  # what `jaxqq.explain` says of a forward product; the attention of a block

  @property
  def cell(self) -> tuple[Any, ...]:
    return self.layer, self.form, self.tokens, self.n, self.k, self.implementation

  @property
  def error(self) -> float | None:
    """The worst of its errors."""
    known = [e for e in (self.error_out, self.error_dx, self.error_dw) if e is not None]
    return max(known, default=None)


@dataclasses.dataclass(frozen=True)
class Suite:
  """What is measured, and how; (n, k) in `shapes` keep these layers alone."""

  modes: Sequence[Mode] = MODES
  tokens: Sequence[int] = TOKENS
  forms: Sequence[str] = tuple(FORMS)
  shapes: Sequence[tuple[int, int]] = ()
  model: Model = MODEL
  has_peer: bool = True  # whether bfloat16 is timed; results are compared with it all the same
  settings: Settings = dataclasses.field(default_factory=Settings)

  def __post_init__(self) -> None:
    for tokens in self.tokens:
      self.model.sequences(tokens)

  @property
  def ways(self) -> list[Way]:
    return [way for way in ways_of(self.modes) if self.has_peer or way != BFLOAT16]

  def cells(self) -> Iterator[Cell]:
    """The products layer by layer, then the block."""
    for tokens in self.tokens:
      for layer, shape in self.model.layers.items():
        for form in self.forms:
          if form != BLOCK and (not self.shapes or shape in self.shapes):
            yield Cell(self.model, layer, form, tokens)
      if BLOCK in self.forms and not self.shapes:
        yield Cell(self.model, BLOCK, BLOCK, tokens)

  def row_of(self, cell: Cell, way: Way) -> Row:
    return Row(cell.layer, cell.form, cell.tokens, *cell.shape, way.name)


def measure(suite: Suite, cell: Cell, timer: Timer) -> list[Row]:
  """Every implementation of a cell, in turn; one that fails becomes a row that says so."""
  settings, ways = suite.settings, suite.ways
  specs = cell.specs()
  copies = _num_copies(specs, timer)

  def compiled(work: Run) -> Run:
    return chained(work).lower([specs] * copies).compile()

  compared = list(dict.fromkeys([BFLOAT16, *ways]))  # with the first one's results
  made = side_by_side(compiled, [cell.run_of(way) for way in compared])
  calls = dict(zip(compared, made, strict=True))
  args = ([cell.operands(settings.seed * 1_000 + i) for i in range(copies)],)
  share = settings.seconds / settings.rounds / max(1, len(ways))
  rows: dict[str, Row] = {}
  programs: dict[str, Program] = {}
  want: Arrays | None = None
  for way, call in calls.items():
    row = dataclasses.replace(suite.row_of(cell, way), copies=copies)
    try:
      if isinstance(call, Exception):
        raise call
      got = jax.block_until_ready(call(*args))[-1]
      if way == BFLOAT16:
        want = got
      else:
        row = dataclasses.replace(row, path=cell.explain(way), **_compared(got, want))
      del got
      if way in ways:
        programs[way.name] = Program.warmed_up(call, args, share)
    except Exception as error:
      row = dataclasses.replace(row, note=f"failed: {reason(error)}")
    if way in ways:
      rows[way.name] = row
  del want
  return with_ratios(list(_timed(rows, programs, timer, settings.rounds).values()))


def _num_copies(specs: Any, timer: Timer) -> int:
  """As many sets of operands as are beyond a GPU's L2."""
  num_bytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(specs))
  return max(1, -(-timer.rotate_bytes // num_bytes))


def _compared(got: Arrays, want: Arrays | None) -> dict[str, Any]:
  """The fields of a row that say how far results are from those in bfloat16."""
  if want is None:
    return {"note": "there is no result in bfloat16 to compare with"}
  errors = {f"error_{name}": float(e) for name, e in _relative_errors(got, want).items()}
  if not all(map(math.isfinite, errors.values())):
    return {"note": "the result is not finite"}
  worst = max(errors.values())
  return errors | ({"note": f"{worst:.2f} off from bf16"} if worst > MOST_ERROR else {})


@jax.jit
def _relative_errors(got: Arrays, want: Arrays) -> Arrays:
  def error(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)

  errors = {name: jax.tree.map(error, got[name], want[name]) for name in got}
  return {name: jnp.max(jnp.stack(jax.tree.leaves(e))) for name, e in errors.items()}


def _timed(
  rows: Mapping[str, Row], programs: Mapping[str, Program], timer: Timer, rounds: int
) -> dict[str, Row]:
  """The rows with the times of their programs, of the timer and on the wall."""
  device = in_turn(programs, timer, rounds)
  wall = device if timer.sample is wall_seconds else in_turn(programs, _WALL, rounds)
  timed = dict(rows)
  for name in programs:
    row, failure = timed[name], None
    for field, found in (("wall_ms", wall[name]), ("ms", device[name])):
      if isinstance(found, Exception):
        failure = found
        continue
      q1, median, q3 = quartiles([1e3 * s / row.copies for s in found])
      times: dict[str, Any] = {field: median, f"{field}_q1": q1, f"{field}_q3": q3}
      row = dataclasses.replace(row, **times, samples=len(found))
    if failure is not None:
      row = dataclasses.replace(row, note=f"failed: {reason(failure)}")
    timed[name] = row
  return timed


def with_ratios(rows: Sequence[Row]) -> list[Row]:
  """How many times as fast as bfloat16 in the same run."""
  base = next((row for row in rows if row.implementation == BFLOAT16.name), None)
  if base is None:
    return list(rows)
  return [
    dataclasses.replace(
      row, ratio=_ratio(base.ms, row.ms), wall_ratio=_ratio(base.wall_ms, row.wall_ms)
    )
    for row in rows
  ]


def _ratio(base: float | None, own: float | None) -> float | None:
  return base / own if base and own else None


def run(
  suite: Suite,
  path: pathlib.Path | None = None,
  *,
  resume: bool = True,
  deadline: float = float("inf"),
  tell: Callable[[str], None] = print,
) -> list[Row]:
  """Measures what the file lacks, cell by cell, until the deadline (`time.monotonic`).

  Raises:
    ValueError: the file has results of another device, JAX, way of timing or choice of kernels.
  """
  timer = make_timer()
  switches = {name: os.environ[name] for name in _SWITCHES if os.environ.get(name)}
  how = dataclasses.asdict(suite.settings) | {"environment": switches}
  header = kept.make_header(timer.method, suites=["training"], **how)
  rows: list[Row] = []
  if path is not None and resume and path.exists():
    old, rows = read(path)
    header = kept.joined(path, old, header, also=("environment",))
  for cell in _left(suite, rows):
    if time.monotonic() >= deadline:
      break
    found = measure(suite, cell, timer)
    new = {row.cell for row in found}
    rows = [row for row in rows if row.cell not in new] + found
    for row in found:
      tell(_line(cell, row))
    if path is not None:
      kept.write(path, header, rows, TABLE)
  return rows


def _left(suite: Suite, rows: Sequence[Row]) -> list[Cell]:
  """The cells that lack a row; last come those in which an implementation failed."""
  known = {row.cell: row for row in rows}
  new, failed = [], []
  for cell in suite.cells():
    found = [known.get(suite.row_of(cell, way).cell) for way in suite.ways]
    if any(row is None for row in found):
      new.append(cell)
    elif any(row is not None and row.ms is None for row in found):
      failed.append(cell)
  return new + failed


def read(path: pathlib.Path) -> tuple[kept.Header, list[Row]]:
  content = json.loads(path.read_text())
  return content["header"], [Row(**row) for row in content[TABLE]]


# Text and tables


def _line(cell: Cell, row: Row) -> str:
  parts = [f"{cell} {row.implementation}: {_time(row.ms, row.ratio)}"]
  if row.wall_ms is not None:
    parts.append(f"wall {_time(row.wall_ms, row.wall_ratio)}")
  if row.error is not None:
    parts.append(f"{row.error:.3f} off")
  return ", ".join([*parts, row.note] if row.note else parts)


def _time(ms: float | None, ratio: float | None) -> str:
  if ms is None:
    return "-"
  return f"{ms:.3f} ms" if ratio is None else f"{ms:.3f} ms ({ratio:.2f}{TIMES})"


def markdown(rows: Sequence[Row]) -> str:
  """For each number of tokens a table of the products, and one of the block."""
  tables = []
  for tokens in sorted({row.tokens for row in rows}):
    here = [row for row in rows if row.tokens == tokens]
    products = [row for row in here if row.layer != BLOCK]
    block = [row for row in here if row.layer == BLOCK]
    if products:
      about = f"Products of {tokens} tokens, device time in ms ({TIMES} bf16):"
      tables += [about, "\n".join(_products(products))]
    if block:
      about = f"The block, forward and backward, {tokens} tokens ({TIMES} bf16):"
      tables += [about, "\n".join(_block(block))]
  return "\n\n".join(tables)


def _products(rows: Sequence[Row]) -> list[str]:
  """Layers and their products down, implementations across."""
  names = list(dict.fromkeys(row.implementation for row in rows))
  lines = markdown_row(["layer", f"N {TIMES} K", "product", *names], head=True)
  for layer, n, k, form in dict.fromkeys((r.layer, r.n, r.k, r.form) for r in rows):
    found = {
      r.implementation: r for r in rows if (r.layer, r.n, r.k, r.form) == (layer, n, k, form)
    }
    cells = [_cell(found.get(name)) for name in names]
    lines += markdown_row([layer, f"{n} {TIMES} {k}", FORMS[form], *cells])
  return lines


def _cell(row: Row | None) -> str:
  if row is None:
    return "-"
  text = "-" if row.ms is None else f"{row.ms:.3f}"
  if row.ratio is not None and row.implementation != BFLOAT16.name:
    text += f" ({row.ratio:.2f})"
  return ", ".join(part for part in (text, row.note) if part)


def _block(rows: Sequence[Row]) -> list[str]:
  titles = ["", "device", "wall clock", "error of out", "of dx", "of dw", ""]
  lines = markdown_row(titles, head=True)
  for row in rows:
    times = _time(row.ms, row.ratio), _time(row.wall_ms, row.wall_ratio)
    errors = (row.error_out, row.error_dx, row.error_dw)
    shown = ("-" if e is None else f"{e:.3f}" for e in errors)
    lines += markdown_row([row.implementation, *times, *shown, row.note])
  return lines
