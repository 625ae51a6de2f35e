"""Layers of Equinox with packed weights, and training around them."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxqq
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("quick_compiles")
X = jnp.asarray(oracle.random(np.random.default_rng(51), (16, 64), "float32"))


def is_linear(node):
  return isinstance(node, eqx.nn.Linear)


def weights_of(model):
  """Those of every linear layer, as `eqx.tree_at` asks for them."""
  return [node.weight for node in jax.tree.leaves(model, is_leaf=is_linear) if is_linear(node)]


def packed(model, mode):
  weights = [jaxqq.quantize_weight(w, mode) for w in weights_of(model)]
  return eqx.tree_at(weights_of, model, weights)


@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
def test_packed_layers_compute_what_qqmm_does(mode):
  model = eqx.nn.MLP(64, 8, 64, 1, key=jax.random.key(0))
  served = packed(model, mode)
  got = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))(served, X)
  first, last = model.layers
  hidden = jaxqq.qqmm(X, jaxqq.quantize_weight(first.weight, mode)) + first.bias.reshape(1, -1)
  want = jaxqq.qqmm(jax.nn.relu(hidden), jaxqq.quantize_weight(last.weight, mode))
  np.testing.assert_allclose(got, want + last.bias.reshape(1, -1), rtol=1e-5, atol=1e-5)
  assert oracle.relative_error(got, np.asarray(jax.vmap(model)(X), np.float64)) < 0.25


def test_what_is_around_packed_layers_trains():
  """Biases: Equinox's own partition would hand the global scales to the optimizer."""
  model = packed(eqx.nn.MLP(64, 8, 64, 1, key=jax.random.key(0)), "nvfp4")
  trainable, frozen = jaxqq.partition(model)
  optimizer = optax.adamw(1e-1, weight_decay=0.1)
  state = optimizer.init(trainable)

  @jax.jit
  def step(trainable, state):
    def loss(trainable):
      return jnp.mean((jax.vmap(jaxqq.combine(trainable, frozen))(X) - 1) ** 2)

    value, grads = jax.value_and_grad(loss)(trainable)
    with jax.numpy_dtype_promotion("standard"):
      updates, state2 = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state2, value

  losses = []
  for _ in range(10):
    trainable, state, value = step(trainable, state)
    losses.append(float(value))
  assert losses[-1] < 0.7 * losses[0]
  trained = jaxqq.combine(trainable, frozen)
  jax.tree.map(np.testing.assert_array_equal, weights_of(trained), weights_of(model))
