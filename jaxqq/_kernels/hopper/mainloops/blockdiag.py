"""skinny_gemm: nvfp4 by fp8 tensor cores, with block-diagonal x.

e2m1 codes are e4m3 numbers, and the tensor cores have all bits of what 16 products of two codes
add up to. What they must not do is add groups of different scales. An instruction's 32 elements
of k are two groups: a row of x gets a column for each, with zeros where the other is, and every
sum is multiplied by its two scales in float32. Nothing is rounded before that.

Fewer rows than columns leave room for more groups in an accumulator. With R rows, up to four and
rounded up to a power of two, 8 columns have `k_blocks_per_acc` blocks of 32 elements at a time:

    R                1   2   4
    k_blocks_per_acc 4   2   1       column c = 2 R (block % k_blocks) + 2 row + group % 2

A packed word is two registers of the tensor cores' left operand: the codes at odd places, and
those at even ones (`expand.e2m1_to_e4m3`). x is stored in the same order: of a block, word 4 h + q
has the codes 8 q + 2 j + 1 - h. `quantize/blockdiag.py` and `quantize/in_kernel.py` write it.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu

from jaxqq._kernels.hopper.mainloops.group_sums import GROUPS
from jaxqq._kernels.hopper.ptx import wgmma
from jaxqq._kernels.hopper.ptx.expand import E4M3, e2m1_to_e4m3
from jaxqq._kernels.hopper.ptx.layouts import ONE_OF_FOUR, ROW_BYTES
from jaxqq._kernels.hopper.ptx.scales import blockdiag_scales, scale_words
from jaxqq._kernels.problem import Problem

UNIT = 2.0**12  # codes become e4m3 numbers of 2**-6 their value, of both operands: this undoes it
_WORDS = 16  # packed words of a row that are expanded at once, 128 codes


class BlockDiagonalX:
  """Steps of 128 of k, four blocks of 32."""

  interleaved = False
  by_warps = False

  @staticmethod
  def unit(problem: Problem) -> float:
    del problem
    return UNIT

  @staticmethod
  def add(cta: Any, sums: Any, stage: Any, scales: Any, rows: int, is_last: Any) -> Any:
    """sums + the product of one block of k."""
    del rows, is_last
    (sums,) = sums
    blockdiag = cta.plan.blockdiag
    k_blocks = blockdiag.k_blocks_per_acc
    words_of_scales = scale_words(cta.smem.scales.at[stage]) if scales is None else scales[0]
    parts = GROUPS // k_blocks
    for step in range(cta.plan.block.words // _WORDS):
      of_row, within = divmod(step * _WORDS, ROW_BYTES // 4)
      if within == 0:
        words = plgpu.load(cta.w_step(stage, of_row), layout=ONE_OF_FOUR, optimized=False)
      a = e2m1_to_e4m3(words[:, within : within + _WORDS])
      b = cta.x_step(stage, step)
      products = wgmma.finish(wgmma.begin(a, b, cta.kernel.x_transforms, E4M3, parts=parts))
      its = words_of_scales[2 * step : 2 * step + 2]
      for part, product in enumerate(products):
        first = (step * parts + part) * cta.plan.padded_m
        product = product * cta.x_scales(stage, 0, first)
        sums += product * blockdiag_scales(its, part, blockdiag.rows, k_blocks)
    return [sums]
