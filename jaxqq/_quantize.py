"""Quantizing to codes and scales, and back: the definition.

The way of the data: array -> `quantize_groups` -> codes, scales -> `pack` -> uint32 words,
and in reverse `unpack`, `dequantize_groups`. Groups run along the last axis throughout.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq import _rounding
from jaxqq._formats import Format, significant_bits
from jaxqq._rounding import ANYWHERE, Arithmetic

# Of the bits of magnitudes, the codes of a dtype.
Encode: TypeAlias = Callable[[jax.Array, np.dtype], jax.Array]

# A tensor whose amax is below 2**-SMALL is quantized and dequantized as 2**RAISED times itself:
# then 2688 / amax, and every number that gets a code, is in the normal range of float32. All else
# scales with it, so that no bit depends on where the limit is.
SMALL, RAISED = 40, 64
# Of four over six, errors count 2**-13 of what the scale for 4 gives a code of 1.
ERROR_BITS = 13

# JAX traces it once for operands of one shape; its operations then stand where it is called.
_traced_once = functools.partial(jax.jit, static_argnames=("fmt",), inline=True)


@dataclasses.dataclass(frozen=True)
class Encoding:
  """What makes codes of the elements of an array, a value for each group: (..., groups, 1).

  Attributes:
    scales: int32, of the groups; NaN where they are poisoned (`encoding_of`).
    blank: bool, whether all of the group's codes are 0.
    power: int32, elements are multiplied by 2**power; None for 0.
    factor: float32, and then by this; None for 1.
  """

  scales: jax.Array
  blank: jax.Array
  power: jax.Array | None = None
  factor: jax.Array | None = None

  def codes(self, a: jax.Array, fmt: Format, random: jax.Array | None = None) -> jax.Array:
    """int32 (..., k) of elements (..., k), as many of each group.

    random: int32 (..., k), uniform in 0 to 65535; None rounds to nearest.
    """
    num_groups = self.scales.shape[-2]
    groups = _in_groups(a, num_groups, fmt).astype(jnp.float32)
    bits = self.magnitudes(groups)
    if random is None:
      codes = _rounding.encode(bits, fmt.element)
    else:
      codes = _rounding.encode_stochastic(bits, _in_groups(random, num_groups, fmt), fmt.element)
    negative = lax.bitcast_convert_type(groups, jnp.int32) < 0
    codes = codes | jnp.where(negative, 1 << (fmt.bits - 1), 0)
    return jnp.where(self.blank, 0, codes).reshape(a.shape)

  def magnitudes(self, groups: jax.Array) -> jax.Array:
    """The bits of what codes are made of, float32, of elements (..., groups, size)."""
    quotients = groups if self.power is None else _rounding.magnified(groups, self.power)
    return _rounding.magnitude_bits(quotients if self.factor is None else quotients * self.factor)


@functools.partial(jax.jit, static_argnames=("fmt", "arithmetic"), inline=True)
def quantize_groups(
  a: jax.Array,
  fmt: Format,
  global_scale: jax.Array | None = None,
  arithmetic: Arithmetic = ANYWHERE,
) -> tuple[jax.Array, jax.Array]:
  """Codes and scale bytes of an array: the definition of quantization.

  Args:
    a: float32, float16 or bfloat16, (..., k).
    fmt: the format.
    global_scale: float32, a scalar or one value a matrix: (...) against a of (..., m, k).
    arithmetic: of the platform that this is for.

  Returns:
    codes: int32, (..., k).
    scales: int32, (..., k / group_size), as of `encoding_of`.
  """
  a = with_axes_of(a, global_scale)
  encoding = encoding_of(a, fmt, global_scale, arithmetic)
  return encoding.codes(a, fmt), encoding.scales.squeeze(-1)


def with_axes_of(a: jax.Array, global_scale: jax.Array | None) -> jax.Array:
  """`a` (..., m, k) with the batch axes that only its global scale has."""
  if global_scale is None or not global_scale.ndim:
    return a
  batch_shape = lax.broadcast_shapes(a.shape[:-2], global_scale.shape)
  return jnp.broadcast_to(a, batch_shape + a.shape[-2:])


def encoding_of(
  a: jax.Array,
  fmt: Format,
  global_scale: jax.Array | None = None,
  arithmetic: Arithmetic = ANYWHERE,
  *,
  amax_bits: jax.Array | None = None,
  largest: float | None = None,
  encode: Encode = _rounding.encode,
) -> Encoding:
  """How the groups of `a`, which has all batch axes of its global scale, are quantized.

  amax_bits: int32 (..., groups, 1), the bits of the magnitudes that scales are made of; None for
    each group's own amax.
  largest: the element that they are mapped to, None for the format's largest; of scales that are
    no powers of two.
  encode: how these are rounded; powers of two are always rounded up.

  A group is poisoned, and its scale NaN, if it is not finite, and under a global scale that is no
  amax: negative, not finite, or 0 beside a number of 2**-126 or more.
  """
  groups = _grouped(a, fmt).astype(jnp.float32)
  if amax_bits is None:
    amax_bits = amax_bits_of(groups)
  poisoned = amax_bits >= _rounding.INFINITY_BITS
  power = of_zeros = enc = None
  if global_scale is not None:
    global_scale = _a_value_per_matrix(global_scale, groups.ndim)
    of_zeros = _rounding.magnitude_bits(global_scale) == 0
    no_amax = ~is_amax(global_scale)
    global_scale, power = raised_of(global_scale, arithmetic)
    enc = arithmetic.divide(jnp.float32(fmt.largest_value), global_scale)
    power, enc = arithmetic.hoisted((power, enc))
    poisoned = poisoned | no_amax
    poisoned = poisoned | (of_zeros & (amax_bits >= _rounding.SMALLEST_NORMAL_BITS))
    amax = lax.bitcast_convert_type(amax_bits, jnp.float32)
    amax_bits = _rounding.magnitude_bits(arithmetic.scaled(amax, power))
  blank, factor = poisoned, None
  if fmt.scale_is_power_of_two:
    scales = scales_of_power_of_two(amax_bits, fmt)
    power = 127 - scales  # from -126 to 127: a finite amax has a scale of at most 253
  else:
    largest = fmt.element_max if largest is None else largest
    scales, factor = _scales_of_float(amax_bits, fmt, enc, arithmetic, largest, encode)
    if of_zeros is not None:
      scales = jnp.where(of_zeros, 0, scales)
    blank = blank | (scales == 0)
  return Encoding(jnp.where(poisoned, fmt.scale_nan, scales), blank, power, factor)


def amax_bits_of(groups: jax.Array) -> jax.Array:
  """The bits of each group's amax, int32 (..., groups, 1)."""
  return jnp.max(_rounding.magnitude_bits(groups), axis=-1, keepdims=True)


