"""Block-diagonal x, for `skinny_gemm`'s nvfp4: `mainloops/blockdiag.py` says why and how."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._formats import Format
from jaxqq._kernels.hopper.quantize.codes import (
  amax_bits_of,
  codes_of,
  scalar_of,
  scalars_of,
  scales_of,
)
from jaxqq._kernels.hopper.quantize.groups import (
  View,
  load_gmem,
  make_kernel,
  per_group,
  positions,
  store_gmem,
)
from jaxqq._kernels.hopper.tiles import BlockDiagonal

BLOCK = 32  # elements of k an instruction


def blockdiag_operand(
  a: jax.Array, fmt: Format, global_scale: jax.Array | None, blockdiag: BlockDiagonal
) -> tuple[jax.Array, jax.Array]:
  """x as columns of e4m3 codes, and the scales of their groups.

  Args:
    a: float32, float16 or bfloat16, (m, k) with m up to blockdiag.rows, k a multiple of 32 from
      `mainloops.table.BLOCKDIAG_MIN_K` on.
    fmt: nvfp4.
    global_scale: None, or a float32 scalar.

  Returns:
    words: uint32 (blockdiag.columns, k / 4); those of rows from m on are not written.
    scales: float32 (k / 32, 2 * blockdiag.rows), NaN for groups with a NaN or an infinity.
  """
  m, k = a.shape
  blocks = k // BLOCK
  view = View(2, 2, 8)  # groups of a block, words of a group, codes of a word
  run = make_kernel(
    functools.partial(_kernel, fmt=fmt, view=view, blockdiag=blockdiag),
    "blockdiag_operand",
    grid=(m * pl.cdiv(blocks, view.tile),),
    out_type=(
      jax.ShapeDtypeStruct((blockdiag.columns, blocks, 2, *view.minor[:2]), jnp.uint32),
      jax.ShapeDtypeStruct((blocks, blockdiag.rows, 2), jnp.float32),
    ),
  )
  words, scales = run(a.reshape(m, blocks, *view.minor), *scalars_of(global_scale))
  return words.reshape(blockdiag.columns, k // 4), scales.reshape(blocks, 2 * blockdiag.rows)


def _kernel(
  a_ref: Any,  # (m, blocks, groups, words, codes)
  *refs: Any,
  fmt: Format,
  view: View,
  blockdiag: BlockDiagonal,
) -> None:
  *global_scale, words_ref, scales_ref = refs
  blocks = a_ref.shape[1]
  steps, step = pl.cdiv(blocks, view.tile), lax.axis_index("step")
  row = lax.div(step, jnp.int32(steps))
  start = jnp.minimum(lax.rem(step, jnp.int32(steps)) * view.tile, blocks - view.tile)
  here = pl.ds(start, view.tile)
  a = load_gmem(a_ref.at[row, here], view.layout).astype(jnp.float32)
  scales = scales_of(amax_bits_of(a), fmt, scalar_of(global_scale), a_ref.dtype)
  store_gmem(scales_ref.at[here, row], scales.scale)
  codes = jnp.where(per_group(scales.blank, a), 0, codes_of(a, scales, fmt))
  numbers = numbers_of_codes(codes)
  place = positions(a.shape, view.layout)
  numbers = numbers << ((place >> 1) << 3)

  def index(axis: int) -> Any:
    iota = lax.broadcasted_iota(jnp.int32, a.shape[:3], axis)
    return plgpu.layout_cast(iota, view.reduced(3))

  k_block, group = (index(0) + start) & (blockdiag.k_blocks_per_acc - 1), index(1)
  for h in range(2):
    words = jnp.sum(jnp.where((place & 1) == 1 - h, numbers, 0), axis=-1, dtype=jnp.int32)
    for own_block in range(blockdiag.k_blocks_per_acc):
      for own_group in range(2):
        own = (k_block == own_block) & (group == own_group)
        column = 2 * blockdiag.rows * own_block + 2 * row + own_group
        own_words = lax.bitcast_convert_type(jnp.where(own, words, 0), jnp.uint32)
        store_gmem(words_ref.at[column, here, h], own_words)


def numbers_of_codes(codes: Any) -> Any:
  """e2m1 codes as e4m3 codes of 2**-6 their value."""
  return ((codes & 8) << 4) | ((codes & 7) << 2)
