"""The float32 steps that decide a quantized bit, in integers: the same on every platform.

Floating point as XLA compiles it is not enough for formats that promise their bits: it may
multiply by a reciprocal where a division by a constant was written, divides to within 2 ulp
on GPUs, flushes subnormals to zero on CPUs, and may drop a round trip through a narrower
type. Only float32 multiplication is used as it is.

A number is handled as its magnitude, split into (mantissa, exponent), both int32, with
2**23 <= mantissa < 2**24 and value = mantissa * 2**(exponent - 150): float32's own fields,
with the hidden bit set and an exponent that may leave the range of float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

_MANTISSA = 0x007FFFFF
_HIDDEN_BIT = 0x00800000
INFINITY_BITS = 0x7F800000
SMALLEST_NORMAL_BITS = 0x00800000
_LARGEST_FINITE_BITS = 0x7F7FFFFF


def magnitude_bits(a: jax.Array) -> jax.Array:
  """The bits of |a|, float32, as int32: they order as the magnitudes do, NaN last."""
  return lax.bitcast_convert_type(a, jnp.int32) & 0x7FFFFFFF


def amax(a: jax.Array, axes: tuple[int, ...], *, keepdims: bool = False) -> jax.Array:
  """max |a| in float32, 0 of nothing. In integers: on a CPU, maxima of floats flush subnormals."""
  bits = magnitude_bits(a.astype(jnp.float32))
  return lax.bitcast_convert_type(
    jnp.max(bits, axis=axes, initial=0, keepdims=keepdims), jnp.float32
  )


def split(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Splits |a|, float32 and finite, into mantissa and exponent; zero becomes 2**-276."""
  bits = magnitude_bits(a)
  # A subnormal is its own bits times 2**-149, and integers this small convert exactly.
  subnormal = bits < _HIDDEN_BIT
  normalized = lax.bitcast_convert_type(bits.astype(jnp.float32), jnp.int32)
  bits = jnp.where(subnormal, normalized, bits)
  exponent = (bits >> 23) - jnp.where(subnormal, 149, 0)
  return (bits & _MANTISSA) | _HIDDEN_BIT, exponent


def divide(a: jax.Array, b: jax.Array, b_bits: int = 24) -> jax.Array:
  """|a| / |b| in float32, to nearest even, for finite a and b.

  `b_bits` bounds the significant bits of b; a divisor of few bits is divided by faster. A
  quotient above float32's range becomes the largest finite number (so does any a / 0 with a
  above 2**-148), one below the normal range becomes zero.
  """
  mantissa, a_exponent = split(a)
  divisor, b_exponent = split(b)
  divisor = divisor >> (24 - b_bits)
  # Long division, in steps whose shifted remainder fits 31 bits, until the quotient has at
  # least 26 bits; the last of them also tells whether a remainder is left.
  quotient = lax.div(mantissa, divisor)
  remainder = mantissa - quotient * divisor
  missing = b_bits + 2
  while missing:
    step = min(missing, 31 - b_bits)
    remainder = remainder << step
    digit = lax.div(remainder, divisor)
    remainder = remainder - digit * divisor
    quotient = (quotient << step) | digit
    missing -= step
  quotient = quotient | (remainder != 0).astype(jnp.int32)
  bits = lax.bitcast_convert_type(quotient.astype(jnp.float32), jnp.int32)
  exponent = (bits >> 23) + a_exponent - b_exponent - 26
  bits = (jnp.clip(exponent, 0, 254) << 23) | (bits & _MANTISSA)
  bits = jnp.where(exponent > 254, _LARGEST_FINITE_BITS, bits)
  bits = jnp.where(exponent < 1, 0, bits)
  return lax.bitcast_convert_type(bits, jnp.float32)


