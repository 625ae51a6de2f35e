"""Which tiles a product gets, tuned on an H200.

A CTA's time is about its steps times what one takes, and what begins and ends a tile. A launch
takes as many waves of CTAs as there are tiles for each multiprocessor. The times below are fitted
to what was measured at n = k = 8192; sums have been exchanged 1 to 2 us faster since.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxqq._kernels import matmul, packed_matmul
from jaxqq._kernels.slabs import ROWS
from jaxqq._kernels.tiles import num_sms


@dataclasses.dataclass(frozen=True)
class _Tile:
  config: Any
  step_us: float
  other_us: float = 3.0  # with a split: to exchange sums as well

  def time(self, batch: int, m: int, n: int, k_steps: int) -> float:
    grid = self.config.grid
    waves = -(-grid.num_tiles(batch, m, n) // num_sms())
    return float(waves * (k_steps / grid.split * self.step_us + self.other_us))

  def is_possible(self, batch: int, m: int, n: int, k: int, out_dtype: Any) -> bool:
    """All CTAs that share a tile run at once, have as many steps, and room for their sums."""
    grid = self.config.grid
    if grid.split == 1:
      return True
    fits = grid.num_tiles(batch, m, n) * grid.split <= num_sms()
    return fits and k % (128 * grid.split) == 0 and jnp.dtype(out_dtype).itemsize == 2


# Shared memory, 227 KiB: stages of (block_m + block_n) rows of 128 bytes, and the tiles on their
# way out. Tried and no faster: 128 x 256, pairs of CTAs that share the load of a tile, wider bands.
_READY = (
  _Tile(matmul.Config(256, 128, 4), 0.78),
  _Tile(matmul.Config(128, 128, 6), 0.45),
)

# Tiles of x_hat against 128 rows of packed w. Expanding w takes as long for few rows of x_hat as
# for many, so small tiles take more than their share. A stage holds 64 or 128 bytes of words a row.
# Sums to exchange, half a tile in float32, take the room of a stage or two.
_PACKED_E2M1 = (
  _Tile(packed_matmul.Config(256, 4), 0.645),
  _Tile(packed_matmul.Config(256, 4, store_slots=1, split=2), 0.645, 8.5),
  _Tile(packed_matmul.Config(128, 8, store_slots=1), 0.44),
  _Tile(packed_matmul.Config(128, 6, store_slots=1, split=2), 0.44, 9.5),
  _Tile(packed_matmul.Config(64, 8), 0.37),
)
_PACKED_E4M3 = (
  _Tile(packed_matmul.Config(256, 4), 0.83),
  _Tile(packed_matmul.Config(256, 3, store_slots=1, split=2), 0.83, 12.0),
  _Tile(packed_matmul.Config(128, 6), 0.57),
  _Tile(packed_matmul.Config(128, 5, store_slots=1, split=2), 0.57, 10.0),
  _Tile(packed_matmul.Config(64, 8), 0.5),
)

# From how many rows of x on packed w of 8 bit codes is expanded a slab at a time. Measured at n = k
# = 8192 (mxfp8): with 2048 rows 244 us by slabs, 238 expanded in registers, with 3072 346 and 354.
# Codes of 4 bits stay in registers: with 8192 rows (nvfp4) 1408 and 1385.
SLAB_MIN_ROWS = 3072


def config(
  packed_bits: int | None, batch: int, m: int, n: int, k: int, out_dtype: Any, promote: bool
) -> Any:
  """The tiles that should take the least time; packed_bits are those of a code, None unpacked.

  Those of `matmul` for packed w are for slabs of it, expanded.
  """
  if packed_bits == 8 and batch == 1 and m >= SLAB_MIN_ROWS and n % ROWS == 0:
    packed_bits = None
  tiles = {None: _READY, 4: _PACKED_E2M1, 8: _PACKED_E4M3}[packed_bits]
  k_steps = k // (64 if packed_bits == 4 else 128)
  possible = (tile for tile in tiles if tile.is_possible(batch, m, n, k, out_dtype))
  best = min(possible, key=lambda tile: tile.time(batch, m, n, k_steps)).config
  # Float32 tiles on their way out are twice as large.
  slots = 1 if jnp.dtype(out_dtype).itemsize > 2 else best.store_slots
  return dataclasses.replace(best, promote=promote, store_slots=slots)
