"""The rule of `_split` told to JAX: to XLA's partitioner, and in the types of explicit meshes.

Under `jit`, XLA's partitioner asks for a rule, since it cannot look into a kernel (nor see that
packed bytes are cheaper to move than the floats they stand for). In a mesh of explicit axes the
types say how everything is split, and the same rule is spelled out with `jax.shard_map`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import (
  ArrayMapping,
  CompoundFactor,
  SdyShardingRule,
  custom_partitioning,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxqq import _compat
from jaxqq._compat import ShardingTypeError
from jaxqq._reference import Operands, matrix_ndim, unflatten
from jaxqq._split import Axes, Layout, dims_of, dims_of_spec, propagated, split_of, to_spec


def vary_alike(arrays: list[jax.Array]) -> list[jax.Array]:
  """Marks every array as varying over the mesh axes that any of them varies over.

  Under `jax.shard_map` an operand that all devices share meets one that differs from device to
  device, as every operation of JAX allows. The mark moves no data; its transpose sums the
  operand's gradient over the devices.
  """
  varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
  union = frozenset().union(*varying)
  return [
    jax.lax.pcast(a, tuple(sorted(union - axes)), to="varying") if union - axes else a
    for a, axes in zip(arrays, varying, strict=True)
  ]


# Meshes of explicit axes: the sharding is part of the type


def out_aval(operands: Operands, layout: Layout, dtype: np.dtype) -> jax.core.ShapedArray:
  """The abstract value of a product: shape, dtype, sharding and varying axes.

  In a mesh of explicit axes the output is split as the operands' batch axes and rows are.
  """
  x, w = operands.x, operands.w
  dims = layout.out
  row, column = map(layout.axis, operands.names, dims)
  # Packed, an axis of w is shorter than that of what it stands for.
  size = w.shape[column]
  if operands.scales is not None and dims[1] in layout.units:
    size = operands.scales.shape[column] * layout.unit(dims[1])
  shape = (*operands.batch_shape, x.shape[row], size)
  mesh_of = w if x.sharding.mesh.empty else x
  spec = _explicit_spec(operands, layout, row, column)
  return jax.core.ShapedArray(
    shape,
    dtype,
    sharding=mesh_of.sharding.update(spec=spec),
    manual_axis_type=x.manual_axis_type,
  )


def _explicit_spec(operands: Operands, layout: Layout, row: int, column: int) -> PartitionSpec:
  """As `jnp.einsum` would give it; what is ambiguous there is refused in a sentence."""
  x, w = operands.x, operands.w
  ndim = len(operands.batch_shape)
  batch: list[Any] = [None] * ndim
  for a, shape in zip(operands.flatten(), operands.batch_shapes, strict=True):
    for axis in range(len(shape)):
      at, own = axis + ndim - len(shape), a.sharding.spec[axis]
      if None not in (own, batch[at]) and own != batch[at]:
        raise ShardingTypeError(
          f"qqmm: a batch axis is split over {batch[at]!r} in one operand and over {own!r} in "
          f"another ({_types(x, w)}); reshard one of them with jax.sharding.reshard."
        )
      batch[at] = batch[at] or own
  of_x, of_w = (layout.axis(name, layout.contracted) for name in operands.names[:2])
  if x.sharding.spec[of_x] is not None and w.sharding.spec[of_w] is not None:
    raise ShardingTypeError(
      f"qqmm: x and w are both split along {layout.contracted.upper()}, which is summed over, so "
      f"that it is ambiguous how the output should be split ({_types(x, w)}); say it with "
      "out_sharding=, or reshard one of them with jax.sharding.reshard."
    )
  spec = PartitionSpec(*batch, x.sharding.spec[row], w.sharding.spec[column])
  used = [axis for axes in dims_of_spec(tuple(spec)) for axis in axes]
  if len(used) != len(set(used)):
    raise ShardingTypeError(
      f"qqmm: two axes of the output would be split over one axis of the mesh, {spec} "
      f"({_types(x, w)}); reshard x or w with jax.sharding.reshard."
    )
  return spec


def _types(x: Any, w: Any) -> str:
  return f"x is {x.str_short(short_dtypes=True)}, w {w.str_short(short_dtypes=True)}"


def over_explicit_axes(
  product: Callable[[Operands, np.dtype], jax.Array],
  names: tuple[str, ...],
  layout: Layout,
  avals: Sequence[Any],
  out: Any,  # the output's abstract value
) -> Callable[..., jax.Array]:
  """`product` as a function of operands whose types say how they are split."""
  mesh = out.sharding.mesh
  split = split_of(
    unflatten(names, avals), layout, dims_of(out.sharding, out.ndim), out.shape, dict(mesh.shape)
  )
  specs = split.operand_specs(names, avals, layout)
  own = Partition(split.part(product, names, out.dtype), specs, split.out_spec())
  return over_parts(own, out.sharding)


def over_parts(own: Partition, sharding: NamedSharding) -> Callable[..., jax.Array]:
  """What devices compute, each from its parts, as a function of whole arrays in explicit axes."""
  mesh = sharding.mesh

  def whole(*values: jax.Array) -> jax.Array:
    placed = (
      jax.sharding.reshard(value, NamedSharding(mesh, spec))
      for value, spec in zip(values, own.operand_specs, strict=True)
    )
    result = jax.shard_map(
      own.part,
      mesh=mesh,
      in_specs=own.operand_specs,
      out_specs=own.out_specs,
      axis_names=set(mesh.explicit_axes),
      check_vma=False,
    )(*placed)
    return jax.sharding.reshard(result, sharding)

  return whole


# XLA's partitioner


def partitioned(
  product: Callable[[Operands, np.dtype], jax.Array],
  names: tuple[str, ...],
  layout: Layout,
  out_dtype: np.dtype,
  label: str,
) -> Callable[..., jax.Array]:
  """`product` as a function of its operands that XLA's partitioner splits by the rule above."""

  def whole(*values: jax.Array) -> jax.Array:
    return product(unflatten(names, values), out_dtype)

  def infer(args: Any, result: Any) -> PartitionSpec:
    return to_spec(propagated(unflatten(names, args), layout))

  def partition(mesh: Mesh, args: Any, result: Any) -> Partition:
    out_dims = dims_of(result.sharding, len(result.shape))
    split = split_of(unflatten(names, args), layout, out_dims, result.shape, dict(mesh.shape))
    part = split.part(product, names, out_dtype)
    return Partition(part, split.operand_specs(names, args, layout), split.out_spec())

  def rule(args: Any, results: Any) -> SdyShardingRule:
    return _rule(names, args, results[0], layout)

  return split_by_xla(whole, infer, partition, rule, label)


