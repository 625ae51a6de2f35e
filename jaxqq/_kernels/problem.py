"""What there is to compute, as the choice of a kernel sees it; operands as a kernel takes them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq._formats import Format
from jaxqq._quantizer import Quantizer
from jaxqq._reference import TRANSPOSED, Operands


@dataclasses.dataclass(frozen=True)
class Problem:
  """Sizes, formats and flags of one product, on one device.

  Of rows in groups, each with a matrix of its own, it is that of a group: m is how many rows one
  has on average, and the batch axes are the groups that have any.
  """

  fmt: Format
  m: int
  n: int
  k: int
  x_batch: tuple[int, ...]  # batch axes
  w_batch: tuple[int, ...]  # of w, and of its scales
  w_dtype: np.dtype  # of unquantized w
  is_packed: bool
  transposed: tuple[str, ...]  # which of x and w have their contracted axis first
  has_global_scales: bool
  out_dtype: np.dtype
  wants_exact_sums: bool  # float32 results, or precision above DEFAULT
  obstacle: str | None  # why no kernel takes it, or None
  x_dtype: np.dtype
  quantize_input: bool  # whether x is quantized; else it is multiplied as it is, in x_dtype
  in_groups: bool = False

  @classmethod
  def of(
    cls,
    operands: Operands,  # arrays, or their shapes and dtypes
    fmt: Format,
    out_dtype: np.dtype,
    precision: jax.lax.Precision | None,
    result_dtype: np.dtype | None = None,
    quantize_input: bool = True,
  ) -> Problem:
    """`result_dtype`: of the sum of all devices' parts, where this is one and float32."""
    w_batch = operands.w.shape[:-2]
    if operands.scales is not None:
      w_batch = lax.broadcast_shapes(w_batch, operands.scales.shape[:-2])
    high = precision in (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST)
    global_scales = (operands.global_scale_x, operands.global_scale_w)
    return cls(
      fmt,
      operands.m,
      operands.n,
      operands.k,
      operands.x.shape[:-2],
      w_batch,
      np.dtype(operands.w.dtype),
      operands.scales is not None,
      operands.transposed,
      any(scale is not None for scale in global_scales),
      np.dtype(out_dtype),
      high or (result_dtype or out_dtype) == np.float32,
      obstacle(operands.flatten(), global_scales),
      np.dtype(operands.x.dtype),
      quantize_input,
    )

  @property
  def function(self) -> str:
    """Whose product it is, for errors."""
    return "qqmm" if self.quantize_input else "quantized_matmul"

  @property
  def batch_shape(self) -> tuple[int, ...]:
    return lax.broadcast_shapes(self.x_batch, self.w_batch)

  @property
  def shares_w(self) -> bool:
    """Whether all of x is multiplied with one matrix w: its batch axes are then just more rows."""
    return math.prod(self.w_batch) == 1

  @property
  def batch(self) -> int:
    """How many products a kernel has."""
    return 1 if self.shares_w else math.prod(self.batch_shape)

  @property
  def rows(self) -> int:
    """How many rows of x are multiplied with one matrix w."""
    return self.m * math.prod(self.batch_shape) if self.shares_w else self.m


def obstacle(arrays: Sequence[Any], global_scales: Sequence[Any]) -> str | None:
  """Why no kernel takes arrays of these shapes, or None; a global scale may be None."""
  if not all(isinstance(size, int) for a in arrays for size in a.shape):
    return "a size is symbolic"
  if any(0 in a.shape for a in arrays):
    return "an axis is empty"
  if any(_is_split_explicitly(a) for a in arrays):
    return "an operand is split along an explicit axis of a mesh"
  if any(math.prod(s.shape) > 1 for s in global_scales if s is not None):
    return "global scales differ from matrix to matrix"
  return None


def _is_split_explicitly(a: Any) -> bool:
  sharding = jax.typeof(a).sharding if isinstance(a, jax.Array) else getattr(a, "sharding", None)
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return False
  explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
  return explicit and any(axes is not None for axes in sharding.spec)


# Rows in groups, each with a matrix of its own

# out[i, n] = sum_k x[i, k] w[n, k];  out[i, k] = sum_n x[i, n] w[n, k], w of the group of row i;
# out[n, k] = sum_m x[m, n] y[m, k], over the rows of each group.
Contracted: TypeAlias = Literal["k", "n", "m"]


@dataclasses.dataclass(frozen=True)
class RaggedProblem:
  """Sizes, formats and flags of one ragged product, on one device."""

  fmt: Format
  contracted: Contracted
  m: int
  groups: int  # of this device: as many as matrices
  n: int
  k: int
  is_packed: bool
  quantize: bool  # whether x, and an unpacked w or y, is quantized along the contracted axis
  quantize_w: bool  # whether an unpacked w is quantized along k, and x multiplied as it is
  x_dtype: np.dtype
  w_dtype: np.dtype  # of unpacked w, or y
  out_dtype: np.dtype
  precision: jax.lax.Precision | None
  function: str  # whose product it is, for errors
  batch: int = 1  # products, with rows and groups of their own each
  all_groups: int | None = None  # that have the rows, of all devices; None: as many as matrices
  result_dtype: np.dtype | None = None  # of the sum of all devices' parts, where this is one
  has_global_scales: bool = False
  scales_by_group: bool = False  # whether one of x differs from group to group
  scales_of_matrices: bool = False  # whether one of w differs from matrix to matrix
  obstacle: str | None = None  # why no kernel takes it, or None


def tiles_of_a_group(rows: int, block_m: int) -> float:
  """How many tiles a group takes, on average, if groups have up to a quarter more or fewer rows."""
  sizes = (rows * (0.75 + 0.5 * (i + 0.5) / 16) for i in range(16))
  return sum(math.ceil(size / block_m) for size in sizes) / 16


