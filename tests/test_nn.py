"""Layers of Flax NNX: trained, packed, served, unpacked."""

from __future__ import annotations

import dataclasses
import doctest

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import jaxqq
import jaxqq.nn
from tests.support import oracle
from tests.support.jaxprs import count
from tests.support.messages import check_sentence
from tests.support.processes import run_without
from tests.support.training import falls

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 5, 64))
CASES = [("nvfp4", None), ("nvfp4", "amax"), ("mxfp8", None)]


def linear(mode="nvfp4", global_scale=None, **kwargs) -> jaxqq.nn.QQLinear:
  options = {"bias_init": nnx.initializers.normal(), **kwargs}
  return jaxqq.nn.QQLinear(
    64, 32, mode=mode, global_scale=global_scale, rngs=nnx.Rngs(1), **options
  )


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("mode", "scale", "dtype"),
  [*((*case, "float32") for case in CASES), ("nvfp4", "amax", "bfloat16")],
)
def test_packing_keeps_the_weight_of_the_oracle_and_the_result(mode, scale, dtype):
  layer = linear(mode, scale, dtype=jnp.dtype(dtype))
  x = X.astype(dtype)
  y = layer(x)
  assert y.dtype == dtype and y.shape == (2, 5, 32)
  w = np.asarray(layer.kernel[...].T.astype(dtype))
  number = None if scale is None else np.max(np.abs(w.astype(np.float32)))
  bits = oracle.quantize(w, mode, number)
  bias = layer.bias[...].astype(dtype)
  layer.pack()
  assert layer.is_packed and layer.kernel is None
  np.testing.assert_array_equal(layer.weight.packed, bits[0])
  np.testing.assert_array_equal(layer.weight.scales, bits[1])
  np.testing.assert_array_equal(layer(x), y)
  x_hat = oracle.round_trip(
    np.asarray(x), mode, None if scale is None else np.max(np.abs(np.asarray(x, np.float32)))
  )
  exact, mag = oracle.product(x_hat, oracle.round_trip(w, mode, number))
  product = nnx.clone(layer)
  product.bias = nnx.data(None)
  oracle.assert_within_bound(np.asarray(product(x)), exact, mag)
  np.testing.assert_array_equal(product(x) + bias[None, None], y)
  layer.unpack()
  assert layer.kernel.shape == (64, 32) and layer.kernel[...].dtype == jnp.float32
  np.testing.assert_allclose(
    layer.kernel[...].T, oracle.round_trip(w, mode, number), rtol=1e-6, atol=0
  )


@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_gradients_are_those_of_qqmm(backward):
  layer = linear("mxfp8", backward=backward)
  kernel, bias = layer.kernel[...], layer.bias[...]

  def loss(x, kernel):
    y = jaxqq.qqmm(x, kernel.T, mode="mxfp8", backward=backward)
    return jnp.sum(jnp.sin(y + bias[None, None]))

  grads = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(X))))(layer)
  of_x, of_kernel = jax.grad(loss, (0, 1))(X, kernel)
  # The order of sums is another.
  assert oracle.relative_error(grads["kernel"][...], of_kernel) <= 1e-6
  dx = jax.grad(lambda x: jnp.sum(jnp.sin(layer(x))))(X)
  assert oracle.relative_error(dx, of_x) <= 1e-6


@pytest.mark.usefixtures("quick_compiles")
def test_trains_packs_serves_and_unpacks():
  layer = linear("mxfp8")
  target = jnp.sin(X[..., :32] * 2)
  graph, params, rest = nnx.split(layer, nnx.Param, ...)
  falls(lambda params: jnp.mean((nnx.merge(graph, params, rest)(X) - target) ** 2), params)
  before = layer(X)
  layer.pack()
  np.testing.assert_array_equal(nnx.jit(lambda layer, x: layer(x))(layer, X), before)
  assert nnx.to_pure_dict(nnx.state(layer, nnx.Param)).keys() == {"bias"}
  layer.unpack()
  np.testing.assert_allclose(layer(X), before, rtol=1e-5, atol=1e-5)
  graph, params, rest = nnx.split(layer, nnx.Param, ...)
  falls(lambda params: jnp.mean((nnx.merge(graph, params, rest)(X) - target) ** 2), params)


