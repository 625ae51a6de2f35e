"""Experts that are layers of their own, `a.experts.0.up`, as one stack, `a.experts.up`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class PlainStack:
  """What all experts have under one name and is not packed, in their order: one array of all."""

  name: str
  items: tuple[DenseLayer | TensorInfo, ...]

  @property
  def parts(self) -> dict[str, TensorInfo]:
    each = (
      item.parts if isinstance(item, DenseLayer) else {item.name: item} for item in self.items
    )
    return {part.name: part for parts in each for part in parts.values()}

  @property
  def form(self) -> Form:
    """The paths are those of the tensors, without their last word."""
    return Form(paths=tuple(item.name.rpartition(".")[0] for item in self.items))


def plain_stacks(
  items: dict[str, DenseLayer | TensorInfo], stacks: list[Stack]
) -> list[PlainStack]:
  """A stack of each weight, bias or other parameter that all experts of a module have alike.

  What some of them lack, or have in another shape or dtype, stays as it is.

  items: what is not packed, by the name under which it would be loaded.
  stacks: of those modules' packed layers, which have as many experts.
  """
  found: dict[str, dict[int, DenseLayer | TensorInfo]] = {}
  count: dict[str, int] = {}
  for stack in stacks:
    module = _STACK.fullmatch(stack.name)
    assert module is not None
    count[module[1]] = len(stack.layers)
  for name, item in items.items():
    part = _EXPERT.fullmatch(name)
    if part is not None:
      found.setdefault(f"{part[1]}.{part[3]}", {})[int(part[2])] = item
      count[part[1]] = max(count.get(part[1], 0), int(part[2]) + 1)
  return [
    PlainStack(name, tuple(by_number[i] for i in range(len(by_number))))
    for name, by_number in found.items()
    if sorted(by_number) == list(range(count[_STACK.fullmatch(name)[1]]))  # type: ignore[index]
    and len({_kind_of_plain(item) for item in by_number.values()}) == 1
  ]


def _kind_of_plain(item: DenseLayer | TensorInfo) -> tuple[Any, ...]:
  if isinstance(item, DenseLayer):
    return item.dense, item.tensors["weight"].shape
  return item.dtype, item.shape


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
  fields = _stacked_fields([loaded.fields or {} for loaded in each])
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


def read_plain_stack(
  stack: PlainStack, read: Callable[[TensorInfo], np.ndarray], dtype: np.dtype, fp8: str
) -> Loaded:
  """One array; or, of FP8 that is mxfp8 for every expert, the fields of a stack."""
  each = [
    read_dense(item, read, dtype, fp8) if isinstance(item, DenseLayer) else Loaded(array=read(item))
    for item in stack.items
  ]
  fields = [loaded.fields for loaded in each if loaded.fields is not None]
  arrays = [loaded.array for loaded in each if loaded.array is not None]
  if len(arrays) == len(each):
    return Loaded(array=np.stack(arrays))
  if len(fields) == len(each):
    return Loaded(_stacked_fields(fields))
  return read_plain_stack(
    stack, read, dtype, "dequantize"
  )  # one that is no mxfp8 makes all numbers


def _stacked_fields(each: list[dict[str, Any]]) -> dict[str, Any]:
  """Of a `QuantizedWeight`, the arrays that all have stacked, and what is not an array of one."""
  out = dict(each[0])
  for field in ("packed", "scales", "global_scale", "input_global_scale"):
    have = [fields[field] for fields in each if fields.get(field) is not None]
    out.pop(field, None)
    if len(have) == len(each):
      out[field] = np.stack(have)
  return out


def read_item(
  item: Layer | DenseLayer | Stack | PlainStack,
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
  if isinstance(item, PlainStack):
    return read_plain_stack(item, read, dtype, fp8)
  return read_packed(item, read, recorded, dtype)
