"""The tiles of the kernel for few rows: what is loaded at once, by how many warpgroups and CTAs."""

from __future__ import annotations

import dataclasses

from jax.experimental import pallas as pl

from jaxqq._kernels import tensor_cores
from jaxqq._kernels.tiles import Grid, num_sms

BLOCK_N = tensor_cores.ROWS
MAX_ROWS = 64
_SHARED_MEMORY = 224 * 1024  # bytes, of 227 KiB: barriers need some, and what aligns buffers


@dataclasses.dataclass(frozen=True)
class Config:
  """The tiles of one launch."""

  num_stages: int  # chunks in shared memory, a multiple of the warpgroups
  compute_warpgroups: int = 4
  promote: bool = False  # 16 bit operands: add to float32 sums after every step
  split: int = 1  # CTAs that share a tile, each with a part of k

  @property
  def grid(self) -> Grid:
    return Grid(MAX_ROWS, BLOCK_N, 1, 0, self.split)


@dataclasses.dataclass(frozen=True)
class Chunk:
  """What is loaded of a row of w at once: words, and 16 bytes of scales or more; or numbers."""

  k: int
  bits: int  # of a code, or of a number
  group_size: int | None  # None of unquantized w

  @property
  def words(self) -> int:
    return self.k * self.bits // 32

  @property
  def scales(self) -> int:
    return 0 if self.group_size is None else self.k // self.group_size


def config(
  chunk: Chunk, x_bytes: int, columns: int, promote: bool, tiles: int, k_steps: int
) -> Config:
  """As many CTAs a tile as find a multiprocessor, then warpgroups, then chunks, as there is room.

  Args:
    chunk: what is loaded of w at once.
    x_bytes: what is there of x for it.
    columns: of the sums.
    promote: as in `Config`.
    tiles: of 64 rows of w.
    k_steps: chunks that k has.
  """
  stage = BLOCK_N * (4 * chunk.words + chunk.scales) + x_bytes

  def stages(workers: int, split: int) -> int:
    sums = (workers - (split == 1)) * BLOCK_N * columns * 4
    return (_SHARED_MEMORY - sums) // stage // workers * workers

  def is_possible(workers: int, split: int) -> bool:
    if split == 1:
      return stages(workers, 1) > 0
    # Every warpgroup of every CTA gets a chunk.
    shared = tiles * split <= num_sms() and k_steps % split == 0 and k_steps >= split * workers
    return shared and stages(workers, split) > 0

  split, workers = next((s, w) for s in (4, 2, 1) for w in (4, 2) if is_possible(w, s))
  return Config(stages(workers, split), workers, promote, split)


def rows_held(m: int) -> int:
  """How many rows of x_hat the kernel has: the copy engine moves 8 at a time."""
  return max(8, pl.next_power_of_2(m))
