"""How `quantize` and `dequantize` are split over a mesh: the rule, and the rule told to JAX.

All arrays of a conversion share its axes: batch axes, rows, groups. Each of these is split
freely, in all arrays alike, and no device needs numbers of another. Groups stay whole: an axis
that is split inside of a group is gathered. Where operands and results are split differently,
packed numbers move: `quantize` runs where w is, `dequantize` where its result is to be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import (
  ArrayMapping,
  CompoundFactor,
  SdyShardingRule,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxqq._compat import ShardingTypeError
from jaxqq._formats import Format
from jaxqq._reference import TRANSPOSED, matrix_ndim
from jaxqq._sharding import Partition, split_by_xla
from jaxqq._split import Axes, dims_of, dims_of_spec, named_sharding, to_spec, words

Function = Callable[..., list[jax.Array]]  # a conversion on one device


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The arrays of one conversion by their names: shapes, and the axes that they share."""

  names: tuple[str, ...]  # of the operands
  operands: tuple[Any, ...]
  fmt: Format

  @property
  def is_quantize(self) -> bool:
    return "scales" not in self.names

  @property
  def function(self) -> str:
    return "quantize" if self.is_quantize else "dequantize"

  @property
  def results(self) -> tuple[str, ...]:
    return ("packed", "scales") if self.is_quantize else ("out",)

  @property
  def sizes(self) -> tuple[int, ...]:
    """Those of the shared axes: batch axes, rows, groups."""
    batch_shapes = [
      a.shape[: len(a.shape) - matrix_ndim(name)]
      for name, a in zip(self.names, self.operands, strict=True)
    ]
    rows, k = self.operands[0].shape[-2:]
    if self.names[0].endswith(TRANSPOSED):
      rows, k = k, rows
    return (*lax.broadcast_shapes(*batch_shapes), rows, k // self.entries_a_group(self.names[0]))

  def entries_a_group(self, name: str) -> int:
    """How many entries along an array's grouped axis belong to one group."""
    if name == "scales":
      return 1
    is_packed = name == "packed" or (name == "w" and not self.is_quantize)
    return self.fmt.group_size // (self.fmt.codes_per_word if is_packed else 1)

  def shape_of(self, result: str) -> tuple[int, ...]:
    *rest, groups = self.sizes
    return (*rest, groups * self.entries_a_group(result))

  def axes_of(self, name: str, shape: Sequence[int]) -> list[int | None]:
    """Which shared axis each axis of an array is; None for one that is broadcast."""
    sizes = self.sizes
    num_batch, own_batch = len(sizes) - 2, len(shape) - matrix_ndim(name)
    batch = range(num_batch - own_batch, num_batch)
    axes: list[int | None] = [
      axis if size == sizes[axis] else None for axis, size in zip(batch, shape, strict=False)
    ]
    if matrix_ndim(name):
      last = [num_batch, num_batch + 1]
      axes += reversed(last) if name.endswith(TRANSPOSED) else last
    return axes

  def shared(self, name: str, shape: Sequence[int], dims: Sequence[Axes]) -> list[Axes]:
    """The mesh axes of each shared axis, from those of an array's own axes."""
    found: list[Axes] = [()] * len(self.sizes)
    for axis, own in zip(self.axes_of(name, shape), dims, strict=True):
      if axis is not None:
        found[axis] = own
    return found

  def spec_of(self, name: str, shape: Sequence[int], split: Sequence[Axes]) -> PartitionSpec:
    """How an array is split when the shared axes are split so."""
    axes = self.axes_of(name, shape)
    return to_spec([() if axis is None else split[axis] for axis in axes])

  def operand_specs(self, split: Sequence[Axes]) -> tuple[PartitionSpec, ...]:
    pairs = zip(self.names, self.operands, strict=True)
    return tuple(self.spec_of(name, a.shape, split) for name, a in pairs)

  def result_specs(self, split: Sequence[Axes]) -> tuple[PartitionSpec, ...]:
    return tuple(self.spec_of(name, self.shape_of(name), split) for name in self.results)

  def of_operands(self) -> list[list[Axes]]:
    """The shared axes as each operand is split."""
    pairs = zip(self.names, self.operands, strict=True)
    return [self.shared(name, a.shape, dims_of(a.sharding, len(a.shape))) for name, a in pairs]


def split_of(
  sizes: Sequence[int], wanted: Sequence[Sequence[Axes]], mesh_shape: Mapping[str, int]
) -> list[Axes]:
  """The split of the shared axes: as the first of `wanted` asks, then as the others do."""
  split: list[Axes] = [()] * len(sizes)
  taken: set[str] = set()
  for dims in wanted:
    for axis, (axes, size) in enumerate(zip(dims, sizes, strict=True)):
      fits = size % math.prod(mesh_shape[name] for name in axes) == 0
      if not split[axis] and fits and taken.isdisjoint(axes):
        split[axis] = axes
        taken |= set(axes)
  return split


# Meshes of explicit axes: the sharding is part of the type


def out_avals(shapes: Shapes, dtypes: Sequence[Any]) -> list[jax.core.ShapedArray]:
  """The abstract values of the results: shapes, dtypes, shardings and varying axes."""
  w = shapes.operands[0]
  with_mesh = [a for a in shapes.operands if not a.sharding.mesh.empty] or [w]
  mesh = with_mesh[0].sharding.mesh
  sharding = NamedSharding(mesh, PartitionSpec()) if mesh.empty else with_mesh[0].sharding
  split = _explicit_split(shapes, mesh.shape)
  return [
    jax.core.ShapedArray(
      shapes.shape_of(name),
      dtype,
      sharding=sharding.update(spec=spec),
      manual_axis_type=w.manual_axis_type,
    )
    for name, dtype, spec in zip(shapes.results, dtypes, shapes.result_specs(split), strict=True)
  ]


def _explicit_split(shapes: Shapes, mesh_shape: Mapping[str, int]) -> list[Axes]:
  """As operands are split, which may not disagree."""
  of_operands = shapes.of_operands()
  found: list[Axes] = [()] * len(shapes.sizes)
  for dims in of_operands:
    for axis, axes in enumerate(dims):
      if axes and found[axis] and axes != found[axis]:
        raise ShardingTypeError(
          f"{shapes.function}: an axis is split over {words(found[axis])} in one operand and over "
          f"{words(axes)} in another ({_types(shapes)}); reshard one of them with "
          "jax.sharding.reshard."
        )
      found[axis] = found[axis] or axes
  used = [name for axes in found for name in axes]
  if len(used) != len(set(used)):
    raise ShardingTypeError(
      f"{shapes.function}: two axes of the result would be split over one axis of the mesh, "
      f"{to_spec(found)} ({_types(shapes)}); reshard an operand with jax.sharding.reshard."
    )
  return split_of(shapes.sizes, [found], mesh_shape)


def _types(shapes: Shapes) -> str:
  pairs = zip(shapes.names, shapes.operands, strict=True)
  return ", ".join(
    f"{name.removesuffix(TRANSPOSED)} is {a.str_short(short_dtypes=True)}" for name, a in pairs
  )


def over_explicit_axes(
  function: Function, shapes: Shapes, results: Sequence[Any]
) -> Callable[..., list[jax.Array]]:
  """`function` of arrays whose types say how they are split."""
  mesh = results[0].sharding.mesh
  split = _explicit_split(shapes, mesh.shape)
  specs = shapes.operand_specs(split)

  def whole(*values: jax.Array) -> list[jax.Array]:
    placed = (
      jax.sharding.reshard(value, NamedSharding(mesh, spec))
      for value, spec in zip(values, specs, strict=True)
    )
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=specs,
      out_specs=list(shapes.result_specs(split)),
      axis_names=set(mesh.explicit_axes),
      check_vma=False,
    )(*placed)

  return whole


