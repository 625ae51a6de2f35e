"""The end of a tile of `dequant_gemm`: sums of other CTAs are added, scaled, and stored.

A compute warpgroup has the sums of 64 rows of w. It stores a piece of up to 32 rows of x at a time:
through shared memory by the TMA, or thread by thread where the rows of another group follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper import epilogue, stream_k
from jaxqq._kernels.hopper.pipeline import GroupTile, Tile, batch_of, rounded_up
from jaxqq._kernels.hopper.ptx import cluster, handover, stores
from jaxqq._kernels.hopper.ptx.loads import look_up
from jaxqq._kernels.hopper.tiles import ROWS

HANDED_OVER = 64  # rows of x whose sums of another CTA are loaded at a time


def stored_size(size: int, piece: int, block: int, multiple: int) -> int:
  """Of an axis of the output that a CTA, or its cluster, stores `block` of, a piece at a time.

  The TMA does not write what is past the end. But Mosaic GPU takes an axis of one piece out of
  the TMA's descriptor, and what is past its end would be written over that piece. So an axis of no
  more than one has room for two, unless no piece can be past its end.
  """
  size = rounded_up(size, multiple)
  if size > piece:
    return size
  return piece if block == piece else 2 * piece


@dataclasses.dataclass(frozen=True)
class TileEnd:
  """Of one CTA, with its references.

  Attributes:
    kernel: sizes, as `dequant_gemm` has them.
    gmem, out, smem: of the kernel.
    warpgroup: of the CTA, which this is.
    cluster_index: which CTA of those that share a tile.
    worker: with stream-K, which CTA; else None.
  """

  kernel: Any
  gmem: Any
  out: Any
  smem: Any
  warpgroup: Any
  cluster_index: Any
  worker: Any = None

  def first_row(self, tile: Tile) -> Any:
    """Of w, this warpgroup's."""
    return tile.n * self.kernel.tiles.block_n + self.warpgroup * ROWS

  def load_w_scales(self, tile: Tile) -> Any:
    """Of this warpgroup's rows. Past the end of w any do: no sum of theirs is stored."""
    ref = self.gmem.w_scales
    first = jnp.minimum(self.first_row(tile), ref.shape[1] - ROWS)
    own = ref.at[batch_of(ref, tile.batch), pl.ds(first, ROWS)]
    return epilogue.load_row_scales(own, of_rows=True)

  def store(self, sums: Any, w_scales: Any, tile: Tile, first_row: int) -> None:
    """Scales and writes the sums of a tile's rows from `first_row` on, a piece after the other."""
    store_m, column = self.kernel.store_m, self.first_row(tile)
    scaled = self.scaler(w_scales, tile)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for i in range(sums.shape[1] // store_m):
      piece = sums[:, i * store_m : (i + 1) * store_m]
      stage = i % self.kernel.tiles.store_stages
      if isinstance(tile, GroupTile):
        self.store_some(piece, scaled, tile, first_row + i * store_m, column, stage)
        continue
      row = tile.row(self.kernel.tiles.block_m) + first_row + i * store_m
      self.store_piece(scaled(piece, row), tile.batch, row, column, stage)

  def scaler(self, w_scales: Any, tile: Tile) -> Callable[[Any, Any], Any]:
    """A function of a piece of a tile's sums, and of its first row of x: what is stored."""
    gmem = self.gmem

    def by_rows(piece: Any, row: Any) -> Any:
      of_x, size = gmem.x_scales, piece.shape[1]
      if isinstance(tile, GroupTile):  # from any row on, of which vectors cannot be loaded
        layout = plgpu.Layout.WGMMA.reduce(0)
        rows = plgpu.layout_cast(lax.iota(jnp.int32, size), layout) + row
        x_scales = look_up(of_x.at[0], jnp.minimum(rows, of_x.shape[1] - 1), layout)
      else:
        here = pl.ds(jnp.minimum(row, of_x.shape[1] - size), size)
        own = of_x.at[batch_of(of_x, tile.batch), here]
        x_scales = epilogue.load_row_scales(own, of_rows=False)
      return epilogue.times_row_scales(piece, w_scales, x_scales)

    if self.kernel.has_row_scales:
      return by_rows
    scales = gmem.global_scale_x, gmem.global_scale_w
    alpha = epilogue.Alpha.of_tile(self.kernel.unit, *scales, tile)
    return lambda piece, row: alpha.times(piece)

  def store_piece(self, piece: Any, b: Any, row: Any, column: Any, stage: int) -> None:
    """By the TMA, through shared memory."""
    kernel = self.kernel
    rows, columns = pl.ds(row, piece.shape[1]), pl.ds(column, ROWS)
    plgpu.wait_smem_to_gmem(self.kernel.tiles.store_stages - 1, wait_read_only=True)
    staged = self.smem.out.at[self.warpgroup, stage]
    if kernel.writes_transpose:
      staged[...] = piece.astype(kernel.out_dtype)
    else:
      staged.T[...] = piece.astype(kernel.out_dtype)
    plgpu.commit_smem()
    where = (columns, rows) if kernel.writes_transpose else (rows, columns)
    plgpu.copy_smem_to_gmem(staged, self.out.at[b, *where])

  def store_some(
    self, piece: Any, scaled: Any, tile: GroupTile, first: int, column: Any, stage: int
  ) -> None:
    """Those rows of a piece that the group has: all of them by the TMA, some thread by thread."""
    kernel, size = self.kernel, piece.shape[1]
    row, rows = tile.first + first, tile.rows - first

    @pl.when(rows > 0)
    def _scale_and_store() -> None:
      out = scaled(piece, row)

      def whole() -> None:
        self.store_piece(out, 0, row, column, stage)

      def some() -> None:
        to = out.astype(kernel.out_dtype), plgpu.Layout.WGMMA, self.out.at[0]
        stores.store_some(*to, row, rows, column, transposed=True)

      epilogue.store_whole_or_some(
        rows >= size, whole if kernel.can_stage_transpose else None, some
      )

  def add_up_and_store(self, sums: Any, w_scales: Any, tile: Any) -> None:
    """Leaves the sums to a later CTA; or adds those that others left, and stores a tile.

    In the order of CTAs: the first one left its sums long ago, the last one leaves them just now.
    Those of the last one are added some columns at a time, which are stored meanwhile.
    """
    left, block_m = self.gmem.left, self.kernel.tiles.block_m
    columns = range(0, block_m, HANDED_OVER)

    def flags_of(worker: Any) -> Any:
      return stream_k.flags_of(self.gmem.flags, worker, left.shape[1], self.warpgroup)

    def parts_of(sums: Any) -> list[Any]:
      return [sums[:, i : min(i + HANDED_OVER, block_m)] for i in columns]

    @pl.when(jnp.logical_not(tile.is_end))
    def _leave() -> None:
      for column, part in zip(columns, parts_of(sums), strict=True):
        handover.store_sums(part, left.at[self.worker, self.warpgroup], column)
      handover.signal(flags_of(self.worker))

    @pl.when(tile.is_end)
    def _store() -> None:
      first, last = self.worker - tile.others, self.worker - 1

      def plus(total: Any, other: Any, column: int) -> Any:
        return total + handover.load_sums(left.at[other, self.warpgroup], column, total.shape[1])

      def add(i: Any, totals: list[Any]) -> list[Any]:
        handover.wait(flags_of(first + i))
        return [plus(total, first + i, at) for at, total in zip(columns, totals, strict=True)]

      before = jnp.maximum(tile.others - 1, 0)
      totals = lax.fori_loop(0, before, add, parts_of(sums))
      pl.when(tile.others > 0)(lambda: handover.wait(flags_of(last)))
      for column, total in zip(columns, totals, strict=True):

        def add_last(_: Any, total: Any, column: int = column) -> Any:
          return plus(total, last, column)

        total = lax.fori_loop(before, tile.others, add_last, total)
        self.store(total, w_scales, tile, column)

  def exchange_and_store(self, sums: Any, w_scales: Any, tile: Tile) -> None:
    """Hands over the others' rows; adds up, always in the same order, and stores the own ones."""
    own_m, buffer, size = self.kernel.tiles.own_m, self.smem.from_cluster, self.kernel.tiles.cluster
    parts = [sums[:, i * own_m : (i + 1) * own_m] for i in range(size)]

    def slot_of(source: int, target: int) -> int:
      return (source - target - 1) % size

    for own in range(size):
      others = [other for other in range(size) if other != own]

      @pl.when(self.cluster_index == own)
      def _exchange(own: int = own, others: list[int] = others) -> None:
        for other in others:
          cluster.dsmem_store(parts[other], buffer, other, slot_of(own, other))
        cluster.cluster_sync()
        total = parts[own]
        for other in others:
          total = total + cluster.dsmem_load(buffer, total.shape[1], slot_of(other, own))
        self.store(total, w_scales, tile, own * own_m)
