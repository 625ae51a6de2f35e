"""A whole model of Flax NNX, converted layer by layer and in place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flax import nnx

from jaxqq._checks import check_bool, check_format
from jaxqq._dot_general import DotGeneral
from jaxqq._formats import Mode
from jaxqq._given import DEFAULT_MODE
from jaxqq._global_scales import DEFAULT, GlobalScale
from jaxqq._gradient import Backward
from jaxqq._recipe import Recipe
from jaxqq.nn.base import Packed, QuantizedLayer, check_rngs, full_name, packing, why_not
from jaxqq.nn.expert_linear import QQExpertLinear
from jaxqq.nn.layers import LAYERS
from jaxqq.nn.report import NO_PRODUCT, LayerReport, Report, num_bytes, relative_error

FUNCTION = "quantize_model"
Predicate = Callable[[str, nnx.Module], bool | str]


def quantize_model(
  model: nnx.Module,
  mode: Mode = DEFAULT_MODE,
  *,
  predicate: Predicate | None = None,
  packed: bool = False,
  backward: Backward = "straight_through",
  global_scale: GlobalScale = DEFAULT,
  implementation: str | None = None,
  quantize_input: bool = True,
  recipe: Recipe | str | None = None,
  keep: Sequence[str] = (),
  rngs: nnx.Rngs | None = None,
) -> Report:
  """Converts the layers of a Flax NNX model, in place, to layers that multiply by `qqmm`.

  nnx.Linear becomes `QQLinear`, nnx.LinearGeneral (so the projections of nnx.MultiHeadAttention)
  `QQLinearGeneral`, nnx.Einsum `QQEinsum`, and `ExpertLinear`, of `Experts`, `QQExpertLinear`.
  Unpacked, for training, they share the variables of the layers before, so that the model's state
  is the same tree. Packed, for serving, each kernel is replaced by its quantized weight. A layer
  that the model holds twice stays one layer. Works on abstract models (`nnx.eval_shape`) too.

  Args:
    model: any nnx.Module that holds layers.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    predicate: a function of (path, layer), path as "blocks.0.attention.query", that says whether
      to convert a layer; it may also answer with the mode for that layer. None converts all.
    packed: whether to pack the kernels.
    backward: "straight_through" or "quantized", as for `qqmm`.
    global_scale: nvfp4 only: "weight", there the default, "amax", "row" or None, as for
      `QQLinear`.
    implementation: what computes the products, as for `qqmm`.
    quantize_input: False multiplies inputs as they are, as `quantized_matmul` does.
    recipe: a `jaxqq.Recipe` for training, or the name of one, in place of mode and backward, as
      for `QQLinear`.
    keep: paths of what stays as it is, as "head", or "blocks.0" and all in it; "blocks.-1" is the
      last of a list. Recipes for 4 bits keep the first and the last blocks and the head.
    rngs: with a stream "recipe", of which each layer gets one of its own, where the recipe has
      something random. The model's state then holds their keys and counts too.

  Returns:
    What became of each layer that has parameters; `str(report)` is a table.

  Raises:
    TypeError: model is no nnx.Module, or a layer itself.
    ValueError: mode, backward, global_scale or implementation is not as above, or backward is
      "quantized" and quantize_input False; keep names what is not in the model; rngs are missing
      where the recipe needs them; packed, and a kernel is shared with what is not packed
      alike, as for `pack`. The model is as it was.

  Example:
    >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
    >>> report = jaxqq.nn.quantize_model(model, "mxfp8", packed=True)
    >>> report["layers.0"].converted, report.bytes_before, report.bytes_after
    (True, 16640, 4480)

  Source: `mlx.nn.quantize`.
  """
  packed = check_bool(FUNCTION, "packed", packed)
  options = backward, global_scale, implementation, quantize_input, FUNCTION
  dot_general = DotGeneral(mode, *options, recipe)
  check_rngs(FUNCTION, dot_general, rngs)
  global_scale = dot_general.global_scale if recipe is not None else global_scale
  if not isinstance(model, nnx.Module):
    raise TypeError(f"{FUNCTION}: model must be an nnx.Module, got {type(model).__name__}.")
  if type(model) in LAYERS:
    kind = LAYERS[type(model)].__name__
    raise TypeError(
      f"{FUNCTION}: model is a single {full_name(type(model))}, which cannot be replaced in "
      f"place; make a layer of it with jaxqq.nn.{kind}."
    )
  conversion = _Conversion(
    dot_general=dot_general,
    global_scale=global_scale,
    predicate=predicate,
    packed=packed,
    keep=_kept(model, keep),
    rngs=rngs,
  )
  conversion.choose(model)
  conversion.walk((), model)
  return Report(tuple(conversion.rows))


def _kept(model: nnx.Module, keep: Sequence[str]) -> dict[str, str]:
  """The paths that keep names, as the model has them, and how it names them."""
  given = keep
  if isinstance(given, Iterable) and not isinstance(given, str):
    keep = tuple(given)
  if not isinstance(keep, tuple) or not all(isinstance(path, str) for path in keep):
    raise TypeError(f"{FUNCTION}: keep must be a sequence of paths, as ['head'], got {given!r}.")
  paths = {".".join(path) for path, _ in nodes(model)}
  found = {}
  for name in keep:
    path = ""
    for part in name.split("."):
      before = f"{path}." if path else ""
      if part.startswith("-") and part[1:].isdecimal():
        children = [p.removeprefix(before) for p in paths if p.startswith(before)]
        length = len({child.partition(".")[0] for child in children if child})
        part = str(length + int(part))
      path = before + part
    if not path or path not in paths:
      raise ValueError(
        f"{FUNCTION}: keep names {name!r}, and nothing in the model has that path; those of layers "
        "are in the report of a call without it."
      )
    found[path] = name
  return found


def pack(model: nnx.Module) -> None:
  """Packs every quantized layer of a model (or the one that it is), for serving.

  Layers that share a kernel share its packed weight.

  Raises:
    ValueError: there is no quantized layer; or one shares its kernel with what is not packed, or
      not alike (another mode, dtype or order of axes), and would be apart from it.

  Example:
    >>> model = nnx.Sequential(jaxqq.nn.QQLinear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
    >>> jaxqq.nn.pack(model)
    >>> model.layers[0].is_packed
    True
  """
  layers = _quantized_layers("pack", model)
  unpacked = [layer for layer in layers if not layer.is_packed]
  ways = {id(layer): packing(type(layer), layer, layer.dot_general) for layer in unpacked}
  _check_shared("pack", model, ways)
  for layer, first in _first_to_hold("kernel", unpacked):
    if layer is first:
      layer.pack()
    else:
      layer._share_kernel_of(first)


def unpack(model: nnx.Module) -> None:
  """Unpacks every packed layer of a model (or the one that it is), to train it further.

  Layers that share a packed weight share the kernel.

  Raises:
    ValueError: there is no quantized layer.

  Example:
    >>> model = nnx.Sequential(jaxqq.nn.QQLinear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
    >>> jaxqq.nn.pack(model)
    >>> jaxqq.nn.unpack(model)
    >>> model.layers[0].kernel.shape
    (64, 64)
  """
  packed = [layer for layer in _quantized_layers("unpack", model) if layer.is_packed]
  for layer, first in _first_to_hold("packed", packed):
    if layer is first:
      layer.unpack()
    else:
      layer._share_kernel_of(first)


def _first_to_hold(
  name: str, layers: list[QuantizedLayer]
) -> list[tuple[QuantizedLayer, QuantizedLayer]]:
  """Each layer with the first one that holds the same variable under that name, often itself."""
  first: dict[int, QuantizedLayer] = {}
  return [(layer, first.setdefault(id(getattr(layer, name)), layer)) for layer in layers]


def _check_shared(function: str, model: Any, ways: dict[int, tuple[Any, ...]]) -> None:
  """A kernel that is to be packed is shared only by layers that pack it alike, if by any.

  ways: of each layer that will be packed, by its id, what decides the bits.
  """
  holders: dict[int, list[tuple[str, Any, Any]]] = {}
  for path, node in nodes(model):
    for key, child in items(node):
      if isinstance(child, nnx.Variable):
        way = ways.get(id(node)) if key == "kernel" else None
        holders.setdefault(id(child), []).append((".".join(path), node, way))
  for held in holders.values():
    packed = next((holder for holder in held if holder[2] is not None), None)
    other = packed and next((holder for holder in held if holder[2] != packed[2]), None)
    if packed and other:
      alike = "is not packed" if other[2] is None else "packs it in another way"
      raise ValueError(
        f"{function}: layer {packed[0]!r} shares its kernel with {other[0]!r}, a "
        f"{type(other[1]).__name__} that {alike}, and they would train apart from then on; pack "
        "both alike, or give each a kernel of its own."
      )


def nodes(node: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Every node of a model once, by its path, but for variables; a node before its children."""
  seen: dict[int, Any] = {}

  def walk(path: tuple[str, ...], node: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if _is_node(node) and id(node) not in seen:
      seen[id(node)] = node
      yield path, node
      for key, child in items(node):
        yield from walk((*path, str(key)), child)

  return walk((), node)


def _is_node(node: Any) -> bool:
  is_container = isinstance(node, (nnx.Pytree, list, dict, tuple))
  return is_container and not isinstance(node, nnx.Variable)


def _quantized_layers(function: str, model: nnx.Module) -> list[QuantizedLayer]:
  layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, QuantizedLayer)]
  if not layers:
    raise ValueError(
      f"{function}: {type(model).__name__} holds no layer of jaxqq.nn, so there is nothing to "
      f"{function}; convert it first with jaxqq.nn.quantize_model."
    )
  return layers


@dataclasses.dataclass
class Replacement:
  """One walk over a model that puts layers in the place of others, wherever the model has them."""

  # By id, a node (kept, so that the id stays its own) and what stands in its place.
  seen: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

  def layer(self, path: str, node: nnx.Module) -> nnx.Module:
    """What stands in the place of a module with parameters: itself, or another one."""
    raise NotImplementedError

  def walk(self, path: tuple[str, ...], node: Any) -> Any:
    """What stands in node's place: itself, with new children, or the layer it became."""
    if not _is_node(node):
      return node
    if id(node) in self.seen:
      return self.seen[id(node)][1]
    self.seen[id(node)] = node, node
    after = node
    if isinstance(node, nnx.Module) and _parameters(node):
      after = self.layer(".".join(path), node)
    if after is node:
      after = self.children(path, node)
    self.seen[id(node)] = node, after
    return after

  def children(self, path: tuple[str, ...], node: Any) -> Any:
    if isinstance(node, tuple):
      after = [self.walk((*path, str(i)), child) for i, child in enumerate(node)]
      if all(new is old for new, old in zip(after, node, strict=True)):
        return node
      return type(node)(*after) if hasattr(node, "_fields") else tuple(after)
    for key, child in items(node):
      new = self.walk((*path, str(key)), child)
      if new is child:
        continue
      if isinstance(node, (list, dict)):
        node[key] = new
      else:
        setattr(node, key, nnx.data(new))
    return node


@dataclasses.dataclass
class _Conversion(Replacement):
  """One walk over a model, and what it finds on the way."""

  _: dataclasses.KW_ONLY
  dot_general: DotGeneral
  global_scale: GlobalScale  # of layers whose mode has one
  predicate: Predicate | None
  packed: bool
  keep: dict[str, str] = dataclasses.field(default_factory=dict)
  rngs: nnx.Rngs | None = None
  rows: list[LayerReport] = dataclasses.field(default_factory=list)
  # By the id of a layer, the mode to convert to, or None and why not.
  choices: dict[int, tuple[Mode | None, str | None]] = dataclasses.field(default_factory=dict)
  # By the id of a kernel (kept), the layer that was packed with it.
  packed_kernels: dict[int, tuple[Any, QuantizedLayer]] = dataclasses.field(default_factory=dict)

  def choose(self, model: nnx.Module) -> None:
    """What becomes of each layer; nothing is changed yet."""
    ways = {}
    for path, node in nodes(model):
      if isinstance(node, nnx.Module) and _parameters(node):
        mode, _ = self.choices[id(node)] = self.choice(".".join(path), node)
        if mode is not None:
          kind = LAYERS[type(node)]
          ways[id(node)] = packing(kind, node, self.dot_general_in(mode, kind))
    if self.packed:
      _check_shared(FUNCTION, model, ways)

  def dot_general_in(self, mode: Mode, kind: type) -> DotGeneral:
    own = self.dot_general._in_mode(mode, self.global_scale)
    recipe, backward = own.recipe, own.backward
    if kind is QQExpertLinear and isinstance(recipe, Recipe):  # then it is that of a mode
      (_, backward), recipe = recipe.as_mode() or (mode, backward), None
    return dataclasses.replace(own, backward=backward, function=kind.__name__, recipe=recipe)

  def layer(self, path: str, node: nnx.Module) -> nnx.Module:
    """The layer converted, or as it is, and its row of the report."""
    mode, reason = self.choices[id(node)]
    before = _parameters(node)
    kernel = getattr(node, "kernel", None)
    largest = max(before, key=lambda v: math.prod(v.shape))
    row = LayerReport(
      path=path,
      kind=type(node).__name__,
      shape=tuple(largest.shape if kernel is None else kernel.shape),
      mode=mode,
      reason=reason,
      bytes_before=num_bytes(before),
      bytes_after=num_bytes(before),
    )
    if mode is None:
      self.rows.append(row)
      return node
    kind = LAYERS[type(node)]
    layer: Any = kind._from(FUNCTION, node, self.dot_general_in(mode, kind), self.rngs)
    kernel, first = self.packed_kernels.get(id(layer.kernel), (layer.kernel, layer))
    weight = layer.quantized()
    error = relative_error(layer.kernel.get_value(), weight, layer._kernel_axes())
    if self.packed and first is layer:
      self.packed_kernels[id(kernel)] = kernel, layer
      layer.set_weight(weight)
    elif self.packed:
      layer._share_kernel_of(first)
    after = num_bytes(_parameters(layer))
    self.rows.append(dataclasses.replace(row, bytes_after=after, relative_error=error))
    return layer

  def choice(self, path: str, node: nnx.Module) -> tuple[Mode | None, str | None]:
    """The mode to convert to, or None and why not."""
    kind = LAYERS.get(type(node))
    if kind is None:
      return None, _why_no_layer(node)
    mode = self.dot_general.mode
    for kept, name in self.keep.items():
      if path == kept or path.startswith(f"{kept}."):
        return None, f"keep names {name!r}"
    chosen = True if self.predicate is None else self.predicate(path, node)
    if isinstance(chosen, str):
      mode = check_format(FUNCTION, chosen, None, None).mode
    if not chosen:
      return None, "predicate leaves it out"
    if kind is QQExpertLinear and self.dot_general.implementation is not None:
      return None, "products of rows in groups take no implementation by name"
    recipe = self.dot_general.recipe
    if kind is QQExpertLinear and isinstance(recipe, Recipe) and recipe.as_mode() is None:
      return None, "products of rows in groups take no recipe but those of Recipe.of_mode"
    reason = why_not(kind, node, mode)
    return (mode, None) if reason is None else (None, reason)


def _why_no_layer(node: nnx.Module) -> str:
  if isinstance(node, QuantizedLayer):
    return "it is quantized already"
  if type(node) is getattr(nnx, type(node).__name__, None):
    reason = NO_PRODUCT.get(type(node).__name__)
    if reason is not None:
      return reason
  for original in LAYERS:
    if isinstance(node, original):
      return f"what it adds to {full_name(original)} would be lost"
  return "it is no layer of nnx that multiplies by a kernel"


def items(node: Any) -> list[tuple[Any, Any]]:
  if isinstance(node, (list, tuple)):
    return list(enumerate(node))
  if isinstance(node, dict):
    return list(node.items())
  return [(key, child) for key, child in vars(node).items() if not key.startswith("_pytree__")]


def _parameters(node: nnx.Module) -> list[nnx.Variable[Any]]:
  """Those that a module holds itself, packed or not."""
  return [child for _, child in items(node) if isinstance(child, (nnx.Param, Packed))]
