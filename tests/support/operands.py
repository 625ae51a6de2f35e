"""Operands of a product and its gradients: random, packed or not, and what they stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxqq
from tests.support import oracle

MODES = oracle.PRODUCT_MODES
BACKWARDS = ("straight_through", "quantized")
KINDS = [(mode, backward) for mode in MODES for backward in BACKWARDS]


def data(*shapes, seed=30):
  """Normal float32 numbers, an array for each shape."""
  rng = np.random.default_rng(seed)
  return [jnp.asarray(oracle.random(rng, shape, "float32")) for shape in shapes]


def amax(a):
  """The largest magnitude, as global scales are given."""
  return np.float32(np.max(np.abs(np.asarray(a, np.float32)), initial=0))


def arguments(w, mode, packed):
  """What stands for w among the arguments of qqmm: itself, or its codes and scales."""
  return jaxqq.quantize(w, mode=mode) if packed else (w,)


def operands(x, w, mode, *, packed=False, global_scale=False):
  """The arguments of qqmm and what they stand for in float64."""
  scales = {"x": amax(x), "w": amax(w)} if global_scale else {"x": None, "w": None}
  x_hat = oracle.round_trip(x, mode, scales["x"])
  w_hat = oracle.round_trip(w, mode, scales["w"])
  args = oracle.quantize(w, mode, scales["w"]) if packed else (w,)
  kwargs = {f"global_scale_{k}": v for k, v in scales.items() if v is not None}
  return (x, *args), {"mode": mode, **kwargs}, x_hat, w_hat


def vjp(f, *primals, g):
  """The cotangents of the primals for g of the result."""
  out, pullback = jax.vjp(f, *primals)
  assert out.shape == g.shape
  return [np.asarray(a) for a in pullback(jnp.asarray(g, out.dtype))]


def quantized_product(a, b, mode, scale_a=None, scale_b=None):
  """qqmm in float64, the last axis zero-padded to whole groups."""
  missing = -a.shape[-1] % oracle.MODES[mode].group

  def hat(c, scale):
    padded = np.pad(c, [(0, 0)] * (c.ndim - 1) + [(0, missing)])
    return oracle.round_trip(padded.astype(np.float32), mode, scale)

  return oracle.product(hat(a, scale_a), hat(b, scale_b))[0]