def _scales_of_float(
  amax_bits: jax.Array,
  fmt: Format,
  enc: jax.Array | None,
  arithmetic: Arithmetic,
  largest: float,
  encode: Encode,
) -> tuple[jax.Array, jax.Array]:
  """s = scale(amax / largest * enc), and enc / s."""
  amax = lax.bitcast_convert_type(amax_bits, jnp.float32)
  bits = max(fmt.element_max_bits, significant_bits(float(np.float32(largest))))
  ideal = arithmetic.divide(amax, jnp.float32(largest), bits)
  if enc is None:
    enc = jnp.float32(1)
  else:
    ideal = ideal * enc
  scales = encode(_rounding.magnitude_bits(ideal), fmt.scale)
  factor = arithmetic.divide(enc, _rounding.decode(scales, fmt.scale), fmt.scale_bits)
  # Else XLA may divide again for every element.
  return scales, lax.optimization_barrier(factor)


def scales_of_power_of_two(amax_bits: jax.Array, fmt: Format) -> jax.Array:
  """e with 2**(e - 127) = amax / max rounded up; int32, 0 at least.

  In float32, amax / max is a power of two only where it is one exactly. One number is an
  exception: next above max * 2**-127 the quotient, a subnormal, rounds back down to 2**-127.
  """
  lowest = int(np.float32(fmt.element_max * 2.0**-127).view(np.int32))
  scales = _rounding.exponent_to_reach(amax_bits, fmt.element_max)
  return jnp.where(amax_bits <= lowest + 1, 0, scales)


@_traced_once
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
  groups, scales = _grouped(codes, fmt), scales[..., None]
  values = _rounding.value(groups, fmt.element)
  if fmt.scale_is_power_of_two:
    poisoned = _rounding.is_nan(scales, fmt.scale) | _rounding.is_nan(groups, fmt.element)
    magnitudes = _rounding.times_power_of_two(_rounding.decode(groups, fmt.element), scales - 127)
    values = jnp.where(groups >> (fmt.bits - 1) == 0, magnitudes, -magnitudes)
    values = jnp.where(poisoned, jnp.float32(np.nan), values)
  elif global_scale is None:
    values = values * _rounding.value(scales, fmt.scale)
  else:
    factor, power = decoding(_a_value_per_matrix(global_scale, scales.ndim), fmt)
    values = values * (_rounding.value(scales, fmt.scale) * factor)
    values = _with_sign_of(values, _rounding.scaled(values, power))
  return values.reshape(codes.shape)


@_traced_once
def dequantize_to_multiply(codes: jax.Array, scales: jax.Array, fmt: Format) -> jax.Array:
  """code * scale in float32, as `dequantize_groups`, but by float multiplication alone.

  On a CPU that makes 0 of what is below 2**-126, as its matrix products do.
  """
  return times_factors(codes, scale_factors(scales, fmt), fmt)


