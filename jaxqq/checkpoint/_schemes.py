"""What the JSON files beside the weights say: which project wrote them, and which layers how.

`read_scheme` gives a `Scheme`, which names the layout of a layer from the tensors it has.
"""

from __future__ import annotations

import abc
import fnmatch
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from jaxqq.checkpoint._files import TensorInfo
from jaxqq.checkpoint._layouts import LAYOUTS, Layout, layout_of

CONFIG = "config.json"
MODELOPT_CONFIG = "hf_quant_config.json"
CONFIGS = (CONFIG, MODELOPT_CONFIG)
QUANTIZATION_KEYS = ("quantization", "quantization_config")  # of config.json
MIXED_MODELOPT = "MIXED_PRECISION"
WEIGHT_ONLY = "W4A16_"  # a server leaves the activations; the weights are laid out alike

Tensors = dict[str, TensorInfo]


class Scheme(abc.ABC):
  """How a checkpoint is quantized, as its configuration says."""

  format: str

  def __init__(self, file: pathlib.Path, config: dict[str, Any]):
    self.file = file
    self.config = config

  @abc.abstractmethod
  def layout(self, layer: str, tensors: Tensors) -> Layout | None:
    """The layout of a layer that has these tensors, by suffix; None for one not quantized."""

  def layers(self) -> list[str]:
    """Layers that the configuration names as quantized: their tensors must be there."""
    return []

  def field(self, key: str, kind: type) -> Any:
    """A value of the configuration that is a dict or a list, empty where there is none."""
    value = self.config.get(key)
    if value is not None and not isinstance(value, kind):
      raise self.refuse(repr(key), value, f"a JSON {'object' if kind is dict else 'list'}")
    return kind() if value is None else value

  def check_group_size(self, key: str, entry: Any, layout: Layout) -> None:
    right = layout.fmt.group_size
    found = entry.get("group_size") if isinstance(entry, dict) else entry
    if found not in (None, right):
      raise self.refuse(key, found, f"{right}, that of {layout.name}")

  def refuse(self, key: str, found: Any, expected: str) -> ValueError:
    return ValueError(f"load: {self.file}: {key} must be {expected}, found {found!r}.")


class Mlx(Scheme):
  """`quantization`: {"group_size", "bits", "mode", "<layer>": {...} or false}.

  A layer of its own entry is as that says. Any other one is quantized where it has scales.
  Source: ml-explore/mlx-lm mlx_lm/utils.py, load_model.
  """

  format = "mlx"

  def layout(self, layer: str, tensors: Tensors) -> Layout | None:
    own = self.config.get(layer)
    if own is False:
      return None
    weight = tensors.get("weight")
    packed = "scales" in tensors or (weight is not None and weight.dtype == "U32")
    if own is None and not packed:
      return None
    if "biases" in tensors:
      biases = tensors["biases"]
      raise ValueError(
        f"load: {biases.file}: tensor {biases.name!r} belongs to MLX's mode 'affine'; expected "
        f"a mode without biases, {self._modes()}."
      )
    key, entry = "'quantization'", self.config
    if isinstance(own, dict):
      key, entry = f"'quantization' of layer {layer!r}", own
    return self._layout(key, entry)

  def layers(self) -> list[str]:
    return [name for name, entry in self.config.items() if isinstance(entry, dict)]

  def _modes(self) -> str:
    return _either(row.mode for row in LAYOUTS if row.format == self.format)

  def _layout(self, key: str, entry: dict[str, Any]) -> Layout:
    mode = entry.get("mode", "affine")
    layout = layout_of(self.format, mode) if isinstance(mode, str) else None
    if layout is None:
      found = f"{mode!r}" if "mode" in entry else "none, which is 'affine'"
      raise ValueError(f"load: {self.file}: mode in {key} must be {self._modes()}, found {found}.")
    self.check_group_size(f"group_size in {key}", entry, layout)
    if entry.get("bits") not in (None, layout.fmt.bits):
      raise self.refuse(f"bits in {key}", entry["bits"], f"{layout.fmt.bits}, that of {mode}")
    return layout


