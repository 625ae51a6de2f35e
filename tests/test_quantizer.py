"""`jaxqq.Quantizer`: each part of it against numpy, and what it promises of keys and of devices."""

from __future__ import annotations

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxqq
from jaxqq import _hadamard, _quantizer, _random_bits
from jaxqq._quantizer import Quantizer
from tests.support import oracle, recipes
from tests.support.messages import check_sentence
from tests.support.recipes import QUANTIZERS, Spec, numbers, words_of
from tests.support.sharding import QUICK, place

KEY = jax.random.key(3)
KEYS = 4096
STOCHASTIC = Quantizer(rounding="stochastic")
UNBIASED = Quantizer(rotation=128, scale="unbiased")


def key_for(quantizer):
  return KEY if quantizer.needs_key else None


# Random bits


@pytest.mark.parametrize(
  ("counter", "key", "seven", "ten"),
  [
    (0, 0, "5f6fb709 0d893f64 4f121f81 4f730a48", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (0xFFFFFFFF, 0xFFFFFFFF, None, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
  ],
)
def test_philox_is_that_of_its_authors(counter, key, seven, ten):
  """The known answers of Random123 (kat_vectors), of 10 rounds and of the 7 that are used."""
  words = [int(word, 16) for word in ten.split()]
  assert [int(word) for word in recipes.philox([counter] * 4, [key] * 2, rounds=10)] == words
  own = [int(word) for word in _random_bits.philox([np.uint32(counter)] * 4, [np.uint32(key)] * 2)]
  assert own == [int(word) for word in recipes.philox([counter] * 4, [key] * 2)]
  if seven is not None:
    assert own == [int(word, 16) for word in seven.split()]


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 40)])
def test_bits_are_those_of_a_place(shape):
  for key in (KEY, jax.random.key(3, impl="rbg")):
    words = _random_bits.stream(_random_bits.key_words("f", "key", key), 1)
    matrix = jnp.arange(int(np.prod(shape[:-2])), dtype=jnp.uint32).reshape(shape[:-2])
    bits = _random_bits.uniform16(words, shape, matrix)
    np.testing.assert_array_equal(bits, recipes.uniform16(recipes.stream(words_of(key), 1), shape))
    np.testing.assert_array_equal(
      _random_bits.signs(words, 128), recipes.signs(recipes.stream(words_of(key), 1), 128)
    )


def test_bits_are_uniform():
  words = _random_bits.stream(_random_bits.key_words("f", "key", KEY), 0)
  bits = np.asarray(_random_bits.uniform16(words, (512, 512)))
  counts = np.bincount(bits.ravel() >> 8, minlength=256)
  assert bits.min() >= 0 and bits.max() < 65536
  chi_squared = ((counts - 1024) ** 2 / 1024).sum()
  assert abs(chi_squared - 255) < 4 * np.sqrt(2 * 255)
  neighbours = np.corrcoef(bits[:, :-1].ravel(), bits[:, 1:].ravel())[0, 1]
  assert abs(neighbours) < 4 / 512


# Codes and scales


@pytest.mark.optimized
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_bits_are_the_oracles(quantizer):
  packed, scales, global_scale = recipes.check_bits(quantizer, KEY)
  mode = quantizer.mode
  left = jaxqq.dequantize(packed, scales, mode=mode, global_scale=global_scale, dtype=jnp.float32)
  codes = oracle.unpack(np.asarray(packed), mode)
  of_all = None if global_scale is None else float(global_scale)
  want = recipes.value_of(codes, np.asarray(scales), mode, of_all)
  np.testing.assert_allclose(left, want, rtol=2**-22)


