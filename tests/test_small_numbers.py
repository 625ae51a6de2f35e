"""Global scales of every size that float32 has, zero included, against float64.

XLA takes subnormals for zeros on a CPU, in products and in comparisons; so each of these numbers is
made and compared by numpy.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxqq
from jaxqq._formats import FORMATS
from jaxqq._quantize import alpha_factors
from tests.support import oracle

pytestmark = pytest.mark.optimized

NVFP4 = FORMATS["nvfp4"]
TINY = float(np.finfo(np.float32).tiny)  # 2**-126
# From the smallest subnormal up; 3.16e-35 is 2688 * 2**-126, and 7.9e-36 is 2688 * 2**-128.
AMAXES = (1e-45, 3e-44, 1e-41, 5e-39, 1.2e-38, 1e-37, 7e-36, 9e-36, 3e-35, 3.3e-35, 1e-33, 1e-31)
AMAXES += (2.0**-40, float(np.nextafter(np.float32(2.0**-40), np.float32(0))))
AMAXES += (1e-30, 1e-20, 1e-12, 1e-5, 1.0, 1e7, 1e20, 1e30, 3e38)


def of_amax(rng, shape, amax):
  """Random float32 whose largest magnitude is amax, with rows of several magnitudes."""
  a = rng.uniform(-1, 1, shape) * 2.0 ** rng.integers(-10, 1, (*shape[:-1], 1))
  a[(0,) * len(shape)] = 1
  return (a * float(np.float32(amax))).astype(np.float32)


def error_of_float32(exact):
  """Three roundings to 24 bits, and one more where the number is subnormal."""
  return 2.0**-22 * np.abs(exact) + 2.0**-149


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("amax", AMAXES)
def test_bits_and_values(amax, jit):
  rng = np.random.default_rng(1)
  w = of_amax(rng, (32, 64), amax)
  global_scale = np.abs(w).max()
  with jax.disable_jit(not jit):
    packed, scales = jaxqq.quantize(w, global_scale=global_scale)
    values = jaxqq.dequantize(packed, scales, global_scale=global_scale, dtype=jnp.float32)
    short = jaxqq.dequantize(packed, scales, global_scale=global_scale)
  codes, want_scales = oracle.quantize_codes(w, "nvfp4", global_scale)
  np.testing.assert_array_equal(scales, want_scales)
  np.testing.assert_array_equal(packed, oracle.pack(codes, "nvfp4"))
  exact = oracle.round_trip(w, "nvfp4", global_scale)
  assert (np.abs(np.asarray(values).astype(np.float64) - exact) <= error_of_float32(exact)).all()
  smallest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).smallest_subnormal)
  error = np.abs(np.asarray(short).astype(np.float64) - exact)
  assert (error <= 2.0**-8 * np.abs(exact) + smallest).all()
  # Within what e2m1 and e4m3 lose: half a step of each, and 2**-10 of a scale where that is least.
  error = np.abs(np.asarray(values).astype(np.float64) - w)
  assert (
    error <= np.abs(w).max(-1, keepdims=True) * 0.2 + float(amax) * 2.0**-16 + 2.0**-149
  ).all()


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("amax", [1e-45, 1e-38, 1e-35])
def test_what_is_above_its_amax_saturates(amax, jit):
  amax = np.float32(amax)
  w = np.full((2, 16), 3e38, np.float32)
  w[1] = -1
  with jax.disable_jit(not jit):
    packed, scales = jaxqq.quantize(w, global_scale=amax)
    values = jaxqq.dequantize(packed, scales, global_scale=amax, dtype=jnp.float32)
  assert (np.asarray(scales) == 0x7E).all()
  want = np.broadcast_to(np.array([[1], [-1]]) * float(amax), (2, 16))
  assert (np.abs(np.asarray(values).astype(np.float64) - want) <= error_of_float32(want)).all()


def operands(amax_x, amax_w):
  rng = np.random.default_rng(2)
  x, w = of_amax(rng, (5, 64), amax_x), of_amax(rng, (7, 64), amax_w)
  return x, w, np.abs(x).max(), np.abs(w).max()


def check_product(out, exact, mag, lost=0.0):
  """Section 3's bound of float32; results below 2**-126 are zeros on a CPU."""
  out, largest = np.asarray(out).astype(np.float64), float(np.finfo(np.float32).max)
  inside = mag < largest / 2
  error, bound = np.abs(out - exact), 2.0**-18 * mag + TINY + lost
  assert (error <= bound)[inside].all(), np.max((error / bound)[inside])
  assert not np.isnan(out).any()


