"""Other names for the same registers: no instruction, only shapes and layouts."""

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
from jaxlib.mlir.dialects import vector

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ONE_EACH
from jaxqq._kernels.hopper.ptx.registers import array

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def regroup(
  a: jax.Array,
  source: Any,
  shape: tuple[int, ...],
  target: Any,
  interleave: bool = False,
) -> jax.Array:
  """A thread's elements in another shape, and interleaved: k = 8 * j + i at 8 * i + j.

  Args:
    a: in the layout `source`, which is ONE_EACH, a column a thread, or has a row a thread.
    shape, target: of the result, a row a thread.
  """
  if interpreting():
    rows = a.T if source is ONE_EACH else a.reshape(shape[0], -1)
    if interleave:
      rows = rows.reshape(shape[0], 8, 8).swapaxes(1, 2)
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
        elements = [elements[8 * j + i] for i in range(8) for j in range(8)]
      step = to.vector_length
      parts = [elements[i : i + step] for i in range(0, len(elements), step)]
      registers = [vector.from_elements(new, part) for part in parts]
    return array(registers, shape, target, a.is_signed)

  return in_registers(a)


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
