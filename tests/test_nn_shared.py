"""Layers of Flax NNX that share a kernel stay one, packed and unpacked; and tables of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqq.nn
from tests.support.messages import check_sentence

X = jax.random.normal(jax.random.key(0), (3, 64))


class Tied(nnx.Module):
  """Layer b has the kernel of a and a bias of its own; the attribute last is what a test adds."""

  def __init__(self, last=None):
    self.a = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    b = nnx.Linear(64, 64, rngs=nnx.Rngs(1), bias_init=nnx.initializers.normal())
    b.kernel = self.a.kernel
    self.between = nnx.data([b])
    self.last = nnx.data(last)

  def __call__(self, x):
    return self.between[0](jnp.tanh(self.a(x)))


def assert_tied(model, packed):
  a, b = model.a, model.between[0]
  assert isinstance(a, jaxqq.nn.QQLinear) and isinstance(b, jaxqq.nn.QQLinear)
  assert a.is_packed == b.is_packed == packed
  for name in ("packed", "scales", "global_scale") if packed else ("kernel",):
    assert getattr(a, name) is getattr(b, name)
  assert a.bias is not b.bias


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("at_once", [False, True])
def test_a_shared_kernel_stays_one(at_once):
  model = Tied()
  jaxqq.nn.quantize_model(model, packed=at_once, global_scale="amax")
  wanted = nnx.clone(model)(X) if at_once else model(X)
  if not at_once:
    assert_tied(model, packed=False)
    jaxqq.nn.pack(model)
  assert_tied(model, packed=True)
  np.testing.assert_array_equal(model(X), wanted)
  assert len(jax.tree.leaves(nnx.state(model, jaxqq.nn.Packed))) == 3

  jaxqq.nn.unpack(model)
  assert_tied(model, packed=False)
  assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == 3
  model.a.kernel[...] = model.a.kernel[...] + 1
  np.testing.assert_array_equal(model.between[0].kernel[...], model.a.kernel[...])
  model.between[0].input_global_scale = jaxqq.nn.Packed(jnp.float32(4))
  jaxqq.nn.pack(model)  # what is of one layer's inputs stays that layer's
  assert model.a.input_global_scale is None and model.between[0].input_global_scale[...] == 4
  assert_tied(nnx.merge(*nnx.split(model)), packed=True)


@pytest.mark.usefixtures("quick_compiles")
def test_a_shared_kernel_gets_one_gradient():
  model, apart = Tied(), Tied()
  apart.between[0].kernel = nnx.Param(apart.a.kernel[...])
  for one in (model, apart):
    jaxqq.nn.quantize_model(one, "mxfp8", packed=True)
    jaxqq.nn.unpack(one)
  loss = nnx.grad(lambda model: jnp.sum(model(X) ** 2))
  grads, parts = loss(model), loss(apart)
  whole = parts["a"]["kernel"][...] + parts["between"][0]["kernel"][...]
  np.testing.assert_allclose(grads["a"]["kernel"][...], whole, rtol=1e-5, atol=1e-4)


class Reads(nnx.Module):
  """A module of the user's own that holds a variable, here a kernel of another."""

  def __init__(self, kernel):
    self.table = kernel


def tied_with(what):
  """A model, a function that packs it, and what the sentence says of the other layer."""
  model = Tied()
  if what == "left out":
    options = {"predicate": lambda path, layer: path != "between.0"}
    return model, lambda: jaxqq.nn.quantize_model(model, packed=True, **options), "not packed"
  if what == "two modes":
    options = {"predicate": lambda path, layer: "nvfp4" if path == "a" else "mxfp8"}
    return model, lambda: jaxqq.nn.quantize_model(model, packed=True, **options), "another way"
  if what == "held by another":
    model.last = Reads(model.a.kernel)
    jaxqq.nn.quantize_model(model)
    return model, lambda: jaxqq.nn.pack(model), "Reads"
  if what == "in a list":
    model.last = nnx.data([model.a.kernel])
    jaxqq.nn.quantize_model(model)
    return model, lambda: jaxqq.nn.pack(model), "'last'"
  jaxqq.nn.quantize_model(model)
  model.a.dtype = jnp.bfloat16
  return model, lambda: jaxqq.nn.pack(model), "another way"


@pytest.mark.parametrize(
  "what", ["left out", "two modes", "held by another", "in a list", "two dtypes"]
)
def test_what_cannot_stay_one_is_refused_and_nothing_changed(what):
  model, pack, words = tied_with(what)
  before, types = nnx.state(model), [type(model.a), type(model.between[0])]
  with pytest.raises(ValueError) as caught:
    pack()
  function = "quantize_model" if what in ("left out", "two modes") else "pack"
  check_sentence(str(caught.value), function, ["shares its kernel", words])
  assert [type(model.a), type(model.between[0])] == types
  after = nnx.state(model)
  assert jax.tree.structure(after) == jax.tree.structure(before)
  assert model.a.kernel is model.between[0].kernel


def test_unpacked_the_same_models_are_converted():
  """Where nothing is packed, a kernel may be anybody's."""
  for what in ("left out", "two modes"):
    model, _, _ = tied_with(what)
    predicate = lambda path, layer: path != "between.0"  # noqa: E731
    report = jaxqq.nn.quantize_model(model, predicate=predicate)
    assert report["a"].converted and not report["between.0"].converted
    assert model.a.kernel is model.between[0].kernel


@pytest.mark.parametrize("packed", [False, True])
def test_tabulate(packed):
  """flax gives every public method that a call uses for a layer's own, which returns arrays."""
  pytest.importorskip("rich")
  layers = {
    "QQLinear": jaxqq.nn.QQLinear(64, 8, rngs=nnx.Rngs(0)),
    "QQLinearGeneral": jaxqq.nn.QQLinearGeneral(64, (4, 2), rngs=nnx.Rngs(0)),
    "QQEinsum": jaxqq.nn.QQEinsum("btd,dh->bth", (64, 8), rngs=nnx.Rngs(0)),
  }
  for name, layer in layers.items():
    if packed:
      layer.pack()
    x = X[None] if name == "QQEinsum" else X
    table = nnx.tabulate(layer, x, console_kwargs={"width": 200, "force_terminal": False})
    assert name in table and ("packed: uint32[8,8]" if packed else "kernel: float32[64,") in table
