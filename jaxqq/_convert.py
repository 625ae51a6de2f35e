"""`quantize` and `dequantize`: checks of what the caller gave, then the primitives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxqq import _convert_primitive
from jaxqq._checks import (
  FLOATS,
  as_array,
  check_dtype,
  check_format,
  check_global_scale,
  check_groups,
  check_has_global_scale,
  check_packed,
  describe,
)
from jaxqq._checks import names as names_of
from jaxqq._formats import Format, Mode
from jaxqq._global_scales import amax_of_each_matrix
from jaxqq._reference import TRANSPOSED
from jaxqq._sharding import vary_alike


def quantize(
  w: ArrayLike,
  group_size: int | None = None,
  bits: int | None = None,
  mode: Mode = "nvfp4",
  *,
  global_scale: ArrayLike | Literal["amax"] | None = None,
  axis: int = -1,
) -> tuple[jax.Array, jax.Array]:
  """Quantizes an array in groups along its last axis, or of its transpose along the one before.

  Every group of `group_size` neighbours gets one scale s, and every element a the code
  nearest to a / s, ties to even, saturating. nvfp4, with enc = 2688 / global_scale (1
  without one): s = e4m3(amax / 6 * enc), code = e2m1(a * (enc / s)). mxfp8 and mxfp4: s is
  amax / 448 or amax / 6 rounded up to a power of two, code = element(a / s). All arithmetic
  is float32. A group that holds a NaN or an infinity gets the NaN scale.

  Args:
    w: float32, float16 or bfloat16, (..., K), K a multiple of the group size.
    group_size: the mode's own, or None.
    bits: the mode's own, or None.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    global_scale: nvfp4 only, a number, taken as float32: the amax of the tensor (compressed-tensors
      has a reciprocal under this name), 0 for zeros only. Under 0, a group with a number of 2**-126
      or more becomes NaN, as under what is no amax. "amax" takes it from w; `dequantize` and `qqmm`
      then need the same number, which `quantize_weight` keeps beside the results. None, as in MLX,
      is no global scale: numbers far below 2**-9 are lost.
    axis: -1, or -2 for w of (..., K, N): the results are those of its transpose (..., N, K),
      which a Hopper GPU never writes (with one matrix w).

  Returns:
    packed: uint32, (..., K * bits / 32); the first code in the lowest bits.
    scales: uint8, (..., K / group_size); bytes of float8_e4m3fn or float8_e8m0fnu.

  Raises:
    TypeError: w or global_scale has a dtype that it may not have.
    ValueError: mode, group_size, bits, axis or a shape is not as above.

  Example:
    >>> packed, scales = jaxqq.quantize(jnp.ones((4, 64)), mode="mxfp8")
    >>> packed.shape, scales.shape
    ((4, 16), (4, 2))
    >>> packed, scales = jaxqq.quantize(jnp.ones((64, 4)), mode="mxfp8", axis=-2)
    >>> packed.shape, scales.shape
    ((4, 16), (4, 2))

  Source: `mlx.core.quantize`, whose bits these are; OCP Microscaling Formats v1.0.
  """
  arrays, names, mode = checked_quantize("quantize", w, group_size, bits, mode, global_scale, axis)
  arrays = _ready(arrays)
  is_vector = arrays[0].ndim == 1
  if is_vector:
    arrays[0] = arrays[0][None, :]
  packed, scales = _convert_primitive.quantize(arrays, names, mode)
  return (packed.squeeze(-2), scales.squeeze(-2)) if is_vector else (packed, scales)


def dequantize(
  w: ArrayLike,
  scales: ArrayLike,
  group_size: int | None = None,
  bits: int | None = None,
  mode: Mode = "nvfp4",
  *,
  global_scale: ArrayLike | None = None,
  dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
  """Turns packed codes and scales back into numbers.

  out = code * scale, or code * (scale * (global_scale / 2688)) with a global scale, in float32
  and then rounded to dtype. Under the NaN scale a whole group is NaN. Its gradient
  is zero, the global scale's too.

  Args:
    w: uint32, (..., K * bits / 32), as `quantize` packs.
    scales: (..., K / group_size), uint8 or the same bytes as float8_e4m3fn (nvfp4) or
      float8_e8m0fnu (mxfp8, mxfp4).
    group_size: the mode's own, or None.
    bits: the mode's own, or None.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    global_scale: nvfp4 only, a float32 scalar: the one that `quantize` was given.
    dtype: float32, float16 or bfloat16.

  Returns:
    dtype, (..., K).

  Raises:
    TypeError: w, scales, global_scale or dtype is of a type that it may not be.
    ValueError: mode, group_size, bits or a shape is not as above.

  Example:
    >>> packed, scales = jaxqq.quantize(jnp.full((1, 16), 3.0))
    >>> float(jaxqq.dequantize(packed, scales)[0, 0])
    3.0

  Source: `mlx.core.dequantize`.
  """
  arrays, names, mode, out_dtype = checked_dequantize(
    "dequantize", w, scales, group_size, bits, mode, global_scale, dtype
  )
  arrays = _ready(arrays)
  if arrays[1].dtype != jnp.uint8:
    arrays[1] = lax.bitcast_convert_type(arrays[1], jnp.uint8)
  is_vector = arrays[0].ndim == 1
  if is_vector:
    arrays[:2] = (a[None, :] for a in arrays[:2])
  out = _convert_primitive.dequantize(arrays, names, mode, out_dtype)
  return out.squeeze(-2) if is_vector else out


def _ready(arrays: Sequence[Any]) -> list[jax.Array]:
  return vary_alike([jnp.asarray(a) for a in arrays])


def checked_quantize(
  function: str,
  w: Any,
  group_size: Any,
  bits: Any,
  mode: Any,
  global_scale: Any,
  axis: Any,
) -> tuple[list[Any], tuple[str, ...], Mode]:
  """Arrays, their names and the mode, or the error that the caller of `quantize` should see."""
  fmt = check_format(function, mode, group_size, bits)
  w = as_array(function, "w", w)
  check_dtype(function, "w", w, FLOATS)
  if not isinstance(axis, (int, np.integer)) or axis not in (-1, -2):
    raise ValueError(f"{function}: axis must be -1 or -2, counted from the last, got {axis!r}.")
  axis = int(axis)
  if axis == -2 and len(w.shape) < 2:
    raise ValueError(
      f"{function}: w has no axis -2 to quantize along, got {describe(w)}; leave axis out."
    )
  check_groups(function, "w", w, fmt, axis)
  global_scale = _global_scale_of(function, w, global_scale, fmt)
  name = "w" + TRANSPOSED if axis == -2 else "w"
  return *_with(global_scale, [w], (name,)), fmt.mode


def _global_scale_of(function: str, w: Any, value: Any, fmt: Format) -> Any:
  """As `check_global_scale`; "amax" is that of w."""
  name = "global_scale"
  if not isinstance(value, str):
    return check_global_scale(function, name, value, fmt)
  if value != "amax":
    raise ValueError(f"{function}: unknown {name} {value!r}; it must be 'amax', a number or None.")
  check_has_global_scale(function, name, fmt)
  if isinstance(w, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct((), np.float32)
  return amax_of_each_matrix(jnp.asarray(w), 0)


def checked_dequantize(
  function: str,
  w: Any,
  scales: Any,
  group_size: Any,
  bits: Any,
  mode: Any,
  global_scale: Any,
  dtype: Any,
) -> tuple[list[Any], tuple[str, ...], Mode, np.dtype]:
  """Arrays, their names, mode and dtype, or the error that `dequantize`'s caller should see."""
  fmt = check_format(function, mode, group_size, bits)
  w, scales = check_packed(function, w, scales, fmt)
  global_scale = check_global_scale(function, "global_scale", global_scale, fmt)
  try:
    out_dtype = np.dtype(dtype)
  except TypeError:
    out_dtype = None
  if out_dtype not in FLOATS:
    raise TypeError(f"{function}: dtype must be {names_of(FLOATS)}, got {dtype!r}.")
  return *_with(global_scale, [w, scales], ("w", "scales")), fmt.mode, out_dtype


def _with(
  global_scale: Any, arrays: list[Any], names: tuple[str, ...]
) -> tuple[list[Any], tuple[str, ...]]:
  if global_scale is None:
    return arrays, names
  return [*arrays, global_scale], (*names, "global_scale")