def test_the_default_is_quantize():
  a = numbers((64, 64))
  for mode in oracle.MODES:
    amax = "amax" if mode == "nvfp4" else None
    for own, want in zip(
      Quantizer(mode).quantize(a), jaxqq.quantize(a, mode=mode, global_scale=amax), strict=False
    ):
      np.testing.assert_array_equal(own, want)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_qqmm_takes_what_it_gives(dtype):
  x, w = numbers((8, 64)).astype(oracle.DTYPES[dtype]), numbers((64, 64), 1)
  packed, scales, global_scale = Quantizer(square=True, scale="four_over_six").quantize(w)
  out = jaxqq.qqmm(x, packed, scales, global_scale_x="amax", global_scale_w=global_scale)
  x_hat = oracle.round_trip(x, "nvfp4", np.abs(x.astype(np.float32)).max())
  codes, w_scales, of_w = recipes.quantized(w, Spec(square=True, scale="four_over_six"))
  w_hat = recipes.value_of(codes, w_scales, "nvfp4", of_w)
  oracle.assert_within_bound(np.asarray(out), *oracle.product(x_hat, w_hat))


@pytest.mark.parametrize("quantizer", [Quantizer(square=True), STOCHASTIC], ids=str)
def test_leading_axes(quantizer):
  """One amax for all; rows are rows, and squares are of one matrix."""
  a = numbers((6, 24, 32)).reshape(2, 3, 24, 32)
  packed, scales, _ = quantizer.quantize(a, key_for(quantizer))
  assert packed.shape == (2, 3, 24, 4) and scales.shape == (2, 3, 24, 2)
  if quantizer.square:
    for index in np.ndindex(2, 3):
      want = quantizer.quantize(a[index], amax=float(np.abs(a).max()))
      np.testing.assert_array_equal(packed[index], want[0])
  else:
    rows = quantizer.quantize(a.reshape(-1, 32), KEY)
    np.testing.assert_array_equal(packed.reshape(-1, 4), rows[0])
  vector = STOCHASTIC.quantize(a[0, 0, 0], KEY)
  assert vector[0].shape == (4,) and vector[1].shape == (2,)


@pytest.mark.parametrize("quantizer", QUANTIZERS[:5], ids=str)
def test_columns_are_rows_of_the_transpose(quantizer):
  a = numbers((64, 64))
  of_columns = quantizer.quantize(a, key_for(quantizer), axis=-2)
  of_rows = quantizer.quantize(np.ascontiguousarray(a.T), key_for(quantizer))
  for own, want in zip(of_columns, of_rows, strict=True):
    np.testing.assert_array_equal(own, want)


def test_vmap_quantizes_each():
  a = jnp.asarray(numbers((2 * 64, 64)).reshape(2, 64, 64))
  keys = jax.random.split(KEY, 2)
  outs = jax.vmap(STOCHASTIC.quantize)(a, keys)
  for i in range(2):
    for own, want in zip(outs, STOCHASTIC.quantize(a[i], keys[i]), strict=True):
      np.testing.assert_array_equal(own[i], want)


@pytest.mark.parametrize(
  ("mode", "scale"), [("nvfp4", "amax"), ("nvfp4", "four_over_six"), ("mxfp8", "amax")]
)
def test_squares_are_transposed_with_the_matrix(mode, scale):
  quantizer, size = Quantizer(mode, square=True, scale=scale), oracle.MODES[mode].group
  a = numbers((64, 64))
  of_a, of_transpose = quantizer.quantize(a), quantizer.quantize(a.T)
  codes, transposed = (oracle.unpack(np.asarray(part[0]), mode) for part in (of_a, of_transpose))
  np.testing.assert_array_equal(codes.T, transposed)
  squares = np.asarray(of_a[1])[::size]
  np.testing.assert_array_equal(np.repeat(squares, size, axis=0), of_a[1])
  np.testing.assert_array_equal(squares.T, np.asarray(of_transpose[1])[::size])
  rows = np.asarray(Quantizer(mode, scale=scale).quantize(a)[1])
  assert (rows != np.asarray(of_a[1])).any()


