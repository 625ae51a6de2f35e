"""Results as a table, Markdown and a plot; `python -m jaxqq.bench.report FILE.json`.

Without a file, `python -m jaxqq.bench.report` writes the page of all results that are kept, and its
picture (`results_page.py`), so that no number of a table is typed.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
from collections.abc import Callable, Sequence

from jaxqq.bench.cases import FEW_ROWS, FORMS, GOAL_SHAPE, goal, is_survey
from jaxqq.bench.kept import Header, read
from jaxqq.bench.markdown import TIMES, markdown_row
from jaxqq.bench.measure import Row
from jaxqq.bench.peers import COPY, CUBLAS
from jaxqq.bench.summary import every_shape, summary


def install(package: str) -> str:
  return f"jaxqq.bench needs {package} for this: pip install 'jaxqq[bench]'"


# ---- text

# Title, width, and what stands in a row.
_COLUMNS = (
  ("case", 38),
  ("implementation", 23),
  ("us", 9),
  ("q1..q3", 18),
  ("TFLOP/s", 8),
  ("GB/s", 7),
  ("ratio", 6),
  ("err/bound", 9),
)
_CHAIN_COLUMNS = (
  ("chain us (q1..q3)", 23),
  ("ratio", 6),
  ("scan us (q1..q3)", 23),
  ("ratio", 6),
)


def line(cells: Sequence[str], columns: Sequence[tuple[str, int]] = _COLUMNS) -> str:
  """Cells under the titles, the first two to the left, the others to the right; then a note."""
  text = "  ".join(
    cell.ljust(width) if i < 2 else cell.rjust(width)
    for i, (cell, (_, width)) in enumerate(zip(cells, columns, strict=False))
  )
  return "  ".join([text, *cells[len(columns) :]]).rstrip()


def titles(chain: bool = False) -> str:
  """The titles of `row_line`.

  Args:
    chain: whether the wall clock of chains has columns.
  """
  columns = _columns(chain)
  return line([title for title, _ in columns], columns)


def row_line(row: Row, chain: bool = False, platform: str = "gpu") -> str:
  cells = [of_platform(cell, platform) for cell in _cells(row, chain)]
  return line(cells, _columns(chain))


def base_name(platform: str) -> str:
  """What to call the product that ratios are to: only on GPUs does XLA give it to cuBLAS."""
  return CUBLAS if platform in ("gpu", "cuda") else "jnp.dot bf16"


def of_platform(text: str, platform: str) -> str:
  """A text about rows, in which that product is called so."""
  return text.replace(CUBLAS, base_name(platform))


def _columns(chain: bool) -> tuple[tuple[str, int], ...]:
  return _COLUMNS + _CHAIN_COLUMNS if chain else _COLUMNS


def _cells(row: Row, chain: bool = False) -> list[str]:
  spread = _spread(row.us_q1, row.us_q3)
  cells = [
    row.name,
    row.implementation,
    _number(row.us, ".1f"),
    spread,
    _number(row.tflops, ".3g" if (row.tflops or 0) < 100 else ".0f"),
    _number(row.gbps, ".3g" if (row.gbps or 0) < 100 else ".0f"),
    _number(row.ratio, ".2f"),
    _number(row.error_share, ".2f"),
  ]
  if not chain:
    return [*cells, row.note]
  for us, q1, q3, ratio in (
    (row.chain_us, row.chain_us_q1, row.chain_us_q3, row.chain_ratio),
    (row.scan_us, row.scan_us_q1, row.scan_us_q3, row.scan_ratio),
  ):
    spread = "" if us is None else f" ({_spread(q1, q3)})"
    cells += [_number(us, ".1f") + spread, _number(ratio, ".2f")]
  return [*cells, "; ".join(note for note in (row.note, row.chain_note) if note)]


def _spread(q1: float | None, q3: float | None) -> str:
  return "" if q1 is None or q3 is None else f"{q1:.1f}..{q3:.1f}"


def _number(value: float | None, how: str) -> str:
  return "-" if value is None else format(value, how)


def header_lines(header: Header) -> list[str]:
  driver = f", driver {header['driver']}" if header["driver"] else ""
  lines = [
    f"{header['device']} ({header['platform']}{driver}), JAX {header['jax']}, "
    f"jaxqq {header['jaxqq']}, Python {header['python']}, {header['date']}",
    f"{header['timing']}; medians, first and third quartile; ratio: time of "
    f"{base_name(header['platform'])} / time, "
    f"or bytes per second / those of {COPY}",
  ]
  if header.get("chain"):
    lines.append(
      f"chain, scan: wall clock of {header['chain']} products in one program, a product, unrolled "
      f"and under lax.scan; XLA's defaults, CUDA graphs too; ratio: to the same by "
      f"{base_name(header['platform'])}"
    )
  return lines


# ---- Markdown


def tables(header: Header, rows: Sequence[Row], with_goals: bool = False) -> str:
  """What is shown of some results: of a survey, how each number of rows of x does."""
  if is_survey(header.get("suites", [""])):
    text = "\n\n".join(filter(None, (summary(rows), every_shape(rows))))
    return of_platform(text, header["platform"])
  found = goals_markdown(rows, with_goals).strip(), chain_markdown(rows)
  return of_platform("\n\n".join(table for table in found if table), header["platform"])


def goals_markdown(rows: Sequence[Row], with_goals: bool = True) -> str:
  """n, k and m down, mode and form across: ratio to cuBLAS in bfloat16, time, perhaps the goal.

  Of a product that several files hold, the first one's row is taken. Where there are few rows, its
  bytes per second are named, as a share of the copy's where one was measured.
  """
  copies = [row.gbps for row in rows if row.implementation == COPY and row.gbps]
  copy = statistics.median(copies) if copies else None

  def base(rows: Sequence[Row]) -> str:
    us = [row.us for row in rows if row.us]
    return _microseconds(statistics.median(us)) if us else "-"

  table = _product_table(rows, base, lambda row: _goal_cell(row, with_goals, copy))
  return "\n".join(table) + _formats_markdown(rows)


def chain_markdown(rows: Sequence[Row]) -> str:
  """As the table of the goals, of the wall clock of chains; empty where none was measured.

  A cell has the unrolled chain, then that under `lax.scan`, each with its ratio to the same by
  cuBLAS.
  """
  rows = [row for row in rows if row.chain]
  if not rows:
    return ""
  numbers = " or ".join(str(number) for number in sorted({row.chain for row in rows}))
  about = (
    f"Wall clock of a chain of {numbers} products in one program, a product: unrolled; under "
    "`lax.scan`."
  )

  def base(rows: Sequence[Row]) -> str:
    ways = ([row.chain_us for row in rows], [row.scan_us for row in rows])
    known = ([us for us in way if us] for way in ways)
    texts = [_microseconds(statistics.median(us)) if us else "-" for us in known]
    return "; ".join(texts)

  return "\n".join([about, "", *_product_table(rows, base, _chain_cell)])


def _chain_cell(row: Row) -> str:
  ways = ((row.chain_us, row.chain_ratio), (row.scan_us, row.scan_ratio))
  texts = [
    "-" if us is None else " ".join([*_times(ratio), _microseconds(us)]) for us, ratio in ways
  ]
  name = row.implementation.removeprefix("jaxqq").strip()
  text = " ".join(word for word in (name, "; ".join(texts)) if word)
  return text + (f", {row.chain_note}" if row.chain_note else "")


def _times(ratio: float | None) -> list[str]:
  return [] if ratio is None else [f"{ratio:.2f}{TIMES}"]


def _product_table(
  rows: Sequence[Row], base: Callable[[Sequence[Row]], str], cell: Callable[[Row], str]
) -> list[str]:
  """Lines of a table: n, k and m down; cuBLAS, then mode and form across.

  Args:
    rows: of which the products are shown.
    base: the cell of cuBLAS, from its rows.
    cell: that of a row of jaxqq.
  """
  products = [row for row in rows if FORMS[row.form].is_product]
  kinds = list(dict.fromkeys((row.mode, row.form) for row in products))
  titles = ["N", "K", "M", CUBLAS, *(f"{mode} {form}" for mode, form in kinds)]
  lines = markdown_row(titles, head=True) if products else []
  for n, k, m in sorted({(row.n, row.k, row.m) for row in products}, key=_goal_shape_first):
    here = [row for row in products if (row.n, row.k, row.m) == (n, k, m)]
    cells = [str(n), str(k), str(m), base([r for r in here if r.implementation == CUBLAS])]
    for kind in kinds:
      mine = [row for row in here if (row.mode, row.form) == kind and _is_jaxqq(row)]
      first = {row.implementation: row for row in reversed(mine)}
      cells.append("; ".join(cell(row) for row in first.values()) or "-")
    lines += markdown_row(cells)
  return lines


def _goal_shape_first(sizes: tuple[int, int, int]) -> tuple[bool, tuple[int, int, int]]:
  return sizes[:2] != GOAL_SHAPE, sizes


def _goal_cell(row: Row, with_goals: bool, copy: float | None) -> str:
  """With goals, bold where they are reached."""
  if row.us is None:
    return row.note
  aim = goal(row.mode, row.form, row.m, row.n, row.k) if with_goals else None
  ratio = "-" if row.ratio is None else f"{row.ratio:.2f}{TIMES}"
  if aim is not None and row.ratio is not None and row.ratio >= aim:
    ratio = f"**{ratio}**"
  name = row.implementation.removeprefix("jaxqq").strip()
  text = " ".join(word for word in (name, ratio, _microseconds(row.us)) if word)
  if row.m <= FEW_ROWS and row.gbps:
    text += f", {row.gbps:.0f} GB/s"
    text += f" ({row.gbps / copy:.0%} of a copy's)" if copy else ""
  if aim is not None:
    text += f" (goal {aim:.3g}{TIMES})"
  return text + (f", {row.note}" if row.note else "")


def _microseconds(us: float) -> str:
  return f"{us:.0f} µs" if us >= 100 else f"{us:.1f} µs"


def _formats_markdown(rows: Sequence[Row]) -> str:
  """quantize and dequantize, as a share of the copy's bandwidth."""
  found = [row for row in rows if not FORMS[row.form].is_product and _is_jaxqq(row)]
  if not found:
    return ""
  lines = markdown_row(["", "µs", "GB/s", "share of a copy's", ""], head=True)
  for row in found:
    name = row.name + row.implementation.removeprefix(f"jaxqq {row.form}")
    lines += markdown_row([name, *(_cells(row)[i] for i in (2, 5, 6)), row.note])
  return "\n\n" + "\n".join(lines)


