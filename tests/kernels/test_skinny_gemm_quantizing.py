"""skinny_gemm where it quantizes x or w itself: interpreted, or run with `-m gpu`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq._formats import FORMATS
from jaxqq._kernels.hopper.mainloops.blockdiag import UNIT
from jaxqq._kernels.hopper.ptx.expand_in_order import E2M1_UNIT
from jaxqq._kernels.hopper.skinny_gemm import Operands, skinny_gemm
from jaxqq._kernels.hopper.tiles import BlockDiagonal, KBlock
from jaxqq._kernels.hopper.tiles import SkinnyTiles as T
from tests.support import oracle
from tests.support.kernels import (
  BF16,
  F16,
  F32,
  FP8_SUMS,
  assert_product,
  compiled,
  e2m1_operand,
  interleaved,
  interpreted,
  mx_operand,
  needs_kernels,
  nothing_beyond,
  on_gpu,
  skinny_plan,
)
from tests.support.quantizers import interpreted_again

pytestmark = needs_kernels

UNQUANTIZED_CASES = {
  # mode, x and out, (b of x, b of w), m, n, k, global scales, config
  "nvfp4, 1 row": ("nvfp4", BF16, (1, 1), 1, 133, 1024, False, T(4)),
  "nvfp4, 1 row, in float32": ("nvfp4", F32, (1, 2), 1, 70, 1024, True, T(4, 2, promote=True)),
  "nvfp4, 3 rows": ("nvfp4", BF16, (1, 1), 3, 64, 512, True, T(4)),
  "nvfp4, 4 rows": ("nvfp4", BF16, (1, 1), 4, 65, 1024, False, T(4)),
  "nvfp4, 2 rows": ("nvfp4", F16, (1, 1), 2, 65, 2560, True, T(4)),
  "mxfp8, 1 row": ("mxfp8", BF16, (1, 1), 1, 133, 2560, False, T(4)),
  "mxfp8, 3 rows, x shared": ("mxfp8", BF16, (1, 3), 3, 66, 1024, False, T(2, 2)),
  "mxfp8, 4 rows": ("mxfp8", BF16, (2, 2), 4, 61, 1536, False, T(4)),
  "mxfp8, 7 rows": ("mxfp8", BF16, (2, 2), 7, 200, 1536, False, T(2, 2)),
  "mxfp8, 16 rows": ("mxfp8", BF16, (1, 1), 16, 70, 1024, False, T(2, 2)),
  "mxfp8, 11 rows": ("mxfp8", BF16, (1, 1), 11, 133, 512, False, T(4)),
  "nvfp4, 5 rows, sixteens": ("nvfp4", BF16, (2, 2), 5, 133, 1536, True, T(4)),
  "nvfp4, 8 rows, sixteens": ("nvfp4", F32, (1, 1), 8, 64, 1024, False, T(4, 2, promote=True)),
  "nvfp4, 4 rows, sixteens": ("nvfp4", F16, (2, 1), 4, 65, 512, False, T(2, 2)),
  "nvfp4, 13 rows, sixteens": ("nvfp4", BF16, (1, 2), 13, 70, 1024, True, T(4)),
}
UNQUANTIZED_CLUSTER_CASES = {
  "nvfp4, 1 row, in four": ("nvfp4", BF16, (1, 1), 1, 133, 8192, True, T(8, 4, cluster=4)),
  "mxfp8, 5 rows, in two": ("mxfp8", BF16, (1, 1), 5, 300, 4096, False, T(4, 4, cluster=2)),
  "nvfp4, 8 rows, sixteens, in three": (
    *("nvfp4", BF16, (1, 1), 8, 133, 7168, True),
    T(8, 4, cluster=3),
  ),
}


def check_unquantized(run, name):
  """x is quantized by the kernel: groups of zeros, of numbers too small, and of many sizes."""
  mode, dtype, (bx, bw), m, n, k, scaled, tiles = (UNQUANTIZED_CASES | UNQUANTIZED_CLUSTER_CASES)[
    name
  ]
  fmt, group = FORMATS[mode], oracle.MODES[mode].group
  rng = np.random.default_rng([m, n, k])
  # The interpreter has the sums of fp8 in float32; on a GPU they keep 14 bits of the largest.
  spread = 3 if run is compiled else 8
  sizes = np.ldexp(0.02, rng.integers(-spread, spread, (bx, m, k // group)))
  x = rng.standard_normal((bx, m, k)) * np.repeat(sizes, group, axis=-1)
  x[0, -1, :64] = 0
  x[0, 0, 64:96] *= 2.0**-20
  x = x.astype(dtype)
  amax = np.max(np.abs(x.astype(F32))) if scaled else None
  x_hat = oracle.round_trip(x, mode, amax)
  how: dict[str, Any] = {"quantizes_x": True}
  if "sixteens" in name:
    codes, scales = e2m1_operand(rng, bw, n, k)
    how["mainloop"], unit = "sixteens", 2.0**E2M1_UNIT
  elif mode == "nvfp4":
    codes, scales = e2m1_operand(rng, bw, n, k)
    how["blockdiag"], unit = BlockDiagonal(1 << (m - 1).bit_length()), UNIT
  else:
    codes, scales = mx_operand(rng, bw, n, k, 127 - spread, 127 + spread)
    unit = 1.0
  factors = (np.array([amax], F32), np.array([0.3], F32)) if scaled else (None, None)
  w_hat = oracle.values(codes, scales, mode) * (factors[1] if scaled else 1)
  if scaled:
    unit /= 2688
  block = KBlock(512, fmt.bits, fmt.group_size)
  plan = skinny_plan(mode, m, n, k, block, tiles, batch=(bx, bw), **how)

  def f(*args):
    return skinny_gemm(Operands(*args), m, plan, unit, dtype)

  out = run(f, x, oracle.pack(codes, mode), scales, *factors)
  fp8_sums = run is compiled and mode == "mxfp8"
  assert_product(out, x_hat, w_hat, dtype, of_mag=FP8_SUMS if fp8_sums else 1.0)


UNPACKED_CASES = {
  # mode, w, out, (b of x, b of w), m, n, k, global scales, config
  "nvfp4": ("nvfp4", BF16, BF16, (1, 1), 1, 133, 512, False, T(4)),
  "nvfp4, scaled": ("nvfp4", F16, F32, (1, 2), 9, 65, 768, True, T(4, promote=True)),
  "mxfp8": ("mxfp8", BF16, BF16, (1, 1), 3, 133, 640, False, T(2, 2)),
  "mxfp8, promoted": ("mxfp8", F16, F32, (2, 1), 17, 64, 512, False, T(2, 2, promote=True)),
}
UNPACKED_CLUSTER_CASES = {
  "nvfp4, in four": ("nvfp4", BF16, BF16, (1, 1), 5, 300, 8192, True, T(4, 4, cluster=4)),
  "mxfp8, in two": ("mxfp8", BF16, F32, (1, 1), 64, 200, 4096, False, T(2, 2, True, cluster=2)),
}


def check_unpacked(run, name):
  """w is quantized by the kernel: groups of zeros, of many sizes, of tiny numbers, with a NaN."""
  mode, w_dtype, dtype, (bx, bw), m, n, k, scaled, tiles = (
    UNPACKED_CASES | UNPACKED_CLUSTER_CASES
  )[name]
  group = oracle.MODES[mode].group
  rng = np.random.default_rng([m, n, k])
  sizes = np.ldexp(0.02, rng.integers(-6, 7, (bw, n, k // group)))
  w = rng.standard_normal((bw, n, k)) * np.repeat(sizes, group, axis=-1)
  w[:, ::7] = np.round(w[:, ::7] * 512) / 512  # ties, and zeros of both signs
  w[0, -1, :64] = 0
  w[0, 0, 64:96] *= 2.0**-20
  w = w.astype(w_dtype)
  amax = np.max(np.abs(w.astype(F32))) if scaled else None
  w[-1, n // 2, 77] = np.nan
  w_hat = oracle.round_trip(w, mode, amax)
  operand = F16 if mode == "nvfp4" else BF16
  x = rng.standard_normal((bx, m, k)).astype(operand)
  factors = (np.array([0.3], F32), np.array([amax], F32)) if scaled else (None, None)
  plan = skinny_plan(mode, m, n, k, KBlock(128, 16, None), tiles, batch=(bx, bw))
  unit = 1 / 2688 if scaled else 1.0

  def f(*args):
    return skinny_gemm(Operands(*args), m, plan, unit, dtype)

  out = run(f, nothing_beyond(interleaved(x), m, np.nan), w, None, *factors)
  x = x.astype(np.float64) * (factors[0] if scaled else 1)
  assert_product(out, x, w_hat, dtype)


def test_a_global_scale_that_is_no_amax_gives_nan():
  rng = np.random.default_rng(0)
  codes, scales = e2m1_operand(rng, 1, 64, 512)
  x = interleaved(rng.standard_normal((1, 8, 512)).astype(F16))
  plan = skinny_plan("nvfp4", 8, 64, 512, KBlock(256, 4, 16), T(4))
  run = interpreted_again(lambda *args: skinny_gemm(Operands(*args), 8, plan, 1.0, F32))
  for bad in (-1.0, np.inf, np.nan):
    factors = (np.array([scale], F32) for scale in (2.0, bad))
    assert np.isnan(run(x, oracle.pack(codes, "nvfp4"), scales, *factors)).all(), bad


@pytest.mark.parametrize("name", UNPACKED_CASES)
def test_w_quantized_in_the_kernel(name, no_races):
  check_unpacked(interpreted, name)


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize(("m", "w_dtype", "k"), [(1, "bfloat16", 8192), (40, "float16", 768)])
def test_w_on_the_fly_is_lowered_with_the_kernel(mode, m, w_dtype, k):
  spec = jax.ShapeDtypeStruct
  args = spec((m, k), jnp.float32), spec((1000, k), w_dtype)
  assert "unquantized numbers quantized" in jaxqq.explain(*args, mode=mode, device="cuda")
  traced = jax.jit(functools.partial(jaxqq.qqmm, mode=mode)).trace(*args)
  assert "jaxqq_skinny_gemm" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
  ("mode", "m", "n", "k", "batch", "quantizes_x"),
  [
    ("nvfp4", 4, 64 * 132, 4096, 1, True),
    ("nvfp4", 4, 64 * 132 + 1, 4096, 1, False),
    ("nvfp4", 4, 64 * 66, 4096, 2, True),
    ("nvfp4", 4, 64 * 66 + 1, 4096, 2, False),
    ("nvfp4", 4, 64 * 133, 2048, 1, True),
    ("nvfp4", 4, 64 * 265, 2048, 1, False),
    ("nvfp4", 4, 64, 4608, 1, True),
    ("nvfp4", 4, 64 * 66, 8192, 1, True),
    ("nvfp4", 4, 64 * 66, 9216, 1, False),
    ("nvfp4", 4, 64 * 67, 4608, 1, False),
    ("nvfp4", 2, 64 * 67, 4608, 1, False),
    ("nvfp4", 1, 64 * 133, 4608, 1, True),
    ("nvfp4", 8, 64 * 132, 2048, 1, True),
    ("nvfp4", 8, 64 * 133, 2048, 1, False),
    ("nvfp4", 8, 64 * 133, 1024, 1, True),
    ("nvfp4", 5, 64 * 132, 4096, 1, False),
    ("nvfp4", 8, 64 * 66, 4096, 1, True),
    ("nvfp4", 9, 64 * 66, 4096, 1, False),
    ("nvfp4", 3, 64, 512, 1, False),  # fewer than are quantized at a time
    ("mxfp4", 8, 64, 512, 1, False),
    ("mxfp8", 8, 64 * 133, 8192, 1, True),
    ("mxfp8", 9, 64 * 133, 2048, 1, False),
    ("mxfp8", 16, 64 * 132, 2048, 1, True),
    ("mxfp8", 16, 64 * 66, 4096, 1, True),
    ("mxfp8", 16, 64 * 132, 2560, 1, False),
    ("mxfp8", 8, 64 * 132, 2560, 1, True),
    ("mxfp8", 17, 64 * 132, 1024, 1, False),
  ],
)
def test_rows_are_quantized_in_the_kernel_of_small_weights(mode, m, n, k, batch, quantizes_x):
  """Where a CTA has little of k, of all its tiles."""
  spec, of_batch, fmt = jax.ShapeDtypeStruct, (batch,) if batch > 1 else (), FORMATS[mode]
  x, words = spec((m, k), jnp.bfloat16), spec((*of_batch, n, k * fmt.bits // 32), jnp.uint32)
  scales = spec((*of_batch, n, k // fmt.group_size), jnp.uint8)
  plan = jaxqq.explain(jaxqq.qqmm, x, words, scales, mode=mode, device="cuda").plan.kernel
  assert plan.quantizes_x == quantizes_x


@pytest.mark.parametrize("name", UNQUANTIZED_CASES)
def test_rows_quantized_in_the_kernel(name, no_races):
  check_unquantized(interpreted, name)


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("name", UNQUANTIZED_CASES | UNQUANTIZED_CLUSTER_CASES)
  def test_rows_quantized_in_the_kernel(self, name):
    check_unquantized(compiled, name)

  @pytest.mark.parametrize("name", UNPACKED_CASES | UNPACKED_CLUSTER_CASES)
  def test_w_quantized_in_the_kernel(self, name):
    check_unpacked(compiled, name)
