"""Which kernel a product gets on Hopper, and which tiles.

    x --quantizer--> x_hat --+
                             +--> gemm ------------> out    w quantized on the fly
    w --quantizer--> w_hat --+
    words, scales -----------+--> dequant_gemm ----> out    w packed
                             +--> staged_gemm -----> out    mxfp8 packed, x of many more rows
                             +--> skinny_gemm -----> out    w packed, x of up to 64 rows (mxfp8: 32)
    w -----------------------+--> skinny_gemm -----> out    w in 16 bits, x of up to 64 rows
    x, words, scales --------+--> skinny_gemm -----> out    w packed, x of one row (mxfp8: 8)

`skinny_gemm` loads K in blocks, of 256 or 512 (packed w) or 128, and zeros past its end; smaller K
go to the others.

An x that is not to be quantized goes to the same kernels as it is, with nothing launched before.

In 16 bits the operands are exact: float16 for e2m1 codes times e4m3 scales, bfloat16 for codes
times powers of two, or the dtype of x as it is, which holds w_hat too. In fp8, twice as fast, a
row's codes share one power of two, and the tensor cores keep 14 bits of a sum:
jaxqq/EXACTNESS.md says what both lose.

Nothing here imports Pallas: a plan can be made, and explained, without it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from jaxqq._formats import Format
from jaxqq._kernels.hopper.costs import (
  CLUSTERS,
  COPY_US,
  GEMM,
  SKINNY_E2M1,
  STREAM_K_GAIN,
  Timed,
)
from jaxqq._kernels.hopper.mainloops.table import (
  PART_K,
  PARTS,
  packed_operand,
  skinny_mainloop,
  skinny_rows,
)
from jaxqq._kernels.hopper.tiles import (
  DEALT_STEPS,
  DEQUANT_STORE,
  GEMM_STORE,
  ROWS,
  SCALES,
  STAGED_BLOCK_N,
  TMA_BYTES,
  BlockDiagonal,
  Grid,
  KBlock,
  SkinnyTiles,
  WideTiles,
  cdiv,
  power_of_two_from,
  power_of_two_up_to,
  scale_slots,
)
from jaxqq._kernels.plan import Device, Implementation, Unsupported
from jaxqq._kernels.problem import Problem, tiles_of_a_group
from jaxqq._reference import Operands

# Plans


@dataclasses.dataclass(frozen=True)
class WidePlan:
  """A product of more rows of x than `skinny_gemm` takes, or for which it is slower.

  Attributes:
    kernel: the file in this folder that has it.
    mainloop: what becomes of w, ready in memory or expanded in registers: a name of
      `mainloops.table.PARTS`.
    fp8: operands are e4m3 codes, rebased, and the epilogue multiplies by the scales of both
      operands' rows; else they are exact 16 bit floats, and it multiplies by alpha.
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
    return f"{self.kernel} {how}{_for_sms(self.device)}"

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
      "scales": copies_scales(k, fmt, fp8=self.fp8),
    }
    names = [name for name, is_copied in copied.items() if is_copied]
    return f", {' and '.join(names)} padded along K by XLA" if names else ""

  def run(self, operands: Operands) -> jax.Array:
    from jaxqq._kernels.hopper import launch

    return launch.wide(self, operands)


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
    problem = self.problem
    return Grid(
      batch=problem.batch,
      m=problem.rows,
      n=problem.n,
      block_m=MAX_SKINNY_ROWS,
      block_n=self.tiles.block_n,
      num_sms=self.device.num_sms,
      cluster=self.tiles.cluster,
      group_width=1,
    )

  @property
  def details(self) -> str:
    blockdiag = "" if self.blockdiag is None else f" with {self.blockdiag}"
    x = ", x quantized in the kernel" if self.quantizes_x else ""
    what = [name for name in ("x", "w", "scales") if self.padded_k(name) > self.problem.k]
    padded = f", {' and '.join(what)} padded along K by XLA" if what else ""
    layout = ""
    if self.in_rows:
      unit = math.lcm(*_tile_units(self.problem, self.block))
      why = "groups begin at any row" if self.problem.in_groups else f"K is no multiple of {unit}"
      layout = f", loaded in rows of {SWIZZLED_BYTES} bytes since {why}"
      layout += ", scales by threads" if self.threads_load_scales else ""
    how = f"({self.mainloop}) with {self.block} {self.tiles}{blockdiag}{x}{layout}{padded}"
    return f"{self.kernel} {how}{_for_sms(self.device)}"

  def padded_k(self, name: str) -> int:
    """K of x, w or scales as the kernel takes them: past their end, loads are zeros.

    x is quantized in whole blocks. Rows of the others are to be as far apart as loads need.
    """
    k, block = self.problem.k, self.block
    if name == "x":
      unit = block.k
      if self.x_in_rows and self.mainloop in ("expanded", "in_order", "sixteens"):
        unit = 64 if self.mainloop == "expanded" else 8  # 64 that are interleaved
    elif name == "w":
      unit = 8 * (TMA_BYTES if self.in_rows else SWIZZLED_BYTES) // block.bits
    else:
      unit = 1 if self.threads_load_scales else TMA_BYTES * (block.group_size or 1)
    return cdiv(k, unit) * unit

  @property
  def in_rows(self) -> bool:
    """Whether shared memory has w and x in rows of 128 bytes, whose loads may go past the end."""
    return _in_rows(self.problem, self.block)

  @property
  def x_in_rows(self) -> bool:
    """The same of x alone: as it is, it may have fewer rows than a tile of shared memory."""
    return self.in_rows or (
      not self.problem.quantize_input and self.problem.rows % self.padded_m != 0
    )

  @property
  def threads_load_scales(self) -> bool:
    """Whether they do and not the TMA, whose rows have to be multiples of 16 bytes apart."""
    group_size = self.block.group_size
    return group_size is not None and self.in_rows and self.problem.k // group_size % TMA_BYTES != 0

  def run(self, operands: Operands) -> jax.Array:
    from jaxqq._kernels.hopper import launch

    return launch.skinny(self, operands)


