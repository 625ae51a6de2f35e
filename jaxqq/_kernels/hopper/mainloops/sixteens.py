"""skinny_gemm by `mma.sync`: packed e2m1 codes beside x in the order of memory, of few rows.

Two operands of 64 rows of w may share what is loaded of x.

Of every 8 rows, the threads of a warp have 0, 2, 4, 6, 1, 3, 5, 7 (`layouts.even_rows_first`). The
arrays are labelled WGMMA all the same, until the sums are stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper.ptx import expand_sixteens as expand
from jaxqq._kernels.hopper.ptx import mma
from jaxqq._kernels.hopper.ptx.expand_in_order import E2M1_UNIT
from jaxqq._kernels.hopper.ptx.layouts import ROWS
from jaxqq._kernels.hopper.ptx.scales import scale_words_of_even_rows
from jaxqq._kernels.hopper.tiles import cdiv
from jaxqq._kernels.problem import Problem


class Sixteens:
  """Two steps of 64 of k at a time."""

  interleaved = False
  by_warps = True

  @staticmethod
  def unit(problem: Problem) -> float:
    return 2.0 ** (0 if problem.fmt.scale_is_power_of_two else E2M1_UNIT)

  @staticmethod
  def add(cta: Any, sums: Any, stage: Any, scales: Any, rows: int, is_last: Any) -> Any:
    """sums + the product of one block of k."""
    dtype, of_two = cta.kernel.x_dtype, expand.STEPS * expand.STEP_WORDS
    scales_of_two = expand.STEPS * expand.STEP_K // cta.plan.block.group_size // 4  # 4 in a word
    transforms, promote = cta.kernel.x_transforms, cta.tiles.promote

    def operands(half: int) -> Callable[[int], list[Any]]:
      refs = cta.w_pieces(stage, half)
      pieces = [plgpu.load(ref, layout=expand.WORDS, optimized=False) for ref in refs]
      if scales is None:
        own = scale_words_of_even_rows(cta.smem.scales.at[stage, pl.ds(half * ROWS, ROWS)])
      else:
        own = scales[half]

      def of_two_steps(i: int) -> list[Any]:
        piece, column = divmod(i * of_two, pieces[0].shape[1])
        words = pieces[piece][:, column : column + of_two]
        its = own[i * scales_of_two : (i + 1) * scales_of_two]
        return expand.e2m1_of_sixteens(words, its, dtype)

      return of_two_steps

    halves = [operands(half) for half in range(len(sums))]

    def add_steps(first: int, end: int, sums: list[Any]) -> list[Any]:
      for i in range(first, end):
        two_steps = [of_two_steps(i) for of_two_steps in halves]
        for j, of_halves in enumerate(zip(*two_steps, strict=True)):
          b = cta.x_step(stage, expand.STEPS * i + j, rows)
          before = sums
          if promote:
            before = [plgpu.layout_cast(jnp.zeros_like(s), plgpu.Layout.WGMMA) for s in sums]
          done = mma.add(before, list(of_halves), b, transforms)
          sums = [total + s for total, s in zip(sums, done, strict=True)] if promote else done
      return sums

    count = cta.plan.block.words // of_two
    of_last = cdiv(cta.plan.problem.k % cta.plan.block.k, expand.STEPS * expand.STEP_K) or count
    sums = add_steps(0, of_last, sums)
    if of_last < count:  # the others are zeros of k's last block
      others = functools.partial(add_steps, of_last, count)
      sums = lax.cond(is_last, lambda sums: sums, others, sums)
    return sums
