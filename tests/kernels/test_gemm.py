"""gemm and dequant_gemm: interpreted anywhere, lowered for CUDA, and run with `-m gpu`."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq._formats import FORMATS
from jaxqq._kernels.hopper import dequant_gemm, gemm, launch, pipeline, stream_k
from jaxqq._kernels.hopper.mainloops.table import PARTS
from jaxqq._kernels.hopper.tiles import SCALES, Grid, planes_of
from jaxqq._kernels.hopper.tiles import WideTiles as T
from jaxqq._kernels.hopper.wide_plan import scales_of_row
from tests.support import interpreter, oracle
from tests.support.interpreter import interpreted_kernels
from tests.support.kernels import (
  BF16,
  E4M3,
  F16,
  F32,
  FP8_SUMS,
  SMS,
  Lowered,
  assert_product,
  check_every_second_row_nan,
  compiled,
  dequantized,
  e2m1_operand,
  interleaved,
  interpreted,
  interpreted_in_order,
  largest_scales,
  lowered_alone,
  mx_operand,
  needs_kernels,
  on_gpu,
  powers,
  rebased,
  rescale_bytes,
  without_nan_codes,
)
from tests.support.programs import count_kernels, lowered_for_cuda

pytestmark = needs_kernels


MAINLOOPS = {
  "e2m1": launch.MAINLOOPS["packed_e2m1"],
  "e4m3": launch.MAINLOOPS["rebased_e4m3"],
  "nvfp4": launch.MAINLOOPS["in_order_nvfp4"],
  "nvfp4 f16": launch.MAINLOOPS["in_order_nvfp4_float16"],
  "mxfp4": launch.MAINLOOPS["in_order_mxfp4"],
  "mxfp8": launch.MAINLOOPS["in_order_mxfp8"],
}
MODES = {which: which.split()[0] for which in MAINLOOPS} | {"e2m1": "nvfp4", "e4m3": "mxfp8"}
# bfloat16 holds the largest code times that.
LARGEST_SCALES = {"nvfp4": 0xFF, "mxfp4": 252, "mxfp8": 245}


def grid_of(tiles, batch, m, n, **how):
  how = {"num_sms": SMS, "stream_k": tiles.stream_k, **how}
  return Grid(batch, m, n, tiles.block_m, tiles.block_n, cluster=tiles.cluster, **how)


# gemm

# Powers of two of the operands' size, and their rows' scales. No float32 need hold the product of
# two scales.
WIDE = (4, (-60, 0, 60), (-50, 0, 50))
HIGH = (-5, (64, 65), (63, 64))
LOW = (6, (-50, -40), (-62, -60))
OPPOSITE = (4, (126, 127), (-126, -125))

GEMMS = {
  # dtype, out, (b of x, b of w), m, n, k, tiles, row scales, the grid's walk
  "f16": (F16, F32, (1, 1), 201, 133, 192, T(256, 3, store_stages=1), None, {}),
  "f16 promoted": (F16, F32, (1, 1), 300, 70, 320, T(256, 2, True, block_n=64), None, {}),
  "f16 to f16, x shared": (F16, F16, (1, 3), 33, 67, 64, T(128, 4, block_n=64), None, {}),
  "bf16, w shared": (BF16, F32, (2, 1), 129, 65, 128, T(128, 2, store_stages=1), None, {}),
  "bf16 to bf16": (BF16, BF16, (2, 2), 35, 130, 256, T(128, 3, True, block_n=192), None, {}),
  "fp8 wide": (E4M3, F32, (1, 1), 201, 133, 384, T(256, 2, True), WIDE, {}),
  "fp8 high to bf16": (E4M3, BF16, (2, 1), 61, 99, 256, T(128, 4), HIGH, {}),
  "fp8 opposite to f16": (
    E4M3,
    F16,
    (1, 2),
    130,
    67,
    128,
    T(128, 2, True, block_n=64),
    OPPOSITE,
    {},
  ),
  "fp8 past the end of k": (E4M3, BF16, (2, 1), 61, 133, 416, T(128, 3, True), LOW, {}),
  "fp8 global scales": (E4M3, F32, (2, 2), 33, 33, 256, T(128, 2, True, block_n=64), None, {}),
  "walk m": (F16, F32, (2, 1), 260, 180, 128, T(128, 3, block_n=64), None, {"group_width": 2}),
  "walk n": (
    E4M3,
    BF16,
    (1, 1),
    300,
    300,
    128,
    T(128, 3, True, 1, 1, 64),
    LOW,
    {"group_width": 2, "minor": 1},
  ),
}


def with_more_behind(scales):
  """Those of one matrix, as quantizers leave them: what is behind may be anything."""
  if scales is None or len(scales) > 1:
    return scales
  return np.pad(scales, ((0, 0), (0, 256)), constant_values=np.nan)


def check_gemm(run, name):
  dtype, out_dtype, batches, m, n, k, tiles, sizes, how = GEMMS[name]
  rng = np.random.default_rng([m, n, k])
  x, w = (rng.standard_normal((b, size, k)) for b, size in zip(batches, (m, n), strict=True))
  size, *exponents = sizes or (0,)
  x, w = (np.ldexp(a, size).astype(dtype) for a in (x, w))
  batch = max(batches)
  factors, unit = rng.uniform(0.1, 2, (2, 1)).astype(F32), 0.3
  x_hat, w_hat = x.astype(np.float64), w.astype(np.float64)
  row_scales = None, None
  if sizes is None:
    x_hat, w_hat = x_hat * factors[0] * unit, w_hat * factors[1]
  else:
    row_scales = tuple(
      powers(rng.choice(np.array(e), a.shape[:2]) + 127)
      for e, a in zip(exponents, (x, w), strict=True)
    )
    x_hat, w_hat = (a * s[..., None] for a, s in zip((x_hat, w_hat), row_scales, strict=True))

  def f(*operands):
    grid = grid_of(tiles, batch, m, n, **how)
    return gemm.gemm(gemm.Operands(*operands), out_dtype, tiles, grid, unit=unit)

  out = run(f, x, w, *factors, *map(with_more_behind, row_scales))
  assert out.shape == (batch, m, n)
  fp8_sums = run is compiled and dtype is E4M3
  assert_product(out, x_hat, w_hat, out_dtype, of_mag=FP8_SUMS if fp8_sums else 1.0)


@pytest.mark.parametrize("name", GEMMS)
def test_gemm(name, no_races):
  check_gemm(interpreted, name)


# dequant_gemm

PACKED = {
  # mainloop, out, (b of x, b of w), m, n, k, tiles, the grid's walk
  "e2m1": ("e2m1", F32, (1, 1), 201, 133, 192, T(256, 3, store_stages=1), {}),
  "e2m1 promoted": ("e2m1", F32, (2, 1), 131, 70, 128, T(256, 2, True), {}),
  "e2m1 to f16": ("e2m1", F16, (1, 2), 33, 130, 64, T(64, 4), {}),
  "e4m3": ("e4m3", F32, (1, 1), 201, 133, 384, T(256, 3, True, 1), {}),
  "e4m3 to bf16": ("e4m3", BF16, (2, 1), 70, 67, 256, T(128, 2), {}),
  "e4m3 to f16": ("e4m3", F16, (2, 2), 33, 61, 128, T(64, 4, True), {}),
  "mxfp8": ("mxfp8", F32, (1, 1), 201, 133, 256, T(256, 3, True), {}),
  "nvfp4": ("nvfp4", BF16, (1, 1), 201, 133, 192, T(256, 3), {}),
  "nvfp4 promoted": ("nvfp4", F32, (1, 2), 66, 70, 128, T(128, 2, True), {}),
  "nvfp4, 256 of n": ("nvfp4", BF16, (2, 1), 70, 330, 192, T(96, 4, block_n=256), {}),
  "nvfp4 f16": ("nvfp4 f16", F16, (2, 1), 67, 133, 192, T(64, 4), {}),
  "nvfp4 f16 promoted": ("nvfp4 f16", F32, (1, 1), 200, 133, 128, T(192, 3, True, 1), {}),
  "mxfp4": ("mxfp4", BF16, (1, 2), 201, 133, 256, T(256, 3), {}),
  "mxfp4, long": ("mxfp4", BF16, (1, 1), 33, 200, 1344, T(64, 9), {}),
  "mxfp8 to bf16": ("mxfp8", BF16, (1, 2), 35, 130, 64, T(64, 4), {}),
  "mxfp8 to f16": ("mxfp8", F16, (1, 1), 67, 33, 192, T(128, 2), {}),
  "walk m": ("e2m1", BF16, (2, 1), 190, 200, 128, T(64, 3), {"group_width": 2}),
  "walk n": ("e4m3", F32, (1, 1), 180, 300, 256, T(64, 3, True, 1), {"group_width": 2, "minor": 1}),
  # Several blocks of scales, and more of them than steps
  "e2m1, long": ("e2m1", F16, (1, 1), 66, 300, 1600, T(64, 9), {}),
  "e4m3, long": ("e4m3", BF16, (2, 1), 33, 200, 3456, T(64, 7, True), {}),
  "mxfp8, long": ("mxfp8", BF16, (1, 1), 33, 200, 1344, T(64, 9), {}),
  "e2m1, short": ("e2m1", F16, (3, 3), 66, 300, 64, T(64, 9), {}),
  # Three and four compute warpgroups; x in tiles of any multiple of 32
  "e2m1, 256 of n": ("e2m1", F16, (1, 1), 70, 330, 192, T(64, 4, block_n=256), {}),
  "e2m1, 96 of m": ("e2m1", BF16, (2, 1), 101, 133, 128, T(96, 3, block_n=192), {}),
  "e2m1, 192 of m": ("e2m1", F32, (1, 1), 200, 200, 192, T(192, 3, store_stages=1), {}),
  "e4m3, past the end of k": ("e4m3", F16, (2, 1), 140, 133, 416, T(128, 3, True), {}),
  "e4m3, 256 of n": ("e4m3", BF16, (1, 2), 65, 300, 384, T(64, 3, True, block_n=256), {}),
  "e4m3, 96 of m": ("e4m3", F16, (1, 1), 97, 130, 256, T(96, 3, True, block_n=192), {}),
  "e4m3, 192 of m": ("e4m3", BF16, (1, 1), 200, 133, 384, T(192, 3, True), {}),
  # Parts of a step; the last step has all of them, some, or a piece of its first
  "e2m1, parts": ("e2m1", BF16, (2, 1), 70, 330, 512, T(64, 2, block_n=256, parts=4), {}),
  "e2m1, 2 parts": ("e2m1", F32, (1, 2), 131, 133, 320, T(96, 4, block_n=192, parts=2), {}),
  "e2m1, parts of less": ("e2m1", F16, (1, 1), 16, 133, 128, T(16, 6, parts=4), {}),
  "e2m1, parts, long": ("e2m1", BF16, (1, 1), 33, 200, 1344, T(32, 5, parts=4), {}),
  "nvfp4, parts": ("nvfp4", F16, (1, 1), 10, 300, 736, T(16, 4, block_n=192, parts=4), {}),
  "nvfp4 f16, 2 parts": ("nvfp4 f16", F16, (2, 1), 67, 133, 224, T(128, 3, parts=2), {}),
  "nvfp4, parts promoted": ("nvfp4", F32, (1, 1), 40, 133, 576, T(64, 3, True, parts=4), {}),
  "mxfp4, parts": ("mxfp4", BF16, (1, 2), 35, 130, 672, T(64, 3, parts=4), {}),
  "mxfp8, 2 parts": ("mxfp8", F32, (1, 1), 67, 133, 416, T(96, 3, True, parts=2), {}),
  "mxfp8, 160 of m": ("mxfp8", F32, (1, 1), 200, 133, 128, T(160, 2, False, 1), {}),
}
# Of stream-K the interpreter runs CTAs in their order, which its race detector does not know.
STREAM_K = {
  # Fewer tiles than CTAs, of which one has the middle of a tile; or waves of whole tiles before
  "stream-K": ("e2m1", BF16, (1, 1), 70, 72, 1600, T(128, 5, stream_k=True), {}),
  "stream-K, batches": ("e4m3", BF16, (3, 1), 33, 70, 1664, T(64, 4, True, stream_k=True), {}),
  "stream-K, waves": ("e2m1", F32, (1, 1), 260, 330, 192, T(64, 9, stream_k=True), {}),
  "stream-K, ping-pong": ("e4m3", F16, (1, 1), 150, 300, 640, T(192, 3, True, stream_k=True), {}),
  "stream-K, 256 of n": (
    *("nvfp4", BF16, (1, 1), 70, 600, 704),
    *(T(96, 4, block_n=256, stream_k=True), {"num_sms": 8}),
  ),
  "stream-K, long": ("mxfp8", BF16, (1, 1), 200, 300, 1344, T(256, 2, True, 1, stream_k=True), {}),
  "stream-K, parts": (
    *("e2m1", BF16, (1, 1), 70, 300, 1856),
    *(T(64, 2, block_n=256, stream_k=True, parts=4), {"num_sms": 3}),
  ),
  "stream-K, fp8, parts, waves": (
    *("e4m3", BF16, (1, 1), 150, 600, 1216),
    *(T(128, 2, True, stream_k=True, parts=2), {"num_sms": 3}),
  ),
  "stream-K, two steps each": (
    *("mxfp4", BF16, (5, 1), 33, 100, 384),
    *(T(64, 9, stream_k=True), {"num_sms": 13}),
  ),
}
# The interpreter has no clusters.
CLUSTERS = {
  "e2m1 cluster": ("e2m1", BF16, (1, 1), 201, 133, 384, T(256, 3, store_stages=1, cluster=2), {}),
  "e2m1 cluster, batches": ("e2m1", F16, (3, 1), 67, 300, 256, T(128, 6, False, 1, 2), {}),
  "e4m3 cluster": ("e4m3", BF16, (1, 1), 201, 390, 768, T(256, 2, True, 1, 2), {}),
  "e4m3 cluster, promoted": ("e4m3", F16, (1, 2), 130, 67, 512, T(128, 5, True, 1, 2), {}),
  "e2m1 cluster of 4": ("e2m1", BF16, (1, 1), 201, 133, 768, T(256, 2, False, 1, 4), {}),
  "e2m1 cluster of 8": ("e2m1", F16, (2, 1), 67, 130, 1024, T(64, 8, False, 1, 8), {}),
  "e4m3 cluster of 4": ("e4m3", BF16, (1, 1), 70, 133, 1024, T(64, 7, True, 1, 4), {}),
  "e4m3 cluster of 8": ("e4m3", F16, (1, 1), 130, 200, 2048, T(128, 4, True, 1, 8), {}),
  "mxfp8 cluster of 4": ("mxfp8", BF16, (1, 1), 201, 129, 512, T(256, 2, True, 1, 4), {}),
  "e2m1 cluster, 256 of n": ("e2m1", BF16, (1, 1), 60, 300, 704, T(64, 4, False, 1, 4, 256), {}),
  "e2m1 cluster, long": ("e2m1", F16, (1, 1), 66, 200, 5312, T(64, 9, False, 1, 3), {}),
  "e2m1 cluster of 3, uneven": (
    "e2m1",
    F16,
    (1, 1),
    128,
    200,
    448,
    T(128, 4, False, 1, 3, 192),
    {},
  ),
  "e4m3 cluster of 3, uneven": ("e4m3", BF16, (1, 1), 64, 400, 896, T(64, 4, True, 1, 3), {}),
  "e2m1 cluster of 3": ("e2m1", BF16, (1, 1), 90, 300, 704, T(96, 4, False, 1, 3, 192), {}),
  "e4m3 cluster, 192 of m": ("e4m3", BF16, (1, 1), 190, 300, 896, T(192, 3, True, 1, 2), {}),
  "e4m3 cluster, 256 of n": ("e4m3", F16, (2, 1), 70, 300, 1152, T(64, 3, True, 1, 4, 256), {}),
  "e2m1 cluster, parts": (
    *("e2m1", BF16, (1, 1), 60, 300, 2240),
    *(T(64, 2, False, 1, 4, 192, parts=4), {}),
  ),
  "e2m1 cluster, 2 parts": (
    *("e2m1", F16, (2, 1), 120, 300, 1472),
    *(T(128, 3, False, 1, 4, 128, parts=2), {}),
  ),
  "mxfp8 cluster, 2 parts": (
    *("mxfp8", BF16, (1, 1), 60, 300, 992),
    *(T(64, 3, False, 1, 3, 128, parts=2), {}),
  ),
  "nvfp4 cluster": ("nvfp4", BF16, (1, 1), 201, 133, 768, T(256, 3, False, 1, 4), {}),
  "nvfp4 f16 cluster": ("nvfp4 f16", F16, (1, 1), 60, 300, 704, T(64, 4, False, 1, 4, 256), {}),
  "mxfp4 cluster": ("mxfp4", BF16, (2, 1), 90, 300, 704, T(96, 4, False, 1, 3, 192), {}),
  "mxfp8 cluster": ("mxfp8", BF16, (2, 2), 257, 129, 256, T(256, 3, True, 1, 2), {}),
}


def dequant_gemm_of(mainloop, out_dtype, tiles, **how):
  def f(*operands):
    operands = dequant_gemm.Operands(*operands)
    (bx, m, _), (bw, n, _) = operands.x.shape, operands.w.shape
    grid = grid_of(tiles, max(bx, bw), m, n, **how)
    unit = 2.0**mainloop.unit_exponent
    return dequant_gemm.dequant_gemm(operands, mainloop, out_dtype, tiles, grid, unit)

  return f


def check_packed(run, name):
  which, out_dtype, batches, m, n, k, tiles, how = (PACKED | STREAM_K | CLUSTERS)[name]
  mainloop, (bx, bw) = MAINLOOPS[which], batches
  batch = max(batches)
  rng = np.random.default_rng([m, n, k])
  x = rng.standard_normal((bx, m, k))
  x[:, 0] = np.abs(x[:, 0])
  factors = rng.uniform(0.1, 0.3, (2, 1)).astype(F32)
  row_scales = None, None
  mode, x = MODES[which], x.astype(mainloop.dtype)
  if which != "e4m3":
    if mode == "nvfp4":
      codes, scales = e2m1_operand(rng, bw, n, k)
    else:
      codes, scales = mx_operand(rng, bw, n, k, 107, 127, mode=mode)
    w_hat = dequantized(mode, codes, scales)
  else:
    # Up to 2**100 and 2**-100.
    codes, scales = mx_operand(rng, bw, n, k, 208, 227)
    rows = largest_scales(scales)
    row_scales = powers(rng.integers(27, 30, (bx, m))), powers(rows)
    scales = rescale_bytes(scales, rows)
    w_hat = rebased(codes, scales) * row_scales[1][..., None]
  x_hat = x.astype(np.float64)
  if row_scales[0] is None:
    x_hat, w_hat = x_hat * factors[0], w_hat * factors[1]
    x = interleaved(x) if mainloop.interleaved else x
  else:
    x_hat = x_hat * row_scales[0][..., None]

  f = dequant_gemm_of(mainloop, out_dtype, tiles, **how)
  row_scales = map(with_more_behind, row_scales)
  out = run(f, x, oracle.pack(codes, mode), scales, *factors, *row_scales)
  assert out.shape == (batch, m, n)
  fp8_sums = run is compiled and which == "e4m3"
  assert_product(out, x_hat, w_hat, out_dtype, of_mag=FP8_SUMS if fp8_sums else 1.0)


@pytest.mark.parametrize("bad", [-1.0, np.inf, np.nan])
def test_a_global_scale_that_is_no_amax_gives_nan(bad):
  rng = np.random.default_rng(0)
  codes, scales = e2m1_operand(rng, 1, 64, 128)
  x = rng.standard_normal((1, 16, 128)).astype(F16)
  amaxes = np.array([2.0], F32), np.array([bad], F32)
  packed = dequant_gemm_of(MAINLOOPS["e2m1"], F32, T(64, 2, store_stages=1))
  assert np.isnan(interpreted(packed, x, oracle.pack(codes, "nvfp4"), scales, *amaxes)).all()

  def ready(*operands):
    tiles = T(128, 2)
    return gemm.gemm(gemm.Operands(*operands), F32, tiles, grid_of(tiles, 1, 16, 64))

  assert np.isnan(interpreted(ready, x, np.ones((1, 64, 128), F16), *amaxes)).all()


@pytest.mark.parametrize("name", PACKED)
def test_dequant_gemm(name, no_races):
  check_packed(interpreted, name)


@pytest.mark.parametrize("name", STREAM_K)
def test_stream_k(name):
  check_packed(interpreted_in_order, name)


def of_one_x(x, weights):
  return [jaxqq.qqmm(x, *w, mode="nvfp4") for w in weights]


def packed_specs(n, k):
  spec = jax.ShapeDtypeStruct
  return spec((n, k // 8), jnp.uint32), spec((n, k // 16), jnp.uint8)


def test_nothing_is_launched_to_clear_flags():
  x, w = jax.ShapeDtypeStruct((192, 8192), jnp.bfloat16), packed_specs(5120, 8192)
  assert jaxqq.explain(jaxqq.qqmm, x, *w, mode="nvfp4", device="cuda").plan.kernel.tiles.stream_k
  text = lowered_for_cuda(of_one_x, x, [w])
  assert count_kernels(text) == 2 and "stablehlo.broadcast_in_dim" not in text
  alone = jaxqq.quantized_matmul
  plan = jaxqq.explain(alone, x, *w, mode="nvfp4", device="cuda").plan.kernel
  text = lowered_for_cuda(functools.partial(alone, mode="nvfp4"), x, *w)
  assert plan.tiles.stream_k and count_kernels(text) == 1
  assert "stablehlo.broadcast_in_dim" not in text


STREAMED_TILES = [1, 3, 10, 22]


@pytest.mark.parametrize("sms", [2, 3, 7])
@pytest.mark.parametrize("k_steps", [2, 5, 8, 19])
@pytest.mark.parametrize("tiles", STREAMED_TILES)
@pytest.mark.parametrize("dealt_steps", [1, 2])
def test_the_pieces_of_stream_k(dealt_steps, tiles, k_steps, sms):
  """Every step of every tile is somebody's, and those who begin a tile are before who ends it.

  No piece has fewer steps than are dealt out together.
  """
  grid = Grid(1, 64, 128 * tiles, 64, 128, sms, stream_k=True, dealt_steps=dealt_steps)
  if tiles % sms == 0 or grid.dealt_tiles * (k_steps // dealt_steps) < sms:
    return  # no stream-K
  # As many pieces in all cases, at once: of each operation there is one program for so many SMs.
  block_steps, most = 4, max(STREAMED_TILES) + 3

  def of_worker(_):
    walk, steps = stream_k.walk(grid, k_steps, block_steps)

    def fields(t):
      p = walk.tile(t)
      of_steps = p.steps.first, p.steps.count, p.steps.before, p.steps.blocks_before
      return [jnp.asarray(a, jnp.int32) for a in (p.n, *of_steps, p.others, p.is_end)]

    pieces = jax.vmap(fields)(jnp.arange(most))
    return walk.num_tiles, steps, jnp.stack(pieces, axis=-1)

  with interpreted_kernels():
    workers = jnp.arange(sms)
    numbers, totals, fields = jax.vmap(of_worker, axis_name=pipeline.WORKER)(workers)
  owners, begun, ended = {}, {}, {}
  for worker in range(sms):
    before = blocks = 0
    assert numbers[worker] <= most
    for piece in np.asarray(fields[worker, : numbers[worker]]):
      tile, first, count, steps_before, blocks_before, others, is_end = map(int, piece)
      assert count >= dealt_steps and (steps_before, blocks_before) == (before, blocks)
      before, blocks = (
        before + count,
        blocks - (-(first + count) // block_steps + first // block_steps),
      )
      for step in range(first, first + count):
        assert owners.setdefault((tile, step), worker) == worker
      assert is_end == (first + count == k_steps)
      (ended if is_end else begun).setdefault(tile, []).append((worker, others))
    assert before == totals[worker]
  assert len(owners) == tiles * k_steps and len(ended) == tiles
  for tile, ((worker, others),) in ended.items():
    assert [w for w, _ in begun.get(tile, [])] == list(range(worker - others, worker))


@pytest.mark.parametrize("out_dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("cluster", [2, 3, 4, 6, 8])
def test_no_row_of_a_cluster_is_stored_over_another(cluster, m, out_dtype, monkeypatch):
  """On a GPU an axis of one piece has no end: past it a CTA would write over the first one's."""
  stored, launch = [], pipeline.launch

  def recorded(body, operands, out_type, *args, **how):
    stored.append(out_type)
    if m == 17:  # what it stores to has its shape before the kernel is traced, which takes long
      return launch(body, operands, out_type, *args, **how)
    return jnp.zeros(out_type.shape, out_type.dtype)

  monkeypatch.setattr(pipeline, "launch", recorded)
  tiles = T(64, 2, cluster=cluster)
  operands = dequant_gemm.Operands(
    jax.ShapeDtypeStruct((1, m, 128 * cluster), BF16),
    jax.ShapeDtypeStruct((1, 136, 32 * cluster), jnp.uint32),
    jax.ShapeDtypeStruct((1, 136, 4 * cluster), jnp.uint8),
  )

  def f(operands):
    return dequant_gemm.dequant_gemm(
      operands, MAINLOOPS["mxfp8"], out_dtype, tiles, grid_of(tiles, 1, m, 136)
    )

  jaxpr = jax.make_jaxpr(f)(operands).jaxpr
  (out_type,) = stored
  if m == 17:
    (out,) = (e.outvars[0].aval for e in jaxpr.eqns if e.primitive.name == "custom_vmap_call")
    assert (out.shape, out.dtype) == (out_type.shape, out_type.dtype)
  transposed = np.dtype(out_dtype).itemsize != 2
  rows = out_type.shape[2 if transposed else 1]
  assert rows >= m
  assert rows > math.gcd(tiles.own_m, tiles.block_m)  # of a piece


