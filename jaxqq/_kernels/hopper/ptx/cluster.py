"""Sums of the CTAs of a cluster, through distributed shared memory (DSMEM).

Few rows: the first CTA adds all up.

    CTA 0   | its part of k | sync | + part of CTA 1, + part of CTA 2, ... | sync | ends
    CTA 1   | its part of k | sync |             waits                     | sync | ends

Each leaves its sums in its own shared memory. The first CTA reads them there in the order of the
CTAs: there are no float atomics, so results are the same every time. The second sync keeps a CTA
from ending before it has been read.

Many rows: up to 8 CTAs, each of which adds up its share of a tile's rows of x. Of two:

    CTA 0   | its part of k | stores half 1 | sync | half 0 + what came | ends
    CTA 1   | its part of k | stores half 0 | sync | half 1 + what came | ends

A store to the other's shared memory is not waited for, as a load is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxqq._kernels.hopper.ptx import registers
from jaxqq._kernels.hopper.ptx.layouts import ROWS

AXIS = "cluster"  # of the grid: which CTA of a cluster
_VECTOR = 4  # numbers that a thread moves at once


def cluster_sync() -> None:
  """All threads of a cluster wait for each other, and see what the others wrote before."""

  @plgpu.inline_mgpu(arg_types=(), return_type=None)
  def wait(ctx: Any) -> None:
    del ctx
    text = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
    # Without the clobber, what is before and after could change places with it.
    registers.void_asm(text, [], "~{memory}")

  wait()


def cluster_sum(own: Any, size: int) -> Any:
  """The sums of all CTAs: each has left its own in its `own`, float32, for the layout WGMMA."""

  def load(ref: Any) -> Any:
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)

  sums = load(own)
  for index in range(1, size):
    sums += load(plgpu.cluster_ref(own, {AXIS: index}))
  return sums


def dsmem_buffer(columns: int, slots: int, warpgroups: int) -> Any:
  """Shared memory for what others `dsmem_store`: so many slots, each for all warpgroups' sums.

  Sums are (64, columns) a warpgroup, or fewer columns, stored as threads hold them.
  """
  return plgpu.SMEM((slots, columns // 2, 2 * ROWS * warpgroups), jnp.float32)


def dsmem_store(sums: jax.Array, buffer: Any, cta: int, slot: int) -> None:
  """Writes sums, float32 in the layout WGMMA, to a slot of the buffer of another CTA."""
  slot_bytes, stride = _sizes(buffer)

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(())), return_type=None)
  def write(ctx: Any, sums: Any, buffer: Any) -> None:
    del ctx
    values = registers.floats(sums)
    lines = [f"mapa.shared::cluster.u32 at, at, {cta};"]
    for i in range(0, len(values), _VECTOR):
      names = ", ".join(f"${j}" for j in range(i, i + _VECTOR))
      offset = slot * slot_bytes + i * stride
      lines.append(f"st.shared::cluster.v4.f32 [at + {offset}], {{{names}}};")
    constraints = ",".join(["f"] * len(values) + ["r", "~{memory}"])
    operands = [*values, registers.smem_address(buffer)]
    registers.void_asm(_at_own_address(lines, len(values)), operands, constraints)

  write(sums, buffer)


def dsmem_load(buffer: Any, columns: int, slot: int) -> jax.Array:
  """What another CTA has stored in a slot, (64, columns)."""
  sums_type = plgpu.ShapeDtypeStruct(
    (ROWS, columns), jnp.dtype(jnp.float32), layout=plgpu.Layout.WGMMA
  )
  slot_bytes, stride = _sizes(buffer)

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(()),), return_type=sums_type)
  def read(ctx: Any, buffer: Any) -> Any:
    del ctx
    count = columns // 2
    lines = []
    for i in range(0, count, _VECTOR):
      names = ", ".join(f"${j}" for j in range(i, i + _VECTOR))
      offset = slot * slot_bytes + i * stride
      lines.append(f"ld.shared.v4.f32 {{{names}}}, [at + {offset}];")
    constraints = ",".join(["=f"] * count + ["r", "~{memory}"])
    operands = [registers.smem_address(buffer)]
    text = _at_own_address(lines, count)
    values = registers.asm_of_floats(text, operands, constraints, count)
    return registers.as_arrays(values, columns)[0]

  return read(buffer)


def _sizes(buffer: Any) -> tuple[int, int]:
  """Bytes of a slot, and of one number of each thread."""
  _, count, threads = buffer.shape
  return 4 * count * threads, 4 * threads


def _at_own_address(lines: list[str], buffer: int) -> str:
  """Assembly with `at`, where a thread's first numbers are in the buffer at operand `buffer`."""
  body = "\n".join(lines)
  return f"""{{
    .reg .u32 at;
    mov.u32 at, %tid.x;
    mad.lo.u32 at, at, {4 * _VECTOR}, ${buffer};
    {body}
  }}"""
