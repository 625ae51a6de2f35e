"""`load_into`: checkpoints put into models of Flax NNX and Linen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen, nnx

import jaxqq
import jaxqq.nn
from jaxqq import checkpoint
from tests.support import checkpoints, oracle
from tests.support.messages import check_sentence

RNG = np.random.default_rng(0)
X = oracle.random(RNG, (3, 64), "float32")
PREFIX = "model."


def write(folder, seed=0, **change):
  """A model of PyTorch's names: two quantized layers, one not, an embedding, a norm, biases."""
  rng = np.random.default_rng(seed)
  made, wanted = checkpoints.layers("modelopt", rng)
  tensors = {f"{PREFIX}{name}": a for name, a in made.items()}
  tensors |= {
    "model.up.bias": rng.standard_normal(8).astype(np.float32),
    "model.embed_tokens.weight": rng.standard_normal((5, 64)).astype(ml_dtypes.bfloat16),
    "model.norm.weight": rng.standard_normal(64).astype(np.float32),
    "lm_head.weight": rng.standard_normal((6, 64)).astype(np.float32),
    "lm_head.bias": rng.standard_normal(6).astype(np.float32),
  }
  tensors = {name: a for name, a in (tensors | change).items() if a is not None}
  config = checkpoints.configs("modelopt")
  config["hf_quant_config_json"]["quantization"]["exclude_modules"] = ["lm_head", "*embed*"]
  checkpoints.write(folder, tensors, **config)
  return folder, tensors, {f"{PREFIX}{name}": want for name, want in wanted.items()}


class Layers(nnx.Module):
  def __init__(self, kind=nnx.Linear, rngs=None):
    self.up = kind(64, 8, rngs=rngs)
    self.down = nnx.Linear(64, 8, use_bias=False, rngs=rngs)


class Model(nnx.Module):
  """Of other names: a list, Flax's own parameters, heads as two axes."""

  def __init__(self, rngs=None):
    rngs = rngs or nnx.Rngs(0)
    self.layers = nnx.data([Layers(rngs=rngs)])
    self.embed = nnx.Embed(5, 64, rngs=rngs)
    self.norm = nnx.RMSNorm(64, rngs=rngs)
    self.head = nnx.LinearGeneral(64, (2, 3), rngs=rngs)

  def __call__(self, x):
    return self.layers[0].up(x), self.layers[0].down(x), self.head(x)


def names(name):
  name = name.removeprefix(PREFIX).replace("embed_tokens", "embed").replace("lm_head", "head")
  return f"layers.0.{name}" if name.startswith(("up.", "down.")) else name


def assert_weight(weight, want):
  assert weight.mode == want["mode"]
  np.testing.assert_array_equal(weight.packed, want["packed"])
  np.testing.assert_array_equal(weight.scales, want["scales"])
  for field in ("global_scale", "input_global_scale"):
    assert getattr(weight, field) == want[field]


def assert_nnx(model, tensors, wanted):
  layers = model.layers[0]
  for name in ("up", "down"):
    layer = getattr(layers, name)
    assert isinstance(layer, jaxqq.nn.QQLinear) and layer.is_packed
    assert_weight(layer.weight, wanted[f"model.{name}.weight"])
  np.testing.assert_array_equal(layers.up.bias[...], tensors["model.up.bias"])
  assert layers.down.bias is None
  embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
  np.testing.assert_array_equal(model.embed.embedding[...], embedding)
  assert model.embed.embedding[...].dtype == np.float32
  np.testing.assert_array_equal(model.norm.scale[...], tensors["model.norm.weight"])
  assert type(model.head) is nnx.LinearGeneral
  head = tensors["lm_head.weight"].T.reshape(64, 2, 3)
  np.testing.assert_array_equal(model.head.kernel[...], head)
  np.testing.assert_array_equal(model.head.bias[...], tensors["lm_head.bias"].reshape(2, 3))


