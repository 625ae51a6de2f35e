"""Scales of w by the TMA, whatever bytes a row of them has.

Rows that the TMA loads are multiples of 16 bytes apart and begin at one. Of rows of S scales, every
p-th does, of the same array as (n / p, p S), with p = 16 / gcd(S, 16). So a tile's rows are p
planes: rows j, j + p, j + 2 p, ... are plane j, loaded from the multiple of 16 bytes before their
first scale. In shared memory their scales begin j S mod 16 bytes behind that.

    S = 180, p = 4     plane 0: rows 0, 4, 8, ...    from byte 0 on
                       plane 1: rows 1, 5, 9, ...    from byte 180 = 11 * 16 + 4, loaded from 176
                       plane 2: rows 2, 6, 10, ...   from byte 360 = 22 * 16 + 8
                       plane 3: rows 3, 7, 11, ...   from byte 540 = 33 * 16 + 12

Whole rows are one piece of memory, and the TMA loads it as such: a tile's rows, of S scales each,
are S rows of a byte for each row of the tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROW, ROWS
from jaxqq._kernels.hopper.ptx.loads import load_words
from jaxqq._kernels.hopper.ptx.registers import constant, packed_array, smem_address, word_asm
from jaxqq._kernels.hopper.ptx.scales import row_of_thread
from jaxqq._kernels.hopper.tiles import TMA_BYTES, ScalePlanes


def as_planes(scales: jax.Array, planes: ScalePlanes) -> jax.Array:
  """(b, n, S) as (b, n / p, p S), the same bytes; n is a multiple of p.

  Whole rows: as (b, n S / rows, rows).
  """
  batch, n, of_row = scales.shape
  if planes.is_whole:
    return scales.reshape(batch, n * of_row // planes.rows, planes.rows)
  return scales.reshape(batch, n // planes.count, planes.count * of_row)


def load(
  of_matrix: Any, first_row: Any, first: Any, to: Any, barrier: Any, planes: ScalePlanes
) -> None:
  """Begins `planes.count` loads, of the rows of a tile and some of their scales.

  Args:
    of_matrix: (n / p, p S), of `as_planes`.
    first_row: of the tile, a multiple of 16; of whole rows, of `planes.rows`.
    first: of the scales, a multiple of 16; of whole rows 0.
    to: uint8 of shape `planes.shape`, in shared memory.
    barrier: at which all of them arrive, `planes.count` times.
    planes: of the tile.
  """
  if planes.is_whole:
    first_of_tile = lax.div(first_row, jnp.int32(planes.rows)) * planes.of_row
    own, here = pl.ds(first_of_tile, planes.of_row), pl.ds(0, planes.of_row)
    plgpu.copy_gmem_to_smem(of_matrix.at[own], to.at[0, here], barrier)
    return
  rows = planes.rows // planes.count
  for plane in range(planes.count):
    start = plane * planes.of_row // TMA_BYTES * TMA_BYTES
    first_of_plane = lax.div(first_row, jnp.int32(planes.count))
    there = pl.ds(first_of_plane, rows), pl.ds(first + start, planes.width)
    plgpu.copy_gmem_to_smem(of_matrix.at[there], to.at[plane, pl.ds(0, rows)], barrier)


def words(
  ref: Any,
  row: Any,
  column: Any,
  count: int,
  planes: ScalePlanes,
  *,
  masks: Mapping[int, Any] | None = None,
  unit: int = 4,
  even_first: bool = False,
) -> list[Any]:
  """Scales of 64 rows, four in a word, as `scales.scale_words` has them.

  Args:
    ref: uint8 of shape `planes.shape`, in shared memory.
    row: int32, the first of the tile's rows, a multiple of 64.
    column: int32, the first of the loaded scales, a multiple of `unit`.
    count: of words.
    planes: of the tile.
    masks: of `masks_of`.
    unit: what the column is a multiple of; below 4, words are put together of two.
    even_first: rows are in the order of `layouts.even_rows_first`, labelled as if they were not.
  """
  row, column, masks = jnp.int32(row), jnp.int32(column), masks or {}
  is_aligned = planes.of_row % 4 == 0 and unit % 4 == 0
  if interpreting():
    return _interpreted(ref, row, column, count, planes, masks)
  word_type = plgpu.ShapeDtypeStruct((ROWS,), np.dtype(np.uint32), layout=ROW)
  splats = [row, column, *masks.values()]
  arg_types = plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * len(splats)

  @plgpu.inline_mgpu(arg_types=arg_types, return_type=[word_type] * count)
  def from_smem(ctx: Any, ref: Any, *splats: Any) -> Any:
    del ctx
    first_row, first, *rest = (splat.registers.flat[0] for splat in splats)
    of_words = dict(zip(masks, rest, strict=True))
    of_rows = []
    for half in range(2):
      own_row = arith.addi(row_of_thread(even_first=even_first), constant(8 * half))
      place = arith.addi(first_row, own_row), first
      own = _words_of_row(ref, *place, count, planes, is_aligned=is_aligned)
      of_rows.append([_masked(word, of_words.get(i)) for i, word in enumerate(own)])
    one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    pairs = zip(*of_rows, strict=True)
    return [packed_array([vector.broadcast(one, w) for w in pair], (ROWS,), ROW) for pair in pairs]

  return from_smem(ref, *splats)


def _masked(word: Any, mask: Any) -> Any:
  return word if mask is None else arith.andi(word, mask)


def masks_of(left: int, count: int, is_last: Any, unit: int = 4) -> dict[int, Any]:
  """What leaves the scales of a row and makes zeros of those that follow it in shared memory.

  There the next row's are, which may be NaN, and meet codes that are zeros.

  Args:
    left: how many scales a row has from the first word on, where it ends there.
    count: of words.
    is_last: whether it does.
    unit: bytes of a word that are asked for.

  Returns:
    an int32 for each word that has other bytes than the row's, by its index.
  """
  own = {i: min(max(left - 4 * i, 0), unit) for i in range(count)}
  return {
    i: jnp.where(is_last, jnp.int32((1 << 8 * size) - 1), jnp.int32(-1))
    for i, size in own.items()
    if size < unit
  }


def _words_of_row(
  ref: Any, row: Any, column: Any, count: int, planes: ScalePlanes, *, is_aligned: bool
) -> list[Any]:
  """Of a row of the tile, in a thread that has it."""
  (of_plane, _, _), _ = ir.MemRefType(ref.type).get_strides_and_offset()
  plane = arith.andi(row, constant(planes.count - 1))
  index = arith.shrui(row, constant(planes.count.bit_length() - 1))
  offset = arith.andi(arith.muli(plane, constant(planes.of_row)), constant(TMA_BYTES - 1))
  of_row = arith.muli(index, constant(planes.width))
  place = arith.addi(arith.muli(plane, constant(of_plane)), of_row)
  start = arith.addi(arith.addi(smem_address(ref), place), arith.addi(offset, column))

  def word(first: Any, i: int) -> Any:
    return vector.extract(load_words(arith.addi(first, constant(4 * i)), 1), [], [0])

  if is_aligned:
    return [word(start, i) for i in range(count)]
  shift = arith.shli(arith.andi(start, constant(3)), constant(3))
  aligned = arith.andi(start, constant(0xFFFFFFFC))
  # The last one may be behind what was loaded of a row, and then no byte of it is asked for.
  parts = [word(aligned, i) for i in range(count + 1)]
  shifted = "shf.r.wrap.b32 $0, $1, $2, $3;"
  return [word_asm(shifted, *pair, shift) for pair in itertools.pairwise(parts)]


def _interpreted(
  ref: Any, row: Any, column: Any, count: int, planes: ScalePlanes, masks: Mapping[int, Any]
) -> list[Any]:
  """Rows in order."""
  rows, loaded = planes.rows // planes.count, ref[...]
  if planes.is_whole:
    own_row, own_column = (lax.broadcasted_iota(jnp.int32, (ROWS, 4 * count), i) for i in range(2))
    places = (row + own_row) * planes.of_row + column + own_column
    scales = jnp.take(loaded.reshape(-1), places, mode="fill", fill_value=0xFF)
  else:
    starts = [plane * planes.of_row % TMA_BYTES for plane in range(planes.count)]
    of_planes = [loaded[i, :rows, start:] for i, start in enumerate(starts)]
    of_planes = [a[:, : planes.loaded] for a in of_planes]
    scales = jnp.pad(jnp.stack(of_planes, axis=1).reshape(planes.rows, -1), ((0, 0), (0, 4)))
    scales = lax.dynamic_slice(scales, (row, column), (ROWS, 4 * count))
  scales = scales.astype(jnp.uint32)
  words = [sum(scales[:, 4 * i + j] << np.uint32(8 * j) for j in range(4)) for i in range(count)]
  for i, mask in masks.items():
    words[i] &= lax.bitcast_convert_type(mask, jnp.uint32)
  return words