# XLA's partitioner


def partitioned(function: Function, shapes: Shapes, label: str) -> Callable[..., list[jax.Array]]:
  """`function` of arrays that XLA's partitioner splits by the rule above."""

  def of(args: Any) -> Shapes:
    return dataclasses.replace(shapes, operands=tuple(args))

  def infer(args: Any, results: Any) -> list[PartitionSpec]:
    del results
    mesh_shape = args[0].sharding.mesh.shape
    split = split_of(shapes.sizes, of(args).of_operands(), mesh_shape)
    return list(shapes.result_specs(split))

  def partition(mesh: Mesh, args: Any, results: Any) -> Partition:
    wanted = [
      shapes.shared(name, a.shape, dims_of(a.sharding, len(a.shape)))
      for name, a in zip(shapes.results, results, strict=True)
    ]
    if shapes.is_quantize:
      wanted = [*of(args).of_operands(), *wanted]
    split = split_of(shapes.sizes, wanted, mesh.shape)
    return Partition(function, shapes.operand_specs(split), list(shapes.result_specs(split)))

  def rule(args: Any, results: Any) -> SdyShardingRule:
    del args, results
    return _rule(shapes)

  return split_by_xla(function, infer, partition, rule, label)


def _rule(shapes: Shapes) -> SdyShardingRule:
  """Which axes of operands and results go together: batch axes, rows, groups.

  A grouped axis is groups ("k") times the entries of one ("k16"), which stay whole.
  """
  groups = shapes.sizes[-1]
  num_batch = len(shapes.sizes) - 2
  inner: dict[str, int] = {}

  def grouped(name: str) -> str | CompoundFactor:
    entries = shapes.entries_a_group(name)
    if entries == 1 and groups > 1:
      return "k"
    inner[f"k{entries}"] = entries
    # Shardy has no compound factors of size 1.
    return CompoundFactor("k", f"k{entries}") if groups > 1 else f"k{entries}"

  def mapping(at: int, name: str, shape: Sequence[int]) -> ArrayMapping:
    dims: list[str | CompoundFactor] = []
    for i, axis in enumerate(shapes.axes_of(name, shape)):
      if axis is None:
        dims.append(f"one{at}{i}")
      elif axis < num_batch:
        dims.append(f"b{axis}")
      else:
        dims.append("n" if axis == num_batch else grouped(name))
    return ArrayMapping(*dims)

  operands = [(name, a.shape) for name, a in zip(shapes.names, shapes.operands, strict=True)]
  results = [(name, shapes.shape_of(name)) for name in shapes.results]
  mappings = [mapping(at, *array) for at, array in enumerate(operands + results)]
  sizes: Any = inner if groups > 1 else {}  # else each of them is an axis
  return SdyShardingRule(
    tuple(mappings[: len(operands)]),
    tuple(mappings[len(operands) :]),
    need_replication_factors=tuple(inner),
    **sizes,
  )


