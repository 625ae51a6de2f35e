"""Which tiles a product gets, tuned on an H200.

A CTA's time is about its steps times what one step costs, and the launch takes as many waves of
CTAs as there are tiles for each multiprocessor. The costs below are measured: microseconds a step,
relative to the largest tile, at n = k = 8192.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxqq._kernels import matmul, packed_matmul
from jaxqq._kernels.slabs import ROWS
from jaxqq._kernels.tiles import NUM_SMS


@dataclasses.dataclass(frozen=True)
class _Tile:
  config: Any
  cost: float  # of a step, relative to the largest tile


# Shared memory, 227 KiB: stages of (block_m + block_n) rows of 128 bytes, and the tiles on their
# way out. Tried and no faster: 128 x 256, pairs of CTAs that share the load of a tile, wider bands.
_READY = (
  _Tile(matmul.Config(256, 128, 4), 1.0),
  _Tile(matmul.Config(128, 128, 6), 0.58),
)

# Tiles of x_hat against 128 rows of packed w. Expanding w costs the same for few rows of x_hat as
# for many, so small tiles cost more than their share. A stage holds 64 or 128 bytes of words a row.
_PACKED_E2M1 = (
  _Tile(packed_matmul.Config(256, 4), 1.0),
  _Tile(packed_matmul.Config(128, 8, store_slots=1), 0.73),
  _Tile(packed_matmul.Config(64, 8), 0.54),
)
_PACKED_E4M3 = (
  _Tile(packed_matmul.Config(256, 4), 1.0),
  _Tile(packed_matmul.Config(128, 6), 0.82),
  _Tile(packed_matmul.Config(64, 8), 0.61),
)

# From how many rows of x on packed w is expanded a slab at a time, by the bits of a code: fewer do
# not pay for writing it.
SLAB_MIN_ROWS = {4: 8192, 8: 2048}


def config(
  packed_bits: int | None, batch: int, m: int, n: int, out_dtype: Any, promote: bool
) -> Any:
  """The tiles that should take the least time; packed_bits are those of a code, None unpacked.

  Those of `matmul` for packed w are for slabs of it, expanded.
  """
  if packed_bits and batch == 1 and m >= SLAB_MIN_ROWS[packed_bits] and n % ROWS == 0:
    packed_bits = None
  tiles = {None: _READY, 4: _PACKED_E2M1, 8: _PACKED_E4M3}[packed_bits]

  def time(tile: _Tile) -> float:
    grid = tile.config.grid
    return -(-grid.num_tiles(batch, m, n) // NUM_SMS) * tile.cost

  best = min(tiles, key=time).config
  # Float32 tiles on their way out are twice as large.
  slots = 1 if jnp.dtype(out_dtype).itemsize > 2 else best.store_slots
  return dataclasses.replace(best, promote=promote, store_slots=slots)
