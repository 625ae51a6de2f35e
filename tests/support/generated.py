"""Checkpoints of every kind from a seed, as the projects' tools write them; nothing of jaxqq's.

A kind is a project, the scheme of each layer, where experts are, which files hold what, which
layers the configuration leaves out, and what else is beside them. The facts are those of ModelOpt
0.47 (modelopt/torch/export), compressed-tensors 0.19, mlx-lm 0.32 and transformers 5.
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
    return {"weight": codes, "weight_scale": scales}, want

  return layer


def compressed_tensors(mode, weight_only=False):
  def layer(rng, shape=SHAPE):
    codes, scales, want = packed(mode, rng, shape)
    want.weight_only = weight_only
    name = "weight" if mode == "mxfp8" else "weight_packed"
    tensors = {name: codes, "weight_scale": scales.view(E4M3) if mode == "nvfp4" else scales}
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
  return {"weight": codes, "weight_scale_inv": scales}, want


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


LINEAR = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
MODEL = {"model_type": "toy", "torch_dtype": "float32"}


def generate(seed) -> tuple[Generated, int, np.random.Generator]:
  """A checkpoint of a random kind, in how many files, and the numbers to go on with."""
  rng = np.random.default_rng(seed)
  out = (_mlx, _modelopt, _compressed_tensors, _transformers)[seed % 4](rng)
  out.add_plain("model.norm.weight", rng.standard_normal(64).astype(BF16))
  if rng.integers(2):
    out.add_plain("model.layers.0.attn.bias", np.tril(np.ones((1, 1, 4, 4), np.uint8)))
  if rng.integers(2):
    out.add_plain("model.position_ids", np.arange(8)[None] + (1 << 40))
  return out, int(rng.integers(1, 4)), rng


def _plain(out, path, rng, shape=SHAPE):
  out.add_plain(f"{path}.weight", rng.standard_normal(shape).astype(BF16))


def _of_layers(out, rng, pick, experts):
  """Two layers of a model, each of some scheme, or of none; the schemes by path."""
  chosen = {}
  paths = [f"model.layers.{i}.{name}" for i in (1, 10) for name in LINEAR]
  if experts:
    paths += [f"model.layers.1.mlp.experts.{e}.{p}" for e in range(3) for p in ("w1", "w2")]
  for path in [*paths, "model.embed_tokens"]:
    kind = pick(rng, path)
    if kind is None:
      _plain(out, path, rng)
    else:
      chosen[path], layer = kind
      out.add(path, layer, rng)
  return chosen


def _mlx(rng):
  out = Generated("mlx")
  common = str(rng.choice(["nvfp4", "mxfp8", "mxfp4"]))
  kinds = {mode: (mlx_entry(mode), mlx(mode)) for mode in ("nvfp4", "mxfp8", "mxfp4")}
  for bits in (2, 3, 4, 5, 6, 8):
    group_size = int(rng.choice([32, 64]))
    kinds[f"affine {bits}"] = (mlx_entry("affine", bits, group_size), affine(bits, group_size))
  names = [common] * 3 + list(kinds)

  def pick(rng, path):
    return None if rng.random() < 0.2 else kinds[str(rng.choice(names))]

  chosen = _of_layers(out, rng, pick, experts=False)
  out.add("model.layers.0.mlp.switch_mlp.up_proj", kinds[common][1], rng, (3, *SHAPE))
  if common == "nvfp4" and rng.integers(2):
    amax = rng.uniform(1, 9, 3).astype(np.float32)
    out.tensors["model.layers.0.mlp.switch_mlp.up_proj.global_scale"] = amax
    out.wants["model.layers.0.mlp.switch_mlp.up_proj.weight"].amax = {"global_scale": amax}
  quantization = mlx_entry(common) | {p: e for p, e in chosen.items() if e != mlx_entry(common)}
  quantization |= {f"{path}.gone": False for path in ("lm_head", "language_model")}
  quantization["language_model.lm_head"] = mlx_entry("affine", 8)
  for name in out.wants:
    if out.wants[name].array is not None and rng.integers(2):
      quantization[name.removesuffix(".weight")] = False
  out.configs["config.json"] = MODEL | dict.fromkeys(
    ("quantization", "quantization_config"), quantization
  )
  if rng.integers(2):
    out.configs["config.json"]["quantize_activations"] = True
    for want in out.wants.values():
      want.weight_only = False
  out.options = {"affine": "dequantize"}
  return out


def _modelopt(rng):
  out = Generated("modelopt")
  stacks = str(rng.choice(["", "stack", "parameters"]))
  mixed = bool(rng.integers(2))
  one = str(rng.choice(["NVFP4", "W4A16_NVFP4", "MXFP8"]))
  kinds = {
    "NVFP4": modelopt_nvfp4(bool(rng.integers(2))),
    "W4A16_NVFP4": modelopt_nvfp4(False, weight_only=True),
    "MXFP8": modelopt_mx("mxfp8"),
    "mxfp4": modelopt_mx("mxfp4"),
    "FP8": fp8("tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": fp8("channel"),
    "FP8_PB_WO": fp8("block", block=(128, 128)),
  }
  names = list(kinds) if mixed else [one]

  def pick(rng, path):
    if ".experts." in path:
      return one, kinds[one]
    if rng.random() < 0.2 or path == "model.embed_tokens":
      return None
    name = str(rng.choice(names))
    return name, kinds[name]

  chosen = _of_layers(out, rng, pick, experts=True)
  fused = modelopt_nvfp4(one == "NVFP4", one == "W4A16_NVFP4")
  if one != "MXFP8" and stacks == "stack":
    out.add("model.layers.0.mlp.up", fused, rng, (3, *SHAPE))
    chosen["model.layers.0.mlp.up"] = one
  elif one != "MXFP8" and stacks == "parameters":
    for name, transposed in (("gate_up_proj", True), ("down_proj", False)):
      out.add_parameter(
        *(f"model.layers.0.mlp.experts.{name}", fused, rng, (3, 8, 128)),
        *(lambda suffix: "" if suffix == "weight" else f"_{suffix}", transposed),
      )
    chosen["model.layers.0.mlp.experts"] = one
  kv_cache = str(rng.choice(["", "FP8", "NVFP4"])) or None
  out.kv_cache = kv_cache is not None
  if kv_cache:
    out.add_plain("model.layers.1.self_attn.k_proj.k_scale", np.asarray(0.5, np.float32))
  if mixed:
    entries = {p: modelopt_entry(n) for p, n in chosen.items() if ".experts." not in p}
    entries["model.layers.1.mlp.experts"] = modelopt_entry(one)
    config = modelopt_config("MIXED_PRECISION", kv_cache=kv_cache, quantized_layers=entries)
  else:
    plain = [n.removesuffix(".weight") for n, want in out.wants.items() if want.array is not None]
    plain = [path for path in plain if path + ".weight" in out.wants]
    # One that hits a quantized layer too: "model.layers.1*" and layer 10.
    wild = ["model.layers.1*"] if rng.integers(2) and one == "NVFP4" else ["lm_head"]
    config = modelopt_config(one, [*plain, *wild], kv_cache)
  if rng.integers(2):
    out.configs = {"config.json": MODEL, "hf_quant_config.json": config}
  else:
    inner = config["quantization"] | {"quant_method": "modelopt", "ignore": []}
    inner["ignore"] = inner.pop("exclude_modules")
    out.configs = {"config.json": MODEL | {"quantization_config": inner}}
  return out


def _compressed_tensors(rng):
  out = Generated("compressed-tensors")
  weight_only = bool(rng.integers(2))
  kinds = {
    "nvfp4": (ct_group("nvfp4", [], weight_only), compressed_tensors("nvfp4", weight_only)),
    "mxfp4": (ct_group("mxfp4", [], True), compressed_tensors("mxfp4", True)),
    "mxfp8": (ct_group("mxfp8", []), compressed_tensors("mxfp8")),
    "fp8 tensor": (ct_group("fp8", [], strategy="tensor"), fp8("tensor", dtype=BF16)),
    "fp8 channel": (ct_group("fp8", [], strategy="channel"), fp8("channel", dtype=BF16)),
    "fp8 block": (ct_group("fp8", [], strategy="block", block=[4, 32]), fp8("block")),
  }
  fp8_kind = str(rng.choice([name for name in kinds if name.startswith("fp8")]))
  names = [str(rng.choice(["nvfp4", "mxfp4", "mxfp8"]))]
  if rng.integers(2):
    names = ["nvfp4", "mxfp4", "mxfp8", fp8_kind]

  def pick(rng, path):
    if ".experts." in path:
      return names[0], kinds[names[0]][1]
    if rng.random() < 0.2:
      return None
    name = str(rng.choice(names))
    return name, kinds[name][1]

  chosen = _of_layers(out, rng, pick, experts=True)
  groups = []
  for name in dict.fromkeys(chosen.values()):
    paths = [path for path, of in chosen.items() if of == name]
    targets = (
      paths if rng.integers(2) else [f"re:.*{path.replace('.', chr(92) + '.')}$" for path in paths]
    )
    groups.append(kinds[name][0] | {"targets": ["Linear"] if len(names) == 1 else targets})
  of_activations = kinds["mxfp8"][0] | {"targets": ["ToyAttention"], "weights": None}
  if rng.integers(2):
    groups.append(of_activations)
    out.add_plain("model.layers.1.self_attn.q_scale", np.float32([0.5]))
  kv_cache = None
  if rng.integers(2):
    kv_cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    out.add_plain("model.layers.1.self_attn.k_scale", np.ones(1, BF16))
  out.kv_cache = kv_cache is not None or of_activations in groups
  plain = [n.removesuffix(".weight") for n, want in out.wants.items() if want.array is not None]
  ignore = [*plain, "re:.*lm_head"]
  if rng.integers(2):  # one that hits layer 10 too
    ignore.append(r"re:model\.layers\.1")
  out.configs["config.json"] = MODEL | {"quantization_config": ct_config(groups, ignore, kv_cache)}
  return out


def _transformers(rng):
  out = Generated("transformers")
  method = str(rng.choice(["mxfp4", "mxfp8", "fp8"]))
  layer = {
    "mxfp8": transformers_mxfp8,
    "fp8": fp8("block", "weight_scale_inv"),
    "mxfp4": None,
  }[method]
  for path in [f"model.layers.1.{name}" for name in LINEAR]:
    if layer is None or rng.random() < 0.2:
      _plain(out, path, rng)
    else:
      out.add(path, layer, rng)
  if method == "mxfp4":
    for name in ("gate_up_proj", "down_proj"):
      path = f"model.layers.1.mlp.experts.{name}"
      out.add_parameter(path, blocks, rng, (3, *SHAPE), lambda suffix: f"_{suffix}")
      out.add_plain(f"{path}_bias", rng.standard_normal((3, 8)).astype(BF16))
  elif method == "mxfp8":
    ending = {"weight": "", "weight_scale_inv": "_scale_inv"}.__getitem__
    path = "model.layers.1.mlp.experts.gate_up_proj"
    out.add_parameter(path, transformers_mxfp8, rng, (3, *SHAPE), ending)
  config = {"quant_method": method, "modules_to_not_convert": ["lm_head", "model.norm"]}
  if method == "fp8":
    config |= {"activation_scheme": "dynamic", "weight_block_size": [4, 32], "fmt": "e4m3"}
  out.configs["config.json"] = MODEL | {"quantization_config": config}
  return out


__all__ = ["E8M0", "Generated", "Want", "generate"]
