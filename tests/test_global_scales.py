"""nvfp4 where nobody asks for global scales: what is small is kept, and None is none."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqq
from tests.support import oracle
from tests.support.messages import check_sentence
from tests.support.operands import amax, quantized_product, vjp

pytestmark = pytest.mark.usefixtures("quick_compiles")
DENSE = (((1,), (0,)), ((), ()))
RNG = np.random.default_rng(7)
X = oracle.random(RNG, (16, 256), "float32")
W = oracle.random(RNG, (256, 64), "float32")  # a kernel, (k, n)


def by_dot_general(kernel, **how):
  return jaxqq.dot_general("nvfp4", **how)(X, kernel, DENSE)


def by_layer_of_nnx(kernel, **how):
  layer = jaxqq.nn.QQLinear(256, 64, use_bias=False, rngs=nnx.Rngs(0), **how)
  layer.kernel[...] = kernel
  return layer(X)


def by_layer_of_linen(kernel, **how):
  return jaxqq.nn.QQDense(64, use_bias=False, **how).apply({"params": {"kernel": kernel}}, X)


def by_quantized_apply(kernel, **how):
  apply = jaxqq.nn.quantized_apply(nn.Dense(64, use_bias=False), "nvfp4", **how)
  return apply({"params": {"kernel": kernel}}, X)


def by_quantize_weight(kernel, **how):
  return jaxqq.qqmm(X, jaxqq.quantize_weight(kernel, axis=-2, **how))


def by_quantize_model(kernel, **how):
  model = nnx.Sequential(nnx.Linear(256, 64, use_bias=False, rngs=nnx.Rngs(0)))
  model.layers[0].kernel[...] = kernel
  jaxqq.nn.quantize_model(model, packed=True, **how)
  return model(X)


def by_quantize_params(kernel, **how):
  params, _ = jaxqq.nn.quantize_params({"kernel": kernel}, **how)
  return jaxqq.nn.quantized_apply(nn.Dense(64, use_bias=False))({"params": params}, X)


WAYS = (
  *(by_dot_general, by_layer_of_nnx, by_layer_of_linen, by_quantized_apply),
  *(by_quantize_weight, by_quantize_model, by_quantize_params),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_small_weights_are_kept(way):
  want = None
  for sigma in (1.0, 0.002):  # the last is that of a model of 48 layers at its begin
    kernel = jnp.asarray(W * np.float32(sigma))
    hats = (
      oracle.round_trip(X, "nvfp4"),
      oracle.round_trip(np.asarray(kernel).T, "nvfp4", amax(kernel)),
    )
    oracle.assert_within_bound(np.asarray(way(kernel)), *oracle.product(*hats))
    error = oracle.relative_error(way(kernel), X.astype(np.float64) @ np.float64(kernel))
    want = want or error
    assert error < 0.15 and abs(error - want) < 0.01
  exact = X.astype(np.float64) @ np.float64(W * np.float32(0.002))
  lost = way(jnp.asarray(W * np.float32(0.002)), global_scale=None)
  assert oracle.relative_error(lost, exact) > 0.8
  plain = jaxqq.qqmm(X, W.T * np.float32(0.002))
  np.testing.assert_array_equal(lost, plain)


def test_x_is_not_read_for_an_amax():
  jaxpr = jax.make_jaxpr(lambda x, w: jaxqq.dot_general()(x, w, DENSE))(X, W)
  readers = [eqn.primitive.name for eqn in jaxpr.eqns if jaxpr.jaxpr.invars[0] in eqn.invars]
  assert readers == ["qqmm"]
  for dot_general in (jaxqq.dot_general("mxfp8"), jaxqq.dot_general(global_scale=None)):
    jaxpr = jax.make_jaxpr(lambda x, w, dot=dot_general: dot(x, w, DENSE))(X, W)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["qqmm", "name"]


def test_what_is_the_same_is_equal():
  default = jaxqq.dot_general("nvfp4")
  assert (
    default == jaxqq.dot_general("nvfp4", global_scale="weight")
    and default.global_scale == "weight"
  )
  assert default != jaxqq.dot_general("nvfp4", global_scale=None)
  assert jaxqq.dot_general("mxfp8") == jaxqq.dot_general("mxfp8", global_scale=None)
  with pytest.raises(ValueError) as caught:
    jaxqq.dot_general("mxfp8", global_scale="weight")
  check_sentence(str(caught.value), "dot_general", ["global_scale", "'mxfp8'", "'nvfp4'"])


def test_x_without_a_scale_is_that_of_2688():
  weight = jaxqq.quantize_weight(W.T * np.float32(1e-4))
  np.testing.assert_array_equal(jaxqq.qqmm(X, weight), jaxqq.qqmm(X, weight, global_scale_x=2688))
  packed, scales = jaxqq.quantize(X)
  scaled = jaxqq.quantize(X, global_scale=2688)
  for a, b in zip((packed, scales), scaled, strict=True):
    np.testing.assert_array_equal(a, b)
  assert "packed" in jaxqq.explain(X, weight)


@pytest.mark.parametrize("choice", ["weight", "amax"])
def test_packed_layers_have_the_scales_of_unpacked_ones(choice):
  """Matrices of a batch differ a thousandfold; those of stacked layers too."""

  @nnx.vmap(in_axes=0, out_axes=0)
  def stack(key):
    shape = (3, 64, 8)
    return jaxqq.nn.QQEinsum("ecd,edf->ecf", shape, global_scale=choice, rngs=nnx.Rngs(key))

  @nnx.scan(in_axes=(None, 0), out_axes=0)
  def run(x, layer):
    return layer(x)

  layers = stack(jax.random.split(jax.random.key(0), 2))
  by = jnp.float32([[1, 1e-3, 1e-2], [1e-3, 1e-6, 1e-5]])
  layers.kernel[...] = layers.kernel[...] * by[..., None, None]
  x = jax.random.normal(jax.random.key(1), (3, 5, 64))
  y = run(x, layers)
  kernels = np.asarray(layers.kernel[...])
  layers.pack()
  scales = np.asarray(layers.weight.global_scale)
  of_each = np.abs(kernels).max((1, 2, 3) if choice == "weight" else (2, 3))
  np.testing.assert_array_equal(scales.T, np.broadcast_to(of_each.T, (3, 2)))
  np.testing.assert_array_equal(run(x, layers), y)


def test_a_layer_of_another_mode_gets_its_own():
  """The mode that a predicate gives has its own default; what was asked for holds."""

  def model():
    layers = (nnx.Linear(64, 64, use_bias=False, rngs=nnx.Rngs(i)) for i in range(2))
    return nnx.Sequential(*layers)

  for mode, how, want in (
    ("mxfp8", {}, [None, "weight"]),
    ("nvfp4", {"global_scale": "amax"}, ["amax", None]),
    ("nvfp4", {"global_scale": None}, [None, None]),
  ):
    other = {"mxfp8": "nvfp4", "nvfp4": "mxfp8"}[mode]
    made = model()
    jaxqq.nn.quantize_model(
      made, mode, predicate=lambda p, _, o=other: o if p[-1] == "1" else True, **how
    )
    assert [layer.dot_general.global_scale for layer in made.layers] == want
  params = {name: {"kernel": jnp.ones((64, 64))} for name in "ab"}
  packed, _ = jaxqq.nn.quantize_params(
    params, "mxfp8", predicate=lambda p, _: "nvfp4" if p == "b" else True
  )
  assert [packed[name]["kernel"].global_scale is None for name in "ab"] == [True, False]


def test_a_packed_weight_decides_whether_there_are_scales():
  x = X * np.float32(1e-4)
  weight = jaxqq.quantize_weight(W.T)
  exact = x.astype(np.float64) @ np.float64(weight.dequantize(jnp.float32)).T
  plain, asked = (
    jaxqq.nn.QQLinear.from_weight(weight, **how) for how in ({}, {"global_scale": "amax"})
  )
  np.testing.assert_array_equal(plain(x), jaxqq.qqmm(x, weight))
  np.testing.assert_array_equal(asked(x), jaxqq.qqmm(x, weight, global_scale_x="amax"))
  assert oracle.relative_error(asked(x), exact) < 0.15 < oracle.relative_error(plain(x), exact)
  none = jaxqq.nn.QQLinear.from_weight(jaxqq.quantize_weight(W.T, global_scale=None))
  assert none.dot_general.global_scale is None
  none.set_weight(weight)
  np.testing.assert_array_equal(none(x), plain(x))


# quantize


def test_quantize_takes_the_amax():
  w = W.T * np.float32(1e-4)
  for got in (
    jaxqq.quantize(w, global_scale="amax"),
    jax.jit(lambda w: jaxqq.quantize(w, global_scale="amax"))(w),
  ):
    for a, b in zip(got, oracle.quantize(w, "nvfp4", amax(w)), strict=True):
      np.testing.assert_array_equal(a, b)
  packed, _ = jaxqq.quantize(w)  # as in MLX
  np.testing.assert_array_equal(packed, oracle.quantize(w, "nvfp4")[0])
  assert "quantize nvfp4" in jaxqq.explain(
    jaxqq.quantize, jax.ShapeDtypeStruct((4, 64), jnp.float32), global_scale="amax"
  )
  for how, words in (
    ({"global_scale": "max"}, ["'max'", "'amax'"]),
    ({"global_scale": "amax", "mode": "mxfp8"}, ["'mxfp8'"]),
  ):
    with pytest.raises(ValueError) as caught:
      jaxqq.quantize(w, **how)
    check_sentence(str(caught.value), "quantize", ["global_scale", *words])


# The quantized backward


def reaching(a):
  """The scale that a matrix gets which has none: 2688, or below 1 that times a power of two."""
  largest = float(np.max(np.abs(a), initial=0))
  if largest == 0 or largest >= 1:
    return np.float32(2688)
  return np.float32(2688 * 2.0 ** np.ceil(np.log2(largest / 2688)))


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
@pytest.mark.parametrize("powers", [(0, 0, 0), (0, -9, -3), (-20, -20, -60)])
def test_cotangents_without_global_scales_are_kept(powers, packed):
  x, w, g = (a * np.float32(2.0**p) for a, p in zip((X, W.T, X[:, :64]), powers, strict=True))
  args = oracle.quantize(w, "nvfp4") if packed else (w,)
  f = lambda x, *w: jaxqq.qqmm(x, *w, *args[len(w) :], backward="quantized")  # noqa: E731
  dx, *dw = vjp(f, x, *([] if packed else [w]), g=g)
  w_used, of_w = (oracle.round_trip(w, "nvfp4"), None) if packed else (w, reaching(w))
  want = quantized_product(g, w_used.T, "nvfp4", reaching(g), of_w)
  np.testing.assert_allclose(dx, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
  if not packed:
    want = quantized_product(g.T, x.T, "nvfp4", reaching(g), reaching(x))
    np.testing.assert_allclose(dw[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert oracle.relative_error(dw[0], g.T.astype(np.float64) @ x) < 0.2
    assert oracle.relative_error(dx, g.astype(np.float64) @ w) < 0.2


@pytest.mark.parametrize("choice", [{}, {"global_scale": None}], ids=["default", "None"])
def test_a_bfloat16_model_has_gradients(choice):
  """A mean over many outputs: cotangents of 1e-6 and less."""
  model = nn.Sequential(
    [nn.Dense(64, param_dtype=jnp.bfloat16), nn.relu, nn.Dense(32, param_dtype=jnp.bfloat16)]
  )
  x = jnp.asarray(X, jnp.bfloat16)
  variables = jax.jit(model.init)(jax.random.key(0), x)

  def gradient(apply):
    loss = lambda v: jnp.mean(apply(v, x).astype(jnp.float32) ** 2) * 1e-3  # noqa: E731
    return jax.jit(jax.grad(loss))(variables)

  got = gradient(jaxqq.nn.quantized_apply(model, "nvfp4", backward="quantized", **choice))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradient(model.apply)), strict=True):
    assert oracle.relative_error(a, np.asarray(b, np.float64)) < 0.5


# Reports


def test_a_report_marks_what_lost_much():
  def model():
    made = nnx.Sequential(*(nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(3)))
    for i, layer in enumerate(made.layers):
      layer.kernel[...] = layer.kernel[...] * jnp.float32(0.01**i)
    return made

  report = jaxqq.nn.quantize_model(model(), global_scale=None)
  assert [row.path for row in report.lossy] == ["layers.1", "layers.2"]
  lines = str(report).splitlines()
  assert [line.split()[6].endswith("!") for line in lines[2:5]] == [False, True, True]
  for word in ("layers.1 and 1 more", "20%", 'global_scale="weight"', '"mxfp8"'):
    assert word in lines[-1]
  for safe in (jaxqq.nn.quantize_model(model()), jaxqq.nn.quantize_model(model(), "mxfp8")):
    assert not safe.lossy and "!" not in str(safe)
    assert all(row.relative_error < 0.12 for row in safe)
  params = {"kernel": jnp.full((64, 64), 1e-5)}
  _, report = jaxqq.nn.quantize_params(params, global_scale=None)
  assert report.lossy and "!" in str(report).splitlines()[-1]