# In words


def described(shapes: Shapes) -> tuple[Shapes, list[str]]:
  """What one device converts, and sentences about it, as far as the operands tell."""
  placed = [named_sharding(a) for a in shapes.operands]
  meshes = [s.mesh for s in placed if s is not None and s.mesh.size > 1]
  if not meshes:
    return shapes, []
  mesh_shape = dict(meshes[0].shape)
  pairs = zip(shapes.operands, placed, strict=True)
  typed = dataclasses.replace(
    shapes,
    operands=tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s) for a, s in pairs),
  )
  asked = typed.of_operands()
  split = split_of(shapes.sizes, asked, mesh_shape)
  parts = []
  for a, spec in zip(shapes.operands, typed.operand_specs(split), strict=True):
    dims = dims_of_spec(tuple(spec))
    ways = [math.prod(mesh_shape[name] for name in axes) for axes in dims]
    local = tuple(size // way for size, way in zip(a.shape, ways, strict=True))
    parts.append(jax.ShapeDtypeStruct(local, a.dtype))
  own = " and ".join(
    f"{name.removesuffix(TRANSPOSED)} {part.shape}"
    for name, part in zip(shapes.names, parts, strict=True)
    if matrix_ndim(name)
  )
  sentences = [
    f"Split over {math.prod(mesh_shape.values())} devices ({mesh_shape}): each takes {own}."
  ]
  cut = next((dims[-1] for dims in asked if dims[-1] and not split[-1]), None)
  if cut and shapes.sizes[-1] % math.prod(mesh_shape[name] for name in cut):
    group = shapes.fmt.group_size
    sentences.append(
      f"K = {shapes.sizes[-1] * group} is split over {words(cut)}, which would cut a group of "
      f"{group}: it is gathered."
    )
  return dataclasses.replace(shapes, operands=tuple(parts)), sentences
