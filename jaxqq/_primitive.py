"""`qqmm_p`, the product as one primitive of JAX, of a quantized x or of x as it is.

Its operands are those of `Operands`, batch axes included, so `vmap` adds an axis and never a
loop. What differentiation does with it is in `_gradient.py`, where it runs in `_kernels`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from jaxqq import _compat, _kernels
from jaxqq._formats import FORMATS, Format
from jaxqq._global_scales import unscaled
from jaxqq._reference import TRANSPOSED, Operands, matrix_ndim, times_alpha, unflatten
from jaxqq._sharding import out_aval, over_explicit_axes, partitioned
from jaxqq._split import Layout, forward

qqmm_p = Primitive("qqmm")


class How(NamedTuple):
  """What is asked of a product, beside its operands and dtypes."""

  precision: jax.lax.Precision | None = None
  implementation: str | None = None
  quantize_input: bool = True  # whether x is quantized; else it is multiplied as it is

  @classmethod
  def of(cls, params: Mapping[str, Any]) -> How:
    """Of a primitive's parameters."""
    return cls(**{name: params[name] for name in cls._fields if name in params})


def qqmm(
  operands: Operands,
  *,
  mode: str,
  out_dtype: np.dtype,
  backward: str,
  precision: jax.lax.Precision | None,
  implementation: str | None = None,
  quantize_input: bool = True,
) -> jax.Array:
  """out[..., m, n] = sum_k x_hat[..., m, k] * w_hat[..., n, k], in out_dtype.

  x_hat is x itself, in its own dtype, where the input is not to be quantized.
  """
  return qqmm_p.bind(
    *operands.flatten(),
    operands=operands.names,
    mode=mode,
    out_dtype=np.dtype(out_dtype),
    backward=backward,
    precision=precision,
    implementation=implementation,
    quantize_input=quantize_input,
  )


# Abstract evaluation


def abstract_eval(*avals: Any, operands: tuple[str, ...], out_dtype: np.dtype, **_: Any) -> Any:
  return out_aval(unflatten(operands, avals), forward(None), out_dtype)


# Lowering


def _lowering(ctx: Any, *args: Any, operands: tuple[str, ...], **params: Any) -> Any:
  platform = platform_of(ctx)

  def product(values: Operands, out_dtype: np.dtype) -> jax.Array:
    return run(values, params["mode"], out_dtype, How.of(params), platform, params["out_dtype"])

  layout = forward(FORMATS[params["mode"]])
  return lower_split(ctx, args, operands, product, layout, f"qqmm_{label(params)}")


def label(params: dict[str, Any]) -> str:
  """What a product's lowering depends on, beside its operands."""
  how = How.of(params)
  words = [params["mode"], params["backward"], how.precision.name if how.precision else "default"]
  if how.implementation is not None:
    words.append(how.implementation)
  if not how.quantize_input or params.get("quantize_w"):
    words.append("weights")
  return "_".join(words)


def platform_of(ctx: Any) -> str:
  return (ctx.platforms or ctx.module_context.platforms)[0]


def run(
  operands: Operands,
  mode: str,
  out_dtype: np.dtype,
  how: How,
  platform: str,
  result_dtype: np.dtype | None = None,
) -> jax.Array:
  """The product as it is planned for one device."""
  fmt, device = FORMATS[mode], _kernels.device_of(platform)
  plan, inner = planned(operands, fmt, out_dtype, how, device, result_dtype)
  out = plan.run(inner)
  if inner is not operands:
    out = times_alpha(out, None, operands.global_scale_w, fmt, operands.row_scales)
  return out.astype(out_dtype)


def has_several(shape: tuple[Any, ...]) -> bool:
  """Whether an array may have more than one number: a size may be symbolic."""
  count = math.prod(shape)
  return not isinstance(count, int) or count > 1


