"""How tests compile their programs fast: LLVM optimizes little; XLA's passes are the same."""

from __future__ import annotations

import jax

OPTION = "jax_disable_most_optimizations"


def optimizes() -> bool:
  return not jax.config.read(OPTION)


def optimize(on: bool) -> None:
  """As for users from here on, or little. What is compiled already stays as it is."""
  jax.config.update(OPTION, not on)
