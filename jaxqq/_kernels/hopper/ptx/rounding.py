"""Division, maxima and rounding of elements, where the hardware has better than array operations.

Maxima: as float32, a number costs a conversion, a mask and a comparison, and the compiler keeps
what it converted in twice the registers until its second use. Two 16 bit floats cost one
instruction.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxqq import _rounding
from jaxqq._formats import Format
from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROWS
from jaxqq._kernels.hopper.ptx.registers import array, asm, operand_array, word_asm

MAGNITUDE = 0x7FFFFFFF  # of float32's bits


def quotient(dividend: jax.Array, divisor: jax.Array) -> jax.Array:
  """dividend / divisor to nearest, of float32 scalars: divisions of arrays are approximate."""
  if interpreting():
    return _rounding.divide(dividend, divisor)
  splat = plgpu.Layout.WG_SPLAT

  @plgpu.inline_mgpu(
    arg_types=(splat, splat),
    return_type=plgpu.ShapeDtypeStruct((), np.dtype(np.float32), layout=splat),
  )
  def divide(ctx: Any, *operands: Any) -> Any:
    del ctx
    registers = [a.registers.flat[0] for a in operands]
    result = llvm.inline_asm(ir.F32Type.get(), registers, "div.rn.f32 $0, $1, $2;", "=f,f,f")
    return mgpu.FragmentedArray.splat(result, ())

  return divide(dividend, divisor)


# Maxima, by MLIR's names of types. Of two pairs, magnitude by magnitude, the larger, or NaN; its
# sign is of no use.
_LARGER = {
  "bf16": "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;",
  "f16": "max.NaN.xorsign.abs.f16x2 $0, $1, $2;",
}
# Of a pair, the larger magnitude as float32.
_LARGEST = {
  "bf16": """{
    .reg .b32 low, high;
    shl.b32 low, $1, 16;
    and.b32 low, low, 0x7FFFFFFF;
    and.b32 high, $1, 0x7FFF0000;
    max.s32 $0, low, high;
  }""",
  "f16": """{
    .reg .b16 low, high;
    .reg .b32 bits;
    .reg .f32 largest;
    mov.b32 {low, high}, $1;
    max.NaN.xorsign.abs.f16 low, low, high;
    cvt.f32.f16 largest, low;
    mov.b32 bits, largest;
    and.b32 $0, bits, 0x7FFFFFFF;
  }""",
}


def thread_amax_bits(a: jax.Array, layout: Any) -> jax.Array:
  """The bits, as float32, of the largest magnitude of each thread's elements, NaN being larger.

  Args:
    a: float32, float16 or bfloat16, (..., vector), in a layout whose last axis is a thread's own.
    layout: that layout.

  Returns:
    int32 (...).
  """
  if interpreting() or a.dtype.itemsize != 2:
    bits = lax.bitcast_convert_type(a.astype(jnp.float32), jnp.int32)
    return jnp.max(bits & MAGNITUDE, axis=-1)
  shape, reduced = a.shape[:-1], layout.reduce((a.ndim - 1,))

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(shape, np.dtype(np.int32), layout=reduced),
  )
  def in_registers(ctx: Any, a: Any) -> Any:
    del ctx
    one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    largest = (_largest_bits([register], a.mlir_dtype) for register in a.registers.flat)
    return array([vector.broadcast(one, bits) for bits in largest], shape, reduced, True)

  return in_registers(a)


def _largest_bits(registers: list[Any], dtype: Any) -> Any:
  """The bits, as float32, of the largest magnitude in vectors of 16 bit floats."""
  i32 = ir.IntegerType.get_signless(32)
  words = []
  for register in registers:
    count = ir.VectorType(register.type).shape[0] // 2
    pairs = vector.bitcast(ir.VectorType.get((count,), i32), register)
    words += [vector.extract(pairs, [], [j]) for j in range(count)]
  larger = functools.partial(word_asm, _LARGER[str(dtype)])
  return word_asm(_LARGEST[str(dtype)], functools.reduce(larger, words))


def tile_amax_bits(a: Any, layout: Any, groups: int, groups_layout: Any, lanes: int) -> Any:
  """int32 (64, groups): the bits, as float32, of the largest magnitudes, NaN being the largest.

  Args:
    a: float16 or bfloat16, (64, k).
    layout: of `a`: a thread has neighbours of two rows.
    groups: of a row.
    groups_layout: of the result: threads that share a group hold the same.
    lanes: threads that share a group, neighbours.
  """
  shape = (ROWS, groups)

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(shape, np.dtype(np.int32), layout=groups_layout),
  )
  def find(ctx: Any, a: Any) -> Any:
    del ctx
    out = []
    for row in a.registers.reshape(2, -1):
      bits = _largest_bits(list(row), a.mlir_dtype)
      for distance in range(1, lanes):
        bits = word_asm("max.s32 $0, $1, $2;", bits, mgpu.utils.shfl_bfly(bits, distance))
      out.append(vector.broadcast(ir.VectorType.get((1,), bits.type), bits))
    return array(out, shape, groups_layout, True)

  return find(a)


# Elements to code * scale


def round_to_codes(
  a: Any,
  factor: Any,
  scale: Any,
  raising: Any,
  fmt: Format,
  dtype: Any,
  layouts: tuple[Any, Any],
) -> Any:
  """float32 (64, 64) as code * scale, a left operand of the tensor cores with k = 8j + i at 8i + j.

  A number times its group's factor is rounded to what a code can be by adding a power of two, and
  taking it away: the float32 sum ends at a code's last bit. No code is ever there.

  Args:
    a: a thread has 16 neighbours of rows r and r + 8.
    factor, scale: float32 (64, groups).
    raising: None, or a float32 scalar that elements are multiplied by first.
    fmt: whose codes.
    dtype: of the result, float16 or bfloat16.
    layouts: of a, and of factor and scale.
  """
  of_a, of_groups = layouts
  scalars = () if raising is None else (raising,)
  columns = a.shape[1]

  @plgpu.inline_mgpu(
    arg_types=(of_a, of_groups, of_groups, *[plgpu.Layout.WG_SPLAT] * len(scalars)),
    return_type=plgpu.ShapeDtypeStruct((ROWS, columns), dtype, layout=plgpu.Layout.WGMMA),
  )
  def round_all(ctx: Any, a: Any, factor: Any, scale: Any, *scalars: Any) -> Any:
    del ctx
    raised = [r.registers.flat[0] for r in scalars]
    i32 = ir.IntegerType.get_signless(32)
    halves = []
    for half, row in enumerate(a.registers.reshape(2, -1)):  # rows r and r + 8
      numbers = [
        arith.bitcast(i32, vector.extract(v, [], [i]))
        for v in row
        for i in range(ir.VectorType(v.type).shape[0])
      ]
      own_factor, own_scale = (
        vector.extract(f.registers.flat[half], [], [0]) for f in (factor, scale)
      )
      own_scale = asm(f"cvt.rn.{_pair_type(dtype)}.f32 $0, $1, $1;", [own_scale], "=r,f")
      pairs = zip(numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :], strict=True)
      halves.append([_rounded_pair(*p, own_factor, own_scale, raised, fmt, dtype) for p in pairs])
    words = [halves[half][i] for i in range(len(halves[0])) for half in range(2)]
    return operand_array(words, columns, dtype, plgpu.Layout.WGMMA)

  return round_all(a, factor, scale, *scalars)


def _rounded_pair(
  a: Any, b: Any, factor: Any, scale: Any, raising: list[Any], fmt: Format, dtype: Any
) -> Any:
  """Two numbers as code * scale, in the halves of a register; scale is in both halves of one.

  What exceeds the codes is cut off in 16 bits, where it may be infinite or, as the difference of
  infinities, NaN: then the minimum is the other one.
  """
  info = ml_dtypes.finfo(fmt.element)
  normal = int(np.float32(2.0 ** int(info.minexp)).view(np.int32))  # below, the last bit stays
  to_last_bit = (23 - int(info.nmant)) << 23
  rounded = "".join(
    f"""
    mov.b32 value{i}, ${i};
    abs.f32 value{i}, value{i};
    {f"mul.rn.f32 value{i}, value{i}, $5;" if raising else ""}
    mul.rn.f32 value{i}, value{i}, $3;
    mov.b32 bits, value{i};
    and.b32 bits, bits, 0x7F800000;
    add.s32 bits, bits, {to_last_bit};
    max.s32 bits, bits, {normal + to_last_bit};
    mov.b32 shifter, bits;
    add.rn.f32 value{i}, value{i}, shifter;
    sub.rn.f32 value{i}, value{i}, shifter;"""
    for i in (1, 2)
  )
  pair_type = _pair_type(dtype)
  largest = int(np.array(fmt.element_max, dtype).view(np.uint16)) * 0x10001
  text = f"""{{
    .reg .b32 bits, pair, signs;
    .reg .f32 shifter, value1, value2;{rounded}
    cvt.rn.{pair_type}.f32 pair, value2, value1;
    mov.b32 bits, {largest};
    min.{pair_type} pair, pair, bits;
    prmt.b32 signs, $1, $2, 0x7632;
    lop3.b32 pair, pair, signs, 0x80008000, 0xF8;
    mul.rn.{pair_type} $0, pair, $4;
  }}"""
  return asm(text, [a, b, factor, scale, *raising], "=r,r,r,f,r" + ",f" * len(raising))


def _pair_type(dtype: Any) -> str:
  return {"float16": "f16x2", "bfloat16": "bf16x2"}[jnp.dtype(dtype).name]
