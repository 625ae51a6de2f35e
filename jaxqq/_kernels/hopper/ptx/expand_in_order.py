"""Packed codes into a left operand whose order along k is that of memory, beside x as it is.

As in `expand.py` a thread holds, of rows r and r + 8, what its lane q = 0..3 of the row's four has:
elements 2q and 2q + 1 of every 8 along k. Where x may not be put in another order, the four threads
of a row all hold its words, and each takes its two codes of every 8:

    e2m1_in_order       byte q of every word.
    (3.1 a code)
    e4m3_in_order       bytes 2q and 2q + 1 of every two words.
    (3.3 a code)

In brackets: instructions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from jaxqq._kernels.hopper.ptx.expand import (
  E4M3,
  Factor,
  codes_of_words,
  e2m1_as_e4m3,
  left_operand,
)
from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROWS, whole_rows
from jaxqq._kernels.hopper.ptx.registers import constant, lane_of_row, word_asm

E2M1_UNIT = 7  # `e2m1_in_order` and `e2m1_of_sixteens` leave out 2**7 under e4m3 scales
WORDS = whole_rows(4)


def e2m1_in_order(words: Any, scales: Any, dtype: Any) -> Any:
  """Words (64, 8), WORDS, times bytes (64, 4) of e4m3 scales or (64, 2) of powers of two.

  Args:
    words, scales: the latter in the layout `whole_rows` of its columns.
    dtype: float16, or bfloat16; of scales that are powers of two it has to be.

  Returns:
    dtype (64, 64): code * scale, under e4m3 scales times 2**-7, so that scale and code take one
    multiplication.
  """
  is_power = scales.shape[1] == 2
  if interpreting():
    return times_scales(e2m1_values(words, is_power=is_power), scales, dtype)
  body = functools.partial(_e2m1_in_order, is_power=is_power, dtype=jnp.dtype(dtype))
  return left_operand(body, (words, scales), (WORDS, whole_rows(scales.shape[1])), dtype)


def e4m3_in_order(words: Any, scales: Any, dtype: Any) -> Any:
  """Words (64, 16), WORDS, times powers of two, bytes (64, 2), `whole_rows`: bfloat16 (64, 64)."""
  assert dtype == jnp.bfloat16
  if interpreting():
    values = lax.bitcast_convert_type(codes_of_words(words, 8).astype(jnp.uint8), E4M3)
    return times_scales(values.astype(jnp.float32), scales, jnp.bfloat16)
  layouts = WORDS, whole_rows(2)
  return left_operand(_e4m3_in_order, (words, scales), layouts, jnp.bfloat16)


# By the element.
IN_ORDER: dict[np.dtype, Callable[[Any, Any, Any], Any]] = {
  np.dtype(ml_dtypes.float4_e2m1fn): e2m1_in_order,
  E4M3: e4m3_in_order,
}


# On MLIR values


_PLACES = {  # of a code in a float: kind of a pair of them, shift and mask
  "bfloat16": ("bf16x2", 2, 0x81C081C0),
  "float16": ("f16x2", 5, 0x8E008E00),
}
# What takes byte 0, with 0x1111 more byte 1, and so on, of the word four bits further up and of the
# word: the byte, which begins with a code, and above it eight times its sign.
FIRST_BYTE = 0x80C4


def e2m1_pair(word: Any, selector: Any, factor: Factor, dtype: Any, *, is_power: bool) -> Any:
  """The two codes of a byte of a word as floats, times their group's scale.

  A code's exponent and mantissa become the lowest bits of a float's exponent and the highest of its
  mantissa: that is the code's value times the least exponent, subnormal or not.
  """
  kind, shift, mask = _PLACES[dtype.name]
  to_value = times_constant("both", "bf16x2", BFLOAT16_PAIR[126]) if is_power else ""
  text = f"""
    .reg .b32 both, constant;
    shl.b32 both, $1, 4;
    prmt.b32 both, $1, both, $2;
    shl.b32 both, both, {shift};
    and.b32 both, both, {hex(mask)};
    {to_value}
    mul.rn.{kind} $0, both, factor;"""
  return word_asm(factor.used_by(text, "$3"), word, selector, factor.pair)


def _e2m1_in_order(words: Any, scales: Any, *, is_power: bool, dtype: Any) -> list[Any]:
  """Register (i, half): byte q of a row's word i, as two floats times the group's scale."""
  selector = arith.addi(arith.muli(lane_of_row(), constant(0x1111)), constant(FIRST_BYTE))

  def pair(row: list[Any], i: int, factor: Factor) -> Any:
    return e2m1_pair(row[i], selector, factor, dtype, is_power=is_power)

  factors = powers_of_two if is_power else functools.partial(e4m3_factors, dtype=dtype)
  return _registers(words, scales, factors, pair)


def _e4m3_in_order(words: Any, scales: Any) -> list[Any]:
  """Register (i, half): two codes of a row's words 2i and 2i + 1, times the group's scale."""
  selector = arith.addi(arith.muli(lane_of_row(), constant(0x22)), constant(0x10))
  text = """
    .reg .b16 codes, a, b;
    .reg .b32 both;
    .reg .f32 fa, fb;
    prmt.b32 both, $1, $2, $3;
    cvt.u16.u32 codes, both;
    cvt.rn.f16x2.e4m3x2 both, codes;
    mov.b32 {a, b}, both;
    cvt.f32.f16 fa, a;
    cvt.f32.f16 fb, b;
    cvt.rn.bf16x2.f32 both, fb, fa;
    mul.rn.bf16x2 $0, both, factor;"""

  def pair(row: list[Any], i: int, factor: Factor) -> Any:
    operands = row[2 * i], row[2 * i + 1], selector, factor.pair
    return word_asm(factor.used_by(text, "$4"), *operands)

  return _registers(words, scales, powers_of_two, pair)


def _registers(
  words: Any,
  scales: Any,
  factors_of: Callable[[Any], Any],
  pair: Callable[[list[Any], int, Factor], Any],
) -> list[Any]:
  """Those of the operand: for each 8 of k, a pair of rows r and r + 8.

  Args:
    words, scales: as of `e2m1_in_order`.
    factors_of: two floats in a register, of a word whose lower half has two scales.
    pair: of a row's words, which 8 of k, and their group's factor.
  """
  vectors = words.registers.reshape(-1, 2)  # four words each, of rows r and r + 8
  halves = []
  for half in range(2):
    row = [vector.extract(v, [], [j]) for v in vectors[:, half] for j in range(4)]
    packed = scales.registers.flat[half]
    groups = ir.VectorType(packed.type).shape[0]
    integer = ir.IntegerType.get_signless(8 * groups)
    packed = vector.extract(vector.bitcast(ir.VectorType.get((1,), integer), packed), [], [0])
    if groups == 2:
      twos = [arith.extui(ir.IntegerType.get_signless(32), packed)]
    else:
      twos = [packed, arith.shrui(packed, constant(16))]
    factors = [Factor(two, each) for two in map(factors_of, twos) for each in ("low", "high")]
    halves.append([pair(row, i, factors[i * groups // 8]) for i in range(8)])
  return [halves[half][i] for i in range(8) for half in range(2)]


BFLOAT16_PAIR = {e: (e + 127) << 7 | (e + 127) << 23 for e in (119, 126)}  # of 2**e


def times_constant(register: str, kind: str, pair: int) -> str:
  return f"mov.b32 constant, {hex(pair)}; mul.rn.{kind} {register}, {register}, constant;"


def powers_of_two(two: Any) -> Any:
  """Bytes s as 2**(s - 127) in bfloat16; of 0xFF, which is infinite at first, NaN."""
  text = """{
    .reg .b32 pair, constant;
    prmt.b32 pair, $1, 0, 0x1404;
    shr.b32 pair, pair, 1;
    mov.b32 constant, 0x00400040;
    max.u16x2 pair, pair, constant;
    mov.b32 constant, 0;
    fma.rn.bf16x2 $0, pair, constant, pair;
  }"""
  return word_asm(text, two)


def e4m3_factors(two: Any, *, dtype: Any) -> Any:
  """e4m3 scales as floats, times what the codes lack but for 2**E2M1_UNIT."""
  if dtype == jnp.float16:  # 2**7 of 2**14
    convert = times_constant("pair", "f16x2", 0x58005800)
  else:  # 2**119 of 2**126
    convert = f"""
      mov.b32 {{a, b}}, pair;
      cvt.f32.f16 fa, a;
      cvt.f32.f16 fb, b;
      cvt.rn.bf16x2.f32 pair, fb, fa;
      {times_constant("pair", "bf16x2", BFLOAT16_PAIR[119])}"""
  text = f"""{{
    .reg .b16 codes, a, b;
    .reg .b32 pair, constant;
    .reg .f32 fa, fb;
    cvt.u16.u32 codes, $1;
    cvt.rn.f16x2.e4m3x2 pair, codes;
    {convert}
    mov.b32 $0, pair;
  }}"""
  return word_asm(text, two)


# For the interpreter


def e2m1_values(words: Any, *, is_power: bool) -> Any:
  """float32, in order; under e4m3 scales times 2**-E2M1_UNIT."""
  values = e2m1_as_e4m3(codes_of_words(words, 4)).astype(jnp.float32) * 2.0**6
  return values if is_power else values * 2.0**-E2M1_UNIT


def times_scales(values: Any, scales: Any, dtype: Any) -> Any:
  """Values (64, 64), in order, times the scales of their groups."""
  if scales.shape[1] == 2:
    s = scales.astype(jnp.int32)
    bits = jnp.where(s == 0xFF, 0x7FC00000, jnp.maximum(s << 23, 1 << 22))
    factors = lax.bitcast_convert_type(bits, jnp.float32)
  else:
    factors = lax.bitcast_convert_type(scales, E4M3).astype(jnp.float32)
  grouped = values.reshape(ROWS, scales.shape[1], -1) * factors[..., None]
  return grouped.reshape(ROWS, -1).astype(dtype)
