"""Packed w in fp8: by how much each group's codes are rebased, and to what.

A row's bytes are in up to 16 lanes of a warp, 16 in each if rows start at multiples of 16 bytes: a
warpgroup has several rows, and their maxima take a few shuffles. Rows are walked along twice; the
second time their bytes are in the L1 cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._formats import Format
from jaxqq._kernels.hopper.ptx import distances
from jaxqq._kernels.hopper.quantize.codes import power, rebasing_bits
from jaxqq._kernels.hopper.quantize.groups import (
  Beside,
  TuningConfig,
  View,
  load_gmem,
  pad,
  store_gmem,
)
from jaxqq._kernels.hopper.quantize.rebased import rebased_operand

_NAN = 0xFF
_LOWER_BITS = 0xC0
_VECTOR = 16  # bytes that a thread loads at once
_LANES = 16  # that a row has at most
_VECTORS = 4  # of 16 bytes, that a thread has of a row at once
CONFIG = TuningConfig(tiles_per_step=2)


def rebased_operands_of_packed(
  x: jax.Array,
  scales: jax.Array,
  fmt: Format,
  beside: Sequence[Beside] = (),
  behind: tuple[int, int] = (0, 0),
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """`rebased_operand` of x, and how far w's codes are to be rebased, in one launch.

  Args:
    x: float32, float16 or bfloat16, (m, k).
    scales: uint8 (n, groups).
    fmt: a format of e4m3 elements and power of two scales.
    beside: what else the launch has.
    behind: how many scales there are beyond those of x's rows, and of w's. They are not written.

  Returns:
    codes: float8_e4m3fn (m, k).
    row_scales: float32 (m + behind[0],), of x.
    rescale: uint8 (n, groups), as `rescale_rows` writes them.
    row_scales: float32 (n + behind[1],), of w.
  """
  n = scales.shape[0]
  vectors, view = scale_vectors(scales)
  vectors = pad(vectors, 0, view.tile)
  rows = vectors.shape[0]
  block = rows_a_step(rows, view)

  def rescale_some(step: Any, *refs: Any) -> None:
    # The last step starts early enough to be a whole one.
    here = pl.ds(jnp.minimum(step * block, rows - block), block)
    rescale_rows(here, *refs, view=view)

  types = (
    jax.ShapeDtypeStruct(vectors.shape, jnp.uint8),
    jax.ShapeDtypeStruct((rows + behind[1],), jnp.float32),
  )
  of_w = Beside(rescale_some, "group_rescale", pl.cdiv(rows, block), (vectors,), types)
  of_x = rebased_operand(x, fmt, beside=(of_w, *beside), behind=behind[0])
  rescale, w_scales = of_w.results()
  return of_x.codes, of_x.row_scales, rescale[:n].reshape(scales.shape), w_scales[: n + behind[1]]


def scale_vectors(scales: jax.Array) -> tuple[jax.Array, View]:
  """Rows (rows, groups) as `rescale_rows` takes them, (rows, vectors, vector)."""
  rows, groups = scales.shape
  vector = math.gcd(groups, _VECTOR)
  if vector == groups:  # two lanes at least
    vector //= 2
  vectors = groups // vector
  view = View(min(_LANES, 1 << (vectors.bit_length() - 1)), vector)
  return scales.reshape(rows, vectors, vector), view


def rows_a_step(rows: int, view: View) -> int:
  """How many rows `rescale_rows` has, of so many in `scale_vectors`."""
  return view.tile * min(CONFIG.tiles_per_step, rows // view.tile)


def rescale_rows(
  rows: Any,
  scales_ref: Any,  # uint8 (rows, vectors, vector); a multiple of 4 in a vector is fast
  rescale_ref: Any,
  row_scales_ref: Any,
  *,
  view: View,
) -> None:
  """mxfp8 scales as `expand.rebase_e4m3` takes them: how far each group's codes are to be rebased.

  Writes:
    rescale: uint8 as the scales, `rescale_byte` of the distance to the largest byte of the row;
      anything in a row with a NaN.
    row_scales: float32 (rows,), the largest scale of a row; NaN where one is NaN.
  """
  lanes, _ = view.minor
  vectors = scales_ref.shape[1]
  size = lanes * min(_VECTORS, vectors // lanes)
  spans = pl.cdiv(vectors, size)

  def span(i: Any) -> tuple[Any, Any]:
    return rows, pl.ds(jnp.minimum(i * size, vectors - size), size)

  def load(i: Any) -> jax.Array:
    return load_gmem(scales_ref.at[span(i)], view.layout)

  def find(i: Any, so_far: jax.Array) -> jax.Array:
    of_threads = distances.largest(load(i), view.layout)
    return jnp.maximum(so_far, jnp.max(of_threads, axis=-1))

  def write(i: Any, _: None) -> None:
    rescale = distances.rescale_bytes(load(i), highest, view.layout, rescale_byte)
    store_gmem(rescale_ref.at[span(i)], rescale)

  nothing = plgpu.layout_cast(jnp.zeros((rows.size,), jnp.int32), view.reduced(1))
  highest = lax.fori_loop(0, spans, find, nothing)
  row_scales = jnp.where(highest == _NAN, jnp.float32(np.nan), power(highest))
  store_gmem(row_scales_ref.at[rows], row_scales)
  lax.fori_loop(0, spans, write, None)


def rescale_byte(distance: jax.Array) -> jax.Array:
  """`rebasing_bits` in a byte: the upper byte of float16, whose two highest bits are free.

  Those hold the two highest bits of the lower byte, which are set in 2**-17 and 2**-18 alone.
  """
  bits = rebasing_bits(distance)
  return (bits >> 8) | (bits & _LOWER_BITS)


def rescale_half(byte: jax.Array) -> jax.Array:
  """float16, of an int32 or uint16 `rescale_byte`."""
  lower = jnp.asarray(_LOWER_BITS, byte.dtype)
  bits = ((byte & ~lower) << jnp.asarray(8, byte.dtype)) | (byte & lower)
  return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)
