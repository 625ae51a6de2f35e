"""What configurations of the projects' tools mean: read right, or refused by name."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import jaxqq
from jaxqq import checkpoint
from tests.support import checkpoints, schemes
from tests.support.checkpoints import E4M3
from tests.support.messages import refused
from tests.support.schemes import (
  BF16,
  CT_NVFP4,
  LINEAR,
  MXFP8,
  NVFP4,
  compressed,
  modelopt,
  one,
)


def rng():
  return np.random.default_rng(0)


# Packed bytes are no weights.


ONE = np.ones((), np.float32)
# With a letter of the path flipped or of the suffix, a scale of "up" is one of these.
SCALARS = ("input_scale", "input_global_scale", "weight_scale_1", "activation_scale")
BESIDE = ("input_scale_2", "input_zero_point", "scale", "scales", "zero_point")

LEFT = {
  "codes without a scale": ({"a.weight": np.zeros((16, 32), np.uint8)}, "'a.weight'"),
  "a scale alone": ({"a.weight_scale": np.zeros((16, 4), E4M3)}, "'a.weight_scale'"),
  "e4m3 without a scale": ({"a.weight": np.zeros((16, 64), E4M3)}, "'a.weight'"),
  "experts' codes of another name": (
    {
      "m.experts.w1": np.zeros((2, 16, 32), np.uint8),
      "m.experts.w1_scales_of_blocks": np.zeros((2, 16, 4), np.float32),
    },
    "'m.experts.w1'",
  ),
  "packed experts": ({"m.experts.w_packed": np.zeros((2, 8, 32), "u1")}, "'m.experts.w_packed'"),
  "blocks": ({"m.experts.w1_blocks": np.zeros((2, 16, 2, 16), np.uint8)}, "'m.experts.w1_blocks'"),
  "integers of 4 bits": ({"a.qweight": np.zeros((8, 64), np.int32)}, "'a.qweight'"),
  "their zeros": ({"a.weight_zero_point": np.zeros((16, 1), np.int8)}, "'a.weight_zero_point'"),
  "their order": ({"a.weight_g_idx": np.zeros(64, np.int32)}, "'a.weight_g_idx'"),
  "smoothing": ({"up.pre_quant_scale": np.ones(64, BF16)}, "'up.pre_quant_scale'", "not applied"),
  "a low rank": ({"up.svdquant_lora_a": np.ones((4, 64), BF16)}, "'up.svdquant_lora_a'"),
  "a rotation": ({"up.R4_input.weight": np.eye(64, dtype=np.float32)}, "a rotation"),
  "FP-Quant's": ({"up.forward_hadamard_matrix": np.eye(16, dtype=BF16)}, "a rotation"),
  "gpt-oss's": ({"m.experts.w_scales": np.zeros((2, 8, 2), np.uint8)}, "'m.experts.w_scales'"),
  "what scales are made from": ({"a.input_quantizer._amax": ONE}, "'a.input_quantizer._amax'"),
  **{f"{n} of no layer": ({f"u.{n}": ONE}, f"'u.{n}'") for n in SCALARS},
  **{f"{n} beside a layer": ({f"up.{n}": ONE}, f"'up.{n}'") for n in BESIDE},
  "an expert's": ({"m.experts.gate_up_input_scale": ONE}, "'m.experts.gate_up_input_scale'"),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT)
def test_what_no_layer_takes_is_refused(what, tmp_path):
  extra, *words = LEFT[what]
  modelopt(tmp_path, {"up": NVFP4}, schemes.modelopt_config("NVFP4", ["a", "m*"]), extra)
  refused(tmp_path, "model.safetensors", *words)


@pytest.mark.parametrize("what", ["smoothing", "a low rank", "a rotation", "FP-Quant's"])
def test_what_a_layer_needs_is_not_left_out(what, tmp_path):
  """By asking for the weight alone. Of another layer it is no matter."""
  extra, *_ = LEFT[what]
  modelopt(tmp_path, {"up": NVFP4, "down": NVFP4}, schemes.modelopt_config("NVFP4"), extra)
  assert checkpoint.load(tmp_path, only="down.weight").keys() == {"down.weight"}
  (name,) = extra
  with pytest.raises(ValueError, match=rf"^load: .*{re.escape(repr(name))}"):
    checkpoint.load(tmp_path, only="up.weight")


def test_what_looks_like_codes_and_is_none_stays(tmp_path):
  """GPT-2's causal mask, masks, scales of the KV cache, and a parameter called scale."""
  extra = {
    "h.attn.bias": np.tril(np.ones((1, 1, 4, 4), np.uint8)),
    "mask": np.ones((4, 4), np.uint8),
    "h.attn.k_scale": np.array([0.5], E4M3),
    "h.v_proj.v_scale": np.asarray(0.5, np.float32),
    "h.norm.scale": np.ones(64, BF16),
    "h.gamma": np.ones((4, 4), np.float32),
    "h.gamma_scale": np.ones(4, np.float32),
    "h.rotary_emb.inv_freq": np.ones(8, np.float32),
    "h.v_proj.output_scale": ONE,
    "h.router.per_expert_scale": np.ones(4, BF16),
    "up.bias": np.ones(8, BF16),
    "h.attn_output.weight": np.ones((8, 8), np.float32),
    "embed_input.weight": np.ones((8, 8), np.float32),
  }
  modelopt(tmp_path, {"up": NVFP4}, schemes.modelopt_config("NVFP4"), extra)
  loaded = checkpoint.load(tmp_path)
  assert loaded.keys() == extra.keys() | {"up.weight"}
  for name, array in extra.items():
    assert np.asarray(loaded[name]).tobytes() == array.tobytes()


