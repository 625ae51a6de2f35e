"""`load_into`: the tensors of a checkpoint put where a model of Flax has its own."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxqq.checkpoint._checkpoint import Tensor
from jaxqq.checkpoint._load import FP8, Affine, Experts, Placement, load

FUNCTION = "load_into"
# What "X.weight" of a file is called in Flax.
WEIGHT_NAMES = ("kernel", "embedding", "scale")

Names = Mapping[str, str | None] | Callable[[str], str | None] | None


class NoPlaceError(Exception):
  """Why a tensor cannot go to where it should, as a clause."""


class Destination(Protocol):
  """A model that tensors are put into. Nothing is changed before `finish`."""

  def put(self, name: str, where: str, value: Tensor) -> None:
    """Takes note of the tensor of a name, or raises `NoPlaceError`."""

  def missing(self) -> list[str]:
    """The parameters that nothing was put into."""

  def finish(self, move: bool) -> Any:
    """The model with all that was put.

    move: whether arrays go to where those of the model are.
    """


def load_into(
  model: Any,
  path: str | os.PathLike[str],
  *,
  names: Names = None,
  only: str | Iterable[str] | None = None,
  partial: bool = False,
  dtype: DTypeLike | None = None,
  device: Placement | Callable[[str, tuple[int, ...]], Placement] = None,
  fp8: FP8 = "dequantize",
  affine: Affine = "refuse",
  experts: Experts = None,
  quantize_input: bool | None = None,
  progress: bool = True,
) -> Any:
  """Loads a quantized checkpoint into a model of Flax, NNX or Linen.

  A weight X.weight that is a `QuantizedWeight` becomes the packed kernel of layer X: in NNX an
  nnx.Linear, nnx.LinearGeneral or nnx.Einsum is replaced by the layer of `jaxqq.nn` that multiplies
  by it, in Linen the kernel is the `QuantizedWeight`, for `jaxqq.nn.quantized_apply`. One that is
  not quantized, (N, K) as PyTorch and MLX have it, is transposed to the kernel's axes. Every other
  tensor has the shape of its parameter and is cast to its dtype.

  Everything is read and checked before the model is changed: after an error it is as it was.

  Args:
    model: an nnx.Module, also one of `nnx.eval_shape`, which is changed; or parameters of Linen, a
      tree of dicts as `model.init(...)["params"]` or the `jax.eval_shape` of it.
    path, dtype, fp8, affine, experts, quantize_input, progress: as for `load`. A layer multiplies
      its inputs as its weight says, quantized or as they are.
    names: the path in the model of each tensor of the checkpoint, "layers.0.up.weight" for example:
      a function, or a dict of those that differ. None for a name leaves the tensor out. A last
      "weight" means kernel, embedding or scale, whichever the layer has.
    only: as for `load`.
    partial: whether parameters of the model may be left as they are, as those of adapters.
    device: as for `load`; None puts each array that is not packed where the model's own is.

  Returns:
    model, or the new tree of parameters.

  Raises:
    FileNotFoundError, ValueError, TypeError: as for `load`.
    ValueError: a tensor has no place in the model, another shape than there, or the place of
      another one; a parameter gets none, and partial is not set.
    TypeError: model or names is not as above.

  Example:
    >>> import tempfile
    >>> weight = jaxqq.quantize_weight(jnp.ones((32, 64)), mode="mxfp8")
    >>> tensors = {"model.up.weight": weight, "model.up.bias": jnp.ones(32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   checkpoint.save(folder, tensors, format="mlx")
    ...   model = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0))))
    ...   rename = lambda name: name.replace("model.up", "layers.0")
    ...   checkpoint.load_into(model, folder, names=rename)(jnp.ones((2, 64))).shape
    (2, 32)

  Source: `flax.nnx.Linear`, `flax.linen.Dense`; as for `load`.
  """
  destination = _destination(model)
  renamed = _renaming(names)
  options = {"fp8": fp8, "affine": affine, "experts": experts, "progress": progress}
  options["quantize_input"] = quantize_input
  tensors = load(path, only=only, dtype=dtype, device=device, **options)  # type: ignore[arg-type]
  for name, value in tensors.items():
    where = renamed(name)
    if where is None:
      continue
    try:
      destination.put(name, where, value)
    except NoPlaceError as reason:
      raise ValueError(
        f"{FUNCTION}: {name!r} of {path} cannot go to {where!r} of the model: {reason}; give it "
        "another name by names, or None to leave it out."
      ) from None
  missing = destination.missing()
  if missing and not partial:
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise ValueError(
      f"{FUNCTION}: every parameter of the model must be in {path}, found nothing for "
      f"{missing[0]!r}{others}; partial=True leaves them as they are."
    )
  return destination.finish(move=device is None)


def _destination(model: Any) -> Destination:
  from jaxqq.checkpoint import _into_linen, _into_nnx  # they need flax, an extra

  if _into_nnx.is_module(model):  # nnx.Dict is a Mapping too
    return _into_nnx.NnxDestination(model)
  if isinstance(model, Mapping):
    return _into_linen.LinenDestination(model)
  raise TypeError(
    f"{FUNCTION}: model must be an nnx.Module, or parameters of Flax Linen as a tree of dicts, got "
    f"{type(model).__name__}."
  )


def _renaming(names: Any) -> Callable[[str], str | None]:
  if not (names is None or callable(names) or isinstance(names, Mapping)):
    raise TypeError(
      f"{FUNCTION}: names must be a function or a dict of names to paths, got "
      f"{type(names).__name__}."
    )

  def renamed(name: str) -> str | None:
    if names is None:
      return name
    where = names.get(name, name) if isinstance(names, Mapping) else names(name)
    if not (where is None or isinstance(where, str)):
      raise TypeError(f"{FUNCTION}: names must give a path or None, got {where!r} for {name!r}.")
    return where

  return renamed


def children_name(key: str, children: Iterable[str], parent: str) -> str:
  """The parameter of a layer that a last part of a path means."""
  there = set(children)
  if key in there:
    return key
  found = [name for name in WEIGHT_NAMES if name in there]
  if key == "weight" and len(found) == 1:
    return found[0]
  raise NoPlaceError(f"{parent or 'the model'} has no parameter {key!r}")


def fitted(name: str, value: Any, old: Any) -> jax.Array:
  """An array as a parameter that is one: of its shape, cast to its dtype.

  old: the parameter's array, or what stands for it.
  """
  array, shape = as_array(value), tuple(old.shape)
  if name.endswith(".bias") and array.ndim == 1 and array.size == math.prod(shape):
    array = array.reshape(shape)  # of several axes of features, flattened in files
  if array.shape != shape:
    raise NoPlaceError(f"it has shape {tuple(value.shape)}, and the parameter {shape}")
  return cast(array, old.dtype)


def as_array(value: Any) -> jax.Array:
  """A tensor as one of JAX, which has 32 bits for 64, as long as they hold its numbers."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # that it has
    array = jnp.asarray(value)
  if array.dtype != value.dtype and (np.asarray(array) != value).any():
    raise NoPlaceError(f"its numbers are {value.dtype.name}, and JAX has {array.dtype.name}")
  return array


def cast(array: jax.Array, dtype: Any) -> jax.Array:
  """To a parameter's dtype, if both are of one kind."""
  kinds = (jnp.floating, jnp.signedinteger, jnp.unsignedinteger, np.bool_)
  if not any(all(jnp.issubdtype(d, kind) for d in (array.dtype, dtype)) for kind in kinds):
    raise NoPlaceError(f"it is {array.dtype.name}, and the parameter {np.dtype(dtype).name}")
  return array.astype(dtype)


def moved(array: jax.Array, old: Any) -> jax.Array:
  """To the devices of the parameter's own array, if it has one."""
  sharding = getattr(old, "sharding", None)
  return array if sharding is None else jax.device_put(array, sharding)
