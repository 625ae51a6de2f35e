"""What a traced program is made of."""

from __future__ import annotations

import jax.extend.core


def count(jaxpr, name: str) -> int:
  """How often a primitive is in a jaxpr, and in the jaxprs in it."""
  inner = [sub for eqn in jaxpr.eqns for sub in jax.extend.core.jaxprs_in_params(eqn.params)]
  here = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
  return here + sum(count(sub, name) for sub in inner)
