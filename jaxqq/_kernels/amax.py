"""The largest magnitudes of 16 bit floats, two at a time.

As float32, a number costs a conversion, a mask and a comparison, and the compiler keeps what it
converted in twice the registers until its second use. Here a pair costs one instruction.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from jaxqq._kernels.codes import MAGNITUDE, as_bits
from jaxqq._kernels.expand import word_asm
from jaxqq._kernels.groups import View

# By MLIR's names of types. Of two pairs, magnitude by magnitude, the larger, or NaN; its sign is of
# no use.
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


def thread_amax_bits(a: jax.Array, view: View) -> jax.Array:
  """The bits, as float32, of the largest magnitude of each thread's elements, NaN being larger.

  The interpreter cannot run it: `thread_amax_bits_twin` is the same on arrays.

  Args:
    a: float32, float16 or bfloat16, (n, lanes, vector), in the layout of the view.

  Returns:
    int32 (n, lanes).
  """
  if a.dtype.itemsize != 2:
    return thread_amax_bits_twin(a, view)
  shape, layout = a.shape[:-1], view.reduced(a.ndim - 1)

  @plgpu.inline_mgpu(
    arg_types=(view.layout,),
    return_type=plgpu.ShapeDtypeStruct(shape, np.dtype(np.int32), layout=layout),
  )
  def in_registers(ctx: Any, a: Any) -> Any:
    del ctx
    one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    out = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
    for i, register in enumerate(a.registers.flat):
      out.flat[i] = vector.broadcast(one, largest_bits([register], a.mlir_dtype))
    return mgpu.FragmentedArray(_registers=out, _layout=layout.to_mgpu(), _is_signed=True)

  return in_registers(a)


def largest_bits(registers: list[Any], dtype: Any) -> Any:
  """The bits, as float32, of the largest magnitude in vectors of 16 bit floats."""
  i32 = ir.IntegerType.get_signless(32)
  words = []
  for register in registers:
    count = ir.VectorType(register.type).shape[0] // 2
    pairs = vector.bitcast(ir.VectorType.get((count,), i32), register)
    words += [vector.extract(pairs, [], [j]) for j in range(count)]
  larger = functools.partial(word_asm, _LARGER[str(dtype)])
  return word_asm(_LARGEST[str(dtype)], functools.reduce(larger, words))


def thread_amax_bits_twin(a: jax.Array, view: View) -> jax.Array:
  """`thread_amax_bits` in array operations, for the interpreter."""
  del view
  return jnp.max(as_bits(a.astype(jnp.float32)) & MAGNITUDE, axis=-1)
