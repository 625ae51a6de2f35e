"""int32 arrays of 128 numbers that every warp has whole, four neighbours a lane.

What Mosaic GPU has not: sums so far, how many entries are up to a number, and entries by an index.
All of them are shuffles within a warp, and need no shared memory.
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

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.layouts import ONE_EACH, WARP, WARPS
from jaxqq._kernels.hopper.ptx.registers import array, constant

_OF_LANE = 4
SIZE = WARP * _OF_LANE
LAYOUT = plgpu.Layout.TILED(
  plgpu.Tiling(((SIZE,), (_OF_LANE,))),
  warp_dims=(plgpu.Replicated(WARPS),),
  lane_dims=(-2,),
  vector_dim=-1,
)
_SPLAT = plgpu.Layout.WG_SPLAT
_ARRAY = plgpu.ShapeDtypeStruct((SIZE,), np.dtype(np.int32), layout=LAYOUT)


def load(ref: Any, first: Any, end: Any) -> jax.Array:
  """ref[first + i], zeros from ref[end] on.

  Args:
    ref: int32 (n,), in global memory.
    first, end: int32.
  """
  if interpreting():
    places = first + jnp.arange(SIZE)
    return jnp.where(places < end, ref[...][jnp.minimum(places, ref.shape[0] - 1)], 0)

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(()), _SPLAT, _SPLAT), return_type=_ARRAY)
  def from_gmem(ctx: Any, ref: Any, first: Any, end: Any) -> Any:
    del ctx
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
    start, bound = (a.registers.flat[0] for a in (first, end))
    numbers = []
    for i in range(_OF_LANE):
      own = arith.addi(arith.muli(_lane(), constant(_OF_LANE)), constant(i))
      place = arith.addi(start, own)
      address = arith.addi(base, arith.extsi(i64, arith.muli(place, constant(4))))
      text = """{
        .reg .pred inside;
        .reg .b64 a;
        setp.lt.s32 inside, $2, $3;
        cvta.to.global.u64 a, $1;
        mov.b32 $0, 0;
        @inside ld.global.nc.b32 $0, [a];
      }"""
      numbers.append(llvm.inline_asm(i32, [address, place, bound], text, "=&r,l,r,r"))
    return _as_array(numbers)

  return from_gmem(ref, first, end)


def running_sums(a: jax.Array, before: Any, most: int) -> tuple[jax.Array, jax.Array]:
  """before + a[0] + ... + a[i - 1], and with a[i]; both at most `most`.

  Args:
    a: no entry is negative, or above `most`.
    before: int32, up to `most`.
    most: less than 2**31.
  """
  if interpreting():
    after = jnp.minimum(before + jnp.cumsum(a, dtype=jnp.int32), most)
    return jnp.concatenate([jnp.full((1,), before, jnp.int32), after[:-1]]), after

  @plgpu.inline_mgpu(arg_types=(LAYOUT, _SPLAT), return_type=(_ARRAY, _ARRAY))
  def by_shuffles(ctx: Any, a: Any, before: Any) -> Any:
    del ctx

    def plus(x: Any, y: Any) -> Any:  # of two below 2**31, without overflow
      return arith.minui(arith.addi(x, y), constant(most))

    own = _numbers(a)
    total = own[0]
    for number in own[1:]:
      total = plus(total, number)
    for distance in (1, 2, 4, 8, 16):
      total = plus(total, _shuffle_up(total, distance))
    sums = [plus(before.registers.flat[0], _shuffle_up(total, 1))]
    for number in own:
      sums.append(plus(sums[-1], number))
    return _as_array(sums[:-1]), _as_array(sums[1:])

  return by_shuffles(a, before)


def count_up_to(a: jax.Array, numbers: jax.Array) -> jax.Array:
  """How many entries of a, which ascend, are at most each number; int32 in the layout ONE_EACH."""
  if interpreting():
    return jnp.sum(a[None] <= numbers[:, None], axis=1, dtype=jnp.int32)

  @plgpu.inline_mgpu(
    arg_types=(LAYOUT, ONE_EACH),
    return_type=plgpu.ShapeDtypeStruct((SIZE,), np.dtype(np.int32), layout=ONE_EACH),
  )
  def by_halves(ctx: Any, a: Any, numbers: Any) -> Any:
    del ctx
    own, (number,) = _numbers(a), _numbers(numbers)

    def one_if_up_to(entry: Any, weight: int) -> Any:
      is_up_to = arith.cmpi(arith.CmpIPredicate.sle, entry, number)
      return arith.select(is_up_to, constant(weight), constant(0))

    lane = constant(0)
    for half in (16, 8, 4, 2, 1):
      last = _shuffle(own[-1], arith.addi(lane, constant(half - 1)))
      lane = arith.addi(lane, one_if_up_to(last, half))
    count = arith.muli(lane, constant(_OF_LANE))
    for number_of_lane in own:
      count = arith.addi(count, one_if_up_to(_shuffle(number_of_lane, lane), 1))
    return _as_array([count], ONE_EACH)

  return by_halves(a, numbers)


def take(a: jax.Array, index: Any) -> jax.Array:
  """a[index], of an int32 or of an array in the layout ONE_EACH. An index above 127 is as that.

  Of a negative index it is any entry.
  """
  index = jnp.minimum(index, jnp.int32(SIZE - 1))
  if interpreting():
    return a[index]
  layout = ONE_EACH if index.ndim else _SPLAT

  @plgpu.inline_mgpu(
    arg_types=(LAYOUT, layout),
    return_type=plgpu.ShapeDtypeStruct(index.shape, np.dtype(np.int32), layout=layout),
  )
  def by_shuffles(ctx: Any, a: Any, index: Any) -> Any:
    del ctx
    (place,) = _numbers(index) if layout == ONE_EACH else (index.registers.flat[0],)
    lane = arith.shrui(place, constant(_OF_LANE.bit_length() - 1))
    of_lane = arith.andi(place, constant(_OF_LANE - 1))
    first, *others = (_shuffle(number, lane) for number in _numbers(a))
    for i, other in enumerate(others, 1):
      is_it = arith.cmpi(arith.CmpIPredicate.eq, of_lane, constant(i))
      first = arith.select(is_it, other, first)
    return _as_array([first], layout)

  return by_shuffles(a, index)


# On MLIR values


def _lane() -> Any:
  return arith.andi(mgpu.utils.thread_idx(), constant(WARP - 1))


def _numbers(a: Any) -> list[Any]:
  """A thread's, one by one."""
  (register,) = a.registers.flat
  length = ir.VectorType(register.type).shape[0]
  return [vector.extract(register, [], [i]) for i in range(length)]


def _as_array(numbers: list[Any], layout: Any = LAYOUT) -> Any:
  if layout == _SPLAT:
    return array(numbers, (), layout, True)
  of_numbers = ir.VectorType.get((len(numbers),), numbers[0].type)
  return array([vector.from_elements(of_numbers, numbers)], (SIZE,), layout, True)


def _shuffle(number: Any, lane: Any) -> Any:
  """That of a lane."""
  text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
  return _word(text, [number, lane], "=r,r,r")


def _shuffle_up(number: Any, distance: int) -> Any:
  """That of the lane so many before; of the first ones 0."""
  text = f"""{{
    .reg .pred inside;
    .reg .b32 other;
    shfl.sync.up.b32 other|inside, $1, {distance}, 0, 0xffffffff;
    selp.b32 $0, other, 0, inside;
  }}"""
  return _word(text, [number], "=r,r")


def _word(text: str, operands: list[Any], constraints: str) -> Any:
  """Of an instruction that all lanes come to."""
  i32 = ir.IntegerType.get_signless(32)
  return llvm.inline_asm(i32, operands, text, constraints, has_side_effects=True)
