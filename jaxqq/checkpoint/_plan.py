"""What `save` will write, all of it checked before a file is."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxqq._checks import as_array, describe
from jaxqq._weight import QuantizedWeight
from jaxqq.checkpoint import _kv_cache
from jaxqq.checkpoint._checkpoint import Checkpoint
from jaxqq.checkpoint._configs import Kind, leaves_inputs, written_configs
from jaxqq.checkpoint._experts import expert_paths
from jaxqq.checkpoint._files import QUANTIZE_INPUT, Recorded, TensorInfo
from jaxqq.checkpoint._layouts import (
  LAYOUTS,
  Form,
  Layout,
  layout_of,
  written_codes,
)
from jaxqq.checkpoint._left import Left
from jaxqq.checkpoint._load import DTYPE_KEYS
from jaxqq.checkpoint._naming import LAYER, OF_PARAMETERS
from jaxqq.checkpoint._safetensors import METADATA, NAMES
from jaxqq.checkpoint._scalars import converted, written_scalars

SUFFIX = ".weight"
# Formats in which a stack under the name of a module is a layer for each of its matrices.
_ONE_MATRIX = ("modelopt", "compressed-tensors")
_PER_MATRIX = re.compile(r"(\w+)\[(\d+)\]")  # a key of what is recorded of a stack


@dataclasses.dataclass(frozen=True)
class Stored:
  """How a `QuantizedWeight` is written."""

  path: str
  layout: Layout
  form: Form

  @property
  def paths(self) -> tuple[str, ...]:
    """Of the layers that it becomes."""
    return self.form.paths or (self.path,)

  def names(self, suffix: str) -> list[str]:
    return [self.form.naming.tensor(path, suffix) for path in self.paths]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What will be written, of which only codes and plain tensors are still to be fetched."""

  values: dict[str, Any]
  stored: dict[str, Stored]  # of each `QuantizedWeight`
  scalars: dict[str, dict[str, np.ndarray]]
  recorded_of: dict[str, Recorded]
  configs: dict[str, dict[str, Any]]

  def written(self, name: str) -> dict[str, np.ndarray]:
    """The tensors of a file that one of the mapping becomes."""
    value, stored = self.values[name], self.stored.get(name)
    if stored is None:
      return {name: np.asarray(value, order="C")}
    parts = written_codes(value, stored.layout, stored.form)
    if not stored.form.paths:
      parts |= self.scalars[name]
      return {stored.names(suffix)[0]: part for suffix, part in parts.items()}
    out: dict[str, np.ndarray] = {}
    one = () if stored.layout.global_scales is None else stored.layout.global_scales.shape
    for suffix, part in parts.items():
      out |= {n: np.ascontiguousarray(part[i]) for i, n in enumerate(stored.names(suffix))}
    for suffix, scalar in self.scalars[name].items():
      each = np.broadcast_to(scalar.ravel(), len(stored.paths))
      of_each = scalar.shape[1:] or one
      out |= {n: each[i].reshape(of_each) for i, n in enumerate(stored.names(suffix))}
    return out

  def recorded(self, names: list[str]) -> Recorded:
    """What the metadata of a file with these of the mapping says of each layer's amax."""
    return {
      layer: fields for name in names for layer, fields in self.recorded_of.get(name, {}).items()
    }


def planned(
  tensors: Mapping[str, Any], format: str, config: dict[str, Any], origin: Checkpoint
) -> Plan:
  """origin: `tensors`, if that is a `Checkpoint`, and an empty one otherwise."""
  values = _taken_apart({name: _checked(name, value) for name, value in tensors.items()}, origin)
  weights = {name: w for name, w in values.items() if isinstance(w, QuantizedWeight)}
  if not weights:
    raise ValueError(
      f"save: tensors must have a QuantizedWeight, found none among {len(values)}; "
      "safetensors.flax.save_file writes a checkpoint that is not quantized."
    )
  stored = {name: _stored(name, weight, format, origin) for name, weight in weights.items()}
  _check_names(values, stored)
  _check_plain(values, stored, format, origin)
  scalars: dict[str, dict[str, np.ndarray]] = {}
  recorded: dict[str, Recorded] = {}
  layers: dict[str, Kind] = {}
  for name, weight in weights.items():
    layout, paths = stored[name].layout, stored[name].paths
    came_in = layout_of(origin.format, weight.mode) if origin.format else None
    weight_only = None if weight.quantize_input else True
    if weight.quantize_input and name in origin.input_quantized:  # as the files said
      weight_only = False
    of_files = converted(origin.stored_scales.get(name, {}), came_in, layout)
    scalars[name], exact = written_scalars(name, weight, layout, of_files, bool(weight_only))
    if exact:
      recorded[name] = _by_layer(exact, stored[name])
    static = layout.scalars.get("input_global_scale") in scalars[name]
    layers |= dict.fromkeys(paths, Kind(layout, static, weight_only))
  for name in _said_otherwise(weights, stored, layers, format):
    of_layers = recorded.setdefault(name, {})
    for path in stored[name].paths:
      of_layers.setdefault(path, {})[QUANTIZE_INPUT] = 1.0
  config = _with_dtype(config, list(weights.values()))
  others = _not_quantized(values)
  configs = written_configs(format, config, layers, others, origin.kv_cache)
  return Plan(values, stored, scalars, recorded, configs)


