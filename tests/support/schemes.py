"""Layers and configurations of each scheme as the projects' tools write them; nothing of jaxqq's.

The facts are those of ModelOpt 0.47 (modelopt/torch/export), compressed-tensors 0.19, mlx-lm 0.32
and transformers 5.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.support import checkpoints
from tests.support.checkpoints import E2M1_VALUES, E4M3, E8M0

BF16 = ml_dtypes.bfloat16
SHAPE = (8, 64)


@dataclasses.dataclass
class Want:
  """What `load` gives under a name: the fields of a `QuantizedWeight`, or an array."""

  mode: str | None = None
  packed: np.ndarray | None = None
  scales: np.ndarray | None = None
  amax: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  values: np.ndarray | None = None  # of a layer that comes dequantized, in float64
  array: np.ndarray | None = None
  weight_only: bool = False


def e2m1(rng, shape, group):
  """Codes (..., N, K / 2), two in a byte, low nibble first, and their numbers."""
  codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2)).astype(np.uint8)
  return codes, np.stack([E2M1_VALUES[codes & 15], E2M1_VALUES[codes >> 4]], -1).reshape(shape)


def e4m3(rng, shape):
  codes = rng.integers(0, 0x7F, shape) | rng.choice([0, 0x80], shape)
  return codes.astype(np.uint8).view(E4M3)


def packed(mode, rng, shape):
  """Codes and scales of a block format as bytes, and what `QuantizedWeight` holds of them."""
  group = 16 if mode == "nvfp4" else 32
  codes = e4m3(rng, shape) if mode == "mxfp8" else e2m1(rng, shape, group)[0]
  low, high = (1, 0x7F) if mode == "nvfp4" else (100, 150)
  scales = rng.integers(low, high, (*shape[:-1], shape[-1] // group)).astype(np.uint8)
  return codes, scales, Want(mode, codes.view(np.uint8).view("<u4"), scales)


def of_powers(scales, rng):
  """Powers of two as bytes, or in their own type."""
  return scales if rng.integers(2) else scales.view(E8M0)


# The tensors of a layer by suffix in each scheme, and what is wanted of it.


def mlx(mode):
  def layer(rng, shape=SHAPE):
    codes, scales, want = packed(mode, rng, shape)
    want.weight_only = True
    return {"weight": codes.view(np.uint8).view("<u4"), "scales": scales}, want

  return layer


def affine(bits, group_size, dtype=BF16):
  """q of some bits after the other in little-endian words; w = scale * q + bias."""

  def layer(rng, shape=SHAPE):
    q = rng.integers(0, 1 << bits, shape)
    words = []
    for row in q.reshape(-1, shape[-1]):
      stream = sum(int(code) << (bits * i) for i, code in enumerate(row))
      words.append(np.frombuffer(stream.to_bytes(shape[-1] * bits // 8, "little"), "<u4"))
    of_groups = (*shape[:-1], shape[-1] // group_size)
    scales, biases = (rng.standard_normal(of_groups).astype(dtype) for _ in range(2))
    scale, bias = (np.repeat(a.astype(np.float64), group_size, -1) for a in (scales, biases))
    weight = np.stack(words).reshape(*shape[:-1], -1)
    tensors = {"weight": weight, "scales": scales, "biases": biases}
    return tensors, Want(values=q * scale + bias)

  return layer


def scalars(kind, rng, of=("global_scale", "input_global_scale"), batch=()):
  """Scalars as a project stores them, and each amax that `load` makes of one."""
  stored = {f: checkpoints.scalar_of(kind, rng.uniform(0.5, 60, batch)) for f in of}
  return stored, {field: checkpoints.amax_of(kind, s) for field, s in stored.items()}


def modelopt_nvfp4(static=True, weight_only=False):
  def layer(rng, shape=SHAPE):
    codes, scales, want = packed("nvfp4", rng, shape)
    batch = shape[:-2] if rng.integers(2) or not shape[:-2] else ()
    of = ("global_scale", "input_global_scale")[: 1 + static]
    stored, want.amax = scalars("modelopt", rng, of, batch)
    names = {"global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
    want.weight_only = weight_only
    tensors = {"weight": codes, "weight_scale": scales.view(E4M3)}
    return tensors | {names[f]: np.asarray(s) for f, s in stored.items()}, want

  return layer


def modelopt_mx(mode):
  def layer(rng, shape=SHAPE):
    codes, scales, want = packed(mode, rng, shape)
    return {"weight": codes, "weight_scale": of_powers(scales, rng)}, want

  return layer


def compressed_tensors(mode, weight_only=False):
  def layer(rng, shape=SHAPE):
    codes, scales, want = packed(mode, rng, shape)
    want.weight_only = weight_only
    name = "weight" if mode == "mxfp8" else "weight_packed"
    stored = scales.view(E4M3) if mode == "nvfp4" else of_powers(scales, rng)
    tensors = {name: codes, "weight_scale": stored}
    if mode == "nvfp4":
      of = ("global_scale", "input_global_scale")[: 2 - weight_only]
      stored, want.amax = scalars("nvfp4-pack-quantized", rng, of)
      names = {"global_scale": "weight_global_scale", "input_global_scale": "input_global_scale"}
      tensors |= {names[f]: s.reshape(1) for f, s in stored.items()}
    return tensors, want

  return layer


def fp8(of, suffix="weight_scale", dtype=np.float32, powers=False, block=(4, 32)):
  """of: what a scale is of: "tensor", "channel" or "block"."""

  def layer(rng, shape=SHAPE):
    codes = e4m3(rng, shape)
    n, k = shape[-2:]
    rows, columns = {"tensor": (n, k), "channel": (1, k), "block": block}[of]
    grid = (*shape[:-2], -(-n // rows), -(-k // columns))
    scale = rng.uniform(1e-3, 2, grid).astype(dtype)
    if powers:
      scale = np.exp2(rng.integers(-20, 5, grid)).astype(dtype)
    each = np.repeat(np.repeat(scale.astype(np.float64), rows, -2)[..., :n, :], columns, -1)
    want = Want(values=codes.astype(np.float64) * each[..., :k])
    stored = scale.reshape(()) if of == "tensor" and len(shape) == 2 else scale
    tensors = {"weight": codes, suffix: stored}
    return tensors | ({"input_scale": np.float32(0.25)} if of == "tensor" else {}), want

  return layer


def transformers_mxfp8(rng, shape=SHAPE):
  codes, scales, want = packed("mxfp8", rng, shape)
  return {"weight": codes, "weight_scale_inv": of_powers(scales, rng)}, want


def blocks(rng, shape):
  """gpt-oss's: a byte of two codes on the last axis, a group of 32 on the one before."""
  codes, scales, want = packed("mxfp4", rng, shape)
  want.weight_only = True
  return {"blocks": codes.reshape(*shape[:-1], -1, 16), "scales": scales}, want


