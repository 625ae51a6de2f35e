"""The table of the ragged product, and its row for every platform: a loop over blocks of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqq._kernels import rows_of, xla
from jaxqq._kernels.plan import Device, Implementation, from_table
from jaxqq._kernels.problem import Problem, RaggedProblem
from jaxqq._ragged_reference import RaggedOperands, rows_times_matrices, sums_of_rows
from jaxqq._reference import Operands, matmul, pulled_back, to_quantize_anew


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Each block of rows times the matrix of its group, as the plain product by XLA."""

  problem: RaggedProblem
  device: Device
  details: str | None = "a loop over blocks of rows, as many as have rows in a group"

  def run(self, operands: RaggedOperands) -> jax.Array:
    problem = self.problem
    if problem.contracted == "m":
      multiple = problem.fmt.group_size if problem.quantize else 1
      sums = sums_of_rows(operands, problem.groups, self.of_block, multiple)
      return sums.astype(problem.out_dtype)
    width = problem.n if problem.contracted == "k" else problem.k
    return rows_times_matrices(operands, self.of_block, width, problem.out_dtype)

  def of_block(self, operands: Operands) -> jax.Array:
    """Of the rows of one group, zero-padded, and its matrix."""
    problem = self.problem
    has_w_hat = problem.is_packed or problem.quantize_w
    if problem.contracted == "n" and problem.quantize:
      return self.product(to_quantize_anew(operands, problem.fmt))
    if problem.contracted == "n" and has_w_hat:
      return pulled_back(operands, problem.fmt)
    if problem.contracted == "n":
      return matmul(operands.x, operands.w)
    if problem.quantize or (problem.contracted == "k" and has_w_hat):
      return self.product(operands)
    plain = operands.untransposed()
    return matmul(plain.x, jnp.swapaxes(plain.w, -1, -2))

  def product(self, operands: Operands) -> jax.Array:
    problem = self.problem
    is_sum = problem.contracted == "m"
    one = Problem.of(
      operands,
      problem.fmt,
      np.dtype(jnp.float32) if is_sum else problem.out_dtype,
      problem.precision,
      problem.out_dtype,
      problem.quantize,
    )
    return from_table(one, self.device, (xla.BFLOAT16, xla.PRODUCT)).run(operands)


def _plan(problem: RaggedProblem, device: Device) -> Any:
  return Blocks(problem, device)


RAGGED: tuple[Implementation, ...] = (
  *rows_of("ragged"),
  Implementation(
    name="xla",
    summary=(
      "XLA: the rows of each group in blocks, each multiplied with the matrix of its group as the "
      "plain product by XLA is; groups without rows cost nothing, and one matrix at a time is "
      "dequantized"
    ),
    platforms=None,
    plan=_plan,
    takes_row_scales=True,
  ),
)