class ModelOpt(Scheme):
  """`quant_algo`, `group_size`, and the layers left out, with wildcards as of a shell.

  They are under "quantization" with "exclude_modules" in hf_quant_config.json, and with "ignore"
  in config.json. Under MIXED_PRECISION "quantized_layers" has an entry for each layer.
  Source: NVIDIA/Model-Optimizer modelopt/torch/export/convert_hf_config.py and quant_utils.py; how
  the wildcards match: vllm-project/vllm vllm/model_executor/layers/quantization/modelopt.py.
  """

  format = "modelopt"

  def __init__(self, file: pathlib.Path, config: dict[str, Any]):
    inner = config.get("quantization", config)
    if not isinstance(inner, dict):
      raise ValueError(f"load: {file}: 'quantization' must be an object, found {inner!r}.")
    super().__init__(file, inner)
    self._excluded = [*self.field("exclude_modules", list), *self.field("ignore", list)]
    self._of_layer: dict[str, Layout] | None = None
    if self.config.get("quant_algo") == MIXED_MODELOPT:
      layers = self.field("quantized_layers", dict)
      self._of_layer = {
        layer: self._layout(f" of layer {layer!r}", entry) for layer, entry in layers.items()
      }
    else:
      self._of_all = self._layout("", self.config)

  def layout(self, layer: str, tensors: Tensors) -> Layout | None:
    if self._of_layer is not None:
      return self._of_layer.get(layer)
    if any(fnmatch.fnmatchcase(layer, str(pattern)) for pattern in self._excluded):
      return None
    weight = tensors.get("weight")
    packed = weight is not None and weight.dtype == self._of_all.codes_dtype
    return self._of_all if packed or tensors.keys() & {"weight_scale", "weight_scale_2"} else None

  def layers(self) -> list[str]:
    return list(self._of_layer or ())

  def _layout(self, of: str, entry: dict[str, Any]) -> Layout:
    if not isinstance(entry, dict):
      raise self.refuse(f"the entry{of}", entry, "a JSON object")
    layouts = {row.name: row for row in LAYOUTS if row.format == self.format}
    algorithm = entry.get("quant_algo")
    layout = layouts.get(str(algorithm).upper().removeprefix(WEIGHT_ONLY))
    if layout is None:
      known = [*layouts, WEIGHT_ONLY + "NVFP4", *([] if of else [MIXED_MODELOPT])]
      raise self.refuse(f"quant_algo{of}", algorithm, _either(known))
    self.check_group_size(f"group_size{of}", entry, layout)
    return layout


class CompressedTensors(Scheme):
  """`format`, or one for each of `config_groups`; `ignore` with names and "re:..." patterns.

  Source: vllm-project/compressed-tensors src/compressed_tensors/quantization/quant_config.py, and
  src/compressed_tensors/utils/match.py.
  """

  format = "compressed-tensors"

  def __init__(self, file: pathlib.Path, config: dict[str, Any]):
    super().__init__(file, config)
    self._ignored = [self._pattern(ignored) for ignored in self.field("ignore", list)]
    layouts = {row.name: row for row in LAYOUTS if row.format == self.format}
    self._layouts: list[Layout] = []
    for key, group in (self.field("config_groups", dict) or {"": {}}).items():
      if not isinstance(group, dict):
        raise self.refuse(f"{key!r} of config_groups", group, "a scheme written out")
      name = group.get("format") or config.get("format")
      if not isinstance(name, str) or name not in layouts:
        raise self.refuse(f"format of {key!r}" if key else "format", name, _either(layouts))
      self.check_group_size(f"group_size of {key!r}", group.get("weights"), layouts[name])
      self._layouts.append(layouts[name])

  def layout(self, layer: str, tensors: Tensors) -> Layout | None:
    if any(pattern.match(layer) for pattern in self._ignored):
      return None
    weight = tensors.get("weight")
    marks = {"weight_packed", "weight_global_scale", "weight_scale"} & tensors.keys()
    if not marks and (weight is None or weight.dtype != "F8_E4M3"):
      return None
    packed = marks & {"weight_packed", "weight_global_scale"}
    mode = "nvfp4" if packed else "mxfp8"
    return next((row for row in self._layouts if row.mode == mode), self._layouts[0])

  def _pattern(self, ignored: Any) -> re.Pattern[str]:
    """A name means itself, and "re:..." what begins as that says."""
    name = str(ignored)
    try:
      return re.compile(name[3:] if name.startswith("re:") else re.escape(name) + r"\Z")
    except re.error as error:
      raise self.refuse("'ignore'", ignored, f"of regular expressions ({error})") from None


def _either(words: Iterable[str]) -> str:
  return " or ".join(map(repr, words))


def read_scheme(
  folder: pathlib.Path, configs: dict[str, dict[str, Any]]
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
    return ModelOpt(folder / MODELOPT_CONFIG, configs[MODELOPT_CONFIG]), config
  for part in (config, config.get("text_config")):  # of a model that reads more than text
    scheme = _scheme_in(file, part) if isinstance(part, dict) else None
    if scheme is not None:
      return scheme, config
  raise ValueError(
    f"load: {file}: expected 'quantization' (MLX) or 'quantization_config' (ModelOpt, "
    "compressed-tensors), found neither; safetensors.flax.load_file reads a checkpoint that is not "
    "quantized."
  )


def _scheme_in(file: pathlib.Path, config: dict[str, Any]) -> Scheme | None:
  if isinstance(config.get("quantization"), dict):
    return Mlx(file, config["quantization"])
  quantization = config.get("quantization_config")
  if not isinstance(quantization, dict):
    return None
  method = quantization.get("quant_method")
  if method is None and {"group_size", "bits"} & quantization.keys():
    return Mlx(file, quantization)
  if str(method).lower().startswith("modelopt"):
    return ModelOpt(file, quantization)
  if method == CompressedTensors.format:
    return CompressedTensors(file, quantization)
  raise ValueError(
    f"load: {file}: quant_method must be 'modelopt' or 'compressed-tensors', found {method!r}."
  )
