"""The JSON files that a saved checkpoint has beside its weights, so that their readers know it."""

from __future__ import annotations

import collections
from typing import Any

import jaxqq
from jaxqq.checkpoint._layouts import Layout
from jaxqq.checkpoint._schemes import (
  CONFIG,
  MIXED_MODELOPT,
  MODELOPT_CONFIG,
  QUANTIZATION_KEYS,
  WEIGHT_ONLY,
)

# The layers of each kind: their layout, and whether their activations have a static scale.
Groups = dict[tuple[Layout, bool], list[str]]


def written_configs(
  format: str, config: dict[str, Any], layers: dict[str, tuple[Layout, bool]], others: list[str]
) -> dict[str, dict[str, Any]]:
  """The contents of each JSON file, by its name.

  Args:
    format: one of `SAVED_FORMATS`.
    config: what else config.json holds.
    layers: each quantized layer's layout, and whether its activations have a static scale.
    others: the layers that could be quantized and are not.
  """
  config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
  if format == "mlx":
    quantization = _mlx({layer: layout for layer, (layout, _) in layers.items()})
    return {CONFIG: config | dict.fromkeys(QUANTIZATION_KEYS, quantization)}
  groups: Groups = collections.defaultdict(list)
  for layer, kind in layers.items():
    groups[kind].append(layer)
  if format == "compressed-tensors":
    return {CONFIG: config | {"quantization_config": _compressed_tensors(groups, others)}}
  producer = {"name": "jaxqq", "version": jaxqq.__version__}
  quantization = _modelopt(groups, others)
  hf = _modelopt_in_config(groups, quantization) | {"producer": producer}
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


def _modelopt(groups: Groups, others: list[str]) -> dict[str, Any]:
  """hf_quant_config.json's "quantization"."""
  kinds = {
    kind: {"quant_algo": _algorithm(*kind), "group_size": kind[0].fmt.group_size} for kind in groups
  }
  if len(kinds) == 1:
    return {**next(iter(kinds.values())), "kv_cache_quant_algo": None, "exclude_modules": others}
  layers = {layer: kinds[kind] for kind, names in groups.items() for layer in names}
  return {
    "quant_algo": MIXED_MODELOPT,
    "kv_cache_quant_algo": None,
    "quantized_layers": layers,
    "exclude_modules": others,
  }


def _algorithm(layout: Layout, static: bool) -> str:
  weight_only = layout.fmt.has_global_scale and not static
  return WEIGHT_ONLY + layout.name if weight_only else layout.name


def _modelopt_in_config(groups: Groups, quantization: dict[str, Any]) -> dict[str, Any]:
  """The same in the words of config.json."""
  config_groups = {}
  for i, ((layout, static), layers) in enumerate(groups.items()):
    fmt = layout.fmt
    args = {"dynamic": False, "num_bits": fmt.bits, "type": "float", "group_size": fmt.group_size}
    activations = {} if fmt.has_global_scale and not static else {"input_activations": args}
    targets = ["Linear"] if len(groups) == 1 else layers
    config_groups[f"group_{i}"] = {**activations, "weights": args, "targets": targets}
  kept: dict[str, Any] = {
    key: quantization[key] for key in ("quant_algo", "quantized_layers") if key in quantization
  }
  return {
    "config_groups": config_groups,
    **kept,
    "ignore": quantization["exclude_modules"],
    "quant_method": "modelopt",
  }


def _compressed_tensors(groups: Groups, others: list[str]) -> dict[str, Any]:
  """A group for each scheme, which names a class of layers where one scheme is for all."""
  names = {layout.name for layout, _ in groups}
  return {
    "config_groups": {
      f"group_{i}": {
        "format": layout.name,
        "targets": ["Linear"] if len(groups) == 1 else layers,
        **_quantization_args(layout, static),
      }
      for i, ((layout, static), layers) in enumerate(groups.items())
    },
    "format": names.pop() if len(names) == 1 else "mixed-precision",
    "ignore": others,
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
  }


def _quantization_args(layout: Layout, static: bool) -> dict[str, Any]:
  """Source: the presets NVFP4, NVFP4A16 and MXFP8 of compressed-tensors' quant_scheme.py."""
  fmt = layout.fmt
  args = {
    "num_bits": fmt.bits,
    "type": "float",
    "strategy": "tensor_group" if fmt.has_global_scale else "group",
    "symmetric": True,
    "group_size": fmt.group_size,
    "scale_dtype": "torch.uint8" if fmt.scale_is_power_of_two else "torch.float8_e4m3fn",
  }
  activations: dict[str, Any] | None = {**args, "dynamic": True}
  if fmt.has_global_scale:  # scales of groups as they come, under a scale that is known before
    activations = {**args, "dynamic": "local"} if static else None
  return {"weights": {**args, "dynamic": False}, "input_activations": activations}
