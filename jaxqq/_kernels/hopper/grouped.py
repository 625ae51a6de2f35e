"""The tiles of a product of rows in groups: which rows a tile has, and its matrix.

A tile has rows of one group. It begins at any row, with the group or where the tile before it ends:

    rows      | group 0      | group 1           | group 3 | of no group |
    tiles     | tile 0 | 1   | tile 2 | tile 3   | tile 4  |             |
    zeros     |                                            | 0 | 1       |

How many there are is known on the device alone, so the tables have room for as many as there can
be. One kernel makes both: a thread has one tile. Every warp goes through all groups, 128 at a time,
adds up how many tiles they have, and looks up where its threads' tiles are (`ptx/warp_arrays.py`).
The launch that quantizes x has it in further CTAs, since its few steps take less than a launch.
Products of the same x and groups share that launch, if their tiles have as many rows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper.pipeline import GroupTiles, arrays
from jaxqq._kernels.hopper.ptx import warp_arrays
from jaxqq._kernels.hopper.ptx.layouts import ONE_EACH
from jaxqq._kernels.hopper.quantize.groups import Beside, positions, store_gmem
from jaxqq._kernels.hopper.ragged_plan import num_group_tiles
from jaxqq._kernels.hopper.tiles import cdiv
from jaxqq._ragged_reference import Groups, RaggedOperands

_TILES = 128  # a CTA: one a thread


def group_tiles(operands: RaggedOperands, groups: int, block_m: int) -> Beside:
  """The kernel that makes them, of up to block_m rows of all batches, one after the other.

  Args:
    operands: of which group_sizes, group_offset and the shapes of x and w count.
    groups: how many matrices there are; rows of groups that have none are zeros.
    block_m: rows of a tile, at most.
  """
  batch, rows = operands.batch_shape, operands.x.shape[-2]
  sizes, offsets = operands.group_sizes, operands.group_offset
  count = sizes.shape[-1]
  sizes = jnp.broadcast_to(sizes, (*batch, count)).reshape(-1)
  offsets = jnp.broadcast_to(offsets, batch).reshape(-1)
  batches = offsets.shape[0]
  tiles, zeros = (
    num_group_tiles(batches * rows, batches * segments, block_m) for segments in (groups, 2)
  )
  steps = cdiv(max(tiles, zeros), _TILES)
  shares_w = math.prod(operands.batch_of("w", "scales", "row_scales")) == 1
  column = jax.ShapeDtypeStruct((steps * _TILES,), jnp.int32)
  return Beside(
    _Tables(groups, count, rows, block_m, shares_w),
    "group_tiles",
    steps,
    (sizes, offsets),
    (*[column] * 6, jax.ShapeDtypeStruct((2,), jnp.int32)),
  )


def tiles_of(tables: Beside) -> GroupTiles:
  """What the kernel of `group_tiles` finds."""
  return GroupTiles(*tables.results())


@dataclasses.dataclass(frozen=True)
class _Tables:
  """The kernel. A thread's tile and its row of zeros are number `tile` of their tables."""

  matrices: int  # of the groups that have one
  groups: int  # of a batch
  rows: int  # of a batch
  block_m: int
  shares_w: bool  # all batches

  def __call__(self, step: Any, sizes_ref: Any, offsets_ref: Any, *out: Any) -> None:
    refs = GroupTiles(*out)
    tile = positions((_TILES,), ONE_EACH) + step * _TILES
    nothing = plgpu.layout_cast(jnp.zeros((_TILES,), jnp.int32), ONE_EACH)
    empty = _Column(jnp.int32(0), nothing, nothing, nothing)

    def of_batch(b: Any, columns: tuple[_Column, _Column]) -> tuple[_Column, _Column]:
      tiles, zeros = columns
      # Clipped, so that nothing below overflows.
      offset = jnp.clip(offsets_ref[b], -self.matrices, self.groups)
      first_row = b * self.rows

      def some(i: Any, state: Any) -> Any:
        """Of 128 groups."""
        end, before, last, tiles = state
        first = i * warp_arrays.SIZE
        sizes = warp_arrays.load(sizes_ref, b * self.groups + first, (b + 1) * self.groups)
        sizes = jnp.clip(sizes, 0, self.rows)
        starts, ends = warp_arrays.running_sums(sizes, end, self.rows)

        def end_of(group: Any, else_: Any) -> Any:
          """The end of a group, or of the last one here if it comes later."""
          return jnp.where(group >= first, warp_arrays.take(ends, group - first), else_)

        before, last = end_of(offset - 1, before), end_of(offset + self.matrices - 1, last)
        own = positions((warp_arrays.SIZE,), warp_arrays.LAYOUT) + (first - offset)
        sizes = jnp.where((own >= 0) & (own < self.matrices), ends - starts, 0)
        group = b * self.matrices + first - offset
        tiles = tiles.with_groups(tile, first_row + starts, sizes, group, self.block_m)
        return end_of(first + warp_arrays.SIZE - 1, end), before, last, tiles

      none = jnp.int32(0)
      chunks = cdiv(self.groups, warp_arrays.SIZE)
      _, before, last, tiles = lax.fori_loop(0, chunks, some, (none, none, none, tiles))
      for start, end in ((none, before), (last, jnp.int32(self.rows))):
        zeros = zeros.with_rows(tile, first_row + start, end - start, none, self.block_m)
      return tiles, zeros

    tiles, zeros = lax.fori_loop(0, offsets_ref.shape[0], of_batch, (empty, empty))
    here = pl.ds(step * _TILES, _TILES)
    matrix = lax.rem(tiles.group, jnp.int32(self.matrices)) if self.shares_w else tiles.group
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

  def with_rows(self, tile: Any, first: Any, size: Any, group: Any, block_m: int) -> _Column:
    """With the tiles of `size` rows from `first` on."""
    tiles = _count(size, block_m)
    is_own = (tile >= self.count) & (tile < self.count + tiles)
    base = first - self.count * block_m
    return self._with(is_own, self.count + tiles, group, base, first + size)

  def with_groups(self, tile: Any, first: Any, sizes: Any, group: Any, block_m: int) -> _Column:
    """With those of 128 groups, the first of which is `group`."""
    counts = _count(sizes, block_m)
    before, after = warp_arrays.running_sums(counts, self.count, np.iinfo(np.int32).max)
    index = warp_arrays.count_up_to(after, tile)
    is_own = (tile >= self.count) & (index < warp_arrays.SIZE)
    own_first, own_size, own_before = (warp_arrays.take(a, index) for a in (first, sizes, before))
    count = warp_arrays.take(after, jnp.int32(warp_arrays.SIZE - 1))
    base = own_first - own_before * block_m
    return self._with(is_own, count, group + index, base, own_first + own_size)

  def _with(self, is_own: Any, count: Any, group: Any, base: Any, end: Any) -> _Column:
    """With so many tiles, of which threads have those that are theirs."""
    pairs = ((group, self.group), (base, self.base), (end, self.end))
    return _Column(count, *(jnp.where(is_own, *pair) for pair in pairs))


def _count(size: Any, block_m: int) -> Any:
  """Tiles of so many rows."""
  return lax.div((size + (block_m - 1)).astype(jnp.uint32), jnp.uint32(block_m)).astype(jnp.int32)


def scales_of_rows(groups: Groups, scales: jax.Array, rows: int) -> jax.Array:
  """The number of each row's group, (rows,); 0 of a row that has none."""
  row = jnp.arange(rows, dtype=jnp.int32)[:, None]
  is_in = (row >= groups.starts[None, :]) & (row < (groups.starts + groups.sizes)[None, :])
  return jnp.sum(jnp.where(is_in, scales[None, :], jnp.float32(0)), axis=1)
