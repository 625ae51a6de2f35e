"""How the product is split over devices.

Under `jit`, XLA's partitioner asks for a rule, since it cannot look into a kernel (nor see that
packed bytes are cheaper to move than the floats they stand for):

- Batch axes, m and n are split as the output is.
- k may be split between groups. Each device multiplies its part in float32, and the parts are
  summed (reduce-scattered where the output is split along the same mesh axes) before the one
  rounding to the output's dtype.
- What is then still split is gathered as it came: a packed w packed.

So a column-parallel product (w split on n) moves nothing, a row-parallel one (x and w split on
k) moves the partial sums only, and fully sharded data parallelism moves packed w.
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
from jax.experimental.custom_partitioning import (
  ArrayMapping,
  CompoundFactor,
  SdyShardingRule,
  custom_partitioning,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxqq._formats import Format
from jaxqq._reference import Operands, matrix_ndim, named

Axes = tuple[str, ...]  # mesh axes that one axis of an array is split over


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


def out_aval(operands: Operands, dtype: np.dtype) -> jax.core.ShapedArray:
  """The abstract value of x @ w.T: shape, dtype, sharding and varying axes.

  In a mesh of explicit axes the output is split as x's rows and w's rows are.
  """
  x, w = operands.x, operands.w
  batch_shape = operands.batch_shape
  batch_spec: list[Any] = [None] * len(batch_shape)
  for a, shape in zip(operands.present, operands.batch_shapes, strict=True):
    for axis in range(len(shape)):
      out_axis = axis + len(batch_shape) - len(shape)
      batch_spec[out_axis] = batch_spec[out_axis] or a.sharding.spec[axis]
  mesh_of = w if x.sharding.mesh.empty else x
  return jax.core.ShapedArray(
    (*batch_shape, x.shape[-2], w.shape[-2]),
    dtype,
    sharding=mesh_of.sharding.update(
      spec=PartitionSpec(*batch_spec, x.sharding.spec[-2], w.sharding.spec[-2])
    ),
    manual_axis_type=x.manual_axis_type,
  )


@dataclasses.dataclass(frozen=True)
class Split:
  """How one product is split."""

  batch: tuple[Axes, ...]
  m: Axes
  n: Axes
  k: Axes
  scatter: str | None  # "m" or "n": the axis that the partial sums are scattered along

  def out_spec(self) -> PartitionSpec:
    return _spec([*self.batch, self.m, self.n])

  def operand_spec(self, name: str, shape: Sequence[int]) -> PartitionSpec:
    rows = {"x": ("m", self.m), "w": ("n", self.n), "scales": ("n", self.n)}
    matrix: list[Axes] = []
    if matrix_ndim(name):
      axis, axes = rows[name]
      matrix = [() if self.scatter == axis else axes, self.k]
    num_batch = len(shape) - len(matrix)
    batch = self.batch[len(self.batch) - num_batch :]
    batch = tuple(
      axes if size > 1 else () for axes, size in zip(batch, shape[:num_batch], strict=True)
    )
    return _spec([*batch, *matrix])


def _spec(dims: Sequence[Axes]) -> PartitionSpec:
  return PartitionSpec(*(axes or None for axes in dims))


def _dims(sharding: Any, ndim: int) -> list[Axes]:
  """The mesh axes of each array axis; without a sharding, as constants come, none."""
  if sharding is None:
    return [()] * ndim
  spec = tuple(sharding.spec) + (None,) * (ndim - len(sharding.spec))
  return [
    () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec
  ]


def split_of(
  operands: Operands,  # of shapes with shardings
  out_dims: list[Axes],
  out_shape: Sequence[int],
  k: int,
  group_size: int,
  mesh: Mesh,
) -> Split:
  """The split of a product whose operands and output the partitioner would like split so."""

  def ways(axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)

  *batch, m, n = (
    axes if size % ways(axes) == 0 else () for axes, size in zip(out_dims, out_shape, strict=True)
  )
  x_k, w_k = (_dims(a.sharding, len(a.shape))[-1] for a in (operands.x, operands.w))
  k_axes = x_k or w_k
  if (x_k and w_k and x_k != w_k) or k % (ways(k_axes) * group_size):
    k_axes = ()
  scatter = None
  taken = {axis for axes in (*batch, m, n) for axis in axes}
  if taken & set(k_axes):
    if x_k == w_k and k_axes in (m, n):
      scatter = "m" if k_axes == m else "n"
    else:
      k_axes = ()
  return Split(tuple(batch), m, n, k_axes, scatter)


def partitioned(
  product: Callable[[Operands, np.dtype], jax.Array],
  names: tuple[str, ...],
  fmt: Format,
  out_dtype: np.dtype,
) -> Callable[..., jax.Array]:
  """`product` as a function of its operands that XLA's partitioner splits by the rule above."""

  @custom_partitioning
  def whole(*values: jax.Array) -> jax.Array:
    return product(named(names, values), out_dtype)

  def infer(mesh: Mesh, args: Any, result: Any) -> NamedSharding:
    operands = named(names, args)
    dims = [_dims(a.sharding, len(a.shape)) for a in (operands.x, operands.w)]
    taken: set[str] = set()
    spec = []
    batch: list[Axes] = [()] * (len(result.shape) - 2)
    for name, a in zip(names, args, strict=True):
      own = _dims(a.sharding, len(a.shape))[: len(a.shape) - matrix_ndim(name)]
      for axis, axes in enumerate(reversed(own), 1):
        batch[-axis] = batch[-axis] or axes
    for axes in (*batch, dims[0][-2], dims[1][-2]):
      spec.append(axes if not taken & set(axes) else ())
      taken |= set(axes)
    return NamedSharding(mesh, _spec(spec))

  def partition(mesh: Mesh, args: Any, result: Any) -> Any:
    operands = named(names, args)
    split = split_of(
      operands,
      _dims(result.sharding, len(result.shape)),
      result.shape,
      operands.x.shape[-1],
      fmt.group_size,
      mesh,
    )

    def part(*values: jax.Array) -> jax.Array:
      out = product(named(names, values), np.dtype(jnp.float32) if split.k else out_dtype)
      if split.scatter:
        axis = out.ndim - (2 if split.scatter == "m" else 1)
        out = lax.psum_scatter(out, split.k, scatter_dimension=axis, tiled=True)
      elif split.k:
        out = lax.psum(out, split.k)
      return out.astype(out_dtype)

    specs = [split.operand_spec(name, a.shape) for name, a in zip(names, args, strict=True)]
    return (
      mesh,
      part,
      NamedSharding(mesh, split.out_spec()),
      tuple(NamedSharding(mesh, spec) for spec in specs),
    )

  whole.def_partition(
    partition=partition,
    infer_sharding_from_operands=infer,
    sharding_rule=lambda mesh, args, result: _rule(names, args, result, fmt),
  )
  return whole


