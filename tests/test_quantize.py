"""quantize and dequantize, bit for bit: against MLX's golden data and against the oracle."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxqq
from tests.support import oracle
from tests.support.golden import GOLDEN, SHORT

pytestmark = pytest.mark.optimized

MODES = tuple(oracle.MODES)


def check_bits(w, mode, global_scale=None, *, jit=True):
  """quantize(w) has the oracle's bits."""
  with jax.disable_jit(not jit):
    got = jaxqq.quantize(w, mode=mode, global_scale=global_scale)
  return check_bits_of(got, w, mode, global_scale)


@functools.partial(jax.jit, static_argnums=1)
def there_and_back(ws, mode):
  """Each w quantized, and that as float32: several by one program."""
  quantized = [jaxqq.quantize(w, mode=mode) for w in ws]
  return [(own, jaxqq.dequantize(*own, mode=mode, dtype=jnp.float32)) for own in quantized]


def check_bits_of(got, w, mode, global_scale=None):
  """The codes and scales that were got of w are the oracle's."""
  packed, scales = got
  want_codes, want_scales = oracle.quantize_codes(np.asarray(w), mode, global_scale)
  assert packed.dtype == np.uint32 and scales.dtype == np.uint8
  np.testing.assert_array_equal(np.asarray(scales), want_scales)
  np.testing.assert_array_equal(np.asarray(packed), oracle.pack(want_codes, mode))
  return want_codes, want_scales


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("case", ["nvfp4", "nvfp4g", "mxfp8", "mxfp4"])
def test_golden(case, dtype, jit):
  mode = case.removesuffix("g")
  w = GOLDEN["w"].astype(oracle.DTYPES[SHORT[dtype]])
  global_scale = np.abs(w.astype(np.float32)).max() if case.endswith("g") else None
  with jax.disable_jit(not jit):
    packed, scales = jaxqq.quantize(w, mode=mode, global_scale=global_scale)
    values = jaxqq.dequantize(
      packed, scales, mode=mode, global_scale=global_scale, dtype=jnp.float32
    )
  np.testing.assert_array_equal(scales, GOLDEN[f"{case}.{dtype}.ws"])
  np.testing.assert_array_equal(values, GOLDEN[f"{case}.{dtype}.dq"])
  codes = oracle.unpack(np.asarray(packed), mode)
  golden = oracle.unpack(GOLDEN[f"{case}.{dtype}.wq"], mode)
  # Under an nvfp4 scale of 0 MLX stores codes of 6, jaxqq zeros: the same value.
  zero = np.repeat(np.asarray(scales) == 0, oracle.MODES[mode].group, axis=-1)
  zero &= mode == "nvfp4"
  np.testing.assert_array_equal(codes[~zero], golden[~zero])
  assert not codes[zero].any()


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", ["nvfp4", "nvfp4 global", "mxfp8", "mxfp4"])
def test_a_million_random_values(case, dtype, jit):
  mode, _, with_global = case.partition(" ")
  rng = np.random.default_rng(1)
  # Magnitudes over many binades, so that scales of every kind come up.
  a = rng.standard_normal((1024, 1024)) * 2.0 ** rng.integers(-14, 12, (1024, 1))
  w = a.astype(oracle.DTYPES[dtype])
  global_scale = np.abs(w.astype(np.float32)).max() if with_global else None
  check_bits(w, mode, global_scale, jit=jit)


@pytest.mark.parametrize("mode", MODES)
def test_every_bfloat16_as_amax(mode):
  """Every finite bfloat16 leads a group; so every scale that bfloat16 data can have is met."""
  rng = np.random.default_rng(2)
  amax = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
  amax = amax[np.isfinite(amax.astype(np.float32))]
  rest = rng.uniform(-1, 1, (amax.size, oracle.MODES[mode].group))
  with np.errstate(under="ignore"):
    w = (rest * amax.astype(np.float64)[:, None]).astype(np.float32)
  w[:, 3] = amax.astype(np.float32)
  _, scales = check_bits(w, mode)
  assert len(np.unique(scales)) > (120 if mode == "nvfp4" else 240)
  check_bits(w.astype(ml_dtypes.bfloat16), mode)


