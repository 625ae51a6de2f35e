"""Every product inside the bound of the specification, against float64: `qqmm`, and the one that
leaves x as it is."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from tests.support import oracle
from tests.support.golden import GOLDEN, SHORT
from tests.support.operands import PRODUCTS, Product, amax, crossed, operands

pytestmark = pytest.mark.optimized

HIGHEST = jax.lax.Precision.HIGHEST
# (M, N, K): every M with every N, and every kind of K, K = None being one group.
SHAPES = [(m, n, 96) for m, n in itertools.product((0, 1, 5, 33, 130), repeat=2)]
PACKED = (False, True)
SHAPES += [(m, n, k) for m, n in ((1, 130), (33, 5), (130, 33)) for k in (None, 512, 4096)]


@functools.partial(jax.jit, static_argnums=0)
def multiplied(calls, given):
  """Products, each with a precision, of (args, kwargs)."""
  return [
    product(*args, **kwargs, precision=precision)
    for (product, precision), (args, kwargs) in zip(calls, given, strict=True)
  ]


def check(cases):
  """Each of [(product, x, w, how)] within its bound; [(its result, what is exact)].

  All by one program, which takes a third of the time to compile of so many.
  """
  calls, given, hats = [], [], []
  for product, x, w, how in cases:
    how = {"precision": None, **how}
    calls.append((product, how.pop("precision")))
    args, kwargs, *own_hats = operands(x, w, product, **how)
    given.append((args, kwargs))
    hats.append(own_hats)
  outs = map(np.asarray, multiplied(tuple(calls), given))
  results = []
  for (product, x, w, how), out, own_hats in zip(cases, outs, hats, strict=True):
    exact, mag = oracle.product(*own_hats)
    try:
      assert out.dtype == x.dtype
      # The reference keeps the bound of HIGHEST whatever is asked for.
      oracle.assert_within_bound(out, exact, mag, highest=True)
    except AssertionError as error:
      error.add_note(f"{product} of {x.dtype}{x.shape} and {w.dtype}{w.shape}, {how}")
      raise
    results.append((out, exact))
  return results


def by_program(cases):
  """{what is the same: the other values of all cases that have it}, from pairs of the two."""
  found = {}
  for same, other in cases:
    found.setdefault(same, []).append(other)
  return found


def shapes():
  """Every size of m and n of what is the same else."""
  cases = (case.values for case in crossed(SHAPES, PACKED))
  sizes = by_program(((product, k, packed), (m, n)) for product, (m, n, k), packed in cases)
  return [pytest.param(*same, own, id="-".join(map(str, same))) for same, own in sizes.items()]


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(("product", "k", "packed", "sizes"), shapes())
def test_shapes(product, k, packed, sizes):
  k = k or oracle.MODES[product.mode].group
  cases = []
  for m, n in sizes:
    rng = np.random.default_rng(m * 1000 + n)
    x, w = (oracle.random(rng, (rows, k), "float32") for rows in (m, n))
    cases.append((product, x, w, {"packed": packed}))
  for (m, n), (out, _) in zip(sizes, check(cases), strict=True):
    assert (out.shape, out.dtype) == ((m, n), np.float32)


def dtypes():
  """Every pair of dtypes, of x and of w, of what is the same else."""
  combinations = (
    *(
      case.values
      for case in crossed(oracle.DTYPES, oracle.DTYPES, ("on the fly", "packed"), every=3)
    ),
    *(
      (Product("nvfp4", quantizes_x), w_dtype, x_dtype, how)
      for how in ("global", "packed global")
      for w_dtype in oracle.DTYPES
      for x_dtype in oracle.DTYPES
      for quantizes_x in (True, False)[: 1 + (w_dtype == x_dtype)]
    ),
  )
  pairs = by_program(((product, how), (x, w)) for product, w, x, how in combinations)
  return [pytest.param(*same, own, id="-".join(map(str, same))) for same, own in pairs.items()]


@pytest.mark.parametrize("data", [oracle.random, oracle.with_outliers])
@pytest.mark.parametrize(("product", "how", "pairs"), dtypes())
def test_dtypes(product, how, pairs, data):
  cases = []
  for x_dtype, w_dtype in pairs:
    rng = np.random.default_rng(11)
    # Small, so that float16 holds the sums of outliers.
    x = (data(rng, (33, 512), "float32") / 64).astype(oracle.DTYPES[x_dtype])
    w = (data(rng, (65, 512), "float32") / 64).astype(oracle.DTYPES[w_dtype])
    cases.append((product, x, w, {"packed": "packed" in how, "global_scale": "global" in how}))
  results = check(cases)
  if data is oracle.random:
    for (x_dtype, _), (out, exact) in zip(pairs, results, strict=True):
      norm_bound = {"float32": 1e-5, "bfloat16": 3e-3, "float16": 4e-4}[x_dtype]
      assert oracle.relative_error(out, exact) <= norm_bound


@pytest.mark.parametrize("x_dtype", oracle.DTYPES)
def test_precision(x_dtype):
  rng = np.random.default_rng(12)
  x, w = oracle.random(rng, (17, 256), x_dtype), oracle.random(rng, (31, 256), "float32")
  product = Product("mxfp8", quantizes_x=x_dtype != "float16")
  precisions = (None, HIGHEST, jax.lax.Precision.DEFAULT)
  check([(product, x, w, {"precision": precision}) for precision in precisions])


@pytest.mark.parametrize("product", [jaxqq.qqmm, jaxqq.quantized_matmul])
@pytest.mark.parametrize("name", ["highest", "high", "default", "float32", ("default", "highest")])
def test_precision_by_name(name, product):
  """As `jax.lax.dot_general` takes it; of two the higher."""
  x, w = (jax.ShapeDtypeStruct((size, 64), jnp.bfloat16) for size in (4, 8))

  def passed(precision):
    jaxpr = jax.make_jaxpr(lambda x, w: product(x, w, precision=precision))(x, w)
    return jaxpr.eqns[0].params["precision"]

  one = name[1] if isinstance(name, tuple) else name
  assert passed(name) is jax.lax.Precision(one)


@pytest.mark.parametrize(
  ("kind", "dtype", "x_dtype"),
  [
    *((Product("mxfp8"), dtype, x_dtype) for dtype in oracle.DTYPES for x_dtype in oracle.DTYPES),
    *(
      (Product("mxfp4", False), *dtypes)
      for dtypes in (("float32", "float16"), ("bfloat16", "float32"))
    ),
  ],
  ids=str,
)
def test_preferred_element_type(kind, x_dtype, dtype):
  """The result's; within its bound, and gradients are of the operands' dtypes."""
  rng = np.random.default_rng(15)
  x, w = oracle.random(rng, (9, 128), x_dtype), oracle.random(rng, (7, 128), "float32")

  def product(x, w):
    return kind(x, w, preferred_element_type=dtype)

  @jax.jit
  def with_gradients(x, w, packed):
    out, pull = jax.vjp(product, x, w)
    again = kind.function(x, packed, preferred_element_type=jnp.dtype(dtype))
    return out, *pull(jnp.ones_like(out)), again

  out, dx, dw, again = with_gradients(x, w, jaxqq.quantize_weight(w, kind.mode))
  out = np.asarray(out)
  assert out.dtype == oracle.DTYPES[dtype]
  exact, mag = oracle.product(kind.x_hat(x), oracle.round_trip(w, kind.mode))
  oracle.assert_within_bound(out, exact, mag)
  assert dx.dtype == x.dtype and dw.dtype == jnp.float32
  np.testing.assert_array_equal(again, out)


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_group_scales_far_apart(product):
  """Powers of two as group scales reach from 2^-100 to 2^100; nvfp4's own scales are e4m3."""
  rng = np.random.default_rng(13)
  reach = 98 if oracle.MODES[product.mode].power_of_two else 8
  powers = np.linspace(-reach, reach, 64).round().repeat(oracle.MODES[product.mode].group)
  x = (rng.standard_normal((9, powers.size)) * 2.0**powers).astype(np.float32)
  w = (rng.standard_normal((7, powers.size)) * 2.0**-powers).astype(np.float32)
  check([(product, x, w, {"packed": packed}) for packed in PACKED])


