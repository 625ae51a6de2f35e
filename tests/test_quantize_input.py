"""Products not told whether x is quantized: `dot_general`, layers, weight @ x, checkpoints.

Each does as its `QuantizedWeight` says, or as it was made to.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxqq
import jaxqq.nn
from jaxqq import _weight, checkpoint
from tests.support import oracle, schemes
from tests.support.messages import check_sentence
from tests.support.operands import data, vjp

X, KERNEL = (np.asarray(a) for a in data((5, 64), (64, 32), seed=41))
DENSE = (((1,), (0,)), ((), ()))
OF_WEIGHT = (((1,), (1,)), ((), ()))
SCALE = np.abs(KERNEL).max()
# What each product of X and KERNEL is in nvfp4, whose global scale is the kernel's amax.
W_HAT = oracle.round_trip(KERNEL.T, "nvfp4", SCALE)
RIGHT = {
  False: oracle.product(X.astype(np.float64), W_HAT),
  True: oracle.product(oracle.round_trip(X, "nvfp4"), W_HAT),
}


def check(out, quantize_input):
  """Inside the bound of one product, and not of the other."""
  oracle.assert_within_bound(np.asarray(out), *RIGHT[quantize_input])
  exact, mag = RIGHT[not quantize_input]
  assert (np.abs(np.asarray(out) - exact) > 2.0**-10 * mag).any()


def weight_that(quantize_input):
  return jaxqq.quantize_weight(KERNEL.T, quantize_input=quantize_input)


# dot_general


@pytest.mark.parametrize("choice", [None, True, False])
def test_dot_general(choice):
  dot_general = jaxqq.dot_general("nvfp4", quantize_input=choice)
  check(dot_general(X, KERNEL, DENSE), choice is not False)
  check(dot_general.einsum("mk,kn->mn", X, KERNEL), choice is not False)
  for said in (True, False):
    weight = weight_that(said)
    wanted = said if choice is None else choice
    check(dot_general(X, weight, OF_WEIGHT), wanted)
    check(dot_general.einsum("mk,nk->mn", X, weight), wanted)
    check(dot_general.packed(X, weight, (1,), (), (32,)), wanted)


@pytest.mark.parametrize("scale", ["weight", "amax", "row"])
def test_what_is_said_of_x_holds_where_it_is_quantized(scale):
  check(jaxqq.dot_general(global_scale=scale, quantize_input=False)(X, KERNEL, DENSE), False)


def test_gradients_of_a_kernel_whose_contracted_axis_comes_first():
  g = np.asarray(data((5, 32), seed=42)[0])
  dot_general = jaxqq.dot_general("mxfp4", quantize_input=False)
  dx, dw = vjp(lambda x, w: dot_general(x, w, DENSE), X, KERNEL, g=g)
  w_hat = oracle.round_trip(KERNEL.T, "mxfp4")
  assert oracle.relative_error(dx, g.astype(np.float64) @ w_hat) <= 1e-6
  assert oracle.relative_error(dw, X.astype(np.float64).T @ g) <= 1e-6


def test_two_of_the_same_are_one():
  make = functools.partial(jaxqq.dot_general, "mxfp8")
  assert make(quantize_input=False) == make(quantize_input=False) != make()
  assert hash(make(quantize_input=False)) == hash(make(quantize_input=False))


# QuantizedWeight


def test_the_weight_keeps_what_it_says():
  weight = weight_that(False)
  assert repr(weight).endswith("with global_scale, quantize_input=False)")
  assert "quantize_input" not in repr(weight_that(True))
  stack = jax.tree.map(lambda a: a[None], weight)
  for kept in (weight[:16], stack[0], jaxqq.concatenate([weight, weight])):
    assert not kept.quantize_input
  assert jax.tree.structure(weight) != jax.tree.structure(weight_that(True))
  other = dataclasses.replace(weight, quantize_input=True)
  assert jax.tree.structure(other) == jax.tree.structure(weight_that(True))
  check((weight @ X.T).T, False)
  check((other @ X.T).T, True)
  check(jaxqq.qqmm(X, weight), True)  # which says so itself
  check(jaxqq.quantized_matmul(X, other), False)


def test_an_exported_program_keeps_it():
  weight = weight_that(False)
  program = jax.export.export(jax.jit(lambda w, x: w @ x))(weight, X.T)
  program = jax.export.deserialize(program.serialize())
  check(program.call(weight, X.T).T, False)
  with pytest.raises(ValueError, match=r"quantize_input|[Pp]ytree|structure"):
    program.call(weight_that(True), X.T)
  assert _weight._deserialized(b'["mxfp8", "float32"]') == ("mxfp8", np.dtype("float32"), True)


# Layers


@pytest.mark.parametrize("quantize_input", [True, False])
def test_layers_of_nnx(quantize_input):
  linear = nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0))
  linear.kernel.set_value(jnp.asarray(KERNEL))
  layer = jaxqq.nn.QQLinear.from_linear(linear, quantize_input=quantize_input)
  unpacked = layer(X)
  check(unpacked, quantize_input)
  layer.pack()
  assert layer.weight.quantize_input is quantize_input
  np.testing.assert_array_equal(layer(X), unpacked)
  layer.set_weight(weight_that(not quantize_input))
  check(layer(X), not quantize_input)
  layer.unpack()
  check(layer(X), not quantize_input)
  check(jaxqq.nn.QQLinear.from_weight(weight_that(quantize_input))(X), quantize_input)
  chosen = jaxqq.nn.QQLinear.from_weight(weight_that(True), quantize_input=quantize_input)
  check(chosen(X), quantize_input)


@pytest.mark.parametrize("packed", [True, False])
def test_a_whole_model_of_nnx(packed):
  model = nnx.List([nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0))])
  model[0].kernel.set_value(jnp.asarray(KERNEL))
  jaxqq.nn.quantize_model(model, packed=packed, quantize_input=False)
  check(model[0](X), False)


def test_layers_of_linen():
  params = {"kernel": jnp.asarray(KERNEL)}
  for choice in (None, True, False):
    layer = jaxqq.nn.QQDense(32, use_bias=False, quantize_input=choice)
    check(layer.apply({"params": params}, X), choice is not False)
    run = jaxqq.nn.quantized_apply(linen.Dense(32, use_bias=False), "nvfp4", quantize_input=choice)
    check(run({"params": params}, X), choice is not False)
    for said in (True, False):
      packed, _ = jaxqq.nn.quantize_params(params, quantize_input=said)
      wanted = said if choice is None else choice
      check(run({"params": packed}, X), wanted)
      check(layer.apply({"params": packed}, X), wanted)


# Checkpoints


class Encoder(nnx.Module):
  """Embeddings of length 1, of two layers side by side."""

  def __init__(self):
    self.up, self.down = (nnx.Linear(64, 8, use_bias=False, rngs=nnx.Rngs(i)) for i in range(2))

  def __call__(self, x):
    out = jnp.concatenate([self.up(x), self.down(x)], -1)
    return out / jnp.linalg.norm(out, axis=-1, keepdims=True)


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4"])  # NVFP4A16, and mxfp4 of the same project
def test_embeddings_are_those_of_the_dequantized_weights(mode, tmp_path):
  group = schemes.ct_group(mode, ["Linear"], weight_only=True)
  layer = schemes.compressed_tensors(mode, weight_only=True)
  made = schemes.compressed(tmp_path / "m", {"up": layer, "down": layer}, [group])
  w_hat = []
  for name in ("up.weight", "down.weight"):
    want = made.wants[name]
    values = oracle.values(oracle.unpack(want.packed, mode), want.scales, mode)
    w_hat.append(values * float(want.amax.get("global_scale", 2688)) / 2688)
  x = X.astype(oracle.DTYPES["bfloat16"])
  out = x.astype(np.float64) @ np.concatenate(w_hat).T
  right = out / np.linalg.norm(out, axis=-1, keepdims=True)
  model = checkpoint.load_into(nnx.eval_shape(Encoder), tmp_path / "m")
  found = model(jnp.asarray(x))
  assert oracle.relative_error(found, right) <= 4e-3  # bfloat16 rounds products, and quotients
  quantized = checkpoint.load_into(nnx.eval_shape(Encoder), tmp_path / "m", quantize_input=True)
  assert oracle.relative_error(quantized(jnp.asarray(x)), right) > 2e-2
  params = {name: {"kernel": jnp.zeros((64, 8))} for name in ("up", "down")}
  params = checkpoint.load_into(params, tmp_path / "m")
  run = jaxqq.nn.quantized_apply(linen.Dense(8, use_bias=False))
  parts = [run({"params": params[name]}, jnp.asarray(x)) for name in ("up", "down")]
  both = np.concatenate([np.asarray(part, np.float64) for part in parts], -1)
  assert oracle.relative_error(both, out) <= 4e-3
  layer = jaxqq.nn.QQLinear(64, 8, backward="quantized", use_bias=False, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"'up.weight'.*inputs are not quantized.*backward"):
    checkpoint.load_into(
      nnx.List([layer]), tmp_path / "m", names={"up.weight": "0.weight"}, only="up.weight"
    )


# Bad input


ERRORS = [
  ("no bool", TypeError, "dot_general", ["quantize_input", "True or False", "'no'"], lambda: jaxqq.dot_general(quantize_input="no")),
  ("quantized backward", ValueError, "dot_general", ["backward", "'quantized'", "quantize_input is False"], lambda: jaxqq.dot_general(backward="quantized", quantize_input=False)),
  ("such a weight", ValueError, "dot_general", ["backward", "quantize_input is False"], lambda: jaxqq.dot_general(backward="quantized")(X, weight_that(False), OF_WEIGHT)),
  ("a layer", ValueError, "QQLinear", ["backward", "quantize_input is False"], lambda: jaxqq.nn.QQLinear(64, 32, backward="quantized", quantize_input=False, rngs=nnx.Rngs(0))),
  ("a layer's weight", ValueError, "QQLinear", ["backward", "quantize_input is False"], lambda: jaxqq.nn.QQLinear(64, 32, backward="quantized", rngs=nnx.Rngs(0)).set_weight(weight_that(False))),
  ("a weight", TypeError, "QuantizedWeight", ["quantize_input", "0"], lambda: weight_that(0)),
  ("two of them", ValueError, "concatenate", ["quantize_input"], lambda: jaxqq.concatenate([weight_that(True), weight_that(False)])),
]  # fmt: skip


@pytest.mark.parametrize("case", ERRORS, ids=[case[0] for case in ERRORS])
def test_errors(case):
  _, error, function, words, call = case
  with pytest.raises(error) as caught:
    call()
  check_sentence(str(caught.value), function, words)
