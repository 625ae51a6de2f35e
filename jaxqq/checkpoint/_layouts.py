"""How each project lays a quantized layer out in tensors: one row a layout, and the way through it.

A layer `X` is some tensors `X.<suffix>`. Their codes and scales are the bytes that
`QuantizedWeight` holds, seen as another type; only the global scales are other numbers than the
amax that jaxqq takes, so each layout says how to get from one to the other.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxqq._formats import FORMATS, Format
from jaxqq._weight import QuantizedWeight
from jaxqq.checkpoint._files import TensorInfo, describe
from jaxqq.checkpoint._safetensors import DTYPES

F32 = np.float32
LARGEST_NVFP4 = F32(FORMATS["nvfp4"].largest_value)  # 2688: what an amax is mapped to


@dataclasses.dataclass(frozen=True)
class GlobalScales:
  """The float32 scalars of a layer, and what they are of an amax."""

  weight: str
  input: str
  shape: tuple[int, ...]
  meaning: str
  to_amax: Callable[[np.ndarray], Any]
  from_amax: Callable[[np.ndarray], Any]


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

  @property
  def fmt(self) -> Format:
    return FORMATS[self.mode]

  @property
  def scalars(self) -> dict[str, str]:
    """Fields of `QuantizedWeight` to the suffixes of the scalars that hold them."""
    if self.global_scales is None:
      return {}
    return {
      "global_scale": self.global_scales.weight,
      "input_global_scale": self.global_scales.input,
    }

  @property
  def required(self) -> list[str]:
    """The static scale of the activations is not: a layer may be quantized in its weight only."""
    scalars = [self.global_scales.weight] if self.global_scales is not None else []
    return [self.codes, self.scales, *scalars]


MODELOPT_SCALES = GlobalScales(
  *("weight_scale_2", "input_scale", (), "amax / 2688"),
  to_amax=lambda scale: LARGEST_NVFP4 * scale,
  from_amax=lambda amax: amax / LARGEST_NVFP4,
)
COMPRESSED_TENSORS_SCALES = GlobalScales(
  *("weight_global_scale", "input_global_scale", (1,), "2688 / amax"),
  to_amax=lambda scale: LARGEST_NVFP4 / scale,
  from_amax=lambda amax: LARGEST_NVFP4 / amax,
)

_E4M3, _E8M0 = ("F8_E4M3",), ("U8", "F8_E8M0")
_MLX = "ml-explore/mlx python/mlx/nn/layers/quantized.py, ml-explore/mlx-lm mlx_lm/utils.py"
_QTENSOR = "NVIDIA/Model-Optimizer modelopt/torch/quantization/qtensor/"
_CT = "vllm-project/compressed-tensors src/compressed_tensors/compressors/"


# fmt: off
LAYOUTS = (
  Layout("mlx", "nvfp4", "nvfp4", "weight", "U32", "scales", ("U8",), None, _MLX),
  Layout("mlx", "mxfp8", "mxfp8", "weight", "U32", "scales", ("U8",), None, _MLX),
  Layout("mlx", "mxfp4", "mxfp4", "weight", "U32", "scales", ("U8",), None, _MLX),
  Layout("modelopt", "NVFP4", "nvfp4", "weight", "U8", "weight_scale", _E4M3,
         MODELOPT_SCALES, _QTENSOR + "nvfp4_tensor.py"),
  Layout("modelopt", "MXFP8", "mxfp8", "weight", "F8_E4M3", "weight_scale", _E8M0,
         None, _QTENSOR + "mxfp8_tensor.py"),
  Layout("compressed-tensors", "nvfp4-pack-quantized", "nvfp4",
         "weight_packed", "U8", "weight_scale", _E4M3,
         COMPRESSED_TENSORS_SCALES, _CT + "nvfp4/base.py"),
  Layout("compressed-tensors", "mxfp8-quantized", "mxfp8",
         "weight", "F8_E4M3", "weight_scale", _E8M0,
         None, _CT + "mxfp8/base.py"),
)
# fmt: on
SAVED_FORMATS = tuple(dict.fromkeys(layout.format for layout in LAYOUTS))


def layout_of(format: str, mode: str) -> Layout | None:
  return next((row for row in LAYOUTS if (row.format, row.mode) == (format, mode)), None)


def check_layer(
  layer: str, tensors: dict[str, TensorInfo], layout: Layout, config: pathlib.Path
) -> None:
  """Every tensor of the layer is there, with the dtype and the shape that belong together.

  Args:
    layer: its path.
    tensors: what the files hold under that path, by suffix.
    layout: the row of `LAYOUTS`.
    config: the file that says how layers are quantized.
  """
  for suffix in layout.required:
    if suffix not in tensors:
      where = next((tensor.file for tensor in tensors.values()), config.parent)
      found = ", ".join(f"{layer}.{name}" for name in sorted(tensors))
      found = found or f"no tensor of that layer, which {config.name} names"
      raise ValueError(
        f"load: {where}: tensor '{layer}.{suffix}' is missing; {layout.format} {layout.name} needs "
        f"it, found {found}."
      )
  if "weight" in tensors and layout.codes != "weight":
    raise ValueError(
      f"load: {tensors['weight'].file}: expected one weight of layer {layer!r}, found both "
      f"'{layer}.weight' and '{layer}.{layout.codes}'."
    )
  codes, fmt = tensors[layout.codes], layout.fmt
  itemsize = DTYPES[layout.codes_dtype].itemsize
  group_size = fmt.group_size * fmt.bits // (8 * itemsize)  # of stored elements
  right = len(codes.shape) >= 2 and codes.shape[-1] % group_size == 0
  if codes.dtype != layout.codes_dtype or not right:
    raise _mismatch(
      codes, layout, f"{layout.codes_dtype} of shape (N, K * {fmt.bits} / {8 * itemsize}), K a "
      f"multiple of {fmt.group_size}"
    )  # fmt: skip
  scales = tensors[layout.scales]
  shape = (*codes.shape[:-1], codes.shape[-1] // group_size)
  if scales.dtype not in layout.scales_dtypes or scales.shape != shape:
    raise _mismatch(scales, layout, f"{' or '.join(layout.scales_dtypes)} of shape {shape}")
  for suffix in layout.scalars.values():
    scalar = tensors.get(suffix)
    if scalar is not None and (scalar.dtype != "F32" or any(size != 1 for size in scalar.shape)):
      raise _mismatch(scalar, layout, "F32 of one element")


def _mismatch(found: TensorInfo, layout: Layout, expected: str) -> ValueError:
  return ValueError(
    f"load: {found.file}: tensor {found.name!r} must be {expected} in {layout.format} "
    f"{layout.name}, found {describe(found)}."
  )


def read_layer(
  tensors: dict[str, TensorInfo],
  layout: Layout,
  read: Callable[[TensorInfo], np.ndarray],
  recorded: dict[str, float],
  dtype: np.dtype,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The arguments of `QuantizedWeight` in numpy, and its scalars as they were stored.

  A static scale of the activations that is no calibration is not among the arguments.

  recorded: what the file's metadata says each amax was, which holds where it gives the scalar.
  """
  packed = read(tensors[layout.codes]).view(np.uint32)
  scales = read(tensors[layout.scales]).view(np.uint8)
  stored = {
    field: read(tensors[suffix]).reshape(())
    for field, suffix in layout.scalars.items()
    if suffix in tensors
  }
  amax = {field: to_amax(layout, scalar) for field, scalar in stored.items()}
  for field in recorded.keys() & stored.keys():
    exact = np.asarray(recorded[field], F32)
    if from_amax(layout, exact).tobytes() == stored[field].tobytes():
      amax[field] = exact
  for field, suffix in layout.scalars.items():
    if field in stored:
      _check_amax(field, amax[field], stored[field], tensors[suffix], layout)
  if "input_global_scale" in amax and not is_calibration(amax["input_global_scale"]):
    del amax["input_global_scale"]
  if amax.get("global_scale") == 0 and not is_all_zeros(packed, scales, layout.fmt):
    tensor = tensors[layout.scalars["global_scale"]]
    raise ValueError(
      f"load: {tensor.file}: tensor {tensor.name!r} must be {_meaning(layout)}, found "
      f"{stored['global_scale']}, the amax of zeros, beside codes and scales that are not zeros."
    )
  return {"packed": packed, "scales": scales, "mode": layout.mode, "dtype": dtype, **amax}, stored


