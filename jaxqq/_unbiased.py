"""Unbiased scales, MS-EDEN's: elements are rounded to nearest, and scales make up for the error.

    S = sum(y * y) / sum(y * q)    of a rotation's n neighbours; 1 where sum(y * q) is 0
    scale = e4m3(s * S)            rounded stochastically, for each of their groups

y are the numbers divided by the scales of their groups and of the tensor, q the elements that they
are rounded to, and s the scale of a group, rounded to nearest. So sum(y * S * q) is sum(y * y): all
of y's length is there, and the mean over rotations is the number. It nearly is with Hadamard's, of
which there are few, best where groups of a rotation have scales alike: a row 2**-14 times as large
as the tensor, with an outlier, came out 6 in 1000 too large.

Numbers are mapped to ELEMENT_MAX, and those of the tensor's largest group to a scale of SCALE_MAX,
above which there is room for S.

Source: arXiv:2601.22813, and its code (IST-DASLab/Quartet-II at 8776a90,
src/models/quantization/schemes/quartet_2.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq import _rounding
from jaxqq._formats import Format
from jaxqq._rounding import Arithmetic

ELEMENT_MAX = 6 / ((17 / 16) * 0.93)  # above 6: the largest element of a group may be clipped
SCALE_MAX = 255.99
# Above what any number divided by its scale is, but where a caller's amax is too small.
_LARGEST_NUMBER = np.float32(2.0**15)


def encode(bits: jax.Array, dtype: np.dtype) -> jax.Array:
  """As `_rounding.encode`, but 1 for 0: then all codes of the group are zeros."""
  codes = _rounding.encode(bits, dtype)
  return jnp.where(codes == 0, int(np.array(1, dtype).view(np.uint8)), codes)


def corrected_scales(
  numbers: jax.Array,
  elements: jax.Array,
  scales: jax.Array,
  random: jax.Array,
  rotation: int,
  fmt: Format,
  arithmetic: Arithmetic,
) -> jax.Array:
  """int32 (..., m, groups), of the magnitudes y and q, float32 (..., m, k), and s, int32.

  random: int32 (..., m, groups), uniform in 0 to 65535.

  A scale that is NaN makes all of its rotation NaN.
  """
  blocks = (*numbers.shape[:-1], numbers.shape[-1] // rotation, rotation)
  y, q = (a.reshape(blocks) for a in (jnp.minimum(numbers, _LARGEST_NUMBER), elements))
  squares, products = _sum(_rounded(y * y)), _sum(_rounded(y * q))
  has_none = products == 0
  one = jnp.float32(1)
  correction = arithmetic.divide(
    jnp.where(has_none, one, squares), jnp.where(has_none, one, products)
  )
  own = scales.reshape(*blocks[:-1], rotation // fmt.group_size)
  corrected = _rounding.magnitude_bits(_rounding.decode(own, fmt.scale) * correction)
  rounded = _rounding.encode_stochastic(corrected, random.reshape(own.shape), fmt.scale)
  poisoned = jnp.any(own == fmt.scale_nan, axis=-1, keepdims=True)
  return jnp.where(poisoned, fmt.scale_nan, rounded).reshape(scales.shape)


def _rounded(a: jax.Array) -> jax.Array:
  """To one bit less than float32's: else a sum might take a product that is not rounded."""
  return lax.reduce_precision(a, 8, 22)


def _sum(a: jax.Array) -> jax.Array:
  """(..., 1), of the last axis, a power of two, in one order: the same bits everywhere."""
  while a.shape[-1] > 1:
    half = a.shape[-1] // 2
    a = a[..., :half] + a[..., half:]
  return a
