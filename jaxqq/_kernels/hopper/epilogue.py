"""What sums are multiplied by before they are stored, with no step out of float32's range.

Sums times one scale, 2**120, may leave float32's range although sums times both, 2**120 and
2**-120, do not. So each scale is split into two factors. A scale's first factor, up to 2**64, keeps
sums well within the range, whatever they are. The rest of it, which nearly always is 1, comes after
the other operand's scale. So no product leaves float32's range unless the last one does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper.pipeline import Tile, Walk, group_of
from jaxqq._kernels.hopper.ptx import stores
from jaxqq._kernels.hopper.quantize.codes import amax_or_nan
from jaxqq._kernels.hopper.tiles import ROWS

_ZERO_ROWS = 32  # that a warpgroup stores at a time, where results are zeros
_LEAST, _LARGEST = 127 - 64, 127 + 64  # exponent fields of a first factor


# Global scales


@dataclasses.dataclass(frozen=True)
class Alpha:
  """What a tile's sums are multiplied by, one after the other.

  Kernels take global scales as they are given: any arithmetic before would cost a kernel of XLA's.

  Attributes:
    unit: what the mainloop leaves out, and 1 / 2688 for each global scale.
    factors: of the global scales, if there are any.
  """

  unit: float
  factors: tuple[Any, ...]

  @classmethod
  def of_tile(cls, unit: float, of_x: Any, of_w: Any, tile: Tile) -> Alpha:
    """of_x, of_w: references to one amax, or to one for each group; None where there is none."""
    refs = [ref for ref in (of_x, of_w) if ref is not None]
    amaxes = tuple(amax_or_nan(ref[group_of(ref, tile)]) for ref in refs)
    return cls(unit, factors_of_product(*amaxes) if len(amaxes) == 2 else amaxes)

  def times(self, sums: Any) -> Any:
    out = sums if self.unit == 1 else sums * np.float32(self.unit)
    for factor in self.factors:
      out = out * factor
    return out


def factors_of_product(a: Any, b: Any) -> tuple[Any, Any]:
  """(a * b, 1) if float32 holds that, else (larger, smaller), of scalars that are not negative.

  Sums times the larger one are between the sums and the result. NaN stays NaN.
  """
  both = a * b
  fits = (both >= np.float32(2.0**-126)) & (both <= np.finfo(np.float32).max)
  fits = fits | (a == 0) | (b == 0)
  is_larger = a > b
  larger, smaller = jnp.where(is_larger, a, b), jnp.where(is_larger, b, a)
  return jnp.where(fits, both, larger), jnp.where(fits, np.float32(1), smaller)


# Rows in groups


def store_whole_or_some(
  is_whole: Any, whole: Callable[[], None] | None, some: Callable[[], None]
) -> None:
  """`whole` of a piece whose rows are all the group's, where the TMA can store it; else `some`."""
  if whole is None:
    some()
    return
  pl.when(is_whole)(whole)
  pl.when(jnp.logical_not(is_whole))(some)


def store_zeros(walk: Walk, out_ref: Any, block_m: int, column_of: Callable[[Any], Any]) -> None:
  """Zeros for the tiles of a walk, 64 columns of each, by a warpgroup.

  Args:
    walk: of `pipeline.walk_of_zeros`.
    out_ref: (1, m, n), in global memory.
    block_m: rows of a tile, at most.
    column_of: a tile's first one.
  """
  size = math.gcd(block_m, _ZERO_ROWS)
  zeros = jnp.zeros((ROWS, size), out_ref.dtype)

  @pl.loop(0, walk.num_tiles)
  def _tile(t: Any) -> None:
    tile: Any = walk.tile(t)
    for i in range(0, block_m, size):

      @pl.when(i < tile.rows)
      def _piece(i: int = i) -> None:
        piece = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        where = tile.first + i, tile.rows - i, column_of(tile)
        to = piece, plgpu.Layout.WGMMA, out_ref.at[0]
        stores.store_some(*to, *where, transposed=True)


# Scales of rows: powers of two, of rebased codes


def load_row_scales(ref: Any, *, of_rows: bool) -> Any:
  """Scales of an operand's rows, which are a tile's rows or its columns, where its sums are."""
  layout = plgpu.Layout.WGMMA.reduce(1 if of_rows else 0)
  return plgpu.load(ref, layout=layout, optimized=False)


def times_row_scales(sums: Any, of_rows: Any, of_columns: Any) -> Any:
  """Sums times the scales of their rows and of their columns, powers of two, 2**-127 to 2**127.

  Those of rows as two factors, one before those of columns: |sums| is 0 or from 2**-18, two of
  e4m3's smallest codes, to 2**50.
  """
  first, second = factors_of_power(of_rows)
  sums = sums * lax.broadcast_in_dim(first, sums.shape, (0,))
  sums = sums * lax.broadcast_in_dim(of_columns, sums.shape, (1,))
  return sums * lax.broadcast_in_dim(second, sums.shape, (0,))


def factors_of_power(scales: Any) -> tuple[Any, Any]:
  """Of float32 powers of two, 2**-127 to 2**127; a NaN goes into the second factor."""
  first, second = _factors_of_field(lax.bitcast_convert_type(scales, jnp.int32) >> 23)
  return first, jnp.where(scales == scales, second, jnp.float32(np.nan))


def factors_of_powers(words: Any) -> tuple[list[Any], list[Any]]:
  """Of four scales in a word, 2**(byte - 127), 0xFF being NaN.

  The first group has the NaN for all four, since the whole row is NaN then.
  """
  magnitudes = words & np.uint32(0x7F7F7F7F)
  nan = (magnitudes + np.uint32(0x01010101)) & words & np.uint32(0x80808080)
  words = lax.bitcast_convert_type(words, jnp.int32)
  fields = [(words >> (8 * i)) & 0xFF for i in range(4)]
  first, second = map(list, zip(*map(_factors_of_field, fields), strict=True))
  second[0] = jnp.where(nan == np.uint32(0), second[0], jnp.float32(np.nan))
  return first, second


def _factors_of_field(field: Any) -> tuple[Any, Any]:
  """2**(field - 127), field of 0 to 254; of 255, numbers."""
  first = jnp.minimum(jnp.maximum(field, _LEAST), _LARGEST)
  one, other = (
    lax.bitcast_convert_type(e << 23, jnp.float32) for e in (first, field + 127 - first)
  )
  return one, other
