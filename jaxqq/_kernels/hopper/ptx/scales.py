"""Bytes of scales in registers: four in a word, and as float32 beside the sums of their groups."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ONE_OF_FOUR, ROW, ROWS, WARP, WARPS, whole_rows
from jaxqq._kernels.hopper.ptx.loads import load_words
from jaxqq._kernels.hopper.ptx.registers import (
  array,
  constant,
  lane_of_row,
  packed_array,
  smem_address,
)


def scale_words(ref: Any) -> list[Any]:
  """Scales (64, 4 * s) as s arrays (64,) of four in a word, the first in its lowest bits."""
  layout = whole_rows(4)
  scales = plgpu.load(ref, layout=layout, optimized=False)
  count = scales.shape[1] // 4
  if interpreting():
    shifts = lax.broadcasted_iota(jnp.uint32, (1, 1, 4), 2) * np.uint32(8)
    scales = scales.astype(jnp.uint32).reshape(ROWS, count, 4)
    words = jnp.sum(scales << shifts, axis=2, dtype=jnp.uint32)
    return [words[:, i] for i in range(count)]
  word_type = plgpu.ShapeDtypeStruct((ROWS,), np.dtype(np.uint32), layout=ROW)

  @plgpu.inline_mgpu(arg_types=(layout,), return_type=[word_type] * count)
  def as_words(ctx: Any, scales: Any) -> Any:
    # As bytes, the compiler takes them apart at once, and waits for them.
    del ctx
    word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    registers = scales.registers.reshape(count, -1)  # rows r and r + 8
    return [
      packed_array([vector.bitcast(word, v) for v in each], (ROWS,), ROW) for each in registers
    ]

  return as_words(scales)


def scale_words_of_even_rows(ref: Any) -> list[Any]:
  """The same of a multiple of 16 scales a row, in the order of `layouts.even_rows_first`.

  The arrays are labelled as if rows were in order.
  """
  if interpreting():
    return scale_words(ref)
  count = ref.shape[1] // 4
  word_type = plgpu.ShapeDtypeStruct((ROWS,), np.dtype(np.uint32), layout=ROW)

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=[word_type] * count)
  def load(ctx: Any, ref: Any) -> Any:
    del ctx
    (of_row, _), _ = ir.MemRefType(ref.type).get_strides_and_offset()
    start = arith.addi(
      smem_address(ref), arith.muli(row_of_thread(even_first=True), constant(of_row))
    )
    halves = []
    for half in range(2):
      words = []
      for vector_bytes in range(0, 4 * count, 16):
        address = arith.addi(start, constant(8 * half * of_row + vector_bytes))
        loaded = load_words(address, 4)
        words += [vector.extract(loaded, [], [i]) for i in range(4)]
      halves.append(words)
    return [
      packed_array([_as_vector(words[i]) for words in halves], (ROWS,), ROW) for i in range(count)
    ]

  return load(ref)


def row_of_thread(*, even_first: bool) -> Any:
  """The first of the two rows of 64 that a thread has."""
  thread = arith.andi(mgpu.utils.thread_idx(), constant(WARPS * WARP - 1))
  row = arith.andi(arith.shrui(thread, constant(2)), constant(7))
  if even_first:
    row = arith.ori(
      arith.shli(arith.andi(row, constant(3)), constant(1)), arith.shrui(row, constant(2))
    )
  return arith.addi(arith.muli(arith.shrui(thread, constant(5)), constant(16)), row)


def _as_vector(a: Any) -> Any:
  return vector.broadcast(ir.VectorType.get((1,), a.type), a)


def bytes_of_words(words: list[Any], layout: Any) -> Any:
  """uint8 (64, 4 * words) of `scale_words`, in a layout `whole_rows` of 2 or 4.

  The layout may be None when interpreted.
  """
  columns = 4 * len(words)
  if interpreting():
    shifts = lax.broadcasted_iota(jnp.uint32, (1, 4), 1) * np.uint32(8)
    scales = [(word[:, None] >> shifts) & np.uint32(0xFF) for word in words]
    return jnp.concatenate(scales, axis=1).astype(jnp.uint8)
  bytes_type = plgpu.ShapeDtypeStruct((ROWS, columns), np.dtype(np.uint8), layout=layout)

  @plgpu.inline_mgpu(arg_types=(ROW,) * len(words), return_type=bytes_type)
  def as_bytes(ctx: Any, *words: Any) -> Any:
    del ctx
    i8 = ir.IntegerType.get_signless(8)
    by_row = [[vector.extract(v, [], [0]) for v in word.registers.flat] for word in words]
    registers = []
    for halves in by_row:
      length = layout.to_mgpu().vector_length
      part = ir.IntegerType.get_signless(8 * length)
      for i in range(0, 4, length):
        for word in halves:
          bits = arith.shrui(word, constant(8 * i)) if i else word
          bits = arith.trunci(part, bits) if length < 4 else bits
          of_bits = vector.broadcast(ir.VectorType.get((1,), part), bits)
          registers.append(vector.bitcast(ir.VectorType.get((length,), i8), of_bits))
    return array(registers, (ROWS, columns), layout, signed=False)

  return as_bytes(*words)


def fourths_of_words(words: list[Any]) -> Any:
  """The same bytes in the layout ONE_OF_FOUR."""
  if interpreting():
    return bytes_of_words(words, None)
  columns = 4 * len(words)
  bytes_type = plgpu.ShapeDtypeStruct((ROWS, columns), np.dtype(np.uint8), layout=ONE_OF_FOUR)

  @plgpu.inline_mgpu(arg_types=(ROW,) * len(words), return_type=bytes_type)
  def as_bytes(ctx: Any, *words: Any) -> Any:
    del ctx
    i8, shift = ir.IntegerType.get_signless(8), arith.shli(lane_of_row(), constant(3))
    registers = []
    for word in words:
      for of_row in word.registers.flat:
        bits = arith.shrui(vector.extract(of_row, [], [0]), shift)
        registers.append(_as_vector(arith.trunci(i8, bits)))
    return array(registers, (ROWS, columns), ONE_OF_FOUR, signed=False)

  return as_bytes(*words)


# Beside block-diagonal x: two columns of the sums are the two groups of one block of 32


def blockdiag_scales(words: list[Any], part: int, rows: int, k_blocks: int) -> Any:
  """float32 (64, n): w's e4m3 scales of the groups in an accumulator, n = 2 * rows * k_blocks.

  Args:
    words: two arrays uint32 (64,), the eight scales of a row and step.
    part: which accumulator of the step it is.
    rows: of x, a power of two.
    k_blocks: of 32 elements of k in an accumulator: 1, 2 or 4.
  """
  n = 2 * rows * k_blocks
  if interpreting():
    shifts = lax.broadcasted_iota(jnp.uint32, (1, 4), 1) * np.uint32(8)
    scales = jnp.concatenate([(w[:, None] >> shifts) & np.uint32(0xFF) for w in words], axis=1)
    scales = lax.bitcast_convert_type(scales.astype(jnp.uint8), ml_dtypes.float8_e4m3fn)
    scales = scales.astype(jnp.float32).reshape(ROWS, -1, k_blocks, 1, 2)[:, part]
    return jnp.broadcast_to(scales, (ROWS, k_blocks, rows, 2)).reshape(ROWS, n)

  @plgpu.inline_mgpu(
    arg_types=(ROW, ROW),
    return_type=plgpu.ShapeDtypeStruct((ROWS, n), np.dtype(np.float32), layout=plgpu.Layout.WGMMA),
  )
  def convert(ctx: Any, *words: Any) -> Any:
    del ctx
    lane = lane_of_row()
    pairs = []
    for half in range(2):  # rows r and r + 8
      first, second = (vector.extract(w.registers.flat[half], [], [0]) for w in words)
      # A thread's two columns are the two groups of one block of 32.
      if k_blocks == 4:
        is_second = arith.cmpi(arith.CmpIPredicate.uge, lane, constant(2))
        word, odd = arith.select(is_second, second, first), arith.andi(lane, constant(1))
      elif k_blocks == 2:
        word, odd = (first, second)[part], arith.shrui(lane, constant(1))
      else:
        word, odd = (first, second)[part // 2], constant(part % 2)
      pair = arith.shrui(word, arith.shli(odd, constant(4)))
      pairs.append(_two_scales(pair))
    registers = [pairs[half] for _ in range(n // 8) for half in range(2)]
    return packed_array(registers, (ROWS, n), plgpu.Layout.WGMMA)

  return convert(*words)


def _two_scales(pair: Any) -> Any:
  f32 = ir.F32Type.get()
  result = llvm.inline_asm(
    llvm.StructType.get_literal([f32, f32]),
    [pair],
    """{
      .reg .b16 bytes, low, high;
      .reg .b32 both;
      cvt.u16.u32 bytes, $2;
      cvt.rn.f16x2.e4m3x2 both, bytes;
      mov.b32 {low, high}, both;
      cvt.f32.f16 $0, low;
      cvt.f32.f16 $1, high;
    }""",
    "=f,=f,r",
  )
  values = [llvm.extractvalue(f32, result, [i]) for i in range(2)]
  return vector.from_elements(ir.VectorType.get((2,), f32), values)


def blockdiag_sum(sums: Any, rows: int, k_blocks: int) -> Any:
  """(64, 4), ONE_OF_FOUR: the sums of a row's columns; from `rows` on, nothing."""
  columns = 4
  if interpreting():
    sums = sums.reshape(ROWS, k_blocks, rows, 2).sum((1, 3))
    return jnp.pad(sums, ((0, 0), (0, columns - rows)))

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,),
    return_type=plgpu.ShapeDtypeStruct((ROWS, columns), np.dtype(np.float32), layout=ONE_OF_FOUR),
  )
  def add_up(ctx: Any, sums: Any) -> Any:
    del ctx
    totals = []
    for pair in sums.registers.flat:
      total = arith.addf(*(vector.extract(pair, [], [i]) for i in range(2)))
      for distance in {1: (1, 2), 2: (2,)}.get(rows, ()):
        total = arith.addf(total, mgpu.utils.shfl_bfly(total, distance))
      totals.append(vector.broadcast(ir.VectorType.get((1,), total.type), total))
    return packed_array(totals, (ROWS, columns), ONE_OF_FOUR)

  return add_up(sums)
