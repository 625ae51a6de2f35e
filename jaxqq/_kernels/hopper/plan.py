"""Which kernel a product gets on Hopper, and which tiles: every threshold is here.

    x --quantizer--> x_hat --+
                             +--> gemm ------------> out    w quantized on the fly
    w --quantizer--> w_hat --+
    words, scales -----------+--> dequant_gemm ----> out    w packed
                             +--> staged_gemm -----> out    mxfp8 packed, x of many more rows
                             +--> skinny_gemm -----> out    w packed, x of up to 64 rows
    w -----------------------+--> skinny_gemm -----> out    w in 16 bits, x of up to 64 rows
    x, words, scales --------+--> skinny_gemm -----> out    w packed, x of one row (mxfp8: 8)

In 16 bits the operands are exact: float16 for e2m1 codes times e4m3 scales, bfloat16 for e4m3 codes
times powers of two. In fp8, twice as fast, a row's codes share one power of two, and the tensor
cores keep 14 bits of a sum: README says what both lose.

Nothing here imports Pallas: a plan can be made, and explained, without it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import ml_dtypes
import numpy as np

from jaxqq._formats import Format
from jaxqq._kernels.hopper.tiles import (
  ROWS,
  STAGED_BLOCK_N,
  BlockDiagonal,
  Grid,
  KBlock,
  SkinnyTiles,
  WideTiles,
  cdiv,
  power_of_two_from,
)
from jaxqq._kernels.plan import Device, Implementation, Unsupported
from jaxqq._kernels.problem import Problem
from jaxqq._reference import Operands

# Plans


@dataclasses.dataclass(frozen=True)
class WidePlan:
  """A product of more than 64 rows of x, or one that `skinny_gemm` does not take.

  Attributes:
    kernel: the file in this folder that has it.
    fp8: operands are e4m3 codes, rebased, and the epilogue multiplies by the scales of both
      operands' rows; else they are exact 16 bit floats, and it multiplies by alpha.
    problem, tiles, num_sms: what they were chosen for, and what was chosen.
  """

  kernel: Literal["gemm", "dequant_gemm", "staged_gemm"]
  fp8: bool
  tiles: WideTiles
  problem: Problem
  num_sms: int
  about_sms: str

  @property
  def grid(self) -> Grid:
    tiles = self.tiles
    return Grid(tiles.block_m, tiles.block_n, self.num_sms, cluster=tiles.cluster)

  @property
  def details(self) -> str:
    staged = ", packed w expanded a panel at a time" if self.kernel == "staged_gemm" else ""
    return f"{self.kernel} with {self.tiles}{staged}{self.about_sms}"

  def run(self, operands: Operands) -> jax.Array:
    from jaxqq._kernels.hopper import launch

    return launch.wide(self, operands)


@dataclasses.dataclass(frozen=True)
class SkinnyPlan:
  """A product of up to 64 rows of x.

  Attributes:
    block: what is loaded of w at once.
    padded_m: rows of x, or columns of block-diagonal x, in shared memory.
    blockdiag: nvfp4 of few rows, None of others.
    x: who quantizes x: this kernel, or another one before it.
    tiles, problem, num_sms: as of `WidePlan`.
  """

  block: KBlock
  padded_m: int
  blockdiag: BlockDiagonal | None
  x: Literal["quantized in the kernel", "quantized before"]
  tiles: SkinnyTiles
  problem: Problem
  num_sms: int
  about_sms: str
  kernel: Literal["skinny_gemm"] = "skinny_gemm"

  @property
  def scales_group_sums(self) -> bool:
    """mxfp8: packed codes of both operands, and each group's sum times its two scales."""
    return self.problem.is_packed and self.problem.fmt.scale_is_power_of_two

  @property
  def grid(self) -> Grid:
    return Grid(MAX_SKINNY_ROWS, ROWS, self.num_sms, group_width=1, cluster=self.tiles.cluster)

  @property
  def details(self) -> str:
    blockdiag = "" if self.blockdiag is None else f" with {self.blockdiag}"
    return f"{self.kernel} with {self.block} {self.tiles}{blockdiag}, x {self.x}{self.about_sms}"

  def run(self, operands: Operands) -> jax.Array:
    from jaxqq._kernels.hopper import launch

    return launch.skinny(self, operands)


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


