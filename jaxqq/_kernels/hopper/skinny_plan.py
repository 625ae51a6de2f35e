"""Products and tiles of `skinny_gemm`: up to 64 rows of x."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import jax

from jaxqq._kernels.hopper.checks import check_fp8, check_product, for_sms
from jaxqq._kernels.hopper.costs import SKINNY_E2M1, counts
from jaxqq._kernels.hopper.mainloops.table import PART_K, skinny_mainloop, skinny_rows
from jaxqq._kernels.hopper.tiles import (
  ROWS,
  SHARED_MEMORY,
  SWIZZLED_BYTES,
  TILE_ROWS,
  TMA_BYTES,
  TMA_ROWS,
  BlockDiagonal,
  Grid,
  KBlock,
  ScalePlanes,
  SkinnyTiles,
  cdiv,
  planes_of,
  power_of_two_from,
  rows_of_scales,
  scale_bytes,
)
from jaxqq._kernels.hopper.wide_plan import wide_plan
from jaxqq._kernels.plan import Device, Unsupported
from jaxqq._kernels.problem import Problem
from jaxqq._reference import Operands

MAX_SKINNY_ROWS = 64
MAX_GROUP_SUMS_ROWS = 32  # with more, rebasing codes costs less than scaling every group's sums
MAX_ROWS_OF_ANY_CLUSTER = 32  # with more, the sums that its first CTA adds take what others save
MIN_SHARED_BLOCKS = 8  # of k, of tiles of a last wave that clusters share: with 4 it took longer
# Stream-K hands sums over, which takes 2 us: it has to save each CTA so many blocks of k. And it
# pays where a block takes longer to multiply than to load: fewer CTAs than SMs load as fast.
MIN_SAVED_BLOCKS = 12
MIN_ROWS_OF_STREAM_K = {"sixteens": 1, "group_sums": 17}
SKINNY_BLOCK_K = 512  # of packed w; nvfp4 also has half of it
MAX_ROWS_OF_LARGE_BLOCKS = 16  # of nvfp4 that is expanded
# Rows of x that the kernel quantizes, by mainloop; and of a small w: rows, where all of a CTA's
# tiles together have no more of k than that. Every CTA quantizes them: with more, w waits for x.
MAX_ROWS_QUANTIZED = {"blockdiag": 1, "group_sums": 8}
MAX_OF_SMALL = {"blockdiag": (4, 4096), "sixteens": (8, 2048), "group_sums": (16, 2048)}
MIN_ROWS_OF_SIXTEENS = 4  # that its quantizer has at a time


@dataclasses.dataclass(frozen=True)
class SkinnyPlan:
  """A product of up to 64 rows of x.

  Attributes:
    mainloop: what becomes of w: a name of `mainloops.table.skinny_mainloops`.
    block: what is loaded of w at once.
    padded_m: rows of x, or columns of block-diagonal x, in shared memory.
    blockdiag: of the mainloop of that name.
    quantizes_x: whether this kernel does, or another one before it.
    tiles, problem, device: as of `WidePlan`.
  """

  mainloop: str
  block: KBlock
  padded_m: int
  blockdiag: BlockDiagonal | None
  quantizes_x: bool
  tiles: SkinnyTiles
  problem: Problem
  device: Device
  kernel: Literal["skinny_gemm"] = "skinny_gemm"

  @property
  def grid(self) -> Grid:
    return _grid(self.problem, self.tiles, self.device)

  @property
  def details(self) -> str:
    blockdiag = "" if self.blockdiag is None else f" with {self.blockdiag}"
    x = ", x quantized in the kernel" if self.quantizes_x else ""
    what = [name for name in ("x", "w", "scales") if self.padded_k(name) > self.problem.k]
    padded = f", {' and '.join(what)} padded along K by XLA" if what else ""
    n = self.problem.n
    if self.problem.is_packed and rows_of_scales(n, self.scale_planes) > n:
      padded += ", scales padded along N by XLA"
    layout = ""
    if self.in_rows:
      unit = math.lcm(*_tile_units(self.problem, self.block))
      size, unit = ("K", unit) if self.problem.k % unit else ("N", TILE_ROWS)
      why = f"{size} is no multiple of {unit}"
      why = "groups begin at any row" if self.problem.in_groups else why
      layout = f", loaded in rows of {SWIZZLED_BYTES} bytes since {why}"
      planes = self.scale_planes
      if planes is not None:
        layout += (
          ", scales as whole rows" if planes.is_whole else f", scales in {planes.count} planes"
        )
    how = f"({self.mainloop}) with {self.block} {self.tiles}{blockdiag}{x}{layout}{padded}"
    return f"{self.kernel} {how}{for_sms(self.device)}"

  def padded_k(self, name: str) -> int:
    """K of x, w or scales as the kernel takes them: past their end, loads are zeros.

    Rows are to be as far apart as loads need, those of the scales of block-diagonal x, too.
    """
    k, block = self.problem.k, self.block
    if name == "x":
      unit = block.k
      if self.x_in_rows:  # 64 that are interleaved, or have 16 bytes of block-diagonal x's scales
        unit = 64 if self.mainloop in ("expanded", "blockdiag") else 8
    elif name == "w":
      unit = 8 * (TMA_BYTES if self.in_rows else SWIZZLED_BYTES) // block.bits
    else:
      unit = 1 if self.scale_planes is not None else TMA_BYTES * (block.group_size or 1)
    return cdiv(k, unit) * unit

  @property
  def in_rows(self) -> bool:
    """Whether shared memory has w in rows of 128 bytes, whose loads may go past the end."""
    return _in_rows(self.problem, self.block)

  @property
  def x_in_rows(self) -> bool:
    """The same of x: as it is, it may have fewer rows than a tile of shared memory."""
    return _x_in_rows(self.problem, self.block) or (
      not self.problem.quantize_input and self.problem.rows % self.padded_m != 0
    )

  @property
  def scale_planes(self) -> ScalePlanes | None:
    """How the TMA loads scales whose rows are no multiple of 16 bytes apart."""
    return _scale_planes(self.problem, self.block, self.tiles)

  def run(self, operands: Operands) -> jax.Array:
    from jaxqq._kernels.hopper import launch

    return launch.skinny(self, operands)


def _grid(problem: Problem, tiles: SkinnyTiles, device: Device) -> Grid:
  return Grid(
    batch=problem.batch,
    m=problem.rows,
    n=problem.n,
    block_m=MAX_SKINNY_ROWS,
    block_n=tiles.block_n,
    num_sms=device.num_sms,
    cluster=tiles.cluster,
    group_width=1,
    stream_k=tiles.stream_k,
    shares_last=tiles.shares_last,
    dealt_steps=1,
  )


def skinny_plan(problem: Problem, device: Device) -> SkinnyPlan:
  check_product(problem, device)
  rows, is_packed = skinny_rows(problem), problem.is_packed
  if not is_packed and problem.transposed:
    raise Unsupported("w is not packed, and an operand's contracted axis comes first")
  if not is_packed and not problem.quantize_input:
    raise Unsupported("w is not packed and x not quantized")
  if not is_packed and problem.w_dtype.itemsize != 2:
    raise Unsupported(f"w is not packed but {problem.w_dtype}, and it quantizes 16 bit floats")
  if rows > MAX_SKINNY_ROWS:
    raise Unsupported(
      f"{rows} rows of x are multiplied with one matrix w, and it is for at most {MAX_SKINNY_ROWS}"
    )
  mainloop = skinny_mainloop(problem)
  block = _k_block(problem, mainloop)
  if problem.k < block.k:
    raise Unsupported(f"k = {problem.k}, and it loads {block.k} of k at once")
  if mainloop == "in_order" and block.k == SKINNY_BLOCK_K and rows > MAX_SKINNY_ROWS // 2:
    raise Unsupported(f"{rows} rows of x, {block.k} of k at once, take more shared memory")
  if mainloop == "group_sums":
    check_fp8(problem, device)
    if rows > MAX_GROUP_SUMS_ROWS:
      raise Unsupported(f"{rows} rows of x, and of mxfp8 it is for at most {MAX_GROUP_SUMS_ROWS}")
  blockdiag, padded_m = None, 8 * cdiv(rows, 8)  # the TMA moves 8 rows at a time
  if mainloop == "blockdiag":
    blockdiag = BlockDiagonal(power_of_two_from(rows))
    padded_m = blockdiag.columns
  tiles = _skinny_tiles(problem, device, mainloop, block, padded_m)
  few = rows <= _max_rows_quantized(problem, device, mainloop, tiles)
  quantizes_x = few and block.k == SKINNY_BLOCK_K and not _x_in_rows(problem, block)
  plan = SkinnyPlan(mainloop, block, padded_m, blockdiag, quantizes_x, tiles, problem, device)
  if mainloop == "expanded" or (mainloop == "in_order" and rows > MAX_SKINNY_ROWS // 2):
    timed = next(timed for timed in SKINNY_E2M1 if rows <= timed.rows)
    parts = cdiv(problem.k, PART_K)
    if plan.grid.shares_every:  # each CTA has whole blocks
      parts = tiles.cluster * cdiv(problem.k, tiles.cluster * block.k) * (block.k // PART_K)
    own = timed.time(plan.grid, parts)
    other = wide_plan(problem, device, fp8=False).estimate_us
    if other < own:
      raise Unsupported(
        f"it would take about {own:.0f} us on an H200, and larger tiles {other:.0f}"
      )
  return plan


def _max_rows_quantized(problem: Problem, device: Device, mainloop: str, tiles: SkinnyTiles) -> int:
  """Of x, by the kernel itself."""
  of_16 = problem.fmt.group_size == 16 and problem.rows >= MIN_ROWS_OF_SIXTEENS
  if not problem.quantize_input or (mainloop == "sixteens" and not of_16):
    return 0
  rows, most_of_k = MAX_OF_SMALL.get(mainloop, (0, 0))
  of_cta, _ = counts(_grid(problem, tiles, device), problem.k)
  if of_cta <= most_of_k:
    return rows
  return MAX_ROWS_QUANTIZED.get(mainloop, 0)


def _in_rows(problem: Problem, block: KBlock) -> bool:
  """As of `SkinnyPlan`: in groups, or where tiles would take padded w or padded scales."""
  is_odd = problem.is_packed and problem.n % TILE_ROWS != 0
  return is_odd or _x_in_rows(problem, block)


def _x_in_rows(problem: Problem, block: KBlock) -> bool:
  """The same of x, whatever N is."""
  if not problem.is_packed:
    return False
  return problem.in_groups or any(problem.k % size for size in _tile_units(problem, block))


def _tile_units(problem: Problem, block: KBlock) -> tuple[int, int]:
  """What K has to be a multiple of, for tiles of w and for the TMA to load scales."""
  return 8 * SWIZZLED_BYTES // block.bits, TMA_BYTES * problem.fmt.group_size


def _k_block(problem: Problem, mainloop: str) -> KBlock:
  fmt, k = problem.fmt, SKINNY_BLOCK_K
  if mainloop == "quantized":
    return KBlock(128, 8 * problem.w_dtype.itemsize, None)
  as_many_zeros = 2 * cdiv(problem.k, k) == cdiv(problem.k, k // 2)
  is_large = as_many_zeros and problem.rows <= MAX_ROWS_OF_LARGE_BLOCKS
  if problem.in_groups and mainloop == "sixteens":
    is_large = False  # twice as many rows of w
  few_scales = k // 2 // fmt.group_size < TMA_BYTES
  if mainloop == "group_sums" or is_large or few_scales:
    return KBlock(k, fmt.bits, fmt.group_size)
  return KBlock(k // 2, fmt.bits, fmt.group_size)


def _scale_planes(problem: Problem, block: KBlock, tiles: SkinnyTiles) -> ScalePlanes | None:
  if block.group_size is None or not _in_rows(problem, block):
    return None
  of_row = problem.k // block.group_size
  return planes_of(of_row, of_row if tiles.whole_scales else block.scales, tiles.block_n)


def _has_whole_scales(
  problem: Problem, planes: ScalePlanes, tiles: SkinnyTiles, k_steps: int
) -> bool:
  """Whether the TMA loads all scales of a tile as one piece of memory.

  It takes them as `of_row` rows of `block_n` bytes, of which all scales of w make a whole number. A
  CTA of a cluster has but a part of k. Every warpgroup is to have a step of each tile.
  """
  pads_no_scales = 8 * cdiv(problem.n, 8) * planes.of_row % tiles.block_n == 0
  fits = pads_no_scales and planes.of_row <= TMA_ROWS
  return fits and tiles.cluster == 1 and k_steps >= tiles.compute_warpgroups


def _x_bytes(mainloop: str, block: KBlock, padded_m: int, rows: int) -> int:
  """Shared memory for x, and its scales, of a block of k."""
  if mainloop == "blockdiag":
    return padded_m * block.k + 4 * max(32, block.scales * power_of_two_from(rows))
  if mainloop == "group_sums":
    return padded_m * (block.k + 4 * block.scales)
  return padded_m * block.k * 2


def _skinny_tiles(
  problem: Problem, device: Device, mainloop: str, block: KBlock, padded_m: int
) -> SkinnyTiles:
  """As many warpgroups as there is room for, then stages.

  Where CTAs would be few, a cluster shares each tile; where the last wave's would be, those alone;
  and stream-K deals out blocks of a long k, where scales are as far apart as the TMA wants.
  Scales whose rows begin anywhere are loaded for a tile at once where that leaves it its stages.
  In groups, "sixteens" has tiles of twice as many rows of w, since every tile loads x again.
  """
  k_steps = cdiv(problem.k, block.k)
  num_tiles = problem.batch * cdiv(problem.n, ROWS)
  x_bytes = _x_bytes(mainloop, block, padded_m, skinny_rows(problem))

  def tiles_of(
    workers: int, cluster: int = 1, *, block_n: int = ROWS, shares_last: bool = False
  ) -> SkinnyTiles | None:
    """None where they do not fit."""
    exact = problem.wants_exact_sums
    tiles = SkinnyTiles(0, workers, exact, cluster, block_n, shares_last=shares_last)
    scales = scale_bytes(_scale_planes(problem, block, tiles), block.scales, block_n)
    stage = block_n * 4 * block.words + x_bytes
    sums = (workers - (cluster == 1)) * block_n * padded_m * 4
    stages = (SHARED_MEMORY - sums) // (stage + scales) // workers * workers
    waits = block_n > ROWS and stages == workers == 4  # four warpgroups, a stage each
    if stages == 0 or waits:
      return None
    tiles = dataclasses.replace(tiles, num_stages=stages)
    whole = dataclasses.replace(tiles, whole_scales=True)
    planes = _scale_planes(problem, block, whole)
    if planes is None or not _has_whole_scales(problem, planes, tiles, k_steps):
      return tiles
    scales = whole.scale_slots(k_steps) * math.prod(planes.shape)
    return whole if sums + stages * stage + scales <= SHARED_MEMORY else tiles

  def first(tiles: Iterable[SkinnyTiles | None]) -> SkinnyTiles | None:
    return next((each for each in tiles if each is not None), None)

  alone = first(tiles_of(workers) for workers in (4, 2))
  assert alone is not None, "two stages fit"
  if problem.in_groups:
    large = None
    if mainloop == "sixteens" and problem.n > ROWS:
      # Where four warpgroups would wait for the only stage that each has, two are faster.
      large = first(tiles_of(workers, block_n=2 * ROWS) for workers in (4, 2))
    return large or alone

  # Every warpgroup of every CTA gets a block of k, the one with the most as few as can be; then as
  # many CTAs as can be.
  shared = [
    tiles
    for cluster in ((8, 6, 4, 3, 2) if problem.rows <= MAX_ROWS_OF_ANY_CLUSTER else (4, 2))
    for workers in (4, 2)
    if num_tiles <= device.num_clusters(cluster) and k_steps >= cluster * workers
    if (tiles := tiles_of(workers, cluster)) is not None
  ]
  if shared:
    return min(shared, key=lambda tiles: cdiv(k_steps, tiles.cluster * tiles.compute_warpgroups))
  if problem.is_packed and _leaves_few(num_tiles, k_steps, device) and not alone.whole_scales:
    last = tiles_of(alone.compute_warpgroups, 2, shares_last=True)
    # CTAs are to be as fast with whole tiles as they would be alone.
    if last is not None and last.num_stages == alone.num_stages:
      return last
  has_work = problem.rows >= MIN_ROWS_OF_STREAM_K.get(mainloop, MAX_SKINNY_ROWS + 1)
  dealt = dataclasses.replace(alone, stream_k=True)
  in_planes = _scale_planes(problem, block, alone) is not None
  if has_work and not in_planes and _saves_blocks(_grid(problem, dealt, device), k_steps):
    return dealt
  return alone


def _saves_blocks(grid: Grid, k_steps: int) -> bool:
  """Whether stream-K leaves each CTA enough fewer blocks of k, and at least one."""
  saved = cdiv(grid.num_tiles, grid.num_sms) * k_steps - grid.most_steps(k_steps)
  return saved >= MIN_SAVED_BLOCKS and grid.dealt_tiles * k_steps >= grid.num_sms


def _leaves_few(num_tiles: int, k_steps: int, device: Device) -> bool:
  """Whether the last wave has no more tiles than clusters of two have room, and long ones."""
  waves, rest = divmod(num_tiles, device.num_sms)
  fits = device.num_sms % 2 == 0 and 0 < rest <= device.num_clusters(2)
  return k_steps >= MIN_SHARED_BLOCKS and waves > 0 and fits
