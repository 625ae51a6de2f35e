"""What the tests of the quantization kernels share: runners, data of many sizes, fp8 operands."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np

from jaxqq._formats import FORMATS
from jaxqq._kernels.hopper.quantize.rebased import rebased_operand
from tests.support import oracle
from tests.support.interpreter import interpreted_kernels

MX = FORMATS["mxfp8"]


def interpreted(f, *args):
  with interpreted_kernels():
    return jax.tree.map(np.asarray, jax.jit(f)(*args))


def interpreted_again(f):
  """Runs f as `interpreted` does, but compiles it once for operands of the same types."""
  program = jax.jit(f)

  def run(*args):
    with interpreted_kernels():
      return jax.tree.map(np.asarray, program(*args))

  return run


def compiled(f, *args):
  return jax.tree.map(np.asarray, jax.jit(f)(*args))


def lower(f, *args):
  return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))


def groups_of_many_sizes(shape, dtype, *, spread=6, seed=0):
  """Random numbers whose groups of 16 differ by powers of two; zeros, NaN and inf among them."""
  rng = np.random.default_rng([seed, *shape])
  a = rng.standard_normal(shape)
  exponents = rng.integers(-spread, spread + 1, (shape[0], shape[1] // 16))
  a = (a * np.exp2(exponents).repeat(16, axis=1)).astype(oracle.DTYPES[dtype])
  a[:, ::7] = np.round(a[:, ::7].astype(np.float32) * 4) / 4  # ties, and zeros of both signs
  a[0, :32] = 0
  a[-1, 40], a[shape[0] // 2, shape[1] - 1] = np.nan, -np.inf
  return a


def rebased_codes(a):
  """Section 2's mxfp8 codes, then rebased row by row: codes and 2**(E - 127), by numpy."""
  codes, scales = oracle.quantize_codes(a, "mxfp8")
  amax = np.abs(a.astype(np.float32)).reshape(*scales.shape, 32).max(axis=-1)
  counts = (amax > 0) & np.isfinite(amax)
  top = np.max(scales.astype(np.int64), axis=1, where=counts, initial=0)
  shift = np.where(counts, top[:, None] - scales, 0)
  values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
  values = values * np.exp2(-shift).repeat(32, axis=1)
  values = np.where((scales == 255).repeat(32, axis=1), np.nan, values)
  return values.astype(ml_dtypes.float8_e4m3fn), np.exp2(top - 127.0).astype(np.float32)


def check_rebased(run, a, operand=rebased_operand):
  out = run(lambda a: operand(a, MX), a)
  codes, row_scales = rebased_codes(a)
  np.testing.assert_array_equal(out.row_scales, row_scales)
  assert codes.dtype == out.codes.dtype and codes.shape == out.codes.shape
  nan = np.isnan(codes.astype(np.float32))
  np.testing.assert_array_equal(out.codes.astype(np.float32), codes.astype(np.float32))
  np.testing.assert_array_equal(out.codes.view(np.uint8)[~nan], codes.view(np.uint8)[~nan])
