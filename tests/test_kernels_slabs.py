"""Products of packed w expanded slab by slab: interpreted anywhere, and compiled with `-m gpu`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq import _sharding
from jaxqq._formats import FORMATS
from tests.support import oracle

if jax.__version_info__ < (0, 11):
  pytest.skip("the kernels need JAX 0.11", allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu

from jaxqq._kernels import matmul as mm
from jaxqq._kernels import slabs
from tests.support.kernels import (
  BF16,
  E4M3,
  F16,
  F32,
  FP8_SUMS,
  assert_product,
  dequantized,
  downs_of,
  e4m3_operand,
  largest_scales,
  lowered,
  on_gpu,
  powers,
)

C = mm.Config
CASES = {
  # dtype of x, out, m, n, k, rows of a slab, config
  "e4m3": (E4M3, BF16, 201, 384, 256, 256, C(128, 128, 3, promote=True)),
  "e4m3, one slab": (E4M3, F16, 65, 128, 384, 128, C(128, 128, 2, promote=True)),
  "e4m3 exact": (BF16, F32, 67, 256, 128, 128, C(128, 128, 2, store_slots=1)),
  "e4m3 exact, overlapping": (BF16, F16, 70, 640, 64, 256, C(256, 128, 2)),
}


def interpreted(f, *args):
  params = plgpu.InterpretGPUParams()
  f = functools.partial(f, interpret=params)
  with plgpu.force_gpu_interpret_mode(params):
    return np.asarray(jax.jit(f)(*jax.tree.map(jnp.asarray, args)))


def compiled(f, *args):
  return np.asarray(jax.jit(f)(*jax.tree.map(jnp.asarray, args)))


def check(run, name, monkeypatch):
  dtype, out_dtype, m, n, k, rows, config = CASES[name]
  monkeypatch.setattr(slabs, "SLAB_BYTES", rows * k * np.dtype(dtype).itemsize)
  assert slabs.slab_rows(n, k, dtype) == rows
  rng = np.random.default_rng([m, n, k])
  x = rng.standard_normal((1, m, k)).astype(dtype)
  factors = rng.uniform(0.1, 0.3, (1, 2)).astype(F32)
  row_scales = None
  codes, scales = e4m3_operand(rng, 1, n, k, 107, 127)
  w_hat = dequantized("mxfp8", codes, scales)
  x_hat = x.astype(np.float64)
  if dtype is E4M3:
    largest = largest_scales(scales)
    row_scales = powers(rng.integers(120, 130, (1, m))), powers(largest)
    scales = downs_of(scales, largest)
    x_hat, w_hat = x_hat * row_scales[0][..., None], lowered(codes, scales)
    w_hat = w_hat * row_scales[1][..., None]
  else:
    x_hat, w_hat = x_hat * factors[:, :1, None], w_hat * factors[:, 1:, None]
  f = functools.partial(
    slabs.slab_matmul, fmt=FORMATS["mxfp8"], out_dtype=np.dtype(out_dtype), config=config
  )
  out = run(f, x, oracle.pack(codes, "mxfp8"), scales, factors, row_scales)
  assert out.shape == (1, m, n)
  fp8_sums = run is compiled and dtype is E4M3
  assert_product(out, x_hat, w_hat, out_dtype, of_mag=FP8_SUMS if fp8_sums else 1.0)


@pytest.mark.parametrize("name", CASES)
def test_slab_matmul(name, monkeypatch):
  monkeypatch.setattr(slabs, "as_codes", slabs.as_codes_twin)
  check(interpreted, name, monkeypatch)


@pytest.mark.parametrize("name", [pytest.param(name, marks=on_gpu) for name in CASES])
def test_slab_matmul_on_a_gpu(name, monkeypatch):
  check(compiled, name, monkeypatch)


@pytest.mark.parametrize(
  ("mode", "m", "by_slabs"), [("mxfp8", 3072, True), ("nvfp4", 16384, False)]
)
def test_many_rows_get_slabs(mode, m, by_slabs):
  """mxfp8, from so many rows on; else the kernel that expands in registers multiplies."""
  fmt = FORMATS[mode]
  n, k = 8192, 8192
  w = jax.ShapeDtypeStruct((n, k // fmt.codes_per_word), np.uint32)
  scales = jax.ShapeDtypeStruct((n, k // fmt.group_size), np.uint8)
  f = jax.jit(functools.partial(jaxqq.qqmm, mode=mode))
  for rows, slab in ((m, by_slabs), (m - 1, False)):
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
    text = f.trace(x, w, scales).lower(lowering_platforms=("cuda",)).as_text()
    assert ("jaxqq_matmul" in text, "jaxqq_packed_matmul" in text) == (slab, not slab)


def check_every_distance(run):
  codes = np.tile(np.arange(256, dtype=np.uint8), (20, 1))
  downs = np.repeat(downs_of(-np.arange(20)[:, None], np.zeros(20, int)), 8, axis=1)
  windows = np.array([0, 20], np.int32)

  def f(words, downs, bounds, **_):
    return slabs.lowered_codes(words, downs, slabs.Window(bounds, 20))

  out = run(f, oracle.pack(codes, "mxfp8"), downs, windows)
  np.testing.assert_array_equal(out.astype(np.float64), lowered(codes, downs))


def test_every_code_is_lowered_by_every_distance(monkeypatch):
  monkeypatch.setattr(slabs, "as_codes", slabs.as_codes_twin)
  check_every_distance(interpreted)


@pytest.mark.parametrize("check", [pytest.param(check_every_distance, marks=on_gpu)])
def test_every_code_is_lowered_on_a_gpu(check):
  check(compiled)


def test_slabs_are_whole_tiles_that_fit():
  for n, k, dtype in ((8192, 8192, E4M3), (8192, 8192, F16), (57344, 8192, F16), (128, 32, F16)):
    rows = slabs.slab_rows(n, k, dtype)
    assert rows % slabs.ROWS == 0 and rows <= n
    assert rows * k * np.dtype(dtype).itemsize <= slabs.SLAB_BYTES
  assert slabs.slab_rows(8192, 8192, E4M3) == 4096
  assert slabs.slab_rows(1024, 1 << 20, F16) == slabs.ROWS


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("split", [("tensor", None), (None, "tensor")], ids=["n", "k"])
@pytest.mark.parametrize(
  ("m", "packed", "kernel"),
  [
    (1, True, "jaxqq_few_rows"),
    (8, False, "jaxqq_few_rows"),
    (1024, True, "jaxqq_packed_matmul"),
    (8192, True, {"mxfp8": "jaxqq_matmul", "nvfp4": "jaxqq_packed_matmul"}),  # mxfp8 in slabs
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