# Configurations.


def mlx_entry(mode, bits=4, group_size=64):
  if mode == "affine":
    return {"group_size": group_size, "bits": bits}
  return {"group_size": 16 if mode == "nvfp4" else 32, "bits": 8 if mode == "mxfp8" else 4} | {
    "mode": mode
  }


def modelopt_entry(algorithm):
  sizes = {"NVFP4": 16, "W4A16_NVFP4": 16, "MXFP8": 32, "MXFP4": 32, "mxfp4": 32}
  return {"quant_algo": algorithm} | (
    {"group_size": sizes[algorithm]} if algorithm in sizes else {}
  )


def ct_group(mode, targets, weight_only=False, strategy=None, block=None):
  """A group of config_groups as `QuantizationConfig.model_dump` gives it."""
  sizes = {"nvfp4": (4, 16), "mxfp4": (4, 32), "mxfp8": (8, 32), "fp8": (8, None)}
  bits, group_size = sizes[mode]
  strategy = strategy or ("tensor_group" if mode == "nvfp4" else "group")
  args: dict[str, Any] = {
    "num_bits": bits,
    "type": "float",
    "symmetric": True,
    "group_size": group_size,
    "strategy": strategy,
    "block_structure": block,
    "dynamic": False,
    "actorder": None,
    "scale_dtype": {"nvfp4": "torch.float8_e4m3fn", "fp8": None}.get(mode, "torch.uint8"),
    "zp_dtype": None,
    "observer": "memoryless_minmax",
    "observer_kwargs": {},
  }
  dynamic = {"nvfp4": "local"}.get(mode, True)
  formats = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
  formats |= {"mxfp8": "mxfp8-quantized", "fp8": "float-quantized"}
  return {
    "targets": targets,
    "weights": args,
    "input_activations": None if weight_only else args | {"dynamic": dynamic},
    "output_activations": None,
    "format": formats[mode],
  }


