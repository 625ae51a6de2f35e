"""The kernels on a GPU, through the public functions: `pytest -m gpu`."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from tests.support import bounds, oracle, recipes
from tests.support.operands import Product, operands

pytestmark = pytest.mark.gpu

HIGHEST = jax.lax.Precision.HIGHEST


@pytest.fixture(autouse=True)
def _on_a_gpu():
  assert jax.default_backend() == "gpu", "these tests are for a machine with a GPU"


def assert_within_bounds(out, x, w, mode, *, highest=False, scales=(None, None)):
  """A product of matrices that the oracle quantizes."""
  quantized = [
    bounds.Quantized(*oracle.quantize_codes(a, mode, scale), mode)
    for a, scale in zip((x, w), scales, strict=True)
  ]
  alpha = np.prod([1.0 if scale is None else float(scale) / 2688 for scale in scales])
  fp8 = mode == "mxfp8" and not highest and out.dtype != np.float32
  verdict = bounds.check(out, *quantized, alpha, bounds.Rules(highest=highest, fp8=fp8))
  assert not verdict.wrong, verdict


def check(x, w, mode, *, precision=None, **how):
  args, kwargs, x_hat, w_hat = operands(x, w, Product(mode), **how)
  kwargs["mode"] = mode
  assert jaxqq.explain(*args, **kwargs, precision=precision).plan.name[:3] != "xla"
  out = np.asarray(jax.jit(lambda *a: jaxqq.qqmm(*a, **kwargs, precision=precision))(*args))
  assert out.dtype == x.dtype
  scales = [kwargs.get(f"global_scale_{name}") for name in "xw"]
  assert_within_bounds(out, x, w, mode, highest=precision is HIGHEST, scales=scales)
  return out, oracle.product(x_hat, w_hat)[0]


ODD = list(
  zip(
    (1, 7, 33, 64, 100, 129, 257, 300, 511, 1000),
    (5, 64, 130, 200, 96, 300, 129, 1000, 65, 33),
    (32, 96, 480, 4096, 4128, 64, 8192, 160, 4640, 32 * 131),
    strict=True,
  )
)


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
def test_odd_shapes(mode, shape, packed):
  m, n, k = shape
  rng = np.random.default_rng(m)
  x, w = oracle.random(rng, (m, k), "bfloat16"), oracle.random(rng, (n, k), "bfloat16")
  check(x, w, mode, packed=packed)


def check_dtype(mode, dtype, data, shape, precision, **how):
  """The bounds of section 3: of all elements, and on Gaussian data of the norm."""
  m, n, k = shape
  rng = np.random.default_rng(11)
  # Small, so that float16 holds the sums of outliers.
  x = (data(rng, (m, k), "float32") / 64).astype(oracle.DTYPES[dtype])
  w = (data(rng, (n, k), "float32") / 64).astype(oracle.DTYPES[dtype])
  out, exact = check(x, w, mode, precision=precision, **how)
  if data is oracle.random:
    loose = {"float32": 1e-5, "bfloat16": 3e-3, "float16": 1.5e-3}[dtype]
    norm_bound = 4e-4 if dtype == "float16" and precision is HIGHEST else loose
    assert oracle.relative_error(out, exact) <= norm_bound


@pytest.mark.parametrize("precision", [None, HIGHEST])
@pytest.mark.parametrize("data", [oracle.random, oracle.with_outliers])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("k", [512, 8192])
@pytest.mark.parametrize(
  ("mode", "how"),
  [(mode, how) for mode in oracle.PRODUCT_MODES for how in ("on the fly", "packed")]
  + [("nvfp4", "global"), ("nvfp4", "packed global")],
)
def test_dtypes(mode, how, dtype, k, data, precision):
  how = {"packed": "packed" in how, "global_scale": "global" in how}
  check_dtype(mode, dtype, data, (133, 265, k), precision, **how)


@pytest.mark.parametrize(
  ("mode", "shape"), [("mxfp8", (3100, 384, 4096)), ("nvfp4", (8200, 256, 544))], ids=str
)
@pytest.mark.parametrize("precision", [None, HIGHEST])
def test_thousands_of_rows(mode, shape, precision):
  """mxfp8 from where packed w is expanded a panel at a time, nvfp4 of which it never is."""
  m, n, k = shape
  rng = np.random.default_rng(k)
  x, w = oracle.random(rng, (m, k), "bfloat16"), oracle.random(rng, (n, k), "bfloat16")
  check(x, w, mode, packed=True, precision=precision)


# Few rows of x have kernels of their own, and there are three of packed w: one row, 8, up to 64.
FEW = (1, 3, 16, 40)


@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
@pytest.mark.parametrize("m", range(1, 65))
def test_every_number_of_few_rows(m, mode):
  """Of odd n. An odd multiple of 32 is among the k: it gets the kernel for many rows."""
  k = (4096, 28672, 8192, 32 * 131)[m % 4]
  rng = np.random.default_rng(m)
  x, w = (oracle.with_outliers(rng, (size, k), "bfloat16") for size in (m, 77))
  check(x, w, mode, packed=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("m", FEW)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(
  ("mode", "global_scale"), [("nvfp4", False), ("nvfp4", True), ("mxfp8", False)]
)
def test_dtypes_of_few_rows(mode, global_scale, dtype, m, packed):
  for data, precision in itertools.product((oracle.random, oracle.with_outliers), (None, HIGHEST)):
    check_dtype(
      mode, dtype, data, (m, 265, 8192), precision, packed=packed, global_scale=global_scale
    )


@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
@pytest.mark.parametrize(
  ("x_batch", "w_batch"), [((3,), (3,)), ((2, 3), ()), ((), (4,)), ((2, 1), (1, 3))], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("k", [192, 4096])
def test_batches(mode, x_batch, w_batch, packed, k):
  rng = np.random.default_rng(3)
  x = oracle.random(rng, (*x_batch, 40, k), "bfloat16")
  w = oracle.random(rng, (*w_batch, 72, k), "bfloat16")
  check(x, w, mode, packed=packed)


@pytest.mark.parametrize("m", [*FEW, 70])
@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
def test_bad_numbers_poison_rows_and_columns(mode, m):
  rng = np.random.default_rng(4)
  for k in (128, 4096, 8192):
    x, w = oracle.random(rng, (m, k), "bfloat16"), oracle.random(rng, (91, k), "bfloat16")
    w[7, 9] = -np.inf
    bad = np.zeros((m, 91), bool)
    bad[:, 7] = True
    if m > 1:  # or no row is left
      x[m // 3, 5], x[m - 1, k - 1] = np.nan, np.inf
      bad[[m // 3, m - 1]] = True
    for args in ((w,), jaxqq.quantize(w, mode=mode)):
      out = np.asarray(jaxqq.qqmm(x, *args, mode=mode), np.float32)
      np.testing.assert_array_equal(np.isnan(out), bad)


@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
@pytest.mark.parametrize("sizes", [(64, 96, 160), (4096, 130, 96), (100, 4096, 4096)], ids=str)
def test_gradients(mode, backward, sizes):
  """Both products of the backward pass, in the sizes that choose one kernel or the other."""
  m, n, k = sizes
  rng = np.random.default_rng(5)
  x, w, g = (oracle.random(rng, s, "bfloat16") for s in ((m, k), (n, k), (m, n)))
  _, pull = jax.vjp(lambda x, w: jaxqq.qqmm(x, w, mode=mode, backward=backward), x, w)
  dx, dw = map(np.asarray, pull(jnp.asarray(g)))

  def whole_groups(a):
    return np.pad(a, ((0, 0), (0, -a.shape[1] % oracle.MODES[mode].group)))

  for out, a, b in ((dx, g, w.T), (dw, g.T, x.T)):
    if backward == "quantized":
      assert_within_bounds(out, whole_groups(a), whole_groups(b), mode)
    else:
      exact, mag = oracle.product(a.astype(np.float64), b.astype(np.float64))
      oracle.assert_within_bound(out, exact, mag)


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_quantize_and_dequantize(mode, dtype):
  rng = np.random.default_rng(6)
  for shape, global_scale in itertools.product(
    ((1, 32), (33, 96), (1000, 4128)), (None, 5.0) if mode == "nvfp4" else (None,)
  ):
    a = oracle.random(rng, shape, dtype)
    scale = {} if global_scale is None else {"global_scale": np.float32(global_scale)}
    packed, scales = jaxqq.quantize(a, mode=mode, **scale)
    want = oracle.quantize(a, mode, global_scale)
    np.testing.assert_array_equal(np.asarray(packed), want[0])
    np.testing.assert_array_equal(np.asarray(scales), want[1])
    back = jaxqq.dequantize(packed, scales, mode=mode, dtype=jnp.float32, **scale)
    exact = oracle.round_trip(a, mode, global_scale)
    assert oracle.relative_error(np.asarray(back), exact) <= (0 if global_scale is None else 1e-6)


@pytest.mark.parametrize("how", ["jit", "shard_map", "explicit"])
@pytest.mark.parametrize("case", [*oracle.MODES, "nvfp4 scaled"])
def test_quantize_and_dequantize_on_every_gpu(case, how):
  """Of one process, which may have several: the compiled programs hold the kernels."""
  mode, _, scaled = case.partition(" ")
  kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(kind,))
  a = oracle.random(np.random.default_rng(7), (1024, 4096), "bfloat16")
  scale = (np.float32(5),) if scaled else ()

  def split(f, *specs):
    """For arrays that are split, and a global scale that is not."""
    if how == "shard_map":
      specs = (*specs, *(P() for _ in scale))
      f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("data"))
    return jax.jit(f)

  def run(f, arrays, specs):
    placed = [
      jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)
    ]
    executable = split(f, *specs).lower(*placed, *scale).compile()
    assert "mosaic_gpu" in executable.as_text() and "all-gather" not in executable.as_text()
    return executable(*placed, *scale)

  def quantize(a, *scale, axis=-1):
    return jaxqq.quantize(a, mode=mode, axis=axis, global_scale=scale[0] if scale else None)

  def dequantize(packed, scales, *scale):
    scale = scale[0] if scale else None
    return jaxqq.dequantize(packed, scales, mode=mode, dtype=jnp.float32, global_scale=scale)

  want = oracle.quantize(a, mode, *scale)
  got = run(quantize, [a], [P("data")])
  columns = run(functools.partial(quantize, axis=-2), [a.T], [P(None, "data")])
  for results in (got, columns):
    for result, right in zip(results, want, strict=True):
      np.testing.assert_array_equal(np.asarray(result), right)
  back = run(dequantize, got, [P("data")] * 2)
  exact = oracle.round_trip(a, mode, *scale)
  assert oracle.relative_error(np.asarray(back), exact) <= (1e-6 if scale else 0)


@pytest.mark.parametrize("quantizer", recipes.QUANTIZERS, ids=str)
def test_quantizers_have_the_oracles_bits(quantizer):
  recipes.check_bits(quantizer, jax.random.key(3))