@pytest.mark.parametrize("mode", MODES)
def test_codes_and_ties(mode):
  """Each element value, each midpoint between two, and the float32 next to both."""
  m = oracle.MODES[mode]
  codes = np.arange(1 << m.bits, dtype=np.uint8).view(m.element).astype(np.float32)
  points = np.unique(codes[np.isfinite(codes)])
  points = np.concatenate([points, (points[1:] + points[:-1]) / 2]).astype(np.float32)
  points = np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)])
  points = np.clip(points, -m.element_max, m.element_max).astype(np.float32)
  for scale in (
    (1.0, 0.5, 1.125, 2.0**-6, 208.0) if mode == "nvfp4" else 2.0 ** np.arange(-120, 118, 7)
  ):
    groups = np.zeros((points.size, m.group), np.float32)
    groups[:, 0] = m.element_max * scale  # pins the group's scale
    groups[:, 1] = points * np.float32(scale)
    groups[:, 2] = -groups[:, 1]
    _, scales = check_bits(groups, mode)
    assert len(np.unique(scales)) == 1


@pytest.mark.parametrize("mode", MODES)
def test_scale_boundaries(mode):
  """amax at and next to each value where the scale changes, subnormals included."""
  m = oracle.MODES[mode]
  if m.power_of_two:
    at = np.float32(m.element_max) * 2.0 ** np.arange(-151, 120, dtype=np.float64)
  else:
    scales = np.arange(127, dtype=np.uint8).view(m.scale).astype(np.float64)
    at = np.float64(6) * np.concatenate([scales, (scales[1:] + scales[:-1]) / 2])
  with np.errstate(under="ignore"):
    at = at.astype(np.float32)
  at = np.concatenate([at, np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(0))])
  groups = np.zeros((at.size, m.group), np.float32)
  groups[:, 0] = at
  groups[:, 1] = -at / 3
  check_bits(groups, mode)


@pytest.mark.parametrize("mode", MODES)
def test_extremes(mode):
  """Zeros of both signs, subnormals, the largest numbers, all in one array of each dtype."""
  ws = [extremes(dtype) for dtype in oracle.DTYPES.values()]
  for w, (got, _) in zip(ws, there_and_back(ws, mode), strict=True):
    check_bits_of(got, w, mode)
    check_bits(w, mode, jit=False)


def extremes(dtype):
  info = ml_dtypes.finfo(dtype)
  rows = [
    0.0,
    -0.0,
    float(info.smallest_subnormal),
    float(info.smallest_normal),
    float(info.max),
    -float(info.max),
    float(np.finfo(np.float32).smallest_subnormal) * 1000,
  ]
  w = np.zeros((2 * len(rows), 64), dtype)
  for i, value in enumerate(rows):
    w[i] = value
    w[len(rows) + i, ::7] = value
  return w


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_poisons_its_group(mode):
  m = oracle.MODES[mode]
  ws = [oracle.random(np.random.default_rng(3), (4, 4 * m.group), dtype) for dtype in oracle.DTYPES]
  for w in ws:
    w[0, 3] = np.nan
    w[1, m.group] = np.inf
    w[2, 4 * m.group - 1] = -np.inf
  nan = np.zeros((4, 4), bool)
  nan[0, 0] = nan[1, 1] = nan[2, 3] = True
  for w, (got, values) in zip(ws, there_and_back(ws, mode), strict=True):
    check_bits_of(got, w, mode)
    np.testing.assert_array_equal(np.isnan(values), np.repeat(nan, m.group, axis=1))
    assert (np.asarray(got[1])[nan] == (0x7F if mode == "nvfp4" else 0xFF)).all()


@pytest.mark.parametrize("global_scale", [np.nan, np.inf, -1.0])
def test_a_global_scale_that_is_no_amax_poisons(global_scale):
  w = np.ones((2, 32), np.float32)
  _, scales = jaxqq.quantize(w, global_scale=np.float32(global_scale))
  assert (np.asarray(scales) == 0x7F).all()
  values = jaxqq.dequantize(*jaxqq.quantize(w), global_scale=np.float32(global_scale))
  assert np.isnan(np.asarray(values, np.float32)).all()


def test_a_global_scale_of_zero_is_that_of_zeros():
  zeros = np.zeros((2, 32), np.float32)
  packed, scales = jaxqq.quantize(zeros, global_scale=np.float32(0))
  assert not np.asarray(packed).any() and not np.asarray(scales).any()
  values = jaxqq.dequantize(packed, scales, global_scale=np.float32(0))
  assert not np.asarray(values, np.float32).any()