def ct_config(groups, ignore, kv_cache=None, **more):
  formats = {group["format"] for group in groups if group["weights"] is not None}
  return {
    "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    "format": formats.pop() if len(formats) == 1 else "mixed-precision",
    "global_compression_ratio": None,
    "ignore": ignore,
    "kv_cache_scheme": kv_cache,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.19.0",
  } | more


def modelopt_config(algorithm, exclude=(), kv_cache=None, **more):
  quantization = modelopt_entry(algorithm) | {"kv_cache_quant_algo": kv_cache}
  quantization |= {"exclude_modules": list(exclude)} | more
  return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}


# Whole checkpoints.


@dataclasses.dataclass
class Generated:
  """tensors and JSON files to write, and what `load` gives of them."""

  format: str
  tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  configs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  wants: dict[str, Want] = dataclasses.field(default_factory=dict)
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  kv_cache: bool = False

  def add(self, path, layer, rng, shape=SHAPE):
    """A layer, X.<suffix>."""
    tensors, self.wants[f"{path}.weight"] = layer(rng, shape)
    self.tensors |= {f"{path}.{suffix}": np.asarray(a) for suffix, a in tensors.items()}

  def add_parameter(self, name, layer, rng, shape, ending, transposed=False):
    """A stack under a parameter's name; ending: what the tensor of a suffix has behind it."""
    tensors, self.wants[name] = layer(rng, shape)
    for suffix, a in tensors.items():
      swap = transposed and a.ndim == 3 and "input" not in suffix
      self.tensors[name + ending(suffix)] = np.ascontiguousarray(
        np.swapaxes(a, 1, 2) if swap else a
      )

  def add_plain(self, name, array):
    self.tensors[name], self.wants[name] = np.asarray(array), Want(array=np.asarray(array))

  def write(self, folder: pathlib.Path, shards=1, rng=None):
    """One file, or an index of several whose tensors come in any order."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
      save_file(self.tensors, folder / "model.safetensors", {"format": "pt"})
    else:
      files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
      weight_map = {name: files[rng.integers(shards)] for name in self.tensors}
      for file in set(weight_map.values()):
        some = {name: a for name, a in self.tensors.items() if weight_map[name] == file}
        save_file(some, folder / file, {"format": "pt"})
      index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
      (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, config in self.configs.items():
      (folder / name).write_text(json.dumps(config))
    return folder


MODEL = {"model_type": "toy", "torch_dtype": "float32"}


MXFP8, NVFP4, CT_NVFP4 = modelopt_mx("mxfp8"), modelopt_nvfp4(), compressed_tensors("nvfp4")
LINEAR = ct_group("nvfp4", ["Linear"])


def one(folder, format, layers, config, file="config.json", extra=None):
  """A checkpoint of layers by path, other tensors and one configuration."""
  made, rng = Generated(format), np.random.default_rng(0)
  for path, layer in layers.items():
    made.add(path, layer, rng)
  for name, array in (extra or {}).items():
    made.add_plain(name, array)
  made.configs = {file: config}
  made.write(folder)
  return made


def modelopt(folder, layers, config, extra=None):
  return one(folder, "modelopt", layers, config, "hf_quant_config.json", extra)


def compressed(folder, layers, groups, ignore=(), extra=None, **more):
  config = {"quantization_config": ct_config(groups, list(ignore), **more)}
  return one(folder, "compressed-tensors", layers, config, extra=extra)
