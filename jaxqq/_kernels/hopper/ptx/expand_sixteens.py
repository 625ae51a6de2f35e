"""Packed e2m1 codes into a left operand of `mma.py`, of which a thread has 16 neighbours along k.

Thread q = 0..3 of a row's four has k = 16 q to 16 q + 15 of each 64: it loads its own two words
alone, and x in the order of memory likewise. Register i of a row is elements 2 i and 2 i + 1.

A code's exponent and mantissa become the lowest bits of a float's exponent and the highest of its
mantissa: that is its value times a power of two, subnormal or not. One `prmt` takes two neighbours
out of a word, below copies of their signs. With a scale that is 2.5 instructions a code.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith, vector

from jaxqq._kernels.hopper.ptx.expand import codes_of_words, e2m1_as_e4m3
from jaxqq._kernels.hopper.ptx.expand_in_order import (
  BFLOAT16_PAIR,
  E2M1_UNIT,
  Factor,
  e4m3_factors,
  powers_of_two,
  times_constant,
  times_scales,
)
from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROW, ROWS, even_rows_first
from jaxqq._kernels.hopper.ptx.registers import constant, operand_array, word_asm
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
    values = e2m1_as_e4m3(codes_of_words(words, 4)).astype(jnp.float32) * 2.0**6
    values = values if is_power else values * 2.0**-E2M1_UNIT
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


_PLACES = {"bfloat16": ("bf16x2", 2, 0x81C081C0), "float16": ("f16x2", 5, 0x8E008E00)}


def _expand(words: Any, scales: Any, dtype: np.dtype) -> list[list[Any]]:
  """Of each step the registers (i, half): i of row r, then i of row r + 8."""
  vectors, is_power = words.registers.reshape(STEPS, 2), len(scales) == 1
  steps: list[list[Any]] = [[None] * 16 for _ in range(STEPS)]
  for half in range(2):
    factors = _factors([vector.extract(s.registers.flat[half], [], [0]) for s in scales], dtype)
    for step, place in enumerate(("low", "high")):
      row = [vector.extract(vectors[step, half], [], [j]) for j in range(2)]
      for i in range(8):
        register = _pair(row[i // 4], i % 4, Factor(factors, place), dtype, is_power=is_power)
        steps[step][2 * i + half] = register
  return steps


def _factors(scales: list[Any], dtype: np.dtype) -> Any:
  """Of a row's 16 in both steps, two floats in a register."""
  q = arith.andi(mgpu.utils.thread_idx(), constant(3))
  if len(scales) == 2:  # byte q of either
    selector = arith.addi(arith.muli(q, constant(0x11)), constant(0x40))
    return e4m3_factors(word_asm("prmt.b32 $0, $1, $2, $3;", *scales, selector), dtype=dtype)
  # One of the first two, and one of the others.
  selector = arith.addi(arith.muli(arith.shrui(q, constant(1)), constant(0x11)), constant(0x20))
  return powers_of_two(word_asm("prmt.b32 $0, $1, 0, $2;", *scales, selector))


def _pair(word: Any, i: int, factor: Factor, dtype: np.dtype, *, is_power: bool) -> Any:
  """Codes 2 i and 2 i + 1 of a word as floats, times their group's scale."""
  kind, shift, mask = _PLACES[dtype.name]
  # Of the word four bits further up and of the word, byte i begins with a code. A selector of 8
  # more has its sign eight times.
  first, second = 4 + i, i
  selector = (8 + second) << 12 | second << 8 | (8 + first) << 4 | first
  to_value = times_constant("both", "bf16x2", BFLOAT16_PAIR[126]) if is_power else ""
  text = f"""
    .reg .b32 both, constant;
    shl.b32 both, $1, 4;
    prmt.b32 both, $1, both, {hex(selector)};
    shl.b32 both, both, {shift};
    and.b32 both, both, {hex(mask)};
    {to_value}
    mul.rn.{kind} $0, both, factor;"""
  return word_asm(factor.used_by(text, "$2"), word, factor.pair)
