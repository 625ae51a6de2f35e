"""Sums of the CTAs of a cluster, added up without a way through memory.

Few rows: the first CTA adds all up.

    CTA 0   | its part of k | meet | + part of CTA 1, + part of CTA 2, ... | meet | ends
    CTA 1   | its part of k | meet |             waits                     | meet | ends

Each leaves its sums in its own shared memory, and the first reads them there, in the order of the
CTAs: no float atomics, so results are the same every time. The second meeting keeps a CTA from
ending before it has been read.

Many rows: two CTAs, each of which adds up half of a tile.

    CTA 0   | its part of k | sends half 1 | meet | half 0 + what came | meet | ends
    CTA 1   | its part of k | sends half 0 | meet | half 1 + what came | meet | ends

A write to the other's shared memory is not waited for, as a read is: reading 64 KiB took 2.3 us.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jaxqq._kernels import tensor_cores
from jaxqq._kernels.groups import WARP, WARPS
from jaxqq._kernels.tiles import COMPUTE_WARPGROUPS

AXIS = "part"  # of the grid: which CTA of a cluster
_THREADS = COMPUTE_WARPGROUPS * WARPS * WARP
_VECTOR = 4  # numbers that a thread moves at once


def total(part_s: Any, split: int) -> Any:
  """The sums of all CTAs: each has left its own in its part_s, float32, for the layout WGMMA."""

  def load(ref: Any) -> Any:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)

  sums = load(part_s)
  for part in range(1, split):
    sums += load(plgpu.cluster_ref(part_s, {AXIS: part}))
  return sums


def buffer(columns: int) -> Any:
  """Shared memory for what compute warpgroups `send`, (64, columns) each, as threads hold it."""
  return plgpu.SMEM((COMPUTE_WARPGROUPS * tensor_cores.ROWS * columns,), jnp.float32)


def send(sums: jax.Array, buffer: Any, part: int) -> None:
  """Writes sums, float32 in the layout WGMMA, to the buffer of another CTA of the cluster."""

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(())), return_type=None)
  def write(ctx: Any, sums: Any, buffer: Any) -> None:
    del ctx
    values = tensor_cores.floats(sums)
    lines = [f"mapa.shared::cluster.u32 at, at, {part};"]
    for i in range(0, len(values), _VECTOR):
      names = ", ".join(f"${j}" for j in range(i, i + _VECTOR))
      lines.append(f"st.shared::cluster.v4.f32 [at + {4 * _THREADS * i}], {{{names}}};")
    void = ir.Type.parse("!llvm.void")
    constraints = ",".join(["f"] * len(values) + ["r", "~{memory}"])
    operands = [*values, _address(buffer)]
    llvm.inline_asm(
      void, operands, _own_place(lines, len(values)), constraints, has_side_effects=True
    )

  write(sums, buffer)


def receive(buffer: Any, columns: int) -> jax.Array:
  """What another CTA has sent, (64, columns)."""
  sums_type = plgpu.ShapeDtypeStruct(
    (tensor_cores.ROWS, columns), jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA
  )

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(()),), return_type=sums_type)
  def read(ctx: Any, buffer: Any) -> Any:
    del ctx
    count = columns // 2
    lines = []
    for i in range(0, count, _VECTOR):
      names = ", ".join(f"${j}" for j in range(i, i + _VECTOR))
      lines.append(f"ld.shared.v4.f32 {{{names}}}, [at + {4 * _THREADS * i}];")
    constraints = ",".join(["=f"] * count + ["r", "~{memory}"])
    operands = [_address(buffer)]
    values = tensor_cores.asm_of_floats(_own_place(lines, count), operands, constraints, count)
    return tensor_cores.as_arrays(values, columns)[0]

  return read(buffer)


def _address(buffer: Any) -> Any:
  pointer = mgpu.utils.memref_ptr(buffer)
  return llvm.ptrtoint(ir.IntegerType.get_signless(32), pointer)


def _own_place(lines: list[str], address: int) -> str:
  """Assembly with `at`, where a thread's first numbers lie in a buffer at operand `address`."""
  body = "\n".join(lines)
  return f"""{{
    .reg .u32 at;
    mov.u32 at, %tid.x;
    mad.lo.u32 at, at, {4 * _VECTOR}, ${address};
    {body}
  }}"""


def meet() -> None:
  """All threads of a cluster wait for each other, and see what the others wrote before."""

  @plgpu.inline_mgpu(arg_types=(), return_type=None)
  def wait(ctx: Any) -> None:
    del ctx
    void = ir.Type.parse("!llvm.void")
    asm = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
    # Without the clobber, what is before and after could change places with it.
    llvm.inline_asm(void, [], asm, "~{memory}", has_side_effects=True)

  wait()