def check_fp8(problem: Problem, device: Device) -> None:
  check_hopper(problem.obstacle, device)
  fmt = problem.fmt
  if fmt.element != ml_dtypes.float8_e4m3fn:
    raise Unsupported(f"{fmt.mode} has no e4m3 elements to feed fp8 tensor cores with")
  if problem.wants_exact_sums:
    raise Unsupported(
      "float32 output, or precision above DEFAULT, takes exact operands and float32 sums"
    )


def _about_sms(device: Device) -> str:
  known = "" if device.knows_sms else " (assumed: no device at hand says so)"
  return f", for {device.num_sms} SMs{known}"


# More than 64 rows: from times that were fitted to what an H200 takes at n = k = 8192
# (bench/results/h200.json)


@dataclasses.dataclass(frozen=True)
class _Timed:
  """Tiles, and how long a CTA takes with them: its steps, and what begins and ends a tile."""

  tiles: WideTiles
  step_us: float
  other_us: float = 3.0  # in a cluster: to exchange sums as well

  def time(self, grid: Grid, batch: int, m: int, n: int, k_steps: int) -> float:
    """A launch takes as many waves of CTAs as there are tiles for each SM."""
    waves = cdiv(grid.num_tiles(batch, m, n), grid.num_sms)
    return float(waves * (k_steps / grid.cluster * self.step_us + self.other_us))


# Shared memory has 227 KiB: stages of (block_m + block_n) rows of 128 bytes, and the tiles on their
# way out.
_GEMM = (
  _Timed(WideTiles(256, 4), 0.78),
  _Timed(WideTiles(128, 6), 0.45),
)

# Expanding w takes as long for few rows of x as for many, so small tiles take more than their
# share. A stage has 64 or 128 bytes of words a row. Sums to exchange, half a tile in float32, take
# the room of a stage or two.
_DEQUANT_E2M1 = (
  _Timed(WideTiles(256, 4), 0.645),
  _Timed(WideTiles(256, 4, store_stages=1, cluster=2), 0.645, 8.5),
  _Timed(WideTiles(128, 8, store_stages=1), 0.44),
  _Timed(WideTiles(128, 6, store_stages=1, cluster=2), 0.44, 9.5),
  _Timed(WideTiles(64, 8), 0.37),
)
_DEQUANT_E4M3 = (
  _Timed(WideTiles(256, 4), 0.83),
  _Timed(WideTiles(256, 3, store_stages=1, cluster=2), 0.83, 12.0),
  _Timed(WideTiles(128, 6), 0.57),
  _Timed(WideTiles(128, 5, store_stages=1, cluster=2), 0.57, 10.0),
  _Timed(WideTiles(64, 8), 0.5),
)

# From how many rows of x on packed w of 8 bit codes is expanded a panel at a time: two kernels then
# expand each number once. Codes of 4 bits are faster in registers at any number of rows.
STAGED_MIN_ROWS = 3072


