"""The quantization kernels with the parts of a `jaxqq.Quantizer`: bits are the definition's."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxqq import Quantizer, _quantizer, _quantizer_lowering, _random_bits
from jaxqq._formats import FORMATS
from jaxqq._quantize import dequantize_to_multiply, pack
from tests.support import oracle

if jax.__version_info__ < (0, 11):
  pytest.skip("the kernels need JAX 0.11", allow_module_level=True)

from jaxqq._kernels.hopper.quantize import amax as amaxes
from jaxqq._kernels.hopper.quantize import columns, exact, packed
from jaxqq._kernels.hopper.quantize.parts import Parts
from tests.support.interpreter import interpreted as interpreted_device
from tests.support.kernels import on_gpu
from tests.support.quantizers import compiled, groups_of_many_sizes, interpreted, lower

STOCHASTIC = Quantizer(rounding="stochastic")
BOTH = Quantizer(rounding="stochastic", rotation=16)
ROTATED = Quantizer(rotation=16)
SQUARE = Quantizer(square=True)
QUANTIZERS = (
  STOCHASTIC,
  BOTH,
  ROTATED,
  Quantizer(rounding="stochastic", rotation=64),
  Quantizer(rotation=32),
  Quantizer("mxfp4", rounding="stochastic"),
  Quantizer("mxfp4", rounding="stochastic", rotation=16),
  SQUARE,
  Quantizer(square=True, rounding="stochastic", rotation=32),
  Quantizer("mxfp4", square=True),
  Quantizer(scale="four_over_six"),
  Quantizer(square=True, scale="four_over_six", rotation=16),
)
KEY = jax.random.key(5)
ROUNDING_KEY = _random_bits.stream(_random_bits.key_words("test", "key", KEY), 0)
ROTATION_KEY = _random_bits.stream(_random_bits.key_words("test", "key", KEY), 1)


def numbers_for(quantizer, shape, dtype):
  """Of many sizes, and NaN and an infinity among them."""
  return groups_of_many_sizes(shape, dtype, seed=sum(shape))


def amax_for(quantizer, a):
  if quantizer.mode != "nvfp4":
    return None
  a = np.asarray(a, np.float32)
  return np.max(np.abs(a), where=np.isfinite(a), initial=np.float32(0))


rotated = jax.jit(_quantizer.rotated, static_argnums=0)
random_of = jax.jit(_quantizer.random_of, static_argnums=(0, 2))


def wanted(quantizer, a, amax):
  """int32 codes and scales, by the definition, step by step: quantizers share the steps' programs.

  And so do small arrays, with zeros up to one shape. Bits are those of places, squares may be cut.
  """
  rows, columns = a.shape
  whole = a if rows > 144 or columns > 192 else np.pad(a, [(0, 144 - rows), (0, 192 - columns)])
  random = None
  if quantizer.is_stochastic:
    random = random_of(STOCHASTIC, ROUNDING_KEY, whole.shape)
  if quantizer.rotation is not None:
    whole = rotated(Quantizer(rotation=quantizer.rotation), whole, ROTATION_KEY)
  unrotated = dataclasses.replace(quantizer, rotation=None)
  scalar = None if amax is None else jnp.float32(amax)
  codes, scales = _quantizer.quantized(unrotated, jnp.asarray(whole), scalar, random)
  groups = columns // FORMATS[quantizer.mode].group_size
  return np.asarray(codes)[:rows, :columns], np.asarray(scales)[:rows, :groups]


def arguments(quantizer):
  """By name: what a kernel takes beside the array, its format and its amax."""
  chooses = quantizer.scale == "four_over_six"
  parts = Parts(quantizer.is_stochastic, quantizer.rotation, quantizer.square, chooses)
  given = {"parts": parts}
  if quantizer.is_stochastic:
    given["key"] = np.asarray(ROUNDING_KEY)
  if quantizer.rotation is not None:
    given["signs"] = np.asarray(_random_bits.signs(ROTATION_KEY, quantizer.rotation))
  return given


@functools.cache  # so that a program is compiled once for arrays of one shape
def by_kernel(kernel, quantizer, **how):
  """Of an array and its amax, a scalar or None."""
  given = {**arguments(quantizer), **how}
  return lambda a, amax: kernel(a, FORMATS[quantizer.mode], global_scale=amax, **given)


def check_quantize(run, quantizer, a, kernel=packed.quantize, amax="own"):
  amax = amax_for(quantizer, a) if amax == "own" else amax
  words, scales = run(by_kernel(kernel, quantizer), a, amax)
  codes, want_scales = wanted(quantizer, a, amax)
  np.testing.assert_array_equal(scales, np.asarray(want_scales, np.uint8))
  np.testing.assert_array_equal(words, pack(codes, FORMATS[quantizer.mode]))


@pytest.mark.parametrize("shape", [(3, 128), (5, 4160)], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_quantize(quantizer, shape):
  check_quantize(interpreted, quantizer, numbers_for(quantizer, shape, "bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("quantizer", [STOCHASTIC, BOTH, ROTATED], ids=str)
def test_quantize_dtypes(quantizer, dtype):
  check_quantize(interpreted, quantizer, numbers_for(quantizer, (33, 96), dtype))


def of_transpose(kernel):
  """A kernel of columns as one of rows."""
  return lambda a, *args, **how: kernel(a.T, *args, **how)


QUANTIZE_T = of_transpose(columns.quantize_transpose)
EXACT_T = of_transpose(columns.exact_operand_of_transpose)


def check_exact(run, quantizer, a, kernel=exact.exact_operand, amax="own"):
  amax = amax_for(quantizer, a) if amax == "own" else amax
  fmt = FORMATS[quantizer.mode]
  dtype = jnp.bfloat16 if fmt.scale_is_power_of_two else jnp.float16
  out = run(by_kernel(kernel, quantizer, dtype=dtype), a, amax)
  want = dequantize_to_multiply(*wanted(quantizer, a, amax), fmt).astype(dtype)
  assert out.dtype == dtype
  np.testing.assert_array_equal(out.astype(np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("shape", [(5, 192), (133, 128)], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_quantize_transpose(quantizer, shape):
  check_quantize(interpreted, quantizer, numbers_for(quantizer, shape, "bfloat16"), QUANTIZE_T)


@pytest.mark.parametrize("kernel", [exact.exact_operand, EXACT_T], ids=["rows", "columns"])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_exact_operand(quantizer, kernel):
  check_exact(interpreted, quantizer, numbers_for(quantizer, (33, 192), "bfloat16"), kernel)


@functools.cache
def rotated_amaxes(size):
  """By the kernels of rows and of columns: functions of an array."""
  signs, fmt = np.asarray(_random_bits.signs(ROTATION_KEY, size)), FORMATS["nvfp4"]
  return (
    lambda a: amaxes.rotated_amax(a, fmt, signs),
    lambda a: amaxes.rotated_amax_of_transpose(a, fmt, signs),
  )


def check_rotated_amax(run, a, size):
  want = np.abs(np.asarray(rotated(Quantizer(rotation=size), a, ROTATION_KEY), np.float32)).max()
  of_rows, of_columns = rotated_amaxes(size)
  found = run(of_rows, a), run(of_columns, np.ascontiguousarray(a.T))
  np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("size", [16, 64])
def test_rotated_amax(size):
  a = np.nan_to_num(
    groups_of_many_sizes((133, 192), "bfloat16").astype(np.float32), posinf=0, neginf=0
  )
  check_rotated_amax(interpreted, a, size)
  a[132, 191] = np.nan
  check_rotated_amax(interpreted, a, size)


KERNELS = (
  (check_quantize, packed.quantize),
  (check_quantize, QUANTIZE_T),
  (check_exact, exact.exact_operand),
  (check_exact, EXACT_T),
)


@pytest.mark.parametrize("exponent", [-120, -45, 100])
@pytest.mark.parametrize("quantizer", [STOCHASTIC, BOTH], ids=str)
def test_numbers_far_from_one(quantizer, exponent):
  """Tensors that are raised, and of large numbers; but not subnormal ones, which a CPU has not."""
  rng = np.random.default_rng(7)
  a = np.ldexp(rng.uniform(1, 4, (33, 96)) * rng.choice([-1, 1], (33, 96)), exponent)
  for check, kernel in KERNELS:
    check(interpreted, quantizer, a.astype(np.float32), kernel)


@pytest.mark.parametrize("amax", [0.0, 1e-3, np.nan, -1.0])
def test_an_amax_that_is_given(amax):
  """Larger numbers are clipped; of what is no amax, or 0, all is NaN."""
  a = numbers_for(STOCHASTIC, (33, 96), "float32")
  for check, kernel in KERNELS:
    check(interpreted, STOCHASTIC, a, kernel, np.float32(amax))


@pytest.mark.parametrize("is_transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("quantizer", [BOTH, Quantizer(scale="four_over_six"), SQUARE], ids=str)
def test_the_method_quantize(quantizer, is_transposed):
  """As on a GPU, with the array's own amax; leading axes of rows are rows."""
  rows = np.nan_to_num(numbers_for(quantizer, (64, 64), "float32"), posinf=0, neginf=0)
  batch = () if quantizer.square or is_transposed else (4,)
  a = jnp.asarray(rows.T if is_transposed else rows.reshape(*batch, -1, 64))
  streams = _quantizer.Streams(
    ROUNDING_KEY if quantizer.is_stochastic else None,
    ROTATION_KEY if quantizer.rotation else None,
  )
  how = (streams, None, quantizer)
  with interpreted_device():
    plan = _quantizer_lowering.planned(quantizer, a, is_transposed, "cuda")
    found = jax.jit(lambda a: _quantizer_lowering.run(a, *how, is_transposed, "cuda"))(a)
  assert plan.name == "hopper_quantizer"
  *wanted, of_all = _quantizer.definition(rows, *how, False)
  wanted = [want.reshape(*batch, -1, want.shape[-1]) for want in wanted]
  for own, want in zip(found, [*wanted, of_all], strict=True):
    np.testing.assert_array_equal(own, want)


