"""Tiles of `gemm` and `dequant_gemm`, and how long they take on an H200.

A line is a tile; `wide_plan.py` tries each in clusters of several sizes, and takes what takes least
time. Times are in microseconds, x's quantizer included, fitted to what was measured: of `gemm` at
n = k = 8192 (bench/results/h200.json), of packed w at layers of models with 16 to 1024 rows
(../tuned/h200_tiles.json). Those of e2m1 codes with 64 rows or more, stream-K apart, and of 16 and
24 by 256, were fitted to more times than are kept there: of several waves, and of the survey
(bench/results). Stream-K of e2m1 codes with up to 32 rows, and of 64 by 192 and 256, is from before
sums were handed over faster.
"""

from __future__ import annotations

import dataclasses
import functools

from jaxqq._kernels.hopper.tiles import Grid, cdiv


@dataclasses.dataclass(frozen=True)
class Timed:
  """A tile, and how long a CTA takes with it: parts of steps, and what begins and ends it.

  A part is 128 bytes of k of x. A step is what is loaded at once.
  """

  block_m: int
  block_n: int
  part_us: float
  tile_us: float
  cluster_us: float | None = None  # instead, where a cluster exchanges sums; None: it cannot
  # With stream-K a part, the rest, and each other CTA that has steps of a tile; None: without
  stream_k: tuple[float, float, float] | None = None
  parts: int = 1  # of a step
  launch_us: float = 0.0  # once, before the first wave; 0: in what begins and ends a tile
  x_us: float = 0.0  # of a part of a row of x, which is quantized before; 0: likewise
  exchange_us: float = 0.0  # of all sums of a tile, of which a cluster's CTA reads its share
  w_us: float = 0.0  # of a part of a row of w: to find how its codes are rebased, and to load it

  def time(
    self, grid: Grid, k_steps: int, parts: int = 1, x_rows: int = 0, w_rows: int = 0
  ) -> float:
    """Of a grid whose tiles have so many steps, of so many parts each.

    x_rows, w_rows: that another kernel quantizes or reads before.
    """
    part_us, rest_us = self.part_us, self.tile_us
    if grid.shares_every:
      assert self.cluster_us is not None
      rest_us = self.cluster_us + self.exchange_us * (1 - 1 / grid.cluster)
    elif grid.stream_k:
      assert self.stream_k is not None
      part_us, rest_us, other_us = self.stream_k
      rest_us += other_us * grid.others
    steps, tiles = counts(grid, k_steps)
    before = self.launch_us + k_steps * parts * (x_rows * self.x_us + w_rows * self.w_us)
    return before + steps * parts * part_us + tiles * rest_us


def _launched_in(us: float, x_us: float, w_us: float, *tiles: Timed) -> tuple[Timed, ...]:
  """Tiles whose waves overlap, so that what comes before them takes a time of its own."""
  before = functools.partial(dataclasses.replace, launch_us=us, x_us=x_us, w_us=w_us)
  return tuple(before(timed) for timed in tiles)


def counts(grid: Grid, k_steps: int) -> tuple[int, int]:
  """How many steps follow each other, and how often a tile begins and ends.

  A launch takes as many waves of CTAs as there are tiles for each SM. A last wave that clusters
  share counts as a whole one: loads take most of its time, and those it has all the same.
  """
  if grid.shares_every:
    return cdiv(k_steps, grid.cluster), 1
  if grid.stream_k:
    return grid.most_steps(k_steps), 1
  waves = cdiv(grid.num_tiles, grid.num_sms)
  return waves * k_steps, waves


CLUSTERS = (1, 2, 3, 4, 6, 8)  # CTAs that share a tile
STREAM_K_GAIN = 1.04  # before it is taken: its times are the least certain

GEMM = (
  Timed(256, 128, 0.78, 3.0),
  Timed(128, 128, 0.45, 3.0),
)


@dataclasses.dataclass(frozen=True)
class Streamed:
  """`skinny_gemm` with packed e2m1 codes, expanded: its tiles follow each other without a break."""

  rows: int  # of x, up to
  part_us: float  # 64 of k, of 64 rows of w
  rest_us: float
  cluster_us: float  # instead, where a cluster adds up sums

  def time(self, grid: Grid, parts: int) -> float:
    """Of a grid whose tiles have so many parts."""
    own, _ = counts(grid, parts)
    return own * self.part_us + (self.cluster_us if grid.shares_every else self.rest_us)