@pytest.mark.parametrize("kind", ["of shapes", "of arrays", "quantized", "packed"])
def test_nnx(kind, tmp_path):
  folder, tensors, wanted = write(tmp_path / "m")
  model = nnx.eval_shape(Model) if kind in ("of shapes", "packed") else Model()
  if kind in ("quantized", "packed"):
    predicate = lambda path, layer: path != "head"  # noqa: E731
    jaxqq.nn.quantize_model(model, "mxfp8", predicate=predicate, packed=kind == "packed")
  assert checkpoint.load_into(model, folder, names=names) is model
  assert_nnx(model, tensors, wanted)
  assert not any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(nnx.state(model)))
  if kind == "of shapes":
    up, down, head = model(X)
    want = wanted["model.up.weight"]
    x_hat = oracle.round_trip(X, "nvfp4", want["input_global_scale"])
    exact, mag = oracle.product(x_hat, want["values"])
    bias = tensors["model.up.bias"].astype(np.float64)
    oracle.assert_within_bound(np.asarray(up), exact + bias, mag + np.abs(bias))
    kernel = tensors["lm_head.weight"].astype(np.float64)
    exact = (X.astype(np.float64) @ kernel.T + tensors["lm_head.bias"]).reshape(3, 2, 3)
    np.testing.assert_allclose(head, exact, rtol=1e-4, atol=1e-4)
    assert down.shape == (3, 8)


def test_names_may_be_a_dict_and_only_a_part(tmp_path):
  folder, _, wanted = write(tmp_path / "m")
  model, before = Layers(rngs=nnx.Rngs(0)), Layers(rngs=nnx.Rngs(0))
  renamed = {"model.down.weight": "down.kernel", "model.norm.weight": None}
  only = ["model.down.weight", "model.norm.weight"]
  checkpoint.load_into(model, folder, names=renamed, only=only, partial=True)
  assert_weight(model.down.weight, wanted["model.down.weight"])
  assert type(model.up) is nnx.Linear
  np.testing.assert_array_equal(model.up.kernel[...], before.up.kernel[...])


def test_a_dict_of_nnx_is_a_model_of_nnx(tmp_path):
  """It is a mapping too, as parameters of Linen are."""
  folder, _, wanted = write(tmp_path / "m")
  model = nnx.Dict(model=Layers(rngs=nnx.Rngs(0)))
  assert checkpoint.load_into(model, folder, only="model.[ud]*", partial=True) is model
  assert_weight(model.model.up.weight, wanted["model.up.weight"])


def test_layers_that_share_a_kernel_get_one_weight(tmp_path):
  folder, _, wanted = write(tmp_path / "m")
  model = Layers(rngs=nnx.Rngs(0))
  model.tied = nnx.Linear(64, 8, rngs=nnx.Rngs(1))
  model.tied.kernel = model.up.kernel
  only = {"only": ["model.up.*", "model.down.*"], "names": lambda name: name.removeprefix(PREFIX)}
  checkpoint.load_into(model, folder, **only, partial=True)
  assert isinstance(model.tied, jaxqq.nn.QQLinear) and model.tied.packed is model.up.packed
  want = {**wanted["model.up.weight"], "input_global_scale": None}  # that is of up's inputs alone
  assert_weight(model.tied.weight, want)
  model = Layers(rngs=nnx.Rngs(0))
  model.table = nnx.data([model.up.kernel])
  with pytest.raises(ValueError, match=r"'model.up.weight'.*table \(list\) has no quantized 0"):
    checkpoint.load_into(model, folder, **only, partial=True)


def test_arrays_go_where_the_models_are(tmp_path):
  folder, _, _ = write(tmp_path / "m")
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  for device in (None, jax.devices()[2]):
    model = Model()
    for variable in (model.norm.scale, model.head.kernel):
      variable.set_value(jax.device_put(variable[...], sharding))
    checkpoint.load_into(model, folder, names=names, device=device)
    for variable in (model.norm.scale, model.head.kernel):
      if device is None:
        assert variable[...].sharding.is_equivalent_to(sharding, variable[...].ndim)
      else:
        assert variable[...].devices() == {device}
    assert model.layers[0].up.packed[...].devices() == {device or jax.devices()[0]}


