"""Scales of groups and codes of elements, in registers.

The bits are those of `jaxqq._quantize`, which defines them. What differs is how they are
found: floats are rounded by the hardware where it rounds as the definition does, and the
steps that XLA cannot be trusted with are trusted to PTX, where mul.f32 keeps subnormals and
div.rn.f32 rounds to nearest.
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

from jaxqq import _rounding
from jaxqq._formats import Format
from jaxqq._kernels.hopper.ptx.loads import look_up
from jaxqq._kernels.hopper.ptx.rounding import (
  MAGNITUDE,
  Stochastic,
  divided,
  quotient,
  scale_up,
  sixth,
  whole_units,
  words_of_first_bits,
)
from jaxqq._kernels.hopper.quantize.elements import (
  SIGN,
  as_bits,
  as_float,
  element_of,
  round_to_e2m1,
)
from jaxqq._kernels.hopper.quantize.groups import per_group, positions
from jaxqq._quantize import ERROR_BITS, RAISED, SMALL, is_amax, raised_of, scales_of_power_of_two

_EXPONENT_FIELD = 0x7F800000
_FLOAT32_MAX = np.finfo(np.float32).max
# Of 2**-126, raised: beside such a number a global scale of 0 is no amax.
_RAISED_NORMAL_BITS = int(np.float32(2.0 ** (RAISED - 126)).view(np.int32))


# Scales of groups, and codes of elements.


@dataclasses.dataclass(frozen=True)
class Scales:
  """What a group's elements are quantized with; all of them arrays of the groups' shape."""

  factor: jax.Array  # float32: elements (raised) times this are what is rounded to codes
  scale: jax.Array  # float32: codes times this are the elements again; NaN for NaN groups
  byte: jax.Array  # int32
  blank: jax.Array  # bool: all codes are zeros, without signs
  raising: jax.Array | None = None  # float32 (), what raises elements: see `_encoding_scale`


def amax_bits_of(a: jax.Array) -> jax.Array:
  """The bits of the largest magnitude of each group, NaN being the largest."""
  bits = as_bits(a) & MAGNITUDE
  return jnp.max(jnp.max(bits, axis=-1), axis=-1)


def finite_bits(amax_bits: jax.Array) -> jax.Array:
  """The bits of amax, 0 for a group with a NaN or an infinity: what a row's largest is taken of."""
  return jnp.where(amax_bits < _rounding.INFINITY_BITS, amax_bits, 0)


def inverse_power(exponents: jax.Array) -> jax.Array:
  """2**(127 - e), normal for all e up to 253, which is the most that a finite amax gets."""
  return as_float((254 - exponents) << 23)


def power(exponents: jax.Array) -> jax.Array:
  """2**(e - 127) for e of 0 to 254; only 2**-127 is subnormal."""
  return as_float(jnp.maximum(exponents << 23, 0x00400000))


def rebasing_bits(distance: jax.Array) -> jax.Array:
  """The bits of 2**-distance as float16: what e4m3 codes are multiplied by to be rebased.

  Float16 holds an e4m3 code times 2**-15 exactly. From 2**-19 on all codes become zero.
  """
  distance = jnp.maximum(distance, 0)
  subnormal = jnp.right_shift(jnp.full_like(distance, 1 << 10), jnp.clip(distance - 14, 0, 11))
  return jnp.where(distance < 15, (15 - distance) << 10, subnormal)


def scales_of(
  amax_bits: jax.Array,
  fmt: Format,
  global_scale: jax.Array | None,
  dtype: Any,
  *,
  rounded_up: Any = None,
) -> Scales:
  """Of groups with these amax, whose elements came as `dtype`.

  rounded_up: None, or the layout of the amax, to round scales up, so that no element is larger than
    a code. Powers of two are so always.
  """
  nan, enc, raising = amax_bits >= _rounding.INFINITY_BITS, None, None
  if global_scale is not None:
    enc, raising = _encoding_scale(global_scale, fmt)
    amax_bits = as_bits(as_float(amax_bits) * raising)
  if fmt.scale_is_power_of_two:
    byte = scales_of_power_of_two(amax_bits, fmt)
    factor, scale, blank = inverse_power(byte), power(byte), nan
  else:
    if global_scale is not None:
      assert enc is not None
      nan = nan | (jnp.full(nan.shape, enc, jnp.float32) != enc)
      of_zeros = jnp.full(nan.shape, global_scale, jnp.float32) == 0
      nan = nan | (of_zeros & (amax_bits >= _RAISED_NORMAL_BITS))
      amax_bits = jnp.where(of_zeros, 0, amax_bits)
    scale, byte = _rounded_scale(_sixth(amax_bits, dtype, enc), fmt, rounded_up)
    factor = _over_scale(enc, scale)
    blank = nan | (byte == 0)
  scale = jnp.where(nan, jnp.float32(np.nan), scale)
  return Scales(factor, scale, jnp.where(nan, fmt.scale_nan, byte), blank, raising)


