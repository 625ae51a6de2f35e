"""mxfp4, transformers' mxfp8, and experts: stacks, parameters, gathered and taken apart."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq import checkpoint
from tests.support import checkpoints, oracle, schemes
from tests.support.checkpoints import E4M3
from tests.support.messages import refused
from tests.support.schemes import (
  BF16,
  CT_NVFP4,
  LINEAR,
  MXFP8,
  NVFP4,
  SHAPE,
  Generated,
  compressed,
  one,
)


def rng():
  return np.random.default_rng(0)


# mxfp4, and transformers' mxfp8.


def gpt_oss(folder):
  made, numbers = Generated("transformers"), rng()
  for name in ("gate_up_proj", "down_proj"):
    path = f"model.layers.0.mlp.experts.{name}"
    made.add_parameter(path, schemes.blocks, numbers, (3, *SHAPE), lambda s: f"_{s}")
    made.add_plain(f"{path}_bias", np.ones((3, 8), BF16))
  made.add_plain("model.layers.0.self_attn.q_proj.weight", np.ones((4, 64), BF16))
  config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
  made.configs = {"config.json": {"quantization_config": config}}
  made.write(folder)
  return made


def test_gpt_oss(tmp_path):
  made = gpt_oss(tmp_path / "m")
  loaded = checkpoint.load(tmp_path / "m")
  name = "model.layers.0.mlp.experts.gate_up_proj"
  weight = loaded[name]
  assert (weight.mode, weight.shape, loaded.format) == ("mxfp4", (3, *SHAPE), "transformers")
  assert loaded.weight_only == {name, name.replace("gate_up", "down")}
  codes = made.tensors[f"{name}_blocks"].reshape(3, 8, 32)
  elements = np.stack(
    [checkpoints.E2M1_VALUES[codes & 15], checkpoints.E2M1_VALUES[codes >> 4]], -1
  )
  scales = np.exp2(np.repeat(made.tensors[f"{name}_scales"], 32, -1) - 127.0)
  np.testing.assert_array_equal(weight.dequantize("float32"), elements.reshape(3, *SHAPE) * scales)
  exact, mag = oracle.product(np.ones((2, SHAPE[1])), (elements.reshape(3, *SHAPE) * scales)[0])
  out = jaxqq.qqmm(jnp.ones((2, SHAPE[1]), jnp.float32), weight[0])
  oracle.assert_within_bound(np.asarray(out), exact, mag)
  checkpoint.save(tmp_path / "again", loaded, format="transformers")
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(tmp_path / "m")
  config = checkpoints.read_json(tmp_path / "again" / "config.json")["quantization_config"]
  assert config["quant_method"] == "mxfp4"
  assert config["modules_to_not_convert"] == ["model.layers.0.self_attn.q_proj"]


def test_mxfp4_of_compressed_tensors_and_of_modelopt(tmp_path):
  group = schemes.ct_group("mxfp4", ["Linear"], weight_only=True)
  layer = schemes.compressed_tensors("mxfp4", weight_only=True)
  made = compressed(tmp_path / "m", {"up": layer}, [group])
  loaded = checkpoint.load(tmp_path / "m")
  assert loaded["up.weight"].mode == "mxfp4" and loaded.weight_only == {"up.weight"}
  for format in ("compressed-tensors", "modelopt", "mlx"):
    checkpoint.save(tmp_path / format, loaded, format=format)
    there = checkpoint.load(tmp_path / format)
    np.testing.assert_array_equal(there["up.weight"].packed, made.wants["up.weight"].packed)
    assert there.weight_only == loaded.weight_only
  assert checkpoints.read_raw(tmp_path / "compressed-tensors") == checkpoints.read_raw(
    tmp_path / "m"
  )
  with pytest.raises(ValueError, match=r"'mxfp4' must be that of stacked experts.*'up.weight'"):
    checkpoint.save(tmp_path / "hf", loaded, format="transformers")


def test_mxfp8_of_transformers(tmp_path):
  config = {"quantization_config": {"quant_method": "mxfp8"}}
  made = one(tmp_path / "m", "transformers", {"up": schemes.transformers_mxfp8}, config)
  loaded = checkpoint.load(tmp_path / "m")
  np.testing.assert_array_equal(loaded["up.weight"].scales, made.wants["up.weight"].scales)
  checkpoint.save(tmp_path / "again", loaded, format="transformers")
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(tmp_path / "m")
  loaded["down.weight"] = jaxqq.quantize_weight(jnp.ones((8, 64)), mode="mxfp4")
  with pytest.raises(ValueError, match=r"'down\.weight'"):
    checkpoint.save(tmp_path / "b", loaded, format="transformers")
  del loaded["down.weight"]
  loaded["experts.up"] = jaxqq.quantize_weight(jnp.ones((2, 8, 64)), mode="mxfp4")
  with pytest.raises(ValueError, match=r"one kind of quantized layers.*mxfp4.* and mxfp8"):
    checkpoint.save(tmp_path / "b", loaded, format="transformers")


# Experts.


def test_a_stack_with_a_scale_for_each_expert(tmp_path):
  """ModelOpt's, under a module's name, and MLX's with an amax for each expert."""
  made, numbers = Generated("modelopt"), rng()
  codes, scales, want = schemes.packed("nvfp4", numbers, (3, *SHAPE))
  scale_2 = np.float32([0.5, 0.25, 3e-4])
  made.tensors = {
    "up.weight": codes,
    "up.weight_scale": scales.view(E4M3),
    "up.weight_scale_2": scale_2,
    "up.input_scale": np.asarray(0.125, np.float32),
  }
  made.configs = {"hf_quant_config.json": schemes.modelopt_config("NVFP4")}
  made.write(tmp_path / "m")
  loaded = checkpoint.load(tmp_path / "m", dtype="float32")
  weight = loaded["up.weight"]
  np.testing.assert_array_equal(weight.global_scale, np.float32(2688) * scale_2)
  np.testing.assert_array_equal(weight.input_global_scale, np.full(3, 336, np.float32))
  elements = np.stack(
    [checkpoints.E2M1_VALUES[codes & 15], checkpoints.E2M1_VALUES[codes >> 4]], -1
  )
  values = elements.reshape(3, *SHAPE) * np.repeat(scales.view(E4M3).astype(np.float64), 16, -1)
  wanted = values * scale_2[:, None, None].astype(np.float64)
  np.testing.assert_allclose(weight.dequantize(), wanted, rtol=2e-7, atol=0)
  checkpoint.save(tmp_path / "again", loaded, format="modelopt")
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(tmp_path / "m")

  amax = np.float32([1, 2, 3])
  mlx = {"up.weight": want.packed, "up.scales": scales, "up.global_scale": amax}
  config = {"quantization": schemes.mlx_entry("nvfp4")}
  checkpoints.write(tmp_path / "mlx", mlx, config_json=config)
  loaded = checkpoint.load(tmp_path / "mlx")
  np.testing.assert_array_equal(loaded["up.weight"].global_scale, amax)
  checkpoint.save(tmp_path / "mlx again", loaded, format="mlx")
  assert checkpoints.read_raw(tmp_path / "mlx again") == checkpoints.read_raw(tmp_path / "mlx")
  bad = mlx | {"up.global_scale": np.ones(2, np.float32)}
  checkpoints.write(tmp_path / "bad", bad, config_json=config)
  refused(tmp_path / "bad", "'up.global_scale' must be F32 of one element or one a matrix", "(2,)")


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("names", ["modelopt", "w13", "compressed-tensors"])
def test_experts_that_are_parameters(names, transposed, tmp_path):
  """gate_up_proj as Llama 4 has it, (E, K / 2, N), or the other way round."""
  ct = names == "compressed-tensors"
  layer = CT_NVFP4 if ct else NVFP4
  made, numbers = Generated("compressed-tensors" if ct else "modelopt"), rng()
  base = "m.experts.w13" if names == "w13" else "m.experts.gate_up_proj"
  name = f"{base}_weight" if names == "w13" else base
  endings = {
    "modelopt": lambda s: "" if s == "weight" else f"_{s}",
    "w13": lambda s: "" if s == "weight" else "_" + s.removeprefix("weight_"),
    "compressed-tensors": lambda s: "_" + s.removeprefix("weight_"),
  }
  ending = endings[names]
  if names == "w13":  # w13_weight, w13_weight_scale, w13_weight_scale_2, w13_input_scale
    made.add_parameter("m.experts.w13", layer, numbers, (3, 8, 128), lambda s: f"_{s}", transposed)
    made.wants[name] = made.wants.pop("m.experts.w13")
  else:
    made.add_parameter(base, layer, numbers, (3, 8, 128), ending, transposed)
  if ct:
    made.configs = {"config.json": {"quantization_config": schemes.ct_config([LINEAR], [])}}
  else:
    made.configs = {"hf_quant_config.json": schemes.modelopt_config("NVFP4")}
  made.write(tmp_path / "m")
  loaded = checkpoint.load(tmp_path / "m")
  want, weight = made.wants[name], loaded[name]
  assert loaded.keys() == {name} and weight.shape == (3, 8, 128)
  np.testing.assert_array_equal(weight.packed, want.packed)
  np.testing.assert_array_equal(weight.scales, want.scales)
  checkpoint.save(tmp_path / "again", loaded, format=made.format)
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(tmp_path / "m")


