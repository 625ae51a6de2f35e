"""skinny_gemm: in Mosaic GPU's interpreter anywhere, run with `-m gpu`."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq._formats import FORMATS
from jaxqq._kernels.hopper.mainloops.blockdiag import UNIT
from jaxqq._kernels.hopper.mainloops.packed_e2m1 import PackedE2M1
from jaxqq._kernels.hopper.ptx.expand_in_order import E2M1_UNIT
from jaxqq._kernels.hopper.quantize.blockdiag import blockdiag_operand
from jaxqq._kernels.hopper.quantize.code_words import code_words
from jaxqq._kernels.hopper.skinny_gemm import Operands, skinny_gemm
from jaxqq._kernels.hopper.tiles import BlockDiagonal, KBlock, planes_of
from jaxqq._kernels.hopper.tiles import SkinnyTiles as T
from tests.support import interpreter, oracle, quantizers
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
  e2m1_operand,
  interleaved,
  interpreted,
  interpreted_in_order,
  lowered_alone,
  mx_operand,
  needs_kernels,
  nothing_beyond,
  on_gpu,
  padded_rows,
  skinny_plan,
)

pytestmark = needs_kernels

CASES = {
  # mode, out, (b of x, b of w), m, n, k, config
  "nvfp4": ("nvfp4", BF16, (1, 1), 1, 133, 1024, T(4)),
  "nvfp4, a warpgroup without a block": ("nvfp4", F32, (1, 1), 5, 70, 512, T(4, promote=True)),
  "nvfp4, three eights of rows": ("nvfp4", BF16, (1, 1), 20, 330, 768, T(4)),
  "nvfp4, w shared": ("nvfp4", F16, (3, 1), 9, 64, 1280, T(4, 2)),
  "nvfp4, as many rows as there may be": ("nvfp4", F32, (1, 2), 64, 65, 768, T(2, 2)),
  "blockdiag, 1 row": ("blockdiag", BF16, (1, 1), 1, 133, 1024, T(4)),
  "blockdiag, 1 row in small blocks": ("blockdiag", F32, (1, 1), 1, 64, 1280, T(4)),
  "blockdiag, 2 rows": ("blockdiag", F32, (1, 2), 2, 70, 1280, T(4, 2)),
  "blockdiag, 3 rows": ("blockdiag", F32, (1, 1), 3, 64, 512, T(4)),
  "blockdiag, 4 rows": ("blockdiag", BF16, (1, 1), 4, 200, 768, T(2, 2)),
  "x as it is, nvfp4": ("nvfp4 bf16", BF16, (1, 1), 1, 133, 1024, T(4)),
  "x as it is, nvfp4, many tiles": ("nvfp4 bf16", F32, (2, 1), 33, 330, 768, T(2, 2, True)),
  "x as it is, nvfp4, float16": ("nvfp4 f16", F16, (1, 2), 17, 70, 768, T(4)),
  "x as it is, mxfp4": ("mxfp4 bf16", BF16, (1, 1), 5, 133, 1536, T(4)),
  "sixteens, nvfp4": ("nvfp4 bf16", BF16, (1, 1), 1, 133, 1024, T(4)),
  "sixteens, nvfp4, 128 rows of w": ("nvfp4 bf16", F32, (2, 1), 17, 200, 768, T(4, block_n=128)),
  "sixteens, nvfp4, float16": ("nvfp4 f16", F32, (1, 2), 16, 330, 768, T(4, 2, True)),
  "sixteens, mxfp4, 128 rows of w": (
    "mxfp4 bf16",
    BF16,
    (2, 1),
    5,
    133,
    1536,
    T(4, 2, block_n=128),
  ),
  "x as it is, mxfp8": ("mxfp8 bf16", BF16, (2, 2), 9, 70, 1024, T(2, 2)),
  # More tiles a CTA than slots, the last one past the end; as few blocks as warpgroups.
  "whole scales, nvfp4": ("nvfp4", BF16, (2, 1), 9, 570, 1088, T(4, whole_scales=True)),
  "whole scales, nvfp4, 2 blocks": ("nvfp4", F32, (1, 2), 5, 570, 320, T(4, 2, whole_scales=True)),
  "sixteens, whole scales": (
    "nvfp4 bf16",
    F32,
    (1, 3),
    17,
    510,
    1120,
    T(4, 2, block_n=128, whole_scales=True),
  ),
  "whole scales, mxfp8, 2 blocks": (
    "mxfp8 bf16",
    BF16,
    (2, 1),
    7,
    576,
    544,
    T(4, 2, whole_scales=True),
  ),
  "mxfp8": ("mxfp8", BF16, (1, 1), 1, 133, 2560, T(4)),
  "mxfp8, x shared": ("mxfp8", BF16, (1, 3), 8, 66, 1024, T(2, 2)),
  "mxfp8, more tiles than stages": ("mxfp8", BF16, (2, 2), 17, 200, 1536, T(2, 2)),
  "mxfp8, three eights of rows": ("mxfp8", BF16, (1, 2), 24, 136, 1536, T(4)),
  "mxfp8, as many rows as there may be": ("mxfp8", BF16, (1, 1), 64, 40, 2048, T(2, 2)),
}


# Clusters of CTAs, each with a part of k: the interpreter cannot read another CTA's shared memory.
CLUSTER_CASES = {
  "nvfp4 in two": ("nvfp4", BF16, (1, 2), 17, 130, 2048, T(4, 4, cluster=2)),
  "nvfp4 in four, promoted": ("nvfp4", F32, (2, 1), 9, 61, 4096, T(8, 4, True, cluster=4)),
  "x as it is, nvfp4 in four": ("nvfp4 bf16", BF16, (1, 1), 9, 133, 4096, T(4, 4, cluster=4)),
  "sixteens, nvfp4 in four": ("nvfp4 bf16", BF16, (1, 1), 5, 133, 4096, T(4, 4, cluster=4)),
  "x as it is, mxfp8 in two": ("mxfp8 bf16", BF16, (1, 2), 1, 200, 4096, T(4, 4, cluster=2)),
  "blockdiag in two": ("blockdiag", F32, (1, 1), 1, 133, 4096, T(8, 4, cluster=2)),
  "blockdiag in four, many tiles": ("blockdiag", BF16, (1, 3), 3, 3000, 2048, T(4, 2, cluster=4)),
  "mxfp8 in two, many tiles": ("mxfp8", BF16, (2, 2), 3, 5000, 4096, T(4, 4, cluster=2)),
  "mxfp8 in four": ("mxfp8", F32, (1, 1), 60, 67, 8192, T(2, 2, cluster=4)),
  "nvfp4 in three, uneven": ("nvfp4", BF16, (2, 1), 17, 130, 3584, T(4, 4, cluster=3)),
  "blockdiag in eight, uneven": ("blockdiag", BF16, (1, 1), 2, 200, 10240, T(4, 2, cluster=8)),
  "mxfp8 in six, uneven": ("mxfp8", F32, (1, 2), 16, 133, 6656, T(4, 2, cluster=6)),
  # A cluster's CTAs have some tiles each, and share a last one of them.
  "nvfp4, last shared": ("nvfp4", F32, (1, 1), 9, 300, 2304, T(4, cluster=2, shares_last=True)),
  "blockdiag, last shared": (
    "blockdiag",
    BF16,
    (1, 1),
    1,
    180,
    5120,
    T(8, cluster=2, shares_last=True),
  ),
  "sixteens, last shared": (
    "nvfp4 bf16",
    BF16,
    (1, 1),
    5,
    570,
    2816,
    T(4, 2, cluster=2, shares_last=True),
  ),
  "mxfp8, last shared": (
    "mxfp8",
    BF16,
    (5, 1),
    20,
    130,
    4608,
    T(4, 2, cluster=2, shares_last=True),
  ),
}
# Blocks of k dealt out to so many CTAs: some of which have the middle of a tile; or parts of two
# tiles, and whole ones; and warpgroups without a block of a part.
STREAM_K_CASES = {
  "stream-K": ("nvfp4", BF16, (1, 1), 9, 133, 1536, T(4, stream_k=True), 5),
  "stream-K, waves": ("mxfp8", F32, (2, 1), 20, 330, 2560, T(4, 2, stream_k=True), 5),
  "sixteens, stream-K": ("nvfp4 bf16", F16, (1, 1), 5, 130, 2048, T(8, stream_k=True), 7),
  "blockdiag, stream-K": ("blockdiag", BF16, (1, 1), 3, 250, 2560, T(8, 2, stream_k=True), 3),
}


def columns_of(codes, scales):
  """x's e2m1 codes (m, k) and scales (m, k / 16) block-diagonal: words, scales, which columns."""
  m, k = codes.shape
  blockdiag = BlockDiagonal(1 << (m - 1).bit_length())
  numbers = ((codes & 8) << 4) | ((codes & 7) << 2)
  words = np.zeros((blockdiag.columns, k // 32, 2, 4, 4), np.uint8)  # column, block, h, q, j
  factors = np.full((k // 32, blockdiag.rows, 2), np.nan, F32)
  for row, block, place in np.ndindex(m, k // 32, 32):
    group, q, j, h = place // 16, place // 8, place % 8 // 2, 1 - place % 2
    column = 2 * blockdiag.rows * (block % blockdiag.k_blocks_per_acc) + 2 * row + group
    words[column, block, h, q, j] = numbers[row, 32 * block + place]
    factors[block, row, group] = scales[row, 2 * block + group]
  return words.reshape(blockdiag.columns, k).view(np.uint32), factors, blockdiag


def check_skinny(run, name):
  every = CASES | CLUSTER_CASES | STREAM_K_CASES
  mode, out_dtype, (bx, bw), m, n, k, tiles, *num_sms = every[name]
  blockdiag = x_as_is = None
  batch = max(bx, bw)
  rng = np.random.default_rng([m, n, k])
  factors = rng.uniform(0.1, 0.3, (2, 1)).astype(F32)
  x = rng.standard_normal((bx, m, k))
  x[:, 0] = np.abs(x[:, 0])
  if " " in mode:
    mode, dtype = mode.split()
    x_as_is, x_factors = {"bf16": BF16, "f16": F16}[dtype], None
    x, unit = x.astype(x_as_is), 1.0
    if mode == "nvfp4":
      block, unit = KBlock(256, 4, 16), 2.0**E2M1_UNIT
      codes, scales = e2m1_operand(rng, bw, n, k)
    else:
      block = KBlock(512, 4 if mode == "mxfp4" else 8, 32)
      codes, scales = mx_operand(rng, bw, n, k, 107, 127, mode=mode)
    operand, x_hat = nothing_beyond(x, m, np.nan), x.astype(np.float64)
  elif mode == "nvfp4":
    block, x, x_factors = KBlock(256, 4, 16), x.astype(F16), None
    codes, scales = e2m1_operand(rng, bw, n, k)
    unit = 2.0**PackedE2M1.unit_exponent
    operand, x_hat = nothing_beyond(interleaved(x), m, np.nan), x.astype(np.float64)
  elif mode == "blockdiag":
    mode, block = "nvfp4", KBlock(256 if k % 512 else 512, 4, 16)
    codes, scales = e2m1_operand(rng, bw, n, k)
    x_codes, x_scales = e2m1_operand(rng, 1, m + 1, k)  # which has a NaN in its last row
    x_codes, x_scales = x_codes[0, :m], x_scales[0, :m]
    x_hat = oracle.values(x_codes, x_scales, mode)[None]
    operand, x_factors, blockdiag = columns_of(x_codes, x_scales.view(E4M3).astype(F32))
    operand, x_factors = operand[None], x_factors.reshape(1, 1, -1)
    unit = UNIT
  else:
    block, x, unit = KBlock(512, 8, 32), (x * 64).astype(E4M3), 1.0
    # On a GPU groups are summed up in 14 bits: there are some of every size in a sum.
    spread = 3 if run is compiled else 30
    codes, scales = mx_operand(rng, bw, n, k, 127 - spread, 127 + spread)
    x_factors = np.ldexp(F32(1), rng.integers(-spread, spread, (bx, m, k // 32)))
    x_hat = x.astype(np.float64) * np.repeat(x_factors, 32, axis=-1)
    x_factors = np.moveaxis(nothing_beyond(x_factors, m, np.nan), 1, 2)
    operand = nothing_beyond(x.view(np.uint32), m, 0x7F7F7F7F)
  w_hat = oracle.values(codes, scales, mode) * factors[1]
  plan = skinny_plan(
    mode, m, n, k, block, tiles, batch=(bx, bw), blockdiag=blockdiag, x_as_is=x_as_is
  )
  if name.startswith("sixteens"):
    plan = dataclasses.replace(plan, mainloop="sixteens")
  if num_sms:
    device = dataclasses.replace(plan.device, num_sms=num_sms[0])
    plan = dataclasses.replace(plan, device=device)

  def f(x, *args):
    return skinny_gemm(Operands(x, *args), m, plan, unit, out_dtype)

  out = run(f, operand, oracle.pack(codes, mode), scales, *factors, x_factors)
  assert out.shape == (batch, m, n)
  fp8_sums = run is compiled and mode == "mxfp8" and x_as_is is None
  of_mag = FP8_SUMS if fp8_sums else 1.0
  assert_product(out, x_hat * factors[0], w_hat, out_dtype, of_mag=of_mag)


@pytest.mark.parametrize("name", CLUSTER_CASES)
def test_cases_of_a_gpu_are_lowered(name):
  with pytest.raises(Lowered):
    check_skinny(lowered_alone, name)


@pytest.mark.parametrize("name", CASES)
def test_skinny_gemm(name, no_races):
  check_skinny(interpreted, name)


@pytest.mark.parametrize("name", STREAM_K_CASES)
def test_stream_k(name):
  check_skinny(interpreted_in_order, name)


@pytest.mark.parametrize(
  ("mode", "m", "n", "k", "stream_k"),
  [
    ("nvfp4", 8, 5120, 25600, True),
    ("nvfp4", 5, 5120, 15872, True),
    ("nvfp4", 8, 5376, 16384, False),  # 21 blocks instead of 32
    ("nvfp4", 8, 5120, 8192, False),
    ("nvfp4", 4, 5120, 25600, False),  # block-diagonal
    ("nvfp4", 16, 5120, 25600, False),  # expanded
    ("nvfp4", 64, 5120, 25600, False),
    ("nvfp4", 8, 4096, 25600, False),  # clusters
    ("nvfp4", 8, 8448, 25600, False),  # as many tiles as SMs
    ("mxfp8", 32, 5120, 25600, True),
    ("mxfp8", 17, 5120, 25600, True),
    ("mxfp8", 16, 5120, 25600, False),
    ("nvfp4", 8, 5120, 25600 + 32, False),  # scales in planes
  ],
)
def test_blocks_of_a_long_k_are_dealt_out(mode, m, n, k, stream_k):
  """Where tiles leave SMs idle, and loads take less than what else there is to do."""
  plan = plan_of(mode, m, n, k)
  assert (plan.kernel == "skinny_gemm" and plan.tiles.stream_k) == stream_k


# Rows of scales that begin at multiples of 1, 2, 4, 8 and 16 bytes, and of a last block of 256 or
# 512 of k some.
ROWS_OF_SCALES = {
  "blockdiag": ("nvfp4", 2, True, (65, 66, 68, 72, 81, 82, 84, 88, 112)),
  "sixteens": ("nvfp4", 7, True, (65, 66, 68, 72, 81, 82, 84, 88, 112)),
  "expanded": ("nvfp4", 17, True, (65, 66, 68, 72, 112)),
  "group_sums": ("mxfp8", 5, True, (17, 18, 20, 24, 48, 49)),
  "in_order": ("mxfp8", 3, False, (17, 18, 20, 24, 48, 49)),
}


def check_scales_of_rows(run, mainloop, sizes=(100, 128)):
  """Of as many rows of w: the last for tiles that no cluster shares."""
  mode, m, quantize_input, counts = ROWS_OF_SCALES[mainloop]
  seen = set()
  for count, n in itertools.product(counts, sizes):
    k = count * FORMATS[mode].group_size
    plan = plan_of(mode, m, n, k, alone=not quantize_input)
    assert plan.mainloop == mainloop
    planes = plan.scale_planes
    assert (planes is None) == (count % 16 == 0)
    if plan.tiles.whole_scales:
      seen.add("whole")
    elif planes is not None:
      assert planes.count == 16 // np.gcd(count, 16) > 1
      seen.add(planes.loaded)
    check_every_second_row_nan(run, mode, m, n, k, quantize_input=quantize_input)
  assert seen == {"whole"} | ({16, 32} if m < 16 and mode == "nvfp4" else {16})


@pytest.mark.parametrize("mainloop", ROWS_OF_SCALES)
def test_rows_of_scales_begin_anywhere(mainloop):
  with interpreter.interpreted():
    check_scales_of_rows(lambda f, *args: np.asarray(jax.jit(f)(*args)), mainloop)


@pytest.mark.parametrize("k_steps", [4, 5, 6, 12])
@pytest.mark.parametrize(("stages", "workers"), [(2, 2), (6, 2), (4, 4), (8, 4), (16, 4)])
def test_whole_scales_are_not_replaced_before_all_have_seen_them(stages, workers, k_steps):
  """They are loaded with a tile's first step, when the step `stages` before it is done."""

  def are_seen(slots):
    """The first tile's, before those of the tile that has its slot next are loaded."""
    done = range(slots * k_steps - stages + 1)
    who = {step % workers for step in done}  # has had a step of it or of a later tile
    return len(done) >= k_steps and len(who) == workers

  slots = T(stages, workers, whole_scales=True).scale_slots(k_steps)
  assert are_seen(slots) and not are_seen(slots - 1)


@pytest.mark.parametrize("rows", [64, 128, 192, 256])
def test_planes_of_scales_begin_at_multiples_of_128_bytes(rows):
  """Where the TMA writes to. Planes of 12 rows did not."""
  for of_row, loaded in itertools.product(range(1, 100), (16, 32)):
    planes = planes_of(of_row, loaded, rows)
    assert (planes is None) == (of_row % 16 == 0)
    if planes is not None:
      count, rows_of_plane, width = planes.shape
      assert count * rows_of_plane >= rows
      assert rows_of_plane * width % 128 == 0


@pytest.mark.parametrize("tiles", [T(2, 2), T(4)], ids=str)
def test_any_warpgroup_adds_up_to_the_same_bits(tiles):
  """Each has some of a CTA's tiles; here all tiles are of the same rows of w."""
  m, k, tile = 9, 1024, 64
  rng = np.random.default_rng(0)
  codes, scales = e2m1_operand(rng, 1, tile, k)
  times = 5 * SMS
  words, scales = (np.tile(a, (1, times, 1)) for a in (oracle.pack(codes, "nvfp4"), scales))
  x = nothing_beyond(interleaved(rng.standard_normal((1, m, k)).astype(F16)), m, np.nan)
  plan = skinny_plan("nvfp4", m, times * tile, k, KBlock(256, 4, 16), tiles)
  assert plan.grid.num_tiles == 5 * plan.grid.num_workers

  def f(*operands):
    return skinny_gemm(Operands(*operands, None, None), m, plan, 1.0, F32)

  out = interpreted(f, x, words, scales)
  of_tiles = out.reshape(m, times, tile)
  assert np.nanmax(out) > 1  # one row of w is NaN
  np.testing.assert_array_equal(of_tiles, of_tiles[:, :1].repeat(times, axis=1))


@pytest.mark.parametrize(
  ("mode", "m"),
  [("nvfp4", m) for m in (1, 2, 4, 8, 9, 16, 17, 32, 33, 64)]
  + [("mxfp8", m) for m in (1, 2, 4, 8, 9, 16, 17, 32)],
)
def test_plans_fit_and_give_every_warpgroup_its_stages(mode, m):
  tiles = plan_of(mode, m, 4096, 8192).tiles
  assert tiles.num_stages >= 2
  assert tiles.num_stages % tiles.compute_warpgroups == 0


def plan_of(mode, m, n, k, *, alone=False):
  """The plan of packed w, for a Hopper GPU of 132 SMs."""
  spec, fmt = jax.ShapeDtypeStruct, FORMATS[mode]
  w = spec((n, k * fmt.bits // 32), jnp.uint32), spec((n, k // fmt.group_size), jnp.uint8)
  product = jaxqq.quantized_matmul if alone else jaxqq.qqmm
  return jaxqq.explain(
    product, spec((m, k), jnp.bfloat16), *w, mode=mode, device="cuda"
  ).plan.kernel


@pytest.mark.parametrize(
  ("mode", "alone", "m", "mainloop"),
  [
    ("nvfp4", False, 4, "blockdiag"),
    ("nvfp4", False, 5, "sixteens"),
    ("nvfp4", False, 8, "sixteens"),
    ("nvfp4", False, 9, "expanded"),
    ("nvfp4", True, 24, "sixteens"),
    ("nvfp4", True, 25, "in_order"),
    ("mxfp4", False, 24, "sixteens"),
    ("mxfp8", True, 1, "in_order"),
  ],
)
def test_mainloops(mode, alone, m, mainloop):
  assert plan_of(mode, m, 8192, 8192, alone=alone).mainloop == mainloop


def check_blockdiag_operand(run, m, k, dtype, global_scale):
  fmt = FORMATS["nvfp4"]
  rng = np.random.default_rng([m, k])
  a = rng.standard_normal((m, k)).astype(dtype)
  a[0, :16] = 0
  a[-1, 70] = np.inf
  packed, scales = oracle.quantize(np.asarray(a, F32), "nvfp4", global_scale)
  words, factors, blockdiag = columns_of(oracle.unpack(packed, "nvfp4"), scales.view(E4M3))
  f = functools.partial(blockdiag_operand, fmt=fmt, global_scale=global_scale, blockdiag=blockdiag)
  got_words, got_factors = run(f, a)
  rows = np.zeros(blockdiag.columns, bool).reshape(blockdiag.k_blocks_per_acc, blockdiag.rows, 2)
  rows[:, :m] = True  # of others nothing is written
  np.testing.assert_array_equal(got_words[rows.ravel()], words[rows.ravel()])
  got_factors = got_factors.reshape(factors.shape)
  np.testing.assert_array_equal(got_factors[:, :m], factors[:, :m])


def check_code_words(run, m, k, dtype):
  """Codes and scales are those of the format, in rows; what is beyond the rows is not looked at."""
  rng = np.random.default_rng([m, k])
  a = (rng.standard_normal((m, k)) * np.ldexp(1.0, rng.integers(-20, 20, (m, 1)))).astype(dtype)
  a[0, :32] = 0
  a[-1, 64] = np.nan
  packed, scales = oracle.quantize(np.asarray(a, F32), "mxfp8")
  padded_m = padded_rows(m)
  words, factors = run(functools.partial(code_words, fmt=FORMATS["mxfp8"], rows=padded_m), a)
  np.testing.assert_array_equal(words[:m], packed)
  # An interpreter on a CPU, and float32 itself, have 2**-127 as a subnormal or as 0.
  want = np.where(scales == 0xFF, np.nan, np.ldexp(1.0, scales.astype(int) - 127))
  np.testing.assert_allclose(factors.T[:m], want, rtol=0, atol=2.0**-126)


OPERANDS = {
  # which, m, k, dtype, global scale
  "codes": (check_code_words, 3, 1024, F32),
  "codes of a row": (check_code_words, 1, 512, BF16),
  "blockdiag, a row": (check_blockdiag_operand, 1, 1024, BF16, None),
  "blockdiag, two, the last step overlaps": (check_blockdiag_operand, 2, 1280, F32, 3.5),
  "blockdiag, four": (check_blockdiag_operand, 4, 1024, F16, None),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_operands(name):
  check, *case = OPERANDS[name]
  check(quantizers.interpreted, *case)


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("split_k", [False, True])
def test_a_split_product_is_lowered_with_its_kernels(mode, split_k):
  """The partitioner's rule holds no constant of numpy's, which JAX refuses with an assertion."""
  fmt, (m, n, k) = FORMATS[mode], (8, 512, 8192)
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))

  def spec(shape, dtype, *axes):
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  of_w = (None, "tensor") if split_k else ("tensor",)
  args = (
    spec((m, k), jnp.bfloat16, *((None, "tensor") if split_k else ())),
    spec((n, k * fmt.bits // 32), jnp.uint32, *of_w),
    spec((n, k // fmt.group_size), jnp.uint8, *of_w),
  )
  text = jaxqq.explain(*args, mode=mode, device="cuda")
  assert "a kernel that streams w" in text, text
  traced = jax.jit(functools.partial(jaxqq.qqmm, mode=mode)).trace(*args)
  assert "CustomSPMDPartitioning" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize(("m", "k"), [(1, 4096), (3, 4096), (3, 1088), (9, 1088)])
def test_few_rows_as_they_are_are_lowered(mode, m, k):
  """x has fewer rows than are loaded, which JAX 0.12 refused."""
  fmt, spec = FORMATS[mode], jax.ShapeDtypeStruct
  w = spec((264, k * fmt.bits // 32), jnp.uint32), spec((264, k // fmt.group_size), jnp.uint8)
  traced = jax.jit(functools.partial(jaxqq.quantized_matmul, mode=mode)).trace(
    spec((m, k), jnp.bfloat16), *w
  )
  assert "jaxqq_skinny_gemm" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize(
  ("n", "k", "cluster"),
  [(91, 4096, 4), (1024, 8192, 4), (2048, 8192, 3), (4096, 4096, 2), (8192, 8192, 1)],
)
def test_few_rows_of_w_are_shared_by_clusters(mode, n, k, cluster):
  """As many CTAs as SMs can hold at once, each warpgroup with a block."""
  assert plan_of(mode, 1, n, k).tiles.cluster == cluster
  fmt, spec = FORMATS[mode], jax.ShapeDtypeStruct
  args = (
    spec((1, k), jnp.bfloat16),
    spec((n, k * fmt.bits // 32), jnp.uint32),
    spec((n, k // fmt.group_size), jnp.uint8),
  )
  traced = jax.jit(functools.partial(jaxqq.qqmm, mode=mode)).trace(*args)
  assert "jaxqq_skinny_gemm" in traced.lower(lowering_platforms=("cuda",)).as_text()


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("name", CASES | CLUSTER_CASES | STREAM_K_CASES)
  def test_skinny_gemm(self, name):
    check_skinny(compiled, name)

  @pytest.mark.parametrize("mainloop", ROWS_OF_SCALES)
  def test_rows_of_scales_begin_anywhere(self, mainloop):
    check_scales_of_rows(compiled, mainloop, (100, 70 * 64))

  @pytest.mark.parametrize("name", OPERANDS)
  def test_operands(self, name):
    check, *case = OPERANDS[name]
    check(compiled, *case)

  @pytest.mark.parametrize("m", [1, 9, 32])
  @pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
  def test_the_same_bits_twice(self, mode, m):
    n, k = 4096, 4096
    w, x = (jax.random.normal(jax.random.key(i), (size, k)) for i, size in enumerate((n, m)))
    packed = jaxqq.quantize(w, mode=mode)
    f = jax.jit(functools.partial(jaxqq.qqmm, mode=mode))
    assert "jaxqq_skinny_gemm" in f.lower(x.astype(jnp.bfloat16), *packed).as_text()
    first = np.asarray(f(x.astype(jnp.bfloat16), *packed))
    for _ in range(5):
      np.testing.assert_array_equal(np.asarray(f(x.astype(jnp.bfloat16), *packed)), first)
