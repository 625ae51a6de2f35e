"""Packed w expanded a panel at a time: interpreted anywhere, and compiled with `-m gpu`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq import _sharding
from jaxqq._formats import FORMATS
from jaxqq.bench.cases import LLAMA, MODELS
from tests.support import oracle

if jax.__version_info__ < (0, 11):
  pytest.skip("the kernels need JAX 0.11", allow_module_level=True)


from jaxqq._kernels.hopper import staged_gemm
from jaxqq._kernels.hopper.dequant_gemm import Operands
from jaxqq._kernels.hopper.quantize.groups import Window
from jaxqq._kernels.hopper.tiles import STAGED_BLOCK_N, Grid
from jaxqq._kernels.hopper.tiles import WideTiles as T
from jaxqq._kernels.hopper.wide_plan import PANEL_BYTES, STAGED_WAVE, panel_rows
from tests.support.interpreter import interpreted_kernels
from tests.support.kernels import (
  BF16,
  E4M3,
  F16,
  F32,
  FP8_SUMS,
  SMS,
  assert_product,
  dequantized,
  largest_scales,
  mx_operand,
  on_gpu,
  powers,
  rebased,
  rescale_bytes,
)

CASES = {
  # dtype of x, out, m, n, k, rows of a panel, tiles
  "e4m3": (E4M3, BF16, 201, 384, 256, 256, T(128, 3, True)),
  "e4m3, one panel": (E4M3, F16, 65, 128, 384, 128, T(128, 2, True)),
  "e4m3, an odd scale": (E4M3, BF16, 70, 256, 224, 128, T(128, 2, True)),
  "e4m3 exact": (BF16, F32, 67, 256, 128, 128, T(128, 2, store_stages=1)),
  "e4m3 exact, overlapping": (BF16, F16, 70, 640, 64, 256, T(256, 2)),
}


def interpreted(f, *args):
  with interpreted_kernels():
    return np.asarray(jax.jit(f)(*jax.tree.map(jnp.asarray, args)))


def compiled(f, *args):
  return np.asarray(jax.jit(f)(*jax.tree.map(jnp.asarray, args)))


def check(run, name):
  dtype, out_dtype, m, n, k, rows, tiles = CASES[name]
  rng = np.random.default_rng([m, n, k])
  x = rng.standard_normal((1, m, k)).astype(dtype)
  factors = rng.uniform(0.1, 0.3, (2, 1)).astype(F32)
  row_scales = None, None
  codes, scales = mx_operand(rng, 1, n, k, 107, 127)
  w_hat = dequantized("mxfp8", codes, scales)
  x_hat = x.astype(np.float64)
  if dtype is E4M3:
    largest = largest_scales(scales)
    row_scales = powers(rng.integers(120, 130, (1, m))), powers(largest)
    scales = rescale_bytes(scales, largest)
    x_hat, w_hat = x_hat * row_scales[0][..., None], rebased(codes, scales)
    w_hat = w_hat * row_scales[1][..., None]
    if scales.shape[2] % 2:  # as the launch that finds them has it
      scales = np.pad(scales, ((0, 0), (0, 0), (0, 1)), constant_values=0xFF)
  else:
    x_hat, w_hat = x_hat * factors[0], w_hat * factors[1]
  grid = Grid(1, m, n, tiles.block_m, tiles.block_n, SMS)

  def f(*args):
    fmt = FORMATS["mxfp8"]
    return staged_gemm.staged_gemm(Operands(*args), fmt, out_dtype, tiles, grid, rows)

  out = run(f, x, oracle.pack(codes, "mxfp8"), scales, *factors, *row_scales)
  assert out.shape == (1, m, n)
  fp8_sums = run is compiled and dtype is E4M3
  assert_product(out, x_hat, w_hat, out_dtype, of_mag=FP8_SUMS if fp8_sums else 1.0)


@pytest.mark.parametrize("name", CASES)
def test_staged_gemm(name):
  check(interpreted, name)


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in CASES])
def test_staged_gemm_on_a_gpu(name):
  check(compiled, name)


@pytest.mark.parametrize(
  ("mode", "m", "is_staged"), [("mxfp8", 3072, True), ("nvfp4", 16384, False)]
)
def test_many_rows_are_staged(mode, m, is_staged):
  """mxfp8, from so many rows on; else the kernel that expands in registers multiplies."""
  fmt = FORMATS[mode]
  n, k = 8192, 8192
  w = jax.ShapeDtypeStruct((n, k // fmt.codes_per_word), np.uint32)
  scales = jax.ShapeDtypeStruct((n, k // fmt.group_size), np.uint8)
  f = jax.jit(functools.partial(jaxqq.qqmm, mode=mode))
  for rows, panel in ((m, is_staged), (m - 1, False)):
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
    text = f.trace(x, w, scales).lower(lowering_platforms=("cuda",)).as_text()
    assert ("jaxqq_gemm" in text, "jaxqq_dequant_gemm" in text) == (panel, not panel)


def check_every_distance(run):
  codes = np.tile(np.arange(256, dtype=np.uint8), (20, 1))
  rescale = np.repeat(rescale_bytes(-np.arange(20)[:, None], np.zeros(20, int)), 8, axis=1)
  windows = np.array([0, 20], np.int32)

  def f(words, rescale, bounds):
    return staged_gemm.rebased_panel(words, rescale, Window(bounds, 20))

  out = run(f, oracle.pack(codes, "mxfp8"), rescale, windows)
  np.testing.assert_array_equal(out.astype(np.float64), rebased(codes, rescale))


def test_every_code_is_rebased_by_every_distance():
  check_every_distance(interpreted)


@pytest.mark.parametrize("check", [pytest.param(check_every_distance, marks=on_gpu)])
def test_every_code_is_rebased_on_a_gpu(check):
  check(compiled)


def waves(grid, rows):
  return -(-grid.n // rows) * -(-dataclasses.replace(grid, n=rows).num_tiles // grid.num_sms)


@pytest.mark.parametrize(("n", "k"), [*MODELS, *LLAMA])
@pytest.mark.parametrize("m", [3072, 4096, 8192])
@pytest.mark.parametrize("function", [jaxqq.qqmm, jaxqq.quantized_matmul])
def test_panels_are_whole_tiles_that_fit(n, k, m, function):
  """And leave few SMs idle: in 16 panels of half a wave each a product takes twice the time."""
  x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
  w = jax.ShapeDtypeStruct((n, k // 4), np.uint32), jax.ShapeDtypeStruct((n, k // 32), np.uint8)
  plan = jaxqq.explain(function, x, *w, mode="mxfp8", device="cuda").plan.kernel
  if plan.kernel != "staged_gemm":
    assert n % STAGED_BLOCK_N or (function, k) == (jaxqq.quantized_matmul, 28672)
    return
  rows, itemsize = plan.panel_rows, 1 if plan.fp8 else 2
  assert rows % STAGED_BLOCK_N == 0 and STAGED_BLOCK_N <= rows <= n
  assert rows * k * itemsize <= 2 * PANEL_BYTES
  assert STAGED_WAVE * waves(plan.grid, rows) <= waves(plan.grid, n)


def test_panels_of_some_products():
  def rows_of(m, n, row_bytes):
    return panel_rows(Grid(1, m, n, 256, STAGED_BLOCK_N, num_sms=132), row_bytes)

  assert rows_of(4096, 8192, 8192) == 4096  # half of it stays in the cache
  assert rows_of(4096, 5120, 25600) == 1024  # not 1280, of 160 tiles: of two waves, one full
  assert rows_of(4096, 8192, 2 * 28672) == 1024  # not 512, of 64 tiles
  assert rows_of(4096, 1024, 1 << 21) == STAGED_BLOCK_N  # not even one fits


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("split", [("tensor", None), (None, "tensor")], ids=["n", "k"])
@pytest.mark.parametrize(
  ("m", "packed", "kernel"),
  [
    (1, True, "jaxqq_skinny_gemm"),
    (8, False, "jaxqq_skinny_gemm"),
    (1024, True, "jaxqq_dequant_gemm"),
    (8192, True, {"mxfp8": "jaxqq_gemm", "nvfp4": "jaxqq_dequant_gemm"}),  # mxfp8 in panels
  ],
)
def test_what_the_partitioner_gets(mode, split, m, packed, kernel, monkeypatch):
  """XLA asks for a device's part when it compiles, and JAX refuses one with mutable arrays."""
  fmt, (n, k) = FORMATS[mode], (2048, 8192)
  kernel = kernel if isinstance(kernel, str) else kernel[mode]
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
  rules = {}

  class Recorder(_sharding.custom_partitioning):
    def def_partition(self, **callbacks):
      rules.update(callbacks)
      super().def_partition(**callbacks)

  monkeypatch.setattr(_sharding, "custom_partitioning", Recorder)

  def spec(shape, dtype, *axes):
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  of_w = (
    spec((n, k * fmt.bits // 32), jnp.uint32, *split),
    spec((n, k // fmt.group_size), jnp.uint8, *split),
  )
  args = (
    spec((m, k), jnp.bfloat16, None, split[1]),
    *(of_w if packed else (spec((n, k), jnp.bfloat16, *split),)),
  )
  jax.jit(functools.partial(jaxqq.qqmm, mode=mode)).trace(*args).lower(lowering_platforms=("cuda",))
  out = spec((m, n), jnp.bfloat16, None, split[0])
  own, part, _, shardings = rules["partition"](mesh, args, out)
  parts = [
    jax.ShapeDtypeStruct(sharding.shard_shape(a.shape), a.dtype)
    for a, sharding in zip(args, shardings, strict=True)
  ]
  traced = jax.make_jaxpr(part, axis_env=list(own.shape.items()))(*parts)
  assert kernel in str(traced)
  effects = {type(effect).__name__ for effect in traced.effects}
  assert effects <= {"NamedAxisEffect"}
  if split[0]:
    lowered = jax.jit(part).trace(*parts).lower(lowering_platforms=("cuda",))
    assert kernel in lowered.as_text()
