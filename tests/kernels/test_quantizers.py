"""The quantization kernels: in Mosaic GPU's interpreter anywhere, and compiled with `-m gpu`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxqq._formats import FORMATS
from tests.support import oracle

if jax.__version_info__ < (0, 11):
  pytest.skip("the kernels need JAX 0.11", allow_module_level=True)


from jaxqq._kernels.hopper.quantize import columns, exact, groups, rebased
from jaxqq._kernels.hopper.quantize import packed as kernels
from tests.support.kernels import interleaved, on_gpu
from tests.support.quantizers import (
  MX,
  check_rebased,
  compiled,
  groups_of_many_sizes,
  interpreted,
  interpreted_again,
  lower,
)

CASES = ("nvfp4", "nvfp4 global", "mxfp8", "mxfp4")
# Below a tile, ragged, and several steps with a rest; multiples of 64 for `interleave`.
SHAPES = ((3, 64), (1, 1088), (5, 4160))
LOWERED = ((8192, 8192, "bfloat16"), (5, 4160, "float16"), (33, 96, "float32"))
# (rows, k) of transposes: fewer rows than a tile has, and more; k that ends within one.
TRANSPOSED_SHAPES = ((5, 96), (133, 192))
GPU_SHAPES = (*SHAPES, (33, 96), (1000, 14336), (3, 28704), (2048, 8192))


def extremes_of_float32():
  """Every power of two times every mantissa of three bits and its neighbours, as amax and below."""
  bits = np.arange(0, 0x7F800000, 1 << 20, dtype=np.int64)
  amax = np.clip(bits[:, None] + np.arange(-1, 2), 0, 0x7F7FFFFF).astype(np.int32).view(np.float32)
  parts = np.linspace(-1, 1, 32, dtype=np.float32)
  with np.errstate(under="ignore"):
    groups = amax.reshape(-1, 1) * parts
  return np.ascontiguousarray(groups.reshape(-1, 96))


def global_scale_of(case, a):
  if not case.endswith("global"):
    return None
  a = a.astype(np.float32)
  return np.max(np.abs(a), where=np.isfinite(a), initial=0)


def with_global_scale(f, a, fmt, global_scale, **kwargs):
  if global_scale is None:
    return lambda a: f(a, fmt, **kwargs), (a,)
  return lambda a, g: f(a, fmt, g, **kwargs), (a, np.float32(global_scale))


# What the kernels should compute, each run by `run`.


def check_quantize(run, case, a, quantize=kernels.quantize):
  mode = case.split()[0]
  g = global_scale_of(case, a)
  f, args = with_global_scale(quantize, a, FORMATS[mode], g)
  packed, scales = run(f, *args)
  want_packed, want_scales = oracle.quantize(a, mode, g)
  assert packed.dtype == np.uint32 and scales.dtype == np.uint8
  np.testing.assert_array_equal(scales, want_scales)
  np.testing.assert_array_equal(packed, want_packed)


def check_dequantize(run, case, a, dtype):
  mode = case.split()[0]
  g = global_scale_of(case, a)
  packed, scales = oracle.quantize(a, mode, g)
  factor = 1.0 if g is None else np.float32(g) / np.float32(2688)
  codes = oracle.unpack(packed, mode).view(oracle.MODES[mode].element).astype(np.float32)
  scale = scales.view(oracle.MODES[mode].scale).astype(np.float32) * np.float32(factor)
  with np.errstate(over="ignore", invalid="ignore"):
    want = (codes * scale.repeat(oracle.MODES[mode].group, axis=1)).astype(oracle.DTYPES[dtype])
  scalar = () if g is None else (np.float32(g),)

  def f(packed, scales, *g):
    return kernels.dequantize(packed, scales, FORMATS[mode], *(g or (None,)), oracle.DTYPES[dtype])

  out = run(f, packed, scales, *scalar)
  assert out.dtype == want.dtype
  np.testing.assert_array_equal(out.astype(np.float32), want.astype(np.float32))


def check_exact(run, case, a, dtype="bfloat16", exact_operand=exact.exact_operand, **kwargs):
  mode = case.split()[0]
  g = global_scale_of(case, a)
  f, args = with_global_scale(
    exact_operand, a, FORMATS[mode], g, dtype=oracle.DTYPES[dtype], **kwargs
  )
  out = run(f, *args)
  # Exact but below 2**-133, where bfloat16 rounds.
  with np.errstate(over="ignore"):
    want = oracle.values(*oracle.quantize_codes(a, mode, g), mode).astype(oracle.DTYPES[dtype])
  if kwargs.get("interleave"):
    want = interleaved(want)
  assert out.dtype == want.dtype
  np.testing.assert_array_equal(out.astype(np.float32), want.astype(np.float32))


def of_transpose(f):
  """A quantizer of transposes as one of rows."""
  return lambda a, *args, **kwargs: f(a.T, *args, **kwargs)


QUANTIZE_T = of_transpose(columns.quantize_transpose)
EXACT_T = of_transpose(columns.exact_operand_of_transpose)
FP8_T = of_transpose(columns.rebased_operand_of_transpose)


def rebased_configured(config):
  return functools.partial(rebased.rebased_operand, config=config)


# In the interpreter.


DEFAULT = groups.TuningConfig()
LOOPING = groups.TuningConfig(tiles_per_step=2, resident_bytes=0)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_quantize(shape, case, dtype):
  check_quantize(interpreted, case, groups_of_many_sizes(shape, dtype))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_dequantize(case, dtype):
  check_dequantize(interpreted, case, groups_of_many_sizes((3, 1088), "float32"), dtype)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", ["nvfp4", "nvfp4 global", "mxfp8"])
@pytest.mark.parametrize("shape", SHAPES[1:2], ids=str)
def test_exact_operand(shape, case, dtype):
  check_exact(interpreted, case, groups_of_many_sizes(shape, dtype))


@pytest.mark.parametrize("case", ["nvfp4", "nvfp4 global", "mxfp8"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_interleaved(shape, case):
  check_exact(interpreted, case, groups_of_many_sizes(shape, "bfloat16"), interleave=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_exact_operand_dtypes(dtype):
  a = groups_of_many_sizes(SHAPES[0], "float32")
  check_exact(interpreted, "nvfp4", a, dtype)
  check_exact(interpreted, "nvfp4", a, dtype, interleave=True)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("config", [DEFAULT, LOOPING], ids=["resident", "looping"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_rebased_operand(shape, config, dtype):
  a = groups_of_many_sizes(shape, dtype, spread=3)
  check_rebased(interpreted, a, rebased_configured(config))


@functools.cache
def rebased_again(f):
  """One program for all that differs in numbers only."""
  operand = {"rows": rebased.rebased_operand, "columns": FP8_T}[f]
  return interpreted_again(lambda a: operand(a, MX))


@pytest.mark.parametrize("distance", [1, 13, 14, 15, 16, 17, 18, 19, 30, 120])
@pytest.mark.parametrize("f", ["rows", "columns"])
def test_groups_far_apart(f, distance):
  """Rounded to nearest at any distance; a row may have zeros, NaN, an infinity, or nothing."""
  a = np.random.default_rng(3).uniform(1, 1.9, (6, 128)).astype(np.float32)
  a[0, 32:64] *= 2.0**-distance
  a[1, 32:64] = 0
  a[2, 32] = np.inf
  a[3] = 0
  a[4] = np.nan
  a[5, 96:] *= 2.0**distance
  check_rebased(lambda _, a: rebased_again(f)(a), a)


@pytest.mark.parametrize("f", ["rows", "columns"])
def test_largest_and_smallest_row_scales(f):
  """amax / 448 rounded up, over the whole range of float32."""
  exponents = np.array([-126, -81, -80, 0, 80, 81, 118])
  a = np.full((7, 2048), 448, np.float32) * np.exp2(exponents, dtype=np.float32)[:, None]
  f = {"rows": rebased.rebased_operand, "columns": FP8_T}[f]
  out = interpreted(lambda a: f(a, MX), a)
  np.testing.assert_array_equal(out.row_scales, np.exp2(exponents, dtype=np.float32))


@pytest.mark.parametrize("k", [128, 160, 256, 512, 1056])
def test_short_rows(k):
  """Threads hold fewer elements of them."""
  check_rebased(interpreted, groups_of_many_sizes((5, k), "bfloat16", spread=3))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", TRANSPOSED_SHAPES, ids=str)
def test_quantize_transpose(shape, case):
  check_quantize(interpreted, case, groups_of_many_sizes(shape, "bfloat16"), QUANTIZE_T)


def elements_of_threads(layout, shape):
  """Where each thread's elements lie, register after register: (128, elements, rank)."""
  layout = layout.to_mgpu()
  # As the rows of what each register's axes, the warp, the lane and the vector pick.
  picked = layout.registers_shape(shape)
  tiled = layout.tiling.tile_shape(shape)
  axes = [layout.warp_dims[0], layout.lane_dims[0], layout.vector_dim]
  found = []
  for warp, lane in np.ndindex(4, 32):
    for register in np.ndindex(*picked):
      for element in range(layout.vector_length):
        index = list(register)
        for axis, i in zip(axes, (warp, lane, element), strict=True):
          index[axis] = i
        assert all(i < size for i, size in zip(index, tiled, strict=True))
        found.append(layout.tiling.untile_indices(tuple(index)))
  return np.reshape(found, (128, -1, len(shape)))


