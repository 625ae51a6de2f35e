"""The tiles of a product of rows in groups: which rows a tile has, and which matrix it meets.

A tile has rows of one group. It begins at any row, with the group or where the tile before it ends:

    rows      | group 0      | group 1           | group 3 | of no group |
    tiles     | tile 0 | 1   | tile 2 | tile 3   | tile 4  | zeros       |

How many there are is known on the device alone, so the table of tiles has room for as many as there
can be. Tiles of rows that have no group come last: their results are zeros.

The table is a few sums over comparisons, each of tiles with groups, which XLA fuses to as many
small kernels. Products of the same groups share it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxqq._kernels.hopper.pipeline import GroupTiles
from jaxqq._kernels.hopper.tiles import num_group_tiles
from jaxqq._ragged_reference import Groups


def group_tiles(groups: Groups, batch: int, rows: int, block_m: int) -> GroupTiles:
  """The tiles of the groups of `batch` times `rows` rows, one batch after the other."""
  starts = groups.starts.reshape(batch, -1)
  ends = starts + groups.sizes.reshape(batch, -1)
  first = jnp.arange(batch, dtype=jnp.int32) * np.int32(rows)
  # The groups, then the rows before the first one, then those behind the last one.
  starts_of = jnp.concatenate([groups.starts, first, jnp.max(ends, axis=1)])
  ends_of = jnp.concatenate([ends.reshape(-1), jnp.min(starts, axis=1), first + np.int32(rows)])
  sizes = ends_of - starts_of
  tiles = (sizes + np.int32(block_m - 1)) // np.int32(block_m)
  segment = jnp.arange(sizes.shape[0], dtype=jnp.int32)
  tiles_to = _sum(segment[None, :] <= segment[:, None], tiles)

  tile = jnp.arange(num_group_tiles(batch * rows, sizes.shape[0], block_m), dtype=jnp.int32)
  own = jnp.sum(tiles_to[None, :] <= tile[:, None], axis=1, dtype=jnp.int32)
  is_own = segment[None, :] == own[:, None]
  done = (tile - _sum(is_own, tiles_to - tiles)) * np.int32(block_m)
  last_group = np.int32(groups.sizes.shape[0] - 1)
  return GroupTiles(
    group=jnp.minimum(own, last_group),
    matrix=_sum(is_own[:, : groups.matrices.shape[0]], groups.matrices),
    first=_sum(is_own, starts_of) + done,
    rows=jnp.minimum(_sum(is_own, sizes) - done, np.int32(block_m)),
    counts=jnp.stack([tiles_to[last_group], tiles_to[-1]]),
  )


def _sum(where: jax.Array, of: jax.Array) -> jax.Array:
  """Of each row of `where`, the numbers that it takes."""
  return jnp.sum(jnp.where(where, of[None, :], np.int32(0)), axis=1, dtype=jnp.int32)


def scales_of_rows(groups: Groups, scales: jax.Array, rows: int) -> jax.Array:
  """The number of each row's group, (rows,); 0 of a row that has none."""
  row = jnp.arange(rows, dtype=jnp.int32)[:, None]
  is_in = (row >= groups.starts[None, :]) & (row < (groups.starts + groups.sizes)[None, :])
  return jnp.sum(jnp.where(is_in, scales[None, :], jnp.float32(0)), axis=1)
