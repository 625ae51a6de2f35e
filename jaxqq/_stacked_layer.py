"""A matrix of a stack of weights, chosen on the device, in w's place: no copy of it is made."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from jaxqq._checks import as_array, describe
from jaxqq._given import Given
from jaxqq._qqmm import checked, is_by_rows, placed_product
from jaxqq._ragged import as_ragged, ragged_product
from jaxqq._ragged_primitive import Params
from jaxqq._ragged_reference import RaggedOperands, unflatten
from jaxqq._split import dims_of, to_spec
from jaxqq._weight import STACKED_LAYER, StackedLayer

# What a product of one group of rows does not take.
_NOT_TAKEN = ("scales", "global_scale_w", "recipe", "key")


def product(function: str, given: Given) -> jax.Array:
  """`qqmm` or `quantized_matmul`: all rows of x are those of the layer's group.

  Args:
    function: which it is, for errors.
    given: with x (..., K) or (K,), and the layer in w's place.
  """
  x = jnp.asarray(as_array(function, "x", given.x))
  order = _order_of_axes(x)
  ordered = x.transpose(order)
  operands, params = checked_layer(function, dataclasses.replace(given, x=ordered))

  def multiply(operands: RaggedOperands, params: Params) -> jax.Array:
    out = ragged_product(operands, params, by_rows=is_by_rows(given.global_scale_x))
    return _with_leading_axes(out, ordered).transpose(np.argsort(order))

  return placed_product(function, operands, params, given.out_sharding, multiply, unflatten)


def _order_of_axes(x: jax.Array) -> list[int]:
  """In which they are made rows: on explicit axes the first ones must be those that are split."""
  sharding = jax.typeof(x).sharding
  if not sharding.mesh.explicit_axes:
    return list(range(x.ndim))
  axes, split = list(range(x.ndim)), dims_of(sharding, x.ndim)
  return sorted(axes[:-1], key=lambda axis: not split[axis]) + axes[-1:]


def _with_leading_axes(out: jax.Array, x: jax.Array) -> jax.Array:
  """Rows (M, N) as (..., N), with the leading axes of x; on explicit axes split as they are."""
  shape, sharding = (*x.shape[:-1], out.shape[-1]), jax.typeof(out).sharding
  if not sharding.mesh.explicit_axes:
    return out.reshape(shape)
  leading = dims_of(jax.typeof(x).sharding, x.ndim)[:-1]
  spec = to_spec([*leading, dims_of(sharding, out.ndim)[-1]])
  return lax.reshape(out, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def checked_layer(function: str, given: Given) -> tuple[RaggedOperands, Params]:
  """As `checked_ragged`: one group, whose place among the matrices is the layer's index."""
  layer: StackedLayer = given.w
  names = {name: name for name in _NOT_TAKEN} | {"global_scale_w": given.name_of_scale}
  for attribute, name in names.items():
    if getattr(given, attribute) is not None:
      raise ValueError(
        f"{function}: {name} was given, and w is {layer!r}, whose product does not take it; leave "
        f"{name} out, or pass the matrix itself, stack[i]."
      )
  x = as_array(function, "x", given.x)
  if not x.shape:
    raise ValueError(
      f"{function}: x must have at least one dimension, (..., K), got {describe(x)}."
    )
  shape = math.prod(x.shape[:-1]), x.shape[-1]
  is_shape = isinstance(x, jax.ShapeDtypeStruct)
  rows = jax.ShapeDtypeStruct(shape, x.dtype) if is_shape else jnp.asarray(x).reshape(shape)
  plain = dataclasses.replace(given, x=rows, w=layer.stack, implementation=None, out_sharding=None)
  operands, params = checked(function, plain)
  sizes = jnp.full((1,), shape[0], jnp.int32)
  offset = -jnp.int32(layer.index)
  return as_ragged(function, operands, params, sizes, offset, given.implementation)


STACKED_LAYER["product"] = product
