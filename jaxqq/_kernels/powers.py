"""Scales as two factors each, so that sums can be multiplied by several of them.

Sums times the scales of x and of w may fit float32 where sums times one of them do not: 2**120 and
2**-120. With half of a scale before the other operand's, and half after it, no product leaves
float32's range unless the last one does.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq._kernels.codes import amax_or_nan


def halves_of_power(scales: Any) -> tuple[Any, Any]:
  """Of float32 powers of two, 2**-127 to 2**127, or NaN, which the second one is then."""
  field = lax.bitcast_convert_type(scales, jnp.int32) >> 23  # 0 is 2**-127
  first = (field + 127) >> 1
  one, other = (
    lax.bitcast_convert_type(e << 23, jnp.float32) for e in (first, field + 127 - first)
  )
  return one, jnp.where(scales == scales, other, jnp.float32(np.nan))


def halves_of_powers(words: Any) -> tuple[list[Any], list[Any]]:
  """Of four scales in a word, 2**(byte - 127), 0xFF being NaN: as `halves_of_power`.

  An exponent's half is the average of the byte and 127, of all four bytes at once, rounded down
  and up. The first group has the NaN for all four, since the whole row is NaN then.
  """
  middle, top_bits = np.uint32(0x7F7F7F7F), np.uint32(0x80808080)
  half = ((words ^ middle) >> np.uint32(1)) & middle
  fields = (words & middle) + half, (words | middle) - half
  first, second = ([_power_of_byte(each, i) for i in range(4)] for each in fields)
  nan = ((words & middle) + np.uint32(0x01010101)) & words & top_bits
  second[0] = jnp.where(nan == np.uint32(0), second[0], jnp.float32(np.nan))
  return first, second


def _power_of_byte(words: Any, i: int) -> Any:
  """2**(byte - 127) of byte i, which is neither 0 nor 255."""
  bits = words << np.uint32(23 - 8 * i) if i < 3 else words >> np.uint32(1)
  return lax.bitcast_convert_type(bits & np.uint32(0x7F800000), jnp.float32)


def halves_of_amax(amax: Any) -> tuple[Any, Any]:
  """Of a global scale, a scalar: 2**64, 1 or 2**-64, and the rest, 2**-85 to 2**64.

  Its bits cannot be had: Mosaic casts no scalars.
  """
  amax, large = amax_or_nan(amax), np.float32(2.0**64)
  is_large, is_small = amax > np.float32(2.0**40), amax < np.float32(2.0**-40)
  first = jnp.where(is_large, large, jnp.where(is_small, 1 / large, np.float32(1)))
  inverse = jnp.where(is_large, 1 / large, jnp.where(is_small, large, np.float32(1)))
  return first, amax * inverse
