"""Inside of shard_map, its default checks on, with collectives around the product."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxqq
from tests.support.operands import MODES, arguments, data
from tests.support.sharding import GRADIENTS_CLOSE, QUICK, collectives, mesh


def gathered_w(product):
  """Fully sharded data parallel: w is split on N, and gathered where it is used."""

  def f(x, *w):
    gather = functools.partial(lax.all_gather, axis_name="data", axis=0, tiled=True)
    return product(x, *(gather(a) for a in w))

  return f, (P("data"), P("data")), P("data")


def summed(product):
  """Row-parallel."""
  return (
    lambda x, *w: lax.psum(product(x, *w), "tensor"),
    (P("data", "tensor"), P(None, "tensor")),
    P("data"),
  )


def scattered(product):
  """Row-parallel, the sum split on N."""

  def f(x, *w):
    return lax.psum_scatter(product(x, *w), "tensor", scatter_dimension=1, tiled=True)

  return f, (P("data", "tensor"), P(None, "tensor")), P("data", "tensor")


def rotated(product):
  """Column-parallel, x going round: every device multiplies every part of x with its w."""

  def f(x, *w):
    size = lax.axis_size("tensor")
    turn = [(i, (i + 1) % size) for i in range(size)]
    outs = []
    for _ in range(size):
      outs.append(product(x, *w))
      x = lax.ppermute(x, "tensor", turn)
    at = lax.axis_index("tensor")
    order = jnp.mod(at - jnp.arange(size), size)
    return (
      jnp.zeros((size, *outs[0].shape))
      .at[order]
      .set(jnp.stack(outs))
      .reshape(-1, outs[0].shape[-1])
    )

  return f, (P("tensor"), P("tensor")), P(None, "tensor")


def table():
  """Jitted, packed and not; what gathers and what sums eagerly too."""
  for around in (gathered_w, summed, scattered, rotated):
    for packed in (False, True):
      eager = (around, packed) in ((gathered_w, True), (summed, False))
      for jit in (False, True) if eager else (True,):
        name = f"{around.__name__}" + "-packed" * packed + "-eager" * (not jit)
        yield pytest.param(around, packed, jit, id=name)


@QUICK
@pytest.mark.parametrize(("around", "packed", "jit"), list(table()))
def test_collectives_around(around, packed, jit):
  mode = MODES[packed]
  x, w = data((16, 128), (32, 128))
  args = arguments(w, mode, packed)
  f, (x_spec, w_spec), out_spec = around(functools.partial(jaxqq.qqmm, mode=mode))
  specs = (x_spec, *(w_spec for _ in args))
  f = jax.shard_map(f, mesh=mesh(), in_specs=specs, out_specs=out_spec)
  out = (jax.jit(f) if jit else f)(x, *args)
  np.testing.assert_allclose(out, jaxqq.qqmm(x, *args, mode=mode), **GRADIENTS_CLOSE)


@QUICK
@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_a_step_of_training(backward):
  """Gradients inside, of column- then row-parallel products, and of a sum over data."""
  x, up, down = data((256, 64), (128, 64), (64, 128))
  product = functools.partial(jaxqq.qqmm, mode="mxfp8", backward=backward)

  def loss(weights, x, total=lambda a: a, over_data=lambda a: a):
    h = jnp.tanh(product(x, weights["up"]))
    return over_data(jnp.sum(total(product(h, weights["down"])) ** 2))

  weights = {"up": up, "down": down}
  want = jax.jit(jax.value_and_grad(loss))(weights, x)

  def inside(weights, x):
    total, over_data = (lambda a: lax.psum(a, "tensor")), (lambda a: lax.psum(a, "data"))
    return jax.value_and_grad(loss)(weights, x, total, over_data)

  specs = {"up": P("tensor"), "down": P(None, "tensor")}
  step = jax.shard_map(inside, mesh=mesh(), in_specs=(specs, P("data")), out_specs=(P(), specs))
  got = jax.jit(step)(weights, x)
  # A rounding may move a code to its neighbour.
  np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
  for name in weights:
    error = np.linalg.norm(got[1][name] - want[1][name]) / np.linalg.norm(want[1][name])
    assert error < 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_manual_over_some_axes_only(mode):
  """XLA splits over the others, by itself."""
  x, w = data((16, 128), (32, 128))
  f = functools.partial(jaxqq.qqmm, mode=mode)
  over_data = jax.shard_map(
    f, mesh=mesh(), in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"}
  )
  np.testing.assert_allclose(jax.jit(over_data)(x, w), f(x, w), **GRADIENTS_CLOSE)


@QUICK
def test_in_quantized_backward_the_amax_is_that_of_a_shard():
  """Documented: with global scales, a device's part of g is quantized by its own amax."""
  x, w, g = data((64, 64), (32, 64), (64, 32))
  g = g * jnp.where(jnp.arange(64) < 16, 2.0**12, 1.0)[:, None]
  amax = lambda a: jnp.max(jnp.abs(a))  # noqa: E731

  def dx(x, g, scale_x, scale_w):
    f = lambda x: jaxqq.qqmm(  # noqa: E731
      x, w, global_scale_x=scale_x, global_scale_w=scale_w, backward="quantized"
    )
    return jax.vjp(f, x)[1](g)[0]

  scales = amax(x), amax(w)
  split = jax.shard_map(
    dx, mesh=mesh(), in_specs=(P("data"), P("data"), P(), P()), out_specs=P("data")
  )
  got = jax.jit(split)(x, g, *scales)
  of_rows = jax.jit(dx)
  want = np.concatenate([of_rows(x[i : i + 16], g[i : i + 16], *scales) for i in range(0, 64, 16)])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_what_moves_is_what_was_written():
  x, w = data((16, 128), (32, 128))
  f, (x_spec, w_spec), out_spec = scattered(jaxqq.qqmm)
  f = jax.shard_map(f, mesh=mesh(), in_specs=(x_spec, w_spec), out_specs=out_spec)
  assert collectives(jax.jit(f).lower(x, w).compile()) == [("reduce-scatter", "f32")]
