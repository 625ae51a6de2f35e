"""Packed codes into the left operand of the tensor cores, without leaving the registers.

The tensor cores take 64 rows of w from registers: a thread holds, of rows r and r + 8, what its
lane q = 0..3 of the row's four has in each block of 32 bytes of k (the layouts WGMMA and
WGMMA_8BIT). The order along k is free, as long as x has the same. It is chosen so that each thread
loads the words it needs with few instructions, and needs few scales.

    e2m1_to_float16     thread q holds words 2q and 2q + 1 of 64 codes: one group of 16. A register
    (1.9 a code)        pairs every other code of half a word, so x is `layouts.interleaved`.
    rebase_e4m3         thread q holds words 4b + q: register b is a word, rebased to the largest
    (1.6 a code)        exponent of its row. x is in order.
    e2m1_to_e4m3        thread q holds words 4b + q: register b has a word's odd codes, b + 1 its
    (0.9 a code)        even ones, times 2**-6. Of each 32 elements, x has the odd ones first.

In brackets: instructions. Array operations cannot pair codes within a register, so these are
written on MLIR values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ONE_OF_FOUR, ROW, ROWS, interleaved, layout_of
from jaxqq._kernels.hopper.ptx.registers import (
  asm,
  constant,
  operand_array,
  word_asm,
)

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def left_operand(body: Any, args: tuple[Any, ...], layouts: tuple[Any, ...], dtype: Any) -> Any:
  """(64, 128 bytes) in the layout of a left operand, by `body` on MLIR values."""
  is_byte = jnp.dtype(dtype).itemsize == 1
  columns = 128 if is_byte else 64
  layout = plgpu.Layout.WGMMA_8BIT if is_byte else plgpu.Layout.WGMMA

  @plgpu.inline_mgpu(
    arg_types=layouts, return_type=plgpu.ShapeDtypeStruct((ROWS, columns), dtype, layout=layout)
  )
  def in_registers(ctx: Any, *args: Any) -> Any:
    del ctx
    return operand_array(body(*args), columns, dtype, layout)

  return in_registers(*args)


# e2m1 to float16


def e2m1_to_float16(words: Any, scales: Any) -> Any:
  """Words (64, 8) in the layout WGMMA times 2**-6 and scales (64, 4), e4m3: float16 (64, 64)."""
  dtype = jnp.dtype(jnp.float16)
  if interpreting():
    values = e2m1_as_e4m3(codes_of_words(words, 4)).reshape(ROWS, scales.shape[1], -1)
    factors = lax.bitcast_convert_type(scales, E4M3).astype(jnp.float32)
    values = values.astype(jnp.float32) * factors[..., None]
    return interleaved(values.reshape(ROWS, -1)).astype(dtype)
  return left_operand(_e2m1_to_float16, (words, scales), (plgpu.Layout.WGMMA, ONE_OF_FOUR), dtype)


def _e2m1_to_float16(words: Any, scales: Any) -> list[Any]:
  """Register (h, w, o), half: of word w's half h the codes o and 2 + o, times the group's scale."""
  registers: list[Any] = [None] * 16
  of_both_rows = [vector.extract(s, [], [0]) for s in scales.registers.flat]
  i32 = ir.IntegerType.get_signless(32)
  factors = word_asm(
    """{
      .reg .b32 both;
      .reg .b16 bytes;
      prmt.b32 both, $1, $2, 0x0040;
      cvt.u16.u32 bytes, both;
      cvt.rn.f16x2.e4m3x2 $0, bytes;
    }""",
    *(arith.extui(i32, scale) for scale in of_both_rows),
  )
  for half in range(2):
    factor = Factor(factors, ("low", "high")[half])
    for w in range(2):
      word = vector.extract(words.registers.flat[half], [], [w])
      for odd, numbers in zip((1, 0), _e2m1_word_to_e4m3(word), strict=True):
        for h in range(2):
          registers[2 * (4 * h + 2 * w + odd) + half] = _e4m3_pair(numbers, h, factor)
  return registers


@dataclasses.dataclass(frozen=True)
class Factor:
  """What codes are multiplied by: one of two floats in a register."""

  pair: Any
  half: str  # low or high

  def used_by(self, text: str, operand: str) -> str:
    """Assembly in which `factor` is that float twice; an instruction that takes it can do so."""
    return f"""{{
    .reg .b16 low, high;
    .reg .b32 factor;
    mov.b32 {{low, high}}, {operand};
    mov.b32 factor, {{{self.half}, {self.half}}};{text}
  }}"""


def _e4m3_pair(word: Any, half: int, factor: Factor) -> Any:
  """Two e4m3 numbers of a word as float16, times a factor."""
  text = f"""
    .reg .b16 first, second;
    .reg .b32 pair;
    mov.b32 {{first, second}}, $1;
    cvt.rn.f16x2.e4m3x2 pair, {("first", "second")[half]};
    mul.rn.f16x2 $0, pair, factor;"""
  return word_asm(factor.used_by(text, "$2"), word, factor.pair)


# e4m3 to e4m3


REBASED_WORDS = layout_of(4, 1, (-3, -2))


def rebase_e4m3(words: Any, rescale: Any) -> Any:
  """Words (64, 32) times powers of two, four `rescale_byte` in a word (64,): e4m3 (64, 128).

  In float16 the products are exact, or so small that they become zero; then they are rounded to
  nearest even. NaN stays NaN.
  """
  if interpreting():
    bits = rescale[:, None] >> (lax.broadcasted_iota(jnp.uint32, (1, 4), 1) * np.uint32(8))
    bits = (bits & np.uint32(0x3F)) << np.uint32(8) | bits & np.uint32(0xC0)
    powers = lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)
    values = lax.bitcast_convert_type(codes_of_words(words, 8).astype(jnp.uint8), E4M3)
    values = values.reshape(ROWS, 4, 32).astype(jnp.float16) * powers[..., None]
    return values.astype(E4M3).reshape(ROWS, 128)
  return left_operand(_rebase_e4m3, (words, rescale), (REBASED_WORDS, ROW), E4M3)


def _rebase_e4m3(words: Any, rescale: Any) -> list[Any]:
  """Register (b, half): a word of four codes, times their group's power of two as float16."""
  out = []
  parts = []  # of the bytes: float16's upper byte, and the two bits of its lower one
  for half in range(2):
    word = vector.extract(rescale.registers.flat[half], [], [0])
    parts.append([arith.andi(word, constant(mask)) for mask in (0x3F3F3F3F, 0xC0C0C0C0)])
  for b in range(8):
    for half in range(2):
      word = vector.extract(words.registers.flat[2 * b + half], [], [0])
      group = b // 2  # 8 words each, of 4 a register
      selector = hex(0x0404 + group * 0x1111)  # twice: a lower byte, then its upper one
      power = word_asm(f"prmt.b32 $0, $1, $2, {selector};", *parts[half])
      text = """{
        .reg .b16 low, high;
        .reg .b32 a, b;
        mov.b32 {low, high}, $1;
        cvt.rn.f16x2.e4m3x2 a, low;
        cvt.rn.f16x2.e4m3x2 b, high;
        mul.rn.f16x2 a, a, $2;
        mul.rn.f16x2 b, b, $2;
        cvt.rn.satfinite.e4m3x2.f16x2 low, a;
        cvt.rn.satfinite.e4m3x2.f16x2 high, b;
        mov.b32 $0, {low, high};
      }"""
      out.append(asm(text, [word, power], "=r,r,r"))
  return out