@dataclasses.dataclass(frozen=True)
class Partition:
  """What every device computes of a function, from which parts to which."""

  part: Callable[..., Any]
  operand_specs: tuple[PartitionSpec, ...]
  out_specs: Any  # a PartitionSpec for each output, in the tree of the outputs


def split_by_xla(
  whole: Callable[..., Any],
  infer: Callable[[Any, Any], Any],
  partition: Callable[[Mesh, Any, Any], Partition],
  rule: Callable[[Any, Any], SdyShardingRule],
  label: str,
) -> Callable[..., Any]:
  """`whole`, a function of arrays, as one that XLA's partitioner splits as it is told.

  - `infer(operands, result)`: the `PartitionSpec` of each output, whose sharding is not known yet
    (for GSPMD).
  - `partition(mesh, operands, result)`: the split. It may differ from what XLA asks for, which
    is what the shardings of `operands` and `result` say; XLA then moves the data.
  - `rule(operand_types, result_types)`: which axes belong together (for Shardy).

  Operands and result are `ShapeDtypeStruct`s, in the trees of `whole`'s arguments and outputs. The
  mesh of their shardings has the program's devices, and axes of prime size with names of their
  own: see `decoded`. `rule` gets lists of types, which have a shape.

  The program holds no more of the rule than a pointer. Its label tells functions apart where JAX
  looks for programs in a persistent cache without regard to pointers.
  """
  split = custom_partitioning(whole)

  def infer_shardings(mesh: Mesh, args: Any, result: Any) -> Any:
    mesh = _mesh_of_primes(mesh, args)
    return _placed(mesh, infer(_decoded_shapes(mesh, args), result))

  def partition_shapes(mesh: Mesh, args: Any, result: Any) -> Any:
    mesh = _mesh_of_primes(mesh, (args, result))
    own = partition(mesh, _decoded_shapes(mesh, args), _decoded_shapes(mesh, result))

    def unmeshed(*values: jax.Array) -> Any:
      """One device's part; a mesh that was set for the whole program has no place in it."""
      with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return _compat.without_refs(own.part)(*values)

    return mesh, unmeshed, _placed(mesh, own.out_specs), _placed(mesh, own.operand_specs)

  split.def_partition(
    partition=partition_shapes,
    infer_sharding_from_operands=infer_shardings,
    sharding_rule=lambda mesh, args, results: rule(args, results),
    decode_shardings=False,  # JAX fails on a part of a mesh axis; _decoded_shapes does it
  )

  def labelled(*values: jax.Array) -> Any:
    return split(*values)

  labelled.__name__ = label
  return jax.jit(labelled)


def _placed(mesh: Mesh, specs: Any) -> Any:
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _decoded_shapes(mesh: Mesh, shapes: Any) -> Any:
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=decoded(mesh, a.sharding, len(a.shape))
    ),
    shapes,
  )


