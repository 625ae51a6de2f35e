"""Quantized checkpoints written from the projects' facts: numpy, safetensors and json, no jaxqq."""

from __future__ import annotations

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
KINDS = ("mlx", "modelopt", "nvfp4-pack-quantized", "mxfp8-quantized")
N, K = 8, 64
# Where a layer of nvfp4 has its codes, and its scalars of the weight and of the activations.
CODES = {"modelopt": "weight", "nvfp4-pack-quantized": "weight_packed"}
SCALARS = {
  "modelopt": ("weight_scale_2", "input_scale"),
  "nvfp4-pack-quantized": ("weight_global_scale", "input_global_scale"),
}
NVFP4_GROUP = {
  "targets": ["Linear"],
  "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
  "input_activations": {"num_bits": 4, "dynamic": "local", "group_size": 16},
}


def nvfp4(rng, n=N, k=K):
  """Codes (n, k / 2), two in a byte, low nibble first; scales (n, k / 16); and their values."""
  codes = rng.integers(0, 256, (n, k // 2)).astype(np.uint8)
  scales = rng.integers(1, 0x7F, (n, k // 16)).astype(np.uint8)
  elements = np.stack([E2M1_VALUES[codes & 15], E2M1_VALUES[codes >> 4]], -1).reshape(n, k)
  return codes, scales, elements * np.repeat(scales.view(E4M3).astype(np.float64), 16, axis=1)


def mxfp8(rng, n=N, k=K):
  """Codes (n, k), scales (n, k / 32), and their values."""
  codes = (rng.integers(0, 0x7F, (n, k)) | rng.choice([0, 0x80], (n, k))).astype(np.uint8)
  scales = rng.integers(120, 134, (n, k // 32)).astype(np.uint8)
  values = codes.view(E4M3).astype(np.float64) * np.exp2(np.repeat(scales, 32, axis=1) - 127.0)
  return codes, scales, values


def scalar_of(kind, amax):
  """What a layer of nvfp4 stores for an amax, in float32."""
  amax = np.asarray(amax, np.float32)
  return amax / np.float32(2688) if kind == "modelopt" else np.float32(2688) / amax


def amax_of(kind, scalar):
  """And back, which may be off by a rounding."""
  scalar = np.asarray(scalar, np.float32)
  return np.float32(2688) * scalar if kind == "modelopt" else np.float32(2688) / scalar


def others(rng):
  """What is not quantized, of several types."""
  return {
    "embed.weight": rng.standard_normal((16, K)).astype(ml_dtypes.bfloat16),
    "norm.weight": rng.standard_normal(K).astype(np.float32),
    "up.bias": rng.standard_normal(N).astype(np.float16),
    "down.k_scale": np.array([0.5], E4M3),
    "embed.position_ids": (np.arange(16) + (1 << 40))[None],
    "mask": np.array([True, False]),
  }


def write(folder, tensors, **configs):
  """One file of tensors, and configs by name with "_" for "."."""
  folder.mkdir(parents=True, exist_ok=True)
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  for name, config in configs.items():
    (folder / name.replace("_json", ".json")).write_text(json.dumps(config))
  return folder


def layers(kind, rng):
  """The tensors of layers "up" and "down", and for each what `QuantizedWeight` should hold."""
  tensors, wanted = {}, {}
  for i, name in enumerate(("up", "down")):
    quantized = mxfp8 if kind in ("mlx-mxfp8", "mxfp8-quantized") else nvfp4
    codes, scales, values = quantized(rng)
    wanted[f"{name}.weight"] = {
      "packed": codes.view("<u4"),
      "scales": scales,
      "mode": "mxfp8" if quantized is mxfp8 else "nvfp4",
      "values": values,
    }
    scalars = [scalar_of(kind, amax) for amax in (0.7 + i, 30.1 + i)]
    fields = ("global_scale", "input_global_scale")
    if kind in ("mlx", "mlx-mxfp8"):
      tensors |= {f"{name}.weight": codes.view("<u4"), f"{name}.scales": scales}
    elif kind == "mxfp8-quantized":
      tensors |= {f"{name}.weight": codes.view(E4M3), f"{name}.weight_scale": scales}
    elif kind == "modelopt":
      tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scales.view(E4M3)}
    else:
      tensors |= {f"{name}.weight_packed": codes, f"{name}.weight_scale": scales.view(E4M3)}
      scalars = [s.reshape(1) for s in scalars]
    if kind in SCALARS:
      tensors |= {f"{name}.{suffix}": s for suffix, s in zip(SCALARS[kind], scalars, strict=True)}
      amax = [amax_of(kind, s).reshape(()) for s in scalars]
      wanted[f"{name}.weight"] |= dict(zip(fields, amax, strict=True))
      factor = float(scalars[0]) if kind == "modelopt" else 1 / float(scalars[0].item())
      wanted[f"{name}.weight"]["values"] = values * factor
  return {name: np.asarray(a) for name, a in tensors.items()}, wanted


def configs(kind):
  model = {"model_type": "toy", "torch_dtype": "float32"}
  if kind.startswith("mlx"):
    size = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    size = size if kind == "mlx-mxfp8" else {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    return {"config_json": model | {"quantization": size, "quantization_config": size}}
  if kind == "modelopt":
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["embed*"]}
    return {"config_json": model, "hf_quant_config_json": {"quantization": quantization}}
  group = NVFP4_GROUP
  if kind == "mxfp8-quantized":
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "group_size": 32}}
  quantization = {
    "quant_method": "compressed-tensors",
    "format": kind,
    "config_groups": {"group_0": group},
    "ignore": ["embed"],
  }
  return {"config_json": model | {"quantization_config": quantization}}


def write_kind(folder, kind, seed=0):
  """A whole checkpoint of a kind; the folder and what it should give."""
  rng = np.random.default_rng(seed)
  tensors, wanted = layers(kind, rng)
  rest = others(rng)
  write(folder, tensors | rest, **configs(kind))
  return folder, wanted, rest


def read_raw(folder: pathlib.Path):
  """Every tensor of every file as (dtype, shape, bytes), from the file's own header."""
  out = {}
  for file in sorted(folder.glob("*.safetensors")):
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    for name, entry in header.items():
      begin, end = (8 + size + offset for offset in entry["data_offsets"])
      assert name not in out
      out[name] = (entry["dtype"], tuple(entry["shape"]), data[begin:end])
  return out


def read_json(file):
  return json.loads(pathlib.Path(file).read_text())
