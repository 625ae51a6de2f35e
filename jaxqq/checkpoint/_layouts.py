"""How each project lays a quantized layer out in tensors: one row a layout, and the way through it.

A layer `X` is some tensors `X.<suffix>`, or others of the names in `_naming.py`. Their codes and
scales are the bytes that `QuantizedWeight` holds, seen as another type; only the global scales are
other numbers than the amax that jaxqq takes, so each layout says how to get from one to the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxqq._formats import FORMATS, Format
from jaxqq._weight import QuantizedWeight
from jaxqq.checkpoint._files import TensorInfo, describe
from jaxqq.checkpoint._naming import LAYER, Naming
from jaxqq.checkpoint._safetensors import DTYPES

F32 = np.float32
LARGEST_NVFP4 = F32(FORMATS["nvfp4"].largest_value)  # 2688: what an amax is mapped to
BLOCK = 16  # bytes of a group of mxfp4, an axis of their own in gpt-oss's files


@dataclasses.dataclass(frozen=True)
class GlobalScales:
  """The float32 scalars of a layer, and what they are of an amax."""

  weight: str
  input: str | None
  shape: tuple[int, ...]
  meaning: str
  to_amax: Callable[[np.ndarray], Any]
  from_amax: Callable[[np.ndarray], Any]
  required: bool = True


@dataclasses.dataclass(frozen=True)
class Layout:
  """The tensors of a layer. Dtypes are safetensors' names, the first being the one written."""

  format: str
  name: str  # what the project calls it
  mode: str
  codes: str
  codes_dtype: str
  scales: str
  scales_dtypes: tuple[str, ...]
  global_scales: GlobalScales | None
  source: str
  in_blocks: bool = False  # the codes of each group on an axis of their own

  @property
  def fmt(self) -> Format:
    return FORMATS[self.mode]

  @property
  def scalars(self) -> dict[str, str]:
    """Fields of `QuantizedWeight` to the suffixes of the scalars that hold them."""
    if self.global_scales is None:
      return {}
    of_input = self.global_scales.input
    return {
      "global_scale": self.global_scales.weight,
      **({} if of_input is None else {"input_global_scale": of_input}),
    }

  @property
  def required(self) -> list[str]:
    """The static scale of the activations is not: a layer may be quantized in its weight only."""
    scales = self.global_scales
    scalars = [scales.weight] if scales is not None and scales.required else []
    return [self.codes, self.scales, *scalars]

  @property
  def bytes_of_group(self) -> int:
    return self.fmt.group_size * self.fmt.bits // 8


MODELOPT_SCALES = GlobalScales(
  *("weight_scale_2", "input_scale", (), "amax / 2688 of an amax"),
  to_amax=lambda scale: LARGEST_NVFP4 * scale,
  from_amax=lambda amax: amax / LARGEST_NVFP4,
)
COMPRESSED_TENSORS_SCALES = GlobalScales(
  *("weight_global_scale", "input_global_scale", (1,), "2688 / amax of an amax"),
  to_amax=lambda scale: LARGEST_NVFP4 / scale,
  from_amax=lambda amax: LARGEST_NVFP4 / amax,
)
# What `mlx.core.dequantize` takes under that name; mlx-lm's layers have none.
MLX_SCALES = GlobalScales(
  *("global_scale", None, (), "an amax"),
  to_amax=lambda scale: scale,
  from_amax=lambda amax: amax,
  required=False,
)

_E4M3, _E8M0 = ("F8_E4M3",), ("U8", "F8_E8M0")
_MLX = "ml-explore/mlx python/mlx/nn/layers/quantized.py, ml-explore/mlx-lm mlx_lm/utils.py"
_QTENSOR = "NVIDIA/Model-Optimizer modelopt/torch/quantization/qtensor/"
_CT = "vllm-project/compressed-tensors src/compressed_tensors/compressors/"
_HF = "huggingface/transformers src/transformers/quantizers/finegrained/"


