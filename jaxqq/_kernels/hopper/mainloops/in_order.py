"""Packed codes beside x as it is in memory: expanded in its order, to exact floats of its dtype."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper.mainloops.table import packed_operand, packed_operands
from jaxqq._kernels.hopper.ptx import expand_in_order as expand
from jaxqq._kernels.hopper.ptx import wgmma
from jaxqq._kernels.hopper.ptx.layouts import whole_rows
from jaxqq._kernels.hopper.ptx.loads import load_words_of_rows
from jaxqq._kernels.hopper.ptx.scales import bytes_of_words


class _Operand:
  """64 rows and 64 of k a step."""

  dtype = jnp.dtype(jnp.bfloat16)
  interleaved = False
  step_k = 64
  unit_exponent = 0
  groups: int

  @staticmethod
  def load_words(ref: Any) -> Any:
    return plgpu.load(ref, layout=expand.WORDS, optimized=False)

  @classmethod
  def load_scales(cls, ref: Any) -> Any:
    return plgpu.load(ref, layout=whole_rows(cls.groups), optimized=False)


class _E2M1(_Operand):
  """8 words a row."""

  words = 8

  @classmethod
  def expand(cls, words: Any, scales: Any) -> Any:
    return expand.e2m1_in_order(words, scales, cls.dtype)


class InOrderNvfp4(_E2M1):
  """4 scales a row, beside bfloat16."""

  groups = 4
  unit_exponent = expand.E2M1_UNIT


class InOrderNvfp4Float16(InOrderNvfp4):
  """The same beside float16."""

  dtype = jnp.dtype(jnp.float16)


class InOrderMxfp4(_E2M1):
  """2 scales a row, beside bfloat16."""

  groups = 2


class InOrderMxfp8(_Operand):
  """16 words and 2 scales a row, beside bfloat16."""

  words = 16
  groups = 2

  @staticmethod
  def expand(words: Any, scales: Any) -> Any:
    return expand.e4m3_in_order(words, scales)


class InOrder:
  """Steps of 64 of k, of `skinny_gemm`: the next operand is made while one is multiplied."""

  @staticmethod
  def add(cta: Any, sums: Any, stage: Any, scales: Any, rows: int) -> Any:
    """sums + the product of one block of k."""
    del rows
    (sums,) = sums
    packed: Any = packed_operands()[packed_operand(cta.plan.problem)]
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
