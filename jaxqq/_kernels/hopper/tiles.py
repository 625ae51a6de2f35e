"""Tiles of the kernels, and the grid that they make. Nothing here imports Pallas."""

from __future__ import annotations

import dataclasses
import math

ROWS = 64  # of a left operand of the tensor cores, which one warpgroup has
TILE_ROWS = 8  # of a swizzled tile in shared memory
TMA_BYTES = 16  # the stride of rows in memory is a multiple of this
TMA_ROWS = 256  # that it loads at most at once
SWIZZLED_BYTES = 128  # as TMA_BYTES, for Mosaic GPU of what is swizzled on its way
SHARED_MEMORY = 224 * 1024  # bytes, of 227 KiB: barriers need some, and what aligns buffers
GEMM_STORE = 64  # rows and columns that a warpgroup of `gemm` stores at a time
DEQUANT_STORE = 32  # rows of x, with 64 of w, that one of `dequant_gemm` does, at most
SCALES = 32  # bytes of a row's scales that `dequant_gemm` loads at once: less is no cheaper
DEALT_STEPS = 2  # along k, that stream-K deals out together: the loop of `dequant_gemm` needs two
STAGED_BLOCK_N = 128  # rows of w that are expanded at a time are a multiple of this, and so is n


def cdiv(a: int, b: int) -> int:
  return -(-a // b)


def power_of_two_from(a: int) -> int:
  return 1 << (a - 1).bit_length()


def power_of_two_up_to(a: int) -> int:
  return 1 << (a.bit_length() - 1)


@dataclasses.dataclass(frozen=True)
class Grid:
  """The output (batch, m, n) in tiles, walked in bands, so that operands stay in the L2 cache."""

  batch: int
  m: int
  n: int
  block_m: int
  block_n: int
  num_sms: int
  cluster: int = 1  # CTAs that share a tile
  group_width: int = 8  # tiles that a band has side by side
  minor: int = 0  # the axis along which bands are cut; 0: m, 1: n
  stream_k: bool = False  # every SM has a CTA, however few tiles there are
  shares_last: bool = False  # CTAs have whole tiles first, and their cluster shares a last one
  dealt_steps: int = DEALT_STEPS  # along k, that stream-K deals out together

  @property
  def tiles(self) -> tuple[int, int]:
    """Of one matrix, along m and along n."""
    return cdiv(self.m, self.block_m), cdiv(self.n, self.block_n)

  @property
  def num_tiles(self) -> int:
    return self.batch * math.prod(self.tiles)

  @property
  def num_workers(self) -> int:
    """CTAs that walk over the tiles; a cluster counts as one, and shares no more than one tile."""
    if self.stream_k:
      return self.num_sms
    if self.shares_last:
      return self.num_sms // self.cluster
    return self.num_tiles if self.cluster > 1 else min(self.num_sms, self.num_tiles)

  @property
  def shares_every(self) -> bool:
    """Whether CTAs of a cluster share every tile."""
    return self.cluster > 1 and not self.shares_last

  @property
  def whole_rounds(self) -> int:
    """Of clusters: tiles that each of their CTAs has alone, before they share one."""
    return self.num_tiles // (self.num_workers * self.cluster) if self.shares_last else 0

  @property
  def whole_waves(self) -> int:
    """Of stream-K: waves of CTAs that have whole tiles. A full one is dealt out with the last."""
    waves, rest = divmod(self.num_tiles, self.num_sms)
    return waves - 1 if waves and rest else waves

  @property
  def dealt_tiles(self) -> int:
    """Of stream-K: tiles whose steps are dealt out, none where all waves are full."""
    return self.num_tiles - self.whole_waves * self.num_sms

  @property
  def others(self) -> float:
    """Of stream-K: on average, CTAs that have steps of a dealt tile beside the one that ends it."""
    return self.num_sms / self.dealt_tiles if self.dealt_tiles else 0.0

  def most_steps(self, k_steps: int) -> int:
    """Of stream-K: that a CTA has, of tiles of so many steps, but for odd last ones."""
    deals = cdiv(self.dealt_tiles * (k_steps // self.dealt_steps), self.num_sms)
    return self.whole_waves * k_steps + deals * self.dealt_steps


@dataclasses.dataclass(frozen=True)
class WideTiles:
  """Of `gemm` and `dequant_gemm`."""

  block_m: int  # rows of x a CTA: a multiple of 8 up to 256; of `gemm` 128 or 256
  num_stages: int = 0  # steps of both operands in shared memory; 0: not known yet
  promote: bool = False  # add to float32 sums after every step, or part of one
  store_stages: int = 2  # pieces of the result on their way out, a warpgroup
  cluster: int = 1  # CTAs that share a tile, each with a part of k: up to 8, of `gemm` 1
  block_n: int = 2 * ROWS  # rows of w a CTA; of `dequant_gemm` 64 a compute warpgroup
  stream_k: bool = False  # steps along k are dealt out to all CTAs evenly (`stream_k.py`)
  parts: int = 1  # of `dequant_gemm`: of a step, loaded together and multiplied one by one

  @property
  def own_m(self) -> int:
    """Rows of x that each CTA of a cluster stores; the last one maybe fewer."""
    return 8 * cdiv(self.block_m, 8 * self.cluster)


def scale_slots(
  k_steps: int, steps_a_block: int, num_stages: int, *, stream_k: bool = False
) -> int:
  """Blocks of scales that the stages of `dequant_gemm` use at once, and the one being loaded.

  A block belongs to the steps of one tile. It is loaded when the step `num_stages` earlier is done.
  With stream-K two tiles may each have a step under way within a block.
  """
  tiles = range(num_stages // k_steps + 3)
  blocks = cdiv(k_steps, steps_a_block)
  block_of = [tile * blocks + ki // steps_a_block for tile in tiles for ki in range(k_steps)]
  oldest = [block_of[max(step - num_stages + 1, 0)] for step in range(len(block_of))]
  most = max(last - first + 1 for first, last in zip(oldest, block_of, strict=True))
  return most + 2 * stream_k


@dataclasses.dataclass(frozen=True)
class SkinnyTiles:
  """Of `skinny_gemm`: all rows of x against `block_n` rows of w."""

  num_stages: int  # a multiple of the warpgroups
  compute_warpgroups: int = 4
  promote: bool = False  # 16 bit operands: add to float32 sums after every step
  cluster: int = 1  # CTAs that share a tile, each with a part of k
  block_n: int = ROWS  # or, of the mainloop "sixteens", twice that
  whole_scales: bool = False  # those of a tile at once, not with each block of k
  shares_last: bool = False  # as of `Grid`
  stream_k: bool = False  # blocks along k are dealt out to all CTAs evenly (`stream_k.py`)

  def scale_slots(self, k_steps: int) -> int:
    """How many tiles' whole scales there is room for, of tiles with so many steps.

    A tile's are loaded with its first step, when the step `num_stages` before is done. By then all
    steps of the tile that had the slot are done. Every warpgroup is to have one of them, so that
    none misses a phase of the slot's barrier.
    """
    return 1 + cdiv(self.num_stages - 1, k_steps)


@dataclasses.dataclass(frozen=True)
class KBlock:
  """What `skinny_gemm` loads of a row of w at once: words, and 16 bytes of scales; or numbers."""

  k: int
  bits: int  # of a code, or of a number
  group_size: int | None  # None of unquantized w

  @property
  def words(self) -> int:
    return self.k * self.bits // 32

  @property
  def scales(self) -> int:
    return 0 if self.group_size is None else self.k // self.group_size


@dataclasses.dataclass(frozen=True)
class ScalePlanes:
  """Scales of a tile's rows of w in shared memory, whose rows in memory begin anywhere.

  `ptx/scale_planes.py` says how the TMA loads them.
  """

  of_row: int  # bytes of a row in memory
  loaded: int  # of a row at once: a multiple of 16, or all of them
  rows: int  # of the tile, a multiple of 64

  @property
  def count(self) -> int:
    """Planes: sets of rows, each of which begin at the same rest of 16 bytes."""
    return 1 if self.is_whole else TMA_BYTES // math.gcd(self.of_row, TMA_BYTES)

  @property
  def is_whole(self) -> bool:
    return self.loaded == self.of_row

  @property
  def width(self) -> int:
    """Bytes of a row in shared memory."""
    return self.loaded + (0 if self.is_whole else TMA_BYTES)

  @property
  def shape(self) -> tuple[int, int, int]:
    """Such that the TMA writes to multiples of 128 bytes: a plane has rows in eights.

    Whole rows are one behind the other, as in memory, whatever the shape.
    """
    if self.is_whole:
      return 1, 2 * cdiv(self.of_row, 2), self.rows
    return self.count, 8 * cdiv(self.rows, 8 * self.count), self.width


def planes_of(of_row: int, loaded: int, rows: int) -> ScalePlanes | None:
  """None where rows are a multiple of 16 bytes apart."""
  return ScalePlanes(of_row, loaded, rows) if of_row % TMA_BYTES else None


def scale_bytes(planes: ScalePlanes | None, loaded: int, rows: int) -> int:
  """Of shared memory, for what is loaded at once."""
  return rows * loaded if planes is None else math.prod(planes.shape)


def rows_of_scales(n: int, planes: ScalePlanes | None) -> int:
  """How many rows of scales kernels take for n rows of w.

  Planes have as many rows each. And Mosaic GPU may load rows in tiles.
  """
  multiple = max(TILE_ROWS, 1 if planes is None else planes.count)
  return cdiv(n, multiple) * multiple


@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
  """x with a column for each group of a block of 32 elements (`mainloops/blockdiag.py`)."""

  rows: int  # of x, up to four, rounded up to a power of two

  @property
  def k_blocks_per_acc(self) -> int:
    """Blocks of 32 elements of k that an accumulator has side by side."""
    return 4 // self.rows

  @property
  def columns(self) -> int:
    return 8