def _for_sms(device: Device) -> str:
  known = "" if device.knows_sms else " (assumed: no device at hand says so)"
  return f", for {device.num_sms} SMs{known}"


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


# What no kernel takes


def check_hopper(obstacle: str | None, device: Device) -> None:
  """Raises Unsupported where no Hopper kernel can take a problem, whatever its mode."""
  if jax.__version_info__ < (0, 11):
    raise Unsupported(f"it needs JAX 0.11 or newer, and this is {jax.__version__}")
  if device.compute_capability != "9.0":
    raise Unsupported(
      f"it is for compute capability 9.0 (H100, H200), not {device.compute_capability}"
    )
  if obstacle is not None:
    raise Unsupported(obstacle)


def check_product(problem: Problem, device: Device) -> None:
  """Raises Unsupported where no kernel of a product here can take a problem."""
  check_hopper(problem.obstacle, device)
  if problem.quantize_input:
    return
  if problem.x_dtype.itemsize != 2:
    raise Unsupported(f"x is {problem.x_dtype} and not quantized, and tensor cores take 16 bits")
  if problem.x_dtype == np.float16 and problem.fmt.scale_is_power_of_two:
    raise Unsupported(f"x is float16 and not quantized, and scales of {problem.fmt.mode} leave it")


def check_fp8(problem: Problem, device: Device) -> None:
  check_hopper(problem.obstacle, device)
  if not problem.quantize_input:
    raise Unsupported("x is not quantized, and fp8 does not hold it")
  fmt = problem.fmt
  if fmt.element != ml_dtypes.float8_e4m3fn:
    raise Unsupported(f"{fmt.mode} has no e4m3 elements to feed fp8 tensor cores with")
  if problem.wants_exact_sums:
    raise Unsupported(
      "float32 output, or precision above DEFAULT, takes exact operands and float32 sums"
    )


# Tiles of many rows, or of few by many of w

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


def _wide(problem: Problem, device: Device, *, fp8: bool) -> WidePlan:
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
  quantized_rows = problem.batch * problem.rows if problem.quantize_input else 0
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
      time = timed.time(grid, k_steps, parts, quantized_rows)
      if kernel == "dequant_gemm" and copies_scales(problem.k, problem.fmt, fp8=fp8):
        time += COPY_US
      plans[with_room] = WidePlan(kernel, mainloop, fp8, with_room, time, problem, device)
  return list(plans.values())


