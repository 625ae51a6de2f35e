"""Which kernel a product of rows in groups gets on Hopper: those of one matrix, with other tiles.

    group sizes --XLA--> table of tiles (`grouped.py`) --+
    x --quantizer--> x_hat ------------------------------+--> skinny_gemm, dequant_gemm --> out
    words, scales of all matrices -----------------------+
    w --quantizer--> w_hat of all matrices --------------+--> gemm ---------------------> out

A tile has rows of one group, and the kernel's mainloop as of any product. Tiles are chosen for as
many rows as a group has on average; how many it has is known on the device alone.

Nothing here imports Pallas: a plan can be made, and explained, without it.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from jaxqq._kernels.hopper import plan as of_one_matrix
from jaxqq._kernels.hopper.plan import SkinnyPlan, WidePlan
from jaxqq._kernels.hopper.tiles import ROWS, Grid, power_of_two_from
from jaxqq._kernels.plan import Device, Implementation, Unsupported
from jaxqq._kernels.problem import Problem, RaggedProblem
from jaxqq._ragged_reference import RaggedOperands

MAX_SKINNY_ROWS = 32  # of a tile: with more, larger tiles of w are no slower


@dataclasses.dataclass(frozen=True)
class RaggedPlan:
  """All groups in one launch.

  Attributes:
    of_group: the plan of one group's product, whose kernel, tiles and mainloop these are.
    problem, device: what for.
  """

  of_group: SkinnyPlan | WidePlan
  problem: RaggedProblem
  device: Device

  @property
  def block_m(self) -> int:
    """Rows of x in a tile, at most."""
    if isinstance(self.of_group, SkinnyPlan):
      return self.of_group.padded_m
    return self.of_group.tiles.block_m

  @property
  def grid(self) -> Grid:
    """With as many tiles as there can be."""
    problem, is_skinny = self.problem, isinstance(self.of_group, SkinnyPlan)
    block_n = ROWS if isinstance(self.of_group, SkinnyPlan) else self.of_group.tiles.block_n
    segments = problem.batch * (problem.groups + 2)  # rows before and behind all groups are two
    rows = problem.batch * problem.m
    return Grid(
      batch=1,
      m=self.block_m * (rows // self.block_m + min(segments, rows)),
      n=problem.n,
      block_m=self.block_m,
      block_n=block_n,
      num_sms=self.device.num_sms,
      group_width=1 if is_skinny else 8,
    )

  @property
  def details(self) -> str:
    scales = ""
    if self.problem.quantize and self.problem.scales_by_group:
      scales = "; x is quantized by XLA, with a global scale for each group"
    return (
      f"all groups in one launch, in tiles of up to {self.block_m} rows, which XLA lists from the "
      f"group sizes: {self.of_group.details}{scales}"
    )

  def run(self, operands: RaggedOperands) -> jax.Array:
    from jaxqq._kernels.hopper import launch

    return launch.ragged(self, operands)


def problem_of_group(problem: RaggedProblem) -> Problem:
  """The product of a group of as many rows as they have on average."""
  rows = problem.batch * problem.m
  groups = min(problem.batch * problem.groups, rows)  # that have rows, at most
  high = problem.precision in (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST)
  return Problem(
    fmt=problem.fmt,
    m=math.ceil(rows / groups),
    n=problem.n,
    k=problem.k,
    x_batch=(groups,),
    w_batch=(groups,),
    w_dtype=problem.w_dtype,
    is_packed=problem.is_packed,
    transposed=(),
    has_global_scales=problem.has_global_scales,
    out_dtype=problem.out_dtype,
    wants_exact_sums=high or problem.out_dtype == jax.numpy.float32,
    obstacle=problem.obstacle,
    x_dtype=problem.x_dtype,
    quantize_input=problem.quantize,
    in_groups=True,
  )


def check(problem: RaggedProblem, device: Device) -> Problem:
  """The problem of a group; raises Unsupported where no kernel takes the products."""
  of_one_matrix.check_hopper(problem.obstacle, device)
  if problem.contracted != "k":
    raise Unsupported("it is a derivative, whose products XLA computes")
  if not problem.is_packed and problem.scales_of_matrices:
    raise Unsupported("w is not packed, and has a global scale for each matrix")
  if not problem.is_packed and problem.batch * problem.m < problem.groups:
    raise Unsupported(
      "w is not packed, and all of it would be quantized for fewer rows than groups"
    )
  return problem_of_group(problem)


def _skinny(problem: RaggedProblem, device: Device) -> RaggedPlan:
  own = check(problem, device)
  if not problem.is_packed:
    raise Unsupported("w is not packed")
  rows = math.ceil(1.25 * own.m)
  if power_of_two_from(rows) > MAX_SKINNY_ROWS:
    raise Unsupported(
      f"groups have {own.m} rows on average, and it is for tiles of up to {MAX_SKINNY_ROWS}"
    )
  plan = of_one_matrix.skinny_plan(own, device)
  if plan.padded_k("w") > problem.k:
    raise Unsupported(f"k = {problem.k}, and w of all groups would be padded")
  return RaggedPlan(plan, problem, device)


def _fp8(problem: RaggedProblem, device: Device) -> RaggedPlan:
  return RaggedPlan(of_one_matrix.fp8_plan(check(problem, device), device), problem, device)


def _exact(problem: RaggedProblem, device: Device) -> RaggedPlan:
  return RaggedPlan(of_one_matrix.exact_plan(check(problem, device), device), problem, device)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
  Implementation(
    name="hopper_skinny",
    summary=(
      "a kernel that streams the matrices of groups with rows through the tensor cores, as that "
      "of one matrix does"
    ),
    platforms=("cuda",),
    plan=_skinny,
  ),
  Implementation(
    name="hopper_fp8",
    summary=(
      "fp8 tensor cores: a kernel quantizes x to e4m3 codes under one power of two a row, another "
      "multiplies the rows of each group with its matrix (packed w expanded in registers), and "
      "adds every 128 products in float32"
    ),
    platforms=("cuda",),
    plan=_fp8,
  ),
  Implementation(
    name="hopper_exact",
    summary=(
      "16 bit tensor cores on exact operands: a kernel quantizes x, another multiplies the rows of "
      "each group with its matrix (packed w expanded in registers); x that is not to be quantized "
      "is taken as it is"
    ),
    platforms=("cuda",),
    plan=_exact,
  ),
)
