"""The axes of a contraction put in order, so that it is a batch of matrix products."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxqq._checks import FLOATS, as_array, check_dtype, describe

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AxesOf:
  """What the axes of an operand are, in the order of the product."""

  batch: Axes
  free: Axes
  contracting: Axes

  @staticmethod
  def of(ndim: int, contracting: Axes, batch: Axes) -> AxesOf:
    free = tuple(i for i in range(ndim) if i not in contracting and i not in batch)
    return AxesOf(tuple(batch), free, tuple(contracting))


def as_x(lhs: jax.Array, axes: AxesOf) -> jax.Array:
  """(batch, m, k), or without batch axes (free axes, k): nothing to reshape in a dense layer."""
  k = math.prod(sizes(lhs, axes.contracting))
  free = sizes(lhs, axes.free)
  m = (math.prod(free),) if axes.batch else free
  return _ordered(lhs, axes).reshape(*sizes(lhs, axes.batch), *m, k)


def as_w(rhs: jax.Array, axes: AxesOf) -> tuple[jax.Array, tuple[str, ...]]:
  """(batch, n, k), or (batch, k, n) where it is stored so, and what of it is `Operands.transposed`.

  Kernels of Flax are (k, n), and nothing moves them.
  """
  n, k = (math.prod(sizes(rhs, own)) for own in (axes.free, axes.contracting))
  batch = sizes(rhs, axes.batch)
  if axes.free and (*axes.batch, *axes.contracting, *axes.free) == tuple(range(rhs.ndim)):
    return rhs.reshape(*batch, k, n), ("w",)
  return _ordered(rhs, axes).reshape(*batch, n, k), ()


def _ordered(a: jax.Array, axes: AxesOf) -> jax.Array:
  order = (*axes.batch, *axes.free, *axes.contracting)
  return a if order == tuple(range(a.ndim)) else jnp.transpose(a, order)


def sizes(a: jax.Array, axes: Axes) -> tuple[int, ...]:
  return tuple(a.shape[i] for i in axes)


def rows(lhs: jax.Array, axes: AxesOf) -> tuple[int, ...]:
  return (*sizes(lhs, axes.batch), *sizes(lhs, axes.free))


def operand(function: str, name: str, a: Any) -> jax.Array:
  a = as_array(function, name, a)
  check_dtype(function, name, a, FLOATS)
  return jnp.asarray(a)


def checked_axes(
  function: str, lhs: jax.Array, rhs: Any, dimension_numbers: Any
) -> tuple[AxesOf, AxesOf]:
  """The axes of both operands, contracted ones in the order that they have in lhs."""
  try:
    pairs = [[tuple(map(int, own)) for own in both] for both in dimension_numbers]
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = pairs
  except (TypeError, ValueError):
    raise ValueError(
      f"{function}: dimension_numbers must be ((lhs contracting, rhs contracting), (lhs batch, rhs "
      f"batch)), four sequences of axes, got {dimension_numbers!r}."
    ) from None
  for name, a, own in (
    ("lhs", lhs, lhs_contracting + lhs_batch),
    ("rhs", rhs, rhs_contracting + rhs_batch),
  ):
    if len(set(own)) != len(own) or not all(0 <= i < a.ndim for i in own):
      raise ValueError(
        f"{function}: the axes {own} of {name} must be different ones between 0 and {a.ndim - 1}, "
        f"got dimension_numbers {dimension_numbers!r} with {name} {describe(a)}."
      )
  for name, of_lhs, of_rhs in (
    ("contracting", lhs_contracting, rhs_contracting),
    ("batch", lhs_batch, rhs_batch),
  ):
    if sizes(lhs, of_lhs) != sizes(rhs, of_rhs):
      raise ValueError(
        f"{function}: the {name} axes must have the same sizes, got {sizes(lhs, of_lhs)} of lhs "
        f"({describe(lhs)}, axes {of_lhs}) and {sizes(rhs, of_rhs)} of rhs ({describe(rhs)}, axes "
        f"{of_rhs})."
      )
  in_order = sorted(zip(lhs_contracting, rhs_contracting, strict=True))
  lhs_contracting, rhs_contracting = (tuple(pair[i] for pair in in_order) for i in (0, 1))
  return (
    AxesOf.of(lhs.ndim, lhs_contracting, lhs_batch),
    AxesOf.of(rhs.ndim, rhs_contracting, rhs_batch),
  )
