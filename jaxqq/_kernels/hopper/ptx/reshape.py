"""Registers in another order: other shapes and layouts of them, and an exchange of neighbours."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ONE_EACH, interleaved
from jaxqq._kernels.hopper.ptx.registers import array, constant

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def regroup(
  a: jax.Array,
  source: Any,
  shape: tuple[int, ...],
  target: Any,
  interleave: bool = False,
) -> jax.Array:
  """A thread's elements in another shape, and `layouts.interleaved`.

  Args:
    a: in the layout `source`, which is ONE_EACH, a column a thread, or has a row a thread.
    shape, target: of the result, a row a thread.
  """
  if interpreting():
    rows = a.T if source is ONE_EACH else a.reshape(shape[0], -1)
    if interleave:
      rows = interleaved(rows)
    return rows.reshape(shape)

  @plgpu.inline_mgpu(
    arg_types=(source,), return_type=plgpu.ShapeDtypeStruct(shape, a.dtype, layout=target)
  )
  def in_registers(ctx: Any, a: Any) -> Any:
    del ctx
    to = target.to_mgpu()
    registers = list(a.registers.flat)
    old = ir.VectorType(registers[0].type)
    new = ir.VectorType.get((to.vector_length,), old.element_type)
    if interleave or new != old:
      elements = [vector.extract(r, [], [i]) for r in registers for i in range(old.shape[0])]
      if interleave:
        elements = [elements[k] for k in interleaved(np.arange(len(elements)))]
      step = to.vector_length
      parts = [elements[i : i + step] for i in range(0, len(elements), step)]
      registers = [vector.from_elements(new, part) for part in parts]
    return array(registers, shape, target, a.is_signed)

  return in_registers(a)


def swap_with_neighbour(values: jax.Array, layout: Any) -> jax.Array:
  """Of 16 elements 8 w + 4 h + 2 e + o, of which thread w of two has eight, at 8 e + 4 h + 2 w + o.

  That is half of what makes them `layouts.interleaved`.

  Args:
    values: of 16 bits, (n, ..., 8), a multiple of 16 for each n.
    layout: of them; a thread has the last axis, and threads with even numbers w = 0.
  """
  if interpreting():
    bits = values.reshape(values.shape[0], -1, 2, 2, 2, 2)
    return bits.swapaxes(2, 4).reshape(values.shape)

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(values.shape, values.dtype, layout=layout),
  )
  def in_registers(ctx: Any, values: Any) -> Any:
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    w = arith.andi(mgpu.utils.thread_idx(), constant(1))
    is_second = arith.cmpi(arith.CmpIPredicate.ne, w, constant(0))
    registers = []
    for register in values.registers.flat:
      pairs = vector.bitcast(ir.VectorType.get((4,), i32), register)
      words = [vector.extract(pairs, [], [i]) for i in range(4)]  # 2 h + e
      out = []
      for first, second in (words[:2], words[2:]):
        other = mgpu.utils.shfl_bfly(arith.select(is_second, first, second), 1)
        out += [arith.select(is_second, other, first), arith.select(is_second, second, other)]
      swapped = vector.from_elements(ir.VectorType.get((4,), i32), out)
      registers.append(vector.bitcast(ir.VectorType(register.type), swapped))
    return array(registers, values.shape, layout, None)

  return in_registers(values)


def words_as_codes(words: jax.Array, layout: Any, codes_layout: Any) -> jax.Array:
  """Words (n, lanes, 4) of four e4m3 codes each as codes (n, lanes, 16), in the same registers."""
  shape = (*words.shape[:2], 16)
  if interpreting():
    codes = lax.bitcast_convert_type(words, jnp.uint8).reshape(shape)
    return lax.bitcast_convert_type(codes, E4M3)

  @plgpu.inline_mgpu(
    arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, E4M3, layout=codes_layout)
  )
  def in_registers(ctx: Any, words: Any) -> Any:
    del ctx
    four = ir.VectorType.get((16,), mgpu.utils.dtype_to_ir_type(E4M3))
    codes = [vector.bitcast(four, r) for r in words.registers.flat]
    return array(codes, shape, codes_layout, None)

  return in_registers(words)


def store_flat(values: jax.Array, ref: Any) -> None:
  """ref[...] = values, where the reference has the middle axes of the values as one."""
  if not interpreting():
    ref.reshape(values.shape)[...] = values
    return
  for i in range(values.shape[1]):  # the interpreter cannot reshape a reference
    for j in range(values.shape[2]):
      ref[:, i * values.shape[2] + j, :] = values[:, i, j, :]
