"""Checkpoints that are damaged, incomplete or of another format: one sentence that says which."""

from __future__ import annotations

import functools
import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxqq
from jaxqq import checkpoint
from tests.support import checkpoints
from tests.support.messages import refused, says

KINDS = checkpoints.KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 5, 60, -1, -200])
def test_a_file_that_is_cut_short(kind, size, tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", kind)
  file = folder / "model.safetensors"
  data = file.read_bytes()[:size]
  file.write_bytes(data)
  refused(folder, file, "whole safetensors file", f"found {len(data)} bytes")


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_that_is_damaged(kind, tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", kind)
  file = folder / "model.safetensors"
  data = bytearray(file.read_bytes())
  data[20] ^= 0xFF
  file.write_bytes(data)
  refused(folder, file, "whole safetensors file")


REQUIRED = {
  "mlx": ("weight", "scales"),
  "modelopt": ("weight", "weight_scale", "weight_scale_2"),
  "nvfp4-pack-quantized": ("weight_packed", "weight_scale", "weight_global_scale"),
  "mxfp8-quantized": ("weight", "weight_scale"),
}


@pytest.mark.parametrize(("kind", "suffix"), [(k, s) for k in KINDS for s in REQUIRED[k]])
def test_a_tensor_that_is_missing(kind, suffix, tmp_path):
  tensors, _ = checkpoints.layers(kind, np.random.default_rng(0))
  del tensors[f"down.{suffix}"]
  checkpoints.write(tmp_path, tensors, **checkpoints.configs(kind))
  found = next(name for name in sorted(tensors) if name.startswith("down."))
  refused(tmp_path, "model.safetensors", f"'down.{suffix}' is missing", f"found {found}")


WRONG = [
  ("mlx", "weight", np.zeros((8, 8), np.int32), "U32", "I32"),
  ("mlx", "weight", np.zeros((8, 7), np.uint32), "K a multiple of 16", "(8, 7)"),
  ("mlx", "weight", np.zeros(8, np.uint32), "(N, K * 4 / 32)", "(8,)"),
  ("mlx", "scales", np.zeros((8, 4), np.int8), "U8 of shape (8, 4)", "I8"),
  ("mlx", "scales", np.zeros((8, 5), np.uint8), "U8 of shape (8, 4)", "(8, 5)"),
  ("modelopt", "weight", np.zeros((8, 64), np.uint32), "U8 of shape (N, K * 4 / 8)", "U32"),
  ("modelopt", "weight", np.zeros((8, 20), np.uint8), "K a multiple of 16", "(8, 20)"),
  ("modelopt", "weight_scale", np.zeros((8, 4), np.uint8), "F8_E4M3 of shape (8, 4)", "U8"),
  ("modelopt", "weight_scale", np.zeros((8, 2), checkpoints.E4M3), "(8, 4)", "(8, 2)"),
  ("modelopt", "weight_scale_2", np.zeros((), np.float16), "F32 of one element", "F16"),
  ("modelopt", "weight_scale_2", np.zeros(2, np.float32), "F32 of one element", "(2,)"),
  ("modelopt", "input_scale", np.zeros((), ml_dtypes.bfloat16), "F32 of one element", "BF16"),
  ("nvfp4-pack-quantized", "weight_packed", np.zeros((8, 32), np.int8), "U8 of shape", "I8"),
  ("nvfp4-pack-quantized", "weight_scale", np.zeros((4, 4), checkpoints.E4M3), "(8, 4)", "(4, 4)"),
  ("nvfp4-pack-quantized", "weight_global_scale", np.zeros(8, np.float32), "F32 of one", "(8,)"),
  ("nvfp4-pack-quantized", "input_global_scale", np.zeros(1), "F32 of one element", "F64"),
  (
    "mxfp8-quantized",
    "weight",
    np.zeros((8, 64), np.int8),
    "F8_E4M3 of shape (N, K * 8 / 8)",
    "I8",
  ),
  ("mxfp8-quantized", "weight", np.zeros((8, 48), checkpoints.E4M3), "a multiple of 32", "(8, 48)"),
  ("mxfp8-quantized", "weight_scale", np.zeros((8, 2), np.float32), "U8 or F8_E8M0", "F32"),
  ("mxfp8-quantized", "weight_scale", np.zeros((8, 4), np.uint8), "shape (8, 2)", "(8, 4)"),
]


@pytest.mark.parametrize(("kind", "suffix", "array", "expected", "found"), WRONG)
def test_a_tensor_of_a_wrong_dtype_or_shape(kind, suffix, array, expected, found, tmp_path):
  tensors, _ = checkpoints.layers(kind, np.random.default_rng(0))
  assert f"down.{suffix}" in tensors
  tensors[f"down.{suffix}"] = array
  checkpoints.write(tmp_path, tensors, **checkpoints.configs(kind))
  sentence = refused(tmp_path, "model.safetensors", f"'down.{suffix}' must be", expected)
  assert says(sentence.partition(", found ")[2], found), sentence


def test_scales_of_mxfp8_may_have_their_own_type(tmp_path):
  tensors, wanted = checkpoints.layers("mxfp8-quantized", np.random.default_rng(0))
  tensors["up.weight_scale"] = tensors["up.weight_scale"].view(checkpoints.E8M0)
  checkpoints.write(tmp_path, tensors, **checkpoints.configs("mxfp8-quantized"))
  scales = checkpoint.load(tmp_path)["up.weight"].scales
  np.testing.assert_array_equal(scales, wanted["up.weight"]["scales"])


@pytest.mark.parametrize("kind", KINDS)
def test_shards(kind, tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", kind)
  checkpoint.save(
    tmp_path / "s",
    checkpoint.load(folder),
    format=checkpoint.load(folder).format,
    max_shard_size=900,
  )
  folder = tmp_path / "s"
  index = folder / "model.safetensors.index.json"
  contents = checkpoints.read_json(index)
  first = folder / min(contents["weight_map"].values())

  data = first.read_bytes()
  first.write_bytes(data[:-3])
  refused(folder, first, "whole safetensors file")
  first.unlink()
  refused(folder, first, "no such file", kind=FileNotFoundError)
  first.write_bytes(data)

  name = next(n for n, file in contents["weight_map"].items() if file == first.name)
  for change, words in (
    ({"up.nothing": first.name}, ("'up.nothing' is not in the file", "lists it")),
    ({name: "../elsewhere.safetensors"}, (name, "'../elsewhere.safetensors'")),
    ({name: 3}, (name, "found 3")),
  ):
    index.write_text(json.dumps({"weight_map": contents["weight_map"] | change}))
    refused(folder, *words)
  for text in ("{", "[]", "{}", '{"weight_map": []}'):
    index.write_text(text)
    refused(folder, index)
  index.unlink()
  refused(folder, folder, "model.safetensors.index.json", first.name, kind=FileNotFoundError)


def test_files_that_are_not_there(tmp_path):
  refused(tmp_path / "none", tmp_path / "none", kind=FileNotFoundError)
  refused(tmp_path, "no .safetensors file", kind=FileNotFoundError)
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "mlx")
  (folder / "config.json").unlink()
  refused(folder, folder, "config.json", "hf_quant_config.json", kind=FileNotFoundError)
  (folder / "config.json").write_text("{,}")
  refused(folder, folder / "config.json", "expected JSON")
  (folder / "config.json").write_text("3")
  refused(folder, folder / "config.json", "JSON object", "int")


AFFINE = {"group_size": 64, "bits": 4}
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
CT = {"quant_method": "compressed-tensors"}
INT = {"weights": {"num_bits": 4}, "format": "pack-quantized"}
CONFIGS = [
  ("mlx", {"quantization": AFFINE}, "nvfp4", "found none, which is 'affine'"),
  ("mlx", {"quantization_config": AFFINE}, "nvfp4", "found none, which is 'affine'"),
  ("mlx", {"quantization": AFFINE | {"mode": "affine"}}, "nvfp4", "found 'affine'"),
  ("mlx", {"quantization": NVFP4 | {"up": AFFINE}}, "layer 'up'", "found none, which is 'affine'"),
  ("mlx", {"quantization": NVFP4 | {"mode": "nvfp3"}}, "nvfp4", "found 'nvfp3'"),
  ("mlx", {"quantization": NVFP4 | {"mode": 3}}, "nvfp4", "found 3"),
  ("mlx", {"quantization": NVFP4 | {"group_size": 32}}, "group_size", "must be 16"),
  ("mlx", {"quantization": NVFP4 | {"bits": 8}}, "bits", "must be 4"),
  ("mlx", {"quantization": NVFP4 | {"up": False}}, "'up' is none", "'up.scales'"),
  ("mlx", {"model_type": "toy"}, "'quantization' (MLX)", "found neither"),
  ("modelopt", {"quantization_config": {"quant_method": "gptq"}}, "'modelopt'", "found 'gptq'"),
  (
    "modelopt",
    {"quantization_config": {"bits": 4, "quant_method": "awq"}},
    "quant_method",
    "'awq'",
  ),
  ("modelopt", {"quantization_config": {"quant_method": "modelopt"}}, "quant_algo", "found None"),
  ("nvfp4-pack-quantized", {"quantization_config": CT}, "format must be", "found None"),
  (
    *("nvfp4-pack-quantized", {"quantization_config": CT | {"format": "pack-quantized"}}),
    *("'nvfp4-pack-quantized' or 'mxfp8-quantized'", "found 'pack-quantized'"),
  ),
  (
    *("nvfp4-pack-quantized", {"quantization_config": CT | {"config_groups": {"group_7": INT}}}),
    *("group_7", "found 'pack-quantized'"),
  ),
  (
    *("nvfp4-pack-quantized", {"quantization_config": CT | {"config_groups": {"NVFP4": ["re:x"]}}}),
    *("'NVFP4' of config_groups", "re:x"),
  ),
  *(
    ("nvfp4-pack-quantized", {"quantization_config": CT | wrong}, *words)
    for wrong, *words in (
      ({"config_groups": ["group_0"]}, "'config_groups' must be a JSON object", "['group_0']"),
      (
        {"ignore": "lm_head", "format": "mxfp8-quantized"},
        "'ignore' must be a JSON list",
        "lm_head",
      ),
      ({"ignore": ["re:("], "format": "mxfp8-quantized"}, "'ignore' must be", "re:("),
    )
  ),
]


@pytest.mark.parametrize(("kind", "config", "expected", "found"), CONFIGS)
def test_configurations_that_are_refused(kind, config, expected, found, tmp_path):
  tensors, _ = checkpoints.layers(kind, np.random.default_rng(0))
  checkpoints.write(tmp_path, tensors, config_json=config)
  refused(tmp_path, expected, found)


@pytest.mark.parametrize(
  ("quantization", "words"),
  [
    ({"quant_algo": "W4A16_AWQ"}, ("'NVFP4'", "found 'W4A16_AWQ'")),
    ({"quant_algo": "FP8"}, ("'down.weight' must be F8_E4M3", "found U8")),
    ({"quant_algo": "NVFP4_AWQ"}, ("found 'NVFP4_AWQ'",)),
    ({"quant_algo": "NVFP4", "group_size": 32}, ("group_size must be 16", "found 32")),
    (
      {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"up": {"quant_algo": "W8A16"}}},
      ("layer 'up'", "found 'W8A16'"),
    ),
    (
      {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"gone": {"quant_algo": "NVFP4"}}},
      ("'gone.weight' is missing",),
    ),
    ({"quant_algo": "MIXED_PRECISION", "quantized_layers": ["up"]}, ("'quantized_layers'",)),
    ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"up": 3}}, ("layer 'up'", "found 3")),
    ({"quant_algo": "NVFP4", "exclude_modules": "up"}, ("'exclude_modules' must be", "'up'")),
    ([], ("must be an object",)),
  ],
)
def test_modelopt_algorithms_that_are_refused(quantization, words, tmp_path):
  tensors, _ = checkpoints.layers("modelopt", np.random.default_rng(0))
  checkpoints.write(tmp_path, tensors, hf_quant_config_json={"quantization": quantization})
  refused(tmp_path, *words)


