"""Philox in registers: a thread has the bits of its own elements, and loads none.

A product of two words is one instruction here, where array operations take one of its halves each.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from jaxqq import _random_bits
from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.registers import array, constant


def uniform16(block: jax.Array, row: jax.Array, key: tuple[Any, Any], layout: Any) -> jax.Array:
  """int32 (..., 8), uniform in 0 to 65535: `jaxqq._random_bits.uniform16` of 8 neighbours each.

  Args:
    block, row: int32 (...), column / 8 and row of a matrix, both in `layout` less its last axis.
    key: uint32 scalars, two words.
    layout: of the result; a thread has 8 neighbours in a register.
  """
  per_call = _random_bits.PER_CALL
  if interpreting():
    zero = np.uint32(0)
    counter = (block.astype(jnp.uint32), row.astype(jnp.uint32), zero, zero)
    return _random_bits.halves(_random_bits.philox(counter, key))
  reduced, splat = layout.reduce((block.ndim,)), plgpu.Layout.WG_SPLAT
  shape = (*block.shape, per_call)

  @plgpu.inline_mgpu(
    arg_types=(reduced, reduced, splat, splat),
    return_type=plgpu.ShapeDtypeStruct(shape, np.dtype(np.int32), layout=layout),
  )
  def in_registers(ctx: Any, block: Any, row: Any, *key: Any) -> Any:
    del ctx
    schedule = _schedule([word.registers.flat[0] for word in key])
    of_thread = ir.VectorType.get((per_call,), ir.IntegerType.get_signless(32))
    registers = []
    for own in zip(block.registers.flat, row.registers.flat, strict=True):
      first, second = (vector.extract(register, [], [0]) for register in own)
      words = _philox([first, second, constant(0), constant(0)], schedule)
      halves = [half for word in words for half in _halves(word)]
      registers.append(vector.from_elements(of_thread, halves))
    return array(registers, shape, layout, True)

  return in_registers(block, row, *key)


def _schedule(key: list[Any]) -> list[list[Any]]:
  """Both words of the key in every round."""
  keys = [key]
  for _ in range(_random_bits.ROUNDS - 1):
    weyl = zip(keys[-1], _random_bits.WEYL, strict=True)
    keys.append([arith.addi(word, constant(step)) for word, step in weyl])
  return keys


def _philox(counter: list[Any], schedule: list[list[Any]]) -> list[Any]:
  a, b, c, d = counter
  for first, second in schedule:
    high_a, low_a = _wide_product(a, _random_bits.MULTIPLIERS[0])
    high_c, low_c = _wide_product(c, _random_bits.MULTIPLIERS[1])
    a, b = arith.xori(arith.xori(high_c, b), first), low_c
    c, d = arith.xori(arith.xori(high_a, d), second), low_a
  return [a, b, c, d]


def _wide_product(a: Any, factor: int) -> tuple[Any, Any]:
  """The high word of a product, and the low one."""
  i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
  wide = arith.muli(arith.extui(i64, a), arith.extui(i64, constant(factor)))
  half = mgpu.utils.c(32, i64)
  return arith.trunci(i32, arith.shrui(wide, half)), arith.trunci(i32, wide)


def _halves(word: Any) -> tuple[Any, Any]:
  return arith.andi(word, constant(0xFFFF)), arith.shrui(word, constant(16))
