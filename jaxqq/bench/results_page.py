"""The page of all kept results, `results/README.md`, and its picture, from the JSON beside them.

`python -m jaxqq.bench.report` without arguments writes both. A file of results that no section
below names is shown at the end, under its own name, so that none is left out.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxqq.bench import accuracy, decode_tables, mesh, moe, report, training
from jaxqq.bench.cases import GOAL_SHAPE, MODES
from jaxqq.bench.kept import Header, read
from jaxqq.bench.markdown import TIMES
from jaxqq.bench.measure import Row
from jaxqq.bench.summary import group, is_small

FOLDER = pathlib.Path(__file__).parent / "results"
PAGE, PICTURE = "README.md", "ratios.png"
# What the picture and the README's table of ratios are drawn from: packed w of many shapes, and w
# on the fly of one.
SURVEY_FILE, ON_THE_FLY_FILES = "h200_models.json", ("h200.json", "h200_few_rows.json")
RATIO_FILES = (SURVEY_FILE, *ON_THE_FLY_FILES)

_INTRO = f"""\
# Results

`python -m jaxqq.bench.report` writes this page and its picture from the JSON files beside it.
The commands named below measure; add `--json FILE` to keep the results.

How to read the tables:

- Times are medians. {TIMES} is the time of cuBLAS's bfloat16 product divided by jaxqq's:
  above 1, jaxqq is faster. Both run in turn in one process.
- x and the result are bfloat16. The time of a product includes the quantization of x, and of w
  where w is "on the fly"; "packed" w is quantized beforehand.
- GB/s counts every input and the output once, packed arrays as they are packed. "Of a copy's"
  compares that with a copy on the same device. A copy reads and writes; a kernel that mostly reads
  may be faster.
- `quantize columns` is `quantize(x, axis=-2)`.

![Speed relative to a bfloat16 product over the number of rows]({PICTURE})"""


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the page: some files whose rows make one table."""

  title: str
  files: tuple[str, ...]
  about: str = ""
  command: str = ""  # that measured them


