"""Division, maxima and rounding of elements, where the hardware has better than array operations.

Maxima: as float32, a number costs a conversion, a mask and a comparison, and the compiler keeps
what it converted in twice the registers until its second use. Two 16 bit floats cost one
instruction.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal

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
from jaxqq._kernels.hopper.ptx.registers import array, asm, constant, operand_array, word_asm

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


def over_lanes(
  bits: jax.Array, lanes: int, layout: Any, operation: Literal["max", "add"]
) -> jax.Array:
  """int32 (rows, ...): of every so many neighbouring rows, of which each lane has one.

  Args:
    bits: int32.
    lanes: a power of two, up to 32.
    layout: of both.
    operation: what becomes of them.
  """
  if interpreting():
    rows = bits.reshape(-1, lanes, *bits.shape[1:])
    reduce: Any = {"max": jnp.max, "add": jnp.sum}[operation]
    return jnp.broadcast_to(reduce(rows, axis=1, keepdims=True), rows.shape).reshape(bits.shape)

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(bits.shape, np.dtype(np.int32), layout=layout),
  )
  def in_registers(ctx: Any, a: Any) -> Any:
    del ctx
    one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    registers = []
    for register in a.registers.flat:
      word = vector.extract(register, [], [0])
      for i in range(lanes.bit_length() - 1):
        other = mgpu.utils.shfl_bfly(word, 1 << i)
        word = word_asm(f"{operation}.s32 $0, $1, $2;", word, other)
      registers.append(vector.broadcast(one, word))
    return array(registers, a.shape, layout, True)

  return in_registers(bits)


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


@dataclasses.dataclass(frozen=True)
class Stochastic:
  """`jaxqq._rounding.encode_stochastic` of float32 magnitudes that are no larger than a code.

  Magnitudes are multiplied by a power of two that makes the code's smallest normal number
  float32's. Then the first bits of the float32 are the code, below the normal range too. Random
  bits are added just below its last place. The bits that the multiplication cuts off lie below
  those.

  Attributes:
    dtype: of the code.
    random: int32 of the elements' shape, uniform in 0 to 65535.
    layout: of both.
    raising: None, or a float32 scalar that magnitudes are multiplied by first, a power of two.
  """

  dtype: np.dtype
  random: jax.Array
  layout: Any
  raising: Any = None

  def first_bits(self, magnitudes: jax.Array) -> jax.Array:
    """int32, the code in its first bits but for the very first, which is 0; then anything."""
    free = 32 - int(ml_dtypes.finfo(self.dtype).bits)
    if interpreting():
      return self._codes(magnitudes) << free
    return self._sums(magnitudes, free - self._place)

  def values(self, magnitudes: jax.Array) -> jax.Array:
    """float32, what the codes mean."""
    if interpreting():
      return _rounding.decode(self._codes(magnitudes), self.dtype)
    code = (1 << (int(ml_dtypes.finfo(self.dtype).bits) - 1)) - 1
    bits = self._sums(magnitudes, 0) & (code << self._place)
    half = np.float32(2.0 ** (self._exponent // 2))  # of all, float32 has no power
    return lax.bitcast_convert_type(bits, jnp.float32) * half * half

  @property
  def _place(self) -> int:
    """Of a code's last bit, in float32's."""
    return 23 - int(ml_dtypes.finfo(self.dtype).nmant)

  @property
  def _exponent(self) -> int:
    """What float32's smallest normal number lacks to a code's, even."""
    return 126 + int(ml_dtypes.finfo(self.dtype).minexp)

  def _codes(self, magnitudes: jax.Array) -> jax.Array:
    if self.raising is not None:
      magnitudes = magnitudes * self.raising
    bits = lax.bitcast_convert_type(magnitudes, jnp.int32)
    return _rounding.encode_stochastic(bits, self.random, self.dtype)

  def _sums(self, magnitudes: jax.Array, shift: int) -> jax.Array:
    bits = _bits_as_of_codes(magnitudes, self.dtype, "rz", self.layout, self.raising)
    last = self._place + shift - 16
    return (bits << shift) + ((self.random << last) | (1 << (last - 1)))


def scale_up(a: jax.Array, dtype: np.dtype, layout: Any) -> jax.Array:
  """int32: `jaxqq._rounding.encode_up` of numbers that are not negative nor above all codes."""
  if interpreting():
    return _rounding.encode_up(lax.bitcast_convert_type(a, jnp.int32), dtype)
  place = 23 - int(ml_dtypes.finfo(dtype).nmant)
  # Subnormal numbers are 0, as for `encode_up`; "rp" would round them up.
  a = jnp.where(a < np.finfo(np.float32).tiny, np.float32(0), a)
  return (_bits_as_of_codes(a, dtype, "rp", layout) + ((1 << place) - 1)) >> place


def whole_units(a: jax.Array, bits: int, layout: Any) -> jax.Array:
  """int32: floor(a * 2**bits), of float32 from 0 to below 2**(23 - bits).

  Added to 2**23, what is left of a number are whole units. A conversion takes four times as long.
  """
  if interpreting():
    return (a * np.float32(2.0**bits)).astype(jnp.int32)

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(a.shape, np.dtype(np.int32), layout=layout),
  )
  def in_registers(ctx: Any, a: Any) -> Any:
    del ctx
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    unit, base = (mgpu.utils.c(2.0**power, f32) for power in (bits, 23))
    registers = []
    for register in a.registers.flat:
      of_thread = ir.VectorType(register.type).shape
      numbers = (vector.extract(register, [], [i]) for i in range(of_thread[0]))
      sums = [asm("fma.rz.f32 $0, $1, $2, $3;", [x, unit, base], "=r,f,f,f") for x in numbers]
      registers.append(vector.from_elements(ir.VectorType.get(of_thread, i32), sums))
    return array(registers, a.shape, layout, True)

  return in_registers(a) & ((1 << 23) - 1)


def divided(dividend: jax.Array, divisor: jax.Array, divisor_bits: int, layout: Any) -> jax.Array:
  """dividend / divisor to nearest, of float32 arrays of groups that are not negative."""
  if interpreting():
    return _rounding.divide(dividend, divisor, divisor_bits)

  @plgpu.inline_mgpu(
    arg_types=(layout, layout),
    return_type=plgpu.ShapeDtypeStruct(dividend.shape, np.dtype(np.float32), layout=layout),
  )
  def in_registers(ctx: Any, *operands: Any) -> Any:
    del ctx
    f32 = ir.F32Type.get()
    one = ir.VectorType.get((1,), f32)
    registers = []
    for pair in zip(*(a.registers.flat for a in operands), strict=True):
      numbers = [vector.extract(register, [], [0]) for register in pair]
      quotient = llvm.inline_asm(f32, numbers, "div.rn.f32 $0, $1, $2;", "=f,f,f")
      registers.append(vector.broadcast(one, quotient))
    return array(registers, dividend.shape, layout, None)

  return in_registers(dividend, divisor)


def sixth(a: jax.Array, layout: Any) -> jax.Array:
  """a / 6 to nearest, of finite float32 that are not negative; 0 below 2**-126.

  A product with the nearest number to 1 / 6, and what it lacks: that is exact, and adding a sixth
  of it rounds the quotient (Markstein, "Computation of elementary functions on the IBM RISC
  System/6000 processor", 1990).
  """
  if interpreting():
    return _rounding.divide(a, jnp.float32(6), 2)
  text = """{
    .reg .f32 quotient, rest;
    .reg .pred is_normal;
    mul.rn.f32 quotient, $1, 0f3E2AAAAB;
    fma.rn.f32 rest, quotient, 0fC0C00000, $1;
    fma.rn.f32 quotient, rest, 0f3E2AAAAB, quotient;
    setp.ge.f32 is_normal, quotient, 0f00800000;
    selp.f32 $0, quotient, 0f00000000, is_normal;
  }"""

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(a.shape, np.dtype(np.float32), layout=layout),
  )
  def in_registers(ctx: Any, a: Any) -> Any:
    del ctx
    f32 = ir.F32Type.get()
    one = ir.VectorType.get((1,), f32)
    numbers = (vector.extract(register, [], [0]) for register in a.registers.flat)
    quotients = (llvm.inline_asm(f32, [number], text, "=f,f") for number in numbers)
    return array([vector.broadcast(one, q) for q in quotients], a.shape, layout, None)

  return in_registers(a)


def _bits_as_of_codes(
  a: jax.Array, dtype: np.dtype, rounding: str, layout: Any, raising: Any = None
) -> jax.Array:
  """int32, float32's of `a` times a power of two; its smallest normal number is then a code's."""
  factor = jnp.float32(2.0 ** (-126 - int(ml_dtypes.finfo(dtype).minexp)))
  factor = factor if raising is None else factor * raising
  instruction = f"mul.{rounding}.f32 $0, $1, $2;"

  @plgpu.inline_mgpu(
    arg_types=(layout, plgpu.Layout.WG_SPLAT),
    return_type=plgpu.ShapeDtypeStruct(a.shape, np.dtype(np.int32), layout=layout),
  )
  def in_registers(ctx: Any, a: Any, factor: Any) -> Any:
    del ctx
    power = factor.registers.flat[0]
    i32 = ir.IntegerType.get_signless(32)
    registers = []
    for register in a.registers.flat:
      of_thread = ir.VectorType(register.type).shape
      numbers = (vector.extract(register, [], [i]) for i in range(of_thread[0]))
      bits = [asm(instruction, [number, power], "=r,f,f") for number in numbers]
      registers.append(vector.from_elements(ir.VectorType.get(of_thread, i32), bits))
    return array(registers, a.shape, layout, True)

  return in_registers(a, factor)


def words_of_first_bits(a: jax.Array, bits: int, layout: Any) -> jax.Array:
  """int32 (...): the first `bits` of each of a thread's neighbours, the first ones lowest.

  Args:
    a: int32 (..., 32 / bits).
    layout: of it; a thread has the last axis.
  """
  shape, reduced = a.shape[:-1], layout.reduce((a.ndim - 1,))
  if interpreting():
    codes = lax.shift_right_logical(a, 32 - bits)
    shifts = bits * lax.broadcasted_iota(jnp.int32, a.shape, a.ndim - 1)
    return jnp.sum(codes << shifts, axis=-1, dtype=jnp.int32)

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(shape, np.dtype(np.int32), layout=reduced),
  )
  def in_registers(ctx: Any, a: Any) -> Any:
    del ctx
    one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    words = []
    for register in a.registers.flat:
      word = constant(0)
      for i in reversed(range(ir.VectorType(register.type).shape[0])):
        element = vector.extract(register, [], [i])
        word = word_asm(f"shf.l.wrap.b32 $0, $1, $2, {bits};", element, word)
      words.append(vector.broadcast(one, word))
    return array(words, shape, reduced, True)

  return in_registers(a)


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
  """float32 (64, 64) as code * scale, a left operand of the tensor cores, `layouts.interleaved`.

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
      pairs = [  # by h, w and o, of both e
        (numbers[8 * w + 4 * h + o], numbers[8 * w + 4 * h + 2 + o])
        for h, w, o in itertools.product(range(2), repeat=3)
      ]
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