def test_a_global_scale_of_no_layer_of_mlx(tmp_path):
  config = {"quantization": schemes.mlx_entry("nvfp4")}
  one(tmp_path, "mlx", {"up": schemes.mlx("nvfp4")}, config, extra={"u.global_scale": ONE})
  refused(tmp_path, "model.safetensors", "'u.global_scale'")


def test_scales_of_activations_alone_stay(tmp_path):
  """Of layers whose weights are not quantized, as the configuration says."""
  of_activations = schemes.ct_group("fp8", ["re:.*b$"], strategy="tensor") | {"weights": None}
  extra = {"b.weight": np.ones((8, 64), BF16), "b.input_scale": ONE}
  compressed(tmp_path, {"up": CT_NVFP4}, [LINEAR, of_activations], extra=extra)
  loaded = checkpoint.load(tmp_path)
  assert loaded["b.input_scale"] == 1
  checkpoint.save(tmp_path / "again", loaded, format="compressed-tensors")
  assert checkpoint.load(tmp_path / "again").keys() == loaded.keys()


PATTERNS = {
  "modelopt": ["model.layers.1*", "*.mlp.gate*"],
  "compressed-tensors": [r"re:.*layers\.1", "re:.*mlp.gate"],
}


@pytest.mark.parametrize("format", PATTERNS)
@pytest.mark.parametrize("path", ["model.layers.10.up", "model.layers.0.mlp.gate_proj"])
def test_a_pattern_that_hits_a_quantized_layer_too(format, path, tmp_path):
  plain = {f"model.layers.{i}.mlp.gate.weight": np.ones((4, 64), np.float32) for i in (0, 1)}
  if format == "modelopt":
    config = schemes.modelopt_config("NVFP4", PATTERNS[format])
    made = modelopt(tmp_path, {path: NVFP4}, config, plain)
  else:
    made = compressed(tmp_path, {path: CT_NVFP4}, [LINEAR], PATTERNS[format], plain)
  loaded = checkpoint.load(tmp_path)
  want = made.wants[f"{path}.weight"]
  np.testing.assert_array_equal(loaded[f"{path}.weight"].packed, want.packed)
  assert np.asarray(loaded[f"{path}.weight"].global_scale) == want.amax["global_scale"]
  assert all(name in loaded for name in plain)


@pytest.mark.parametrize("suffix", ["global_scale", "biases"])
def test_what_a_mode_of_mlx_has_no_place_for(suffix, tmp_path):
  config = {"quantization": schemes.mlx_entry("mxfp8")}
  extra = {f"up.{suffix}": np.ones((), np.float32)}
  one(tmp_path, "mlx", {"up": schemes.mlx("mxfp8")}, config, extra=extra)
  refused(tmp_path, f"'up.{suffix}'")


# Rotations and zero points of compressed-tensors' configurations.


def transforms(location):
  apply = [{"targets": ["re:.*up"], "location": location, "inverse": False, "ignore": []}]
  scheme = {"type": "hadamard", "apply": apply, "randomize": False, "head_dim": None}
  return {"config_groups": {"R1": scheme}}