SECTIONS = (
  Section(
    "Products and conversions on an H200",
    ("h200.json", "h200_few_rows.json", "h200_few_rows_llama.json"),
    """\
Packed mxfp8 is faster than bfloat16 at every number of rows measured, nvfp4 up to 64 rows. From
256 rows on nvfp4 has 0.94 to 0.98 of bfloat16's speed at N = K = 8192, and saves memory. In a
second run it had 0.92 to 0.99, and mxfp8 1.15 to 1.55. With w on the fly and up to 64 rows, a
product takes up to a third more time than in bfloat16; with 256 rows, up to 2.5 times as much.
From 1024 rows on, mxfp8 on the fly is faster than bfloat16.

Products with up to 64 rows of x ran a skinny GEMM that is designed to be limited by memory
bandwidth, that is by reading w. It did not reach that limit with 64 rows, nor in nvfp4 with
8 rows or more. With packed w it quantizes x itself where that is little work. Where w has few
rows, clusters of CTAs share them, and each CTA sums a part of K. With 4096 rows of w the launch
is most of the time.

From 1024 rows on cuBLAS runs at 822 to 828 TFLOP/s, where the card is at its power limit. On
cards where cuBLAS was slower, the ratios were higher.

The rows up to 64 were measured a day before the others. All of them are older than the removal
of mxfp8's fallback (a second path for data of large range); "Chains" below has newer times of
packed mxfp8. Of packed w and 33 to 256 rows they are those of other kernels than today's.""",
    "python -m jaxqq.bench --suite goals quantize (then few-rows, few-rows-llama)",
  ),
  Section(
    "Layers of Llama 3 with many rows on an H200",
    ("h200_llama.json",),
    "Packed nvfp4 has 0.94 to 1.04 of bfloat16's speed, mxfp8 1.23 to 1.53.",
    "python -m jaxqq.bench --suite llama --forms packed",
  ),
  Section(
    "Products and conversions on an H100",
    ("h100.json", "h100_few_rows.json"),
    "From 1024 rows on cuBLAS runs at 771 to 807 TFLOP/s.",
    "python -m jaxqq.bench --suite goals quantize (then few-rows)",
  ),
  Section(
    "XLA alone on an H100",
    ("h100_xla.json",),
    """\
The same products without the kernels, as on a GPU that has none. Packed w becomes bfloat16 in
memory, and is read again by the product: with 1024 rows that is a third of the time. One row of x
is multiplied while w is read. Of 16 rows XLA makes what it makes of 1024.""",
    "JAXQQ_DISABLE=hopper python -m jaxqq.bench --rows 1 16 1024 4096 --peers cublas",
  ),
  Section(
    "Layers of many models on an H200",
    ("h200_models.json",),
    """\
Packed w. Each (N, K) is measured briefly: of one cell, trust no difference below a few per cent.
The second column is the geometric mean over the shapes of the time of cuBLAS's bfloat16 product
divided by jaxqq's. Weights that are small in bfloat16 stand apart, since launches are much of
their time. In the last tables are the ratios of every shape.

nvfp4 is multiplied in 16 bits, at bfloat16's rate of the tensor cores, so with many rows it can
hardly be faster. x's quantizer is a launch of its own, of 2 to 4 µs at 256 rows.

The kernels and tiles are those of today, but for some cells from 2048 rows on with K of 2880 or
5376, whose scales are no longer padded. Of mxfp8 with 1 to 16 rows all are of one run, the newest,
as are those of nvfp4 with 8 rows, and of mxfp8 with 32, whose kernels changed then; from 2048 on
most are the oldest.

All N and K here are multiples of 64. Rows of x that are no multiple of 8 cost no more: at 4096 x
4096, 1001 rows take 47.6 µs in nvfp4 and 36.1 in mxfp8, 1024 rows 47.8 and 36.0. With 50257 rows of
w, x 4096, one row of x takes 51.5 and 61.1 µs.""",
    "python -m jaxqq.bench --suite models --processes 15",
  ),
  Section(
    "Weights alone at the layers of many models on an H200",
    ("h200_weights.json",),
    """\
`quantized_matmul`: packed w, x in bfloat16 as it is. Tables as above. All modes are multiplied in
16 bits, at bfloat16's rate of the tensor cores.""",
    "python -m jaxqq.bench --suite weights --modes nvfp4 mxfp4 mxfp8 --processes 15",
  ),
  Section(
    "Gradients on an H200",
    ("h200_backward.json",),
    """\
The gradients under `jax.grad`, with w on the fly: of x (dx) and of w (dw), in both backward
modes. The quantized ones write no transposed operand to memory.""",
    "python -m jaxqq.bench --backward --forms dx dw --rows 8192",
  ),
  Section(
    "Chains",
    ("h200_chain.json",),
    """\
A program also launches its kernels, so the second table has wall clock: 24 packed products in
one compiled program under XLA's defaults, each with its own w and dependent on the result before
it. Times are for one product. "Unrolled" passes every w as an argument. Under `lax.scan` over
the stacked weights, XLA may copy each slice of w first, which the time includes. The ratio is to
the same program in bfloat16. The column of bfloat16 is the median of both modes'. Unrolled, the
program ends later than its kernels: Python and XLA launch them, one by one or as graphs.""",
    "python -m jaxqq.bench --suite chain --peers cublas",
  ),
  Section(
    "Layers of experts on an H200",
    ("h200_moe.json",),
    """\
`ragged_qqmm`: each token's rows go to some experts, drawn at random. A layer is (N, K) of Qwen3
30B-A3B, gpt-oss 20B, Mixtral 8x7B and DeepSeek V3, with (experts, experts a token); T is the number
of tokens. In brackets: how many times as fast as the fastest bfloat16 product of the same run, of
`jax.lax.ragged_dot`, JAX's Pallas kernel in four configurations and torch's `_grouped_mm`.
"Training" is the product with w on the fly, and both straight-through gradients. DeepSeek V3 and
training are older than the others. mxfp8 has other tiles since with 256 and 512 tokens of gpt-oss
and 128 and 256 of Mixtral, and takes 7 to 10% less time (gpt-oss, T = 512: 209 µs).

At 8 rows an expert (gpt-oss, T = 64) mxfp8 takes 1.1 times as long as its bytes would at 4.2 TB/s,
and nvfp4 1.3 times.""",
    "python -m jaxqq.bench --suite moe --backward",
  ),
  Section(
    "Quantizers of recipes on an H200",
    ("h200_recipe.json",),
    """\
A `Quantizer` in nvfp4, of rows and of columns: stochastic rounding, Hadamard rotations of 16, and
both. The amax is known before, or is the array's own, which takes one more read. Both of columns,
and squares, are not measured yet.""",
    "python -m jaxqq.bench --suite recipe --modes nvfp4",
  ),
  Section(
    "Training on an H200",
    ("h200_training.json",),
    """\
What a training step of Llama 3 8B does on one GPU, in bfloat16 and with every operand quantized on
the fly: the three products of each linear layer, and a whole block, forward and backward, as one
program. Sequences have 2048 tokens. "jaxqq" and a mode is `backward="quantized"`, in nvfp4 with the
global scales that layers have by default; the recipe mxfp8 is the same program as the mode. In
brackets: bf16's time divided by the program's. The block was measured a day before the products.
Programs are launched without CUDA graphs. An error is ‖difference‖/‖bf16's result‖, of dw that of
the worst weight; quantization itself makes most of it.""",
    "python -m jaxqq.bench --suite training",
  ),
  Section(
    "The MLP of Llama 3 70B on one device and on two",
    ("h200_mesh.json",),
    """\
H200s of one host. Gate and up are split along N, down along K, with one all-reduce. Forward uses
packed weights. In the training step every product quantizes on the fly, those of the gradients
too. The times are older than a cheaper computation of nvfp4's scales and than the removal of
mxfp8's fallback. Every product checked on a sample was within 0.65 of its bound, on two devices
as on one.""",
    "python -m jaxqq.bench.mesh",
  ),
  Section(
    "Decoding with the shapes of Llama 3 8B",
    ("h200_decode.json",),
    """\
`weights GB/s` counts what one token reads: the packed linear layers and the head. `logits off
by` is ‖difference‖/‖logits‖ after the prompt, against the bfloat16 model with the same random
weights. `same tokens` counts the prompts for which both models choose the same next token.
Random weights leave many logits nearly equal, so a trained model agrees more often.

In an earlier run every layer had, besides its products, 14 to 16 small XLA kernels (attention,
norms, rotary positions), in each of the models. In nvfp4 at batch 1 they took 23 µs a layer,
products 50, and what is between kernels, 1.2 µs each, 23 more. Attention, of which five were, is
one kernel of cuDNN's now. A prompt of 128 tokens takes as long as its kernels are launched: in all
three models they themselves take less.""",
    "python examples/decode.py",
  ),
  Section(
    "Errors by kind of data",
    ("h200_accuracy.json",),
    """\
‖error‖/‖exact‖ in units of 1e-3, of products of (256, K) by (256, K). `exact` is the float64
product of the dequantized operands, so the error of quantization itself is not counted. `plain`
is a bfloat16 product of the unquantized x and w, compared with their float64 product. Rounding
the result to bfloat16 alone makes about 1.65.

What loses more, and why, is in [EXACTNESS.md](../../EXACTNESS.md#norm-wise-errors).""",
    "python -m jaxqq.bench.accuracy",
  ),
)