@pytest.mark.parametrize("quantizes_x", [True, False])
@pytest.mark.parametrize("magnitude", [1e-20, 1e-12, 1e12])
def test_global_scales_of_every_size(magnitude, quantizes_x):
  """The factor of the two together underflows float32 where the product does not."""
  rng = np.random.default_rng(14)
  x = (rng.standard_normal((9, 512)) * magnitude).astype(np.float32)
  w = (rng.standard_normal((7, 512)) * 1e-15).astype(np.float32)
  [(out, exact)] = check([(Product("nvfp4", quantizes_x), x, w, {"global_scale": True})])
  assert oracle.relative_error(out, exact) <= 1e-5


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("case", ["nvfp4", "nvfp4g", "mxfp8"])
def test_golden(case, dtype):
  """MLX's CUDA backend computed the same products, of rows 8 to 12 of x.

  In bfloat16 nvfp4, MLX is outside the bound that jaxqq keeps element by element.
  """
  mode = case.removesuffix("g")
  x, w = (GOLDEN[name].astype(oracle.DTYPES[SHORT[dtype]]) for name in "xw")
  scales = (amax(x), amax(w)) if case.endswith("g") else (None, None)
  sizes = (5,) if case == "nvfp4g" else (1, 5)
  parts = [x[8 : 8 + rows] for rows in sizes]
  global_scales = {"global_scale_x": scales[0], "global_scale_w": scales[1]}
  outs = jax.jit(lambda parts, w: [jaxqq.qqmm(x, w, mode=mode, **global_scales) for x in parts])(
    parts, w
  )
  for rows, part, out in zip(sizes, parts, outs, strict=True):
    exact, mag = oracle.product(
      oracle.round_trip(part, mode, scales[0]), oracle.round_trip(w, mode, scales[1])
    )
    bound = {"f32": 1e-5, "bf16": 3e-3, "f16": 1.5e-3}[dtype]
    assert oracle.relative_error(GOLDEN[f"{case}.{dtype}.y{rows}"], exact) <= bound
    oracle.assert_within_bound(np.asarray(out), exact, mag)


