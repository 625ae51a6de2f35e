"""Where a result goes, as a caller says: `out_sharding` of `qqmm` and `dot_general`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxqq._compat import ShardingTypeError

OutSharding: TypeAlias = NamedSharding | PartitionSpec | None


def checked_out_sharding(function: str, out_sharding: Any) -> OutSharding:
  if out_sharding is None or isinstance(out_sharding, NamedSharding):
    return out_sharding
  if not isinstance(out_sharding, PartitionSpec):
    raise TypeError(
      f"{function}: out_sharding must be a jax.sharding.NamedSharding, a PartitionSpec or None, "
      f"got {type(out_sharding).__name__}."
    )
  if jax.sharding.get_abstract_mesh().empty:
    raise ValueError(
      f"{function}: out_sharding is {out_sharding}, and no mesh is set for it to be of; set one "
      "with jax.set_mesh, or give a NamedSharding."
    )
  return out_sharding


def produced(
  product: Callable[..., jax.Array], out_sharding: OutSharding, *operands: Any
) -> jax.Array:
  """product(*operands), where out_sharding says.

  On explicit axes it may be what is missing: where types do not tell how the result is split, say
  since both operands are split along what is summed over, XLA is told so.
  """
  try:
    out = product(*operands)
  except ShardingTypeError:
    if out_sharding is None:
      raise
    return told(product, out_sharding, *operands)
  return placed(out, out_sharding)


def told(function: Callable[..., jax.Array], out_sharding: OutSharding, *args: Any) -> jax.Array:
  """function(*args), where out_sharding says; what is within, XLA splits as it would.

  args: arrays, trees of them, or None.
  """
  if out_sharding is None or not (explicit := _mesh_of(out_sharding).explicit_axes):
    return placed(function(*args), out_sharding)
  out: jax.Array = jax.sharding.auto_axes(function, axes=explicit, out_sharding=out_sharding)(*args)
  return out


def placed(out: jax.Array, out_sharding: OutSharding) -> jax.Array:
  if out_sharding is None:
    return out
  if _mesh_of(out_sharding).are_all_axes_auto:
    return lax.with_sharding_constraint(out, out_sharding)
  return jax.sharding.reshard(out, out_sharding)


def _mesh_of(out_sharding: OutSharding) -> Any:
  mesh = getattr(out_sharding, "mesh", None) or jax.sharding.get_abstract_mesh()
  return getattr(mesh, "abstract_mesh", mesh)


@contextlib.contextmanager
def errors_of(function: str) -> Iterator[None]:
  """What the primitive says of types names the function that the user called."""
  try:
    yield
  except ShardingTypeError as error:
    message = str(error)
    if not message.startswith("qqmm: "):
      raise
    raise ShardingTypeError(function + message.removeprefix("qqmm")) from None
