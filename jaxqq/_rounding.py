"""The float32 steps that decide a quantized bit, in integers: the same on every platform.

Floating point as XLA compiles it is not enough for formats that promise their bits: it may
multiply by a reciprocal where a division by a constant was written, divides to within 2 ulp
on GPUs, flushes subnormals to zero on CPUs, and may drop a round trip through a narrower
type. Only float32 multiplication is used as it is, and additions whose result float32 rounds
the same wherever it is computed. A CPU's division, of operands and quotients that are normal,
rounds to nearest even, so that there it does too (`ON_CPU`).

A number is handled as its magnitude, split into (mantissa, exponent), both int32, with
2**23 <= mantissa < 2**24 and value = mantissa * 2**(exponent - 150): float32's own fields,
with the hidden bit set and an exponent that may leave the range of float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

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

  `b_bits` bounds the significant bits of b; up to 5, one integer division is enough. A quotient
  above float32's range becomes the largest finite number (so does any a / 0 with a above
  2**-148), one below the normal range becomes zero.
  """
  mantissa, a_exponent = split(a)
  divisor, b_exponent = split(b)
  divisor = divisor >> (24 - b_bits)
  # Long division, in steps whose shifted remainder fits 31 bits, until the quotient has at
  # least 26 bits; the last of them also tells whether a remainder is left.
  quotient, remainder, missing, free = jnp.int32(0), mantissa, b_bits + 2, 31 - 24
  while missing:
    step = min(missing, free)
    remainder = remainder << step
    digit = lax.div(remainder, divisor)
    remainder = remainder - digit * divisor
    quotient = (quotient << step) | digit
    missing, free = missing - step, 31 - b_bits
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


def divide_on_cpu(a: jax.Array, b: jax.Array, b_bits: int = 24) -> jax.Array:
  """`divide` of a normal a, or of one whose quotient is 0, on a CPU: its division rounds so too.

  What `divide` makes the largest finite number is infinite.
  """
  del b_bits
  if not jnp.ndim(b):
    # By the reciprocal of one number for all XLA would multiply. It takes this for many.
    places = [lax.broadcasted_iota(jnp.int32, a.shape, axis) for axis in range(a.ndim)]
    b = jnp.where(sum(places, magnitude_bits(a) >> 1) < 0, a, b)
  return a / b


@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """The steps that have a shorter form where the processor is known.

  Attributes:
    divide: `divide`, of what has quotients in range.
    scaled: `scaled`, by a power of 0 or 64. By 0 of numbers of 2**-40 or more; else results below
      2**-103 may be any number below 2**-103.
    hoisted: what is computed once for a matrix, kept out of the loops over its elements.
  """

  divide: Callable[..., jax.Array]
  scaled: Callable[[jax.Array, jax.Array], jax.Array]
  hoisted: Callable[[Any], Any]


def arithmetic_of(platform: str) -> Arithmetic:
  """For a CPU XLA compiles half of the instructions of `ANYWHERE`, or less, in half the time."""
  return ON_CPU if platform == "cpu" else ANYWHERE


def exponent_to_reach(bits: jax.Array, largest: float) -> jax.Array:
  """e + 127, int32, for the least e with |a| <= largest * 2**e.

  bits: int32, of |a|, float32. Of a subnormal |a| the result is at most that of 2**-126.
  """
  largest_bits = int(np.float32(largest).view(np.int32))
  mantissa, exponent = largest_bits & _MANTISSA, (largest_bits >> 23) - 127
  # Comparing the mantissas rounds up without a division: what is left of one carries.
  return ((bits + (_MANTISSA - mantissa)) >> 23) - exponent


def encode(bits: jax.Array, dtype: np.dtype) -> jax.Array:
  """The code of a magnitude in a narrow float type, without its sign: nearest even, saturating.

  A power of two is added that has the last place of a code as its own: float32 addition rounds
  as codes are rounded. The bits in between keep XLA from making one operation of that addition
  and a multiplication before it.

  Args:
    bits: int32, of a float32 magnitude. Subnormal ones may be taken for 0, as which they round.
    dtype: of the code. Source: ml_dtypes' definitions of the types.

  Returns:
    int32, the sign bit clear.
  """
  info = ml_dtypes.finfo(dtype)
  place = 23 - info.nmant  # of a code's last bit in float32's mantissa
  smallest = int(info.minexp) + 127
  bits = jnp.minimum(bits, int(np.float32(info.max).view(np.int32)))
  power = jnp.maximum(bits & INFINITY_BITS, smallest << 23) + (place << 23)
  total = lax.bitcast_convert_type(bits, jnp.float32) + lax.bitcast_convert_type(power, jnp.float32)
  steps = lax.bitcast_convert_type(total, jnp.int32) - power
  # Below the normal range the step stays that of the smallest exponent.
  return steps + (power >> place) - ((smallest + place) << info.nmant)


def encode_up(bits: jax.Array, dtype: np.dtype) -> jax.Array:
  """As `encode`, to the next code that is not smaller, saturating.

  Args:
    bits: int32, of a float32 magnitude. Subnormal ones are taken for 0.
    dtype: of the code.

  Returns:
    int32, the sign bit clear.
  """
  mantissa, shift, base = _in_last_places(bits, dtype)
  shift = jnp.minimum(shift, 30)
  return base + ((mantissa + jnp.left_shift(1, shift) - 1) >> shift)


