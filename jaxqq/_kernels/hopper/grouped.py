"""The tiles of a product of rows in groups: which rows a tile has, and which matrix it meets.

A tile has rows of one group. It begins at any row, with the group or where the tile before it ends:

    rows      | group 0      | group 1           | group 3 | of no group |
    tiles     | tile 0 | 1   | tile 2 | tile 3   | tile 4  |             |
    zeros     |                                            | 0 | 1       |

How many there are is known on the device alone, so the tables have room for as many as there can
be. One kernel makes both. Each of its CTAs goes through all groups, and its threads, which have a
tile each, keep what they find of their own. Products of the same groups share the tables.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper.pipeline import GroupTiles, arrays
from jaxqq._kernels.hopper.ptx.layouts import ONE_EACH
from jaxqq._kernels.hopper.quantize.groups import make_kernel, positions, store_gmem
from jaxqq._kernels.hopper.tiles import cdiv, num_group_tiles
from jaxqq._ragged_reference import Groups, RaggedOperands

_TILES = 128  # a CTA: one a thread
_LOADS = 8  # sizes that are loaded at once


def group_tiles(operands: RaggedOperands, groups: int, block_m: int) -> GroupTiles:
  """The tiles of up to block_m rows of all batches, one after the other.

  Args:
    operands: of which group_sizes, group_offset and the shapes of x and w count.
    groups: how many matrices there are; rows of groups that have none are zeros.
    block_m: rows of a tile, at most.
  """
  batch, rows = operands.batch_shape, operands.x.shape[-2]
  sizes, offsets = operands.group_sizes, operands.group_offset
  count, missing = sizes.shape[-1], -sizes.shape[-1] % _LOADS
  sizes = jnp.broadcast_to(sizes, (*batch, count)).reshape(-1, count)
  sizes = jnp.pad(sizes, ((0, 0), (0, missing))) if missing else sizes
  offsets = jnp.broadcast_to(offsets, batch).reshape(-1)
  batches = offsets.shape[0]
  tiles, zeros = (
    num_group_tiles(batches * rows, batches * segments, block_m) for segments in (groups, count + 1)
  )
  steps = cdiv(max(tiles, zeros), _TILES)
  shares_w = math.prod(operands.batch_of("w", "scales", "row_scales")) == 1
  column = jax.ShapeDtypeStruct((steps * _TILES,), jnp.int32)
  run = make_kernel(
    _Tables(groups, rows, block_m, shares_w),
    "group_tiles",
    grid=(steps,),
    out_type=(*[column] * 6, jax.ShapeDtypeStruct((2,), jnp.int32)),
  )
  return GroupTiles(*run(sizes, offsets))


@dataclasses.dataclass(frozen=True)
class _Tables:
  """The kernel. A thread's tile and its row of zeros are number `tile` of their tables."""

  groups: int
  rows: int  # of a batch
  block_m: int
  shares_w: bool  # all batches

  def __call__(self, sizes_ref: Any, offsets_ref: Any, *out: Any) -> None:
    refs = GroupTiles(*out)
    step = lax.axis_index("step")
    tile = positions((_TILES,), ONE_EACH) + step * _TILES
    nothing = plgpu.layout_cast(jnp.zeros((_TILES,), jnp.int32), ONE_EACH)
    empty = _Column(jnp.int32(0), nothing, nothing, nothing)

    def of_batch(b: Any, columns: Any) -> Any:
      offset = offsets_ref[b]

      def some(i: Any, state: Any) -> Any:
        end, tiles, zeros = state
        sizes = [sizes_ref[b, i * _LOADS + j] for j in range(_LOADS)]
        for j, size in enumerate(sizes):
          start, end = end, jnp.minimum(end + jnp.clip(size, 0, self.rows), self.rows)
          own = i * _LOADS + j - offset
          is_own = (own >= 0) & (own < self.groups)
          here = b * self.rows + start, end - start, b * self.groups + own, tile
          tiles = tiles.with_rows(is_own, *here, self.block_m)
          zeros = zeros.with_rows(jnp.logical_not(is_own), *here, self.block_m)
        return end, tiles, zeros

      loads = sizes_ref.shape[1] // _LOADS
      end, tiles, zeros = lax.fori_loop(0, loads, some, (jnp.int32(0), *columns))
      behind = b * self.rows + end, self.rows - end, jnp.int32(0), tile
      return tiles, zeros.with_rows(True, *behind, self.block_m)

    tiles, zeros = lax.fori_loop(0, sizes_ref.shape[0], of_batch, (empty, empty))
    here = pl.ds(step * _TILES, _TILES)
    matrix = lax.rem(tiles.group, jnp.int32(self.groups)) if self.shares_w else tiles.group
    store_gmem(refs.group.at[here], tiles.group)
    store_gmem(refs.matrix.at[here], matrix)
    for column, first_ref, rows_ref in (
      (tiles, refs.first, refs.rows),
      (zeros, refs.first_zeros, refs.rows_of_zeros),
    ):
      first = column.base + tile * self.block_m
      store_gmem(first_ref.at[here], first)
      store_gmem(rows_ref.at[here], jnp.minimum(column.end - first, self.block_m))

    @pl.when(step == 0)
    def _counts() -> None:
      for i, column in enumerate((tiles, zeros)):
        refs.counts[pl.ds(i, 1)] = jnp.full((1,), column.count)


@arrays
class _Column:
  """What a table has so far, and of each thread's tile the group, once it was passed."""

  count: Any  # of tiles
  group: Any
  base: Any  # the first row of the group, if the table began with it
  end: Any  # of the rows of the group

  def with_rows(
    self, are_here: Any, first: Any, size: Any, group: Any, tile: Any, block_m: int
  ) -> _Column:
    """With the tiles of `size` rows from `first` on, if they belong to this table."""
    tiles = jnp.where(are_here, lax.div(size + (block_m - 1), jnp.int32(block_m)), 0)
    index = tile - self.count
    is_own = (index >= 0) & (index < tiles)
    return _Column(
      self.count + tiles,
      jnp.where(is_own, group, self.group),
      jnp.where(is_own, first - self.count * block_m, self.base),
      jnp.where(is_own, first + size, self.end),
    )


def scales_of_rows(groups: Groups, scales: jax.Array, rows: int) -> jax.Array:
  """The number of each row's group, (rows,); 0 of a row that has none."""
  row = jnp.arange(rows, dtype=jnp.int32)[:, None]
  is_in = (row >= groups.starts[None, :]) & (row < (groups.starts + groups.sizes)[None, :])
  return jnp.sum(jnp.where(is_in, scales[None, :], jnp.float32(0)), axis=1)