@pytest.mark.parametrize("minor", [(4, 2, 8), (2, 4, 8), (2, 8, 4)], ids=str)
def test_regrouping_moves_nothing_between_threads(minor):
  """What `regroup` takes for granted: thread t has column t, and then row t, in order."""
  source = elements_of_threads(columns._COLUMNS, (64, 128))
  row, k = np.mgrid[:128, :64]
  np.testing.assert_array_equal(source, np.stack([k, row], axis=-1))
  grouped = elements_of_threads(columns._row_layout(*minor), (128, *minor))
  np.testing.assert_array_equal(grouped, np.stack([row, *np.unravel_index(k, minor)], axis=-1))
  words = elements_of_threads(columns._row_layout(*minor).reduce((3,)), (128, *minor[:2]))
  row, k = np.mgrid[:128, : minor[0] * minor[1]]
  np.testing.assert_array_equal(words, np.stack([row, *np.unravel_index(k, minor[:2])], axis=-1))
  for width, length in ((64, 8), (16, 4), (8, 4)):
    staged = elements_of_threads(columns._staged_layout(width, length), (128, width))
    np.testing.assert_array_equal(staged, np.stack(np.mgrid[:128, :width], axis=-1))


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("case", ["nvfp4", "nvfp4 global", "mxfp8"])
@pytest.mark.parametrize("shape", [(5, 128), (133, 192)], ids=str)
def test_exact_operand_of_transpose(shape, case, interleave):
  a = groups_of_many_sizes(shape, "float32")
  check_exact(interpreted, case, a, "bfloat16", EXACT_T, interleave=interleave)
  if case == "nvfp4":
    check_exact(interpreted, case, a, "float16", EXACT_T, interleave=interleave)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", TRANSPOSED_SHAPES, ids=str)