def test_a_square_that_is_not_finite():
  a = numbers((64, 64))
  a[20, 20] = np.inf
  packed, scales, _ = Quantizer("mxfp8", square=True).quantize(a)
  assert (np.asarray(scales)[:32, 0] == 0xFF).all() and not (np.asarray(scales)[32:] == 0xFF).any()
  assert not (np.asarray(scales)[:, 1] == 0xFF).any()
  for quantizer in (Quantizer(), STOCHASTIC, Quantizer(scale="four_over_six")):
    packed, scales, global_scale = quantizer.quantize(a, key_for(quantizer))
    assert (np.asarray(scales) == 0x7F).all()  # the tensor's amax is not finite
    assert not np.isfinite(float(global_scale)) and not np.asarray(packed).any()


# Stochastic rounding


def values_between(dtype):
  """Each magnitude of a type, and numbers of every kind between it and the next."""
  table = recipes.magnitudes(dtype)
  lower, step = table[:-1, None], np.diff(table)[:, None]
  parts = lower + step * [0, 2.0**-9, 1 / 8, 1 / 3, 1 / 2, 7 / 8, 1 - 2.0**-9]
  signed = np.concatenate([parts.ravel(), -parts.ravel()]).astype(np.float32)
  return signed, table[-1]


def rounded_at_random(a, dtype):
  """Both neighbours of each magnitude, and the standard error of a mean over all keys."""
  table, a = recipes.magnitudes(dtype), np.abs(a).astype(np.float64)
  lower = table[np.searchsorted(table, a, side="right") - 1]
  upper = table[np.searchsorted(table, a, side="left")]
  step = upper - lower
  chance = np.where(step == 0, 0, (a - lower) / np.where(step == 0, 1, step))
  return lower, upper, step * np.sqrt(chance * (1 - chance) / KEYS)


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_the_mean_over_keys_is_the_value(mode):
  """Every element value, boundaries and between, in groups whose scale is 1."""
  group, quantizer = oracle.MODES[mode].group, Quantizer(mode, rounding="stochastic")
  values, largest = values_between(oracle.MODES[mode].element)
  if mode == "mxfp8":  # of 1764 numbers every third; with both neighbours in sixteenths
    values = values[::3]
  columns = group - 1
  values = np.pad(values, (0, -len(values) % columns)).reshape(-1, columns)
  a = np.concatenate([values, np.full_like(values[:, :1], largest)], axis=1)

  def once(key):
    amax = 2688.0 if mode == "nvfp4" else None
    packed, scales, of_all = quantizer.quantize(a, key, amax=amax)
    return jaxqq.dequantize(packed, scales, mode=mode, global_scale=of_all, dtype=jnp.float32)

  out = np.asarray(jax.jit(jax.vmap(once))(jax.random.split(KEY, KEYS)), np.float64)
  lower, upper, error = rounded_at_random(a, oracle.MODES[mode].element)
  assert ((np.abs(out) == lower) | (np.abs(out) == upper)).all()
  exact = lower == upper  # these never move
  assert exact.any() and not error[exact].any() and (error[~exact] > 0).all()
  assert (np.abs(out.mean(axis=0) - a) <= 4 * error + 2.0**-17 * (upper - lower)).all()


def test_nothing_is_clipped():
  """Under scales of all kinds, subnormal ones too, no element is too large: the mean is right."""
  rng = np.random.default_rng(5)
  a = rng.standard_normal((64, 16)).astype(np.float32)
  a *= 2.0 ** -np.arange(0, 24, 24 / 64)[:, None].astype(np.float32)
  _, scales, amax = recipes.quantize_codes(a, Spec(rounding="stochastic"), words_of(KEY))
  s = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * amax / 2688
  assert (np.abs(a) <= 6 * s * (1 + 2.0**-22)).all() and (scales < 8).any() and (scales > 0).all()

  def once(key):
    packed, scales, amax = STOCHASTIC.quantize(a, key)
    return jaxqq.dequantize(packed, scales, global_scale=amax, dtype=jnp.float32)

  out = np.asarray(jax.jit(jax.vmap(once))(jax.random.split(KEY, KEYS)), np.float64)
  error = rounded_at_random(np.minimum(np.abs(a) / s, 6), ml_dtypes.float4_e2m1fn)[2] * s
  assert (np.abs(out.mean(axis=0) - a) <= 4 * error + 2.0**-15 * s).all()
  nearest = oracle.round_trip(a, "nvfp4", amax)
  assert (np.abs(nearest).max(axis=1) < 0.97 * np.abs(a).max(axis=1)).any()  # there it would be


