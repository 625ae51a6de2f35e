"""The product by XLA on matrix units, of GPUs without kernels and of TPUs: run here on a CPU."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq import _compat, _kernels
from jaxqq._formats import FORMATS
from jaxqq._kernels.plan import Device
from jaxqq._reference import Operands
from tests.support import oracle
from tests.support.programs import lowered_for_cuda

DEVICES = {"A100": Device("cuda", "8.0"), "TPU": Device("tpu")}


def product(device, x, w, scales, *global_scales, mode, quantize_input=True):
  operands = Operands(x, w, scales, *global_scales)
  how = {"precision": None, "quantize_input": quantize_input}
  problem = _kernels.Problem.of(operands, FORMATS[mode], np.dtype(x.dtype), **how)
  plan = _kernels.plan(problem, device)
  assert plan.name == "xla_bfloat16"
  return plan.run(operands)


ROWS = [
  (5, ((), ())),
  (5, ((2, 1), (3,))),
  (1, ((), ())),
  (1, ((2,), (2,))),
  (70, ((), ())),
]
QUANTIZED = [  # mode, global scales, dtype
  ("nvfp4", False, "bfloat16"),
  ("nvfp4", True, "float16"),
  ("mxfp8", False, "bfloat16"),
  ("mxfp8", False, "float16"),
]


def cases():
  """Every combination; of mxfp4, and of x as it is, every number of rows in one of the ways."""
  yield from (
    (*k, True, *rows, p, d) for k in QUANTIZED for rows in ROWS for p in (0, 1) for d in DEVICES
  )
  for kind in (
    ("mxfp4", False, "bfloat16", True),
    ("mxfp4", False, "bfloat16", False),
    ("nvfp4", True, "float16", False),
    ("nvfp4", False, "bfloat16", False),
  ):
    yield from ((*kind, *rows, i % 2, "TPU" if i == 4 else "A100") for i, rows in enumerate(ROWS))


CASES = list(cases())


def operands(kind, rows, batches, packed):
  """The arguments of `product`, and what is multiplied in float64."""
  mode, scaled, dtype, quantize_input = kind
  rng = np.random.default_rng(0)
  x, w = (
    oracle.random(rng, (*batch, size, 512), dtype) * 3
    for batch, size in zip(batches, (rows, 7), strict=True)
  )
  x[..., 0, 3] = (np.inf if quantize_input else np.nan) if rows > 1 else 0
  numbers = [
    np.float32(np.abs(a[np.isfinite(a)].astype(np.float32)).max()) if scaled else None
    for a in (x, w)
  ]
  words, scales = oracle.quantize(w, mode, numbers[1]) if packed else (w, None)
  if not quantize_input:
    numbers[0] = None
  hats = [oracle.round_trip(a, mode, n) for a, n in zip((x, w), numbers, strict=True)]
  if not quantize_input:
    hats[0] = x.astype(np.float64)
  return (x, words, scales, *numbers), hats


@functools.cache
def products(kind):
  """{the rest of a case: (the result, what was multiplied)} of all of a kind, by one program."""
  mode, _, _, quantize_input = kind
  rests = [case[4:] for case in CASES if case[:4] == kind]
  args, hats = zip(*(operands(kind, *rest[:-1]) for rest in rests), strict=True)

  @jax.jit
  def run(args):
    how = {"mode": mode, "quantize_input": quantize_input}
    pairs = zip(rests, args, strict=True)
    return [product(DEVICES[rest[-1]], *own, **how) for rest, own in pairs]

  outs = map(np.asarray, run(args))
  return dict(zip(rests, zip(outs, hats, strict=True), strict=True))


@pytest.mark.parametrize(
  ("mode", "scaled", "dtype", "quantize_input", "rows", "batches", "packed", "device"),
  CASES,
  ids=str,
)
def test_product_is_within_its_bound(
  mode, scaled, dtype, quantize_input, rows, batches, packed, device
):
  kind = mode, scaled, dtype, quantize_input
  out, hats = products(kind)[rows, batches, packed, device]
  exact, mag = oracle.product(*hats)
  np.testing.assert_array_equal(np.isnan(out), np.isnan(exact))
  first = int(rows > 1)
  oracle.assert_within_bound(out[..., first:, :], exact[..., first:, :], mag[..., first:, :])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
def test_the_program_multiplies_bfloat16(mode, packed, monkeypatch):
  monkeypatch.setattr(_compat, "cuda_compute_capability", lambda: "8.0")
  x, w = (jax.ShapeDtypeStruct((size, 256), jnp.bfloat16) for size in (16, 128))
  args = (w,) if not packed else jax.eval_shape(lambda w: jaxqq.quantize(w, mode=mode), w)
  text = lowered_for_cuda(lambda x, *w: jaxqq.qqmm(x, *w, mode=mode), x, *args)
  (dot,) = re.findall(r"stablehlo\.dot_general.*", text)
  assert dot.endswith("(tensor<16x256xbf16>, tensor<256x128xbf16>) -> tensor<16x128xf32>")
  assert "mosaic_gpu" not in text
  x = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)  # sums of many rows are not written as float32
  text = lowered_for_cuda(lambda x, *w: jaxqq.qqmm(x, *w, mode=mode), x, *args)
  (dot,) = re.findall(r"stablehlo\.dot_general.*", text)
  assert dot.endswith("-> tensor<128x128xbf16>")
  x = jax.ShapeDtypeStruct((1, 256), jnp.bfloat16)  # and w_hat of one row not at all
  text = lowered_for_cuda(lambda x, *w: jaxqq.qqmm(x, *w, mode=mode), x, *args)
  assert "stablehlo.dot_general" not in text


@pytest.mark.parametrize(
  ("mode", "x_dtype", "dtype"),
  [
    ("nvfp4", "bfloat16", "bf16"),
    ("nvfp4", "float16", "f16"),
    ("mxfp4", "bfloat16", "bf16"),
    ("mxfp4", "float16", "f32"),
    ("mxfp8", "float32", "f32"),
  ],
)
def test_x_as_it_is_is_multiplied_in_its_own_dtype(mode, x_dtype, dtype, monkeypatch):
  """Where that holds w_hat exactly, too; else both are float32."""
  monkeypatch.setattr(_compat, "cuda_compute_capability", lambda: "8.0")
  x, w = jax.ShapeDtypeStruct((16, 256), x_dtype), jax.ShapeDtypeStruct((128, 256), "bfloat16")
  packed = jax.eval_shape(lambda w: jaxqq.quantize(w, mode=mode), w)
  function = functools.partial(jaxqq.quantized_matmul, mode=mode)
  (dot,) = re.findall(r"stablehlo\.dot_general.*", lowered_for_cuda(function, x, *packed))
  assert dot.endswith(f"(tensor<16x256x{dtype}>, tensor<256x128x{dtype}>) -> tensor<16x128xf32>")
  text = jaxqq.explain(jaxqq.quantized_matmul, x, *packed, mode=mode, device="cuda")
  refused = {"float16": "x is float16 and not quantized", "float32": "float32 output"}
  reason = f"Not xla_bfloat16: {refused.get(x_dtype)}"
  assert (reason in text) if dtype == "f32" else ("Not xla_bfloat16" not in text)
  assert text.startswith(f"quantized_matmul {mode}, x {x_dtype} (16, 256), w uint32")
  assert "Not block_scaled_dot: " in text and "computed by XLA" in text


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)])
@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
def test_no_rows(mode, shape):
  x, w = np.zeros(shape, "float16"), np.zeros((7, 64), "float16")
  run = jax.jit(lambda x, w: product(DEVICES["A100"], x, w, None, mode=mode))
  assert run(x, w).shape == (*shape[:-1], 7)


@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
def test_xla_simplifies_to_an_end(mode, backward, capfd):
  """XLA says on stderr where its algebraic simplifier goes round in circles, and gives up."""
  x, w = (jax.ShapeDtypeStruct((size, 64), jnp.bfloat16) for size in (8, 64))

  def sum_of_product(x, w):
    return jaxqq.qqmm(x, w, mode=mode, backward=backward).astype(jnp.float32).sum()

  jax.jit(jax.grad(sum_of_product, argnums=(0, 1))).lower(x, w).compile()
  jax.jit(lambda w: sum_of_product(jnp.ones(x.shape, x.dtype), w)).lower(w).compile()
  assert "circular" not in capfd.readouterr().err


@pytest.mark.parametrize("how", [{"precision": "highest"}, {"preferred_element_type": "float32"}])
def test_exact_sums_are_of_float32(how, monkeypatch):
  monkeypatch.setattr(_compat, "cuda_compute_capability", lambda: "8.0")
  x = jax.ShapeDtypeStruct((16, 256), jnp.bfloat16)
  text = jaxqq.explain(x, x, device="cuda", **how)
  assert text.plan.name == "xla" and "Not xla_bfloat16: float32 output, or precision" in text
  assert jaxqq.explain(x, x, device="cuda").plan.name == "xla_bfloat16"
  assert jaxqq.explain(x, x, device="cpu").plan.name == "xla"