@pytest.mark.parametrize(
  ("how", "amax_x"),
  [("jit", amax) for amax in AMAXES]
  + [
    (how, amax) for how in ("eager", "constants", "packed") for amax in (1e-45, 9e-36, 1e-20, 3e38)
  ],
)
def test_product(how, amax_x):
  """Of constants, XLA would multiply one factor by the other."""
  amaxes = AMAXES if how == "jit" else (1e-45, 3e-35, 1e-20, 1e-17, 1.0, 3e38)
  given = [operands(amax_x, amax_w) for amax_w in amaxes]
  if how == "constants":
    outs = products_of_constants(given)
  elif how == "packed":
    weights = [
      jaxqq.quantize_weight(w, global_scale=jnp.asarray(scale_w)) for _, w, _, scale_w in given
    ]
    outs = [
      jaxqq.qqmm(x, weight, global_scale_x=scale_x)
      for (x, _, scale_x, _), weight in zip(given, weights, strict=True)
    ]
  else:
    with jax.disable_jit(how == "eager"):
      outs = [qqmm(*own) for own in given]
  for (x, w, scale_x, scale_w), out in zip(given, outs, strict=True):
    exact, mag = oracle.product(
      oracle.round_trip(x, "nvfp4", scale_x), oracle.round_trip(w, "nvfp4", scale_w)
    )
    check_product(out, exact, mag)


def products_of_constants(given):
  """The scales are the program's, which is one for all."""

  @jax.jit
  def products(pairs):
    how = [{"global_scale_x": a, "global_scale_w": b} for _, _, a, b in given]
    return [jaxqq.qqmm(x, w, **own) for (x, w), own in zip(pairs, how, strict=True)]

  return products([own[:2] for own in given])


@jax.jit
def qqmm(x, w, scale_x, scale_w):
  return jaxqq.qqmm(x, w, global_scale_x=scale_x, global_scale_w=scale_w)


def test_a_scale_for_each_matrix():
  """Tiny and large ones in one batch."""
  rng = np.random.default_rng(3)
  amaxes = np.float32([1e-45, 1e-36, 1, 1e30])
  w = np.stack([of_amax(rng, (8, 64), amax) for amax in amaxes])
  x = np.stack([of_amax(rng, (3, 64), amax) for amax in amaxes[::-1]])
  weight = jaxqq.quantize_weight(w, global_scale="amax")
  np.testing.assert_array_equal(
    np.asarray(weight.global_scale).view(np.int32), amaxes.view(np.int32)
  )
  scales = np.abs(x).max((1, 2))
  out = jax.vmap(lambda x, w, s: jaxqq.qqmm(x, w, global_scale_x=s))(x, weight, scales)
  values = np.asarray(weight.dequantize())
  for i in range(4):
    w_hat = oracle.round_trip(w[i], "nvfp4", amaxes[i])
    exact, mag = oracle.product(oracle.round_trip(x[i], "nvfp4", scales[i]), w_hat)
    check_product(out[i], exact, mag)
    assert (np.abs(values[i].astype(np.float64) - w_hat) <= error_of_float32(w_hat)).all()


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
@pytest.mark.parametrize(
  ("amax_x", "amax_w"), [*itertools.product((1e-38, 1e-36, 1e-20, 1.0, 1e20), (1e-38, 1e-35, 1.0))]
)
def test_gradients(amax_x, amax_w, backward, packed):
  """The cotangent is as large as 1e10, so that the gradients are in range."""
  x, w, scale_x, scale_w = operands(amax_x, amax_w)
  g = of_amax(np.random.default_rng(4), (5, 7), 1e10)
  scale_g = np.abs(g).max()
  weight = jaxqq.quantize_weight(w, global_scale=jnp.asarray(scale_w)) if packed else w
  scales = {"global_scale_x": scale_x} | ({} if packed else {"global_scale_w": scale_w})

  def f(x, w):
    return jaxqq.qqmm(x, w, backward=backward, **scales)

  def check_gradient(found, other, scale_other, cotangent):
    """cotangent @ other, both quantized anew along the rows of other, or as they are."""
    lost = np.zeros_like(other)
    if backward == "quantized":
      of_group = ((0, 0), (0, -other.shape[0] % 16))
      a, b = np.pad(cotangent, of_group), np.pad(other.T, of_group)
      product = oracle.product(
        oracle.round_trip(a, "nvfp4", scale_g), oracle.round_trip(b, "nvfp4", scale_other)
      )
    else:
      product = oracle.product(cotangent.astype(np.float64), other.T.astype(np.float64))
      if not packed:  # the product is XLA's, which takes subnormals for zeros on a CPU
        lost = np.where(np.abs(other) < TINY, other, 0)
    check_product(found, *product, np.abs(cotangent).astype(np.float64) @ np.abs(lost))

  if packed:
    (dx,) = jax.vjp(lambda x: f(x, weight), x)[1](g)
    w = oracle.round_trip(w, "nvfp4", scale_w)
    if backward == "quantized":  # after it was dequantized to float32
      w = np.asarray(weight.dequantize(jnp.float32))
  else:
    dx, dw = jax.vjp(f, x, weight)[1](g)
    check_gradient(dw, x, scale_x, g.T)
  check_gradient(dx, w, scale_w, g)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_factors_of_the_product(jit):
  """Normal, of even exponents, and together alpha."""
  amaxes = np.float32(AMAXES)
  with jax.disable_jit(not jit):
    factors = jax.jit(lambda x, w: alpha_factors(x, w, NVFP4))
    first, second = (np.asarray(f).astype(np.float64) for f in factors(amaxes[:, None], amaxes))
  assert first.shape == second.shape == (len(amaxes),) * 2
  wide = amaxes.astype(np.float64) / 2688
  alpha = wide[:, None] * wide
  assert (first >= TINY).all() and (second >= TINY).all()
  reached = alpha >= 2.0**-251
  np.testing.assert_allclose((first * second)[reached], alpha[reached], rtol=2.0**-22)
  assert ((first * second)[~reached] <= 2.0**-250).all()
  ratio = np.log2(first / second)[reached]
  assert np.abs(ratio).max() <= 2


