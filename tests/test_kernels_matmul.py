"""The matrix kernels: in Mosaic GPU's interpreter anywhere, lowered for CUDA, run with `-m gpu`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxqq._kernels import expand, tensor_cores, tuning
from jaxqq._kernels import matmul as mm
from jaxqq._kernels import packed_matmul as pm
from tests.support import oracle
from tests.support.kernels import (
  BF16,
  E4M3,
  F16,
  F32,
  FP8_SUMS,
  assert_product,
  compiled,
  dequantized,
  downs_of,
  e2m1_operand,
  e4m3_operand,
  interleaved,
  interpreted,
  largest_scales,
  lowered,
  needs_kernels,
  on_gpu,
  powers,
  without_nan_codes,
)

pytestmark = needs_kernels


EXPANSIONS = {"e2m1": expand.E2M1, "e4m3": expand.E4M3, "e4m3_exact": expand.E4M3_EXACT}


# Operands


# matmul

C = mm.Config
# Powers of two of the operands' size, and their rows' scales. No float32 need hold the product of
# two scales.
WIDE = (4, (-60, 0, 60), (-50, 0, 50))
HIGH = (-5, (64, 65), (63, 64))
LOW = (6, (-50, -40), (-62, -60))
OPPOSITE = (4, (126, 127), (-126, -125))

MATMULS = {
  # dtype, out, (b of x, b of w), m, n, k, config, row scales
  "f16": (F16, F32, (1, 1), 201, 133, 192, C(256, 128, 3, store_slots=1), None),
  "f16 promoted": (F16, F32, (1, 1), 300, 70, 320, C(256, 64, 2, promote=True), None),
  "f16 to f16, x shared": (F16, F16, (1, 3), 33, 67, 64, C(128, 64, 4), None),
  "bf16, w shared": (BF16, F32, (2, 1), 129, 65, 128, C(128, 128, 2, store_slots=1), None),
  "bf16 to bf16": (BF16, BF16, (2, 2), 35, 130, 256, C(128, 192, 3, promote=True), None),
  "fp8 wide": (E4M3, F32, (1, 1), 201, 133, 384, C(256, 128, 2, promote=True), WIDE),
  "fp8 high to bf16": (E4M3, BF16, (2, 1), 61, 99, 256, C(128, 128, 4), HIGH),
  "fp8 opposite to f16": (E4M3, F16, (1, 2), 130, 67, 128, C(128, 64, 2, promote=True), OPPOSITE),
  "fp8 factors": (E4M3, F32, (2, 2), 33, 33, 256, C(128, 64, 2, promote=True), None),
  "walk m": (F16, F32, (2, 1), 260, 180, 128, C(128, 64, 3, group_width=2), None),
  "walk n": (E4M3, BF16, (1, 1), 300, 300, 128, C(128, 64, 3, True, 1, 2, minor=1), LOW),
}


def check_matmul(run, name):
  dtype, out_dtype, batches, m, n, k, config, sizes = MATMULS[name]
  rng = np.random.default_rng([m, n, k])
  x, w = (rng.standard_normal((b, size, k)) for b, size in zip(batches, (m, n), strict=True))
  size, *exponents = sizes or (0,)
  x, w = (np.ldexp(a, size).astype(dtype) for a in (x, w))
  batch = max(batches)
  factors = rng.uniform(0.1, 2, (batch, 2)).astype(F32)
  x_hat, w_hat = x.astype(np.float64), w.astype(np.float64)
  row_scales = None
  if sizes is None:
    x_hat = x_hat * factors[:, :1, None]
    w_hat = w_hat * factors[:, 1:, None]
  else:
    row_scales = tuple(
      powers(rng.choice(np.array(e), a.shape[:2]) + 127)
      for e, a in zip(exponents, (x, w), strict=True)
    )
    x_hat, w_hat = (a * s[..., None] for a, s in zip((x_hat, w_hat), row_scales, strict=True))

  f = functools.partial(mm.matmul, out_dtype=out_dtype, config=config)
  out = run(f, x, w, factors, row_scales)
  assert out.shape == (batch, m, n)
  fp8_sums = run is compiled and dtype is E4M3
  assert_product(out, x_hat, w_hat, out_dtype, of_mag=FP8_SUMS if fp8_sums else 1.0)


@pytest.mark.parametrize("name", MATMULS)
def test_matmul(name, few_ctas, no_races):
  check_matmul(interpreted, name)


# packed_matmul

P = pm.Config
PACKED = {
  # expansion, out, (b of x, b of w), m, n, k, config
  "e2m1": ("e2m1", F32, (1, 1), 201, 133, 192, P(256, 3, store_slots=1)),
  "e2m1 promoted": ("e2m1", F32, (2, 1), 131, 70, 128, P(256, 2, promote=True)),
  "e2m1 to f16": ("e2m1", F16, (1, 2), 33, 130, 64, P(64, 4)),
  "e4m3": ("e4m3", F32, (1, 1), 201, 133, 384, P(256, 3, promote=True, store_slots=1)),
  "e4m3 to bf16": ("e4m3", BF16, (2, 1), 70, 67, 256, P(128, 2)),
  "e4m3 to f16": ("e4m3", F16, (2, 2), 33, 61, 128, P(64, 4, promote=True)),
  "e4m3_exact": ("e4m3_exact", F32, (1, 1), 201, 133, 256, P(256, 4, promote=True)),
  "e4m3_exact to bf16": ("e4m3_exact", BF16, (1, 2), 35, 130, 64, P(64, 4)),
  "e4m3_exact to f16": ("e4m3_exact", F16, (1, 1), 67, 33, 192, P(128, 2)),
  "walk m": ("e2m1", BF16, (2, 1), 190, 200, 128, P(64, 3, group_width=2)),
  "walk n": ("e4m3", F32, (1, 1), 180, 300, 256, P(64, 3, True, 1, 2, minor=1)),
}
# The interpreter has no clusters.
SPLIT = {
  "e2m1 split": ("e2m1", BF16, (1, 1), 201, 133, 384, P(256, 4, store_slots=1, split=2)),
  "e2m1 split, batches": ("e2m1", F16, (3, 1), 67, 300, 128, P(128, 6, store_slots=1, split=2)),
  "e4m3 split": ("e4m3", BF16, (1, 1), 201, 390, 768, P(256, 3, True, 1, split=2)),
  "e4m3 split, promoted": ("e4m3", F16, (1, 2), 130, 67, 512, P(128, 5, True, 1, split=2)),
  "e4m3_exact split": ("e4m3_exact", BF16, (2, 2), 257, 129, 256, P(256, 3, True, 1, split=2)),
}


def check_packed(run, name):
  which, out_dtype, batches, m, n, k, config = (PACKED | SPLIT)[name]
  expansion, (bx, bw) = EXPANSIONS[which], batches
  batch = max(batches)
  rng = np.random.default_rng([m, n, k])
  x = rng.standard_normal((bx, m, k))
  x[:, 0] = np.abs(x[:, 0])
  factors = rng.uniform(0.1, 0.3, (batch, 2)).astype(F32)
  row_scales = None
  if which == "e2m1":
    mode, x = "nvfp4", x.astype(F16)
    codes, scales = e2m1_operand(rng, bw, n, k)
    w_hat = dequantized(mode, codes, scales)
    passed = factors * np.array([expansion.unit, 1], F32)
  elif which == "e4m3_exact":
    mode, x, passed = "mxfp8", x.astype(BF16), factors
    codes, scales = e4m3_operand(rng, bw, n, k, 107, 127)
    w_hat = dequantized(mode, codes, scales)
  else:
    mode, x, passed = "mxfp8", x.astype(E4M3), factors
    # Up to 2**100 and 2**-100.
    codes, scales = e4m3_operand(rng, bw, n, k, 208, 227)
    rows = largest_scales(scales)
    row_scales = powers(rng.integers(27, 30, (bx, m))), powers(rows)
    scales = downs_of(scales, rows)
    w_hat = lowered(codes, scales) * row_scales[1][..., None]
  x_hat = x.astype(np.float64)
  if row_scales is None:
    x_hat, w_hat = x_hat * factors[:, :1, None], w_hat * factors[:, 1:, None]
    x = interleaved(x)
  else:
    x_hat = x_hat * row_scales[0][..., None]

  f = functools.partial(pm.packed_matmul, expansion=expansion, out_dtype=out_dtype, config=config)
  out = run(f, x, oracle.pack(codes, mode), scales, passed, row_scales)
  assert out.shape == (batch, m, n)
  fp8_sums = run is compiled and which == "e4m3"
  assert_product(out, x_hat, w_hat, out_dtype, of_mag=FP8_SUMS if fp8_sums else 1.0)


@pytest.mark.parametrize("name", PACKED)
def test_packed_matmul(name, few_ctas, no_races):
  check_packed(interpreted, name)


# Every code under every scale: x is the identity, so that the product is w itself.

CONFIG = P(64, 3, store_slots=1)


def times_identity(run, expansion, codes, scales, of_w):
  """w_hat (n, k) as the kernel expands it."""
  mode = "nvfp4" if expansion.bits == 4 else "mxfp8"
  k = codes.shape[1]
  x = np.eye(k).astype(expansion.dtype)[None]
  row_scales = None
  if of_w is None:
    x = interleaved(x)
  else:
    row_scales = np.ones((1, k), F32), of_w[None]
  f = functools.partial(pm.packed_matmul, expansion=expansion, out_dtype=F32, config=CONFIG)
  factors = np.array([[expansion.unit, 1]], F32)
  return run(f, x, oracle.pack(codes, mode)[None], scales[None], factors, row_scales)[0].T


def assert_same_rows(out, want):
  """Exactly, but for what float32 holds only as a subnormal; a NaN takes all of its row."""
  nan_rows = np.isnan(want).any(axis=1)
  assert 0 < nan_rows.sum() < len(want)
  np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(nan_rows[:, None], out.shape))
  np.testing.assert_allclose(out[~nan_rows], want[~nan_rows], rtol=0, atol=2.0**-126)


def check_every_e2m1(run):
  rng = np.random.default_rng(0)
  n, k = 168, 128
  finite = [b for b in range(256) if b & 0x7F != 0x7F]
  scales = np.resize(np.array(finite, np.uint8), (n, k // 16))
  codes = rng.permuted(np.resize(np.arange(16, dtype=np.uint8), (n, k // 16, 16)), axis=-1)
  codes = codes.reshape(n, k)
  scales[3, 7], scales[150, 0] = 0x7F, 0xFF
  out = times_identity(run, expand.E2M1, codes, scales, None)
  assert_same_rows(out, dequantized("nvfp4", codes, scales))


def every_e4m3(n, k, kinds):
  """Codes, and which of so many kinds a group is, in all pairs; NaN in a few rows only."""
  group = np.arange(n * k // 32).reshape(n, k // 32)
  eighth = group // kinds % 8
  codes = (32 * eighth[..., None] + np.arange(32)).reshape(n, k).astype(np.uint8)
  some = np.arange(n)[:, None] % 16 == 7
  return np.where(some, codes, without_nan_codes(codes)), group % kinds


def check_every_e4m3(run):
  rng = np.random.default_rng(0)
  n, k = 168, 256
  codes, kind = every_e4m3(n, k, 20)
  rows = powers(rng.integers(100, 140, n))
  rows[3] = np.nan
  scales = downs_of(-kind, np.zeros(n, int))
  out = times_identity(run, expand.E4M3, codes, scales, rows)
  assert_same_rows(out, lowered(codes, scales) * rows[:, None])


def check_every_e4m3_exact(run):
  """Scales up to those at which bfloat16 still holds the largest code."""
  n, k = 496, 128
  codes, kind = every_e4m3(n, k, 246)
  scales = kind.astype(np.uint8)
  scales[3, 2] = 0xFF
  want = dequantized("mxfp8", codes, scales)
  if run is interpreted:  # on a CPU, which flushes the subnormal scale 2**-127 to zero
    want = np.where((np.repeat(scales, 32, axis=1) == 0) & ~np.isnan(want), 0, want)
  assert_same_rows(times_identity(run, expand.E4M3_EXACT, codes, scales, None), want)


EVERY = {"e2m1": check_every_e2m1, "e4m3": check_every_e4m3, "e4m3_exact": check_every_e4m3_exact}


@pytest.mark.parametrize("check", EVERY.values(), ids=EVERY)
def test_every_code_and_scale(check):
  check(interpreted)


# Lowered for CUDA, without one.

BIG = (
  # batch, m, n, k, promote
  (1, 8192, 8192, 8192, True),
  (1, 1, 128256, 4096, True),
  (8, 1000, 14336, 1024, False),
)


def assert_lowers(f, name, *args):
  lowered = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))
  assert name in lowered.as_text()


@pytest.mark.parametrize("shape", BIG, ids=str)
def test_matmul_lowers_for_cuda(shape):
  batch, m, n, k, promote = shape
  struct = jax.ShapeDtypeStruct
  for dtype, out_dtype in ((F16, BF16), (BF16, F32), (E4M3, F16)):
    config = tuning.config(None, batch, m, n, k, out_dtype, promote)
    row_scales = struct((1, m), F32), struct((batch, n), F32)
    assert_lowers(
      functools.partial(mm.matmul, out_dtype=out_dtype, config=config),
      "jaxqq_matmul",
      struct((1, m, k), dtype),
      struct((batch, n, k), dtype),
      struct((1, 2), F32),
      row_scales if dtype is E4M3 else None,
    )


@pytest.mark.parametrize(
  "shape", [(1, 1024, *BIG[0][2:]), (1, 256, *BIG[0][2:]), *BIG[1:]], ids=str
)
def test_packed_matmul_lowers_for_cuda(shape):
  batch, m, n, k, promote = shape
  struct = jax.ShapeDtypeStruct
  for (which, expansion), out_dtype in zip(EXPANSIONS.items(), (F32, BF16, F16), strict=True):
    config = tuning.config(expansion.bits, batch, m, n, k, out_dtype, promote)
    row_scales = struct((1, m), F32), struct((batch, n), F32)
    static = {"expansion": expansion, "out_dtype": out_dtype, "config": config}

    assert_lowers(
      functools.partial(pm.packed_matmul, **static),
      "jaxqq_packed_matmul",
      struct((1, m, k), expansion.dtype),
      struct((batch, n, k * expansion.bits // 32), np.uint32),
      struct((batch, n, k // expansion.group_size), np.uint8),
      struct((1, 2), F32),
      row_scales if which == "e4m3" else None,
    )


# Compiled, on a GPU.


def twins(words, scales, expansion):
  """`expand.twin` of all rows and steps: the operand (n, k), in the order the kernel has it."""
  n, steps = words.shape[0], words.shape[1] // expansion.words

  def a_tile(words, scales):
    if expansion is expand.E4M3:
      scales = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    return expand.twin(words, expand.factors(scales, expansion), expansion)

  def split(a):
    return a.reshape(n // tensor_cores.ROWS, tensor_cores.ROWS, steps, -1).swapaxes(1, 2)

  out = jax.vmap(jax.vmap(a_tile))(split(words), split(scales))
  return out.swapaxes(1, 2).reshape(n, -1)


def check_twin(run, which, n, k):
  """Random bits; NaN is in every 8th row only, for it takes all of it."""
  expansion = EXPANSIONS[which]
  rng = np.random.default_rng(1)
  words = rng.integers(0, 2**32, (n, k * expansion.bits // 32), dtype=np.uint32)
  largest = 0xFF if which == "e2m1" else 245  # bfloat16 holds the largest code times that
  scales = rng.integers(0, largest + 1, (n, k // expansion.group_size)).astype(np.uint8)
  rows = powers(rng.integers(47, 208, n))
  spared = np.arange(n)[:, None] % 8 != 0
  if which == "e2m1":
    scales = np.where(spared, without_nan_codes(scales), scales)
  else:
    codes = words.view(np.uint8)
    words = np.where(spared, without_nan_codes(codes), codes).view(np.uint32)
  if which == "e4m3":
    scales = downs_of(-rng.integers(0, 20, scales.shape), np.zeros(n, int))
    rows[16] = np.nan
  elif which == "e4m3_exact":
    scales[16, 3] = 0xFF
  want = np.asarray(jax.jit(functools.partial(twins, expansion=expansion))(words, scales))
  want = want.astype(np.float64)
  if which == "e4m3":
    want = want * rows[:, None]
    passed = np.ones((1, k), F32), rows[None]
  else:
    passed = None
  config = P(256, 4, store_slots=1)
  f = functools.partial(pm.packed_matmul, expansion=expansion, out_dtype=F32, config=config)
  x = np.eye(k).astype(expansion.dtype)[None]
  out = run(f, x, words[None], scales[None], np.ones((1, 2), F32), passed)[0].T
  assert_same_rows(out, want)


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("name", MATMULS)
  def test_matmul(self, name):
    check_matmul(compiled, name)

  @pytest.mark.parametrize("name", PACKED | SPLIT)
  def test_packed_matmul(self, name):
    check_packed(compiled, name)

  @pytest.mark.parametrize("check", EVERY.values(), ids=EVERY)
  def test_every_code_and_scale(self, check):
    check(compiled)

  @pytest.mark.parametrize("which", EXPANSIONS)
  def test_registers_hold_what_the_twin_computes(self, which):
    check_twin(compiled, which, 1024, 1024)