def rows_markdown(rows: Sequence[Row]) -> str:
  """Everything, a line a row."""
  chain = any(row.chain for row in rows)
  lines = markdown_row([*(title for title, _ in _columns(chain)), "note"], head=True)
  return "\n".join(lines + [text for row in rows for text in markdown_row(_cells(row, chain))])


def _is_jaxqq(row: Row) -> bool:
  return row.implementation.partition(" ")[0] == "jaxqq"


# ---- plot


def shape_shown(rows: Sequence[Row]) -> tuple[int, int] | None:
  """The (n, k) that a plot over m is of: that of the goals, or the one with the most m."""
  sizes: dict[tuple[int, int], set[int]] = {}
  for row in rows:
    if FORMS[row.form].is_product:
      sizes.setdefault((row.n, row.k), set()).add(row.m)
  if not sizes:
    return None
  return GOAL_SHAPE if GOAL_SHAPE in sizes else max(sizes, key=lambda shape: len(sizes[shape]))


def plot(path: pathlib.Path, header: Header, rows: Sequence[Row]) -> None:
  """Speed over m: a line an implementation, a panel a mode and form."""
  try:
    from matplotlib.figure import Figure
  except ImportError:
    raise SystemExit(install("matplotlib")) from None
  shape = shape_shown(rows)
  shown = [row for row in rows if (row.n, row.k) == shape and row.tflops is not None]
  kinds = list(dict.fromkeys((row.mode, row.form) for row in shown))
  if not kinds:
    raise SystemExit("jaxqq.bench: nothing to plot, since no product was measured.")
  names = list(dict.fromkeys(row.implementation for row in shown))
  columns = min(4, len(kinds))
  lines = -(-len(kinds) // columns)
  figure = Figure(figsize=(4 * columns, 3.2 * lines + 0.6), layout="constrained")
  panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
  for panel in panels[len(kinds) :]:
    panel.remove()
  for panel, kind in zip(panels, kinds, strict=False):
    for i, name in enumerate(names):
      of_m: dict[int, float | None] = {}
      for row in shown:
        if (row.mode, row.form) == kind and row.implementation == name:
          of_m.setdefault(row.m, row.tflops)  # as in the table, the first of several
      points = sorted(of_m.items())
      if points:
        label = of_platform(name, header["platform"])
        style = {"color": f"C{i}", "label": label, "linewidth": 2.2 if "jaxqq" in name else 1.2}
        panel.plot(*zip(*points, strict=True), marker="o", markersize=4, **style)
    panel.set_title(" ".join(kind))
    sizes = sorted({row.m for row in shown})
    panel.set_xscale("log")
    panel.set_xticks(sizes, labels=[str(m) for m in sizes], rotation=45)
    panel.minorticks_off()
    panel.set_xlabel("M")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
  panels[0].set_ylim(bottom=0)
  panels[0].set_ylabel("TFLOP/s")
  n, k = shape or (0, 0)
  figure.suptitle(f"{header['device']}, N = {n}, K = {k}, {header['timing']}", fontsize="medium")
  figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m jaxqq.bench.report",
    description="Prints kept results as Markdown. Without "
    "files, writes the page of all results in jaxqq/bench/results and its picture anew.",
  )
  parser.add_argument("files", nargs="*", type=pathlib.Path, help="what --json wrote")
  parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw it anew")
  parser.add_argument("--goals", action="store_true", help="beside each ratio, what is aimed at")
  parser.add_argument("--all", action="store_true", help="every row, behind the goals")
  options = parser.parse_args(arguments)
  if not options.files:
    _write_page(parser, options)
    return
  try:
    header, rows = read(options.files)
  except (OSError, ValueError, KeyError, TypeError) as error:
    parser.error(f"cannot read {', '.join(map(str, options.files))}: {error}")
  print(*header_lines(header), "", tables(header, rows, options.goals), sep="\n")
  if options.all:
    print("", of_platform(rows_markdown(rows), header["platform"]), sep="\n")
  if options.plot:
    plot(options.plot, header, rows)


def _write_page(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
  """The page of all kept results; the flags are for files."""
  flags = [name for name in ("plot", "goals", "all") if getattr(options, name)]
  if flags:
    parser.error(f"--{flags[0]} needs files of results.")
  from jaxqq.bench import results_page  # which is built on this file

  for path in results_page.write():
    print(path)


if __name__ == "__main__":
  main()