def test_factors_of_one_scale_or_none():
  for scales in ((None, np.float32(1e-40)), (np.float32(1e-40), None)):
    first, second = (float(f) for f in alpha_factors(*scales, NVFP4))
    np.testing.assert_allclose(first * second, float(np.float32(1e-40)) / 2688, rtol=2.0**-22)
  assert [float(f) for f in alpha_factors(None, None, NVFP4)] == [1, 1]
  for bad in (np.nan, np.inf, -1.0, -1e-45):
    assert np.isnan(np.prod([float(f) for f in alpha_factors(np.float32(bad), None, NVFP4)]))
    assert np.isnan(np.prod([float(f) for f in alpha_factors(None, np.float32(bad), NVFP4)]))
  for zero in (0.0, -0.0):
    assert np.prod([float(f) for f in alpha_factors(np.float32(zero), None, NVFP4)]) == 0


# A global scale of zero is that of a tensor of zeros.


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_global_scale_of_zero_beside_other_numbers_is_nan(zero, jit):
  x, w = np.zeros((3, 64), np.float32), np.ones((5, 64), np.float32)
  x[1, 20] = 2.0**-126
  zero, one = np.float32(zero), np.float32(1)
  with jax.disable_jit(not jit):
    _, scales = jaxqq.quantize(x, global_scale=zero)
    out = jaxqq.qqmm(x, w, global_scale_x=zero, global_scale_w=one)
    swapped = jaxqq.qqmm(w, x, global_scale_x=one, global_scale_w=zero)
  np.testing.assert_array_equal(scales, [[0, 0, 0, 0], [0, 0x7F, 0, 0], [0, 0, 0, 0]][:3])
  want = np.zeros((3, 5))
  want[1] = np.nan
  np.testing.assert_array_equal(out, want)
  np.testing.assert_array_equal(swapped, want.T)


def test_a_negative_global_scale_poisons_even_if_subnormal():
  _, scales = jaxqq.quantize(np.ones((1, 16), np.float32), global_scale=np.float32(-1e-45))
  assert np.asarray(scales).tolist() == [[0x7F]]


def test_the_amax_of_subnormals_is_not_zero():
  """Neither a weight's nor, in a layer, that of its input; XLA's maximum says zero on a CPU."""
  w = np.full((2, 16), 1e-41, np.float32)
  weight = jaxqq.quantize_weight(w, global_scale="amax")
  assert np.asarray(weight.global_scale).view(np.int32) == w.view(np.int32)[0, 0]
  dot = jaxqq.dot_general("nvfp4", global_scale="amax")
  out = dot(w, 1e30 * np.ones((16, 3), np.float32), (((1,), (0,)), ((), ())))
  np.testing.assert_allclose(out, np.float64(w[0, 0]) * 1e30 * 16, rtol=1e-6)