def experts(folder, kind="modelopt", skip=(), **changed):
  made, numbers = Generated("modelopt"), rng()
  for e in (i for i in range(11) if i not in skip):
    for name in ("up", "down"):
      made.add(f"m.experts.{e}.{name}", changed.get(f"{name}{e}", NVFP4), numbers)
  made.add("m.shared_experts.up", NVFP4, numbers)
  made.add_plain("m.experts.0.up.bias", np.ones(8, BF16))
  made.configs = {"hf_quant_config.json": schemes.modelopt_config("NVFP4")}
  made.write(folder)
  return made


def test_experts_are_gathered_and_taken_apart(tmp_path):
  made = experts(tmp_path / "m")
  loaded = checkpoint.load(tmp_path / "m", experts="stack")
  assert loaded.keys() == {
    *("m.experts.up.weight", "m.experts.down.weight", "m.shared_experts.up.weight"),
    "m.experts.0.up.bias",
  }
  weight = loaded["m.experts.up.weight"]
  assert weight.shape == (11, *SHAPE)
  for e in range(11):
    want = made.wants[f"m.experts.{e}.up.weight"]
    np.testing.assert_array_equal(weight[e].packed, want.packed)
    assert np.asarray(weight.global_scale)[e] == want.amax["global_scale"]
    assert np.asarray(weight.input_global_scale)[e] == want.amax["input_global_scale"]
  checkpoint.save(tmp_path / "again", loaded, format="modelopt", max_shard_size=3000)
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(tmp_path / "m")

  # A stack of one's own is taken apart too, and its amax is noted where no scalar stands for it.
  amax = np.random.default_rng(0).uniform(1, 32, 400).astype(np.float32)
  kind = "nvfp4-pack-quantized"
  lost = amax[checkpoints.amax_of(kind, checkpoints.scalar_of(kind, amax)) != amax][:2]
  own = jaxqq.QuantizedWeight(weight.packed[:2], weight.scales[:2], global_scale=lost)
  checkpoint.save(tmp_path / "own", {"a.experts.w.weight": own}, format="compressed-tensors")
  names = checkpoints.read_raw(tmp_path / "own")
  assert "a.experts.1.w.weight_packed" in names and len(names) == 6
  again = checkpoint.load(tmp_path / "own", experts="stack")["a.experts.w.weight"]
  assert np.asarray(again.global_scale).tobytes() == lost.tobytes()
  whole = checkpoint.load(tmp_path / "own", only="a.experts.*.w.weight")
  assert whole.keys() == {"a.experts.0.w.weight", "a.experts.1.w.weight"}
  stack = checkpoint.load(tmp_path / "own", only="a.experts.w.weight", experts="stack")
  assert stack.keys() == {"a.experts.w.weight"}


