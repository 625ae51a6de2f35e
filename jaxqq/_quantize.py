"""Quantizing to codes and scales, and back: the definition.

The way of the data: array -> `quantize_groups` -> codes, scales -> `pack` -> uint32 words,
and in reverse `unpack`, `dequantize_groups`. Groups run along the last axis throughout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq import _rounding
from jaxqq._formats import Format

# A tensor whose amax is below 2**-SMALL is quantized and dequantized as 2**RAISED times itself:
# then 2688 / amax, and every number that gets a code, is in the normal range of float32. All else
# scales with it, so that no bit depends on where the limit is.
SMALL, RAISED = 40, 64


def quantize_groups(
  a: jax.Array, fmt: Format, global_scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Codes and scale bytes of an array: the definition of quantization.

  Args:
    a: float32, float16 or bfloat16, (..., k).
    fmt: the format.
    global_scale: float32, a scalar or one value a matrix: (...) against a of (..., m, k).

  Returns:
    codes: int32, (..., k).
    scales: int32, (..., k / group_size). NaN for a group that is not finite, and under a global
      scale that is no amax: negative, not finite, or 0 beside a number of 2**-126 or more.
  """
  if global_scale is not None and global_scale.ndim:
    batch_shape = lax.broadcast_shapes(a.shape[:-2], global_scale.shape)
    a = jnp.broadcast_to(a, batch_shape + a.shape[-2:])
  num_groups = a.shape[-1] // fmt.group_size
  groups = a.astype(jnp.float32).reshape(*a.shape[:-1], num_groups, fmt.group_size)
  amax_bits = jnp.max(_rounding.magnitude_bits(groups), axis=-1, keepdims=True)
  poisoned = amax_bits >= _rounding.INFINITY_BITS
  magnitudes, of_zeros = groups, None
  if global_scale is not None:
    global_scale = _a_value_per_matrix(global_scale, groups.ndim)
    of_zeros = _rounding.magnitude_bits(global_scale) == 0
    poisoned = poisoned | ~_is_amax(global_scale)
    poisoned = poisoned | (of_zeros & (amax_bits >= _rounding.SMALLEST_NORMAL_BITS))
    global_scale, power = _raised(global_scale)
    magnitudes = _rounding.scaled(groups, power)
    amax = lax.bitcast_convert_type(amax_bits, jnp.float32)
    amax_bits = _rounding.magnitude_bits(_rounding.scaled(amax, power))
  if fmt.scale_is_power_of_two:
    scales, codes = _quantize_by_power_of_two(magnitudes, amax_bits, fmt)
    blank = poisoned
  else:
    scales, codes = _quantize_by_float(magnitudes, amax_bits, fmt, global_scale)
    if of_zeros is not None:
      scales = jnp.where(of_zeros, 0, scales)
    blank = poisoned | (scales == 0)
  negative = lax.bitcast_convert_type(groups, jnp.int32) < 0
  codes = codes | jnp.where(negative, 1 << (fmt.bits - 1), 0)
  codes = jnp.where(blank, 0, codes)
  scales = jnp.where(poisoned, fmt.scale_nan, scales)
  return codes.reshape(a.shape), scales.squeeze(-1)


