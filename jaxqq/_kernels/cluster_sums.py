"""Sums of the CTAs of a cluster, added up in the first one without a way through memory.

    CTA 0   | its part of k | meet | + part of CTA 1, + part of CTA 2, ... | meet | goes on
    CTA 1   | its part of k | meet |             waits                     | meet | goes on

Each leaves its sums in its own shared memory, and the first reads them there, in the order of the
CTAs: no float atomics, so results are the same every time. The second meeting keeps a CTA from
ending, or writing what is next, before it has been read.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

AXIS = "part"  # of the grid: which CTA of a cluster


def barrier() -> Any:
  """What one warpgroup of each CTA meets at."""
  return plgpu.ClusterBarrier(collective_axes=(AXIS,))


def add_parts(sums: Any, part_s: Any, parts: Any, split: int) -> Any:
  """In the first CTA, the sums of all; in others, something.

  Args:
    sums: float32 in the layout WGMMA, of this CTA.
    part_s: a place for them in shared memory.
    parts: the `barrier`.
    split: CTAs in a cluster.
  """
  part_s[...] = sums
  _meet(parts)
  for part in range(1, split):
    peer = plgpu.cluster_ref(part_s, {AXIS: part})
    sums += plgpu.load(peer, layout=plgpu.Layout.WGMMA, optimized=False)
  _meet(parts)
  return sums


def _meet(parts: Any) -> None:
  """The warpgroups that meet see what the others wrote before."""
  _fence()
  plgpu.commit_smem()  # one thread arrives for all of the warpgroup
  plgpu.barrier_arrive(parts)
  plgpu.barrier_wait(parts)
  _fence()


def _fence() -> None:
  """Orders a thread's reads and writes of shared memory for its cluster."""

  @plgpu.inline_mgpu(arg_types=(), return_type=None)
  def fence(ctx: Any) -> None:
    del ctx
    void = ir.Type.parse("!llvm.void")
    # Without the clobber, what is before and after could change places with it.
    llvm.inline_asm(void, [], "fence.acq_rel.cluster;", "~{memory}", has_side_effects=True)

  fence()