def _can_deal_out(timed: Timed, grid: Grid, k_steps: int, parts: int) -> bool:
  """Whether stream-K has a measured time, and may gain.

  Every CTA gets enough steps. Tiles are not short, and waves are few: those overlap, so that
  without stream-K they take less time than the costs say. And few CTAs share a tile, since the last
  one adds up the sums of all.
  """
  return (
    timed.stream_k is not None
    and grid.dealt_tiles * k_steps * parts >= MIN_STREAM_K_PARTS * grid.num_sms
    and grid.dealt_tiles * (k_steps // DEALT_STEPS) >= grid.num_sms
    and MAX_STREAM_K_SHARES * grid.dealt_tiles >= grid.num_sms
    and k_steps * parts >= MIN_STREAM_K_TILE_PARTS
    and grid.whole_waves <= 1
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


_SHARED_MEMORY = 224 * 1024  # bytes, of 227 KiB: barriers need some, and what aligns buffers
_MAX_STAGES = 9
_MIN_PARTS = 3  # of steps in shared memory: two are too few for any tile
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
  part = PARTS[mainloop]
  from_cluster = 4 * (tiles.cluster - 1) * tiles.own_m * block_n
  piece = out_bytes * block_n * (GEMM_STORE if mainloop == "ready" else DEQUANT_STORE)

  def size(stages: int, store_stages: int) -> int:
    slots = 0
    if part.scales:
      steps, of_block = cdiv(k, tiles.parts * part.k), SCALES // (tiles.parts * part.scales)
      slots = scale_slots(steps, of_block, stages, stream_k=tiles.stream_k)
    loads = stages * tiles.parts * (128 * block_m + part.bytes * block_n)
    return loads + slots * SCALES * block_n + from_cluster + store_stages * piece

  fewest = max(2, cdiv(_MIN_PARTS, tiles.parts))
  for stages, store_stages in itertools.product(range(_MAX_STAGES, fewest - 1, -1), (2, 1)):
    if size(stages, store_stages) <= _SHARED_MEMORY:
      return dataclasses.replace(tiles, num_stages=stages, store_stages=store_stages)
  return None


def row_unit(fmt: Format) -> int:
  """Elements of packed w that the TMA wants rows to be a multiple of."""
  return 8 * TMA_BYTES // fmt.bits


def copies_scales(k: int, fmt: Format, *, fp8: bool) -> bool:
  """Whether XLA adds zeros behind the scales of w, for the TMA of `dequant_gemm` to load them."""
  unit = row_unit(fmt)
  count = cdiv(k, unit) * unit // fmt.group_size
  if fp8 and (count % 2 or count <= 2):
    count = cdiv(count, 4) * 4  # before they are made into what rescales codes
  return count % TMA_BYTES != 0


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
  return _wide(problem, device, fp8=True)


def exact_plan(problem: Problem, device: Device) -> WidePlan:
  check_product(problem, device)
  return _wide(problem, device, fp8=False)


# Up to 64 rows

MAX_SKINNY_ROWS = 64
MAX_GROUP_SUMS_ROWS = 32  # with more, rebasing codes costs less than scaling every group's sums
SWIZZLED_BYTES = 128  # as TMA_BYTES, for Mosaic GPU of what is swizzled on its way
SKINNY_BLOCK_K = 512  # of packed w; nvfp4 also has half of it
MAX_ROWS_OF_LARGE_BLOCKS = 16  # of nvfp4 that is expanded
# With more rows, w waits for x to be quantized in the kernel.
MAX_ROWS_QUANTIZED = 8
MAX_BLOCKDIAG_ROWS_QUANTIZED = 1


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
  most = {"blockdiag": MAX_BLOCKDIAG_ROWS_QUANTIZED, "group_sums": MAX_ROWS_QUANTIZED}
  few = rows <= most.get(mainloop, 0) and not _in_rows(problem, block)
  quantizes_x = few and block.k == SKINNY_BLOCK_K
  tiles = _skinny_tiles(problem, device, mainloop, block, padded_m)
  plan = SkinnyPlan(mainloop, block, padded_m, blockdiag, quantizes_x, tiles, problem, device)
  if mainloop == "expanded" or (mainloop == "in_order" and rows > MAX_SKINNY_ROWS // 2):
    timed = next(timed for timed in SKINNY_E2M1 if rows <= timed.rows)
    own = timed.time(plan.grid, cdiv(problem.k, PART_K))
    other = _wide(problem, device, fp8=False).estimate_us
    if other < own:
      raise Unsupported(
        f"it would take about {own:.0f} us on an H200, and larger tiles {other:.0f}"
      )
  return plan


def _in_rows(problem: Problem, block: KBlock) -> bool:
  """As of `SkinnyPlan`: in groups, or where tiles would take padded w or padded scales."""
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
  """As many CTAs a tile as find an SM, then warpgroups, then stages, as there is room.

  In groups, "sixteens" has tiles of twice as many rows of w, since every tile loads x again.
  """
  k_steps = cdiv(problem.k, block.k)
  x_bytes = _x_bytes(mainloop, block, padded_m, skinny_rows(problem))

  def tiles_of(block_n: int, workers: int, cluster: int) -> SkinnyTiles | None:
    """None where they do not fit."""
    stage = block_n * (4 * block.words + block.scales) + x_bytes
    sums = (workers - (cluster == 1)) * block_n * padded_m * 4
    stages = (_SHARED_MEMORY - sums) // stage // workers * workers
    if stages == 0:
      return None
    if cluster > 1:
      tiles = problem.batch * cdiv(problem.n, block_n)
      shared = tiles <= device.num_clusters(cluster) and k_steps % cluster == 0
      # Every warpgroup of every CTA gets a block of k.
      if problem.in_groups or not shared or k_steps < cluster * workers:
        return None
    promote = problem.wants_exact_sums
    return SkinnyTiles(stages, workers, promote, cluster, block_n)

  choices = [(ROWS, workers, cluster) for cluster in (4, 2, 1) for workers in (4, 2)]
  if problem.in_groups and mainloop == "sixteens" and problem.n > ROWS:
    choices.insert(0, (2 * ROWS, 4, 1))
  return next(tiles for choice in choices if (tiles := tiles_of(*choice)) is not None)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
  Implementation(
    name="hopper_skinny",
    summary=(
      "a kernel that streams w through the tensor cores: packed codes in fp8 (mxfp8, and nvfp4 of "
      "up to 4 rows), where each group's sum is scaled in float32, or expanded to float16 in "
      "registers; unquantized numbers quantized in registers. x that is not to be quantized it "
      "takes as it is, beside codes expanded to its dtype. Beside packed w it quantizes x "
      "itself (a row of nvfp4, eight of mxfp8), else another kernel does"
    ),
    platforms=("cuda",),
    plan=skinny_plan,
  ),
  Implementation(
    name="hopper_fp8",
    summary=(
      "fp8 tensor cores: a kernel quantizes x (and w, unless packed) to e4m3 codes under one power "
      "of two a row, another multiplies them (packed w expanded in its registers, or before) and "
      "adds every 128 products in float32"
    ),
    platforms=("cuda",),
    plan=fp8_plan,
  ),
  Implementation(
    name="hopper_exact",
    summary=(
      "16 bit tensor cores on exact operands: a kernel quantizes x (and w, unless packed), another "
      "multiplies them (packed w expanded in its registers, or before); x that is not to be "
      "quantized is taken as it is"
    ),
    platforms=("cuda",),
    plan=exact_plan,
  ),
)


def operand_dtype(problem: Problem) -> np.dtype:
  """Of both operands in 16 bits."""
  return exact_dtype(problem.fmt) if problem.quantize_input else problem.x_dtype


def exact_dtype(fmt: Format) -> np.dtype:
  """The 16 bit floats that hold code * scale exactly."""
  return np.dtype(ml_dtypes.bfloat16 if fmt.scale_is_power_of_two else np.float16)
