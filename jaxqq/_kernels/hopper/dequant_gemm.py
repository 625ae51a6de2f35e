"""out = x_hat w_hat^T on the tensor cores, from packed w, expanded in registers.

One CTA an SM, with a producer and two to four compute warpgroups (`pipeline.py`):

    warpgroup 0, compute  | wgmma p       | wgmma p+1     | wgmma p+2     | ... | store
                          |    expand p+1 |    expand p+2 |    expand p+3 | ...
    warpgroup 1, compute      likewise

- A compute warpgroup has 64 rows of w and all rows of the x tile: out^T = w_hat x_hat^T. It expands
  the words of a part of a step in its registers (`mainloops/`), from where the tensor cores take
  them, while they work on the part before. No expanded w is ever written to memory.
- With few rows of x the tensor cores wait for expanded words. Then more warpgroups expand: two
  have 240 registers a thread each, four have 112, which hold the sums of up to 96 rows. And a step
  has several parts along k: they share its barriers, and a row of w is loaded 64 or 128 bytes at a
  time, where loads of 32 would be what takes longest.
- Sums inside the tensor cores are truncated (to 14 bits in fp8, and by float32's last bit in 16
  bit formats). With `promote` they cover one part, and are then added to float32 sums.
- With 192 rows of x or more, two operands and the sums of a step do not fit in registers. Then
  two warpgroups multiply in ping-pong (`wgmma.add_promoted`): one expands while the other
  multiplies.
- In a cluster, up to 8 CTAs have a part of k each of one tile. In the end they exchange sums
  through shared memory (`ptx/cluster.py`), and each adds up and stores its share of the rows.
- With stream-K, CTAs have as many steps each, of one tile after the other (`stream_k.py`).
- In groups, where a tile has more than 128 rows of x, a group's last tile loads and multiplies 128,
  if it has no more (`TAIL_ROWS`).
- The epilogue multiplies by the global scales, or by the scales of both operands' rows, in float32,
  and writes tiles transposed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper import epilogue, pipeline, stream_k
from jaxqq._kernels.hopper.dequant_store import TileEnd, stored_size
from jaxqq._kernels.hopper.pipeline import (
  GroupTile,
  GroupTiles,
  Steps,
  Tile,
  batch_of,
  pad_rows,
  rounded_up,
)
from jaxqq._kernels.hopper.ptx import (
  cluster,
  named_barriers,
  scale_planes,
  stores,
  wgmma,
)
from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROW_BYTES, row_transforms, tile_transforms
from jaxqq._kernels.hopper.ptx.registers import recomputed
from jaxqq._kernels.hopper.tiles import (
  DEQUANT_STORE,
  ROWS,
  SCALES,
  TILE_ROWS,
  TMA_BYTES,
  Grid,
  WideTiles,
  cdiv,
  planes_of,
  rows_of_scales,
  scale_slots,
)

TAIL_ROWS = 128  # of x: of a group's last tile, if it has no more
PING_PONG_ROWS = 192  # of x: from here on, sums to be promoted leave no registers to expand into


class PackedOperand(Protocol):
  """Packed w as the left operand of the tensor cores: 64 rows and `part_k` of k at a time."""

  @property
  def dtype(self) -> Any:
    """Of the operand, and of x."""

  @property
  def interleaved(self) -> bool:
    """Whether x is to be, in every 64 of k (`ptx/expand.py`)."""

  @property
  def part_k(self) -> int: ...

  @property
  def words(self) -> int:
    """Of uint32, a row and part."""

  @property
  def groups(self) -> int:
    """Scales, a row and part."""

  @property
  def unit_exponent(self) -> int:
    """Of the power of two that the product is to be multiplied by."""

  def load_words(self, ref: Any, transforms: tuple[Any, ...], part: int) -> Any:
    """Of a part of a piece of a step, from shared memory, in the layout that `expand` takes."""

  def load_scales(self, ref: Any) -> Any:
    """From shared memory: `groups` a row."""

  def scales_of_word(self, word: Any) -> Any:
    """The same of words (64,) that have them in their lowest bytes."""

  def expand(self, words: Any, scales: Any) -> Any:
    """(64, part_k) in the layout of a left operand."""


@pipeline.arrays
class Operands:
  # (b or 1, m, k) of mainloop.dtype, k a multiple of 16; interleaved, of mainloop.part_k.
  x: Any
  w: Any  # uint32 (b or 1, n, k * bits / 32)
  scales: Any  # uint8 (b or 1, n, k / group_size); of rebased codes `group_rescale`
  global_scale_x: Any = None  # float32 (1,) or (groups,)
  global_scale_w: Any = None
  x_scales: Any = None  # float32 (b or 1, m or more), of rebased codes
  w_scales: Any = None  # float32 (b or 1, n or more)
  groups: GroupTiles | None = None  # of x (1, m, k) in groups, and w (matrices, n, k)
  # Of stream-K, `stream_k.buffers`
  left: Any = None  # float32 (CTAs, warpgroups, 64, block_m): sums that a CTA leaves to a later one
  flags: Any = None  # int32: that it has


@pipeline.arrays
class Scratch:
  x: Any  # (stages, parts, block_m, part_k)
  w: Any  # (stages, pieces, block_n, words): rows of up to 128 bytes
  scales: Any  # (slots, block_n, SCALES), each of several steps; or in planes
  out: Any  # pieces of 64 rows of w on their way out; None where threads store them
  from_cluster: Any  # sums of the other CTAs, a slot each
  full: Any
  empty: Any


@pipeline.arrays
class Place:
  """Where a step's operands are in shared memory."""

  stage: Any
  slot: Any  # of its block of scales
  column: Any  # of its first scale there
  left: Any  # steps of w's rows after it, where scales of other rows follow a row's; else None


