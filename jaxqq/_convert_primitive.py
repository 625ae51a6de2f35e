"""`quantize_p` and `dequantize_p`, the conversions as primitives of JAX.

    quantize_p      w, [global_scale]          ->  packed, scales
    dequantize_p    w, scales, [global_scale]  ->  out

w is (..., n, k), or "w_transposed" (..., k, n), or packed (..., n, k * bits / 32), and a
global scale is (...). Axes before these are batch axes, which broadcast, so that `vmap` adds
an axis and never a loop. A conversion has several results or a list of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxqq import _kernels, _primitive
from jaxqq._convert_split import Function, Shapes, out_avals, over_explicit_axes, partitioned
from jaxqq._formats import FORMATS
from jaxqq._kernels import conversions
from jaxqq._kernels.plan import Implementation
from jaxqq._kernels.problem import Conversion

quantize_p = Primitive("quantize")
dequantize_p = Primitive("dequantize")
for primitive in (quantize_p, dequantize_p):
  primitive.multiple_results = True


def quantize(arrays: Sequence[jax.Array], names: tuple[str, ...], mode: str) -> list[jax.Array]:
  """[packed, scales] of an array, or of its transpose, by its name."""
  return quantize_p.bind(*arrays, operands=names, mode=mode)


def dequantize(
  arrays: Sequence[jax.Array], names: tuple[str, ...], mode: str, out_dtype: np.dtype
) -> jax.Array:
  (out,) = dequantize_p.bind(*arrays, operands=names, mode=mode, out_dtype=np.dtype(out_dtype))
  return out


# Abstract evaluation


def _quantize_abstract_eval(*avals: Any, operands: tuple[str, ...], mode: str) -> Any:
  return out_avals(Shapes(operands, avals, FORMATS[mode]), (np.uint32, np.uint8))


def _dequantize_abstract_eval(
  *avals: Any, operands: tuple[str, ...], mode: str, out_dtype: np.dtype
) -> Any:
  return out_avals(Shapes(operands, avals, FORMATS[mode]), (out_dtype,))


# Lowering


def _lowering(
  ctx: Any,
  *args: Any,
  table: tuple[Implementation, ...],
  operands: tuple[str, ...],
  mode: str,
  out_dtype: np.dtype | None = None,
) -> Any:
  platform = _primitive.platform_of(ctx)

  def one_device(*arrays: jax.Array) -> list[jax.Array]:
    problem = Conversion.of(FORMATS[mode], operands, arrays, out_dtype)
    return _kernels.plan(problem, _kernels.device_of(platform), table).run(arrays)

  shapes = Shapes(operands, tuple(ctx.avals_in), FORMATS[mode])
  dtypes = (out_dtype.name,) if out_dtype else ()
  label = "_".join((shapes.function, *operands, mode, *dtypes))
  function = _split(ctx, one_device, shapes, label)
  return mlir.lower_fun(function, multiple_results=True)(ctx, *args)


def _split(ctx: Any, function: Function, shapes: Shapes, label: str) -> Callable[..., Any]:
  """A conversion of one device, to be split over those of the program."""
  if ctx.avals_out[0].sharding.mesh.explicit_axes:
    return over_explicit_axes(function, shapes, ctx.avals_out)
  is_empty = 0 in (size for aval in (*ctx.avals_in, *ctx.avals_out) for size in aval.shape)
  if _primitive.is_partitioned_by_xla(ctx) and not is_empty:
    return partitioned(function, shapes, label)
  return function


# Derivatives


def _jvp(primals: Any, tangents: Any, *, primitive: Primitive, **params: Any) -> Any:
  """Codes are integers, and of global scales the gradient is zero, as in a product."""
  del tangents
  results = primitive.bind(*primals, **params)
  return results, [ad.Zero(jax.typeof(a).to_tangent_aval()) for a in results]


# Registrations

quantize_p.def_abstract_eval(_quantize_abstract_eval)
dequantize_p.def_abstract_eval(_dequantize_abstract_eval)

for primitive, table in (
  (quantize_p, conversions.QUANTIZE),
  (dequantize_p, conversions.DEQUANTIZE),
):
  primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
  ad.primitive_jvps[primitive] = functools.partial(_jvp, primitive=primitive)
  batching.primitive_batchers[primitive] = functools.partial(_primitive.batch, primitive)
  _primitive.register_lowering(primitive, functools.partial(_lowering, table=table))
