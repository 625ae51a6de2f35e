"""How arrays are stored in registers and in shared memory."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.tiles import TILE_ROWS

ROWS = 64  # of a left operand of the tensor cores, which one warpgroup has
WARP, WARPS = 32, 4  # lanes in a warp, warps in a warpgroup
ROW_BYTES = 128  # of a swizzled tile in shared memory


def layout_of(columns: int, length: int, lanes: tuple[Any, ...]) -> Any:
  """(64, columns): a warp has 16 rows, a thread vectors of rows r and r + 8."""
  return plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, columns), (16, columns), (8, columns), (length,))),
    warp_dims=(-7,),
    lane_dims=lanes,
    vector_dim=-1,
  )


def whole_rows(length: int) -> Any:
  """(64, length * i): each of a row's four threads has all of it, so many at a time."""
  return plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, length), (16, length), (8, length))),
    warp_dims=(-6,),
    lane_dims=(-2, plgpu.Replicated(4)),
    vector_dim=-1,
  )


def even_rows_first(columns: int, length: int) -> Any:
  """(64, columns * i) as of `layout_of`, but of every 8 rows a warp has 0, 2, 4, 6, 1, 3, 5, 7.

  A row's four threads have vectors of `length`. In swizzled shared memory, words that the threads
  of four such rows load are in different banks.
  """
  return plgpu.Layout.TILED(
    plgpu.Tiling(((ROWS, columns), (16, columns), (8, columns), (2, length))),
    warp_dims=(-8,),
    lane_dims=(-2, -4, -3),
    vector_dim=-1,
  )


ROW = plgpu.Layout.WGMMA.reduce(1)  # (64,): the four lanes of a row hold the same

# (64, 4 i): of every four neighbours of a row, each of its four lanes has one.
ONE_OF_FOUR = layout_of(4, 1, (-3, -2))

# Of the last axis, a thread has one of each 128 neighbours.
ONE_EACH = plgpu.Layout.TILED(
  plgpu.Tiling(((WARPS * WARP,), (WARP,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)


def interleaved(a: Any) -> Any:
  """Of every 64 along the last axis, k = 16 q + 8 w + 4 h + 2 e + o at 32 h + 16 w + 8 o + 2 q + e.

  So thread q of a row's four holds word w's codes 2 e + o of its half h, in pairs of both e: no
  register takes codes of two words (`expand.py`).
  """
  bits = a.reshape(*a.shape[:-1], -1, 4, 2, 2, 2, 2)  # q, w, h, e, o
  return bits.transpose(*range(bits.ndim - 5), -3, -4, -1, -5, -2).reshape(a.shape)


def tile_transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
  """How a tile is stored in shared memory: 8 rows of up to 128 bytes, swizzled."""
  itemsize = jnp.dtype(dtype).itemsize
  swizzle = plgpu.find_swizzle(columns * itemsize * 8)
  # Abstract to a type checker, for a method that they do not need.
  transform: Any = plgpu.SwizzleTransform
  tiling: Any = plgpu.TilingTransform
  return tiling((TILE_ROWS, swizzle // itemsize)), transform(swizzle)


def row_transforms(row_bytes: int = ROW_BYTES) -> tuple[Any, ...]:
  """The same bytes, of rows of up to 128 of them, that may be loaded from any row and column on.

  Mosaic GPU copies tiles as a whole: those of 8 rows from every eighth row of a matrix on, whose
  rows have to be whole tiles as well.
  """
  transform: Any = plgpu.SwizzleTransform
  return (transform(row_bytes),)


def tiles_in_rows(shape: tuple[int, ...], dtype: Any) -> Any:
  """Shared memory of rows of 128 bytes, to load from any row on and to multiply in tiles.

  The bytes are the same, and Mosaic GPU wants to be told either way: `in_rows`, `in_tiles`. Its
  interpreter has no such unions, and neither way in its arrays.
  """
  whole = plgpu.SMEM(shape, dtype, transforms=tile_transforms(shape[-1], dtype))
  if interpreting():
    return whole
  return plgpu.RefUnion(whole, plgpu.SMEM(shape, dtype, transforms=row_transforms()))


def in_tiles(ref: Any) -> Any:
  return ref if interpreting() else ref[0]


def in_rows(ref: Any) -> Any:
  return ref if interpreting() else ref[1]
