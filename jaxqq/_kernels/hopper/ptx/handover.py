"""Sums from one CTA to another through global memory, warp by warp.

    CTA i       | its part of a tile | stores sums, sets its flag |
    a later one |        its part of it        | waits, clears the flag | + sums of CTA i | stores

A thread's sums are read by the thread of the same place in the other CTA. So a warp has a flag of
its own, and no barrier of a warpgroup is needed.

Nobody clears the flags before: a launch for that would take what is gained. A flag is set if it is
`_SET`, 64 bits that memory has by chance once in 2**64. Whoever has waited for a flag clears it, so
none is left set for a kernel that gets the memory later.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jaxqq._kernels.hopper.ptx import registers
from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROWS, WARP, WARPS

FLAGS = 2 * WARPS  # words of a warpgroup: a flag a warp
_SET = 0x7B1D6E0FA35C94E7
_VECTOR = 4  # numbers that a thread moves at once
_STRIDE = 4 * _VECTOR * WARPS * WARP  # bytes from one of a thread's vectors to the next


def store_sums(sums: jax.Array, ref: Any, column: int) -> None:
  """Leaves sums, float32 (64, columns) in the layout WGMMA, in global memory.

  Args:
    sums: columns from `column` on.
    ref: this warpgroup's, (64, columns of all), as threads hold them; the interpreter has rows.
    column: static.
  """
  columns = sums.shape[1]
  if interpreting():
    ref[:, column : column + columns] = sums
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(())), return_type=None)
  def write(ctx: Any, sums: Any, ref: Any) -> None:
    del ctx
    values = registers.floats(sums)
    lines = []
    for i, offset in _vectors(column, columns):
      names = ", ".join(f"${j}" for j in range(i, i + _VECTOR))
      lines.append(f"st.global.v4.f32 [at + {offset}], {{{names}}};")
    constraints = ",".join(["f"] * len(values) + ["l", "~{memory}"])
    text = _at_own_address(lines, len(values), "127", 4 * _VECTOR)
    registers.void_asm(text, [*values, _address(ref)], constraints)

  write(sums, ref)


def load_sums(ref: Any, column: int, columns: int) -> jax.Array:
  """What another CTA's warpgroup has left there, (64, columns)."""
  if interpreting():
    return ref[:, column : column + columns]
  sums_type = plgpu.ShapeDtypeStruct(
    (ROWS, columns), jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA
  )

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(()),), return_type=sums_type)
  def read(ctx: Any, ref: Any) -> Any:
    del ctx
    count = columns // 2
    lines = []
    for i, offset in _vectors(column, columns):
      names = ", ".join(f"${j}" for j in range(i, i + _VECTOR))
      lines.append(f"ld.global.v4.f32 {{{names}}}, [at + {offset}];")
    constraints = ",".join(["=f"] * count + ["l", "~{memory}"])
    text = _at_own_address(lines, count, "127", 4 * _VECTOR)
    values = registers.asm_of_floats(text, [_address(ref)], constraints, count)
    return registers.as_arrays(values, columns)[0]

  return read(ref)


def signal(flags: Any) -> None:
  """Says that this warpgroup's sums are there; flags is its own, int32 (FLAGS,)."""
  if interpreting():
    return
  _of_own_flag(
    [
      "bar.warp.sync 0xffffffff;",
      "mov.u32 lane, %laneid;",
      "setp.eq.u32 again, lane, 0;",
      f"mov.u64 flag, {_SET};",
      "@again st.release.gpu.global.u64 [at], flag;",
    ],
    flags,
  )


def wait(flags: Any) -> None:
  """Until another CTA's warpgroup has left its sums, once. The interpreter runs CTAs in order."""
  if interpreting():
    return
  _of_own_flag(
    [
      "poll:",
      "ld.acquire.gpu.global.u64 flag, [at];",
      f"setp.ne.u64 again, flag, {_SET};",
      "@again bra poll;",
      "bar.warp.sync 0xffffffff;",
      "mov.u32 lane, %laneid;",
      "setp.eq.u32 again, lane, 0;",
      "@again st.relaxed.gpu.global.u64 [at], 0;",
    ],
    flags,
  )


def _of_own_flag(lines: list[str], flags: Any) -> None:
  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(()),), return_type=None)
  def run(ctx: Any, flags: Any) -> None:
    del ctx
    before = [".reg .u32 lane;", ".reg .u64 flag;", ".reg .pred again;"]
    # A warp's place is its first thread's, over 32: at 8 bytes each, thread / 4.
    text = _at_own_address([*before, *lines], 0, "96", 1, shift=2)
    registers.void_asm(text, [_address(flags)], "l,~{memory}")

  run(flags)


def _vectors(column: int, columns: int) -> list[tuple[int, int]]:
  """Of a thread's numbers: the first of each vector, and its bytes from the thread's address."""
  first, count = column // 2 // _VECTOR, columns // 2
  return [(i, (first + i // _VECTOR) * _STRIDE) for i in range(0, count, _VECTOR)]


def _address(ref: Any) -> Any:
  return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))


def _at_own_address(lines: list[str], base: int, mask: str, size: int, shift: int = 0) -> str:
  """Assembly with `at`, at operand `base` and so many bytes for each of the masked threads."""
  body = "\n".join(lines)
  return f"""{{
    .reg .u32 thread;
    .reg .u64 at;
    mov.u32 thread, %tid.x;
    and.b32 thread, thread, {mask};
    shr.u32 thread, thread, {shift};
    mad.wide.u32 at, thread, {size}, ${base};
    {body}
  }}"""
