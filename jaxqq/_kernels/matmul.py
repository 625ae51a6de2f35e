"""out = x_hat w_hat^T on Hopper's tensor cores, both operands ready in memory.

Three warpgroups share one CTA, and the CTAs (one a multiprocessor) walk over the output tiles:

    warpgroup 2, memory   | load k+3 | load k+4  | load k+5  | ...
    warpgroup 0, compute  |  wgmma k  |  wgmma k+1  |  wgmma k+2  | ... | store
    warpgroup 1, compute  |  wgmma k  |  wgmma k+1  |  wgmma k+2  | ... | store

- The memory warpgroup has the copy engine (TMA) bring tiles of both operands to shared memory, and
  refills a place once both compute warpgroups have released it.
- Each compute warpgroup has half of the rows of the x_hat tile, and its sums in registers.
- Sums inside the tensor cores are truncated (to 14 bits in fp8, and by float32's last bit in 16
  bit formats). With `promote` they cover one step, and are then added to float32 sums: 64 rows
  after the other, for want of registers.
- The epilogue multiplies by the global scales, or by the scales of both operands' rows. (Tried and
  1% slower: those of w_hat brought to shared memory with a tile's first step.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels import tensor_cores
from jaxqq._kernels.tiles import (
  COMPUTE_WARPGROUPS,
  Grid,
  batch_of,
  compiler_params,
  keep_full,
  load_row_scales,
  padded,
  rounded_up,
  scaled,
  tile_transforms,
)

WGMMA_ROWS = 64  # of x_hat: what one instruction multiplies
STORE = (64, 64)  # rows and columns that a warpgroup stores at a time


@dataclasses.dataclass(frozen=True)
class Config:
  """The tiles of one launch."""

  block_m: int  # rows of x_hat a CTA, 128 or 256
  block_n: int  # rows of w_hat a CTA, a multiple of 64
  num_stages: int  # tiles in shared memory
  promote: bool = False  # add to float32 sums after every step
  store_slots: int = 2  # tiles on their way out, a warpgroup
  group_width: int = 8  # neighbouring tiles of the minor axis that are walked together
  minor: int = 0  # 0: m, 1: n

  @property
  def grid(self) -> Grid:
    return Grid(self.block_m, self.block_n, self.group_width, self.minor)


def step_k(dtype: Any) -> int:
  """Elements of k a step: one swizzled row of 128 bytes in shared memory."""
  return 128 // int(jnp.dtype(dtype).itemsize)


def matmul(
  x: jax.Array,  # (b or 1, m, k) of float16, bfloat16 or float8_e4m3fn; k a multiple of step_k
  w: jax.Array,  # (b or 1, n, k) of the same dtype
  factors: jax.Array,  # float32 (b or 1, 2)
  row_scales: tuple[jax.Array, jax.Array] | None,  # float32 (b or 1, m), (b or 1, n), for fp8
  *,
  out_dtype: Any,
  config: Config,
  interpret: Any = None,
  columns_of: tuple[jax.Array, Any] | None = None,
) -> Any:
  """(b, m, n): the sums times both factors, or times the scales of x's and of w's rows.

  With `columns_of`, int32 (first, ...) and a reference to an `out_type_of` all columns, they are
  written to its columns from `first` on, a multiple of block_n; w's row scales are those of all.
  """
  batch, m, n = max(x.shape[0], w.shape[0]), x.shape[1], w.shape[1]
  a_step = step_k(x.dtype)
  k_steps = x.shape[2] // a_step
  block_m, block_n, stages, grid = config.block_m, config.block_n, config.num_stages, config.grid
  own_m = block_m // COMPUTE_WARPGROUPS  # rows of a compute warpgroup

  def kernel(x_g: Any, w_g: Any, factors_g: Any, *refs: Any) -> None:
    *rest, out_g, x_s, w_s, out_s, full, empty = refs
    first_column = 0 if columns_of is None else pl.multiple_of(rest.pop()[0], block_n)
    row_scales_g = rest
    warpgroup = lax.axis_index("warpgroup")
    own_tiles, tile_of = grid.walk(batch, m, n)

    def slot_of(step: Any) -> Any:
      return lax.rem(step, jnp.int32(stages))

    # Memory

    def load(slot: Any, ki: Any, tile: Any) -> None:
      b, mi, ni = tile
      ks = pl.ds(ki * a_step, a_step)

      rows, columns = pl.ds(mi * block_m, block_m), pl.ds(ni * block_n, block_n)
      plgpu.copy_gmem_to_smem(x_g.at[batch_of(x_g, b), rows, ks], x_s.at[slot], full.at[slot])
      plgpu.copy_gmem_to_smem(w_g.at[batch_of(w_g, b), columns, ks], w_s.at[slot], full.at[slot])

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _memory() -> None:
      keep_full(load, empty, own_tiles, k_steps, tile_of)

    # Compute

    def multiply(acc: Any, slot: Any, first_row: int, rows: int) -> None:
      own_rows = pl.ds(warpgroup * own_m + first_row, rows)
      plgpu.wgmma(acc, x_s.at[slot, own_rows], w_s.at[slot].T)

    def sums(first: Any) -> list[Any]:
      """A tile's sums in one accumulator over all of k, two steps under way."""

      def scope(acc: Any) -> Any:
        @pl.loop(0, k_steps)
        def _step(ki: Any) -> None:
          slot = slot_of(first + ki)
          plgpu.barrier_wait(full.at[slot])
          multiply(acc, slot, 0, own_m)
          plgpu.wgmma_wait(1)

          @pl.when(ki > 0)
          def _release() -> None:
            plgpu.barrier_arrive(empty.at[slot_of(first + ki - 1)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(empty.at[slot_of(first + k_steps - 1)])
        return acc[...]

      acc = pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((own_m, block_n), jnp.float32))
      return [acc[i : i + WGMMA_ROWS] for i in range(0, own_m, WGMMA_ROWS)]

    def sums_of_step(slot: Any, first_row: int) -> Any:
      if not interpret:
        own_rows = pl.ds(warpgroup * own_m + first_row, WGMMA_ROWS)
        own = x_s.at[slot, own_rows]
        begun = tensor_cores.begin(own, w_s.at[slot], transforms, x.dtype)
        return tensor_cores.finish(begun)[0]

      def scope(acc: Any) -> Any:
        multiply(acc, slot, first_row, WGMMA_ROWS)
        plgpu.wgmma_wait(0)
        return acc[...]

      return pl.run_scoped(scope, plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, block_n), jnp.float32))

    def promoted_sums(first: Any) -> list[Any]:
      """A tile's sums, in parts, taken out of the tensor cores after every step."""
      zeros = jnp.zeros((WGMMA_ROWS, block_n), jnp.float32)
      totals = tuple(
        plgpu.layout_cast(zeros, plgpu.Layout.WGMMA) for _ in range(own_m // WGMMA_ROWS)
      )

      def do_step(ki: Any, totals: tuple[Any, ...]) -> tuple[Any, ...]:
        slot = slot_of(first + ki)
        plgpu.barrier_wait(full.at[slot])
        results = []
        for part, total in enumerate(totals):
          partial = sums_of_step(slot, part * WGMMA_ROWS)
          if part == len(totals) - 1:
            plgpu.barrier_arrive(empty.at[slot])
          results.append(total + partial)
        return tuple(results)

      return list(lax.fori_loop(0, k_steps, do_step, totals))

    def store(parts: list[Any], tile: Any) -> None:
      """Scales and writes a tile, 64 by 64 after the other."""
      b, mi, ni = tile
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      slot = 0
      for i, part in enumerate(parts):
        rows = pl.ds(mi * block_m + warpgroup * own_m + i * STORE[0], STORE[0])
        for j in range(0, block_n, STORE[1]):
          columns = pl.ds(first_column + ni * block_n + j, STORE[1])
          piece = part[:, j : j + STORE[1]]
          if row_scales_g:
            of_x, of_w = row_scales_g
            of_rows = load_row_scales(of_x.at[batch_of(of_x, b), rows], of_rows=True)
            of_columns = load_row_scales(of_w.at[batch_of(of_w, b), columns], of_rows=False)
            piece = scaled(piece, of_rows, of_columns)
          else:
            index = batch_of(factors_g, b)
            piece = piece * factors_g[index, 0] * factors_g[index, 1]
          plgpu.wait_smem_to_gmem(config.store_slots - 1, wait_read_only=True)
          out_s[warpgroup, slot] = piece.astype(out_dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(out_s.at[warpgroup, slot], out_g.at[b, rows, columns])
          slot = (slot + 1) % config.store_slots

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute() -> None:
      plgpu.set_max_registers(232, action="increase")

      @pl.loop(0, own_tiles)
      def _tile(t: Any) -> None:
        store((promoted_sums if config.promote else sums)(t * k_steps), tile_of(t))

      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  transforms = tile_transforms(a_step, x.dtype)
  out_type = out_type_of(batch, m, n, out_dtype, config)
  run = plgpu.kernel(
    kernel,
    out_type=out_type if columns_of is None else (),
    grid=(grid.num_ctas(batch, m, n),),
    grid_names=("cta",),
    num_threads=COMPUTE_WARPGROUPS + 1,
    thread_name="warpgroup",
    compiler_params=compiler_params(),
    scratch_types=[
      plgpu.SMEM((stages, block_m, a_step), x.dtype, transforms=transforms),
      plgpu.SMEM((stages, block_n, a_step), x.dtype, transforms=transforms),
      plgpu.SMEM(
        (COMPUTE_WARPGROUPS, config.store_slots, *STORE),
        out_dtype,
        transforms=tile_transforms(STORE[1], out_dtype),
      ),
      plgpu.Barrier(num_barriers=stages, num_arrivals=2),
      plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE_WARPGROUPS),
    ],
    interpret=interpret,
    kernel_name="jaxqq_matmul",
  )
  operands = [padded(x, rounded_up(m, 8)), padded(w, rounded_up(n, 8)), factors]
  if row_scales is not None:
    of_x, of_w = row_scales
    operands.append(padded(of_x, rounded_up(m, block_m)))
    operands.append(padded(of_w, rounded_up(of_w.shape[1], block_n)))
  if columns_of is not None:
    return run(*operands, *columns_of)
  return run(*operands)[:, :m, :n]


def out_type_of(batch: int, m: int, n: int, dtype: Any, config: Config) -> jax.ShapeDtypeStruct:
  """What the kernel writes to: (b, m, n) and what the last tiles hold beyond.

  No stored tile may lie past the end of an axis of one tile: the copy engine drops such an axis.
  """
  shape = (batch, max(rounded_up(m, 8), STORE[0]), rounded_up(n, config.block_n))
  return jax.ShapeDtypeStruct(shape, dtype)
