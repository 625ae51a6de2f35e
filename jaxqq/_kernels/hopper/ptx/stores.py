"""Stores thread by thread, for what the TMA does not write: ragged rows, and swizzled scatters."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import WARP, WARPS
from jaxqq._kernels.hopper.ptx.registers import constant, smem_address, void_asm

# Global memory


def store_columns(a: Any, layout: Any, out_ref: Any, first: Any, m: int, n: int) -> None:
  """out_ref[:m, first:first+64] = a.T, (64, padded_m), of which columns from m on are nothing.

  The TMA would write them too. Few rows are few bytes: threads store them one by one. The
  interpreter writes past m and n, to an output that has room (`stored_shape`).
  """
  if interpreting():
    out_ref[pl.ds(0, a.shape[1]), pl.ds(first, a.shape[0])] = a.T
    return
  itemsize = jnp.dtype(a.dtype).itemsize

  @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=None)
  def store(ctx: Any, a: Any, out: Any, first: Any) -> None:
    del ctx
    text = f"""{{
      .reg .pred inside;
      .reg .s32 place;
      .reg .s64 address;
      mad.lo.s32 place, $3, {n}, $2;
      mad.wide.s32 address, place, {itemsize}, $0;
      setp.lt.s32 inside, $2, {n};
      setp.lt.and.s32 inside, $3, {m}, inside;
      @inside st.global.{_kind(itemsize)} [address], $1;
    }}"""
    _store_each(a, out, first.registers.flat[0], text, [], transposed=True)

  store(a, out_ref, first)


def store_some(
  a: Any,
  layout: Any,
  out_ref: Any,
  first_row: Any,
  rows: Any,
  first_column: Any,
  *,
  transposed: bool = False,
) -> None:
  """out_ref[first_row:first_row+rows, first_column:...] = a[:rows], or of a.T.

  As `store_columns`, where the kernel alone knows the rows. Columns past the end of the output are
  not written.

  Args:
    a: in `layout`.
    out_ref: (m, n), in global memory.
    first_row, rows, first_column: int32.
    transposed: whether rows of the output are columns of a.
  """
  if interpreting():
    a = a.T if transposed else a
    for i in range(a.shape[0]):

      @pl.when((i < rows) & (first_column < out_ref.shape[1]))
      def _row(i: int = i) -> None:
        out_ref[pl.ds(first_row + i, 1), pl.ds(first_column, a.shape[1])] = a[i : i + 1]

    return
  n, itemsize = out_ref.shape[1], jnp.dtype(a.dtype).itemsize
  splats = [plgpu.Layout.WG_SPLAT] * 3

  @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), *splats), return_type=None)
  def store(ctx: Any, a: Any, out: Any, first_row: Any, rows: Any, first_column: Any) -> None:
    del ctx
    text = f"""{{
      .reg .pred inside;
      .reg .s32 row;
      .reg .s64 place, column, address;
      add.s32 row, $3, $4;
      cvt.s64.s32 column, $2;
      mad.wide.s32 place, row, {n}, column;
      mad.lo.s64 address, place, {itemsize}, $0;
      setp.lt.s32 inside, $2, {n};
      setp.lt.and.s32 inside, $3, $5, inside;
      @inside st.global.{_kind(itemsize)} [address], $1;
    }}"""
    dynamic = [first_row.registers.flat[0], rows.registers.flat[0]]
    _store_each(a, out, first_column.registers.flat[0], text, dynamic, transposed=transposed)

  store(a, out_ref, first_row, rows, first_column)


def _kind(itemsize: int) -> str:
  return "b16" if itemsize == 2 else "b32"


def _store_each(
  a: Any, out: Any, first: Any, text: str, others: list[Any], *, transposed: bool
) -> None:
  """The text for every number.

  $0 is where `out` is, $1 the number, $2 its column there, from `first` on, $3 its row in a, or of
  one that is transposed its column; and then the others.
  """
  i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
  base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(out))
  halves = mgpu.utils.bytewidth(a.mlir_dtype) == 2
  bits = ir.IntegerType.get_signless(16) if halves else ir.F32Type.get()
  constraints = ",".join(["l", "h" if halves else "f", "r", "r", *["r"] * len(others)])

  def store_one(value: Any, index: Any) -> None:
    of_column, of_row = index if transposed else index[::-1]
    column = arith.addi(arith.index_cast(i32, of_column), first)
    row = arith.index_cast(i32, of_row)
    value = arith.bitcast(bits, value) if halves else value
    void_asm(text, [base, value, column, row, *others], constraints)

  a.foreach(store_one)


def stored_shape(m: int, n: int, padded_m: int, block_n: int) -> tuple[int, int]:
  """Of what `store_columns` writes to, so many columns of the output at a time."""
  if not interpreting():
    return m, n
  return max(m, padded_m), -(-n // block_n) * block_n


# Shared memory


_VECTOR_BYTES = 16  # that a thread clears at once


def clear_smem(ref: Any, transforms: tuple[Any, ...]) -> None:
  """Zeros, by one warpgroup."""
  if interpreting():
    ref[...] = jnp.zeros(ref.shape, ref.dtype)
    return
  each = WARPS * WARP * _VECTOR_BYTES
  size = ref.shape[0] * ref.shape[1] * ref.dtype.itemsize

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms),), return_type=None)
  def clear(ctx: Any, ref: Any) -> None:
    del ctx
    thread = arith.andi(mgpu.utils.thread_idx(), constant(WARPS * WARP - 1))
    start = arith.addi(smem_address(ref), arith.muli(thread, constant(_VECTOR_BYTES)))
    zeros = [constant(0)] * (_VECTOR_BYTES // 4)
    for i in range(0, size, each):
      _store_words(arith.addi(start, constant(i)), zeros, 32)

  clear(ref)


def scatter_words(
  words: list[jax.Array],
  offset: jax.Array,
  layout: Any,
  ref: Any,
  transforms: tuple[Any, ...],
  bits: int = 32,
) -> None:
  """Each thread's words, or the low halves of them, so many bytes into shared memory.

  Args:
    words: one number a thread, in the layout.
    offset: int32, in bytes: into the reference as it is stored, swizzled.
    layout: of both.
    ref: to shared memory.
    transforms: of it.
    bits: of each word.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(transforms), *[layout] * (1 + len(words))), return_type=None
  )
  def store(ctx: Any, ref: Any, offset: Any, *words: Any) -> None:
    del ctx
    start, *values = (vector.extract(a.registers.flat[0], [], [0]) for a in (offset, *words))
    i32 = ir.IntegerType.get_signless(32)
    address = arith.addi(smem_address(ref), start)
    _store_words(address, [arith.bitcast(i32, v) for v in values], bits)

  store(ref, offset, *words)


