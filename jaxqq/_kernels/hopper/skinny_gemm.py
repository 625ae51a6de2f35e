"""out = x_hat w_hat^T for up to 64 rows of x, from w that is read once.

A CTA has 64 rows of w at a time (in groups `sixteens` has 128) and all of k, in blocks that go
round its compute warpgroups:

    producer, warpgroup C | load block 8 | load block 9 | load block 10 | ...
    warpgroup 0, compute  |  block 0  |  block 4  |  block 8  | ... | add up, store | next rows of w
    warpgroup 1, compute  |  block 1  |  block 5  |  block 9  | ... | hand over     | next rows of w
    warpgroup 2, ...

- The producer has the TMA keep all of shared memory full: packed words and scales of w, or its
  numbers, and of x what belongs to them, in one block of k. Where packed w is multiplied by so few
  rows of x that their quantization is little work, a compute warpgroup does that itself, while it
  waits for its block of w (`quantize/in_kernel.py`). Where rows of scales begin anywhere, those of
  all of a tile's blocks come with its first, if there is room: they are one piece of memory.
- A compute warpgroup multiplies its blocks: out^T = w_hat x_hat^T, the tile's rows of w by all of
  x, 64 at a time. The mainloop (`mainloops/`) decides how: `blockdiag`, `expanded`, `group_sums`,
  `in_order`, `quantized`, `sixteens`.
- One warpgroup adds the sums of the others to its own and stores them: of a CTA's first tile
  warpgroup 0, of its second one warpgroup 1, and so on. So all have the same work. Sums are added
  in pairs that are the same whoever adds them, and so are the bits.
- Where w has so few rows that half of the SMs or more would idle, a cluster of CTAs has 64 rows
  together, each a part of k, and adds up its sums (`ptx/cluster.py`). Where half of the SMs or more
  would idle in the last wave of CTAs, clusters share its tiles. Where fewer would, and k is long,
  its blocks are dealt out to all CTAs evenly (`stream_k.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper import pipeline, stream_k
from jaxqq._kernels.hopper.mainloops.table import skinny_mainloops
from jaxqq._kernels.hopper.pipeline import (
  GroupTile,
  GroupTiles,
  Steps,
  Tile,
  batch_of,
  pad_rows,
  rounded_up,
)
from jaxqq._kernels.hopper.ptx import scale_planes, stores
from jaxqq._kernels.hopper.ptx.interpreter import finish_loads
from jaxqq._kernels.hopper.ptx.layouts import ROW_BYTES, row_transforms, tile_transforms
from jaxqq._kernels.hopper.quantize.code_words import first_of_scales
from jaxqq._kernels.hopper.quantize.in_kernel import InKernelQuantizer, quantizer_of
from jaxqq._kernels.hopper.skinny_plan import SkinnyPlan
from jaxqq._kernels.hopper.skinny_store import TileEnd
from jaxqq._kernels.hopper.tiles import ROWS, TILE_ROWS, Grid, cdiv, rows_of_scales
from jaxqq._kernels.problem import Problem


class Mainloop(Protocol):
  """How a warpgroup adds one block of k to its sums.

  Attributes:
    interleaved: whether x is to be, in every 64 of k (`ptx/expand.py`).
    by_warps: whether a warp has an instruction of its own (`ptx/mma.py`). Then rows of w are in the
      order of `layouts.even_rows_first`, and in groups a tile of fewer rows of x takes less time.
  """

  interleaved: bool
  by_warps: bool

  @staticmethod
  def unit(problem: Problem) -> float:
    """What its sums are to be multiplied by, global scales apart."""

  @staticmethod
  def add(cta: Any, sums: list[Any], stage: Any, scales: Any, rows: int, is_last: Any) -> list[Any]:
    """sums + the product of the block in a stage.

    Args:
      cta: the kernel's `_Cta`.
      sums: (64, padded_m), for each 64 rows of w.
      stage: of both operands.
      scales: for each 64 rows of w their words, of `scale_planes`; None where rows are a multiple
        of 16 bytes apart.
      rows: of x that the tile has, rounded up to a multiple of 8. Fewer than padded_m only where it
        is `by_warps`; the other columns of the sums stay zero.
      is_last: whether it is k's last block, which may go past the end.
    """


@pipeline.arrays
class Operands:
  # (b or 1, padded_m, k) of 16 bit floats, or (.., .., k / 4) of four e4m3 numbers in a uint32; or
  # (b or 1, m, k) to be quantized here
  x: Any
  w: Any  # uint32 (b or 1, n, k * bits / 32); or (b or 1, n, k) of 16 bit floats
  scales: Any  # uint8 (b or 1, n, k / group_size); or None
  global_scale_x: Any  # float32 (1,), the amax of x; or None
  global_scale_w: Any
  # Of e4m3 numbers, float32: (b or 1, k / group_size, padded_m), or beside `groups` as `code_words`
  # shifts them; of block-diagonal x (1, 1, all), block after block.
  x_scales: Any = None
  # Of x (1, m, k) in groups, and w (matrices, n, k), with global scales of shape (1,) or (groups,).
  groups: GroupTiles | None = None
  # Of stream-K, `stream_k.buffers`
  left: Any = None  # float32 (CTAs, 1, 64, padded_m): sums that a CTA leaves to a later one
  flags: Any = None  # int32: that it has


@pipeline.arrays
class Scratch:
  x: Any  # (stages, padded_m, columns), or in rows (stages, .., padded_m, 128 bytes)
  w: Any  # (stages, block_n, words or numbers), or in rows (stages, .., block_n, 128 bytes)
  sums: Any  # that warpgroups hand over, a slot each
  scales: Any  # (stages, ..); whole ones (slots, ..), a tile each
  x_scales: Any
  cta_sums: Any  # that the first CTA of a cluster reads
  full: Any
  empty: Any
  scales_full: Any  # one a slot
  sums_full: Any  # one for each warpgroup that adds up
  sums_empty: Any


def skinny_gemm(
  operands: Operands,
  m: int,
  plan: SkinnyPlan,
  unit: float,
  out_dtype: Any,
  grid: Grid | None = None,
) -> jax.Array:
  """(b, m, n): the sums times `unit` and the global scales. x has k in whole blocks.

  Args:
    operands: of shapes as above; what rows of x from m on hold reaches no result.
    m: rows of x that count.
    plan: for the sizes at hand.
    unit: what to multiply the sums by: what the mainloop leaves out, and 1 / 2688 a global scale.
    out_dtype: of the result.
    grid: of tiles, where it is not the plan's.
  """
  grid = plan.grid if grid is None else grid
  kernel = _SkinnyGemm(operands, m, plan, grid, unit, out_dtype)
  if plan.tiles.stream_k:
    left, flags = stream_k.buffers(grid, 1, plan.padded_m)
    operands = dataclasses.replace(operands, left=left, flags=flags)
  out = pipeline.launch(
    kernel,
    kernel.padded(operands),
    kernel.out_type(),
    kernel.scratch(),
    name="skinny_gemm",
    grid=grid,
    compute_warpgroups=plan.tiles.compute_warpgroups,
  )
  return out if out.shape[1:] == (m, kernel.n) else out[:, :m, : kernel.n]


class _SkinnyGemm:
  """Sizes and buffers of one launch."""

  def __init__(
    self,
    operands: Operands,
    m: int,
    plan: SkinnyPlan,
    grid: Grid,
    unit: float,
    out_dtype: Any,
  ):
    self.grid = grid
    x, w, block = operands.x, operands.w, plan.block
    self.plan, self.m, self.unit, self.out_dtype = plan, m, unit, out_dtype
    self.has_groups = operands.groups is not None
    self.batch, self.n = 1 if self.has_groups else max(x.shape[0], w.shape[0]), w.shape[1]
    self.is_packed = operands.scales is not None
    self.w_dtype, self.w_columns = w.dtype, block.words if self.is_packed else block.k
    self.all_steps = cdiv(w.shape[2], self.w_columns)
    self.quantizer: InKernelQuantizer | None = None
    self.x_scales_shape: tuple[int, int] | None = None  # of a block, in shared memory
    self.x_scales_loaded: tuple[int, int] = 0, 0
    if plan.quantizes_x:
      self.quantizer = quantizer_of(plan, m)
      self.x_dtype, self.x_columns = self.quantizer.dtype, self.quantizer.columns
      self.x_scales_shape = self.quantizer.scales_shape
    else:
      self.x_dtype = x.dtype
      self.x_columns = block.k // (4 if x.dtype == jnp.uint32 else 1)
      if operands.x_scales is not None:
        self.x_scales_loaded = block.scales, plan.padded_m
        if plan.blockdiag is not None:
          self.x_scales_loaded = 1, block.scales * plan.blockdiag.rows
        rows, size = self.x_scales_loaded
        # The TMA writes to multiples of 128 bytes.
        self.x_scales_shape = rows, max(size, 32 // rows)
    self.x_transforms = self.w_transforms = row_transforms()
    if not plan.x_in_rows:
      self.x_transforms = tile_transforms(self.x_columns, self.x_dtype)
    if not plan.in_rows:
      self.w_transforms = tile_transforms(self.w_columns, self.w_dtype)
    self.mainloop = skinny_mainloops()[plan.mainloop]
    self.block_n = plan.tiles.block_n

  def padded(self, operands: Operands) -> Operands:
    """With w in whole tiles, where it is loaded in such, and x as its quantizer takes it."""
    x = operands.x if self.quantizer is None else self.quantizer.operand(operands.x)
    planes, w, scales = self.plan.scale_planes, operands.w, operands.scales
    if scales is not None:
      scales = pad_rows(scales, rows_of_scales(self.n, planes))
      scales = scales if planes is None else scale_planes.as_planes(scales, planes)
    if not self.plan.in_rows:
      w = pad_rows(w, rounded_up(self.n, TILE_ROWS))
    return dataclasses.replace(operands, x=x, w=w, scales=scales)

  def out_type(self) -> jax.ShapeDtypeStruct:
    shape = stores.stored_shape(self.m, self.n, self.plan.padded_m, self.block_n)
    return jax.ShapeDtypeStruct((self.batch, *shape), self.out_dtype)

  def scratch(self) -> Scratch:
    plan, tiles = self.plan, self.plan.tiles
    stages, workers, padded_m = tiles.num_stages, tiles.compute_warpgroups, plan.padded_m
    sums_transforms = tile_transforms(padded_m, jnp.float32)
    x_shape = _stored_shape(padded_m, self.x_columns, self.x_dtype, in_rows=plan.x_in_rows)
    w_shape = _stored_shape(self.block_n, self.w_columns, self.w_dtype, in_rows=plan.in_rows)
    planes, scales_shape = plan.scale_planes, (self.block_n, plan.block.scales)
    slots = tiles.scale_slots(self.all_steps) if tiles.whole_scales else 0
    loads = _num_loads(w_shape)
    if self.is_packed and not slots:
      loads += 1 if planes is None else planes.count
    if self.quantizer is None:
      loads += _num_loads(x_shape) + (self.x_scales_shape is not None)

    def smem(shape: tuple[int, ...], dtype: Any, transforms: Any = ()) -> Any:
      return plgpu.SMEM(shape, dtype, transforms=transforms)

    return Scratch(
      x=smem((stages, *x_shape), self.x_dtype, self.x_transforms),
      w=smem((stages, *w_shape), self.w_dtype, self.w_transforms),
      sums=smem((workers - 1, self.block_n, padded_m), jnp.float32, sums_transforms),
      scales=smem((slots or stages, *(planes.shape if planes else scales_shape)), jnp.uint8)
      if self.is_packed
      else None,
      x_scales=smem((stages, *self.x_scales_shape), jnp.float32) if self.x_scales_shape else None,
      cta_sums=smem((ROWS, padded_m), jnp.float32, sums_transforms) if tiles.cluster > 1 else None,
      full=plgpu.Barrier(num_barriers=stages, num_arrivals=loads),
      empty=plgpu.Barrier(num_barriers=stages),
      scales_full=plgpu.Barrier(num_barriers=slots) if slots else None,
      sums_full=plgpu.Barrier(num_barriers=workers, num_arrivals=workers - 1),
      sums_empty=plgpu.Barrier(),
    )

  @property
  def halves(self) -> range:
    """Which 64 rows of w of a tile's: one of them, or two."""
    return range(self.block_n // ROWS)

  def __call__(self, gmem: Operands, out: Any, smem: Scratch) -> None:
    _Cta(self, gmem, out, smem).run()


def _stored_shape(rows: int, columns: int, dtype: Any, *, in_rows: bool) -> tuple[int, ...]:
  """Of an operand in a stage."""
  if not in_rows:
    return rows, columns
  of_row = ROW_BYTES // jnp.dtype(dtype).itemsize
  return columns // of_row, rows, of_row


def _num_loads(shape: tuple[int, ...]) -> int:
  """How many the TMA takes for it: in rows, one for each 128 bytes of them."""
  return shape[0] if len(shape) == 3 else 1


class _Cta:
  """One CTA of the kernel, with its references."""

  def __init__(self, kernel: _SkinnyGemm, gmem: Operands, out: Any, smem: Scratch):
    self.kernel, self.plan, self.tiles = kernel, kernel.plan, kernel.plan.tiles
    self.gmem, self.smem, self.warpgroup = gmem, smem, lax.axis_index("warpgroup")
    cluster_index = pipeline.cluster_index(kernel.grid)
    self.dealt_steps: Any = 0  # of stream-K
    if self.tiles.stream_k:
      self.walk, self.dealt_steps = stream_k.walk(kernel.grid, kernel.all_steps)
    else:
      self.walk = pipeline.walk(kernel.grid, gmem.groups)
    self.end = TileEnd(kernel, gmem, out, smem, self.warpgroup, cluster_index, self.walk)

  def run(self) -> None:
    kernel, warpgroup, workers = self.kernel, self.warpgroup, self.tiles.compute_warpgroups

    @pl.when(warpgroup == workers)
    @jax.named_scope("producer")
    def _producer() -> None:
      pipeline.release_registers(workers)
      steps = self.steps_of, self.count_steps
      pipeline.produce(self.load, self.smem.empty, self.walk, *steps)

    @pl.when(warpgroup < workers)
    def _compute() -> None:
      pipeline.take_registers(workers)
      if kernel.quantizer is not None:
        for i in range(0, self.tiles.num_stages, workers):
          kernel.quantizer.clear(self.smem.x.at[warpgroup + i])

      @pl.loop(0, self.walk.num_tiles)
      def _tile(t: Any) -> None:
        with jax.named_scope("mainloop"):
          sums = self.own_sums(t)
        with jax.named_scope("epilogue"):
          self.end.add_up_and_store(sums, t)

      # No mbarrier is mid-phase at exit.
      pl.when(self.walk.num_tiles > 0)(self.end.wait_for_slots)
      if self.gmem.groups is not None:
        pl.when(warpgroup == 0)(functools.partial(self.end.store_zeros, self.gmem.groups))

    if self.tiles.cluster > 1:
      self.end.add_up_cluster()

  # Loads

  def steps_of(self, tile: Tile) -> Steps:
    """The blocks of k that this CTA has of a tile: all, but of a shared one."""
    if isinstance(tile, stream_k.Piece):
      return tile.steps
    every, grid = self.kernel.all_steps, self.kernel.grid
    before = tile.index * every
    if grid.cluster == 1:
      return Steps(0, every, before)
    first, count = pipeline.share_of_steps(grid, every)
    if grid.shares_last:
      is_shared = tile.index >= grid.whole_rounds
      first, count = jnp.where(is_shared, first, 0), jnp.where(is_shared, count, every)
    return Steps(first, count, before)

  def count_steps(self) -> Any:
    """Of all tiles."""
    if self.tiles.stream_k:
      return self.dealt_steps
    last = self.steps_of(self.walk.tile(jnp.maximum(self.walk.num_tiles - 1, 0)))
    return last.before + jnp.where(self.walk.num_tiles > 0, last.count, 0)

  def load(self, stage: Any, ki: Any, tile: Tile) -> None:
    kernel, gmem, smem, full = self.kernel, self.gmem, self.smem, self.smem.full.at[stage]
    ki = ki + self.steps_of(tile).first
    rows = pl.ds(tile.n * kernel.block_n, kernel.block_n)

    def copy(a: Any, rows: Any, columns: int, to: Any) -> None:
      b = batch_of(a, tile.batch)
      if to.ndim == 3:
        plgpu.copy_gmem_to_smem(a.at[b, rows, pl.ds(ki * columns, columns)], to.at[stage], full)
        return
      pieces, size = to.shape[1], to.shape[3]
      for i in range(pieces):
        here = pl.ds((ki * pieces + i) * size, size)
        plgpu.copy_gmem_to_smem(a.at[b, rows, here], to.at[stage, i], full)

    copy(gmem.w, rows, kernel.w_columns, smem.w)
    planes, count = self.plan.scale_planes, self.plan.block.scales
    if planes is not None:
      of_matrix = gmem.scales.at[batch_of(gmem.scales, tile.batch)]
      load_scales = functools.partial(
        scale_planes.load, of_matrix, tile.n * kernel.block_n, planes=planes
      )
      if self.tiles.whole_scales:
        slot = self.slot_of_scales(tile.index)
        to = smem.scales.at[slot], smem.scales_full.at[slot]
        pl.when(ki == 0)(lambda: load_scales(0, *to))
      else:
        load_scales(ki * count, smem.scales.at[stage], full)
    elif smem.scales is not None:
      copy(gmem.scales, rows, count, smem.scales)
    first_of_x: Any = 0
    if isinstance(tile, GroupTile):
      first_of_x = tile.first
    elif jax.__version_info__ >= (0, 12) and self.plan.padded_m > gmem.x.shape[1]:
      first_of_x = tile.n * 0  # JAX 0.12 refuses rows past the end from a number on that it knows
    x_rows = pl.ds(first_of_x, self.plan.padded_m)
    if kernel.quantizer is None:
      copy(gmem.x, x_rows, kernel.x_columns, smem.x)
    if gmem.x_scales is not None:
      count, size = kernel.x_scales_loaded
      source, here = batch_of(gmem.x_scales, tile.batch), pl.ds(ki * count, count)
      columns = pl.ds(0, size)
      if isinstance(tile, GroupTile):
        source, first = first_of_scales(tile.first)
        columns = pl.ds(first, size)
      elif self.plan.blockdiag is not None:
        here, columns = pl.ds(0, 1), pl.ds(ki * size, size)
      to = smem.x_scales.at[stage, :, pl.ds(0, size)]
      plgpu.copy_gmem_to_smem(gmem.x_scales.at[source, here, columns], to, full)

  # A stage's operands

  def x_step(self, stage: Any, step: int, rows: int | None = None) -> Any:
    """The bytes of x that an instruction for the tensor cores takes, (padded_m or `rows`, 128)."""
    return self._row(self.smem.x, stage, step, rows)

  def w_step(self, stage: Any, step: int) -> Any:
    return self._row(self.smem.w, stage, step, None)

  def _row(self, ref: Any, stage: Any, step: int, rows: int | None) -> Any:
    of_rows = slice(None) if rows is None else pl.ds(0, rows)
    if ref.ndim == 4:  # in rows
      return ref.at[stage, step, of_rows]
    size = ROW_BYTES // ref.dtype.itemsize
    return ref.at[stage, of_rows, pl.ds(step * size, size)]

  def w_pieces(self, stage: Any, half: int = 0) -> list[Any]:
    """64 rows of w as it is stored: all columns, or 128 bytes of them one after the other."""
    rows = pl.ds(half * ROWS, ROWS)
    if self.plan.in_rows:
      return [self.smem.w.at[stage, i, rows] for i in range(self.smem.w.shape[1])]
    return [self.smem.w.at[stage, rows]]

  def slot_of_scales(self, t: Any) -> Any:
    """Of this CTA's t-th tile."""
    return pipeline.stage_of(t, self.smem.scales.shape[0])

  def words_of_scales(self, t: Any, ki: Any, stage: Any, is_last: Any) -> list[Any] | None:
    """Of a tile's block of k, for each 64 rows of w, where they are in planes.

    is_last: of a row's blocks.
    """
    planes = self.plan.scale_planes
    if planes is None:
      return None
    count, is_whole = self.plan.block.scales, self.tiles.whole_scales
    own = self.smem.scales.at[self.slot_of_scales(t) if is_whole else stage]
    column = ki * count if is_whole else 0
    of_last = planes.of_row - (self.kernel.all_steps - 1) * count
    masks = scale_planes.masks_of(of_last, count // 4, is_last)
    return [
      scale_planes.words(
        own,
        half * ROWS,
        column,
        count // 4,
        planes,
        masks=masks,
        even_first=self.kernel.mainloop.by_warps,
      )
      for half in self.kernel.halves
    ]

  # A warpgroup's sums: for each 64 rows of w, (64, padded_m)

  def own_sums(self, t: Any) -> list[Any]:
    """What a warpgroup's blocks of a tile add up to.

    In groups, by instructions of warps, there is a program for every 8 rows up to padded_m: a tile
    of fewer rows takes less time.
    """
    eights, tile = self.plan.padded_m // 8, self.walk.tile(t)
    if not self.kernel.mainloop.by_warps or not isinstance(tile, GroupTile) or eights == 1:
      return self.own_sums_of(t, tile, self.plan.padded_m)
    branches = [functools.partial(self.own_sums_of, t, tile, 8 * (i + 1)) for i in range(eights)]
    return lax.switch(lax.div(tile.rows - 1, jnp.int32(8)), branches)

  def own_sums_of(self, t: Any, tile: Tile, rows: int) -> list[Any]:
    """The same, of a tile with up to so many rows of x.

    Blocks go round without regard to tiles: a stage, of which there are a multiple of the
    warpgroups, always belongs to the same one, which sees all its barrier's phases.
    """
    smem, workers = self.smem, self.tiles.compute_warpgroups
    stages, steps = self.tiles.num_stages, self.steps_of(tile)
    own_first = lax.rem(
      self.warpgroup + workers - lax.rem(steps.before, jnp.int32(workers)), jnp.int32(workers)
    )
    count = lax.div(steps.count - own_first + workers - 1, jnp.int32(workers))

    def add_block(i: Any, state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
      stage, sums = state
      ki = own_first + i * workers
      block = steps.first + ki
      if self.kernel.quantizer is not None:
        self.quantize_x(self.kernel.quantizer, stage, block, tile)
      plgpu.barrier_wait(smem.full.at[stage])
      is_last = block == self.kernel.all_steps - 1
      scales = self.words_of_scales(t, ki, stage, is_last)
      sums = self.kernel.mainloop.add(self, sums, stage, scales, rows, is_last)
      finish_loads()
      plgpu.barrier_arrive(smem.empty.at[stage])
      return pipeline.stage_after(stage, stages, workers), sums

    if self.tiles.whole_scales:
      plgpu.barrier_wait(smem.scales_full.at[self.slot_of_scales(t)])
    zeros = jnp.zeros((ROWS, self.plan.padded_m), jnp.float32)
    state = (
      pipeline.stage_of(steps.before + own_first, stages),
      [plgpu.layout_cast(zeros, plgpu.Layout.WGMMA) for _ in self.kernel.halves],
    )
    return lax.fori_loop(0, count, add_block, state)[1]

  def quantize_x(self, quantizer: InKernelQuantizer, stage: Any, block: Any, tile: Tile) -> None:
    b = tile.batch if self.gmem.x.shape[0] > 1 else 0
    quantizer.write(
      self.gmem.x.at[b],
      block,
      self.smem.x.at[stage],
      None if self.smem.x_scales is None else self.smem.x_scales.at[stage],
      None if self.gmem.global_scale_x is None else self.gmem.global_scale_x[0],
    )

  def x_scales(self, stage: Any, row: int, first: int) -> Any:
    """A row of x's scales from `first` on, those of the columns of sums: (64, padded_m)."""
    padded_m = self.plan.padded_m
    scales = plgpu.load(
      self.smem.x_scales.at[stage, row, pl.ds(first, padded_m)],
      layout=plgpu.Layout.WGMMA.reduce(0),
      optimized=False,
    )
    return lax.broadcast_in_dim(scales, (ROWS, padded_m), (1,))
