"""Rows of squares: 16 x 16 elements, or 32 x 32, that share a scale.

A warp has the whole height of a square and 64 columns: a lane 8 neighbours of every fourth row.

    lanes 0-7 | rows 0, 4, ...    the largest magnitude of a square is that of a thread's registers,
    lanes 8-15 | rows 1, 5, ...   then of lanes, by shuffles
    lanes 16-23 | rows 2, 6, ...
    lanes 24-31 | rows 3, 7, ...

A warpgroup has four such bands, one under the other. The last tile of either axis starts early
enough to be a whole one, and writes some of the same values again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._formats import Format
from jaxqq._kernels.hopper.ptx.layouts import WARP, WARPS
from jaxqq._kernels.hopper.ptx.rotation import rotated_in_lanes
from jaxqq._kernels.hopper.ptx.rounding import thread_amax_bits
from jaxqq._kernels.hopper.quantize.groups import VECTOR, load_gmem, make_kernel
from jaxqq._kernels.hopper.quantize.parts import Given, Parts, iota_of

COLUMNS = 64  # of a tile
_LANES = COLUMNS // VECTOR  # that a row of a tile has


@dataclasses.dataclass(frozen=True)
class Squares:
  """A matrix (rows, k) as (bands, size, squares, lanes, 8), squares of size rows and columns."""

  size: int
  rows: int
  k: int
  parts: Parts

  @classmethod
  def of(cls, a: jax.Array, fmt: Format, parts: Parts) -> Squares:
    rows, k = a.shape
    return cls(fmt.group_size, rows, k, parts)

  @property
  def shape(self) -> tuple[int, ...]:
    """With zeros at the end, up to whole squares and a whole tile at least."""
    bands, squares = pl.cdiv(self.rows, self.size), pl.cdiv(self.k, self.size)
    return max(bands, WARPS), self.size, max(squares, self._squares), *self._minor

  @property
  def tile(self) -> tuple[int, ...]:
    return WARPS, self.size, self._squares, *self._minor

  @property
  def layout(self) -> Any:
    of_tile = WARPS, WARP // _LANES, self._squares, *self._minor
    return plgpu.Layout.TILED(
      plgpu.Tiling((of_tile,)), warp_dims=(-5,), lane_dims=(-4, -3, -2), vector_dim=-1
    )

  def reduced(self, ndim: int) -> Any:
    """The layout of what is left when only the first axes are."""
    return self.layout.reduce(tuple(range(ndim, len(self.tile))))

  @property
  def _squares(self) -> int:
    return COLUMNS // self.size

  @property
  def _minor(self) -> tuple[int, int]:
    return self.size // VECTOR, VECTOR

  def given(self, given: Given) -> Given:
    """With the factors of signs that each thread multiplies its elements by."""
    if given.signs is None:
      return given
    tile = WARPS, WARP // _LANES, self._squares, *self._minor
    row = jnp.resize(given.signs, tile[2:])
    return dataclasses.replace(given, signs=jnp.broadcast_to(row, tile))

  def load(self, a_ref: Any, here: Any, given: Given) -> tuple[jax.Array, jax.Array]:
    """float32 elements, rotated, and the bits of the amax of squares, for each of their rows."""
    a = load_gmem(a_ref.at[here], self.layout)
    if self.parts.rotation is not None:
      signs = load_gmem(given.signs, self.layout)
      a = rotated_in_lanes(a.astype(jnp.float32), signs, self.parts.rotation, self.layout)
    bits = jnp.max(jnp.max(thread_amax_bits(a, self.layout), axis=3), axis=1)
    bits = lax.broadcast_in_dim(bits, a.shape[:3], (0, 2))
    return a.astype(jnp.float32), plgpu.layout_cast(bits, self.reduced(3))

  def over_block(self, values: jax.Array) -> jax.Array:
    """int32 (bands, size, squares, lanes) of threads to the sums of squares, for each row."""
    sums = jnp.sum(jnp.sum(values, axis=3, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    sums = lax.broadcast_in_dim(sums, values.shape[:3], (0, 2))
    return plgpu.layout_cast(sums, self.reduced(3))

  def random(self, here: Any, shape: tuple[int, ...], given: Given) -> jax.Array | None:
    """Of elements of that shape; None to round to nearest."""
    if not self.parts.is_stochastic:
      return None
    bands, _, squares = here
    band, in_band, square, lane = (iota_of(shape[:-1], i, self.reduced(4)) for i in range(4))
    row = (band + bands.start) * self.size + in_band
    return given.random((square + squares.start) * shape[3] + lane, row, self.layout)

  def run(
    self,
    body: Callable[..., None],
    name: str,
    a: jax.Array,
    out_types: tuple[jax.ShapeDtypeStruct, ...],
    arrays: tuple[jax.Array, ...],
  ) -> list[jax.Array]:
    """Runs body(here, a_ref, *array_refs, *out_refs) on every tile.

    out_types are those of one square of a row; the results are (rows, squares, ...) of them.
    """
    bands, size, squares, *minor = self.shape
    a = jnp.pad(a, ((0, bands * size - self.rows), (0, squares * size - self.k)))
    steps = pl.cdiv(squares, self._squares)

    def kernel(*refs: Any) -> None:
      step = lax.axis_index("step")
      band = jnp.minimum(lax.div(step, jnp.int32(steps)) * WARPS, bands - WARPS)
      square = lax.rem(step, jnp.int32(steps)) * self._squares
      square = jnp.minimum(square, squares - self._squares)
      body((pl.ds(band, WARPS), slice(None), pl.ds(square, self._squares)), *refs)

    run = make_kernel(
      kernel,
      f"{name}_of_squares",
      grid=(steps * pl.cdiv(bands, WARPS),),
      out_type=tuple(
        jax.ShapeDtypeStruct((bands, size, squares, *t.shape), t.dtype) for t in out_types
      ),
    )
    results = run(a.reshape(bands, size, squares, *minor), *arrays)
    return [
      out.reshape(-1, squares, *out.shape[3:])[: self.rows, : self.k // size] for out in results
    ]
