"""A survey in a few tables: at each number of rows of x, how all shapes of w do.

    time of cuBLAS in bfloat16 / time of jaxqq:  geometric mean over (N, K), worst, how many < 1

Weights that are small in bfloat16 stand apart: there launches are much of the time, and in a model
more of them stay in the L2 cache than in this measurement, which has them come from memory.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from jaxqq.bench.markdown import TIMES, markdown_row
from jaxqq.bench.measure import Row
from jaxqq.bench.peers import CUBLAS

SMALL_BYTES = 16 << 20  # of w in bfloat16

# A field of `Row`, and what its ratio is of.
_MEASURES = {
  "ratio": "device time",
  "chain_ratio": "wall clock in a chain, unrolled",
  "scan_ratio": "wall clock in a chain, under lax.scan",
}


@dataclasses.dataclass(frozen=True)
class Group:
  """The products of one mode and m with some of the weights."""

  mean: float  # geometric, of the ratios to cuBLAS in bfloat16
  worst: float
  shape: tuple[int, int]  # (n, k) of the worst
  below_1: int
  cells: int

  @property
  def texts(self) -> list[str]:
    n, k = self.shape
    worst = f"{self.worst:.2f}{TIMES} {n}x{k}"
    return [f"{self.mean:.2f}{TIMES}", worst, f"{self.below_1} of {self.cells}"]


def is_small(row: Row) -> bool:
  """Whether w is, in bfloat16."""
  return 2 * row.n * row.k <= SMALL_BYTES


def group(rows: Sequence[Row], measure: str = "ratio") -> Group | None:
  """What is said of some rows together; None if none of them has a ratio.

  Args:
    rows: of jaxqq, of different (n, k).
    measure: the field that holds the ratio.
  """
  ratios = [(getattr(row, measure), (row.n, row.k)) for row in rows]
  known = sorted((ratio, shape) for ratio, shape in ratios if ratio is not None)
  if not known:
    return None
  values = [ratio for ratio, _ in known]
  worst, shape = known[0]
  below = sum(ratio < 1 for ratio in values)
  return Group(statistics.geometric_mean(values), worst, shape, below, len(known))


def summary(rows: Sequence[Row]) -> str:
  """For every mode a table of each measure, then what failed or was wrong; Markdown."""
  mine = [row for row in rows if row.implementation == "jaxqq"]
  tables = [
    _table([row for row in mine if (row.mode, row.form) == kind], measure)
    for kind in dict.fromkeys((row.mode, row.form) for row in mine)
    for measure in _MEASURES
    if any(getattr(row, measure) is not None for row in mine)
  ]
  noted = [
    f"- {row.name}, {row.implementation}: {note}"
    for row in rows
    if row.implementation in ("jaxqq", CUBLAS)
    for note in (row.note, row.chain_note)
    if note
  ]
  parts = ["\n".join(table) for table in tables if table]
  return "\n\n".join(parts + (["\n".join(noted)] if noted else []))


def _table(rows: Sequence[Row], measure: str) -> list[str]:
  """m down; weights above the limit, then those up to it."""
  if not rows:
    return []
  size = f"{SMALL_BYTES >> 20} MiB"
  lines = [f"{rows[0].mode}, w {rows[0].form}, {_MEASURES[measure]}:", ""]
  head = ["M"]
  for which in (f"w above {size}", f"w up to {size}"):
    head += [which, "worst, N x K", f"below 1{TIMES}"]
  lines += markdown_row(head, head=True)
  for m in sorted({row.m for row in rows}):
    cells = [str(m)]
    for small in (False, True):
      here = [row for row in rows if row.m == m and is_small(row) == small]
      found = group(here, measure)
      cells += found.texts if found else ["-"] * 3
    lines += markdown_row(cells)
  return lines


def every_shape(rows: Sequence[Row]) -> str:
  """For every mode the ratio of each cell, in device time: (N, K) down, from large to small; M."""
  mine = [row for row in rows if row.implementation == "jaxqq" and row.ratio is not None]
  tables = []
  for mode, form in dict.fromkeys((row.mode, row.form) for row in mine):
    ratios = {(r.n, r.k, r.m): r.ratio for r in mine if (r.mode, r.form) == (mode, form)}
    sizes = sorted({m for _, _, m in ratios})
    lines = [f"{mode}, w {form}, device time, every shape:", ""]
    lines += markdown_row(["N x K", *map(str, sizes)], head=True)
    for n, k in sorted({(n, k) for n, k, _ in ratios}, key=lambda w: (-w[0] * w[1], w)):
      found = (ratios.get((n, k, m)) for m in sizes)
      lines += markdown_row([f"{n} x {k}", *("-" if r is None else f"{r:.2f}" for r in found)])
    tables.append("\n".join(lines))
  return "\n\n".join(tables)
