"""Checkpoints of every kind from a seed, as the projects' tools write them; nothing of jaxqq's.

A kind is a project, the scheme of each layer, where experts are, which files hold what, which
layers the configuration leaves out, and what else is beside them.
"""

from __future__ import annotations

import numpy as np

from tests.support.schemes import (
  BF16,
  MODEL,
  SHAPE,
  Generated,
  affine,
  blocks,
  compressed_tensors,
  ct_config,
  ct_group,
  fp8,
  mlx,
  mlx_entry,
  modelopt_config,
  modelopt_entry,
  modelopt_mx,
  modelopt_nvfp4,
  transformers_mxfp8,
)

LINEAR = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


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