def _rounded_scale(ideal: jax.Array, fmt: Format, rounded_up: Any) -> tuple[jax.Array, jax.Array]:
  """A scale and its byte: to nearest, or no smaller if a layout says so; saturating."""
  ideal = jnp.minimum(ideal, np.float32(ml_dtypes.finfo(fmt.scale).max))
  if rounded_up is not None:
    byte = scale_up(ideal, fmt.scale, rounded_up)
    scale = lax.bitcast_convert_type(byte.astype(jnp.uint8), fmt.scale)
    return scale.astype(jnp.float32), byte
  rounded = ideal.astype(fmt.scale)
  scale = rounded.astype(jnp.float32)
  return scale, lax.bitcast_convert_type(rounded, jnp.uint8).astype(jnp.int32)


def encoding_table(global_scale: jax.Array, fmt: Format) -> jax.Array:
  """float32: enc / s of every scale s by its byte, then what raises the tensor, enc, and a limit.

  They are the definition's own, computed before the kernel: a division by one there is rounded to
  nearest in eight instructions or more, and every thread would divide anew. From the limit on, a
  group's amax makes NaN: that of infinity, or 2**-126 under an amax of 0, or 0 under what is none.
  It is an exponent field.
  """
  raised, power = raised_of(global_scale)
  is_zero = _rounding.magnitude_bits(global_scale) == 0
  enc = _rounding.divide(jnp.float32(fmt.largest_value), raised)
  every = jnp.arange(1 << 7, dtype=jnp.int32)
  factors = _rounding.divide(enc, _rounding.decode(every, fmt.scale), fmt.scale_bits)
  limit = jnp.where(is_amax(global_scale), jnp.where(is_zero, 1.0, 255.0), 0.0)
  enc = jnp.where(is_zero, jnp.float32(0), enc)
  return jnp.concatenate(
    [factors, jnp.stack([_rounding.power_of_two(power), enc, limit.astype(jnp.float32)])]
  )


def scales_by_table(
  amax_bits: jax.Array,
  fmt: Format,
  table: Any,
  layout: Any,
  *,
  rounds_up: bool = False,
  by_four: bool = False,
) -> Scales:
  """`scales_of` under a global scale, by its `encoding_table`, in global memory.

  by_four: amax is mapped to 4 instead of 6.
  """
  size = table.shape[0] - 3
  raising, enc, limit = (table[size + i] for i in range(3))
  nan = amax_bits >= limit.astype(jnp.int32) << 23
  amax = jnp.minimum(as_float(amax_bits) * raising, _FLOAT32_MAX)
  ideal = (_quarter(amax) if by_four else sixth(amax, layout)) * enc
  scale, byte = _rounded_scale(ideal, fmt, layout if rounds_up else None)
  factor = look_up(table, byte, layout)
  scale = jnp.where(nan, jnp.float32(np.nan), scale)
  return Scales(factor, scale, jnp.where(nan, fmt.scale_nan, byte), nan | (byte == 0), raising)


def _quarter(amax: jax.Array) -> jax.Array:
  quarter = amax * np.float32(0.25)
  return jnp.where(quarter < np.finfo(np.float32).tiny, np.float32(0), quarter)


