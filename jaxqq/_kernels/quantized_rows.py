"""Few rows of x, quantized by the kernel that multiplies them: no launch of their own.

A compute warpgroup quantizes the part of x that its chunk of w meets, while that chunk is still on
its way, and leaves it in shared memory as the tensor cores take it:

    warpgroup 0   | x for chunk 0 | wait for w | multiply | x for chunk 4 | wait for w | ...

Every CTA does so for itself: what is computed many times is little, and what is read many times
comes from the cache. Of four rows or more of mxfp8 a warp has one, and a thread 16 elements of a
group; else four warps share a row, 4 elements a thread.

In shared memory a chunk's 512 codes lie as words of four e4m3 numbers, in order (mxfp8), or in the
columns and in the order that keep nvfp4's groups apart (`apart.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxqq._formats import Format
from jaxqq._kernels import apart
from jaxqq._kernels.codes import Scales, amax_bits_of, codes_of, scales_of
from jaxqq._kernels.groups import WARP, WARPS, View, load_gmem, per_group, positions
from jaxqq._kernels.tensor_cores import constant
from jaxqq._kernels.tiles import tile_transforms

CHUNK_K = 512
_ROW_BYTES = 128  # of a swizzled tile in shared memory, which has 8 rows
_TILES = CHUNK_K // _ROW_BYTES  # that a row crosses
_PART = 16  # bytes that a swizzle moves together


def max_rows(columns: apart.Columns | None) -> int:
  """With more rows, w waits for x.

  On an H100, 8192 x 8192, in microseconds, in brackets where another kernel quantizes x before:
  nvfp4 17.1 (17.8) with 1 row, 18.1 (17.9) with 2, 23.1 (18.8) with 8; mxfp8 25.2 (27.1) with 1,
  25.6 (27.4) with 8, 28.7 (28.2) with 16.
  """
  return 8 if columns is None else 1


@dataclasses.dataclass(frozen=True)
class QuantizedRows:
  """What a chunk of x becomes.

  Attributes:
    m: rows of x.
    fmt: of which x_hat is.
    columns: nvfp4: where x_hat has them; None where its rows are the columns.
    held: rows of x_hat in shared memory.
  """

  m: int
  fmt: Format
  columns: apart.Columns | None
  held: int

  @property
  def at_once(self) -> int:
    return WARPS if self.columns is None and self.m >= WARPS else 1

  @property
  def view(self) -> View:
    """Of (4, groups, lanes, elements): four rows, or four parts of one."""
    groups = CHUNK_K // self.fmt.group_size * self.at_once // WARPS
    lanes = WARP // groups
    return View(groups, lanes, self.fmt.group_size // lanes)

  @property
  def scales_shape(self) -> tuple[int, int]:
    """Of a chunk's scales in shared memory, as many in a row as the kernel loads at once."""
    if self.columns is None:
      return CHUNK_K // self.fmt.group_size, self.held
    return CHUNK_K // 256, 16 * self.columns.rows

  def operand(self, x: jax.Array) -> jax.Array:
    """x (b, m, k) as `write` takes it."""
    parts = WARPS // self.at_once
    return x.reshape(*x.shape[:2], x.shape[2] // CHUNK_K, parts, *self.view.minor)

  def clear(self, x_s: Any, interpret: bool) -> None:
    """Zeros in a chunk's place, which `write` counts on."""
    if self.columns is None:
      return
    if interpret:
      x_s[...] = jnp.zeros(x_s.shape, x_s.dtype)
      return
    each = WARPS * WARP * _PART

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_transforms(x_s)),), return_type=None)
    def clear(ctx: Any, x_s: Any) -> None:
      del ctx
      thread = arith.andi(mgpu.utils.thread_idx(), constant(WARPS * WARP - 1))
      start = arith.addi(_address(x_s), arith.muli(thread, constant(_PART)))
      zeros = [constant(0)] * (_PART // 4)
      for i in range(0, self.held * CHUNK_K, each):
        _store_words(arith.addi(start, constant(i)), zeros, 32)

    clear(x_s)

  def write(
    self,
    x_g: Any,  # one matrix of `operand`
    ki: Any,  # which chunk
    x_s: Any,  # uint32 (held, 128)
    scales_s: Any,  # float32 (rows, scales)
    global_scale: Any,  # None, or float32
    interpret: bool,
  ) -> None:
    """Quantizes all rows of a chunk. What comes next may read it."""
    ready = []
    for start in range(0, self.m, self.at_once):
      first = min(start, self.m - self.at_once)
      rows = first if self.at_once == 1 else pl.ds(first, self.at_once)
      here = x_g.at[rows, ki] if self.at_once == 1 else x_g.at[rows, ki, 0]
      ready.append((first, load_gmem(here, self.view.layout).astype(jnp.float32)))
    results = [
      (first, a, scales_of(amax_bits_of(a), self.fmt, global_scale, x_g.dtype))
      for first, a in ready
    ]
    if not interpret:
      _wait_for_warpgroup()  # what was there before has been read
    for first, a, scales in results:
      codes = jnp.where(per_group(scales.blank, a), 0, codes_of(a, scales, self.fmt))
      if interpret:
        self._write_twin(first, codes, scales, x_s, scales_s)
      else:
        self._write(first, codes, scales, x_s, scales_s)
    plgpu.commit_smem()

  # A thread has some neighbours of a group, and knows which row and group that is.

  def _index(self, shape: tuple[int, ...], axis: int) -> Any:
    iota = lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.layout_cast(iota, self.view.reduced(len(shape)))

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
    if self.columns is None:
      words = [_packed(codes, place >> 2 == i, place & 3) for i in range(elements // 4)]
      byte = group * self.fmt.group_size + before
      _store(words, _offset(row, byte), layout, x_s, _transforms(x_s))
    else:
      numbers, column = apart.numbers_of_codes(codes), self._column(row, group)
      for h in range(2):  # a thread has two of a word's four numbers
        words = [_packed(numbers, (place & 1) == 1 - h, place >> 1)]
        byte = (group >> 1) * 32 + h * 16 + (group & 1) * 8 + (before >> 1)
        _store(words, _offset(column, byte), layout, x_s, _transforms(x_s), bits=16)
    row, group = self._row_and_group(scales.scale.shape, first)
    layout = self.view.reduced(2)
    _store([scales.scale], self._scale_index(row, group) * 4, layout, scales_s, ())

  def _column(self, row: Any, group: Any) -> Any:
    """Which column of x_hat has a group, where groups are kept apart."""
    assert self.columns is not None
    block, rows = group >> 1, self.columns.rows
    return 2 * rows * (block & (self.columns.classes - 1)) + 2 * row + (group & 1)

  def _scale_index(self, row: Any, group: Any) -> Any:
    """Where a group's scale lies among those of the chunk."""
    if self.columns is None:
      return group * self.held + row
    return (group >> 1) * 2 * self.columns.rows + 2 * row + (group & 1)

  def _write_twin(self, first: int, codes: Any, scales: Scales, x_s: Any, scales_s: Any) -> None:
    """The same in array operations, for the interpreter."""
    rows = self.at_once
    codes = codes.reshape(rows, -1)
    values = scales.scale.reshape(rows, -1)
    groups = jnp.arange(values.shape[1])
    flat = scales_s[...].ravel()
    for i in range(rows):
      flat = flat.at[self._scale_index(first + i, groups)].set(values[i])
      if self.columns is None:
        x_s[first + i] = _words_of(codes[i].reshape(-1, 4))
        continue
      numbers = apart.numbers_of_codes(codes[i]).reshape(-1, 2, 2, 4, 2)[..., ::-1]
      words = _words_of(jnp.moveaxis(numbers, 4, 1))  # block, h, group, q
      own = self._column(first + i, groups).reshape(-1, 2)
      for column in range(self.held):
        mine = jnp.broadcast_to((own == column)[:, None, :, None], words.shape).ravel()
        x_s[column] = jnp.where(mine, words.ravel(), x_s[column])
    scales_s[...] = flat.reshape(scales_s.shape)


def _words_of(numbers: Any) -> Any:
  """Four numbers of a byte, along the last axis, in a word."""
  shifts = lax.broadcasted_iota(jnp.uint32, numbers.shape, numbers.ndim - 1) * np.uint32(8)
  return jnp.sum(numbers.astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)


def _packed(numbers: Any, mine: Any, place: Any) -> Any:
  """A thread's numbers, those that are `mine`, in the bytes of a word."""
  return jnp.sum(jnp.where(mine, numbers << (place << 3), 0), axis=-1, dtype=jnp.int32)


def _offset(row: Any, byte: Any) -> Any:
  """Where a byte of a row lies in a chunk's place, in bytes: in tiles, and swizzled."""
  tile, within = byte >> 7, byte & (_ROW_BYTES - 1)
  low = row & 7
  swizzled = ((within >> 4) ^ low) * _PART + (within & (_PART - 1))
  return ((row >> 3) * _TILES + tile) * (8 * _ROW_BYTES) + low * _ROW_BYTES + swizzled


# On MLIR values


def _transforms(x_s: Any) -> tuple[Any, ...]:
  return tile_transforms(x_s.shape[-1], x_s.dtype)


def _store(
  words: list[jax.Array],
  offset: Any,
  layout: Any,
  ref: Any,
  transforms: tuple[Any, ...],
  bits: int = 32,
) -> None:
  """Each thread's words, or the low halves of them, so many bytes into shared memory."""

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(transforms), *[layout] * (1 + len(words))), return_type=None
  )
  def store(ctx: Any, ref: Any, offset: Any, *words: Any) -> None:
    del ctx
    start, *values = (vector.extract(a.registers.flat[0], [], [0]) for a in (offset, *words))
    i32 = ir.IntegerType.get_signless(32)
    _store_words(arith.addi(_address(ref), start), [arith.bitcast(i32, v) for v in values], bits)

  store(ref, offset, *words)


def _store_words(address: Any, words: list[Any], bits: int) -> None:
  names = ", ".join(f"${1 + i}" for i in range(len(words)))
  asm = {
    (1, 16): "{ .reg .b16 low; cvt.u16.u32 low, $1; st.shared.b16 [$0], low; }",
    (1, 32): "st.shared.b32 [$0], $1;",
  }.get((len(words), bits), f"st.shared.v{len(words)}.b32 [$0], {{{names}}};")
  constraints = ",".join(["r"] * (1 + len(words)) + ["~{memory}"])
  void = ir.Type.parse("!llvm.void")
  llvm.inline_asm(void, [address, *words], asm, constraints, has_side_effects=True)


def _address(ref: Any) -> Any:
  return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))


def _wait_for_warpgroup() -> None:
  @plgpu.inline_mgpu(arg_types=(), return_type=None)
  def wait(ctx: Any) -> None:
    del ctx
    mgpu.utils.warpgroup_barrier()

  wait()
