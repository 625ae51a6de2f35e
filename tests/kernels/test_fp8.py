"""mxfp8 in fp8, in Mosaic GPU's interpreter: what becomes of rows of any range."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from tests.support import bounds, data, fp8, oracle
from tests.support.interpreter import interpreted
from tests.support.programs import count_kernels

pytestmark = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 (Mosaic GPU's warpgroups)"
)

BF16 = np.dtype(jnp.bfloat16)
M, N, K = 70, 72, 256


def in_range(x, w):
  return x, w


def with_zeros(x, w):
  x[3] = w[5] = 0
  x[4, 32:64] = w[-1, :32] = 0
  return x, w


def far_apart_in_x(x, w):
  x[-1, 32:64] *= 2.0**-30
  return x, w


def far_apart_in_w(x, w):
  w[-1, 32:64] *= 2.0**-17
  return x, w


def large_x_small_w(x, w):
  x[0] *= 2.0**110
  return x, w * 2.0**-110


def small_x_large_w(x, w):
  w[N // 2] *= 2.0**110
  return x * 2.0**-110, w


CHANGES = (in_range, with_zeros, far_apart_in_x, far_apart_in_w, large_x_small_w, small_x_large_w)


@functools.cache
def program(packed):
  """Of (x, w) or (x, packed w, scales), all of one size: by the fp8 kernels."""
  x, w = jnp.zeros((M, K), BF16), np.zeros((N, K), BF16)
  args = x, *(oracle.quantize(w, "mxfp8") if packed else (w,))
  assert jaxqq.explain(*args, mode="mxfp8").plan.name == "hopper_fp8"
  return jax.jit(functools.partial(jaxqq.qqmm, mode="mxfp8")).lower(*args).compile()


def product(x, w, packed):
  with interpreted():
    return np.asarray(program(packed)(x, *(oracle.quantize(w, "mxfp8") if packed else (w,))))


def operands_of(change):
  rng = np.random.default_rng(0)
  x, w = change(rng.standard_normal((M, K)), rng.standard_normal((N, K)))
  return x.astype(BF16), w.astype(BF16)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "on the fly"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_every_row_is_taken(change, packed):
  """The interpreter adds up in float32, so that re-basing is all that is lost."""
  x, w = operands_of(change)
  quantized = [bounds.Quantized(*oracle.quantize_codes(a, "mxfp8"), "mxfp8") for a in (x, w)]
  rules = bounds.Rules(fp8=change not in (in_range, with_zeros), fp8_sums=False)
  verdict = bounds.check(product(x, w, packed), *quantized, 1.0, rules)
  assert not verdict.wrong, verdict


@pytest.mark.parametrize(("m", "counts"), [(7, (2, 1)), (100, (3, 2)), (4000, (3, 3))])
def test_no_branch_is_left_to_xla(m, counts):
  """XLA would read a flag on the host, or split its CUDA graph, at each product."""
  x, w = jax.ShapeDtypeStruct((m, 512), BF16), jax.ShapeDtypeStruct((256, 512), BF16)
  packed = jax.ShapeDtypeStruct((256, 128), np.uint32), jax.ShapeDtypeStruct((256, 16), np.uint8)
  for of_w, count in zip(((w,), packed), counts, strict=True):
    traced = jax.jit(functools.partial(jaxqq.qqmm, mode="mxfp8")).trace(x, *of_w)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert count_kernels(text) == count
    assert "stablehlo.case" not in text and "stablehlo.if" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "on the fly"])
@pytest.mark.parametrize("kind", ["normal", "positive", "outliers", "heavy tails"])
@pytest.mark.parametrize("k", [32, 160, 512, 4096])
def test_sums_are_those_of_the_model(k, kind, packed):
  """Bit for bit what `tests/support/fp8.py` says that the hardware computes."""
  rng = np.random.default_rng(k)
  x, w = (data.KINDS[kind](rng, (size, k)).astype(BF16) for size in (100, 72))
  (xc, xs), (wc, ws) = (oracle.quantize_codes(a, "mxfp8") for a in (x, w))
  rows, columns = (a.ravel() for a in np.indices((100, 72)))
  (_, x_codes), (_, w_codes) = fp8.rebased(xc, xs), fp8.rebased(wc, ws)
  chains = fp8.chains(x_codes[rows], w_codes[columns])[0].T.astype(np.float32)
  # Added up in float32, one after the other; two CTAs may share a tile of packed w, half of k each.
  parts = np.split(chains, 2) if packed and k % 256 == 0 else [chains]
  sums = [sum(np.cumsum(part, axis=0)[-1] for part in each) for each in ([chains], parts)]
  exponent = fp8.row_exponent(xs)[rows] + fp8.row_exponent(ws)[columns]
  wants = [np.ldexp(each, exponent).astype(BF16).reshape(100, 72) for each in sums]
  of_w = oracle.quantize(w, "mxfp8") if packed else (w,)
  out = np.asarray(jax.jit(functools.partial(jaxqq.qqmm, mode="mxfp8"))(x, *of_w))
  assert any((out == want).all() for want in wants), (out != wants[0]).mean()
