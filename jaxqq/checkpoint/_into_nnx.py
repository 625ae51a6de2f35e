"""Tensors of a checkpoint put into a model of Flax NNX."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxqq._dot_general import DotGeneral
from jaxqq._weight import QuantizedWeight
from jaxqq.checkpoint._checkpoint import Tensor
from jaxqq.checkpoint._into import (
  FUNCTION,
  NoPlaceError,
  as_array,
  cast,
  children_name,
  fitted,
  moved,
)
from jaxqq.nn.base import Packed, QuantizedLayer, full_name, why_not
from jaxqq.nn.convert import Replacement, items, nodes
from jaxqq.nn.layers import LAYERS


def is_module(model: Any) -> bool:
  return isinstance(model, nnx.Module)


@dataclasses.dataclass
class _Layers(Replacement):
  """By the id of a layer, what takes its place."""

  _: dataclasses.KW_ONLY
  layers: dict[int, QuantizedLayer]

  def layer(self, path: str, node: nnx.Module) -> nnx.Module:
    return self.layers.get(id(node), node)


class NnxDestination:
  """Variables are told apart by their identity: what is shared gets one tensor."""

  def __init__(self, model: nnx.Module):
    self._model = model
    # By the id of each variable, those that hold it: path, node, name of the attribute.
    self._holders: dict[int, list[tuple[str, Any, str]]] = {}
    self._variables: dict[int, nnx.Variable[Any]] = {}
    for path, node in nodes(model):
      for key, child in items(node):
        if isinstance(child, nnx.Variable):
          self._holders.setdefault(id(child), []).append((".".join(path), node, str(key)))
          self._variables[id(child)] = child
    self._names: dict[int, str] = {}  # of the tensor that a variable gets
    self._arrays: dict[int, jax.Array] = {}
    self._weights: dict[int, QuantizedWeight] = {}  # by the variable of the kernel, or its codes

  def put(self, name: str, where: str, value: Tensor) -> None:
    node, path, key = self._find(where)
    is_packed = isinstance(node, QuantizedLayer) and node.is_packed
    variable = node.packed if is_packed and key == "kernel" else dict(items(node)).get(key)
    if not isinstance(variable, nnx.Variable):
      raise NoPlaceError(f"{path or 'the model'} has no parameter {key!r}")
    if id(variable) in self._names:
      raise NoPlaceError(f"{self._names[id(variable)]!r} goes there too")
    if isinstance(value, QuantizedWeight):
      self._check_weight(node, path, key, variable, value)
      self._weights[id(variable)] = value
    else:
      self._arrays[id(variable)] = _array(name, node, key, variable, value)
    self._names[id(variable)] = name

  def _find(self, where: str) -> tuple[Any, str, str]:
    """What holds a parameter, its path, and the attribute."""
    *parts, key = where.split(".")
    node: Any = self._model
    for i, part in enumerate(parts):
      children = {str(name): child for name, child in items(node)} if _has_items(node) else {}
      if part not in children:
        raise NoPlaceError(f"{'.'.join(parts[:i]) or 'the model'} has no {part!r}")
      node = children[part]
    path = ".".join(parts)
    if not _has_items(node):
      raise NoPlaceError(f"{path!r} is no layer")
    there = [str(name) for name, child in items(node) if isinstance(child, nnx.Variable)]
    if isinstance(node, QuantizedLayer) and node.is_packed:
      there.append("kernel")
    return node, path, children_name(key, there, path)

  def _check_weight(
    self, node: Any, path: str, key: str, variable: nnx.Variable[Any], weight: QuantizedWeight
  ) -> None:
    """All that hold the kernel can be layers that multiply by the weight."""
    for other_path, other, other_key in self._holders[id(variable)]:
      kind = type(other) if isinstance(other, QuantizedLayer) else LAYERS.get(type(other))
      if kind is None or other_key not in ("kernel", "packed"):
        raise NoPlaceError(
          f"it is quantized, and {other_path or 'the model'} ({type(other).__name__}) has no "
          f"quantized {other_key}"
        )
      if other is self._model and not isinstance(other, QuantizedLayer):
        raise NoPlaceError(
          f"the model is a single {full_name(type(other))}, which cannot be replaced in place"
        )
      if isinstance(other, QuantizedLayer):
        if not weight.quantize_input and other.dot_general.backward == "quantized":
          raise NoPlaceError(
            f"its inputs are not quantized, and {other_path} has the backward 'quantized'; load "
            "with quantize_input=True, or make the layer with the other one"
          )
      else:
        reason = why_not(kind, other, weight.mode)
        if reason is not None:
          raise NoPlaceError(reason)
      shape = _matrices_shape(kind, other)
      if weight.shape != shape:
        raise NoPlaceError(f"it has shape {weight.shape}, and the kernel of {other_path} {shape}")

  def missing(self) -> list[str]:
    out = []
    for i, variable in self._variables.items():
      path, _, key = self._holders[i][0]
      is_kernel = isinstance(variable, Packed) and key == "packed"
      if i not in self._names and (isinstance(variable, nnx.Param) or is_kernel):
        out.append(f"{path}.{'kernel' if is_kernel else key}".removeprefix("."))
    return out

  def finish(self, move: bool) -> nnx.Module:
    for i, array in self._arrays.items():
      variable = self._variables[i]
      variable.set_value(moved(array, variable.get_value()) if move else array)
    layers: dict[int, QuantizedLayer] = {}
    for i, weight in self._weights.items():
      held = [node for _, node, _ in self._holders[i]]
      for node in held:
        if not isinstance(node, QuantizedLayer):
          layers[id(node)] = LAYERS[type(node)]._from(FUNCTION, node, DotGeneral(weight.mode))
      first, *others = (layers.get(id(node), node) for node in held)
      first.set_weight(weight)
      for other in others:
        other._share_kernel_of(first)
        other.dot_general = dataclasses.replace(
          other.dot_general, quantize_input=weight.quantize_input
        )
    if layers:
      _Layers(layers=layers).walk((), self._model)
    return self._model


def _has_items(node: Any) -> bool:
  is_container = isinstance(node, (nnx.Pytree, list, dict, tuple))
  return is_container and not isinstance(node, nnx.Variable)


def _matrices_shape(kind: type[QuantizedLayer], layer: Any) -> tuple[int, ...]:
  """That of the matrices of a layer, packed or not."""
  if isinstance(layer, QuantizedLayer) and layer.weight is not None:
    return layer.weight.shape
  axes, shape = kind._kernel_axes(layer), tuple(layer.kernel.shape)
  return (*shape[: len(shape) - len(axes.shape)], *axes.matrices_shape)


def _array(name: str, node: Any, key: str, variable: nnx.Variable[Any], value: Any) -> jax.Array:
  kind = type(node) if isinstance(node, QuantizedLayer) else LAYERS.get(type(node))
  old = variable.get_value()
  if kind is None or key != "kernel" or not name.endswith(".weight"):
    return fitted(name, value, old)
  if isinstance(node, QuantizedLayer) and node.is_packed:
    raise NoPlaceError("it is not quantized, and the layer is packed")
  shape = _matrices_shape(kind, node)
  if tuple(value.shape) != shape:
    raise NoPlaceError(f"it has shape {tuple(value.shape)}, and the kernel of the layer {shape}")
  return cast(kind._kernel_axes(node).from_matrices(as_array(value)), old.dtype)
