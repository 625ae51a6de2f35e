"""Blackwell's row: the program lowered for it, and what the same call computes on a CPU.

No machine here has such a GPU: nothing below has run on one.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq import _compat, _kernels
from jaxqq._formats import FORMATS
from jaxqq._kernels.block_scaled_dot import PRODUCT
from jaxqq._kernels.plan import TURNED_OFF, Device
from jaxqq._reference import Operands
from tests.support import oracle
from tests.support.programs import lowered_for_cuda

BLACKWELL = Device("cuda", "10.0")
DOT = "__op$block_scaled_dot"
MODES = ("nvfp4", "mxfp8")  # that the tensor cores take

runs_on_a_cpu = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="jax.nn.scaled_matmul runs on a CPU from JAX 0.11 on"
)


def product(x, w, mode, *, scales=None, global_scales=(None, None)):
  @jax.jit
  def run(x, w, scales, *global_scales):
    operands = Operands(x, w, scales, *global_scales)
    problem = _kernels.Problem.of(operands, FORMATS[mode], np.dtype(x.dtype), None)
    return _kernels.plan(problem, BLACKWELL, (PRODUCT,)).run(operands)

  return np.asarray(run(x, w, scales, *global_scales))


@runs_on_a_cpu
@pytest.mark.parametrize("form", ["packed", "on the fly"])
@pytest.mark.parametrize("batches", [((), ()), ((3,), ()), ((2, 1), (3,))], ids=str)
@pytest.mark.parametrize(
  ("mode", "scaled", "dtype"),
  [
    ("nvfp4", False, "bfloat16"),
    ("nvfp4", True, "bfloat16"),
    ("nvfp4", True, "float16"),
    ("mxfp8", False, "bfloat16"),
    ("mxfp8", False, "float16"),
  ],
)
def test_product_is_within_its_bound(mode, scaled, dtype, batches, form):
  rng = np.random.default_rng(0)
  x, w = (
    oracle.random(rng, (*batch, size, 96), dtype) * 3
    for batch, size in zip(batches, (5, 7), strict=True)
  )
  x[..., 0, 3] = np.nan
  number_of_x, number_of_w = (
    (np.float32(np.nanmax(np.abs(a.astype(np.float32)))) for a in (x, w)) if scaled else (None,) * 2
  )
  args, scales = w, None
  if form == "packed":
    args, scales = oracle.quantize(w, mode, number_of_w)
  global_scales = tuple(None if a is None else jnp.asarray(a) for a in (number_of_x, number_of_w))
  out = product(jnp.asarray(x), args, mode, scales=scales, global_scales=global_scales)
  x_hat, w_hat = oracle.round_trip(x, mode, number_of_x), oracle.round_trip(w, mode, number_of_w)
  exact, mag = oracle.product(x_hat, w_hat)
  np.testing.assert_array_equal(np.isnan(out), np.isnan(exact))
  oracle.assert_within_bound(out[..., 1:, :], exact[..., 1:, :], mag[..., 1:, :])


def args_of(mode, packed, m=16, n=128, k=256):
  x, w = (jax.ShapeDtypeStruct((size, k), jnp.bfloat16) for size in (m, n))
  if packed:
    return x, *jax.eval_shape(lambda w: jaxqq.quantize(w, mode=mode), w)
  return x, w


@pytest.fixture
def on_blackwell(monkeypatch):
  """Programs are lowered for such a GPU."""
  monkeypatch.setattr(_compat, "cuda_compute_capability", lambda: "10.0")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_program_holds_the_dot_and_no_float_w(mode, packed, on_blackwell):
  text = lowered_for_cuda(lambda x, *w: jaxqq.qqmm(x, *w, mode=mode), *args_of(mode, packed))
  assert text.count(DOT) == 1 and "mosaic_gpu" not in text
  if packed:  # w goes in as its own bits
    assert not re.search(r"tensor<(1x)?128x256x(bf16|f16|f32)>", text)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_quantized_backward_holds_it_too(mode, packed, on_blackwell):
  wrt = (0,) if packed else (0, 1)

  def loss(x, *w):
    return jaxqq.qqmm(x, *w, mode=mode, backward="quantized").astype(jnp.float32).sum()

  text = lowered_for_cuda(jax.value_and_grad(loss, wrt), *args_of(mode, packed, m=64))
  assert text.count(DOT) == 1 + len(wrt) and "mosaic_gpu" not in text


def test_who_gets_it(on_blackwell):
  x, w = args_of("nvfp4", False)
  text = jaxqq.explain(x, w, device="cuda")
  assert text.plan.name == "block_scaled_dot" and "never run on the hardware" in text
  exact = jaxqq.explain(x, w, precision="highest", device="cuda")
  assert exact.plan.name == "xla" and "Not block_scaled_dot: float32 output" in exact
  mxfp4 = jaxqq.explain(x, w, mode="mxfp4", device="cuda")
  assert mxfp4.plan.name == "xla_bfloat16"
  assert "Not block_scaled_dot: the tensor cores get no mxfp4" in mxfp4
  weights = jaxqq.explain(jaxqq.quantized_matmul, x, w, device="cuda")
  assert weights.plan.name == "xla_bfloat16"
  assert "Not block_scaled_dot: x is not quantized, and the tensor cores take two" in weights


def test_who_does_not(monkeypatch):
  x, w = args_of("nvfp4", False)
  for capability in ("8.0", "9.0"):
    monkeypatch.setattr(_compat, "cuda_compute_capability", lambda c=capability: c)
    text = jaxqq.explain(x, w, device="cuda", precision="highest")
    assert text.plan.name != "block_scaled_dot"
    refusal = f"it is for compute capability 10 and 12 (Blackwell), not {capability}"
    assert refusal in text or text.plan.name.startswith("hopper")
  assert "Not block_scaled_dot: it is for cuda, not cpu" in jaxqq.explain(x, w, device="cpu")


@pytest.mark.parametrize("names", ["block_scaled_dot", "block, hopper", " block_scaled_dot,"])
def test_the_environment_turns_rows_off(names, on_blackwell, monkeypatch):
  monkeypatch.setenv(TURNED_OFF, names)
  text = jaxqq.explain(*args_of("nvfp4", False), device="cuda")
  assert text.plan.name == "xla_bfloat16"
  assert "Not block_scaled_dot: the environment variable JAXQQ_DISABLE turns it off." in text


def test_the_last_row_stays(monkeypatch):
  monkeypatch.setenv(TURNED_OFF, "xla, hopper, block")  # "xla" is the last row, and others' start
  assert jaxqq.explain(*args_of("nvfp4", True), device="cuda").plan.name == "xla"
  out = jaxqq.explain(jaxqq.quantize, args_of("nvfp4", False)[1], device="cuda")
  assert "Not hopper_quantize: the environment variable JAXQQ_DISABLE turns it off." in out
