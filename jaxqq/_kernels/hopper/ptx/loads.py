"""Loads that Mosaic GPU has not: less than a swizzled row of shared memory, and by an index."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROWS, TILE_ROWS, WARP, WARPS, whole_rows
from jaxqq._kernels.hopper.ptx.registers import array, constant, smem_address

_VECTOR = 4  # words, which a swizzle leaves together
_ROW_VECTORS = 8  # of a swizzled row, which 8 rows share a tile of


def load_words_of_rows(ref: Any, transforms: tuple[Any, ...], first: int, count: int) -> Any:
  """Words (64, count) from `first` on, in the layout `whole_rows(4)`.

  Args:
    ref: uint32 (64, a multiple of 32), in shared memory; in no tiles (64, 32).
    transforms: of it, with a swizzle of 128 bytes.
    first, count: multiples of 4.
  """
  if interpreting():
    return ref[...][:, first : first + count]
  layout = whole_rows(_VECTOR)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(transforms),),
    return_type=plgpu.ShapeDtypeStruct((ROWS, count), np.dtype(jnp.uint32), layout=layout),
  )
  def load(ctx: Any, ref: Any) -> Any:
    del ctx
    kind = ir.MemRefType(ref.type)
    (of_rows, of_columns, *_), _ = kind.get_strides_and_offset()
    if kind.rank == 2:
      of_rows *= TILE_ROWS
    thread = arith.andi(mgpu.utils.thread_idx(), constant(WARPS * WARP - 1))
    warp = arith.shrui(thread, constant(5))
    row = arith.andi(arith.shrui(thread, constant(2)), constant(TILE_ROWS - 1))
    # 16 rows a warp: two tiles of 8, and a row of 128 bytes in each.
    start = arith.addi(smem_address(ref), arith.muli(warp, constant(2 * 4 * of_rows)))
    start = arith.addi(start, arith.muli(row, constant(128 + 16)))
    registers = []
    for i in range(first // _VECTOR, (first + count) // _VECTOR):
      column, swizzled = divmod(i, _ROW_VECTORS)
      address = arith.xori(start, constant(16 * swizzled))
      for half in range(2):
        offset = 4 * (column * of_columns + half * of_rows)
        registers.append(load_words(arith.addi(address, constant(offset)), _VECTOR))
    return array(registers, (ROWS, count), layout, signed=False)

  return load(ref)


def look_up(table: Any, index: jax.Array, layout: Any) -> jax.Array:
  """table[index], float32 in the layout of the index.

  Args:
    table: float32 (size,), in global memory, from where a few hundred bytes soon are in L1.
    index: int32, of any shape.
  """
  if interpreting():
    return table[...][index]

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(()), layout),
    return_type=plgpu.ShapeDtypeStruct(index.shape, np.dtype(np.float32), layout=layout),
  )
  def in_registers(ctx: Any, table: Any, index: Any) -> Any:
    del ctx
    i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
    start = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(table))
    registers = []
    for register in index.registers.flat:
      offset = arith.muli(vector.extract(register, [], [0]), constant(4))
      address = arith.addi(start, arith.extui(i64, offset))
      text = "{ .reg .b64 a; cvta.to.global.u64 a, $1; ld.global.nc.f32 $0, [a]; }"
      number = llvm.inline_asm(f32, [address], text, "=f,l")
      registers.append(vector.broadcast(ir.VectorType.get((1,), f32), number))
    return array(registers, index.shape, layout, None)

  return in_registers(table, index)


def load_words(address: Any, count: int) -> Any:
  """A vector of so many words, from an address in shared memory that is a multiple of its bytes."""
  pointer = llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), address)
  of_words = ir.VectorType.get((count,), ir.IntegerType.get_signless(32))
  return llvm.load(of_words, pointer, alignment=4 * count)
