"""out = x_hat w_hat^T for up to 64 rows of x_hat, from w that is read once.

A CTA has 64 rows of w at a time and all of k, in chunks that go round its compute warpgroups:

    warpgroup C, memory   | load chunk 8 | load chunk 9 | load chunk 10 | ...
    warpgroup 0, compute  |  chunk 0  |  chunk 4  |  chunk 8  | ... | add up, store | next 64 rows
    warpgroup 1, compute  |  chunk 1  |  chunk 5  |  chunk 9  | ... | hand over     | next 64 rows
    warpgroup 2, ...

- The memory warpgroup has the copy engine (TMA) keep all of shared memory full: packed words and
  scales of w, or its numbers, and of x_hat what belongs to them, in one chunk. Where x meets packed
  w with so few rows that their quantization is little work, a compute warpgroup does that itself,
  while it waits for its chunk of w (`quantized_rows.py`).
- A compute warpgroup multiplies its chunks: out^T = w_hat x_hat^T, 64 rows of w by all of x_hat.
  nvfp4, up to 8 rows: codes go to the fp8 tensor cores, two groups an instruction, which columns
  of x_hat keep apart, and each group's exact sum is multiplied by its two scales (`apart.py`).
  nvfp4, more: codes are expanded in registers to exact float16 (`expand.py`), and so is x_hat.
  mxfp8: an instruction's 32 elements of k are one group. Packed codes of both operands go to the
  tensor cores as they are, and each group's sums are multiplied by its two scales in float32.
  w unquantized: quantized in registers, to exact 16 bit floats (`quantized_tile.py`).
- Warpgroup 0 adds the sums of the others to its own, always in the same order, and stores them.
- Where w has so few rows that half of the multiprocessors or more would idle, a cluster of CTAs
  has 64 rows together, each a part of k, and adds up its sums (`cluster_sums.py`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._formats import Format
from jaxqq._kernels import apart, cluster_sums, expand, quantized_tile, tensor_cores
from jaxqq._kernels.codes import amax_or_nan
from jaxqq._kernels.few_rows_config import BLOCK_N, Chunk, Config
from jaxqq._kernels.powers import factors_of_powers, factors_of_product
from jaxqq._kernels.quantized_rows import CHUNK_K, QuantizedRows
from jaxqq._kernels.store_columns import store_columns
from jaxqq._kernels.tiles import (
  batch_of,
  compiler_params,
  keep_full,
  padded,
  rounded_up,
  tile_transforms,
)

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
_STEP_WORDS = tensor_cores.STEP // 4
_GROUPS = tensor_cores.STEP // 32  # of mxfp8 in a step
# A thread of a compute warpgroup, by how many there are: what the memory warpgroup leaves.
_REGISTERS = {2: 232, 4: 104}


def few_rows(
  # (b or 1, rows or columns, k) of 16 bit floats, or (.., .., k / 4) of four e4m3 numbers in a
  # uint32; or (b or 1, m, k) to be quantized here
  x: jax.Array,
  x_scales: jax.Array | None,  # of e4m3 numbers: float32 (b or 1, k / chunk.k, .., ..)
  w: jax.Array,  # uint32 (b or 1, n, k * bits / 32); or (b or 1, n, k) of 16 bit floats
  scales: jax.Array | None,  # uint8 (b or 1, n, k / group_size); or None
  factors: tuple[jax.Array, ...],  # float32 (1,), the amax of x and that of w; or nothing
  m: int,  # rows of x that count: what others hold reaches no result
  *,
  chunk: Chunk,
  unit: float = 1.0,
  columns: apart.Columns | None = None,  # nvfp4: where x has them, `apart.apart_operand`
  # What is to become of x, or of w, whose global scales are then the first and second factor.
  quantized_x: QuantizedRows | None = None,
  quantized_w: Format | None = None,
  out_dtype: Any,
  config: Config,
  interpret: Any = None,
) -> jax.Array:
  """(b, m, n): the sums times the unit and all factors. k is a multiple of chunk.k."""
  n = w.shape[1]
  held = quantized_x.held if quantized_x else x.shape[1]
  w_columns = chunk.k if quantized_w else chunk.words
  all_steps = w.shape[2] // w_columns
  k_steps = all_steps // config.split
  batch = max(x.shape[0], w.shape[0])
  workers, stages, grid = config.compute_warpgroups, config.num_stages, config.grid
  split = config.split
  x_scaled = x_scales is not None or quantized_x is not None
  x_dtype: Any = jnp.uint32 if quantized_x else x.dtype
  x_columns = CHUNK_K // 4 if quantized_x else x.shape[2] // all_steps
  x_transforms = tile_transforms(x_columns, x_dtype)
  w_transforms = tile_transforms(w_columns, w.dtype)
  sums_transforms = tile_transforms(held, jnp.float32)

  num_loads = 1 + (scales is not None) + (not quantized_x) + (x_scales is not None)

  def kernel(*refs: Any) -> None:
    x_g, w_g, *rest = refs
    scales_g: Any = None if scales is None else rest.pop(0)
    factors_g, rest = rest[: len(factors)], rest[len(factors) :]
    x_scales_g: Any = rest.pop(0) if x_scales is not None else None
    out_g, x_s, w_s, sums_s, *rest = rest
    scales_s: Any = None if scales is None else rest.pop(0)
    x_scales_s: Any = rest.pop(0) if x_scaled else None
    part_s: Any = rest.pop(0) if split > 1 else None
    full, empty, sums_full, sums_empty = rest
    warpgroup = lax.axis_index("warpgroup")
    own_part = lax.axis_index(cluster_sums.AXIS) if split > 1 else 0
    own_tiles, tile_of = grid.walk(batch, m, n)

    # Memory

    def load(slot: Any, ki: Any, tile: Any) -> None:
      b, _, ni = tile
      ki = ki + own_part * k_steps
      rows = pl.ds(ni * BLOCK_N, BLOCK_N)

      def copy(a_g: Any, rows: Any, columns: int, a_s: Any) -> None:
        place = a_g.at[batch_of(a_g, b), rows, pl.ds(ki * columns, columns)]
        plgpu.copy_gmem_to_smem(place, a_s.at[slot], full.at[slot])

      copy(w_g, rows, w_columns, w_s)
      if scales is not None:
        copy(scales_g, rows, chunk.scales, scales_s)
      if not quantized_x:
        copy(x_g, pl.ds(0, held), x_columns, x_s)
      if x_scales is not None:
        place = x_scales_g.at[batch_of(x_scales_g, b), ki]
        size = pl.ds(0, x_scales_g.shape[3])
        plgpu.copy_gmem_to_smem(place, x_scales_s.at[slot, :, size], full.at[slot])

    @pl.when(warpgroup == workers)
    def _memory() -> None:
      keep_full(load, empty, own_tiles, k_steps, tile_of)

    # Compute

    def add_expanded(sums: Any, slot: Any) -> Any:
      """sums + a chunk's product, its codes expanded in registers."""
      words = plgpu.load(w_s.at[slot], layout=expand.E2M1.words_layout, optimized=False)
      all_scales = expand.load_scales(scales_s.at[slot], expand.E2M1, bool(interpret))
      for step in range(chunk.words // expand.E2M1.words):
        its = slice(step * expand.E2M1.words, (step + 1) * expand.E2M1.words)
        groups = slice(step * expand.E2M1.groups, (step + 1) * expand.E2M1.groups)
        factor = expand.factors(all_scales[:, groups], expand.E2M1)
        of_w = expand.twin if interpret else expand.expand
        sums = add_step(sums, of_w(words[:, its], factor, expand.E2M1), slot, step)
      return sums

    def add_quantized(sums: Any, slot: Any) -> Any:
      """sums + a chunk's product, its numbers quantized in registers."""
      assert quantized_w is not None
      global_scale = factors_g[1][0] if factors else None
      for step in range(chunk.k // quantized_tile.STEP_K):
        columns = pl.ds(step * quantized_tile.STEP_K, quantized_tile.STEP_K)
        numbers = w_s.at[slot, :, columns]
        a = quantized_tile.quantized_tile(numbers, quantized_w, global_scale, bool(interpret))
        sums = add_step(sums, a, slot, step)
      return sums

    def add_step(sums: Any, a: Any, slot: Any, step: int) -> Any:
      """sums + the product of 64 of k in 16 bits."""
      b = x_s.at[slot, :, pl.ds(step * a.shape[1], a.shape[1])]
      if interpret:
        return sums + _product(a, b[...])
      before = None if config.promote else sums
      (done,) = tensor_cores.finish(tensor_cores.begin(a, b, x_transforms, x_dtype, sums=before))
      return sums + done if config.promote else done

    def add_scaled_groups(sums: Any, slot: Any) -> Any:
      """sums + a chunk's product of mxfp8, groups scaled after they are summed up."""
      row_words = expand.scale_words(scales_s.at[slot], bool(interpret))
      for step, words_of_step in enumerate(row_words):
        columns = pl.ds(step * _STEP_WORDS, _STEP_WORDS)
        a, b = w_s.at[slot, :, columns], x_s.at[slot, :, columns]
        if interpret:
          products = _products_of_groups(a[...], b[...])
        else:
          begun = tensor_cores.begin(a, b, w_transforms, E4M3, parts=_GROUPS)
          products = tensor_cores.finish(begun)
        of_rows = factors_of_powers(words_of_step)
        for i, product in enumerate(products):
          first, second = (lax.broadcast_in_dim(f[i], product.shape, (0,)) for f in of_rows)
          product = product * first * scales_of_x(slot, step * _GROUPS + i, 0)
          sums += product * second
      return sums

    def scales_of_x(slot: Any, row: int, first: int) -> Any:
      """Those of the columns of sums, (64, held)."""
      scales = plgpu.load(
        x_scales_s.at[slot, row, pl.ds(first, held)],
        layout=plgpu.Layout.WGMMA.reduce(0),
        optimized=False,
      )
      return lax.broadcast_in_dim(scales, (BLOCK_N, held), (1,))

    def add_apart(sums: Any, slot: Any) -> Any:
      """sums + a chunk's product of nvfp4, groups in columns of their own (`apart.py`)."""
      assert columns is not None
      scale_words = expand.scale_words(scales_s.at[slot], bool(interpret))
      parts = _GROUPS // columns.classes
      for step in range(chunk.words // apart.STEP_WORDS):
        first = step * apart.STEP_WORDS
        tile, within = divmod(first, _STEP_WORDS)
        if within == 0:
          ref = w_s.at[slot, :, pl.ds(tile * _STEP_WORDS, _STEP_WORDS)]
          words = plgpu.load(ref, layout=apart.WORDS_LAYOUT, optimized=False)
        its = words[:, within : within + apart.STEP_WORDS]
        b = x_s.at[slot, :, pl.ds(step * _STEP_WORDS, _STEP_WORDS)]
        two_words = scale_words[2 * step : 2 * step + 2]
        if interpret:
          a, b = apart.expand_twin(its), apart.numbers_of(b[...])
          k = apart.BLOCK * columns.classes
          products = [_product(a[:, i : i + k], b[:, i : i + k]) for i in range(0, 128, k)]
        else:
          begun = tensor_cores.begin(apart.expand(its), b, x_transforms, E4M3, parts=parts)
          products = tensor_cores.finish(begun)
        of_w = apart.scales_of_columns_twin if interpret else apart.scales_of_columns
        for part, product in enumerate(products):
          # Two steps are a row of their scales.
          product = product * scales_of_x(slot, step // 2, (step % 2 * parts + part) * held)
          sums += product * of_w(two_words, part, columns)
      return sums

    add = add_scaled_groups if x_scaled else add_quantized if quantized_w else add_expanded
    if columns is not None:
      add = add_apart

    def quantize_x(slot: Any, ki: Any, t: Any) -> None:
      assert quantized_x is not None
      b = tile_of(t)[0] if x.shape[0] > 1 else 0
      quantized_x.write(
        x_g.at[b],
        ki + own_part * k_steps,
        x_s.at[slot],
        x_scales_s.at[slot],
        factors_g[0][0] if factors else None,
        bool(interpret),
      )

    def own_sums(t: Any) -> Any:
      """What a warpgroup's chunks of a tile add up to.

      Chunks go round without regard to tiles: a place in shared memory, of which there are a
      multiple of the warpgroups, always belongs to the same one, which sees all its barrier's
      phases.
      """
      first = t * k_steps
      own_first = lax.rem(
        warpgroup + workers - lax.rem(first, jnp.int32(workers)), jnp.int32(workers)
      )
      count = lax.div(k_steps - own_first + workers - 1, jnp.int32(workers))

      def add_chunk(i: Any, sums: Any) -> Any:
        ki = own_first + i * workers
        slot = lax.rem(first + ki, jnp.int32(stages))
        if quantized_x:
          quantize_x(slot, ki, t)
        plgpu.barrier_wait(full.at[slot])
        sums = add(sums, slot)
        if interpret:  # it has no rule that loads are over once their values are used
          plgpu.commit_smem()
        plgpu.barrier_arrive(empty.at[slot])
        return sums

      zeros = plgpu.layout_cast(jnp.zeros((BLOCK_N, held), jnp.float32), plgpu.Layout.WGMMA)
      return lax.fori_loop(0, count, add_chunk, zeros)

    def hand_over(sums: Any, t: Any) -> None:
      @pl.when(t > 0)
      def _wait() -> None:
        plgpu.barrier_wait(sums_empty)

      sums_s[warpgroup - 1] = sums
      plgpu.barrier_arrive(sums_full)

    def add_up(sums: Any, t: Any) -> None:
      plgpu.barrier_wait(sums_full)
      for i in range(workers - 1):
        sums += plgpu.load(sums_s.at[i], layout=plgpu.Layout.WGMMA, optimized=False)
      plgpu.barrier_arrive(sums_empty)
      if split > 1:
        part_s[...] = sums
      else:
        store(sums, t)

    def store(sums: Any, t: Any) -> None:
      b, _, ni = tile_of(t)
      if columns is not None:
        sums = (apart.collapse_twin if interpret else apart.collapse)(sums, columns)
      out = sums * np.float32(unit)
      if factors_g:
        first, second = factors_of_product(*(amax_or_nan(factor[0]) for factor in factors_g))
        out = out * first * second
      out = out.astype(out_dtype)
      layout = plgpu.Layout.WGMMA if columns is None else apart.WORDS_LAYOUT
      store_columns(out, layout, out_g.at[b], ni * BLOCK_N, m, n, bool(interpret))

    @pl.when(warpgroup < workers)
    def _compute() -> None:
      plgpu.set_max_registers(_REGISTERS[workers], action="increase")
      if quantized_x:
        for i in range(0, stages, workers):
          quantized_x.clear(x_s.at[warpgroup + i], bool(interpret))

      @pl.loop(0, own_tiles)
      def _tile(t: Any) -> None:
        sums = own_sums(t)
        lax.cond(warpgroup == 0, add_up, hand_over, sums, t)

      # No barrier is left half way.
      @pl.when(warpgroup > 0)
      def _drain() -> None:
        plgpu.barrier_wait(sums_empty)

    if split > 1:  # and so a cluster has one tile
      cluster_sums.meet()

      @pl.when((warpgroup == 0) & (own_part == 0))
      def _total() -> None:
        store(cluster_sums.total(part_s, split), 0)

      cluster_sums.meet()

  scratch: list[Any] = [
    plgpu.SMEM((stages, held, x_columns), x_dtype, transforms=x_transforms),
    plgpu.SMEM((stages, BLOCK_N, w_columns), w.dtype, transforms=w_transforms),
    plgpu.SMEM((workers - 1, BLOCK_N, held), jnp.float32, transforms=sums_transforms),
  ]
  if scales is not None:
    scratch.append(plgpu.SMEM((stages, BLOCK_N, chunk.scales), jnp.uint8))
  if quantized_x:
    scratch.append(plgpu.SMEM((stages, *quantized_x.scales_shape), jnp.float32))
  if x_scales is not None:
    rows, size = x_scales.shape[2:]
    # The copy engine writes to multiples of 128 bytes.
    size = max(size, 32 // rows)
    scratch.append(plgpu.SMEM((stages, rows, size), jnp.float32))
  if split > 1:
    scratch.append(plgpu.SMEM((BLOCK_N, held), jnp.float32, transforms=sums_transforms))
  scratch += [
    plgpu.Barrier(num_barriers=stages, num_arrivals=num_loads),
    plgpu.Barrier(num_barriers=stages),
    plgpu.Barrier(num_arrivals=workers - 1),
    plgpu.Barrier(),
  ]
  out_rows, out_columns = (max(m, held), rounded_up(n, BLOCK_N)) if interpret else (m, n)
  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((batch, out_rows, out_columns), out_dtype),
    grid=(grid.num_ctas(batch, m, n),),
    grid_names=("cta",),
    cluster=(split,) if split > 1 else (),
    cluster_names=(cluster_sums.AXIS,) if split > 1 else (),
    num_threads=workers + 1,
    thread_name="warpgroup",
    compiler_params=compiler_params(),
    scratch_types=scratch,
    interpret=interpret,
    kernel_name="jaxqq_few_rows",
  )
  operands = [
    quantized_x.operand(x) if quantized_x else x,
    *(padded(a, rounded_up(n, 8)) for a in (w, scales) if a is not None),
    *factors,
  ]
  if x_scales is not None:
    operands.append(x_scales)
  out = run(*operands)
  return out[:, :m, :n] if interpret else out


# For the interpreter


def _product(a: Any, b: Any) -> Any:
  return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32).T, precision="highest")


def _products_of_groups(a_words: Any, b_words: Any) -> list[Any]:
  a, b = (apart.numbers_of(words).reshape(len(words), _GROUPS, -1) for words in (a_words, b_words))
  return [_product(a[:, i], b[:, i]) for i in range(_GROUPS)]