def is_calibration(amax: np.ndarray) -> bool:
  """Whether an amax of activations was measured.

  Calibration that never reached a layer, or saw zeros only, leaves an amax of 0 or infinity, or
  what a tool puts in place of 0: at most float32's smallest normal number, as amax / 2688.
  """
  return bool(LARGEST_NVFP4 * np.finfo(F32).tiny < amax < np.inf)


def is_all_zeros(packed: np.ndarray, scales: np.ndarray, fmt: Format) -> bool:
  """Whether every code or its scale is zero, of either sign."""
  magnitude = (1 << (fmt.bits - 1)) - 1
  mask = np.uint32(sum(magnitude << (fmt.bits * i) for i in range(fmt.codes_per_word)))
  has_codes = ((packed & mask) != 0).reshape(*scales.shape, -1).any(-1)
  scale = scales & 0x7F
  return not ((has_codes & (scale != 0)) | (scale == fmt.scale_nan)).any()


def _check_amax(
  field: str, amax: np.ndarray, scalar: np.ndarray, tensor: TensorInfo, layout: Layout
) -> None:
  """Not NaN, not negative, and finite where it scales the weight."""
  largest = np.finfo(F32).max if field == "global_scale" else np.inf
  if not (scalar >= 0 and 0 <= amax <= largest):
    raise ValueError(
      f"load: {tensor.file}: tensor {tensor.name!r} must be {_meaning(layout)}, found {scalar}."
    )


