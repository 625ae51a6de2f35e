"""Layers of experts on a mesh of explicit axes: as on one device, and split as they say."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq.nn
from jaxqq._compat import ShardingTypeError
from tests.support import oracle
from tests.support.messages import check_sentence
from tests.support.sharding import (
  CLOSE,
  GRADIENTS_CLOSE,
  QUICK,
  explicit_mesh,
  mesh,
  place,
  place_explicit,
)

E, K, N, TOKENS, TOP = 4, 64, 32, 8, 2
RNG = np.random.default_rng(0)
X = oracle.random(RNG, (TOKENS, K), "float32")
BUFFERS = oracle.random(RNG, (E, 4, K), "float32")
CHOSEN = RNG.integers(-1, E, (TOKENS, TOP)).astype(np.int32)  # -1: no expert
WEIGHTS = RNG.uniform(size=(TOKENS, TOP)).astype(np.float32)
SIZES = np.int32([2, 0, 5, 1])


@functools.cache
def parts_of(kind):
  """A layer, some with biases of numbers: its graph, parameters and the rest."""
  options = {"use_bias": kind != "mxfp8", "gated": False, "rngs": nnx.Rngs(0)}
  options["bias_init"] = nnx.initializers.normal()
  if kind == "plain":
    layer = jaxqq.nn.Experts(E, K, N, **options)
  else:
    layer = jaxqq.nn.QQExperts(E, K, N, mode="mxfp8", **options)
  if kind == "packed":
    jaxqq.nn.pack(layer)
  return nnx.split(layer, nnx.Param, ...)


def of_tokens(graph, params, rest, x, weights, **how):
  """What a call gives, and gradients of parameters, tokens and weights."""

  def loss(params, x, weights):
    out = nnx.merge(graph, params, rest)(x, CHOSEN, weights, **how)
    return jnp.sum(jnp.sin(out)), out

  (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, x, weights)
  return out, gradients


def of_rows(graph, params, rest, x, buffers, **how):
  layer = nnx.merge(graph, params, rest)
  return layer.grouped(x, SIZES, **how), layer.buffers(buffers, **how)


def split(tree, *spec):
  return jax.tree.map(lambda a: place_explicit(a, P(*spec[: a.ndim])), tree)


@functools.cache
def tokens_on_one_device():
  graph, *variables = parts_of("mxfp8")
  return jax.jit(functools.partial(of_tokens, graph))(*variables, X, WEIGHTS)


@QUICK
def test_tokens_and_gradients():
  """Experts and tokens over one axis: the result is split as tokens are, gradients as operands."""
  graph, *variables = parts_of("mxfp8")
  run, want = functools.partial(of_tokens, graph), tokens_on_one_device()
  with jax.set_mesh(explicit_mesh()):
    args = *(split(a, "data") for a in variables), split(X, "data"), split(WEIGHTS, "data")
    got = jax.jit(run)(*args)
  assert got[0].sharding.spec == P("data", None)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, **GRADIENTS_CLOSE)
    assert a.sharding.spec[0] == "data"


@QUICK
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_rows_and_buffers(kind):
  """Where out_sharding says; every device has some columns of each kernel."""
  graph, *variables = parts_of(kind)
  run = functools.partial(of_rows, graph)
  want = jax.jit(run)(*variables, X, BUFFERS)
  spec = (None, "tensor") if kind == "packed" else (None, None, "tensor")  # N of a kernel
  with jax.set_mesh(explicit_mesh()):
    columns = functools.partial(jax.tree.map, lambda a: place_explicit(a, P(*spec[: a.ndim])))
    args = *(columns(a) for a in variables), split(X, "data"), split(BUFFERS, None, "data")
    got = jax.jit(functools.partial(run, out_sharding=P(None, "data")))(*args)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, **CLOSE)
    assert a.sharding.spec == P(None, "data", *[None] * (a.ndim - 2))


@QUICK
def test_automatic_axes():
  graph, *variables = parts_of("mxfp8")
  layer = nnx.merge(graph, *variables)
  sharding = NamedSharding(mesh(), P("data", "tensor"))
  run = jax.jit(lambda x: layer(x, CHOSEN, WEIGHTS, out_sharding=sharding))
  out = run(place(X, P("data")))
  assert out.sharding.is_equivalent_to(sharding, 2)
  np.testing.assert_allclose(out, tokens_on_one_device()[0], **CLOSE)


@pytest.mark.parametrize("layer", [jaxqq.nn.ExpertLinear, jaxqq.nn.QQExpertLinear])
def test_errors_name_the_layer(layer):
  name = layer.__name__
  layer = layer(E, K, N, rngs=nnx.Rngs(0))
  layer.kernel = nnx.Param(place_explicit(layer.kernel[...], P(None, "tensor")))
  x = place_explicit(X, P(None, "tensor"))
  with jax.set_mesh(explicit_mesh()), pytest.raises(ShardingTypeError) as caught:
    jax.eval_shape(lambda x: layer(x, SIZES), x)
  check_sentence(str(caught.value), name, ["both split along K", "out_sharding="])
  for call in (lambda: layer(X, SIZES, out_sharding=1), lambda: layer.buffers(BUFFERS, 1)):
    with pytest.raises(TypeError, match=rf"^{name}.*: out_sharding must be .* got int\."):
      call()
