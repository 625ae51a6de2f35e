"""Everything of JAX that has no public way, each with the reason it is needed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax._src import checkify, config, dispatch

# The effect of arrays that kernels write to in place: no public name tells which functions have it.
from jax._src.core import InternalMutableArrayEffect

# What JAX's own operations raise, without a public name.
from jax._src.core import ShardingTypeError as ShardingTypeError

# Makes them values; nothing public does.
from jax._src.state.discharge import discharge_state
from jax.extend.core import Primitive, jaxpr_as_fun


def needs_devices_to_lower(primitive: Primitive) -> None:
  """Makes JAX tell the lowering of a primitive which devices it is for.

  `jax.experimental.custom_partitioning` reads them there, and JAX passes them on only for
  primitives in this set.
  """
  dispatch.prim_requires_devices_during_lowering.add(primitive)


def seen_by_checkify(primitive: Primitive) -> None:
  """Makes `checkify.nan_checks` look at the results of a primitive, as at those of JAX's own.

  The table of what is checked has no public name.
  """
  checkify.error_checks[primitive] = functools.partial(checkify.nan_error_check, primitive)


def device_assignment(sharding: jax.sharding.Sharding) -> tuple[jax.Device, ...]:
  """The devices of a sharding in the order in which XLA numbers them.

  Public is only the set of them; for a collective the order matters.
  """
  return tuple(sharding._device_assignment)


def without_refs(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, its arrays that kernels write to in place made into values.

  Wherever else JAX lowers a function it does that by itself, but `custom_partitioning` refuses it.
  """

  def of_values(*args: Any) -> Any:
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    if any(isinstance(effect, InternalMutableArrayEffect) for effect in traced.effects):
      traced = discharge_state(traced)
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(traced)(*args))

  return of_values


def interprets_kernels() -> bool:
  """Within Pallas's `force_gpu_interpret_mode`, whose state has no public name."""
  return config.pallas_tpu_interpret_mode_context_manager.value is not None


def cuda_compute_capability() -> str | None:
  """That of the device programs are made for: an abstract one, or the GPU at hand; else None."""
  abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  kind = getattr(abstract, "device_kind", None)
  if kind is not None and "cpu" not in kind.lower():
    return "9.0" if any(name in kind for name in ("H100", "H200", "H800", "H20")) else f"a {kind}"
  return _capability_at_hand()


def cuda_sm_count() -> int | None:
  """How many SMs the device has that programs are made for; None where none is at hand.

  An abstract device says so, else the GPU at hand.
  """
  abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  kind = getattr(abstract, "device_kind", None)
  if kind is not None and "cpu" not in kind.lower():
    return getattr(abstract, "num_cores", None)
  return getattr(_gpu_at_hand(), "core_count", None)


def _capability_at_hand() -> str | None:
  """Of this process's first NVIDIA GPU; None where there is none."""
  device = _gpu_at_hand()
  return None if device is None else str(getattr(device, "compute_capability", None))


def _gpu_at_hand() -> Any:
  """This process's first NVIDIA GPU, or None."""
  try:
    return jax.local_devices(backend="cuda")[0]
  except (RuntimeError, IndexError):
    return None


def platform_of_gpus() -> str:
  """What JAX calls "gpu" here: "rocm" with AMD's, else "cuda"."""
  try:
    jax.local_devices(backend="rocm")
  except RuntimeError:
    return "cuda"
  return "rocm"