# e2m1 to e4m3


def e2m1_to_e4m3(words: Any) -> Any:
  """Words (64, 16), ONE_OF_FOUR: e4m3 (64, 128), of 2**-6 their value."""
  if interpreting():
    numbers = e2m1_as_e4m3(codes_of_words(words, 4))
    # block, q, j, odd  ->  block, h, q, j
    numbers = numbers.reshape(ROWS, 4, 4, 4, 2)[..., ::-1]
    return numbers.transpose(0, 1, 4, 2, 3).reshape(ROWS, 128)
  return left_operand(_e2m1_to_e4m3, (words,), (ONE_OF_FOUR,), E4M3)


def _e2m1_to_e4m3(words: Any) -> list[Any]:
  registers: list[Any] = [None] * 16
  for i, register in enumerate(words.registers.flat):  # block, rows r and r + 8
    word = vector.extract(register, [], [0])
    block, half = divmod(i, 2)
    odd, even = _e2m1_word_to_e4m3(word)
    registers[4 * block + half], registers[4 * block + 2 + half] = odd, even
  return registers


def _e2m1_word_to_e4m3(word: Any) -> tuple[Any, Any]:
  """The odd codes of a word, and the even ones: four e4m3 numbers each, of 2**-6 their value."""
  odd, even = (
    word_asm(
      f"""{{
        .reg .b32 high, low;
        {"mov.b32 high, $1" if h == 0 else "shl.b32 high, $1, 4"};
        {"shr.b32 low, $1, 2" if h == 0 else "shl.b32 low, $1, 2"};
        and.b32 low, low, 0x1C1C1C1C;
        lop3.b32 $0, high, 0x80808080, low, 0xEA;
      }}""",
      word,
    )
    for h in range(2)
  )
  return odd, even


# For the interpreter


def codes_of_words(words: Any, bits: int) -> Any:
  """uint32 (64, codes), in order."""
  shifts = lax.broadcasted_iota(jnp.uint32, (1, 1, 32 // bits), 2) * np.uint32(bits)
  codes = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
  return codes.reshape(ROWS, -1)


def e2m1_as_e4m3(codes: Any) -> Any:
  """Of 2**-6 their value."""
  numbers = ((codes & np.uint32(8)) << np.uint32(4)) | ((codes & np.uint32(7)) << np.uint32(2))
  return lax.bitcast_convert_type(numbers.astype(jnp.uint8), E4M3)
