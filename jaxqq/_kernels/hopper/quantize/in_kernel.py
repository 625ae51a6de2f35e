"""Few rows of x, quantized by `skinny_gemm` itself: no launch of their own.

A compute warpgroup quantizes the part of x that its block of w is multiplied by, while that block
is still on its way, and leaves it in shared memory as the tensor cores take it:

    warpgroup 0   | x for block 0 | wait for w | multiply | x for block 4 | wait for w | ...

Every CTA does so for itself: what is computed many times is little, and what is read many times
comes from the cache. In shared memory a block's 512 elements are one of these:

- words of four e4m3 codes, in order (mxfp8). Of four rows or more a warp has one, and a thread 16
  elements of a group; else four warps share a row, 4 elements a thread;
- e2m1 codes as e4m3 numbers, in the columns and in the order of block-diagonal x (nvfp4,
  `mainloops/blockdiag.py`). Four warps share a row;
- code * scale in float16, in order (nvfp4, `mainloops/sixteens.py`). A thread has a group, and a
  warp eight groups of each of four rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._formats import Format
from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import WARP, WARPS, tile_transforms
from jaxqq._kernels.hopper.ptx.named_barriers import sync_warpgroup
from jaxqq._kernels.hopper.ptx.rounding import thread_amax_bits
from jaxqq._kernels.hopper.ptx.stores import clear_smem, scatter_groups, scatter_words
from jaxqq._kernels.hopper.quantize.blockdiag import numbers_of_codes
from jaxqq._kernels.hopper.quantize.codes import Scales, codes_of, scales_of, values_of
from jaxqq._kernels.hopper.quantize.groups import View, load_gmem, per_group, positions
from jaxqq._kernels.hopper.skinny_plan import SKINNY_BLOCK_K, SkinnyPlan
from jaxqq._kernels.hopper.tiles import BlockDiagonal

_ROW_BYTES = 128  # of a swizzled tile in shared memory, which has 8 rows
_SWIZZLED = 16  # bytes that a swizzle moves together


@dataclasses.dataclass(frozen=True)
class InKernelQuantizer:
  """What a block of x becomes.

  Attributes:
    m: rows of x.
    fmt: of which x_hat is.
    blockdiag: nvfp4: which column has what; None where rows of x are the columns.
    padded_m: rows of x_hat in shared memory.
  """

  m: int
  fmt: Format
  blockdiag: BlockDiagonal | None
  padded_m: int

  dtype: ClassVar[Any] = jnp.dtype(jnp.uint32)  # of x_hat in shared memory
  columns: ClassVar[int] = SKINNY_BLOCK_K // 4  # of it, a block

  @property
  def at_once(self) -> int:
    return WARPS if self.blockdiag is None and self.m >= WARPS else 1

  @property
  def view(self) -> View:
    """Of (4, groups, lanes, elements): four rows, or four parts of one."""
    groups = SKINNY_BLOCK_K // self.fmt.group_size * self.at_once // WARPS
    lanes = WARP // groups
    return View(groups, lanes, self.fmt.group_size // lanes)

  @property
  def layout(self) -> Any:
    """Of what is loaded at a time, which has four axes."""
    return self.view.layout

  @property
  def scales_shape(self) -> tuple[int, int] | None:
    """Of a block's scales in shared memory; None where x_hat has them."""
    groups = SKINNY_BLOCK_K // self.fmt.group_size
    if self.blockdiag is None:
      return groups, self.padded_m
    return 1, groups * self.blockdiag.rows

  def operand(self, x: jax.Array) -> jax.Array:
    """x (b, m, k) as `write` takes it."""
    parts = (WARPS,) if self.at_once == 1 else ()
    return x.reshape(*x.shape[:2], x.shape[2] // SKINNY_BLOCK_K, *parts, *self.view.minor)

  def clear(self, x_s: Any) -> None:
    """Zeros in a stage, which `write` counts on."""
    if self.blockdiag is not None:
      clear_smem(x_s, _transforms(x_s))

  def write(
    self,
    x_g: Any,  # one matrix of `operand`
    ki: Any,  # which block of k
    x_s: Any,  # (padded_m, columns) of dtype
    scales_s: Any,  # float32, of scales_shape
    global_scale: Any,  # None, or float32
  ) -> None:
    """Quantizes all rows of a block. What comes next may read it."""
    ready = []
    for start in range(0, self.m, self.at_once):
      first = min(start, self.m - self.at_once)
      rows = first if self.at_once == 1 else pl.ds(first, self.at_once)
      ready.append((first, load_gmem(x_g.at[rows, ki], self.layout)))
    results = [
      (first, a, scales_of(self._amax_bits(a), self.fmt, global_scale, x_g.dtype))
      for first, a in ready
    ]
    sync_warpgroup()  # what was there before has been read
    for first, a, scales in results:
      self._store(first, a.astype(jnp.float32), scales, x_s, scales_s)
    plgpu.commit_smem()

  def _amax_bits(self, a: jax.Array) -> jax.Array:
    """Of groups: a thread's, and those of the lanes beside it."""
    return jnp.max(thread_amax_bits(a, self.layout), axis=-1)

  def _store(self, first: int, a: jax.Array, scales: Scales, x_s: Any, scales_s: Any) -> None:
    """Rows from `first` on."""
    codes = jnp.where(per_group(scales.blank, a), 0, codes_of(a, scales, self.fmt))
    write = self._write_interpreted if interpreting() else self._write
    write(first, codes, scales, x_s, scales_s)

  # A thread has some neighbours of a group, and knows which row and group that is.

  def _index(self, shape: tuple[int, ...], axis: int) -> Any:
    """Along an axis of what is left when only the first axes are."""
    iota = lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.layout_cast(iota, self.layout.reduce(tuple(range(len(shape), 4))))

  def _row_and_group(self, shape: tuple[int, ...], first: int) -> tuple[Any, Any]:
    outer, group = self._index(shape, 0), self._index(shape, 1)
    if self.at_once == 1:
      return first, outer * self.view.minor[0] + group
    return first + outer, group

  def _write(self, first: int, codes: Any, scales: Scales, x_s: Any, scales_s: Any) -> None:
    place = positions(codes.shape, self.view.layout)
    row, group = self._row_and_group(codes.shape[:-1], first)
    layout = self.view.reduced(3)
    elements = self.view.minor[-1]
    before = self._index(codes.shape[:-1], 2) * elements  # of the group, in other lanes
    if self.blockdiag is None:
      words = [_packed(codes, place >> 2 == i, place & 3) for i in range(elements // 4)]
      byte = group * self.fmt.group_size + before
      scatter_words(words, _offset(row, byte, x_s), layout, x_s, _transforms(x_s))
    else:
      numbers, column = numbers_of_codes(codes), self._column(row, group)
      for h in range(2):  # a thread has two of a word's four numbers
        words = [_packed(numbers, (place & 1) == 1 - h, place >> 1)]
        byte = (group >> 1) * 32 + h * 16 + (group & 1) * 8 + (before >> 1)
        scatter_words(words, _offset(column, byte, x_s), layout, x_s, _transforms(x_s), bits=16)
    row, group = self._row_and_group(scales.scale.shape, first)
    layout = self.view.reduced(2)
    scatter_words([scales.scale], self._scale_index(row, group) * 4, layout, scales_s, ())

  def _column(self, row: Any, group: Any) -> Any:
    """Which column of block-diagonal x has a group."""
    assert self.blockdiag is not None
    block, rows = group >> 1, self.blockdiag.rows
    return 2 * rows * (block & (self.blockdiag.k_blocks_per_acc - 1)) + 2 * row + (group & 1)

  def _scale_index(self, row: Any, group: Any) -> Any:
    """Where a group's scale is stored among those of the block."""
    if self.blockdiag is None:
      return group * self.padded_m + row
    return (group >> 1) * 2 * self.blockdiag.rows + 2 * row + (group & 1)

  def _write_interpreted(
    self, first: int, codes: Any, scales: Scales, x_s: Any, scales_s: Any
  ) -> None:
    """The same in array operations, for the interpreter."""
    rows = self.at_once
    codes = codes.reshape(rows, -1)
    values = scales.scale.reshape(rows, -1)
    groups = jnp.arange(values.shape[1])
    flat = scales_s[...].ravel()
    for i in range(rows):
      flat = flat.at[self._scale_index(first + i, groups)].set(values[i])
      if self.blockdiag is None:
        x_s[first + i] = _words_of(codes[i].reshape(-1, 4))
        continue
      numbers = numbers_of_codes(codes[i]).reshape(-1, 2, 2, 4, 2)[..., ::-1]
      words = _words_of(jnp.moveaxis(numbers, 4, 1))  # block, h, group, q
      own = self._column(first + i, groups).reshape(-1, 2)
      for column in range(self.padded_m):
        mine = jnp.broadcast_to((own == column)[:, None, :, None], words.shape).ravel()
        x_s[column] = jnp.where(mine, words.ravel(), x_s[column])
    scales_s[...] = flat.reshape(scales_s.shape)


@dataclasses.dataclass(frozen=True)
class ExactInKernelQuantizer(InKernelQuantizer):
  """The same of nvfp4 for the 16 bit tensor cores, four rows or more."""

  dtype: ClassVar[Any] = jnp.dtype(jnp.float16)
  columns: ClassVar[int] = SKINNY_BLOCK_K

  @property
  def at_once(self) -> int:
    return WARPS

  @property
  def _shape(self) -> tuple[int, ...]:
    """Of four rows: rows, warps, groups of a warp, elements."""
    group = self.fmt.group_size
    return WARPS, WARPS, SKINNY_BLOCK_K // WARPS // group, group

  @property
  def layout(self) -> Any:
    rows, _, *of_warp = self._shape
    tiling = plgpu.Tiling((self._shape, (rows, 1, *of_warp)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-4, -2), vector_dim=-1)

  @property
  def scales_shape(self) -> tuple[int, int] | None:
    return None

  def operand(self, x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], x.shape[2] // SKINNY_BLOCK_K, *self._shape[1:])

  def _amax_bits(self, a: jax.Array) -> jax.Array:
    return thread_amax_bits(a, self.layout)

  def _store(self, first: int, a: jax.Array, scales: Scales, x_s: Any, scales_s: Any) -> None:
    values = values_of(a, scales, self.fmt).astype(self.dtype)
    if interpreting():
      x_s[pl.ds(first, self.at_once)] = values.reshape(self.at_once, -1)
      return
    shape = a.shape[:-1]
    row = first + self._index(shape, 0)
    group = self._index(shape, 1) * shape[2] + self._index(shape, 2)
    offset = _offset(row, group * self.fmt.group_size * self.dtype.itemsize, x_s)
    scatter_groups(values, offset, self.layout, x_s, _transforms(x_s))


def quantizer_of(plan: SkinnyPlan, m: int) -> InKernelQuantizer:
  """For m rows of x."""
  how = m, plan.problem.fmt, plan.blockdiag, plan.padded_m
  return (ExactInKernelQuantizer if plan.mainloop == "sixteens" else InKernelQuantizer)(*how)


def _words_of(numbers: Any) -> Any:
  """Four numbers of a byte, along the last axis, in a word."""
  shifts = lax.broadcasted_iota(jnp.uint32, numbers.shape, numbers.ndim - 1) * np.uint32(8)
  return jnp.sum(numbers.astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)


def _packed(numbers: Any, mine: Any, place: Any) -> Any:
  """A thread's numbers, those that are `mine`, in the bytes of a word."""
  return jnp.sum(jnp.where(mine, numbers << (place << 3), 0), axis=-1, dtype=jnp.int32)


def _offset(row: Any, byte: Any, x_s: Any) -> Any:
  """Where a byte of a row is stored in a stage, in bytes: in tiles, and swizzled."""
  tiles = x_s.shape[1] * x_s.dtype.itemsize // _ROW_BYTES  # that a row crosses
  tile, within = byte >> 7, byte & (_ROW_BYTES - 1)
  low = row & 7
  swizzled = ((within >> 4) ^ low) * _SWIZZLED + (within & (_SWIZZLED - 1))
  return ((row >> 3) * tiles + tile) * (8 * _ROW_BYTES) + low * _ROW_BYTES + swizzled


def _transforms(x_s: Any) -> tuple[Any, ...]:
  return tile_transforms(x_s.shape[-1], x_s.dtype)
