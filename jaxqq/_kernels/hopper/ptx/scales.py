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
from jaxqq._kernels.hopper.ptx.layouts import ONE_OF_FOUR, ROW, ROWS, whole_rows
from jaxqq._kernels.hopper.ptx.registers import constant, packed_array


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
    lane = arith.andi(mgpu.utils.thread_idx(), constant(3))
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
  """(64, max(4, rows)), ONE_OF_FOUR: the sums of a row's columns; from `rows` on, nothing."""
  columns = max(4, rows)
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