BATCHES = [
  ((3,), ()),
  ((2, 3), ()),
  ((2, 3), (3,)),
  ((3,), (2, 3)),
  ((2, 1), (1, 3)),
  ((), (4,)),
  ((2, 1, 3), (2, 1, 3)),
]


def crossed_by_product(*values):
  """(product, the combinations of values that it is crossed with)."""
  combinations = by_program((case.values[0], case.values[1:]) for case in crossed(*values))
  return [pytest.param(*of_one, id=str(of_one[0])) for of_one in combinations.items()]


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(("product", "combinations"), crossed_by_product(BATCHES, PACKED))
def test_batch_axes_broadcast(product, combinations):
  cases = []
  for (x_batch, w_batch), packed in combinations:
    rng = np.random.default_rng(15)
    x = oracle.random(rng, (*x_batch, 5, 64), "float32")
    w = oracle.random(rng, (*w_batch, 7, 64), "float32")
    cases.append((product, x, w, {"packed": packed}))
  check(cases)


@pytest.mark.parametrize("product", [PRODUCTS[0], PRODUCTS[-1]], ids=str)
@pytest.mark.parametrize("w_batch", [(), (4,)])
def test_a_vector(w_batch, product):
  rng = np.random.default_rng(16)
  x, w = oracle.random(rng, (64,), "float32"), oracle.random(rng, (*w_batch, 7, 64), "float32")
  out = product(x, w)
  assert out.shape == (*w_batch, 7)
  exact, mag = oracle.product(product.x_hat(x[None]), oracle.round_trip(w, product.mode))
  oracle.assert_within_bound(np.asarray(out)[..., None, :], exact, mag)


