"""The JSON files that a saved checkpoint has beside its weights, so that their readers know it."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jaxqq
from jaxqq.checkpoint import _kv_cache
from jaxqq.checkpoint._layouts import Layout
from jaxqq.checkpoint._mlx import QUANTIZES_INPUTS
from jaxqq.checkpoint._modelopt import MIXED, WEIGHT_ONLY
from jaxqq.checkpoint._schemes import CONFIG, MODELOPT_CONFIG, QUANTIZATION_KEYS
from jaxqq.checkpoint._transformers import LEAVES_INPUTS


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a configuration says of a layer.

  Attributes:
    static: its activations have a scale in the files.
    weight_only: they are left as they are; None where nothing is known of them.
  """

  layout: Layout
  static: bool
  weight_only: bool | None

  @property
  def leaves_inputs(self) -> bool:
    """Unless known, a layer quantizes its activations where it can: nvfp4 with a static scale."""
    if self.weight_only is None:
      return self.layout.fmt.has_global_scale and not self.static
    return self.weight_only


Groups = dict[tuple[Layout, bool, bool], list[str]]  # layout, static, leaves_inputs


def leaves_inputs(format: str, layers: dict[str, Kind]) -> dict[str, bool]:
  """Whether the configuration says of each layer that its activations are left as they are."""
  if format == "mlx":  # which says it of all
    return dict.fromkeys(layers, any(kind.weight_only is not False for kind in layers.values()))
  return {layer: kind.leaves_inputs for layer, kind in layers.items()}


def written_configs(
  format: str,
  config: dict[str, Any],
  layers: dict[str, Kind],
  others: list[str],
  kv_cache: dict[str, Any],
) -> dict[str, dict[str, Any]]:
  """The contents of each JSON file, by its name.

  Args:
    format: one of `SAVED_FORMATS`.
    config: what else config.json holds.
    layers: the kind of each quantized layer.
    others: the layers that could be quantized and are not.
    kv_cache: what `load` found of it.
  """
  config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
  if format in ("mlx", "transformers"):
    _kv_cache.check_none(format, kv_cache)
  if format == "mlx":
    quantization = _mlx({layer: kind.layout for layer, kind in layers.items()})
    if not any(leaves_inputs(format, layers).values()):
      config.setdefault(QUANTIZES_INPUTS, True)
    elif any(kind.weight_only for kind in layers.values()):
      config.pop(QUANTIZES_INPUTS, None)
    return {CONFIG: config | dict.fromkeys(QUANTIZATION_KEYS, quantization)}
  groups: Groups = collections.defaultdict(list)
  for layer, kind in layers.items():
    groups[kind.layout, kind.static, kind.leaves_inputs].append(layer)
  if format == "transformers":
    return {CONFIG: config | {"quantization_config": _transformers(groups, others)}}
  if format == "compressed-tensors":
    quantization = _compressed_tensors(groups, others, kv_cache)
    return {CONFIG: config | {"quantization_config": quantization}}
  producer = {"name": "jaxqq", "version": jaxqq.__version__}
  algorithm, scheme = _kv_cache.in_modelopt(kv_cache)
  quantization = _modelopt(groups, others, algorithm)
  hf = _modelopt_in_config(groups, quantization, scheme) | {"producer": producer}
  return {
    CONFIG: config | {"quantization_config": hf},
    MODELOPT_CONFIG: {"producer": producer, "quantization": quantization},
  }


def _mlx(layers: dict[str, Layout]) -> dict[str, Any]:
  """The mode of most layers for all, and an entry for each of the others."""
  entries = {
    layer: {"group_size": row.fmt.group_size, "bits": row.fmt.bits, "mode": row.mode}
    for layer, row in layers.items()
  }
  common = collections.Counter(row.mode for row in layers.values()).most_common(1)[0][0]
  for_all = next(entry for entry in entries.values() if entry["mode"] == common)
  return for_all | {layer: entry for layer, entry in entries.items() if entry != for_all}