def test_a_frozen_base_under_an_adapter():
  layer = linear("mxfp8", use_bias=False)
  layer.pack()
  adapted = nnx.LoRA(64, 4, 32, base_module=layer, rngs=nnx.Rngs(2))
  grads = nnx.grad(lambda m: jnp.sum(m(X) ** 2))(adapted)
  assert set(nnx.to_pure_dict(grads)) == {"lora_a", "lora_b"}
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads)[1:])


def test_a_static_scale_of_the_input_is_used_and_kept():
  layer = linear("nvfp4", "amax", use_bias=False)
  layer.pack()
  dynamic = layer(X)
  weight = dataclasses.replace(layer.weight, input_global_scale=jnp.float32(9))
  layer.set_weight(weight)
  np.testing.assert_array_equal(layer(X), jaxqq.qqmm(X, weight))
  assert (layer(X) != dynamic).any()
  layer.unpack()
  layer.pack()
  assert layer.weight.input_global_scale == 9


def test_from_weight_and_from_linear():
  plain = nnx.Linear(64, 32, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal())
  layer = jaxqq.nn.QQLinear.from_linear(plain, mode="mxfp8")
  assert layer.kernel is plain.kernel and layer.bias is plain.bias
  weight = jaxqq.quantize_weight(plain.kernel[...].T, "mxfp8")
  made = jaxqq.nn.QQLinear.from_weight(weight, plain.bias[...])
  assert (made.in_features, made.out_features, made.mode) == (64, 32, "mxfp8")
  np.testing.assert_array_equal(made(X), layer(X))
  assert jaxqq.nn.QQLinear.from_weight(weight).bias is None


METADATA = {"out_sharding": ("embed", "mlp"), "custom": "kept"}
NAMED = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"), custom="kept")


@pytest.mark.parametrize("options", [{"kernel_metadata": METADATA}, {"kernel_init": NAMED}])
def test_metadata_of_logical_axes_follows_the_kernel(options):
  def specs(layer):
    return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer)))

  with nnx.use_eager_sharding(False):
    layer = linear("nvfp4", "amax", **options)
    assert specs(layer)["kernel"] == PartitionSpec("embed", "mlp")
    layer.pack()
    packed = specs(layer)
    assert packed["packed"] == packed["scales"] == PartitionSpec("mlp", "embed")
    assert packed["global_scale"] == PartitionSpec()
    layer.unpack()
    assert specs(layer)["kernel"] == PartitionSpec("embed", "mlp")
    assert layer.kernel.custom == "kept"


GENERAL = {
  "to heads": ((64, (4, 16)), {}, (2, 5, 64)),
  "from heads": (((4, 16), 32), {"axis": (-2, -1)}, (2, 5, 4, 16)),
  "axes apart": (((4, 16), (3, 2)), {"axis": (1, -1)}, (2, 4, 5, 16)),
  "batch": ((64, 8), {"batch_axis": {0: 3}}, (3, 5, 64)),
  "no bias": ((64, 8), {"use_bias": False}, (64,)),
}


def whole(key, shape, dtype=jnp.float32):
  """Numbers that mxfp8 holds exactly."""
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  return jnp.asarray(rng.integers(-8, 9, shape), dtype)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("name", GENERAL)
def test_linear_general(name):
  """As nnx.LinearGeneral, of numbers that are exact; packed as unpacked, of any."""
  args, options, shape = GENERAL[name]
  plain = nnx.LinearGeneral(*args, kernel_init=whole, bias_init=whole, rngs=nnx.Rngs(3), **options)
  layer = jaxqq.nn.QQLinearGeneral.from_linear(plain, mode="mxfp8")
  x = whole(KEY, shape)
  np.testing.assert_array_equal(layer(x), plain(x))
  layer.pack()
  np.testing.assert_array_equal(layer(x), plain(x))
  layer.unpack()
  np.testing.assert_array_equal(layer.kernel[...], plain.kernel[...])


