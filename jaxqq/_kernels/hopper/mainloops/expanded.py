"""skinny_gemm: packed e2m1 codes, expanded in registers to exact float16, as x is."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu

from jaxqq._kernels.hopper.mainloops.packed_e2m1 import PackedE2M1
from jaxqq._kernels.hopper.ptx import wgmma
from jaxqq._kernels.hopper.ptx.scales import fourths_of_words
from jaxqq._kernels.problem import Problem


def add_step(cta: Any, sums: Any, a: Any, stage: Any, step: int) -> Any:
  """sums + the product of a, 64 of k in 16 bits in registers, and a step of a stage's x."""
  b = cta.x_step(stage, step)
  promote = cta.tiles.promote
  begun = wgmma.begin(
    a, b, cta.kernel.x_transforms, cta.kernel.x_dtype, sums=None if promote else sums
  )
  (done,) = wgmma.finish(begun)
  return sums + done if promote else done


class Expanded:
  """Steps of 64 of k."""

  interleaved = True
  by_warps = False

  @staticmethod
  def unit(problem: Problem) -> float:
    del problem
    return 2.0**PackedE2M1.unit_exponent

  @staticmethod
  def add(cta: Any, sums: Any, stage: Any, scales: Any, rows: int, is_last: Any) -> Any:
    """sums + the product of one block of k."""
    del rows, is_last
    (sums,) = sums
    packed = PackedE2M1
    layout = plgpu.Layout.WGMMA
    pieces = [plgpu.load(ref, layout=layout, optimized=False) for ref in cta.w_pieces(stage)]
    if scales is None:
      all_scales = packed.load_scales(cta.smem.scales.at[stage])
    else:
      all_scales = fourths_of_words(scales[0])
    for step in range(cta.plan.block.words // packed.words):
      groups = slice(step * packed.groups, (step + 1) * packed.groups)
      its = all_scales[:, groups]
      piece, column = divmod(step * packed.words, pieces[0].shape[1])
      words = pieces[piece][:, column : column + packed.words]
      sums = add_step(cta, sums, packed.expand(words, its), stage, step)
    return [sums]
