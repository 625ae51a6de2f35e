"""The tensor cores' sums of one step, begun and waited for in two calls.

Mosaic's accumulators start as zeros that the tensor cores add to: where sums are taken out after
every step, setting 64 registers a thread to zero costs half as much as adding them up. The
instruction can also ignore what its registers hold, and give parts of a step sums of their own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

ROWS = 64  # of the left operand
STEP = 128  # bytes of k: a row of swizzled shared memory
_INSTRUCTION = 32  # bytes of k
_INSTRUCTIONS = STEP // _INSTRUCTION
_PTX_TYPES = {"float8_e4m3fn": "e4m3", "float16": "f16", "bfloat16": "bf16"}


def begin(
  a: Any,
  b: Any,
  transforms: tuple[Any, ...],
  dtype: Any,
  *,
  sums: jax.Array | None = None,
  parts: int = 1,
) -> list[jax.Array]:
  """Begins a b^T over one step: `finish` waits for it, before that nothing may read it.

  Args:
    a: (64, 128 bytes): a reference to shared memory, or an array in registers, as the tensor cores
      have it (WGMMA_8BIT or WGMMA).
    b: (n, 128 bytes), in shared memory.
    transforms: of the references, with a swizzle of 128 bytes.
    dtype: of the numbers in a and b: float8_e4m3fn, float16 or bfloat16.
    sums: float32 (64, n) in the layout WGMMA, to which the one part is added; None for zeros.
    parts: 1, 2 or 4 of the step along k, each summed up for itself.

  Returns:
    as many float32 (64, n) in the layout WGMMA.
  """
  n = b.shape[0]
  before = () if sums is None else (sums,)

  @plgpu.inline_mgpu(
    arg_types=(*_operand_types(a, transforms, dtype), *[plgpu.Layout.WGMMA] * len(before)),
    return_type=[_sums_type(n)] * parts,
  )
  def multiply(ctx: Any, a: Any, b: Any, *before: Any) -> Any:
    del ctx
    values = _floats(before[0]) if before else []
    return _as_arrays(_multiply(values, _left(a), _descriptor(b), n, dtype, parts), n)

  return multiply(a, b, *before)


def finish(sums: list[jax.Array]) -> list[jax.Array]:
  """The sums that were begun: all are done."""
  n = sums[0].shape[1]

  @plgpu.inline_mgpu(
    arg_types=[plgpu.Layout.WGMMA] * len(sums), return_type=[_sums_type(n)] * len(sums)
  )
  def wait(ctx: Any, *sums: Any) -> Any:
    del ctx
    values = [value for array in sums for value in _floats(array)]
    constraints = ["=f"] * len(values) + [str(i) for i in range(len(values))]
    done = _asm("wgmma.wait_group.sync.aligned 0;", values, ",".join(constraints), len(values))
    return _as_arrays(done, n)

  return wait(*sums)


def _operand_types(a: Any, transforms: tuple[Any, ...], dtype: Any) -> tuple[Any, Any]:
  reference = plgpu.RefType(transforms)
  return (_layout(dtype) if isinstance(a, jax.Array) else reference, reference)


def _layout(dtype: Any) -> Any:
  return plgpu.Layout.WGMMA_8BIT if jnp.dtype(dtype).itemsize == 1 else plgpu.Layout.WGMMA


def _sums_type(n: int) -> Any:
  return plgpu.ShapeDtypeStruct((ROWS, n), np.dtype(np.float32), layout=plgpu.Layout.WGMMA)


# On MLIR values


def _multiply(
  before: list[Any], left: list[Any], right: Any, n: int, dtype: Any, parts: int
) -> list[Any]:
  """The instructions of one step, which are on their way when this is past."""
  a_sum = n // 2
  outputs = a_sum * parts
  first_left = outputs + len(before)
  names = [f"${first_left + i}" for i in range(len(left))]
  shared, fp8 = len(left) == 1, jnp.dtype(dtype).itemsize == 1
  # Scales of 1 and, of 16 bit operands in shared memory, no transposition.
  flags = ", 1, 1" + ("" if fp8 else ", 0, 0" if shared else ", 0")
  ptx_type = _PTX_TYPES[jnp.dtype(dtype).name]
  instruction = (
    f"wgmma.mma_async.sync.aligned.m64n{n}k{32 if fp8 else 16}.f32.{ptx_type}.{ptx_type}"
  )
  lines = ["wgmma.fence.sync.aligned;"]
  for i in range(_INSTRUCTIONS):
    offset = i * _INSTRUCTION >> 4  # descriptors count in 16 bytes
    lines.append(f"add.s64 b, ${first_left + len(left)}, {offset};")
    if shared:
      lines.append(f"add.s64 a, {names[0]}, {offset};")
    operand = "a" if shared else "{" + ", ".join(names[4 * i : 4 * i + 4]) + "}"
    part, place = divmod(i, _INSTRUCTIONS // parts)
    first = part * a_sum
    sums = ", ".join(f"${first + j}" for j in range(a_sum))
    add = "yes" if before or place else "no"
    lines.append(f"{instruction} {{{sums}}}, {operand}, b, {add}{flags};")
  lines.append("wgmma.commit_group.sync.aligned;")
  asm = """{
    .reg .pred yes, no;
    .reg .b64 a, b;
    setp.eq.u32 yes, 0, 0;
    setp.ne.u32 no, 0, 0;
    BODY
  }""".replace("BODY", "\n".join(lines))
  tied = [str(i) for i in range(len(before))]
  constraints = ["=f"] * outputs + tied + ["l" if shared else "r"] * len(left) + ["l"]
  return _asm(asm, [*before, *left, right], ",".join(constraints), outputs)


def _asm(asm: str, operands: list[Any], constraints: str, outputs: int) -> list[Any]:
  f32 = ir.F32Type.get()
  result_type = llvm.StructType.get_literal([f32] * outputs)
  result = llvm.inline_asm(result_type, operands, asm, constraints, has_side_effects=True)
  return [llvm.extractvalue(f32, result, [i]) for i in range(outputs)]


def packed_array(registers: list[Any], shape: tuple[int, ...], layout: Any) -> Any:
  """What a thread's registers hold, as an array."""
  target = layout.to_mgpu()
  out = np.empty(target.registers_shape(shape), dtype=object)
  out.flat[:] = registers
  signed = None if shape[1:] else False
  return mgpu.FragmentedArray(_registers=out, _layout=target, _is_signed=signed)


