"""`explain`: which implementation a product gets, in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxqq import _compat, _kernels
from jaxqq._formats import FORMATS
from jaxqq._qqmm import DEFAULT_MODE, checked
from jaxqq._split import described

# Platforms as JAX names them; "gpu" is one of the two, whichever is here.
PLATFORMS = ("cpu", "cuda", "gpu", "rocm", "tpu")


def explain(
  x: Any,
  w: Any,
  scales: Any = None,
  group_size: int | None = None,
  bits: int | None = None,
  mode: str = DEFAULT_MODE,
  global_scale_x: Any = None,
  global_scale_w: Any = None,
  *,
  backward: str = "straight_through",
  precision: lax.Precision | None = None,
  device: jax.Device | str | None = None,
) -> str:
  """Says which implementation a call of `qqmm` would run, and why not another.

  Args:
    x, w, scales, group_size, bits, mode, global_scale_x, global_scale_w, backward, precision:
      what `qqmm` takes, with the same checks; a `jax.ShapeDtypeStruct` serves for an array.
      Where they are split over devices, what one device computes is told.
    device: a `jax.Device`, or a platform as JAX names it ("cpu", "cuda", "rocm", "tpu"). None
      is where x is, or for what is nowhere yet, JAX's default backend.

  Returns:
    Some sentences.

  Raises:
    TypeError, ValueError: as `qqmm`.

  Example:
    >>> x = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
    >>> print(jaxqq.explain(x, x, mode="mxfp8", device="cpu").split(":")[0])
    qqmm mxfp8, x bfloat16 (8, 64), w bfloat16 (8, 64) quantized on the fly, on cpu
  """
  operands, params = checked(
    "explain",
    x,
    w,
    scales,
    group_size,
    bits,
    mode,
    global_scale_x,
    global_scale_w,
    backward,
    precision,
  )
  platform = _platform(operands.x, device)
  as_matrix = operands
  if len(operands.x.shape) == 1:
    row = jax.ShapeDtypeStruct((1, *operands.x.shape), operands.x.dtype)
    as_matrix = dataclasses.replace(operands, x=row)
  part, summed, about_split = described(as_matrix, FORMATS[params["mode"]])
  part_dtype = np.dtype(np.float32) if summed else params["out_dtype"]
  problem = _kernels.Problem(params["mode"], part, part_dtype, precision, params["out_dtype"])
  implementation, refusals = _kernels.choose(problem, platform)
  x_words = f"x {np.dtype(operands.x.dtype).name} {tuple(operands.x.shape)}"
  w_words = f"w {np.dtype(operands.w.dtype).name} {tuple(operands.w.shape)}"
  w_words += " quantized on the fly" if operands.scales is None else " packed"
  sentences = [
    f"qqmm {params['mode']}, {x_words}, {w_words}, on {platform}: "
    f"computed by {implementation.summary}.",
    *(f"Not {refusal}." for refusal in refusals),
  ]
  if implementation.details is not None:
    sentences[0] = f"{sentences[0][:-1]}; {implementation.details(problem)}."
  if implementation.platforms is None and not refusals:
    sentences.append(f"No kernel is made for {platform} yet, so there was no other choice.")
  return " ".join([*sentences, *about_split])


def _platform(x: Any, device: jax.Device | str | None) -> str:
  """The platform as lowering names it."""
  if device is None and isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
    device = next(iter(x.devices()))
  if device is None:
    platform = jax.default_backend()
  elif isinstance(device, str):
    platform = device.lower()
    if platform not in PLATFORMS:
      raise ValueError(
        f"explain: unknown platform {device!r}; it must be one of "
        f"{', '.join(repr(name) for name in PLATFORMS)}."
      )
  elif isinstance(device, jax.Device):
    platform = device.platform
  else:
    raise TypeError(
      f"explain: device must be a jax.Device, a platform such as 'cuda', or None, got "
      f"{type(device).__name__}."
    )
  return _compat.platform_of_gpus() if platform == "gpu" else platform