def page(folder: pathlib.Path = FOLDER) -> str:
  """The whole page, from every JSON file of a folder; sections that lack a file are left out."""
  present = {path.name for path in folder.glob("*.json")}
  sections = [section for section in SECTIONS if present.issuperset(section.files)]
  shown = {name for section in sections for name in section.files}
  sections += [Section(f"`{name}`", (name,)) for name in sorted(present - shown)]
  return "\n\n".join([_INTRO, *(_section(folder, section) for section in sections)]) + "\n"


def write(folder: pathlib.Path = FOLDER) -> list[pathlib.Path]:
  """The page and the picture, in the folder of the results; what was written."""
  files = folder / PAGE, folder / PICTURE
  files[0].write_text(page(folder))
  plot_ratios(files[1], folder)
  return list(files)


def _section(folder: pathlib.Path, section: Section) -> str:
  contents = {name: json.loads((folder / name).read_text()) for name in section.files}
  parts = [f"## {section.title}", section.about]
  if section.command:
    parts.append(f"Measured by `{section.command}`:")
  parts.append("\n".join(_origin(name, c["header"]) for name, c in contents.items()))
  parts.append(_tables(list(contents.values())))
  return "\n\n".join(part for part in parts if part)


def _origin(name: str, header: Header) -> str:
  """Where and when a file's results came about."""
  driver = f" (driver {header['driver']})" if header.get("driver") else ""
  switches = [f"{name}={value}" for name, value in header.get("environment", {}).items()]
  commit = f"commit {header['commit']}" if header.get("commit") else "commit not recorded"
  date = header["date"][:10]
  return (
    f"- [`{name}`]({name}): {header['device']}{driver}, JAX {header['jax']}, {date}, {commit}; "
    f"{header['timing']}{'; ' if switches else ''}{' '.join(switches)}."
  )