def encode_stochastic(bits: jax.Array, random: jax.Array, dtype: np.dtype) -> jax.Array:
  """As `encode`, to one of the two codes around a magnitude, saturating.

  The upper one of f < a < c has the probability (a - f) / (c - f), to within 2**-17. A number that
  a code has keeps it.

  Args:
    bits: int32, of a float32 magnitude. Subnormal ones are taken for 0.
    random: int32, uniform in 0 to 65535.
    dtype: of the code.

  Returns:
    int32, the sign bit clear.
  """
  mantissa, shift, base = _in_last_places(bits, dtype)
  shift = jnp.minimum(shift - 16, 25)  # what is left counts 2**-16 of a code's last place
  steps = (mantissa + jnp.left_shift(1, shift - 1)) >> shift
  return base + ((steps + random) >> 16)


def _in_last_places(bits: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
  """mantissa, shift and base: a magnitude's code is base + mantissa / 2**shift, but for rounding.

  Below a code's normal range, its last place stays that of the smallest exponent.
  """
  info = ml_dtypes.finfo(dtype)
  smallest = int(info.minexp) + 127
  bits = jnp.minimum(bits, int(np.float32(info.max).view(np.int32)))
  field = bits >> 23
  mantissa = jnp.where(field == 0, 0, (bits & _MANTISSA) | _HIDDEN_BIT)
  exponent = jnp.maximum(field, smallest)
  # The hidden bit counts one step of the exponent's own, so the smallest exponent has base 0.
  return mantissa, exponent - field + (23 - info.nmant), (exponent - smallest) << info.nmant


def decode(code: jax.Array, dtype: np.dtype) -> jax.Array:
  """The magnitude of a code in float32; its sign bit is ignored.

  A NaN code is read as if it were a number: see `is_nan`.
  """
  info = ml_dtypes.finfo(dtype)
  code = code & ((1 << (info.bits - 1)) - 1)
  bits = (code << (23 - info.nmant)) + ((int(info.minexp) + 126) << 23)
  value = lax.bitcast_convert_type(bits, jnp.float32)
  # Without an exponent there is no hidden bit, and the exponent is that of the smallest normal.
  without = value + value - np.float32(2.0 ** int(info.minexp))
  return jnp.where(code < 1 << info.nmant, without, value)


def value(code: jax.Array, dtype: np.dtype) -> jax.Array:
  """The number of a code, sign and NaN included, in float32."""
  sign_bit = 1 << (ml_dtypes.finfo(dtype).bits - 1)
  bits = lax.bitcast_convert_type(decode(code, dtype), jnp.int32)
  bits = bits | ((code & sign_bit) << (32 - ml_dtypes.finfo(dtype).bits))
  number = lax.bitcast_convert_type(bits, jnp.float32)
  nan_codes = _nan_codes(dtype)
  return jnp.where(is_nan(code, dtype), jnp.float32(np.nan), number) if nan_codes else number


def is_nan(code: jax.Array, dtype: np.dtype) -> jax.Array:
  """Where a code, its sign bit included, is NaN."""
  nan = jnp.zeros(code.shape, bool)
  for nan_code in _nan_codes(dtype):
    nan = nan | (code == nan_code)
  return nan


def _nan_codes(dtype: np.dtype) -> list[int]:
  codes = np.arange(1 << ml_dtypes.finfo(dtype).bits, dtype=np.uint8)
  return [int(code) for code in codes[np.isnan(codes.view(dtype).astype(np.float32))]]


def power_of_two(exponent: jax.Array) -> jax.Array:
  """2**exponent in float32, for exponents of -126 to 127."""
  return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def times_power_of_two(a: jax.Array, exponent: jax.Array | int) -> jax.Array:
  """a * 2**exponent in float32, infinite above the range, for what no subnormal has to round.

  a is 0, or normal and positive, so this takes fewer steps than `scaled`.
  """
  bits = lax.bitcast_convert_type(a, jnp.int32)
  field = (bits >> 23) + exponent
  mantissa = bits & _MANTISSA
  normal = (jnp.clip(field, 1, 254) << 23) | mantissa
  subnormal = (mantissa | _HIDDEN_BIT) >> jnp.clip(1 - field, 0, 24)
  result = jnp.where(field < 1, subnormal, jnp.where(field > 254, INFINITY_BITS, normal))
  return lax.bitcast_convert_type(jnp.where(bits == 0, 0, result), jnp.float32)


def magnified(a: jax.Array, power: jax.Array) -> jax.Array:
  """|a| * 2**power in float32 for powers of -126 to 127, rounded once.

  What is below 2**-103 may become any number below it: no code but 0 is made of such.
  """
  bits = magnitude_bits(a)
  # On a CPU a subnormal operand is 0. As an integer it is its own bits.
  subnormal = bits.astype(jnp.float32) * power_of_two(jnp.maximum(power - 149, -126))
  normal = lax.bitcast_convert_type(bits, jnp.float32) * power_of_two(power)
  return jnp.where(bits < _HIDDEN_BIT, subnormal, normal)


ANYWHERE = Arithmetic(divide, scaled, lambda values: values)
ON_CPU = Arithmetic(divide_on_cpu, magnified, lax.optimization_barrier)