def _rule(names: tuple[str, ...], args: Any, result: Any, fmt: Format) -> SdyShardingRule:
  """Which axes of operands and output go together: m, n, whole groups of k, batch axes.

  An axis k is groups times s numbers, or groups times p packed words; s and p stay whole.
  """
  shapes = [tuple(a.shape) for a in args]
  out_shape = tuple(result[0].shape)
  num_batch = len(out_shape) - 2
  num_groups = shapes[0][-1] // fmt.group_size
  inner = {"x": "s", "w": "p" if "scales" in names else "s"}
  sizes = {"s": fmt.group_size, "p": fmt.group_size // fmt.codes_per_word, "g": num_groups}
  mappings = []
  for operand, (name, shape) in enumerate(zip(names, shapes, strict=True)):
    own = len(shape) - matrix_ndim(name)
    dims: list[str | CompoundFactor] = []
    for axis, size in enumerate(shape[:own], num_batch - own):
      dims.append(f"b{axis}" if size == out_shape[axis] else f"one{operand}{axis}")
    if matrix_ndim(name):
      dims.append("m" if name == "x" else "n")
      dims.append("g" if name == "scales" else CompoundFactor("g", inner[name]))
    if num_groups == 1:  # Shardy has no compound factors of size 1
      dims = [dim[1] if isinstance(dim, CompoundFactor) else dim for dim in dims]
    mappings.append(ArrayMapping(*dims))
  out = ArrayMapping(*(f"b{axis}" for axis in range(num_batch)), "m", "n")
  # Sizes are to be told of the factors that are nowhere an axis of their own.
  flat = [dim for mapping in mappings for dim in mapping]
  compound = {factor for dim in flat if isinstance(dim, CompoundFactor) for factor in dim}
  return SdyShardingRule(
    tuple(mappings),
    (out,),
    need_replication_factors=tuple(dict.fromkeys(inner.values())),
    **{factor: sizes[factor] for factor in compound - set(flat)},
  )
