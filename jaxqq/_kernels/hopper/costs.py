"""Tiles of the kernels for more than 64 rows, and how long they take on an H200.

A line is a candidate; `plan.py` takes the one whose time is least. Times are in microseconds, x's
quantizer included, fitted to what was measured at n = k = 8192 (bench/results/h200.json) and, of
packed w, at five shapes of models with 96 and 256 rows (../tuned/h200_tiles.json).
"""

from __future__ import annotations

import dataclasses

from jaxqq._kernels.hopper.tiles import Grid, WideTiles, cdiv


@dataclasses.dataclass(frozen=True)
class Timed:
  """Tiles, and how long a CTA takes with them: its steps, and what begins and ends a tile."""

  tiles: WideTiles
  step_us: float
  other_us: float = 3.0  # in a cluster: to exchange sums as well

  def time(self, grid: Grid, k_steps: int) -> float:
    """A launch takes as many waves of CTAs as there are tiles for each SM."""
    waves = cdiv(grid.num_tiles, grid.num_sms)
    return float(waves * (k_steps / grid.cluster * self.step_us + self.other_us))


# Shared memory has 227 KiB: stages of (block_m + block_n) rows of 128 bytes, and the tiles on their
# way out.
GEMM = (
  Timed(WideTiles(256, 4), 0.78),
  Timed(WideTiles(128, 6), 0.45),
)

# Expanding w takes as long for few rows of x as for many, so small tiles take more than their
# share. A stage has 64 or 128 bytes of words a row. In a cluster, the sums that the other CTAs send
# take the room of some stages.
DEQUANT_E2M1 = (
  Timed(WideTiles(256, 4), 0.645, 2.0),
  Timed(WideTiles(256, 4, store_stages=1, cluster=2), 0.645, 6.5),
  Timed(WideTiles(256, 3, store_stages=1, cluster=4), 0.645, 9.0),
  Timed(WideTiles(128, 8, store_stages=1), 0.44, 4.5),
  Timed(WideTiles(128, 6, store_stages=1, cluster=2), 0.44, 8.0),
  Timed(WideTiles(128, 6, store_stages=1, cluster=4), 0.44, 7.5),
  Timed(WideTiles(128, 6, store_stages=1, cluster=8), 0.44, 7.2),
  Timed(WideTiles(64, 8), 0.37, 3.0),
  Timed(WideTiles(64, 8, store_stages=1, cluster=2), 0.37, 5.0),
  Timed(WideTiles(64, 8, store_stages=1, cluster=4), 0.37, 5.5),
  Timed(WideTiles(64, 8, store_stages=1, cluster=8), 0.37, 6.0),
)
DEQUANT_E4M3 = (
  Timed(WideTiles(256, 4), 0.83, 2.5),
  Timed(WideTiles(256, 3, store_stages=1, cluster=2), 0.83, 8.4),
  Timed(WideTiles(256, 2, store_stages=1, cluster=4), 0.83, 10.5),
  Timed(WideTiles(128, 6), 0.62, 5.0),
  Timed(WideTiles(128, 5, store_stages=1, cluster=2), 0.62, 8.0),
  Timed(WideTiles(128, 5, store_stages=1, cluster=4), 0.62, 8.0),
  Timed(WideTiles(128, 5, store_stages=1, cluster=8), 0.62, 8.3),
  Timed(WideTiles(64, 8), 0.5, 3.7),
  Timed(WideTiles(64, 7, store_stages=1, cluster=2), 0.5, 7.0),
  Timed(WideTiles(64, 7, store_stages=1, cluster=4), 0.5, 6.7),
  Timed(WideTiles(64, 7, store_stages=1, cluster=8), 0.5, 7.5),
)
