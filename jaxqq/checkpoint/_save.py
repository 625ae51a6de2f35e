"""`save`: everything checked first, then a folder written beside the other and put in its place."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from jaxqq._checks import check_bool
from jaxqq.checkpoint._checkpoint import Checkpoint, Tensor
from jaxqq.checkpoint._files import INDEX, progress_bar
from jaxqq.checkpoint._layouts import SAVED_FORMATS
from jaxqq.checkpoint._plan import planned
from jaxqq.checkpoint._replace import check_target, replacing
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
FRAMEWORKS = dict.fromkeys(SAVED_FORMATS, "pt") | {"mlx": "mlx"}


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
  """Writes a quantized checkpoint as MLX, ModelOpt, compressed-tensors or transformers do.

  Each `QuantizedWeight` under `X.weight` becomes the tensors of layer `X`, with the bits it has:

    "mlx": weight, scales;
    "modelopt": nvfp4 weight, weight_scale, weight_scale_2 = global_scale / 2688, and input_scale;
      mxfp8 (ModelOpt's MXFP8) weight, weight_scale;
    "compressed-tensors": nvfp4-pack-quantized with weight_packed, weight_scale,
      weight_global_scale = 2688 / global_scale, and input_global_scale; mxfp8-quantized with
      weight, weight_scale; mxfp4-pack-quantized with weight_packed, weight_scale;
    "transformers": mxfp8 weight, weight_scale_inv; mxfp4, for stacked experts, blocks, scales.

  A scale of the activations is written where the weight has one. A layer is declared as quantized
  in its weight only where the weight's quantize_input is False. So is one of nvfp4 without such a
  scale, which servers need, and all of "mlx", unless `load` found otherwise: that inputs are
  quantized is noted in the files' metadata then, for `load`. A stack of experts, (E, N, K)
  under `a.experts.up.weight`, becomes a layer for each expert, `a.experts.0.up`, but in "mlx";
  under the name of a parameter, `a.experts.gate_up_proj`, it stays one, with
  `gate_up_proj_weight_scale` and the like. A weight without a global scale is written with 2688 for
  both, which stands for the same numbers. What `load` returned is written with the scalars it was
  stored with, bit for bit; and a float32 amax that those scalars do not determine is noted in the
  files' metadata, so that `load` has it again. Every other tensor is written as it is.
  The folder is written under another name and gets its own when it is complete: a failure leaves
  what was there. At every moment the old folder or the new one is at path: they exchange their
  names in one step (Linux' renameat2). A system or a file system that cannot do so has none there
  for a moment, which a warning says. What a save that was killed left beside path, the next one
  removes.

  Args:
    path: a folder, new or empty. Where it is a link, the folder that it leads to is meant.
    tensors: names to arrays and `QuantizedWeight`s: a `Checkpoint`, or any mapping.
    format: "mlx", "modelopt", "compressed-tensors" or "transformers".
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
      does not fit the format: a mode that it has not, a global scale in MLX's, a name that is
      neither that of a layer, with ".weight", nor of stacked experts, a global scale that is no
      amax; an array that load would take for a code, a scale or a rotation of a layer, such as one
      of float8; the format has no words for the checkpoint's kv_cache.

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
  plan = planned(tensors, format, config, origin)
  texts = {file: as_json(file, contents) for file, contents in plan.configs.items()}
  check_target(path, check_bool("save", "overwrite", overwrite))
  shards = shard({name: value.nbytes for name, value in plan.values.items()}, max_bytes)
  with (
    replacing(path, ["*.safetensors", INDEX, CONFIG, MODELOPT_CONFIG], overwrite) as target,
    progress_bar("save", len(plan.values), progress) as advance,
  ):
    index: dict[str, str] = {}
    total_size = 0
    for file, names in zip(shard_names(len(shards)), shards, strict=True):
      parts = {part: array for name in names for part, array in plan.written(name).items()}
      write_tensors(target.folder / file, parts, FRAMEWORKS[format], plan.recorded(names))
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
