"""Random Hadamard transforms: rotations that spread the outliers of a group over all of it.

    y = H diag(s) x / sqrt(n)    H[i, j] = (-1)**popcount(i & j), Sylvester's; s = 1 or -1 at random

of every n neighbours along the last axis. It is orthonormal, so a product whose two operands are
rotated alike along the contracted axis stays as it was, and nothing is ever rotated back.

The sums are float32 and in one order, each a sum of two, so their bits are the same everywhere.
Numbers below 2**-126 count as zeros on the way, as they do on a CPU. The result is bfloat16, if not
asked for in float32: what is quantized afterwards has fewer bits yet.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq import _rounding

SIZES = (16, 32, 64, 128)


def rotated(a: jax.Array, signs: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
  """(..., m, k), every n neighbours rotated; k a multiple of n.

  Args:
    a: float32, float16 or bfloat16, (..., m, k).
    signs: float32 (..., n), 1 or -1; the leading axes are those of matrices.
    dtype: of the result, bfloat16 or float32.
  """
  of_matrices = signs.shape[:-1]
  ones = (1,) * (a.ndim - 2 - len(of_matrices))
  signs = signs.reshape(*ones, *of_matrices, 1, 1, signs.shape[-1])
  return rotated_by(a, factors_of_signs(signs), dtype)


def factors_of_signs(signs: jax.Array) -> jax.Array:
  """What elements are multiplied by first: a power of two, so that sums stay in range."""
  return signs * np.float32(2.0 ** -_power(signs.shape[-1]))


def last_factor(size: int) -> np.float32:
  """What sums are multiplied by last: what is left of 1 / sqrt(n)."""
  return np.float32(2.0 ** _power(size) / np.sqrt(size))


def _power(size: int) -> int:
  return (size.bit_length() - 1) // 2


def rotated_by(a: jax.Array, factors: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
  """`rotated`, by `factors_of_signs` that broadcast with (..., k / n, n)."""
  size = factors.shape[-1]
  *batch, k = a.shape
  blocks = a.astype(jnp.float32).reshape(*batch, k // size, size)
  sums = _without_subnormals(blocks * factors)
  half = 1
  while half < size:
    pairs = sums.reshape(*blocks.shape[:-1], size // (2 * half), 2, half)
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    both = jnp.stack([first + second, first - second], axis=-2)
    sums = _without_subnormals(both.reshape(blocks.shape))
    half *= 2
  rest = last_factor(size)
  sums = sums if rest == 1 else _without_subnormals(sums * rest)
  if dtype == jnp.float32:
    return sums.reshape(a.shape)
  # A conversion to bfloat16 and back, which may follow, XLA drops; this it does not.
  return lax.reduce_precision(sums, 8, 7).reshape(a.shape).astype(jnp.bfloat16)


def _without_subnormals(a: jax.Array) -> jax.Array:
  is_zero = _rounding.magnitude_bits(a) < _rounding.SMALLEST_NORMAL_BITS
  return jnp.where(is_zero, jnp.float32(0), a)
