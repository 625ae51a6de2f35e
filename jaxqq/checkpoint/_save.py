"""`save`: everything checked first, then a folder written beside the other and put in its place."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxqq._checks import as_array, describe
from jaxqq._weight import QuantizedWeight
from jaxqq.checkpoint._configs import written_configs
from jaxqq.checkpoint._files import INDEX, Recorded, progress_bar
from jaxqq.checkpoint._layouts import (
  LAYOUTS,
  SAVED_FORMATS,
  Layout,
  converted,
  layout_of,
  written_codes,
  written_scalars,
)
from jaxqq.checkpoint._load import DTYPE_KEYS, Checkpoint, Tensor
from jaxqq.checkpoint._replace import check_target, replacing
from jaxqq.checkpoint._safetensors import METADATA, NAMES
from jaxqq.checkpoint._schemes import CONFIG, MODELOPT_CONFIG
from jaxqq.checkpoint._writing import (
  as_json,
  parse_size,
  shard,
  shard_names,
  write_tensors,
  write_text,
)

# The "format" of a file's metadata, which transformers and mlx-lm look at.
FRAMEWORKS = {"mlx": "mlx", "modelopt": "pt", "compressed-tensors": "pt"}
SUFFIX = ".weight"


def save(
  path: str | os.PathLike[str],
  tensors: Mapping[str, Tensor],
  *,
  format: str,
  config: Mapping[str, Any] | None = None,
  max_shard_size: int | str = "5GB",
  overwrite: bool = False,
  progress: bool = True,
) -> None:
  """Writes a quantized checkpoint as MLX, ModelOpt or compressed-tensors do.

  Each `QuantizedWeight` under `X.weight` becomes the tensors of layer `X`, with the bits it has:

    "mlx": weight, scales;
    "modelopt": nvfp4 weight, weight_scale, weight_scale_2 = global_scale / 2688, and input_scale;
      mxfp8 (ModelOpt's MXFP8) weight, weight_scale;
    "compressed-tensors": nvfp4-pack-quantized with weight_packed, weight_scale,
      weight_global_scale = 2688 / global_scale, and input_global_scale; mxfp8-quantized with
      weight, weight_scale.

  A scale of the activations is written where the weight has one; a layer without is declared as
  quantized in its weight only. A weight without a global scale is written with 2688 for both, which
  stands for the same numbers. What `load` returned is written with the scalars it was stored with,
  bit for bit; and a float32 amax that those scalars do not determine is noted in the files'
  metadata, so that `load` has it again. Every other tensor is written as it is.

  The folder is written under another name and gets its own when it is complete: a failure leaves
  what was there. At every moment the old folder or the new one is at path: they exchange their
  names in one step (Linux' renameat2). A system or a file system that cannot do so has none there
  for a moment, which a warning says. What a save that was killed left beside path, the next one
  removes.

  Args:
    path: a folder, new or empty. Where it is a link, the folder that it leads to is meant.
    tensors: names to arrays and `QuantizedWeight`s: a `Checkpoint`, or any mapping.
    format: "mlx", "modelopt" or "compressed-tensors".
    config: what config.json holds besides the quantization; None is a `Checkpoint`'s own.
    max_shard_size: bytes, or a string such as "5GB"; more are split into several files with an
      index. A layer's tensors stay together.
    overwrite: replaces the weights and configurations of a folder that is not empty (*.safetensors,
      the index, config.json, hf_quant_config.json); other files in it and all subfolders stay.
    progress: a progress bar, where tqdm is installed and stderr is a terminal.

  Raises:
    OSError: the system refused, as a disk that is full. What was there is as it was; the sentence
      names path and the file.
    FileExistsError: path is a file, or a folder that is not empty and overwrite is not set.
    TypeError: a tensor is no array, or of a dtype that safetensors has not; config is no JSON.
    ValueError: format or max_shard_size is not as above; no tensor is a `QuantizedWeight`, or one
      does not fit the format: a mode that it has not, a global scale in MLX's, a name that does not
      end in ".weight", more than two axes beside a global scale, a global scale that is no amax.

  Example:
    >>> import tempfile
    >>> weight = jaxqq.quantize_weight(jnp.ones((8, 64)), mode="mxfp8")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   checkpoint.save(folder, {"proj.weight": weight, "proj.bias": jnp.ones(8)}, format="mlx")
    ...   sorted(checkpoint.load(folder))
    ['proj.bias', 'proj.weight']

  Source: as for `load`.
  """
  path = pathlib.Path(path)
  if format not in SAVED_FORMATS:
    known = " or ".join(map(repr, SAVED_FORMATS))
    raise ValueError(f"save: unknown format {format!r}; it must be {known}.")
  max_bytes = parse_size(max_shard_size)
  origin = tensors if isinstance(tensors, Checkpoint) else Checkpoint()
  config = origin.config if config is None else dict(config)
  plan = _planned(tensors, format, config, origin)
  texts = {file: as_json(file, contents) for file, contents in plan.configs.items()}
  check_target(path, overwrite)
  shards = shard({name: value.nbytes for name, value in plan.values.items()}, max_bytes)
  with (
    replacing(path, ["*.safetensors", INDEX, CONFIG, MODELOPT_CONFIG], overwrite) as target,
    progress_bar("save", len(plan.values), progress) as advance,
  ):
    index: dict[str, str] = {}
    total_size = 0
    for file, names in zip(shard_names(len(shards)), shards, strict=True):
      parts = {part: array for name in names for part, array in plan.written(name).items()}
      recorded = {layer: plan.recorded[layer] for layer in plan.recorded if layer + SUFFIX in names}
      write_tensors(target.folder / file, parts, FRAMEWORKS[format], recorded)
      index |= dict.fromkeys(parts, file)
      total_size += sum(part.nbytes for part in parts.values())
      advance(len(names))
    if len(shards) > 1:
      contents = {"metadata": {"total_size": total_size}, "weight_map": index}
      texts[INDEX] = as_json(INDEX, contents)
    for file, text in texts.items():
      write_text(target.folder / file, text)
  if not target.at_once:
    warnings.warn(
      f"save: {path}: this system cannot exchange the names of two folders, so for a moment none "
      "was there; had the process been killed then, the next save would have put the old one back.",
      stacklevel=2,
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
  """What will be written, of which only codes and plain tensors are still to be fetched."""

  values: dict[str, Any]
  layouts: dict[str, Layout]  # of each `QuantizedWeight`
  scalars: dict[str, dict[str, np.ndarray]]
  recorded: Recorded
  configs: dict[str, dict[str, Any]]

  def written(self, name: str) -> dict[str, np.ndarray]:
    """The tensors of a file that one of the mapping becomes."""
    value, layout = self.values[name], self.layouts.get(name)
    if layout is None:
      return {name: np.asarray(value, order="C")}
    parts = written_codes(value, layout) | self.scalars[name]
    return {f"{name.removesuffix(SUFFIX)}.{suffix}": part for suffix, part in parts.items()}


def _planned(
  tensors: Mapping[str, Any],
  format: str,
  config: dict[str, Any],
  origin: Checkpoint,
) -> _Plan:
  values = {name: _checked(name, value) for name, value in tensors.items()}
  weights = {name: w for name, w in values.items() if isinstance(w, QuantizedWeight)}
  if not weights:
    raise ValueError(
      f"save: tensors must have a QuantizedWeight, found none among {len(values)}; "
      "safetensors.flax.save_file writes a checkpoint that is not quantized."
    )
  layouts = {name: _layout(name, weight, format, values) for name, weight in weights.items()}
  scalars: dict[str, dict[str, np.ndarray]] = {}
  recorded: Recorded = {}
  layers: dict[str, tuple[Layout, bool]] = {}
  for name, weight in weights.items():
    layer, layout = name.removesuffix(SUFFIX), layouts[name]
    came_in = layout_of(origin.format, weight.mode) if origin.format else None
    stored = converted(origin.stored_scales.get(name, {}), came_in, layout)
    scalars[name], exact = written_scalars(name, weight, layout, stored)
    if exact:
      recorded[layer] = exact
    layers[layer] = (layout, layout.scalars.get("input_global_scale") in scalars[name])
  config = _with_dtype(config, list(weights.values()))
  configs = written_configs(format, config, layers, _not_quantized(values))
  return _Plan(values, layouts, scalars, recorded, configs)


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


def _layout(name: str, weight: QuantizedWeight, format: str, values: dict[str, Any]) -> Layout:
  if not name.endswith(SUFFIX):
    raise ValueError(
      f"save: the name of a QuantizedWeight must be that of a layer and {SUFFIX!r}, such as "
      f"'model.proj.weight', got {name!r}."
    )
  layout = layout_of(format, weight.mode)
  if layout is None:
    able = " or ".join(repr(row.format) for row in LAYOUTS if row.mode == weight.mode)
    raise ValueError(
      f"save: {name!r} is quantized in mode {weight.mode!r}, which format {format!r} has not; "
      f"save it as {able}."
    )
  for suffix in (*layout.required, *layout.scalars.values()):
    part = f"{name.removesuffix(SUFFIX)}.{suffix}"
    if part in values and part != name:
      raise ValueError(
        f"save: {part!r} is a tensor of the QuantizedWeight {name!r} in format {format!r}, and is "
        "given besides; leave it out, or rename it."
      )
  return layout


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
