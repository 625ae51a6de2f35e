"""skinny_gemm: unquantized w, quantized in the registers of the kernel that reads it.

A step of 64 rows and 64 of k goes from shared memory to code * scale, exact in float16 (e2m1 codes)
or bfloat16 (e4m3).

Thread q = 0..3 of a row's four holds 16 neighbours of k: all of an nvfp4 group, or half of one of
32. A register of the operand pairs two of them, so that nothing moves between threads, and x is
interleaved as for packed codes (`ptx/expand.py`).
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxqq._formats import Format
from jaxqq._kernels.hopper.mainloops.expanded import add_step
from jaxqq._kernels.hopper.mainloops.table import exact_dtype
from jaxqq._kernels.hopper.ptx import rounding
from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROWS, interleaved, layout_of
from jaxqq._kernels.hopper.quantize.codes import amax_bits_of, scales_of, values_of
from jaxqq._kernels.problem import Problem

STEP_K = 64
_THREAD_K = 16  # neighbours that a thread has of a row
_VECTOR = 8  # of them that it loads at once: in 16 bits, what a swizzle leaves together
_NUMBERS = plgpu.Layout.TILED(
  plgpu.Tiling(((ROWS, STEP_K), (16, STEP_K), (8, STEP_K), (_THREAD_K,), (_VECTOR,))),
  warp_dims=(-8,),
  lane_dims=(-4, -3),
  vector_dim=-1,
)


class Quantized:
  """Steps of 64 of k."""

  interleaved = True
  by_warps = False

  @staticmethod
  def unit(problem: Problem) -> float:
    del problem
    return 1.0

  @staticmethod
  def add(cta: Any, sums: Any, stage: Any, scales: Any, rows: int, is_last: Any) -> Any:
    """sums + the product of one block of k."""
    del scales, rows, is_last  # w has none
    (sums,) = sums
    global_scale = None if cta.gmem.global_scale_w is None else cta.gmem.global_scale_w[0]
    for step in range(cta.plan.block.k // STEP_K):
      numbers = cta.smem.w.at[stage, :, pl.ds(step * STEP_K, STEP_K)]
      a = quantized_tile(numbers, cta.plan.problem.fmt, global_scale)
      sums = add_step(cta, sums, a, stage, step)
    return [sums]


def quantized_tile(ref: Any, fmt: Format, global_scale: Any) -> Any:
  """Numbers (64, 64) in shared memory as the operand (64, 64), in the layout WGMMA."""
  groups, dtype = STEP_K // fmt.group_size, exact_dtype(fmt)
  if interpreting():
    a = ref[...]
    grouped = a.astype(jnp.float32).reshape(ROWS, groups, 2, -1)
    scales = scales_of(amax_bits_of(grouped), fmt, global_scale, a.dtype)
    values = values_of(grouped, scales, fmt).reshape(ROWS, STEP_K)
    return interleaved(values).astype(dtype)
  lanes = fmt.group_size // _THREAD_K
  replicated = (plgpu.Replicated(lanes),) if lanes > 1 else ()
  layout = layout_of(groups, 1, (-3, -2, *replicated))  # threads that share a group hold the same
  a = plgpu.load(ref, layout=_NUMBERS, optimized=False)
  amax_bits = rounding.tile_amax_bits(a, _NUMBERS, groups, layout, lanes)
  scales = scales_of(amax_bits, fmt, global_scale, a.dtype)
  numbers, layouts = a.astype(jnp.float32), (_NUMBERS, layout)
  return rounding.round_to_codes(
    numbers, scales.factor, scales.scale, scales.raising, fmt, dtype, layouts
  )
