"""nvfp4 by fp8 tensor cores, for few rows: groups kept apart by columns of their own.

e2m1 codes are e4m3 numbers, and the tensor cores have all bits of what 16 products of two codes
add up to. What they must not do is add groups of different scales. An instruction's 32 elements
of k are two groups: a row of x gets a column for each, with zeros where the other is, and every
sum is multiplied by its two scales in float32. Nothing is rounded before that.

Fewer rows than columns leave room for more groups in an accumulator. With R rows, rounded up to a
power of two, n columns hold `classes` blocks of 32 elements at a time:

    R                1   2   4   8
    n                8   8   8   16
    classes          4   2   1   1       column c = 2 R (block % classes) + 2 row + group % 2

A packed word is two registers of the tensor cores' left operand: the codes at odd places, and
those at even ones, are moved to where e4m3 has their bits (times 2**-6), 7 instructions for 8
codes. x lies in the same order: of a block, word 4 h + q has the codes 8 q + 2 j + 1 - h.
"""

from __future__ import annotations

import dataclasses
import functools
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
from jaxqq._kernels.codes import E4M3, amax_bits_of, codes_of, scalar_of, scalars_of, scales_of
from jaxqq._kernels.expand import layout_of, word_asm
from jaxqq._kernels.groups import View, load_gmem, make_kernel, per_group, positions, store_gmem
from jaxqq._kernels.tensor_cores import ROWS, constant, operand_array, packed_array