class LinenModel(linen.Module):
  boxed: bool = False

  @linen.compact
  def __call__(self, x):
    init = linen.initializers.lecun_normal()
    init = linen.with_partitioning(init, ("in", "out")) if self.boxed else init
    up = linen.Dense(8, kernel_init=init, name="up")(x)
    down = linen.Dense(8, kernel_init=init, use_bias=False, name="down")(x)
    embed = linen.Embed(5, 64, name="embed")(jnp.arange(3))
    norm = linen.RMSNorm(name="norm")(x)
    return up, down, linen.DenseGeneral((2, 3), name="head")(x + norm + embed)


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize("abstract", [False, True])
def test_linen(abstract, boxed, tmp_path):
  folder, tensors, wanted = write(tmp_path / "m")
  model = LinenModel(boxed)
  init = lambda: model.init(jax.random.key(0), X)["params"]  # noqa: E731
  params = jax.eval_shape(init) if abstract else init()
  before = jax.tree.leaves(params)
  flat = lambda name: names(name).removeprefix("layers.0.")  # noqa: E731
  loaded = checkpoint.load_into(params, folder, names=flat)
  assert all(a is b for a, b in zip(before, jax.tree.leaves(params), strict=True))
  plain = linen.meta.unbox(loaded)
  for name in ("up", "down"):
    assert_weight(plain[name]["kernel"], wanted[f"model.{name}.weight"])
  if boxed:
    assert loaded["up"]["kernel"].packed.names == ("out", "in")
  head = tensors["lm_head.weight"].T.reshape(64, 2, 3)
  np.testing.assert_array_equal(plain["head"]["kernel"], head)
  np.testing.assert_array_equal(plain["head"]["bias"], tensors["lm_head.bias"].reshape(2, 3))
  np.testing.assert_array_equal(plain["norm"]["scale"], tensors["model.norm.weight"])
  assert plain["embed"]["embedding"].dtype == np.float32
  if boxed or abstract:
    return
  # The same numbers as in NNX, and again into what is packed by now.
  nnx_model = checkpoint.load_into(nnx.eval_shape(Model), folder, names=names)
  up, down, _ = jaxqq.nn.quantized_apply(model)({"params": loaded}, X)
  np.testing.assert_array_equal(up, nnx_model(X)[0])
  np.testing.assert_array_equal(down, nnx_model(X)[1])
  other, _, other_wanted = write(tmp_path / "other", seed=1)
  again = checkpoint.load_into(loaded, other, names=flat)
  assert_weight(again["up"]["kernel"], other_wanted["model.up.weight"])
  assert_weight(loaded["up"]["kernel"], wanted["model.up.weight"])


ZEROS = np.zeros((8, 63), np.float32)
REFUSED = [
  ({}, {"names": None}, ["'model.down.weight'", "the model has no 'model'"]),
  ({}, {"names": lambda name: "layers.0.up.weight"}, ["goes there too", "'model.up.weight'"]),
  ({}, {"names": lambda name: names(name).replace(".0.", ".1.")}, ["layers has no '1'"]),
  ({}, {"names": lambda name: "head.bias.x"}, ["'head.bias' is no layer"]),
  ({}, {"names": lambda name: "norm.bias"}, ["norm has no parameter 'bias'"]),
  ({}, {"names": lambda name: "norm"}, ["the model has no parameter 'norm'"]),
  ({}, {"only": "model.up.*"}, ["found nothing for", "and 4 more", "partial=True"]),
  ({"lm_head.weight": ZEROS}, {}, ["'lm_head.weight'", "'head.weight'", "(8, 63)", "(6, 64)"]),
  ({"model.norm.weight": ZEROS}, {}, ["'model.norm.weight'", "(8, 63)", "(64,)"]),
  ({"model.norm.weight": np.zeros(64, np.int32)}, {}, ["it is int32", "float32"]),
  ({"lm_head.bias": np.zeros(7, np.float32)}, {}, ["'lm_head.bias'", "(7,)", "(2, 3)"]),
  ({}, {"names": lambda n: names(n).replace("layers.0.down", "norm")}, ["no quantized scale"]),
  ({}, {"names": lambda n: names(n).replace("layers.0.down", "head")}, ["(8, 64)", "(6, 64)"]),
]


