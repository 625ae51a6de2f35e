"""Everything of JAX that has no public way, each with the reason it is needed."""

from __future__ import annotations

from jax._src import dispatch
from jax.extend.core import Primitive


def needs_devices_to_lower(primitive: Primitive) -> None:
  """Makes JAX tell the lowering of a primitive which devices it is for.

  `jax.experimental.custom_partitioning` reads them there, and JAX passes them on only for
  primitives in this set.
  """
  dispatch.prim_requires_devices_during_lowering.add(primitive)