def test_experts_that_cannot_be_a_stack(tmp_path):
  experts(tmp_path / "a", skip=(4,))
  with pytest.raises(ValueError, match=r"all experts of 'm.experts.\w+'.*no quantized expert 4\.$"):
    checkpoint.load(tmp_path / "a", experts="stack")
  assert "m.experts.5.up.weight" in checkpoint.load(tmp_path / "a")
  entries = {"m": schemes.modelopt_entry("NVFP4")}
  entries["m.experts.3.up"] = schemes.modelopt_entry("MXFP8")
  experts(tmp_path / "b", up3=MXFP8)
  config = schemes.modelopt_config("MIXED_PRECISION", quantized_layers=entries)
  (tmp_path / "b" / "hf_quant_config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"of one kind, found 'm.experts.3.up' in MXFP8.*NVFP4"):
    checkpoint.load(tmp_path / "b", experts="stack")


@pytest.mark.parametrize("of", ["fp8", "numbers"])
def test_a_last_expert_that_is_not_packed(of, tmp_path):
  """It would be left out of a stack that is one expert short."""
  layers, extra = {"m.experts.0.up": NVFP4}, {}
  if of == "fp8":
    layers["m.experts.1.up"] = schemes.fp8("tensor")
  else:
    extra["m.experts.1.up.weight"] = np.zeros(schemes.SHAPE, np.float32)
  schemes.modelopt(tmp_path, layers, schemes.modelopt_config("NVFP4", ["m.experts.1*"]), extra)
  assert checkpoint.load(tmp_path).keys() == {"m.experts.0.up.weight", "m.experts.1.up.weight"}
  for only in (None, "m.experts.up.weight"):
    with pytest.raises(
      ValueError, match=r"^load: .*'m.experts.up' packed.*'m.experts.1.up.weight'"
    ):
      checkpoint.load(tmp_path, experts="stack", only=only)


def test_an_expert_that_calibration_never_reached(tmp_path):
  """The stack has no static scale of the activations; a save writes those that were there."""
  made = experts(tmp_path / "m")
  made.tensors["m.experts.7.up.input_scale"] = np.asarray(0, np.float32)
  made.write(tmp_path / "m")
  with pytest.warns(UserWarning, match="'m.experts.7.up.input_scale' is 0.0"):
    loaded = checkpoint.load(tmp_path / "m", experts="stack")
  assert loaded["m.experts.up.weight"].input_global_scale is None
  assert loaded["m.experts.down.weight"].input_global_scale is not None
  checkpoint.save(tmp_path / "again", loaded, format="modelopt")
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(tmp_path / "m")


def test_a_stack_of_which_one_expert_was_not_reached(tmp_path):
  made, numbers = Generated("modelopt"), rng()
  codes, scales, _ = schemes.packed("nvfp4", numbers, (3, *SHAPE))
  made.tensors = {"up.weight": codes, "up.weight_scale": scales.view(E4M3)}
  made.tensors["up.weight_scale_2"] = np.float32([0.5, 0.25, 0.1])
  made.tensors["up.input_scale"] = np.float32([0.5, 0, 0.1])
  made.configs = {"hf_quant_config.json": schemes.modelopt_config("NVFP4")}
  made.write(tmp_path / "m")
  with pytest.warns(UserWarning, match="'up.input_scale' is 0.0, which is no calibration"):
    loaded = checkpoint.load(tmp_path / "m")
  assert loaded["up.weight"].input_global_scale is None
  checkpoint.save(tmp_path / "again", loaded, format="modelopt")
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(tmp_path / "m")


def test_a_name_that_a_stack_would_take(tmp_path):
  made = experts(tmp_path)
  made.add_plain("m.experts.up.weight", np.ones(4, np.float32))
  made.write(tmp_path)
  with pytest.raises(ValueError, match=r"'m\.experts\.up\.weight' has the name of a stack"):
    checkpoint.load(tmp_path, experts="stack")


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
def test_a_global_scale_for_each_row(format, tmp_path):
  """One for all where they are equal, and refused otherwise."""
  weight = jaxqq.quantize_weight(jnp.ones((8, 64)), global_scale="amax")
  leaves, tree = jax.tree.flatten(weight)
  same = jax.tree.unflatten(tree, [*leaves[:2], jnp.full(8, leaves[2])])
  checkpoint.save(tmp_path / "m", {"up.weight": same}, format=format)
  assert float(checkpoint.load(tmp_path / "m")["up.weight"].global_scale) == 1
  of_rows = jax.tree.unflatten(tree, [*leaves[:2], jnp.arange(1.0, 9)])
  with pytest.raises(ValueError, match=r"^save: 'up.weight' has a global_scale for each row"):
    checkpoint.save(tmp_path / "b", {"up.weight": of_rows}, format=format)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("gathered", [False, True])
def test_scalars_keep_their_shape(shape, gathered, tmp_path):
  """ModelOpt's are of none, and others that write its format have them in an array of one."""
  made = experts(tmp_path / "m")
  for name, array in made.tensors.items():
    if name.endswith(("weight_scale_2", "input_scale")):
      made.tensors[name] = array.reshape(shape)
  made.write(tmp_path / "m")
  loaded = checkpoint.load(tmp_path / "m", experts="stack" if gathered else None)
  checkpoint.save(tmp_path / "again", loaded, format="modelopt")
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(tmp_path / "m")


def test_experts_whose_scalars_differ_in_shape(tmp_path):
  made = experts(tmp_path / "m")
  name = "m.experts.3.up.weight_scale_2"
  made.tensors[name] = made.tensors[name].reshape(1)
  made.write(tmp_path / "m")
  weight = checkpoint.load(tmp_path / "m", experts="stack")["m.experts.up.weight"]
  assert (
    np.asarray(weight.global_scale)[3] == made.wants["m.experts.3.up.weight"].amax["global_scale"]
  )


@pytest.mark.parametrize("path", ["experts.w1", "a.local_experts.w1", "a.b.experts.mlp.w1"])
def test_names_of_experts(path, tmp_path):
  weight = jaxqq.quantize_weight(jnp.ones((2, 8, 64)), global_scale="amax")
  checkpoint.save(tmp_path / "m", {f"{path}.weight": weight}, format="modelopt")
  names = set(checkpoint.load(tmp_path / "m"))
  before, _, after = path.rpartition("experts.")
  assert names == {f"{before}experts.{i}.{after}.weight" for i in range(2)}
  loaded = checkpoint.load(tmp_path / "m", experts="stack")
  assert loaded.keys() == {f"{path}.weight"}
  with pytest.raises(ValueError, match=r"'a.myexperts.w1.weight' must have two dimensions"):
    checkpoint.save(tmp_path / "b", {"a.myexperts.w1.weight": weight}, format="modelopt")


# Experts that are not packed.


def plain_experts(folder, count=3, **changed):
  """A quantized layer, and experts of bfloat16 with biases; a value of None leaves one out."""
  made, numbers = Generated("modelopt"), rng()
  made.add("m.proj", NVFP4, numbers)
  for e in range(count):
    for part, shape in (("weight", SHAPE), ("bias", SHAPE[:1])):
      name = f"m.experts.{e}.up.{part}"
      array = changed.get(f"{part}{e}", numbers.standard_normal(shape).astype(BF16))
      if array is not None:
        made.add_plain(name, array)
  made.configs = {"hf_quant_config.json": schemes.modelopt_config("NVFP4", ["m.experts*"])}
  made.write(folder)
  return made


def test_experts_that_are_numbers_are_gathered_and_taken_apart(tmp_path):
  made = plain_experts(tmp_path / "m", count=11)
  loaded = checkpoint.load(tmp_path / "m", experts="stack")
  assert loaded.keys() == {"m.proj.weight", "m.experts.up.weight", "m.experts.up.bias"}
  for part in ("weight", "bias"):
    each = [made.tensors[f"m.experts.{e}.up.{part}"] for e in range(11)]
    np.testing.assert_array_equal(loaded[f"m.experts.up.{part}"], np.stack(each))
  assert loaded["m.experts.up.weight"].dtype == BF16
  checkpoint.save(tmp_path / "again", loaded, format="modelopt")
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(tmp_path / "m")
  config = checkpoints.read_json(tmp_path / "again" / "hf_quant_config.json")["quantization"]
  assert "m.experts.7.up" in config["exclude_modules"]
  one = checkpoint.load(tmp_path / "m", only="m.experts.up.bias", experts="stack")
  assert one["m.experts.up.bias"].shape == (11, SHAPE[0])
  loaded["m.experts.3.up.bias"] = loaded["m.experts.up.bias"][3]
  with pytest.raises(ValueError, match=r"^save: 'm.experts.3.up.bias' is a part of"):
    checkpoint.save(tmp_path / "b", loaded, format="modelopt")


@pytest.mark.parametrize(
  "changed",
  [
    {"bias1": None},
    {"bias2": None},
    {"bias1": np.ones(3, BF16)},
    {"bias1": np.ones(8, np.float32)},
  ],
  ids=["one lacks it", "the last lacks it", "another shape", "another dtype"],
)
def test_what_some_experts_lack_or_have_otherwise_stays(changed, tmp_path):
  made = plain_experts(tmp_path / "m", **changed)
  loaded = checkpoint.load(tmp_path / "m", experts="stack")
  biases = {name for name in made.tensors if name.endswith("up.bias")}
  assert loaded.keys() == {"m.proj.weight", "m.experts.up.weight", *biases}
  checkpoint.save(tmp_path / "again", loaded, format="modelopt")
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(tmp_path / "m")


@pytest.mark.parametrize("powers", ["all", "none", "but one"])
def test_experts_of_fp8(powers, tmp_path):
  """Numbers in one array; or mxfp8, where the scales of all of them are powers of two."""
  layers = {"m.proj": NVFP4}
  for e in range(3):
    is_power = {"all": True, "none": False, "but one": e != 1}[powers]
    layers[f"m.experts.{e}.up"] = schemes.fp8("tensor", powers=is_power)
  config = schemes.modelopt_config(
    "MIXED_PRECISION",
    quantized_layers={
      "m.proj": schemes.modelopt_entry("NVFP4"),
      "m.experts": schemes.modelopt_entry("FP8"),
    },
  )
  made = schemes.modelopt(tmp_path, layers, config)
  wanted = np.stack([made.wants[f"m.experts.{e}.up.weight"].values for e in range(3)])
  loaded = checkpoint.load(tmp_path, experts="stack", dtype="float32")
  assert loaded.keys() == {"m.proj.weight", "m.experts.up.weight"}
  np.testing.assert_allclose(loaded["m.experts.up.weight"], wanted, rtol=1e-7)
  assert loaded.dequantized.keys() == {"m.experts.up.weight"}
  weight = checkpoint.load(tmp_path, experts="stack", fp8="mxfp8")["m.experts.up.weight"]
  assert isinstance(weight, jaxqq.QuantizedWeight) == (powers == "all")
  numbers = weight.dequantize("float32") if powers == "all" else weight.astype(np.float32)
  np.testing.assert_allclose(numbers, wanted, rtol=2**-8)
  assert weight.shape == (3, *SHAPE)
