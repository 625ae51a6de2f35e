"""Which kernel a product of rows in groups gets on Hopper: those of one matrix, with other tiles.

    x, group sizes --quantizer--> x_hat, table of tiles --+--> skinny_gemm, dequant_gemm --> out
    words, scales of all matrices ------------------------+
    w --quantizer--> w_hat of all matrices ---------------+--> gemm ---------------------> out

The straight-through gradients are products of unquantized operands, in 16 bits:

    g, w of all matrices --> gemm, w transposed --> dx        g, x --> row_sums --> dw

A tile has rows of one group, and the kernel's mainloop as of any product. Tiles are chosen for as
many rows as a group has on average; how many it has is known on the device alone.

Nothing here imports Pallas: a plan can be made, and explained, without it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from jaxqq._kernels.hopper.checks import check_hopper
from jaxqq._kernels.hopper.costs import GEMM
from jaxqq._kernels.hopper.mainloops.table import packed_operand, skinny_rows
from jaxqq._kernels.hopper.skinny_plan import SkinnyPlan, skinny_plan
from jaxqq._kernels.hopper.tiles import Grid, WideTiles, cdiv
from jaxqq._kernels.hopper.wide_plan import (
  WidePlan,
  exact_plan,
  fp8_plan,
  with_stages,
)
from jaxqq._kernels.plan import Device, Implementation, Unsupported
from jaxqq._kernels.problem import Problem, RaggedProblem, tiles_of_a_group
from jaxqq._ragged_reference import RaggedOperands

# Tiles side by side in a band of `dequant_gemm`. With 8, which has divisors in common with 132 SMs,
# a CTA may have only first tiles of groups, or only last ones, which take less time.
GROUP_WIDTH = 5
MAX_TILE_ROWS = 32  # of a tile: with more, larger tiles of w are no slower
MAX_TILE_ROWS_OF_NVFP4 = 16  # beside x that is quantized


def num_group_tiles(rows: int, segments: int, block_m: int) -> int:
  """How many tiles there can be of rows in groups: each segment, one group or none, ends in one."""
  return rows // block_m + min(segments, rows)


def _grid(problem: RaggedProblem, n: int, block_m: int, block_n: int, device: Device) -> Grid:
  """Of results with n columns, with as many tiles as there can be."""
  segments = problem.batch * (problem.groups + 2)  # rows before and behind all groups are two
  tiles = num_group_tiles(problem.batch * problem.m, segments, block_m)
  return Grid(1, block_m * tiles, n, block_m, block_n, device.num_sms)


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
    block_n = self.of_group.tiles.block_n
    grid = _grid(self.problem, self.problem.n, self.block_m, block_n, self.device)
    widths = {"skinny_gemm": 1, "dequant_gemm": GROUP_WIDTH, "gemm": grid.group_width}
    return dataclasses.replace(grid, group_width=widths[self.of_group.kernel])

  @property
  def details(self) -> str:
    scales = ""
    if self.problem.quantize and self.problem.scales_by_group:
      scales = "; x is quantized by XLA, with a global scale for each group"
    return (
      f"all groups in one launch, in tiles of up to {self.block_m} rows, listed on "
      f"the device from the group sizes: {self.of_group.details}{scales}"
    )

  def run(self, operands: RaggedOperands) -> jax.Array:
    from jaxqq._kernels.hopper import launch

    return launch.ragged(self, operands)


def problem_of_group(problem: RaggedProblem) -> Problem:
  """The product of a group of as many rows as they have on average."""
  rows = problem.batch * problem.m
  all_groups = problem.groups if problem.all_groups is None else problem.all_groups
  # That have rows, at most; and those of them that have a matrix.
  with_rows = min(problem.batch * all_groups, rows)
  groups = min(problem.batch * problem.groups, with_rows)
  high = problem.precision in (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST)
  return Problem(
    fmt=problem.fmt,
    m=math.ceil(rows / with_rows),
    n=problem.n,
    k=problem.k,
    x_batch=(groups,),
    w_batch=(groups,),
    w_dtype=problem.w_dtype,
    is_packed=problem.is_packed,
    transposed=(),
    has_global_scales=problem.has_global_scales,
    out_dtype=problem.out_dtype,
    wants_exact_sums=high or (problem.result_dtype or problem.out_dtype) == np.float32,
    obstacle=problem.obstacle,
    x_dtype=problem.x_dtype,
    quantize_input=problem.quantize,
    in_groups=True,
  )


def check(problem: RaggedProblem, device: Device) -> Problem:
  """The problem of a group; raises Unsupported where no kernel takes the products."""
  check_hopper(problem.obstacle, device)
  if problem.contracted != "k":
    raise Unsupported("it is a gradient, and these kernels sum over k")
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
  rows, most = skinny_rows(own), MAX_TILE_ROWS
  if packed_operand(own) == "packed_e2m1":
    most = MAX_TILE_ROWS_OF_NVFP4
  if rows > most:
    raise Unsupported(f"groups have {own.m} rows on average, and it is for tiles of up to {most}")
  plan = skinny_plan(own, device)
  if plan.padded_k("w") > problem.k:
    raise Unsupported(f"k = {problem.k}, and w of all groups would be padded")
  return RaggedPlan(plan, problem, device)


def _fp8(problem: RaggedProblem, device: Device) -> RaggedPlan:
  return RaggedPlan(fp8_plan(check(problem, device), device), problem, device)


def _exact(problem: RaggedProblem, device: Device) -> RaggedPlan:
  return RaggedPlan(exact_plan(check(problem, device), device), problem, device)


# Straight-through gradients


@dataclasses.dataclass(frozen=True)
class GradientPlan:
  """dx by `gemm`, or dw by `row_sums`.

  Attributes:
    tiles: of `gemm`; `row_sums` has its own.
    problem, device: what for.
  """

  tiles: WideTiles | None
  problem: RaggedProblem
  device: Device

  @property
  def grid(self) -> Grid:
    """Of dx, with as many tiles as there can be."""
    assert self.tiles is not None
    tiles = self.tiles
    return _grid(self.problem, self.problem.k, tiles.block_m, tiles.block_n, self.device)

  @property
  def details(self) -> str:
    which = "row_sums" if self.tiles is None else f"gemm with {self.tiles}, w transposed"
    return f"all groups in one launch: {which}"

  def run(self, operands: RaggedOperands) -> jax.Array:
    from jaxqq._kernels.hopper import launch

    return launch.ragged_gradient(self, operands)


def _gradient(problem: RaggedProblem, device: Device) -> GradientPlan:
  check_hopper(problem.obstacle, device)
  if problem.contracted == "k" or problem.quantize or problem.quantize_w or problem.is_packed:
    raise Unsupported("it is for gradients of unquantized operands")
  if problem.x_dtype.itemsize != 2 or problem.w_dtype != problem.x_dtype:
    raise Unsupported(f"operands are {problem.x_dtype} and {problem.w_dtype}, not 16 bits both")
  if problem.precision not in (None, jax.lax.Precision.DEFAULT):
    raise Unsupported("precision is above DEFAULT, and tensor cores cut off sums")
  if problem.n % 8 or problem.k % 64:
    raise Unsupported(f"n = {problem.n} and k = {problem.k} are no multiples of 8 and of 64")
  if problem.contracted == "m":
    return GradientPlan(None, problem, device)
  own = problem_of_group(problem)
  times = {}
  for timed in GEMM:
    tiles = WideTiles(timed.block_m, block_n=timed.block_n)
    with_room = with_stages(tiles, "ready", problem.n, problem.out_dtype.itemsize)
    if with_room is not None:
      count = math.ceil(own.batch * tiles_of_a_group(own.m, timed.block_m))
      grid = Grid(count, timed.block_m, problem.k, timed.block_m, timed.block_n, device.num_sms)
      times[with_room] = timed.time(grid, cdiv(problem.n, 128))
  return GradientPlan(min(times, key=times.__getitem__), problem, device)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
  Implementation(
    name="hopper_gradient",
    summary=(
      "16 bit tensor cores: a kernel multiplies unquantized operands, of each group its rows with "
      "its matrix, or the rows of two operands, with float32 sums"
    ),
    platforms=("cuda",),
    plan=_gradient,
  ),
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