def dequant_gemm(
  operands: Operands,
  mainloop: PackedOperand,
  out_dtype: Any,
  tiles: WideTiles,
  grid: Grid,
  unit: float = 1.0,
) -> jax.Array:
  """(b, m, n): the sums times `unit` and global scales, or times the scales of x's and w's rows."""
  kernel = _DequantGemm(operands, mainloop, out_dtype, tiles, grid, unit)
  if tiles.stream_k:
    left, flags = stream_k.buffers(grid, kernel.compute_warpgroups, tiles.block_m)
    operands = dataclasses.replace(operands, left=left, flags=flags)
  out = pipeline.launch(
    kernel,
    kernel.padded(operands),
    kernel.out_type(),
    kernel.scratch(),
    name="dequant_gemm",
    grid=grid,
    compute_warpgroups=kernel.compute_warpgroups,
  )
  if kernel.writes_transpose:
    out = jnp.swapaxes(out, 1, 2)
  return out[:, : kernel.m, : kernel.n]


class _DequantGemm:
  """Sizes and buffers of one launch."""

  def __init__(
    self,
    operands: Operands,
    mainloop: PackedOperand,
    out_dtype: Any,
    tiles: WideTiles,
    grid: Grid,
    unit: float,
  ):
    x, w, self.unit = operands.x, operands.w, unit
    self.has_groups = operands.groups is not None
    self.batch = 1 if self.has_groups else max(x.shape[0], w.shape[0])
    self.m, self.n = x.shape[1], w.shape[1]
    self.mainloop, self.tiles, self.grid = mainloop, tiles, grid
    self.out_dtype = jnp.dtype(out_dtype)
    self.compute_warpgroups = tiles.block_n // ROWS
    self.k_steps = cdiv(x.shape[2], tiles.parts * mainloop.part_k)  # of CTAs that share a tile
    assert tiles.cluster == 1 or self.k_steps >= 2 * tiles.cluster, "every CTA has two steps"
    sizes = range(8, DEQUANT_STORE + 1, 8)  # rows of x that a CTA stores at a time
    self.store_m = max(s for s in sizes if tiles.own_m % s == 0 and tiles.block_m % s == 0)
    # Tiles of a group's last rows, of which fewer are loaded and multiplied.
    self.has_short_tails = self.has_groups and tiles.block_m > TAIL_ROWS
    self.ping_pong = tiles.promote and tiles.block_m >= PING_PONG_ROWS
    assert not self.ping_pong or tiles.block_n == 2 * ROWS, "two warpgroups multiply in turn"
    self.has_row_scales = operands.x_scales is not None
    self.step_groups = tiles.parts * mainloop.groups
    self.steps_a_block = SCALES // self.step_groups  # of scales
    self.blocks_a_tile = cdiv(self.k_steps, self.steps_a_block)
    self.slots = scale_slots(
      self.k_steps, self.steps_a_block, tiles.num_stages, stream_k=tiles.stream_k
    )
    # Only 16 bit matrices can be transposed on their way to shared memory.
    self.can_stage_transpose = self.out_dtype.itemsize == 2
    self.writes_transpose = not self.can_stage_transpose and not self.has_groups
    self.x_transforms = tile_transforms(mainloop.part_k, mainloop.dtype)
    step_words = tiles.parts * mainloop.words
    self.piece_words = min(ROW_BYTES // 4, step_words)
    self.pieces = step_words // self.piece_words
    # Of an axis of one piece Mosaic GPU knows no end (`stored_size`): it would be loaded again.
    assert tiles.parts == 1 or x.shape[2] > mainloop.part_k, "k has several parts, as a step has"
    assert self.pieces == 1 or w.shape[2] > self.piece_words, "and several pieces"
    self.w_transforms = tile_transforms(self.piece_words, jnp.uint32)
    if self.has_groups or w.shape[2] % self.piece_words or self.n % TILE_ROWS:
      self.w_transforms = row_transforms(4 * self.piece_words)
    # Of scales whose rows are no multiple of 16 bytes apart.
    self.planes = planes_of(operands.scales.shape[2], SCALES, tiles.block_n)
    self.scale_loads = 1 if self.planes is None else self.planes.count
    # In a row's last step, where that goes past its end, and the next row's scales are there.
    self.scales_of_last: int | None = None
    if self.planes is not None and self.planes.of_row % self.step_groups:
      self.scales_of_last = self.planes.of_row - (self.k_steps - 1) * self.step_groups
    past_end = x.shape[2] % mainloop.part_k != 0  # the last part goes there, and loads zeros
    # Tiles of 8 rows may be loaded where all rows are such; in groups a tile begins at any row.
    if self.has_groups or past_end or self.m % TILE_ROWS:
      self.x_transforms = row_transforms()

  def out_type(self) -> jax.ShapeDtypeStruct:
    """(b, m, n), or (b, n, m), and what the last pieces have beyond."""
    if self.has_groups and not self.can_stage_transpose:
      return jax.ShapeDtypeStruct(
        (1, *stores.stored_shape(self.m, self.n, 0, ROWS)), self.out_dtype
      )
    m_multiple = self.store_m if self.writes_transpose else 1
    rows = stored_size(self.m, self.store_m, self.tiles.block_m, m_multiple)
    rows = self.m if self.has_groups else rows
    columns = stored_size(self.n, ROWS, self.tiles.block_n, self.n_multiple)
    shape = (columns, rows) if self.writes_transpose else (rows, columns)
    return jax.ShapeDtypeStruct((self.batch, *shape), self.out_dtype)

  @property
  def n_multiple(self) -> int:
    """Of the result's columns: rows of it are multiples of 16 bytes, as the TMA stores them."""
    in_pieces = self.writes_transpose or (self.has_groups and interpreting())
    return ROWS if in_pieces else TMA_BYTES // self.out_dtype.itemsize

  def scratch(self) -> Scratch:
    tiles, mainloop, stages = self.tiles, self.mainloop, self.tiles.num_stages
    warpgroups, others = self.compute_warpgroups, tiles.cluster - 1
    loads = self.scale_loads + self.pieces + tiles.parts * (1 + self.has_short_tails)
    out = (ROWS, self.store_m) if self.writes_transpose else (self.store_m, ROWS)
    out_transforms = tile_transforms(out[1], self.out_dtype)
    in_tiles = self.m % TILE_ROWS == 0 and self.n % ROWS == 0
    if self.has_groups or not (in_tiles or self.writes_transpose):
      out_transforms = row_transforms()
    is_staged = self.can_stage_transpose or self.writes_transpose
    x_shape = stages, tiles.parts, tiles.block_m, mainloop.part_k
    w_shape = stages, self.pieces, tiles.block_n, self.piece_words
    scales_shape = (tiles.block_n, SCALES) if self.planes is None else self.planes.shape
    return Scratch(
      plgpu.SMEM(x_shape, mainloop.dtype, transforms=self.x_transforms),
      plgpu.SMEM(w_shape, jnp.uint32, transforms=self.w_transforms),
      plgpu.SMEM((self.slots, *scales_shape), jnp.uint8),
      plgpu.SMEM((warpgroups, tiles.store_stages, *out), self.out_dtype, transforms=out_transforms)
      if is_staged
      else None,
      cluster.dsmem_buffer(tiles.own_m, others, warpgroups) if others else None,
      plgpu.Barrier(num_barriers=stages, num_arrivals=loads),
      plgpu.Barrier(num_barriers=stages, num_arrivals=warpgroups),
    )

  def padded(self, operands: Operands) -> Operands:
    """With scales for as many rows as are loaded at once."""
    of_x, of_w, planes = operands.x_scales, operands.w_scales, self.planes
    scales = pad_rows(operands.scales, rows_of_scales(self.n, planes))
    if planes is not None:
      scales = scale_planes.as_planes(scales, planes)
    if of_x is not None:
      if not self.has_groups:
        of_x = pad_rows(of_x, rounded_up(self.m, self.store_m))
      of_w = pad_rows(of_w, rounded_up(self.n, ROWS))
    return dataclasses.replace(operands, scales=scales, x_scales=of_x, w_scales=of_w)

  def __call__(self, gmem: Operands, out: Any, smem: Scratch) -> None:
    _Cta(self, gmem, out, smem).run()


class _Cta:
  """One CTA of the kernel, with its references."""

  def __init__(self, kernel: _DequantGemm, gmem: Operands, out: Any, smem: Scratch):
    self.kernel, self.mainloop, self.tiles = kernel, kernel.mainloop, kernel.tiles
    self.gmem, self.out, self.smem = gmem, out, smem
    self.warpgroup = lax.axis_index("warpgroup")
    self.cluster_index = pipeline.cluster_index(kernel.grid)
    self.first_step, self.k_steps = 0, kernel.k_steps
    if self.tiles.cluster > 1:
      self.first_step, self.k_steps = pipeline.share_of_steps(kernel.grid, kernel.k_steps)
    worker = None
    if self.tiles.stream_k:
      worker = lax.axis_index(pipeline.WORKER)
      self.walk, self.dealt_steps = stream_k.walk(kernel.grid, kernel.k_steps, kernel.steps_a_block)
    else:
      self.walk = pipeline.walk(kernel.grid, gmem.groups)
    self.end = TileEnd(kernel, gmem, out, smem, self.warpgroup, self.cluster_index, worker)

  def steps_of(self, tile: Tile) -> Steps:
    """Those of a tile that this CTA has."""
    if isinstance(tile, stream_k.Piece):
      return tile.steps
    before = tile.index * self.k_steps, tile.index * self.kernel.blocks_a_tile
    return Steps(self.first_step, self.k_steps, *before)

  def count_steps(self) -> Any:
    """Of all its tiles."""
    return self.dealt_steps if self.tiles.stream_k else self.walk.num_tiles * self.k_steps

  def run(self) -> None:
    kernel, warpgroup = self.kernel, self.warpgroup

    @pl.when(warpgroup == kernel.compute_warpgroups)
    @jax.named_scope("producer")
    def _producer() -> None:
      steps = self.steps_of, self.count_steps
      pipeline.release_registers(kernel.compute_warpgroups)
      pipeline.produce(self.load, self.smem.empty, self.walk, *steps)
      if self.tiles.cluster > 1:
        cluster.cluster_sync()

    self.own_rows = pl.ds(warpgroup * ROWS, ROWS)  # of w, within a tile

    @pl.when(warpgroup < kernel.compute_warpgroups)
    def _compute() -> None:
      pipeline.take_registers(kernel.compute_warpgroups)
      if kernel.ping_pong:
        # The first is warpgroup 0's.
        pl.when(warpgroup == 1)(lambda: named_barriers.arrive(warpgroup))

      @pl.loop(0, self.walk.num_tiles)
      def _tile(t: Any) -> None:
        if kernel.has_short_tails:
          self.multiply_tail_or_whole(t)
        else:
          self.multiply(self.walk.tile(t), self.tiles.block_m)

      if kernel.ping_pong:  # no barrier mid-phase at exit
        pl.when(warpgroup == 0)(lambda: named_barriers.wait(warpgroup))

      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      if self.gmem.groups is not None:
        with jax.named_scope("zeros"):
          zeros = pipeline.walk_of_zeros(kernel.grid, self.gmem.groups)
          epilogue.store_zeros(zeros, self.out, self.tiles.block_m, self.end.first_row)

  def multiply_tail_or_whole(self, t: Any) -> None:
    """The t-th tile, by the code for a group's last rows or by that for others.

    The tile is computed anew for each: to share it takes registers, and without enough of them
    ptxas serializes wgmma. In ping-pong one branch with two ways spills less than two branches.
    """

    def tile() -> Any:
      return self.walk.tile(recomputed(t))

    def few() -> None:
      self.multiply(tile(), TAIL_ROWS)

    def most() -> None:
      self.multiply(tile(), self.tiles.block_m)

    if self.kernel.ping_pong:
      lax.cond(tile().rows <= TAIL_ROWS, few, most)
    else:
      pl.when(tile().rows <= TAIL_ROWS)(few)
      pl.when(tile().rows > TAIL_ROWS)(most)

  def multiply(self, tile: Tile, rows: int) -> None:
    """A tile of up to so many rows of x."""
    with jax.named_scope("mainloop"):
      sums, w_scales = self.sums(tile, rows)
    with jax.named_scope("epilogue"):
      if self.tiles.cluster > 1:
        self.end.exchange_and_store(sums, w_scales, tile)
      elif self.tiles.stream_k:
        again = self.walk.tile(recomputed(tile.index))
        self.end.add_up_and_store(sums, w_scales, again)
      else:
        self.end.store(sums, w_scales, tile, 0)

  # Loads

  def load(self, stage: Any, ki: Any, tile: Tile) -> None:
    gmem, full, mainloop = self.gmem, self.smem.full.at[stage], self.mainloop
    block, slot, is_first = self.scales_of(ki, tile)
    w_rows = pl.ds(tile.n * self.tiles.block_n, self.tiles.block_n)
    ki = ki + self.steps_of(tile).first
    of_w = gmem.w.at[batch_of(gmem.w, tile.batch), w_rows]
    pieces, size = self.kernel.pieces, self.kernel.piece_words
    for piece in range(pieces):
      words = of_w.at[:, pl.ds((ki * pieces + piece) * size, size)]
      plgpu.copy_gmem_to_smem(words, self.smem.w.at[stage, piece], full)
    of_x = gmem.x.at[batch_of(gmem.x, tile.batch)]
    first_row = tile.row(self.tiles.block_m)

    def load_x(part: int, first: int, rows: int) -> None:
      ks = pl.ds((ki * self.tiles.parts + part) * mainloop.part_k, mainloop.part_k)
      to = self.smem.x.at[stage, part, pl.ds(first, rows)]
      plgpu.copy_gmem_to_smem(of_x.at[pl.ds(first_row + first, rows), ks], to, full)

    for part in range(self.tiles.parts):
      if self.kernel.has_short_tails and isinstance(tile, GroupTile):
        load_x(part, 0, TAIL_ROWS)
        more = functools.partial(load_x, part, TAIL_ROWS, self.tiles.block_m - TAIL_ROWS)
        pl.when(tile.rows > TAIL_ROWS)(more)
        pl.when(tile.rows <= TAIL_ROWS)(lambda: plgpu.barrier_arrive(full))
      else:
        load_x(part, 0, self.tiles.block_m)

    planes = self.kernel.planes

    @pl.when(is_first)
    def _scales() -> None:
      of_matrix, to = gmem.scales.at[batch_of(gmem.scales, tile.batch)], self.smem.scales.at[slot]
      if planes is None:
        here = pl.ds(block * SCALES, SCALES)
        plgpu.copy_gmem_to_smem(of_matrix.at[w_rows, here], to, full)
      else:
        first_row = tile.n * self.tiles.block_n
        scale_planes.load(of_matrix, first_row, block * SCALES, to, full, planes)

    @pl.when(jnp.logical_not(is_first))
    def _no_scales() -> None:
      for _ in range(self.kernel.scale_loads):  # in place of each
        plgpu.barrier_arrive(full)

  def scales_of(self, ki: Any, tile: Tile) -> tuple[Any, Any, Any]:
    """Of a step: its block of scales, where that is, and whether it is loaded with this step."""
    size, steps = jnp.int32(self.kernel.steps_a_block), self.steps_of(tile)
    block, of_first = lax.div(steps.first + ki, size), lax.div(jnp.int32(steps.first), size)
    own_block = steps.blocks_before + block - of_first
    slot = lax.rem(own_block, jnp.int32(self.kernel.slots))
    is_first = (ki == 0) | (lax.rem(steps.first + ki, size) == 0)
    return block, slot, is_first

  # A tile's sums

  def first_place(self, tile: Tile) -> Place:
    groups, steps = self.kernel.step_groups, self.steps_of(tile)
    stage = pipeline.stage_of(steps.before, self.tiles.num_stages)
    slot = lax.rem(steps.blocks_before, jnp.int32(self.kernel.slots))
    left = None
    if self.kernel.scales_of_last is not None:
      left = jnp.int32(self.kernel.k_steps - 1 - steps.first)
    return Place(stage, slot, lax.rem(steps.first * groups, jnp.int32(SCALES)), left)

  def place_after(self, place: Place) -> Place:
    """Of the next step of a tile."""
    column = place.column + self.kernel.step_groups
    is_next = column == SCALES
    next_slot = pipeline.stage_after(place.slot, self.kernel.slots)
    return Place(
      pipeline.stage_after(place.stage, self.tiles.num_stages),
      jnp.where(is_next, next_slot, place.slot),
      jnp.where(is_next, jnp.int32(0), column),
      None if place.left is None else place.left - 1,
    )

  def expanded(self, place: Place, part: int) -> Any:
    """The operand of a part of a step, from its packed words; x's is there then as well."""
    mainloop, smem = self.mainloop, self.smem
    if part == 0:
      plgpu.barrier_wait(smem.full.at[place.stage])
    piece, of_piece = divmod(part, self.tiles.parts // self.kernel.pieces)
    own_words = smem.w.at[place.stage, piece, self.own_rows]
    words = mainloop.load_words(own_words, self.kernel.w_transforms, of_piece)
    return mainloop.expand(words, self.scales(place, part * mainloop.groups))

  def scales(self, place: Place, first: int) -> Any:
    """Of a part of a step, `first` of whose scales come before."""
    mainloop, planes = self.mainloop, self.kernel.planes
    own, column = self.smem.scales.at[place.slot], place.column + first
    if planes is None:
      of_step = own.at[self.own_rows, pl.ds(place.column, self.kernel.step_groups)]
      return mainloop.load_scales(of_step.at[:, pl.ds(first, mainloop.groups)])
    row, unit, masks = self.warpgroup * ROWS, mainloop.groups, None
    if self.kernel.scales_of_last is not None:
      masks = scale_planes.masks_of(self.kernel.scales_of_last - first, 1, place.left == 0, unit)
    (word,) = scale_planes.words(own, row, column, 1, planes, masks=masks, unit=unit)
    return mainloop.scales_of_word(word)

  def step(self, place: Place, a: Any, total: Any, after: Place | None) -> tuple[Any, Any]:
    """total + one step's product, of whose first part a is; and the first of the step after."""
    for part in range(self.tiles.parts):
      following: Callable[[], Any] | None = None
      if part + 1 < self.tiles.parts:
        following = functools.partial(self.expanded, place, part + 1)
      elif after is not None:
        following = functools.partial(self.expanded, after, 0)
      total, a = self.part(place, part, a, total, following)
    return total, a

  def part(
    self, place: Place, part: int, a: Any, total: Any, following: Callable[[], Any] | None
  ) -> tuple[Any, Any]:
    """total + a x_hat^T; meanwhile `following`, if any, expands the next part's a."""
    kernel, dtype, rows = self.kernel, self.mainloop.dtype, total.shape[1]
    b = self.smem.x.at[place.stage]

    def release() -> None:
      if part == self.tiles.parts - 1:
        plgpu.barrier_arrive(self.smem.empty.at[place.stage])

    if kernel.ping_pong:
      b = b.at[part, pl.ds(0, rows)]
      total = wgmma.add_promoted(total, a, b, self.warpgroup, kernel.x_transforms, dtype)
      release()
      return total, following and following()
    promote = self.tiles.promote
    before = None if promote else total
    begun = wgmma.begin(a, b, kernel.x_transforms, dtype, sums=before, of_b=(part, rows))
    next_a = following and following()
    at_end = promote or part == self.tiles.parts - 1
    (sums,) = wgmma.finish(begun, a, next_a, at_end=at_end)
    release()
    return total + sums if promote else sums, next_a

  def sums(self, tile: Tile, rows: int) -> tuple[Any, Any]:
    """Over all steps, (64, rows), and the scales of the own rows of w."""

    def body(_: Any, state: Any) -> Any:
      place, a, total = state
      after = self.place_after(place)
      total, a = self.step(place, a, total, after)
      return after, a, total

    place = self.first_place(tile)
    state = place, self.expanded(place, 0), wgmma.zeros(rows)
    times = self.steps_of(tile).count - 1
    if not isinstance(times, int):
      # A count that is known at run time is two or more (clusters, stream-K). If the loop might not
      # be entered, ptxas would serialize wgmma, and a step take a quarter longer.
      times = jnp.maximum(times, 1)
    place, a, total = lax.fori_loop(0, times, body, state)
    w_scales = None
    if self.kernel.has_row_scales:  # here, so that they arrive while the last step is multiplied
      w_scales = self.end.load_w_scales(tile)
    total, _ = self.step(place, a, total, None)
    return total, w_scales
