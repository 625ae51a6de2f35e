"""A tree of parameters as what is trained and what is frozen, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqq._weight import QuantizedWeight


def partition(tree: Any, is_trainable: Callable[[str, Any], bool] | None = None) -> tuple[Any, Any]:
  """Splits a tree of parameters into what is trained and what is frozen.

  A `QuantizedWeight` is always frozen, and stays whole: codes are no numbers that an optimizer, an
  average or a norm could take. So are arrays that hold no floats. Both results are the tree with
  None where the other has a value, which `jax.grad`, optax and `jax.tree.map` skip.

  Args:
    tree: any tree of arrays and `QuantizedWeight`s.
    is_trainable: a function of (path, array), path as "blocks.0.lora_a", of arrays of floats that
      are in no `QuantizedWeight`: whether to train it. None trains all of them.

  Returns:
    trainable: for `jax.grad`, optimizers, averages and norms.
    frozen: the rest; `combine` puts both together.

  Raises:
    TypeError: is_trainable is no function.

  Example:
    >>> layer = {"w": jaxqq.quantize_weight(jnp.ones((8, 64))), "bias": jnp.zeros(8)}
    >>> trainable, frozen = jaxqq.partition(layer)
    >>> def loss(trainable):
    ...   layer = jaxqq.combine(trainable, frozen)
    ...   return jnp.sum(jaxqq.qqmm(jnp.ones((2, 64)), layer["w"]) + layer["bias"].reshape(1, 8))
    >>> jax.tree.map(jnp.shape, jax.grad(loss)(trainable))
    {'bias': (8,), 'w': None}

  Source: `equinox.partition`.
  """
  if is_trainable is not None and not callable(is_trainable):
    raise TypeError(
      "partition: is_trainable must be a function of (path, array) or None, got "
      f"{type(is_trainable).__name__}."
    )

  def trains(path: Any, leaf: Any) -> bool:
    if isinstance(leaf, QuantizedWeight) or not _is_float(leaf):
      return False
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return is_trainable is None or bool(is_trainable(name, leaf))

  chosen = jax.tree_util.tree_map_with_path(trains, tree, is_leaf=_is_weight)

  def where(wanted: bool) -> Any:
    take = lambda leaf, own: leaf if own is wanted else None  # noqa: E731
    return jax.tree.map(take, tree, chosen, is_leaf=_is_weight)

  return where(True), where(False)


def combine(*trees: Any) -> Any:
  """The tree of which each of these has some values, and None at the others'.

  Args:
    trees: what `partition` returned, or the first part of it after a step of an optimizer.

  Returns:
    The first value that is not None, at each place.

  Raises:
    ValueError: there is no tree, or their structures differ.

  Example:
    >>> jaxqq.combine({"a": 1, "b": None}, {"a": None, "b": 2})
    {'a': 1, 'b': 2}

  Source: `equinox.combine`.
  """
  if not trees:
    raise ValueError("combine: give at least one tree.")

  def is_place(leaf: Any) -> bool:
    return leaf is None or _is_weight(leaf)

  structures: list[Any] = [jax.tree.structure(tree, is_leaf=is_place) for tree in trees]
  for structure in structures[1:]:
    if structure != structures[0]:
      raise ValueError(
        "combine: trees must be of one structure, None where another has a value, got "
        f"{structures[0]} and {structure}."
      )

  def first(*leaves: Any) -> Any:
    return next((leaf for leaf in leaves if leaf is not None), None)

  return jax.tree.map(first, *trees, is_leaf=is_place)


def _is_weight(leaf: Any) -> bool:
  return isinstance(leaf, QuantizedWeight)


def _is_float(leaf: Any) -> bool:
  dtype = np.asarray(leaf).dtype if isinstance(leaf, (int, float)) else getattr(leaf, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jnp.floating)
