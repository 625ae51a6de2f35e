"""MLIR values: a thread's registers as arrays, 32 bit words and floats, and inline assembly."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROWS

# Inline assembly


def asm(text: str, operands: list[Any], constraints: str) -> Any:
  """The 32 bit result of inline assembly."""
  return llvm.inline_asm(ir.IntegerType.get_signless(32), operands, text, constraints)


def word_asm(instruction: str, *operands: Any) -> Any:
  """The same, of an instruction on words alone."""
  return asm(instruction, list(operands), ",".join(["=r"] + ["r"] * len(operands)))


def void_asm(text: str, operands: list[Any], constraints: str) -> None:
  """Inline assembly without a result."""
  void = ir.Type.parse("!llvm.void")
  llvm.inline_asm(void, operands, text, constraints, has_side_effects=True)


def asm_of_floats(text: str, operands: list[Any], constraints: str, outputs: int) -> list[Any]:
  """The float32 results of inline assembly."""
  f32 = ir.F32Type.get()
  result_type = llvm.StructType.get_literal([f32] * outputs)
  result = llvm.inline_asm(result_type, operands, text, constraints, has_side_effects=True)
  return [llvm.extractvalue(f32, result, [i]) for i in range(outputs)]


def constant(value: int) -> Any:
  """32 bits, given without a sign."""
  i32 = ir.IntegerType.get_signless(32)
  attribute = ir.IntegerAttr.get(i32, value - (1 << 32) if value >> 31 else value)
  return arith.ConstantOp(i32, attribute).result  # type: ignore[call-arg, arg-type]  # no stub


def lane_of_row() -> Any:
  """Which of the four threads that share a row of an operand this is."""
  return arith.andi(mgpu.utils.thread_idx(), constant(3))


def smem_address(ref: Any) -> Any:
  """The address of a reference to shared memory, 32 bits."""
  return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))


# Arrays and the registers that hold them


def array(registers: list[Any], shape: tuple[int, ...], layout: Any, signed: Any) -> Any:
  """What a thread's registers hold, as an array."""
  target = layout.to_mgpu()
  out = np.empty(target.registers_shape(shape), dtype=object)
  out.flat[:] = registers
  return mgpu.FragmentedArray(_registers=out, _layout=target, _is_signed=signed)


def packed_array(registers: list[Any], shape: tuple[int, ...], layout: Any) -> Any:
  """An array of floats, or one axis of unsigned integers."""
  return array(registers, shape, layout, None if shape[1:] else False)


def operand_array(words: list[Any], columns: int, dtype: Any, layout: Any) -> Any:
  """A thread's 32 bit registers as its part of a left operand, (64, columns)."""
  element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
  vector_type = ir.VectorType.get((4 // jnp.dtype(dtype).itemsize,), element)
  one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
  registers = [vector.bitcast(vector_type, vector.broadcast(one, word)) for word in words]
  return packed_array(registers, (ROWS, columns), layout)


def as_arrays(sums: list[Any], n: int, layout: Any = plgpu.Layout.WGMMA) -> list[Any]:
  """The floats of one or more (64, n) in a layout with registers in the order of WGMMA's."""
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  pairs = zip(sums[::2], sums[1::2], strict=True)
  registers = [vector.from_elements(pair, list(each)) for each in pairs]
  each = n // 4
  return [
    packed_array(registers[i : i + each], (ROWS, n), layout) for i in range(0, len(registers), each)
  ]


def floats(sums: Any) -> list[Any]:
  """A thread's numbers, float32, of an array in the layout WGMMA."""
  return [vector.extract(pair, [], [i]) for pair in sums.registers.flat for i in range(2)]


def words(a: Any) -> list[Any]:
  """A thread's registers of 32 bits."""
  word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
  return [vector.extract(vector.bitcast(word, r), [], [0]) for r in a.registers.flat]


def recomputed(number: Any) -> Any:
  """The same int32, by an instruction that the compiler cannot look into.

  So what is made of it before a loop and after it is computed twice, and has no register meanwhile.
  """
  if interpreting():
    return number
  splat = plgpu.Layout.WG_SPLAT
  result = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=splat)

  @plgpu.inline_mgpu(arg_types=(splat,), return_type=result)
  def run(ctx: Any, number: Any) -> Any:
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    text, value = "mov.b32 $0, $1;", number.registers.flat[0]
    out = llvm.inline_asm(i32, [value], text, "=r,r", has_side_effects=True)
    return array([out], (), splat, True)

  return run(number)