def _meaning(layout: Layout) -> str:
  scales = layout.global_scales
  return (
    f"{scales.meaning} of an amax, finite and not negative, in {layout.format} "  # type: ignore[union-attr]
    f"{layout.name}"
  )


def to_amax(layout: Layout, scalar: np.ndarray) -> np.ndarray:
  return _converted(layout.global_scales.to_amax, scalar)  # type: ignore[union-attr]


def from_amax(layout: Layout, amax: np.ndarray) -> np.ndarray:
  return _converted(layout.global_scales.from_amax, amax)  # type: ignore[union-attr]


@np.errstate(all="ignore")  # the amax of a weight of zeros has no finite reciprocal
def _converted(convert: Callable[[np.ndarray], Any], scalar: np.ndarray) -> np.ndarray:
  return np.asarray(convert(scalar + F32(0)), F32)  # -0 is 0


def written_codes(weight: QuantizedWeight, layout: Layout) -> dict[str, np.ndarray]:
  """The tensors of codes and scales by suffix: the inverse of `read_layer`."""
  packed = np.asarray(weight.packed, order="C")
  scales = np.asarray(weight.scales, order="C")
  return {
    layout.codes: packed.view(DTYPES[layout.codes_dtype]),
    layout.scales: scales.view(DTYPES[layout.scales_dtypes[0]]),
  }


def written_scalars(
  name: str, weight: QuantizedWeight, layout: Layout, stored: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """The tensors of the global scales by suffix, and each amax that `load` could not tell from them.

  A scalar s and its amax, 2688 s or 2688 / s, do not determine each other in float32: either may
  have more values in some range than the other. So where `stored`, what a file of this format held,
  still stands for the weight's amax, it is written again; and an amax that is another than that of
  its s goes into the metadata of the file. A scale of the activations that `load` left out, since
  it is no calibration, is written again beside the global scale that it was stored with.
  """
  out, recorded = {}, {}
  amax_of_fields = _amax_of_fields(name, weight, layout)
  for field, amax in amax_of_fields.items():
    if not 0 <= amax <= np.finfo(F32).max:
      raise ValueError(
        f"save: {name!r} must have a {field} that is an amax, finite and not negative, got {amax}."
      )
    scalar = stored.get(field)
    if scalar is None or to_amax(layout, scalar).tobytes() != amax.tobytes():
      scalar = from_amax(layout, amax)
    if to_amax(layout, scalar).tobytes() != amax.tobytes():
      recorded[field] = float(amax)
    out[layout.scalars[field]] = scalar.reshape(layout.global_scales.shape)  # type: ignore[union-attr]
  if amax_of_fields.get("global_scale") == 0:
    packed, scales = (np.asarray(a, order="C") for a in (weight.packed, weight.scales))
    if not is_all_zeros(packed, scales, layout.fmt):
      raise ValueError(
        f"save: {name!r} must have a positive global_scale, the amax of the weight, got 0 beside "
        "codes and scales that are not zeros."
      )
  suffix, scalar = layout.scalars.get("input_global_scale"), stored.get("input_global_scale")
  if suffix is not None and scalar is not None and suffix not in out:
    beside = out[layout.scalars["global_scale"]].tobytes()
    same_weight = beside == stored["global_scale"].tobytes()
    if same_weight and not is_calibration(to_amax(layout, scalar)):
      out[suffix] = scalar.reshape(layout.global_scales.shape)  # type: ignore[union-attr]
  return out, recorded


def converted(
  stored: dict[str, np.ndarray], layout: Layout | None, to: Layout
) -> dict[str, np.ndarray]:
  """Scalars as they were stored in a layout, as another one stores them."""
  if layout is None or layout.format == to.format or not to.scalars:
    return stored
  return {field: from_amax(to, to_amax(layout, scalar)) for field, scalar in stored.items()}


def _amax_of_fields(name: str, weight: QuantizedWeight, layout: Layout) -> dict[str, np.ndarray]:
  """The amax of each field that the layout writes.

  A weight without a global scale has the same bits as one with 2688, and an activation that is
  quantized without one, too.
  """
  given = {
    field: np.asarray(value)
    for field in ("global_scale", "input_global_scale")
    if (value := getattr(weight, field)) is not None
  }
  if not layout.scalars:
    if any((value != LARGEST_NVFP4).any() for value in given.values()):
      raise ValueError(
        f"save: {name!r} has a global scale, for which {layout.format} {layout.name} has no "
        "tensor; save it as 'modelopt' or 'compressed-tensors', or quantize without a global scale."
      )
    return {}
  if weight.ndim != 2:
    raise ValueError(
      f"save: {name!r} must have two dimensions, (N, K), in {layout.format} {layout.name}, which "
      f"holds one matrix a layer, got shape {weight.shape}; save its matrices under a name each."
    )
  if "global_scale" not in given:
    given = dict.fromkeys(layout.scalars, np.asarray(LARGEST_NVFP4)) | given
  return {field: value.reshape(()) for field, value in given.items()}