# With 16 rows there are too many sums for the registers: 32 us on an H200 (8192 x 8192) where
# codes expanded to float16 take 19 us for 32 rows.
MAX_ROWS = 8
MIN_K = 1024  # what the quantizer takes at once
UNIT = 2.0**12  # a product of two codes, in units of what their e4m3 numbers multiply to
BLOCK = 32  # elements of k an instruction
STEP_WORDS = 16  # packed words of a row that are expanded at once, 128 codes
WORDS_LAYOUT = layout_of(4, 1, (-3, -2))


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which column of x_hat has which group of which row."""

  rows: int  # R, a power of two

  @classmethod
  def of(cls, m: int) -> Columns:
    return cls(pl.next_power_of_2(m))

  @property
  def classes(self) -> int:
    return max(1, 4 // self.rows)

  @property
  def count(self) -> int:
    return 2 * self.rows * self.classes


# x


def apart_operand(
  a: jax.Array, fmt: Format, global_scale: jax.Array | None, columns: Columns
) -> tuple[jax.Array, jax.Array]:
  """x as columns of e4m3 codes, and the scales of their groups.

  Args:
    a: float32, float16 or bfloat16, (m, k) with m up to columns.rows, k a multiple of 256 from
      MIN_K on.
    fmt: nvfp4.
    global_scale: None, or a float32 scalar.

  Returns:
    words: uint32 (columns.count, k / 4); those of rows from m on are not written.
    scales: float32 (k / 32, 2 * columns.rows), NaN for groups with a NaN or an infinity.
  """
  m, k = a.shape
  blocks = k // BLOCK
  view = View(2, 2, 8)  # groups of a block, words of a group, codes of a word
  run = make_kernel(
    functools.partial(_operand_kernel, fmt=fmt, view=view, columns=columns),
    grid=(m * pl.cdiv(blocks, view.tile),),
    out_type=(
      jax.ShapeDtypeStruct((columns.count, blocks, 2, *view.minor[:2]), jnp.uint32),
      jax.ShapeDtypeStruct((blocks, columns.rows, 2), jnp.float32),
    ),
  )
  words, scales = run(a.reshape(m, blocks, *view.minor), *scalars_of(global_scale))
  return words.reshape(columns.count, k // 4), scales.reshape(blocks, 2 * columns.rows)


def _operand_kernel(
  a_ref: Any,  # (m, blocks, groups, words, codes)
  *refs: Any,
  fmt: Format,
  view: View,
  columns: Columns,
) -> None:
  *global_scale, words_ref, scales_ref = refs
  blocks = a_ref.shape[1]
  steps, step = pl.cdiv(blocks, view.tile), lax.axis_index("step")
  row = lax.div(step, jnp.int32(steps))
  start = jnp.minimum(lax.rem(step, jnp.int32(steps)) * view.tile, blocks - view.tile)
  here = pl.ds(start, view.tile)
  a = load_gmem(a_ref.at[row, here], view.layout).astype(jnp.float32)
  scales = scales_of(amax_bits_of(a), fmt, scalar_of(global_scale), a_ref.dtype)
  store_gmem(scales_ref.at[here, row], scales.scale)
  codes = jnp.where(per_group(scales.blank, a), 0, codes_of(a, scales, fmt))
  numbers = numbers_of_codes(codes)
  place = positions(a.shape, view.layout)
  numbers = numbers << ((place >> 1) << 3)

  def index(axis: int) -> Any:
    iota = lax.broadcasted_iota(jnp.int32, a.shape[:3], axis)
    return plgpu.layout_cast(iota, view.reduced(3))

  block_class, group = (index(0) + start) & (columns.classes - 1), index(1)
  for h in range(2):
    words = jnp.sum(jnp.where((place & 1) == 1 - h, numbers, 0), axis=-1, dtype=jnp.int32)
    for own_class in range(columns.classes):
      for own_group in range(2):
        own = (block_class == own_class) & (group == own_group)
        column = 2 * columns.rows * own_class + 2 * row + own_group
        own_words = lax.bitcast_convert_type(jnp.where(own, words, 0), jnp.uint32)
        store_gmem(words_ref.at[column, here, h], own_words)


def numbers_of_codes(codes: Any) -> Any:
  """e2m1 codes as e4m3 codes of 2**-6 their value."""
  return ((codes & 8) << 4) | ((codes & 7) << 2)


# w


def expand(words: Any) -> Any:
  """Packed words (64, 16) as e4m3 (64, 128), in registers."""

  @plgpu.inline_mgpu(
    arg_types=(WORDS_LAYOUT,),
    return_type=plgpu.ShapeDtypeStruct((ROWS, 128), E4M3, layout=plgpu.Layout.WGMMA_8BIT),
  )
  def in_registers(ctx: Any, words: Any) -> Any:
    del ctx
    registers: list[Any] = [None] * 16
    for i, register in enumerate(words.registers.flat):  # block, rows r and r + 8
      word = vector.extract(register, [], [0])
      block, half = divmod(i, 2)
      odd, even = (
        word_asm(
          f"""{{
            .reg .b32 high, low;
            {"mov.b32 high, $1" if h == 0 else "shl.b32 high, $1, 4"};
            {"shr.b32 low, $1, 2" if h == 0 else "shl.b32 low, $1, 2"};
            and.b32 low, low, 0x1C1C1C1C;
            lop3.b32 $0, high, 0x80808080, low, 0xEA;
          }}""",
          word,
        )
        for h in range(2)
      )
      registers[4 * block + half], registers[4 * block + 2 + half] = odd, even
    return operand_array(registers, 128, E4M3, plgpu.Layout.WGMMA_8BIT)

  return in_registers(words)


def scales_of_columns(words: list[Any], part: int, columns: Columns) -> Any:
  """float32 (64, n): w's scales of the groups in an accumulator.

  Args:
    words: two arrays uint32 (64,), the eight scales of a row and step.
    part: which accumulator of the step it is.
    columns: of x_hat.
  """
  n, rows = columns.count, plgpu.Layout.WGMMA.reduce(1)

  @plgpu.inline_mgpu(
    arg_types=(rows, rows),
    return_type=plgpu.ShapeDtypeStruct((ROWS, n), np.dtype(np.float32), layout=plgpu.Layout.WGMMA),
  )
  def convert(ctx: Any, *words: Any) -> Any:
    del ctx
    lane = arith.andi(mgpu.utils.thread_idx(), constant(3))
    pairs = []
    for half in range(2):  # rows r and r + 8
      first, second = (vector.extract(w.registers.flat[half], [], [0]) for w in words)
      # A thread's two columns are the two groups of one block of 32.
      if columns.classes == 4:
        is_second = arith.cmpi(arith.CmpIPredicate.uge, lane, constant(2))
        word, odd = arith.select(is_second, second, first), arith.andi(lane, constant(1))
      elif columns.classes == 2:
        word, odd = (first, second)[part], arith.shrui(lane, constant(1))
      else:
        word, odd = (first, second)[part // 2], constant(part % 2)
      pair = arith.shrui(word, arith.shli(odd, constant(4)))
      pairs.append(_two_scales(pair))
    registers = [pairs[half] for _ in range(n // 8) for half in range(2)]
    return packed_array(registers, (ROWS, n), plgpu.Layout.WGMMA)

  return convert(*words)


def collapse(sums: Any, columns: Columns) -> Any:
  """(64, max(4, R)): the sums of a row's columns; columns from R on are nothing."""
  out_columns = max(4, columns.rows)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,),
    return_type=plgpu.ShapeDtypeStruct(
      (ROWS, out_columns), np.dtype(np.float32), layout=WORDS_LAYOUT
    ),
  )
  def add_up(ctx: Any, sums: Any) -> Any:
    del ctx
    totals = []
    for pair in sums.registers.flat:
      total = arith.addf(*(vector.extract(pair, [], [i]) for i in range(2)))
      for distance in {1: (1, 2), 2: (2,)}.get(columns.rows, ()):
        total = arith.addf(total, mgpu.utils.shfl_bfly(total, distance))
      totals.append(vector.broadcast(ir.VectorType.get((1,), total.type), total))
    return packed_array(totals, (ROWS, out_columns), WORDS_LAYOUT)

  return add_up(sums)