def test_rebased_operand_of_transpose(shape, dtype):
  check_rebased(interpreted, groups_of_many_sizes(shape, dtype, spread=3), FP8_T)


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8", "mxfp4"])
def test_amax_all_over_float32(mode):
  """The normal range only: XLA's CPU backend, which interprets, flushes subnormals to zero."""
  a = extremes_of_float32()
  tiny = np.finfo(np.float32).tiny
  a = np.where(np.abs(a) < tiny, np.float32(0), a)
  check_quantize(interpreted, mode, a)


def test_a_bad_global_scale_makes_nan():
  a = np.ones((2, 64), np.float32)
  quantize = interpreted_again(lambda a, g: kernels.quantize(a, FORMATS["nvfp4"], g))
  for bad in (np.nan, np.inf, -1.0):
    packed, scales = quantize(a, np.float32(bad))
    assert (scales == 0x7F).all() and (packed == 0).all(), bad


@pytest.mark.parametrize(
  "f", [rebased.rebased_operand, columns.rebased_operand_of_transpose], ids=["rows", "columns"]
)
def test_rebased_operand_refuses_other_formats(f):
  with pytest.raises(NotImplementedError, match="nvfp4"):
    f(jnp.ones((64, 64)), FORMATS["nvfp4"])


@pytest.mark.parametrize(
  "f", [exact.exact_operand, columns.exact_operand_of_transpose], ids=["rows", "columns"]
)
def test_float16_is_refused_where_it_is_too_narrow(f):
  with pytest.raises(NotImplementedError, match="mxfp8"):
    f(jnp.ones((64, 64)), MX, dtype=jnp.float16)


# Lowered for CUDA, without one.


