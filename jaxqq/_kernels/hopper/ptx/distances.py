"""Power of two scales, four bytes in a word: the largest, and what rebases to it.

Byte by byte as int32 this is ten instructions a scale, four times as many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.registers import array, constant, word_asm

WORD = 4  # scales


def largest(scales: jax.Array, layout: Any) -> jax.Array:
  """int32 (...): the largest of each thread's neighbours.

  Args:
    scales: uint8; if the last axis is a multiple of 4, by words.
    layout: of it; a thread has the last axis.
  """
  if not _by_words(scales):
    return jnp.max(scales.astype(jnp.int32), axis=-1)
  reduced = layout.reduce((scales.ndim - 1,))
  result = plgpu.ShapeDtypeStruct(scales.shape[:-1], np.dtype(np.int32), layout=reduced)

  @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
  def in_registers(ctx: Any, scales: Any) -> Any:
    del ctx
    found = []
    for register in scales.registers.flat:
      pair = constant(0)
      for word in _words(register):
        pair = word_asm(
          """{
            .reg .b32 even, odd;
            and.b32 even, $2, 0x00FF00FF;
            shr.b32 odd, $2, 8;
            and.b32 odd, odd, 0x00FF00FF;
            max.u16x2 odd, odd, even;
            max.u16x2 $0, odd, $1;
          }""",
          pair,
          word,
        )
      ends = arith.andi(pair, constant(0xFFFF)), arith.shrui(pair, constant(16))
      found.append(_vector_of([arith.maxui(*ends)]))
    return array(found, result.shape, reduced, True)

  return in_registers(scales)


def rescale_bytes(
  scales: jax.Array, highest: jax.Array, layout: Any, rescale_byte: Callable[[Any], Any]
) -> jax.Array:
  """uint8 as scales: `group_rescale.rescale_byte` of how far each is below its row's highest one.

  Args:
    scales, layout: as of `largest`.
    highest: int32 (rows,), no less than any of a row's.
    rescale_byte: the definition, of int32: what a scale becomes that is not in a word.
  """
  if not _by_words(scales):
    scales = scales.astype(jnp.int32)
    distances = lax.broadcast_in_dim(highest, scales.shape, (0,)) - scales
    return rescale_byte(distances).astype(jnp.uint8)
  of_threads = lax.broadcast_in_dim(highest, scales.shape[:-1], (0,))
  reduced = layout.reduce((scales.ndim - 1,))
  result = plgpu.ShapeDtypeStruct(scales.shape, np.dtype(np.uint8), layout=layout)

  @plgpu.inline_mgpu(arg_types=(layout, reduced), return_type=result)
  def in_registers(ctx: Any, scales: Any, highest: Any) -> Any:
    del ctx
    found = []
    for register, of_row in zip(scales.registers.flat, highest.registers.flat, strict=True):
      four = arith.muli(vector.extract(of_row, [], [0]), constant(0x01010101))
      words = [word_asm(_RESCALE, word, four) for word in _words(register)]
      found.append(vector.bitcast(ir.VectorType(register.type), _vector_of(words)))
    return array(found, scales.shape, layout, False)

  return in_registers(scales, of_threads)


def _by_words(scales: jax.Array) -> bool:
  return scales.shape[-1] % WORD == 0 and not interpreting()


def _words(register: Any) -> list[Any]:
  """Of a vector of bytes."""
  count = ir.VectorType(register.type).shape[0] // WORD
  words = vector.bitcast(_vector_type(count), register)
  return [vector.extract(words, [], [i]) for i in range(count)]


def _vector_of(words: list[Any]) -> Any:
  return vector.from_elements(_vector_type(len(words)), words)


def _vector_type(count: int) -> Any:
  return ir.VectorType.get((count,), ir.IntegerType.get_signless(32))


# Up to a distance of 14, a float16 power of two has 4 * (15 - distance) as its upper byte, and 0 as
# the lower one. Further on it is subnormal, and from 19 on no code has it.
_RESCALE = """{
  .reg .b32 distance, far, result, byte, bits, shift;
  .reg .pred is_near, is_normal;
  sub.u32 distance, $2, $1;
  add.u32 far, distance, 0x71717171;
  or.b32 far, far, distance;
  and.b32 far, far, 0x80808080;
  setp.eq.u32 is_near, far, 0;
  shl.b32 result, distance, 2;
  sub.u32 result, 0x3C3C3C3C, result;
  @is_near bra DONE;
  BYTES
  DONE:
  mov.b32 $0, result;
}""".replace(
  "BYTES",
  "\n".join(
    f"""
  bfe.u32 byte, distance, {8 * i}, 8;
  sub.s32 shift, byte, 14;
  max.s32 shift, shift, 0;
  min.s32 shift, shift, 11;
  shr.u32 bits, 0x400, shift;
  sub.s32 shift, 15, byte;
  shl.b32 shift, shift, 10;
  setp.lt.u32 is_normal, byte, 15;
  selp.b32 bits, shift, bits, is_normal;
  shr.u32 byte, bits, 8;
  and.b32 bits, bits, 0xC0;
  or.b32 byte, byte, bits;
  bfi.b32 result, byte, result, {8 * i}, 8;"""
    for i in range(WORD)
  ),
)
