"""Sums of the CTAs of a cluster, added up in the first one without a way through memory.

    CTA 0   | its part of k | meet | + part of CTA 1, + part of CTA 2, ... | meet | ends
    CTA 1   | its part of k | meet |             waits                     | meet | ends

Each leaves its sums in its own shared memory, and the first reads them there, in the order of the
CTAs: no float atomics, so results are the same every time. The second meeting keeps a CTA from
ending before it has been read.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

AXIS = "part"  # of the grid: which CTA of a cluster


def total(part_s: Any, split: int) -> Any:
  """The sums of all CTAs: each has left its own in its part_s, float32, for the layout WGMMA."""

  sums = plgpu.load(part_s, layout=plgpu.Layout.WGMMA, optimized=False)
  for part in range(1, split):
    sums += load(part_s, part)
  return sums


def load(ref: Any, part: int) -> Any:
  """What another CTA of the cluster has there, float32, for the layout WGMMA."""
  other = plgpu.cluster_ref(ref, {AXIS: part})
  return plgpu.load(other, layout=plgpu.Layout.WGMMA, optimized=False)


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
