"""Packed codes beside x as it is in memory: expanded in its order, to exact floats of its dtype."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental import pallas as pl

from jaxqq._formats import Format
from jaxqq._kernels.hopper.mainloops.table import PART_K, packed_operand, packed_operands
from jaxqq._kernels.hopper.ptx import expand_in_order as expand
from jaxqq._kernels.hopper.ptx import wgmma
from jaxqq._kernels.hopper.ptx.layouts import whole_rows
from jaxqq._kernels.hopper.ptx.loads import load_words_of_rows
from jaxqq._kernels.hopper.ptx.scales import bytes_of_words
from jaxqq._kernels.problem import Problem


@dataclasses.dataclass(frozen=True)
class InOrderOperand:
  """64 rows and 64 of k, of a format's codes and scales, beside x of a dtype."""

  fmt: Format
  dtype: np.dtype  # of x, and of the operand
  interleaved = False
  part_k = PART_K

  @property
  def words(self) -> int:
    return PART_K // self.fmt.codes_per_word

  @property
  def groups(self) -> int:
    return PART_K // self.fmt.group_size

  @property
  def unit_exponent(self) -> int:
    return 0 if self.fmt.scale_is_power_of_two else expand.E2M1_UNIT

  def load_words(self, ref: Any, transforms: Any, part: int) -> Any:
    return load_words_of_rows(ref, transforms, part * self.words, self.words)

  def load_scales(self, ref: Any) -> Any:
    return plgpu.load(ref, layout=whole_rows(self.groups), optimized=False)

  def scales_of_word(self, word: Any) -> Any:
    return bytes_of_words([word], whole_rows(self.groups))[:, : self.groups]

  def expand(self, words: Any, scales: Any) -> Any:
    return expand.IN_ORDER[self.fmt.element](words, scales, self.dtype)


class InOrder:
  """Steps of 64 of k, of `skinny_gemm`: the next operand is made while one is multiplied."""

  interleaved = False
  by_warps = False

  @staticmethod
  def unit(problem: Problem) -> float:
    return 2.0 ** packed_operands()[packed_operand(problem)].unit_exponent

  @staticmethod
  def add(cta: Any, sums: Any, stage: Any, scales: Any, rows: int, is_last: Any) -> Any:
    """sums + the product of one block of k."""
    del rows, is_last
    (sums,) = sums
    packed = packed_operands()[packed_operand(cta.plan.problem)]
    kernel, pieces, promote = cta.kernel, cta.w_pieces(stage), cta.tiles.promote
    all_scales = None if scales is None else bytes_of_words(scales[0], whole_rows(packed.groups))
    count = cta.plan.block.words // packed.words

    def operand(step: int) -> Any:
      piece, column = divmod(step * packed.words, pieces[0].shape[1])
      words = load_words_of_rows(pieces[piece], kernel.w_transforms, column, packed.words)
      if all_scales is None:
        groups = pl.ds(step * packed.groups, packed.groups)
        return packed.expand(words, packed.load_scales(cta.smem.scales.at[stage, :, groups]))
      first = step * packed.groups
      return packed.expand(words, all_scales[:, first : first + packed.groups])

    a = operand(0)
    for step in range(count):
      b = cta.x_step(stage, step)
      before = None if promote else sums
      begun = wgmma.begin(a, b, kernel.x_transforms, packed.dtype, sums=before)
      following = operand(step + 1) if step + 1 < count else None
      (done,) = wgmma.finish(begun, a, following)
      sums, a = sums + done if promote else done, following
    return [sums]
