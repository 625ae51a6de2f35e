"""The end of a tile of `skinny_gemm`: sums of warpgroups and of CTAs are added, scaled, and stored.

    warpgroup 0   | its blocks | + sums of warpgroups 1, 2, 3 | + those of other CTAs | store
    warpgroup 1   | its blocks | leaves sums                  | next tile

Threads store the few rows of the result, 64 columns at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper import epilogue, pipeline, stream_k
from jaxqq._kernels.hopper.pipeline import GroupTile, GroupTiles, Tile, Walk
from jaxqq._kernels.hopper.ptx import cluster, handover, mma, stores
from jaxqq._kernels.hopper.ptx.layouts import ONE_OF_FOUR
from jaxqq._kernels.hopper.ptx.registers import recomputed
from jaxqq._kernels.hopper.ptx.scales import blockdiag_sum
from jaxqq._kernels.hopper.tiles import ROWS


@dataclasses.dataclass(frozen=True)
class TileEnd:
  """Of one CTA, with its references.

  Attributes:
    kernel: sizes, as `skinny_gemm` has them.
    gmem, out, smem: of the kernel.
    warpgroup: of the CTA, which this is.
    cluster_index: which CTA of those that share a tile.
    walk: over the CTA's tiles.
  """

  kernel: Any
  gmem: Any
  out: Any
  smem: Any
  warpgroup: Any
  cluster_index: Any
  walk: Walk

  def add_up_and_store(self, sums: list[Any], t: Any) -> None:
    """Of the t-th tile: one warpgroup does, to which the others hand over theirs."""
    pl.when(t > 0)(self.wait_for_slots)
    adder = lax.rem(t, jnp.int32(self.kernel.plan.tiles.compute_warpgroups))
    lax.cond(
      self.warpgroup == adder,
      functools.partial(self.add_up, t, adder),
      functools.partial(self.hand_over, adder),
      sums,
    )

  def wait_for_slots(self) -> None:
    """Until the sums of the tile before are read: all do, and so see all the barrier's phases."""
    plgpu.barrier_wait(self.smem.sums_empty)

  def hand_over(self, adder: Any, sums: list[Any]) -> None:
    slot = (self.warpgroup ^ adder) - 1
    for half, own in enumerate(sums):
      self.smem.sums[slot, pl.ds(half * ROWS, ROWS)] = own
    plgpu.barrier_arrive(self.smem.sums_full.at[adder])

  def add_up(self, t: Any, adder: Any, sums: list[Any]) -> None:
    plgpu.barrier_wait(self.smem.sums_full.at[adder])

    def with_others(half: int, own: Any) -> Any:
      def of_other(distance: int) -> Any:
        """The sums of warpgroup `adder ^ distance`."""
        ref = self.smem.sums.at[distance - 1, pl.ds(half * ROWS, ROWS)]
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)

      own = own + of_other(1)
      if self.kernel.plan.tiles.compute_warpgroups == 4:
        own = own + (of_other(2) + of_other(3))
      return own

    sums = [with_others(half, own) for half, own in enumerate(sums)]
    plgpu.barrier_arrive(self.smem.sums_empty)
    if self.kernel.plan.tiles.stream_k:
      (own,) = sums  # its tiles have 64 rows of w
      self.add_others_or_leave(own, t)
      return
    if self.kernel.plan.tiles.cluster == 1:
      self.store(sums, t)
      return
    rounds = self.kernel.grid.whole_rounds
    if rounds:
      pl.when(t < rounds)(lambda: self.store(sums, t))

    @pl.when(t >= rounds)
    def _leave() -> None:
      (own,) = sums  # a cluster's tile has 64 rows of w
      self.smem.cta_sums[...] = own

  def add_others_or_leave(self, sums: Any, t: Any) -> None:
    """Leaves sums, (64, padded_m), to a later CTA; or adds those that others left, and stores."""
    worker, left = lax.axis_index(pipeline.WORKER), self.gmem.left
    piece: Any = self.walk.tile(recomputed(t))

    def flags_of(worker: Any) -> Any:
      return stream_k.flags_of(self.gmem.flags, worker, 1, 0)

    @pl.when(jnp.logical_not(piece.is_end))
    def _leave() -> None:
      handover.store_sums(sums, left.at[worker, 0], 0)
      handover.signal(flags_of(worker))

    @pl.when(piece.is_end)
    def _store() -> None:
      def add(i: Any, total: Any) -> Any:
        other = worker - piece.others + i
        handover.wait(flags_of(other))
        return total + handover.load_sums(left.at[other, 0], 0, self.kernel.plan.padded_m)

      self.store([lax.fori_loop(0, piece.others, add, sums)], t)

  def add_up_cluster(self) -> None:
    """All sums of the tile that a cluster shares, by its first CTA; the others wait for it."""
    kernel, rounds = self.kernel, self.kernel.grid.whole_rounds
    cluster.cluster_sync()

    def total() -> None:
      sums = cluster.cluster_sum(self.smem.cta_sums, kernel.plan.tiles.cluster)
      cluster.cluster_sync()  # before stores to memory, for which it would wait
      self.store([sums], rounds)

    is_first = (self.warpgroup == 0) & (self.cluster_index == 0) & (self.walk.num_tiles > rounds)
    lax.cond(is_first, total, cluster.cluster_sync)

  def first_column(self, tile: Tile, *, half: int) -> Any:
    return tile.n * self.kernel.block_n + half * ROWS

  def store(self, sums: list[Any], t: Any) -> None:
    tile = self.walk.tile(t)
    for half, own in enumerate(sums):
      self.store_half(own, tile, self.first_column(tile, half=half))

  def store_half(self, sums: Any, tile: Tile, first_column: Any) -> None:
    """64 columns of the output."""
    kernel, blockdiag, gmem = self.kernel, self.kernel.plan.blockdiag, self.gmem
    layout = plgpu.Layout.WGMMA
    if blockdiag is not None:
      sums = blockdiag_sum(sums, blockdiag.rows, blockdiag.k_blocks_per_acc)
      layout = ONE_OF_FOUR
    if kernel.mainloop.by_warps:
      sums, layout = mma.relabel(sums), mma.SUMS
    scales = gmem.global_scale_x, gmem.global_scale_w
    out = epilogue.Alpha.of_tile(kernel.unit, *scales, tile).times(sums).astype(kernel.out_dtype)
    if isinstance(tile, GroupTile):
      rows = self.out.at[0]
      where = tile.first, tile.rows, first_column
      stores.store_some(out, layout, rows, *where, transposed=True)
    else:
      rows = self.out.at[tile.batch]
      stores.store_columns(out, layout, rows, first_column, kernel.m, kernel.n)

  @jax.named_scope("zeros")
  def store_zeros(self, groups: GroupTiles) -> None:
    """Of rows that no group has."""
    zeros = pipeline.walk_of_zeros(self.kernel.grid, groups)
    for half in self.kernel.halves:
      column_of = functools.partial(self.first_column, half=half)
      epilogue.store_zeros(zeros, self.out, self.kernel.plan.padded_m, column_of)
