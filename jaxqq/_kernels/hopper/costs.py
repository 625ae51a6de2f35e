"""Tiles of the kernels for more than 64 rows, and how long they take on an H200.

A line is a tile; `plan.py` tries each in clusters of several sizes, and takes what takes least
time. Times are in microseconds, x's quantizer included, fitted to what was measured: of `gemm` at
n = k = 8192 (bench/results/h200.json), of packed w at layers of models with 64 to 1024 rows
(../tuned/h200_tiles.json).
"""

from __future__ import annotations

import dataclasses

from jaxqq._kernels.hopper.tiles import Grid, cdiv


@dataclasses.dataclass(frozen=True)
class Timed:
  """A tile, and how long a CTA takes with it: its steps, and what begins and ends it."""

  block_m: int
  block_n: int
  step_us: float
  tile_us: float
  cluster_us: float | None = None  # instead, where a cluster exchanges sums; None: it cannot
  stream_k: tuple[float, float] | None = None  # a step and the rest, with stream-K; None: without

  def time(self, grid: Grid, k_steps: int) -> float:
    step_us, rest_us = self.step_us, self.tile_us
    if grid.cluster > 1:
      assert self.cluster_us is not None
      rest_us = self.cluster_us
    elif grid.stream_k:
      assert self.stream_k is not None
      step_us, rest_us = self.stream_k
    steps, tiles = counts(grid, k_steps)
    return steps * step_us + tiles * rest_us


def counts(grid: Grid, k_steps: int) -> tuple[int, int]:
  """How many steps follow each other, and how often a tile begins and ends.

  A launch takes as many waves of CTAs as there are tiles for each SM.
  """
  if grid.cluster > 1:
    return cdiv(k_steps, grid.cluster), 1
  if grid.stream_k:
    return grid.most_steps(k_steps), 1
  waves = cdiv(grid.num_tiles, grid.num_sms)
  return waves * k_steps, waves


CLUSTERS = (1, 2, 3, 4, 6, 8)  # CTAs that share a tile
STREAM_K_GAIN = 1.05  # before it is taken: its times are the least certain

GEMM = (
  Timed(256, 128, 0.78, 3.0),
  Timed(128, 128, 0.45, 3.0),
)

# `skinny_gemm` with packed e2m1 codes and 33 to 64 rows of x; a step is 64 of k.
SKINNY_E2M1 = Timed(64, 64, 0.145, 1.6, 3.8)

# Expanding w takes as long for few rows of x as for many, so small tiles take more than their
# share. Tiles of 192 or 256 rows of w have three or four warpgroups, and registers for fewer sums:
# with 128 rows of x by 256, ptxas 13.0 serializes wgmma. In fp8, which sums a step apart, tiles of
# 128 by 192 spill registers, and those of 64 by 256 gain nothing. Most of `step_us` and `tile_us`
# are of an older fit, to fewer times; today's steps differ from them by up to 13%. With stream-K,
# 64 rows by 192 in fp8 take longer in the survey of models, whose matrices are larger; the cost is
# made for that.
DEQUANT_E2M1 = (
  Timed(64, 128, 0.312, 4.0, 5.5, (0.312, 9.5)),
  Timed(64, 192, 0.438, 4.4, 5.5, (0.438, 9.5)),
  Timed(64, 256, 0.560, 4.4, 6.3, (0.560, 12.0)),
  Timed(96, 128, 0.375, 4.0, 5.7, (0.375, 10.5)),
  Timed(96, 192, 0.514, 4.3, 6.6, (0.514, 12.5)),
  Timed(96, 256, 0.634, 5.0, 9.6, (0.634, 16.2)),
  Timed(128, 128, 0.417, 4.3, 6.1, (0.432, 11.7)),
  Timed(128, 192, 0.549, 4.2, 6.8, (0.549, 18.0)),
  Timed(192, 128, 0.510, 4.7, 7.4, (0.536, 15.9)),
  Timed(192, 192, 0.714, 3.5, 12.3, (0.720, 20.0)),
  Timed(256, 128, 0.610, 5.2, 9.5, (0.654, 17.6)),
)
DEQUANT_E4M3 = (
  Timed(64, 128, 0.534, 4.3, 5.3, (0.534, 10.0)),
  Timed(64, 192, 0.679, 5.8, 6.3, (0.707, 14.0)),
  Timed(96, 128, 0.610, 4.6, 5.0, (0.615, 12.1)),
  Timed(96, 192, 0.785, 4.9, 7.0, (0.785, 12.2)),
  Timed(128, 128, 0.655, 5.8, 6.6, (0.670, 13.8)),
  Timed(192, 128, 0.710, 5.6, 8.7, (0.764, 18.5)),
  Timed(256, 128, 0.910, 6.2, 8.0, (1.042, 16.4)),
)
