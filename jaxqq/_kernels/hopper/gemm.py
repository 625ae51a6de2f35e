"""out = x_hat w_hat^T on the tensor cores, both operands ready in memory.

One CTA an SM, with a producer and two compute warpgroups (`pipeline.py`), each of which has half of
the rows of the x tile, and its sums in registers.

- Sums inside the tensor cores are truncated (to 14 bits in fp8, and by float32's last bit in 16
  bit formats). With `promote` they cover one step, and are then added to float32 sums: 64 rows
  at a time, because registers are short. Else they stay in one accumulator over all of k.
- The epilogue multiplies by the global scales, or by the scales of both operands' rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper import epilogue, pipeline
from jaxqq._kernels.hopper.pipeline import (
  GroupTile,
  GroupTiles,
  Tile,
  batch_of,
  pad_rows,
  rounded_up,
)
from jaxqq._kernels.hopper.ptx import stores, wgmma
from jaxqq._kernels.hopper.ptx.layouts import (
  in_rows,
  in_tiles,
  row_transforms,
  tile_transforms,
  tiles_in_rows,
)
from jaxqq._kernels.hopper.tiles import GEMM_STORE as STORE
from jaxqq._kernels.hopper.tiles import ROWS, TILE_ROWS, TMA_BYTES, Grid, WideTiles, cdiv

COMPUTE_WARPGROUPS = 2


@pipeline.arrays
class Operands:
  x: Any  # (b or 1, m, k) of float16, bfloat16 or float8_e4m3fn; k a multiple of step_k
  w: Any  # (b or 1, n, k) of the same dtype; of 16 bits, in groups, (matrices, k, n) if said so
  global_scale_x: Any = None  # float32 (1,) or (groups,)
  global_scale_w: Any = None
  x_scales: Any = None  # float32 (b or 1, m or more), of fp8
  w_scales: Any = None  # float32 (b or 1, n or more); with a panel, of all columns
  panel: Any = None  # int32 (first, ...): the column of `out` where those of w go, whole tiles on
  out: Any = None  # a reference to all columns, `out_type`
  groups: GroupTiles | None = None  # of x (1, m, k) in groups, and w (matrices, n, k)


@pipeline.arrays
class Scratch:
  x: Any  # (stages, block_m, step_k)
  w: Any  # (stages, block_n, step_k)
  out: Any  # pieces of 64 x 64 on their way out; None where threads store them
  full: Any
  empty: Any


def step_k(dtype: Any) -> int:
  """Elements of k a step: one swizzled row of 128 bytes in shared memory."""
  return wgmma.STEP_BYTES // int(jnp.dtype(dtype).itemsize)


def gemm(
  operands: Operands,
  out_dtype: Any,
  tiles: WideTiles,
  grid: Grid,
  *,
  unit: float = 1.0,
  w_transposed: bool = False,
) -> Any:
  """(b, m, n): the sums times `unit` and global scales, or times the scales of x's and w's rows.

  With a panel the results are written to `operands.out`, and nothing is returned.
  """
  kernel = _Gemm(operands, out_dtype, tiles, grid, unit, w_transposed)
  operands = kernel.padded(operands)
  is_panel = operands.panel is not None
  of_out = out_type(kernel.batch, kernel.m, kernel.n, out_dtype, tiles)
  if kernel.has_groups:  # every row that is stored is one of them
    columns = of_out.shape[2] if kernel.is_staged else kernel.n
    shape = 1, *stores.stored_shape(kernel.m, columns, 0, tiles.block_n)
    of_out = jax.ShapeDtypeStruct(shape, out_dtype)
  out = pipeline.launch(
    kernel,
    operands,
    () if is_panel else of_out,
    kernel.scratch(),
    name="gemm",
    grid=grid,
    compute_warpgroups=COMPUTE_WARPGROUPS,
  )
  return out if is_panel else out[:, : kernel.m, : kernel.n]


def out_type(batch: int, m: int, n: int, dtype: Any, tiles: WideTiles) -> jax.ShapeDtypeStruct:
  """What the kernel writes to: (b, m, n), and what the last tiles have beyond where they must.

  The TMA writes nothing past the end of rows and columns. But a row of a piece of float32 is 256
  bytes, and so in tiles of 8 rows, which are whole. And an axis of one tile is dropped.
  """
  rows, columns = max(m, STORE), n
  if _is_wide(dtype):
    rows = rounded_up(rows, TILE_ROWS)
  if _is_wide(dtype) or n <= STORE or n % (TMA_BYTES // jnp.dtype(dtype).itemsize):
    columns = rounded_up(n, tiles.block_n)
  return jax.ShapeDtypeStruct((batch, rows, columns), dtype)


def _is_wide(dtype: Any) -> bool:
  return bool(jnp.dtype(dtype).itemsize > 2)


class _Gemm:
  """Sizes and buffers of one launch."""

  def __init__(
    self,
    operands: Operands,
    out_dtype: Any,
    tiles: WideTiles,
    grid: Grid,
    unit: float,
    w_transposed: bool,
  ):
    x, w = operands.x, operands.w
    self.unit, self.w_transposed = unit, w_transposed
    self.has_groups = operands.groups is not None
    self.batch = 1 if self.has_groups else max(x.shape[0], w.shape[0])
    self.m, self.n = x.shape[1], w.shape[2 if w_transposed else 1]
    self.dtype, self.out_dtype = x.dtype, jnp.dtype(out_dtype)
    self.tiles, self.grid = tiles, grid
    self.step_k = step_k(x.dtype)
    self.k_steps = cdiv(x.shape[2], self.step_k)
    self.own_m = tiles.block_m // COMPUTE_WARPGROUPS  # rows of a compute warpgroup
    self.transforms = tile_transforms(self.step_k, x.dtype)
    self.w_transforms = self.transforms  # those of a transposed one are the same: 64 columns
    self.out_transforms = tile_transforms(STORE, out_dtype)
    past_end = x.shape[2] % self.step_k != 0  # the last step goes there, and loads zeros
    self.in_steps = tiles.promote or (self.has_groups and not w_transposed)
    # Tiles of 8 rows may be loaded where all rows are such; in groups a tile begins at any row.
    loads_rows = self.has_groups or self.m % TILE_ROWS != 0
    self.x_as_both = loads_rows and not self.in_steps  # loaded in rows, and multiplied in tiles
    if self.in_steps and (loads_rows or past_end):
      self.transforms = self.w_transforms = row_transforms()
    # A row of a piece is 256 bytes in float32: in groups, threads store those themselves.
    is_wide = _is_wide(out_dtype)
    self.is_staged = not (self.has_groups and is_wide)
    if not is_wide and (loads_rows or self.n % STORE):
      self.out_transforms = row_transforms()

  def scratch(self) -> Scratch:
    tiles, stages = self.tiles, self.tiles.num_stages
    x_shape = stages, tiles.block_m, self.step_k
    of_w = (self.step_k, tiles.block_n) if self.w_transposed else (tiles.block_n, self.step_k)
    return Scratch(
      tiles_in_rows(x_shape, self.dtype)
      if self.x_as_both
      else plgpu.SMEM(x_shape, self.dtype, transforms=self.transforms),
      plgpu.SMEM((stages, *of_w), self.dtype, transforms=self.w_transforms),
      plgpu.SMEM(
        (COMPUTE_WARPGROUPS, tiles.store_stages, STORE, STORE),
        self.out_dtype,
        transforms=self.out_transforms,
      )
      if self.is_staged
      else None,
      plgpu.Barrier(num_barriers=stages, num_arrivals=2),
      plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE_WARPGROUPS),
    )

  def padded(self, operands: Operands) -> Operands:
    """With w in whole rows of eight, and scales for whole tiles."""
    w = operands.w
    if not self.w_transposed:
      w = pad_rows(w, rounded_up(self.n, TILE_ROWS))
    x_scales, w_scales = operands.x_scales, operands.w_scales
    if x_scales is not None:
      # A group's last piece begins at any row.
      rows = self.m + STORE if self.has_groups else rounded_up(self.m, self.tiles.block_m)
      x_scales = pad_rows(x_scales, rows)
      w_scales = pad_rows(w_scales, rounded_up(self.n, self.tiles.block_n))
    return dataclasses.replace(operands, w=w, x_scales=x_scales, w_scales=w_scales)

  def __call__(self, gmem: Operands, out: Any, smem: Scratch) -> None:
    _Cta(self, gmem, out, smem).run()


class _Cta:
  """One CTA of the kernel, with its references."""

  def __init__(self, kernel: _Gemm, gmem: Operands, out: Any, smem: Scratch):
    self.kernel, self.tiles = kernel, kernel.tiles
    self.gmem, self.out, self.smem = gmem, out, smem
    self.first_column: Any = 0  # of `out`, where the columns of w's rows go
    if gmem.panel is not None:
      self.out = gmem.out
      self.first_column = pl.multiple_of(gmem.panel[0], kernel.tiles.block_n)
    self.warpgroup = lax.axis_index("warpgroup")
    self.walk = pipeline.walk(kernel.grid, gmem.groups)

  def run(self) -> None:
    kernel, warpgroup = self.kernel, self.warpgroup

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    @jax.named_scope("producer")
    def _producer() -> None:
      steps = pipeline.whole_steps(self.walk, kernel.k_steps)
      pipeline.release_registers(COMPUTE_WARPGROUPS)
      pipeline.produce(self.load, self.smem.empty, self.walk, *steps)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute() -> None:
      pipeline.take_registers(COMPUTE_WARPGROUPS)

      @pl.loop(0, self.walk.num_tiles)
      def _tile(t: Any) -> None:
        first = t * kernel.k_steps
        with jax.named_scope("mainloop"):
          sums = self.sums_in_steps(first) if kernel.in_steps else self.sums(first)
        with jax.named_scope("epilogue"):
          self.store(sums, self.walk.tile(t))

      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      groups = self.gmem.groups
      if groups is not None:
        with jax.named_scope("zeros"):
          zeros = pipeline.walk_of_zeros(kernel.grid, groups)
          epilogue.store_zeros(zeros, self.out, self.tiles.block_m, self.zero_columns)

  def zero_columns(self, tile: Tile) -> Any:
    """Half of a tile's are a warpgroup's."""
    return tile.n * self.tiles.block_n + self.warpgroup * ROWS

  def load(self, stage: Any, ki: Any, tile: Tile) -> None:
    gmem, full, step_k = self.gmem, self.smem.full.at[stage], self.kernel.step_k
    ks = pl.ds(ki * step_k, step_k)
    rows = pl.ds(tile.row(self.tiles.block_m), self.tiles.block_m)
    columns = pl.ds(tile.n * self.tiles.block_n, self.tiles.block_n)
    x = gmem.x.at[batch_of(gmem.x, tile.batch), rows, ks]
    to_x = in_rows(self.smem.x) if self.kernel.x_as_both else self.smem.x
    plgpu.copy_gmem_to_smem(x, to_x.at[stage], full)
    of_w = (ks, columns) if self.kernel.w_transposed else (columns, ks)
    w = gmem.w.at[batch_of(gmem.w, tile.batch), *of_w]
    plgpu.copy_gmem_to_smem(w, self.smem.w.at[stage], full)

  # A tile's sums, (64, block_n) each

  def sums(self, first: Any) -> list[Any]:
    """In one accumulator over all of k, two steps under way."""
    smem, own_m, stages = self.smem, self.kernel.own_m, self.tiles.num_stages
    w_transposed = self.kernel.w_transposed
    x = in_tiles(smem.x) if self.kernel.x_as_both else smem.x

    def scope(acc: Any) -> Any:
      def do_step(ki: Any, before_and_stage: tuple[Any, Any]) -> tuple[Any, Any]:
        before, stage = before_and_stage
        plgpu.barrier_wait(smem.full.at[stage])
        own_rows = pl.ds(self.warpgroup * own_m, own_m)
        w = smem.w.at[stage]
        plgpu.wgmma(acc, x.at[stage, own_rows], w if w_transposed else w.T)
        plgpu.wgmma_wait(1)

        @pl.when(ki > 0)
        def _release() -> None:
          plgpu.barrier_arrive(smem.empty.at[before])

        return stage, pipeline.stage_after(stage, stages)

      begin = pipeline.stage_of(first, stages)
      last, _ = lax.fori_loop(0, self.kernel.k_steps, do_step, (begin, begin))
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(smem.empty.at[last])
      return acc[...]

    acc_type = plgpu.WGMMAAccumulatorRef((own_m, self.tiles.block_n), jnp.float32)
    acc = pl.run_scoped(scope, acc_type)
    return [acc[i : i + ROWS] for i in range(0, own_m, ROWS)]

  def sums_in_steps(self, first: Any) -> list[Any]:
    """One step under way. With `promote` sums are taken out of the tensor cores after each."""
    promote = self.tiles.promote
    kernel, smem, stages = self.kernel, self.smem, self.tiles.num_stages
    parts = kernel.own_m // ROWS
    zeros = [wgmma.zeros(self.tiles.block_n) for _ in range(parts)]

    def do_step(_: Any, stage_and_totals: tuple[Any, ...]) -> tuple[Any, ...]:
      stage, *totals = stage_and_totals
      plgpu.barrier_wait(smem.full.at[stage])
      results = []
      for part, total in enumerate(totals):
        rows = pl.ds(self.warpgroup * kernel.own_m + part * ROWS, ROWS)
        x, w = smem.x.at[stage, rows], smem.w.at[stage]
        before = None if promote else total
        begun = wgmma.begin(x, w, kernel.transforms, kernel.dtype, sums=before)
        (sums,) = wgmma.finish(begun)
        if part == parts - 1:
          plgpu.barrier_arrive(smem.empty.at[stage])
        results.append(total + sums if promote else sums)
      return pipeline.stage_after(stage, stages), *results

    begin = pipeline.stage_of(first, stages)
    _, *sums = lax.fori_loop(0, kernel.k_steps, do_step, (begin, *zeros))
    return sums

  # The epilogue

  def store(self, parts: list[Any], tile: Tile) -> None:
    """Scales and writes a tile, 64 by 64 after the other."""
    tiles, warpgroup = self.tiles, self.warpgroup
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    stage, scaled = 0, self.scaler(tile)
    for i, part in enumerate(parts):
      if isinstance(tile, GroupTile):
        self.store_some(part, scaled, tile, warpgroup * self.kernel.own_m + i * STORE)
        continue
      rows = pl.ds(tile.m * tiles.block_m + warpgroup * self.kernel.own_m + i * STORE, STORE)
      for j in range(0, tiles.block_n, STORE):
        columns = pl.ds(self.first_column + tile.n * tiles.block_n + j, STORE)
        piece = scaled(part[:, j : j + STORE], rows, columns)
        self.store_piece(piece, stage, tile.batch, rows, columns)
        stage = (stage + 1) % tiles.store_stages

  def store_piece(self, piece: Any, stage: int, b: Any, rows: Any, columns: Any) -> None:
    """By the TMA, through shared memory."""
    plgpu.wait_smem_to_gmem(self.tiles.store_stages - 1, wait_read_only=True)
    staged = self.smem.out.at[self.warpgroup, stage]
    staged[...] = piece.astype(self.kernel.out_dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, self.out.at[b, rows, columns])

  def store_some(self, part: Any, scaled: Any, tile: GroupTile, first: Any) -> None:
    """Those of 64 rows that the group has: all of them by the TMA, some thread by thread."""
    kernel, rows = self.kernel, tile.rows - first
    row = tile.first + first

    @pl.when(rows > 0)
    def _scale_and_store() -> None:
      for index, j in enumerate(range(0, self.tiles.block_n, STORE)):
        column = tile.n * self.tiles.block_n + j
        here = pl.ds(row, STORE), pl.ds(column, STORE)
        piece = scaled(part[:, j : j + STORE], *here)

        def whole(piece: Any = piece, index: int = index, here: Any = here) -> None:
          self.store_piece(piece, index % self.tiles.store_stages, 0, *here)

        def some(piece: Any = piece, column: Any = column) -> None:
          to = piece.astype(kernel.out_dtype), plgpu.Layout.WGMMA, self.out.at[0]
          stores.store_some(*to, row, rows, column)

        epilogue.store_whole_or_some(rows >= STORE, whole if kernel.is_staged else None, some)

  def scaler(self, tile: Tile) -> Callable[[Any, Any, Any], Any]:
    """A function of a piece of a tile's sums, and of its rows and columns: what is stored."""
    gmem, of_x, of_w, b = self.gmem, self.gmem.x_scales, self.gmem.w_scales, tile.batch

    def by_rows(piece: Any, rows: Any, columns: Any) -> Any:
      of_rows = epilogue.load_row_scales(of_x.at[batch_of(of_x, b), rows], of_rows=True)
      of_columns = epilogue.load_row_scales(of_w.at[batch_of(of_w, b), columns], of_rows=False)
      return epilogue.times_row_scales(piece, of_rows, of_columns)

    if of_x is not None:
      return by_rows
    scales = gmem.global_scale_x, gmem.global_scale_w
    alpha = epilogue.Alpha.of_tile(self.kernel.unit, *scales, tile)
    return lambda piece, rows, columns: alpha.times(piece)
