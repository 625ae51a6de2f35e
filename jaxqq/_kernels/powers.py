"""Scales as two factors each, so that sums can be multiplied by those of x and of w.

Sums times both scales may fit float32 where sums times one of them do not: 2**120 and 2**-120. A
scale's first factor, up to 2**64, keeps sums well within the range, whatever they are; the rest of
it, which nearly always is 1, comes after the other operand's scale. So no product leaves float32's
range unless the last one does.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

_LEAST, _LARGEST = 127 - 64, 127 + 64  # exponent fields of a first factor


def factors_of_power(scales: Any) -> tuple[Any, Any]:
  """Of float32 powers of two, 2**-127 to 2**127, or NaN, which the second one is then."""
  first, second = _factors_of_field(lax.bitcast_convert_type(scales, jnp.int32) >> 23)
  return first, jnp.where(scales == scales, second, jnp.float32(np.nan))


def factors_of_powers(words: Any) -> tuple[list[Any], list[Any]]:
  """Of four scales in a word, 2**(byte - 127), 0xFF being NaN.

  The first group has the NaN for all four, since the whole row is NaN then.
  """
  magnitudes = words & np.uint32(0x7F7F7F7F)
  nan = (magnitudes + np.uint32(0x01010101)) & words & np.uint32(0x80808080)
  words = lax.bitcast_convert_type(words, jnp.int32)
  fields = [(words >> (8 * i)) & 0xFF for i in range(4)]
  first, second = map(list, zip(*map(_factors_of_field, fields), strict=True))
  second[0] = jnp.where(nan == np.uint32(0), second[0], jnp.float32(np.nan))
  return first, second


def _factors_of_field(field: Any) -> tuple[Any, Any]:
  """2**(field - 127), field of 0 to 254; of 255, numbers."""
  first = jnp.minimum(jnp.maximum(field, _LEAST), _LARGEST)
  one, other = (
    lax.bitcast_convert_type(e << 23, jnp.float32) for e in (first, field + 127 - first)
  )
  return one, other


def factors_of_product(a: Any, b: Any) -> tuple[Any, Any]:
  """Of a * b, scalars of which none is negative: in turn, where it is out of float32's range.

  The larger one first: then sums times that lie between the sums and the result. NaN stays NaN.
  """
  both = a * b
  fits = (both >= np.float32(2.0**-126)) & (both <= np.finfo(np.float32).max)
  fits = fits | (a == 0) | (b == 0)
  is_larger = a > b
  larger, smaller = jnp.where(is_larger, a, b), jnp.where(is_larger, b, a)
  return jnp.where(fits, both, larger), jnp.where(fits, np.float32(1), smaller)
