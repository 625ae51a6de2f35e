"""Derivatives: both backward modes, forward mode, second derivatives, residuals."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from tests.support import oracle
from tests.support.golden import GOLDEN
from tests.support.operands import BACKWARDS, PRODUCTS, Product, amax, quantized_product, vjp

pytestmark = pytest.mark.optimized

MODES = oracle.PRODUCT_MODES
WEIGHTS = Product("nvfp4", False)
# Of the others, two: mxfp4 in qqmm, and x as it is.
SOME = (*PRODUCTS[:3], WEIGHTS)
each_product = pytest.mark.parametrize("product", SOME, ids=str)


def data(*shapes, seed=20):
  rng = np.random.default_rng(seed)
  return [oracle.random(rng, shape, "float32") for shape in shapes]


def gradients(product, backward, operands):
  """(dx, dw) of each of some x, w, g, by one program."""

  @jax.jit
  def cotangents(operands):
    f = functools.partial(product, backward=backward)
    return [jax.vjp(f, x, w)[1](g) for x, w, g in operands]

  return jax.tree.map(np.asarray, cotangents(operands))


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_quantized_backward_reproduces_mlx(mode):
  x, w, g = (GOLDEN[name] for name in "xwg")

  @jax.jit
  def with_gradients(x, w, g):
    y, pullback = jax.vjp(lambda x, w: jaxqq.qqmm(x, w, mode=mode, backward="quantized"), x, w)
    return y, *pullback(g)

  for name, value in zip(("y", "dx", "dw"), with_gradients(x, w, g), strict=True):
    assert oracle.relative_error(value, GOLDEN[f"{mode}.vjp.{name}"]) <= 1e-6


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_straight_through(product):
  x, w, g = data((33, 96), (40, 96), (33, 40))
  dx, dw = vjp(product, x, w, g=g)
  x64, g64 = (a.astype(np.float64) for a in (x, g))
  assert oracle.relative_error(dx, g64 @ product.w_of_dx(w)) <= 1e-6
  assert oracle.relative_error(dw, g64.T @ x64) <= 1e-6


# x as it is has one backward.
with_backward = pytest.mark.parametrize(
  ("product", "backward"),
  [(product, b) for product in SOME for b in BACKWARDS[: 1 + product.quantizes_x]],
  ids=str,
)


@with_backward
def test_packed_w_passes_the_gradient_on_to_x(product, backward):
  x, w, g = data((33, 96), (40, 96), (33, 40))
  packed, scales = oracle.quantize(w, product.mode)
  (dx,) = vjp(lambda x: product(x, packed, scales, backward=backward), x, g=g)
  w_hat = oracle.round_trip(w, product.mode)
  want = g.astype(np.float64) @ w_hat
  if backward == "quantized":
    want = quantized_product(g, w_hat.T, product.mode)
  assert oracle.relative_error(dx, want) <= 1e-6


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
@pytest.mark.parametrize("backward", ["straight_through", "quantized", "weights"])
def test_global_scales(backward, packed):
  product = Product("nvfp4", backward != "weights")
  x, w, g = data((33, 96), (40, 96), (33, 40))
  sx, sw = amax(x), amax(w)

  def f(x, w, sx, sw):
    args = quantized if packed else (w,)
    return product(x, *args, global_scale_x=sx, global_scale_w=sw, backward=backward)

  quantized = oracle.quantize(w, "nvfp4", sw)
  dx, dw, dsx, dsw = vjp(f, x, w, sx, sw, g=g)
  assert dsx == 0 and dsw == 0
  uses_w_hat = packed or not product.quantizes_x
  w_used = oracle.round_trip(w, "nvfp4", sw) if uses_w_hat else w
  if backward == "quantized":
    want_dx = quantized_product(g, np.asarray(w_used).T, "nvfp4", amax(g), sw)
    want_dw = quantized_product(g.T, x.T, "nvfp4", amax(g), sx)
  else:
    want_dx, want_dw = g.astype(np.float64) @ w_used, g.T.astype(np.float64) @ x
  assert oracle.relative_error(dx, want_dx) <= 1e-6
  if packed:
    assert not dw.any()
  else:
    assert oracle.relative_error(dw, want_dw) <= 1e-6


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("mode", MODES)
def test_quantized_backward_pads_to_whole_groups(mode):
  sizes = (1, 1), (5, 7), (16, 48), (33, 100), (0, 8), (8, 0)
  operands = [data((m, 64), (n, 64), (m, n)) for m, n in sizes]
  for (x, w, g), (dx, dw) in zip(
    operands, gradients(Product(mode), "quantized", operands), strict=True
  ):
    assert dx.shape == x.shape and dw.shape == w.shape
    np.testing.assert_allclose(dx, quantized_product(g, w.T, mode), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, quantized_product(g.T, x.T, mode), rtol=1e-5, atol=1e-5)


BATCHES = [((2, 3), ()), ((2, 3), (3,)), ((), (4,)), ((3,), (2, 1)), ((2, 3), (2, 3))]


@functools.cache
def gradients_of_batches(backward):
  """{batches: (x, w, g), (dx, dw)}, by one program."""
  shapes = [
    ((*x_batch, 32, 96), (*w_batch, 64, 96), (*np.broadcast_shapes(x_batch, w_batch), 32, 64))
    for x_batch, w_batch in BATCHES
  ]
  operands = [data(*of_batch) for of_batch in shapes]
  found = gradients(Product("mxfp8", backward != "weights"), backward, operands)
  return dict(zip(BATCHES, zip(operands, found, strict=True), strict=True))


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("backward", ["straight_through", "quantized", "weights"])
@pytest.mark.parametrize(("x_batch", "w_batch"), BATCHES)
def test_batch_axes(x_batch, w_batch, backward):
  """Gradients of a broadcast operand are sums over the axes it was broadcast along."""
  mode = "mxfp8"
  product = Product(mode, backward != "weights")
  (x, w, g), (dx, dw) = gradients_of_batches(backward)[x_batch, w_batch]
  assert dx.shape == x.shape and dw.shape == w.shape
  # m and n are whole groups, so summing over more rows is summing products.
  g_t, x_t, w_t = (np.swapaxes(a, -1, -2) for a in (g, x, w))
  if backward == "quantized":
    full_dx, full_dw = quantized_product(g, w_t, mode), quantized_product(g_t, x_t, mode)
  else:
    full_dx, full_dw = g.astype(np.float64) @ product.w_of_dx(w), g_t.astype(np.float64) @ x
  for grad, full in ((dx, full_dx), (dw, full_dw)):
    shape = (1,) * (full.ndim - grad.ndim) + grad.shape
    axes = tuple(i for i in range(full.ndim) if shape[i] == 1 and full.shape[i] != 1)
    assert oracle.relative_error(grad, full.sum(axes).reshape(grad.shape)) <= 1e-6


# w's dtypes and x's.
PAIRS = {backward: list(itertools.product(oracle.DTYPES, oracle.DTYPES)) for backward in BACKWARDS}
PAIRS["weights"] = list(itertools.pairwise((*oracle.DTYPES, "float32", "bfloat16")))


@functools.cache
def gradients_of_dtypes(backward):
  """{dtypes: (x, w, g), (dx, dw)}, by one program."""
  operands = []
  for w_dtype, x_dtype in PAIRS[backward]:
    x, w, g = data((16, 64), (32, 64), (16, 32))
    x, w = x.astype(oracle.DTYPES[x_dtype]), w.astype(oracle.DTYPES[w_dtype])
    operands.append((x, w, g.astype(x.dtype)))
  found = gradients(Product("mxfp8", backward != "weights"), backward, operands)
  return dict(zip(PAIRS[backward], zip(operands, found, strict=True), strict=True))


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("backward", "w_dtype", "x_dtype"),
  [(backward, *pair) for backward, pairs in PAIRS.items() for pair in pairs],
)
def test_gradients_have_the_dtype_of_their_operand(x_dtype, w_dtype, backward):
  product = Product("mxfp8", backward != "weights")
  (x, w, g), (dx, dw) = gradients_of_dtypes(backward)[w_dtype, x_dtype]
  assert dx.dtype == x.dtype and dw.dtype == w.dtype
  as_f64 = [np.asarray(a, np.float64) for a in (x, w, g)]
  if backward == "quantized":
    x64, w64, g64 = (a.astype(np.float32) for a in as_f64)
    wants = quantized_product(g64, w64.T, "mxfp8"), quantized_product(g64.T, x64.T, "mxfp8")
  else:
    x64, _, g64 = as_f64
    wants = g64 @ product.w_of_dx(w), g64.T @ x64
  for grad, want in zip((dx, dw), wants, strict=True):
    # One rounding to the operand's dtype; a float32 gradient is no worse for bfloat16 x.
    bound = {"float32": 1e-6, "bfloat16": 3e-3, "float16": 4e-4}[grad.dtype.name]
    assert oracle.relative_error(grad, want) <= bound


@with_backward
def test_forward_mode_is_straight_through(product, backward):
  x, w, dx, dw = data((9, 64), (7, 64), (9, 64), (7, 64))

  def f(x, w):
    return product(x, w, backward=backward)

  want = dx.astype(np.float64) @ product.w_of_dx(w).T + x.astype(np.float64) @ dw.T

  @jax.jit
  def derivatives(x, w, dx, dw):
    linearized, linear = jax.linearize(f, x, w)
    (jacobian,) = jax.jacfwd(lambda w: f(x[:2], w), argnums=(0,))(w)
    return jax.jvp(f, (x, w), (dx, dw)), (linearized, linear(dx, dw)), jacobian

  *both, jacobian = derivatives(x, w, dx, dw)
  out = jax.jit(f)(x, w)
  for y, tangent in both:
    np.testing.assert_array_equal(y, out)
    assert oracle.relative_error(tangent, want) <= 1e-6
  want = np.einsum("mk,no->mnok", x[:2].astype(np.float64), np.eye(7))
  assert oracle.relative_error(jacobian, want) <= 1e-6


@each_product
def test_forward_mode_through_packed_w(product):
  x, w, dx = data((9, 64), (7, 64), (9, 64))
  for global_scale in (None, amax(w)) if product.mode == "nvfp4" else (None,):
    packed, scales = oracle.quantize(w, product.mode, global_scale)
    kwargs = (
      {} if global_scale is None else {"global_scale_x": amax(x), "global_scale_w": global_scale}
    )
    _, tangent = jax.jvp(lambda x, a=(packed, scales), k=kwargs: product(x, *a, **k), (x,), (dx,))
    want = dx.astype(np.float64) @ oracle.round_trip(w, product.mode, global_scale).T
    assert oracle.relative_error(tangent, want) <= 1e-6


@with_backward
def test_second_derivatives(product, backward):
  """Hessian-vector products of sum(y^2) / 2, forward over reverse and reverse over both."""
  x, w, v = data((16, 64), (32, 64), (32, 64))

  def loss(w):
    return 0.5 * jnp.sum(product(x, w, backward=backward) ** 2)

  # The gradient is y(w)^T x (quantized: of the quantized y and x). Its straight-through
  # derivative in the direction v is (x v^T)^T x.
  x64, v64 = x.astype(np.float64), v.astype(np.float64)
  want = (x64 @ v64.T).T @ x64

  @jax.jit
  def hvps(w):
    return {
      "forward over reverse": jax.jvp(jax.grad(loss), (w,), (v,))[1],
      "reverse over reverse": jax.grad(lambda w: jnp.vdot(jax.grad(loss)(w), v))(w),
      "reverse over forward": jax.grad(lambda w: jax.jvp(loss, (w,), (v,))[1])(w),
    }

  for name, hvp in hvps(w).items():
    if backward == "straight_through" or name == "forward over reverse":
      assert oracle.relative_error(hvp, want) <= 2e-6, name
    else:
      # The outer reverse pass quantizes its own operands once more.
      assert oracle.relative_error(hvp, want) <= 0.3, name


@with_backward
def test_mixed_second_derivatives(product, backward):
  """d/dx of dw, for a loss that is linear in y: the term that joins both operands."""
  x, w, g, dx = data((16, 64), (32, 64), (16, 32), (16, 64))

  def dw(x):
    return jax.grad(lambda w: jnp.vdot(g, product(x, w, backward=backward)))(w)

  def tangent_of(x, w):
    return jax.jvp(lambda x: product(x, w), (x,), (dx,))[1]

  @jax.jit
  def derivatives(x, w, dx):
    second = jax.jvp(lambda w: tangent_of(x, w), (w,), (w,))[1]
    return jax.jvp(dw, (x,), (dx,))[1], *jax.vjp(tangent_of, x, w)[1](g), second

  tangent, grad_x, grad_w, second = map(np.asarray, derivatives(x, w, dx))
  assert oracle.relative_error(tangent, g.T.astype(np.float64) @ dx) <= 1e-6
  # y' = dx w^T (x as it is: dx w_hat^T): straight-through in w, independent of x.
  assert not grad_x.any()
  assert oracle.relative_error(grad_w, g.T.astype(np.float64) @ dx) <= 1e-6
  assert oracle.relative_error(second, dx.astype(np.float64) @ w.T) <= 1e-6


@pytest.mark.parametrize("w_batch", [(), (3,)], ids=["one w", "a stack"])
def test_the_gradient_of_the_gradient_of_x_as_it_is(w_batch):
  """dx = g w_hat: linear in g, straight-through in w, and of x there is nothing in it."""
  product = Product("nvfp4", False)
  x, w, g, v, u, h = data(
    (5, 64), (*w_batch, 8, 64), (*w_batch, 5, 8), (5, 64), (*w_batch, 8, 64), (*w_batch, 5, 8)
  )

  def dx(x, w, g):
    return jax.vjp(lambda x: product(x, w), x)[1](g)[0]

  @jax.jit
  def derivatives(x, w, g):
    gradients = jax.grad(lambda *a: jnp.vdot(v, dx(*a)), (0, 1, 2))(x, w, g)
    return gradients, jax.jvp(dx, (x, w, g), (x, u, h))[1]

  got, tangent = jax.tree.map(np.asarray, derivatives(x, w, g))
  v64, w_hat = v.astype(np.float64), product.w_of_dx(w)
  assert not got[0].any()
  assert oracle.relative_error(got[1], np.swapaxes(g, -1, -2).astype(np.float64) @ v64) <= 1e-6
  assert oracle.relative_error(got[2], v64 @ np.swapaxes(w_hat, -1, -2)) <= 1e-6
  want = h.astype(np.float64) @ w_hat + g.astype(np.float64) @ u
  assert oracle.relative_error(tangent, want.sum(0) if w_batch else want) <= 1e-6


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
@pytest.mark.parametrize("backward", ["straight_through", "quantized", "weights"])
def test_residuals_are_the_operands_as_they_came(backward, packed):
  product = Product("mxfp8", backward != "weights")
  x, w, _ = data((16, 64), (32, 64), (1,))
  x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
  args = (x, *oracle.quantize(w, "mxfp8")) if packed else (x, w)
  f = lambda *args: product(*args, backward=backward)  # noqa: E731
  if packed:
    _, pullback = jax.vjp(lambda x: f(x, *args[1:]), x)
  else:
    _, pullback = jax.vjp(f, *args)
  residuals = [(r.shape, r.dtype) for r in jax.tree.leaves(pullback) if r.size > 1]
  allowed = [(a.shape, a.dtype) for a in args]
  assert residuals and all(r in allowed for r in residuals), residuals
  assert len(residuals) <= len(allowed)


@each_product
def test_the_gradient_of_what_is_packed_is_refused(product):
  x, w = data((4, 64), (8, 64))
  packed, scales = oracle.quantize(w, product.mode)
  float8 = jnp.asarray(scales.view(oracle.MODES[product.mode].scale))

  def loss(x, packed, scales):
    return product(x, packed, scales).sum()

  rule = f"^{product.function.__name__}: .*to receive gradients, w must be provided unquantized"
  with pytest.raises(ValueError, match=rule):
    jax.grad(loss, argnums=2)(x, packed, float8)
  with pytest.raises(ValueError, match=rule.partition(".*")[2]):
    jax.grad(lambda x: jax.grad(loss, argnums=2)(x, packed, float8).astype(jnp.float32).sum())(x)
  with pytest.raises(TypeError, match="uint32"):  # JAX itself differentiates no integers
    jax.grad(loss, argnums=1)(x, packed, scales)
  assert jax.grad(loss)(x, packed, float8).shape == x.shape


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
def test_what_is_not_differentiated_has_gradient_zero(packed):
  """With respect to global scales alone, or integers alone, there is no tangent at all."""
  x, w = data((4, 64), (8, 64))
  args = oracle.quantize(w, "nvfp4", amax(w)) if packed else (w,)

  def loss(scale_x, scale_w):
    return jaxqq.qqmm(x, *args, global_scale_x=scale_x, global_scale_w=scale_w).sum()

  scales = amax(x), amax(w)
  assert jax.grad(loss, argnums=(0, 1))(*scales) == (0, 0)
  _, tangent = jax.jvp(loss, scales, scales)
  assert tangent == 0
  if packed:
    out, pullback = jax.vjp(lambda packed: jaxqq.qqmm(x, packed, args[1]), args[0])
    assert pullback(jnp.ones_like(out))[0].dtype == jax.dtypes.float0


def test_a_zero_cotangent_with_global_scales_is_no_nan():
  x, w = data((4, 64), (8, 64))
  scales = {"global_scale_x": amax(x), "global_scale_w": amax(w)}
  grads = vjp(
    lambda x, w: jaxqq.qqmm(x, w, **scales, backward="quantized"),
    x,
    w,
    g=np.zeros((4, 8), np.float32),
  )
  for grad in grads:
    np.testing.assert_array_equal(grad, np.zeros_like(grad))
