"""mxfp8 in fp8, in Mosaic GPU's interpreter: when the exact operands take its place."""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.test_kernels_quantize import stage_in_slices

pytestmark = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 (Mosaic GPU's warpgroups)"
)

BF16 = np.dtype(jnp.bfloat16)
M, N, K = 40, 72, 256
OTHER = 7.0  # what stands for the product of exact operands


def tame(x, w):
  return x, w


def with_zeros(x, w):
  x[3] = w[5] = 0
  x[4, 32:64] = w[-1, :32] = 0
  return x, w


def far_apart_in_x(x, w):
  x[-1, 32:64] *= 2.0**-30
  return x, w


def far_apart_in_w(x, w):
  w[-1, 32:64] *= 2.0**-30
  return x, w


def beyond_in_x(x, w):
  x[0] *= 2.0**90
  return x, w * 2.0**-10


def beyond_in_w(x, w):
  w[N // 2] *= 2.0**-90
  return x, w


TAME, WILD = (tame, with_zeros), (far_apart_in_x, far_apart_in_w, beyond_in_x, beyond_in_w)


@pytest.fixture
def fp8(monkeypatch):
  """hopper.fp8 of x and w, which is packed or not."""
  from jaxqq._kernels import amax, hopper, matmul, operands, packed_matmul
  from jaxqq._reference import Operands

  interpret = plgpu.InterpretGPUParams()
  for module, name in ((matmul, "matmul"), (packed_matmul, "packed_matmul")):
    f = functools.partial(getattr(module, name), interpret=interpret)
    monkeypatch.setattr(module, name, f)
  monkeypatch.setattr(operands, "thread_amax_bits", amax.thread_amax_bits_twin)
  monkeypatch.setattr(operands, "_stage", stage_in_slices)

  def run(x, w, packed):
    scales = None
    if packed:
      w, scales = oracle.quantize(w, "mxfp8")
    f = functools.partial(hopper.fp8, mode="mxfp8", out_dtype=BF16)
    with plgpu.force_gpu_interpret_mode(interpret):
      return np.asarray(jax.jit(lambda *args: f(Operands(*args)))(x, w, scales))

  return run


def operands_of(change):
  rng = np.random.default_rng(0)
  x, w = change(rng.standard_normal((M, K)), rng.standard_normal((N, K)))
  return x.astype(BF16), w.astype(BF16)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "on the fly"])
@pytest.mark.parametrize("change", [*TAME, *WILD], ids=lambda f: f.__name__)
def test_which_rows_fp8_cannot_take(change, packed, fp8, monkeypatch):
  from jaxqq._kernels import hopper

  def instead(operands, mode, out_dtype, promote):
    return jnp.full((operands.m, operands.n), OTHER, out_dtype)

  monkeypatch.setattr(hopper, "exact", instead)
  x, w = operands_of(change)
  out = fp8(x, w, packed)
  assert (out == OTHER).all() == (change in WILD)
  if change in TAME:  # k is too small for fp8's rounding to stay within the bound on every element
    exact, mag = oracle.product(*(oracle.round_trip(a, "mxfp8") for a in (x, w)))
    assert (np.abs(out - exact) <= 2.0**-8 * np.abs(exact) + 2.0**-9 * mag).all()


@pytest.mark.parametrize("change", [far_apart_in_w, beyond_in_x], ids=lambda f: f.__name__)
def test_the_exact_product_comes_instead(change, fp8):
  x, w = operands_of(change)
  hats = (oracle.round_trip(a, "mxfp8") for a in (x, w))
  oracle.assert_within_bound(fp8(x, w, True), *oracle.product(*hats), highest=True)
