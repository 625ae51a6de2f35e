"""ModelOpt's configuration, of hf_quant_config.json or of config.json."""

from __future__ import annotations

import fnmatch
import pathlib
import re
from typing import Any

from jaxqq.checkpoint._dense import FP8_BLOCK, Dense
from jaxqq.checkpoint._layouts import Layout, layouts_of
from jaxqq.checkpoint._scheme import Names, Scheme, Tensors, either, fp8_by, packed_by

MIXED = "MIXED_PRECISION"
WEIGHT_ONLY = "W4A16_"  # a server leaves the activations; the weights are laid out alike
KV_CACHE_KEYS = ("kv_cache_quant_algo", "kv_cache_scheme")
_BLOCK = (FP8_BLOCK, FP8_BLOCK)
_FP8: dict[str, tuple[int, int] | None] = {
  "FP8": None,
  "FP8_PER_CHANNEL_PER_TOKEN": None,
  "FP8_PB_WO": _BLOCK,
  "FP8_PB_REAL": _BLOCK,
}


class ModelOpt(Scheme):
  """`quant_algo`, `group_size`, and the layers left out, with wildcards as of a shell.

  They are under "quantization" with "exclude_modules" in hf_quant_config.json, and with "ignore"
  in config.json. Under MIXED_PRECISION "quantized_layers" has an entry for each layer, or for a
  module that has layers. What a wildcard leaves out and has codes and scales all the same, as
  "model.layers.1*" and a quantized layer 10, is what its tensors are.
  Source: NVIDIA/Model-Optimizer modelopt/torch/export/convert_hf_config.py and quant_utils.py; how
  the wildcards match: vllm-project/vllm vllm/model_executor/layers/quantization/modelopt.py.
  """

  format = "modelopt"

  def __init__(self, file: pathlib.Path, config: dict[str, Any], fp8: str):
    """fp8: what `load` was told."""
    inner = config.get("quantization", config)
    if not isinstance(inner, dict):
      raise ValueError(f"load: {file}: 'quantization' must be an object, found {inner!r}.")
    super().__init__(file, inner)
    self._fp8 = fp8
    self._excluded = _as_names(self.field("exclude_modules", list) + self.field("ignore", list))
    self._of_module: dict[str, str] | None = None
    self._of_all = ""
    if self.config.get("quant_algo") == MIXED:
      entries = self.field("quantized_layers", dict)
      self._of_module = {
        module: self._checked(f" of layer {module!r}", entry) for module, entry in entries.items()
      }
    else:
      self._of_all = self._checked("", self.config)
    self.kv_cache = kv_cache_of(inner)

  def layout(self, path: str, tensors: Tensors) -> Layout | Dense | None:
    algorithm = self._algorithm(path)
    if algorithm is None:
      return packed_by(self.format, tensors) or fp8_by(self.format, tensors)
    if algorithm in _FP8:
      marks = {"weight_scale", "weight_scale_2", "weight_scale_inv"} & tensors.keys()
      scales = "weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"
      dense = Dense(self.format, "fp8", algorithm, scales, _FP8[algorithm])
      return dense if path in (self._of_module or {}) or (marks and "weight" in tensors) else None
    layout = _row(algorithm)
    weight = tensors.get("weight")
    packed = weight is not None and weight.dtype == layout.codes_dtype
    if self._of_module is not None and path in self._of_module:
      return layout
    return layout if packed or tensors.keys() & {"weight_scale", "weight_scale_2"} else None

  def layers(self) -> list[str]:
    """Of what names a layer, not a module of several."""
    return list(self._of_module or ())

  def is_weight_only(self, path: str, layout: Layout) -> bool:
    return (self._algorithm(path) or self._of_all or "").startswith(WEIGHT_ONLY)

  def _algorithm(self, path: str) -> str | None:
    """That of a layer, or of the module around it that is named last; None where left out."""
    if self._of_module is None:
      return None if self._excluded.has(path) else self._of_all
    while path:
      if path in self._of_module:
        return self._of_module[path]
      path = path.rpartition(".")[0]
    return None

  def _checked(self, of: str, entry: Any) -> str:
    """The algorithm of an entry, in capitals."""
    if not isinstance(entry, dict):
      raise self.refuse(f"the entry{of}", entry, "a JSON object")
    algorithm = str(entry.get("quant_algo")).upper()
    rows = layouts_of(self.format)
    if algorithm in _FP8 and self._fp8 != "refuse":
      return algorithm
    if algorithm.removeprefix(WEIGHT_ONLY) not in rows:
      fp8 = [] if self._fp8 == "refuse" else list(_FP8)
      known = [*rows, WEIGHT_ONLY + "NVFP4", *fp8, *([] if of else [MIXED])]
      raise self.refuse(f"quant_algo{of}", entry.get("quant_algo"), either(known))
    self.check_group_size(f"group_size{of}", entry, _row(algorithm))
    return algorithm


def kv_cache_of(config: dict[str, Any]) -> dict[str, Any]:
  """What a configuration says of the cache of keys and values."""
  return {key: config[key] for key in KV_CACHE_KEYS if config.get(key) is not None}


def _as_names(excluded: list[Any]) -> Names:
  words = list(map(str, excluded))
  wild = [word for word in words if set("*?[") & set(word)]
  patterns = tuple(re.compile(fnmatch.translate(word)) for word in wild)
  return Names(frozenset(words).difference(wild), patterns)


def _row(algorithm: str) -> Layout:
  return layouts_of(ModelOpt.format)[algorithm.removeprefix(WEIGHT_ONLY)]