def _transformers(groups: Groups, others: list[str]) -> dict[str, Any]:
  """One quant_method for all layers, whose activations are all quantized, or none is."""
  kinds = {(layout, leaves_inputs) for layout, _, leaves_inputs in groups}
  if len(kinds) > 1:
    names = sorted({f"{layout.mode}{' in the weight only' * leaves}" for layout, leaves in kinds})
    raise ValueError(
      f"save: format 'transformers' has one kind of quantized layers for all, got "
      f"{' and '.join(names)}; save it as 'compressed-tensors'."
    )
  ((layout, leaves_inputs),) = kinds
  out = {"quant_method": layout.name, "modules_to_not_convert": others}
  if leaves_inputs != (layout.name == LEAVES_INPUTS):  # what each does where nothing is said
    out["activation_format"] = "bf16" if leaves_inputs else layout.mode
  return out


def _modelopt(groups: Groups, others: list[str], kv_cache: str | None) -> dict[str, Any]:
  """hf_quant_config.json's "quantization"."""
  entries = {
    kind: {"quant_algo": _algorithm(kind[0], kind[2]), "group_size": kind[0].fmt.group_size}
    for kind in groups
  }
  first = next(iter(entries.values()))
  if all(entry == first for entry in entries.values()):
    return {**first, "kv_cache_quant_algo": kv_cache, "exclude_modules": others}
  return {
    "quant_algo": MIXED,
    "kv_cache_quant_algo": kv_cache,
    "quantized_layers": {layer: entries[kind] for kind, names in groups.items() for layer in names},
    "exclude_modules": others,
  }


def _algorithm(layout: Layout, leaves_inputs: bool) -> str:
  return WEIGHT_ONLY + layout.name if leaves_inputs else layout.name


def _modelopt_in_config(
  groups: Groups, quantization: dict[str, Any], kv_cache: Any
) -> dict[str, Any]:
  """The same in the words of config.json."""
  config_groups = {}
  for i, ((layout, _, leaves_inputs), layers) in enumerate(groups.items()):
    fmt = layout.fmt
    args = {"dynamic": False, "num_bits": fmt.bits, "type": "float", "group_size": fmt.group_size}
    activations = {} if leaves_inputs else {"input_activations": args}
    targets = ["Linear"] if len(groups) == 1 else layers
    config_groups[f"group_{i}"] = {**activations, "weights": args, "targets": targets}
  kept: dict[str, Any] = {
    key: quantization[key] for key in ("quant_algo", "quantized_layers") if key in quantization
  }
  return {
    "config_groups": config_groups,
    **kept,
    "ignore": quantization["exclude_modules"],
    **({} if kv_cache is None else {"kv_cache_scheme": kv_cache}),
    "quant_method": "modelopt",
  }


def _compressed_tensors(
  groups: Groups, others: list[str], kv_cache: dict[str, Any]
) -> dict[str, Any]:
  """A group for each scheme, which names a class of layers where one scheme is for all."""
  names = {layout.name for layout, _, _ in groups}
  scheme, of_activations = _kv_cache.in_compressed_tensors(kv_cache)
  config_groups = {
    f"group_{i}": {
      "format": layout.name,
      "targets": ["Linear"] if len(groups) == 1 else layers,
      **_quantization_args(layout, static, leaves_inputs),
    }
    for i, ((layout, static, leaves_inputs), layers) in enumerate(groups.items())
  }
  for key, group in of_activations.items():
    free = key if key not in config_groups else f"group_{len(config_groups)}"
    config_groups[free] = group
  return {
    "config_groups": config_groups,
    "format": names.pop() if len(names) == 1 else "mixed-precision",
    "ignore": others,
    "kv_cache_scheme": scheme,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
  }


def _quantization_args(layout: Layout, static: bool, leaves_inputs: bool) -> dict[str, Any]:
  """Source: the presets of compressed-tensors' quant_scheme.py, NVFP4A16 and the like."""
  fmt = layout.fmt
  args = {
    "num_bits": fmt.bits,
    "type": "float",
    "strategy": "tensor_group" if fmt.has_global_scale else "group",
    "symmetric": True,
    "group_size": fmt.group_size,
    "scale_dtype": "torch.uint8" if fmt.scale_is_power_of_two else "torch.float8_e4m3fn",
  }
  # Local: scales of groups as they come, under a scale that is known before.
  dynamic = "local" if static else True
  activations = None if leaves_inputs else {**args, "dynamic": dynamic}
  return {"weights": {**args, "dynamic": False}, "input_activations": activations}
