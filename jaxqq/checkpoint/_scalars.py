"""The global scales of a layer: the scalars of its files and the amax that jaxqq takes, both ways.

A scalar s and its amax, 2688 s or 2688 / s, do not determine each other in float32: either may have
more values in some range than the other. So a scalar that still stands for the amax is written
again, and an amax that is another than that of its scalar goes into the metadata of the file.
A stack of matrices has one of each for all, or one for each matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxqq._formats import Format
from jaxqq._weight import QuantizedWeight
from jaxqq.checkpoint._files import TensorInfo
from jaxqq.checkpoint._layouts import F32, LARGEST_NVFP4, Layer, Layout

Scalars = dict[str, np.ndarray]  # by the field of `QuantizedWeight`


def read_scalars(
  layer: Layer,
  read: Callable[[TensorInfo], np.ndarray],
  recorded: dict[str, float],
  packed: np.ndarray,
  scales: np.ndarray,
) -> tuple[Scalars, Scalars]:
  """The amax of each field, and the scalars as they were stored.

  A static scale of the activations that is no calibration is not among the first.

  recorded: what the file's metadata says each amax was, which holds where it gives the scalar.
  """
  layout, batch = layer.layout, layer.batch_shape
  stored, amax = {}, {}
  for field, suffix in layout.scalars.items():
    if suffix in layer.tensors:
      scalar = read(layer.tensors[suffix])
      stored[field] = scalar
      amax[field] = _amax(layout, to_matrices(scalar, batch), field, recorded)
      _check_amax(field, amax[field], scalar, layer.tensors[suffix], layout)
  if "input_global_scale" in amax and not is_calibration(amax["input_global_scale"]).all():
    del amax["input_global_scale"]
  if "global_scale" in amax:
    wrong = (amax["global_scale"] == 0) & ~is_all_zeros(packed, scales, layout.fmt)
    if wrong.any():
      tensor = layer.tensors[layout.scalars["global_scale"]]
      found = np.broadcast_to(to_matrices(stored["global_scale"], batch), wrong.shape)[wrong][0]
      raise ValueError(
        f"load: {tensor.file}: tensor {tensor.name!r} must be {_meaning(layout)}, found {found}, "
        "the amax of zeros, beside codes and scales that are not zeros."
      )
  return amax, stored


def to_matrices(scalar: np.ndarray, batch: tuple[int, ...]) -> np.ndarray:
  return scalar.reshape(() if scalar.size == 1 else batch)


def _key(field: str, i: int, batch: tuple[int, ...]) -> str:
  """Of a matrix's amax in the metadata of a file."""
  return f"{field}[{i}]" if batch else field


def _amax(layout: Layout, scalar: np.ndarray, field: str, recorded: dict[str, float]) -> np.ndarray:
  """What the metadata says it was, where that gives the scalar, and what the scalar gives."""
  amax = to_amax(layout, scalar)
  for i in range(scalar.size):
    exact = np.asarray(recorded.get(_key(field, i, scalar.shape), np.nan), F32)
    if from_amax(layout, exact).tobytes() == scalar.ravel()[i].tobytes():
      amax.ravel()[i] = exact
  return amax


def is_calibration(amax: np.ndarray) -> np.ndarray:
  """Whether each amax of activations was measured.

  Calibration that never reached a layer, or saw zeros only, leaves an amax of 0 or infinity, or
  what a tool puts in place of 0: at most float32's smallest normal number, as amax / 2688.
  """
  return np.asarray((LARGEST_NVFP4 * np.finfo(F32).tiny < amax) & (amax < np.inf))


def is_all_zeros(packed: np.ndarray, scales: np.ndarray, fmt: Format) -> np.ndarray:
  """Whether every code of a matrix or its scale is zero, of either sign."""
  magnitude = (1 << (fmt.bits - 1)) - 1
  mask = np.uint32(sum(magnitude << (fmt.bits * i) for i in range(fmt.codes_per_word)))
  words = fmt.group_size // fmt.codes_per_word
  has_codes = ((packed & mask) != 0).reshape(*scales.shape, words).any(-1)
  scale = scales & 0x7F
  return ~np.asarray(((has_codes & (scale != 0)) | (scale == fmt.scale_nan)).any((-2, -1)))


def _check_amax(
  field: str, amax: np.ndarray, scalar: np.ndarray, tensor: TensorInfo, layout: Layout
) -> None:
  """Not NaN, not negative, and finite where it scales the weight."""
  largest = np.finfo(F32).max if field == "global_scale" else np.inf
  right = (scalar.ravel() >= 0) & (amax.ravel() >= 0) & (amax.ravel() <= largest)
  if not right.all():
    raise ValueError(
      f"load: {tensor.file}: tensor {tensor.name!r} must be {_meaning(layout)}, found "
      f"{scalar.ravel()[~right][0]}."
    )


def _meaning(layout: Layout) -> str:
  scales = layout.global_scales
  return (
    f"{scales.meaning}, finite and not negative, in {layout.format} "  # type: ignore[union-attr]
    f"{layout.name}"
  )


def to_amax(layout: Layout, scalar: np.ndarray) -> np.ndarray:
  return _converted(layout.global_scales.to_amax, scalar)  # type: ignore[union-attr]


def from_amax(layout: Layout, amax: np.ndarray) -> np.ndarray:
  return _converted(layout.global_scales.from_amax, amax)  # type: ignore[union-attr]


@np.errstate(all="ignore")  # the amax of a weight of zeros has no finite reciprocal
def _converted(convert: Callable[[np.ndarray], Any], scalar: np.ndarray) -> np.ndarray:
  return np.asarray(convert(scalar + F32(0)), F32)  # -0 is 0


