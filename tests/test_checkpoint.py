"""`jaxqq.checkpoint` against files that it did not write, and its own read by other means."""

from __future__ import annotations

import dataclasses
import doctest
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from safetensors.numpy import save_file

import jaxqq
from jaxqq import checkpoint
from jaxqq.checkpoint import _layouts, _scalars
from tests.support import checkpoints, oracle
from tests.support.processes import HIDE, run_without

# Where names cannot be exchanged, `save` says so.
pytestmark = pytest.mark.filterwarnings("ignore:save. .* this system cannot exchange")
KINDS = (*checkpoints.KINDS, "mlx-mxfp8")
FORMAT = {kind: kind.removesuffix("-mxfp8") for kind in KINDS} | dict.fromkeys(
  ("nvfp4-pack-quantized", "mxfp8-quantized"), "compressed-tensors"
)


def assert_same(array, wanted):
  array, wanted = np.asarray(array), np.asarray(wanted)
  assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
  assert array.tobytes() == wanted.tobytes()


def assert_same_weight(weight, other):
  assert jax.tree.structure(weight) == jax.tree.structure(other)
  jax.tree.map(assert_same, weight, other)


@pytest.mark.parametrize("kind", KINDS)
def test_load(kind, tmp_path):
  folder, wanted, rest = checkpoints.write_kind(tmp_path / "m", kind)
  tensors = checkpoint.load(folder)
  assert isinstance(tensors, dict) and set(tensors) == wanted.keys() | rest.keys()
  assert tensors.format == FORMAT[kind]
  assert tensors.config == {"model_type": "toy", "torch_dtype": "float32"}
  for name, want in wanted.items():
    weight = tensors[name]
    assert isinstance(weight, jaxqq.QuantizedWeight)
    assert (weight.shape, weight.mode, weight.dtype) == ((8, 64), want["mode"], np.float32)
    assert_same(weight.packed, want["packed"])
    assert_same(weight.scales, want["scales"])
    for field in ("global_scale", "input_global_scale"):
      if field in want:
        assert_same(getattr(weight, field), want[field])
      else:
        assert getattr(weight, field) is None
    np.testing.assert_allclose(weight.dequantize(), want["values"], rtol=2e-7, atol=0)
  for name, want in rest.items():
    assert_same(tensors[name], want)


def test_a_tensor_of_64_bits_stays_in_numpy(tmp_path):
  folder, _, rest = checkpoints.write_kind(tmp_path / "m", "mlx")
  assert isinstance(checkpoint.load(folder)["embed.position_ids"], np.ndarray)
  with jax.enable_x64(True):
    ids = checkpoint.load(folder)["embed.position_ids"]
    assert isinstance(ids, jax.Array)
    assert_same(ids, rest["embed.position_ids"])