@pytest.mark.parametrize("magnitude", [1e-25, 1e-10, 7.0, 1e10, 1e25])
def test_global_scales_of_every_size(magnitude):
  rng = np.random.default_rng(4)
  w = (rng.standard_normal((64, 256)) * magnitude).astype(np.float32)
  w *= np.float32(2) ** rng.integers(-12, 1, (64, 1)).astype(np.float32)
  for global_scale in (np.abs(w).max(), np.abs(w).max() * np.float32(1.7)):
    check_bits(w, "nvfp4", global_scale)
    check_bits(w, "nvfp4", global_scale, jit=False)


@pytest.mark.parametrize("mode", MODES)
def test_dequantize_every_code_under_every_scale(mode):
  """Scales as uint8 and as float8, to every dtype."""
  m = oracle.MODES[mode]
  codes = np.resize(np.arange(1 << m.bits, dtype=np.uint8), max(1 << m.bits, m.group))
  codes = np.broadcast_to(codes, (256, codes.size))
  scales = np.broadcast_to(
    np.arange(256, dtype=np.uint8)[:, None], (256, codes.shape[1] // m.group)
  )
  codes, scales = map(np.ascontiguousarray, (codes, scales))

  @jax.jit
  def dequantized(packed, *scales):
    return [
      {
        dtype: jaxqq.dequantize(packed, own, mode=mode, dtype=oracle.DTYPES[dtype])
        for dtype in oracle.DTYPES
      }
      for own in scales
    ]

  exact = oracle.values(codes, scales, mode)
  for outs in dequantized(oracle.pack(codes, mode), scales, scales.view(m.scale)):
    for dtype, out in outs.items():
      assert out.dtype == oracle.DTYPES[dtype]
      with np.errstate(all="ignore"):
        want = exact.astype(np.float32).astype(oracle.DTYPES[dtype])
      np.testing.assert_array_equal(np.asarray(out).astype(np.float64), want.astype(np.float64))
      assert (np.signbit(np.asarray(out, np.float32)) == np.signbit(want.astype(np.float32)))[
        ~np.isnan(exact)
      ].all()


@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_axes_and_size_zero(mode):
  group = oracle.MODES[mode].group
  rng = np.random.default_rng(5)
  shapes = (group,), (3, 0), (0, group), (2, 3, 2 * group), (2, 1, 3, 2, group), (0,)
  ws = [oracle.random(rng, shape, "float32") for shape in shapes]
  for w, (got, values) in zip(ws, there_and_back(ws, mode), strict=True):
    check_bits_of(got, w, mode)
    assert values.shape == w.shape


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("shape", [(96, 5), (64, 0), (2, 3, 32, 7)], ids=str)
def test_along_the_axis_before(mode, shape):
  w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  out = jaxqq.quantize(w, mode=mode, axis=-2)
  want = oracle.quantize(np.swapaxes(w, -1, -2), mode)
  for a, b in zip(out, want, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_vmap_and_arguments_by_position(mode):
  m = oracle.MODES[mode]
  w = oracle.random(np.random.default_rng(6), (3, 4, 2 * m.group), "float32")
  packed, scales = jax.vmap(lambda w: jaxqq.quantize(w, m.group, m.bits, mode), in_axes=1)(w)
  want_packed, want_scales = oracle.quantize(np.swapaxes(w, 0, 1), mode)
  np.testing.assert_array_equal(packed, want_packed)
  np.testing.assert_array_equal(scales, want_scales)
  values = jax.vmap(lambda p, s: jaxqq.dequantize(p, s, m.group, m.bits, mode))(packed, scales)
  assert values.dtype == jnp.bfloat16 and values.shape == (4, 3, 2 * m.group)


def test_dequantize_then_quantize_is_the_identity():
  for mode in MODES:
    w = oracle.random(np.random.default_rng(7), (64, 256), "float32")
    packed, scales = jaxqq.quantize(w, mode=mode)
    again = jaxqq.quantize(jaxqq.dequantize(packed, scales, mode=mode), mode=mode)
    values = jaxqq.dequantize(*again, mode=mode)
    np.testing.assert_array_equal(
      np.asarray(values, np.float32),
      np.asarray(jaxqq.dequantize(packed, scales, mode=mode), np.float32),
    )
