"""Unquantized w into the left operand of Hopper's tensor cores, quantized in the registers.

For few rows of x, which wait for w to be read: a step of 64 rows and 64 of k goes from shared
memory to code * scale, exact in float16 (e2m1 codes) or bfloat16 (e4m3), as `exact_operand` has it.

Thread q = 0..3 of a row's four holds 16 neighbours of k: all of an nvfp4 group, or half of one of
32. Its register i of the operand pairs elements i and 8 + i, so that nothing moves between
threads, and x_hat is interleaved as for packed codes (`expand.py`): k = 8j + i at 8i + j.

Codes themselves are never there. A number a times the group's factor is rounded to what a code can
be by adding a power of two, and taking it away: the float32 sum ends at a code's last bit.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from jaxqq._formats import Format
from jaxqq._kernels.amax import largest_bits
from jaxqq._kernels.codes import Scales, amax_bits_of, scales_of, values_of
from jaxqq._kernels.expand import asm_of, layout_of, word_asm
from jaxqq._kernels.operands import exact_dtype
from jaxqq._kernels.tensor_cores import ROWS, operand_array

STEP_K = 64
_THREAD_K = 16  # neighbours that a thread has of a row
_VECTOR = 8  # of them that it loads at once: in 16 bits, what a swizzle leaves together
_F32 = np.dtype(np.float32)
_NUMBERS = plgpu.Layout.TILED(
  plgpu.Tiling(((ROWS, STEP_K), (16, STEP_K), (8, STEP_K), (_THREAD_K,), (_VECTOR,))),
  warp_dims=(-8,),
  lane_dims=(-4, -3),
  vector_dim=-1,
)


def quantized_tile(ref: Any, fmt: Format, global_scale: Any, interpret: bool) -> Any:
  """Numbers (64, 64) in shared memory as the operand (64, 64), in the layout WGMMA."""
  if interpret:
    return _twin(ref[...], fmt, global_scale)
  a = plgpu.load(ref, layout=_NUMBERS, optimized=False)
  scales = scales_of(_amax_bits(a, fmt), fmt, global_scale, a.dtype)
  return _operand(a.astype(jnp.float32), scales, fmt)


def _groups_layout(fmt: Format) -> Any:
  """Of (64, groups): threads that share a group hold the same."""
  lanes = fmt.group_size // _THREAD_K
  replicated = (plgpu.Replicated(lanes),) if lanes > 1 else ()
  return layout_of(STEP_K // fmt.group_size, 1, (-3, -2, *replicated))


def _amax_bits(a: Any, fmt: Format) -> Any:
  """int32 (64, groups): the bits, as float32, of the largest magnitudes, NaN being the largest."""
  shape, layout = (ROWS, STEP_K // fmt.group_size), _groups_layout(fmt)

  @plgpu.inline_mgpu(
    arg_types=(_NUMBERS,),
    return_type=plgpu.ShapeDtypeStruct(shape, np.dtype(np.int32), layout=layout),
  )
  def find(ctx: Any, a: Any) -> Any:
    del ctx
    out = []
    for row in a.registers.reshape(2, -1):
      bits = largest_bits(list(row), a.mlir_dtype)
      for distance in range(1, fmt.group_size // _THREAD_K):
        bits = word_asm("max.s32 $0, $1, $2;", bits, mgpu.utils.shfl_bfly(bits, distance))
      out.append(vector.broadcast(ir.VectorType.get((1,), bits.type), bits))
    registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
    registers.flat[:] = out
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=True)

  return find(a)


def _operand(a: Any, scales: Scales, fmt: Format) -> Any:
  dtype, layout = exact_dtype(fmt), _groups_layout(fmt)
  raising = () if scales.raising is None else (scales.raising,)

  @plgpu.inline_mgpu(
    arg_types=(_NUMBERS, layout, layout, *[plgpu.Layout.WG_SPLAT] * len(raising)),
    return_type=plgpu.ShapeDtypeStruct((ROWS, STEP_K), dtype, layout=plgpu.Layout.WGMMA),
  )
  def round_all(ctx: Any, a: Any, factor: Any, scale: Any, *raising: Any) -> Any:
    del ctx
    raised = [r.registers.flat[0] for r in raising]
    i32 = ir.IntegerType.get_signless(32)
    halves = []
    for half, row in enumerate(a.registers.reshape(2, -1)):  # rows r and r + 8
      numbers = [
        arith.bitcast(i32, vector.extract(v, [], [i])) for v in row for i in range(_VECTOR)
      ]
      own_factor, own_scale = (
        vector.extract(f.registers.flat[half], [], [0]) for f in (factor, scale)
      )
      of_group = own_factor, _in_both_halves(own_scale, fmt), raised, fmt
      pairs = zip(numbers[:_VECTOR], numbers[_VECTOR:], strict=True)
      halves.append([_rounded_pair(*pair, *of_group) for pair in pairs])
    words = [halves[half][i] for i in range(_VECTOR) for half in range(2)]
    return operand_array(words, STEP_K, dtype, plgpu.Layout.WGMMA)

  return round_all(a, scales.factor, scales.scale, *raising)


def _rounded_pair(a: Any, b: Any, factor: Any, scale: Any, raising: list[Any], fmt: Format) -> Any:
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
  kind = _pair_kind(fmt)
  largest = int(np.array(fmt.element_max, exact_dtype(fmt)).view(np.uint16)) * 0x10001
  asm = f"""{{
    .reg .b32 bits, pair, signs;
    .reg .f32 shifter, value1, value2;{rounded}
    cvt.rn.{kind}.f32 pair, value2, value1;
    mov.b32 bits, {largest};
    min.{kind} pair, pair, bits;
    prmt.b32 signs, $1, $2, 0x7632;
    lop3.b32 pair, pair, signs, 0x80008000, 0xF8;
    mul.rn.{kind} $0, pair, $4;
  }}"""
  return asm_of(asm, [a, b, factor, scale, *raising], "=r,r,r,f,r" + ",f" * len(raising))


def _in_both_halves(value: Any, fmt: Format) -> Any:
  return asm_of(f"cvt.rn.{_pair_kind(fmt)}.f32 $0, $1, $1;", [value], "=r,f")


def _pair_kind(fmt: Format) -> str:
  return {"float16": "f16x2", "bfloat16": "bf16x2"}[exact_dtype(fmt).name]


def _twin(a: Any, fmt: Format, global_scale: Any) -> Any:
  """The same in array operations, for the interpreter."""
  groups = a.astype(jnp.float32).reshape(ROWS, STEP_K // fmt.group_size, 2, -1)
  scales = scales_of(amax_bits_of(groups), fmt, global_scale, a.dtype)
  values = values_of(groups, scales, fmt).reshape(ROWS, 8, 8).swapaxes(1, 2)
  return values.reshape(ROWS, STEP_K).astype(exact_dtype(fmt))