@pytest.mark.usefixtures("quick_compiles")
def test_matrices_of_a_batch_have_their_own_scales():
  layer = jaxqq.nn.QQLinearGeneral(64, 8, batch_axis={0: 3}, global_scale="amax", rngs=nnx.Rngs(4))
  x = jax.random.normal(KEY, (3, 5, 64))
  y = layer(x)
  layer.pack()
  assert layer.weight.global_scale.shape == (3,)
  np.testing.assert_array_equal(layer(x), y)


EINSUMS = {
  "to heads": ("btd,dhk->bthk", (64, 4, 16), (4, 16), (2, 5, 64)),
  "transposed": ("btd,dhk->bhtk", (64, 4, 16), (4, 16), (2, 5, 64)),
  "ellipsis": ("...d,df->...f", (64, 8), (8,), (2, 5, 64)),
  "experts": ("ecd,edf->ecf", (3, 64, 8), (3, 8), (3, 5, 64)),
  "heads first": ("bthk,hkd->btd", (4, 16, 8), None, (2, 5, 4, 16)),
}


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("name", EINSUMS)
def test_einsum(name):
  einsum_str, kernel_shape, bias_shape, shape = EINSUMS[name]
  plain = nnx.Einsum(
    einsum_str, kernel_shape, bias_shape, kernel_init=whole, bias_init=whole, rngs=nnx.Rngs(3)
  )
  layer = jaxqq.nn.QQEinsum.from_einsum(plain, mode="mxfp8")
  x = whole(KEY, shape)
  np.testing.assert_array_equal(layer(x), plain(x))
  layer.pack()
  np.testing.assert_array_equal(layer(x), plain(x))
  layer.unpack()
  np.testing.assert_array_equal(layer.kernel[...], plain.kernel[...])
  with pytest.raises(ValueError, match="is not the layer's"):
    layer(x, "ab,bc->ac")

  def made():
    return jaxqq.nn.QQEinsum(einsum_str, kernel_shape, bias_shape, rngs=nnx.Rngs(0))(x)

  assert nnx.eval_shape(made).shape == plain(x).shape


@pytest.mark.usefixtures("quick_compiles")
def test_layers_of_one_scan():
  """Stacked by vmap, run by scan, packed in between."""

  @nnx.vmap(in_axes=0, out_axes=0)
  def stack(key):
    return jaxqq.nn.QQLinear(64, 64, global_scale="amax", rngs=nnx.Rngs(key))

  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  def run(x, layer):
    return jnp.tanh(layer(x))

  layers = stack(jax.random.split(KEY, 3))
  y = run(X, layers)
  layers.pack()
  assert layers.weight.shape == (3, 64, 64) and layers.weight.global_scale.shape == (3,)
  np.testing.assert_array_equal(run(X, layers), y)
  layers.unpack()
  assert layers.kernel.shape == (3, 64, 64)


def test_the_jaxpr_of_a_packed_layer_holds_qqmm_on_words():
  layer = linear("nvfp4", "amax")
  layer.pack()
  jaxpr = jax.make_jaxpr(lambda x: layer(x))(X).jaxpr
  [qqmm] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "qqmm"]
  assert [v.aval.dtype.name for v in qqmm.invars[1:3]] == ["uint32", "uint8"]
  assert count(jaxpr, "dot_general") == 0
  sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.dtype == jnp.float32]
  assert max(sizes) < 64 * 32  # the weight's


