"""What the JSON files beside the weights say: which project wrote them, and which layers how.

`read_scheme` gives a `Scheme`, which names the layout of a layer from the tensors it has.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from jaxqq._checks import check_bool
from jaxqq.checkpoint._compressed_tensors import CompressedTensors
from jaxqq.checkpoint._mlx import Mlx
from jaxqq.checkpoint._modelopt import ModelOpt, kv_cache_of
from jaxqq.checkpoint._scheme import Scheme, either
from jaxqq.checkpoint._transformers import Transformers

CONFIG = "config.json"
MODELOPT_CONFIG = "hf_quant_config.json"
CONFIGS = (CONFIG, MODELOPT_CONFIG)
QUANTIZATION_KEYS = ("quantization", "quantization_config")  # of config.json


_KNOWN = {
  "fp8": ("dequantize", "mxfp8", "refuse"),
  "affine": ("dequantize", "refuse"),
  "experts": ("stack", None),
}


@dataclasses.dataclass(frozen=True)
class Choices:
  """What `load` is to do with layers that jaxqq has no packed form for, experts, and inputs."""

  fp8: str = "dequantize"
  affine: str = "refuse"
  experts: str | None = None
  quantize_input: bool | None = None  # of each weight; None is as the files say

  def check(self) -> None:
    if self.quantize_input is not None:
      check_bool("load", "quantize_input", self.quantize_input)
    for name, known in _KNOWN.items():
      value = getattr(self, name)
      if not (value is None or isinstance(value, str)) or value not in known:
        right = " or ".join(map(repr, known))
        raise ValueError(f"load: {name} must be {right}, got {value!r}.")


def read_scheme(
  folder: pathlib.Path, configs: dict[str, dict[str, Any]], choices: Choices
) -> tuple[Scheme, dict[str, Any]]:
  """The scheme of a folder, and config.json, {} where there is none.

  configs: what those of `CONFIGS` hold that are there.
  """
  file = folder / CONFIG
  if not configs:
    raise FileNotFoundError(
      f"load: {folder}: expected {CONFIG} or {MODELOPT_CONFIG}, which say how the weights are "
      "quantized, found neither."
    )
  config = configs.get(CONFIG, {})
  if MODELOPT_CONFIG in configs:
    scheme: Scheme = ModelOpt(folder / MODELOPT_CONFIG, configs[MODELOPT_CONFIG], choices.fp8)
    in_config = config.get("quantization_config")
    if not scheme.kv_cache and isinstance(in_config, dict):
      scheme.kv_cache = kv_cache_of(in_config)
    return scheme, config
  for part in (config, config.get("text_config")):  # of a model that reads more than text
    found = _scheme_in(file, part, config, choices) if isinstance(part, dict) else None
    if found is not None:
      return found, config
  raise ValueError(
    f"load: {file}: expected 'quantization' (MLX) or 'quantization_config' (ModelOpt, "
    "compressed-tensors, transformers), found neither; safetensors.flax.load_file reads a "
    "checkpoint that is not quantized."
  )


def _scheme_in(
  file: pathlib.Path, part: dict[str, Any], config: dict[str, Any], choices: Choices
) -> Scheme | None:
  if isinstance(part.get("quantization"), dict):
    return Mlx(file, part["quantization"], config, choices.affine)
  quantization = part.get("quantization_config")
  if not isinstance(quantization, dict):
    return None
  method = quantization.get("quant_method")
  if method is None and {"group_size", "bits"} & quantization.keys():
    return Mlx(file, quantization, config, choices.affine)
  if str(method).lower().startswith("modelopt"):
    return ModelOpt(file, quantization, choices.fp8)
  if method == CompressedTensors.format:
    return CompressedTensors(file, quantization, choices.fp8)
  if method in Transformers.METHODS:
    return Transformers(file, quantization)
  known = either(("modelopt", CompressedTensors.format, *Transformers.METHODS))
  raise ValueError(f"load: {file}: quant_method must be {known}, found {method!r}.")
