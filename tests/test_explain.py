"""explain says in words what runs and why; the primitive runs that."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from tests import oracle

X = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
W = jax.ShapeDtypeStruct((16, 64), jnp.float32)


@pytest.mark.parametrize("device", [None, "cpu", "gpu", "cuda", "tpu"])
@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
def test_shapes_and_platforms(mode, device):
  text = jaxqq.explain(X, W, mode=mode, device=device)
  platform = {"gpu": "cuda", None: jax.default_backend()}.get(device, device)
  for word in (mode, "bfloat16 (8, 64)", "float32 (16, 64)", "on the fly", f"on {platform}", "XLA"):
    assert word in text


def test_arrays_and_devices():
  x, w = np.ones((8, 64), np.float32), np.ones((16, 64), np.float32)
  packed, scales = jaxqq.quantize(w)
  for args in ((x, packed, scales), (jnp.asarray(x), packed, scales)):
    for device in (None, jax.devices()[0]):
      text = jaxqq.explain(*args, device=device)
      assert f"packed, on {jax.devices()[0].platform}" in text
  one = np.float32(1)
  assert "XLA" in jaxqq.explain(x, w, global_scale_x=one, global_scale_w=one, backward="quantized")
  with pytest.raises(TypeError, match="explain: device must be"):
    jaxqq.explain(x, w, device=3)


def test_under_jit():
  said = []

  @jax.jit
  def f(x, w):
    said.append(jaxqq.explain(x, w))
    return jaxqq.qqmm(x, w)

  f(np.ones((8, 64), np.float32), np.ones((16, 64), np.float32))
  assert f"on {jax.default_backend()}" in said[0]
