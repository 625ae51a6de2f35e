"""gather_qqmm against gathered plain products: MLX's documented shapes, and what MLX lacks."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import jaxqq
from tests.support import oracle
from tests.support.operands import amax

# (batch of x, lhs_indices, batch of w, rhs_indices): those of MLX's tests, and more axes
INDICES = {
  "one x, two w": ((1,), (0,), (3,), (2, 1)),
  "lhs None of one": ((1,), None, (3,), (2, 1)),
  "lhs None": ((2,), None, (3,), (2, 1)),
  "one w": ((3,), (0, 2), (1,), (0,)),
  "both": ((5,), (0, 2), (3,), (2, 1)),
  "nothing": ((3,), None, (3,), None),
  "batch axes flattened": ((2, 2), ((3,), (1,)), (2, 3), (5, -6, 5)),
  "no batch axes": ((), None, (4,), ((3, 3), (1, 0))),
  "one matrix": ((2,), (1, 1, 0), (), None),
}
N, K = 48, 96


def gathered(batch_x, lhs, batch_w, rhs):
  """Indices of the flattened axes, broadcast."""
  lhs, rhs = (
    np.arange(int(np.prod(batch))).reshape(batch) if a is None else np.array(a)
    for a, batch in ((lhs, batch_x), (rhs, batch_w))
  )
  return np.broadcast_arrays(lhs, rhs)


def as_indices(a):
  return None if a is None else np.array(a, np.int32)


def operands(mode, name):
  """The arguments, global scales by name, and what is multiplied in float64."""
  batch_x, lhs, batch_w, rhs = INDICES[name]
  rng = np.random.default_rng(3)
  turn = list(INDICES).index(name)
  m, packed = (1, 7)[turn % 2], turn % 3 > 0
  x, w = (oracle.random(rng, (*b, n, K), "float32") for b, n in ((batch_x, m), (batch_w, N)))
  scales = {"x": None, "w": None}
  if mode == "nvfp4" and turn % 2:
    scales = {"x": amax(x), "w": amax(w)}
  how = {f"global_scale_{k}": v for k, v in scales.items() if v is not None}
  args = oracle.quantize(w, mode, scales["w"]) if packed else (w, None)
  at_x, at_w = gathered(*INDICES[name])
  hats = [
    oracle.round_trip(a, mode, scales[n]).reshape(-1, *a.shape[-2:])[at]
    for a, n, at in ((x, "x", at_x), (w, "w", at_w))
  ]
  return ((x, *args, as_indices(lhs), as_indices(rhs)), how), hats


@functools.cache
def products(mode):
  """{name: (the product, what was multiplied)}, by one program."""
  given, hats = zip(*(operands(mode, name) for name in INDICES), strict=True)
  run = jax.jit(lambda given: [jaxqq.gather_qqmm(*args, mode=mode, **how) for args, how in given])
  return dict(zip(INDICES, zip(run(given), hats, strict=True), strict=True))


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_products(mode, name):
  out, hats = products(mode)[name]
  oracle.assert_within_bound(np.asarray(out), *oracle.product(*hats), highest=True)


def test_sorted_indices_are_not_sorted():
  """24 sorted rows, three experts, a global scale for each; the same bits, and no sort."""
  rng = np.random.default_rng(4)
  x = oracle.random(rng, (24, 1, 256), "bfloat16")
  w = oracle.random(rng, (3, 64, 256), "float32") * np.float32([1e-3, 1, 50])[:, None, None]
  weight = jaxqq.quantize_weight(w)
  rhs = np.sort(rng.integers(0, 3, 24)).astype(np.uint32)

  def run(is_sorted):
    f = jax.jit(lambda x, w, i: jaxqq.gather_qqmm(x, w, None, None, i, sorted_indices=is_sorted))
    assert ("stablehlo.sort" in f.lower(x, weight, rhs).as_text()) != is_sorted
    return f(x, weight, rhs)

  out = run(True)
  np.testing.assert_array_equal(out, run(False))
  w_hat = np.stack([oracle.round_trip(a, "nvfp4", amax(a)) for a in w])
  exact, mag = oracle.product(oracle.round_trip(x, "nvfp4"), w_hat[rhs])
  oracle.assert_within_bound(np.asarray(out), exact, mag)


def test_no_matrix_of_w_is_copied():
  """The program has neither w dequantized nor packed matrices for each index."""
  w = jaxqq.quantize_weight(np.ones((7, 32, 64), np.float32))
  x, rhs = np.ones((40, 1, 64), np.float32), np.zeros(40, np.int32)
  f = jax.jit(lambda x, w, rhs: jaxqq.gather_qqmm(x, w, None, None, rhs))
  text = f.lower(x, w, rhs).as_text()
  assert "tensor<7x32x8xui32>" in text
  for shape in ("40x32x8x", "40x32x64x", "7x32x64x"):
    assert f"tensor<{shape}" not in text


def test_an_index_that_is_not_there_gives_nan():
  """Under jit nobody can be told; the other products are as without it."""
  x, w = (
    oracle.random(np.random.default_rng(i), (3, n, 64), "float32") for i, n in ((5, 2), (6, 8))
  )
  run = jax.jit(lambda lhs, rhs: jaxqq.gather_qqmm(x, w, None, lhs, rhs))
  out = np.asarray(run(np.int32([0, 1, 3, 2, 0]), np.int32([2, 3, 0, -4, -1])))
  want = jax.jit(jaxqq.gather_qqmm)(x[0], w[2])
  for i in (0, 4):
    np.testing.assert_array_equal(out[i], want)
  assert np.isnan(out[1:4]).all()


BEYOND = [np.int64([2**32 + 1]), np.uint32([2**32 - 1]), np.int8([-4])]


@pytest.mark.parametrize("index", BEYOND, ids=str)
def test_an_index_beyond_int32_is_not_there(index):
  x, w = np.ones((1, 2, 64), np.float32), np.ones((3, 8, 64), np.float32)
  zero = np.zeros(1, np.int32)
  assert np.isnan(jaxqq.gather_qqmm(x, w, None, zero, index)).all()
  assert np.isnan(jaxqq.gather_qqmm(x, w, None, index, zero)).all()


def test_of_no_matrix_of_x_every_index_is_not_there():
  x, w = np.ones((0, 2, 64), np.float32), np.ones((3, 8, 64), np.float32)
  out = jaxqq.gather_qqmm(x, w, None, np.zeros(2, np.int32), np.int32([0, 2]))
  assert out.shape == (2, 2, 8) and np.isnan(out).all()


@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_gradients(backward):
  """Those of the sum over every product that a matrix has a part in."""
  rng = np.random.default_rng(7)
  x, w, g = (
    oracle.random(rng, shape, "float32") for shape in ((3, 8, 64), (4, 32, 64), (3, 2, 8, 32))
  )
  lhs, rhs = np.int32([[0], [2], [2]]), np.int32([[1, 3], [3, 1], [0, 0]])
  f = lambda x, w: jaxqq.gather_qqmm(x, w, None, lhs, rhs, mode="mxfp8", backward=backward)  # noqa: E731
  dx, dw = map(np.asarray, jax.jit(lambda g: jax.vjp(f, x, w)[1](g))(g))

  def hat(a):
    """Along its last axis."""
    return oracle.round_trip(a, "mxfp8") if backward == "quantized" else a.astype(np.float64)

  want_dx, want_dw = np.zeros(x.shape), np.zeros(w.shape)
  at_x, at_w = np.broadcast_arrays(lhs, rhs)
  for i in np.ndindex(at_x.shape):
    want_dx[at_x[i]] += hat(g[i]) @ hat(w[at_w[i]].T.copy()).T
  for matrix in range(4):
    of_it = [i for i in np.ndindex(at_w.shape) if at_w[i] == matrix]
    if of_it:
      rows = [
        np.concatenate([a[j] for j in of]).T
        for a, of in ((g, of_it), (x, [at_x[i] for i in of_it]))
      ]
      pad = [np.pad(a, ((0, 0), (0, -a.shape[1] % 32))) for a in rows]
      want_dw[matrix] = hat(pad[0]) @ hat(pad[1]).T
  np.testing.assert_allclose(dx, want_dx, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-4)
  assert not dx[1].any() and not dw[2].any()


def test_vmap():
  """Over indices and x, each with products of its own."""
  rng = np.random.default_rng(8)
  x, w = oracle.random(rng, (3, 4, 1, 64), "float32"), oracle.random(rng, (5, 16, 64), "float32")
  rhs = rng.integers(0, 5, (3, 4)).astype(np.int32)
  f = lambda x, rhs: jaxqq.gather_qqmm(x, w, None, None, rhs)  # noqa: E731
  out, one = jax.jit(jax.vmap(f))(x, rhs), jax.jit(f)
  np.testing.assert_array_equal(out, np.stack([one(a, i) for a, i in zip(x, rhs, strict=True)]))
  assert np.isfinite(out).all()
