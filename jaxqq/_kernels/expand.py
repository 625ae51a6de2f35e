"""Packed codes into the left operand of Hopper's tensor cores, without leaving the registers.

The tensor cores take 64 rows of w_hat from registers: a thread holds, of rows r and r + 8, what
its lane q = 0..3 of the row's four has in each block of 32 bytes of k (the layouts WGMMA and
WGMMA_8BIT). The order along k is free, as long as x_hat has the same: it is chosen so that each
thread loads the words it needs with few instructions, and needs few scales.

    e2m1 to float16     thread q holds words 2q and 2q + 1 of 64 codes: one group of 16. Register i
    (2.6 a code)        pairs nibble i of both, so x_hat is interleaved: k = 8j + i at 8i + j.
    e4m3 to e4m3        thread q holds words 4b + q: register b is a word, moved down to the
    (1.6 a code)        largest exponent of its row. x_hat is in order.
    e4m3 to bfloat16    thread q holds words 4q to 4q + 3; x_hat is interleaved as for e2m1.

In brackets: instructions. Array operations cannot pair codes within a register, so the inner
functions are written on MLIR values; `twin` is the same in array operations, for the interpreter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxqq._kernels.tensor_cores import ROWS, constant, operand_array, packed_array


def layout_of(columns: int, length: int, lanes: tuple[Any, ...]) -> Any:
  """(64, columns): a warp has 16 rows, a thread vectors of rows r and r + 8."""
  return plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, columns), (16, columns), (8, columns), (length,))),
    warp_dims=(-7,),
    lane_dims=lanes,
    vector_dim=-1,
  )


_ROW = plgpu.Layout.WGMMA.reduce(1)  # (64,): the four lanes of a row hold the same


@dataclasses.dataclass(frozen=True)
class Expansion:
  """From which codes to which operand."""

  bits: int  # of a code
  group_size: int
  dtype: Any  # of the operand

  @property
  def step_k(self) -> int:
    """Elements of k a step: 128 bytes of the operand."""
    return 128 // int(jnp.dtype(self.dtype).itemsize)

  @property
  def words(self) -> int:
    """Packed words of a row and step."""
    return self.step_k * self.bits // 32

  @property
  def groups(self) -> int:
    return self.step_k // self.group_size

  @property
  def layout(self) -> Any:
    return plgpu.Layout.WGMMA_8BIT if self.step_k == 128 else plgpu.Layout.WGMMA

  @property
  def words_layout(self) -> Any:
    if self.bits == 4:
      return plgpu.Layout.WGMMA
    if self.step_k == 128:
      return layout_of(4, 1, (-3, -2))
    return layout_of(16, 4, (-3, -2))

  @property
  def unit(self) -> float:
    """What the product of expanded numbers is to be multiplied by."""
    return 2.0**self.unit_exponent

  @property
  def unit_exponent(self) -> int:
    return -(_E2M1_SHIFT + _E4M3_SHIFT) if self.bits == 4 else 0


# e2m1 codes become float16 numbers of 2**-14 their value (their exponent field lands on float16's
# lowest bits), and their e4m3 scales 2**7 times theirs. What is missing, the epilogue multiplies.
_E2M1_SHIFT, _E4M3_SHIFT = -14, 7

E2M1 = Expansion(4, 16, jnp.dtype(jnp.float16))
E4M3 = Expansion(8, 32, jnp.dtype(jnp.float8_e4m3fn))
E4M3_EXACT = Expansion(8, 32, jnp.dtype(jnp.bfloat16))


# Scales


def load_scales(ref: Any, expansion: Expansion, twin: bool) -> Any:
  """The scales of 64 rows and one step, as they are loaded: they stay in flight for a step."""
  if expansion.bits == 4:
    return plgpu.load(ref, layout=layout_of(4, 1, (-3, -2)), optimized=False)
  if expansion.step_k == 64:
    lanes = (-3, -2, plgpu.Replicated(2))
    return plgpu.load(ref, layout=layout_of(2, 1, lanes), optimized=False)
  return scale_words(ref, twin)[0]


def scale_words(ref: Any, twin: bool) -> list[Any]:
  """Scales (64, 4 * s) as s arrays (64,) of four in a word, the first in its lowest bits."""
  layout = plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, 4), (16, 4), (8, 4))),
    warp_dims=(-6,),
    lane_dims=(-2, plgpu.Replicated(4)),
    vector_dim=-1,
  )
  scales = plgpu.load(ref, layout=layout, optimized=False)
  count = scales.shape[1] // 4
  if twin:
    shifts = lax.broadcasted_iota(jnp.uint32, (1, 1, 4), 2) * np.uint32(8)
    scales = scales.astype(jnp.uint32).reshape(ROWS, count, 4)
    words = jnp.sum(scales << shifts, axis=2, dtype=jnp.uint32)
    return [words[:, i] for i in range(count)]
  word_type = plgpu.ShapeDtypeStruct((ROWS,), np.dtype(np.uint32), layout=_ROW)

  @plgpu.inline_mgpu(arg_types=(layout,), return_type=[word_type] * count)
  def as_words(ctx: Any, scales: Any) -> Any:
    # As bytes, the compiler takes them apart at once, and waits for them.
    del ctx
    word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    registers = scales.registers.reshape(count, -1)  # rows r and r + 8
    return [
      packed_array([vector.bitcast(word, v) for v in each], (ROWS,), _ROW) for each in registers
    ]

  return as_words(scales)


def factors(scales: Any, expansion: Expansion) -> tuple[Any, ...]:
  """What the words of a step are expanded with, from loaded scales."""
  if expansion.bits == 4:
    s = scales.astype(jnp.int32)
    magnitude = s & 0x7F
    bits = (magnitude << 7) | ((s & 0x80) << 8)  # 2**-8 of the scale, as float16
    value = lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)
    value = value * jnp.float16(2.0 ** (8 + _E4M3_SHIFT))
    return (jnp.where(magnitude == 0x7F, jnp.float16(np.nan), value),)
  if expansion.step_k == 64:
    s = scales.astype(jnp.int32)
    bits = jnp.where(s == 0, 1 << 22, s << 23)
    bits = jnp.where(s == 0xFF, 0x7FC00000, bits)
    return (lax.bitcast_convert_type(bits, jnp.float32),)
  return (scales,)


# Codes


def expand(words: Any, factors: tuple[Any, ...], expansion: Expansion) -> Any:
  """Words (64, words) and their factors to the operand (64, step_k), in registers."""
  if expansion.bits == 4:
    body: Callable[..., list[Any]] = _expand_e2m1
    layouts: tuple[Any, ...] = (layout_of(4, 1, (-3, -2)),)
  elif expansion.step_k == 64:
    body, layouts = _expand_e4m3_exactly, (layout_of(2, 1, (-3, -2, plgpu.Replicated(2))),)
  else:
    body, layouts = _expand_e4m3, (_ROW,)
  shape = (ROWS, expansion.step_k)

  @plgpu.inline_mgpu(
    arg_types=(expansion.words_layout, *layouts),
    return_type=plgpu.ShapeDtypeStruct(shape, expansion.dtype, layout=expansion.layout),
  )
  def in_registers(ctx: Any, words: Any, *factors: Any) -> Any:
    del ctx
    return operand_array(body(words, factors), shape[1], expansion.dtype, expansion.layout)

  return in_registers(words, *factors)


def _expand_e2m1(words: Any, factors: Any) -> list[Any]:
  """Register (i, half): nibble i of a row's two words, as float16 times the group's factor."""
  halves = []
  for half in range(2):
    pair = words.registers.flat[half]
    a, b = (vector.extract(pair, [], [j]) for j in range(2))
    factor = vector.extract(factors[0].registers.flat[half], [], [0])
    factor = _twice(factor)
    zipped = [
      word_asm("prmt.b32 $0, $1, $2, 0x5410;", a, b),
      word_asm("prmt.b32 $0, $1, $2, 0x7632;", a, b),
    ]
    halves.append([_e2m1_pair(zipped[i // 4], i % 4, factor) for i in range(8)])
  return [halves[half][i] for i in range(8) for half in range(2)]


def _e2m1_pair(word: Any, i: int, factor: Any) -> Any:
  """Nibble i of both half words: the sign to bit 15, the rest to float16's bits 11 to 9."""
  top = word if i == 3 else arith.shli(word, constant(12 - 4 * i))
  magnitude = arith.andi(arith.shrui(top, constant(3)), constant(0x0E000E00))
  value = arith.ori(arith.andi(top, constant(0x80008000)), magnitude)
  return word_asm("mul.rn.f16x2 $0, $1, $2;", value, factor)


