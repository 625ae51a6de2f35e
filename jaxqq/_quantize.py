"""Quantizing to codes and scales, and back.

The way of the data: array -> `quantize_groups` -> codes, scales -> `pack` -> uint32 words,
and in reverse `unpack`, `dequantize_groups`. Groups run along the last axis throughout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxqq import _compat, _rounding
from jaxqq._checks import (
  FLOATS,
  as_array,
  check_dtype,
  check_format,
  check_global_scale,
  check_groups,
  check_packed,
  names,
)
from jaxqq._formats import FORMATS, Format

# Significant bits of the divisors: an element's max is 6 = 3 * 2 or 448 = 7 * 64, an e4m3 scale
# has 4, and nvfp4's largest value is 2688 = 21 * 128.
_ELEMENT_MAX_BITS, _SCALE_BITS, _LARGEST_VALUE_BITS = 3, 4, 5


def quantize(
  w: ArrayLike,
  group_size: int | None = None,
  bits: int | None = None,
  mode: str = "nvfp4",
  *,
  global_scale: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Quantizes an array in groups along its last axis.

  Every group of `group_size` neighbours gets one scale s, and every element a the code
  nearest to a / s, ties to even, saturating. nvfp4, with enc = 2688 / global_scale (1
  without one): s = e4m3(amax / 6 * enc), code = e2m1(a * (enc / s)). mxfp8 and mxfp4: s is
  amax / 448 or amax / 6 rounded up to a power of two, code = element(a / s). All arithmetic
  is float32. A group that holds a NaN or an infinity gets the NaN scale.

  Args:
    w: float32, float16 or bfloat16, (..., K), K a multiple of the group size.
    group_size: the mode's own, or None.
    bits: the mode's own, or None.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    global_scale: nvfp4 only, a float32 scalar: the amax of the tensor.

  Returns:
    packed: uint32, (..., K * bits / 32); the first code in the lowest bits.
    scales: uint8, (..., K / group_size); bytes of float8_e4m3fn or float8_e8m0fnu.

  Raises:
    TypeError: w or global_scale has a dtype that it may not have.
    ValueError: mode, group_size, bits or a shape is not as above.

  Example:
    >>> packed, scales = jaxqq.quantize(jnp.ones((4, 64)), mode="mxfp8")
    >>> packed.shape, scales.shape
    ((4, 16), (4, 2))

  Source: `mlx.core.quantize`, whose bits these are; OCP Microscaling Formats v1.0.
  """
  fmt = check_format("quantize", mode, group_size, bits)
  w = as_array("quantize", "w", w)
  check_dtype("quantize", "w", w, FLOATS)
  check_groups("quantize", "w", w, fmt)
  global_scale = check_global_scale("quantize", "global_scale", global_scale, fmt)
  return _quantize(jnp.asarray(w), global_scale, mode=mode)


