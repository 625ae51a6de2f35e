"""Packed e4m3 codes under power of two scales, rebased in fp8."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxqq._kernels.hopper.ptx import expand
from jaxqq._kernels.hopper.ptx.scales import scale_words


class RebasedE4M3:
  """64 rows and 128 of k: 32 words, and 4 bytes of `group_rescale` a row. x is in order."""

  dtype = jnp.dtype(jnp.float8_e4m3fn)
  interleaved = False
  part_k = 128
  words = 32
  groups = 4
  unit_exponent = 0

  @staticmethod
  def load_words(ref: Any, transforms: Any, part: int) -> Any:
    del transforms, part  # a piece has one
    return plgpu.load(ref, layout=expand.REBASED_WORDS, optimized=False)

  @staticmethod
  def load_scales(ref: Any) -> Any:
    return scale_words(ref)[0]

  @staticmethod
  def scales_of_word(word: Any) -> Any:
    return word

  @staticmethod
  def expand(words: Any, scales: Any) -> Any:
    return expand.rebase_e4m3(words, scales)
