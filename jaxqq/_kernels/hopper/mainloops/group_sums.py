"""skinny_gemm: mxfp8, whose codes go to the fp8 tensor cores as they are.

An instruction's 32 elements of k are one group. Its sums are multiplied by the group's two scales
in float32, and then added up.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxqq._kernels.hopper import epilogue
from jaxqq._kernels.hopper.ptx import wgmma
from jaxqq._kernels.hopper.ptx.scales import scale_words
from jaxqq._kernels.problem import Problem

GROUPS = wgmma.STEP_BYTES // 32  # in a step
_E4M3 = jnp.dtype(jnp.float8_e4m3fn)


class GroupSums:
  """Steps of 128 of k, four groups."""

  interleaved = False
  by_warps = False

  @staticmethod
  def unit(problem: Problem) -> float:
    del problem
    return 1.0

  @staticmethod
  def add(cta: Any, sums: Any, stage: Any, scales: Any, rows: int, is_last: Any) -> Any:
    """sums + the product of one block of k."""
    del rows, is_last
    (sums,) = sums
    row_words = scale_words(cta.smem.scales.at[stage]) if scales is None else scales[0]
    for step, words_of_step in enumerate(row_words):
      a, b = cta.w_step(stage, step), cta.x_step(stage, step)
      products = wgmma.finish(
        wgmma.begin(
          a,
          b,
          cta.kernel.x_transforms,
          _E4M3,
          parts=GROUPS,
          a_transforms=cta.kernel.w_transforms,
        )
      )
      of_rows = epilogue.factors_of_powers(words_of_step)
      for i, product in enumerate(products):
        first, second = (lax.broadcast_in_dim(f[i], product.shape, (0,)) for f in of_rows)
        product = product * first * cta.x_scales(stage, step * GROUPS + i, 0)
        sums += product * second
    return [sums]
