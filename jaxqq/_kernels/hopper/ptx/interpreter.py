"""Whether kernels are interpreted: the only switch between hardware and Mosaic's interpreter."""

from __future__ import annotations

import jax.experimental.pallas.mosaic_gpu as plgpu

from jaxqq import _compat


def interpreting() -> bool:
  """Within `plgpu.force_gpu_interpret_mode`: a kernel then runs on a CPU, as array operations."""
  return _compat.interprets_kernels()


def finish_loads() -> None:
  """Loads from shared memory are over, so that a barrier may say so.

  On a GPU they are once their values are used. The interpreter has no such rule.
  """
  if interpreting():
    plgpu.commit_smem()