def scatter_groups(
  values: jax.Array, offset: jax.Array, layout: Any, ref: Any, transforms: tuple[Any, ...]
) -> None:
  """Each thread's 16 neighbours, of 16 bits, into a row of shared memory.

  Args:
    values: (..., 16), in the layout.
    offset: int32 (...), in bytes: into the reference as it is stored, swizzled.
    layout: of the values.
    ref: to shared memory.
    transforms: of it, with a swizzle of 128 bytes.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(transforms), layout, layout.reduce((values.ndim - 1,))),
    return_type=None,
  )
  def store(ctx: Any, ref: Any, values: Any, offset: Any) -> None:
    del ctx
    (numbers,), (own,) = values.registers.flat, offset.registers.flat
    words = vector.bitcast(ir.VectorType.get((8,), ir.IntegerType.get_signless(32)), numbers)
    start = arith.addi(smem_address(ref), vector.extract(own, [], [0]))
    for half in range(2):
      # The swizzle exchanges 16 bytes with others: the next ones differ in one bit of the address.
      address = arith.xori(start, constant(_VECTOR_BYTES * half))
      _store_words(address, [vector.extract(words, [], [4 * half + i]) for i in range(4)], 32)

  store(ref, values, offset)


def _store_words(address: Any, words: list[Any], bits: int) -> None:
  names = ", ".join(f"${1 + i}" for i in range(len(words)))
  text = {
    (1, 16): "{ .reg .b16 low; cvt.u16.u32 low, $1; st.shared.b16 [$0], low; }",
    (1, 32): "st.shared.b32 [$0], $1;",
  }.get((len(words), bits), f"st.shared.v{len(words)}.b32 [$0], {{{names}}};")
  void_asm(text, [address, *words], ",".join(["r"] * (1 + len(words)) + ["~{memory}"]))