def _expand_e4m3(words: Any, factors: Any) -> list[Any]:
  """Register (b, half): a word of four codes, times their group's power of two as float16.

  In float16 the products are exact, or so small that they become zero; then they are rounded to
  nearest even. NaN stays NaN. `lowered_scales.rebasing_byte` says what the bytes hold.
  """
  out = []
  downs = []
  for half in range(2):
    word = vector.extract(factors[0].registers.flat[half], [], [0])
    downs.append([arith.andi(word, constant(mask)) for mask in (0x3F3F3F3F, 0xC0C0C0C0)])
  for b in range(8):
    for half in range(2):
      word = vector.extract(words.registers.flat[2 * b + half], [], [0])
      group = b // 2  # 8 words each, of 4 a register
      selector = hex(0x0404 + group * 0x1111)  # twice: a lower byte, then its upper one
      down = word_asm(f"prmt.b32 $0, $1, $2, {selector};", *downs[half])
      asm = """{
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
      out.append(asm_of(asm, [word, down], "=r,r,r"))
  return out


def _expand_e4m3_exactly(words: Any, factors: Any) -> list[Any]:
  """Register (i, half): code i of a row's two units of 8, as bfloat16 times the group's factor."""
  halves = []
  for half in range(2):
    quad = words.registers.flat[half]
    w = [vector.extract(quad, [], [j]) for j in range(4)]
    factor = vector.extract(factors[0].registers.flat[half], [], [0])
    registers = []
    for i in range(8):
      asm = """{
        .reg .b16 codes, a, b;
        .reg .b32 pair;
        .reg .f32 fa, fb;
        prmt.b32 pair, $1, $2, SELECTOR;
        cvt.u16.u32 codes, pair;
        cvt.rn.f16x2.e4m3x2 pair, codes;
        mov.b32 {a, b}, pair;
        cvt.f32.f16 fa, a;
        cvt.f32.f16 fb, b;
        mul.rn.f32 fa, fa, $3;
        mul.rn.f32 fb, fb, $3;
        cvt.rn.bf16x2.f32 $0, fb, fa;
      }""".replace("SELECTOR", hex(i % 4 | (4 + i % 4) << 4))
      registers.append(asm_of(asm, [w[i // 4], w[2 + i // 4], factor], "=r,r,r,f"))
    halves.append(registers)
  return [halves[half][i] for i in range(8) for half in range(2)]


def word_asm(instruction: str, *operands: Any) -> Any:
  return asm_of(instruction, list(operands), ",".join(["=r"] + ["r"] * len(operands)))


def asm_of(asm: str, operands: list[Any], constraints: str) -> Any:
  """The 32 bit result of inline assembly."""
  return llvm.inline_asm(ir.IntegerType.get_signless(32), operands, asm, constraints)


def _twice(value: Any) -> Any:
  """A float16 in both halves of a register."""
  pair = vector.broadcast(ir.VectorType.get((2,), ir.F16Type.get()), value)
  word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
  return vector.extract(vector.bitcast(word, pair), [], [0])


def twin(words: Any, factors: tuple[Any, ...], expansion: Expansion) -> Any:
  """`expand` in array operations, each value computed on its own."""
  per_word = 32 // expansion.bits
  shifts = lax.broadcasted_iota(jnp.uint32, (1, 1, per_word), 2) * np.uint32(expansion.bits)
  codes = (words[..., None] >> shifts) & np.uint32((1 << expansion.bits) - 1)
  codes = codes.reshape(ROWS, expansion.groups, expansion.group_size)
  if expansion.step_k == 128:
    downs = factors[0][:, None] >> (lax.broadcasted_iota(jnp.uint32, (1, 4), 1) * np.uint32(8))
    downs = (downs & np.uint32(0x3F)) << np.uint32(8) | downs & np.uint32(0xC0)
    downs = lax.bitcast_convert_type(downs.astype(jnp.uint16), jnp.float16)
    values = lax.bitcast_convert_type(codes.astype(jnp.uint8), expansion.dtype)
    values = values.astype(jnp.float16) * downs[..., None]
    return values.astype(expansion.dtype).reshape(ROWS, expansion.step_k)
  if expansion.bits == 4:
    bits = ((codes & np.uint32(8)) << np.uint32(12)) | ((codes & np.uint32(7)) << np.uint32(9))
    values = lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)
  else:
    values = lax.bitcast_convert_type(codes.astype(jnp.uint8), jnp.float8_e4m3fn)
  values = values.astype(jnp.float32) * factors[0].astype(jnp.float32)[..., None]
  values = values.reshape(ROWS, 8, 8).swapaxes(1, 2)
  return values.reshape(ROWS, expansion.step_k).astype(expansion.dtype)