@pytest.mark.parametrize("rows, k, dtype", LOWERED)
def test_lowers_for_cuda(rows, k, dtype):
  shape = (rows, k)
  a = jax.ShapeDtypeStruct(shape, oracle.DTYPES[dtype])
  g = jax.ShapeDtypeStruct((), jnp.float32)
  a_t = jax.ShapeDtypeStruct(shape[::-1], a.dtype)
  lower(lambda a: rebased.rebased_operand(a, MX), a)
  lower(lambda a: columns.rebased_operand_of_transpose(a, MX), a_t)
  for fmt in FORMATS.values():
    scalar = (g,) if fmt.has_global_scale else ()
    lower(functools.partial(lambda a, *g, fmt: kernels.quantize(a, fmt, *g), fmt=fmt), a, *scalar)
    lower(functools.partial(columns.quantize_transpose, fmt=fmt), a_t)
    for interleave in (False, True)[: 1 + (shape[1] % 64 == 0)]:
      lower(
        functools.partial(
          lambda a, *g, fmt, **kw: exact.exact_operand(a, fmt, *g, **kw),
          fmt=fmt,
          interleave=interleave,
        ),
        a,
        *scalar,
      )
      lower(
        functools.partial(
          lambda a, *g, fmt, **kw: columns.exact_operand_of_transpose(a, fmt, *g, **kw),
          fmt=fmt,
          interleave=interleave,
        ),
        a_t,
        *scalar,
      )
    packed = jax.ShapeDtypeStruct((shape[0], shape[1] // fmt.codes_per_word), jnp.uint32)
    scales = jax.ShapeDtypeStruct((shape[0], shape[1] // fmt.group_size), jnp.uint8)
    lower(
      functools.partial(
        lambda p, s, *g, fmt: kernels.dequantize(p, s, fmt, *(g or (None,)), a.dtype), fmt=fmt
      ),
      packed,
      scales,
      *scalar,
    )


# Compiled, on a GPU.


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("dtype", oracle.DTYPES)
  @pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
  @pytest.mark.parametrize("case", CASES)
  def test_all(self, case, shape, dtype):
    a = groups_of_many_sizes(shape, dtype)
    check_quantize(compiled, case, a)
    check_dequantize(compiled, case, a, dtype)
    check_exact(compiled, case, a)
    if shape[1] % 64 == 0:
      check_exact(compiled, case, a, interleave=True)
    if case.startswith("nvfp4"):
      check_exact(compiled, case, a, "float16")

  @pytest.mark.parametrize("dtype", oracle.DTYPES)
  @pytest.mark.parametrize("shape", (*GPU_SHAPES, *TRANSPOSED_SHAPES), ids=str)
  @pytest.mark.parametrize("case", CASES)
  def test_all_of_transposes(self, case, shape, dtype):
    a = groups_of_many_sizes(shape, dtype)
    check_quantize(compiled, case, a, QUANTIZE_T)
    check_exact(compiled, case, a, "bfloat16", EXACT_T)
    if shape[1] % 64 == 0:
      check_exact(compiled, case, a, "bfloat16", EXACT_T, interleave=True)
    if case.startswith("nvfp4"):
      check_exact(compiled, case, a, "float16", EXACT_T)
    if case == "mxfp8":
      check_rebased(compiled, a, FP8_T)
      check_rebased(compiled, groups_of_many_sizes(shape, dtype, spread=3), FP8_T)

  @pytest.mark.parametrize("dtype", oracle.DTYPES)
  @pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
  @pytest.mark.parametrize("config", [DEFAULT, LOOPING], ids=["resident", "looping"])
  @pytest.mark.parametrize("spread", [0, 3, 6])
  def test_rebased_operand(self, spread, config, shape, dtype):
    check_rebased(
      compiled, groups_of_many_sizes(shape, dtype, spread=spread), rebased_configured(config)
    )

  @pytest.mark.parametrize("case", CASES)
  def test_amax_all_over_float32(self, case):
    """Subnormals, the largest numbers, exact ties: every exponent there is."""
    a = extremes_of_float32()
    check_quantize(compiled, case, a)
    check_exact(compiled, case, a)
    check_dequantize(compiled, case, a, "float32")
    if case == "mxfp8":
      check_rebased(compiled, a)
      check_rebased(compiled, a, FP8_T)
    check_quantize(compiled, case, a, QUANTIZE_T)

  @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
  @pytest.mark.parametrize("case", CASES)
  def test_every_16_bit_float(self, case, dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(oracle.DTYPES[dtype])
    values = np.where(np.isfinite(values.astype(np.float32)), values, 0).astype(values.dtype)
    shuffled = np.random.default_rng(0).permutation(values)
    check_quantize(compiled, case, np.stack([values, shuffled]))
    if case == "mxfp8":
      check_rebased(compiled, values.reshape(-1, 32))
      check_rebased(compiled, shuffled.reshape(-1, 32))

  @pytest.mark.parametrize("exponent", [-110, -60, 0, 60, 127])
  def test_global_scales(self, exponent):
    a = groups_of_many_sizes((16, 1024), "float32")
    a = np.where(np.isfinite(a), a, 0).astype(np.float32)
    g = np.float32(np.ldexp(1.0, exponent))
    packed, scales = compiled(lambda a, g: kernels.quantize(a, FORMATS["nvfp4"], g), a, g)
    want_packed, want_scales = oracle.quantize(a, "nvfp4", g)
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(packed, want_packed)
