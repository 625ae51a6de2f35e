"""`QuantizedWeight.take`: a table of embeddings that is quantized, looked up in."""

from __future__ import annotations

import doctest

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from tests.support import checkpoints

N, K = 50, 64


def table(mode, rng, global_scale=None):
  """A weight of random bytes, and its numbers in float64."""
  make = checkpoints.mxfp8 if mode == "mxfp8" else checkpoints.nvfp4
  codes, scales, values = make(rng, N, K)
  if mode == "mxfp4":
    scales = rng.integers(120, 134, (N, K // 32)).astype(np.uint8)
    elements = checkpoints.E2M1_VALUES[np.stack([codes & 15, codes >> 4], -1).reshape(N, K)]
    values = elements * np.exp2(np.repeat(scales, 32, 1) - 127.0)
  packed = codes.view(np.uint8).view("<u4")
  if global_scale is not None:
    values = values * (np.float64(global_scale) / 2688)
    global_scale = np.float32(global_scale)
  return jaxqq.QuantizedWeight(packed, scales, mode, global_scale, "float32"), values


@pytest.mark.parametrize(
  ("mode", "global_scale"), [("nvfp4", None), ("nvfp4", 3.0), ("mxfp8", None), ("mxfp4", None)]
)
def test_rows_are_those_of_the_weight(mode, global_scale):
  weight, values = table(mode, np.random.default_rng(0), global_scale)
  rows = np.array([[3, 0, -1], [49, 2, 2]])
  out = weight.take(rows)
  assert (out.dtype, out.shape) == (np.float32, (2, 3, K))
  np.testing.assert_allclose(out, values[rows], rtol=2e-7, atol=0)
  assert weight.take(np.int32(7), "bfloat16").shape == (K,)
  assert weight.take(jnp.zeros((0, 2), jnp.uint8)).shape == (0, 2, K)
  # As jnp.take: what is not there is NaN.
  wide = np.int64([2**32, -(2**32) - 1, 2**31])
  assert np.isnan(weight.take(wide)).all() and np.isnan(weight.take(np.uint64(2**63))).all()
  gone = np.asarray(weight.take(jnp.array([N, -N - 1, -N])))
  assert np.isnan(gone).all(axis=1).tolist() == [True, True, False]


def shapes(jaxpr):
  """Of all that a jaxpr computes, and the jaxprs in it."""
  found = {v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars}
  for eqn in jaxpr.eqns:
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      found |= shapes(inner)
  return found


def test_only_the_rows_that_are_taken_are_dequantized():
  weight, _ = table("nvfp4", np.random.default_rng(0), 3.0)
  of_take = shapes(jax.make_jaxpr(lambda w, i: w.take(i))(weight, jnp.array([1, 2])).jaxpr)
  of_all = shapes(jax.make_jaxpr(lambda w, i: w.dequantize()[i])(weight, jnp.array([1, 2])).jaxpr)
  assert (2, K) in of_take and (N, K) not in of_take
  assert (N, K) in of_all


def test_a_global_scale_for_each_row():
  weight, _ = table("nvfp4", np.random.default_rng(0), 3.0)
  amax = jnp.arange(1, N + 1, dtype=jnp.float32)
  leaves, tree = jax.tree.flatten(weight)
  of_rows = jax.tree.unflatten(tree, [*leaves[:2], amax])
  rows = np.array([[4, -1]])
  wanted = [
    jaxqq.QuantizedWeight(*leaves[:2], "nvfp4", amax[i], "float32").take(jnp.array(i))
    for i in (4, N - 1)
  ]
  np.testing.assert_array_equal(of_rows.take(rows), np.stack(wanted)[None])


@pytest.mark.parametrize(
  ("rows", "options", "error", "words"),
  [
    (jnp.ones(3), {}, TypeError, r"rows must be integers, got float32 of shape \(3,\)"),
    ([1, 2], {}, TypeError, "rows must be a numpy or JAX array, got list"),
    (jnp.array([1]), {"dtype": "int8"}, TypeError, "dtype must be float32.*'int8'"),
  ],
)
def test_what_take_refuses(rows, options, error, words):
  weight, _ = table("nvfp4", np.random.default_rng(0))
  with pytest.raises(error, match=f"^QuantizedWeight.take: {words}"):
    weight.take(rows, **options)


def test_take_of_a_stack():
  stack = jaxqq.QuantizedWeight(np.zeros((3, 8, 8), np.uint32), np.zeros((3, 8, 4), np.uint8))
  with pytest.raises(ValueError, match=r"two dimensions.*got shape \(3, 8, 64\).*w\[i\]"):
    stack.take(jnp.array([1]))
  assert stack[1].take(jnp.array([1])).shape == (1, 64)


def test_the_example():
  names = {"jnp": jnp, "jaxqq": jaxqq}
  text = jaxqq.QuantizedWeight.take.__doc__
  assert all(part in text for part in ("Args:", "Returns:", "Raises:", "Example:", "Source:"))
  example = doctest.DocTestParser().get_doctest(text, names, "take", None, 0)
  assert doctest.DocTestRunner().run(example).failed == 0
