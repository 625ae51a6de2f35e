"""`quantized_matmul`: x as it is, times a quantized w. And `weight @ x`, by either product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxqq._checks import as_array
from jaxqq._formats import Mode
from jaxqq._given import DEFAULT_MODE, Given
from jaxqq._out_sharding import OutSharding
from jaxqq._qqmm import checked, placed_product, product, qqmm
from jaxqq._weight import MATMUL, STACKED_LAYER, QuantizedWeight, StackedLayer


def quantized_matmul(
  x: ArrayLike,
  w: ArrayLike | QuantizedWeight | StackedLayer,
  scales: ArrayLike | None = None,
  group_size: int | None = None,
  bits: int | None = None,
  mode: Mode = DEFAULT_MODE,
  global_scale: ArrayLike | Literal["amax"] | None = None,
  *,
  precision: lax.PrecisionLike = None,
  preferred_element_type: DTypeLike | None = None,
  out_sharding: OutSharding = None,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies x, as it is, by a block-quantized w: what a model with weights alone quantized does.

  out[..., n] = sum_k x[..., k] * w_hat[n, k], where w_hat = dequantize(quantize(w)), and the sum is
  in float32. No bit of x is lost, and w_hat is exact in 16 bits. It is the primitive of `qqmm` with
  quantize_input=False, and composes with jit, grad, vmap, scan, remat and shard_map.

  The gradients are dx = g w_hat, which is exact, since the product is linear in x, and of an
  unquantized w dw = g^T x, straight-through. A packed w receives none. Global scales have gradient
  zero. Forward mode is the tangent of the same two terms.

  Args:
    x: float32, float16 or bfloat16, (..., K) or (K,); K a multiple of the group size of w.
    w: (N, K), float32, float16 or bfloat16, not necessarily x's: quantized on the fly, and
      receives gradients. Or uint32, (N, K * bits / 32), as `quantize` packs it. Leading batch
      axes, (..., N, K) against x of (..., M, K), broadcast as in `jnp.matmul`. Or a
      `QuantizedWeight`, which brings scales, mode and global_scale; its quantize_input and
      input_global_scale are for products that are not told. Or, against all of x, a matrix of a
      stack of them, stack.layer(i).
    scales: for packed w only, (..., N, K / group_size), uint8 or the same bytes as
      float8_e4m3fn (nvfp4) or float8_e8m0fnu (mxfp8, mxfp4).
    group_size: the mode's own, or None.
    bits: the mode's own, or None.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    global_scale: nvfp4 only, a scalar, taken as float32: the amax of w (compressed-tensors has a
      reciprocal under this name); "amax" of unquantized w only. Of a w with batch axes it may be
      one for each matrix. A w packed with a global scale must be multiplied with it; without it the
      result is off by a factor.
    precision: `jax.lax.Precision.HIGHEST`, or "highest", asks for float32 sums within 2^-18 of
      |x| |w_hat|^T where 2^-12 is promised to 16 bit results (jaxqq/EXACTNESS.md).
    preferred_element_type: float32, float16 or bfloat16: the dtype of the result. None is x's.
    out_sharding: where the result goes, as for `qqmm`.
    implementation: what computes it, as for `qqmm`.

  Returns:
    x.shape[:-1] + (N,), batch axes broadcast.

  Raises:
    TypeError: an argument has a dtype, or is of a type, that it may not be.
    ValueError: mode, group_size, bits or a shape is not as above; scales without packed w or packed
      w without scales; what a `QuantizedWeight` brings, given once more. Or, as the program is
      lowered: `implementation` cannot compute it on that platform.

  Example:
    >>> x, w = jnp.full((8, 64), 3.1), jnp.full((4, 64), 3.0)
    >>> packed, scales = jaxqq.quantize(w)
    >>> round(float(jaxqq.quantized_matmul(x, packed, scales)[0, 0]), 3)  # 64 * 3.1 * 3
    595.2
    >>> weight = jaxqq.quantize_weight(w, "mxfp4")
    >>> jaxqq.quantized_matmul(x, weight).shape
    (8, 4)

  Source: `mlx.core.quantized_matmul` with transpose=True. It has no global scale, takes packed w
  only, and its biases, its transpose=False and its mode "affine" are not here.
  """
  function = "quantized_matmul"
  given = Given(
    x,
    w,
    scales,
    group_size=group_size,
    bits=bits,
    mode=mode,
    global_scale_w=global_scale,
    precision=precision,
    preferred_element_type=preferred_element_type,
    out_sharding=out_sharding,
    implementation=implementation,
    quantize_input=False,
  )
  if isinstance(w, StackedLayer):
    return STACKED_LAYER["product"](function, given)
  return placed_product(function, *checked(function, given), out_sharding, product)


def _matmul(w: QuantizedWeight, x: Any) -> jax.Array:
  """w @ x, (..., N, K) times (K,) or (..., K, M), as layers of Equinox multiply."""
  x = as_array("QuantizedWeight.__matmul__", "x", x)
  multiply: Callable[..., jax.Array] = qqmm if w.quantize_input else quantized_matmul
  if len(x.shape) < 2:
    return multiply(x, w)
  return jnp.swapaxes(multiply(jnp.swapaxes(jnp.asarray(x), -1, -2), w), -1, -2)


MATMUL["product"] = _matmul