# Lowered for CUDA, without one.


LOWERED = [
  *((quantizer, 8192, 8192, "bfloat16") for quantizer in QUANTIZERS),
  *((quantizer, 33, 192, "float32") for quantizer in QUANTIZERS[1::3]),
]


@pytest.mark.parametrize(("quantizer", "rows", "k", "dtype"), LOWERED, ids=str)
def test_lowers_for_cuda(quantizer, rows, k, dtype):
  fmt, amax = FORMATS[quantizer.mode], 1.0 if quantizer.mode == "nvfp4" else None
  of_rows = jax.ShapeDtypeStruct((rows, k), oracle.DTYPES[dtype])
  of_columns = jax.ShapeDtypeStruct((k, rows), oracle.DTYPES[dtype])
  for kernel, a in (
    (packed.quantize, of_rows),
    (columns.quantize_transpose, of_columns),
    (exact.exact_operand, of_rows),
    (columns.exact_operand_of_transpose, of_columns),
  ):
    given = {**arguments(quantizer), "global_scale": amax}
    parts, names = given.pop("parts"), [n for n, value in given.items() if value is not None]
    arrays = [given[name] for name in names]
    lower(
      lambda a, *arrays, kernel=kernel, parts=parts, names=names: kernel(
        a, fmt, parts=parts, **dict(zip(names, arrays, strict=True))
      ),
      a,
      *arrays,
    )


