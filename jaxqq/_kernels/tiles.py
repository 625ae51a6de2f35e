"""What the matrix kernels share: the order of tiles, the memory warpgroup, shapes, epilogues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq import _compat
from jaxqq._kernels.powers import factors_of_power

COMPUTE_WARPGROUPS = 2
_ASSUMED_SMS = 132  # of an H100 SXM or H200; an H100 PCIe has 114, an H20 78


def num_sms() -> int:
  """How many multiprocessors (SMs) the device has, of which each gets a CTA."""
  return _compat.cuda_sm_count() or _ASSUMED_SMS


@dataclasses.dataclass(frozen=True)
class Grid:
  """The output in tiles, walked in bands of `group_width` tiles so that the cache is reused."""

  block_m: int
  block_n: int
  group_width: int
  minor: int  # the axis along which bands are cut; 0: m, 1: n
  split: int = 1  # CTAs that share a tile

  def _tiles(self, m: int, n: int) -> tuple[int, int]:
    return pl.cdiv(m, self.block_m), pl.cdiv(n, self.block_n)

  def num_tiles(self, batch: int, m: int, n: int) -> int:
    m_tiles, n_tiles = self._tiles(m, n)
    return batch * m_tiles * n_tiles

  def num_ctas(self, batch: int, m: int, n: int) -> int:
    """Of those that share a tile, which is the only one that they have, one counts."""
    num_tiles = self.num_tiles(batch, m, n)
    return num_tiles if self.split > 1 else min(num_sms(), num_tiles)

  def walk(self, batch: int, m: int, n: int) -> tuple[Any, Callable[[Any], Any]]:
    """Within a kernel: how many tiles this CTA has, and which its t-th is."""
    num_ctas, cta = self.num_ctas(batch, m, n), lax.axis_index("cta")
    own_tiles = lax.div(self.num_tiles(batch, m, n) - cta + num_ctas - 1, jnp.int32(num_ctas))
    return own_tiles, lambda t: self.tile_of(cta + t * num_ctas, m, n)

  def tile_of(self, index: Any, m: int, n: int) -> tuple[Any, Any, Any]:
    """Batch, row and column of an output tile, counted in tiles."""
    m_tiles, n_tiles = self._tiles(m, n)
    a_matrix = jnp.int32(m_tiles * n_tiles)
    within = lax.rem(index, a_matrix)
    mi, ni = plgpu.planar_snake(within, (m_tiles, n_tiles), self.minor, self.group_width)
    return lax.div(index, a_matrix), mi, ni


def keep_full(
  load: Callable[[Any, Any, Any], None],  # (place, k step within the tile, tile)
  empty: Any,  # barriers, one a place in shared memory
  own_tiles: Any,
  k_steps: int,
  tile_of: Callable[[Any], Any],
) -> None:
  """What the memory warpgroup does: loads every step of every tile, once its place is free."""
  plgpu.set_max_registers(40, action="decrease")
  (stages,) = empty.shape

  def load_when_free(step: Any, ki: Any, tile: Any) -> None:
    slot = lax.rem(step, jnp.int32(stages))

    @pl.when(step >= stages)
    def _wait() -> None:
      plgpu.barrier_wait(empty.at[slot])

    load(slot, ki, tile)

  @pl.loop(0, own_tiles)
  def _tile(t: Any) -> None:
    tile = tile_of(t)
    pl.loop(0, k_steps)(lambda ki: load_when_free(t * k_steps + ki, ki, tile))

  total = own_tiles * k_steps

  # The last readers: no barrier is left half way.
  @pl.loop(jnp.maximum(total - stages, 0), total)
  def _drain(step: Any) -> None:
    plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(stages))])


def batch_of(ref: Any, b: Any) -> Any:
  """The batch index of an operand that may be shared by all batches."""
  return b if ref.shape[0] > 1 else 0


def tile_transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
  """How a tile of so many columns lies in shared memory: 8 rows of up to 128 bytes, swizzled."""
  itemsize = jnp.dtype(dtype).itemsize
  swizzle = plgpu.find_swizzle(columns * itemsize * 8)
  # Abstract to a type checker, for a method that they do not need.
  transform: Any = plgpu.SwizzleTransform
  tiling: Any = plgpu.TilingTransform
  return tiling((8, swizzle // itemsize)), transform(swizzle)


def compiler_params() -> plgpu.CompilerParams:
  """Barriers are where the kernels put them: no shared memory is both written and read by one."""
  return plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True
  )


def load_row_scales(ref: Any, *, of_rows: bool) -> Any:
  """Scales of an operand's rows, which are a tile's rows or its columns, where its sums are."""
  layout = plgpu.Layout.WGMMA.reduce(1 if of_rows else 0)
  return plgpu.load(ref, layout=layout, optimized=False)


def scaled(a: Any, of_rows: Any, of_columns: Any) -> Any:
  """a times the scales of its rows and of its columns, powers of two from 2**-127 to 2**127.

  Those of rows as two factors, one before those of columns: no product leaves float32's range
  unless the last one does, since |a| is 0 or from 2**-18, two of e4m3's smallest codes, to 2**50.
  """
  first, second = factors_of_power(of_rows)
  a = a * lax.broadcast_in_dim(first, a.shape, (0,))
  a = a * lax.broadcast_in_dim(of_columns, a.shape, (1,))
  return a * lax.broadcast_in_dim(second, a.shape, (0,))


def rounded_up(size: int, multiple: int) -> int:
  return pl.cdiv(size, multiple) * multiple


def padded(a: jax.Array, rows: int) -> jax.Array:
  """Zero rows along axis 1: the copy engine moves 8 rows at a time, and loads know no end."""
  missing = rows - a.shape[1]
  return jnp.pad(a, ((0, 0), (0, missing), (0, 0))[: a.ndim]) if missing else a
