"""What became of each layer of a model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqq._formats import Mode
from jaxqq._weight import QuantizedWeight
from jaxqq.nn.kernel import KernelAxes

# What is not multiplied by a matrix, by the names of layers in Flax.
NO_PRODUCT = {
  "Embed": "rows are looked up, not multiplied",
  "Conv": "a convolution is no qqmm",
  "ConvTranspose": "a convolution is no qqmm",
  **dict.fromkeys(
    ("LayerNorm", "RMSNorm", "BatchNorm", "GroupNorm", "InstanceNorm", "PReLU"),
    "its parameters are multiplied element by element",
  ),
}


# Of normal numbers nvfp4 loses 0.10 of the norm and mxfp8 0.03, at any size in reach of the scales.
LOSSY = 0.2


@dataclasses.dataclass(frozen=True)
class LayerReport:
  """One layer: what it is, and whether and how it was converted.

  Attributes:
    path: where it is in the model, as "blocks.0.attention.query".
    kind: its class before.
    shape: that of its kernel (or of its largest parameter).
    mode: that it was converted to; None where it was not.
    reason: why it was not converted; None where it was.
    bytes_before: those of its parameters.
    bytes_after: the same after the conversion.
    relative_error: ||w_hat - w|| / ||w|| of the kernel; None where it is not converted, or has no
      numbers yet.
  """

  path: str
  kind: str
  shape: tuple[int, ...]
  mode: Mode | None
  reason: str | None
  bytes_before: int
  bytes_after: int
  relative_error: float | None = None

  @property
  def converted(self) -> bool:
    return self.mode is not None

  @property
  def lossy(self) -> bool:
    """Whether it lost more than a fifth of its kernel."""
    error = self.relative_error
    return error is not None and not error <= LOSSY


@dataclasses.dataclass(frozen=True)
class Report:
  """What `quantize_model` and `quantize_params` did: a row for each layer, and a table as str.

  A layer that lost much is marked, and a sentence below the table says what to do.
  """

  layers: tuple[LayerReport, ...]
  note: str = ""  # what to do with the result

  @property
  def converted(self) -> tuple[LayerReport, ...]:
    return tuple(layer for layer in self.layers if layer.converted)

  @property
  def not_converted(self) -> tuple[LayerReport, ...]:
    return tuple(layer for layer in self.layers if not layer.converted)

  @property
  def lossy(self) -> tuple[LayerReport, ...]:
    """Layers that lost more than a fifth of their kernels."""
    return tuple(layer for layer in self.layers if layer.lossy)

  @property
  def bytes_before(self) -> int:
    return sum(layer.bytes_before for layer in self.layers)

  @property
  def bytes_after(self) -> int:
    return sum(layer.bytes_after for layer in self.layers)

  def __iter__(self) -> Iterator[LayerReport]:
    return iter(self.layers)

  def __len__(self) -> int:
    return len(self.layers)

  def __getitem__(self, path: str) -> LayerReport:
    for layer in self.layers:
      if layer.path == path:
        return layer
    raise KeyError(path)

  def __str__(self) -> str:
    header = ("layer", "kind", "kernel", "mode", "bytes before", "after", "error", "not converted")
    rows = [header, *(_row(layer) for layer in self.layers)]
    total = f"{len(self.converted)} of {len(self.layers)} converted"
    rows.append((total, "", "", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(_aligned, row, widths, range(len(row)))).rstrip() for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *self._advice()])

  def _advice(self) -> list[str]:
    notes = [self.note] if self.note else []
    if not self.lossy:
      return notes
    first = self.lossy[0].path or "the model"
    others = f" and {len(self.lossy) - 1} more" if len(self.lossy) > 1 else ""
    return [
      *notes,
      f"! {first}{others} lost more than {LOSSY:.0%} of the kernel: without a global scale nvfp4 "
      'does not reach small numbers, so give global_scale="weight"; or use mode "mxfp8" for such '
      "layers, or leave them out, by predicate.",
    ]


def _row(layer: LayerReport) -> tuple[str, ...]:
  error = layer.relative_error
  return (
    layer.path or "(the model)",
    layer.kind,
    "x".join(map(str, layer.shape)),
    layer.mode or "-",
    f"{layer.bytes_before:,}",
    f"{layer.bytes_after:,}",
    "-" if error is None else f"{error:.4f}" + "!" * layer.lossy,
    layer.reason or "",
  )


def _aligned(cell: str, width: int, column: int) -> str:
  return cell.rjust(width) if 4 <= column <= 6 else cell.ljust(width)


def num_bytes(tree: Any) -> int:
  """Those of all arrays in a tree, or of what stands for them."""
  return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))


def relative_error(kernel: Any, weight: QuantizedWeight, axes: KernelAxes) -> float | None:
  """||w_hat - w|| / ||w||, None where there are no numbers."""
  leaves = jax.tree.leaves((kernel, weight))
  if any(isinstance(a, (jax.core.Tracer, jax.ShapeDtypeStruct)) for a in leaves):
    return None
  return float(_relative_error(kernel, weight, axes))


@functools.partial(jax.jit, static_argnames="axes")
def _relative_error(kernel: jax.Array, weight: QuantizedWeight, axes: KernelAxes) -> jax.Array:
  w = axes.as_matrices(kernel).astype(jnp.float32)
  scale = jnp.max(jnp.abs(w), initial=0)
  scale = jnp.where(scale > 0, scale, 1)  # squares neither overflow nor vanish
  difference = (weight.dequantize(jnp.float32) - w) / scale
  norm = jnp.linalg.norm(w / scale)
  return jnp.linalg.norm(difference) / jnp.where(norm > 0, norm, 1)
