"""Layers that come dequantized: FP8, and MLX's mode affine, beside layers of the block formats.

FP8: w[n, k] = code[n, k] * scale, an e4m3 (or e5m2) number times the scale of its tensor, its row
or its block. Affine: w[n, k] = scale * q + bias, q of 2 to 8 bits, by groups of a row. Either is
rounded once, to the dtype asked for.
Source: NVIDIA/Model-Optimizer modelopt/torch/quantization/qtensor/fp8_tensor.py;
vllm-project/compressed-tensors src/compressed_tensors/compressors/naive_quantized/base.py;
deepseek-ai/DeepSeek-V3 inference/fp8_cast_bf16.py; ml-explore/mlx mlx/ops.cpp, quantize.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from jaxqq._formats import FORMATS
from jaxqq.checkpoint._files import TensorInfo, describe
from jaxqq.checkpoint._naming import LAYER, Naming

FP8 = {
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
FP8_BLOCK = 128  # rows and columns of a block, where the configuration does not say
_FLOATS = ("F32", "BF16", "F16")
_EXPONENTS = ("U8", "F8_E8M0")
_ROWS = 1 << 22  # elements that are dequantized at a time
_MXFP8_GROUP = FORMATS["mxfp8"].group_size

Read = Callable[[TensorInfo], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Dense:
  """How such a layer is stored.

  Attributes:
    kind: "fp8" or "affine".
    name: what the project calls it.
    scales: the suffix of its scales.
    block: rows and columns that share a scale, where the configuration says so.
    bits: of a code of "affine".
    group_size: of "affine".
  """

  format: str
  kind: str
  name: str
  scales: str
  block: tuple[int, int] | None = None
  bits: int = 8
  group_size: int = 0

  @property
  def suffixes(self) -> tuple[str, ...]:
    """Of all tensors of the layer; a scale of activations means nothing to a dequantized weight."""
    if self.kind == "affine":
      return ("weight", self.scales, "biases")
    return ("weight", self.scales, "input_scale", "activation_scale")


@dataclasses.dataclass(frozen=True)
class DenseLayer:
  """A layer that comes dequantized: its tensors by suffix, and the name of its weight."""

  name: str
  path: str
  dense: Dense
  tensors: dict[str, TensorInfo]
  naming: Naming = LAYER

  def expected(self, suffix: str) -> str:
    """What its tensor of a suffix is called, were it there."""
    return self.naming.tensor(self.path, suffix)

  @property
  def parts(self) -> dict[str, TensorInfo]:
    return {s: self.tensors[s] for s in self.dense.suffixes if s in self.tensors}

  @property
  def report(self) -> str:
    """What it was."""
    dense = self.dense
    if dense.kind == "affine":
      return f"{dense.format} affine, {dense.bits} bits in groups of {dense.group_size}"
    shape = self.tensors["weight"].shape
    rows, columns = _blocks(self) or (1, 1)
    of = f"each {rows} x {columns}"
    if (rows, columns) == shape[-2:]:
      of = "the tensor" if math.prod(self.tensors[dense.scales].shape) == 1 else "each matrix"
    elif (rows, columns) == (1, shape[-1]):
      of = "each row"
    return f"{dense.format} {dense.name}, a scale for {of}"


def check_dense(layer: DenseLayer) -> None:
  """Every tensor of the layer is there, with a dtype and a shape that belong together."""
  dense, tensors = layer.dense, layer.tensors
  needed = ("weight", dense.scales, *(("biases",) if dense.kind == "affine" else ()))
  for suffix in needed:
    if suffix not in tensors:
      found = ", ".join(sorted(tensor.name for tensor in tensors.values()))
      where = next(iter(tensors.values())).file
      raise ValueError(
        f"load: {where}: tensor {layer.expected(suffix)!r} is missing; {dense.format} {dense.name} "
        f"needs it, found {found}."
      )
  weight, scales = tensors["weight"], tensors[dense.scales]
  if dense.kind == "affine":
    _check_affine(layer)
    return
  if weight.dtype not in FP8 or len(weight.shape) < 2:
    raise _mismatch(weight, dense, "F8_E4M3 of shape (N, K)")
  if scales.dtype not in (*_FLOATS, *_EXPONENTS):
    raise _mismatch(scales, dense, " or ".join((*_FLOATS, *_EXPONENTS)))
  if _blocks(layer) is None:
    rows, columns = dense.block or (FP8_BLOCK, FP8_BLOCK)
    n, k = weight.shape[-2:]
    raise _mismatch(
      scales, dense, f"one scale, or of shape ({n}, 1) or "
      f"({-(-n // rows)}, {-(-k // columns)}), for blocks of {rows} x {columns} of {weight.shape}"
    )  # fmt: skip


def _check_affine(layer: DenseLayer) -> None:
  dense, weight = layer.dense, layer.tensors["weight"]
  if weight.dtype != "U32" or len(weight.shape) < 2:
    raise _mismatch(weight, dense, f"U32 of shape (N, K * {dense.bits} / 32)")
  shape = (*weight.shape[:-1], weight.shape[-1] * 32 // (dense.bits * dense.group_size))
  whole = weight.shape[-1] * 32 == shape[-1] * dense.bits * dense.group_size
  for suffix in (dense.scales, "biases"):
    tensor = layer.tensors[suffix]
    if tensor.dtype not in _FLOATS or tensor.shape != shape or not whole:
      raise _mismatch(
        tensor, dense, f"{' or '.join(_FLOATS)} of shape {shape}, {dense.bits} bits in groups of "
        f"{dense.group_size} of {weight.name!r}, {describe(weight)}"
      )  # fmt: skip


def _mismatch(found: TensorInfo, dense: Dense, expected: str) -> ValueError:
  return ValueError(
    f"load: {found.file}: tensor {found.name!r} must be {expected} in {dense.format} {dense.name}, "
    f"found {describe(found)}."
  )


def _blocks(layer: DenseLayer) -> tuple[int, int] | None:
  """Rows and columns that share a scale, by the shapes; None where they do not belong together."""
  *batch, n, k = layer.tensors["weight"].shape
  shape = layer.tensors[layer.dense.scales].shape
  if math.prod(shape) == 1:
    return n, k
  if len(shape) == len(batch) + 4 and shape[-3] == shape[-1] == 1:
    shape = (*shape[:-3], shape[-2])  # as ModelOpt keeps blocks: (N / 128, 1, K / 128, 1)
  if list(shape[: len(batch)]) != batch:
    return None
  of_matrix = shape[len(batch) :]
  if math.prod(of_matrix) == 1:
    return n, k
  is_parameter = layer.naming != LAYER  # whose matrices may be (K, N)
  if of_matrix == (n, 1) or (of_matrix == (n,) and not (is_parameter and n == k)):
    return 1, k
  if of_matrix == (k,) and is_parameter and n != k:
    return n, 1
  if len(of_matrix) != 2:
    return None
  rows = [layer.dense.block[0]] if layer.dense.block else [1, FP8_BLOCK, n]
  columns = [layer.dense.block[1]] if layer.dense.block else [k, FP8_BLOCK, k // of_matrix[1]]
  fits = [
    (row, column)
    for row in rows
    for column in columns
    if column and (-(-n // row), -(-k // column)) == of_matrix
  ]
  return fits[0] if fits else None


def read_fp8(layer: DenseLayer, read: Read, dtype: np.dtype) -> np.ndarray:
  """The weight of an FP8 layer in a dtype, in the shape that its codes have."""
  codes, scale, (rows, columns) = _fp8(layer, read)
  table = np.arange(256, dtype=np.uint8).view(codes.dtype).astype(np.float64)
  out = np.empty(codes.shape, dtype)
  for matrix, scale_of, out_of in zip(
    codes.reshape(-1, *codes.shape[-2:]).view(np.uint8),
    scale.reshape(-1, *scale.shape[-2:]),
    out.reshape(-1, *codes.shape[-2:]),
    strict=True,
  ):
    for some in _slices(*matrix.shape):
      of_rows = scale_of[np.arange(some.start, some.stop) // rows]
      by_element = np.repeat(of_rows, columns, axis=1)[:, : matrix.shape[1]]
      with np.errstate(invalid="ignore"):
        out_of[some] = rounded(table[matrix[some]] * by_element, dtype)
  _check_range(layer, out, codes)
  return out


def read_as_mxfp8(layer: DenseLayer, read: Read) -> tuple[np.ndarray, np.ndarray] | None:
  """packed and scales of the same numbers in mxfp8; None where it has not these scales."""
  codes, scale, (rows, columns) = _fp8(layer, read)
  *_, n, k = codes.shape
  mantissa, exponent = np.frexp(scale)
  powers = (mantissa == 0.5) & (exponent > -127) & (exponent <= 128)
  if codes.dtype != FP8["F8_E4M3"] or k % _MXFP8_GROUP or not powers.all():
    return None
  if columns != k and columns % _MXFP8_GROUP:
    return None
  by_row = np.repeat((exponent + 126).astype(np.uint8), rows, axis=-2)[..., :n, :]
  groups = -(-columns // _MXFP8_GROUP)
  scales = np.repeat(by_row, groups, axis=-1)[..., : k // _MXFP8_GROUP]
  return codes.view(np.uint32), np.ascontiguousarray(scales)


def _fp8(layer: DenseLayer, read: Read) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
  """Codes (..., N, K), scales (..., N / rows, K / columns) in float64, rows and columns."""
  codes, stored = read(layer.tensors["weight"]), read(layer.tensors[layer.dense.scales])
  if stored.dtype == np.uint8:
    stored = stored.view(ml_dtypes.float8_e8m0fnu)
  rows, columns = blocks = _blocks(layer) or (1, 1)
  *batch, n, k = codes.shape
  scale = stored.astype(np.float64)
  if not ((scale >= 0) & (scale < np.inf)).all():
    tensor = layer.tensors[layer.dense.scales]
    raise ValueError(
      f"load: {tensor.file}: tensor {tensor.name!r} must be finite and not negative, found "
      f"{scale[~((scale >= 0) & (scale < np.inf))][0]}."
    )
  if scale.size == 1:
    scale = np.full((*batch, 1, 1), scale.reshape(()))
  scale = scale.reshape(*batch, -(-n // rows), -(-k // columns))
  return np.ascontiguousarray(codes), scale, blocks


def read_affine(layer: DenseLayer, read: Read, dtype: np.dtype) -> np.ndarray:
  """The weight of an affine layer in a dtype, (..., N, K)."""
  dense = layer.dense
  packed, scales, biases = (read(layer.tensors[s]) for s in ("weight", dense.scales, "biases"))
  *batch, n, groups = scales.shape
  k = groups * dense.group_size
  out = np.empty((*batch, n, k), dtype)
  flat = packed.reshape(-1, packed.shape[-1]), scales.reshape(-1, groups)
  words, scale_of, bias_of, out_of = *flat, biases.reshape(-1, groups), out.reshape(-1, k)
  weights = 1 << np.arange(dense.bits)
  for some in _slices(*out_of.shape):
    bits = np.unpackbits(
      np.ascontiguousarray(words[some]).view(np.uint8), axis=1, bitorder="little"
    )
    q = bits.reshape(-1, k, dense.bits) @ weights
    by_element = (
      np.repeat(a[some].astype(np.float64), dense.group_size, axis=1) for a in (scale_of, bias_of)
    )
    scale, bias = by_element
    out_of[some] = rounded(q * scale, dtype, plus=bias)
  return out


def _slices(rows: int, columns: int) -> Iterator[slice]:
  step = max(1, _ROWS // max(columns, 1))
  for start in range(0, rows, step):
    yield slice(start, min(start + step, rows))


def _check_range(layer: DenseLayer, out: np.ndarray, codes: np.ndarray) -> None:
  """No number became infinite in a dtype of too small a range."""
  if np.isinf(out).any() and not np.isinf(codes.astype(np.float32)).any():
    weight = layer.tensors["weight"]
    raise ValueError(
      f"load: {weight.file}: tensor {weight.name!r} dequantizes to numbers beyond "
      f"{out.dtype.name}; load with dtype='bfloat16' or 'float32'."
    )


def rounded(value: np.ndarray, dtype: np.dtype, plus: np.ndarray | float = -0.0) -> np.ndarray:
  """float64 value + plus in a narrower dtype, rounded once, to nearest even.

  Each step but the last rounds to odd where it is not exact, so that the last sees on which side of
  a tie the value is.
  """
  total = value + plus
  back = total - value
  lost = (value - (total - back)) + (plus - back)  # Knuth's two-sum: total + lost is exact
  total = _to_odd(total, lost)
  with np.errstate(over="ignore", under="ignore"):
    single = total.astype(np.float32)
    if dtype != np.float32:
      single = _to_odd(single, total - single.astype(np.float64)).astype(dtype)
  return single


def _to_odd(nearest: np.ndarray, lost: np.ndarray) -> np.ndarray:
  """What was rounded to nearest and lost something, rounded to the neighbour that is odd."""
  integer = np.dtype(f"i{nearest.dtype.itemsize}")
  bits = nearest.view(integer)
  with np.errstate(invalid="ignore"):
    to_step = (lost != 0) & ~np.isnan(lost) & (bits % 2 == 0)
  away = np.where(np.signbit(nearest) == np.signbit(lost), 1, -1).astype(integer)
  smallest = np.copysign(np.ones((), integer).view(nearest.dtype), lost.astype(nearest.dtype))
  stepped = np.where(nearest == 0, smallest, (bits + away).view(nearest.dtype))
  return np.where(to_step, stepped, nearest)