# fmt: off
LAYOUTS = (
  Layout("mlx", "nvfp4", "nvfp4", "weight", "U32", "scales", ("U8",), MLX_SCALES, _MLX),
  Layout("mlx", "mxfp8", "mxfp8", "weight", "U32", "scales", ("U8",), None, _MLX),
  Layout("mlx", "mxfp4", "mxfp4", "weight", "U32", "scales", ("U8",), None, _MLX),
  Layout("modelopt", "NVFP4", "nvfp4", "weight", "U8", "weight_scale", _E4M3,
         MODELOPT_SCALES, _QTENSOR + "nvfp4_tensor.py"),
  Layout("modelopt", "MXFP8", "mxfp8", "weight", "F8_E4M3", "weight_scale", _E8M0,
         None, _QTENSOR + "mxfp8_tensor.py"),
  Layout("modelopt", "MXFP4", "mxfp4", "weight", "U8", "weight_scale", _E8M0,
         None, _QTENSOR + "mxfp4_tensor.py"),
  Layout("compressed-tensors", "nvfp4-pack-quantized", "nvfp4",
         "weight_packed", "U8", "weight_scale", _E4M3,
         COMPRESSED_TENSORS_SCALES, _CT + "nvfp4/base.py"),
  Layout("compressed-tensors", "mxfp8-quantized", "mxfp8",
         "weight", "F8_E4M3", "weight_scale", _E8M0,
         None, _CT + "mxfp8/base.py"),
  Layout("compressed-tensors", "mxfp4-pack-quantized", "mxfp4",
         "weight_packed", "U8", "weight_scale", _E8M0,
         None, _CT + "mxfp4/base.py"),
  Layout("transformers", "mxfp8", "mxfp8", "weight", "F8_E4M3", "weight_scale_inv", _E8M0,
         None, _HF + "mxfp8.py"),
  Layout("transformers", "mxfp4", "mxfp4", "blocks", "U8", "scales", _E8M0,
         None, _HF + "mxfp4.py", in_blocks=True),
)
# fmt: on
SAVED_FORMATS = tuple(dict.fromkeys(layout.format for layout in LAYOUTS))


def layouts_of(format: str) -> dict[str, Layout]:
  """The rows of a format, by their names."""
  return {row.name: row for row in LAYOUTS if row.format == format}


def layout_of(format: str, mode: str) -> Layout | None:
  return next((row for row in LAYOUTS if (row.format, row.mode) == (format, mode)), None)


@dataclasses.dataclass(frozen=True)
class Form:
  """How the tensors of a layer are stored.

  Attributes:
    naming: what they are called.
    transposed: a stack of matrices (K, N), as a model that multiplies by x @ w holds them.
    paths: those of its matrices, where each is a layer.
    scales_dtype: safetensors' name, where it is not the one that the layout writes.
  """

  naming: Naming = LAYER
  transposed: bool = False
  paths: tuple[str, ...] = ()
  scales_dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
  """The tensors of a quantized layer, by the suffixes of its layout.

  Attributes:
    name: what its weight is called among the tensors that `load` returns.
    path: what the configuration calls the layer.
    weight_only: the activations are left as they are.
    form: what its tensors are called, and how their axes are.
  """

  name: str
  path: str
  layout: Layout
  tensors: dict[str, TensorInfo]
  form: Form = Form()
  weight_only: bool = False

  def expected(self, suffix: str) -> str:
    """What its tensor of a suffix is called, were it there."""
    return self.form.naming.tensor(self.path, suffix)

  @property
  def parts(self) -> dict[str, TensorInfo]:
    wanted = (*self.layout.required, *self.layout.scalars.values())
    return {suffix: self.tensors[suffix] for suffix in wanted if suffix in self.tensors}

  def shape(self, suffix: str) -> tuple[int, ...]:
    """Of codes or scales, with the axis of groups last and no axis within a group."""
    shape = self.tensors[suffix].shape
    if self.layout.in_blocks and suffix == self.layout.codes and len(shape) >= 3:
      shape = (*shape[:-2], shape[-2] * shape[-1])
    return (*shape[:-2], shape[-1], shape[-2]) if self.form.transposed else shape

  @property
  def batch_shape(self) -> tuple[int, ...]:
    return self.shape(self.layout.codes)[:-2]


def is_transposed(codes: TensorInfo, scales: TensorInfo) -> bool:
  """Whether groups run along the axis before the last, as the two shapes say."""
  if len(codes.shape) != 3 or len(scales.shape) != 3:
    return False
  return codes.shape[-2] != scales.shape[-2] and codes.shape[-1] == scales.shape[-1]