def _tables(contents: Sequence[dict[str, Any]]) -> str:
  """By what the first of some files holds."""
  first = contents[0]
  if "mlp" in first:
    return mesh.markdown([mesh.Result(**result) for result in first["mlp"]])
  if moe.TABLE in first:
    layers = [layer for content in contents for layer in content[moe.TABLE]]
    return moe.markdown([moe.Row.of(layer) for layer in layers]).strip()
  if training.TABLE in first:
    rows = [row for content in contents for row in content[training.TABLE]]
    return training.markdown([training.Row(**row) for row in rows])
  if "models" in first:
    return decode_tables.tables(first["models"])
  rows = [row for content in contents for row in content["rows"]]
  if "kind" in first["rows"][0]:
    kinds = dict.fromkeys((row["mode"], row["dtype"]) for row in rows)
    return "\n\n".join("\n".join(accuracy.table(rows, *kind)).strip() for kind in kinds)
  return report.tables(first["header"], [Row(**row) for row in rows])


# ---- ratios


@dataclasses.dataclass(frozen=True)
class _Ratio:
  """To cuBLAS: a geometric mean over shapes, and the worst and best of them; or of one shape."""

  mean: float
  worst: float | None = None
  best: float | None = None


_Ratios = dict[tuple[str, str], dict[int, _Ratio]]  # by mode and form, of each number of rows


def _ratios(folder: pathlib.Path) -> _Ratios:
  """Of packed w those of large shapes, on the fly those at the shape of the goals."""
  found: _Ratios = {}
  _, survey = read([folder / SURVEY_FILE])
  large = [row for row in survey if row.implementation == "jaxqq" and not is_small(row)]
  for mode, m in sorted({(row.mode, row.m) for row in large}, key=lambda e: MODES.index(e[0])):
    here = [row for row in large if (row.mode, row.m) == (mode, m)]
    if (shapes := group(here)) is not None:
      best = max(row.ratio for row in here if row.ratio is not None)
      ratio = _Ratio(shapes.mean, shapes.worst, best)
      found.setdefault((mode, "packed"), {})[m] = ratio
  _, rows = read([folder / name for name in ON_THE_FLY_FILES])
  for row in rows:
    is_wanted = row.form == "on the fly" and (row.n, row.k) == GOAL_SHAPE
    if is_wanted and row.implementation == "jaxqq" and row.ratio is not None:
      found.setdefault((row.mode, row.form), {}).setdefault(row.m, _Ratio(row.ratio))
  return {kind: dict(sorted(of_m.items())) for kind, of_m in found.items()}


