"""Products of experts on meshes of explicit axes: shardings in the types, and out_sharding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from jaxqq._compat import ShardingTypeError
from tests.support import oracle, ragged
from tests.support.messages import check_sentence
from tests.support.operands import data
from tests.support.sharding import (
  CLOSE,
  GRADIENTS_CLOSE,
  QUICK,
  explicit_mesh,
  gathered,
  mesh,
  place,
  place_explicit,
)

M, G, N, K = 24, 4, 32, 64
SIZES = np.int32([3, 0, 9, 10])  # below M
OF_ROW = ragged.groups_of(SIZES, M)
X, W, COTANGENT = data((M, K), (G, N, K), (M, N))
CHOSEN = np.random.default_rng(0).integers(0, G, (M, 2)).astype(np.int32)
mxfp8 = functools.partial(jaxqq.ragged_qqmm, mode="mxfp8")


def placed(w, spec):
  """Of a weight, each array as its own axes are; a global scale with its expert."""
  return jax.tree.map(lambda a: place_explicit(a, P(*tuple(spec)[: a.ndim])), w)


def spec_of(out):
  return (*out.sharding.spec, *[None] * (out.ndim - len(out.sharding.spec)))


def with_gradients(product):
  """A program of x, w and others: the product, dx and dw (of a packed w none), and its text."""

  def run(x, w, *others):
    packed = isinstance(w, jaxqq.QuantizedWeight)
    pull_args, fixed = ((x,), (w,)) if packed else ((x, w), ())
    out, pull = jax.vjp(lambda x, *w: product(x, *w, *fixed, *others), *pull_args)
    g = jnp.asarray(COTANGENT if out.ndim == 2 else np.resize(COTANGENT, out.shape))
    sharding = jax.typeof(out).sharding
    return out, *pull(g if sharding.mesh.empty else jax.sharding.reshard(g, sharding))

  return run


def compiled(f, *args):
  executable = jax.jit(f).lower(*args).compile()
  return executable, executable(*args)


@functools.cache
def on_one_device(kind):
  w = jaxqq.quantize_weight(W) if kind == "packed" else W
  return w, jax.jit(with_gradients(KINDS[kind]))(X, w, SIZES)


KINDS = {
  "mxfp8": mxfp8,
  "packed": jaxqq.ragged_qqmm,
  "weights": functools.partial(jaxqq.ragged_quantized_matmul, mode="mxfp4"),
  "quantized": functools.partial(mxfp8, backward="quantized"),
}
OF_K = P(None, "tensor"), P(None, None, "tensor")
# What is multiplied; x (M, K), w (G, N, K), sizes; out_sharding; how the result is split
CASES = {
  "rows and experts": ("mxfp8", P("tensor"), P("data"), P("data"), None, ("tensor", None)),
  "the same axis": ("weights", P("data"), P("data"), P(), None, ("data", None)),
  "rows and columns": ("quantized", P("data"), P(None, "tensor"), P(), None, ("data", "tensor")),
  "K of x": ("packed", P(None, "tensor"), P("data"), P("data"), None, (None, None)),
  "K of both": ("mxfp8", *OF_K, P(), P("data"), ("data", None)),
}


@QUICK
@pytest.mark.parametrize("name", CASES)
def test_product_and_gradients(name):
  """Gradients are split as their operands, and no weight is gathered."""
  kind, of_x, of_w, of_sizes, out_sharding, want = CASES[name]
  w, expected = on_one_device(kind)
  product = functools.partial(KINDS[kind], out_sharding=out_sharding)
  args = place_explicit(X, of_x), placed(w, of_w), place_explicit(SIZES, of_sizes)
  with jax.set_mesh(explicit_mesh()):
    executable, got = compiled(with_gradients(product), *args)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, **GRADIENTS_CLOSE)
  assert spec_of(got[0]) == want
  for gradient, operand in zip(got[1:], args, strict=False):
    assert spec_of(gradient) == spec_of(operand)
  if name != "rows and columns":  # there dw of the quantized backward is quantized along all rows
    assert not any(len(shape) == 3 for shape in gathered(executable))


@pytest.mark.parametrize("kind", ["mxfp8", "packed", "weights"])
def test_what_is_split_is_compared_with(kind):
  """The product of one device within the bound of float64, its gradients straight-through."""
  _, (out, *gradients) = on_one_device(kind)
  mode = {"mxfp8": "mxfp8", "packed": "nvfp4", "weights": "mxfp4"}[kind]
  scales = np.abs(W).max((1, 2)) if kind == "packed" else [None] * G
  w_hat = np.stack([oracle.round_trip(a, mode, s) for a, s in zip(W, scales, strict=True)])
  x_hat = np.float64(X) if kind == "weights" else oracle.round_trip(X, mode)
  oracle.assert_within_bound(np.asarray(out), *ragged.product(x_hat, w_hat, OF_ROW))
  of_dx = np.float64(W) if kind == "mxfp8" else w_hat
  g = np.where(OF_ROW[:, None] < 0, 0, np.float64(COTANGENT))
  dx = np.stack([row @ of_dx[group] for row, group in zip(g, OF_ROW, strict=True)])
  rows = [ragged.rows_of(OF_ROW, group) for group in range(G)]
  dw = np.stack([g[own].T @ np.float64(X)[own] for own in rows])
  for got, exact in zip(gradients, (dx, dw), strict=False):
    assert oracle.relative_error(got, exact) < 1e-6


@QUICK
def test_automatic_axes():
  """The result goes where it is asked for, of ragged and gathered products."""
  sharding = NamedSharding(mesh(), P(None, "tensor"))
  for product, args, want in (
    (mxfp8, (SIZES,), on_one_device("mxfp8")[1][0]),
    (tokens, (CHOSEN,), tokens_on_one_device()[0]),
  ):
    f = jax.jit(functools.partial(product, out_sharding=sharding))
    out = f(place(X, P("data")), place(W, P("data")), *args)
    np.testing.assert_allclose(out, want, **CLOSE)
    assert spec_of(out)[:2] == (None, "tensor")


@QUICK
def test_vmap():
  """The batch axis is split as well, with sizes of its own, and no device has it all."""
  x, sizes = np.stack([X, 2 * X, -X, X]), np.stack([SIZES, SIZES[::-1], 0 * SIZES, SIZES + 3])
  run = jax.vmap(mxfp8, (0, None, 0))
  want = jax.jit(run)(x, W, sizes)
  with jax.set_mesh(explicit_mesh()):
    args = (place_explicit(x, P("data", "tensor")), place_explicit(W, P()))
    executable, out = compiled(run, *args, place_explicit(sizes, P("data")))
  np.testing.assert_allclose(out, want, **CLOSE)
  assert spec_of(out) == ("data", "tensor", None) and not gathered(executable)


def test_nothing_to_sum():
  """K = 0: zeros. A mesh of one device, too, has its types kept."""
  with jax.set_mesh(explicit_mesh()):
    out = mxfp8(place_explicit(X[:, :0], P("data")), place_explicit(W[..., :0], P("tensor")), SIZES)
  assert spec_of(out) == ("data", None) and not np.asarray(out).any()
  one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(one):
    out = mxfp8(jax.device_put(X, NamedSharding(one, P("data"))), W, SIZES)
  assert spec_of(out) == ("data", None)
  np.testing.assert_allclose(out, on_one_device("mxfp8")[1][0], **CLOSE)


# Gathered


def tokens(x, w, chosen, **how):
  """Each token by two experts: (M, 2, 1, N)."""
  of_x = np.arange(M)[:, None]
  return jaxqq.gather_qqmm(x[:, None], w, None, of_x, chosen, mode="mxfp8", **how)


@functools.cache
def tokens_on_one_device():
  return jax.jit(with_gradients(tokens))(X, W, CHOSEN)


@QUICK
def test_gathered_tokens_and_their_gradients():
  """Indices say how tokens are split, w how columns are."""
  args = place_explicit(X, P("data")), place_explicit(W, P(None, "tensor"))
  with jax.set_mesh(explicit_mesh()):
    got = jax.jit(with_gradients(tokens))(*args, place_explicit(CHOSEN, P("data")))
  for a, b in zip(got, tokens_on_one_device(), strict=True):
    np.testing.assert_allclose(a, b, **GRADIENTS_CLOSE)
  assert spec_of(got[0]) == ("data", None, None, "tensor")
  assert [spec_of(a) for a in got[1:]] == [("data", None), (None, "tensor", None)]


@QUICK
def test_gathered_where_k_is_split_in_both():
  """Without indices batch axes say it, but of K nothing does."""
  x, w = X[:G, None], W
  args = place_explicit(x, P("data", None, "tensor")), place_explicit(w, P("data", None, "tensor"))
  product = functools.partial(jaxqq.gather_qqmm, mode="mxfp8")
  with jax.set_mesh(explicit_mesh()):
    one = jax.eval_shape(product, args[0], place_explicit(w, P("data")))
    out = jax.jit(functools.partial(product, out_sharding=P(None, None, "data")))(*args)
  assert one.sharding.spec == P("data", None, None)
  assert spec_of(out) == (None, None, "data")
  np.testing.assert_allclose(out, jaxqq.qqmm(x, w, mode="mxfp8"), **CLOSE)


# Errors

PRODUCTS = {
  "ragged_qqmm": lambda x, w: jaxqq.ragged_qqmm(x, w, SIZES),
  "ragged_quantized_matmul": lambda x, w: jaxqq.ragged_quantized_matmul(x, w, SIZES),
  "gather_qqmm": lambda x, w: jaxqq.gather_qqmm(x, w, None, None, np.array([1])),
}
OPEN = {
  "K": (*OF_K, ["both split along K", "f32[24,64@tensor]"]),
  "one axis": (P("data"), P(None, "data"), ["two axes of the output", "f32[4,32@data,64]"]),
}


@pytest.mark.parametrize("function", PRODUCTS)
@pytest.mark.parametrize("name", OPEN)
def test_what_types_leave_open_is_refused(name, function):
  of_x, of_w, words = OPEN[name]
  with jax.set_mesh(explicit_mesh()), pytest.raises(ShardingTypeError) as caught:
    jax.eval_shape(PRODUCTS[function], place_explicit(X, of_x), place_explicit(W, of_w))
  words = [*words, "out_sharding=", "jax.sharding.reshard"]
  check_sentence(str(caught.value), function, words)


def test_batch_axes_that_are_split_differently():
  x, w = np.ones((4, 1, K), np.float32), W
  args = place_explicit(x, P("data")), place_explicit(w, P("tensor"))
  with jax.set_mesh(explicit_mesh()), pytest.raises(ShardingTypeError) as caught:
    jax.eval_shape(jaxqq.gather_qqmm, *args)
  check_sentence(str(caught.value), "gather_qqmm", ["'data'", "'tensor'", "out_sharding="])


@pytest.mark.parametrize("put", [place, place_explicit])
def test_explain_tells_what_one_device_multiplies(put):
  x, sentence = (
    np.asarray(X, jnp.bfloat16),
    "Split over 8 devices ({'data': 4, 'tensor': 2}): each ",
  )
  explained = functools.partial(jaxqq.explain, jaxqq.ragged_qqmm, device="cuda")
  text = explained(put(x, P("tensor")), put(W, P("data")), SIZES)
  part = "multiplies x (12, 64) with w (1, 32, 64), and results are summed over 'data'."
  assert text.endswith(sentence + part)
  text = explained(put(x, P("data", "tensor")), put(W, P(None, None, "tensor")), SIZES)
  part = "multiplies x (6, 32) with w (4, 32, 32), and results are summed over 'tensor'."
  assert text.endswith(sentence + part)
  assert "explicit" not in text  # of a device's part no kernel is refused for its sharding


def test_explain_takes_it():
  sharding = NamedSharding(explicit_mesh(), P())
  for product in (jaxqq.ragged_qqmm, jaxqq.ragged_quantized_matmul):
    explained = functools.partial(jaxqq.explain, product, X, W, SIZES)
    assert explained(out_sharding=sharding).startswith(f"{product.__name__} nvfp4")
    with pytest.raises(TypeError) as caught:
      explained(out_sharding="data")
    check_sentence(str(caught.value), "explain", ["out_sharding", "str"])