def planned(
  operands: Operands,
  fmt: Format,
  out_dtype: np.dtype,
  how: How,
  device: _kernels.Device,
  result_dtype: np.dtype | None = None,
) -> tuple[_kernels.Plan, Operands]:
  """The plan of one device, and what it multiplies: w without global scales that kernels lack.

  Kernels take one global scale of w. Where those of packed w differ from matrix to matrix or from
  row to row, a kernel's float32 result is multiplied by them, unless it `takes_row_scales`.
  """
  of_w, of_rows = operands.global_scale_w, operands.row_scales

  def plan_of(ops: Operands, dtype: np.dtype, result: np.dtype | None) -> _kernels.Plan:
    problem = _kernels.Problem.of(ops, fmt, dtype, how.precision, result, how.quantize_input)
    return _kernels.plan(problem, device, chosen=how.implementation)

  differ = of_rows is not None or (of_w is not None and has_several(of_w.shape))
  if operands.scales is None or not differ:
    return plan_of(operands, out_dtype, result_dtype), operands
  none = None if operands.global_scale_x is None else unscaled(fmt)
  inner = dataclasses.replace(operands, global_scale_w=none, row_scales=None)
  sums = np.dtype(jnp.float32)
  plan = plan_of(inner, sums, result_dtype or out_dtype)
  if not plan.implementation.takes_row_scales:
    return plan, inner
  return plan_of(operands, out_dtype, result_dtype), operands


def lower_split(
  ctx: Any,
  args: Any,
  names: tuple[str, ...],
  product: Callable[[Operands, np.dtype], jax.Array],
  layout: Layout,
  label: str,
) -> Any:
  """Lowers a product of one device to be split over those of the program."""
  (out,) = ctx.avals_out
  label = "_".join((label, *(name for name in names if name.endswith(TRANSPOSED))))
  if 0 in (size for aval in (*ctx.avals_in, out) for size in aval.shape):
    split = None
  elif out.sharding.mesh.explicit_axes and out.sharding.mesh.size > 1:
    split = over_explicit_axes(product, names, layout, ctx.avals_in, out)
  elif is_partitioned_by_xla(ctx):
    split = partitioned(product, names, layout, out.dtype, label)
  else:
    split = None

  def whole(*values: jax.Array) -> jax.Array:
    return product(unflatten(names, values), out.dtype)

  return mlir.lower_fun(split or whole, multiple_results=False)(ctx, *args)


def is_partitioned_by_xla(ctx: Any) -> bool:
  """Several devices, known, and axes of a mesh that are XLA's to split.

  Not in an export, whose artifact cannot hold the rule: there XLA splits the reference itself.
  """
  if ctx.module_context.lowering_parameters.for_export:
    return False
  devices = getattr(ctx.module_context.axis_context, "device_assignment", None)
  mesh = ctx.avals_out[0].sharding.mesh
  return devices is not None and len(devices) > 1 and (mesh.empty or mesh.are_all_axes_auto)


# Batching


def batch(
  primitive: Primitive,
  args: Any,
  dims: Any,
  *,
  operands: tuple[str, ...],
  num_axes: Callable[[str], int] = matrix_ndim,
  **params: Any,
) -> Any:
  """The batched axis becomes the first batch axis of every operand that has it.

  num_axes: how many axes of an operand, by its name, are no batch axes.
  """
  unbatched_ndims = [
    jnp.ndim(a) - (dim is not None) - num_axes(name)
    for a, dim, name in zip(args, dims, operands, strict=True)
  ]
  batch_ndim = max(unbatched_ndims)
  aligned = []
  for a, dim, ndim in zip(args, dims, unbatched_ndims, strict=True):
    if dim is not None:
      a = jnp.moveaxis(a, dim, 0)
      a = a.reshape(a.shape[:1] + (1,) * (batch_ndim - ndim) + a.shape[1:])
    aligned.append(a)
  out = primitive.bind(*aligned, operands=operands, **params)
  return (out, (0,) * len(out)) if primitive.multiple_results else (out, 0)


# Registrations


def register_lowering(primitive: Primitive, rule: Callable[..., Any]) -> None:
  """On every platform, as a function of its own, so that layers of one shape share it."""
  _compat.seen_by_checkify(primitive)
  _compat.needs_devices_to_lower(primitive)
  for platform in (None, "cpu", *_kernels.PLATFORMS):
    mlir.register_lowering(primitive, rule, platform=platform, inline=False)


qqmm_p.def_impl(functools.partial(xla.apply_primitive, qqmm_p))
qqmm_p.def_abstract_eval(abstract_eval)
batching.primitive_batchers[qqmm_p] = functools.partial(batch, qqmm_p)
register_lowering(qqmm_p, _lowering)
