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
    scales: int32, (..., k / group_size).
  """
  if global_scale is not None and global_scale.ndim:
    batch_shape = lax.broadcast_shapes(a.shape[:-2], global_scale.shape)
    a = jnp.broadcast_to(a, batch_shape + a.shape[-2:])
  num_groups = a.shape[-1] // fmt.group_size
  groups = a.astype(jnp.float32).reshape(*a.shape[:-1], num_groups, fmt.group_size)
  amax_bits = jnp.max(_rounding.magnitude_bits(groups), axis=-1, keepdims=True)
  poisoned = amax_bits >= _rounding.INFINITY_BITS
  if global_scale is not None:
    global_scale = _a_value_per_matrix(global_scale, groups.ndim)
    poisoned = poisoned | ~_is_amax(global_scale)
  if fmt.scale_is_power_of_two:
    scales, codes = _quantize_by_power_of_two(groups, amax_bits, fmt)
    blank = poisoned
  else:
    scales, codes = _quantize_by_float(groups, amax_bits, fmt, global_scale)
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
    if global_scale is not None:
      scale = scale * decoding_factor(_a_value_per_matrix(global_scale, scale.ndim), fmt)
    magnitude = counts.astype(jnp.float32) * np.float32(2.0**unit) * scale
    negative = negative ^ (scales >= 1 << 7)
  values = jnp.where(negative, -magnitude, magnitude)
  nan = _rounding.is_nan(scales, fmt.scale) | _rounding.is_nan(codes, fmt.element)
  return jnp.where(nan, jnp.float32(np.nan), values).reshape(shape)


def decoding_factor(global_scale: jax.Array, fmt: Format) -> jax.Array:
  """global_scale / 2688: what dequantized numbers are multiplied by; NaN for what is no amax."""
  factor = _rounding.divide(global_scale, jnp.float32(fmt.largest_value), fmt.largest_value_bits)
  return jnp.where(_is_amax(global_scale), factor, jnp.float32(np.nan))


def _is_amax(global_scale: jax.Array) -> jax.Array:
  return (global_scale >= 0) & (global_scale <= np.finfo(np.float32).max)


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
