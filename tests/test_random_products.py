"""Products drawn from a seed, each element by its bound: `-m gpu` compiled, elsewhere by XLA.

JAXQQ_SEED and JAXQQ_PRODUCTS choose which and how many; JAXQQ_GRADIENTS and JAXQQ_RAGGED how many
programs of those.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import pytest

import jaxqq
from jaxqq._kernels.hopper.costs import DEQUANT_E2M1, DEQUANT_E4M3
from jaxqq._kernels.hopper.tiles import cdiv
from tests.support import gradients, products, ragged_products
from tests.support.cases import DRAWS, Case, Program

pytestmark = pytest.mark.optimized

SEED = int(os.environ.get("JAXQQ_SEED", "0"))
PRODUCTS = int(os.environ.get("JAXQQ_PRODUCTS", "2000"))
GRADIENTS = int(os.environ.get("JAXQQ_GRADIENTS", "40"))
RAGGED = int(os.environ.get("JAXQQ_RAGGED", "40"))
GPU_CHUNK = 5  # seeds a test


def seeds(first, count, chunk):
  return [range(first + i, first + min(i + chunk, count)) for i in range(0, count, chunk)]


def assert_right(seeds, *, small=False, run_seed=products.run_seed):
  results = [r for seed in seeds for r in run_seed(seed, small=small)]
  failed = [f"{r['wrong']}\n  {r['case']}\n  {r['again']}" for r in results if r["wrong"]]
  assert not failed, "\n".join(failed)
  assert len(results) == len(seeds) * DRAWS


def assert_case_is_right(case):
  result = products.run(case)
  assert not result["wrong"], f"{result['wrong']}\n{result}"


@pytest.mark.gpu
def test_thousands_on_a_gpu(tmp_path, capfd):
  """In several processes, since most of the time is compiling."""
  assert jax.default_backend() == "gpu"
  assert_workers_find_nothing(tmp_path, capfd, PRODUCTS, min(12, os.cpu_count() or 1))


def test_workers_share_the_products(tmp_path, capfd):
  assert_workers_find_nothing(tmp_path, capfd, 5, 2, "--small")


def assert_workers_find_nothing(tmp_path, capfd, count, workers, *how):
  out = tmp_path / "found.jsonl"
  args = ["--seed", SEED, "--products", count, "--workers", workers, "--out", out, *how]
  failed = products.main(list(map(str, args)))
  told = capfd.readouterr().out
  assert not failed and f"{count} products, 0 failures" in told, told


@pytest.mark.parametrize("seeds", seeds(SEED, 20, 5), ids=str)
def test_by_xla(seeds):
  assert_right(seeds, small=True)


@pytest.mark.gpu
@pytest.mark.parametrize("seeds", seeds(SEED, RAGGED, GPU_CHUNK), ids=str)
def test_rows_in_groups_on_a_gpu(seeds):
  assert_right(seeds, run_seed=ragged_products.run_seed)


@pytest.mark.parametrize("seeds", seeds(SEED, 10, 10), ids=str)
def test_rows_in_groups_by_xla(seeds):
  assert_right(seeds, small=True, run_seed=ragged_products.run_seed)


def assert_gradients_are_right(seeds):
  found = dict(zip(seeds, gradients.run(list(map(gradients.gradient_of, seeds))), strict=True))
  failed = [f"{wrong}\n  {gradients.again(seed)}" for seed, wrong in found.items() if wrong]
  assert not failed, "\n".join(failed)


@pytest.mark.gpu
@pytest.mark.parametrize("seeds", seeds(SEED, GRADIENTS, GPU_CHUNK), ids=str)
def test_gradients_on_a_gpu(seeds):
  assert_gradients_are_right(seeds)


@pytest.mark.parametrize("seeds", seeds(SEED, 16, 8), ids=str)
def test_gradients_by_xla(seeds):
  assert_gradients_are_right(seeds)


# Every kernel where its loops are short; jaxqq/_kernels/README.md lists what only a GPU runs.

# A step is 64 or 128 of k, a tile up to 256 rows and, of packed w, up to 256 columns.
STEPS = {"one step": 64, "a step of fp8": 128, "two steps": 256, "a last part": 320}
TILES = {"a part": (70, 40), "one": (256, 128), "a last part": (300, 200)}
MANY_ROWS = [
  Program(mode, m, n, k, dtype, "float32", packed=packed, highest=highest)
  for mode in ("nvfp4", "mxfp8")
  for packed in (False, True)
  for dtype, highest in (("bfloat16", False), ("float16", True), ("float32", False))
  for m, n in TILES.values()
  for k in STEPS.values()
]
# Chunks of 256 and 512, which go round two or four warpgroups, and clusters.
FEW_ROWS = [
  Program(mode, m, n, k, dtype, packed=packed, highest=dtype == "float16")
  for mode in ("nvfp4", "mxfp8")
  for packed in (False, True)
  for dtype in ("bfloat16", "float16")
  for m, n in ((1, 64), (5, 200), (17, 64), (64, 70))
  for k in (512, 1024, 8192)
] + [Program("nvfp4", m, 200, 4096, packed=True) for m in (2, 3, 4)]
# Packed w expanded a panel at a time, tiles that CTAs share, tiles of three or four warpgroups;
# transposes are the gradients'.
PANELS = [
  Program("mxfp8", 3100, n, k, packed=True, highest=highest)
  for n, k in ((128, 128), (256, 320), (128, 64), (256, 96), (128, 224))
  for highest in (False, True)
]
SHARED = [
  Program(mode, m, n, 4096, packed=True, highest=highest)
  for mode in ("nvfp4", "mxfp8")
  for highest in (False, True)
  for m, n in ((96, 128), (96, 1024), (200, 1024), (256, 4096), (65, 2056), (128, 3080))
] + [Program("nvfp4", 192, 3072, 3072, packed=True), Program("mxfp8", 96, 2048, 6144, packed=True)]
LARGE_TILES = (
  [
    Program(mode, m, n, k, dtype, packed=True, highest=highest)
    for mode in ("nvfp4", "mxfp8")
    for dtype, highest in (("bfloat16", False), ("float16", True), ("float32", False))
    for m, n, k in ((96, 28680, 256), (190, 16872, 320), (250, 16872, 320))
  ]
  + [
    Program(mode, m, n, k, packed=True)
    for mode in ("nvfp4", "mxfp8")
    for m, n, k in (
      *((128, 12296, 320), (128, 20000, 256), (64, 33000, 512)),
      *((100, 2056, 2048), (96, 20000, 256), (96, 4096, 1024), (190, 25000, 320)),
    )
  ]
  + [  # few rows, whose steps have several parts
    Program("nvfp4", m, n, k, packed=True)
    for m, n, k in (
      *((12, 20000, 320), (12, 28680, 2048), (30, 20000, 2048), (20, 28680, 2048)),
      (30, 16384, 4096),
      *((48, 20000, 512), (96, 20000, 1024), (200, 1024, 3072), (96, 2048, 7168)),
    )
  ]
  + [  # with stream-K, one of them after whole waves
    Program(mode, m, n, k, packed=True)
    for mode, m, n, k in (
      *(("mxfp8", 128, 5120, 8192), ("mxfp8", 192, 5120, 8192), ("nvfp4", 192, 5120, 8192)),
      *(("nvfp4", 128, 4096, 12288), ("nvfp4", 256, 34816, 2560), ("nvfp4", 96, 36864, 2560)),
    )
  ]
  + [  # with stream-K, since float32 results have no clusters
    Program("nvfp4", 100, 1280, 2816, "float32", packed=True),
    Program("mxfp8", 64, 1280, 2688, "float32", packed=True),
  ]
)
# K that is no whole number of blocks: zeros past its end, with few rows.
LAST_BLOCKS = [
  Program(mode, m, n, k, packed=packed)
  for mode in ("nvfp4", "mxfp8")
  for packed in (False, True)
  for m, n, k in ((1, 200, 2880), (8, 64, 1440), (40, 70, 1312), (64, 136, 672))
]
# Rows of scales that are 8, 4, 2 bytes and one byte after a multiple of 16, with many rows.
SCALES_APART = [
  Program(mode, m, n, k, dtype, packed=True, quantize_input=quantized)
  for mode, k, quantized in (
    *(("nvfp4", 2944, True), ("nvfp4", 2880, True), ("nvfp4", 2080, True)),
    *(("nvfp4", 2880, False), ("mxfp4", 640, True), ("mxfp4", 2656, False)),
    *(("mxfp8", 2880, True), ("mxfp8", 2688, True), ("mxfp8", 2656, True), ("mxfp8", 2656, False)),
  )
  for m, n, dtype in (
    (100, 2056, "bfloat16"),
    (96, 1280, "float32" if quantized else "bfloat16"),
    (300, 72, "bfloat16"),
  )
]
# Few rows, whose scales a tile loads at once. Some CTAs have more tiles than slots, and some tiles
# as few steps as there are warpgroups.
WHOLE_SCALES = [
  Program(mode, m, n, k, packed=True, quantize_input=quantized)
  for mode, m, n, k, quantized in (
    *(("nvfp4", 7, 43520, 1168, True), ("nvfp4", 3, 8704, 2336, True)),
    *(("nvfp4", 5, 34816, 1168, False), ("mxfp8", 9, 8704, 2880, True)),
    *(("mxfp8", 4, 34816, 1568, True), ("mxfp8", 12, 8704, 2080, False)),
    *(("mxfp4", 20, 34816, 1568, True), ("nvfp4", 2, 43520, 1200, True)),
  )
]
# Few rows: CTAs of a cluster with parts of k, not of one size; those that share but a last tile.
PARTS_OF_K = [
  Program(mode, m, n, k, packed=True, quantize_input=quantized)
  for mode, m, n, k, quantized in (
    *(("nvfp4", 4, 2048, 7168, True), ("nvfp4", 12, 2000, 5376, True)),
    *(("nvfp4", 7, 1024, 7168, False), ("nvfp4", 1, 576, 9216, True)),
    *(("mxfp8", 8, 2048, 7680, True), ("mxfp8", 16, 1000, 6912, True)),
    *(("mxfp8", 3, 576, 9216, False), ("mxfp4", 30, 2050, 3584, True)),
  )
]
LAST_SHARED = [
  Program(mode, m, n, k, dtype, packed=True, quantize_input=quantized)
  for mode, m, n, k, dtype, quantized in (
    *(("nvfp4", 1, 10240, 4608, "bfloat16", True), ("nvfp4", 3, 12280, 4096, "float16", True)),
    *(("nvfp4", 8, 9000, 4608, "bfloat16", True), ("nvfp4", 16, 20480, 4608, "bfloat16", False)),
    *(("mxfp8", 1, 12288, 4608, "bfloat16", True), ("mxfp8", 8, 18000, 4096, "float16", True)),
    *(("mxfp8", 20, 10250, 4096, "bfloat16", True), ("mxfp4", 6, 9000, 4096, "bfloat16", False)),
  )
]
# Few rows: blocks of a long k dealt out to all CTAs.
STREAMED = [
  Program(mode, m, n, k, dtype, packed=True, quantize_input=quantized)
  for mode, m, n, k, dtype, quantized in (
    *(("nvfp4", 7, 5100, 16384, "bfloat16", True), ("nvfp4", 12, 4800, 15360, "float16", False)),
    *(("mxfp8", 20, 5050, 16384, "bfloat16", True), ("mxfp4", 6, 4500, 16384, "bfloat16", True)),
  )
]
# Few rows: of a CTA's only tile, quantized in the kernel.
QUANTIZED_IN_KERNEL = [
  Program(mode, m, n, k, dtype, packed=True)
  for mode, m, n, k, dtype in (
    *(("nvfp4", 8, 4096, 4096, "bfloat16"), ("nvfp4", 5, 8440, 2048, "float16")),
    *(("nvfp4", 6, 1000, 512, "float32"), ("mxfp8", 16, 4000, 4096, "bfloat16")),
    *(("mxfp8", 11, 7168, 1536, "float16"), ("mxfp8", 13, 600, 6144, "bfloat16")),
  )
]
KINDS = (
  ("normal", "groups within reach"),
  ("outliers", "heavy tails"),
  ("positive", "positive outliers"),
  ("groups far apart", "groups far apart"),
)
EVERY = (
  MANY_ROWS
  + FEW_ROWS
  + PANELS
  + SHARED
  + LARGE_TILES
  + LAST_BLOCKS
  + SCALES_APART
  + WHOLE_SCALES
  + PARTS_OF_K
  + LAST_SHARED
  + STREAMED
  + QUANTIZED_IN_KERNEL
)


@pytest.mark.gpu
@pytest.mark.parametrize("program", EVERY, ids=str)
def test_every_kernel_on_a_gpu(program):
  for i, (x, w) in enumerate(KINDS[: 2 if program in MANY_ROWS else None]):
    assert_case_is_right(Case(program, x, w, seed=i))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels need JAX 0.11")
def test_every_kernel_is_among_them():
  """With each of its ways."""
  plans = [explained(program).plan for program in EVERY]
  kernels = [plan.kernel for plan in plans]
  names = {plan.name for plan in plans}
  assert names == {"hopper_skinny", "hopper_fp8", "hopper_exact"}
  wide, skinny = (
    [kernel for kernel in kernels if (kernel.kernel == "skinny_gemm") == is_skinny]
    for is_skinny in (False, True)
  )
  assert {kernel.kernel for kernel in wide} == {"gemm", "dequant_gemm", "staged_gemm"}
  assert {kernel.tiles.promote for kernel in kernels} == {True, False}
  for name, table in (("hopper_fp8", DEQUANT_E4M3), ("hopper_exact", DEQUANT_E2M1)):
    own = [plan.kernel for plan in plans if plan.name == name]
    tiles = {(k.tiles.block_m, k.tiles.block_n) for k in own if k.kernel == "dequant_gemm"}
    assert tiles >= {(timed.block_m, timed.block_n) for timed in table}, name
  for name, clusters in (
    ("hopper_fp8", {1, 2, 3, 4, 6, 8}),
    ("hopper_exact", {1, 2, 3, 4, 6, 8}),
    ("hopper_skinny", {1, 2, 3, 4, 6, 8}),
  ):
    assert {plan.kernel.tiles.cluster for plan in plans if plan.name == name} == clusters, name
  streams = {
    (k.mainloop, k.tiles.block_m, k.tiles.block_n, k.tiles.parts, k.grid.whole_waves)
    for k in wide
    if k.kernel == "dequant_gemm" and k.tiles.stream_k
  }
  assert streams >= {
    *(("rebased_e4m3", 128, 128, 2, 0), ("rebased_e4m3", 192, 128, 1, 0)),
    *(("packed_e2m1", 192, 128, 1, 0), ("packed_e2m1", 128, 128, 2, 0)),
    *(("packed_e2m1", 256, 128, 1, 1), ("packed_e2m1", 96, 256, 2, 0)),
  }
  assert {kernel.tiles.compute_warpgroups for kernel in skinny} == {2, 4}
  assert {kernel.quantizes_x for kernel in skinny} == {True, False}
  own = [kernel for kernel in skinny if kernel.tiles.cluster > 2]
  uneven = [k for k in own if cdiv(k.problem.k, k.block.k) % k.tiles.cluster]
  assert {kernel.mainloop for kernel in uneven} >= {"blockdiag", "group_sums", "sixteens"}
  shared = [kernel for kernel in skinny if kernel.tiles.shares_last]
  assert {kernel.mainloop for kernel in shared} >= {"blockdiag", "group_sums", "sixteens"}
  assert {kernel.quantizes_x for kernel in shared} == {True, False}
  assert max(kernel.grid.whole_rounds for kernel in shared) > 1
  streamed = [explained(program).plan.kernel for program in STREAMED]
  assert all(kernel.tiles.stream_k for kernel in streamed)
  assert {kernel.mainloop for kernel in streamed} == {"sixteens", "group_sums"}
  in_kernel = [explained(program).plan.kernel for program in QUANTIZED_IN_KERNEL]
  assert all(kernel.quantizes_x for kernel in in_kernel)
  assert {kernel.mainloop for kernel in in_kernel} == {"sixteens", "group_sums"}
  own = [explained(program).plan.kernel for program in WHOLE_SCALES]
  assert all(kernel.tiles.whole_scales for kernel in own)
  steps = [cdiv(kernel.problem.k, kernel.block.k) for kernel in own]
  slots = [kernel.tiles.scale_slots(k_steps) for kernel, k_steps in zip(own, steps, strict=True)]
  of_cta = [cdiv(kernel.grid.num_tiles, kernel.grid.num_workers) for kernel in own]
  assert sum(tiles > of for tiles, of in zip(of_cta, slots, strict=True)) >= 4
  assert min(steps) == 4
  assert len({kernel.mainloop for kernel in skinny}) == 6


@functools.cache
def explained(program):
  """Of a Hopper GPU."""
  m, n, k = program.m, program.n, program.k
  w = [jax.ShapeDtypeStruct((n, k), program.w_dtype)]
  if program.packed:
    w = jax.eval_shape(lambda: jaxqq.quantize(jnp.zeros((n, k)), mode=program.mode))
  x = jax.ShapeDtypeStruct((m, k), program.x_dtype)
  product = jaxqq.qqmm if program.quantize_input else jaxqq.quantized_matmul
  precision = jax.lax.Precision.HIGHEST if program.highest else None
  return jaxqq.explain(product, x, *w, mode=program.mode, precision=precision, device="cuda")


# What was found wrong on a GPU.


def one_step(mode, k, m, n, x_dtype, **how):
  return Case(Program(mode, m, n, k, x_dtype, packed=True, **how))


# Packed w, one step of k, sums promoted (`tensor_cores.add_promoted`): garbage.
ONE_STEP = [
  one_step(mode, k, m, n, x_dtype, highest=x_dtype != "float32")
  for mode, sizes in (("nvfp4", (16, 32, 48, 64)), ("mxfp8", (32, 64, 96, 128)))
  for k in sizes
  for (m, n), x_dtype in zip(
    ((1, 5), (2, 136), (7, 64), (63, 129), (100, 32), (513, 136)),
    ("float32", "bfloat16", "float16") * 2,
    strict=True,
  )
]
ONE_STEP += [
  one_step("mxfp8", 32, 40, 72, "float32", x_batch=(3,), w_batch=(3,)),
  one_step("nvfp4", 16, 40, 72, "bfloat16", highest=True, x_batch=(2, 3)),
]

THREE_BY_ONE = {"x_batch": (3,), "w_batch": (1,)}

# Sums in fp8, so many times 2**-8 |exact| + 2**-12 mag: what the bound has a term for now.
BEYOND = [
  # 6.1
  Case(Program("mxfp8", 128, 333, 4096, "float16"), "heavy tails", "heavy tails"),
  Case(Program("mxfp8", 65, 72, 4608), "outliers", "outliers"),  # 1.15
  Case(Program("mxfp8", 255, 136, 7168, packed=True), "positive", "positive"),  # 1.014
  Case(  # 1.007
    Program("mxfp8", 100, 72, 4096, packed=True, x_batch=(3,), w_batch=(3,)),
    "heavy tails",
    "heavy tails",
  ),
  Case(  # 1.5e-3 as a norm, all of it re-basing: the README names this kind
    Program("mxfp8", 65, 101, 2048, "float16", "float32", x_batch=(2, 3)),
    "large outliers",
    "large outliers",
    x_exponent=-2,
    w_exponent=2,
    seed=(63043, 3, 1),
  ),
  Case(  # 2.8e-3 as a norm, of one row of x, all of it re-basing
    Program("mxfp8", 1, 712, 288, "float16", "float16", packed=True),
    "large outliers",
    "large outliers",
    x_exponent=-3,
    w_exponent=3,
    seed=(632029, 3, 5),
  ),
  Case(  # codes as subnormal bfloat16 are off by half of one, and the result by its rounding too
    Program("mxfp8", 491, 824, 128, w_dtype="float32", highest=True),
    "groups apart",
    "groups apart",
    x_exponent=99,
    w_exponent=-100,
    seed=(233, 3, 2),
  ),
  Case(  # 1.57: tensor cores align the products of subnormal numbers as those of 2**-126
    Program("mxfp8", 8, 784, 512, "float32", highest=True, x_batch=(2, 3)),
    "groups far apart",
    "groups far apart",
    x_exponent=96,
    w_exponent=-100,
    bad=("x",),
    seed=(143093, 3, 4),
  ),
  Case(  # 2.1 and 1.76: the same, beside an x that is not quantized
    Program("mxfp8", 16, 14, 2048, w_dtype="float32", **THREE_BY_ONE, quantize_input=False),
    "groups far apart",
    "groups apart",
    x_exponent=95,
    w_exponent=-100,
    seed=(630045, 3, 1),
  ),
  Case(
    Program(
      "mxfp8", 51, 815, 288, w_dtype="float32", packed=True, **THREE_BY_ONE, quantize_input=False
    ),
    "rows apart",
    "groups far apart",
    x_exponent=60,
    w_exponent=-64,
    bad=("w",),
    seed=(630049, 3, 4),
  ),
]

# A cluster's CTAs without rows stored zeros over the first one's: some elements, sometimes.
CLUSTERS = [
  Case(Program("mxfp8", m, n, k, x_dtype, packed=True, highest=True), seed=(m, n, k))
  for m, n, k, x_dtype in (
    (2, 263, 4096, "float16"),
    (4, 8, 7168, "bfloat16"),
    (1, 1024, 1024, "bfloat16"),
    (8, 129, 8192, "float16"),
    (3, 520, 2048, "bfloat16"),
    (8, 64, 4096, "float32"),
  )
]

# Threads load the scales of rows that are no multiple of 16 bytes apart.
SCALES_BY_THREADS = [
  Case(Program(mode, m, n, k, packed=True, quantize_input=quantize_input), seed=(m, n, k))
  for mode in ("nvfp4", "mxfp8", "mxfp4")
  for quantize_input in (True, False)
  for m, n, k in ((1, 2880, 2880), (5, 263, 1120), (17, 64, 2912), (30, 100, 1056))
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ONE_STEP + BEYOND + CLUSTERS + SCALES_BY_THREADS, ids=repr)
def test_found_on_a_gpu(case):
  assert_case_is_right(case)


@pytest.mark.parametrize("case", ONE_STEP[::5], ids=repr)
def test_found_on_a_gpu_by_xla(case):
  assert_case_is_right(case)
