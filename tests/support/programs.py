"""The text of a program that is lowered for CUDA, on whatever machine, and what it holds."""

from __future__ import annotations

import jax


def lowered_for_cuda(f, *args) -> str:
  """The StableHLO of f for operands like these."""
  return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def count_kernels(text: str) -> int:
  """How many Mosaic GPU kernels a program calls."""
  return text.count("custom_call @mosaic_gpu_v2")