SKINNY_E2M1 = (
  Streamed(16, 0.0880, 5.1, 5.9),
  Streamed(24, 0.0880, 5.2, 6.4),
  Streamed(32, 0.0950, 5.4, 6.9),
  Streamed(64, 0.140, 6.0, 7.1),
)

# Expanding w takes as long for few rows of x as for many, so small tiles take more than their
# share. Tiles of 192 or 256 rows of w have three or four warpgroups, and registers for fewer sums:
# with 128 rows of x by 256, ptxas 13.0 serializes wgmma. In fp8, which sums a step apart, tiles of
# 128 by 192 spill registers, and those of 64 by 256 gain nothing. Steps of four parts load rows of
# w of 128 bytes, of two parts 64. With 32, w of 57344 x 8192 took 16 to 38% longer in tiles of up
# to 64 rows of x, 6 to 13% with 96 and 128, and as long from 192 on. With `mma.sync` (`ptx/mma.py`)
# instead of `wgmma`, 33792 x 4096 took as long with 16 rows (30.0 us instead of 30.5 in tiles of
# 128, 29.4 instead of 28.4 of 256), 11% longer with 24, 15 or 16% with 32, 38 or 49% with 64. In
# fp8, 128 by 128 has steps of two parts for stream-K, which take 3 to 13% less. Elsewhere they gain
# nothing, and in clusters, with room for two stages, took 8 to 30% longer.
DEQUANT_E2M1 = _launched_in(
  4.5,
  4.5e-5,
  0.0,
  Timed(16, 128, 0.182, 0.4, 1.1, (0.234, 1.6, 0.4), 4),
  Timed(16, 192, 0.223, 1.5, 1.9, (0.264, 3.9, 0.0), 4),
  Timed(16, 256, 0.305, 1.6, 1.7, (0.351, 4.4, 0.0), 4),
  Timed(24, 256, 0.315, 1.6, None, None, 4),
  Timed(32, 128, 0.193, 1.1, 1.6, (0.215, 3.6, 0.1), 4),
  Timed(32, 192, 0.240, 2.2, 2.5, (0.277, 4.2, 0.1), 4),
  Timed(32, 256, 0.322, 2.8, 2.6, (0.360, 5.0, 0.1), 4),
  Timed(64, 128, 0.250, 1.0, 2.1, (0.250, 3.1, 0.4), 4),
  Timed(64, 192, 0.308, 1.7, 3.2, (0.338, 6.2, 0.0), 4),
  Timed(64, 256, 0.435, 0.9, 3.3, (0.469, 6.9, 0.0), 4),
  Timed(96, 128, 0.309, 1.1, 1.7, (0.319, 3.5, 0.5), 2, exchange_us=0.9),
  Timed(96, 192, 0.427, 1.7, 0.4, (0.425, 4.5, 0.5), 2, exchange_us=3.3),
  Timed(96, 256, 0.556, 1.2, 0.0, (0.570, 4.7, 0.6), 2, exchange_us=5.9),
  Timed(128, 128, 0.358, 1.2, 1.2, (0.362, 3.7, 0.8), 2, exchange_us=2.5),
  Timed(128, 192, 0.508, 0.8, 0.0, (0.492, 4.9, 0.7), 2, exchange_us=6.2),
  Timed(192, 128, 0.488, 0.8, 0.0, (0.505, 3.7, 0.9), exchange_us=5.6),
  Timed(192, 192, 0.673, 1.8, 0.0, (0.730, 4.3, 1.5), exchange_us=9.9),
  Timed(256, 128, 0.628, 0.8, 0.0, (0.632, 5.3, 1.3), exchange_us=6.5),
)
DEQUANT_E4M3 = _launched_in(
  4.5,
  1.15e-4,
  8e-6,
  Timed(64, 128, 0.409, 0.7, 1.3, (0.468, 1.7, 1.1), 2),
  Timed(64, 192, 0.586, 1.3, 2.1, (0.747, 4.3, 0.1)),
  Timed(96, 128, 0.425, 1.3, 1.3, (0.484, 2.5, 0.9), 2, exchange_us=1.4),
  Timed(96, 192, 0.642, 1.9, 3.3, (0.698, 5.3, 0.3)),
  Timed(128, 128, 0.550, 1.1, 0.9, (0.568, 3.9, 0.8), exchange_us=2.7),
  Timed(128, 128, 0.541, 1.8, None, (0.525, 2.5, 1.1), 2),
  Timed(192, 128, 0.637, 1.7, 1.3, (0.699, 4.9, 0.6), exchange_us=3.0),
  Timed(256, 128, 0.757, 2.2, 3.4, (0.931, 4.4, 1.4)),
)
