"""How one product is split over a mesh: the rule, on shapes and names of mesh axes alone.

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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxqq._formats import Format
from jaxqq._reference import TRANSPOSED, Operands, matrix_ndim, unflatten

Axes = tuple[str, ...]  # mesh axes that one axis of an array is split over


@dataclasses.dataclass(frozen=True)
class Layout:
  """The last axes of every array of a product, by dims; arrays by their names."""

  operands: Mapping[str, str]
  out: str
  contracted: str
  units: Mapping[str, int]  # how many numbers along an axis no split may part

  def unit(self, dim: str) -> int:
    return self.units.get(dim, 1)

  def axis(self, name: str, dim: str) -> int:
    """That of an operand, counted from the last one, which is -1."""
    return self.operands[name].index(dim) - 2


def forward(fmt: Format | None) -> Layout:
  """out[m, n] = sum_k x[m, k] * w[n, k], in groups along k; without a format, in none."""
  dims = {"x": "mk", "w": "nk", "scales": "nk", "row_scales": "n"}
  dims |= {name + TRANSPOSED: dims[name][::-1] for name in ("x", "w")}
  return Layout(dims, "mn", "k", {"k": fmt.group_size} if fmt else {})


def pullback(fmt: Format, *, quantized: bool) -> Layout:
  """out[m, k] = sum_n x[m, n] * w[n, k], w packed along k; `quantized` anew, also along n."""
  units = {"k": fmt.group_size, "n": fmt.group_size if quantized else 1}
  return Layout({"x": "mn", "w": "nk", "scales": "nk", "row_scales": "n"}, "mk", "n", units)


@dataclasses.dataclass(frozen=True)
class Split:
  """How one product is split."""

  out: tuple[Axes, ...]  # batch axes, rows, columns
  contracted: Axes
  scatter: int | None  # the axis of the output that partial sums are scattered along
  cuts_group: bool  # the contracted axis was split, but inside of a group, and is gathered

  def out_spec(self) -> PartitionSpec:
    return to_spec(self.out)

  def operand_specs(
    self, names: Sequence[str], shapes: Sequence[Any], layout: Layout
  ) -> tuple[PartitionSpec, ...]:
    """Where each operand must be before the product of parts."""
    before = list(self.out)  # before scattering
    if self.scatter is not None:
      before[self.scatter] = before[self.scatter][: -len(self.contracted)]
    *batch, row, column = before
    by_dim = {layout.out[0]: row, layout.out[1]: column, layout.contracted: self.contracted}
    specs = []
    for name, a in zip(names, shapes, strict=True):
      num_batch = len(a.shape) - matrix_ndim(name)
      own = batch[len(batch) - num_batch :]
      dims = [axes if size > 1 else () for axes, size in zip(own, a.shape[:num_batch], strict=True)]
      if matrix_ndim(name):
        dims += [by_dim[dim] for dim in layout.operands[name]]
      specs.append(to_spec(dims))
    return tuple(specs)

  def part(
    self,
    product: Callable[[Operands, np.dtype], jax.Array],
    names: tuple[str, ...],
    out_dtype: np.dtype,
  ) -> Callable[..., jax.Array]:
    """What each device computes."""

    def part(*values: jax.Array) -> jax.Array:
      dtype = np.dtype(jnp.float32) if self.contracted else out_dtype
      out = product(unflatten(names, values), dtype)
      if self.scatter is not None:
        out = lax.psum_scatter(out, self.contracted, scatter_dimension=self.scatter, tiled=True)
      elif self.contracted:
        out = lax.psum(out, self.contracted)
      return out.astype(out_dtype)

    return part


def to_spec(dims: Sequence[Axes]) -> PartitionSpec:
  return PartitionSpec(*(axes or None for axes in dims))


def dims_of_spec(spec: Sequence[Any]) -> list[Axes]:
  """What is left to XLA, `PartitionSpec.UNCONSTRAINED`, counts as not split."""
  open_ends = (None, PartitionSpec.UNCONSTRAINED)
  return [
    () if axes in open_ends else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec
  ]


def dims_of(sharding: Any, ndim: int) -> list[Axes]:
  """The mesh axes of each array axis; without a mesh, as constants come, none."""
  spec = getattr(sharding, "spec", None)
  if spec is None:
    return [()] * ndim
  return dims_of_spec(tuple(spec) + (None,) * (ndim - len(spec)))


def split_of(
  operands: Operands,  # of shapes with shardings
  layout: Layout,
  out_dims: list[Axes],
  out_shape: Sequence[int],
  mesh_shape: Mapping[str, int],
) -> Split:
  """The split of a product whose operands and output the partitioner would like split so."""

  def fits(axes: Axes, size: int, unit: int) -> bool:
    return size % (math.prod(mesh_shape[axis] for axis in axes) * unit) == 0

  units = [1] * (len(out_shape) - 2) + [layout.unit(dim) for dim in layout.out]
  out = [
    axes if fits(axes, size, unit) else ()
    for axes, size, unit in zip(out_dims, out_shape, units, strict=True)
  ]
  axis_of_x, axis_of_w = (layout.axis(name, layout.contracted) for name in operands.names[:2])
  of_x = dims_of(operands.x.sharding, len(operands.x.shape))[axis_of_x]
  of_w = dims_of(operands.w.sharding, len(operands.w.shape))[axis_of_w]
  contracted = () if of_x and of_w and of_x != of_w else of_x or of_w
  unit = layout.unit(layout.contracted)
  cuts_group = bool(contracted) and not fits(contracted, operands.x.shape[axis_of_x], unit)
  if cuts_group:
    contracted = ()
  taken = {axis for axes in out for axis in axes}
  if not taken & set(contracted):
    return Split(tuple(out), contracted, None, cuts_group)
  if of_x != of_w:  # one operand is gathered, and the other not split: nothing to sum
    return Split(tuple(out), (), None, cuts_group)
  for axis, axes in enumerate(out):
    rest = axes[: -len(contracted)]
    if (*rest, *contracted) == axes and set(contracted).isdisjoint(taken - set(axes)):
      return Split(tuple(out), contracted, axis, cuts_group)
  # Every device gets the whole sum, and XLA takes from it what is wanted where.
  out = [axes if set(axes).isdisjoint(contracted) else () for axes in out]
  return Split(tuple(out), contracted, None, cuts_group)


def described(operands: Operands, fmt: Format) -> tuple[Operands, bool, list[str]]:
  """What one device multiplies: shapes, whether parts are summed, and sentences about it.

  As far as it can be seen from the operands, if nothing else is asked of the output.
  """
  shardings = [named_sharding(a) for a in operands.flatten()]
  meshes = [s.mesh for s in shardings if s is not None and s.mesh.size > 1]
  if not meshes:
    return operands, False, []
  shape = dict(meshes[0].shape)
  typed = unflatten(
    operands.names,
    [
      jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
      for a, s in zip(operands.flatten(), shardings, strict=True)
    ],
  )
  layout = forward(fmt)
  out_shape = (*operands.batch_shape, operands.m, operands.n)
  split = split_of(typed, layout, propagated(typed, layout), out_shape, shape)
  parts = []
  for a, spec in zip(
    typed.flatten(), split.operand_specs(typed.names, typed.flatten(), layout), strict=True
  ):
    ways = [math.prod(shape[axis] for axis in axes) for axes in dims_of_spec(tuple(spec))]
    local = tuple(size // way for size, way in zip(a.shape, ways, strict=True))
    parts.append(jax.ShapeDtypeStruct(local, a.dtype))
  own = unflatten(operands.names, parts)
  sentence = (
    f"Split over {math.prod(shape.values())} devices ({shape}): each multiplies x "
    f"{own.x.shape} with w {own.w.shape}"
  )
  if split.contracted:
    sentence += f", and float32 parts are summed over {words(split.contracted)}"
  sentences = [f"{sentence}."]
  if split.cuts_group:
    over = dims_of(typed.x.sharding, len(typed.x.shape))[-1]
    over = over or dims_of(typed.w.sharding, len(typed.w.shape))[-1]
    sentences.append(
      f"K = {operands.x.shape[-1]} is split over {words(over)}, which would cut a group of "
      f"{fmt.group_size}: it is gathered."
    )
  return own, bool(split.contracted), sentences


def words(axes: Axes) -> str:
  return " and ".join(repr(axis) for axis in axes)


def named_sharding(a: Any) -> NamedSharding | None:
  """That of an array, a shape, or a tracer in a mesh of explicit axes."""
  sharding = jax.typeof(a).sharding if isinstance(a, jax.core.Tracer) else None
  sharding = sharding or getattr(a, "sharding", None)
  return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def propagated(operands: Operands, layout: Layout) -> list[Axes]:
  """How the output is split if nobody asks for anything else: as the operands are."""
  ndim = len(operands.batch_shape)
  dims: list[Axes] = [()] * ndim
  for a, shape in zip(operands.flatten(), operands.batch_shapes, strict=True):
    for axis, axes in enumerate(dims_of(a.sharding, len(a.shape))[: len(shape)]):
      at = axis + ndim - len(shape)
      dims[at] = dims[at] or axes
  matrices = zip(operands.names, (operands.x, operands.w), layout.out, strict=False)
  for name, a, dim in matrices:
    dims.append(dims_of(a.sharding, len(a.shape))[layout.axis(name, dim)])
  taken: set[str] = set()
  for axis, axes in enumerate(dims):
    dims[axis] = axes if taken.isdisjoint(axes) else ()
    taken |= set(axes)
  return dims