def _two_scales(pair: Any) -> Any:
  f32 = ir.F32Type.get()
  result = llvm.inline_asm(
    llvm.StructType.get_literal([f32, f32]),
    [pair],
    """{
      .reg .b16 bytes, low, high;
      .reg .b32 both;
      cvt.u16.u32 bytes, $2;
      cvt.rn.f16x2.e4m3x2 both, bytes;
      mov.b32 {low, high}, both;
      cvt.f32.f16 $0, low;
      cvt.f32.f16 $1, high;
    }""",
    "=f,=f,r",
  )
  values = [llvm.extractvalue(f32, result, [i]) for i in range(2)]
  return vector.from_elements(ir.VectorType.get((2,), f32), values)


# The same in array operations, for the interpreter


def expand_twin(words: Any) -> Any:
  shifts = lax.broadcasted_iota(jnp.uint32, (1, 1, 8), 2) * np.uint32(4)
  codes = (words[..., None] >> shifts) & np.uint32(15)
  numbers = ((codes & np.uint32(8)) << np.uint32(4)) | ((codes & np.uint32(7)) << np.uint32(2))
  numbers = lax.bitcast_convert_type(numbers.astype(jnp.uint8), E4M3).astype(jnp.float32)
  # block, q, j, odd  ->  block, h, q, j
  numbers = numbers.reshape(ROWS, 4, 4, 4, 2)[..., ::-1]
  return numbers.transpose(0, 1, 4, 2, 3).reshape(ROWS, 128)


def numbers_of(words: Any) -> Any:
  """uint32 (n, 32) of e4m3 numbers as float32 (n, 128)."""
  shifts = lax.broadcasted_iota(jnp.uint32, (1, 1, 4), 2) * np.uint32(8)
  codes = ((words[..., None] >> shifts) & np.uint32(0xFF)).astype(jnp.uint8)
  values = lax.bitcast_convert_type(codes, E4M3).astype(jnp.float32)
  return values.reshape(words.shape[0], -1)


def scales_of_columns_twin(words: list[Any], part: int, columns: Columns) -> Any:
  shifts = lax.broadcasted_iota(jnp.uint32, (1, 4), 1) * np.uint32(8)
  scales = jnp.concatenate([(w[:, None] >> shifts) & np.uint32(0xFF) for w in words], axis=1)
  scales = lax.bitcast_convert_type(scales.astype(jnp.uint8), E4M3).astype(jnp.float32)
  scales = scales.reshape(ROWS, -1, columns.classes, 1, 2)[:, part]
  shape = (ROWS, columns.classes, columns.rows, 2)
  return jnp.broadcast_to(scales, shape).reshape(ROWS, columns.count)


def collapse_twin(sums: Any, columns: Columns) -> Any:
  sums = sums.reshape(ROWS, columns.classes, columns.rows, 2).sum((1, 3))
  return jnp.pad(sums, ((0, 0), (0, max(0, 4 - columns.rows))))