# Unbiased scales


def unbiased_numbers(columns):
  """Over so many binades that scales are of all kinds: subnormal, and those that round to 0."""
  exponents = -np.arange(0, 24, 24 / 64, dtype=np.float32)[:, None]
  return numbers((64, columns)) * np.exp2(np.round(exponents)).astype(np.float32)


def test_unbiased_scales_are_the_published_ones():
  """Codes, scales and the tensor's, from its largest groups to those whose scale rounds to 0."""
  a, quantizer = unbiased_numbers(256), dataclasses.replace(UNBIASED, rotation=32)
  packed, scales, global_scale = jax.jit(quantizer.quantize)(a, KEY)
  want_codes, want_scales, of_all = recipes.quantized(a, Spec.of(quantizer), words_of(KEY))
  np.testing.assert_array_equal(scales, want_scales)
  codes = oracle.unpack(np.asarray(packed), "nvfp4")
  np.testing.assert_array_equal(codes, want_codes)
  assert float(global_scale) == of_all
  e4m3 = np.asarray(scales).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  assert 240 <= e4m3.max() <= 320 and (e4m3 < 2.0**-6).any()
  of_zeros = ~(codes & 7).reshape(*e4m3.shape, 16).any(axis=-1)
  assert of_zeros.any() and set(np.unique(e4m3[of_zeros])) <= {0.9375, 1, 1.125}


def test_unbiased_scales_at_the_ends():
  """Zeros; numbers that are not finite; numbers far above the amax that is given."""

  @jax.jit
  def left(value, amax):
    packed, scales, of_all = UNBIASED.quantize(jnp.full((2, 128), value), KEY, amax=amax)
    return jaxqq.dequantize(packed, scales, global_scale=of_all, dtype=jnp.float32)

  assert not left(np.float32(0), np.float32(0)).any()
  assert np.isnan(left(np.float32(np.inf), np.float32(1))).all()
  above = np.asarray(left(np.float32(3), np.float32(1e-30)))
  assert 0 < above.max() < 2e-30


def test_the_mean_of_unbiased_scales_is_the_value():
  """Rotated back. Without the correction it would be shorter by 4 in 1000."""
  a = np.random.default_rng(6).standard_normal((2, 128)).astype(np.float32)
  matrix, count = recipes.hadamard(128, np.ones(128)).astype(np.float32), 2048

  def once(key):
    packed, scales, of_all = UNBIASED.quantize(a, key)
    left = jaxqq.dequantize(packed, scales, global_scale=of_all, dtype=jnp.float32)
    stream = _random_bits.stream(_random_bits.key_words("f", "key", key), recipes.ROTATION)
    return left @ matrix * _random_bits.signs(stream, 128)[None]

  out = np.asarray(jax.jit(jax.vmap(once))(jax.random.split(KEY, count)), np.float64)
  mean = out.mean(axis=0)
  assert (np.abs(mean - a) <= 4 * out.std(axis=0) / np.sqrt(count)).all()
  assert abs((mean * a).sum() / (a * a).sum() - 1) < 1e-3


# Rotation


