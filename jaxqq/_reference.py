"""The product in plain jnp: its definition, and its lowering on platforms without a kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq._formats import Format
from jaxqq._quantize import (
  alpha_factors,
  dequantize_groups,
  dequantize_to_multiply,
  quantize_groups,
  scale_bytes,
  unpack,
)
from jaxqq._rounding import ANYWHERE, Arithmetic

TRANSPOSED = "_transposed"  # ends the name of an operand that is
_ARRAYS = ("x", "w", "scales", "global_scale_x", "global_scale_w", "row_scales", "key")


@dataclasses.dataclass(frozen=True)
class Operands:
  """What a product multiplies; the axes before the named ones are batch axes.

  Batch axes broadcast as in numpy: aligned from the right, each of size 1 or the common one.
  A primitive takes the operands, `flatten`, and their `names` as a parameter: "x",
  "w_transposed" are those of x and of a w whose contracted axis comes first.
  """

  x: Any  # (..., m, k)
  w: Any  # (..., n, k), or uint32 (..., n, k * bits / 32) beside scales
  scales: Any = None  # (..., n, k / group_size)
  global_scale_x: Any = None  # (...)
  global_scale_w: Any = None  # (...)
  # Which of "x" and "w" are stored as (..., k, m), (..., k, n). None is beside scales.
  transposed: tuple[str, ...] = ()
  row_scales: Any = None  # (..., n): the global scales of the rows of packed w, where they differ
  key: Any = None  # uint32 (..., 4): of what is random, in the products of a recipe

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(
      name + TRANSPOSED if name in self.transposed else name
      for name in _ARRAYS
      if getattr(self, name) is not None
    )

  def flatten(self) -> tuple[Any, ...]:
    """Those that are there, in the order of `names`."""
    return tuple(a for a in (getattr(self, name) for name in _ARRAYS) if a is not None)

  def axes(self, name: str) -> tuple[int, int]:
    """The axes of x or w: that of its rows, and the contracted one."""
    return (-1, -2) if name in self.transposed else (-2, -1)

  @property
  def m(self) -> int:
    return self.x.shape[self.axes("x")[0]]

  @property
  def n(self) -> int:
    return self.w.shape[self.axes("w")[0]]

  @property
  def k(self) -> int:
    return self.x.shape[self.axes("x")[1]]

  def untransposed(self, names: Sequence[str] = ("x", "w")) -> Operands:
    """The same, with those of `names` that are transposed put in order."""
    swapped = {
      name: jnp.swapaxes(getattr(self, name), -1, -2) for name in self.transposed if name in names
    }
    rest = tuple(name for name in self.transposed if name not in swapped)
    return dataclasses.replace(self, **swapped, transposed=rest)

  @property
  def batch_shapes(self) -> tuple[tuple[int, ...], ...]:
    """The batch axes of each operand that is there."""
    return tuple(
      a.shape[: len(a.shape) - matrix_ndim(name)]
      for name, a in zip(self.names, self.flatten(), strict=True)
    )

  @property
  def batch_shape(self) -> tuple[int, ...]:
    return lax.broadcast_shapes(*self.batch_shapes)


def unflatten(names: Sequence[str], values: Sequence[Any]) -> Operands:
  """The operands of a primitive, by their names."""
  transposed = tuple(n.removesuffix(TRANSPOSED) for n in names if n.endswith(TRANSPOSED))
  fields = (name.removesuffix(TRANSPOSED) for name in names)
  return Operands(**dict(zip(fields, values, strict=True)), transposed=transposed)


def matrix_ndim(name: str) -> int:
  """How many axes of an operand are not batch axes."""
  if name in ("row_scales", "key"):
    return 1
  return 0 if name.startswith("global_scale") else 2


def product(
  operands: Operands,
  *,
  fmt: Format,
  out_dtype: np.dtype,
  quantize_input: bool = True,
  arithmetic: Arithmetic = ANYWHERE,
) -> jax.Array:
  """out[..., m, n] = alpha * sum_k x_hat[..., m, k] * w_hat[..., n, k], in float32.

  x_hat and w_hat are dequantized without their global scales, which float32 holds exactly;
  alpha = global_scale_x / 2688 * global_scale_w / 2688 follows, as two factors of about the same
  exponent: the sum is large where alpha itself would underflow. x_hat is x where the input is not
  to be quantized.
  """
  operands = operands.untransposed()
  x_hat = operands.x.astype(jnp.float32)
  if quantize_input:
    x_hat = round_trip(operands.x, fmt, operands.global_scale_x, arithmetic)
  w_hat = w_hat_of(operands, fmt, arithmetic)
  out = matmul(x_hat, jnp.swapaxes(w_hat, -1, -2))
  global_scales = operands.global_scale_x, operands.global_scale_w
  out = times_alpha(out, *global_scales, fmt, operands.row_scales, arithmetic)
  return out.astype(out_dtype)


def w_hat_of(operands: Operands, fmt: Format, arithmetic: Arithmetic = ANYWHERE) -> jax.Array:
  """w_hat, packed before or quantized here, in float32 and without its global scale."""
  if operands.scales is None:
    return round_trip(operands.w, fmt, operands.global_scale_w, arithmetic)
  return dequantize_to_multiply(*unpacked(operands.w, operands.scales, fmt), fmt)


def round_trip(
  a: jax.Array, fmt: Format, global_scale: jax.Array | None, arithmetic: Arithmetic = ANYWHERE
) -> jax.Array:
  """What is left of `a` after quantization, in float32 and without its global scale."""
  return dequantize_to_multiply(*quantize_groups(a, fmt, global_scale, arithmetic), fmt)


def dequantize_packed(
  w: jax.Array, scales: jax.Array, fmt: Format, global_scale: jax.Array | None = None
) -> jax.Array:
  """Packed w in float32; without a global scale, exact."""
  batch_shape = () if global_scale is None else global_scale.shape
  codes, scales = unpacked(w, scales, fmt, batch_shape)
  return dequantize_groups(codes, scales, fmt, global_scale)


def dequantized(operands: Operands, fmt: Format) -> jax.Array:
  """Packed w in float32 with its global scales, as `dequantize` has it."""
  w, scales, rows = operands.w, operands.scales, operands.row_scales
  if rows is None:
    return dequantize_packed(w, scales, fmt, operands.global_scale_w)
  return dequantize_packed(w[..., None, :], scales[..., None, :], fmt, rows).squeeze(-2)


def dequantized_for(dtype: np.dtype, ops: Operands, fmt: Format) -> jax.Array:
  """w_hat without its global scale, to be multiplied with an operand of this dtype.

  bfloat16 holds such a w exactly, so that matrix units can multiply it by a bfloat16 operand. w is
  packed, or quantized here along its last axis.
  """
  if ops.scales is None:
    w = round_trip(ops.w, fmt, ops.global_scale_w)
  else:
    w = dequantize_packed(ops.w, ops.scales, fmt)
  return w.astype(dtype) if dtype == jnp.bfloat16 else w


def whole_groups(operands: Operands, fmt: Format) -> Operands:
  """Zeros up to a multiple of the group size along k."""
  missing = -operands.k % fmt.group_size

  def padded(name: str) -> jax.Array:
    a = getattr(operands, name)
    widths = [(0, 0)] * a.ndim
    widths[operands.axes(name)[1]] = (0, missing)
    return jnp.pad(a, widths)

  return dataclasses.replace(operands, x=padded("x"), w=padded("w")) if missing else operands


def pulled_back(ops: Operands, fmt: Format) -> jax.Array:
  """g w_hat in float32, where x names g (..., m, n): dx through a w that is quantized along k."""
  g, of_w = ops.x, ops.global_scale_w
  if ops.row_scales is not None:
    g, of_w = times_alpha(g.astype(jnp.float32), None, None, fmt, ops.row_scales), None
    g = g.astype(ops.x.dtype) if ops.x.dtype == jnp.bfloat16 else g
  return times_alpha(matmul(g, dequantized_for(ops.x.dtype, ops, fmt)), None, of_w, fmt)


def to_quantize_anew(ops: Operands, fmt: Format) -> Operands:
  """The operands of the same dx as qqmm(g, w^T): both are quantized along n, in whole groups."""
  w = ops.w if ops.scales is None else dequantized(ops, fmt)
  ready = Operands(ops.x, w, None, ops.global_scale_x, ops.global_scale_w, ("w",))
  return whole_groups(ready, fmt)


def unpacked(
  w: jax.Array, scales: jax.Array, fmt: Format, batch_shape: tuple[int, ...] = ()
) -> tuple[jax.Array, jax.Array]:
  """Codes and scales in int32, of the same batch axes, which broadcast."""
  batch_shape = lax.broadcast_shapes(w.shape[:-2], scales.shape[:-2], batch_shape)
  codes, scales = unpack(w, fmt), scale_bytes(scales)
  codes, scales = (jnp.broadcast_to(a, batch_shape + a.shape[-2:]) for a in (codes, scales))
  return codes, scales


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """a @ b in float32, every product and sum at float32 precision on every platform.

  Batch axes broadcast. Products of two 16 bit floats are exact in float32, so operands of one
  such type go in as they are.
  """
  if a.dtype != b.dtype:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  if min(a.ndim, b.ndim) > 2:  # else jnp.matmul keeps the matrix a matrix, and out of the batch
    ndim = max(a.ndim, b.ndim)
    a, b = with_ndim(a, ndim), with_ndim(b, ndim)
  # XLA's CPU backend makes a loop of one running sum out of a product with a single row, slower
  # and with a larger error than the matrix product that two rows get. So does a single column.
  rows, columns = a.shape[-2], b.shape[-1]
  if rows == 1 and columns != 1:
    a = jnp.concatenate([a, jnp.zeros_like(a)], axis=-2)
  elif columns == 1 and rows != 1:
    b = jnp.concatenate([b, jnp.zeros_like(b)], axis=-1)
  out = jnp.matmul(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
  return out[..., :rows, :columns]


def times_alpha(
  sums: jax.Array,  # (..., m, n), float32
  global_scale_x: jax.Array | None,  # (...)
  global_scale_w: jax.Array | None,  # (...)
  fmt: Format,
  row_scales: jax.Array | None = None,  # (..., n), in place of global_scale_w
  arithmetic: Arithmetic = ANYWHERE,
) -> jax.Array:
  """sums * alpha, with no step out of float32's range where neither sums nor the result are."""
  if global_scale_x is None and global_scale_w is None and row_scales is None:
    return sums
  if row_scales is None:
    first, second = alpha_factors(global_scale_x, global_scale_w, fmt, arithmetic=arithmetic)
    first, second = (factor[..., None, None] for factor in (first, second))
  else:
    of_x = None if global_scale_x is None else global_scale_x[..., None]
    factors = alpha_factors(of_x, row_scales, fmt, arithmetic=arithmetic)
    first, second = (factor[..., None, :] for factor in factors)
  # Two constants in a row XLA would multiply by each other, and underflow.
  first, second = lax.optimization_barrier(first), arithmetic.hoisted(second)
  ndim = max(sums.ndim, first.ndim)
  first, second = (with_ndim(factor, ndim) for factor in (first, second))
  return with_ndim(sums, ndim) * first * second


def with_ndim(a: jax.Array, ndim: int) -> jax.Array:
  """`a` with leading axes of size 1."""
  return a.reshape((1,) * (ndim - a.ndim) + a.shape)
