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
from jaxqq._kernels.hopper.ptx.layouts import ROW_BYTES, ROWS, WARP, WARPS, whole_rows
from jaxqq._kernels.hopper.ptx.registers import array, constant, lane_of_row, smem_address
from jaxqq._kernels.hopper.tiles import TILE_ROWS

_VECTOR = 4  # words, which a swizzle leaves together


def load_words_of_rows(ref: Any, transforms: tuple[Any, ...], first: int, count: int) -> Any:
  """Words (64, count) from `first` on, in the layout `whole_rows(4)`.

  Args:
    ref: uint32 (64, 8 or 16) or (64, a multiple of 32), in shared memory; in no tiles up to 32.
    transforms: of it, with a swizzle of as many bytes, or of 128.
    first, count: multiples of 4.
  """
  places = range(first, first + count, _VECTOR)
  return _load_rows(ref, transforms, places, whole_rows(_VECTOR), _VECTOR)


def load_pairs_of_rows(ref: Any, transforms: tuple[Any, ...], first: int) -> Any:
  """Words (64, 8) from `first` on, a multiple of 8, in the layout WGMMA: a thread has pairs.

  Args:
    ref, transforms: as of `load_words_of_rows`.
  """
  return _load_rows(ref, transforms, range(first, first + 8, 8), plgpu.Layout.WGMMA, 2)


def _load_rows(
  ref: Any, transforms: tuple[Any, ...], places: range, layout: Any, length: int
) -> Any:
  """Of 64 rows the words at some places, in vectors of `length`.

  From one place to the next each of a row's four threads has one vector, its own or the same.
  """
  count = len(places) * places.step
  if interpreting():
    return ref[...][:, places.start : places.start + count]

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(transforms),),
    return_type=plgpu.ShapeDtypeStruct((ROWS, count), np.dtype(jnp.uint32), layout=layout),
  )
  def load(ctx: Any, ref: Any) -> Any:
    del ctx
    of_row, of_rows, of_columns = _places(ref)
    own = None
    if places.step > length:
      own = arith.shli(lane_of_row(), constant(length.bit_length() + 1))  # times its bytes

    def in_row(offset: int) -> Any:
      return constant(offset) if own is None else arith.xori(own, constant(offset))

    registers = []
    for place in places:
      column, offset = divmod(4 * place, _row_bytes(ref))
      start = arith.addi(smem_address(ref), arith.xori(of_row, in_row(offset)))
      for half in range(2):
        further = 4 * (column * of_columns + half * of_rows)
        registers.append(load_words(arith.addi(start, constant(further)), length))
    return array(registers, (ROWS, count), layout, signed=False)

  return load(ref)


def _row_bytes(ref: Any) -> int:
  """Of a row of a tile, all of which a swizzle exchanges vectors of."""
  return 4 * int(ir.MemRefType(ref.type).shape[-1])


def _places(ref: Any) -> tuple[Any, int, int]:
  """Where a thread's first row begins, swizzled, and words from 8 rows, or a tile, to the next."""
  kind, row_bytes = ir.MemRefType(ref.type), _row_bytes(ref)
  (of_rows, of_columns, *_), _ = kind.get_strides_and_offset()
  if kind.rank == 2:
    of_rows *= TILE_ROWS
  thread = arith.andi(mgpu.utils.thread_idx(), constant(WARPS * WARP - 1))
  warp = arith.shrui(thread, constant(5))
  row = arith.andi(arith.shrui(thread, constant(2)), constant(TILE_ROWS - 1))
  # Every 128 bytes the vectors of a row are exchanged in another way.
  rotation = arith.shrui(row, constant((ROW_BYTES // row_bytes).bit_length() - 1))
  swizzled = arith.ori(arith.muli(row, constant(row_bytes)), arith.shli(rotation, constant(4)))
  # 16 rows a warp: two tiles of 8.
  return arith.addi(arith.muli(warp, constant(2 * 4 * of_rows)), swizzled), of_rows, of_columns


def look_up(table: Any, index: jax.Array, layout: Any) -> jax.Array:
  """table[index], float32 in the layout of the index.

  Args:
    table: float32 (size,), in global memory.
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
      length = ir.VectorType(register.type).shape[0]
      numbers = []
      for i in range(length):
        offset = arith.muli(vector.extract(register, [], [i]), constant(4))
        address = arith.addi(start, arith.extui(i64, offset))
        text = "{ .reg .b64 a; cvta.to.global.u64 a, $1; ld.global.nc.f32 $0, [a]; }"
        numbers.append(llvm.inline_asm(f32, [address], text, "=f,l"))
      registers.append(vector.from_elements(ir.VectorType.get((length,), f32), numbers))
    return array(registers, index.shape, layout, None)

  return in_registers(table, index)


def load_words(address: Any, count: int) -> Any:
  """A vector of so many words, from an address in shared memory that is a multiple of its bytes."""
  pointer = llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), address)
  of_words = ir.VectorType.get((count,), ir.IntegerType.get_signless(32))
  return llvm.load(of_words, pointer, alignment=4 * count)