def _wide(problem: Problem, device: Device, *, fp8: bool) -> WidePlan:
  m, n, batch = problem.rows, problem.n, problem.batch
  kernel: Literal["gemm", "dequant_gemm", "staged_gemm"] = "gemm"
  candidates: tuple[_Timed, ...] = _GEMM
  step_k = 128
  if problem.is_packed:
    bits = problem.fmt.bits
    if bits == 8 and batch == 1 and m >= STAGED_MIN_ROWS and n % STAGED_BLOCK_N == 0:
      kernel = "staged_gemm"
    else:
      kernel = "dequant_gemm"
      candidates = _DEQUANT_E2M1 if bits == 4 else _DEQUANT_E4M3
      step_k = 64 if bits == 4 else 128
  narrow_out = problem.out_dtype.itemsize == 2

  def grid(tiles: WideTiles) -> Grid:
    return Grid(tiles.block_m, tiles.block_n, device.num_sms, cluster=tiles.cluster)

  def is_possible(tiles: WideTiles) -> bool:
    """All CTAs that share a tile run at once, have as many steps, and room for their sums."""
    if tiles.cluster == 1:
      return True
    fits = grid(tiles).num_tiles(batch, m, n) * tiles.cluster <= device.num_sms
    in_steps = problem.k % (128 * tiles.cluster) == 0
    return fits and in_steps and narrow_out and tiles.cluster <= device.max_cluster

  def time(timed: _Timed) -> float:
    return timed.time(grid(timed.tiles), batch, m, n, problem.k // step_k)

  best = min((timed for timed in candidates if is_possible(timed.tiles)), key=time).tiles
  # Float32 tiles on their way out are twice as large.
  tiles = dataclasses.replace(
    best,
    promote=fp8 or problem.wants_exact_sums,
    store_stages=best.store_stages if narrow_out else 1,
  )
  return WidePlan(kernel, fp8, tiles, problem, device.num_sms, _about_sms(device))


def _fp8(problem: Problem, device: Device) -> WidePlan:
  check_fp8(problem, device)
  return _wide(problem, device, fp8=True)


def _exact(problem: Problem, device: Device) -> WidePlan:
  check_hopper(problem.obstacle, device)
  return _wide(problem, device, fp8=False)


# Up to 64 rows

MAX_SKINNY_ROWS = 64
SKINNY_BLOCK_K = 512  # of packed w; nvfp4 also has half of it
# With 16 rows block-diagonal x has too many sums for the registers.
MAX_BLOCKDIAG_ROWS = 8
BLOCKDIAG_MIN_K = 1024  # what its quantizer takes at once
# With more rows, w waits for x to be quantized in the kernel: of block-diagonal x, and of others.
MAX_ROWS_QUANTIZED_IN_KERNEL = {True: 1, False: 8}
_SHARED_MEMORY = 224 * 1024  # bytes, of 227 KiB: barriers need some, and what aligns buffers


def _skinny(problem: Problem, device: Device) -> SkinnyPlan:
  check_hopper(problem.obstacle, device)
  fmt, rows, is_packed = problem.fmt, problem.rows, problem.is_packed
  if not is_packed and problem.transposed:
    raise Unsupported("w is not packed, and an operand's contracted axis comes first")
  if not is_packed and problem.w_dtype.itemsize != 2:
    raise Unsupported(f"w is not packed but {problem.w_dtype}, and it quantizes 16 bit floats")
  if rows > MAX_SKINNY_ROWS:
    raise Unsupported(f"{rows} rows of x meet a matrix w, and it is for at most {MAX_SKINNY_ROWS}")
  blockdiag = _blockdiag(problem)
  block = _k_block(problem, blockdiag)
  if problem.k % block.k:
    raise Unsupported(f"k = {problem.k} is no multiple of {block.k}, which its loads are made of")
  if is_packed and fmt.scale_is_power_of_two:
    check_fp8(problem, device)
  # The TMA moves 8 rows at a time.
  padded_m = max(8, power_of_two_from(rows)) if blockdiag is None else blockdiag.columns
  plan = SkinnyPlan(
    block,
    padded_m,
    blockdiag,
    "quantized in the kernel" if _quantizes_x(problem, block, blockdiag) else "quantized before",
    SkinnyTiles(0),
    problem,
    device.num_sms,
    _about_sms(device),
  )
  return dataclasses.replace(plan, tiles=_skinny_tiles(plan, device))


def _blockdiag(problem: Problem) -> BlockDiagonal | None:
  """For nvfp4 of one matrix x with few enough rows that its groups get columns of their own."""
  if not problem.is_packed or problem.fmt.scale_is_power_of_two:
    return None
  one_matrix = problem.shares_w or math.prod(problem.x_batch) == 1
  few = problem.rows <= MAX_BLOCKDIAG_ROWS and problem.k >= BLOCKDIAG_MIN_K
  return BlockDiagonal(power_of_two_from(problem.rows)) if one_matrix and few else None


def _k_block(problem: Problem, blockdiag: BlockDiagonal | None) -> KBlock:
  fmt = problem.fmt
  if not problem.is_packed:
    return KBlock(128, 8 * problem.w_dtype.itemsize, None)
  k = SKINNY_BLOCK_K
  if not fmt.scale_is_power_of_two:
    few = blockdiag is not None or problem.rows <= 16
    k = k if few and problem.k % k == 0 else k // 2
  return KBlock(k, fmt.bits, fmt.group_size)


def _quantizes_x(problem: Problem, block: KBlock, blockdiag: BlockDiagonal | None) -> bool:
  if not problem.is_packed or (blockdiag is None and not problem.fmt.scale_is_power_of_two):
    return False
  most = MAX_ROWS_QUANTIZED_IN_KERNEL[blockdiag is not None]
  return problem.rows <= most and block.k == SKINNY_BLOCK_K


def _skinny_tiles(plan: SkinnyPlan, device: Device) -> SkinnyTiles:
  """As many CTAs a tile as find an SM, then warpgroups, then stages, as there is room."""
  problem, block, padded_m = plan.problem, plan.block, plan.padded_m
  if plan.blockdiag is not None:
    x_bytes = padded_m * block.k + 4 * max(32, block.scales * plan.blockdiag.rows)
  elif plan.scales_group_sums:
    x_bytes = padded_m * (block.k + 4 * block.scales)
  else:
    x_bytes = padded_m * block.k * 2
  stage = ROWS * (4 * block.words + block.scales) + x_bytes
  tiles = problem.batch * cdiv(problem.n, ROWS)
  k_steps = problem.k // block.k

  def stages(workers: int, cluster: int) -> int:
    sums = (workers - (cluster == 1)) * ROWS * padded_m * 4
    return (_SHARED_MEMORY - sums) // stage // workers * workers

  def is_possible(workers: int, cluster: int) -> bool:
    if cluster == 1:
      return stages(workers, 1) > 0
    # Every warpgroup of every CTA gets a block of k.
    shared = tiles * cluster <= device.num_sms and k_steps % cluster == 0
    shared = shared and k_steps >= cluster * workers and cluster <= device.max_cluster
    return shared and stages(workers, cluster) > 0

  cluster, workers = next((c, w) for c in (4, 2, 1) for w in (4, 2) if is_possible(w, c))
  promote = problem.wants_exact_sums
  return SkinnyTiles(stages(workers, cluster), workers, promote, cluster)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
  Implementation(
    name="hopper_skinny",
    summary=(
      "a kernel that streams w through the tensor cores: packed codes in fp8 (mxfp8, and nvfp4 of "
      "up to 8 rows), where each group's sum is scaled in float32, or expanded to float16 in "
      "registers; unquantized numbers quantized in registers. Beside packed w it quantizes x "
      "itself (a row of nvfp4, eight of mxfp8), else another kernel does"
    ),
    platforms=("cuda",),
    plan=_skinny,
  ),
  Implementation(
    name="hopper_fp8",
    summary=(
      "fp8 tensor cores: a kernel quantizes x (and w, unless packed) to e4m3 codes under one power "
      "of two a row, another multiplies them (packed w expanded in its registers, or before) and "
      "adds every 128 products in float32"
    ),
    platforms=("cuda",),
    plan=_fp8,
  ),
  Implementation(
    name="hopper_exact",
    summary=(
      "16 bit tensor cores on exact operands: a kernel quantizes x (and w, unless packed), another "
      "multiplies them (packed w expanded in its registers, or before)"
    ),
    platforms=("cuda",),
    plan=_exact,
  ),
)


def exact_dtype(fmt: Format) -> np.dtype:
  """The 16 bit floats that hold code * scale exactly."""
  return np.dtype(ml_dtypes.bfloat16 if fmt.scale_is_power_of_two else np.float16)
