"""The scales of packed w as the fp8 product takes them: how far to lower codes, and to what.

`packed_fp8_operands.py` launches it. A row's bytes lie in up to 16 lanes of a warp, 16 in each if
rows start at multiples of 16 bytes: a warpgroup has several rows, and their maxima take a few
shuffles. Rows are walked along twice; the second time their bytes are in the cache next to the
cores.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.codes import power, rebasing_bits
from jaxqq._kernels.groups import TuningConfig, View, load_gmem, per_group, store_gmem

_NAN = 0xFF
_LOWER = 0xC0
_VECTOR = 16  # bytes that a thread loads at once
_LANES = 16  # that a row has at most
_VECTORS = 4  # of 16 bytes, that a thread has of a row at once
CONFIG = TuningConfig(tiles_per_step=2)


def scale_vectors(scales: jax.Array) -> tuple[jax.Array, View]:
  """Rows (rows, groups) as `lower_rows` takes them, (rows, vectors, vector)."""
  rows, groups = scales.shape
  vector = math.gcd(groups, _VECTOR)
  if vector == groups:  # two lanes at least
    vector //= 2
  vectors = groups // vector
  view = View(min(_LANES, 1 << (vectors.bit_length() - 1)), vector)
  return scales.reshape(rows, vectors, vector), view


def rows_a_step(rows: int, view: View) -> int:
  """How many rows `lower_rows` has, of so many in `scale_vectors`."""
  return view.tile * min(CONFIG.tiles_per_step, rows // view.tile)


def lower_rows(
  rows: Any,
  scales_ref: Any,  # uint8 (rows, vectors, vector); fast from 16 in a vector
  downs_ref: Any,
  row_scales_ref: Any,
  *,
  view: View,
) -> None:
  """mxfp8 scales as `expand.E4M3` takes them: how far each group's codes are to be rebased.

  Writes:
    downs: uint8 as the scales, `rebasing_byte` of the distance to the largest byte of the row;
      anything in a row with a NaN.
    row_scales: float32 (rows,), the largest scale of a row; NaN where one is NaN.
  """
  lanes, _ = view.minor
  vectors = scales_ref.shape[1]
  size = lanes * min(_VECTORS, vectors // lanes)
  chunks = pl.cdiv(vectors, size)

  def chunk(i: Any) -> tuple[Any, Any]:
    return rows, pl.ds(jnp.minimum(i * size, vectors - size), size)

  def load(i: Any) -> jax.Array:
    return load_gmem(scales_ref.at[chunk(i)], view.layout).astype(jnp.int32)

  def find(i: Any, so_far: jax.Array) -> jax.Array:
    return jnp.maximum(so_far, jnp.max(jnp.max(load(i), axis=-1), axis=-1))

  def write(i: Any, _: None) -> None:
    scales = load(i)
    downs = rebasing_byte(per_group(highest, scales) - scales)
    store_gmem(downs_ref.at[chunk(i)], downs.astype(jnp.uint8))

  nothing = plgpu.layout_cast(jnp.zeros((rows.size,), jnp.int32), view.reduced(1))
  highest = lax.fori_loop(0, chunks, find, nothing)
  row_scales = jnp.where(highest == _NAN, jnp.float32(np.nan), power(highest))
  store_gmem(row_scales_ref.at[rows], row_scales)
  lax.fori_loop(0, chunks, write, None)


def rebasing_byte(distance: jax.Array) -> jax.Array:
  """`rebasing_bits` in a byte: the upper byte of float16, whose two highest bits are free.

  Those are the two highest bits of the lower byte, which 2**-17 and 2**-18 have alone.
  """
  bits = rebasing_bits(distance)
  return (bits >> 8) | (bits & _LOWER)


def rebasing_half(byte: jax.Array) -> jax.Array:
  """float16, of an int32 or uint16 `rebasing_byte`."""
  lower = jnp.asarray(_LOWER, byte.dtype)
  bits = ((byte & ~lower) << jnp.asarray(8, byte.dtype)) | (byte & lower)
  return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)