def _said_otherwise(
  weights: dict[str, QuantizedWeight],
  stored: dict[str, Stored],
  layers: dict[str, Kind],
  format: str,
) -> list[str]:
  """The weights whose inputs are quantized, while the configuration says that they are not."""
  leaves = leaves_inputs(format, layers)
  return [
    name
    for name, weight in weights.items()
    if weight.quantize_input and any(leaves[path] for path in stored[name].paths)
  ]


def _by_layer(exact: dict[str, float], stored: Stored) -> Recorded:
  """Fields of a weight's matrices, by the layers that these are."""
  if not stored.form.paths:
    return {stored.path: exact}
  out: Recorded = {}
  for key, amax in exact.items():
    field, i = _PER_MATRIX.fullmatch(key).groups()  # type: ignore[union-attr]
    out.setdefault(stored.paths[int(i)], {})[field] = amax
  return out


def _checked(name: Any, value: Any) -> Any:
  """An array or a `QuantizedWeight` that can be written under its name."""
  if not isinstance(name, str):
    raise TypeError(f"save: the names of tensors must be strings, got {name!r}.")
  if name == METADATA or name.encode(errors="ignore") != name.encode(errors="surrogatepass"):
    raise ValueError(
      f"save: the names of tensors must be Unicode text other than {METADATA!r}, got {name!r}."
    )
  if isinstance(value, QuantizedWeight):
    return value
  array = as_array("save", repr(name), value)
  dtypes = [dtype.name for dtype in NAMES]
  if np.dtype(array.dtype).name not in dtypes:
    raise TypeError(
      f"save: {name!r} must be of a dtype that safetensors has ({', '.join(dtypes)}), got "
      f"{describe(array)}."
    )
  return array


def _taken_apart(values: dict[str, Any], origin: Checkpoint) -> dict[str, Any]:
  """Arrays that `load` made of what each expert has, as they were."""
  out: dict[str, Any] = {}
  for name, value in values.items():
    form = origin.stored_forms.get(name)
    is_packed = isinstance(value, QuantizedWeight)
    if form is None or is_packed or tuple(value.shape[:1]) != (len(form.paths),):
      out[name] = value
      continue
    last = name.rpartition(".")[2]
    for i, path in enumerate(form.paths):
      part = f"{path}.{last}"
      if part in values:
        raise ValueError(
          f"save: {part!r} is a part of {name!r}, the stack of all experts', and is given besides; "
          "leave one of them out."
        )
      out[part] = value[i]
  return out