def better_scales(
  a: jax.Array,
  amax_bits: jax.Array,
  fmt: Format,
  table: Any,
  layout: Any,
  of_elements: Any,
  over_block: Callable[[jax.Array], jax.Array],
) -> Scales:
  """Of 6 and 4, what amax is better mapped to, by the squares of errors: `_quantizer._better`.

  Args:
    a: float32 elements.
    amax_bits: of groups, in that layout.
    table: as of `scales_by_table`.
    of_elements: the layout of `a`.
    over_block: sums up int32 that each thread has, (..., lanes), to sums of blocks for each group.
  """
  six, four = (scales_by_table(amax_bits, fmt, table, layout, by_four=i) for i in (False, True))
  magnitudes = jnp.abs(_raised(a, six))

  def scaled(by: Scales) -> jax.Array:
    return magnitudes * per_group(by.factor, a)

  number = jnp.minimum(scaled(four), _FLOAT32_MAX)
  of_six, of_four = (round_to_e2m1(scaled(by))[0] for by in (six, four))
  ratio = per_group(divided(six.scale, four.scale, fmt.scale_bits, layout), a)
  # No fused operation may take a product before it is rounded: minima stand between.
  errors = (jnp.minimum(of_six * ratio, _FLOAT32_MAX) - number, of_four - number)
  (high_six, low_six), (high_four, low_four) = (
    _squares(jnp.abs(error), over_block, of_elements) for error in errors
  )
  high_four = jnp.where(four.blank, np.iinfo(np.int32).max, high_four)  # then never
  takes_four = (high_four < high_six) | ((high_four == high_six) & (low_four < low_six))
  factor, scale, byte = (
    jnp.where(takes_four, getattr(four, name), getattr(six, name))
    for name in ("factor", "scale", "byte")
  )
  return Scales(factor, scale, byte, (byte == 0) | (byte == fmt.scale_nan), six.raising)


def _squares(
  errors: jax.Array, over_block: Callable[[jax.Array], jax.Array], layout: Any
) -> tuple[jax.Array, jax.Array]:
  """The sums of squares over blocks, in two words: above 16 bits, and below."""
  errors = jnp.minimum(errors, np.float32(8 - 2.0**-ERROR_BITS))
  units = whole_units(errors, ERROR_BITS, layout)
  squares = units * units  # without a sign, and 32 bits
  high = over_block(jnp.sum(lax.shift_right_logical(squares, 16), axis=-1, dtype=jnp.int32))
  low = over_block(jnp.sum(squares & 0xFFFF, axis=-1, dtype=jnp.int32))
  return high + (low >> 16), low & 0xFFFF


def _sixth(amax_bits: jax.Array, dtype: Any, enc: jax.Array | None) -> jax.Array:
  """amax / 6 * enc before it is rounded to e4m3; amax / 6 is zero below float32's normal range.

  Of 16 bit numbers, with nothing to multiply by, a product will do: it is 2**-25 too large before
  it is rounded. Where amax is six times a number between two e4m3 numbers, a tie, that is a quarter
  to half of its last bit, so the tie stays; any other amax is 2**-11 of itself from there. Else the
  mantissa is divided by 3 in integers, with enough bits and a sticky one that converting the
  quotient to float32 rounds it as the division would; the rest is its exponent.
  """
  if enc is None and jnp.dtype(dtype).itemsize == 2:
    return as_float(amax_bits) * np.float32(1 / 6)
  mantissa = ((amax_bits & 0x7FFFFF) | 0x800000) << 7
  quotient = lax.div(mantissa, jnp.full_like(mantissa, 3))
  sticky = (quotient * 3 != mantissa).astype(jnp.int32)
  # amax = mantissa * 2**(field - 157), and 6 = 3 * 2.
  bits = as_bits((quotient | sticky).astype(jnp.float32))
  bits = bits + ((amax_bits & _EXPONENT_FIELD) - (158 << 23))
  ideal = as_float(jnp.where(bits < 0x00800000, 0, bits))
  return ideal if enc is None else ideal * enc


def _over_scale(enc: jax.Array | None, scale: jax.Array) -> jax.Array:
  """enc / scale, or 1 / scale, rounded to nearest: divisions of floats are approximate here.

  An e4m3 scale is eight to fifteen eighths times a power of two: eight quotients are all there are.
  None is subnormal: enc is 2688 / global_scale, above 2**-117, and scales go up to 448.
  """
  eighths = [np.float32(i / 8) for i in range(8, 16)]
  if enc is None:
    quotients: list[Any] = [np.float32(1) / eighth for eighth in eighths]
  else:
    quotients = [enc, *(quotient(enc, jnp.float32(eighth)) for eighth in eighths[1:])]
  bits = as_bits(scale)
  for i in range(3):
    odd = (bits & (1 << (20 + i))) != 0
    quotients = [jnp.where(odd, b, a) for a, b in zip(quotients[::2], quotients[1::2], strict=True)]
  factor = quotients[0] * as_float((254 << 23) - (bits & _EXPONENT_FIELD))
  return factor if enc is None else jnp.minimum(factor, _FLOAT32_MAX)


