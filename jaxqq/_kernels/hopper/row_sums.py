"""out[g] = a^T b over the rows of group g: the gradient of each group's matrix, in 16 bits.

One CTA an SM, with a producer and two compute warpgroups. A tile of the output is 256 by 128 of one
group, of which a warpgroup has 128 by 128 in registers. A step is 64 rows of the group, as the TMA
loads them from any row on:

    producer              | load step s+2 | load step s+3 | ...  (a: 64 x 256, b: 64 x 128)
    warpgroups, compute   |  step s       |  step s+1     | ... | last step, cleared | store

The last step may have rows of the next group, which may be NaN: both operands are cleared of them
in shared memory. Both warpgroups clear b, and write the same. A group without rows gets zeros.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper import pipeline
from jaxqq._kernels.hopper.ptx.layouts import in_rows, in_tiles, tile_transforms, tiles_in_rows
from jaxqq._kernels.hopper.tiles import GEMM_STORE as STORE
from jaxqq._kernels.hopper.tiles import ROWS, Grid

COMPUTE_WARPGROUPS = 2
BLOCK_N, BLOCK_K, STEP = 256, 128, 64
OWN_N = BLOCK_N // COMPUTE_WARPGROUPS
STAGES = 4


@pipeline.arrays
class Operands:
  a: Any  # (m, n), bfloat16 or float16, n a multiple of 64
  b: Any  # (m, k) of the same dtype, k a multiple of 64
  starts: Any  # int32 (groups,): the first row of each
  sizes: Any  # int32 (groups,)


@pipeline.arrays
class Scratch:
  a: Any  # (stages, n / 64, 64, 64)
  b: Any  # (stages, k / 64, 64, 64)
  out: Any  # pieces of 64 x 64 on their way out
  full: Any
  empty: Any


def row_sums(operands: Operands, out_dtype: Any, num_sms: int) -> jax.Array:
  """(groups, n, k), summed in float32."""
  kernel = _RowSums(operands, out_dtype, num_sms)
  out = pipeline.launch(
    kernel,
    operands,
    kernel.out_type(),
    kernel.scratch(),
    name="row_sums",
    grid=kernel.grid,
    compute_warpgroups=COMPUTE_WARPGROUPS,
  )
  return out[:, : kernel.n, : kernel.k]


class _RowSums:
  """Sizes and buffers of one launch."""

  def __init__(self, operands: Operands, out_dtype: Any, num_sms: int):
    self.n, self.k = operands.a.shape[1], operands.b.shape[1]
    self.dtype, self.out_dtype = operands.a.dtype, jnp.dtype(out_dtype)
    groups = operands.sizes.shape[0]
    self.grid = Grid(groups, self.n, self.k, BLOCK_N, BLOCK_K, num_sms)

  def out_type(self) -> jax.ShapeDtypeStruct:
    shape = (self.grid.batch, *(max(size, 2 * STORE) for size in (self.n, self.k)))
    return jax.ShapeDtypeStruct(shape, self.out_dtype)

  def scratch(self) -> Scratch:
    loads = (BLOCK_N + BLOCK_K) // STORE
    return Scratch(
      tiles_in_rows((STAGES, BLOCK_N // STORE, STEP, STORE), self.dtype),
      tiles_in_rows((STAGES, BLOCK_K // STORE, STEP, STORE), self.dtype),
      plgpu.SMEM(
        (COMPUTE_WARPGROUPS, 2, STORE, STORE),
        self.out_dtype,
        transforms=tile_transforms(STORE, self.out_dtype),
      ),
      plgpu.Barrier(num_barriers=STAGES, num_arrivals=loads),
      plgpu.Barrier(num_barriers=STAGES, num_arrivals=COMPUTE_WARPGROUPS),
    )

  def __call__(self, gmem: Operands, out: Any, smem: Scratch) -> None:
    _Cta(self, gmem, out, smem).run()


class _Cta:
  """One CTA of the kernel, with its references."""

  def __init__(self, kernel: _RowSums, gmem: Operands, out: Any, smem: Scratch):
    self.kernel, self.gmem, self.out, self.smem = kernel, gmem, out, smem
    self.warpgroup = lax.axis_index("warpgroup")
    self.walk = pipeline.walk(kernel.grid)

  def run(self) -> None:
    @pl.when(self.warpgroup == COMPUTE_WARPGROUPS)
    @jax.named_scope("producer")
    def _producer() -> None:
      self.produce()

    @pl.when(self.warpgroup < COMPUTE_WARPGROUPS)
    def _compute() -> None:
      pipeline.take_registers(COMPUTE_WARPGROUPS)

      def do_tile(t: Any, done: Any) -> Any:
        tile = self.walk.tile(t)
        with jax.named_scope("mainloop"):
          sums, done = self.sums(tile, done)
        with jax.named_scope("epilogue"):
          self.store(sums, tile)
        return done

      lax.fori_loop(0, self.walk.num_tiles, do_tile, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  def num_steps(self, tile: pipeline.Tile) -> Any:
    return lax.div(self.gmem.sizes[tile.batch] + STEP - 1, jnp.int32(STEP))

  # Loads

  def produce(self) -> None:
    pipeline.release_registers(COMPUTE_WARPGROUPS)
    empty = self.smem.empty

    def load_tile(t: Any, done: Any) -> Any:
      tile = self.walk.tile(t)
      first = self.gmem.starts[tile.batch]

      def load_step(s: Any, done: Any) -> Any:
        stage = pipeline.stage_of(done, STAGES)

        @pl.when(done >= STAGES)
        def _wait() -> None:
          plgpu.barrier_wait(empty.at[stage])

        rows = pl.ds(first + s * STEP, STEP)
        self.load(self.gmem.a, self.smem.a, stage, rows, tile.m * BLOCK_N)
        self.load(self.gmem.b, self.smem.b, stage, rows, tile.n * BLOCK_K)
        return done + 1

      return lax.fori_loop(0, self.num_steps(tile), load_step, done)

    total = lax.fori_loop(0, self.walk.num_tiles, load_tile, jnp.int32(0))

    # The last readers: no mbarrier is mid-phase at exit.
    @pl.loop(jnp.maximum(total - STAGES, 0), total)
    def _drain(step: Any) -> None:
      plgpu.barrier_wait(empty.at[pipeline.stage_of(step, STAGES)])

  def load(self, source: Any, to: Any, stage: Any, rows: Any, column: Any) -> None:
    pieces = in_rows(to)
    for i in range(pieces.shape[1]):
      columns = pl.ds(column + i * STORE, STORE)
      plgpu.copy_gmem_to_smem(
        source.at[rows, columns], pieces.at[stage, i], self.smem.full.at[stage]
      )

  # A tile's sums, (128, 64) each

  def sums(self, tile: pipeline.Tile, done: Any) -> tuple[list[Any], Any]:
    """In accumulators over all rows of the group; `done` counts the steps of all tiles."""
    steps, size = self.num_steps(tile), self.gmem.sizes[tile.batch]
    a, b = in_tiles(self.smem.a), in_tiles(self.smem.b)
    own = OWN_N // STORE  # pieces of a

    def scope(*accs: Any) -> Any:
      def do_step(s: Any, done: Any) -> Any:
        stage = pipeline.stage_of(done, STAGES)
        plgpu.barrier_wait(self.smem.full.at[stage])

        @pl.when((s + 1) * STEP > size)
        def _clear() -> None:
          rows = size - s * STEP
          for i in range(own):
            clear_rows(a.at[stage, self.warpgroup * own + i], rows)
          for j in range(BLOCK_K // STORE):
            clear_rows(b.at[stage, j], rows)
          plgpu.commit_smem()

        for i in range(own):
          left = a.at[stage, self.warpgroup * own + i].T
          for j in range(BLOCK_K // STORE):
            plgpu.wgmma(accs[i * (BLOCK_K // STORE) + j], left, b.at[stage, j])
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(self.smem.empty.at[stage])
        return done + 1

      after = lax.fori_loop(0, steps, do_step, done)
      return [acc[...] for acc in accs], after

    count = own * (BLOCK_K // STORE)
    of_piece = plgpu.WGMMAAccumulatorRef((ROWS, STORE), jnp.float32)
    return pl.run_scoped(scope, *[of_piece] * count)

  def store(self, sums: list[Any], tile: pipeline.Tile) -> None:
    """A piece of 64 by 64 after the other."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    across = BLOCK_K // STORE
    for index, piece in enumerate(sums):
      i, j = divmod(index, across)
      row = tile.m * BLOCK_N + self.warpgroup * OWN_N + i * STORE
      column = tile.n * BLOCK_K + j * STORE
      plgpu.wait_smem_to_gmem(1, wait_read_only=True)
      staged = self.smem.out.at[self.warpgroup, index % 2]
      staged[...] = piece.astype(self.kernel.out_dtype)
      plgpu.commit_smem()
      where = pl.ds(row, STORE), pl.ds(column, STORE)
      plgpu.copy_smem_to_gmem(staged, self.out.at[tile.batch, *where])


def clear_rows(ref: Any, count: Any) -> None:
  """Zeros in all rows of (64, 64) from `count` on."""
  numbers = plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
  row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, ref.shape, 0), plgpu.Layout.WGMMA)
  ref[...] = jnp.where(row < count, numbers, jnp.zeros_like(numbers))