def check_layer(layer: Layer, config: Any) -> None:
  """Every tensor of the layer is there, with the dtype and the shape that belong together.

  config: the file that says how layers are quantized.
  """
  layout, tensors = layer.layout, layer.tensors
  for suffix in layout.required:
    if suffix not in tensors:
      where = next((tensor.file for tensor in tensors.values()), config.parent)
      found = ", ".join(sorted(tensor.name for tensor in tensors.values()))
      found = found or f"no tensor of that layer, which {config.name} names"
      raise ValueError(
        f"load: {where}: tensor {layer.expected(suffix)!r} is missing; {layout.format} "
        f"{layout.name} needs it, found {found}."
      )
  if "weight" in tensors and layout.codes != "weight":
    raise ValueError(
      f"load: {tensors['weight'].file}: expected one weight of layer {layer.path!r}, found both "
      f"{tensors['weight'].name!r} and {tensors[layout.codes].name!r}."
    )
  codes, fmt = tensors[layout.codes], layout.fmt
  itemsize = DTYPES[layout.codes_dtype].itemsize
  group_size = layout.bytes_of_group // itemsize  # of stored elements
  shape = layer.shape(layout.codes)
  right = len(shape) >= 2 and shape[-1] % group_size == 0
  if layout.in_blocks:
    right = len(codes.shape) >= 3 and codes.shape[-1] == BLOCK
  if codes.dtype != layout.codes_dtype or not right:
    expected = f"(N, K * {fmt.bits} / {8 * itemsize}), K a multiple of {fmt.group_size}"
    if layout.in_blocks:
      expected = f"(N, K / {fmt.group_size}, {BLOCK}) with leading axes of experts"
    raise _mismatch(codes, layout, f"{layout.codes_dtype} of shape {expected}")
  scales = tensors[layout.scales]
  wanted = (*shape[:-1], shape[-1] // group_size)
  if scales.dtype not in layout.scales_dtypes or layer.shape(layout.scales) != wanted:
    wanted = (*wanted[:-2], wanted[-1], wanted[-2]) if layer.form.transposed else wanted
    raise _mismatch(scales, layout, f"{' or '.join(layout.scales_dtypes)} of shape {wanted}")
  for suffix in layout.scalars.values():
    scalar = tensors.get(suffix)
    if scalar is not None and (scalar.dtype != "F32" or not _is_of_each(layer, scalar.shape)):
      one = "F32 of one element" + (" or one a matrix" if layer.batch_shape else "")
      raise _mismatch(scalar, layout, one)


def _is_of_each(layer: Layer, shape: tuple[int, ...]) -> bool:
  """One element, or one for each matrix of a stack, with axes of size 1 behind."""
  batch = layer.batch_shape
  behind = shape[len(batch) :]
  return math.prod(shape) == 1 or (shape[: len(batch)] == batch and math.prod(behind) == 1)


def _mismatch(found: TensorInfo, layout: Layout, expected: str) -> ValueError:
  return ValueError(
    f"load: {found.file}: tensor {found.name!r} must be {expected} in {layout.format} "
    f"{layout.name}, found {describe(found)}."
  )


def read_codes(
  layer: Layer, read: Callable[[TensorInfo], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """packed and scales of `QuantizedWeight`: the bytes of the files, in their places."""
  out = []
  for suffix, dtype in ((layer.layout.codes, np.uint32), (layer.layout.scales, np.uint8)):
    stored = read(layer.tensors[suffix])
    if stored.dtype.itemsize == 1:
      stored = stored.view(np.uint8)
    if layer.layout.in_blocks and suffix == layer.layout.codes:
      stored = stored.reshape(*stored.shape[:-2], -1)
    if layer.form.transposed:
      stored = np.swapaxes(stored, -1, -2)
    out.append(np.ascontiguousarray(stored).view(dtype))
  return out[0], out[1]


def written_codes(weight: QuantizedWeight, layout: Layout, form: Form) -> dict[str, np.ndarray]:
  """The tensors of codes and scales by suffix: the inverse of `read_codes`."""
  packed = np.asarray(weight.packed, order="C").view(DTYPES[layout.codes_dtype])
  scales_dtype = form.scales_dtype or layout.scales_dtypes[0]
  scales = np.asarray(weight.scales, order="C").view(DTYPES[scales_dtype])
  if layout.in_blocks:
    packed = packed.reshape(*packed.shape[:-1], -1, BLOCK)
  if form.transposed:
    packed, scales = (np.ascontiguousarray(np.swapaxes(a, -1, -2)) for a in (packed, scales))
  return {layout.codes: packed, layout.scales: scales}
