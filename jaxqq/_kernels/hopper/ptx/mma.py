"""`mma.sync`, the tensor cores' instruction of a warp: the product of one step of k, with few rows.

It has 16 rows by 8 columns, and no other warp waits for it. Its time grows with the columns faster
than that of `wgmma`, which so is better with many rows of x (`costs.py`). Its left operand and its
sums are in the registers that `wgmma` has them in; its right one, x, each thread loads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxqq._kernels.hopper.ptx import registers
from jaxqq._kernels.hopper.ptx.interpreter import finish_loads, interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROWS, WARP, even_rows_first
from jaxqq._kernels.hopper.ptx.loads import load_words
from jaxqq._kernels.hopper.ptx.registers import constant, smem_address
from jaxqq._kernels.hopper.ptx.wgmma import tile_bytes
from jaxqq._kernels.hopper.tiles import TILE_ROWS

SUMS = even_rows_first(8, 2)
_INSTRUCTIONS = 4  # of 16 of k, in a step of 64
_PTX_TYPES = {"float16": "f16", "bfloat16": "bf16"}


def add(
  sums: list[jax.Array],
  left: list[jax.Array],
  right: Any,
  transforms: tuple[Any, ...],
) -> list[jax.Array]:
  """sums + a b^T over one step, 64 of k, of several a with the same b, which is loaded once.

  Args:
    sums: float32 (64, n) in the layout WGMMA, one for each a. Columns from b's rows on stay.
    left: each a, 16 bit floats (64, 64) in registers: thread q of a row's four has k = 16 q to
      16 q + 15, two neighbours a register (`expand_sixteens.py`).
    right: b, of the same dtype (up to n, 64), in shared memory.
    transforms: of b, with a swizzle of 128 bytes.
  """
  (_, n), rows = sums[0].shape, right.shape[0]
  if interpreting():
    finish_loads()
    b = right[...].astype(jnp.float32)
    dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)
    products = [dot(a.astype(jnp.float32), b.T) for a in left]
    return [s + jnp.pad(p, ((0, 0), (0, n - rows))) for s, p in zip(sums, products, strict=True)]
  layout, kind, count = plgpu.Layout.WGMMA, _PTX_TYPES[left[0].dtype.name], len(sums)
  result = plgpu.ShapeDtypeStruct((ROWS, n), np.dtype(np.float32), layout=layout)

  @plgpu.inline_mgpu(
    arg_types=(*[layout] * (2 * count), plgpu.RefType(transforms)), return_type=[result] * count
  )
  def multiply(ctx: Any, *args: Any) -> Any:
    del ctx
    totals = [registers.floats(a) for a in args[:count]]
    operands = [registers.words(a) for a in args[count:-1]]
    for block in range(rows // TILE_ROWS):
      own, of_block = slice(4 * block, 4 * block + 4), _rows(args[-1], block)
      for i in range(_INSTRUCTIONS):
        pair = of_block[2 * i : 2 * i + 2]
        for total, a in zip(totals, operands, strict=True):
          total[own] = _mma(total[own], a[4 * i : 4 * i + 4], pair, kind)
    return [registers.as_arrays(total, n)[0] for total in totals]

  return multiply(*sums, *left, right)


# On MLIR values


def _mma(sums: list[Any], left: list[Any], right: list[Any], kind: str) -> list[Any]:
  """One instruction. All threads of a warp run it: it may stand in no branch that divides them."""
  f32 = ir.F32Type.get()
  text = (
    f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
  )
  constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
  result_type = llvm.StructType.get_literal([f32] * 4)
  result = llvm.inline_asm(result_type, [*left, *right, *sums], text, constraints)
  return [llvm.extractvalue(f32, result, [i]) for i in range(4)]


def _rows(b: Any, block: int) -> list[Any]:
  """Of the block-th 8 rows of b the 16 neighbours that a thread has: 8 registers."""
  lane = arith.andi(mgpu.utils.thread_idx(), constant(WARP - 1))
  row, q = arith.shrui(lane, constant(2)), arith.andi(lane, constant(3))
  # A row is 8 vectors of 16 bytes, and the swizzle exchanges them by the row's number.
  place = arith.shli(arith.xori(row, arith.shli(q, constant(1))), constant(4))
  start = arith.addi(smem_address(b), constant(block * tile_bytes(b)))
  start = arith.addi(start, arith.addi(arith.shli(row, constant(7)), place))
  vectors = [load_words(address, 4) for address in (start, arith.xori(start, constant(16)))]
  return [vector.extract(v, [], [i]) for v in vectors for i in range(4)]


def relabel(sums: jax.Array) -> jax.Array:
  """Sums that are labelled WGMMA, labelled by the rows that they are of."""
  if interpreting():
    return sums
  kind = plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout=SUMS)

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=kind)
  def same(ctx: Any, sums: Any) -> Any:
    del ctx
    values = registers.floats(sums)
    # No instruction, but without it MLIR takes the array for the one before.
    constraints = ",".join(["=f"] * len(values) + [str(i) for i in range(len(values))])
    values = registers.asm_of_floats("", values, constraints, len(values))
    return registers.as_arrays(values, sums.shape[1], SUMS)[0]

  return same(sums)
