"""`qqmm_p`, the product as one primitive of JAX.

Its operands are those of `Operands`, batch axes included, so `vmap` adds an axis and never a
loop. What differentiation does with it is in `_gradient.py`, where it runs in `_kernels`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from jaxqq import _compat, _kernels
from jaxqq._formats import FORMATS
from jaxqq._reference import Operands, matrix_ndim, named
from jaxqq._sharding import out_aval, partitioned

qqmm_p = Primitive("qqmm")


def qqmm(
  operands: Operands,
  *,
  mode: str,
  out_dtype: np.dtype,
  backward: str,
  precision: jax.lax.Precision | None,
) -> jax.Array:
  """out[..., m, n] = sum_k x_hat[..., m, k] * w_hat[..., n, k], in out_dtype."""
  return qqmm_p.bind(
    *operands.present,
    operands=operands.names,
    mode=mode,
    out_dtype=np.dtype(out_dtype),
    backward=backward,
    precision=precision,
  )


# Abstract evaluation


def abstract_eval(*avals: Any, operands: tuple[str, ...], out_dtype: np.dtype, **_: Any) -> Any:
  return out_aval(named(operands, avals), out_dtype)


# Lowering


def _lowering(ctx: Any, *args: Any, operands: tuple[str, ...], **params: Any) -> Any:
  platform = (ctx.platforms or ctx.module_context.platforms)[0]

  def product(values: Operands, out_dtype: np.dtype) -> jax.Array:
    problem = _kernels.Problem(params["mode"], values, out_dtype, params["precision"])
    implementation, _ = _kernels.choose(problem, platform)
    return implementation.run(values, problem)

  out_dtype = params["out_dtype"]
  if _is_partitioned_by_xla(ctx):
    qqmm = partitioned(product, operands, FORMATS[params["mode"]], out_dtype)
  else:

    def qqmm(*values: jax.Array) -> jax.Array:
      return product(named(operands, values), out_dtype)

  return mlir.lower_fun(qqmm, multiple_results=False)(ctx, *args)


def _is_partitioned_by_xla(ctx: Any) -> bool:
  """Several devices, known, axes of a mesh that are XLA's to split, and something to split.

  Not in an export, whose artifact cannot hold the rule: there XLA splits the reference itself.
  """
  if ctx.module_context.lowering_parameters.for_export:
    return False
  devices = getattr(ctx.module_context.axis_context, "device_assignment", None)
  mesh = ctx.avals_out[0].sharding.mesh
  automatic = mesh.empty or mesh.are_all_axes_auto
  sizes = [size for aval in ctx.avals_in for size in aval.shape]
  return devices is not None and len(devices) > 1 and automatic and 0 not in sizes


# Batching


def batch(
  primitive: Primitive, args: Any, dims: Any, *, operands: tuple[str, ...], **params: Any
) -> Any:
  """The batched axis becomes the first batch axis of every operand that has it."""
  unbatched_ndims = [
    jnp.ndim(a) - (dim is not None) - matrix_ndim(name)
    for a, dim, name in zip(args, dims, operands, strict=True)
  ]
  batch_ndim = max(unbatched_ndims)
  aligned = []
  for a, dim, ndim in zip(args, dims, unbatched_ndims, strict=True):
    if dim is not None:
      a = jnp.moveaxis(a, dim, 0)
      a = a.reshape(a.shape[:1] + (1,) * (batch_ndim - ndim) + a.shape[1:])
    aligned.append(a)
  return primitive.bind(*aligned, operands=operands, **params), 0


# Registrations

qqmm_p.def_impl(functools.partial(xla.apply_primitive, qqmm_p))
qqmm_p.def_abstract_eval(abstract_eval)
_compat.needs_devices_to_lower(qqmm_p)
batching.primitive_batchers[qqmm_p] = functools.partial(batch, qqmm_p)
# Emitted as a function of its own, so that layers of one shape share it.
for _platform in (None, *_kernels.PLATFORMS):
  mlir.register_lowering(qqmm_p, _lowering, platform=_platform, inline=False)