def codes_of(a: jax.Array, scales: Scales, fmt: Format) -> jax.Array:
  """int32 codes, signs included; of blank groups, anything."""
  a, factor = _raised(a, scales), per_group(scales.factor, a)
  return element_of(fmt).codes(a, factor)


def words_of(
  a: jax.Array, scales: Scales, fmt: Format, layout: Any, random: jax.Array | None = None
) -> jax.Array:
  """int32: the codes of a thread's neighbours in one word, zeros in blank groups.

  Args:
    a: float32 (..., codes_per_word), in the layout.
    random: None to round to nearest; or int32, uniform in 0 to 65535.
  """
  if random is None:
    codes = codes_of(a, scales, fmt) << (positions(a.shape, layout) * fmt.bits)
    words = jnp.sum(codes, axis=-1, dtype=jnp.int32)
  else:
    magnitudes, stochastic = _stochastic(a, scales, fmt, layout, random)
    codes = stochastic.first_bits(magnitudes) | (as_bits(a) & SIGN)
    words = words_of_first_bits(codes, fmt.bits, layout)
  return jnp.where(per_group(scales.blank, words), 0, words)


def _stochastic(
  a: jax.Array, scales: Scales, fmt: Format, layout: Any, random: jax.Array
) -> tuple[jax.Array, Stochastic]:
  """What is rounded stochastically, and how.

  It is raised after it is multiplied by the factor: what is subnormal between has code 0.
  """
  largest: Any = np.float32(fmt.element_max)
  if scales.raising is not None:
    small = np.float32(fmt.element_max * 2.0**-RAISED)
    largest = jnp.where(scales.raising == 1, largest, small)
  magnitudes = jnp.minimum(jnp.abs(a) * per_group(scales.factor, a), largest)
  return magnitudes, Stochastic(fmt.element, random, layout, scales.raising)


def values_of(
  a: jax.Array,
  scales: Scales,
  fmt: Format,
  layout: Any = None,
  random: jax.Array | None = None,
) -> jax.Array:
  """code * scale, float32; layout and random as of `words_of`, where codes are stochastic."""
  factor, scale = per_group(scales.factor, a), per_group(scales.scale, a)
  if random is not None:
    magnitudes, stochastic = _stochastic(a, scales, fmt, layout, random)
    values = stochastic.values(magnitudes)
    return as_float(as_bits(values) | (as_bits(a) & SIGN)) * scale
  a = _raised(a, scales)
  return element_of(fmt).values(a, factor, scales.blank) * scale


def scalars_of(global_scale: jax.Array | None) -> tuple[jax.Array, ...]:
  """What a kernel is given for a global scale: (1,), or nothing without one."""
  return () if global_scale is None else (jnp.asarray(global_scale, jnp.float32).reshape(1),)


def scalar_of(refs: list[Any]) -> Any:
  """In a kernel, the global scale that `scalars_of` gave it, or None."""
  return refs[0][0] if refs else None


def _raised(a: jax.Array, scales: Scales) -> jax.Array:
  return a if scales.raising is None else a * scales.raising


def _encoding_scale(global_scale: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
  """enc = 2688 / global_scale, NaN where that is no amax, of a tensor that is raised: by how much.

  `jaxqq._quantize` says why: tensors with an amax below 2**-40 are taken 2**64 times.
  """
  largest, magnitude = jnp.float32(fmt.largest_value), jnp.abs(global_scale)
  is_small = magnitude < np.float32(2.0**-SMALL)
  raising = jnp.where(is_small, np.float32(2.0**RAISED), np.float32(1))
  enc = jnp.minimum(quotient(largest, magnitude * raising), _FLOAT32_MAX)
  return jnp.where(_is_amax(global_scale), enc, jnp.float32(np.nan)), raising


def amax_or_nan(global_scale: jax.Array) -> jax.Array:
  """A global scale, or NaN where that is no amax: negative, infinite or NaN."""
  return jnp.where(_is_amax(global_scale), global_scale, jnp.float32(np.nan))


def _is_amax(global_scale: jax.Array) -> jax.Array:
  return (global_scale >= 0) & (global_scale <= _FLOAT32_MAX)
