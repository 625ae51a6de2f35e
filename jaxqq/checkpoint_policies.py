"""Policies of `jax.checkpoint` that count `qqmm` and `ragged_qqmm` as matrix products.

Those of `jax.checkpoint_policies` that save dots know `dot_general` alone: under them every `qqmm`
is computed once more in the backward pass. Here are the same ones, by the same names, that save its
results too. Those that go by names know the result of every `qqmm`, also in a layer, as "qqmm":
`jax.checkpoint_policies.save_only_these_names("qqmm")`.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxqq import _ragged_reference
from jaxqq._primitive import qqmm_p
from jaxqq._ragged_primitive import ragged_qqmm_p
from jaxqq._recipe_product import recipe_product_p
from jaxqq._reference import unflatten

__all__ = [
  "checkpoint_dots",
  "checkpoint_dots_with_no_batch_dims",
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
]


def dots_saveable(prim: Any, *args: Any, **params: Any) -> Any:
  """Saves the results of matrix products, jaxqq's among them; the rest is computed again.

  Args:
    prim, args, params: what `jax.checkpoint` asks of a policy.

  Returns:
    Whether the result is saved.

  Example:
    >>> @functools.partial(jax.checkpoint, policy=jaxqq.checkpoint_policies.dots_saveable)
    ... def block(x, w):
    ...   return jnp.sin(jaxqq.qqmm(x, w))
    >>> jax.grad(lambda w: block(jnp.ones((2, 64)), w).sum())(jnp.ones((4, 64))).shape
    (4, 64)

  Source: `jax.checkpoint_policies.dots_saveable`.
  """
  return prim in (qqmm_p, recipe_product_p, ragged_qqmm_p) or jax.checkpoint_policies.dots_saveable(
    prim, *args, **params
  )


def dots_with_no_batch_dims_saveable(prim: Any, *args: Any, **params: Any) -> Any:
  """The same of products without batch axes: a `qqmm` by one matrix w, or a `ragged_qqmm`.

  Args:
    prim, args, params: what `jax.checkpoint` asks of a policy.

  Returns:
    Whether the result is saved.

  Example:
    >>> policy = jaxqq.checkpoint_policies.dots_with_no_batch_dims_saveable
    >>> block = jax.checkpoint(lambda x, w: jnp.sin(jaxqq.qqmm(x, w)), policy=policy)
    >>> block(jnp.ones((2, 64)), jnp.ones((4, 64))).shape
    (2, 4)

  Source: `jax.checkpoint_policies.dots_with_no_batch_dims_saveable`.
  """
  if prim in (qqmm_p, recipe_product_p):
    return len(unflatten(params["operands"], args).w.shape) == 2
  if prim is ragged_qqmm_p:
    return len(_ragged_reference.unflatten(params["operands"], args).w.shape) == 3
  return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(prim, *args, **params)


checkpoint_dots = dots_saveable
checkpoint_dots_with_no_batch_dims = dots_with_no_batch_dims_saveable


def __dir__() -> list[str]:
  return list(__all__)
