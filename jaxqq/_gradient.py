"""The derivatives of qqmm.

Quantization Q is a staircase: its derivative is 0 almost everywhere and tells nothing. Taken as
the identity instead (the straight-through estimator: Bengio, Léonard, Courville 2013,
arXiv:1308.3432), y = Q(x) Q(w)^T has the tangent

    y' = x' w^T + x w'^T

with w the unquantized weight, or the dequantized one where it came packed. Each term is one
primitive, `qqmm_tangent`, linear in the operand that it is taken with respect to. Forward mode
evaluates it. Reverse mode transposes it, and the rule for that is ours to choose:

    straight_through    dx = g w             dw = g^T x
    quantized           dx = qqmm(g, w^T)    dw = qqmm(g^T, x^T)

The second is what MLX does: each operand is quantized anew along the axis that the product
sums over, zero-padded to whole groups; x's and w's global scales are kept, and g's is its amax.
In nvfp4 without global scales MLX loses most cotangents, which are too small for its scales. Here
an unpacked operand whose amax is below 1 gets a global scale, 2688 times a power of two.
Both sum over rows: dx over n, dw over m, and over every batch axis that the result lacks. dx
through a packed w is a primitive of its own, `qqmm_pullback`, so that w is moved between devices
as it is packed.

Global scales have no gradient. A second derivative differentiates these formulas again,
straight-through where they multiply quantized operands. Residuals are x and w as they came.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxqq import _primitive
from jaxqq._formats import FORMATS
from jaxqq._global_scales import scale_that_reaches, unscaled
from jaxqq._primitive import qqmm_p
from jaxqq._reference import Operands, dequantized, matmul, times_alpha, unflatten
from jaxqq._row_sums import (
  amax,
  dequantized_for,
  operands_of_gradient,
  quantized_product,
  straight_through_product,
  sum_over_rows,
  whole_groups,
)
from jaxqq._sharding import out_aval
from jaxqq._split import forward, pullback

Backward: TypeAlias = Literal["straight_through", "quantized"]
BACKWARDS: tuple[Backward, ...] = get_args(Backward)

qqmm_tangent_p = Primitive("qqmm_tangent")
qqmm_pullback_p = Primitive("qqmm_pullback")


# Forward mode


def _jvp(primals: Any, tangents: Any, *, operands: tuple[str, ...], **params: Any) -> Any:
  """y' = x' w^T + x w'^T."""
  out = qqmm_p.bind(*primals, operands=operands, **params)
  at, tangent = unflatten(operands, primals), unflatten(operands, tangents)
  _refuse_gradient_of_packed(tangent)
  terms = []
  if not _is_zero(tangent.x):
    terms.append(_tangent(dataclasses.replace(at, x=tangent.x), wrt="x", **params))
  if not _is_zero(tangent.w):
    terms.append(_tangent(dataclasses.replace(at, w=tangent.w), wrt="w", **params))
  return out, _total(terms, out)


def _refuse_gradient_of_packed(tangent: Operands) -> None:
  """Packed words are integers, which JAX never differentiates; float8 scales it would."""
  if tangent.scales is not None and not _is_zero(tangent.scales):
    raise ValueError(
      "qqmm: asked for the gradient of the scales of a packed w; to receive gradients, w must "
      "be provided unquantized."
    )


def _is_zero(tangent: Any) -> bool:
  return isinstance(tangent, ad.Zero)


def _total(terms: list[jax.Array], out: jax.Array) -> Any:
  return functools.reduce(jnp.add, terms) if terms else ad.Zero(jax.typeof(out).to_tangent_aval())


def _tangent(operands: Operands, *, wrt: str, **params: Any) -> jax.Array:
  """x @ w.T of unquantized operands (or a packed w), linear in the one `wrt` names."""
  return qqmm_tangent_p.bind(*operands.flatten(), operands=operands.names, wrt=wrt, **params)


def _tangent_product(
  *args: jax.Array, operands: tuple[str, ...], mode: str, out_dtype: np.dtype, **_: Any
) -> jax.Array:
  """What `qqmm_tangent` computes: a product in which nothing is quantized on the fly."""
  ops = unflatten(operands, args).untransposed()
  if ops.scales is None:
    out = matmul(ops.x, jnp.swapaxes(ops.w, -1, -2))
  else:
    fmt = FORMATS[mode]
    w = dequantized_for(ops.x.dtype, ops, fmt)
    out = matmul(ops.x, jnp.swapaxes(w, -1, -2))
    out = times_alpha(out, None, ops.global_scale_w, fmt, ops.row_scales)
  # A batch axis may come from a global scale alone.
  return jnp.broadcast_to(out, ops.batch_shape + out.shape[-2:]).astype(out_dtype)


