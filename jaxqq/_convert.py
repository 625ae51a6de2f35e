"""`quantize` and `dequantize`: checks of what the caller gave, then a kernel or the definition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxqq import _compat
from jaxqq._checks import (
  FLOATS,
  as_array,
  check_dtype,
  check_format,
  check_global_scale,
  check_groups,
  check_packed,
  describe,
  names,
)
from jaxqq._formats import FORMATS
from jaxqq._quantize import dequantize_groups, pack, quantize_groups, scale_bytes, unpack


def quantize(
  w: ArrayLike,
  group_size: int | None = None,
  bits: int | None = None,
  mode: str = "nvfp4",
  *,
  global_scale: ArrayLike | None = None,
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
    global_scale: nvfp4 only, a float32 scalar: the amax of the tensor, 0 for zeros only. Under
      0, a group with a number of 2**-126 or more becomes NaN, as under what is no amax.
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
  fmt = check_format("quantize", mode, group_size, bits)
  w = as_array("quantize", "w", w)
  check_dtype("quantize", "w", w, FLOATS)
  if axis not in (-1, -2):
    raise ValueError(f"quantize: axis must be -1 or -2, counted from the last, got {axis!r}.")
  if axis == -2 and np.ndim(w) < 2:
    raise ValueError(
      f"quantize: w has no axis -2 to quantize along, got {describe(w)}; leave axis out."
    )
  check_groups("quantize", "w", w, fmt, axis)
  global_scale = check_global_scale("quantize", "global_scale", global_scale, fmt)
  return _quantize(jnp.asarray(w), global_scale, mode=mode, transpose=axis == -2)


def dequantize(
  w: ArrayLike,
  scales: ArrayLike,
  group_size: int | None = None,
  bits: int | None = None,
  mode: str = "nvfp4",
  *,
  global_scale: ArrayLike | None = None,
  dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
  """Turns packed codes and scales back into numbers.

  out = code * scale, or code * (scale * (global_scale / 2688)) with a global scale, in float32
  and then rounded to dtype. Under the NaN scale a whole group is NaN.

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
  fmt = check_format("dequantize", mode, group_size, bits)
  w, scales = check_packed("dequantize", w, scales, fmt)
  global_scale = check_global_scale("dequantize", "global_scale", global_scale, fmt)
  try:
    out_dtype = np.dtype(dtype)
  except TypeError:
    out_dtype = None
  if out_dtype not in FLOATS:
    raise TypeError(f"dequantize: dtype must be {names(FLOATS)}, got {dtype!r}.")
  return _dequantize(jnp.asarray(w), jnp.asarray(scales), global_scale, mode=mode, dtype=out_dtype)


@functools.partial(jax.jit, static_argnames=("mode", "transpose"))
def _quantize(w: jax.Array, global_scale: jax.Array | None, *, mode: str, transpose: bool) -> Any:
  fmt = FORMATS[mode]

  def by_xla(w: jax.Array, *global_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    if transpose:
      w = jnp.swapaxes(w, -1, -2)
    codes, scales = quantize_groups(w, fmt, *global_scale)
    return pack(codes, fmt), scales.astype(jnp.uint8)

  def by_kernel(w: jax.Array, *global_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    from jaxqq._kernels import quantize as kernels
    from jaxqq._kernels import transposed

    one = global_scale[0] if global_scale else None
    if transpose and w.ndim == 2:
      return transposed.quantize_transpose(w, fmt, one)
    if transpose:
      w = jnp.swapaxes(w, -1, -2)
    packed, scales = kernels.quantize(w.reshape(-1, w.shape[-1]), fmt, one)
    return packed.reshape(*w.shape[:-1], -1), scales.reshape(*w.shape[:-1], -1)

  # The results are integers: nothing is lost by not differentiating.
  scalars = () if global_scale is None else (lax.stop_gradient(global_scale),)
  return _on_hopper(by_kernel, by_xla, (lax.stop_gradient(w),), scalars)


@functools.partial(jax.jit, static_argnames=("mode", "dtype"))
def _dequantize(
  w: jax.Array, scales: jax.Array, global_scale: jax.Array | None, *, mode: str, dtype: Any
) -> jax.Array:
  fmt = FORMATS[mode]

  def by_xla(w: jax.Array, scales: jax.Array) -> jax.Array:
    values = dequantize_groups(unpack(w, fmt), scale_bytes(scales), fmt, global_scale)
    return values.astype(dtype)

  def by_kernel(w: jax.Array, scales: jax.Array) -> jax.Array:
    from jaxqq._kernels import quantize as kernels

    two_axes = (w.reshape(-1, w.shape[-1]), scales.reshape(-1, scales.shape[-1]))
    out = kernels.dequantize(*two_axes, fmt, None, dtype)
    return out.reshape(*w.shape[:-1], -1)

  if global_scale is not None:  # which may be differentiated
    return by_xla(w, scales)
  return _on_hopper(by_kernel, by_xla, (w, lax.bitcast_convert_type(scales, jnp.uint8)))


def _on_hopper(
  by_kernel: Callable[..., Any],
  by_xla: Callable[..., Any],
  arrays: tuple[jax.Array, ...],
  scalars: tuple[jax.Array, ...] = (),
) -> Any:
  """Runs a kernel where there is one Hopper GPU, and XLA's operations anywhere else.

  XLA splits its own operations over several GPUs, and would gather what a kernel reads. Under
  `shard_map` and with sizes not known yet they are taken too.
  """
  sizes = [size for a in arrays for size in a.shape]
  varying = any(jax.typeof(a).manual_axis_type.varying for a in arrays)
  if not _compat.runs_on_one_hopper() or varying:
    return by_xla(*arrays, *scalars)
  if not all(isinstance(size, int) and size for size in sizes):
    return by_xla(*arrays, *scalars)

  @jax.custom_batching.custom_vmap
  def kernel(*args: jax.Array) -> Any:
    return by_kernel(*args)

  @kernel.def_vmap
  def _batch(size: int, batched: list[bool], *args: jax.Array) -> Any:
    if any(batched[len(arrays) :]):  # a scalar for each: the kernel has one for all
      in_axes = tuple(0 if is_batched else None for is_batched in batched)
      out = jax.vmap(by_xla, in_axes)(*args)
      return out, jax.tree.map(lambda _: True, out)
    whole = (
      a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
      for a, is_batched in zip(args[: len(arrays)], batched, strict=False)
    )
    out = kernel(*whole, *args[len(arrays) :])
    return out, jax.tree.map(lambda _: True, out)

  return lax.platform_dependent(*arrays, *scalars, cuda=kernel, default=by_xla)
