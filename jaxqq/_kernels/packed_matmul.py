"""out = x_hat w_hat^T on Hopper's tensor cores, from packed w, expanded in registers.

Three warpgroups share one CTA, and the CTAs (one a multiprocessor) walk over the output tiles:

    warpgroup 2, memory   | load k+3      | load k+4      | load k+5      | ...
    warpgroup 0, compute  | wgmma k       | wgmma k+1     | wgmma k+2     | ... | store
                          |    expand k+1 |    expand k+2 |    expand k+3 | ...
    warpgroup 1, compute      likewise

- The memory warpgroup has the copy engine (TMA) bring tiles of x_hat and of packed words to
  shared memory, and refills a place once both compute warpgroups have released it.
- A compute warpgroup has 64 rows of w and all rows of the x_hat tile: out^T = w_hat x_hat^T. It
  expands the words of a step in its registers (`expand.py`), from where the tensor cores take
  them, while they work on the step before. No expanded w is ever written to memory.
- Sums inside the tensor cores are truncated (to 14 bits in fp8, and by float32's last bit in 16
  bit formats). With `promote` they cover one step, and are then added to float32 sums.
- Of 256 rows of x_hat there are not registers enough for two operands and the sums of a step. Then
  the warpgroups take turns (`tensor_cores.add_promoted`): one expands while the other multiplies.
- Tried and slower: expanded w in shared memory, whether these warpgroups write it there or others
  (one or two) do. The tensor cores then read both operands from there, and every step has a fence.
- With `split`, as many CTAs (a cluster) have a part of k each of one tile. In the end they exchange
  sums through shared memory, and each adds up and stores its share of the tile's rows.
- The epilogue multiplies by the global scales, or by the scales of both operands' rows, in
  float32, and writes tiles transposed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels import cluster_sums, expand, tensor_cores
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

BLOCK_N = COMPUTE_WARPGROUPS * tensor_cores.ROWS
STORE = 64  # rows of x_hat that are stored at a time
TURN_ROWS = 256  # of x_hat: from here on, sums to be promoted leave no registers to expand into


@dataclasses.dataclass(frozen=True)
class Config:
  """The tiles of one launch."""

  block_m: int  # rows of x_hat a CTA, a multiple of 64, up to 256
  num_stages: int  # tiles in shared memory
  promote: bool = False  # add to float32 sums after every step
  store_slots: int = 2  # tiles on their way out, a warpgroup
  group_width: int = 8  # neighbouring tiles of the minor axis that are walked together
  minor: int = 0  # 0: m, 1: n
  split: int = 1  # CTAs that share a tile, 2 at most: block_m is a multiple of 64 * split

  @property
  def grid(self) -> Grid:
    return Grid(self.block_m, BLOCK_N, self.group_width, self.minor, self.split)


def packed_matmul(
  x: jax.Array,  # (b or 1, m, k) of expansion.dtype, k a multiple of expansion.step_k
  words: jax.Array,  # uint32 (b or 1, n, k * bits / 32)
  scales: jax.Array,  # uint8 (b or 1, n, k / group_size); for E4M3 as `lower_rows` leaves them
  factors: jax.Array,  # float32 (b or 1, 2)
  row_scales: tuple[jax.Array, jax.Array] | None,  # float32 (b or 1, m), (b or 1, n), for E4M3
  *,
  expansion: expand.Expansion,
  out_dtype: Any,
  config: Config,
  interpret: Any = None,
) -> Any:
  """(b, m, n): the sums times both factors, or times the scales of x's and of w's rows."""
  m, n, k = x.shape[1], words.shape[1], x.shape[2]
  batch = max(x.shape[0], words.shape[0])
  step_k, step_words, groups = expansion.step_k, expansion.words, expansion.groups
  block_m, stages, split, grid = config.block_m, config.num_stages, config.split, config.grid
  k_steps = k // step_k // split  # of a CTA
  own_m = block_m // split  # rows of x_hat that a CTA stores
  takes_turns = config.promote and block_m >= TURN_ROWS and not interpret
  num_ctas = grid.num_ctas(batch, m, n)
  x_transforms = tile_transforms(step_k, x.dtype)
  has_row_scales = row_scales is not None
  # Only 16 bit matrices can be transposed on their way to shared memory.
  transposed = jnp.dtype(out_dtype).itemsize != 2
  # No stored tile may lie past the end of an axis of one tile: the copy engine drops such an axis.
  stored = (
    rounded_up(m, STORE) if transposed or m < STORE else rounded_up(m, 8),
    rounded_up(n, BLOCK_N),
  )

  def kernel(*refs: Any) -> None:
    x_g, words_g, scales_g, factors_g, *rest = refs
    of_x: Any = rest.pop(0) if has_row_scales else None
    of_w: Any = rest.pop(0) if has_row_scales else None
    out_g, x_s, words_s, out_s, *rest = rest
    a_s: Any = rest.pop(0) if interpret else None
    sent: Any = rest.pop(0) if split > 1 else None
    full, empty = rest
    warpgroup = lax.axis_index("warpgroup")
    own_part = lax.axis_index(cluster_sums.AXIS) if split > 1 else 0
    own_tiles, tile_of = grid.walk(batch, m, n)

    # Memory

    def load(slot: Any, ki: Any, tile: Any) -> None:
      b, mi, ni = tile
      ki = ki + own_part * k_steps

      plgpu.copy_gmem_to_smem(
        words_g.at[
          batch_of(words_g, b), pl.ds(ni * BLOCK_N, BLOCK_N), pl.ds(ki * step_words, step_words)
        ],
        words_s.at[slot],
        full.at[slot],
      )
      plgpu.copy_gmem_to_smem(
        x_g.at[batch_of(x_g, b), pl.ds(mi * block_m, block_m), pl.ds(ki * step_k, step_k)],
        x_s.at[slot],
        full.at[slot],
      )

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _memory() -> None:
      keep_full(load, empty, own_tiles, k_steps, tile_of)
      if split > 1:
        cluster_sums.meet()
        cluster_sums.meet()

    # Compute

    own_rows = pl.ds(warpgroup * tensor_cores.ROWS, tensor_cores.ROWS)

    def own_columns(ni: Any) -> Any:
      return pl.ds(ni * BLOCK_N + warpgroup * tensor_cores.ROWS, tensor_cores.ROWS)

    def load_group_scales(ki: Any, tile: Any) -> Any:
      b, _, ni = tile
      ks = pl.ds((ki + own_part * k_steps) * groups, groups)
      ref = scales_g.at[batch_of(scales_g, b), own_columns(ni), ks]
      return expand.load_scales(ref, expansion, bool(interpret))

    def slot_of(step: Any) -> Any:
      return lax.rem(step, jnp.int32(stages))

    def expanded(step: Any, scales: Any) -> Any:
      """The operand of one step, from its packed words; x_hat's is there then as well."""
      slot = slot_of(step)
      factors = expand.factors(scales, expansion)
      plgpu.barrier_wait(full.at[slot])
      layout = expansion.words_layout
      words = plgpu.load(words_s.at[slot, own_rows], layout=layout, optimized=False)
      return (expand.twin if interpret else expand.expand)(words, factors, expansion)

    def do_step(step: Any, a: Any, total: Any, scales: Any) -> tuple[Any, Any]:
      """total + a x_hat^T and, by its scales, the next step's a; without scales there is none."""
      b, is_empty = x_s.at[slot_of(step)], empty.at[slot_of(step)]

      def following() -> Any:
        return None if scales is None else expanded(step + 1, scales)

      if interpret:
        total += product_twin(a, b)
        plgpu.barrier_arrive(is_empty)
        return total, following()
      if takes_turns:
        total = tensor_cores.add_promoted(total, a, b, warpgroup, x_transforms, x.dtype)
        plgpu.barrier_arrive(is_empty)
        return total, following()
      before = None if config.promote else total
      begun = tensor_cores.begin(a, b, x_transforms, x.dtype, sums=before)
      next_a = following()
      (sums,) = tensor_cores.finish(begun, a, next_a)
      plgpu.barrier_arrive(is_empty)
      return total + sums if config.promote else sums, next_a

    def product_twin(a: Any, b: Any) -> Any:
      def scope(acc: Any) -> Any:
        a_s[warpgroup] = a  # the interpreter has no left operand in registers
        plgpu.commit_smem()
        plgpu.wgmma(acc, a_s.at[warpgroup], b.T)
        plgpu.wgmma_wait(0)
        return acc[...]

      return pl.run_scoped(
        scope, plgpu.WGMMAAccumulatorRef((tensor_cores.ROWS, block_m), jnp.float32)
      )

    def sums_of(first: Any, tile: Any) -> tuple[Any, Any]:
      """A tile's sums over all steps, and the scales of its rows of w."""

      def body(ki: Any, state: Any) -> Any:
        a, scales, total = state
        following = load_group_scales(jnp.minimum(ki + 2, k_steps - 1), tile)
        total, a = do_step(first + ki, a, total, scales)
        return a, following, total

      total = plgpu.layout_cast(
        jnp.zeros((tensor_cores.ROWS, block_m), jnp.float32), plgpu.Layout.WGMMA
      )
      a = expanded(first, load_group_scales(jnp.int32(0), tile))
      scales = load_group_scales(jnp.int32(min(1, k_steps - 1)), tile)
      a, _, total = lax.fori_loop(0, k_steps - 1, body, (a, scales, total))
      of_own_w = None
      if has_row_scales:  # here, so that they arrive while the last step is multiplied
        b, _, ni = tile
        of_own_w = load_row_scales(of_w.at[batch_of(of_w, b), own_columns(ni)], of_rows=True)
      total, _ = do_step(first + k_steps - 1, a, total, None)
      return total, of_own_w

    def store(sums: Any, of_own_w: Any, tile: Any, first_row: int) -> None:
      """Scales and writes the sums of a tile's rows from `first_row` on, 64 after the other."""
      b, mi, ni = tile
      columns = own_columns(ni)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for i in range(sums.shape[1] // STORE):
        part = sums[:, i * STORE : (i + 1) * STORE]
        rows = pl.ds(mi * block_m + first_row + i * STORE, STORE)
        if has_row_scales:
          of_x_rows = load_row_scales(of_x.at[batch_of(of_x, b), rows], of_rows=False)
          part = scaled(part, of_own_w, of_x_rows)
        else:
          index = batch_of(factors_g, b)
          part = part * factors_g[index, 0] * factors_g[index, 1]
        slot = i % config.store_slots
        plgpu.wait_smem_to_gmem(config.store_slots - 1, wait_read_only=True)
        if transposed:
          out_s[warpgroup, slot] = part.astype(out_dtype)
        else:
          out_s.at[warpgroup, slot].T[...] = part.astype(out_dtype)
        plgpu.commit_smem()
        place = (columns, rows) if transposed else (rows, columns)
        plgpu.copy_smem_to_gmem(out_s.at[warpgroup, slot], out_g.at[b, *place])

    def exchange_and_store(sums: Any, of_own_w: Any, tile: Any) -> None:
      """Adds up and stores the own rows, and hands over the others."""
      parts = [sums[:, i * own_m : (i + 1) * own_m] for i in range(split)]
      for own, other in ((0, 1), (1, 0)):

        @pl.when(own_part == own)
        def _exchange(own: int = own, other: int = other) -> None:
          cluster_sums.send(parts[other], sent, other)
          cluster_sums.meet()
          its = cluster_sums.receive(sent, own_m)
          store(parts[own] + its, of_own_w, tile, own * own_m)
          cluster_sums.meet()  # none ends before it has been read

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute() -> None:
      plgpu.set_max_registers(232, action="increase")
      if takes_turns:
        # The first is warpgroup 0's.
        pl.when(warpgroup == 1)(lambda: tensor_cores.pass_turn(warpgroup))

      @pl.loop(0, own_tiles)
      def _tile(t: Any) -> None:
        tile = tile_of(t)
        if split > 1:
          exchange_and_store(*sums_of(t * k_steps, tile), tile)
        else:
          store(*sums_of(t * k_steps, tile), tile, 0)

      if takes_turns:  # no barrier is left half way
        pl.when(warpgroup == 0)(lambda: tensor_cores.take_turn(warpgroup))

      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  scratch: list[Any] = [
    plgpu.SMEM((stages, block_m, step_k), x.dtype, transforms=x_transforms),
    plgpu.SMEM(
      (stages, BLOCK_N, step_words), jnp.uint32, transforms=tile_transforms(step_words, jnp.uint32)
    ),
    plgpu.SMEM(
      (COMPUTE_WARPGROUPS, config.store_slots, STORE, tensor_cores.ROWS),
      out_dtype,
      transforms=tile_transforms(tensor_cores.ROWS, out_dtype),
    ),
  ]
  if interpret:
    scratch.append(
      plgpu.SMEM((COMPUTE_WARPGROUPS, tensor_cores.ROWS, step_k), x.dtype, transforms=x_transforms)
    )
  if split > 1:
    scratch.append(cluster_sums.buffer(own_m))
  scratch += [
    plgpu.Barrier(num_barriers=stages, num_arrivals=2),
    plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE_WARPGROUPS),
  ]
  out_shape = (batch, *(stored[::-1] if transposed else stored))
  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(out_shape, out_dtype),
    grid=(num_ctas,),
    grid_names=("cta",),
    cluster=(split,) if split > 1 else (),
    cluster_names=(cluster_sums.AXIS,) if split > 1 else (),
    num_threads=COMPUTE_WARPGROUPS + 1,
    thread_name="warpgroup",
    compiler_params=compiler_params(),
    scratch_types=scratch,
    interpret=interpret,
    kernel_name="jaxqq_packed_matmul",
  )
  rows, columns = rounded_up(m, block_m), rounded_up(n, BLOCK_N)
  operands = [padded(x, rounded_up(m, 8)), padded(words, rounded_up(n, 8)), padded(scales, columns)]
  operands.append(factors)
  if row_scales is not None:
    operands += [padded(row_scales[0], rows), padded(row_scales[1], columns)]
  out = run(*operands)
  return (jnp.swapaxes(out, 1, 2) if transposed else out)[:, :m, :n]