def _tangent_lowering(ctx: Any, *args: Any, operands: tuple[str, ...], **params: Any) -> Any:
  """XLA splits a plain product by itself, but gathers a packed w dequantized."""
  fmt = FORMATS[params["mode"]] if "scales" in operands else None
  mesh = ctx.avals_out[0].sharding.mesh

  def product(values: Operands, out_dtype: np.dtype) -> jax.Array:
    own = {**params, "out_dtype": out_dtype}
    return _tangent_product(*values.flatten(), operands=operands, **own)

  if fmt is None and not mesh.explicit_axes:
    whole = functools.partial(_tangent_product, operands=operands, **params)
    return mlir.lower_fun(whole, multiple_results=False)(ctx, *args)
  label = f"qqmm_tangent_{_primitive.label(params)}"
  return _primitive.lower_split(ctx, args, operands, product, forward(fmt), label)


def _tangent_jvp(
  primals: Any, tangents: Any, *, operands: tuple[str, ...], wrt: str, **params: Any
) -> Any:
  """The product rule: linear in one operand, and straight-through in the other."""
  out = qqmm_tangent_p.bind(*primals, operands=operands, wrt=wrt, **params)
  at, tangent = unflatten(operands, primals), unflatten(operands, tangents)
  _refuse_gradient_of_packed(tangent)
  terms = []
  for name in ("x", "w"):
    if not _is_zero(getattr(tangent, name)):
      moved = dataclasses.replace(at, **{name: getattr(tangent, name)})
      own = params if name == wrt else {**params, "backward": "straight_through"}
      terms.append(_tangent(moved, wrt=name, **own))
  return out, _total(terms, out)


# Reverse mode


def _transpose(
  cotangent: Any,
  *args: Any,
  operands: tuple[str, ...],
  wrt: str,
  out_dtype: np.dtype,
  **params: Any,
) -> list[Any]:
  """The cotangent of the operand that `qqmm_tangent` is linear in; None for the others."""
  del out_dtype  # it is the cotangent's
  if _is_zero(cotangent):
    return [None for _ in operands]
  target = getattr(unflatten(operands, args), wrt).aval
  known = [None if ad.is_undefined_primal(a) else a for a in args]
  pull: Callable[..., jax.Array] = functools.partial(
    _pulled, operands=operands, target=target, wrt=wrt, **params
  )
  if target.sharding.mesh.explicit_axes:  # what is summed may be split, and how is not told twice
    pull = jax.sharding.auto_axes(pull, out_sharding=target.sharding)
  return [pull(cotangent, known) if ad.is_undefined_primal(a) else None for a in args]


def _pulled(
  cotangent: jax.Array,
  known: list[jax.Array | None],  # all operands but the one that is asked for
  *,
  operands: tuple[str, ...],
  target: jax.core.ShapedArray,
  wrt: str,
  mode: str,
  backward: str,
  precision: lax.Precision | None,
  implementation: str | None,
) -> jax.Array:
  """The cotangent of x or w, of that operand's shape and dtype."""
  fmt, ops = FORMATS[mode], unflatten(operands, known)
  others, global_scale, amax_g = ops.x, ops.global_scale_x, None
  if wrt == "x":
    others, global_scale = ops.w, ops.global_scale_w
  if wrt == "x" and ops.row_scales is not None:  # w_hat is quantized anew, under one for all rows
    global_scale = jnp.max(ops.row_scales, axis=-1)
  if backward == "quantized" and global_scale is not None:
    scales = (ops.global_scale_x, ops.global_scale_w, global_scale)
    shapes = (scale.shape for scale in scales if scale is not None)
    global_scale = jnp.broadcast_to(global_scale, lax.broadcast_shapes(*shapes))
    amax_g = amax(cotangent, global_scale.shape)
  elif backward == "quantized" and fmt.has_global_scale:
    # One for all matrices of a batch, as kernels take it.
    amax_g = scale_that_reaches(amax(cotangent, ()), fmt)
    global_scale = unscaled(fmt)  # as packed w is
    if ops.scales is None:
      global_scale = scale_that_reaches(amax(others, ()), fmt)
  if ops.scales is not None and target.shape[:-2] == cotangent.shape[:-2]:
    at = dataclasses.replace(ops, x=cotangent, global_scale_x=amax_g, global_scale_w=global_scale)
    return _pullback(at, mode, target.dtype, backward, precision, implementation)
  if backward == "quantized":
    if ops.scales is not None:
      others = dequantized(ops, fmt)
    how = precision, implementation
    product = functools.partial(quantized_product, fmt=fmt, how=how, dtype=target.dtype)
  else:
    if ops.row_scales is not None:
      others, global_scale = dequantized(ops, fmt), None
    elif ops.scales is not None:
      others = dequantized_for(cotangent.dtype, ops, fmt)
    else:
      global_scale = None
    product = functools.partial(straight_through_product, fmt=fmt)
  summed = operands_of_gradient(
    (cotangent, amax_g), (others, global_scale), wrt=wrt, transposed=ops.transposed
  )
  return sum_over_rows(summed, target.shape, product).astype(target.dtype)