def _stored(name: str, weight: QuantizedWeight, format: str, origin: Checkpoint) -> Stored:
  layout = layout_of(format, weight.mode)
  if layout is None:
    able = " or ".join(repr(row.format) for row in LAYOUTS if row.mode == weight.mode)
    raise ValueError(
      f"save: {name!r} is quantized in mode {weight.mode!r}, which format {format!r} has not; "
      f"save it as {able}."
    )
  form = origin.stored_forms.get(name)
  if form is not None and _still_fits(form, weight, layout, origin):
    dtype = form.scales_dtype if form.scales_dtype in layout.scales_dtypes else None
    form = dataclasses.replace(form, scales_dtype=dtype)
    return Stored(name.removesuffix(form.naming.weight), layout, form)
  if name.endswith(SUFFIX) and not layout.in_blocks:
    path = name.removesuffix(SUFFIX)
    if weight.ndim == 2 or format not in _ONE_MATRIX or _was_stack(name, format, origin):
      return Stored(path, layout, Form())
    return Stored(path, layout, Form(paths=_of_experts(name, weight, layout)))
  if weight.ndim == 3 and OF_PARAMETERS[format] and not name.endswith(SUFFIX):
    return Stored(name, layout, Form(OF_PARAMETERS[format][0], transposed=format == "modelopt"))
  if layout.in_blocks:
    raise ValueError(
      f"save: the name of a QuantizedWeight of mode {weight.mode!r} must be that of stacked "
      f"experts in format {format!r}, such as 'model.experts.down_proj', and its shape (E, N, K), "
      f"got {name!r} and {weight.shape}."
    )
  raise ValueError(
    f"save: the name of a QuantizedWeight must be that of a layer and {SUFFIX!r}, such as "
    f"'model.proj.weight', got {name!r}."
  )


def _still_fits(form: Form, weight: QuantizedWeight, layout: Layout, origin: Checkpoint) -> bool:
  """Whether what a weight was stored as is what one of its shape can be in a format."""
  if form.paths:
    return layout.format != "mlx" and weight.shape[:-2] == (len(form.paths),)
  if layout.format != origin.format:
    return False
  return form.naming == LAYER or weight.ndim == 3


def _was_stack(name: str, format: str, origin: Checkpoint) -> bool:
  return format == origin.format and name in origin.stored_scales


def _of_experts(name: str, weight: QuantizedWeight, layout: Layout) -> tuple[str, ...]:
  """The paths of layers that the matrices of a stack are: a.experts.0.up of a.experts.up."""
  paths = expert_paths(name.removesuffix(SUFFIX), weight.shape[0])
  if paths is None or weight.ndim != 3:
    raise ValueError(
      f"save: {name!r} must have two dimensions, (N, K), in {layout.format} {layout.name}, which "
      f"holds one matrix a layer, got shape {weight.shape}; save its matrices under a name each, "
      "or a stack of experts under a name such as 'model.experts.up_proj.weight'."
    )
  return paths


def _check_names(values: dict[str, Any], stored: dict[str, Stored]) -> None:
  """No tensor of a layer has the name of another."""
  for name, how in stored.items():
    for suffix in (*how.layout.required, *how.layout.scalars.values()):
      for part in how.names(suffix):
        if part in values and part != name:
          raise ValueError(
            f"save: {part!r} is a tensor of the QuantizedWeight {name!r} in format "
            f"{how.layout.format!r}, and is given besides; leave it out, or rename it."
          )


def _check_plain(
  values: dict[str, Any], stored: dict[str, Stored], format: str, origin: Checkpoint
) -> None:
  """No array would be taken for a part of a quantized layer, which `load` refuses."""
  parts = [
    part
    for how in stored.values()
    for suffix in (*how.layout.required, *how.layout.scalars.values())
    for part in how.names(suffix)
  ]
  quantized = {path for how in stored.values() for path in how.paths}
  of_activations = _kv_cache.GROUPS in origin.kv_cache
  left = Left([*values, *parts], quantized, format, of_activations)
  for name, value in values.items():
    if name in stored:
      continue
    dtype = NAMES[np.dtype(value.dtype)]
    what = left.what(TensorInfo(name, pathlib.Path(), dtype, tuple(value.shape)))
    if what is not None:
      raise ValueError(
        f"save: {name!r} is {what} by its name, dtype and shape, got {describe(value)}, which load "
        "would refuse; rename it, cast it or leave it out."
      )


def _with_dtype(config: dict[str, Any], weights: list[QuantizedWeight]) -> dict[str, Any]:
  """config, with the weights' own dtype where it names none and they have one."""
  dtypes = {weight.dtype.name for weight in weights}
  if len(dtypes) > 1 or any(key in config for key in DTYPE_KEYS):
    return config
  return {**config, "torch_dtype": dtypes.pop()}


def _not_quantized(values: dict[str, Any]) -> list[str]:
  """Layers whose weight could have been quantized: a reader would take them to be, unless told."""
  return [
    name.removesuffix(SUFFIX)
    for name, value in values.items()
    if name.endswith(SUFFIX) and not isinstance(value, QuantizedWeight) and value.ndim >= 2
  ]
