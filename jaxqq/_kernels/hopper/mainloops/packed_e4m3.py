"""Packed e4m3 codes under power of two scales: rebased in fp8, or expanded to exact bfloat16."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxqq._kernels.hopper.ptx import expand
from jaxqq._kernels.hopper.ptx.scales import scale_words


class RebasedE4M3:
  """64 rows and 128 of k a step: 32 words, and 4 bytes of `group_rescale` a row. x is in order."""

  dtype = jnp.dtype(jnp.float8_e4m3fn)
  step_k = 128
  words = 32
  groups = 4
  unit_exponent = 0

  @staticmethod
  def load_words(ref: Any) -> Any:
    return plgpu.load(ref, layout=expand.REBASED_WORDS, optimized=False)

  @staticmethod
  def load_scales(ref: Any) -> Any:
    return scale_words(ref)[0]

  @staticmethod
  def expand(words: Any, scales: Any) -> Any:
    return expand.rebase_e4m3(words, scales)


class ExactE4M3:
  """64 rows and 64 of k a step: 16 words and 2 scales a row. x is interleaved."""

  dtype = jnp.dtype(jnp.bfloat16)
  step_k = 64
  words = 16
  groups = 2
  unit_exponent = 0

  @staticmethod
  def load_words(ref: Any) -> Any:
    return plgpu.load(ref, layout=expand.E4M3_WORDS, optimized=False)

  @staticmethod
  def load_scales(ref: Any) -> Any:
    return plgpu.load(ref, layout=expand.E4M3_FACTORS, optimized=False)

  @staticmethod
  def expand(words: Any, scales: Any) -> Any:
    s = scales.astype(jnp.int32)
    bits = jnp.where(s == 0, 1 << 22, s << 23)
    bits = jnp.where(s == 0xFF, 0x7FC00000, bits)
    return expand.e4m3_to_bfloat16(words, lax.bitcast_convert_type(bits, jnp.float32))