def test_the_planner_knows_what_a_part_takes():
  for name, mainloop in launch.MAINLOOPS.items():
    part = PARTS[name]
    of_part = mainloop.part_k, 4 * mainloop.words, mainloop.groups
    assert (part.k, part.bytes, part.scales) == of_part


# Every code under every scale: x is the identity, so that the product is w itself.


def times_identity(run, which, codes, scales, of_w):
  """w_hat (n, k) as the kernel expands it."""
  mode, mainloop = MODES[which], MAINLOOPS[which]
  k = codes.shape[1]
  x = np.eye(k).astype(mainloop.dtype)[None]
  row_scales = None, None
  if mainloop.interleaved:
    x = interleaved(x)
  if of_w is not None:
    row_scales = np.ones((1, k), F32), of_w[None]
  f = dequant_gemm_of(mainloop, F32, T(64, 3, store_stages=1))
  one = np.ones(1, F32)
  return run(f, x, oracle.pack(codes, mode)[None], scales[None], one, one, *row_scales)[0].T


def assert_same_rows(out, want):
  """Exactly, but for what float32 holds only as a subnormal; a NaN takes all of its row."""
  nan_rows = np.isnan(want).any(axis=1)
  assert 0 < nan_rows.sum() < len(want)
  np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(nan_rows[:, None], out.shape))
  np.testing.assert_allclose(out[~nan_rows], want[~nan_rows], rtol=0, atol=2.0**-126)


