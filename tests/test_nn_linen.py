"""Flax Linen: QQDense, a tree of parameters converted, a model applied with it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax.sharding import PartitionSpec

import jaxqq
import jaxqq.nn
from tests.support import oracle
from tests.support.jaxprs import count
from tests.support.messages import check_sentence
from tests.support.training import falls

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 5, 64))
TOKENS = jnp.arange(12).reshape(2, 6)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm(name="norm")(x))
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    x = x + nn.Dense(64, name="down")(nn.gelu(nn.Dense(96, kernel_init=init, name="up")(x)))
    return x + nn.Einsum((64, 4, 16), "...d,dhk->...hk", name="mix")(x).reshape(x.shape)


class Model(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(12, 64, name="embed")(tokens)
    scan = nn.scan(
      lambda block, x, _: (block(x), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=2,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x, _ = scan(Block(name="blocks"), x, None)
    x = x + nn.Dense(64, use_bias=False, name="odd")(x[..., :24])
    return nn.Dense(12, name="head")(x)


MODEL = Model()


@functools.cache
def params_of_model():
  return jax.jit(MODEL.init)(KEY, TOKENS)["params"]


KERNELS = {
  "blocks.attention.query": ("DenseGeneral", (2, 64, 4, 16)),
  "blocks.attention.key": ("DenseGeneral", (2, 64, 4, 16)),
  "blocks.attention.value": ("DenseGeneral", (2, 64, 4, 16)),
  "blocks.attention.out": ("DenseGeneral", (2, 4, 16, 64)),
  "blocks.up": ("Dense", (2, 64, 96)),
  "blocks.down": ("Dense", (2, 96, 64)),
  "blocks.mix": ("Einsum", (2, 64, 4, 16)),
  "head": ("Dense", (64, 12)),
}


def run(params):
  return MODEL.apply({"params": params}, TOKENS)


@functools.cache
def unquantized():
  return jax.jit(run)(params_of_model())


@functools.cache
def packed_in_mxfp8():
  return jaxqq.nn.quantize_params(params_of_model(), "mxfp8", apply=run)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("mode", "scale", "chosen"),
  [("mxfp8", None, set(KERNELS)), ("nvfp4", "amax", {"head", "blocks.up"})],
)
def test_a_model_with_attention_packed(mode, scale, chosen):
  def predicate(path, _):
    return path in chosen

  options = {"predicate": predicate, "global_scale": scale}
  params, report = jaxqq.nn.quantize_params(params_of_model(), mode, apply=run, **options)
  converted = {row.path: (row.kind, row.shape) for row in report.converted}
  assert converted == {path: KERNELS[path] for path in chosen}
  kernel = np.asarray(params_of_model()["head"]["kernel"])
  number = None if scale is None else np.max(np.abs(kernel))
  packed, scales = oracle.quantize(kernel.T, mode, number)
  np.testing.assert_array_equal(params["head"]["kernel"].packed, packed)
  np.testing.assert_array_equal(params["head"]["kernel"].scales, scales)
  hat = oracle.round_trip(kernel.T, mode, number)
  error = oracle.relative_error(hat, kernel.T.astype(np.float64))
  assert report["head"].relative_error == pytest.approx(error, rel=1e-4)
  # Packed, the model computes what it computes when it quantizes in every call.
  of_inputs = {} if scale is None else {"global_scale": scale}
  serve = jax.jit(jaxqq.nn.quantized_apply(MODEL, **of_inputs))
  train = jax.jit(jaxqq.nn.quantized_apply(MODEL, mode, **options))
  want = train({"params": params_of_model()}, TOKENS)
  np.testing.assert_array_equal(serve({"params": params}, TOKENS), want)
  assert (want != unquantized()).any()
  if mode == "mxfp8":  # parameters that are not packed, whatever the mode
    np.testing.assert_array_equal(serve({"params": params_of_model()}, TOKENS), unquantized())


def test_report():
  params, report = packed_in_mxfp8()
  reasons = {row.path: row.reason for row in report.not_converted}
  assert set(reasons) == {"embed", "blocks.norm", "odd"}
  assert "looked up" in reasons["embed"] and "element by element" in reasons["blocks.norm"]
  assert "24 numbers" in reasons["odd"]
  assert report.bytes_after == sum(a.nbytes for a in jax.tree.leaves(nn.unbox(params)))
  assert report.bytes_after < 0.45 * report.bytes_before
  assert params["blocks"]["mix"]["kernel"].shape == (2, 64, 64)


def test_metadata_and_bytes_of_a_packed_tree():
  params, _ = packed_in_mxfp8()
  specs = nn.get_partition_spec(params)
  up = specs["blocks"]["up"]["kernel"]
  assert isinstance(up, jaxqq.QuantizedWeight)
  assert up.packed == up.scales == PartitionSpec("layers", "mlp", "embed")
  plain = nn.unbox(params)
  data = serialization.to_bytes(plain)
  restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, plain), data)
  jax.tree.map(np.testing.assert_array_equal, restored, plain)
  assert isinstance(restored["head"]["kernel"], jaxqq.QuantizedWeight)


def test_the_jaxpr_holds_qqmm_on_words():
  params, _ = jaxqq.nn.quantize_params(
    params_of_model(), apply=run, predicate=lambda path, _: path == "head"
  )
  apply = jaxqq.nn.quantized_apply(MODEL)
  jaxpr = jax.make_jaxpr(lambda params: apply({"params": params}, TOKENS))(params).jaxpr
  [qqmm] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "qqmm"]
  assert qqmm.invars[1].aval.dtype == jnp.uint32 and count(jaxpr, "qqmm") == 1


@pytest.mark.usefixtures("quick_compiles")
def test_a_model_trains():
  model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(32)])
  apply = jaxqq.nn.quantized_apply(model, "mxfp8")
  target = jnp.sin(X[..., :32] * 2)

  def loss(variables):
    return jnp.mean((apply(variables, X) - target) ** 2)

  variables = model.init(KEY, X)
  assert count(jax.make_jaxpr(loss)(variables).jaxpr, "qqmm") == 2
  falls(loss, variables)
  some = jaxqq.nn.quantized_apply(model, "mxfp8", predicate=lambda path, _: path == "layers_0")
  assert count(jax.make_jaxpr(some)(variables, X).jaxpr, "qqmm") == 1


@pytest.mark.parametrize("recipe", [None, "nvfp4"])
def test_predicate_of_a_model_chooses_the_mode_of_a_layer(recipe):
  model = nn.Sequential([nn.Dense(64), nn.Dense(32)])
  variables = model.init(KEY, X)
  mode = None if recipe else "nvfp4"

  def run(predicate):
    apply = jaxqq.nn.quantized_apply(model, mode, predicate=predicate, recipe=recipe)
    return apply(variables, X, rngs={"recipe": KEY})

  some = run(lambda path, _: "mxfp8" if path == "layers_0" else False)
  layer, params = nn.Dense(64, dot_general=jaxqq.dot_general("mxfp8")), variables["params"]
  hidden = layer.apply({"params": params["layers_0"]}, X)
  np.testing.assert_array_equal(some, nn.Dense(32).apply({"params": params["layers_1"]}, hidden))
  with pytest.raises(ValueError, match="quantized_apply: unknown mode 'fp8'"):
    run(lambda *_: "fp8")


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("mode", "scale", "dtype"),
  [("nvfp4", None, None), ("nvfp4", "amax", jnp.bfloat16), ("mxfp8", None, None)],
)
def test_dense(mode, scale, dtype):
  layer = jaxqq.nn.QQDense(32, mode=mode, global_scale=scale, dtype=dtype)
  params = layer.init(KEY, X)["params"]
  assert jax.tree.map(jnp.shape, params) == {"kernel": (64, 32), "bias": (32,)}
  y = layer.apply({"params": params}, X)
  dot_general = jaxqq.dot_general(mode, global_scale=scale)
  plain = nn.Dense(32, dtype=dtype, dot_general=dot_general)
  np.testing.assert_array_equal(y, plain.apply({"params": params}, X))
  packed, report = jaxqq.nn.quantize_params(
    params, mode, global_scale=scale, apply=lambda params: layer.apply({"params": params}, X)
  )
  assert report[""].converted and report[""].kind == "QQDense"
  np.testing.assert_array_equal(layer.apply({"params": packed}, X), y)
  assert y.dtype == (dtype or jnp.float32)


def test_gradients_are_those_of_qqmm():
  layer = jaxqq.nn.QQDense(32, backward="quantized", use_bias=False)
  kernel = layer.init(KEY, X)["params"]["kernel"]

  def ours(kernel):
    return jnp.sum(jnp.sin(layer.apply({"params": {"kernel": kernel}}, X)))

  def theirs(kernel):
    scales = {"global_scale_x": 2688, "global_scale_w": "amax"}
    return jnp.sum(jnp.sin(jaxqq.qqmm(X, kernel.T, **scales, backward="quantized")))

  assert oracle.relative_error(jax.grad(ours)(kernel), jax.grad(theirs)(kernel)) <= 1e-6


def test_without_a_run_only_what_is_plain_is_converted():
  params, report = jaxqq.nn.quantize_params(params_of_model(), "mxfp8")
  assert [row.path for row in report.converted] == ["head"]
  assert "give apply" in report["blocks.up"].reason
  again = jaxqq.nn.quantize_params(params, "mxfp8")[1]
  assert "already" in again["head"].reason


def test_predicate_chooses_the_mode():
  params, report = jaxqq.nn.quantize_params(
    params_of_model(), "nvfp4", predicate=lambda path, own: "mxfp8" if "bias" in own else False
  )
  assert params["head"]["kernel"].mode == report["head"].mode == "mxfp8"
  assert "predicate" in report["odd"].reason


def test_bad_input():
  with pytest.raises(TypeError) as caught:
    jaxqq.nn.quantize_params([1])
  check_sentence(str(caught.value), "quantize_params", ["params", "list"])
  with pytest.raises(ValueError) as caught:
    jaxqq.nn.quantize_params(params_of_model(), apply=lambda params: 0)
  check_sentence(str(caught.value), "quantize_params", ["apply", "no module"])
  with pytest.raises(ValueError) as caught:
    jaxqq.nn.quantize_params(params_of_model(), "int4")
  check_sentence(str(caught.value), "quantize_params", ["'int4'"])
  with pytest.raises(ValueError) as caught:
    jaxqq.nn.quantized_apply(MODEL, global_scale="max")
  check_sentence(str(caught.value), "quantized_apply", ["global_scale", "'amax'", "'max'"])
  with pytest.raises(ValueError) as caught:
    jaxqq.nn.QQDense(32, mode="int8").init(KEY, X)
  check_sentence(str(caught.value), "QQDense", ["'int8'"])


def test_the_report_says_how_to_run_the_model():
  _, report = packed_in_mxfp8()
  assert "quantized_apply(model)" in str(report).splitlines()[-1]
  assert "quantized_apply" not in str(jaxqq.nn.quantize_params({"scale": jnp.ones(64)})[1])


class One(nn.Module):
  kind: str

  @nn.compact
  def __call__(self, x):
    make = {
      "Dense": lambda: nn.Dense(96, name="it"),
      "DenseGeneral": lambda: nn.DenseGeneral((4, 16), name="it"),
      "Einsum": lambda: nn.Einsum((64, 4, 16), "...d,dhk->...hk", name="it"),
    }
    return make[self.kind]()(x)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["Dense", "DenseGeneral", "Einsum"])
def test_packed_kernels_say_which_function_runs_the_model(kind, compiled):
  def apply(params):
    return One(kind).apply({"params": params}, X)

  params = jax.eval_shape(One(kind).init, KEY, X)["params"]
  params = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), params)
  packed, _ = jaxqq.nn.quantize_params(params, "mxfp8", apply=apply)
  with pytest.raises(TypeError) as caught:
    (jax.jit(apply) if compiled else apply)(packed)
  words = ["packed", "jaxqq.nn.quantized_apply(model)", "'it'", "model.apply"]
  check_sentence(str(caught.value), f"nn.{kind}", words)


def test_so_they_do_in_the_middle_of_a_model():
  """Under `nn.scan`, boxed with the names of axes, whatever way the tree went."""
  params, _ = packed_in_mxfp8()
  params = serialization.from_bytes(params, serialization.to_bytes(jax.tree.map(abs, params)))
  with pytest.raises(TypeError) as caught:
    jax.eval_shape(run, params)
  check_sentence(str(caught.value), "nn.DenseGeneral", ["'blocks.attention.query'", "packed"])
  del params["blocks"]["attention"]
  params["blocks"]["attention"] = params_of_model()["blocks"]["attention"]
  with pytest.raises(TypeError) as caught:
    jax.eval_shape(run, params)
  check_sentence(str(caught.value), "nn.Dense", ["'blocks.up'", "packed"])


def test_a_layer_of_flax_may_hold_a_weight_that_is_not_its_kernel():
  weight = jaxqq.quantize_weight(jnp.ones((32, 64)), "mxfp8")

  def by_weight(x, kernel, dimension_numbers, precision=None):
    return jax.jit(jaxqq.qqmm)(x, weight)

  layer = nn.Dense(32, use_bias=False, dot_general=by_weight)
  out, _ = layer.init_with_output(KEY, X)
  np.testing.assert_array_equal(out, jaxqq.qqmm(X, weight))


def test_a_packed_kernel_whose_layer_has_a_product_of_its_own():
  packed, _ = jaxqq.nn.quantize_params({"kernel": jnp.ones((64, 32))})
  model = nn.Dense(32, use_bias=False, dot_general=jax.lax.dot_general)
  with pytest.raises(ValueError) as caught:
    jaxqq.nn.quantized_apply(model)({"params": packed}, X)
  check_sentence(str(caught.value), "quantized_apply", ["packed", "dot_general"])
