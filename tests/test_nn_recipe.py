"""Layers of Flax that train by a recipe: their products, their keys, and what stays as it is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxqq
import jaxqq.nn
from tests.support.messages import check_sentence
from tests.support.sharding import QUICK

pytestmark = QUICK


def inputs(shape=(32, 64), seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(32, 64, rngs=rngs)
    self.down = nnx.Linear(64, 32, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.relu(self.up(x)))


class Model(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(16, 32, rngs=rngs)
    self.blocks = nnx.List([Block(rngs) for _ in range(3)])
    self.head = nnx.Linear(32, 16, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    for block in self.blocks:
      x = block(x)
    return self.head(x)


def test_a_layer_multiplies_as_qqmm_does():
  """By the key that its stream gives: another one in every call."""
  layer = jaxqq.nn.QQLinear(64, 32, recipe="nvfp4", use_bias=False, rngs=nnx.Rngs(0, recipe=1))
  x, kernel = inputs(), layer.kernel.get_value()
  stream = layer.recipe_rngs.key.get_value()
  gradient = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 2)))
  own = [gradient(layer, x).kernel.get_value() for _ in range(2)]
  assert int(layer.recipe_rngs.count.get_value()) == 2
  for i in range(2):
    key = jax.random.fold_in(stream, i)
    want = jax.grad(lambda w, key: jnp.sum(jaxqq.qqmm(x, w, recipe="nvfp4", key=key) ** 2))
    np.testing.assert_allclose(own[i], want(kernel.T, key).T, rtol=1e-5, atol=1e-3)
  assert (np.asarray(own[0]) != np.asarray(own[1])).any()
  assert layer.mode == "nvfp4" and layer.dot_general.global_scale == "amax"


def test_a_recipe_without_anything_random_needs_no_stream():
  linear = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
  layer = jaxqq.nn.QQLinear.from_linear(linear, recipe="mxfp8")
  assert layer.recipe_rngs is None and layer.mode == "mxfp8"
  plain = jaxqq.nn.QQLinear.from_linear(linear, mode="mxfp8", backward="quantized")
  np.testing.assert_array_equal(layer(inputs()), plain(inputs()))


def test_other_layers_take_one():
  rngs = nnx.Rngs(0, recipe=1)
  general = jaxqq.nn.QQLinearGeneral(64, (2, 16), recipe="nvfp4", rngs=rngs)
  einsum = jaxqq.nn.QQEinsum("bd,df->bf", (64, 32), recipe="nvfp4", rngs=rngs)
  assert general(inputs()).shape == (32, 2, 16) and einsum(inputs()).shape == (32, 32)
  keys = [jax.random.key_data(layer.recipe_rngs.key.get_value()) for layer in (general, einsum)]
  assert (keys[0] != keys[1]).any()


def test_pack_and_unpack():
  """A packed layer serves, its inputs under their amax; unpacked it trains by its recipe again."""
  layer = jaxqq.nn.QQLinear(64, 32, recipe="nvfp4", rngs=nnx.Rngs(0))
  kernel = layer.kernel.get_value()
  layer.pack()
  want = jaxqq.qqmm(inputs(), jaxqq.quantize_weight(kernel.T), global_scale_x="amax")
  np.testing.assert_allclose(layer(inputs()), want, rtol=1e-6, atol=1e-6)
  layer.unpack()
  assert layer.dot_general.recipe == jaxqq.Recipe.named("nvfp4")
  layer(inputs())
  layer.set_weight(jaxqq.quantize_weight(kernel.T, "mxfp8"))  # of another mode: none of it
  assert layer.dot_general.recipe is None and layer(inputs()).shape == (32, 32)


def test_quantize_model_keeps_what_it_is_told():
  model = Model(nnx.Rngs(0))
  before = jax.tree.structure(nnx.state(model, nnx.Param))
  keep = ["blocks.0", "blocks.-1", "head"]
  report = jaxqq.nn.quantize_model(model, recipe="nvfp4", keep=keep, rngs=nnx.Rngs(recipe=3))
  converted = {row.path: row.converted for row in report}
  assert [path for path, is_converted in converted.items() if is_converted] == [
    "blocks.1.up",
    "blocks.1.down",
  ]
  assert report["blocks.2.up"].reason == "keep names 'blocks.-1'"
  assert report["blocks.0.down"].reason == "keep names 'blocks.0'"
  assert report["head"].reason == "keep names 'head'" and type(model.head) is nnx.Linear
  assert jax.tree.structure(nnx.state(model, nnx.Param)) == before
  once = jaxqq.nn.quantize_model(
    Model(nnx.Rngs(0)), recipe="nvfp4", keep=iter(keep), rngs=nnx.Rngs(recipe=3)
  )
  assert [(row.path, row.reason) for row in once] == [(row.path, row.reason) for row in report]
  tokens = jnp.arange(32) % 16

  @nnx.jit
  def step(model):
    def loss(model):
      logits = model(tokens)
      return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(32), tokens])

    value, gradient = nnx.value_and_grad(loss)(model)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.5 * g, nnx.state(model, nnx.Param), gradient))
    return value

  losses = [float(step(model)) for _ in range(20)]
  assert losses[-1] < 0.5 * losses[0]
  assert int(model.blocks[1].up.recipe_rngs.count.get_value()) == 20
  assert model.blocks[1].up.dot_general.recipe == jaxqq.Recipe.named("nvfp4")


def test_linen():
  """The stream "recipe" of apply; without it Flax says so."""
  recipe = dataclasses.replace(jaxqq.Recipe.named("nvfp4"), forward_x=None, forward_w=None)
  layer = jaxqq.nn.QQDense(32, recipe=recipe, use_bias=False)
  variables = layer.init({"params": jax.random.key(0), "recipe": jax.random.key(1)}, inputs())
  dense = linen.Dense(32, use_bias=False)

  def gradient(apply, key):
    grad = jax.grad(lambda v: jnp.sum(apply(v, inputs(), rngs={"recipe": key}) ** 2))
    return grad(variables)["params"]["kernel"]

  first, again, other = (gradient(layer.apply, jax.random.key(i)) for i in (2, 2, 3))
  np.testing.assert_array_equal(first, again)
  assert (np.asarray(first) != np.asarray(other)).any()
  x, kernel = inputs(), variables["params"]["kernel"]
  exact = 2 * x.T @ (x @ kernel)
  assert 0.02 < float(jnp.linalg.norm(first - exact) / jnp.linalg.norm(exact)) < 0.3
  by_apply = gradient(jaxqq.nn.quantized_apply(dense, recipe=recipe), jax.random.key(2))
  np.testing.assert_array_equal(by_apply, first)
  with pytest.raises(Exception, match="recipe"):
    layer.apply(variables, inputs())


@pytest.mark.parametrize(
  ("options", "error", "words"),
  [
    ({"recipe": "nvfp4"}, ValueError, ["rngs needs a stream 'recipe'", "nnx.Rngs(recipe=0)"]),
    (
      {"recipe": "nvfp4", "rngs": nnx.Rngs(params=0)},
      ValueError,
      ["rngs needs a stream", "'params'"],
    ),
    ({"recipe": "int4"}, ValueError, ["recipe must be a jaxqq.Recipe"]),
    ({"recipe": "mxfp8", "mode": "nvfp4"}, ValueError, ["mode is 'nvfp4'"]),
    ({"recipe": "mxfp8", "keep": ["haed"]}, ValueError, ["keep names 'haed'"]),
    ({"recipe": "mxfp8", "keep": ["blocks.-4"]}, ValueError, ["keep names 'blocks.-4'"]),
    ({"recipe": "mxfp8", "keep": [""]}, ValueError, ["keep names ''"]),
    ({"recipe": "mxfp8", "keep": ["blocks.-²"]}, ValueError, ["keep names 'blocks.-²'"]),
    ({"recipe": "mxfp8", "keep": None}, TypeError, ["keep must be a sequence of paths", "None"]),
    ({"recipe": "mxfp8", "keep": "head"}, TypeError, ["keep must be a sequence of paths"]),
  ],
)
def test_models_that_cannot_be(options, error, words):
  """The model is as it was."""
  model = Model(nnx.Rngs(0))
  with pytest.raises(error) as caught:
    jaxqq.nn.quantize_model(model, **options)
  check_sentence(str(caught.value), "quantize_model", words)
  assert type(model.head) is nnx.Linear


def test_a_layer_without_a_stream():
  with pytest.raises(ValueError) as caught:
    jaxqq.nn.QQLinear.from_linear(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), recipe="nvfp4")
  check_sentence(str(caught.value), "QQLinear.from_linear", ["rngs needs a stream 'recipe'"])


def test_experts_take_the_recipes_of_modes():
  """Others would be lost without a word."""

  def layer():
    return jaxqq.nn.ExpertLinear(2, 64, 32, rngs=nnx.Rngs(0))

  model = nnx.Dict(experts=layer())
  report = jaxqq.nn.quantize_model(model, recipe="nvfp4", rngs=nnx.Rngs(recipe=0))
  assert not report["experts"].converted and "no recipe but those" in report["experts"].reason
  model = nnx.Dict(experts=layer())
  assert jaxqq.nn.quantize_model(model, recipe="mxfp8")["experts"].converted
  x, sizes = jax.random.normal(jax.random.key(0), (6, 64)), jnp.array([4, 2])
  same = jaxqq.nn.QQExpertLinear.from_linear(layer(), mode="mxfp8", backward="quantized")
  grads = [jax.grad(lambda x: jnp.sum(of(x, sizes) ** 2))(x) for of in (model["experts"], same)]  # noqa: B023
  np.testing.assert_array_equal(*grads)
