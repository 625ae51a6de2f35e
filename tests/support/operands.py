"""Operands of a product and its gradients: random, packed or not, and what they stand for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import pytest

import jaxqq
from tests.support import oracle

MODES = oracle.PRODUCT_MODES
BACKWARDS = ("straight_through", "quantized")


@dataclasses.dataclass(frozen=True)
class Product:
  """A public product in a mode, called as qqmm is: qqmm itself, or the one that leaves x as it is.

  Global scales and backward are told by qqmm's names, and what the other one has no use for is
  left out.
  """

  mode: str
  quantizes_x: bool = True

  def __call__(self, *args: Any, **how: Any) -> Any:
    if self.quantizes_x:
      return jaxqq.qqmm(*args, mode=self.mode, **how)
    for name in ("global_scale_x", "backward"):
      how.pop(name, None)
    global_scale = how.pop("global_scale_w", None)
    return jaxqq.quantized_matmul(*args, mode=self.mode, global_scale=global_scale, **how)

  @property
  def function(self) -> Any:
    return jaxqq.qqmm if self.quantizes_x else jaxqq.quantized_matmul

  def x_hat(self, x: np.ndarray, global_scale: Any = None) -> np.ndarray:
    """What is multiplied of x, in float64."""
    if not self.quantizes_x:
      return np.asarray(x).astype(np.float64)
    return oracle.round_trip(x, self.mode, global_scale)

  def w_of_dx(self, w: np.ndarray, *, packed: bool = False) -> np.ndarray:
    """What dx is g times, by default: w as it came, or what the product multiplies with."""
    if packed or not self.quantizes_x:
      return oracle.round_trip(w, self.mode)
    return np.asarray(w).astype(np.float64)

  def __str__(self) -> str:
    return self.mode if self.quantizes_x else f"{self.mode} weights"


# The first two with everything, the others each with some of it: `crossed`.
PRODUCTS = tuple(Product(mode) for mode in ("nvfp4", "mxfp8", "mxfp4"))
PRODUCTS += tuple(Product(mode, False) for mode in ("nvfp4", "mxfp4", "mxfp8"))
# Of gradients: of the first two with either backward, and of x as it is.
KINDS = [(product, backward) for product in PRODUCTS[:2] for backward in BACKWARDS]
KINDS += [(product, BACKWARDS[0]) for product in PRODUCTS[3:5]]
EVERY = 7  # odd, so that both of two values are met


def crossed(*values: Iterable[Any], every: int = EVERY) -> list[Any]:
  """(product, *combination): products of the modes with kernels with every combination of values.

  The others each take one of `every`, from places of their own.
  """
  combinations = list(itertools.product(*values))
  out = []
  for i, product in enumerate(PRODUCTS):
    first = max(0, 2 * (i - 2) + 1) % len(combinations)
    for combination in combinations if i < 2 else combinations[first::every]:
      name = "-".join(map(str, (product, *combination)))
      out.append(pytest.param(product, *combination, id=name))
  return out


def data(*shapes, seed=30):
  """Normal float32 numbers, an array for each shape."""
  rng = np.random.default_rng(seed)
  return [oracle.random(rng, shape, "float32") for shape in shapes]


def amax(a):
  """The largest magnitude, as global scales are given."""
  return np.float32(np.max(np.abs(np.asarray(a, np.float32)), initial=0))


def arguments(w, mode, packed):
  """What stands for w among the arguments of qqmm: itself, or its codes and scales."""
  return oracle.quantize(np.asarray(w), mode) if packed else (w,)


def operands(x, w, product, *, packed=False, global_scale=False):
  """The arguments of a `Product` and what they stand for in float64."""
  scales = {"x": amax(x), "w": amax(w)} if global_scale else {"x": None, "w": None}
  w_hat = oracle.round_trip(w, product.mode, scales["w"])
  args = oracle.quantize(w, product.mode, scales["w"]) if packed else (w,)
  kwargs = {f"global_scale_{k}": v for k, v in scales.items() if v is not None}
  return (x, *args), kwargs, product.x_hat(x, scales["x"]), w_hat


def vjp(f, *primals, g):
  """The cotangents of the primals for g of the result, by one program."""

  def cotangents(g, *primals):
    out, pullback = jax.vjp(f, *primals)
    assert out.shape == g.shape
    return pullback(g.astype(out.dtype))

  return [np.asarray(a) for a in jax.jit(cotangents)(g, *primals)]


def quantized_product(a, b, mode, scale_a=None, scale_b=None):
  """qqmm in float64, the last axis zero-padded to whole groups."""
  missing = -a.shape[-1] % oracle.MODES[mode].group

  def hat(c, scale):
    padded = np.pad(c, [(0, 0)] * (c.ndim - 1) + [(0, missing)])
    return oracle.round_trip(padded.astype(np.float32), mode, scale)

  return oracle.product(hat(a, scale_a), hat(b, scale_b))[0]
