"""Whether a tensor that no layer took is one of a model, or what only a quantized layer has.

Names tell, and dtypes with shapes: codes are bytes in two dimensions or more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from jaxqq.checkpoint._files import TensorInfo
from jaxqq.checkpoint._naming import PACKED

# Suffixes, or endings of a parameter's name, of what only a quantized layer has.
_OF_LAYERS = (
  *("weight_packed", "weight_g_idx", "weight_shape", "weight_blocks", "scale_inv"),
  *("qweight", "qzeros", "g_idx"),
)
# The same, with whatever number is behind: "weight_scale_2", "gate_up_proj_input_scale".
_SCALE = r"(?:_global)?_(?:scales?|zero_points?)(?:_\w+)?$"
_OF_WEIGHTS = re.compile(rf"(?:^|_)weight{_SCALE}")
_OF_ACTIVATIONS = re.compile(rf"(?:^|_)(?:input|activation){_SCALE}")
# What ModelOpt makes scales from, when it exports a model.
_CALIBRATION = re.compile(r"\b(?:input|weight)_quantizer\.\w+$")
_SMOOTHING = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
# Modules of rotations: compressed-tensors' transforms, FP-Quant's matrices.
_ROTATION = re.compile(
  r"_(weight_input|weight_output|k_cache|q_attn)\.weight$"
  r"|(forward|backward)_hadamard_matrix$|\b(hadamard|rotation)(_matrix|\.weight)?$"
)
# One below a layer; a layer may be called "attn_output", too.
_ROTATION_OF_LAYER = re.compile(r"(.*)\.[^.]*_(?:input|output)\.weight$")
# Beside a layer that has no place for them.
_OF_QUANTIZED = (
  *("biases", "scale", "scales", "global_scale", "global_scales", "zeros", "zero_point"),
)
_OF_MLX = ("scales", "global_scale")  # where the format has no other names for them
_CODES_OF_PARAMETERS = re.compile(r"_(packed|blocks|qweight|codes)$")


class Left:
  """Tells what only a quantized layer has from what a model has, by names, dtypes and shapes."""

  def __init__(
    self,
    names: Iterable[str],
    quantized: set[str],
    format: str,
    scales_activations: bool = False,
  ):
    """Of all tensors there are.

    Args:
      names: theirs.
      quantized: the paths of layers.
      format: one of `SAVED_FORMATS`.
      scales_activations: as of a `Scheme`.
    """
    self._names = set(names)
    self._quantized = quantized
    self._scaled = _scaled(self._names)
    self._is_mlx = format == "mlx"
    self._scales_activations = scales_activations

  def is_beside_layer(self, name: str) -> bool:
    """Whether it is below or beside a quantized layer, by its name."""
    return not self._quantized.isdisjoint(_beginnings(name))

  def what(self, tensor: TensorInfo) -> str | None:
    """What of a quantized layer a tensor is that none took; None for one of a model."""
    path, _, last = tensor.name.rpartition(".")
    if last.endswith(_SMOOTHING):
      return "a factor of the activations of a quantized layer, which is not applied"
    if self._is_rotation(tensor.name):
      return "a rotation, which is not applied"
    if any(last == suffix or last.endswith(f"_{suffix}") for suffix in _OF_LAYERS):
      return "a scale or a code of a quantized layer"
    if self._is_scale(path, last) or _CALIBRATION.search(tensor.name):
      return "a scale or a code of a quantized layer"
    return "a code or a scale of a quantized layer" if self._is_codes(path, last, tensor) else None

  def _is_rotation(self, name: str) -> bool:
    below = _ROTATION_OF_LAYER.fullmatch(name)
    of_layer = below and (below[1] in self._quantized or f"{below[1]}.weight" in self._names)
    return bool(of_layer or _ROTATION.search(name))

  def _is_scale(self, path: str, last: str) -> bool:
    if _OF_ACTIVATIONS.search(last):
      return not self._scales_activations
    beside = path in self._quantized and last in _OF_QUANTIZED
    return beside or bool(_OF_WEIGHTS.search(last)) or (self._is_mlx and last in _OF_MLX)

  def _is_codes(self, path: str, last: str, tensor: TensorInfo) -> bool:
    if tensor.dtype not in PACKED or len(tensor.shape) < 2:
      return False
    of_layer = last == "weight" or _CODES_OF_PARAMETERS.search(last) is not None
    is_scaled = not self._scaled.isdisjoint((path, tensor.name)) or _has_scale(last)
    return of_layer or tensor.dtype.startswith("F8") or is_scaled


def _beginnings(name: str) -> list[str]:
  """What ends where a word of the name does."""
  return [name[: found.start()] for found in re.finditer(r"[._]", name)]


def _has_scale(last: str) -> bool:
  return not {"scale", "scales"}.isdisjoint(last.split("_"))


def _scaled(names: Iterable[str]) -> set[str]:
  """Layers that have a scale, and names that a scale's begins with: "a.w_scale" is of "a.w"."""
  out = set()
  for name in names:
    path, _, last = name.rpartition(".")
    words = last.split("_")
    if not _has_scale(last):
      continue
    if words[0] in ("scale", "scales", "weight"):
      out.add(path)
    out |= {f"{path}.{'_'.join(words[:i])}" for i in range(1, len(words))}
  return out