def decoded(mesh: Mesh, sharding: Any, ndim: int) -> NamedSharding:
  """A sharding as XLA has it, in terms of the mesh; an axis that has none is not split.

  XLA may split an axis of an array over a part of a mesh axis, say 4 ways over the first or the
  last 4 of 8 = 2 * 2 * 2. On a mesh of prime axes such a part is some of the axes. XLA may also
  take the factors of 6 in the other order; then the array is gathered along this axis alone.
  """
  if sharding is None:  # of a constant
    return NamedSharding(mesh, PartitionSpec())
  # For this shape every split is even: i of n parts begins at i * (mesh.size / n).
  parts = sharding.devices_indices_map((mesh.size,) * ndim)
  starts = np.array([[axis.start or 0 for axis in parts[device]] for device in mesh.devices.flat])
  starts = starts.reshape(*mesh.devices.shape, ndim)
  return NamedSharding(mesh, to_spec([_axes_of(mesh, starts[..., axis]) for axis in range(ndim)]))


def _axes_of(mesh: Mesh, starts: np.ndarray) -> Axes:
  """The mesh axes, the major first, by which an array's axis is split; none if none are.

  starts: where the part begins that each device of the mesh has.
  """
  first = (0,) * starts.ndim
  strides = [int(starts[*first[:i], 1, *first[i + 1 :]]) for i in range(starts.ndim)]
  if (np.tensordot(strides, np.indices(starts.shape), 1) != starts).any():
    return ()
  by_stride = sorted(zip(strides, mesh.axis_names, strict=True), reverse=True)
  return tuple(name for stride, name in by_stride if stride)


def _mesh_of_primes(mesh: Mesh, shapes: Any) -> Mesh:
  """The program's devices, in order, along axes of prime size whose products are the mesh's axes.

  Outside of jit JAX may have lost the mesh, or have another one that was set.
  """
  own = tuple(mesh.devices.flat)
  shardings = (a.sharding for a in jax.tree.leaves(shapes) if a.sharding is not None)
  devices = next((_compat.device_assignment(sharding) for sharding in shardings), own)
  sizes = mesh.devices.shape if devices == own else (len(devices),)
  primes = [prime for size in sizes for prime in _prime_factors(size)]
  return Mesh(np.array(devices).reshape(primes), tuple(f"axis{i}" for i in range(len(primes))))


def _prime_factors(size: int) -> list[int]:
  for factor in range(2, size):
    if size % factor == 0:
      return [factor, *_prime_factors(size // factor)]
  return [size] if size > 1 else []


def _rule(names: tuple[str, ...], args: Any, result: Any, layout: Layout) -> SdyShardingRule:
  """Which axes of operands and output go together: batch axes, rows, columns, what is summed.

  An axis in units, say k in groups, is k units times so many numbers, packed words or scales;
  those stay whole.
  """
  shapes = [tuple(a.shape) for a in args]
  out_shape = tuple(result.shape)
  num_batch = len(out_shape) - 2
  contracted = layout.axis(names[0], layout.contracted)
  sizes = {layout.contracted: shapes[0][contracted], layout.out[0]: out_shape[-2]}
  sizes[layout.out[1]] = out_shape[-1]
  # An axis that is no multiple of its unit is one unit.
  num_units = {
    dim: size // layout.unit(dim) if size % layout.unit(dim) == 0 else 1
    for dim, size in sizes.items()
  }
  inner: dict[str, int] = {}

  def matrix_factors(dims: str, shape: tuple[int, ...]) -> list[str | CompoundFactor]:
    factors: list[str | CompoundFactor] = []
    for dim, size in zip(dims, shape[-len(dims) :], strict=True):
      whole = size // num_units[dim]
      factor = f"{dim}{whole}"
      if layout.unit(dim) == 1 or size == num_units[dim] != 1:
        factors.append(dim)
      else:
        inner[factor] = whole
        # Shardy has no compound factors of size 1.
        factors.append(factor if num_units[dim] == 1 else CompoundFactor(dim, factor))
    return factors

  mappings = []
  for operand, (name, shape) in enumerate(zip(names, shapes, strict=True)):
    own = len(shape) - matrix_ndim(name)
    dims: list[str | CompoundFactor] = []
    for axis, size in enumerate(shape[:own], num_batch - own):
      dims.append(f"b{axis}" if size == out_shape[axis] else f"one{operand}{axis}")
    if matrix_ndim(name):
      dims += matrix_factors(layout.operands[name], shape)
    mappings.append(ArrayMapping(*dims))
  batch = [f"b{axis}" for axis in range(num_batch)]
  out = ArrayMapping(*batch, *matrix_factors(layout.out, out_shape))
  # Sizes are to be told of the factors that are nowhere an axis of their own.
  flat = [dim for mapping in (*mappings, out) for dim in mapping]
  compound = {factor for dim in flat if isinstance(dim, CompoundFactor) for factor in dim}
  sizes_of: Any = {f: inner.get(f, num_units.get(f, 1)) for f in compound - set(flat)}
  return SdyShardingRule(tuple(mappings), (out,), need_replication_factors=tuple(inner), **sizes_of)
