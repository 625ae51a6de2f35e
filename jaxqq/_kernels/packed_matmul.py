"""out = x_hat w_hat^T on Hopper's tensor cores, from packed w, expanded in registers.

Three warpgroups share one CTA, and the CTAs (one a multiprocessor) walk over the output tiles:

    warpgroup 2, memory   | load k+3      | load k+4      | load k+5      | ...
    warpgroup 0, compute  | wgmma k  | expand k+1 | wgmma k+1  | expand k+2 | ... | store
    warpgroup 1, compute      expand k  | wgmma k    | expand k+1 | wgmma k+1 | ...

- The memory warpgroup has the copy engine (TMA) bring tiles of x_hat and of packed words to
  shared memory, and refills a place once both compute warpgroups have released it.
- A compute warpgroup has 64 rows of w and all rows of the x_hat tile: out^T = w_hat x_hat^T. It
  expands the words of a step in its registers (`expand.py`), from where the tensor cores take
  them, while they work for the other warpgroup. No expanded w is ever written to memory.
- Where a step takes two waits (`promote`, below), the warpgroups take turns: one begins its step
  when the other has begun the last part of its own, so that one expands while the other waits.
- Sums inside the tensor cores are truncated (to 14 bits in fp8, and by float32's last bit in 16
  bit formats). With `promote` they cover one step, and are then added to float32 sums: 128 rows
  of x_hat after the other, for want of registers.
- Tried and slower: expanded w in shared memory, whether these warpgroups write it there or others
  (one or two) do. The tensor cores then read both operands from there, and every step has a fence.
- Where operands carry flags, the last CTA's memory warpgroup goes through them when all its loads
  are under way.
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

from jaxqq._kernels import expand, tensor_cores
from jaxqq._kernels.tiles import (
  COMPUTE_WARPGROUPS,
  LEAST_FLAGS,
  Grid,
  any_of,
  batch_of,
  compiler_params,
  keep_full,
  load_row_scales,
  padded,
  rounded_up,
  scaled,
  tile_transforms,
)

PROMOTED_ROWS = 128  # of x_hat: what the tensor cores sum up before it is added in float32
BLOCK_N = COMPUTE_WARPGROUPS * tensor_cores.ROWS
STORE = 64  # rows of x_hat that are stored at a time


@dataclasses.dataclass(frozen=True)
class Config:
  """The tiles of one launch."""

  block_m: int  # rows of x_hat a CTA, a multiple of 64, up to 256
  num_stages: int  # tiles in shared memory
  promote: bool = False  # add to float32 sums after every step
  store_slots: int = 2  # tiles on their way out, a warpgroup
  group_width: int = 8  # neighbouring tiles of the minor axis that are walked together
  minor: int = 0  # 0: m, 1: n

  @property
  def grid(self) -> Grid:
    return Grid(self.block_m, BLOCK_N, self.group_width, self.minor)


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
  flags: jax.Array | None = None,  # int32
) -> Any:
  """(b, m, n): the sums times both factors, or times the scales of x's and of w's rows.

  With `flags`, also bool (1,), whether one is above 0: XLA would have a kernel of its own for that.
  """
  m, n, k = x.shape[1], words.shape[1], x.shape[2]
  batch = max(x.shape[0], words.shape[0])
  step_k, step_words, groups = expansion.step_k, expansion.words, expansion.groups
  k_steps = k // step_k
  block_m, stages = config.block_m, config.num_stages
  grid = config.grid
  part_m = min(PROMOTED_ROWS, block_m) if config.promote else block_m
  takes_turns = part_m < block_m
  num_ctas = grid.num_ctas(batch, m, n)
  x_transforms = tile_transforms(step_k, x.dtype)
  has_row_scales = row_scales is not None
  # Only 16 bit matrices can be transposed on their way to shared memory.
  transposed = jnp.dtype(out_dtype).itemsize != 2
  # No stored tile may lie past the end of an axis of one tile: the copy engine drops such an axis.
  out_shape = (
    rounded_up(m, STORE) if transposed or m < STORE else rounded_up(m, 8),
    rounded_up(n, BLOCK_N),
  )

  def kernel(*refs: Any) -> None:
    x_g, words_g, scales_g, factors_g, *rest = refs
    of_x: Any = rest.pop(0) if has_row_scales else None
    of_w: Any = rest.pop(0) if has_row_scales else None
    flags_g: Any = rest.pop(0) if flags is not None else None
    out_g, *rest = rest
    any_g: Any = rest.pop(0) if flags is not None else None
    x_s, words_s, out_s, *rest = rest
    a_s: Any = rest.pop(0) if interpret else None
    x_full, words_full, empty, *rest = rest
    turn: Any = rest.pop() if takes_turns else None
    warpgroup = lax.axis_index("warpgroup")
    own_tiles, tile_of = grid.walk(batch, m, n)

    # Memory

    def load(slot: Any, ki: Any, tile: Any) -> None:
      b, mi, ni = tile

      plgpu.copy_gmem_to_smem(
        words_g.at[
          batch_of(words_g, b), pl.ds(ni * BLOCK_N, BLOCK_N), pl.ds(ki * step_words, step_words)
        ],
        words_s.at[slot],
        words_full.at[slot],
      )
      plgpu.copy_gmem_to_smem(
        x_g.at[batch_of(x_g, b), pl.ds(mi * block_m, block_m), pl.ds(ki * step_k, step_k)],
        x_s.at[slot],
        x_full.at[slot],
      )

    def find_any() -> None:
      @pl.when(lax.axis_index("cta") == num_ctas - 1)  # it has the fewest tiles
      def _() -> None:
        any_g[0] = any_of(flags_g)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _memory() -> None:
      at_end = None if flags is None else find_any
      keep_full(load, empty, own_tiles, k_steps, tile_of, at_end=at_end)

    # Compute

    own_rows = pl.ds(warpgroup * tensor_cores.ROWS, tensor_cores.ROWS)

    def own_columns(ni: Any) -> Any:
      return pl.ds(ni * BLOCK_N + warpgroup * tensor_cores.ROWS, tensor_cores.ROWS)

    def load_group_scales(ki: Any, tile: Any) -> Any:
      b, _, ni = tile
      ref = scales_g.at[batch_of(scales_g, b), own_columns(ni), pl.ds(ki * groups, groups)]
      return expand.load_scales(ref, expansion, bool(interpret))

    def expanded(step: Any, scales: Any) -> Any:
      """The operand of one step, from its packed words."""
      slot = lax.rem(step, jnp.int32(stages))
      factors = expand.factors(scales, expansion)
      plgpu.barrier_wait(words_full.at[slot])
      layout = expansion.words_layout
      words = plgpu.load(words_s.at[slot, own_rows], layout=layout, optimized=False)
      return (expand.twin if interpret else expand.expand)(words, factors, expansion)

    def pass_turn() -> None:
      plgpu.barrier_arrive(turn.at[1 - warpgroup])

    def multiply(sums: Any, a: Any, slot: Any, part: int) -> Any:
      """(sums +) a x_hat^T."""
      b = x_s.at[slot, pl.ds(part * part_m, part_m)]
      last = takes_turns and (part + 1) * part_m == block_m
      if not interpret:
        begun = tensor_cores.begin(a, b, x_transforms, x.dtype, sums=sums)
        if last:
          pass_turn()
        return tensor_cores.finish(begun)[0]
      if last:
        pass_turn()

      def scope(acc: Any) -> Any:
        a_s[warpgroup] = a  # the interpreter has no left operand in registers
        plgpu.commit_smem()
        plgpu.wgmma(acc, a_s.at[warpgroup], b.T)
        plgpu.wgmma_wait(0)
        return acc[...] if sums is None else acc[...] + sums

      return pl.run_scoped(
        scope, plgpu.WGMMAAccumulatorRef((tensor_cores.ROWS, part_m), jnp.float32)
      )

    def add_step(step: Any, a: Any, totals: tuple[Any, ...]) -> tuple[Any, ...]:
      """The totals, in parts of part_m rows of x_hat, and a step's sums."""
      slot = lax.rem(step, jnp.int32(stages))
      plgpu.barrier_wait(x_full.at[slot])
      if takes_turns:
        plgpu.barrier_wait(turn.at[warpgroup])
      results = []
      for part, total in enumerate(totals):
        sums = multiply(None if config.promote else total, a, slot, part)
        if part == len(totals) - 1:
          plgpu.barrier_arrive(empty.at[slot])
        results.append(total + sums if config.promote else sums)
      return tuple(results)

    def sums_of(first: Any, tile: Any) -> tuple[list[Any], Any]:
      """A tile's sums over all steps, in parts, and the scales of its rows of w."""

      def body(ki: Any, state: Any) -> Any:
        a, scales, totals = state
        following = load_group_scales(jnp.minimum(ki + 2, k_steps - 1), tile)
        totals = add_step(first + ki, a, totals)
        return expanded(first + ki + 1, scales), following, totals

      zeros = jnp.zeros((tensor_cores.ROWS, part_m), jnp.float32)
      totals = tuple(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA) for _ in range(block_m // part_m))
      a = expanded(first, load_group_scales(jnp.int32(0), tile))
      scales = load_group_scales(jnp.int32(min(1, k_steps - 1)), tile)
      a, _, totals = lax.fori_loop(0, k_steps - 1, body, (a, scales, totals))
      of_own_w = None
      if has_row_scales:  # here, so that they arrive while the last step is multiplied
        b, _, ni = tile
        of_own_w = load_row_scales(of_w.at[batch_of(of_w, b), own_columns(ni)], of_rows=True)
      return list(add_step(first + k_steps - 1, a, totals)), of_own_w

    def store(parts: list[Any], of_own_w: Any, tile: Any) -> None:
      """Scales and writes a tile, 64 rows of x_hat after the other."""
      b, mi, ni = tile
      columns = own_columns(ni)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for i in range(block_m // STORE):
        within = i * STORE % part_m
        part = parts[i * STORE // part_m][:, within : within + STORE]
        rows = pl.ds(mi * block_m + i * STORE, STORE)
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

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute() -> None:
      plgpu.set_max_registers(232, action="increase")
      if takes_turns:
        pl.when(warpgroup == 1)(pass_turn)  # the first is warpgroup 0's

      @pl.loop(0, own_tiles)
      def _tile(t: Any) -> None:
        tile = tile_of(t)
        store(*sums_of(t * k_steps, tile), tile)

      if takes_turns:  # no barrier is left half way
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))

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
  scratch += [
    plgpu.Barrier(num_barriers=stages),
    plgpu.Barrier(num_barriers=stages),
    plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE_WARPGROUPS),
  ]
  if takes_turns:
    scratch.append(plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS))
  out_types = (
    jax.ShapeDtypeStruct((batch, *(out_shape[::-1] if transposed else out_shape)), out_dtype),
    jax.ShapeDtypeStruct((1,), jnp.bool_),
  )
  run = plgpu.kernel(
    kernel,
    out_type=out_types if flags is not None else out_types[:1],
    grid=(num_ctas,),
    grid_names=("cta",),
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
  if flags is not None:
    missing = LEAST_FLAGS - flags.size
    operands.append(jnp.pad(flags, (0, missing)) if missing > 0 else flags)
  out, *found = run(*operands)
  out = (jnp.swapaxes(out, 1, 2) if transposed else out)[:, :m, :n]
  return (out, *found) if found else out
