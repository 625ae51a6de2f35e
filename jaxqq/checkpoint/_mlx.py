"""MLX's configuration."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxqq.checkpoint._dense import Dense
from jaxqq.checkpoint._layouts import Layout, layout_of, layouts_of
from jaxqq.checkpoint._scheme import Scheme, Tensors, either

QUANTIZES_INPUTS = "quantize_activations"  # of config.json
# Of `affine`, where an entry does not say: mlx.nn.quantize's own.
_AFFINE = {"bits": 4, "group_size": 64}
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)


class Mlx(Scheme):
  """`quantization`: {"group_size", "bits", "mode", "<layer>": {...} or false}.

  A layer of its own entry is as that says. Any other one is quantized where it has scales. An entry
  of a layer that has no tensors says nothing.
  Source: ml-explore/mlx-lm mlx_lm/utils.py, load_model; ml-explore/mlx
  python/mlx/nn/layers/quantized.py, quantize.
  """

  format = "mlx"

  def __init__(
    self, file: pathlib.Path, config: dict[str, Any], model: dict[str, Any], affine: str
  ):
    """model: the whole of config.json. affine: what `load` was told."""
    super().__init__(file, config)
    self._weight_only = not model.get(QUANTIZES_INPUTS, False)
    self._affine = affine

  def layout(self, path: str, tensors: Tensors) -> Layout | Dense | None:
    own = self.config.get(path)
    weight = tensors.get("weight")
    packed = "scales" in tensors or (weight is not None and weight.dtype == "U32")
    if not packed and (weight is None or not isinstance(own, dict)):
      return None
    if own is False:
      found = "scales" if "scales" in tensors else "weight"
      raise ValueError(
        f"load: {tensors[found].file}: tensor {tensors[found].name!r} is of a quantized layer, but "
        f"{self.file.name} says that {path!r} is none; remove its entry in 'quantization', or the "
        "tensor."
      )
    key, entry = "'quantization'", self.config
    if isinstance(own, dict):
      key, entry = f"'quantization' of layer {path!r}", own
    return self._layout(key, entry, tensors)

  def is_weight_only(self, path: str, layout: Layout) -> bool:
    return self._weight_only

  def _modes(self) -> str:
    return either(layouts_of(self.format))

  def _layout(self, key: str, entry: dict[str, Any], tensors: Tensors) -> Layout | Dense:
    mode = entry.get("mode", "affine")
    if mode == "affine" and self._affine == "dequantize":
      return self._of_affine(key, entry)
    if "biases" in tensors:
      biases = tensors["biases"]
      raise ValueError(
        f"load: {biases.file}: tensor {biases.name!r} belongs to MLX's mode 'affine'; expected "
        f"a mode without biases, {self._modes()}; load(..., affine='dequantize') reads layers of "
        "that mode as numbers."
      )
    layout = layout_of(self.format, mode) if isinstance(mode, str) else None
    if layout is None:
      found = f"{mode!r}" if "mode" in entry else "none, which is 'affine'"
      raise ValueError(f"load: {self.file}: mode in {key} must be {self._modes()}, found {found}.")
    self.check_group_size(f"group_size in {key}", entry, layout)
    if entry.get("bits") not in (None, layout.fmt.bits):
      raise self.refuse(f"bits in {key}", entry["bits"], f"{layout.fmt.bits}, that of {mode}")
    return layout

  def _of_affine(self, key: str, entry: dict[str, Any]) -> Dense:
    sizes = {name: entry.get(name) or default for name, default in _AFFINE.items()}
    bits, group_size = sizes["bits"], sizes["group_size"]
    if type(bits) is not int or bits not in _AFFINE_BITS:
      raise self.refuse(f"bits in {key}", bits, " or ".join(map(str, _AFFINE_BITS)))
    if type(group_size) is not int or not 0 < group_size < 1 << 20:
      raise self.refuse(f"group_size in {key}", group_size, "a positive integer")
    return Dense(self.format, "affine", "affine", "scales", None, **sizes)