@pytest.mark.parametrize("size", _hadamard.SIZES)
def test_rotations(size):
  """Orthonormal, so that products stay; what is computed is that, rounded to bfloat16."""
  key = _random_bits.stream(_random_bits.key_words("f", "key", KEY), recipes.ROTATION)
  of = recipes.signs(recipes.stream(words_of(KEY), recipes.ROTATION), size)
  matrix = recipes.hadamard(size, of)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-15)
  x, w = numbers((5, 256)), numbers((7, 256), 1)
  exact = x.astype(np.float64) @ w.T.astype(np.float64)
  np.testing.assert_allclose(recipes.rotate(x, of) @ recipes.rotate(w, of).T, exact, atol=1e-12)
  rotated = jax.jit(lambda a: _hadamard.rotated(a, _random_bits.signs(key, size)))
  ours = rotated(jnp.asarray(x))
  assert ours.dtype == jnp.bfloat16
  want = recipes.rotate(x, of)
  np.testing.assert_allclose(np.asarray(ours, np.float64), want, rtol=2**-8, atol=1e-7)
  # Single numbers are columns of H: what each is spread to.
  ones = np.zeros((5, 256), np.float32)
  ones[range(5), [0, 1, 7, size - 1, 3]] = 1
  rounded = recipes.rotate(ones, of).astype(np.float32).astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(rotated(jnp.asarray(ones)), rounded)


def test_rotations_in_the_whole_range():
  """Sums of the largest numbers stay in range; those below 2**-126 are zeros everywhere."""
  rotated, signs = jax.jit(_hadamard.rotated), np.ones(16, np.float32)
  large, small = (
    np.asarray(rotated(np.full((1, 16), number, np.float32), signs), np.float32)
    for number in (2.0**125, 2.0**-126)
  )
  assert large[0, 0] == 2.0**127
  assert not small.any()


# Four over six


