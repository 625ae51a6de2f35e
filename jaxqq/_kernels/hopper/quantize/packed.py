"""`quantize` and `dequantize` on Hopper: packed codes and scales, bound by memory, read once.

`groups` says how the arrays are stored in registers, `codes` what is computed there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq import _rounding
from jaxqq._formats import Format
from jaxqq._kernels.hopper.quantize.codes import power, words_of
from jaxqq._kernels.hopper.quantize.elements import element_of
from jaxqq._kernels.hopper.quantize.groups import (
  DEFAULT_CONFIG,
  TuningConfig,
  View,
  Window,
  by_blocks,
  load_gmem,
  per_group,
  positions,
  store_gmem,
)
from jaxqq._kernels.hopper.quantize.parts import NEAREST, Given, Parts, Rows, load_scaled
from jaxqq._kernels.hopper.quantize.squares import Squares
from jaxqq._quantize import decoding

_BYTE = jax.ShapeDtypeStruct((), jnp.uint8)


def quantize(
  a: jax.Array,
  fmt: Format,
  global_scale: jax.Array | None = None,
  config: TuningConfig = DEFAULT_CONFIG,
  *,
  parts: Parts = NEAREST,
  key: jax.Array | None = None,
  signs: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Packed codes and scale bytes: `jaxqq._quantize.quantize_groups`, packed.

  Args:
    a: float32, float16 or bfloat16, (rows, k), k a multiple of a group and of a rotation.
    fmt: the format.
    global_scale: None, or a float32 scalar.
    parts: what else of a `jaxqq.Quantizer`; of formats of 4 bits, if it rounds stochastically or
      has squares, which have rotations of up to 64.
    key: uint32 (2,), that of a stream, for stochastic rounding.
    signs: float32 (rotation,), 1 or -1.

  Returns:
    packed: uint32 (rows, k * bits / 32).
    scales: uint8 (rows, k / group_size).
  """
  rows, k = a.shape
  types = jax.ShapeDtypeStruct((fmt.group_size // fmt.codes_per_word,), jnp.uint32), _BYTE
  if parts.is_square:
    squares = Squares.of(a, fmt, parts)
    arrays, given = jax.tree.flatten(squares.given(Given.of(fmt, parts, global_scale, key, signs)))
    body = functools.partial(_quantize_kernel, fmt=fmt, seen=squares, given=given)
    packed, scales = squares.run(body, "quantize", a, types, tuple(arrays))
    return packed.reshape(rows, k // fmt.codes_per_word), scales
  of_rows = Rows.of(k, fmt, parts, fmt.codes_per_word)
  view = of_rows.view
  blocks = a.reshape(-1, *view.minor)
  arrays, given = jax.tree.flatten(of_rows.given(Given.of(fmt, parts, global_scale, key, signs)))
  packed, scales = by_blocks(
    functools.partial(_quantize_kernel, fmt=fmt, seen=of_rows, given=given),
    "quantize",
    (blocks,),
    (
      jax.ShapeDtypeStruct(view.minor[:-1], jnp.uint32),
      jax.ShapeDtypeStruct(view.minor[:-2], jnp.uint8),
    ),
    view,
    config,
    tuple(arrays),
  )
  return packed.reshape(rows, k // fmt.codes_per_word), scales.reshape(rows, k // fmt.group_size)


def dequantize(
  packed: jax.Array,
  scales: jax.Array,
  fmt: Format,
  global_scale: jax.Array | None,
  dtype: np.dtype,
  config: TuningConfig = DEFAULT_CONFIG,
  window: Window | None = None,
) -> jax.Array:
  """`jaxqq._quantize.dequantize_groups` of packed codes.

  Args:
    packed: uint32 (rows, k * bits / 32).
    scales: uint8 (rows, k / group_size).
    fmt: the format.
    global_scale: None, or a float32 scalar.
    dtype: float32, float16 or bfloat16.
    window: which rows, None for all of them.

  Returns:
    dtype (rows, k).
  """
  rows = packed.shape[0] if window is None else window.rows
  view = _word_view(fmt)
  scalars: tuple[jax.Array, ...] = ()
  if global_scale is not None:
    factor, power = decoding(global_scale.reshape(1), fmt)
    scalars = factor, _rounding.power_of_two(power)
  (out,) = by_blocks(
    functools.partial(_dequantize_kernel, fmt=fmt, view=view),
    "dequantize",
    (packed.reshape(-1, *view.minor[:-1]), scales.reshape(-1)),
    (jax.ShapeDtypeStruct(view.minor, dtype),),
    view,
    config,
    scalars,
    entries=rows * scales.shape[1],
    window=window,
  )
  return out.reshape(rows, packed.shape[1] * fmt.codes_per_word)


def _word_view(fmt: Format) -> View:
  """A thread holds the codes of one 32 bit word."""
  return View(fmt.group_size // fmt.codes_per_word, fmt.codes_per_word)


def _quantize_kernel(
  here: Any, a_ref: Any, *refs: Any, fmt: Format, seen: Rows | Squares, given: Any
) -> None:
  *arrays, packed_ref, scales_ref = refs
  a, scales, random = load_scaled(seen, a_ref, here, jax.tree.unflatten(given, arrays), fmt)
  words = words_of(a, scales, fmt, seen.layout, random)
  store_gmem(packed_ref.at[here], lax.bitcast_convert_type(words, jnp.uint32))
  store_gmem(scales_ref.at[here], scales.byte.astype(jnp.uint8))


def _dequantize_kernel(
  rows: Any, packed_ref: Any, scales_ref: Any, *refs: Any, fmt: Format, view: View
) -> None:
  *scalars, out_ref = refs
  words = load_gmem(packed_ref.at[rows], view.reduced(2))
  scales = load_gmem(scales_ref.at[rows], view.reduced(1))
  shape = (*words.shape, fmt.codes_per_word)
  words = lax.broadcast_in_dim(words, shape, (0, 1))
  shifts = (positions(shape, view.layout) * fmt.bits).astype(jnp.uint32)
  codes = (words >> shifts) & np.uint32((1 << fmt.bits) - 1)
  factor, power = (ref[0] for ref in scalars) if scalars else (None, None)
  values = element_of(fmt).decode(codes) * per_group(_decode_scales(scales, fmt, factor), codes)
  if power is not None:  # apart from the factor, which it would take out of float32's range
    values = values * power
  store_gmem(out_ref.at[rows], values.astype(out_ref.dtype))


def _decode_scales(byte: jax.Array, fmt: Format, factor: jax.Array | None) -> jax.Array:
  if not fmt.scale_is_power_of_two:
    scale = lax.bitcast_convert_type(byte, fmt.scale).astype(jnp.float32)
    return scale if factor is None else scale * factor
  exponents = byte.astype(jnp.int32)
  return jnp.where(exponents == fmt.scale_nan, jnp.float32(np.nan), power(exponents))
