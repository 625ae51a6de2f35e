"""How the kernel for few rows writes its results."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def store_columns(
  a: Any, layout: Any, out_ref: Any, first: Any, m: int, n: int, interpret: bool
) -> None:
  """out_ref[:m, first:] = a.T, (64, held), of which columns from m on are nothing.

  The copy engine would write them too. Few rows are few bytes: threads store them one by one.
  """
  if interpret:
    out_ref[pl.ds(0, a.shape[1]), pl.ds(first, a.shape[0])] = a.T
    return
  itemsize = jnp.dtype(a.dtype).itemsize

  @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=None)
  def store(ctx: Any, a: Any, out: Any, first: Any) -> None:
    del ctx
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(out))
    start = first.registers.flat[0]
    kind, constraint = ("b16", "h") if itemsize == 2 else ("b32", "f")
    bits = ir.IntegerType.get_signless(16) if itemsize == 2 else ir.F32Type.get()

    def store_one(value: Any, index: Any) -> None:
      row = arith.addi(arith.index_cast(i32, index[0]), start)
      column = arith.index_cast(i32, index[1])
      asm = f"""{{
        .reg .pred inside;
        .reg .s32 place;
        .reg .s64 address;
        mad.lo.s32 place, $3, {n}, $2;
        mad.wide.s32 address, place, {itemsize}, $0;
        setp.lt.s32 inside, $2, {n};
        setp.lt.and.s32 inside, $3, {m}, inside;
        @inside st.global.{kind} [address], $1;
      }}"""
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [base, arith.bitcast(bits, value) if itemsize == 2 else value, row, column],
        asm,
        f"l,{constraint},r,r",
        has_side_effects=True,
      )

    a.foreach(store_one)

  store(a, out_ref, first)