@pytest.mark.parametrize("product", [*PRODUCTS[:2], PRODUCTS[-2]], ids=str)
def test_scales_as_float8(product):
  rng = np.random.default_rng(17)
  x, w = oracle.random(rng, (5, 64), "bfloat16"), oracle.random(rng, (7, 64), "bfloat16")
  packed, scales = oracle.quantize(w, product.mode)
  as_float8 = scales.view(oracle.MODES[product.mode].scale)
  products = jax.jit(lambda *ws: [product(x, *args) for args in ws])
  out, *others = products((packed, scales), (packed, as_float8), (w,))
  for other in others:
    np.testing.assert_array_equal(other, out)


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_what_is_not_finite_stays_in_its_row(product):
  rng = np.random.default_rng(18)
  x, w = oracle.random(rng, (5, 64), "float32"), oracle.random(rng, (7, 64), "float32")
  x[1, 3], w[2, 5] = np.nan, np.inf
  nan = np.zeros((5, 7), bool)
  nan[1], nan[:, 2] = True, True
  products = jax.jit(lambda *ws: [product(x, *args) for args in ws])
  for out in products((w,), oracle.quantize(w, product.mode)):
    np.testing.assert_array_equal(np.isnan(out), nan)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("product", "combinations"),
  crossed_by_product([(1, 130), (2, 130), (130, 1), (1, 1)], PACKED),
)
def test_single_rows_of_one_sign_and_many_magnitudes(product, combinations):
  """Sums without cancellation show what the order of summation costs."""
  cases = []
  for sizes, packed in combinations:
    rng = np.random.default_rng(21)
    k, group = 14336, oracle.MODES[product.mode].group
    powers = (2.0 ** rng.integers(-8, 8, k // group)).repeat(group)
    x, w = (np.abs(rng.standard_normal((size, k)) * powers).astype(np.float32) for size in sizes)
    cases.append((product, x, w, {"packed": packed}))
  check(cases)


def test_zeros_give_zeros():
  x, w = np.zeros((3, 64), np.float32), np.ones((5, 64), np.float32)
  zero, one = np.float32(0), np.float32(1)
  for kwargs in ({}, {"mode": "mxfp8"}, {"global_scale_x": zero, "global_scale_w": one}):
    np.testing.assert_array_equal(jaxqq.qqmm(x, w, **kwargs), np.zeros((3, 5)))
  np.testing.assert_array_equal(jaxqq.quantized_matmul(x, w), np.zeros((3, 5)))
  np.testing.assert_array_equal(jaxqq.quantized_matmul(w, x), np.zeros((5, 3)))
  assert jaxqq.qqmm(x[:, :0], w[:, :0]).tolist() == [[0.0] * 5] * 3


def test_the_same_under_jit_and_eagerly():
  rng = np.random.default_rng(19)
  x, w = oracle.random(rng, (33, 512), "bfloat16"), oracle.random(rng, (65, 512), "bfloat16")
  for product in (*PRODUCTS[:2], PRODUCTS[-2]):
    out = np.asarray(jax.jit(product)(x, w))
    np.testing.assert_array_equal(np.asarray(product(jnp.asarray(x), jnp.asarray(w))), out)


@pytest.mark.parametrize("product", [jaxqq.qqmm, jaxqq.quantized_matmul])
@pytest.mark.parametrize("packed", [False, True])
def test_the_reference_asks_for_float32_products(packed, product):
  """A CPU multiplies in float32 whatever is asked for; a TPU would not."""
  w = jax.ShapeDtypeStruct((64, 128), jnp.float32)
  args = jax.eval_shape(jaxqq.quantize, w) if packed else (w,)
  traced = jax.jit(product).trace(jax.ShapeDtypeStruct((8, 128), jnp.bfloat16), *args)
  dots = [
    line
    for line in traced.lower(lowering_platforms=("tpu",)).as_text().splitlines()
    if "dot_general" in line
  ]
  assert dots and all("HIGHEST" in line for line in dots)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_no_bit_of_x_is_lost(mode):
  """A w of one 1 a row picks x out, bit by bit; qqmm rounds it to codes."""
  m = oracle.MODES[mode]
  xs = [oracle.random(np.random.default_rng(22), (5, 64), x_dtype) for x_dtype in oracle.DTYPES]
  packed = oracle.pack(np.eye(64).astype(m.element).view(np.uint8), mode)
  scales = np.ones((64, 64 // m.group), m.scale)

  @jax.jit
  def products(xs, packed, scales):
    functions = jaxqq.quantized_matmul, jaxqq.qqmm
    return [[f(x, packed, scales, mode=mode) for f in functions] for x in xs]

  for x, outs in zip(xs, products(xs, packed, scales), strict=True):
    out, rounded = map(np.asarray, outs)
    assert out.dtype == rounded.dtype == x.dtype
    np.testing.assert_array_equal(out.view(np.uint8), x.view(np.uint8))
    assert (rounded != x).any()


@pytest.mark.parametrize("mode", ["mxfp8", "mxfp4"])
@pytest.mark.parametrize("exponent", [-100, -30, 40, 100])
def test_float16_beside_scales_beyond_its_range(mode, exponent):
  """2**exponent in a group of w: float16 holds neither that nor, of the smaller, the product."""
  rng = np.random.default_rng(23)
  x, w = oracle.random(rng, (5, 64), "float16"), oracle.random(rng, (7, 64), "float32")
  if exponent < 0:
    w[:, :32] *= np.float32(2.0**exponent)
  else:  # what it is multiplied by is 0, or the result would be infinite
    w[:, :32], x[:, :32] = w[:, :32] * np.float32(2.0**exponent), 0
  check([(Product(mode, False), x, w, {"packed": packed}) for packed in PACKED])