def ratios_markdown(folder: pathlib.Path = FOLDER) -> str:
  """The README's table: w's mode and form down, rows of x across."""
  ratios = _ratios(folder)
  rows = sorted({m for of_m in ratios.values() for m in of_m})
  lines = ["| rows of x | " + " | ".join(map(str, rows)) + " |", "|" + "---|" * (1 + len(rows))]

  def line(name: str, values: dict[int, float]) -> None:
    cells = (f"{values[m]:.2f}" if m in values else "-" for m in rows)
    lines.append(f"| {name} | " + " | ".join(cells) + " |")

  for (mode, form), of_m in ratios.items():
    line(f"{mode}, w {form}", {m: ratio.mean for m, ratio in of_m.items()})
    worst = {m: ratio.worst for m, ratio in of_m.items() if ratio.worst is not None}
    if worst:
      line("slowest shape", worst)
  return "\n".join(lines)


# Colors that are told apart by eyes of every kind, on a ground of their own: the picture is the
# same on light pages and on dark ones.
_INK, _GROUND = "#24292f", "#ffffff"
_COLORS = dict(zip(MODES, ("#0072b2", "#d55e00"), strict=True))


def plot_ratios(path: pathlib.Path, folder: pathlib.Path = FOLDER) -> None:
  """Draws the ratios over the number of rows: a panel a form, a line a mode."""
  figure_class: Callable[..., Any]
  try:
    from matplotlib.figure import Figure as figure_class
  except ImportError:
    raise SystemExit(report.install("matplotlib")) from None
  ratios = _ratios(folder)
  header, _ = read([folder / RATIO_FILES[0]])
  titles = {
    "packed": "w packed: layers of models, mean and range",
    "on the fly": "w quantized in the call: {} {TIMES} {}".format(*GOAL_SHAPE, TIMES=TIMES),
  }
  figure = figure_class(figsize=(9, 3.7), layout="constrained", facecolor=_GROUND)
  panels = figure.subplots(1, len(titles), sharey=True)
  for panel, (form, title) in zip(panels, titles.items(), strict=True):
    panel.axhline(1, color=_INK, linewidth=1.2, linestyle="--")
    for mode, color in _COLORS.items():
      points = ratios[mode, form]
      means = [ratio.mean for ratio in points.values()]
      panel.plot(list(points), means, "o-", color=color, linewidth=2, label=mode)
      if form == "packed":
        spread = zip(*((r.worst, r.best) for r in points.values()), strict=True)
        panel.fill_between(list(points), *spread, color=color, alpha=0.15, linewidth=0)
    sizes = [m for m in ratios[MODES[0], form] if m & (m - 1) == 0]  # others have no room
    panel.set_title(title, color=_INK)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, labels=[str(m) for m in sizes], rotation=60)
    panel.minorticks_off()
    panel.set_xlabel("rows of x", color=_INK)
    panel.grid(alpha=0.3)
    panel.set_facecolor(_GROUND)
    panel.tick_params(colors=_INK)
    panel.legend(loc="upper right", frameon=False)
  panels[0].annotate(
    "cuBLAS, bfloat16", (1, 1), (0, -4), textcoords="offset points", va="top", color=_INK
  )
  panels[0].set_ylim(bottom=0)
  panels[0].set_ylabel("speed relative to bfloat16", color=_INK)
  figure.suptitle(f"{header['device']}, device time", color=_INK)
  figure.savefig(path, dpi=110, metadata={"Software": None})
