"""How one ragged product is split over a mesh: the rule, and the same told to XLA's partitioner.

- Matrices may be split between groups, as experts are: each device multiplies the rows of its own
  groups, and the results, zeros for the rows of others, are summed.
- n and k are split as for the plain product: as the output is, or, along the axis that is summed
  over, between groups of a format. Then float32 parts are summed before they are rounded.
- Rows may be split too: a device then has the sizes of its part of each group.
- A sum is scattered where the output is split along the same mesh axis: tokens that are split over
  the devices of the experts are gathered, and their results scattered.

No part of w moves but along an axis of the mesh that the output needs otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule
from jax.sharding import Mesh, PartitionSpec

from jaxqq._formats import Format
from jaxqq._ragged_reference import NUM_AXES, RaggedOperands, unflatten
from jaxqq._sharding import Partition, split_by_xla
from jaxqq._split import Axes, dims_of, dims_of_spec, named_sharding, to_spec, words

# What a product of one device is: operands, the matrices that it has, the dtype of its result.
Product = Callable[[RaggedOperands, int, np.dtype], jax.Array]
OF_GROUPS = {"scales": "gnk", "row_scales": "gn", "global_scale_x": "g", "global_scale_w": "g"}


@dataclasses.dataclass(frozen=True)
class Layout:
  """The axes of every array of a product, by dims: g matrices, m rows, n and k."""

  operands: Mapping[str, str]
  out: str
  contracted: str
  units: Mapping[str, int]  # how many numbers along an axis no split may part
  whole: str = ""  # dims that may not be split
  batch: str = ""  # batch axes of the output, its first dims: capital letters

  def of(self, name: str, shape: Sequence[int], groups: int) -> str:
    """Those of an operand; a dot for an axis of none of them, such as one scale for all groups."""
    count = len(shape) - NUM_AXES[name]
    own = self.batch[len(self.batch) - count :]
    batch = "".join("." if size == 1 else dim for dim, size in zip(own, shape, strict=False))
    dims = self.operands.get(name, "." * NUM_AXES[name])
    return batch + ("." if dims == "g" and tuple(shape[count:]) != (groups,) else dims)

  def unit(self, dim: str) -> int:
    return self.units.get(dim, 1)


def layout_of(contracted: str, fmt: Format, *, quantize: bool, has_w_hat: bool) -> Layout:
  """has_w_hat: whether w is quantized along k, packed or in the product."""
  group = fmt.group_size
  if contracted == "k":
    units = {"k": group if quantize or has_w_hat else 1}
    return Layout({"x": "mk", "w": "gnk", **OF_GROUPS}, "mn", "k", units)
  if contracted == "n":
    units = {"n": group if quantize else 1, "k": group if has_w_hat else 1}
    return Layout({"x": "mn", "w": "gnk", **OF_GROUPS}, "mk", "n", units)
  # Groups of rows that are quantized together begin where those of a matrix do.
  whole = "m" if quantize else ""
  return Layout({"x": "mn", "y": "mk", **OF_GROUPS}, "gnk", "m", {}, whole)


@dataclasses.dataclass(frozen=True)
class Split:
  """The mesh axes that each dim is split over while products are computed, and the output after."""

  dims: Mapping[str, Axes]
  out: tuple[Axes, ...]
  scattered: tuple[int, Axes] | None  # an axis of the output, and over what sums are scattered
  summed: Axes  # over what they are summed besides

  def specs(
    self, names: Sequence[str], shapes: Sequence[Any], layout: Layout, groups: int
  ) -> tuple[PartitionSpec, ...]:
    """Where each operand must be before the product of parts."""
    each = (layout.of(name, a.shape, groups) for name, a in zip(names, shapes, strict=True))
    return tuple(to_spec([self.dims.get(dim, ()) for dim in dims]) for dims in each)


def split_of(
  names: Sequence[str],
  shapes: Sequence[Any],  # with shardings
  out_dims: Sequence[Axes],
  out_shape: Sequence[int],
  layout: Layout,
  groups: int,
  mesh_shape: Mapping[str, int],
) -> Split:
  """The split of a product whose operands and output the partitioner would like split so."""
  sizes = dict(zip(layout.out, out_shape, strict=True)) | {"g": groups}
  asked: dict[str, list[Axes]] = {}
  for name, a in zip(names, shapes, strict=True):
    own = layout.of(name, a.shape, groups)
    for dim, axes, size in zip(own, dims_of(a.sharding, len(a.shape)), a.shape, strict=True):
      if name in ("x", "y", "w"):
        asked.setdefault(dim, []).append(axes)
        if name == "x":  # of w, packed axes are shorter
          sizes[dim] = size
  taken: set[str] = set()

  def taking(axes: Axes, dim: str) -> Axes:
    ways = math.prod(mesh_shape[axis] for axis in axes) * layout.unit(dim)
    fits = dim not in layout.whole and sizes[dim] % ways == 0 and taken.isdisjoint(axes)
    taken.update(axes if fits else ())
    return axes if fits else ()

  dims: dict[str, Axes] = {}
  of_groups: Axes = ()
  if "g" not in layout.out:
    of_groups = dims["g"] = taking(asked["g"][0], "g")
  given = {axes for axes in asked[layout.contracted] if axes}
  dims[layout.contracted] = taking(given.pop(), layout.contracted) if len(given) == 1 else ()
  summed = (*of_groups, *dims[layout.contracted])
  out: list[Axes] = []
  scattered: tuple[int, Axes] | None = None
  for i, (dim, axes) in enumerate(zip(layout.out, out_dims, strict=True)):
    over = tuple(axis for axis in axes if axis in summed)
    before = axes[: len(axes) - len(over)]
    if not over:
      before = after = taking(axes, dim)
    elif scattered is None and (*before, *over) == axes and _divides(axes, dim, sizes, mesh_shape):
      before = taking(before, dim)
      after, scattered = (*before, *over), (i, over)
    else:
      before = after = ()  # every device gets the whole sum, and XLA takes what is wanted where
    dims[dim] = before
    out.append(after)
  rest = tuple(axis for axis in summed if scattered is None or axis not in scattered[1])
  return Split(dims, tuple(out), scattered, rest)


def _divides(axes: Axes, dim: str, sizes: Mapping[str, int], mesh_shape: Mapping[str, int]) -> bool:
  return sizes[dim] % math.prod(mesh_shape[axis] for axis in axes) == 0


def part_of(
  split: Split, product: Product, names: tuple[str, ...], layout: Layout, groups: int, rows: int,
  out_dtype: np.dtype, mesh_shape: Mapping[str, int],
) -> Callable[..., jax.Array]:  # fmt: skip
  """What each device computes."""

  def ways(dim: str) -> int:
    return math.prod(mesh_shape[axis] for axis in split.dims.get(dim, ()))

  def part(*values: jax.Array) -> jax.Array:
    ops = unflatten(names, values)
    sizes, offset = ops.group_sizes, ops.group_offset
    if over := split.dims.get("m"):
      sizes = sizes_of_part(sizes, rows, lax.axis_index(over), ways("m"))
    own = groups // ways("g")
    if over := split.dims.get("g"):
      offset = offset + lax.axis_index(over) * own
    ops = dataclasses.replace(ops, group_sizes=sizes, group_offset=offset)
    # Of a row that is one device's alone, a sum with zeros is exact in any dtype.
    sums = np.dtype(jnp.float32) if split.dims[layout.contracted] else out_dtype
    out = product(ops, own, sums)
    if split.scattered is not None:
      axis, over = split.scattered
      out = lax.psum_scatter(out, over, scatter_dimension=axis, tiled=True)
    if split.summed:
      out = lax.psum(out, split.summed)
    return out.astype(out_dtype)

  return part


def sizes_of_part(sizes: jax.Array, rows: int, index: Any, parts: int) -> jax.Array:
  """How many rows of each group are in one of so many equal parts of all rows."""
  count = rows // parts
  running = lax.associative_scan(jnp.add, jnp.clip(sizes, 0, rows), axis=sizes.ndim - 1)
  ends = jnp.clip(jnp.minimum(running, rows) - index * count, 0, count)
  return ends - jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends[..., :-1]], axis=-1)


def described(ops: RaggedOperands, layout: Layout, groups: int) -> tuple[RaggedOperands, list[str]]:
  """What one device multiplies of a product of rows with w: shapes, and a sentence about it.

  As far as it can be seen from the operands, if nothing else is asked of the output.
  """
  pairs = [(a, named_sharding(a)) for a in ops.flatten()]
  typed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=own) for a, own in pairs]
  mesh_shape = next((dict(s.mesh.shape) for _, s in pairs if s is not None and s.mesh.size > 1), {})
  out_shape = (ops.x.shape[0], ops.w.shape[1])
  wanted = _propagated(ops.names, typed, layout, groups)
  split = split_of(ops.names, typed, wanted, out_shape, layout, groups, mesh_shape)
  parts = []
  for a, spec in zip(typed, split.specs(ops.names, typed, layout, groups), strict=True):
    ways = (math.prod(mesh_shape[axis] for axis in axes) for axes in dims_of_spec(tuple(spec)))
    local = tuple(size // way for size, way in zip(a.shape, ways, strict=True))
    parts.append(jax.ShapeDtypeStruct(local, a.dtype))
  own = unflatten(ops.names, parts)
  if not mesh_shape:
    return own, []
  sentence = (
    f"Split over {math.prod(mesh_shape.values())} devices ({mesh_shape}): each multiplies x "
    f"{own.x.shape} with w {own.w.shape}"
  )
  if summed := (*split.summed, *(split.scattered[1] if split.scattered else ())):
    sentence += f", and results are summed over {words(summed)}"
  return own, [f"{sentence}."]


def partitioned(
  product: Product,
  names: tuple[str, ...],
  layout: Layout,
  groups: int,
  rows: int,
  out_dtype: np.dtype,
  label: str,
) -> Callable[..., jax.Array]:
  """`product` as a function of its operands, without batch axes, that XLA splits by the rule."""

  def whole(*values: jax.Array) -> jax.Array:
    return product(unflatten(names, values), groups, out_dtype)

  def infer(args: Any, result: Any) -> PartitionSpec:
    return to_spec(_propagated(names, args, layout, groups))

  def partition(mesh: Mesh, args: Any, result: Any) -> Partition:
    mesh_shape = dict(mesh.shape)
    wanted = dims_of(result.sharding, len(result.shape))
    split = split_of(names, args, wanted, result.shape, layout, groups, mesh_shape)
    part = part_of(split, product, names, layout, groups, rows, out_dtype, mesh_shape)
    return Partition(part, split.specs(names, args, layout, groups), to_spec(split.out))

  def rule(args: Any, results: Any) -> SdyShardingRule:
    return _rule(names, args, results[0], layout, groups)

  return split_by_xla(whole, infer, partition, rule, label)


def _propagated(
  names: Sequence[str], shapes: Sequence[Any], layout: Layout, groups: int
) -> list[Axes]:
  """How the output is split if nobody asks for anything else: as the operands are."""
  found: dict[str, Axes] = {}
  for name, a in zip(names, shapes, strict=True):
    own = layout.of(name, a.shape, groups)
    for dim, axes in zip(own, dims_of(a.sharding, len(a.shape)), strict=True):
      if name in ("x", "y", "w"):
        found[dim] = found.get(dim) or axes
  taken: set[str] = set() if "g" in layout.out else set(found.get("g", ()))
  out = []
  for dim in layout.out:
    axes = found.get(dim, ())
    axes = axes if taken.isdisjoint(axes) else ()
    taken |= set(axes)
    out.append(axes)
  return out


def _rule(
  names: Sequence[str], args: Any, result: Any, layout: Layout, groups: int
) -> SdyShardingRule:
  """Which axes of operands and output go together.

  An axis in units, say k in groups, is k units times so many numbers, packed words or scales; those
  stay whole.
  """
  sizes = dict(zip(layout.out, result.shape, strict=True)) | {"g": groups}
  x = args[names.index("x")]
  sizes |= dict(zip(layout.operands["x"], x.shape, strict=True))
  # An axis that is no multiple of its unit is one unit.
  count = {d: n // layout.unit(d) if n % layout.unit(d) == 0 else 1 for d, n in sizes.items()}
  inner: dict[str, int] = {}

  def factor(dim: str, size: int, own: str) -> str | CompoundFactor:
    if dim == ".":
      return own
    if layout.unit(dim) == 1 or size == count[dim] != 1:
      return dim
    name = f"{dim}{size // count[dim]}"
    inner[name] = size // count[dim]
    # Shardy has no compound factors of size 1.
    return name if count[dim] == 1 else CompoundFactor(dim, name)

  def mapping(dims: str, shape: Sequence[int], own: str) -> list[str | CompoundFactor]:
    each = enumerate(zip(dims, shape, strict=True))
    return [factor(dim, size, f"{own}{i}") for i, (dim, size) in each]

  operands = [
    mapping(layout.of(name, a.shape, groups), a.shape, f"own{i}")
    for i, (name, a) in enumerate(zip(names, args, strict=True))
  ]
  out = mapping(layout.out, result.shape, "out")
  # Sizes are to be told of the factors that are nowhere an axis of their own.
  flat = [one for axes in (*operands, out) for one in axes]
  compound = {name for one in flat if isinstance(one, CompoundFactor) for name in one}
  told: Any = {name: inner.get(name, count.get(name, 1)) for name in compound - set(flat)}
  mappings = tuple(ArrayMapping(*axes) for axes in operands)
  replicated = tuple(inner)
  return SdyShardingRule(
    mappings, (ArrayMapping(*out),), need_replication_factors=replicated, **told
  )
