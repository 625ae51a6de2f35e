"""A matrix of a stack of weights, chosen on the device, in w's place: no copy of it is made."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxqq._checks import as_array, describe
from jaxqq._given import Given
from jaxqq._qqmm import checked, is_by_rows
from jaxqq._ragged import as_ragged, ragged_product
from jaxqq._ragged_primitive import Params
from jaxqq._ragged_reference import RaggedOperands
from jaxqq._weight import STACKED_LAYER, StackedLayer

# What a product of one group of rows does not take.
_NOT_TAKEN = ("scales", "global_scale_w", "out_sharding", "recipe", "key")


def product(function: str, given: Given) -> jax.Array:
  """`qqmm` or `quantized_matmul`: all rows of x are those of the layer's group.

  Args:
    function: which it is, for errors.
    given: with x (..., K) or (K,), and the layer in w's place.
  """
  x = as_array(function, "x", given.x)
  operands, params = checked_layer(function, dataclasses.replace(given, x=x))
  out = ragged_product(operands, params, by_rows=is_by_rows(given.global_scale_x))
  return out.reshape(*x.shape[:-1], out.shape[-1])


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
  plain = dataclasses.replace(given, x=rows, w=layer.stack, implementation=None)
  operands, params = checked(function, plain)
  sizes = jnp.full((1,), shape[0], jnp.int32)
  offset = -jnp.int32(layer.index)
  return as_ragged(function, operands, params, sizes, offset, given.implementation)


STACKED_LAYER["product"] = product
