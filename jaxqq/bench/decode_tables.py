"""The tables of what `examples/decode.py` measured: its `--show` and the page of kept results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BASE = "bf16"  # the mode that the others are compared with


def tables(models: Sequence[dict[str, Any]]) -> str:
  """Markdown: how fast each model is at each batch; how large and how exact it is.

  Args:
    models: "models" of the JSON that `examples/decode.py --json` writes.
  """
  plain = [m for m in models if m["mode"] == BASE][:1]
  base = {run["batch"]: run for m in plain for run in m["runs"]}
  titles = "model | batch | tokens/s | vs bf16 | ms/token | weights GB/s | prefill ms"
  rows = [titles.split(" | ")]
  for model in models:
    for run in model["runs"]:
      batch, step = run["batch"], run["step_ms"]
      ratio = f"{base[batch]['step_ms'] / step:.2f}x" if batch in base else "-"
      row = (model["name"], f"{batch}", f"{run['tokens_per_s']:.1f}", ratio, f"{step:.3f}")
      rows.append([*row, f"{run['weights_gb_per_s']:.1f}", f"{run['prefill_ms']:.2f}"])
  speeds = _markdown(rows)
  titles = "model | all weights | linear layers and lm head | vs bf16 | logits off by | same tokens"
  rows = [titles.split(" | ")]
  for model in models:
    linear, off = model["linear_bytes"], model["logits_error"]
    part = f"{100 * linear / model['bf16_linear_bytes']:.1f}%"
    of = max(run["batch"] for run in model["runs"])
    exact = ("-", "-") if off is None else (f"{100 * off:.1f}%", f"{model['same_tokens']} of {of}")
    rows.append([model["name"], f"{model['bytes']:,} bytes", f"{linear:,} bytes", part, *exact])
  return f"{speeds}\n\n{_markdown(rows)}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  titles, *lines = (f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
  return "\n".join([titles, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines])