def written_scalars(
  name: str, weight: QuantizedWeight, layout: Layout, stored: Scalars, weight_only: bool = False
) -> tuple[Scalars, dict[str, float]]:
  """The tensors of the global scales by suffix, and each amax that `load` could not tell from them.

  Where `stored`, what a file of this format held, still stands for the weight's amax, it is written
  again. A scale of the activations that `load` left out, since it is no calibration, is written
  again beside the global scale that it was stored with.

  weight_only: the activations are not to be quantized, so no scale of them is made up.
  """
  out, recorded = {}, {}
  amax_of_fields = _amax_of_fields(name, weight, layout, stored, weight_only)
  for field, amax in amax_of_fields.items():
    if not ((amax >= 0) & (amax <= np.finfo(F32).max)).all():
      raise ValueError(
        f"save: {name!r} must have a {field} that is an amax, finite and not negative, got {amax}."
      )
    scalar = _scalar_of(amax, stored.get(field), layout)
    again = np.broadcast_to(to_amax(layout, to_matrices(scalar, amax.shape)), amax.shape)
    lost = again.ravel().view(np.uint32) != amax.ravel().view(np.uint32)
    for i in np.flatnonzero(lost).tolist():
      recorded[_key(field, i, amax.shape)] = float(amax.ravel()[i])
    out[layout.scalars[field]] = scalar
  _check_zero(name, weight, layout, amax_of_fields.get("global_scale"))
  suffix, left = layout.scalars.get("input_global_scale"), stored.get("input_global_scale")
  if suffix is not None and left is not None and suffix not in out:
    beside = out[layout.scalars["global_scale"]].tobytes()
    same_weight = beside == stored["global_scale"].tobytes()
    if same_weight and not is_calibration(to_amax(layout, left)).all():
      out[suffix] = left
  return out, recorded


def _scalar_of(amax: np.ndarray, stored: np.ndarray | None, layout: Layout) -> np.ndarray:
  """What was stored, where it still stands for the amax, and otherwise what the amax gives."""
  one = layout.global_scales.shape  # type: ignore[union-attr]
  if stored is None or stored.size not in (1, amax.size):
    return from_amax(layout, amax).reshape(amax.shape or one)
  old = np.broadcast_to(to_matrices(stored, amax.shape), amax.shape)
  stands = to_amax(layout, old).view(np.uint32) == amax.view(np.uint32)
  if stands.all():
    return stored
  return np.where(stands, old, from_amax(layout, amax)).reshape(amax.shape or one)


def _check_zero(
  name: str, weight: QuantizedWeight, layout: Layout, amax: np.ndarray | None
) -> None:
  if amax is None or (amax != 0).all():
    return
  packed, scales = (np.asarray(a, order="C") for a in (weight.packed, weight.scales))
  if ((amax == 0) & ~is_all_zeros(packed, scales, layout.fmt)).any():
    raise ValueError(
      f"save: {name!r} must have a positive global_scale, the amax of the weight, got 0 beside "
      "codes and scales that are not zeros."
    )


def converted(stored: Scalars, layout: Layout | None, to: Layout) -> Scalars:
  """Scalars as they were stored in a layout, as another one stores them."""
  if layout is None or layout.format == to.format or not to.scalars:
    return stored
  one = to.global_scales.shape  # type: ignore[union-attr]
  return {
    field: from_amax(to, to_amax(layout, scalar)).reshape(one if scalar.size == 1 else scalar.shape)
    for field, scalar in stored.items()
  }


def _amax_of_fields(
  name: str, weight: QuantizedWeight, layout: Layout, stored: Scalars, weight_only: bool
) -> Scalars:
  """The amax of each field that the layout writes.

  A weight without a global scale has the same bits as one with 2688, and an activation that is
  quantized without one, too.
  """
  given = {
    field: np.asarray(value)
    for field in ("global_scale", "input_global_scale")
    if (value := getattr(weight, field)) is not None
  }
  given = {field: _of_each_matrix(name, field, a, weight, layout) for field, a in given.items()}
  scales = layout.global_scales
  if scales is not None and not scales.required:  # there where the files had it
    known = layout.scalars.keys() & stored.keys()
    rest = {field: value for field, value in given.items() if field not in known}
  else:
    known, rest = set(layout.scalars), {} if layout.scalars else given
  if any((value != LARGEST_NVFP4).any() for value in rest.values()):
    raise ValueError(
      f"save: {name!r} has a global scale, for which {layout.format} {layout.name} has no "
      "tensor; save it as 'modelopt' or 'compressed-tensors', or quantize with global_scale=None."
    )
  given = {field: value for field, value in given.items() if field in known}
  if scales is not None and scales.required and "global_scale" not in given:
    fields = [field for field in layout.scalars if field == "global_scale" or not weight_only]
    ones = np.full(weight.shape[:-2], LARGEST_NVFP4, F32)
    given = dict.fromkeys(fields, ones) | given
  return given


def _of_each_matrix(
  name: str, field: str, amax: np.ndarray, weight: QuantizedWeight, layout: Layout
) -> np.ndarray:
  """An amax of each row, as concatenated weights have it, as that of its matrix."""
  batch = weight.shape[:-2]
  if amax.shape == batch:
    return amax
  of_rows = amax.reshape(*batch, -1)
  if not of_rows.size:
    return np.zeros(batch, F32)
  if (of_rows != of_rows[..., :1]).any():
    raise ValueError(
      f"save: {name!r} has a {field} for each row, and {layout.format} {layout.name} holds one a "
      "matrix; save its parts, slices of its rows, under a name each."
    )
  return of_rows[..., 0]
