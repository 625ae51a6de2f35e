"""Tensors of a checkpoint put into parameters of Flax Linen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from flax.core import meta

from jaxqq._weight import QuantizedWeight
from jaxqq.checkpoint._checkpoint import Tensor
from jaxqq.checkpoint._into import NoPlaceError, as_array, cast, children_name, fitted, moved
from jaxqq.nn.kernel import KernelAxes
from jaxqq.nn.params import boxed

Path = tuple[str, ...]


class LinenDestination:
  def __init__(self, params: Mapping[str, Any]):
    self._params = params
    self._values: dict[Path, tuple[str, Any]] = {}  # the tensor's name, and the new parameter

  def put(self, name: str, where: str, value: Tensor) -> None:
    path, old = self._find(where)
    if path in self._values:
      raise NoPlaceError(f"{self._values[path][0]!r} goes there too")
    self._values[path] = name, _parameter(name, path[-1], value, old)

  def _find(self, where: str) -> tuple[Path, Any]:
    """The path of a parameter, and what is there."""
    *parts, key = where.split(".")
    node: Any = self._params
    for i, part in enumerate(parts):
      if not isinstance(node, Mapping) or part not in node:
        raise NoPlaceError(f"{'.'.join(parts[:i]) or 'the model'} has no {part!r}")
      node = node[part]
    parent = ".".join(parts)
    if not isinstance(node, Mapping):
      raise NoPlaceError(f"{parent!r} is no layer")
    there = [name for name, child in node.items() if not isinstance(child, Mapping)]
    key = children_name(key, there, parent)
    return (*parts, key), node[key]

  def missing(self) -> list[str]:
    return [".".join(path) for path, _ in _leaves((), self._params) if path not in self._values]

  def finish(self, move: bool) -> dict[str, Any]:
    def walk(path: Path, params: Mapping[str, Any]) -> dict[str, Any]:
      return {key: after((*path, key), value) for key, value in params.items()}

    def after(path: Path, old: Any) -> Any:
      if isinstance(old, Mapping):
        return walk(path, old)
      if path not in self._values:
        return old
      new, array = self._values[path][1], meta.unbox(old)
      if isinstance(meta.unbox(new), QuantizedWeight):
        return new
      new = moved(new, array) if move else new
      return old.replace_boxed(new) if isinstance(old, meta.AxisMetadata) else new

    return walk((), self._params)


def _leaves(path: Path, params: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
  for key, value in params.items():
    if isinstance(value, Mapping):
      yield from _leaves((*path, key), value)
    else:
      yield (*path, key), value


def _parameter(name: str, key: str, value: Any, old: Any) -> Any:
  """What takes the place of a parameter: an array without a box, or a `QuantizedWeight`."""
  array = meta.unbox(old)
  if isinstance(array, QuantizedWeight):
    if not isinstance(value, QuantizedWeight):
      raise NoPlaceError("it is not quantized, and the layer is packed")
    if value.shape != array.shape:
      raise NoPlaceError(f"it has shape {value.shape}, and the kernel {array.shape}")
    return value
  if isinstance(value, QuantizedWeight):
    if key != "kernel":
      raise NoPlaceError(f"it is quantized, and {key!r} is no kernel of a dense layer")
    return boxed(value, old, _axes(value.shape, tuple(array.shape)))
  if key != "kernel" or not name.endswith(".weight"):
    return fitted(name, value, array)
  axes = _axes(tuple(value.shape), tuple(array.shape))
  return cast(axes.from_matrices(as_array(value)), array.dtype)


def _axes(matrices: tuple[int, ...], kernel: tuple[int, ...]) -> KernelAxes:
  """Those of a kernel of Dense or DenseGeneral: contracted ones first, then features."""
  if len(matrices) >= 2:
    *stacked, n, k = matrices
    shape = kernel[len(stacked) :]
    for i in range(len(shape) + 1):
      if (list(kernel[: len(stacked)]), math.prod(shape[:i]), math.prod(shape[i:])) == (
        stacked,
        k,
        n,
      ):
        return KernelAxes(shape, (), tuple(range(i, len(shape))), tuple(range(i)))
  raise NoPlaceError(
    f"it has shape {matrices}, and the kernel {kernel}, whose last axes are those of the result"
  )
