"""The products that the backward pass is made of, both kinds: sums over rows of two matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq import _primitive
from jaxqq._formats import Format
from jaxqq._reference import Operands, dequantize_packed, matmul, times_global_scale


def sum_over_rows(
  a: jax.Array,  # (..., r, m)
  b: jax.Array,  # (..., r, n)
  global_scale: jax.Array | None,  # (...), of b
  shape: tuple[int, ...],  # (..., m, n)
  product: Callable[..., jax.Array],
) -> jax.Array:
  """sum_r a[..., r, m] * b[..., r, n], also over the batch axes that are missing from shape.

  Such an axis joins the rows, unless global scales differ along it: a product has one global
  scale a matrix, so those axes are summed after it.
  """
  batch = a.shape[:-2]  # a is a cotangent, or its transpose, and has all of them
  ndim = len(batch)
  b_batch, scale_batch, out_batch = (
    (1,) * (ndim - len(own)) + tuple(own)
    for own in (b.shape[:-2], () if global_scale is None else global_scale.shape, shape[:-2])
  )
  missing = [i for i in range(ndim) if out_batch[i] == 1 and batch[i] != 1]
  joined = [i for i in missing if scale_batch[i] == 1 and b_batch[i] != 1]
  kept = [i for i in range(ndim) if i not in joined]
  if global_scale is not None:
    global_scale = global_scale.reshape([scale_batch[i] for i in kept])
  out = product(
    _join_rows(a, kept, joined),
    _join_rows(b.reshape(b_batch + b.shape[-2:]), kept, joined),
    global_scale,
    sums_follow=len(missing) > len(joined),
  )
  summed = tuple(kept.index(i) for i in missing if i in kept)
  return (jnp.sum(out, axis=summed) if summed else out).reshape(shape)


def _join_rows(a: jax.Array, kept: list[int], joined: list[int]) -> jax.Array:
  """(kept and joined batch axes, r, m) to (kept batch axes, joined * r, m)."""
  if not joined:
    return a
  a = a.transpose(*kept, *joined, a.ndim - 2, a.ndim - 1)
  rows = math.prod(a.shape[len(kept) : -1])
  return a.reshape(*a.shape[: len(kept)], rows, a.shape[-1])


def straight_through_product(
  a: jax.Array, b: jax.Array, global_scale: jax.Array | None, *, sums_follow: bool, fmt: Format
) -> jax.Array:
  """a^T b in float32; a global scale is that of b, dequantized without it."""
  del sums_follow
  return times_global_scale(matmul(jnp.swapaxes(a, -1, -2), b), global_scale, fmt)


def quantized_product(
  a: jax.Array,
  b: jax.Array,
  global_scale: jax.Array | None,
  *,
  sums_follow: bool,
  fmt: Format,
  precision: lax.Precision | None,
  dtype: np.dtype,
) -> jax.Array:
  """qqmm(a^T, b^T), both quantized along the rows they are summed over."""
  amax_a = None if global_scale is None else amax(a, global_scale)
  return _primitive.qqmm(
    Operands(
      whole_groups(jnp.swapaxes(a, -1, -2), fmt),
      whole_groups(jnp.swapaxes(b, -1, -2), fmt),
      None,
      amax_a,
      global_scale,
    ),
    mode=fmt.mode,
    out_dtype=np.dtype(jnp.float32) if sums_follow else dtype,
    backward="quantized",
    precision=precision,
  )


def amax(a: jax.Array, global_scale: jax.Array) -> jax.Array:
  """The amax of a cotangent, over every axis along which the other's scale is one number."""
  ndim = a.ndim - 2 - global_scale.ndim
  shape = (1,) * ndim + global_scale.shape
  axes = [i for i in range(a.ndim) if i >= a.ndim - 2 or shape[i] == 1]
  magnitude = jnp.abs(a.astype(jnp.float32))
  return jnp.max(magnitude, axis=axes, initial=0, keepdims=True).squeeze((-1, -2))


def whole_groups(a: jax.Array, fmt: Format) -> jax.Array:
  """Zeros up to a multiple of the group size along the last axis."""
  missing = -a.shape[-1] % fmt.group_size
  return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]) if missing else a


def dequantized_for(dtype: np.dtype, ops: Operands, fmt: Format) -> jax.Array:
  """Packed w without its global scale, to be multiplied with an operand of this dtype.

  bfloat16 holds such a w exactly, so that it can meet a bfloat16 operand on the matrix units.
  """
  w = dequantize_packed(ops.w, ops.scales, fmt)
  return w.astype(dtype) if dtype == jnp.bfloat16 else w
