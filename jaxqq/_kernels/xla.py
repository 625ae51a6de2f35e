"""The product on every platform, by XLA: the definition (`jaxqq/_reference.py`)."""

from __future__ import annotations

import dataclasses

import jax

from jaxqq import _reference
from jaxqq._kernels.plan import Device, Implementation
from jaxqq._kernels.problem import Problem
from jaxqq._reference import Operands


@dataclasses.dataclass(frozen=True)
class Reference:
  """x (and w, unless packed) quantized, both dequantized, and multiplied in float32."""

  problem: Problem
  details: str | None = None

  def run(self, operands: Operands) -> jax.Array:
    problem = self.problem
    return _reference.product(operands, fmt=problem.fmt, out_dtype=problem.out_dtype)


def _plan(problem: Problem, device: Device) -> Reference:
  del device
  return Reference(problem)


PRODUCT = Implementation(
  name="xla",
  summary=(
    "XLA: x (and w, unless packed) is quantized, both are dequantized, and float32 matrices "
    "are multiplied at float32 precision; this is the definition (jaxqq/_reference.py), exact "
    "and not fast"
  ),
  platforms=None,
  plan=_plan,
)
