"""The ragged product in plain jnp: rows in groups, and a matrix for each group.

Groups of rows are found on the device, from their sizes, and taken in blocks of rows: a loop over
as many blocks as there are rows for. So a group without rows costs nothing, and of a packed w no
more than one matrix is dequantized at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq._reference import Operands, with_ndim

# How many axes of an operand are no batch axes.
NUM_AXES = {
  "group_sizes": 1,
  "group_offset": 0,
  "x": 2,
  "y": 2,
  "w": 3,
  "scales": 3,
  "global_scale_x": 1,
  "global_scale_w": 1,
  "row_scales": 2,
}


@dataclasses.dataclass(frozen=True)
class RaggedOperands:
  """What a ragged product multiplies; the axes before the named ones are batch axes.

  Batch axes broadcast as in numpy. A primitive takes the operands, `flatten`, and their `names`.
  """

  group_sizes: Any  # (..., all groups), int32: how many rows each has, one group after the other
  group_offset: Any  # (...), int32: the group of the first matrix
  x: Any  # (..., m, k), or (..., m, n) where n is contracted
  w: Any = None  # (..., groups, n, k), or uint32 (..., groups, n, k * bits / 32) beside scales
  scales: Any = None  # (..., groups, n, k / group_size)
  global_scale_x: Any = None  # (..., 1) or (..., groups)
  global_scale_w: Any = None  # (..., 1) or (..., groups)
  row_scales: Any = None  # (..., groups, n)
  y: Any = None  # (..., m, k), where rows of x and y are multiplied; global_scale_w is its

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(name for name in NUM_AXES if getattr(self, name) is not None)

  def flatten(self) -> tuple[Any, ...]:
    """Those that are there, in the order of `names`."""
    return tuple(getattr(self, name) for name in self.names)

  def batch_of(self, *names: str) -> tuple[int, ...]:
    """The batch axes that these have together."""
    given = ((getattr(self, name), NUM_AXES[name]) for name in names)
    shapes = (a.shape[: len(a.shape) - own] for a, own in given if a is not None)
    return lax.broadcast_shapes((), *shapes)

  @property
  def batch_shape(self) -> tuple[int, ...]:
    return self.batch_of(*self.names)


def unflatten(names: Sequence[str], values: Sequence[Any]) -> RaggedOperands:
  """The operands of a primitive, by their names."""
  return RaggedOperands(**{"x": None, **dict(zip(names, values, strict=True))})


# Groups


def bounds(ops: RaggedOperands, groups: int) -> tuple[jax.Array, jax.Array]:
  """Where the rows of each matrix begin and end: int32, (..., groups).

  Sizes below 0 count as 0, and groups end with the rows there are. A matrix whose group is not in
  group_sizes has no rows.
  """
  m = ops.x.shape[-2]
  ends = jnp.minimum(_running_sum(jnp.clip(ops.group_sizes, 0, m)), m)
  starts = jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends[..., :-1]], axis=-1)
  offset = ops.group_offset[..., None]
  index = offset + with_ndim(jnp.arange(groups, dtype=jnp.int32), offset.ndim)
  batch = lax.broadcast_shapes(index.shape[:-1], ends.shape[:-1])
  index, starts, ends = (
    jnp.broadcast_to(with_ndim(a, len(batch) + 1), (*batch, a.shape[-1]))
    for a in (index, starts, ends)
  )
  is_there = (index >= 0) & (index < ends.shape[-1])
  at = jnp.clip(index, 0, max(ends.shape[-1] - 1, 0))
  starts, ends = (jnp.take_along_axis(a, at, axis=-1) for a in (starts, ends))
  return starts, jnp.where(is_there, ends, starts)


def in_groups(ops: RaggedOperands, groups: int) -> jax.Array:
  """Whether a row belongs to the group of a matrix: bool, (..., m)."""
  starts, ends = bounds(ops, groups)
  first = jnp.min(starts, axis=-1, keepdims=True, initial=ops.x.shape[-2])
  last = jnp.max(ends, axis=-1, keepdims=True, initial=0)
  row = with_ndim(jnp.arange(ops.x.shape[-2], dtype=jnp.int32), last.ndim)
  return (row >= first) & (row < last)


@dataclasses.dataclass(frozen=True)
class Groups:
  """Groups in the order of their rows, those of all batch axes in one row: int32, (groups,)."""

  starts: jax.Array
  sizes: jax.Array
  matrices: jax.Array  # which of w each multiplies


def folded(ops: RaggedOperands, groups: int) -> tuple[Groups, RaggedOperands]:
  """The same without batch axes: rows one after the other, and a global scale for each group."""
  batch = ops.batch_shape
  count, m = math.prod(batch), ops.x.shape[-2]
  of_w = ops.batch_of("w", "scales", "row_scales")
  shares_w = math.prod(of_w) == 1

  def whole(a: Any, own: int, batch: tuple[int, ...] = batch) -> Any:
    """The first of the `own` last axes has the batch axes in it."""
    a = jnp.broadcast_to(with_ndim(a, len(batch) + own), (*batch, *a.shape[a.ndim - own :]))
    return a.reshape(math.prod(batch) * a.shape[len(batch)], *a.shape[len(batch) + 1 :])

  def of_matrices(a: Any, own: int) -> Any:
    return None if a is None else whole(a, own, of_w if shares_w else batch)

  def of_groups(a: Any) -> Any:
    return None if a is None else whole(jnp.broadcast_to(a, (*a.shape[:-1], groups)), 1)

  starts, ends = bounds(ops, groups)
  before = jnp.arange(count, dtype=jnp.int32)[:, None] * m
  first = (whole(starts, 1).reshape(count, groups) + before).reshape(count * groups)
  number = jnp.arange(count * groups, dtype=jnp.int32)
  matrices = number % max(groups, 1) if shares_w else number
  own = RaggedOperands(
    ops.group_sizes,
    ops.group_offset,
    whole(ops.x, 2),
    of_matrices(ops.w, 3),
    of_matrices(ops.scales, 3),
    of_groups(ops.global_scale_x),
    of_groups(ops.global_scale_w),
    of_matrices(ops.row_scales, 2),
    None if ops.y is None else whole(ops.y, 2),
  )
  return Groups(first, whole(ends - starts, 1), matrices), own


def _running_sum(a: jax.Array) -> jax.Array:
  """Along the last axis."""
  # `jnp.cumsum` has a lowering for each platform, and of a program for several, in which a loop
  # depends on it, XLA's compiler for CPUs fails.
  return lax.associative_scan(jnp.add, a, axis=a.ndim - 1)


# Blocks of rows


@dataclasses.dataclass(frozen=True)
class Block:
  """Some rows of one group."""

  group: jax.Array
  first: jax.Array  # row
  count: jax.Array  # of rows


def over_blocks(
  groups: Groups, size: int, step: Callable[[Block, Any], Any], carry: jax.Array
) -> jax.Array:
  """carry = step(block, carry) for every block of so many rows, in the order of rows."""
  if not groups.starts.shape[0]:
    return carry
  counts = (groups.sizes + (size - 1)) // size
  ends = _running_sum(counts)

  def of_index(i: jax.Array, carry: Any) -> Any:
    group = jnp.sum(ends <= i, dtype=jnp.int32)
    done = (i - (ends[group] - counts[group])) * size
    left = jnp.minimum(groups.sizes[group] - done, size)
    return step(Block(group, groups.starts[group] + done, left), carry)

  return lax.fori_loop(jnp.int32(0), ends[-1], of_index, carry)


def block_size(rows: Any, groups: int) -> int:
  """How many rows a block has: one where groups have few, else above what they have on average."""
  if not isinstance(rows, int):  # an exported program may be made for any number of them
    return 64
  if rows <= groups:
    return 1
  return min(128, max(8, 1 << (rows // max(groups, 1)).bit_length()))


def rows_times_matrices(
  ops: RaggedOperands,
  multiply: Callable[[Operands], jax.Array],  # of one block and one matrix, (rows, out)
  width: int,  # of the result
  dtype: np.dtype,
) -> jax.Array:
  """out[..., i, :] = multiply(x[..., i, :], w[..., group of i, :, :]); 0 for rows of no group."""
  groups, own = folded(ops, ops.w.shape[-3])
  rows = own.x.shape[0]
  size = block_size(rows, ops.group_sizes.shape[-1])
  x = _with_rows(own.x, size)

  def step(block: Block, out: jax.Array) -> jax.Array:
    matrix = groups.matrices[block.group]
    y = multiply(
      Operands(
        lax.dynamic_slice_in_dim(x, block.first, size),
        own.w[matrix],
        _at(own.scales, matrix),
        _at(own.global_scale_x, block.group),
        _at(own.global_scale_w, block.group),
        row_scales=_at(own.row_scales, matrix),
      )
    )
    # What is behind a group is written by the next one, or is to be zero.
    y = jnp.where(_is_in(block, size), y, jnp.zeros_like(y)).astype(dtype)
    return lax.dynamic_update_slice_in_dim(out, y, block.first, 0)

  out = over_blocks(groups, size, step, like(x, (rows + size, width), dtype))[:rows]
  return out.reshape(*ops.batch_shape, ops.x.shape[-2], width)


def sums_of_rows(
  ops: RaggedOperands,
  groups: int,
  multiply: Callable[[Operands], jax.Array],  # x[rows, n], w[rows, k] to (n, k) in float32
  multiple: int,  # of which the rows of a block are one
) -> jax.Array:
  """out[..., g, n, k] = sum over the rows i of group g of x[..., i, n] * y[..., i, k], float32.

  A block is zero-padded: with `multiple` the group size, no group of rows is parted or shared.
  """
  flat, own = folded(ops, groups)
  size = max(multiple, block_size(own.x.shape[0], groups))
  x, y = (_with_rows(a, size) for a in (own.x, own.y))
  shape = (*ops.batch_shape, groups, x.shape[-1], y.shape[-1])

  def step(block: Block, out: jax.Array) -> jax.Array:
    keep = _is_in(block, size)
    of_x, of_y = (
      jnp.where(keep, rows, jnp.zeros_like(rows))
      for rows in (lax.dynamic_slice_in_dim(a, block.first, size) for a in (x, y))
    )
    scale_x, scale_y = (_at(a, block.group) for a in (own.global_scale_x, own.global_scale_w))
    part = multiply(Operands(of_x, of_y, None, scale_x, scale_y, ("x", "w")))
    return out.at[block.group].add(part, mode="promise_in_bounds")

  flat_shape = (flat.starts.shape[0], *shape[-2:])
  out = over_blocks(flat, size, step, like(x, flat_shape, np.dtype(jnp.float32)))
  return out.reshape(shape)


def _at(a: jax.Array | None, index: jax.Array) -> jax.Array | None:
  return None if a is None else a[index]


def _with_rows(a: jax.Array, count: int) -> jax.Array:
  """With rows behind, so that every block has as many."""
  return jnp.pad(a, ((0, count), (0, 0)))


def _is_in(block: Block, size: int) -> jax.Array:
  """Which rows of a block are the group's: (size, 1)."""
  return (jnp.arange(size, dtype=jnp.int32) < block.count)[:, None]


def like(a: jax.Array, shape: Sequence[int], dtype: np.dtype) -> jax.Array:
  """Zeros that vary over the axes of a mesh that `a` varies over, as what a loop carries must."""
  zeros = jnp.zeros(shape, dtype)
  varying = tuple(sorted(jax.typeof(a).manual_axis_type.varying))
  return lax.pcast(zeros, varying, to="varying") if varying else zeros
