"""Trees that hold packed weights: what is trained, what is frozen, and what optimizers see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxqq
from tests.support import oracle
from tests.support.messages import check_sentence
from tests.support.operands import amax

pytestmark = pytest.mark.usefixtures("quick_compiles")
RNG = np.random.default_rng(41)
X = oracle.random(RNG, (4, 64), "float32")
W = oracle.random(RNG, (8, 64), "float32")
A, B = oracle.random(RNG, (2, 64), "float32"), oracle.random(RNG, (8, 2), "float32")


def adapted():
  """A packed base, adapters beside it, and a count."""
  base = jaxqq.quantize_weight(W)
  layer = {"w": base, "lora": {"a": jnp.asarray(A), "b": jnp.asarray(B)}}
  return {"layers": [layer], "scale": jnp.float32(2), "step": jnp.int32(3)}


def loss_of(params):
  (layer,) = params["layers"]
  y = jaxqq.qqmm(X, layer["w"]) + X @ layer["lora"]["a"].T @ layer["lora"]["b"].T
  return jnp.sum(y**2) * params["scale"]


def test_what_is_trained_and_what_is_frozen():
  params = adapted()
  trainable, frozen = jaxqq.partition(params)
  assert jax.tree.map(jnp.shape, trainable) == {
    "layers": [{"w": None, "lora": {"a": (2, 64), "b": (8, 2)}}],
    "scale": (),
    "step": None,
  }
  assert frozen["layers"][0]["w"] is params["layers"][0]["w"] and frozen["step"] == 3
  back = jaxqq.combine(trainable, frozen)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  some, rest = jaxqq.partition(params, lambda path, a: path.endswith("lora.b") and a.size == 16)
  assert [path for path, _ in jax.tree_util.tree_leaves_with_path(some)] == [
    path for path, leaf in jax.tree_util.tree_leaves_with_path(params) if leaf.shape == (8, 2)
  ]
  jax.tree.map(np.testing.assert_array_equal, jaxqq.combine(rest, some), params)
  abstract = jaxqq.partition(jax.eval_shape(adapted))
  assert jax.tree.structure(abstract[0]) == jax.tree.structure(trainable)


def test_gradients_norms_averages_and_steps():
  """They see the adapters alone, and the packed weight is as it was, bit for bit."""
  params = adapted()
  trainable, frozen = jaxqq.partition(params, lambda path, _: "lora" in path)
  grads = jax.jit(jax.grad(lambda t: loss_of(jaxqq.combine(t, frozen))))(trainable)
  w_hat = oracle.round_trip(W, "nvfp4", amax(W))
  x_hat = oracle.round_trip(X, "nvfp4")
  y = x_hat @ w_hat.T + X.astype(np.float64) @ A.T @ B.T
  want = {"a": 4 * B.T.astype(np.float64) @ y.T @ X, "b": 4 * y.T @ (X.astype(np.float64) @ A.T)}
  for name in "ab":
    got = grads["layers"][0]["lora"][name]
    assert oracle.relative_error(got, want[name]) < 1e-5
  norm = np.sqrt(sum(np.sum(a**2) for a in want.values()))
  global_norm = getattr(optax.tree, "norm", None) or optax.global_norm
  assert float(global_norm(grads)) == pytest.approx(norm, rel=1e-5)
  optimizer = optax.adamw(1e-2, weight_decay=0.5)  # that would shrink a global scale
  with jax.numpy_dtype_promotion("standard"):
    updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
    after = optax.apply_updates(trainable, updates)
  average = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, trainable, after)
  lora = lambda tree: tree["layers"][0]["lora"]["a"]  # noqa: E731
  np.testing.assert_allclose(lora(average), (lora(trainable) + lora(after)) / 2, rtol=1e-6)
  assert not np.array_equal(lora(after), lora(trainable))
  trained = jaxqq.combine(after, frozen)
  before, now = params["layers"][0]["w"], trained["layers"][0]["w"]
  jax.tree.map(np.testing.assert_array_equal, before, now)


def test_structures_that_do_not_fit():
  with pytest.raises(TypeError) as caught:
    jaxqq.partition({}, {"a"})
  check_sentence(str(caught.value), "partition", ["is_trainable", "function", "set"])
  with pytest.raises(ValueError) as caught:
    jaxqq.combine({"a": 1}, {"b": 1})
  check_sentence(str(caught.value), "combine", ["structure"])
  with pytest.raises(ValueError) as caught:
    jaxqq.combine()
  check_sentence(str(caught.value), "combine", ["at least one"])


@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
def test_a_weight_times_columns(mode):
  """w @ x, as layers that are not made for it write it."""
  weight = jaxqq.quantize_weight(W, mode)
  want = jaxqq.qqmm(X, weight)
  np.testing.assert_array_equal(weight @ X[0], want[0])
  np.testing.assert_array_equal(weight @ jnp.asarray(X.T), want.T)
  np.testing.assert_array_equal(jax.vmap(lambda x: weight @ x)(X), want)
  stack = jaxqq.quantize_weight(np.stack([W, 4 * W]), mode)
  out = stack @ np.stack([X.T] * 2)
  np.testing.assert_allclose(out[1], 4 * want.T, rtol=1e-5)
  with pytest.raises(TypeError) as caught:
    weight @ [1.0]
  check_sentence(str(caught.value), "QuantizedWeight.__matmul__", ["x", "list"])
