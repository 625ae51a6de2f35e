"""Ragged products against float64: rows in groups, each with a matrix of its own."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq import _kernels
from jaxqq._formats import FORMATS
from jaxqq._kernels.problem import RaggedProblem
from jaxqq._kernels.ragged import RAGGED
from jaxqq._ragged_reference import RaggedOperands, unflatten
from tests.support import oracle, ragged
from tests.support.operands import PRODUCTS, Product, amax, crossed, quantized_product
from tests.support.ragged import SIZES, G, M

DTYPES = ("float32", "bfloat16", "float16")
N = 5 * 16
K = {16: 3 * 16, 32: 3 * 32}  # odd multiples of the group


def call(product, x, w, sizes, *scales, **how):
  """The ragged product of the kind that a plain one is."""
  if product.quantizes_x:
    return jaxqq.ragged_qqmm(x, w, sizes, *scales, mode=product.mode, **how)
  for name in ("global_scale_x", "backward"):
    how.pop(name, None)
  scale = how.pop("global_scale_w", None)
  return jaxqq.ragged_quantized_matmul(
    x, w, sizes, *scales, mode=product.mode, global_scale=scale, **how
  )


def operands(mode, x_dtype="float32", w_dtype="float32", *, groups=G, m=M, n=N, seed=0):
  rng = np.random.default_rng(seed)
  k = K[oracle.MODES[mode].group]
  return oracle.random(rng, (m, k), x_dtype), oracle.random(rng, (groups, n, k), w_dtype)


def check(out, x_hat, w_hat, of_row):
  out = np.asarray(out)
  exact, mag = ragged.product(x_hat, w_hat, of_row)
  oracle.assert_within_bound(out, exact, mag, highest=True)
  assert not out[of_row < 0].any()


def packed_arguments(w, mode, scale=None):
  return oracle.quantize(w, mode, scale)


@pytest.mark.parametrize(("product", "packed"), crossed([False, True], every=1))
def test_products(product, packed):
  """One program for all sizes of groups; dtypes in turn."""
  turn = PRODUCTS.index(product) + 3 * packed
  x, w = operands(product.mode, DTYPES[turn % 3], DTYPES[(turn + 1 + packed) % 3])
  args = packed_arguments(w, product.mode) if packed else (w,)
  x[-1] = np.nan  # a row of no group in some
  run = jax.jit(lambda x, sizes, w, *rest: call(product, x, w, sizes, *rest))
  w_hat = oracle.round_trip(w, product.mode)
  for sizes in SIZES.values():
    of_row = ragged.groups_of(sizes, M)
    this = x if of_row[-1] < 0 else np.where(np.isnan(x), x.dtype.type(1), x)
    out = run(this, np.int32(sizes), *args)
    assert out.shape == (M, N) and out.dtype == x.dtype
    check(out, product.x_hat(np.nan_to_num(this)), w_hat, of_row)


@pytest.mark.parametrize(("groups", "m"), [(1, 20), (128, 60), (128, 300), (3, 0), (0, 4)], ids=str)
def test_numbers_of_groups(groups, m):
  product = PRODUCTS[groups % 2]
  x, w = operands(product.mode, groups=groups, m=m, n=16)
  rng = np.random.default_rng(1)
  sizes = np.bincount(rng.integers(0, max(groups, 1), m * 3 // 4), minlength=groups)[:groups]
  out = call(product, x, w, sizes.astype(np.int16))
  of_row = ragged.groups_of(sizes, m) if groups else np.full(m, -1)
  check(out, product.x_hat(x), oracle.round_trip(w, product.mode), of_row)


def each(hat, a, scales):
  return np.stack([hat(b, scale) for b, scale in zip(a, scales, strict=True)])


@pytest.mark.parametrize("packed", [False, True])
def test_global_scales(packed):
  """One for all, or one for each group: of w the amax of each, and also of x."""
  x, w = operands("nvfp4")
  x, w = x * np.float32(1e-4), w * np.float32([1e-4, 1e-3, 1, 20, 1e4])[:, None, None]
  sizes = SIZES["all"]
  of_row = ragged.groups_of(sizes, M)
  trip = functools.partial(oracle.round_trip, mode="nvfp4")
  hat = lambda a, scale: trip(a, global_scale=scale)  # noqa: E731
  of_w, of_x = (
    np.float32([amax(a) for a in w]),
    np.float32([amax(x[of_row == i]) for i in range(G)]),
  )
  w_hat = each(hat, w, of_w)
  args = (w,)
  if packed:
    pairs = [oracle.quantize(a, "nvfp4", scale) for a, scale in zip(w, of_w, strict=True)]
    args = tuple(map(np.stack, zip(*pairs, strict=True)))

  ways = [(amax(x), of_w), (of_x, of_w)]
  if not packed:
    ways += [("amax", "amax"), (amax(x), amax(w))]

  @jax.jit
  def products(x, sizes, w, *scales):
    weights = call(Product("nvfp4", False), x, w, sizes, *scales, global_scale_w=of_w)
    how = [{"global_scale_x": a, "global_scale_w": b} for a, b in ways]
    return weights, *(call(PRODUCTS[0], x, w, sizes, *scales, **own) for own in how)

  weights, of_one, of_groups, *others = products(x, np.int32(sizes), *args)
  check(of_one, hat(x, amax(x)), w_hat, of_row)
  x_hat = np.concatenate([hat(x[of_row == i], of_x[i]) for i in range(G)])
  check(of_groups, x_hat, w_hat, of_row)
  if not packed:
    by_amax, of_one_w = others
    np.testing.assert_array_equal(by_amax, of_one)
    check(of_one_w, hat(x, amax(x)), hat(w, amax(w)), of_row)
  check(weights, x.astype(np.float64), w_hat, of_row)


def sizes_of(sizes):
  return jnp.asarray(sizes, jnp.int32)


def test_a_quantized_weight_is_its_arrays():
  """With a global scale for each expert, for each row, and of inputs."""
  x, w = operands("nvfp4")
  sizes = sizes_of(SIZES["below M"])
  weight = jaxqq.quantize_weight(w)
  arrays = weight.packed, sizes, weight.scales
  how = {"global_scale_x": 2688.0, "global_scale_w": weight.global_scale}
  np.testing.assert_array_equal(
    jaxqq.ragged_qqmm(x, weight, sizes), jaxqq.ragged_qqmm(x, *arrays, **how)
  )
  of_inputs = np.float32([1, 2, 3, 4, 5])
  static = dataclasses.replace(weight, input_global_scale=of_inputs)
  np.testing.assert_array_equal(
    jaxqq.ragged_qqmm(x, static, sizes),
    jaxqq.ragged_qqmm(x, *arrays, **{**how, "global_scale_x": of_inputs}),
  )
  two = jaxqq.concatenate([weight, jaxqq.quantize_weight(100 * w)])
  assert two.has_row_scales
  parts = [jaxqq.ragged_qqmm(x, part, sizes) for part in (weight, jaxqq.quantize_weight(100 * w))]
  np.testing.assert_allclose(
    jaxqq.ragged_qqmm(x, two, sizes), np.concatenate(parts, axis=1), rtol=2e-6
  )


def test_rows_do_not_depend_on_each_other_by_row():
  """Garbage behind the groups, or in another row of one, changes no bit."""
  x, w = operands("nvfp4")
  sizes = sizes_of(SIZES["below M"])
  run = jax.jit(
    lambda x: jaxqq.ragged_qqmm(x, w, sizes, global_scale_x="row", global_scale_w="amax")
  )
  want = np.asarray(run(x * np.float32(1e-6)))
  exact, _ = ragged.product(
    x.astype(np.float64) * 1e-6, w.astype(np.float64), ragged.groups_of(SIZES["below M"], M)
  )
  assert oracle.relative_error(want, exact) < 0.2
  spoiled = x * np.float32(1e-6)
  spoiled[0], spoiled[-1] = 1e30, np.nan
  np.testing.assert_array_equal(np.asarray(run(spoiled))[1:], want[1:])


def test_part_of_the_experts():
  """group_offset: rows of the groups that w lacks are 0, and the parts add up."""
  x, w = operands("mxfp8")
  w_hat, x_hat = (oracle.round_trip(a, "mxfp8") for a in (w, x))
  run = jax.jit(
    lambda sizes, offset: jaxqq.ragged_qqmm(x, w[1:3], sizes, mode="mxfp8", group_offset=offset)
  )
  for name, sizes in SIZES.items():
    if name != "none":
      for offset in (0, 1, 3):
        of_row = ragged.groups_of(sizes, M, offset, 2)
        check(run(sizes_of(sizes), jnp.int32(offset)), x_hat, w_hat[1:3], of_row)
  sizes = sizes_of(SIZES["all"])
  np.testing.assert_array_equal(run(sizes, jnp.int32(1)), run(sizes, jnp.int32([1])))
  assert not np.asarray(run(sizes, jnp.int32(7))).any()  # there are no such groups
  last = np.asarray(run(sizes, jnp.int32(4)))  # of w[2] there is none
  check(last, x_hat, w_hat[1:3], ragged.groups_of(SIZES["all"], M, 4, 2))


def test_a_program_knows_no_sizes_and_dequantizes_one_matrix_at_a_time():
  x, w = operands("nvfp4", groups=64)
  weight = jaxqq.quantize_weight(w)
  text = jax.jit(jaxqq.ragged_qqmm).lower(x, weight, np.zeros(64, np.int32)).as_text()
  assert f"tensor<64x{N}x{w.shape[-1]}x" not in text


@pytest.mark.parametrize(("platform", "m"), [("tpu", M), ("cuda", M), ("cuda", 3)])
def test_plans_of_other_platforms(platform, m):
  """In bfloat16, which holds x_hat and w_hat; one row at a time where there are few."""
  x, w = operands("nvfp4", "bfloat16", m=m)
  packed, scales = oracle.quantize(w, "nvfp4")
  sizes = np.int32(SIZES["below M"])
  ops = RaggedOperands(*map(jnp.asarray, (sizes, np.int32(0), x, packed, scales)))
  bfloat16 = np.dtype(jnp.bfloat16)
  problem = RaggedProblem(
    FORMATS["nvfp4"],
    "k",
    m,
    G,
    N,
    x.shape[1],
    True,
    True,
    False,
    bfloat16,
    bfloat16,
    bfloat16,
    None,
    "",
  )
  device = _kernels.Device(platform, "8.0" if platform == "cuda" else None)
  plan = _kernels.plan(problem, device, RAGGED)
  assert plan.name == "xla"
  run = jax.jit(lambda *arrays: plan.run(unflatten(ops.names, arrays)))
  assert "xbf16>" in run.lower(*ops.flatten()).as_text()
  out = np.asarray(run(*ops.flatten()))
  hats = oracle.round_trip(x, "nvfp4"), oracle.round_trip(w, "nvfp4")
  oracle.assert_within_bound(out, *ragged.product(*hats, ragged.groups_of(sizes, m)))


def test_explain():
  """Of arrays, or of what they would be."""
  x, w = operands("nvfp4")
  weight = jaxqq.quantize_weight(w)
  for arrays in ((x, weight, np.int32(SIZES["all"])), (x, w, np.int32(SIZES["all"]))):
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    for function in (jaxqq.ragged_qqmm, jaxqq.ragged_quantized_matmul):
      text = jaxqq.explain(function, *arrays, device="cpu")
      assert text == jaxqq.explain(function, *shapes, device="cpu") and text.plan.name == "xla"
      assert text.startswith(f"{function.__name__} nvfp4, x float32 (37, 48), w ")


# Gradients

GRADIENTS = [
  pytest.param(product, backward, packed, id=f"{product}-{backward}-{packed}")
  for product, backward in (
    *((PRODUCTS[0], b) for b in ("straight_through", "quantized")),
    *((PRODUCTS[1], b) for b in ("straight_through", "quantized")),
    (PRODUCTS[3], "straight_through"),
  )
  for packed in (False, True)
]


@pytest.mark.parametrize(("product", "backward", "packed"), GRADIENTS)
def test_gradients(product, backward, packed):
  mode = product.mode
  x, w = operands(mode, n=3 * 8)  # no whole groups of it
  g = np.random.default_rng(2).standard_normal((M, 3 * 8)).astype(np.float32)
  args = packed_arguments(w, mode) if packed else (w,)

  @jax.jit
  def pull(sizes, g, x, *args):
    def f(x, *differentiable):
      return call(
        product,
        x,
        *((*differentiable, sizes) if not packed else (args[0], sizes, args[1])),
        backward=backward,
      )

    return jax.vjp(f, x, *(() if packed else args))[1](g)

  w_of_dx = product.w_of_dx(w, packed=packed)
  names = SIZES if backward == "quantized" else ("all", "none", "one has everything", "below M")
  for name in names:
    of_row = ragged.groups_of(SIZES[name], M)
    dx, *dw = map(np.asarray, pull(np.int32(SIZES[name]), g, x, *args))
    for group in range(G):
      rows = ragged.rows_of(of_row, group)
      if backward == "quantized":
        want = quantized_product(g[rows], w_of_dx[group].T.astype(np.float32), mode)
        np.testing.assert_allclose(dx[rows], want, rtol=1e-5, atol=1e-4)
      else:
        oracle.assert_within_bound(dx[rows], *oracle.product(g[rows], w_of_dx[group].T))
      if packed:
        continue
      if backward == "quantized":
        want = quantized_product(g[rows].T, x[rows].T, mode) if len(rows) else 0
        np.testing.assert_allclose(dw[0][group], np.zeros(w[0].shape) + want, rtol=1e-5, atol=1e-4)
      else:
        pair = (a[rows].T.astype(np.float64) for a in (g, x))
        oracle.assert_within_bound(dw[0][group], *oracle.product(*pair))
    assert not dx[of_row < 0].any()


def test_global_scales_of_the_quantized_backward():
  """The cotangent's is its amax over rows that have a group; x's and w's are kept."""
  x, w = operands("nvfp4", n=32)
  x, w = x * np.float32(1e-3), w * np.float32([1e-4, 1e-3, 1, 20, 1e4])[:, None, None]
  g = np.random.default_rng(2).standard_normal((M, 32)).astype(np.float32) * np.float32(1e-5)
  g[-1] = 1e6  # of no group
  sizes = SIZES["below M"]
  of_row = ragged.groups_of(sizes, M)
  of_w = np.float32([amax(a) for a in w])
  how = {"global_scale_x": amax(x), "global_scale_w": of_w, "backward": "quantized"}
  f = lambda x, w: jaxqq.ragged_qqmm(x, w, sizes_of(sizes), **how)  # noqa: E731
  dx, dw = jax.jit(lambda g: jax.vjp(f, x, w)[1](g))(g)
  of_g = amax(g[of_row >= 0])
  for group in range(G):
    rows = ragged.rows_of(of_row, group)
    want = quantized_product(g[rows], w[group].T, "nvfp4", of_g, of_w[group])
    np.testing.assert_allclose(dx[rows], want, rtol=1e-4, atol=1e-6 * np.abs(want).max(initial=0))
    if len(rows):
      want = quantized_product(g[rows].T, x[rows].T, "nvfp4", of_g, amax(x))
      np.testing.assert_allclose(dw[group], want, rtol=1e-4, atol=1e-6 * np.abs(want).max())
