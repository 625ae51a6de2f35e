"""Packed e2m1 codes under e4m3 scales, expanded to exact float16."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxqq._kernels.hopper.ptx import expand
from jaxqq._kernels.hopper.ptx.layouts import ONE_OF_FOUR
from jaxqq._kernels.hopper.ptx.loads import load_pairs_of_rows
from jaxqq._kernels.hopper.ptx.scales import fourths_of_words

# Codes become e4m3 numbers of 2**-6 their value (their exponent field ends up on e4m3's lowest
# bits), and those float16. What is missing, the epilogue multiplies.
_CODES_EXPONENT = -6


class PackedE2M1:
  """64 rows and 64 of k: 8 words and 4 scales a row. x is interleaved (`ptx/expand.py`)."""

  dtype = jnp.dtype(jnp.float16)
  interleaved = True
  part_k = 64
  words = 8
  groups = 4
  unit_exponent = -_CODES_EXPONENT  # what the product misses

  @classmethod
  def load_words(cls, ref: Any, transforms: Any, part: int) -> Any:
    return load_pairs_of_rows(ref, transforms, part * cls.words)

  @staticmethod
  def load_scales(ref: Any) -> Any:
    """Of 64 rows, as they are stored: the load completes a step later."""
    return plgpu.load(ref, layout=ONE_OF_FOUR, optimized=False)

  @staticmethod
  def scales_of_word(word: Any) -> Any:
    return fourths_of_words([word])

  @staticmethod
  def expand(words: Any, scales: Any) -> Any:
    return expand.e2m1_to_float16(words, scales)