@pytest.mark.parametrize("location", ["input", "output", "k_cache", "q_attn"])
def test_online_rotations_are_refused(location, tmp_path):
  compressed(tmp_path, {"up": CT_NVFP4}, [LINEAR], transform_config=transforms(location))
  refused(tmp_path, "config.json", "'R1' of 'transform_config'", f"found {location!r}")


@pytest.mark.parametrize("location", ["weight_input", "weight_output"])
def test_rotations_that_are_in_the_weights_are_none_of_load(location, tmp_path):
  made = compressed(tmp_path, {"up": CT_NVFP4}, [LINEAR], transform_config=transforms(location))
  assert checkpoint.load(tmp_path).keys() == made.wants.keys()


ACTIVATIONS = {
  "of 8 bits": ({"num_bits": 8, "group_size": None}, "'num_bits'", "found 8"),
  "integers": ({"type": "int"}, "'type'", "found 'int'"),
  "a scale for each token": ({"group_size": None, "strategy": "token"}, "'strategy'"),
  "other groups": ({"group_size": 32}, "'group_size'", "found 32"),
  "zero points": ({"symmetric": False}, "'symmetric'", "found False"),
}


@pytest.mark.parametrize("what", ACTIVATIONS)
def test_activations_that_are_not_quantized_as_weights_are(what, tmp_path):
  change, *words = ACTIVATIONS[what]
  group = LINEAR | {"input_activations": LINEAR["input_activations"] | change}
  compressed(tmp_path, {"up": CT_NVFP4}, [group])
  refused(tmp_path, "config.json", "input_activations", "'group_0'", *words)


def test_results_of_layers_that_are_quantized(tmp_path):
  group = LINEAR | {"output_activations": LINEAR["input_activations"]}
  compressed(tmp_path, {"up": CT_NVFP4}, [group])
  refused(tmp_path, "config.json", "'output_activations'", "'group_0'", "null")


def test_zero_points_and_sparsity_are_refused(tmp_path):
  group = json.loads(json.dumps(LINEAR))
  group["weights"]["symmetric"] = False
  compressed(tmp_path / "a", {"up": CT_NVFP4}, [group])
  refused(tmp_path / "a", "'symmetric' of the weights of 'group_0'", "zero points")
  sparse = {"format": "sparse-24-bitmask"}
  compressed(tmp_path / "b", {"up": CT_NVFP4}, [LINEAR], sparsity_config=sparse)
  refused(tmp_path / "b", "'sparsity_config'", "found 'sparse-24-bitmask'")


# The KV cache.


KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def test_the_configuration_of_the_kv_cache_survives(tmp_path):
  scales = {"a.k_proj.k_scale": np.float32(0.25), "a.v_proj.v_scale": np.float32(0.5)}
  modelopt(tmp_path / "m", {"up": NVFP4}, schemes.modelopt_config("NVFP4", (), "FP8"), scales)
  loaded = checkpoint.load(tmp_path / "m")
  assert loaded.kv_cache == {"kv_cache_quant_algo": "FP8"}
  checkpoint.save(tmp_path / "again", loaded, format="modelopt")
  hf = checkpoints.read_json(tmp_path / "again" / "hf_quant_config.json")["quantization"]
  assert hf["kv_cache_quant_algo"] == "FP8"
  config = checkpoints.read_json(tmp_path / "again" / "config.json")["quantization_config"]
  assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
  assert float(checkpoint.load(tmp_path / "again")["a.k_proj.k_scale"]) == 0.25

  checkpoint.save(tmp_path / "ct", loaded, format="compressed-tensors")
  there = checkpoint.load(tmp_path / "ct")
  assert there.kv_cache["kv_cache_scheme"].items() >= {"num_bits": 8, "type": "float"}.items()
  assert float(there["a.v_proj.v_scale"]) == 0.5
  checkpoint.save(tmp_path / "back", there, format="modelopt")
  assert checkpoint.load(tmp_path / "back").kv_cache == loaded.kv_cache


