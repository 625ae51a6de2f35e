"""The products that the backward pass is made of, both kinds: sums over rows of two matrices.

Most of them sum over an axis that comes first in what the forward pass multiplied. Operands are
marked as `transposed` then, and not moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxqq import _primitive, _rounding
from jaxqq._formats import Format
from jaxqq._reference import Operands, matmul, matrix_ndim, times_alpha, whole_groups


def operands_of_gradient(
  g: tuple[jax.Array, jax.Array | None],  # the cotangent and its global scale
  others: tuple[jax.Array, jax.Array | None],  # w or x, as the forward pass has it
  *,
  wrt: str,
  transposed: tuple[str, ...],  # in the forward pass
) -> Operands:
  """What dx[m, k] = sum_n g[m, n] w[n, k] or dw[n, k] = sum_m g[m, n] x[m, k] multiplies.

  In this order, or in the other one for the gradient of what is transposed, which is so too.
  """
  by = "x" if wrt == "w" else "w"
  # What w and x came with last is now the rows, and what is summed over comes first.
  pair = [(*g, wrt == "w"), (*others, by not in transposed)]
  if wrt in transposed:
    pair.reverse()
  (x, scale_x, x_transposed), (w, scale_w, w_transposed) = pair
  names = (*("x",) * x_transposed, *("w",) * w_transposed)
  return Operands(x, w, None, scale_x, scale_w, names)


def sum_over_rows(
  operands: Operands,  # not packed
  shape: tuple[int, ...],  # (..., m, n)
  product: Callable[..., jax.Array],
) -> jax.Array:
  """sum_k x[..., m, k] * w[..., n, k], also over the batch axes that are missing from shape.

  Such an axis joins k, unless x or w lacks it, or global scales differ along it: a product has
  one global scale a matrix. Those axes are summed after it.
  """
  batch = operands.batch_shape
  ndim = len(batch)

  def aligned(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (ndim - len(sizes)) + sizes

  def is_joined(axis: int) -> bool:
    return all(
      aligned(sizes)[axis] == (batch[axis] if matrix_ndim(name) else 1)
      for name, sizes in zip(operands.names, operands.batch_shapes, strict=True)
    )

  out_batch = aligned(shape[:-2])
  missing = [i for i in range(ndim) if out_batch[i] == 1 and batch[i] != 1]
  joined = [i for i in missing if is_joined(i)]
  kept = [i for i in range(ndim) if i not in joined]

  def matrices(name: str) -> jax.Array:
    a = getattr(operands, name)
    a = a.reshape(*aligned(a.shape[:-2]), *a.shape[-2:])
    return _joined(a, kept, joined, a.ndim + operands.axes(name)[1])

  def scale(a: jax.Array | None) -> jax.Array | None:
    return None if a is None else a.reshape([aligned(a.shape)[i] for i in kept])

  out = product(
    Operands(
      matrices("x"),
      matrices("w"),
      None,
      scale(operands.global_scale_x),
      scale(operands.global_scale_w),
      operands.transposed,
    ),
    sums_follow=len(missing) > len(joined),
  )
  summed = tuple(kept.index(i) for i in missing if i in kept)
  return (jnp.sum(out, axis=summed) if summed else out).reshape(shape)


def _joined(a: jax.Array, kept: list[int], joined: list[int], contracted: int) -> jax.Array:
  """The joined batch axes become one with the contracted axis. Nothing moves if that is first."""
  if not joined:
    return a
  first, second = a.ndim - 2, a.ndim - 1
  order = [*joined, first, second] if contracted == first else [first, *joined, second]
  size = math.prod(a.shape[i] for i in (*joined, contracted))
  matrix = (size, a.shape[second]) if contracted == first else (a.shape[first], size)
  return a.transpose(*kept, *order).reshape(*(a.shape[i] for i in kept), *matrix)


def straight_through_product(operands: Operands, *, sums_follow: bool, fmt: Format) -> jax.Array:
  """x w^T in float32; a global scale is that of an operand that was dequantized without it."""
  del sums_follow
  ordered = operands.untransposed()
  out = matmul(ordered.x, jnp.swapaxes(ordered.w, -1, -2))
  return times_alpha(out, ordered.global_scale_x, ordered.global_scale_w, fmt)


def quantized_product(
  operands: Operands,
  *,
  sums_follow: bool,
  fmt: Format,
  how: _primitive.How,
  dtype: np.dtype,
) -> jax.Array:
  """qqmm(x, w), both quantized along the axis they are summed over."""
  return _primitive.qqmm(
    whole_groups(operands, fmt),
    mode=fmt.mode,
    out_dtype=np.dtype(jnp.float32) if sums_follow else dtype,
    backward="quantized",
    precision=how.precision,
    implementation=how.implementation,
  )


def amax(a: jax.Array, batch_shape: tuple[int, ...]) -> jax.Array:
  """The amax of (..., m, n) over every axis but those of matrices that have scales of their own."""
  ndim = a.ndim - 2
  shape = (1,) * (ndim - len(batch_shape)) + batch_shape[max(0, len(batch_shape) - ndim) :]
  axes = [i for i in range(a.ndim) if i >= a.ndim - 2 or shape[i] == 1]
  return _rounding.amax(a, tuple(axes), keepdims=True).squeeze((-1, -2))
