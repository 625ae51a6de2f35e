"""The implementations of the product, and which of them one product gets.

An implementation is one row of `IMPLEMENTATIONS`; the first that a platform has and that
does not refuse the problem is taken. The last row takes everything. A row is all that a new
kernel needs: the primitive's lowerings, and `jaxqq.explain`, are made from the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from jaxqq import _reference
from jaxqq._reference import Operands


@dataclasses.dataclass(frozen=True)
class Problem:
  """One product, as far as the choice of an implementation depends on it."""

  mode: str
  operands: Operands  # of shapes and dtypes
  out_dtype: np.dtype
  precision: jax.lax.Precision | None


@dataclasses.dataclass(frozen=True)
class Implementation:
  name: str
  summary: str  # what it does, to follow "The product is computed by"
  platforms: tuple[str, ...] | None  # as JAX names them; None is any
  refuses: Callable[[Problem], str | None]  # why it cannot take the problem, or None
  run: Callable[..., jax.Array]  # (operands, problem) -> out


IMPLEMENTATIONS: tuple[Implementation, ...] = (
  Implementation(
    name="xla",
    summary=(
      "XLA: x (and w, unless packed) is quantized, both are dequantized, and float32 matrices "
      "are multiplied at float32 precision; this is the definition (jaxqq/_reference.py), exact "
      "and not fast"
    ),
    platforms=None,
    refuses=lambda problem: None,
    run=lambda operands, problem: _reference.product(
      operands, mode=problem.mode, out_dtype=problem.out_dtype
    ),
  ),
)

# The platforms that have rows of their own.
PLATFORMS = tuple(sorted({p for row in IMPLEMENTATIONS for p in row.platforms or ()}))


def choose(problem: Problem, platform: str) -> tuple[Implementation, list[str]]:
  """The implementation that a product gets on a platform, and why not those before it."""
  refusals: list[str] = []
  for row in IMPLEMENTATIONS:
    if row.platforms is not None and platform not in row.platforms:
      reason: str | None = f"it is for {' and '.join(row.platforms)}, not {platform}"
    else:
      reason = row.refuses(problem)
    if reason is None:
      return row, refusals
    refusals.append(f"{row.name}: {reason}")
  raise AssertionError("the last row of IMPLEMENTATIONS takes every problem")
