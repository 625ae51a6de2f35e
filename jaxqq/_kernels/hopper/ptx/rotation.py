"""Hadamard transforms of the numbers that a thread has, and of a few neighbouring threads.

The sums are those of `jaxqq._hadamard`, in its order. Numbers below 2**-126 count as zeros there;
here an addition takes them as such by itself (.ftz), but keeps their sign, which is taken away at
the end.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxqq import _hadamard
from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.registers import array, asm, constant


def rotated_in_lanes(a: jax.Array, signs: jax.Array, size: int, layout: Any) -> jax.Array:
  """bfloat16 of `a`, every `size` neighbours rotated, in the same layout.

  Args:
    a: float32 (n, ..., 8): a thread has 8 neighbours, the lane next to it the next ones.
    signs: float32 (tile, ..., 8) in the same layout, n a multiple of tile: of `factors_of_signs`.
    size: 16 to 128.
  """
  if interpreting():
    return _interpreted(a, signs[0].reshape(-1)[:size])
  length = a.shape[-1]

  @plgpu.inline_mgpu(
    arg_types=(layout, layout),
    return_type=plgpu.ShapeDtypeStruct(a.shape, np.dtype(jnp.bfloat16), layout=layout),
  )
  def in_registers(ctx: Any, a: Any, signs: Any) -> Any:
    del ctx
    (of_lane,) = signs.registers.flat
    factors = _elements(of_lane)
    lanes = [1 << i for i in range((size // length).bit_length() - 1)]
    # 1 in the lower lane of two, -1 in the upper one.
    upper = [_sign_of_lane(lane) for lane in lanes]
    registers = []
    for register in a.registers.flat:
      numbers = _butterflies(_scaled(_elements(register), factors), length)
      for lane, sign in zip(lanes, upper, strict=True):
        others = [mgpu.utils.shfl_bfly(number, lane) for number in numbers]
        pairs = zip(numbers, others, strict=True)
        # What is subtracted is the upper lane's own.
        numbers = [_float("fma.rn.ftz.f32 $0, $1, $2, $3;", own, sign, by) for own, by in pairs]
      registers.append(_as_bfloat16(_finished(numbers, size)))
    return array(registers, a.shape, layout, None)

  return in_registers(a, signs)


def rotated_in_thread(a: jax.Array, signs: list[Any], layout: Any) -> jax.Array:
  """The same of numbers that one thread has, (rows, ..., length): a row, register after register.

  Args:
    a: float32.
    signs: float32 scalars, as many as are rotated together: of `factors_of_signs`.
  """
  size = len(signs)
  if interpreting():
    return _interpreted(a, jnp.stack(signs))
  splat = plgpu.Layout.WG_SPLAT

  @plgpu.inline_mgpu(
    arg_types=(layout, *[splat] * size),
    return_type=plgpu.ShapeDtypeStruct(a.shape, np.dtype(jnp.bfloat16), layout=layout),
  )
  def in_registers(ctx: Any, a: Any, *signs: Any) -> Any:
    del ctx
    factors = [sign.registers.flat[0] for sign in signs]
    numbers = [number for register in a.registers.flat for number in _elements(register)]
    out: list[Any] = []
    for i in range(0, len(numbers), size):
      out += _finished(_butterflies(_scaled(numbers[i : i + size], factors), size), size)
    length = len(numbers) // a.registers.size
    parts = [out[i : i + length] for i in range(0, len(out), length)]
    return array([_as_bfloat16(part) for part in parts], a.shape, layout, None)

  return in_registers(a, *signs)


def _interpreted(a: jax.Array, factors: jax.Array) -> jax.Array:
  rows = a.reshape(a.shape[0], -1)
  return _hadamard.rotated_by(rows, factors[None, None, :]).reshape(a.shape)


def _scaled(numbers: list[Any], factors: list[Any]) -> list[Any]:
  pairs = zip(numbers, factors, strict=True)
  return [_float("mul.rn.ftz.f32 $0, $1, $2;", *pair) for pair in pairs]


def _butterflies(numbers: list[Any], size: int) -> list[Any]:
  """Sums and differences of numbers 1, 2, 4, ... places apart, as far as `size` goes."""
  half = 1
  while half < size:
    out = list(numbers)
    for i in (i for i in range(size) if not i & half):
      pair = numbers[i], numbers[i + half]
      out[i] = _float("add.rn.ftz.f32 $0, $1, $2;", *pair)
      out[i + half] = _float("sub.rn.ftz.f32 $0, $1, $2;", *pair)
    numbers, half = out, 2 * half
  return numbers


def _finished(numbers: list[Any], size: int) -> list[Any]:
  rest = _hadamard.last_factor(size)
  if rest != 1:
    factor = mgpu.utils.c(float(rest), ir.F32Type.get())
    numbers = [_float("mul.rn.ftz.f32 $0, $1, $2;", number, factor) for number in numbers]
  return numbers


def _sign_of_lane(lane: int) -> Any:
  bit = arith.andi(mgpu.utils.thread_idx(), constant(lane))
  one, shift = constant(0x3F800000), constant(31 - (lane.bit_length() - 1))
  return arith.bitcast(ir.F32Type.get(), arith.ori(one, arith.shli(bit, shift)))


def _float(instruction: str, *operands: Any) -> Any:
  constraints = ",".join(["=f"] + ["f"] * len(operands))
  return llvm.inline_asm(ir.F32Type.get(), list(operands), instruction, constraints)


def _elements(register: Any) -> list[Any]:
  return [vector.extract(register, [], [i]) for i in range(ir.VectorType(register.type).shape[0])]


def _as_bfloat16(numbers: list[Any]) -> Any:
  """A register of them, zeros without a sign; two by an instruction, one alone takes ten times.

  Times 1, plus 0: of -0 that is 0.
  """
  text = """{
    .reg .b32 pair;
    cvt.rn.bf16x2.f32 pair, $1, $2;
    fma.rn.bf16x2 $0, pair, $3, $4;
  }"""
  pairs, ones = zip(numbers[::2], numbers[1::2], strict=True), [constant(0x3F803F80), constant(0)]
  words = [asm(text, [high, low, *ones], "=r,f,f,r,r") for low, high in pairs]
  of_words = ir.VectorType.get((len(words),), ir.IntegerType.get_signless(32))
  of_halves = ir.VectorType.get((len(numbers),), ir.BF16Type.get())
  return vector.bitcast(of_halves, vector.from_elements(of_words, words))
