"""Products and tiles of `gemm`, `dequant_gemm` and `staged_gemm`: many rows of x, or many of w.

Each tile is tried, in clusters of several sizes and with stream-K; that is taken which takes least
time by the costs (`costs.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax

from jaxqq._formats import Format
from jaxqq._kernels.hopper.checks import check_fp8, check_product, for_sms
from jaxqq._kernels.hopper.costs import CLUSTERS, GEMM, STREAM_K_GAIN, Timed
from jaxqq._kernels.hopper.mainloops.table import PART_K, PARTS, Part, packed_operand
from jaxqq._kernels.hopper.tiles import (
  DEALT_STEPS,
  DEQUANT_STORE,
  GEMM_STORE,
  ROWS,
  SCALES,
  SHARED_MEMORY,
  STAGED_BLOCK_N,
  SWIZZLED_BYTES,
  TMA_BYTES,
  Grid,
  WideTiles,
  cdiv,
  planes_of,
  power_of_two_up_to,
  rows_of_scales,
  scale_bytes,
  scale_slots,
)
from jaxqq._kernels.plan import Device
from jaxqq._kernels.problem import Problem, tiles_of_a_group
from jaxqq._reference import Operands


@dataclasses.dataclass(frozen=True)
class WidePlan:
  """A product of more rows of x than `skinny_gemm` takes, or for which it is slower.

  Attributes:
    kernel: the file in this folder that has it.
    mainloop: what becomes of w, ready in memory or expanded in registers: a name of
      `mainloops.table.PARTS`.
    fp8: operands are e4m3 codes, rebased, and the epilogue multiplies by the scales of both
      operands' rows; else they are exact 16 bit floats, and it multiplies by global scales.
    tiles: what was chosen.
    estimate_us: how long it takes on an H200, by the costs in `costs.py`.
    problem, device: what for.
  """

  kernel: Literal["gemm", "dequant_gemm", "staged_gemm"]
  mainloop: str
  fp8: bool
  tiles: WideTiles
  estimate_us: float
  problem: Problem
  device: Device

  @property
  def grid(self) -> Grid:
    return _wide_grid(self.problem, self.tiles, self.device)

  @property
  def panel_rows(self) -> int:
    """Of w, that `staged_gemm` expands at a time."""
    return panel_rows(self.grid, self.problem.k * (1 if self.fp8 else 2))

  @property
  def details(self) -> str:
    staged = ""
    if self.kernel == "staged_gemm":
      staged = f", packed w expanded a panel at a time, of {self.panel_rows} rows"
    time = ""
    if self.kernel == "dequant_gemm":  # else the time of what makes w ready is not known
      time = f", about {self.estimate_us:.0f} us on an H200"
    how = f"({self.mainloop}) with {self.tiles}{time}{staged}{self._padded}"
    return f"{self.kernel} {how}{for_sms(self.device)}"

  @property
  def _padded(self) -> str:
    """What XLA copies, to add zeros."""
    k, fmt = self.problem.k, self.problem.fmt
    if self.kernel != "dequant_gemm":
      is_padded = k % PART_K and not self.fp8  # whose loads go past the end
      return f", K padded to a multiple of {PART_K} by XLA" if is_padded else ""
    copied = {
      "x": self.mainloop == "packed_e2m1" and k % PART_K,
      "w": k % row_unit(fmt),
      "scales": k % row_unit(fmt) or (self.fp8 and self._scales_of_row != k // fmt.group_size),
    }
    names = [name for name, is_copied in copied.items() if is_copied]
    along_k = f", {' and '.join(names)} padded along K by XLA" if names else ""
    planes = planes_of(self._scales_of_row, SCALES, self.tiles.block_n)
    more = rows_of_scales(self.problem.n, planes) > self.problem.n
    return along_k + (", scales padded along N by XLA" if more else "")

  @property
  def _scales_of_row(self) -> int:
    """Of `dequant_gemm`."""
    return scales_of_row(self.problem.k, PARTS[self.mainloop], fp8=self.fp8)

  def run(self, operands: Operands) -> jax.Array:
    from jaxqq._kernels.hopper import launch

    return launch.wide(self, operands)


def _wide_grid(problem: Problem, tiles: WideTiles, device: Device) -> Grid:
  batch, m = problem.batch, problem.rows
  if problem.in_groups:
    batch, m = math.ceil(batch * tiles_of_a_group(m, tiles.block_m)), tiles.block_m
  return Grid(
    batch=batch,
    m=m,
    n=problem.n,
    block_m=tiles.block_m,
    block_n=tiles.block_n,
    num_sms=device.num_sms,
    cluster=tiles.cluster,
    stream_k=tiles.stream_k,
  )


# From how many rows of x on packed w of 8 bit codes is expanded a panel at a time: two kernels then
# expand each number once. Codes of 4 bits are faster in registers at any number of rows.
STAGED_MIN_ROWS = 3072
# A wave of CTAs, as a share of one of `dequant_gemm`, the expansion of its panel included.
STAGED_WAVE = 0.92


PANEL_BYTES = 32 << 20  # of expanded w, that stay in an H200's 50 MB of L2 cache
_PANEL_US = 5.0  # of two launches, before and after their steps
_MEMORY_BYTES_PER_US = 4e6


def panel_rows(grid: Grid, row_bytes: int) -> int:
  """Rows of w, whole tiles, that `staged_gemm` expands at a time to take least time.

  The last wave of a panel's CTAs may leave most SMs idle. Then a panel of twice what the L2 cache
  holds is better, though it is written to memory and read again.

  Args:
    grid: of the whole product.
    row_bytes: of expanded w.
  """
  timed = next(t for t in GEMM if (t.block_m, t.block_n) == (grid.block_m, grid.block_n))
  blocks = cdiv(grid.n, STAGED_BLOCK_N)

  def time_us(count: int) -> float:
    panel = dataclasses.replace(grid, n=count * STAGED_BLOCK_N)
    moved = 2 * panel.n * row_bytes if panel.n * row_bytes > PANEL_BYTES else 0
    one = timed.time(panel, cdiv(row_bytes, SWIZZLED_BYTES)) + _PANEL_US
    return cdiv(blocks, count) * (one + moved / _MEMORY_BYTES_PER_US)

  most = 2 * PANEL_BYTES // (row_bytes * STAGED_BLOCK_N)
  counts = range(max(min(most, blocks), 1), 0, -1)  # of equal times, the first: the fewest panels
  return STAGED_BLOCK_N * min(counts, key=time_us)


def wide_plan(problem: Problem, device: Device, *, fp8: bool) -> WidePlan:
  return fastest(wide_plans(problem, device, fp8=fp8))


def fastest(plans: Sequence[WidePlan]) -> WidePlan:
  """That which takes least time by the costs."""
  return min(plans, key=expected_us)


def expected_us(plan: WidePlan) -> float:
  """By which plans are compared: more than its estimate where that is least certain."""
  return plan.estimate_us * (STREAM_K_GAIN if plan.tiles.stream_k else 1)


def wide_plans(problem: Problem, device: Device, *, fp8: bool) -> list[WidePlan]:
  """A plan for each of the tiles that can be."""
  kernel, mainloop = _wide_kernel(problem, device, fp8)
  part, out_bytes = PARTS[mainloop], problem.out_dtype.itemsize
  x_rows = problem.batch * problem.rows if problem.quantize_input else 0
  w_rows = 0 if problem.in_groups else problem.batch * problem.n
  plans: dict[WideTiles, WidePlan] = {}
  ways: list[tuple[int, bool]] = [(cluster, False) for cluster in CLUSTERS]
  if kernel == "dequant_gemm" and not problem.in_groups:
    ways.append((1, True))
  for timed, (cluster, stream_k) in itertools.product(part.costs, ways):
    # No more than k has: of an axis that is one piece Mosaic GPU knows no end, and loads it again.
    parts = min(timed.parts, power_of_two_up_to(cdiv(problem.k, part.k)))
    k_steps = cdiv(problem.k, parts * part.k)
    tiles = WideTiles(
      block_m=timed.block_m,
      block_n=timed.block_n,
      promote=fp8 or problem.wants_exact_sums,
      cluster=cluster,
      stream_k=stream_k,
      parts=parts,
    )
    grid = _wide_grid(problem, tiles, device)
    if stream_k and not _can_deal_out(timed, grid, k_steps, parts):
      continue
    if cluster > 1 and not _can_share(timed, tiles, grid, k_steps, problem, device):
      continue
    if not _has_registers(tiles, problem):
      continue
    with_room = with_stages(tiles, mainloop, problem.k, out_bytes)
    if with_room is not None:
      time = timed.time(grid, k_steps, parts, x_rows, w_rows)
      plans[with_room] = WidePlan(kernel, mainloop, fp8, with_room, time, problem, device)
  return list(plans.values())


def _can_deal_out(timed: Timed, grid: Grid, k_steps: int, parts: int) -> bool:
  """Whether stream-K has a measured time, and may gain.

  Every CTA gets enough steps. Tiles are not short. And few CTAs share a tile, since the last one
  adds up the sums of all.
  """
  return (
    timed.stream_k is not None
    and grid.dealt_tiles * k_steps * parts >= MIN_STREAM_K_PARTS * grid.num_sms
    and grid.dealt_tiles * (k_steps // DEALT_STEPS) >= grid.num_sms
    and MAX_STREAM_K_SHARES * grid.dealt_tiles >= grid.num_sms
    and k_steps * parts >= MIN_STREAM_K_TILE_PARTS
  )


def _can_share(
  timed: Timed, tiles: WideTiles, grid: Grid, k_steps: int, problem: Problem, device: Device
) -> bool:
  """All CTAs that share a tile run at once, and have rows to store, of 16 bit results.

  Each has two steps or more, which the kernel's loop needs.
  """
  return (
    timed.cluster_us is not None
    and not problem.in_groups
    and grid.num_tiles <= device.num_clusters(tiles.cluster)
    and k_steps >= 2 * tiles.cluster
    and tiles.own_m * (tiles.cluster - 1) < tiles.block_m
    and problem.out_dtype.itemsize == 2
  )


def _has_registers(tiles: WideTiles, problem: Problem) -> bool:
  """Whether sums fit into registers.

  Exact sums are two accumulators, of a step and of all steps. There is room with two warpgroups,
  in ping-pong where x has many rows, or with three and up to 64 rows of x.
  """
  is_narrow = tiles.block_n <= 2 * ROWS or (tiles.block_n <= 3 * ROWS and tiles.block_m <= ROWS)
  return is_narrow or not problem.wants_exact_sums


_MAX_STAGES = 9
# Of steps of one part, and of fp8: 128 x 43008 x 5376 took 103 us by steps of two parts in two
# stages, and 85 by steps of one in five. Else two.
_MIN_STAGES = 3
MIN_STREAM_K_PARTS = 8  # of steps, of a CTA
MIN_STREAM_K_TILE_PARTS = 40
MAX_STREAM_K_SHARES = 6  # CTAs a tile


def with_stages(tiles: WideTiles, mainloop: str, k: int, out_bytes: int) -> WideTiles | None:
  """With as many steps in shared memory as there is room for, or None if for too few.

  A step more is worth more than a second piece of the result on its way out.

  Args:
    tiles: without.
    mainloop: as of `WidePlan`.
    k: of the product.
    out_bytes: of a number of the result.
  """
  block_m, block_n = tiles.block_m, tiles.block_n
  part, fp8 = PARTS[mainloop], mainloop == "rebased_e4m3"
  from_cluster = 4 * (tiles.cluster - 1) * tiles.own_m * block_n
  piece = out_bytes * block_n * (GEMM_STORE if mainloop == "ready" else DEQUANT_STORE)

  def size(stages: int, store_stages: int) -> int:
    scales = 0
    if part.scales:
      steps, of_block = cdiv(k, tiles.parts * part.k), SCALES // (tiles.parts * part.scales)
      slots = scale_slots(steps, of_block, stages, stream_k=tiles.stream_k)
      of_row = scales_of_row(k, part, fp8=fp8)
      planes = planes_of(of_row, SCALES, block_n)
      scales = slots * scale_bytes(planes, SCALES, block_n)
    loads = stages * tiles.parts * (128 * block_m + part.bytes * block_n)
    return loads + scales + from_cluster + store_stages * piece

  fewest = _MIN_STAGES if fp8 or tiles.parts == 1 else 2
  for stages, store_stages in itertools.product(range(_MAX_STAGES, fewest - 1, -1), (2, 1)):
    if size(stages, store_stages) <= SHARED_MEMORY:
      return dataclasses.replace(tiles, num_stages=stages, store_stages=store_stages)
  return None


def row_unit(fmt: Format) -> int:
  """Elements of packed w that the TMA wants rows to be a multiple of."""
  return 8 * TMA_BYTES // fmt.bits


def scales_of_row(k: int, part: Part, *, fp8: bool) -> int:
  """Bytes of a row of scales as `dequant_gemm` takes them; of fp8 what rescales codes."""
  group_size, unit = part.k // part.scales, TMA_BYTES * part.k // part.bytes
  count = cdiv(cdiv(k, unit) * unit, group_size)  # w is padded to whole rows, and scales with it
  return cdiv(count, 4) * 4 if fp8 and (count % 2 or count <= 2) else count


def _wide_kernel(problem: Problem, device: Device, fp8: bool) -> tuple[Any, Any]:
  """The fields `kernel` and `mainloop` of a plan."""
  if not problem.is_packed:
    return "gemm", "ready"
  one_matrix = problem.batch == 1 and not problem.in_groups
  many_rows = one_matrix and problem.rows >= STAGED_MIN_ROWS
  whole_tiles = problem.n % STAGED_BLOCK_N == 0
  if problem.fmt.bits == 8 and many_rows and whole_tiles and _staging_pays(problem, device, fp8):
    return "staged_gemm", "ready"
  return "dequant_gemm", "rebased_e4m3" if fp8 else packed_operand(problem)


def _staging_pays(problem: Problem, device: Device, fp8: bool) -> bool:
  """Whether panels leave so few SMs idle that what they save is more."""
  whole = Grid(1, problem.rows, problem.n, 256, STAGED_BLOCK_N, device.num_sms)
  rows = panel_rows(whole, problem.k * (1 if fp8 else 2))
  panel = dataclasses.replace(whole, n=rows)
  waves = cdiv(problem.n, rows) * cdiv(panel.num_tiles, device.num_sms)
  return STAGED_WAVE * waves <= cdiv(whole.num_tiles, device.num_sms)


def fp8_plan(problem: Problem, device: Device) -> WidePlan:
  check_fp8(problem, device)
  return wide_plan(problem, device, fp8=True)


def exact_plan(problem: Problem, device: Device) -> WidePlan:
  check_product(problem, device)
  return wide_plan(problem, device, fp8=False)
