"""A matrix of a stack of weights, chosen on the device, in w's place: no copy of it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxqq._checks import as_array, describe
from jaxqq._qqmm import checked, is_by_rows
from jaxqq._ragged import as_ragged, ragged_product
from jaxqq._ragged_primitive import Params
from jaxqq._ragged_reference import RaggedOperands
from jaxqq._weight import STACKED_LAYER, StackedLayer

# What a product of one group of rows does not take.
_NOT_TAKEN = ("scales", "global_scale_w", "out_sharding", "recipe", "key")


def product(function: str, x: Any, layer: StackedLayer, given: Mapping[str, Any]) -> jax.Array:
  """`qqmm` or `quantized_matmul`: all rows of x are those of the layer's group.

  Args:
    function: which it is, for errors.
    x: (..., K) or (K,).
    layer: in w's place.
    given: the other arguments of the function, by their names.
  """
  x = as_array(function, "x", x)
  quantizes = function == "qqmm"
  operands, params = checked_layer(function, x, layer, given, quantize_input=quantizes)
  out = ragged_product(operands, params, by_rows=is_by_rows(given.get("global_scale_x")))
  return out.reshape(*x.shape[:-1], out.shape[-1])


def checked_layer(
  function: str,
  x: Any,
  layer: StackedLayer,
  given: Mapping[str, Any],
  *,
  quantize_input: bool,
) -> tuple[RaggedOperands, Params]:
  """As `checked_ragged`: one group, whose place among the matrices is the layer's index."""
  for name in _NOT_TAKEN:
    if given.get(name) is not None:
      raise ValueError(
        f"{function}: {name} was given, and w is {layer!r}, whose product does not take it; leave "
        f"{name} out, or pass the matrix itself, stack[i]."
      )
  x = as_array(function, "x", x)
  if not x.shape:
    raise ValueError(
      f"{function}: x must have at least one dimension, (..., K), got {describe(x)}."
    )
  shape = math.prod(x.shape[:-1]), x.shape[-1]
  is_shape = isinstance(x, jax.ShapeDtypeStruct)
  rows = jax.ShapeDtypeStruct(shape, x.dtype) if is_shape else jnp.asarray(x).reshape(shape)
  operands, params = checked(
    function,
    rows,
    layer.stack,
    None,
    given["group_size"],
    given["bits"],
    given["mode"],
    given.get("global_scale_x"),
    None,
    given.get("backward", "straight_through"),
    given["precision"],
    given["preferred_element_type"],
    None,
    quantize_input,
  )
  sizes = jnp.full((1,), shape[0], jnp.int32)
  offset = -jnp.int32(layer.index)
  return as_ragged(function, operands, params, sizes, offset, given.get("implementation"))


STACKED_LAYER["product"] = product