def check_every_nvfp4(run, which):
  rng = np.random.default_rng(0)
  n, k = 168, 128
  finite = [b for b in range(256) if b & 0x7F != 0x7F]
  scales = np.resize(np.array(finite, np.uint8), (n, k // 16))
  codes = rng.permuted(np.resize(np.arange(16, dtype=np.uint8), (n, k // 16, 16)), axis=-1)
  codes = codes.reshape(n, k)
  scales[3, 7], scales[150, 0] = 0x7F, 0xFF
  out = times_identity(run, which, codes, scales, None)
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
  scales = rescale_bytes(-kind, np.zeros(n, int))
  out = times_identity(run, "e4m3", codes, scales, rows)
  assert_same_rows(out, rebased(codes, scales) * rows[:, None])


def check_every_mxfp8(run):
  """Scales up to those at which bfloat16 still holds the largest code."""
  n, k = 496, 128
  codes, kind = every_e4m3(n, k, 246)
  check_powers(run, "mxfp8", codes, kind.astype(np.uint8))


def check_every_mxfp4(run):
  n, k = 253, 128
  codes = np.resize(np.arange(16, dtype=np.uint8), (n, k))
  kind = np.arange(n)[:, None] + np.arange(4)
  check_powers(run, "mxfp4", codes, (kind % (LARGEST_SCALES["mxfp4"] + 1)).astype(np.uint8))


def check_powers(run, mode, codes, scales):
  scales[3, 2] = 0xFF
  want = dequantized(mode, codes, scales)
  if run is interpreted:  # on a CPU, which flushes the subnormal scale 2**-127 to zero
    want = np.where((np.repeat(scales, 32, axis=1) == 0) & ~np.isnan(want), 0, want)
  assert_same_rows(times_identity(run, mode, codes, scales, None), want)


EVERY = {
  which: functools.partial(check_every_nvfp4, which=which)
  for which, mode in MODES.items()
  if mode == "nvfp4"
} | {"e4m3": check_every_e4m3, "mxfp4": check_every_mxfp4, "mxfp8": check_every_mxfp8}


@pytest.mark.parametrize("check", EVERY.values(), ids=EVERY)
def test_every_code_and_scale(check):
  check(interpreted)


# Lowered for CUDA, without one: a product's plan says which kernel, the program has it.

BIG = (
  # batch, m, n, k
  (1, 8192, 8192, 8192),
  (1, 1024, 8192, 8192),
  (1, 256, 8192, 8192),
  (1, 65, 128256, 4096),
  (8, 1000, 14336, 1024),
)


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("shape", BIG, ids=str)
def test_lowers_for_cuda(shape, mode):
  batch, m, n, k = shape
  spec, (bits, group) = jax.ShapeDtypeStruct, {"nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
  w = spec((batch, n, k * bits // 32), np.uint32), spec((batch, n, k // group), np.uint8)
  on_the_fly = (spec((batch, n, k), BF16),)
  for dtype, of_w in ((BF16, w), (F32, w), (BF16, on_the_fly), (F16, on_the_fly)):
    args = spec((batch, m, k), dtype), *of_w
    kernel = jaxqq.explain(*args, mode=mode, device="cuda").plan.kernel.kernel
    staged = mode == "mxfp8" and m == 8192
    wide = {"gemm"} if of_w is on_the_fly else {"staged_gemm" if staged else "dequant_gemm"}
    assert kernel in wide
    text = lowered_for_cuda(functools.partial(jaxqq.qqmm, mode=mode), *args)
    assert f"jaxqq_{'gemm' if staged else kernel}" in text


@pytest.mark.parametrize("name", STREAM_K | CLUSTERS)
def test_cases_of_a_gpu_are_lowered(name):
  with pytest.raises(Lowered):
    check_packed(lowered_alone, name)


# Compiled, on a GPU.


def interpreted_operand(words, scales, mainloop):
  """What the interpreter expands, all rows and steps: (n, k), in the order the kernel has it."""
  n, steps = words.shape[0], words.shape[1] // mainloop.words

  def a_tile(words, scales):
    if mainloop is MAINLOOPS["e4m3"]:
      scales = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    return mainloop.expand(words, scales)

  def split(a):
    return a.reshape(n // 64, 64, steps, -1).swapaxes(1, 2)

  with interpreted_kernels():
    out = jax.jit(jax.vmap(jax.vmap(a_tile)))(split(words), split(scales))
  return np.asarray(out.swapaxes(1, 2).reshape(n, -1).astype(F32)).astype(np.float64)


def check_registers(run, which, n, k):
  """Random bits; NaN is in every 8th row only, for it takes all of it."""
  mainloop, mode = MAINLOOPS[which], MODES[which]
  bits, group = {"nvfp4": (4, 16), "mxfp4": (4, 32), "mxfp8": (8, 32)}[mode]
  rng = np.random.default_rng(1)
  words = rng.integers(0, 2**32, (n, k * bits // 32), dtype=np.uint32)
  scales = rng.integers(0, LARGEST_SCALES[mode] + 1, (n, k // group)).astype(np.uint8)
  rows = powers(rng.integers(47, 208, n))
  spared = np.arange(n)[:, None] % 8 != 0
  if mode == "nvfp4":
    scales = np.where(spared, without_nan_codes(scales), scales)
  if mode == "mxfp8":
    codes = words.view(np.uint8)
    words = np.where(spared, without_nan_codes(codes), codes).view(np.uint32)
  passed = None, None
  if which == "e4m3":
    scales = rescale_bytes(-rng.integers(0, 20, scales.shape), np.zeros(n, int))
    rows[16] = np.nan
    passed = np.ones((1, k), F32), rows[None]
  elif mode != "nvfp4":
    scales[16, 3] = 0xFF
  want = interpreted_operand(words, scales, mainloop) * 2.0**mainloop.unit_exponent
  if which == "e4m3":
    want = want * rows[:, None]
  f = dequant_gemm_of(mainloop, F32, T(256, 3, store_stages=1))
  x = np.eye(k).astype(mainloop.dtype)[None]
  one = np.ones(1, F32)
  out = run(f, x, words[None], scales[None], one, one, *passed)[0].T
  assert_same_rows(out, want)


# Scales in planes, where a last step goes past the end of a row of them.
ROWS_OF_SCALES = {  # mode, m, n, k, whether x is quantized; mainloop, planes
  "nvfp4": ("nvfp4", 100, 72, 544, True, "packed_e2m1", 8),
  "nvfp4 alone": ("nvfp4", 100, 72, 1120, False, "in_order_nvfp4", 8),
  "mxfp8": ("mxfp8", 100, 72, 832, True, "rebased_e4m3", 8),
  "mxfp8 alone, two scales a part": ("mxfp8", 100, 200, 928, False, "in_order_mxfp8", 16),
  "mxfp4 alone": ("mxfp4", 100, 72, 608, False, "in_order_mxfp4", 16),
}


def check_rows_of_scales(run, name):
  *product, quantize_input, mainloop, count = ROWS_OF_SCALES[name]
  mode, m, n, k = product
  fmt, spec = FORMATS[mode], jax.ShapeDtypeStruct
  w = spec((n, k * fmt.bits // 32), jnp.uint32), spec((n, k // fmt.group_size), jnp.uint8)
  function = jaxqq.qqmm if quantize_input else jaxqq.quantized_matmul
  plan = jaxqq.explain(function, spec((m, k), BF16), *w, mode=mode, device="cuda").plan.kernel
  assert (plan.kernel, plan.mainloop) == ("dequant_gemm", mainloop)
  of_row = scales_of_row(k, PARTS[mainloop], fp8=plan.fp8)
  assert planes_of(of_row, SCALES, plan.tiles.block_n).count == count
  check_every_second_row_nan(run, *product, quantize_input=quantize_input)


@pytest.mark.parametrize("name", ROWS_OF_SCALES)
def test_rows_of_scales_begin_anywhere(name):
  with interpreter.interpreted():
    check_rows_of_scales(lambda f, *args: np.asarray(jax.jit(f)(*args)), name)


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("name", ROWS_OF_SCALES)
  def test_rows_of_scales_begin_anywhere(self, name):
    check_rows_of_scales(compiled, name)

  @pytest.mark.parametrize("name", GEMMS)
  def test_gemm(self, name):
    check_gemm(compiled, name)

  @pytest.mark.parametrize("name", PACKED | STREAM_K | CLUSTERS)
  def test_dequant_gemm(self, name):
    check_packed(compiled, name)

  def test_products_of_one_x_have_flags_of_their_own(self):
    """Which look alike to XLA, as their x_hat is."""
    x = jax.random.normal(jax.random.key(0), (192, 8192), jnp.bfloat16)
    weights = [
      (
        jax.random.bits(jax.random.key(i), words.shape, jnp.uint32),
        jax.random.randint(jax.random.key(2 + i), scales.shape, 40, 72, jnp.uint8),
      )
      for i in range(2)
      for words, scales in [packed_specs(5120, 8192)]
    ]
    plan = jaxqq.explain(jaxqq.qqmm, x, *weights[0], mode="nvfp4").plan.kernel
    assert plan.tiles.stream_k
    together, apart = jax.jit(of_one_x), jax.jit(functools.partial(jaxqq.qqmm, mode="nvfp4"))
    want = [np.asarray(apart(x, *w)) for w in weights]
    for _ in range(20):
      for got, own in zip(together(x, weights), want, strict=True):
        assert (np.asarray(got) == own).all()

  @pytest.mark.parametrize("check", EVERY.values(), ids=EVERY)
  def test_every_code_and_scale(self, check):
    check(compiled)

  @pytest.mark.parametrize("which", MAINLOOPS)
  def test_registers_hold_what_the_interpreter_computes(self, which):
    check_registers(compiled, which, 1024, 1024)
