"""out_sharding of products, and packed weights as the right operand of a contraction."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from jaxqq._compat import ShardingTypeError
from tests.support import oracle
from tests.support.messages import check_sentence
from tests.support.operands import Product, amax
from tests.support.sharding import collectives

pytestmark = pytest.mark.usefixtures("quick_compiles")
RNG = np.random.default_rng(31)
X, W = (oracle.random(RNG, shape, "float32") for shape in ((16, 256), (32, 256)))
KINDS = pytest.mark.parametrize(
  "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
ALL = np.int32([16])  # rows of the one group
OF_ROWS = (((1,), (1,)), ((), ()))


def placed(kind, x_spec, w_spec):
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
  return mesh, *(
    jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((X, x_spec), (W, w_spec))
  )


def spec_of(out):
  spec = tuple(out.sharding.spec)
  return spec + (None,) * (out.ndim - len(spec))


@KINDS
@pytest.mark.parametrize("spec", [P("data", None), P("data", "tensor"), P(None, None)], ids=str)
def test_k_split_in_both(spec, kind):
  """Where types alone do not tell how the result is split; partial sums are added or scattered."""
  mesh, x, w = placed(kind, P("data", "tensor"), P(None, "tensor"))
  want = jaxqq.qqmm(X, W, mode="mxfp8")
  products = {
    "qqmm": functools.partial(jaxqq.qqmm, mode="mxfp8", out_sharding=spec),
    "dot_general": lambda x, w: jaxqq.dot_general("mxfp8")(x, w, OF_ROWS, out_sharding=spec),
    "einsum": lambda x, w: jaxqq.dot_general("mxfp8").einsum("mk,nk->mn", x, w, out_sharding=spec),
  }
  with jax.set_mesh(mesh):
    for name, product in products.items():
      out = jax.jit(product)(x, w)
      np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-4, err_msg=name)
      assert spec_of(out) == (*spec, *[None] * (2 - len(spec))), name
    found = collectives(jax.jit(products["qqmm"]).lower(x, w).compile())
    assert {kind for kind, _ in found} <= {"all-reduce", "reduce-scatter", "all-gather"}
    assert any(kind in ("all-reduce", "reduce-scatter") for kind, _ in found)


@pytest.mark.parametrize("quantize_input", [True, False])
def test_gradients_where_k_is_split_in_both(quantize_input):
  multiply = Product("mxfp8", quantize_input)
  mesh, x, w = placed(AxisType.Explicit, P("data", "tensor"), P(None, "tensor"))

  def loss(product, x, w):
    return jnp.sum(jnp.sin(product(x, w)))

  with jax.set_mesh(mesh):
    product = functools.partial(multiply, out_sharding=P("data", None))
    got = jax.jit(jax.grad(functools.partial(loss, product), (0, 1)))(x, w)
  want = jax.grad(functools.partial(loss, multiply), (0, 1))(X, W)
  for a, b in zip(got, want, strict=True):
    assert oracle.relative_error(np.asarray(a), np.asarray(b, np.float64)) < 1e-5


@KINDS
def test_a_result_goes_where_it_is_asked_for(kind):
  mesh, x, w = placed(kind, P("data", None), P("tensor", None))
  sharding = NamedSharding(mesh, P(None, "tensor"))
  weight = jaxqq.quantize_weight(W)
  out = jax.jit(lambda x: jaxqq.qqmm(x, weight, out_sharding=sharding))(x)
  np.testing.assert_allclose(out, jaxqq.qqmm(X, weight), rtol=1e-5, atol=1e-5)
  assert spec_of(out) == (None, "tensor")
  text = jaxqq.explain(x, w, out_sharding=sharding)
  assert text.startswith("qqmm nvfp4")


def ambiguous(call):
  mesh, x, w = placed(AxisType.Explicit, P(None, "tensor"), P(None, "tensor"))
  with jax.set_mesh(mesh), pytest.raises(ShardingTypeError) as caught:
    jax.jit(call)(x, w)
  return str(caught.value)


def test_errors_name_the_function_that_was_called():
  words = ["both split", "out_sharding=", "jax.sharding.reshard"]
  dot_general = jaxqq.dot_general("mxfp8")
  check_sentence(ambiguous(jaxqq.qqmm), "qqmm", words)
  check_sentence(ambiguous(jaxqq.quantized_matmul), "quantized_matmul", words)
  check_sentence(ambiguous(lambda x, w: dot_general(x, w, OF_ROWS)), "dot_general", words)
  einsum = lambda x, w: dot_general.einsum("mk,nk->mn", x, w)  # noqa: E731
  check_sentence(ambiguous(einsum), "dot_general.einsum", words)

  def by_layer(x, w):
    layer = jaxqq.nn.QQLinear(256, 32, use_bias=False, mode="mxfp8", rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(w.T)
    return layer(x)

  check_sentence(ambiguous(by_layer), "QQLinear", words)
  layers = (
    jaxqq.nn.QQLinear(64, 8, rngs=nnx.Rngs(0)),
    jaxqq.nn.QQLinear.from_linear(nnx.Linear(64, 8, rngs=nnx.Rngs(0))),
    jaxqq.nn.QQLinear.from_weight(jaxqq.quantize_weight(W[:, :64])),
  )
  model = nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
  jaxqq.nn.quantize_model(model)
  for layer in (*layers, model.layers[0]):
    with pytest.raises(ValueError) as caught:
      layer(jnp.ones((2, 40)))
    check_sentence(str(caught.value), "QQLinear", ["lhs", "(2, 40)"])


@pytest.mark.parametrize(
  ("error", "words", "out_sharding"),
  [
    (TypeError, ["out_sharding", "str"], "data"),
    (ValueError, ["no mesh", "jax.set_mesh"], P("data")),
  ],
)
def test_bad_out_sharding(error, words, out_sharding):
  calls = {
    "qqmm": lambda: jaxqq.qqmm(X, W, out_sharding=out_sharding),
    "explain": lambda: jaxqq.explain(X, W, out_sharding=out_sharding),
    "ragged_qqmm": lambda: jaxqq.ragged_qqmm(X, W[None], ALL, out_sharding=out_sharding),
    "ragged_quantized_matmul": lambda: jaxqq.ragged_quantized_matmul(
      X, W[None], ALL, out_sharding=out_sharding
    ),
    "gather_qqmm": lambda: jaxqq.gather_qqmm(X, W, out_sharding=out_sharding),
    "dot_general": lambda: jaxqq.dot_general()(X, W, OF_ROWS, out_sharding=out_sharding),
    "dot_general.einsum": lambda: jaxqq.dot_general().einsum(
      "mk,nk->mn", X, W, out_sharding=out_sharding
    ),
  }
  for name, call in calls.items():
    with pytest.raises(error) as caught:
      call()
    check_sentence(str(caught.value), name, words)


# A packed weight as the right operand


@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
def test_a_packed_weight_is_contracted(mode):
  weight = jaxqq.quantize_weight(W, mode)
  dot_general = jaxqq.dot_general("mxfp8")  # the weight brings its mode
  want = jaxqq.qqmm(X, weight)
  np.testing.assert_array_equal(dot_general(X, weight, OF_ROWS), want)
  np.testing.assert_array_equal(dot_general.einsum("...k,nk->...n", X, weight), want)
  np.testing.assert_array_equal(dot_general.einsum("mk,nk->nm", X, weight), want.T)
  first = np.moveaxis(X.reshape(4, 4, 256), -1, 0)
  np.testing.assert_array_equal(
    dot_general(first, weight, (((0,), (1,)), ((), ()))), want.reshape(4, 4, 32)
  )
  half = dot_general(X.astype(jnp.bfloat16), weight, OF_ROWS, preferred_element_type=jnp.float32)
  assert half.dtype == jnp.float32
  (dx,) = jax.vjp(lambda x: dot_general(x, weight, OF_ROWS), X)[1](want)
  w_hat = oracle.round_trip(W, mode, amax(W) if mode == "nvfp4" else None)
  assert oracle.relative_error(dx, np.asarray(want, np.float64) @ w_hat) < 1e-6


def test_a_packed_stack_is_contracted_matrix_by_matrix():
  """Batch axes in any order, as in lax.dot_general."""
  stack = np.stack([np.stack([W[:8] * s for s in (1, 2, 3)])] * 2)  # (2, 3, 8, 256)
  weight = jaxqq.quantize_weight(stack)
  x = oracle.random(RNG, (3, 5, 2, 256), "float32")
  dot_general = jaxqq.dot_general("nvfp4")
  for numbers in ((((3,), (3,)), ((2, 0), (0, 1))), (((3,), (3,)), ((0, 2), (1, 0)))):
    got = jax.jit(lambda x, w, n=numbers: dot_general(x, w, n))(x, weight)
    exact = lax.dot_general(
      np.float32(oracle.round_trip(x, "nvfp4")),
      weight.dequantize(jnp.float32),
      numbers,
      precision="highest",
    )
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-4)


WEIGHT = jaxqq.quantize_weight(W)
WRONG = [
  ("its rows", ["packed rhs", "last axis", "(0,)"], X[:, :32], (((1,), (0,)), ((), ()))),
  ("rows as a batch", ["packed rhs", "batch axes (0,)"], W, (((1,), (1,)), ((0,), (0,)))),
  ("sizes", ["contracting", "(128,)", "(256,)"], X[:, :128], OF_ROWS),
]


@pytest.mark.parametrize("case", WRONG, ids=[case[0] for case in WRONG])
def test_what_is_no_contraction_of_it(case):
  _, words, lhs, numbers = case
  with pytest.raises(ValueError) as caught:
    jaxqq.dot_general()(lhs, WEIGHT, numbers)
  check_sentence(str(caught.value), "dot_general", words)
