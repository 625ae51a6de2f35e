"""The backward pass split over eight devices: the same gradients, and what moves for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from tests.support import oracle
from tests.support.operands import BACKWARDS, KINDS, Product, amax, arguments, data
from tests.support.sharding import (
  GATHERED,
  GRADIENTS_CLOSE,
  QUICK,
  SPLITS,
  collectives,
  mesh,
  place,
)

X_SPECS = {"": P(), "m": P("data"), "k": P(None, "tensor"), "m, k": P("data", "tensor")}
W_SPECS = {"": P(), "n": P("tensor"), "k": P(None, "tensor"), "n, k": P("data", "tensor")}
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])


def gradients_of(kind, backward, g, packed):
  """x, w or its packed parts -> the product, dx and, of an unquantized w, dw."""

  def gradients(x, *args):
    product = functools.partial(kind, backward=backward)
    if packed:
      out, pull = jax.vjp(lambda x: product(x, *args), x)
    else:
      out, pull = jax.vjp(product, x, *args)
    return out, *pull(g)

  return gradients


def table():
  """Every way to split x and w, every second one packed too, modes and backwards in turn.

  The usual ways, on the fly, in every mode and backward.
  """
  for i, x_split in enumerate(X_SPECS):
    for j, w_split in enumerate(W_SPECS):
      usual = (x_split, w_split) in (("m", "n"), ("m, k", "k"), ("m", "n, k"))
      for packed in (False, True) if usual or (i + j) % 2 else (False,):
        every = usual and not packed
        for kind in KINDS if every else [KINDS[(i + (j // 2 if packed else j)) % len(KINDS)]]:
          name = f"x on ({x_split}), w on ({w_split})" + ", packed" * packed
          yield pytest.param(x_split, w_split, packed, *kind, id="-".join(map(str, (name, *kind))))


TABLE = list(table())


@functools.cache
def results(packed, product, backward):
  """What a kind gives on one device, and {splits: what it gives} of all in the table.

  These are by one program, which takes half of the time to compile of so many.
  """
  x, w, g = data((128, 128), (64, 128), (128, 64))
  args = arguments(w, product.mode, packed)
  f = gradients_of(product, backward, g, packed)
  kind = (packed, product, backward)
  splits = [case.values[:2] for case in TABLE if case.values[2:] == kind]
  placed = [
    (place(x, X_SPECS[x_split]), *(place(a, W_SPECS[w_split]) for a in args))
    for x_split, w_split in splits
  ]
  found = jax.jit(lambda each: [f(*operands) for operands in each])(placed)
  return jax.jit(f)(x, *args), dict(zip(splits, found, strict=True))


@QUICK
@pytest.mark.parametrize(("x_split", "w_split", "packed", "product", "backward"), TABLE)
def test_every_way_to_split(x_split, w_split, packed, product, backward):
  want, found = results(packed, product, backward)
  for a, b in zip(found[x_split, w_split], want, strict=True):
    np.testing.assert_allclose(a, b, **GRADIENTS_CLOSE)


def moved(split, product, backward, packed, g_spec):
  """What the product and its gradients move, with gradients split as their operands are."""
  x, w, g = data((128, 256), (128, 256), (128, 128))
  x_spec, w_spec, _ = SPLITS[split]
  args = [place(a, w_spec) for a in arguments(w, product.mode, packed)]
  outs = [g_spec, x_spec] if packed else [g_spec, x_spec, w_spec]

  def f(x, g, *args):
    return gradients_of(product, backward, g, packed)(x, *args)

  out_shardings = tuple(NamedSharding(mesh(), spec) for spec in outs)
  lowered = jax.jit(f, out_shardings=out_shardings).lower(place(x, x_spec), place(g, g_spec), *args)
  return collectives(lowered.compile())


@QUICK
@PACKED
@pytest.mark.parametrize("backward", (*BACKWARDS, "weights"))
@pytest.mark.parametrize("split", ["column", "row", "columns of w"])
def test_what_moves(split, backward, packed):
  """Tensor parallelism sums; fully sharded data parallelism gathers w as it came."""
  product = Product("nvfp4" if packed else "mxfp8", backward != "weights")
  g_spec = P("data", "tensor") if split == "column" else P("data")
  found = moved(split, product, backward, packed, g_spec)
  if packed and backward == "quantized":  # the amax of g, a number
    found = [one for one in found if one != ("all-reduce", "s32")]
  if split != "columns of w":
    # Column: dx is summed over tensor. Row: the product is. Either: dw over data, as x is split.
    assert found == [("all-reduce", "f32")] * (1 if packed else 2)
  elif packed:
    assert found == GATHERED[True]  # once for both passes
  else:
    kinds = {kind for kind, _ in found}
    assert kinds == {"all-gather", "reduce-scatter" if backward == "quantized" else "all-reduce"}


@functools.cache
def with_global_scales(packed):
  """Operands, the gradients as a function, and what it gives on one device.

  In the quantized backward g has an amax too, here far larger on one device than on the others.
  """
  x, w, g = data((128, 256), (128, 256), (128, 128))
  g = g * jnp.where(jnp.arange(128) < 16, 2.0**12, 1.0)[:, None]
  scales = {"global_scale_x": amax(x), "global_scale_w": amax(w)}
  args = oracle.quantize(w, "nvfp4", amax(w)) if packed else (w,)

  def gradients(x, *args):
    product = functools.partial(jaxqq.qqmm, **scales, backward="quantized")
    if packed:
      return jax.vjp(lambda x: product(x, *args), x)[1](g)
    return jax.vjp(product, x, *args)[1](g)

  @jax.jit
  def of_small_rows(x):
    return jax.vjp(lambda x: jaxqq.qqmm(x, *args, **scales, backward="quantized"), x)[1](g[16:])[0]

  want = jax.jit(gradients)(x, *args)
  # With the amax of the small rows for those alone they would come out otherwise.
  assert not np.allclose(of_small_rows(x[16:]), want[0][16:], rtol=1e-3)
  return (x, *args), gradients, want


@QUICK
@pytest.mark.parametrize("split", ["column", "row", "rows of w"])
@PACKED
def test_global_scales_are_the_whole_tensors(split, packed):
  (x, *args), gradients, want = with_global_scales(packed)
  x_spec, w_spec, _ = SPLITS[split]
  placed = place(x, x_spec), *(place(a, w_spec) for a in args)
  for got, expected in zip(jax.jit(gradients)(*placed), want, strict=True):
    scale = np.max(np.abs(np.asarray(expected)))
    np.testing.assert_allclose(got / scale, expected / scale, rtol=1e-4, atol=1e-6)


@QUICK
@pytest.mark.parametrize(
  ("backward", "packed"),
  [
    ("straight_through", False),
    ("quantized", False),
    ("quantized", True),
    ("weights", False),
    ("weights", True),
  ],
)
def test_batch_axes_that_x_or_w_lack(backward, packed):
  """dx and dw are summed over them, wherever they are split."""
  x, w, g = data((8, 16, 64), (8, 32, 64), (8, 16, 32))
  shared_x, shared_w = x[0], w[0]
  for x_own, w_own in ((x, shared_w), (shared_x, w)):
    args = arguments(w_own, "nvfp4", packed)
    f = gradients_of(Product("nvfp4", backward != "weights"), backward, g, packed)
    spec = lambda a: P("data") if a.ndim == 3 else P(None, "tensor")  # noqa: E731
    placed = place(x_own, spec(x_own)), *(place(a, spec(a)) for a in args)
    for got, want in zip(jax.jit(f)(*placed), jax.jit(f)(x_own, *args), strict=True):
      np.testing.assert_allclose(got, want, **GRADIENTS_CLOSE)


@QUICK
@pytest.mark.parametrize("backward", BACKWARDS)
def test_second_derivatives_through_packed_w(backward):
  """Forward over reverse, and reverse over reverse."""
  x, w, v = data((32, 128), (32, 128), (32, 128))
  args = oracle.quantize(w, "mxfp8")

  def hvp(x, v, *args):
    loss = lambda x: jnp.sum(jaxqq.qqmm(x, *args, mode="mxfp8", backward=backward) ** 2)  # noqa: E731
    return jax.jvp(jax.grad(loss), (x,), (v,))[1], jax.vjp(jax.grad(loss), x)[1](v)[0]

  want = jax.jit(hvp)(x, v, *args)
  if backward == "straight_through":
    w_hat = oracle.round_trip(w, "mxfp8")
    for got in want:
      exact = 2 * np.asarray(v, np.float64) @ w_hat.T @ w_hat
      np.testing.assert_allclose(got, exact, **GRADIENTS_CLOSE)
  for split in ("column", "columns of w"):
    x_spec, w_spec, _ = SPLITS[split]
    placed = place(x, x_spec), place(v, x_spec), *(place(a, w_spec) for a in args)
    for got, expected in zip(jax.jit(hvp)(*placed), want, strict=True):
      np.testing.assert_allclose(got, expected, **GRADIENTS_CLOSE)
