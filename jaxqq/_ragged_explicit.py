"""Ragged products in meshes of explicit axes, where the sharding is part of the type.

The result is split as rows of x and columns of w are, and as batch axes. What is summed over tells
nothing of it: the experts of w, each with the rows of its own groups, and K, which is ambiguous
where x and w are both split along it. What devices compute is the rule of `_ragged_split.py`,
spelled out with `jax.shard_map`.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxqq._compat import ShardingTypeError
from jaxqq._ragged_split import Layout, Product, part_of, split_of
from jaxqq._sharding import Partition, over_parts
from jaxqq._split import Axes, dims_of, to_spec, words


def with_batch(layout: Layout, ndim: int) -> Layout:
  """The same of a product with so many batch axes, dims of their own."""
  batch = batch_dims(ndim)
  return dataclasses.replace(layout, out=batch + layout.out, batch=batch)


def batch_dims(ndim: int) -> str:
  return string.ascii_uppercase[:ndim]


def out_sharding(
  function: str, names: Sequence[str], avals: Sequence[Any], layout: Layout, groups: int
) -> NamedSharding:
  """That of the result's type; what types leave open is refused in a sentence."""
  mesh = mesh_of(avals)
  if not mesh.explicit_axes:
    return NamedSharding(mesh, PartitionSpec(*(None for _ in layout.out)))
  matrices, others = [], []
  for name, a in zip(names, avals, strict=True):
    dims = layout.of(name, a.shape, groups)
    if name in ("x", "y", "w"):
      matrices.append((name, a, dims))
    else:  # only batch axes tell anything
      others.append((name, a, "".join(dim if dim in layout.batch else "." for dim in dims)))
  typed = matrices + others
  return NamedSharding(mesh, spec_of(function, typed, layout.out, layout.contracted))


def mesh_of(avals: Sequence[Any]) -> Any:
  """The first that there is."""
  meshes = [a.sharding.mesh for a in avals]
  return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def spec_of(
  function: str,
  typed: Sequence[tuple[str, Any, str]],  # name, abstract value, dims; first those of matrices
  out: str,  # dims of the result
  contracted: str,
) -> PartitionSpec:
  """How a result is split, by types of operands alone. A dim that is a dot tells nothing."""
  types = ", ".join(f"{name} is {a.str_short(short_dtypes=True)}" for name, a, _ in typed[:2])
  found: dict[str, Axes] = {}
  for _, a, dims in typed:
    for dim, axes in zip(dims, dims_of(a.sharding, len(a.shape)), strict=True):
      if dim == "." or not axes:
        continue
      if dim == contracted and dim in found:
        both = " and ".join(name for name, *_ in typed[:2])
        raise ShardingTypeError(
          f"{function}: {both} are both split along {dim.upper()}, which is summed over, so that "
          f"it is ambiguous how the output should be split ({types}); say it with out_sharding=, "
          "or reshard one of them with jax.sharding.reshard."
        )
      if found.setdefault(dim, axes) != axes:
        raise ShardingTypeError(
          f"{function}: a batch axis is split over {words(found[dim])} in one operand and over "
          f"{words(axes)} in another ({types}); say with out_sharding= how the output should be "
          "split, or reshard one of them with jax.sharding.reshard."
        )
  spec = to_spec([found.get(dim, ()) for dim in out])
  used = [axis for dim in out for axis in found.get(dim, ())]
  if len(used) != len(set(used)):
    raise ShardingTypeError(
      f"{function}: two axes of the output would be split over one axis of the mesh, {spec} "
      f"({types}); say with out_sharding= how it should be split, or reshard an operand with "
      "jax.sharding.reshard."
    )
  return spec


def over_explicit_axes(
  product: Product,
  names: tuple[str, ...],
  layout: Layout,
  groups: int,
  rows: int,
  avals: Sequence[Any],
  out: Any,  # the result's abstract value
) -> Callable[..., jax.Array]:
  """`product` as a function of operands whose types say how they are split."""
  mesh_shape = dict(out.sharding.mesh.shape)
  wanted = dims_of(out.sharding, out.ndim)
  split = split_of(names, avals, wanted, out.shape, layout, groups, mesh_shape)
  part = part_of(split, product, names, layout, groups, rows, np.dtype(out.dtype), mesh_shape)
  own = Partition(part, split.specs(names, avals, layout, groups), to_spec(split.out))
  return over_parts(own, out.sharding)