def scaled(a: jax.Array, power: jax.Array | int) -> jax.Array:
  """|a| * 2**power in float32, to nearest even, subnormals included.

  What is above the range becomes the largest finite number; infinities and NaNs stay.
  """
  mantissa, exponent = split(a)
  exponent = exponent + power
  normal = (jnp.clip(exponent, 1, 254) << 23) | (mantissa & _MANTISSA)
  # Below the normal range the last bit counts 2**-149; shifted by 25, a mantissa rounds to 0.
  shift = jnp.clip(1 - exponent, 1, 25)
  subnormal = (mantissa + jnp.left_shift(1, shift - 1) - 1 + ((mantissa >> shift) & 1)) >> shift
  bits = jnp.where(exponent < 1, subnormal, normal)
  bits = jnp.where(exponent > 254, _LARGEST_FINITE_BITS, bits)
  whole = magnitude_bits(a)
  return lax.bitcast_convert_type(jnp.where(whole >= INFINITY_BITS, whole, bits), jnp.float32)


def encode(mantissa: jax.Array, exponent: jax.Array, dtype: np.dtype) -> jax.Array:
  """The code of a magnitude in a narrow float type, without its sign: nearest even, saturating.

  int32, the sign bit clear. Source: ml_dtypes' definitions of the types.
  """
  info = ml_dtypes.finfo(dtype)
  largest = int(np.array(info.max, dtype).view(np.uint8))
  smallest_exponent = int(info.minexp) + 127
  # Below the normal range the step stays that of the smallest exponent. Shifted by 25 or
  # more, a mantissa rounds to 0 whatever it is.
  shift = (23 - info.nmant) + jnp.clip(smallest_exponent - exponent, 0, info.nmant + 2)
  odd = (mantissa >> shift) & 1
  half = jnp.left_shift(1, shift - 1)
  steps = (mantissa + half - 1 + odd) >> shift
  code = steps + (jnp.maximum(exponent - smallest_exponent, 0) << info.nmant)
  return jnp.minimum(code, largest)


def decode(code: jax.Array, dtype: np.dtype) -> tuple[jax.Array, int]:
  """The magnitude of a code (its sign bit is ignored) as an integer count of 2**unit.

  Returns the int32 counts and the exponent `unit`, that of the smallest subnormal. A NaN
  code is read as if it were a number: see `is_nan`.
  """
  info = ml_dtypes.finfo(dtype)
  code = code & ((1 << (info.bits - 1)) - 1)
  fraction = code & ((1 << info.nmant) - 1)
  exponent = code >> info.nmant
  hidden = (exponent > 0).astype(jnp.int32) << info.nmant
  counts = (fraction | hidden) << jnp.maximum(exponent - 1, 0)
  return counts, int(info.minexp) - int(info.nmant)


def is_nan(code: jax.Array, dtype: np.dtype) -> jax.Array:
  """Where a code, its sign bit included, is NaN."""
  codes = np.arange(1 << ml_dtypes.finfo(dtype).bits, dtype=np.uint8)
  nan = jnp.zeros(code.shape, bool)
  for nan_code in codes[np.isnan(codes.view(dtype).astype(np.float32))]:
    nan = nan | (code == int(nan_code))
  return nan


def times_power_of_two(counts: jax.Array, exponent: jax.Array | int) -> jax.Array:
  """counts * 2**exponent in float32, exact into the subnormals, infinite above the range.

  counts: non-negative, below 2**24; exponent: -149 or more.
  """
  bits = lax.bitcast_convert_type(counts.astype(jnp.float32), jnp.int32)
  field = (bits >> 23) + exponent
  normal = (jnp.clip(field, 1, 254) << 23) | (bits & _MANTISSA)
  # A subnormal's bits count 2**-149, which is at most what `counts` counts.
  subnormal = counts << jnp.clip(exponent + 149, 0, 23)
  bits = jnp.where(field < 1, subnormal, jnp.where(field > 254, INFINITY_BITS, normal))
  return lax.bitcast_convert_type(jnp.where(counts == 0, 0, bits), jnp.float32)