# Conversions


@dataclasses.dataclass(frozen=True)
class Conversion:
  """One `quantize` or `dequantize`, as far as the choice of an implementation depends on it."""

  fmt: Format
  names: tuple[str, ...]  # of the arrays, as the primitives' parameter `operands` has them
  shapes: tuple[tuple[Any, ...], ...]
  obstacle: str | None  # what no kernel takes, if there is such
  out_dtype: np.dtype | None = None  # that `dequantize` rounds to

  @classmethod
  def of(
    cls,
    fmt: Format,
    names: tuple[str, ...],
    arrays: Sequence[Any],  # or their shapes and dtypes
    out_dtype: np.dtype | None = None,
  ) -> Conversion:
    scale = arrays[-1] if names[-1] == "global_scale" else None
    shapes = tuple(tuple(a.shape) for a in arrays)
    return cls(fmt, names, shapes, obstacle(arrays, (scale,)), out_dtype)

  @property
  def is_transposed(self) -> bool:
    return self.names[0].endswith(TRANSPOSED)

  @property
  def has_global_scale(self) -> bool:
    return self.names[-1] == "global_scale"

  @property
  def batch_shape(self) -> tuple[int, ...]:
    shapes = [shape[:-2] for shape in self.shapes]
    if self.has_global_scale:
      shapes[-1] = self.shapes[-1]
    return lax.broadcast_shapes(*shapes)

  @property
  def rows(self) -> int:
    return self.shapes[0][-1 if self.is_transposed else -2]

  @property
  def is_one_matrix(self) -> bool:
    return all(size == 1 for size in self.shapes[0][:-2])

  def in_order(self, w: jax.Array) -> jax.Array:
    """With groups along its last axis."""
    return jnp.swapaxes(w, -1, -2) if self.is_transposed else w


# Quantizers, and the products of a recipe


@dataclasses.dataclass(frozen=True)
class Quantizing:
  """One array that a `Quantizer` quantizes, as far as the choice of an implementation depends."""

  quantizer: Quantizer
  shape: tuple[Any, ...]  # of one matrix, as it is stored
  is_transposed: bool
  obstacle: str | None
  function: str = "Quantizer.quantize"


@dataclasses.dataclass(frozen=True)
class RecipeProblem:
  """One product of a recipe, on one device."""

  quantizers: tuple[Quantizer | None, Quantizer | None]
  operands: Operands  # shapes and dtypes
  out_dtype: np.dtype
  precision: jax.lax.Precision | None
  obstacle: str | None
  function: str = "qqmm"

  @classmethod
  def of(
    cls,
    quantizers: tuple[Quantizer | None, Quantizer | None],
    operands: Operands,
    out_dtype: np.dtype,
    precision: jax.lax.Precision | None,
    why_not: str | None,
  ) -> RecipeProblem:
    """why_not: why no kernel may take it, beside what operands tell; or None."""
    found = why_not or obstacle((operands.x, operands.w), ())
    if found is None and any(math.prod(shape) > 1 for shape in operands.batch_shapes):
      found = "there are several matrices, each a tensor of its own"
    x, w = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (operands.x, operands.w))
    shapes = dataclasses.replace(operands, x=x, w=w, key=None)
    return cls(quantizers, shapes, out_dtype, precision, found)


# Operands: one batch axis, and whole steps of k


def fold(operands: Operands) -> Operands:
  """Every operand with one batch axis, of size 1 where it is shared; scales as bytes.

  One matrix alone stays transposed, for the quantizers of columns; several are put in order.
  """
  operands = operands.untransposed(
    [n for n in operands.transposed if math.prod(getattr(operands, n).shape[:-2]) > 1]
  )
  x, w, scales = operands.x, operands.w, operands.scales
  batch_shape = operands.batch_shape
  w_batches = [a.shape[:-2] for a in (w, scales) if a is not None]
  shares_w = all(math.prod(batch) == 1 for batch in w_batches)

  def matrices(a: Any, fold_rows: bool) -> Any:
    if fold_rows:
      a = jnp.broadcast_to(a, (*batch_shape, *a.shape[-2:]))
      return a.reshape(1, -1, a.shape[-1])
    if math.prod(a.shape[:-2]) > 1:
      a = jnp.broadcast_to(a, (*batch_shape, *a.shape[-2:]))
    return a.reshape(-1, *a.shape[-2:])

  if scales is not None:
    common = lax.broadcast_shapes(w.shape[:-2], scales.shape[:-2])
    w = jnp.broadcast_to(w, (*common, *w.shape[-2:]))
    scales = jnp.broadcast_to(scales, (*common, *scales.shape[-2:]))
    scales = matrices(lax.bitcast_convert_type(scales, jnp.uint8), False)
  return dataclasses.replace(operands, x=matrices(x, shares_w), w=matrices(w, False), scales=scales)


def pad_k(operands: Operands, step_k: int, fmt: Format) -> Operands:
  """Folded operands with zeros to whole steps of k: a copy, where there is a rest."""
  missing = -operands.k % step_k
  if not missing:
    return operands

  def pad(a: Any, by: int, axis: int = -1) -> Any:
    widths = [(0, 0)] * 3
    widths[axis] = (0, by)
    return jnp.pad(a, widths)

  (_, of_x), (_, of_w) = operands.axes("x"), operands.axes("w")
  x = pad(operands.x, missing, of_x)
  if operands.scales is None:
    return dataclasses.replace(operands, x=x, w=pad(operands.w, missing, of_w))
  w = pad(operands.w, missing // fmt.codes_per_word)
  scales = pad(operands.scales, missing // fmt.group_size)
  return dataclasses.replace(operands, x=x, w=w, scales=scales)
