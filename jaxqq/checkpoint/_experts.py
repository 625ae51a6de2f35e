"""Experts that are layers of their own, `a.experts.0.up`, as one stack, `a.experts.up`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from jaxqq.checkpoint._dense import DenseLayer
from jaxqq.checkpoint._files import Recorded, TensorInfo, describe
from jaxqq.checkpoint._layouts import Form, Layer
from jaxqq.checkpoint._read import Loaded, read_dense, read_packed

_EXPERT = re.compile(r"((?:.*[._])?experts)\.(\d+)\.(.+)")
_STACK = re.compile(r"((?:.*[._])?experts)\.(.+)")


@dataclasses.dataclass(frozen=True)
class Stack:
  """The layers of all experts, in their order, which become one stack of matrices."""

  name: str
  layers: tuple[Layer, ...]

  @property
  def parts(self) -> dict[str, TensorInfo]:
    return {part.name: part for layer in self.layers for part in layer.parts.values()}

  @property
  def form(self) -> Form:
    paths = tuple(layer.path for layer in self.layers)
    return Form(paths=paths, scales_dtype=self.layers[0].form.scales_dtype)

  @property
  def weight_only(self) -> bool:
    return self.layers[0].weight_only


def stack_of(path: str) -> str | None:
  """The path of the stack that an expert's layer belongs to."""
  found = _EXPERT.fullmatch(path)
  return None if found is None else f"{found[1]}.{found[3]}"


def expert_paths(stack: str, count: int) -> tuple[str, ...] | None:
  """The paths of the experts' layers that a stack of this path is; None where it names none."""
  found = _STACK.fullmatch(stack)
  return None if found is None else tuple(f"{found[1]}.{i}.{found[2]}" for i in range(count))


def stacked(layers: list[Layer], others: dict[str, TensorInfo]) -> list[Stack]:
  """A stack of each kind of layer that all experts of a module have.

  Raises where an expert is missing, or where two of them cannot be in one stack.

  others: the weights that are not packed, by the paths of their layers.
  """
  experts: dict[str, dict[int, Layer]] = {}
  for layer in layers:
    found = _EXPERT.fullmatch(layer.path)
    if found is not None:
      experts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = layer
  for path, tensor in others.items():
    stack = stack_of(path)
    if stack in experts:
      raise ValueError(
        f"load: {tensor.file}: experts='stack' needs all experts of {stack!r} packed, found "
        f"{tensor.name!r}, {describe(tensor)}, which is not; load without it."
      )
  return [_stack(path, by_number) for path, by_number in experts.items()]


def _stack(path: str, experts: dict[int, Layer]) -> Stack:
  numbers = sorted(experts)
  first = experts[numbers[0]]
  if numbers != list(range(len(numbers))):
    missing = next(i for i in range(len(numbers) + 1) if i not in experts)
    raise ValueError(
      f"load: {first.parts[first.layout.codes].file}: experts='stack' needs all experts of "
      f"{path!r}, found {len(numbers)} of them and no quantized expert {missing}."
    )
  for layer in experts.values():
    kinds = [(a.layout.mode, a.shape(a.layout.codes), a.weight_only) for a in (first, layer)]
    if kinds[0] != kinds[1]:
      codes = layer.parts[layer.layout.codes]
      raise ValueError(
        f"load: {codes.file}: experts='stack' needs experts of one kind, found {layer.path!r} in "
        f"{_kind(layer)} and {first.path!r} in {_kind(first)}; load without it."
      )
  return Stack(f"{path}.weight", tuple(experts[i] for i in numbers))


def _kind(layer: Layer) -> str:
  alone = ", its weight alone" if layer.weight_only else ""
  codes = layer.parts[layer.layout.codes]
  return f"{layer.layout.name} with {codes.dtype} of shape {codes.shape}{alone}"


def read_stack(
  stack: Stack, read: Callable[[TensorInfo], np.ndarray], recorded: Recorded, dtype: np.dtype
) -> Loaded:
  """The fields of all experts, with a global scale for each.

  Where calibration never reached an expert, the stack has no static scale of the activations.
  """
  each = [read_packed(layer, read, recorded, dtype) for layer in stack.layers]
  fields = dict(each[0].fields or {})
  for field in ("packed", "scales", "global_scale", "input_global_scale"):
    values = [loaded.fields.get(field) for loaded in each if loaded.fields is not None]
    have = [value for value in values if value is not None]
    fields.pop(field, None)
    if len(have) == len(values):
      fields[field] = np.stack(have)
  stored = {
    field: _stack_of_scalars([loaded.stored[field] for loaded in each])
    for field in each[0].stored
    if all(field in loaded.stored for loaded in each)
  }
  left = next((loaded.uncalibrated for loaded in each if loaded.uncalibrated is not None), None)
  return Loaded(fields, stored=stored, uncalibrated=left)


def _stack_of_scalars(scalars: list[np.ndarray]) -> np.ndarray:
  """Along a new first axis; each in an array of the same axes, or without any."""
  shapes = {scalar.shape for scalar in scalars}
  return np.stack(scalars if len(shapes) == 1 else [scalar.reshape(()) for scalar in scalars])


def read_item(
  item: Layer | DenseLayer | Stack,
  read: Callable[[TensorInfo], np.ndarray],
  recorded: Recorded,
  dtype: np.dtype,
  fp8: str,
) -> Loaded:
  """What a layer or a stack of layers becomes.

  recorded: what the files' metadata says each amax was, by layer. fp8: what `load` was told.
  """
  if isinstance(item, DenseLayer):
    return read_dense(item, read, dtype, fp8)
  if isinstance(item, Stack):
    return read_stack(item, read, recorded, dtype)
  return read_packed(item, read, recorded, dtype)