def operand_array(words: list[Any], columns: int, dtype: Any, layout: Any) -> Any:
  """A thread's 32 bit registers as its part of a left operand, (64, columns)."""
  element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
  vector_type = ir.VectorType.get((4 // jnp.dtype(dtype).itemsize,), element)
  one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
  registers = [vector.bitcast(vector_type, vector.broadcast(one, word)) for word in words]
  return packed_array(registers, (ROWS, columns), layout)


def _as_arrays(sums: list[Any], n: int) -> list[Any]:
  """The registers of one or more (64, n), one after the other."""
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  pairs = zip(sums[::2], sums[1::2], strict=True)
  registers = [vector.from_elements(pair, list(each)) for each in pairs]
  each = n // 4
  return [
    packed_array(registers[i : i + each], (ROWS, n), plgpu.Layout.WGMMA)
    for i in range(0, len(registers), each)
  ]


def _floats(sums: Any) -> list[Any]:
  return [vector.extract(pair, [], [i]) for pair in sums.registers.flat for i in range(2)]


def _left(a: Any) -> list[Any]:
  """The words in registers, or the one descriptor of a reference."""
  return _words(a) if isinstance(a, mgpu.FragmentedArray) else [_descriptor(a)]


def _words(a: Any) -> list[Any]:
  word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
  return [vector.extract(vector.bitcast(word, r), [], [0]) for r in a.registers.flat]


def _descriptor(ref: Any) -> Any:
  """Of rows in tiles of 8 by 128 bytes; from 8 rows to the next it may lie anywhere."""
  kind = ir.MemRefType(ref.type)
  strides, _ = kind.get_strides_and_offset()
  stride = strides[0] * mgpu.utils.bytewidth(kind.element_type)
  return mma_utils.encode_descriptor(
    ref, leading_byte_offset=0, stride_byte_offset=stride, swizzle=STEP
  )
