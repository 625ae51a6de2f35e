"""Packed e2m1 codes into a left operand of `mma.py`, of which a thread has 16 neighbours along k.

Thread q = 0..3 of a row's four has k = 16 q to 16 q + 15 of each 64: it loads its own two words
alone, and x in the order of memory likewise. Register i of a row is elements 2 i and 2 i + 1.

With an e4m3 scale that is 2.5 instructions a code, with a power of two 3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir.dialects import arith, vector

from jaxqq._kernels.hopper.ptx.expand import Factor
from jaxqq._kernels.hopper.ptx.expand_in_order import (
  FIRST_BYTE,
  e2m1_pair,
  e2m1_values,
  e4m3_factors,
  powers_of_two,
  times_scales,
)
from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROW, ROWS, even_rows_first
from jaxqq._kernels.hopper.ptx.registers import constant, lane_of_row, operand_array, word_asm
from jaxqq._kernels.hopper.ptx.scales import bytes_of_words

STEP_K, STEP_WORDS = 64, 8
STEPS = 2  # that are expanded at once, and share what makes floats of scales
WORDS = even_rows_first(8, 2)  # a thread has words 2 q and 2 q + 1 of 8


def e2m1_of_sixteens(words: jax.Array, scales: list[jax.Array], dtype: Any) -> list[jax.Array]:
  """Two steps of 64 of k: code * scale, each (64, 64), under e4m3 scales times 2**-E2M1_UNIT.

  Args:
    words: uint32 (64, 16), in the layout WORDS.
    scales: of `scale_words_of_even_rows`: two words a row of e4m3 scales, of groups of 16; or one
      of powers of two, of groups of 32.
    dtype: float16, or bfloat16; of scales that are powers of two it has to be.
  """
  if interpreting():
    is_power = len(scales) == 1
    values = e2m1_values(words, is_power=is_power)
    count = 4 * len(scales) // STEPS
    all_scales = bytes_of_words(scales, None)
    return [
      times_scales(
        values[:, i * STEP_K : (i + 1) * STEP_K], all_scales[:, i * count : (i + 1) * count], dtype
      )
      for i in range(STEPS)
    ]
  layout = plgpu.Layout.WGMMA
  of_step = plgpu.ShapeDtypeStruct((ROWS, STEP_K), jnp.dtype(dtype), layout=layout)

  @plgpu.inline_mgpu(arg_types=(WORDS, *[ROW] * len(scales)), return_type=[of_step] * STEPS)
  def in_registers(ctx: Any, words: Any, *scales: Any) -> Any:
    del ctx
    steps = _expand(words, scales, jnp.dtype(dtype))
    return [operand_array(step, STEP_K, dtype, layout) for step in steps]

  return in_registers(words, *scales)


# On MLIR values


def _expand(words: Any, scales: Any, dtype: np.dtype) -> list[list[Any]]:
  """Of each step the registers (i, half): i of row r, then i of row r + 8."""
  vectors, is_power = words.registers.reshape(STEPS, 2), len(scales) == 1
  steps: list[list[Any]] = [[None] * 16 for _ in range(STEPS)]
  for half in range(2):
    factors = _factors([vector.extract(s.registers.flat[half], [], [0]) for s in scales], dtype)
    for step, place in enumerate(("low", "high")):
      row = [vector.extract(vectors[step, half], [], [j]) for j in range(2)]
      for i in range(8):
        selector, factor = constant(FIRST_BYTE + 0x1111 * (i % 4)), Factor(factors, place)
        register = e2m1_pair(row[i // 4], selector, factor, dtype, is_power=is_power)
        steps[step][2 * i + half] = register
  return steps


def _factors(scales: list[Any], dtype: np.dtype) -> Any:
  """Of a row's 16 in both steps, two floats in a register."""
  q = lane_of_row()
  if len(scales) == 2:  # byte q of either
    selector = arith.addi(arith.muli(q, constant(0x11)), constant(0x40))
    return e4m3_factors(word_asm("prmt.b32 $0, $1, $2, $3;", *scales, selector), dtype=dtype)
  # One of the first two, and one of the others.
  selector = arith.addi(arith.muli(arith.shrui(q, constant(1)), constant(0x11)), constant(0x20))
  return powers_of_two(word_asm("prmt.b32 $0, $1, 0, $2;", *scales, selector))