def test_biases_of_affine_weights(tmp_path):
  tensors, _ = checkpoints.layers("mlx", np.random.default_rng(0))
  tensors["down.biases"] = np.zeros((8, 4), np.float32)
  checkpoints.write(tmp_path, tensors, **checkpoints.configs("mlx"))
  refused(tmp_path, "'down.biases'", "'affine'")


def test_two_weights_of_a_layer(tmp_path):
  tensors, _ = checkpoints.layers("nvfp4-pack-quantized", np.random.default_rng(0))
  tensors["down.weight"] = np.zeros((8, 64), np.float32)
  checkpoints.write(tmp_path, tensors, **checkpoints.configs("nvfp4-pack-quantized"))
  refused(tmp_path, "'down.weight'", "'down.weight_packed'")


def test_a_type_that_numpy_has_not(tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "mlx")
  header = {"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
  text = json.dumps(header).encode()
  file = folder / "model.safetensors"
  file.write_bytes(len(text).to_bytes(8, "little") + text + b"ab")
  refused(folder, file, "'x'", "numpy and ml_dtypes")


@pytest.mark.parametrize("text", ["{", "3", '{"up": 3}', '{"up": {"global_scale": "x"}}'])
def test_metadata_that_is_damaged(text, tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "modelopt")
  tensors, _ = checkpoints.layers("modelopt", np.random.default_rng(0))
  save_file(tensors, folder / "model.safetensors", {"jaxqq.amax": text})
  refused(folder, "model.safetensors", "'jaxqq.amax'", repr(text))


def test_dtype_of_load(tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "mlx")
  for dtype in ("int8", "float64", "no"):
    with pytest.raises(TypeError, match=f"load: dtype must be float32.*'{dtype}'"):
      checkpoint.load(folder, dtype=dtype)


@functools.cache
def weight(mode="nvfp4", shape=(8, 64), **options):
  return jaxqq.quantize_weight(jnp.ones(shape), mode=mode, **{"global_scale": None, **options})


# Weights are made when a test runs: each process of tests imports all modules.
SCALED = {"global_scale": "amax"}
REFUSED = [
  ({"a.weight": weight}, {"format": "gguf"}, ValueError, "unknown format 'gguf'.*'modelopt'"),
  ({}, {"format": "mlx"}, ValueError, "must have a QuantizedWeight, found none among 0"),
  ({"a.weight": np.ones((2, 2), np.float32)}, {"format": "mlx"}, ValueError, "found none among 1"),
  ({"a.kernel": weight}, {"format": "mlx"}, ValueError, "'.weight'.*got 'a.kernel'"),
  (
    {"a.weight": functools.partial(weight, **SCALED)},
    {"format": "mlx"},
    ValueError,
    "'a.weight' has a global scale",
  ),
  ({"a.weight": weight}, {"format": "transformers"}, ValueError, "'nvfp4'.*save it as 'mlx'"),
  (
    *(
      {"a.weight": functools.partial(weight, shape=(2, 8, 64))},
      {"format": "compressed-tensors"},
      ValueError,
    ),
    r"'a.weight' must have two dimensions.*\(2, 8, 64\)",
  ),
  ({"a.weight": weight, "b": "text"}, {"format": "mlx"}, TypeError, "'b'.*str"),
  ({"a.weight": weight, 3: np.ones(2, np.float32)}, {"format": "mlx"}, TypeError, "strings, got 3"),
  (
    *({"a.weight": weight, "b": np.zeros(2, np.complex128)}, {"format": "mlx"}, TypeError),
    "'b' must be of a dtype.*complex128",
  ),
  (
    *({"a.weight": weight, "a.scales": np.ones(2, np.float32)}, {"format": "mlx"}, ValueError),
    "'a.scales'.*'a.weight'",
  ),
  *(
    (
      {"a.weight": functools.partial(weight, mode="mxfp8"), name: array},
      {"format": format},
      ValueError,
      f"'{name}' is",
    )
    for name, array, format in (
      ("b.weight", np.zeros((8, 64), np.uint8), "modelopt"),
      ("b", np.zeros((8, 64), ml_dtypes.float8_e4m3fn), "mlx"),
      ("b.input_scale", np.ones((), np.float32), "compressed-tensors"),
      ("b.global_scale", np.ones((), np.float32), "mlx"),
      ("a.R1_input.weight", np.eye(64, dtype=np.float32), "transformers"),
    )
  ),
  *(
    (
      {"a.weight": weight},
      {"format": "mlx", "max_shard_size": size},
      ValueError,
      "max_shard_size",
    )
    for size in (0, -1, "5 parsecs", "GB", "0.1", True, None)
  ),
]


@pytest.mark.parametrize(("tensors", "options", "kind", "words"), REFUSED)
def test_save_refuses(tensors, options, kind, words, tmp_path):
  tensors = {name: array() if callable(array) else array for name, array in tensors.items()}
  with pytest.raises(kind, match=words) as caught:
    checkpoint.save(tmp_path / "m", tensors, **options)
  assert re.fullmatch(r"save: [^\n]*\.", str(caught.value))
  assert not list(tmp_path.iterdir())


def test_save_to_a_file(tmp_path):
  (tmp_path / "m").write_text("x")
  with pytest.raises(TypeError, match="save: overwrite must be True or False, got 'no'"):
    checkpoint.save(tmp_path / "m", {"a.weight": weight()}, format="mlx", overwrite="no")
  for overwrite in (False, True):
    with pytest.raises(FileExistsError, match="is a file"):
      checkpoint.save(tmp_path / "m", {"a.weight": weight()}, format="mlx", overwrite=overwrite)
