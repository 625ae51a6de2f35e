"""The tensor cores' sums, begun and waited for in two calls, in registers that are seen in between.

Mosaic's accumulators start as zeros that the tensor cores add to: where sums are taken out after
every step, setting 64 registers a thread to zero costs half as much as adding them up. The
instruction can also ignore what its registers hold. And between `begin` and `finish` a warpgroup
can work on other registers.
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
_TILE = 8 * STEP  # bytes of 8 such rows
_PTX_TYPES = {"float8_e4m3fn": "e4m3", "float16": "f16", "bfloat16": "bf16"}


def begin(sums: jax.Array | None, a: Any, b: Any, transforms: tuple[Any, ...]) -> jax.Array:
  """Begins sums + a b^T over one step: `finish` waits for it, before that nothing may read it.

  Args:
    sums: float32 (64, n) in the layout WGMMA, or None for zeros.
    a: (64, 128 bytes): a reference to shared memory, or a tuple of arrays (64, ...) in registers
      (as the tensor cores have them: WGMMA_8BIT or WGMMA), which lie side by side.
    b: (n, 128 bytes), in shared memory.
    transforms: of the references, with a swizzle of 128 bytes.

  Returns:
    float32 (64, n) in the layout WGMMA.
  """
  n = b.shape[0]
  reference = plgpu.RefType(transforms)
  in_registers = isinstance(a, tuple)
  layout = plgpu.Layout.WGMMA_8BIT if b.dtype.itemsize == 1 else plgpu.Layout.WGMMA
  lefts = [layout] * len(a) if in_registers else [reference]
  before = () if sums is None else (sums,)

  @plgpu.inline_mgpu(
    arg_types=(reference, *lefts, *[plgpu.Layout.WGMMA] * len(before)), return_type=_sums_type(n)
  )
  def multiply(ctx: Any, b: Any, *rest: Any) -> Any:
    del ctx
    lefts, before = rest[: len(rest) - len(sums_in)], rest[len(rest) - len(sums_in) :]
    if in_registers:
      left = [word for part in lefts for word in _words(part)]
    else:
      left = [_descriptor(lefts[0])]
    values = _floats(before[0]) if before else []
    return _as_array(_multiply(values, left, _descriptor(b), n, ptx_type), n)

  sums_in, ptx_type = before, _PTX_TYPES[jnp.dtype(b.dtype).name]
  return multiply(b, *(a if in_registers else (a,)), *before)


def finish(sums: jax.Array) -> jax.Array:
  """The sums that `begin` began: all that were begun are done."""
  n = sums.shape[1]

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=_sums_type(n))
  def wait(ctx: Any, sums: Any) -> Any:
    del ctx
    values = _floats(sums)
    constraints = ["=f"] * len(values) + [str(i) for i in range(len(values))]
    return _as_array(
      _asm("wgmma.wait_group.sync.aligned 0;", values, ",".join(constraints), n // 2), n
    )

  return wait(sums)


def _sums_type(n: int) -> Any:
  return plgpu.ShapeDtypeStruct((ROWS, n), jnp.float32, layout=plgpu.Layout.WGMMA)


def _as_array(sums: list[Any], n: int) -> Any:
  layout = plgpu.Layout.WGMMA.to_mgpu()
  registers = np.empty(layout.registers_shape((ROWS, n)), dtype=object)
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  pairs = zip(sums[::2], sums[1::2], strict=True)
  registers.flat[:] = [vector.from_elements(pair, list(each)) for each in pairs]
  return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _multiply(before: list[Any], left: list[Any], right: Any, n: int, ptx_type: str) -> list[Any]:
  """The instructions of one step, which are on their way when this is past."""
  outputs = n // 2
  first_left = outputs + len(before)
  sums = ", ".join(f"${i}" for i in range(outputs))
  names = [f"${first_left + i}" for i in range(len(left))]
  shared = len(left) == 1
  # Scales of 1 and, of 16 bit operands in shared memory, no transposition.
  flags = ", 1, 1" + ("" if ptx_type == "e4m3" else ", 0, 0" if shared else ", 0")
  instruction = f"wgmma.mma_async.sync.aligned.m64n{n}k{32 if ptx_type == 'e4m3' else 16}"
  lines = ["wgmma.fence.sync.aligned;"]
  for i in range(STEP // _INSTRUCTION):
    offset = i * _INSTRUCTION >> 4  # descriptors count in 16 bytes
    lines.append(f"add.s64 b, ${first_left + len(left)}, {offset};")
    if shared:
      lines.append(f"add.s64 a, {names[0]}, {offset};")
    operand = "a" if shared else "{" + ", ".join(names[4 * i : 4 * i + 4]) + "}"
    add = "yes" if i or before else "no"
    lines.append(f"{instruction}.f32.{ptx_type}.{ptx_type} {{{sums}}}, {operand}, b, {add}{flags};")
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


def _floats(sums: Any) -> list[Any]:
  return [vector.extract(pair, [], [i]) for pair in sums.registers.flat for i in range(2)]


def _asm(asm: str, operands: list[Any], constraints: str, outputs: int) -> list[Any]:
  f32 = ir.F32Type.get()
  result_type = llvm.StructType.get_literal([f32] * outputs)
  result = llvm.inline_asm(result_type, operands, asm, constraints, has_side_effects=True)
  return [llvm.extractvalue(f32, result, [i]) for i in range(outputs)]


def _words(a: Any) -> list[Any]:
  word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
  return [vector.extract(vector.bitcast(word, r), [], [0]) for r in a.registers.flat]


def _descriptor(ref: Any) -> Any:
  return mma_utils.encode_descriptor(
    ref, leading_byte_offset=0, stride_byte_offset=_TILE, swizzle=STEP
  )
