"""out = x_hat w_hat^T on the tensor cores, both operands ready in memory.

One CTA an SM, with a producer and two compute warpgroups (`pipeline.py`), each of which has half of
the rows of the x tile, and its sums in registers.

- Sums inside the tensor cores are truncated (to 14 bits in fp8, and by float32's last bit in 16
  bit formats). With `promote` they cover one step, and are then added to float32 sums: 64 rows
  at a time, because registers are short. Else they stay in one accumulator over all of k.
- The epilogue multiplies by alpha, or by the scales of both operands' rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper import epilogue, pipeline
from jaxqq._kernels.hopper.pipeline import Tile, batch_of, pad_rows, rounded_up
from jaxqq._kernels.hopper.ptx import wgmma
from jaxqq._kernels.hopper.ptx.layouts import tile_transforms
from jaxqq._kernels.hopper.tiles import GEMM_STORE as STORE
from jaxqq._kernels.hopper.tiles import ROWS, Grid, WideTiles

COMPUTE_WARPGROUPS = 2


@pipeline.arrays
class Operands:
  x: Any  # (b or 1, m, k) of float16, bfloat16 or float8_e4m3fn; k a multiple of step_k
  w: Any  # (b or 1, n, k) of the same dtype
  alpha: Any  # float32 (1, 2), see `epilogue.alpha_operand`
  x_scales: Any = None  # float32 (b or 1, m), of fp8
  w_scales: Any = None  # float32 (b or 1, n); with a panel, of all columns
  panel: Any = None  # int32 (first, ...): the column of `out` where those of w go, whole tiles on
  out: Any = None  # a reference to all columns, `out_type`


@pipeline.arrays
class Scratch:
  x: Any  # (stages, block_m, step_k)
  w: Any  # (stages, block_n, step_k)
  out: Any  # pieces of 64 x 64 on their way out
  full: Any
  empty: Any


def step_k(dtype: Any) -> int:
  """Elements of k a step: one swizzled row of 128 bytes in shared memory."""
  return wgmma.STEP_BYTES // int(jnp.dtype(dtype).itemsize)


def gemm(operands: Operands, out_dtype: Any, tiles: WideTiles, grid: Grid) -> Any:
  """(b, m, n): the sums times alpha, or times the scales of x's and of w's rows.

  With a panel the results are written to `operands.out`, and nothing is returned.
  """
  kernel = _Gemm(operands, out_dtype, tiles, grid)
  operands = kernel.padded(operands)
  is_panel = operands.panel is not None
  out = pipeline.launch(
    kernel,
    operands,
    () if is_panel else out_type(kernel.batch, kernel.m, kernel.n, out_dtype, tiles),
    kernel.scratch(),
    name="gemm",
    grid=grid,
    compute_warpgroups=COMPUTE_WARPGROUPS,
  )
  return out if is_panel else out[:, : kernel.m, : kernel.n]


def out_type(batch: int, m: int, n: int, dtype: Any, tiles: WideTiles) -> jax.ShapeDtypeStruct:
  """What the kernel writes to: (b, m, n) and what the last tiles have beyond.

  No stored tile may be past the end of an axis of one tile: the TMA drops such an axis.
  """
  shape = (batch, max(rounded_up(m, 8), STORE), rounded_up(n, tiles.block_n))
  return jax.ShapeDtypeStruct(shape, dtype)


class _Gemm:
  """Sizes and buffers of one launch."""

  def __init__(self, operands: Operands, out_dtype: Any, tiles: WideTiles, grid: Grid):
    x, w = operands.x, operands.w
    self.batch, self.m, self.n = max(x.shape[0], w.shape[0]), x.shape[1], w.shape[1]
    self.dtype, self.out_dtype = x.dtype, out_dtype
    self.tiles, self.grid = tiles, grid
    self.step_k = step_k(x.dtype)
    self.k_steps = x.shape[2] // self.step_k
    self.own_m = tiles.block_m // COMPUTE_WARPGROUPS  # rows of a compute warpgroup
    self.transforms = tile_transforms(self.step_k, x.dtype)

  def scratch(self) -> Scratch:
    tiles, stages = self.tiles, self.tiles.num_stages
    return Scratch(
      plgpu.SMEM((stages, tiles.block_m, self.step_k), self.dtype, transforms=self.transforms),
      plgpu.SMEM((stages, tiles.block_n, self.step_k), self.dtype, transforms=self.transforms),
      plgpu.SMEM(
        (COMPUTE_WARPGROUPS, tiles.store_stages, STORE, STORE),
        self.out_dtype,
        transforms=tile_transforms(STORE, self.out_dtype),
      ),
      plgpu.Barrier(num_barriers=stages, num_arrivals=2),
      plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE_WARPGROUPS),
    )

  def padded(self, operands: Operands) -> Operands:
    """With whole rows of eight, and scales for whole tiles."""
    x, w = pad_rows(operands.x, rounded_up(self.m, 8)), pad_rows(operands.w, rounded_up(self.n, 8))
    x_scales, w_scales = operands.x_scales, operands.w_scales
    if x_scales is not None:
      x_scales = pad_rows(x_scales, rounded_up(self.m, self.tiles.block_m))
      w_scales = pad_rows(w_scales, rounded_up(w_scales.shape[1], self.tiles.block_n))
    return dataclasses.replace(operands, x=x, w=w, x_scales=x_scales, w_scales=w_scales)

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
    self.walk = pipeline.walk(kernel.grid)

  def run(self) -> None:
    kernel, warpgroup = self.kernel, self.warpgroup

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    @jax.named_scope("producer")
    def _producer() -> None:
      pipeline.produce(self.load, self.smem.empty, self.walk, kernel.k_steps)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute() -> None:
      plgpu.set_max_registers(pipeline.COMPUTE_REGISTERS[COMPUTE_WARPGROUPS], action="increase")

      @pl.loop(0, self.walk.num_tiles)
      def _tile(t: Any) -> None:
        first = t * kernel.k_steps
        with jax.named_scope("mainloop"):
          sums = self.promoted_sums(first) if self.tiles.promote else self.sums(first)
        with jax.named_scope("epilogue"):
          self.store(sums, self.walk.tile(t))

      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  def load(self, stage: Any, ki: Any, tile: Tile) -> None:
    gmem, full, step_k = self.gmem, self.smem.full.at[stage], self.kernel.step_k
    ks = pl.ds(ki * step_k, step_k)
    rows = pl.ds(tile.m * self.tiles.block_m, self.tiles.block_m)
    columns = pl.ds(tile.n * self.tiles.block_n, self.tiles.block_n)
    x = gmem.x.at[batch_of(gmem.x, tile.batch), rows, ks]
    plgpu.copy_gmem_to_smem(x, self.smem.x.at[stage], full)
    w = gmem.w.at[batch_of(gmem.w, tile.batch), columns, ks]
    plgpu.copy_gmem_to_smem(w, self.smem.w.at[stage], full)

  # A tile's sums, (64, block_n) each

  def sums(self, first: Any) -> list[Any]:
    """In one accumulator over all of k, two steps under way."""
    smem, own_m, stages = self.smem, self.kernel.own_m, self.tiles.num_stages

    def scope(acc: Any) -> Any:
      def do_step(ki: Any, before_and_stage: tuple[Any, Any]) -> tuple[Any, Any]:
        before, stage = before_and_stage
        plgpu.barrier_wait(smem.full.at[stage])
        own_rows = pl.ds(self.warpgroup * own_m, own_m)
        plgpu.wgmma(acc, smem.x.at[stage, own_rows], smem.w.at[stage].T)
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

  def promoted_sums(self, first: Any) -> list[Any]:
    """Taken out of the tensor cores after every step."""
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
        (sums,) = wgmma.finish(wgmma.begin(x, w, kernel.transforms, kernel.dtype))
        if part == parts - 1:
          plgpu.barrier_arrive(smem.empty.at[stage])
        results.append(total + sums)
      return pipeline.stage_after(stage, stages), *results

    begin = pipeline.stage_of(first, stages)
    _, *sums = lax.fori_loop(0, kernel.k_steps, do_step, (begin, *zeros))
    return sums

  # The epilogue

  def store(self, parts: list[Any], tile: Tile) -> None:
    """Scales and writes a tile, 64 by 64 after the other."""
    tiles, warpgroup = self.tiles, self.warpgroup
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    stage = 0
    for i, part in enumerate(parts):
      rows = pl.ds(tile.m * tiles.block_m + warpgroup * self.kernel.own_m + i * STORE, STORE)
      for j in range(0, tiles.block_n, STORE):
        columns = pl.ds(self.first_column + tile.n * tiles.block_n + j, STORE)
        piece = self.scaled(part[:, j : j + STORE], tile.batch, rows, columns)
        plgpu.wait_smem_to_gmem(tiles.store_stages - 1, wait_read_only=True)
        staged = self.smem.out.at[warpgroup, stage]
        staged[...] = piece.astype(self.kernel.out_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, self.out.at[tile.batch, rows, columns])
        stage = (stage + 1) % tiles.store_stages

  def scaled(self, piece: Any, b: Any, rows: Any, columns: Any) -> Any:
    of_x, of_w = self.gmem.x_scales, self.gmem.w_scales
    if of_x is None:
      return epilogue.times_alpha(piece, self.gmem.alpha)
    of_rows = epilogue.load_row_scales(of_x.at[batch_of(of_x, b), rows], of_rows=True)
    of_columns = epilogue.load_row_scales(of_w.at[batch_of(of_w, b), columns], of_rows=False)
    return epilogue.times_row_scales(piece, of_rows, of_columns)