def dequantize(
  w: ArrayLike,
  scales: ArrayLike,
  group_size: int | None = None,
  bits: int | None = None,
  mode: str = "nvfp4",
  *,
  global_scale: ArrayLike | None = None,
  dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
  """Turns packed codes and scales back into numbers.

  out = code * scale, or code * (scale * (global_scale / 2688)) with a global scale, in float32
  and then rounded to dtype. Under the NaN scale a whole group is NaN.

  Args:
    w: uint32, (..., K * bits / 32), as `quantize` packs.
    scales: (..., K / group_size), uint8 or the same bytes as float8_e4m3fn (nvfp4) or
      float8_e8m0fnu (mxfp8, mxfp4).
    group_size: the mode's own, or None.
    bits: the mode's own, or None.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    global_scale: nvfp4 only, a float32 scalar: the one that `quantize` was given.
    dtype: float32, float16 or bfloat16.

  Returns:
    dtype, (..., K).

  Raises:
    TypeError: w, scales, global_scale or dtype is of a type that it may not be.
    ValueError: mode, group_size, bits or a shape is not as above.

  Example:
    >>> packed, scales = jaxqq.quantize(jnp.full((1, 16), 3.0))
    >>> float(jaxqq.dequantize(packed, scales)[0, 0])
    3.0

  Source: `mlx.core.dequantize`.
  """
  fmt = check_format("dequantize", mode, group_size, bits)
  w, scales = check_packed("dequantize", w, scales, fmt)
  global_scale = check_global_scale("dequantize", "global_scale", global_scale, fmt)
  try:
    out_dtype = np.dtype(dtype)
  except TypeError:
    out_dtype = None
  if out_dtype not in FLOATS:
    raise TypeError(f"dequantize: dtype must be {names(FLOATS)}, got {dtype!r}.")
  return _dequantize(jnp.asarray(w), jnp.asarray(scales), global_scale, mode=mode, dtype=out_dtype)


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
  ideal = _rounding.divide(amax, jnp.float32(fmt.element_max), _ELEMENT_MAX_BITS)
  enc = jnp.float32(1)
  if global_scale is not None:
    enc = _rounding.divide(jnp.float32(fmt.largest_value), global_scale)
    ideal = ideal * enc
  scales = _rounding.encode(*_rounding.split(ideal), fmt.scale)
  decoded = _rounding.times_power_of_two(*_rounding.decode(scales, fmt.scale))
  factor = _rounding.divide(enc, decoded, _SCALE_BITS)
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
  factor = _rounding.divide(global_scale, jnp.float32(fmt.largest_value), _LARGEST_VALUE_BITS)
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


@functools.partial(jax.jit, static_argnames="mode")
def _quantize(w: jax.Array, global_scale: jax.Array | None, *, mode: str) -> Any:
  fmt = FORMATS[mode]

  def by_xla(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes, scales = quantize_groups(w, fmt, global_scale)
    return pack(codes, fmt), scales.astype(jnp.uint8)

  def by_kernel(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    from jaxqq._kernels import quantize as kernels

    packed, scales = kernels.quantize(w.reshape(-1, w.shape[-1]), fmt, global_scale)
    return packed.reshape(*w.shape[:-1], -1), scales.reshape(*w.shape[:-1], -1)

  # The results are integers: nothing is lost by not differentiating.
  return _on_hopper(by_kernel, by_xla, lax.stop_gradient(w))


@functools.partial(jax.jit, static_argnames=("mode", "dtype"))
def _dequantize(
  w: jax.Array, scales: jax.Array, global_scale: jax.Array | None, *, mode: str, dtype: Any
) -> jax.Array:
  fmt = FORMATS[mode]

  def by_xla(w: jax.Array, scales: jax.Array) -> jax.Array:
    values = dequantize_groups(unpack(w, fmt), scale_bytes(scales), fmt, global_scale)
    return values.astype(dtype)

  def by_kernel(w: jax.Array, scales: jax.Array) -> jax.Array:
    from jaxqq._kernels import quantize as kernels

    two_axes = (w.reshape(-1, w.shape[-1]), scales.reshape(-1, scales.shape[-1]))
    out = kernels.dequantize(*two_axes, fmt, None, dtype)
    return out.reshape(*w.shape[:-1], -1)

  if global_scale is not None:  # which may be differentiated
    return by_xla(w, scales)
  return _on_hopper(by_kernel, by_xla, w, lax.bitcast_convert_type(scales, jnp.uint8))


def _on_hopper(by_kernel: Callable[..., Any], by_xla: Callable[..., Any], *args: jax.Array) -> Any:
  """Runs a kernel where there is one Hopper GPU, and XLA's operations anywhere else.

  XLA splits its own operations over several GPUs, and would gather what a kernel reads.
  """
  if not _compat.only_device_is_hopper() or 0 in args[0].shape:
    return by_xla(*args)

  @jax.custom_batching.custom_vmap
  def kernel(*args: jax.Array) -> Any:
    return by_kernel(*args)

  @kernel.def_vmap
  def _batch(size: int, batched: list[bool], *args: jax.Array) -> Any:
    whole = (
      a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
      for a, is_batched in zip(args, batched, strict=True)
    )
    out = kernel(*whole)
    return out, jax.tree.map(lambda _: True, out)

  return lax.platform_dependent(*args, cuda=kernel, default=by_xla)