def scale_factors(scales: jax.Array, fmt: Format) -> tuple[jax.Array, ...]:
  """What scales mean, in float32. Powers of two as two factors: 2**-127 is subnormal."""
  if not fmt.scale_is_power_of_two:
    return (_rounding.value(scales, fmt.scale),)
  power = scales - 127
  half = power >> 1
  first = _rounding.power_of_two(half)
  first = jnp.where(_rounding.is_nan(scales, fmt.scale), jnp.float32(np.nan), first)
  return first, _rounding.power_of_two(power - half)


def times_factors(codes: jax.Array, factors: tuple[jax.Array, ...], fmt: Format) -> jax.Array:
  """The numbers of codes (..., k) times factors (..., groups), in float32."""
  values = _rounding.value(_in_groups(codes, factors[0].shape[-1], fmt), fmt.element)
  for factor in factors:
    values = values * factor.astype(jnp.float32)[..., None]
  return values.reshape(codes.shape)


def _grouped(codes: jax.Array, fmt: Format) -> jax.Array:
  num_groups = codes.shape[-1] // fmt.group_size
  return codes.reshape(*codes.shape[:-1], num_groups, fmt.group_size)


def _in_groups(a: jax.Array, num_groups: Any, fmt: Format) -> jax.Array:
  """(..., k) as (..., groups, size). There may be a part of each group; symbolic sizes have all."""
  *batch, k = a.shape
  is_known = isinstance(num_groups, int)
  size = k // max(num_groups, 1) if is_known else fmt.group_size
  return a.reshape(*batch, num_groups, size)


def _with_sign_of(a: jax.Array, magnitudes: jax.Array) -> jax.Array:
  negative = lax.bitcast_convert_type(a, jnp.int32) < 0
  return jnp.where(negative, -magnitudes, magnitudes)


def alpha_factors(
  global_scale_x: jax.Array | None,
  global_scale_w: jax.Array | None,
  fmt: Format,
  arithmetic: Arithmetic = ANYWHERE,
) -> tuple[jax.Array, jax.Array]:
  """Two numbers that a product's sums are multiplied by, one after the other.

    first * second = (global_scale_x / 2688) * (global_scale_w / 2688)

  Each quotient is rounded to float32's 24 bits. The exponent of the whole is shared out evenly
  between the two, so sums * first is between sums and the result: it is in range where these
  are. They must not be multiplied by each other before: XLA does that to constants.

  Args:
    global_scale_x, global_scale_w: float32, scalars or one value a matrix, (...), which
      broadcast; None stands for a quotient of 1.
    fmt: the format.
    arithmetic: of the platform that this is for.

  Returns:
    float32, two of the broadcast shape. Both normal; a quotient of 0 (or NaN, of what is no amax)
    is a factor of 0 (or NaN). Below 2**-252 first * second is 2**-252 to 2**-250, which makes
    zeros of sums all the same.
  """
  quotients, exponent = [], jnp.int32(0)
  ndim = max(jnp.ndim(a) for a in (global_scale_x, global_scale_w, 0) if a is not None)
  for global_scale in (global_scale_x, global_scale_w):
    quotient = jnp.float32(1)
    if global_scale is not None:
      global_scale = lax.expand_dims(global_scale, range(ndim - jnp.ndim(global_scale)))
      quotient, raised = arithmetic.hoisted(decoding(global_scale, fmt, arithmetic))
      exponent = exponent + raised
    bits = lax.bitcast_convert_type(quotient, jnp.int32)
    is_number = (bits > 0) & (bits < _rounding.INFINITY_BITS)
    exponent = exponent + jnp.where(is_number, (bits >> 23) - 127, 0)
    mantissa = lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
    quotients.append(jnp.where(is_number, mantissa, quotient))
  first = exponent >> 1
  one, two = (
    _rounding.power_of_two(jnp.clip(half, -126, 127)) for half in (first, exponent - first)
  )
  return quotients[0] * one, quotients[1] * two


def decoding(
  global_scale: jax.Array, fmt: Format, arithmetic: Arithmetic = ANYWHERE
) -> tuple[jax.Array, jax.Array]:
  """global_scale / 2688 as factor * 2**power: 0, normal, or NaN for what is no amax; and int32."""
  raised, power = raised_of(global_scale, arithmetic)
  factor = arithmetic.divide(raised, jnp.float32(fmt.largest_value), fmt.largest_value_bits)
  return jnp.where(is_amax(global_scale), factor, jnp.float32(np.nan)), -power


def raised_of(
  global_scale: jax.Array, arithmetic: Arithmetic = ANYWHERE
) -> tuple[jax.Array, jax.Array]:
  """|global_scale| * 2**power, and power: int32, not 0 where float32 is too short below."""
  limit = int(np.float32(2.0**-SMALL).view(np.int32))
  power = jnp.where(_rounding.magnitude_bits(global_scale) < limit, jnp.int32(RAISED), jnp.int32(0))
  return arithmetic.scaled(global_scale, power), power


def is_amax(global_scale: jax.Array) -> jax.Array:
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
  codes = lax.optimization_barrier(codes.astype(jnp.uint8))  # else XLA rounds within its reduction
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