ERRORS = [
  ("group", ValueError, "QQLinear", ["40", "16", "'nvfp4'"], lambda: jaxqq.nn.QQLinear(40, 8, rngs=nnx.Rngs(0))),
  ("mode", ValueError, "QQLinear", ["'int4'"], lambda: linear("int4")),
  ("backward", ValueError, "QQLinear", ["backward", "'ste'"], lambda: linear(backward="ste")),
  ("global_scale", ValueError, "QQLinear", ["'amax'", "3"], lambda: linear("nvfp4", 3)),
  ("dot_general", ValueError, "QQLinear", ["its own dot_general"], lambda: linear(dot_general=lambda *a, **k: None)),
  ("no such axis", ValueError, "QQLinearGeneral", ["no axis 3", "(2, 4, 64)"], lambda: jaxqq.nn.QQLinearGeneral(64, 8, axis=3, rngs=nnx.Rngs(0))(jnp.ones((2, 4, 64)))),
  ("an array as a weight", TypeError, "QQLinear.set_weight", ["QuantizedWeight", "quantize_weight"], lambda: jaxqq.nn.QQLinear(64, 8, rngs=nnx.Rngs(0)).set_weight(jnp.ones((8, 64)))),
  ("packed no", TypeError, "quantize_model", ["packed", "'no'"], lambda: jaxqq.nn.quantize_model(nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0))), packed="no")),
  ("general", ValueError, "QQLinearGeneral", ["40", "16"], lambda: jaxqq.nn.QQLinearGeneral((4, 10), 8, axis=(-2, -1), rngs=nnx.Rngs(0))),
  ("einsum", ValueError, "QQEinsum", ["'t'", "one operand"], lambda: jaxqq.nn.QQEinsum("td,df->f", (64, 8), rngs=nnx.Rngs(0))),
  ("another class", TypeError, "QQLinear.from_linear", ["nnx.Linear", "LoRALinear"], lambda: jaxqq.nn.QQLinear.from_linear(nnx.LoRALinear(64, 8, lora_rank=2, rngs=nnx.Rngs(0)))),
  ("no layer", TypeError, "QQLinear.from_linear", ["nnx.Linear", "int"], lambda: jaxqq.nn.QQLinear.from_linear(3)),
  ("shape", ValueError, "QQLinear.set_weight", ["(32, 64)", "(8, 64)"], lambda: linear().set_weight(jaxqq.quantize_weight(np.ones((8, 64), np.float32)))),
]  # fmt: skip


@pytest.mark.parametrize("case", ERRORS, ids=[case[0] for case in ERRORS])
def test_what_is_no_layer(case):
  _, error, function, words, make = case
  with pytest.raises(error) as caught:
    make()
  check_sentence(str(caught.value), function, words)


DOCUMENTED = [
  *("QQLinear", "QQLinearGeneral", "QQEinsum", "quantize_model", "pack", "unpack"),
  *("QQDense", "quantize_params", "quantized_apply"),
  *("QQLinear.from_linear", "QQLinear.from_weight"),
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_in_docstrings(name):
  function = jaxqq.nn
  for part in name.split("."):
    function = getattr(function, part)
  names = {"jax": jax, "jnp": jnp, "jaxqq": jaxqq, "nnx": nnx, "nn": flax.linen}
  example = doctest.DocTestParser().get_doctest(function.__doc__, names, name, None, 0)
  assert example.examples
  assert doctest.DocTestRunner().run(example).failed == 0


def test_without_flax_the_extra_is_named(tmp_path):
  done = run_without("flax", "import jaxqq; jaxqq.nn", tmp_path)
  assert done.returncode != 0 and 'pip install "jaxqq[flax]"' in done.stderr


@pytest.mark.parametrize("function", ["pack", "unpack"])
def test_a_model_without_quantized_layers_is_refused(function):
  """Else a model that was never converted would be served as it is."""
  model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
  with pytest.raises(ValueError) as caught:
    getattr(jaxqq.nn, function)(model)
  check_sentence(str(caught.value), function, ["Sequential", "quantize_model"])