# dx through a packed w: dx[..., m, k] = sum_n g[..., m, n] * w[..., n, k], where x names g


def _pullback(
  operands: Operands,
  mode: str,
  out_dtype: np.dtype,
  backward: str,
  precision: lax.Precision | None,
  implementation: str | None,
) -> jax.Array:
  return qqmm_pullback_p.bind(
    *operands.flatten(),
    operands=operands.names,
    mode=mode,
    out_dtype=np.dtype(out_dtype),
    backward=backward,
    precision=precision,
    implementation=implementation,
  )


def _pullback_abstract_eval(
  *avals: Any, operands: tuple[str, ...], mode: str, out_dtype: np.dtype, **_: Any
) -> Any:
  return out_aval(unflatten(operands, avals), pullback(FORMATS[mode], quantized=False), out_dtype)


def _pullback_lowering(
  ctx: Any,
  *args: Any,
  operands: tuple[str, ...],
  **params: Any,
) -> Any:
  mode, how = params["mode"], (params["precision"], params["implementation"])
  fmt, quantized = FORMATS[mode], params["backward"] == "quantized"
  platform = _primitive.platform_of(ctx)

  def product(ops: Operands, out_dtype: np.dtype) -> jax.Array:
    if quantized:
      w = dequantized(ops, fmt)
      ready = Operands(ops.x, w, None, ops.global_scale_x, ops.global_scale_w, ("w",))
      return _primitive.run(whole_groups(ready, fmt), mode, out_dtype, how, platform)
    g, of_w = ops.x, ops.global_scale_w
    if ops.row_scales is not None:
      g, of_w = times_alpha(g.astype(jnp.float32), None, None, fmt, ops.row_scales), None
      g = g.astype(ops.x.dtype) if ops.x.dtype == jnp.bfloat16 else g
    out = times_alpha(matmul(g, dequantized_for(ops.x.dtype, ops, fmt)), None, of_w, fmt)
    return jnp.broadcast_to(out, ops.batch_shape + out.shape[-2:]).astype(out_dtype)

  layout = pullback(fmt, quantized=quantized)
  label = f"qqmm_pullback_{_primitive.label(params)}"
  return _primitive.lower_split(ctx, args, operands, product, layout, label)


def _pullback_jvp(
  primals: Any, tangents: Any, *, operands: tuple[str, ...], backward: str, **params: Any
) -> Any:
  """Linear in g, straight-through where g is quantized."""
  out = qqmm_pullback_p.bind(*primals, operands=operands, backward=backward, **params)
  tangent = unflatten(operands, tangents)
  _refuse_gradient_of_packed(tangent)
  if _is_zero(tangent.x):
    return out, _total([], out)
  moved = dataclasses.replace(unflatten(operands, primals), x=tangent.x, global_scale_x=None)
  return out, _pullback(moved, backward=BACKWARDS[0], **params)


def _pullback_transpose(
  cotangent: Any, *args: Any, operands: tuple[str, ...], out_dtype: np.dtype, **params: Any
) -> list[Any]:
  """The cotangent of g, of `qqmm_pullback` as its jvp has it: a product with w as it came."""
  if _is_zero(cotangent):
    return [None for _ in operands]
  ops = unflatten(operands, args)
  g = ops.x.aval
  at = dataclasses.replace(ops, x=cotangent)
  result = _tangent(at, wrt="x", out_dtype=np.dtype(jnp.float32), **params)
  missing = [i for i in range(g.ndim) if g.shape[i] != result.shape[i]]
  result = jnp.sum(result, axis=missing, keepdims=True) if missing else result
  return [result.astype(g.dtype) if name == "x" else None for name in operands]


# Registrations

ad.primitive_jvps[qqmm_p] = _jvp

qqmm_tangent_p.def_impl(functools.partial(xla.apply_primitive, qqmm_tangent_p))
qqmm_tangent_p.def_abstract_eval(_primitive.abstract_eval)
ad.primitive_jvps[qqmm_tangent_p] = _tangent_jvp
ad.primitive_transposes[qqmm_tangent_p] = _transpose
batching.primitive_batchers[qqmm_tangent_p] = functools.partial(_primitive.batch, qqmm_tangent_p)

qqmm_pullback_p.def_impl(functools.partial(xla.apply_primitive, qqmm_pullback_p))
qqmm_pullback_p.def_abstract_eval(_pullback_abstract_eval)
ad.primitive_jvps[qqmm_pullback_p] = _pullback_jvp
ad.primitive_transposes[qqmm_pullback_p] = _pullback_transpose
batching.primitive_batchers[qqmm_pullback_p] = functools.partial(_primitive.batch, qqmm_pullback_p)

_primitive.register_lowering(qqmm_tangent_p, _tangent_lowering)
_primitive.register_lowering(qqmm_pullback_p, _pullback_lowering)
