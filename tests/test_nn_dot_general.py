"""Layers of Flax that are given a dot_general: they train, with the gradients of qqmm."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqq
from tests.support import oracle
from tests.support.jaxprs import count
from tests.support.training import falls

# The layers of Flax: a batch of numbers, one step after the other until the loss has fallen.

INPUTS = jax.random.normal(jax.random.key(0), (16, 8, 64))
TARGETS = jnp.sin(INPUTS[..., :32] * 2)


MXFP8 = jaxqq.dot_general("mxfp8")
LINEN = {
  "Dense": lambda d: nn.Dense(32, dot_general=d),
  "Dense of a class": lambda d: nn.Dense(32, dot_general_cls=lambda: d),
  "DenseGeneral": lambda d: nn.DenseGeneral(32, axis=(-1,), dot_general=d),
  "attention": lambda d: nn.MultiHeadDotProductAttention(
    4, out_features=32, qkv_dot_general=d, out_dot_general=d
  ),
}
RNGS = nnx.Rngs(0)
NNX = {
  "Linear": lambda d: nnx.Linear(64, 32, dot_general=d, rngs=RNGS),
  "Linear that prefers": lambda d: nnx.Linear(
    64, 32, dot_general=d, preferred_element_type=jnp.float32, precision="highest", rngs=RNGS
  ),
  "LinearGeneral": lambda d: nnx.LinearGeneral(64, (32,), dot_general_cls=lambda: d, rngs=RNGS),
  "Einsum": lambda d: nnx.Einsum("btd,df->btf", (64, 32), (32,), einsum_op=d.einsum, rngs=RNGS),
  "attention": lambda d: nnx.MultiHeadAttention(
    4, 64, out_features=32, qkv_dot_general=d, out_dot_general=d, decode=False, rngs=RNGS
  ),
}


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("name", LINEN)
def test_layers_of_linen_train(name):
  layer = LINEN[name](MXFP8)
  params = layer.init(jax.random.key(1), INPUTS)

  def loss(params):
    return jnp.mean((layer.apply(params, INPUTS) - TARGETS) ** 2)

  assert count(jax.make_jaxpr(loss)(params).jaxpr, "qqmm") == (4 if name == "attention" else 1)
  falls(loss, params)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("name", NNX)
def test_layers_of_nnx_train(name):
  graph, params, rest = nnx.split(NNX[name](MXFP8), nnx.Param, ...)

  def loss(params):
    return jnp.mean((nnx.merge(graph, params, rest)(INPUTS) - TARGETS) ** 2)

  assert count(jax.make_jaxpr(loss)(params).jaxpr, "qqmm") == (4 if name == "attention" else 1)
  falls(loss, params)


@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_gradients_of_layers_are_those_of_qqmm(backward):
  x = INPUTS[0]
  dot_general = jaxqq.dot_general("nvfp4", backward=backward)
  kernel = jax.random.normal(jax.random.key(2), (64, 32))

  def qqmm(kernel):
    scales = {"global_scale_x": 2688, "global_scale_w": "amax"}
    return jnp.sum(jnp.sin(jaxqq.qqmm(x, kernel.T, **scales, backward=backward)))

  want = jax.grad(qqmm)(kernel)
  linen = nn.Dense(32, use_bias=False, dot_general=dot_general)

  def loss(kernel):
    return jnp.sum(jnp.sin(linen.apply({"params": {"kernel": kernel}}, x)))

  assert oracle.relative_error(jax.grad(loss)(kernel), want) <= 1e-6  # another order of sums
  linear = nnx.Linear(64, 32, use_bias=False, dot_general=dot_general, rngs=nnx.Rngs(0))
  linear.kernel[...] = kernel
  got = nnx.grad(lambda linear: jnp.sum(jnp.sin(linear(x))))(linear)
  assert oracle.relative_error(got["kernel"][...], want) <= 1e-6


def test_attention_of_flax_takes_it():
  """Flax hands it to jnp.einsum, which may swap the operands."""
  q, k = (jax.random.normal(jax.random.key(i), (2, 6, 4, 32)) for i in range(2))
  got = nn.dot_product_attention_weights(q, k, einsum_dot_general=jaxqq.dot_general("mxfp8"))
  want = nn.dot_product_attention_weights(q, k)
  assert 0 < oracle.relative_error(np.asarray(got), np.asarray(want, np.float64)) < 0.1