# Compiled, on a GPU.


GPU_SHAPES = ((3, 128), (5, 4160), (33, 192), (133, 192), (1000, 14336), (2048, 8192))


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
  @pytest.mark.parametrize("axis", [-1, -2])
  def test_the_method_quantize(self, axis, quantizer):
    """Under jit, with the array's own amax; the definition is asked for by its function."""
    a = jnp.asarray(np.random.default_rng(2).standard_normal((256, 512)), jnp.bfloat16)
    key = KEY if quantizer.needs_key else None
    found = jax.jit(lambda a: quantizer.quantize(a, key, axis=axis))(a)
    streams = _quantizer.Streams(
      ROUNDING_KEY if quantizer.is_stochastic else None,
      ROTATION_KEY if quantizer.rotation else None,
    )
    want = _quantizer.definition(a, streams, None, quantizer, axis == -2)
    for own, right in zip(found, want, strict=False):
      np.testing.assert_array_equal(own, right)

  @pytest.mark.parametrize("dtype", oracle.DTYPES)
  @pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
  @pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
  def test_all(self, quantizer, shape, dtype):
    a = numbers_for(quantizer, shape, dtype)
    for check, kernel in KERNELS:
      check(compiled, quantizer, a, kernel)

  @pytest.mark.parametrize("size", [16, 32, 64])
  @pytest.mark.parametrize("shape", [(133, 192), (1000, 14336)], ids=str)
  def test_rotated_amax(self, shape, size):
    a = groups_of_many_sizes(shape, "bfloat16").astype(np.float32)
    check_rotated_amax(compiled, np.nan_to_num(a, posinf=0, neginf=0), size)

  @pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
  @pytest.mark.parametrize("exponent", [-149, -130, -126, -120, -45, -39, 60, 120])
  def test_numbers_far_from_one(self, exponent, quantizer):
    rng = np.random.default_rng(7)
    a = np.ldexp(rng.uniform(1, 8, (64, 1024)) * rng.choice([-1, 1], (64, 1024)), exponent)
    a[:, ::3] *= 2.0**-9
    for check, kernel in KERNELS:
      check(compiled, quantizer, a.astype(np.float32), kernel)

  @pytest.mark.parametrize("amax", [0.0, 2.0**-100, 1e-3, 1e30, np.inf, np.nan, -1.0])
  @pytest.mark.parametrize("quantizer", [STOCHASTIC, BOTH, ROTATED], ids=str)
  def test_an_amax_that_is_given(self, quantizer, amax):
    a = numbers_for(quantizer, (64, 1024), "float32")
    for check, kernel in KERNELS:
      check(compiled, quantizer, a, kernel, np.float32(amax))

  @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
  @pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
  def test_every_16_bit_float(self, quantizer, dtype):
    values = np.arange(1 << 16, dtype=np.uint16).view(oracle.DTYPES[dtype])
    values = np.where(np.isfinite(values.astype(np.float32)), values, 0).astype(values.dtype)
    shuffled = np.random.default_rng(0).permutation(values)
    for check, kernel in KERNELS:
      check(compiled, quantizer, np.stack([values, shuffled]), kernel)