@pytest.mark.parametrize("square", [False, True])
def test_four_over_six_never_has_a_larger_error(square):
  """Than 6 alone or 4 alone, in any block, under the same tensor scale; often a smaller one."""
  rng = np.random.default_rng(7)
  tails, level = rng.standard_t(4, (64, 256)), rng.uniform(-5, 5, (64, 256))
  a = np.where(np.arange(256) // 16 % 2, tails, level).astype(np.float32)
  a[:16, :64] *= 2.0**-12  # scales that are subnormal
  quantizer = Quantizer(square=square, scale="four_over_six")
  packed, scales, global_scale = quantizer.quantize(a)
  spec, group = Spec(square=square), 16
  blocks, enc = recipes.block_amax(a, spec), np.float32(2688) / np.float32(global_scale)

  def error(codes, scales):
    left = recipes.value_of(codes, scales, "nvfp4", float(global_scale))
    sums = ((left - a) ** 2).reshape(64, -1, group).sum(axis=-1)
    return recipes.over_squares(sums, 16, np.sum) if square else sums

  own = error(oracle.unpack(np.asarray(packed), "nvfp4"), np.asarray(scales))
  alone = [
    error(*recipes._float_codes(a, recipes._float_scales(blocks, enc, n, up=False), enc, None))
    for n in (6, 4)
  ]
  assert (own <= np.minimum(*alone) * (1 + 1e-3)).all()
  takes_four = own < alone[0]
  assert 0.1 < takes_four.mean() < 0.9
  assert float(global_scale) == float(np.float32(1.75) * np.abs(a).max())
  assert np.asarray(scales).view(ml_dtypes.float8_e4m3fn).astype(float).max() <= 384


@pytest.mark.parametrize("square", [False, True])
def test_sums_of_squared_errors_are_exact(square):
  """To the last bit, so that no order of adding them up decides; errors of 8 and more are cut."""
  errors = np.random.default_rng(2).uniform(0, 6, (32, 4, 16)).astype(np.float32)
  errors[0, 0] = 9
  over_block = functools.partial(_quantizer._over_squares, size=16)
  high, low = _quantizer._squared_error(
    jnp.asarray(errors), over_block if square else _quantizer._over_groups
  )
  sums = (np.minimum(errors * 8192, 65535).astype(np.int64) ** 2).sum(axis=-1)
  want = recipes.over_squares(sums, 16, np.sum) if square else sums
  total = np.asarray(high, np.int64).squeeze(-1) * 65536 + np.asarray(low).squeeze(-1)
  np.testing.assert_array_equal(total, want)
  assert int(low.min()) >= 0 and int(low.max()) < 65536


def test_four_over_six_at_the_ends_of_the_range():
  quantizer = Quantizer(scale="four_over_six")
  for value in (3e38, 2.0**-100, 0.0):
    packed, scales, global_scale = quantizer.quantize(jnp.full((1, 16), value))
    left = jaxqq.dequantize(packed, scales, global_scale=global_scale, dtype=jnp.float32)
    np.testing.assert_allclose(left, value, rtol=1e-6 if value < 1 else 0.05)


# The same bits


@pytest.fixture(scope="module")
def operand():
  return jnp.asarray(numbers((64, 256)))


def run(quantizer, a, key):
  packed, scales, global_scale = quantizer.quantize(a, key)
  return (packed, scales) if global_scale is None else (packed, scales, global_scale)


def assert_same(own, want):
  for a, b in zip(own, want, strict=True):
    np.testing.assert_array_equal(a, b)


SAME = (
  Quantizer(rounding="stochastic", rotation=16),
  Quantizer("mxfp8", square=True, rounding="stochastic"),
  Quantizer(square=True, scale="four_over_six"),
  Quantizer(rotation=64, scale="unbiased"),
)


@pytest.mark.parametrize("quantizer", SAME, ids=str)
@QUICK
def test_the_same_bits_in_vmap_and_scan(quantizer, operand):
  one = functools.partial(run, quantizer)
  keys = jax.random.split(KEY, 3) if quantizer.needs_key else None
  axes = None if keys is None else 0
  each = jnp.stack([operand, 2 * operand, operand[::-1]])
  want = [one(a, None if keys is None else keys[i]) for i, a in enumerate(each)]
  want = [np.stack(part) for part in zip(*want, strict=True)]
  assert_same(jax.jit(jax.vmap(one, in_axes=(0, axes)))(each, keys), want)
  _, scanned = jax.lax.scan(lambda c, step: (c, one(*step)), 0, (each, keys))
  assert_same(scanned, want)


@pytest.mark.parametrize(
  ("quantizer", "spec"),
  [
    (SAME[0], P(("data", "tensor"))),
    (SAME[0], P(None, ("data", "tensor"))),
    (SAME[1], P(("data", "tensor"))),
    (SAME[2], P("data", "tensor")),
    (SAME[3], P("data", "tensor")),
  ],
  ids=str,
)
@QUICK
def test_the_same_bits_on_many_devices(quantizer, spec, operand):
  """Also where a split cuts squares: the places and the amax are those of the whole array."""
  want = run(quantizer, operand, key_for(quantizer))
  split = jax.jit(functools.partial(run, quantizer))
  assert_same(split(place(operand, spec), key_for(quantizer)), want)


def test_another_key_gives_other_bits(operand):
  operand = operand[:, :64]
  first, second = (STOCHASTIC.quantize(operand, jax.random.key(i))[0] for i in range(2))
  assert (np.asarray(first) != np.asarray(second)).mean() > 0.5
  raw = STOCHASTIC.quantize(operand, jax.random.key_data(jax.random.key(0)))[0]
  np.testing.assert_array_equal(raw, first)


def test_two_operands_share_a_rotation(operand):
  quantizer = Quantizer(rounding="stochastic", rotation=16)
  one, other = (quantizer.quantize(operand, jax.random.key(i), rotation_key=KEY) for i in range(2))
  np.testing.assert_array_equal(one[2], other[2])  # the amax of the same rotated numbers
  assert (np.asarray(one[0]) != np.asarray(other[0])).any()


# Bad input


@pytest.mark.parametrize(
  ("attributes", "error", "message"),
  [
    ({"mode": "fp4"}, ValueError, "unknown mode 'fp4'"),
    ({"square": 1}, TypeError, "square must be True or False, got 1"),
    ({"rounding": "up"}, ValueError, "unknown rounding 'up'; it must be one of"),
    ({"scale": 6}, ValueError, "unknown scale 6; it must be one of"),
    ({"rotation": 8}, ValueError, "rotation must be None, or the size"),
    ({"rotation": True}, ValueError, "rotation must be None, or the size"),
    (
      {"mode": "mxfp8", "scale": "four_over_six"},
      ValueError,
      "the scales of mode 'mxfp8' are powers of two",
    ),
    ({"rounding": "stochastic", "scale": "four_over_six"}, ValueError, "would move the mean"),
    ({"scale": "unbiased"}, ValueError, "'unbiased' and rotation None"),
    (
      {"scale": "unbiased", "rotation": 128, "mode": "mxfp8"},
      ValueError,
      "mode 'mxfp8', whose scales are powers of two; use mode 'nvfp4'",
    ),
    ({"scale": "unbiased", "rotation": 128, "square": True}, ValueError, "use square False"),
    (
      {"scale": "unbiased", "rotation": 128, "rounding": "stochastic"},
      ValueError,
      "use rounding 'nearest', or scale 'amax'",
    ),
  ],
)
def test_wrong_attributes(attributes, error, message):
  with pytest.raises(error) as caught:
    Quantizer(**attributes)
  check_sentence(str(caught.value), "Quantizer", [message])


@pytest.mark.parametrize(
  ("quantizer", "shape", "arguments", "error", "message"),
  [
    (Quantizer(), (4, 40), {}, ValueError, "multiple of the group size 16"),
    (Quantizer(rotation=64), (4, 96), {"key": KEY}, ValueError, "multiple of the rotation 64"),
    (Quantizer(square=True), (32,), {}, ValueError, "square blocks need two axes"),
    (STOCHASTIC, (4, 32), {}, ValueError, "a key is needed where rounding is 'stochastic'"),
    (Quantizer(rotation=16), (4, 32), {}, ValueError, "a key is needed where rotation is 16"),
    (UNBIASED, (4, 128), {}, ValueError, "a key is needed where scale is 'unbiased'"),
    (Quantizer(), (4, 32), {"key": KEY}, ValueError, "has nothing random for it"),
    (STOCHASTIC, (4, 32), {"key": 0}, TypeError, "key must be a key, as jax.random.key(0)"),
    (STOCHASTIC, (4, 32), {"key": jnp.ones(2)}, TypeError, "got float32 of shape (2,)"),
    (STOCHASTIC, (4, 32), {"key": jax.random.split(KEY)}, ValueError, "must be one key"),
    (Quantizer("mxfp8"), (4, 32), {"amax": 1.0}, ValueError, "has no global scale"),
    (Quantizer(), (4, 32), {"axis": 0}, ValueError, "axis must be -1, or -2"),
    (Quantizer(), (4, 32), {"axis": -1.0}, ValueError, "got -1.0"),
    (Quantizer(), (4, 32), {"axis": np.array([-1, -2])}, ValueError, "got array([-1, -2])"),
    (Quantizer(), (32,), {"axis": -2}, ValueError, "with two axes or more, got -2"),
    (Quantizer(rotation=64), (96, 4), {"key": KEY, "axis": -2}, ValueError, "before the last"),
  ],
)
def test_wrong_arguments(quantizer, shape, arguments, error, message):
  with pytest.raises(error) as caught:
    quantizer.quantize(jnp.ones(shape), **arguments)
  check_sentence(str(caught.value), "Quantizer", [message])


def test_wrong_arrays():
  with pytest.raises(TypeError) as caught:
    Quantizer().quantize(jnp.ones((4, 32), jnp.int32))
  check_sentence(str(caught.value), "Quantizer", ["a must be float32", "int32"])


@pytest.mark.parametrize("documented", [Quantizer, Quantizer.quantize])
def test_examples_in_docstrings(documented):
  names = {"jax": jax, "jnp": jnp, "jaxqq": jaxqq}
  example = doctest.DocTestParser().get_doctest(documented.__doc__, names, "example", None, 0)
  assert example.examples
  assert doctest.DocTestRunner().run(example).failed == 0


def test_two_of_the_same_are_equal():
  assert dataclasses.replace(Quantizer(), rotation=16) == Quantizer(rotation=16)
  assert hash(Quantizer(square=True)) == hash(Quantizer(square=True))
