"""How the product is split over devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxqq._reference import Operands


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
