"""What the tests of the product kernels share: runners, operands in a kernel's form, the bound."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxqq
from jaxqq._formats import FORMATS
from jaxqq._kernels import Device, Problem
from jaxqq._kernels.hopper.skinny_plan import SkinnyPlan
from jaxqq._reference import Operands
from tests.support import oracle
from tests.support.interpreter import interpreted_kernels
from tests.support.programs import lowered_for_cuda

needs_kernels = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 (Mosaic GPU's warpgroups)"
)
on_gpu = [
  pytest.mark.gpu,
  pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
F16, F32 = np.float16, np.float32


SMS = 2  # of the device that kernels are run for: each CTA walks over several tiles


def interpreted(f, *args):
  with interpreted_kernels(detect_races=True):
    return jax.tree.map(np.asarray, jax.jit(f)(*args))


def interpreted_in_order(f, *args):
  """Of kernels whose CTAs wait for earlier ones, which the race detector does not know."""
  with interpreted_kernels():
    return jax.tree.map(np.asarray, jax.jit(f)(*args))


def compiled(f, *args):
  return jax.tree.map(np.asarray, jax.jit(f)(*jax.tree.map(jnp.asarray, args)))


class Lowered(Exception):
  """Instead of results, which a machine without a GPU does not have."""


def lowered_alone(f, *args):
  """As far as a machine without a GPU gets: no more shared memory than there is, for one thing."""
  assert "jaxqq_" in lowered_for_cuda(f, *jax.tree.map(jnp.asarray, args))
  raise Lowered


# Operands


def interleaved(x):
  """Elements 16q + 8w + 4h + 2e + o of every 64 along k at 32h + 16w + 8o + 2q + e."""
  order = np.empty(64, int)
  for k in range(64):
    q, w, h, e, o = k // 16, k // 8 % 2, k // 4 % 2, k // 2 % 2, k % 2
    order[32 * h + 16 * w + 8 * o + 2 * q + e] = k
  return x.reshape(*x.shape[:-1], -1, 64)[..., order].reshape(x.shape)


def dequantized(mode, codes, scales):
  return oracle.values(codes, scales, mode)


def rescale_bytes(scales, exponents):
  """Powers of two by which codes are rebased, float16's in a byte: 0 from 2**-19 on.

  Its upper byte, and the two highest bits of its lower one where the upper byte never has any.
  """
  distance = np.maximum(exponents[..., None] - scales.astype(int), 0)
  bits = np.where(distance >= 19, 0, np.ldexp(1.0, -distance)).astype(F16).view(np.uint16)
  return ((bits >> 8) | (bits & 0xC0)).astype(np.uint8)


def largest_scales(scales):
  """The largest byte of each row; 0xFF in one with a NaN."""
  return np.max(scales.astype(int), axis=-1)


def rebased(codes, rescale):
  """e4m3 codes times `rescale_bytes`, rounded to e4m3; float64."""
  rescale = np.repeat(rescale, 32, axis=-1).astype(np.uint16)
  powers = ((rescale & 0x3F) << 8 | rescale & 0xC0).view(F16).astype(np.float64)
  return (codes.view(E4M3).astype(np.float64) * powers).astype(E4M3).astype(np.float64)


def powers(exponents):
  """float32 2**(e - 127), NaN for 0xFF."""
  nan = exponents == 0xFF
  return np.where(nan, np.nan, np.ldexp(1.0, np.where(nan, 127, exponents) - 127)).astype(F32)


def without_nan_codes(codes):
  return np.where((codes & 0x7F) == 0x7F, codes & 0x80, codes).astype(np.uint8)


def e2m1_operand(rng, batch, n, k):
  """Any codes and scales, zeros and negative ones too, with NaN in the last column."""
  codes = rng.integers(0, 16, (batch, n, k)).astype(np.uint8)
  scales = without_nan_codes(rng.integers(0, 256, (batch, n, k // 16)))
  scales[0, -1, 1] = 0x7F
  return codes, scales


def mx_operand(rng, batch, n, k, lowest, highest, *, mode="mxfp8"):
  """Any codes, scale bytes within bounds or 0, with NaN in the first and last columns.

  Not all of a column is 0: XLA's CPU backend, which interprets, flushes subnormals to zero.
  """
  one = {"mxfp4": 2, "mxfp8": 0x38}[mode]
  codes = without_nan_codes(rng.integers(0, 16 if mode == "mxfp4" else 256, (batch, n, k)))
  scales = rng.integers(lowest, highest + 1, (batch, n, k // 32)).astype(np.uint8)
  scales[..., 1:][rng.random(scales[..., 1:].shape) < 0.1] = 0
  if mode == "mxfp8":
    codes[0, 0, -3] = 0xFF
  codes[0, -1, 32:64] = one  # were the scale an infinity, so would be their products
  scales[0, -1, 1] = 0xFF
  return codes, scales


def padded_rows(m):
  """How many rows of x `skinny_gemm` has: the TMA moves 8 at a time."""
  return -(-m // 8) * 8


def skinny_plan(mode, m, n, k, block, tiles, *, batch=(1, 1), blockdiag=None, x_as_is=None, **how):
  """One for `skinny_gemm`, whatever the planner would choose."""
  spec, fmt = jax.ShapeDtypeStruct, FORMATS[mode]
  is_packed = block.group_size is not None
  scales = spec((batch[1], n, k // fmt.group_size), np.uint8) if is_packed else None
  operands = Operands(spec((batch[0], m, k), x_as_is or F16), spec((batch[1], n, k), F16), scales)
  problem = dataclasses.replace(
    Problem.of(operands, fmt, np.dtype(BF16), None, quantize_input=x_as_is is None),
    x_batch=(max(batch),),
    w_batch=(max(batch),),
  )
  of_packed = {"nvfp4": "expanded", "mxfp4": "in_order", "mxfp8": "group_sums"}
  mainloop = of_packed[mode] if is_packed else "quantized"
  if blockdiag is not None:
    mainloop = "blockdiag"
  if x_as_is is not None:
    mainloop = "in_order"
  mainloop = how.get("mainloop", mainloop)
  return SkinnyPlan(
    mainloop,
    block,
    padded_rows(m) if blockdiag is None else blockdiag.columns,
    blockdiag,
    how.get("quantizes_x", False),
    tiles,
    problem,
    Device("cuda", "9.0", SMS),
  )


def nothing_beyond(x, m, nothing):
  """Rows from m on hold what must not be read."""
  out = np.full((x.shape[0], padded_rows(m), *x.shape[2:]), nothing, x.dtype)
  out[:, :m] = x
  return out


def assert_product(out, x, w, dtype, *, of_mag=1.0):
  """Section 3 of the specification at HIGHEST, with columns of NaN where w has one."""
  x, w = np.nan_to_num(x, nan=np.nan), np.asarray(w)
  nan_columns = np.broadcast_to(np.isnan(w).any(axis=-1)[..., None, :], out.shape)
  exact, mag = oracle.product(x, np.nan_to_num(w))
  assert out.dtype == dtype
  np.testing.assert_array_equal(np.isnan(out.astype(F32)), nan_columns)
  kept = np.where(nan_columns, 0, out.astype(np.float64)).astype(dtype)
  exact, mag = (np.where(nan_columns, 0, a) for a in (exact, mag))
  oracle.assert_within_bound(kept, exact, mag * of_mag, highest=True)


# Fp8 tensor cores sum up in 14 bits, the interpreter in float32: each of an instruction's 32
# products and the sum so far may lose 2**-13 of the largest, all together 33 times that. Of long
# sums less than 2**-12 is left, which `test_on_gpu.py` asks for.
FP8_SUMS = 33 * 2.0 ** (18 - 13)


def check_every_second_row_nan(run, mode, m, n, k, *, quantize_input=True, of_mag=2.0**6):
  """Their scales follow those of the rows before in memory, and reach no result of theirs."""
  rng = np.random.default_rng([m, n, k])
  x = rng.standard_normal((m, k)).astype(BF16)
  x_hat = oracle.round_trip(x, mode) if quantize_input else x.astype(np.float64)
  codes, scales = oracle.quantize_codes(rng.standard_normal((n, k)), mode)
  scales[1::2] = 0x7F if mode == "nvfp4" else 0xFF
  f = functools.partial(jaxqq.qqmm if quantize_input else jaxqq.quantized_matmul, mode=mode)
  out = run(f, x, oracle.pack(codes, mode), scales)
  assert_product(out, x_hat, oracle.values(codes, scales, mode), BF16, of_mag=of_mag)