def _quantize_by_float(
  groups: jax.Array, amax_bits: jax.Array, fmt: Format, global_scale: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """s = scale(amax / max * enc); code = element(a * (enc / s))."""
  amax = lax.bitcast_convert_type(amax_bits, jnp.float32)
  ideal = _rounding.divide(amax, jnp.float32(fmt.element_max), fmt.element_max_bits)
  enc = jnp.float32(1)
  if global_scale is not None:
    enc = _rounding.divide(jnp.float32(fmt.largest_value), global_scale)
    ideal = ideal * enc
  scales = _rounding.encode(*_rounding.split(ideal), fmt.scale)
  decoded = _rounding.times_power_of_two(*_rounding.decode(scales, fmt.scale))
  factor = _rounding.divide(enc, decoded, fmt.scale_bits)
  return scales, _rounding.encode(*_rounding.split(groups * factor), fmt.element)


def _quantize_by_power_of_two(
  groups: jax.Array, amax_bits: jax.Array, fmt: Format
) -> tuple[jax.Array, jax.Array]:
  """2**(e - 127) = amax / max rounded up; code = element(a / 2**(e - 127)).

  In float32, amax / max is a power of two only where it is one exactly, so comparing the two
  mantissas rounds up without dividing. One number is an exception: next above max * 2**-127
  the quotient, a subnormal, rounds back down to 2**-127.
  """
  max_bits = int(np.float32(fmt.element_max).view(np.int32))
  max_mantissa, max_exponent = max_bits & 0x7FFFFF, (max_bits >> 23) - 127
  mantissa, exponent = _rounding.split(lax.bitcast_convert_type(amax_bits, jnp.float32))
  above = (mantissa & 0x7FFFFF) > max_mantissa
  scales = exponent - max_exponent + above.astype(jnp.int32)
  scales = jnp.where(amax_bits <= (max_exponent << 23 | max_mantissa) + 1, 0, scales)
  mantissa, exponent = _rounding.split(groups)
  return scales, _rounding.encode(mantissa, exponent - (scales - 127), fmt.element)


def dequantize_groups(
  codes: jax.Array, scales: jax.Array, fmt: Format, global_scale: jax.Array | None = None
) -> jax.Array:
  """code * (scale * (global_scale / 2688)), exact without a global scale: the definition.

  No step but the last leaves the normal range of float32, and that one reaches its subnormals.

  Args:
    codes: int32, (..., k).
    scales: int32, (..., k / group_size).
    fmt: the format.
    global_scale: as for `quantize_groups`.

  Returns:
    float32, (..., k).
  """
  shape = codes.shape
  scales = scales[..., None]
  codes = codes.reshape(*scales.shape[:-1], fmt.group_size)
  negative = codes >= 1 << (fmt.bits - 1)
  counts, unit = _rounding.decode(codes, fmt.element)
  if fmt.scale_is_power_of_two:
    magnitude = _rounding.times_power_of_two(counts, scales + (unit - 127))
  else:
    scale_counts, scale_unit = _rounding.decode(scales, fmt.scale)
    scale = scale_counts.astype(jnp.float32) * np.float32(2.0**scale_unit)
    power: jax.Array | None = None
    if global_scale is not None:
      factor, power = decoding(_a_value_per_matrix(global_scale, scale.ndim), fmt)
      scale = scale * factor
    magnitude = counts.astype(jnp.float32) * np.float32(2.0**unit) * scale
    if power is not None:
      magnitude = _rounding.scaled(magnitude, power)
    negative = negative ^ (scales >= 1 << 7)
  values = jnp.where(negative, -magnitude, magnitude)
  nan = _rounding.is_nan(scales, fmt.scale) | _rounding.is_nan(codes, fmt.element)
  return jnp.where(nan, jnp.float32(np.nan), values).reshape(shape)


def alpha_factors(
  global_scale_x: jax.Array | None,
  global_scale_w: jax.Array | None,
  fmt: Format,
  power: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Two numbers that a product's sums are multiplied by, one after the other.

    first * second = (global_scale_x / 2688) * (global_scale_w / 2688) * 2**power

  Each quotient is rounded to float32's 24 bits. The exponent of the whole is shared out evenly
  between the two, so sums * first is between sums and the result: it is in range where these
  are. They must not be multiplied by each other before: XLA does that to constants.

  Args:
    global_scale_x, global_scale_w: float32, scalars or one value a matrix, (...), which
      broadcast; None stands for a quotient of 1.
    fmt: the format.
    power: what else the sums are to be multiplied by, in units of which they were formed.

  Returns:
    float32, two of the broadcast shape. Both normal; a quotient of 0 (or NaN, of what is no amax)
    is a factor of 0 (or NaN). Below 2**-252 first * second is 2**-252 to 2**-250, which makes
    zeros of sums all the same.
  """
  quotients, exponent = [], jnp.int32(power)
  ndim = max(jnp.ndim(a) for a in (global_scale_x, global_scale_w, 0) if a is not None)
  for global_scale in (global_scale_x, global_scale_w):
    quotient = jnp.float32(1)
    if global_scale is not None:
      quotient, raised = decoding(
        lax.expand_dims(global_scale, range(ndim - jnp.ndim(global_scale))), fmt
      )
      exponent = exponent + raised
    bits = lax.bitcast_convert_type(quotient, jnp.int32)
    is_number = (bits > 0) & (bits < _rounding.INFINITY_BITS)
    exponent = exponent + jnp.where(is_number, (bits >> 23) - 127, 0)
    mantissa = lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
    quotients.append(jnp.where(is_number, mantissa, quotient))
  first = exponent >> 1
  one, two = (
    _rounding.times_power_of_two(jnp.int32(1), jnp.clip(half, -126, 127))
    for half in (first, exponent - first)
  )
  return quotients[0] * one, quotients[1] * two


def decoding(global_scale: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
  """global_scale / 2688 as factor * 2**power: 0, normal, or NaN for what is no amax; and int32."""
  raised, power = _raised(global_scale)
  factor = _rounding.divide(raised, jnp.float32(fmt.largest_value), fmt.largest_value_bits)
  return jnp.where(_is_amax(global_scale), factor, jnp.float32(np.nan)), -power


def _raised(global_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
  """|global_scale| * 2**power, and power: int32, not 0 where float32 is too short below."""
  limit = int(np.float32(2.0**-SMALL).view(np.int32))
  power = jnp.where(_rounding.magnitude_bits(global_scale) < limit, RAISED, 0)
  return _rounding.scaled(global_scale, power), power


def _is_amax(global_scale: jax.Array) -> jax.Array:
  """Zero or positive, and finite: of the bits, since comparing floats takes -2**-149 for 0."""
  bits = lax.bitcast_convert_type(global_scale, jnp.int32)
  return ((bits >= 0) & (bits < _rounding.INFINITY_BITS)) | (bits == np.iinfo(np.int32).min)


def _a_value_per_matrix(values: jax.Array, ndim: int) -> jax.Array:
  """Shapes (...) for groups of (..., m, k / group_size, group_size), ndim dimensions."""
  trailing = min(3, ndim)
  return values.reshape((1,) * (ndim - trailing - values.ndim) + values.shape + (1,) * trailing)


def pack(codes: jax.Array, fmt: Format) -> jax.Array:
  """int32 codes (..., k) to uint32 words (..., k * bits / 32), the first code lowest."""
  words = codes.shape[-1] // fmt.codes_per_word
  codes = codes.astype(jnp.uint32).reshape(*codes.shape[:-1], words, fmt.codes_per_word)
  return jnp.sum(codes << _shifts(fmt, codes.ndim), axis=-1, dtype=jnp.uint32)


def unpack(packed: jax.Array, fmt: Format) -> jax.Array:
  """The inverse of `pack`."""
  codes = (packed[..., None] >> _shifts(fmt, packed.ndim + 1)) & np.uint32((1 << fmt.bits) - 1)
  k = packed.shape[-1] * fmt.codes_per_word
  return codes.astype(jnp.int32).reshape(*packed.shape[:-1], k)


def _shifts(fmt: Format, ndim: int) -> jax.Array:
  """0, bits, 2 * bits, ... along the last of ndim axes."""
  shape = (1,) * (ndim - 1) + (fmt.codes_per_word,)
  return lax.broadcasted_iota(jnp.uint32, shape, ndim - 1) * np.uint32(fmt.bits)


def scale_bytes(scales: jax.Array) -> jax.Array:
  """Scales as uint8 or as the float8 type of the same bytes, to int32."""
  return lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