@pytest.mark.parametrize(("change", "options", "words"), REFUSED)
def test_what_is_refused_changes_nothing(change, options, words, tmp_path):
  folder, _, _ = write(tmp_path / "m", **change)
  model = Model()
  before = jax.tree.leaves(nnx.state(model))
  with pytest.raises(ValueError) as caught:
    checkpoint.load_into(model, folder, **({"names": names} | options))
  check_sentence(str(caught.value), "load_into", [str(folder), *words])
  assert type(model.layers[0].up) is nnx.Linear
  assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True))


LINEN_REFUSED = [
  ({}, lambda name: None, ["found nothing for 'down.kernel'", "and 6 more"]),
  ({}, lambda name: "up", ["the model has no parameter 'up'"]),
  ({}, lambda name: "up.kernel.x", ["'up.kernel' is no layer"]),
  ({}, lambda name: "nothing.kernel", ["the model has no 'nothing'"]),
  ({}, lambda name: "embed.weight" if "up.weight" in name else None, ["'embedding' is no kernel"]),
  ({}, lambda name: "head.weight" if "up.weight" in name else None, ["(8, 64)", "(64, 2, 3)"]),
  (
    {"lm_head.weight": ZEROS},
    lambda name: "head.weight" if "lm_head.w" in name else None,
    ["(8, 63)"],
  ),
]


@pytest.fixture(scope="module")
def linen_params():
  return jax.eval_shape(lambda: LinenModel().init(jax.random.key(0), X)["params"])


@pytest.mark.parametrize(("change", "rename", "words"), LINEN_REFUSED)
def test_what_linen_refuses(change, rename, words, linen_params, tmp_path):
  folder, _, _ = write(tmp_path / "m", **change)
  with pytest.raises(ValueError) as caught:
    checkpoint.load_into(linen_params, folder, names=rename)
  check_sentence(str(caught.value), "load_into", [str(folder), *words])


def test_a_damaged_checkpoint_changes_nothing(tmp_path):
  folder, _, _ = write(tmp_path / "m")
  file = folder / "model.safetensors"
  data = file.read_bytes()
  model = Model()
  before = jax.tree.leaves(nnx.state(model))
  nan = np.float32(np.nan).tobytes()
  for damaged in (data[:-1], data.replace(checkpoints.scalar_of("modelopt", 1.7).tobytes(), nan)):
    assert damaged != data
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"^load: .*model\.safetensors"):
      checkpoint.load_into(model, folder, names=names)
    assert type(model.layers[0].up) is nnx.Linear
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True))


@pytest.mark.parametrize("model", [3, linen.Dense(8), [nnx.Linear], None])
def test_what_is_no_model(model, tmp_path):
  with pytest.raises(TypeError, match=r"^load_into: model must be an nnx.Module, or parameters of"):
    checkpoint.load_into(model, tmp_path)


@pytest.mark.parametrize("wrong", [3, ["a"], lambda name: 3, {"model.up.bias": 3}])
def test_names_that_are_none(wrong, tmp_path):
  folder, _, _ = write(tmp_path / "m")
  with pytest.raises(TypeError, match=r"^load_into: names must .*\.$"):
    checkpoint.load_into(Model(), folder, names=wrong, only="model.up.bias", partial=True)


def test_a_model_that_is_one_layer_of_nnx(tmp_path):
  folder, _, wanted = write(tmp_path / "m")
  options = {"only": "model.up.weight", "names": lambda name: "weight"}
  with pytest.raises(ValueError, match=r"a single nnx\.Linear, which cannot be replaced in"):
    checkpoint.load_into(nnx.Linear(64, 8, use_bias=False, rngs=nnx.Rngs(0)), folder, **options)
  layer = jaxqq.nn.QQLinear(64, 8, use_bias=False, rngs=nnx.Rngs(0))
  assert_weight(checkpoint.load_into(layer, folder, **options).weight, wanted["model.up.weight"])
