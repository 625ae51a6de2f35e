"""The parts of a `jaxqq.Quantizer` in kernels: what they take beside an array, and do to elements.

    rotation      elements become those of a Hadamard transform, bfloat16, as they are loaded
    rounding      codes are stochastic, by bits of an element's place
    scales        then no element may be larger than a code: they are rounded up
    squares       the amax of a group is that of a square (`squares.py`; of columns, `columns.py`)
    four over six  one of two scales, by the errors of both, before codes are made

Nearest rounding without a rotation is `NEAREST`, which quantizers have where nothing else is said.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxqq import _hadamard
from jaxqq._formats import Format
from jaxqq._kernels.hopper.ptx.random_bits import uniform16
from jaxqq._kernels.hopper.ptx.rotation import rotated_in_lanes
from jaxqq._kernels.hopper.ptx.rounding import thread_amax_bits
from jaxqq._kernels.hopper.quantize.codes import (
  Scales,
  amax_bits_of,
  better_scales,
  encoding_table,
  scales_by_table,
  scales_of,
)
from jaxqq._kernels.hopper.quantize.groups import View, load_gmem


@dataclasses.dataclass(frozen=True)
class Parts:
  """What is asked of a kernel: as of `Quantizer`."""

  is_stochastic: bool = False
  rotation: int | None = None
  is_square: bool = False
  is_four_over_six: bool = False

  def entry(self, fmt: Format) -> int:
    """Neighbours that belong together: a group, or a rotation of several."""
    return max(fmt.group_size, self.rotation or 1)


NEAREST = Parts()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
  """The arrays of a quantizer, or in a kernel the references to them; None for what it lacks."""

  global_scale: Any = None  # float32 (1,), of NEAREST
  table: Any = None  # float32, of a global scale: `encoding_table`
  key: Any = None  # uint32 (2,), of random bits
  signs: Any = None  # float32, of a rotation: `factors_of_signs`

  @classmethod
  def of(
    cls,
    fmt: Format,
    parts: Parts,
    global_scale: jax.Array | None,
    key: jax.Array | None = None,
    signs: jax.Array | None = None,
  ) -> Given:
    """global_scale: float32, a scalar; key: uint32 (2,); signs: float32 (rotation,), 1 or -1."""
    if signs is not None:
      signs = _hadamard.factors_of_signs(signs)
    if global_scale is None or parts == NEAREST:
      return cls(None if global_scale is None else _one(global_scale), None, key, signs)
    return cls(None, encoding_table(global_scale, fmt), key, signs)

  def scales(
    self,
    a: jax.Array,
    amax_bits: jax.Array,
    fmt: Format,
    parts: Parts,
    dtype: Any,
    layout: Any,
    of_elements: Any,
    over_block: Callable[[jax.Array], jax.Array],
  ) -> Scales:
    """Of groups, whose array has that layout, of elements that came as `dtype`."""
    if parts.is_four_over_six:
      return better_scales(a, amax_bits, fmt, self.table, layout, of_elements, over_block)
    if self.table is not None:
      up = parts.is_stochastic
      return scales_by_table(amax_bits, fmt, self.table, layout, rounds_up=up)
    scalar = None if self.global_scale is None else self.global_scale[0]
    rounded_up = layout if parts.is_stochastic else None
    return scales_of(amax_bits, fmt, scalar, dtype, rounded_up=rounded_up)

  def random(self, block: Any, row: Any, layout: Any) -> jax.Array:
    """int32 (..., 8), of eight elements (row, 8 * block + i) each."""
    return uniform16(block, row, (self.key[0], self.key[1]), layout)


def amax_bits_of_parts(a: jax.Array, parts: Parts, layout: Any) -> jax.Array:
  """Of groups, the last two axes: `amax_bits_of`, of 16 bit floats two by an instruction."""
  if parts == NEAREST:
    return amax_bits_of(a.astype(jnp.float32))
  return jnp.max(thread_amax_bits(a, layout), axis=-1)


def iota_of(shape: tuple[int, ...], axis: int, layout: Any) -> jax.Array:
  return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, axis), layout)


def _one(scalar: jax.Array) -> jax.Array:
  return jnp.asarray(scalar, jnp.float32).reshape(1)


# Rows: a thread has a few neighbours, the lanes beside it the rest of a group or a rotation.


@dataclasses.dataclass(frozen=True)
class Rows:
  """A matrix of rows of k, seen as entries of `view`."""

  view: View
  k: int
  parts: Parts

  @classmethod
  def of(cls, k: int, fmt: Format, parts: Parts, vector: int) -> Rows:
    """With `vector` elements in a thread, and a group in an axis of its own."""
    lanes, groups = fmt.group_size // vector, parts.entry(fmt) // fmt.group_size
    return cls(View(lanes, vector) if groups == 1 else View(groups, lanes, vector), k, parts)

  @property
  def layout(self) -> Any:
    return self.view.layout

  def reduced(self, ndim: int) -> Any:
    """The layout of what is left when only the first axes are."""
    return self.view.reduced(ndim)

  def given(self, given: Given) -> Given:
    """With the factors of signs that each thread of a tile multiplies its elements by."""
    if given.signs is None:
      return given
    entry = jnp.resize(given.signs, self.view.minor)
    return dataclasses.replace(given, signs=jnp.broadcast_to(entry, (self.view.tile, *entry.shape)))

  def load(self, a_ref: Any, here: Any, given: Given) -> tuple[jax.Array, jax.Array]:
    """float32 elements, rotated, and the bits of the amax of groups."""
    layout, rotation = self.view.layout, self.parts.rotation
    a = load_gmem(a_ref.at[here], layout)
    if rotation is not None:
      signs = load_gmem(given.signs, layout)
      a = rotated_in_lanes(a.astype(jnp.float32), signs, rotation, layout)
    return a.astype(jnp.float32), amax_bits_of_parts(a, self.parts, layout)

  def over_block(self, values: jax.Array) -> jax.Array:
    """int32 (..., lanes) of threads to the sums of groups."""
    return jnp.sum(values, axis=-1, dtype=jnp.int32)

  def random(self, here: Any, shape: tuple[int, ...], given: Given) -> jax.Array | None:
    """Of elements of that shape; None to round to nearest."""
    if not self.parts.is_stochastic:
      return None
    vector = shape[-1]
    reduced, of_entry = self.view.reduced(len(shape) - 1), math.prod(self.view.minor[:-1])
    strides = [math.prod(shape[i:-1]) for i in range(1, len(shape))]
    index = jnp.full(shape[:-1], here.start * of_entry, jnp.int32)
    for axis, stride in enumerate(strides):
      index = index + iota_of(shape[:-1], axis, reduced) * stride
    row = lax.div(index.astype(jnp.uint32), jnp.uint32(self.k // vector)).astype(jnp.int32)
    return given.random(index - row * (self.k // vector), row, self.view.layout)


# What rows, and squares of them (`squares.py`), are seen as
Seen = Any  # Rows | Squares


def load_scaled(
  seen: Seen, a_ref: Any, here: Any, given: Given, fmt: Format
) -> tuple[jax.Array, Scales, jax.Array | None]:
  """Elements, the scales of their groups, and what they are rounded by; None is to nearest."""
  a, amax_bits = seen.load(a_ref, here, given)
  of_groups = seen.reduced(amax_bits.ndim)
  how = seen.parts, a_ref.dtype, of_groups, seen.layout, seen.over_block
  return a, given.scales(a, amax_bits, fmt, *how), seen.random(here, a.shape, given)


# Columns: a thread has 64 neighbours of one.


def random_of_columns(
  shape: tuple[int, ...], tile: Any, row: Any, given: Given, parts: Parts, layout: Any
) -> jax.Array | None:
  """Of rows (128, ..., 8) from `row` on, behind whole tiles; None to round to nearest."""
  if not parts.is_stochastic:
    return None
  of_tile = math.prod(shape[1:-1])
  reduced = layout.reduce((len(shape) - 1,))
  iota = [iota_of(shape[:-1], axis, reduced) for axis in range(len(shape) - 1)]
  block = jnp.full(shape[:-1], tile * of_tile, jnp.int32)
  for axis in range(1, len(iota)):
    block = block + iota[axis] * math.prod(shape[axis + 1 : -1])
  return given.random(block, iota[0] + row, layout)
