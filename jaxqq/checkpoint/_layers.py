"""The layers of a checkpoint: which tensors are codes and scales, and that none is left over.

A tensor that belongs to no quantized layer stays what it is. So each is asked whether it can be: a
code, a scale or a rotation that no layout took would come back as if it were numbers of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from jaxqq.checkpoint._dense import Dense, DenseLayer, check_dense
from jaxqq.checkpoint._experts import PlainStack, Stack, plain_stacks, stack_of, stacked
from jaxqq.checkpoint._files import TensorInfo, describe
from jaxqq.checkpoint._layouts import Form, Layer, Layout, check_layer, is_transposed
from jaxqq.checkpoint._left import Left
from jaxqq.checkpoint._naming import LAYER, Group, grouped
from jaxqq.checkpoint._scheme import Scheme
from jaxqq.checkpoint._schemes import Choices

Item: TypeAlias = Layer | DenseLayer | Stack | PlainStack | TensorInfo


def read_items(
  tensors: dict[str, TensorInfo],
  scheme: Scheme,
  choices: Choices,
  wants: Callable[[str], bool] = lambda name: True,
) -> dict[str, Item]:
  """What is loaded, by name: the quantized layers first, all checked.

  Raises where a tensor of a layer would be left over. Layers without a tensor that is wanted are
  left out, whatever they are.

  Args:
    wants: whether what has a name is to be loaded.
  """
  groups = grouped(tensors, scheme.format)
  _check_named(scheme, groups, wants)
  to_stack = choices.experts == "stack"
  wanted = [group for group in groups if _is_wanted(group, wants, to_stack)]
  layers = [layer for group in wanted if (layer := _layer(group, scheme)) is not None]
  for layer in layers:
    if isinstance(layer, Layer):
      check_layer(layer, scheme.file)
    else:
      check_dense(layer)
      _check_choice(layer, choices)
  used = {tensor.name for layer in layers for tensor in layer.parts.values()}
  rest = {t.name: t for group in wanted for t in group.tensors.values() if t.name not in used}
  _check_left(tensors, used, layers, scheme, wants)
  packed = [layer for layer in layers if isinstance(layer, Layer)]
  dense = {layer.path: layer.tensors["weight"] for layer in layers if isinstance(layer, DenseLayer)}
  plain = {n.removesuffix(".weight"): t for n, t in rest.items() if n.endswith(".weight")}
  stacks = stacked(packed, dense | plain) if to_stack else []
  not_packed: dict[str, DenseLayer | TensorInfo] = {**rest}
  not_packed |= {layer.name: layer for layer in layers if isinstance(layer, DenseLayer)}
  others = plain_stacks(not_packed, stacks) if to_stack else []
  in_stacks = {layer.name for stack in stacks for layer in stack.layers}
  in_stacks |= {item.name for stack in others for item in stack.items}
  items: dict[str, Item] = {layer.name: layer for layer in layers if layer.name not in in_stacks}
  items |= {stack.name: stack for stack in stacks} | {stack.name: stack for stack in others}
  for name in sorted(rest):
    if name in in_stacks:
      continue
    if name in items:
      raise ValueError(
        f"load: {rest[name].file}: tensor {name!r} has the name of a stack of experts; load "
        "without experts='stack'."
      )
    items[name] = rest[name]
  return {name: item for name, item in items.items() if wants(name)}


def _is_wanted(group: Group, wants: Callable[[str], bool], to_stack: bool) -> bool:
  names = [group.weight, *(tensor.name for tensor in group.tensors.values())]
  stacks = [stack_of(name) for name in names] if to_stack else []
  return any(wants(name) for name in (*names, *stacks) if name is not None)


def _check_choice(layer: DenseLayer, choices: Choices) -> None:
  if layer.dense.kind == "fp8" and choices.fp8 == "refuse":
    weight = layer.tensors["weight"]
    raise ValueError(
      f"load: {weight.file}: tensor {weight.name!r} is FP8 ({layer.report}), and fp8 is 'refuse'; "
      "load(..., fp8='dequantize') reads it as numbers."
    )


def _layer(group: Group, scheme: Scheme) -> Layer | DenseLayer | None:
  layout = scheme.layout(group.path, group.tensors)
  if layout is None:
    return None
  if isinstance(layout, Dense):
    return DenseLayer(group.weight, group.path, layout, group.tensors, group.naming)
  codes, scales = (group.tensors.get(suffix) for suffix in (layout.codes, layout.scales))
  form = Form()
  if codes is not None and scales is not None:
    transposed = group.naming != LAYER and is_transposed(codes, scales)
    other = scales.dtype if scales.dtype in layout.scales_dtypes[1:] else None
    form = Form(group.naming, transposed, scales_dtype=other)
  weight_only = scheme.is_weight_only(group.path, layout)
  return Layer(group.weight, group.path, layout, group.tensors, form, weight_only)


def _check_named(scheme: Scheme, groups: Iterable[Group], wants: Callable[[str], bool]) -> None:
  """Layers that the configuration names are there, or layers within a module that it names."""
  paths = {group.path for group in groups}
  for path in scheme.layers():
    found = path in paths or any(other.startswith(path + ".") for other in paths)
    if not found and wants(f"{path}.weight"):
      layout = scheme.layout(path, {})
      if layout is not None:
        codes = layout.codes if isinstance(layout, Layout) else "weight"
        raise ValueError(
          f"load: {scheme.file.parent}: tensor {LAYER.tensor(path, codes)!r} is missing; "
          f"{layout.format} {layout.name} needs it, found no tensor of that layer, which "
          f"{scheme.file.name} names."
        )


def _check_left(
  tensors: dict[str, TensorInfo],
  used: set[str],
  layers: list[Layer | DenseLayer],
  scheme: Scheme,
  wants: Callable[[str], bool],
) -> None:
  """Of what is wanted, and of what is below or beside a layer, nothing is left that it needs.

  used: the parts of the layers.
  """
  left = Left(tensors, {layer.path for layer in layers}, scheme.format, scheme.scales_activations)
  for name, tensor in tensors.items():
    what = left.what(tensor) if left.is_beside_layer(name) or wants(name) else None
    if what is not None and name not in used:
      raise ValueError(
        f"load: {tensor.file}: tensor {name!r} is {what}, found {describe(tensor)}, "
        "which belongs to no layer that the configuration and its tensors say how to read."
      )