def test_a_kv_cache_that_config_json_alone_names(tmp_path):
  """Of the two files that ModelOpt writes."""
  modelopt(tmp_path, {"up": NVFP4}, schemes.modelopt_config("NVFP4"))
  scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
  config = {"quantization_config": {"quant_method": "modelopt", "kv_cache_scheme": scheme}}
  (tmp_path / "config.json").write_text(json.dumps(config))
  loaded = checkpoint.load(tmp_path)
  assert loaded.kv_cache == {"kv_cache_scheme": scheme}
  checkpoint.save(tmp_path / "again", loaded, format="modelopt")
  assert checkpoint.load(tmp_path / "again").kv_cache["kv_cache_quant_algo"] == "FP8"


@pytest.mark.parametrize("format", ["mlx", "transformers"])
def test_a_format_without_a_configuration_of_the_kv_cache(format, tmp_path):
  """It is not lost without a word."""
  modelopt(tmp_path / "m", {"up": MXFP8}, schemes.modelopt_config("MXFP8", (), "FP8"))
  loaded = checkpoint.load(tmp_path / "m")
  words = rf"^save: 'kv_cache_quant_algo'.*'FP8'.*'{format}'.*set kv_cache to \{{\}}"
  with pytest.raises(ValueError, match=words):
    checkpoint.save(tmp_path / "other", loaded, format=format)
  loaded.kv_cache = {}
  checkpoint.save(tmp_path / "other", loaded, format=format)


@pytest.mark.parametrize(
  ("kv_cache", "algorithm"),
  [(KV, "FP8"), (KV | {"strategy": "attn_head"}, None), (KV | {"dynamic": True}, None)],
)
def test_schemes_of_the_kv_cache_of_compressed_tensors(kv_cache, algorithm, tmp_path):
  compressed(tmp_path / "m", {"up": CT_NVFP4}, [LINEAR], kv_cache=kv_cache)
  loaded = checkpoint.load(tmp_path / "m")
  checkpoint.save(tmp_path / "again", loaded, format="compressed-tensors")
  config = checkpoints.read_json(tmp_path / "again" / "config.json")["quantization_config"]
  assert config["kv_cache_scheme"] == kv_cache
  if algorithm is None:
    with pytest.raises(ValueError, match=r"'kv_cache_scheme'.*'modelopt' has no words"):
      checkpoint.save(tmp_path / "modelopt", loaded, format="modelopt")
  else:
    checkpoint.save(tmp_path / "modelopt", loaded, format="modelopt")
    assert checkpoint.load(tmp_path / "modelopt").kv_cache == {"kv_cache_quant_algo": algorithm}


def test_nvfp4_in_the_kv_cache(tmp_path):
  """ModelOpt's own word for it, in either of its files, which compressed-tensors has not."""
  inner = schemes.modelopt_config("NVFP4")["quantization"]
  inner |= {"quant_method": "modelopt", "kv_cache_scheme": "NVFP4"}
  del inner["kv_cache_quant_algo"]
  one(tmp_path / "m", "modelopt", {"up": NVFP4}, {"quantization_config": inner})
  loaded = checkpoint.load(tmp_path / "m")
  checkpoint.save(tmp_path / "again", loaded, format="modelopt")
  hf = checkpoints.read_json(tmp_path / "again" / "hf_quant_config.json")["quantization"]
  config = checkpoints.read_json(tmp_path / "again" / "config.json")["quantization_config"]
  assert (hf["kv_cache_quant_algo"], config["kv_cache_scheme"]) == ("NVFP4", "NVFP4")
  with pytest.raises(ValueError, match=r"is 'NVFP4'.*'compressed-tensors'"):
    checkpoint.save(tmp_path / "ct", loaded, format="compressed-tensors")


# Configurations that name more, or less, than the files hold.


def test_mlx_entries_without_tensors_say_nothing(tmp_path):
  entries = {"lm_head": schemes.mlx_entry("affine", 8), "language_model.up": {"bits": 3}}
  quantization = schemes.mlx_entry("nvfp4") | entries | {"norm": False, "up": True}
  made = one(tmp_path, "mlx", {"up": schemes.mlx("nvfp4")}, {"quantization": quantization})
  assert checkpoint.load(tmp_path).keys() == made.wants.keys()


