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
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.codes import extremes_of, is_beyond, lowest_of, no_extremes, power
from jaxqq._kernels.groups import TuningConfig, View, load_gmem, per_group, store_gmem
from jaxqq._kernels.operands import MAX_SHIFT

_NAN = 0xFF
_VECTOR = 16  # bytes that a thread loads at once
_LANES = 16  # that a row has at most
_VECTORS = 4  # of 16 bytes, that a thread has of a row at once
CONFIG = TuningConfig(tiles_per_step=2)


def scale_vectors(scales: jax.Array) -> tuple[jax.Array, View]:
  """Rows (rows, groups) as `lower_rows` takes them, (rows, vectors, vector)."""
  rows, groups = scales.shape
  vector = math.gcd(groups, _VECTOR)
  vectors = groups // vector
  view = View(min(_LANES, 1 << (vectors.bit_length() - 1)), vector)
  return scales.reshape(rows, vectors, vector), view


def rows_a_step(rows: int, view: View) -> int:
  """How many rows `lower_rows` has, of so many in `scale_vectors`."""
  return view.tile * min(CONFIG.tiles_per_step, rows // view.tile)


def lower_rows(
  rows: Any,
  scales_ref: Any,  # uint8 (rows, vectors, vector), of 32 groups or more; fast from 16 in a vector
  downs_ref: Any,
  row_scales_ref: Any,
  wild_ref: Any,
  step: Any,
  *,
  view: View,
) -> None:
  """mxfp8 scales as `expand.E4M3` takes them, and whether that is close enough.

  Writes:
    downs: uint8 as the scales, the upper byte of 2**(byte - largest byte of the row) as float16;
      0 from 2**-15 on; anything in a row with a NaN.
    row_scales: float32 (rows,), the largest scale of a row; NaN where one is NaN.
    wild: int32 (steps,), at `step` 1 if in one of the rows a scale lies more than MAX_SHIFT below
      the largest, or that is beyond what `codes.is_beyond` allows. A byte of 0 does not count: it
      is that of zeros, or of numbers too small to matter. Nor does a row with a NaN.
  """
  lanes, _ = view.minor
  vectors = scales_ref.shape[1]
  size = lanes * min(_VECTORS, vectors // lanes)
  chunks = pl.cdiv(vectors, size)

  def chunk(i: Any) -> tuple[Any, Any]:
    return rows, pl.ds(jnp.minimum(i * size, vectors - size), size)

  def load(i: Any) -> jax.Array:
    return load_gmem(scales_ref.at[chunk(i)], view.layout).astype(jnp.int32)

  def find(i: Any, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    found = (jnp.max(jnp.max(a, axis=-1), axis=-1) for a in extremes_of(load(i), _NAN + 1))
    highest, inverse_lowest = map(jnp.maximum, so_far, found)
    return highest, inverse_lowest

  def write(i: Any, _: None) -> None:
    scales = load(i)
    distance = per_group(highest, scales) - scales
    downs = (15 - jnp.minimum(distance, 15)) << 2
    store_gmem(downs_ref.at[chunk(i)], downs.astype(jnp.uint8))

  nothing = no_extremes(rows.size, view.reduced(1))
  highest, inverse_lowest = lax.fori_loop(0, chunks, find, nothing)
  nan = highest == _NAN
  store_gmem(row_scales_ref.at[rows], jnp.where(nan, jnp.float32(np.nan), power(highest)))
  wild = (highest - lowest_of(inverse_lowest) > MAX_SHIFT) | is_beyond(highest)
  wild = wild & (highest != _NAN)
  wild_ref[step] = jnp.max(wild.astype(jnp.int32))
  lax.fori_loop(0, chunks, write, None)