@pytest.mark.parametrize("kind", ["modelopt", "nvfp4-pack-quantized"])
def test_a_static_scale_of_the_activations_is_used(kind, tmp_path):
  folder, wanted, _ = checkpoints.write_kind(tmp_path / "m", kind)
  weight, want = checkpoint.load(folder)["down.weight"], wanted["down.weight"]
  x = 3 * oracle.random(np.random.default_rng(1), (4, 64), "float32")
  out = jaxqq.qqmm(x, weight)
  x_hat = oracle.round_trip(x, "nvfp4", want["input_global_scale"])
  oracle.assert_within_bound(np.asarray(out), *oracle.product(x_hat, want["values"]))
  other = oracle.product(oracle.round_trip(x, "nvfp4", np.abs(x).max()), want["values"])[0]
  assert oracle.relative_error(np.asarray(out), other) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_saved_with_the_same_bits(kind, tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", kind)
  tensors = checkpoint.load(folder)
  checkpoint.save(tmp_path / "again", tensors, format=tensors.format)
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(folder)
  again = checkpoint.load(tmp_path / "again")
  assert (again.format, again.config) == (tensors.format, tensors.config)
  for name, value in tensors.items():
    assert_same_weight(again[name], value)


@pytest.mark.parametrize("kind", ["modelopt", "nvfp4-pack-quantized"])
def test_scalars_that_float32_cannot_give_back_are_kept(kind, tmp_path):
  """Not every s is to be had from float32(2688 s), nor from float32(2688 / s)."""
  rng = np.random.default_rng(0)
  s = rng.uniform(1.53, 1.99, 1000).astype(np.float32) * np.float32(2.0**-12)
  back = checkpoints.scalar_of(kind, checkpoints.amax_of(kind, s))
  awkward = s[back != s][:4]
  assert awkward.size == 4
  names = ("up", "down")
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", kind)
  tensors, _ = checkpoints.layers(kind, rng)
  scalars = [f"{name}.{suffix}" for name in names for suffix in checkpoints.SCALARS[kind]]
  for name, value in zip(scalars, awkward, strict=True):
    tensors[name] = np.full_like(tensors[name], value)
  checkpoints.write(folder, tensors)
  loaded = checkpoint.load(folder)
  checkpoint.save(tmp_path / "again", loaded, format=loaded.format)
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(folder)

  # What was stored for a weight is not written for another one that took its name.
  other = jaxqq.quantize_weight(jnp.ones((8, 64)), global_scale=jnp.float32(7))
  loaded["up.weight"] = other
  checkpoint.save(tmp_path / "other", loaded, format=loaded.format)
  assert_same(checkpoint.load(tmp_path / "other")["up.weight"].global_scale, np.float32(7))


def test_scalars_that_come_from_an_amax_survive_without_what_was_stored():
  """s = float32(amax / 2688) is what ModelOpt stores, and 2688 / amax compressed-tensors."""
  rng = np.random.default_rng(0)
  amax = np.exp2(rng.uniform(-20, 20, 400_000)).astype(np.float32)
  near = np.float32(np.sqrt(2688 / 2048)) * np.exp2(np.float32(np.arange(-3, 4)))[:, None]
  steps = np.arange(-3000, 3000, dtype=np.int32)
  amax = np.concatenate([amax, (near.view(np.int32) + steps).view(np.float32).ravel()])
  for format in ("modelopt", "compressed-tensors"):
    layout = _layouts.layout_of(format, "nvfp4")
    stored = _scalars.from_amax(layout, amax)
    assert_same(_scalars.from_amax(layout, _scalars.to_amax(layout, stored)), stored)


@pytest.mark.parametrize("kind", ["modelopt", "nvfp4-pack-quantized"])
def test_every_amax_comes_back(kind, tmp_path):
  """Also one that no scalar of the format stands for, as long as its scalar is not changed."""
  format = FORMAT[kind]
  amax = np.random.default_rng(0).uniform(1, 32, 1000).astype(np.float32)
  lost = amax[checkpoints.amax_of(kind, checkpoints.scalar_of(kind, amax)) != amax]
  assert 100 < lost.size < 900
  packed, scales = jaxqq.quantize(jnp.ones((4, 64)))
  tensors = {
    f"{i}.weight": jaxqq.QuantizedWeight(
      *(packed, scales), global_scale=scale, input_global_scale=scale
    )
    for i, scale in enumerate(np.concatenate([lost[:3], amax[:2]]))
  }
  checkpoint.save(tmp_path / "m", tensors, format=format, max_shard_size=500)
  loaded = checkpoint.load(tmp_path / "m")
  for name, weight in tensors.items():
    assert_same_weight(loaded[name], weight)
  raw = checkpoints.read_raw(tmp_path / "m")
  checkpoint.save(tmp_path / "again", loaded, format=format)
  assert checkpoints.read_raw(tmp_path / "again") == raw

  # Somebody changed a scalar and kept the metadata.
  with safetensors.safe_open(tmp_path / "again" / "model.safetensors", "np") as file:
    metadata = file.metadata()
  assert "0" in json.loads(metadata["jaxqq.amax"])
  changed = np.full(() if kind == "modelopt" else (1,), 0.25, np.float32)
  kept = {
    f"0.{checkpoints.CODES[kind]}": np.asarray(packed).view(np.uint8),
    "0.weight_scale": np.asarray(scales).view(checkpoints.E4M3),
    f"0.{checkpoints.SCALARS[kind][0]}": changed,
  }
  save_file(kept, tmp_path / "again" / "model.safetensors", metadata)
  weight = checkpoint.load(tmp_path / "again")["0.weight"]
  assert_same(weight.global_scale, checkpoints.amax_of(kind, changed.reshape(())))


def test_from_one_project_to_another(tmp_path):
  folder, _, rest = checkpoints.write_kind(tmp_path / "m", "nvfp4-pack-quantized")
  there = checkpoint.load(folder)
  checkpoint.save(tmp_path / "modelopt", there, format="modelopt")
  between = checkpoint.load(tmp_path / "modelopt")
  assert between.format == "modelopt"
  for name, weight in there.items():
    assert_same_weight(between[name], weight)
  checkpoint.save(tmp_path / "back", dict(between), format="compressed-tensors")
  assert checkpoints.read_raw(tmp_path / "back") == checkpoints.read_raw(folder)
  raw = checkpoints.read_raw(tmp_path / "modelopt")
  assert {name for name in raw if name.startswith("up.")} == {
    *("up.weight", "up.weight_scale", "up.weight_scale_2", "up.input_scale", "up.bias")
  }
  assert raw["up.weight_scale"][:2] == ("F8_E4M3", (8, 4))
  assert raw["up.weight_scale_2"][:2] == raw["up.input_scale"][:2] == ("F32", ())
  for name in rest:
    assert raw[name] == checkpoints.read_raw(folder)[name]


def quantized(mode, **options):
  w = oracle.random(np.random.default_rng(3), (8, 64), "float32")
  return jaxqq.quantize_weight(w, mode=mode, **{"global_scale": None, **options})


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("format", ["mlx", "modelopt", "compressed-tensors"])
def test_a_weight_without_global_scale_in_every_format(format, mode, tmp_path):
  """2688 stands for none: the same weight, and the same activations."""
  weight = quantized(mode)
  checkpoint.save(tmp_path / "m", {"up.weight": weight}, format=format)
  again = checkpoint.load(tmp_path / "m")["up.weight"]
  x = oracle.random(np.random.default_rng(1), (4, 64), "float32")
  assert_same(again.packed, weight.packed)
  assert_same(again.scales, weight.scales)
  assert_same(again.dequantize(), weight.dequantize())
  assert_same(jaxqq.qqmm(x, again), jaxqq.qqmm(x, weight))


def test_mlx_holds_mxfp4_and_stacked_matrices(tmp_path):
  w = oracle.random(np.random.default_rng(3), (3, 8, 64), "float32")
  quantize = functools.partial(jaxqq.quantize_weight, w, global_scale=None)
  weights = {f"{mode}.weight": quantize(mode) for mode in oracle.MODES}
  checkpoint.save(tmp_path / "m", weights, format="mlx")
  again = checkpoint.load(tmp_path / "m")
  for name, weight in weights.items():
    assert_same_weight(again[name], weight)
  config = checkpoints.read_json(tmp_path / "m" / "config.json")
  common = config["quantization"]["mode"]
  rest = {name: entry for name, entry in config["quantization"].items() if isinstance(entry, dict)}
  assert {common, *(entry["mode"] for entry in rest.values())} == set(oracle.MODES)


def test_configurations_that_save_writes(tmp_path):
  """What readers of these projects look at."""
  plain = jnp.ones((4, 64))
  tensors = {
    "a.weight": jaxqq.QuantizedWeight(
      *jaxqq.quantize(plain, global_scale=jnp.float32(1)),
      global_scale=jnp.float32(1),
      input_global_scale=jnp.float32(2),
    ),
    "lm_head.weight": plain,
    "norm.weight": jnp.ones(64),
  }
  for format in ("modelopt", "compressed-tensors"):
    checkpoint.save(tmp_path / format, tensors, format=format, config={"model_type": "toy"})
  quant = checkpoints.read_json(tmp_path / "modelopt" / "hf_quant_config.json")
  assert quant["producer"] == {"name": "jaxqq", "version": jaxqq.__version__}
  assert quant["quantization"] == {
    "quant_algo": "NVFP4",
    "group_size": 16,
    "kv_cache_quant_algo": None,
    "exclude_modules": ["lm_head"],
  }
  config = checkpoints.read_json(tmp_path / "modelopt" / "config.json")
  assert (config["model_type"], config["torch_dtype"]) == ("toy", "bfloat16")
  hf = config["quantization_config"]
  assert (hf["quant_method"], hf["quant_algo"], hf["ignore"]) == ("modelopt", "NVFP4", ["lm_head"])
  config = checkpoints.read_json(tmp_path / "compressed-tensors" / "config.json")
  quant = config["quantization_config"]
  assert (quant["quant_method"], quant["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
  assert quant["ignore"] == ["lm_head"]
  (group,) = quant["config_groups"].values()
  assert group["targets"] == ["Linear"]
  assert group["weights"]["strategy"] == "tensor_group" and group["weights"]["dynamic"] is False
  assert group["input_activations"]["dynamic"] == "local"

  # Without a static scale the activations are not said to be quantized.
  weight = quantized("nvfp4", global_scale="amax")
  for format in ("modelopt", "compressed-tensors"):
    checkpoint.save(tmp_path / f"{format}-a16", {"a.weight": weight}, format=format)
    assert_same_weight(checkpoint.load(tmp_path / f"{format}-a16")["a.weight"], weight)
    # That it was another is noted where no reader but jaxqq's looks.
    file = tmp_path / f"{format}-a16" / "model.safetensors"
    size, raw = int.from_bytes(file.read_bytes()[:8], "little"), file.read_bytes()
    header = json.loads(raw[8 : 8 + size])
    noted = json.loads(header.pop("__metadata__")["jaxqq.amax"])
    assert noted["a"]["quantize_input"] == 1
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    alone = dataclasses.replace(weight, quantize_input=False)
    assert_same_weight(checkpoint.load(tmp_path / f"{format}-a16")["a.weight"], alone)
    checkpoint.save(tmp_path / f"{format}-b", {"a.weight": alone}, format=format)
    assert checkpoint.load(tmp_path / f"{format}-b").weight_only == {"a.weight"}
  quant = checkpoints.read_json(tmp_path / "modelopt-a16" / "hf_quant_config.json")
  assert quant["quantization"]["quant_algo"] == "W4A16_NVFP4"
  config = checkpoints.read_json(tmp_path / "compressed-tensors-a16" / "config.json")
  (group,) = config["quantization_config"]["config_groups"].values()
  assert group["input_activations"] is None


@pytest.mark.parametrize("format", ["mlx", "modelopt", "compressed-tensors"])
def test_modes_mixed_in_one_checkpoint(format, tmp_path):
  tensors = {
    "a.weight": quantized("nvfp4"),
    "b.weight": quantized("mxfp8"),
    "c.weight": jnp.ones(4),
  }
  checkpoint.save(tmp_path / "m", tensors, format=format)
  again = checkpoint.load(tmp_path / "m")
  assert [again[name].mode for name in ("a.weight", "b.weight")] == ["nvfp4", "mxfp8"]
  for name, value in tensors.items():
    leaves, others = jax.tree.leaves(value), jax.tree.leaves(again[name])
    # Where nvfp4 always has global scales, of w and of x, 2688 stands for none.
    added = [2688, 2688] if name == "a.weight" and format != "mlx" else []
    assert others[len(leaves) :] == added
    for leaf, other in zip(leaves, others, strict=not added):
      assert_same(leaf, other)


def test_mlx_entries_of_layers(tmp_path):
  rng = np.random.default_rng(0)
  (a, a_scales, _), (b, b_scales, _) = checkpoints.nvfp4(rng), checkpoints.mxfp8(rng)
  tensors = {
    "a.weight": a.view("<u4"),
    "a.scales": a_scales,
    "b.weight": b.view("<u4"),
    "b.scales": b_scales,
    "d.weight": np.ones((4, 4), np.float32),
  }
  quantization = {
    "group_size": 16,
    "bits": 4,
    "mode": "nvfp4",
    "d": False,
    "a": True,
    "language_model.lm_head": {"group_size": 64, "bits": 8},
    "b": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
  }
  checkpoints.write(tmp_path, tensors, config_json={"quantization": quantization})
  loaded = checkpoint.load(tmp_path)
  assert (loaded["a.weight"].mode, loaded["b.weight"].mode) == ("nvfp4", "mxfp8")
  assert_same(loaded["b.weight"].packed, tensors["b.weight"])
  assert_same(loaded["d.weight"], tensors["d.weight"])


@pytest.mark.parametrize("where", ["hf_quant_config_json", "config_json"])
def test_modelopt_leaves_out_what_its_wildcards_match(where, tmp_path):
  tensors, wanted = checkpoints.layers("modelopt", np.random.default_rng(0))
  renamed = {name.replace("down.", "model.layers.10.gate."): a for name, a in tensors.items()}
  renamed["model.layers.0.gate.weight"] = np.ones((4, 64), np.float32)
  inner = {"quant_algo": "NVFP4", "group_size": 16}
  if where == "config_json":
    ignored = {"quant_method": "modelopt", "ignore": ["lm_head", "*.gate"]}
    config = {"quantization_config": inner | ignored}
  else:
    config = {"quantization": inner | {"exclude_modules": ["lm_head", "model.layers.*.gate"]}}
  loaded = checkpoint.load(checkpoints.write(tmp_path, renamed, **{where: config}))
  assert_same(loaded["up.weight"].packed, wanted["up.weight"]["packed"])
  assert_same(loaded["model.layers.0.gate.weight"], renamed["model.layers.0.gate.weight"])
  # What the pattern means to leave out, and hits a quantized layer, is what its tensors are.
  hit = loaded["model.layers.10.gate.weight"]
  assert_same(hit.packed, wanted["down.weight"]["packed"])
  assert_same(hit.global_scale, wanted["down.weight"]["global_scale"])
  assert len(loaded) == 3


def test_modelopt_keeps_apart_the_scales_of_layers_that_servers_fuse(tmp_path):
  tensors, _ = checkpoints.layers("modelopt", np.random.default_rng(0))
  fused = {
    name.replace("up.", "q_proj.").replace("down.", "k_proj."): a for name, a in tensors.items()
  }
  checkpoints.write(tmp_path, fused, **checkpoints.configs("modelopt"))
  loaded = checkpoint.load(tmp_path)
  assert float(loaded["q_proj.weight"].global_scale) == pytest.approx(0.7)
  assert float(loaded["k_proj.weight"].global_scale) == pytest.approx(1.7)


def test_compressed_tensors_of_two_formats_and_patterns(tmp_path):
  rng = np.random.default_rng(0)
  a, _ = checkpoints.layers("nvfp4-pack-quantized", rng)
  b, _ = checkpoints.layers("mxfp8-quantized", rng)
  tensors = {f"a.{name}": v for name, v in a.items()} | {f"b.{name}": v for name, v in b.items()}
  config = checkpoints.configs("nvfp4-pack-quantized")["config_json"]["quantization_config"]
  config |= {"format": "mixed-precision", "ignore": ["re:a\\.do.*"]}
  config["config_groups"] = {
    "group_0": checkpoints.NVFP4_GROUP | {"format": "nvfp4-pack-quantized"},
    "group_1": {"targets": ["re:b.*"], "weights": {"group_size": 32}, "format": "mxfp8-quantized"},
  }
  checkpoints.write(tmp_path, tensors, config_json={"quantization_config": config})
  loaded = checkpoint.load(tmp_path)
  modes = {k: w.mode for k, w in loaded.items() if isinstance(w, jaxqq.QuantizedWeight)}
  names = {"a": "nvfp4", "b": "mxfp8"}
  assert modes == {f"{a}.{b}.weight": names[a] for a in names for b in ("up", "down")}
  assert_same(loaded["a.down.weight"].packed.view("u1"), tensors["a.down.weight_packed"])


def test_the_configuration_of_a_text_model_in_another(tmp_path):
  folder, wanted, _ = checkpoints.write_kind(tmp_path / "m", "mxfp8-quantized")
  config = checkpoints.configs("mxfp8-quantized")["config_json"]
  (folder / "config.json").write_text(json.dumps({"model_type": "vlm", "text_config": config}))
  loaded = checkpoint.load(folder)
  assert_same(loaded["up.weight"].packed, wanted["up.weight"]["packed"])
  assert loaded["up.weight"].dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_shards_with_an_index(kind, tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", kind)
  whole = checkpoint.load(folder)
  raw = checkpoints.read_raw(folder)

  # Written by others: a layer's tensors in different files.
  tensors, _ = checkpoints.layers(kind, np.random.default_rng(0))
  (folder / "model.safetensors").unlink()
  weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(tensors)}
  for file in set(weight_map.values()):
    save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  for path in (folder, index):
    loaded = checkpoint.load(path)
    assert set(loaded) == {"up.weight", "down.weight"}
    for name, weight in loaded.items():
      assert_same_weight(weight, whole[name])

  # Written by save.
  checkpoint.save(tmp_path / "saved", whole, format=whole.format, max_shard_size="1KB")
  assert checkpoints.read_raw(tmp_path / "saved") == raw
  files = sorted(file.name for file in (tmp_path / "saved").glob("*.safetensors"))
  assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
  index = checkpoints.read_json(tmp_path / "saved" / "model.safetensors.index.json")
  assert index["weight_map"].keys() == raw.keys() and set(index["weight_map"].values()) == set(
    files
  )
  assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in raw.values())
  again = checkpoint.load(tmp_path / "saved")
  for name, value in whole.items():
    assert_same_weight(again[name], value)


def test_a_single_file_is_a_path_too(tmp_path):
  folder, wanted, _ = checkpoints.write_kind(tmp_path / "m", "mlx")
  (folder / "model.safetensors").rename(folder / "weights.safetensors")
  for path in (folder, folder / "weights.safetensors", str(folder)):
    assert_same(checkpoint.load(path)["up.weight"].packed, wanted["up.weight"]["packed"])


def test_device_and_dtype(tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "modelopt")
  device = jax.devices()[3]
  loaded = checkpoint.load(folder, device=device, dtype="float16")
  assert loaded["up.weight"].dtype == np.float16
  arrays = [a for a in jax.tree.leaves(loaded) if isinstance(a, jax.Array)]
  assert len(arrays) == len(jax.tree.leaves(loaded)) - 1  # but for what has 64 bits
  assert all(a.devices() == {device} for a in arrays)
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  asked = []

  def place(name, shape):
    asked.append((name, shape))
    spec = ("x",) if name == "up.weight" and shape else ()
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

  loaded = checkpoint.load(folder, device=place)
  assert loaded["up.weight"].packed.sharding.shard_shape((8, 8)) == (1, 8)
  assert loaded["up.weight"].global_scale.sharding.is_fully_replicated
  assert [shape for name, shape in asked if name == "up.weight"] == [(8, 8), (8, 4), (), ()]
  checkpoint.save(tmp_path / "again", loaded, format="modelopt")
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(folder)


def test_a_checkpoint_is_a_tree(tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "modelopt")
  loaded = checkpoint.load(folder)
  same = jax.tree.map(lambda a: a, loaded)
  assert isinstance(same, checkpoint.Checkpoint) and set(same) == set(loaded)
  assert_same_weight(same["up.weight"], loaded["up.weight"])
  assert len(jax.tree.leaves(loaded)) == 6 + 2 * 4
  out = jax.jit(lambda t, x: jaxqq.qqmm(x, t["up.weight"]))(
    {"up.weight": loaded["up.weight"]}, jnp.ones((2, 64))
  )
  assert_same(out, jaxqq.qqmm(jnp.ones((2, 64)), loaded["up.weight"]))


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "mlx")
  loaded = checkpoint.load(folder)
  before = {file.name: file.read_bytes() for file in folder.iterdir()}
  written = []

  def fail(file, tensors, *metadata):
    if written:
      raise OSError("disk full")
    written.append(file)
    save_file(tensors, file)

  monkeypatch.setattr("jaxqq.checkpoint._save.write_tensors", fail)
  for target, options in ((folder, {"overwrite": True}), (tmp_path / "new", {})):
    written.clear()
    with pytest.raises(OSError, match="disk full"):
      checkpoint.save(target, loaded, format="mlx", max_shard_size=1000, **options)
    assert len(written) == 1
  assert [path.name for path in tmp_path.iterdir()] == ["m"]
  assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_overwrite(tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "modelopt")
  loaded = checkpoint.load(folder)
  checkpoint.save(folder, loaded, format="modelopt", max_shard_size=1000, overwrite=True)
  (folder / "tokenizer.json").write_text("{}")
  (folder / "pooling").mkdir()
  (folder / "pooling" / "config.json").write_text("[]")
  weights = {"up.weight": loaded["up.weight"]}
  with pytest.raises(FileExistsError, match=r"not empty.*overwrite=True"):
    checkpoint.save(folder, weights, format="compressed-tensors")
  checkpoint.save(folder, weights, format="compressed-tensors", overwrite=True)
  names = {file.name for file in folder.iterdir()}
  assert names == {"model.safetensors", "config.json", "tokenizer.json", "pooling"}
  assert checkpoint.load(folder).format == "compressed-tensors"
  (tmp_path / "empty").mkdir()
  checkpoint.save(tmp_path / "empty", weights, format="modelopt")
  assert checkpoint.load(tmp_path / "empty").keys() == weights.keys()


def test_layouts_name_their_sources():
  assert all(layout.source.count("/") >= 3 for layout in _layouts.LAYOUTS)


@pytest.mark.parametrize("name", ["load", "load_each", "load_into", "save"])
def test_examples_in_docstrings(name):
  function = getattr(checkpoint, name)
  assert all(part in function.__doc__ for part in ("Args:", "Raises:", "Example:", "Source:"))
  names = {"jax": jax, "jnp": jnp, "nnx": nnx, "jaxqq": jaxqq, "checkpoint": checkpoint}
  example = doctest.DocTestParser().get_doctest(function.__doc__, names, name, None, 0)
  assert example.examples
  assert doctest.DocTestRunner().run(example).failed == 0


def test_no_extra_is_needed(tmp_path):
  """Neither tqdm, for a progress bar, nor safetensors."""
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "modelopt")
  hidden = HIDE.format(package="safetensors")
  code = f"from jaxqq import checkpoint; print(len(checkpoint.load({str(folder)!r})))"
  done = run_without("tqdm", hidden + code, tmp_path)
  assert done.stdout.strip() == "8", done.stderr
