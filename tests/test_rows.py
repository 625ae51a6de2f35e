"""Rows of x that do not depend on one another: global_scale_x="row"."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxqq
from tests.support import oracle
from tests.support.jaxprs import count
from tests.support.messages import check_sentence
from tests.support.operands import amax, vjp

pytestmark = pytest.mark.usefixtures("quick_compiles")
RNG = np.random.default_rng(21)
W = oracle.random(RNG, (24, 64), "float32")
P = PartitionSpec
by_rows = jax.jit(
  functools.partial(jaxqq.qqmm, global_scale_x="row", global_scale_w="amax"),
  static_argnames="backward",
)
# From one end of each type to the other; the last two keep clear of results that are infinite.
SIZES = {
  "float32": [1, 1e-36, 3e-20, 1e-3, 1e5, 1e20, 1e34],
  "bfloat16": [1, 1e-36, 3e-20, 1e-3, 1e5, 1e20, 1e34],
  "float16": [1, 3e-7, 1e-5, 1e-3, 10, 100, 300],
}


def rows(dtype, k=64):
  x = oracle.random(RNG, (7, k), "float32") * np.float32(SIZES[dtype])[:, None]
  return x.astype(oracle.DTYPES[dtype])


def power_of(row):
  """The global scale that a row has: the smallest 2688 * 2**e that its amax does not exceed."""
  largest = float(np.max(np.abs(row.astype(np.float64))))
  return 2688 * 2.0 ** np.ceil(np.log2(largest / 2688))


def x_hat(x):
  """Each row by itself, in float64, where its power of two is exact."""
  powers = np.array([power_of(row) for row in x])[:, None] / 2688
  return oracle.round_trip((x.astype(np.float64) / powers).astype(np.float32), "nvfp4") * powers


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_every_row_is_in_reach(dtype):
  x = rows(dtype)
  out = by_rows(x, W)
  assert out.dtype == dtype
  w_hat = oracle.round_trip(W, "nvfp4", amax(W))
  exact, mag = oracle.product(x_hat(x), w_hat)
  if dtype == "float16":  # results below its normal numbers are rounded to multiples of 2**-24
    exact, mag, out = exact[2:], mag[2:], out[2:]
  oracle.assert_within_bound(np.asarray(out), exact, mag)
  whole = jaxqq.qqmm(x, W, global_scale_x="amax", global_scale_w="amax")
  assert dtype == "float16" or not np.asarray(whole[3]).any()  # beside the largest row
  weight = jaxqq.quantize_weight(W)
  np.testing.assert_array_equal(jaxqq.qqmm(x, weight, global_scale_x="row"), by_rows(x, W))


@pytest.mark.parametrize("garbage", [1e30, np.nan, 0], ids=str)
def test_rows_of_padding_touch_no_other(garbage):
  x = rows("float32")
  want = np.asarray(by_rows(x, W))
  padded = np.concatenate([x, np.full((2, 64), garbage, np.float32)])
  got = np.asarray(by_rows(padded, W))
  np.testing.assert_array_equal(got[:7], want)
  if garbage != 1e30:
    assert (np.isnan(got[7:]) if garbage else got[7:] == 0).all()
  one = jaxqq.qqmm(padded, W, global_scale_x="amax", global_scale_w="amax")
  if garbage:
    assert oracle.relative_error(one[:3], want[:3].astype(np.float64)) > 0.9 or np.isnan(one).all()
  # One row by itself, and a vector.
  np.testing.assert_array_equal(by_rows(x[2], W), want[2])


@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_gradients(backward):
  x = rows("float32")[:3] / np.float32([[1], [1e-36], [1e-20]])
  g = oracle.random(RNG, (3, 24), "float32")
  dx, dw = vjp(lambda x, w: by_rows(x, w, backward=backward), x, W, g=g)
  want = g.astype(np.float64) @ W, g.T.astype(np.float64) @ x
  limit = 1e-6 if backward == "straight_through" else 0.3
  for a, b in zip((dx, dw), want, strict=True):
    assert oracle.relative_error(a, b) <= limit
  _, tangent = jax.jvp(lambda x: by_rows(x, W, backward=backward), (x,), (x,))
  assert oracle.relative_error(tangent, x.astype(np.float64) @ W.T) <= 1e-6


def test_transforms_and_batches():
  x = rows("float32").reshape(7, 1, 64)
  want = by_rows(x[:, 0], W)[:, None]
  for f, w in (
    (by_rows, W),
    (jax.vmap(by_rows, (0, None)), W),
    (jax.vmap(by_rows), np.stack([W] * 7)),
  ):
    np.testing.assert_array_equal(jax.jit(f)(x, w), want)
  assert count(jax.make_jaxpr(by_rows)(x, W).jaxpr, "qqmm") == 1
  assert jaxqq.explain(x, W, global_scale_x="row", global_scale_w="amax", device="cpu")
  # Without a scale of w, and in mode's own words.
  small = rows("float32")
  oracle.assert_within_bound(
    np.asarray(jaxqq.qqmm(small, W, global_scale_x="row")),
    *oracle.product(x_hat(small), oracle.round_trip(W, "nvfp4")),
  )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_split_over_devices(kind):
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
  x = np.concatenate([rows("float32"), rows("float32")[:1]])
  placed = jax.device_put(x, NamedSharding(mesh, P("a", "b")))
  w = jax.device_put(W, NamedSharding(mesh, P(None, None)))
  with jax.set_mesh(mesh):
    got = by_rows(placed, w)
  np.testing.assert_allclose(got, by_rows(x, W), rtol=1e-3)


def test_layers_and_contractions():
  x = rows("float32")
  want = by_rows(x, W)
  dot_general = jaxqq.dot_general("nvfp4", global_scale="row")
  np.testing.assert_array_equal(dot_general(x, W, (((1,), (1,)), ((), ()))), want)
  layer = jaxqq.nn.QQLinear(64, 24, use_bias=False, global_scale="row", rngs=nnx.Rngs(0))
  layer.kernel[...] = jnp.asarray(W.T)
  np.testing.assert_array_equal(layer(x), want)
  layer.pack()
  np.testing.assert_array_equal(layer(x), want)
  # Of a contraction with batch axes, and several axes that are summed over.
  xs = x.reshape(1, 7, 2, 32)
  ws = W.reshape(1, 24, 2, 32)
  out = dot_general(xs, ws, (((2, 3), (2, 3)), ((0,), (0,))))
  np.testing.assert_allclose(out[0], want, rtol=1e-3)


@pytest.mark.parametrize(
  ("words", "how"),
  [
    (["global_scale_x", "'mxfp8'"], {"global_scale_x": "row", "mode": "mxfp8"}),
    (["global_scale_w", "'row'", "'amax'"], {"global_scale_x": "row", "global_scale_w": "row"}),
    (["global_scale_x", "'rows'", "'row'"], {"global_scale_x": "rows", "global_scale_w": "amax"}),
  ],
)
def test_bad_input(words, how):
  with pytest.raises(ValueError) as caught:
    jaxqq.qqmm(np.ones((2, 64), np.float32), W, **how)
  check_sentence(str(caught.value), "qqmm", words)