def test_modules_of_mixed_precision(tmp_path):
  """A key may be a module around the layers: the innermost one that is named says how."""
  layers = {f"m.experts.{i}.{name}": NVFP4 for i in range(2) for name in ("up", "down")}
  layers |= {"m.experts.1.down": MXFP8, "m.attn.q": MXFP8}
  entries = {"m.experts": "NVFP4", "m.experts.1.down": "MXFP8", "m.attn": "MXFP8"}
  entries = {path: schemes.modelopt_entry(name) for path, name in entries.items()}
  config = schemes.modelopt_config("MIXED_PRECISION", quantized_layers=entries)
  made = modelopt(tmp_path, layers, config, {"m.gate.weight": np.ones((2, 64), BF16)})
  loaded = checkpoint.load(tmp_path)
  modes = {name: w.mode for name, w in loaded.items() if isinstance(w, jaxqq.QuantizedWeight)}
  assert modes == {name: want.mode for name, want in made.wants.items() if want.mode}
  entries["m.gone"] = schemes.modelopt_entry("NVFP4")
  (tmp_path / "hf_quant_config.json").write_text(json.dumps(config))
  refused(tmp_path, "'m.gone.weight' is missing", "hf_quant_config.json")


def test_groups_of_activations_alone(tmp_path):
  group = {"targets": ["LlamaAttention"], "weights": None, "input_activations": KV}
  extra = {"attn.q_scale": np.ones(1, BF16)}
  compressed(tmp_path / "m", {"up": CT_NVFP4}, [group, LINEAR], extra=extra)
  loaded = checkpoint.load(tmp_path / "m")
  assert loaded["up.weight"].mode == "nvfp4" and "attn.q_scale" in loaded
  checkpoint.save(tmp_path / "again", loaded, format="compressed-tensors")
  config = checkpoints.read_json(tmp_path / "again" / "config.json")["quantization_config"]
  assert group in config["config_groups"].values()
  with pytest.raises(ValueError, match=r"'config_groups'.*'modelopt'"):
    checkpoint.save(tmp_path / "modelopt", loaded, format="modelopt")


# Weights alone.


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("alone", [True, False])
def test_weights_alone_are_kept_as_such(format, alone, tmp_path):
  if format == "modelopt":
    layer = schemes.modelopt_nvfp4(static=False, weight_only=alone)
    algorithm = "W4A16_NVFP4" if alone else "NVFP4"
    modelopt(tmp_path / "m", {"up": layer}, schemes.modelopt_config(algorithm))
  else:
    layer = schemes.compressed_tensors("mxfp8", alone)
    compressed(tmp_path / "m", {"up": layer}, [schemes.ct_group("mxfp8", ["Linear"], alone)])
  loaded = checkpoint.load(tmp_path / "m")
  assert loaded.weight_only == ({"up.weight"} if alone else set())
  assert loaded["up.weight"].quantize_input is not alone
  for chosen in (True, False):
    told = checkpoint.load(tmp_path / "m", quantize_input=chosen)
    assert told["up.weight"].quantize_input is chosen
    checkpoint.save(tmp_path / f"{chosen}", told, format=format)
    assert checkpoint.load(tmp_path / f"{chosen}")["up.weight"].quantize_input is chosen
  with pytest.raises(TypeError, match="load: quantize_input must be True or False, got 'no'"):
    checkpoint.load(tmp_path / "m", quantize_input="no")
  for other in ("modelopt", "compressed-tensors"):
    checkpoint.save(tmp_path / other, loaded, format=other)
    there = checkpoint.load(tmp_path / other)
    assert there.weight_only == loaded.weight_only
    config = checkpoints.read_json(tmp_path / other / "config.json")["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (group.get("input_activations") is None) == alone
    if other == "modelopt":
      assert config["quant_algo"].startswith("W4A16_") == alone


@pytest.mark.parametrize("quantized", [True, False])
def test_mlx_says_whether_activations_are_quantized(quantized, tmp_path):
  config = {"quantization": schemes.mlx_entry("mxfp8")}
  config |= {"quantize_activations": True} if quantized else {}
  one(tmp_path / "m", "mlx", {"up": schemes.mlx("mxfp8")}, config)
  loaded = checkpoint.load(tmp_path / "m")
  assert loaded.weight_only == (set() if quantized else {"up.weight"})
  checkpoint.save(tmp_path / "ct", loaded, format="compressed-tensors")
  there = checkpoint.load(tmp_path / "ct")
  assert there.weight_only == loaded.weight_only
  there.config.pop("quantize_activations", None)
  checkpoint.save(tmp_path / "back", there, format="mlx")
  back = checkpoints.read_json(tmp_path / "back" / "config.json")
  assert back.get("quantize_activations", False) is quantized
