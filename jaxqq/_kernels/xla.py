"""The product by XLA: the definition (`jaxqq/_reference.py`), and that on matrix units."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxqq import _reference
from jaxqq._kernels.plan import Device, Implementation, Unsupported
from jaxqq._kernels.problem import Problem
from jaxqq._reference import Operands


@dataclasses.dataclass(frozen=True)
class Reference:
  """x (and w, unless packed) quantized, both dequantized, and multiplied with float32 sums."""

  problem: Problem
  dtype: Any = jnp.float32  # of what is multiplied
  details: str | None = None

  def run(self, operands: Operands) -> jax.Array:
    fmt, out_dtype = self.problem.fmt, self.problem.out_dtype
    return _reference.product(operands, fmt=fmt, out_dtype=out_dtype, dtype=self.dtype)


def _plan(problem: Problem, device: Device) -> Reference:
  del device
  return Reference(problem)


def _plan_bfloat16(problem: Problem, device: Device) -> Reference:
  del device
  if problem.wants_exact_sums:
    raise Unsupported(
      "float32 output, or precision above DEFAULT, takes float32 sums, and matrix units may cut "
      "off theirs"
    )
  return Reference(problem, jnp.bfloat16)


BFLOAT16 = Implementation(
  name="xla_bfloat16",
  summary=(
    "XLA, on matrix units: x (and w, unless packed) is quantized, both are dequantized to "
    "bfloat16, which holds them exactly, and multiplied with float32 sums"
  ),
  platforms=("cuda", "rocm", "tpu"),
  plan=_plan_bfloat16,
)


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
