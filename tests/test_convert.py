"""quantize and dequantize as a Hopper GPU would run them, as far as a CPU can tell: the program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from tests import oracle

pytestmark = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 (Mosaic GPU's warpgroups)"
)

W = jax.ShapeDtypeStruct((3, 40, 96), jnp.bfloat16)
SCALE = jax.ShapeDtypeStruct((), jnp.float32)
BATCH_OF_SCALES = jax.ShapeDtypeStruct((3,), jnp.float32)


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch):
  jax.clear_caches()
  monkeypatch.setattr("jaxqq._compat.runs_on_one_hopper", lambda: True)
  yield
  jax.clear_caches()


def program(f, *args):
  return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def quantize_and_back(w, global_scale=None, *, mode="nvfp4"):
  packed, scales = jaxqq.quantize(w, mode=mode, global_scale=global_scale)
  return jaxqq.dequantize(packed, scales, mode=mode)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_kernels_are_in_the_program(mode):
  assert program(lambda w: quantize_and_back(w, mode=mode), W).count("mosaic_gpu") >= 2


@pytest.mark.parametrize("mode", oracle.MODES)
def test_no_transpose_is_written(mode):
  text = program(lambda w: jaxqq.quantize(w, mode=mode, axis=-2), W.update(shape=(96, 130)))
  assert "mosaic_gpu" in text and "stablehlo.transpose" not in text
  several = program(lambda w: jaxqq.quantize(w, mode=mode, axis=-2), W.update(shape=(2, 96, 130)))
  assert "mosaic_gpu" in several


def test_with_64_bit_types():
  with jax.enable_x64(True):
    for mode in oracle.MODES:
      assert "mosaic_gpu" in program(lambda w, mode=mode: quantize_and_back(w, mode=mode), W)


def test_vmap():
  assert program(jax.vmap(quantize_and_back), W).count("mosaic_gpu") >= 2
  assert "mosaic_gpu" in program(jax.vmap(quantize_and_back, (0, None)), W, SCALE)
  # A global scale for each matrix: quantize has no kernel for that, dequantize needs none here.
  program(jax.vmap(quantize_and_back), W, BATCH_OF_SCALES)


def test_grad_goes_around_the_kernels():
  """The gradient of what is quantized is zero, also where its own amax is the global scale."""

  def f(w):
    scale = jnp.max(jnp.abs(w)).astype(jnp.float32)
    packed, scales = jaxqq.quantize(w, global_scale=scale)
    back = jaxqq.dequantize(packed, scales, global_scale=scale)
    return jnp.sum(back.astype(jnp.float32)) + jnp.sum(w.astype(jnp.float32))

  assert "mosaic_gpu" in program(jax.value_and_grad(f), W)


def test_other_platforms_get_xla():
  """The same program on the CPU that runs the tests."""
  w = oracle.random(np.random.default_rng(1), (5, 64), "float32")
  packed, scales = jaxqq.quantize(w)
  want = oracle.quantize(w, "nvfp4")
  np.testing.assert_array_equal(packed, want[0])
  np.testing.assert_array_equal(scales, want[1])


def test_sizes_that_are_not_known():
  (b,) = jax.export.symbolic_shape("b")
  x, w = jax.ShapeDtypeStruct((b, 64), jnp.bfloat16), jax.ShapeDtypeStruct((32, 64), jnp.bfloat16)
  for f, args in ((jaxqq.qqmm, (x, w)), (quantize_and_back, (x,))):
    exported = jax.export.export(jax.jit(f), platforms=("cuda",))(*args)
    assert "mosaic_gpu" not in exported.mlir_module()
