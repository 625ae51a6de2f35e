"""A `QuantizedWeight` of an array."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxqq._checks import (
  FLOATS,
  as_array,
  check_dtype,
  check_format,
  check_groups,
  check_has_global_scale,
  describe,
)
from jaxqq._convert import quantize
from jaxqq._formats import Mode
from jaxqq._global_scales import (
  DEFAULT_OF_WEIGHT,
  amax_of_each_matrix,
  is_default,
  scale_of_each_matrix,
)
from jaxqq._weight import QuantizedWeight


def quantize_weight(
  w: ArrayLike,
  mode: Mode = "nvfp4",
  *,
  global_scale: Literal["amax"] | ArrayLike | None = DEFAULT_OF_WEIGHT,
  axis: Literal[-1, -2] = -1,
  quantize_input: bool = True,
) -> QuantizedWeight:
  """Quantizes a weight along its last axis, the one that `qqmm` sums over, or of its transpose.

  Args:
    w: float32, float16 or bfloat16, (..., N, K), K a multiple of the group size. Leading axes are
      stacked matrices.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    global_scale: nvfp4 only. "amax", there the default, takes the largest magnitude of each matrix;
      a number, or one for each matrix, is taken as it is, in float32; None is no global scale, so
      that numbers far below 2**-9 are lost.
    axis: -1, or -2 for w of (..., K, N), as kernels of Flax are: the weight is that of its
      transpose, (..., N, K).
    quantize_input: whether products that are not told quantize x too, as of `QuantizedWeight`.

  Returns:
    The packed weight, which knows w's shape and dtype.

  Raises:
    TypeError: w or global_scale is of a type that it may not be.
    ValueError: mode, axis or a shape is not as above, or a global scale is given in another mode.

  Example:
    >>> w = jax.random.normal(jax.random.key(0), (32, 64))
    >>> weight = jaxqq.quantize_weight(w)
    >>> weight
    QuantizedWeight(nvfp4, float32 (32, 64), with global_scale)
    >>> w.nbytes, weight.nbytes
    (8192, 1156)

  Source: `mlx.core.quantize`, whose bits these are.
  """
  function = "quantize_weight"
  fmt = check_format(function, mode, None, None)
  checked = as_array(function, "w", w)
  check_dtype(function, "w", checked, FLOATS)
  if len(checked.shape) < 2:
    raise ValueError(
      f"{function}: w must have at least two dimensions, (N, K) or (..., N, K), got "
      f"{describe(checked)}."
    )
  if not isinstance(axis, (int, np.integer)) or axis not in (-1, -2):
    raise ValueError(f"{function}: axis must be -1 or -2, got {axis!r}.")
  check_groups(function, "w", checked, fmt, axis)
  matrices = jnp.asarray(checked)
  batch_shape = matrices.shape[:-2]
  if is_default(global_scale) and not fmt.has_global_scale:
    global_scale = None
  if isinstance(global_scale, str):
    if global_scale != "amax":
      raise ValueError(
        f"{function}: unknown global_scale {global_scale!r}; it must be 'amax', float32 or None."
      )
    check_has_global_scale(function, "global_scale", fmt)
    global_scale = amax_of_each_matrix(matrices, len(batch_shape))
  scale = scale_of_each_matrix(
    function, "global_scale", global_scale, fmt=fmt, batch_shape=batch_shape
  )

  def one(w: jax.Array, global_scale: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    return quantize(w, mode=fmt.mode, global_scale=global_scale, axis=axis)

  of_each = one
  for _ in range(0 if scale is None else len(batch_shape)):
    of_each = jax.vmap(of_each)
  packed, scales = of_each(matrices, scale)
  return QuantizedWeight(
    packed, scales, fmt.mode, scale, matrices.dtype, quantize_input=quantize_input
  )
