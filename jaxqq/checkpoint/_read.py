"""What a layer's tensors become, in numpy: the fields of a `QuantizedWeight`, or numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxqq.checkpoint._dense import DenseLayer, read_affine, read_as_mxfp8, read_fp8
from jaxqq.checkpoint._files import QUANTIZE_INPUT, Recorded, TensorInfo
from jaxqq.checkpoint._layouts import Layer, read_codes
from jaxqq.checkpoint._scalars import Scalars, is_calibration, read_scalars, to_amax


@dataclasses.dataclass(frozen=True)
class Loaded:
  """One name's value.

  Attributes:
    fields: the arguments of `QuantizedWeight`; None for an array.
    array: of a layer that comes dequantized.
    stored: the scalars as the files have them, by field.
    uncalibrated: a tensor of static scales of the activations, and one that is no calibration.
  """

  fields: dict[str, Any] | None = None
  array: np.ndarray | None = None
  stored: Scalars = dataclasses.field(default_factory=dict)
  uncalibrated: tuple[TensorInfo, np.ndarray] | None = None


def read_dense(
  layer: DenseLayer,
  read: Callable[[TensorInfo], np.ndarray],
  dtype: np.dtype,
  fp8: str,
) -> Loaded:
  """fp8: what `load` was told."""
  if layer.dense.kind == "affine":
    return Loaded(array=read_affine(layer, read, dtype))
  if fp8 == "mxfp8" and (arrays := read_as_mxfp8(layer, read)) is not None:
    packed, scales = arrays
    return Loaded({"packed": packed, "scales": scales, "mode": "mxfp8", "dtype": dtype})
  return Loaded(array=read_fp8(layer, read, dtype))


def read_packed(
  layer: Layer,
  read: Callable[[TensorInfo], np.ndarray],
  recorded: Recorded,
  dtype: np.dtype,
) -> Loaded:
  """recorded: what the files' metadata says of each amax and of inputs, by layer."""
  packed, scales = read_codes(layer, read)
  of_layer = recorded.get(layer.path, {})
  amax, stored = read_scalars(layer, read, of_layer, packed, scales)
  fields = {"packed": packed, "scales": scales, "mode": layer.layout.mode, "dtype": dtype, **amax}
  fields["quantize_input"] = not layer.weight_only or of_layer.get(QUANTIZE_INPUT) == 1
  left = None
  if (field := "input_global_scale") in stored.keys() - amax.keys():
    scalars = stored[field].ravel()
    wrong = ~is_calibration(to_amax(layer.layout, scalars))
    left = layer.tensors[layer.layout.scalars[field]], scalars[wrong][0]
  return Loaded(fields, stored=stored, uncalibrated=left)
