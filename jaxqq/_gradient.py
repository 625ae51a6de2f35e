"""The derivatives of qqmm, and of the product whose x is not quantized.

Quantization Q is a staircase: its derivative is 0 almost everywhere and tells nothing. Taken as
the identity instead (the straight-through estimator: Bengio, Léonard, Courville 2013,
arXiv:1308.3432), y = Q(x) Q(w)^T has the tangent

    y' = x' w^T + x w'^T

with w the unquantized weight, or the dequantized one where it came packed. Each term is one
primitive, `qqmm_tangent`, linear in the operand that it is taken with respect to. Forward mode
evaluates it. Reverse mode transposes it, and the rule for that is ours to choose:

    straight_through    dx = g w             dw = g^T x
    quantized           dx = qqmm(g, w^T)    dw = qqmm(g^T, x^T)

Both are recipes (`_recipe.py`), the ones whose quantizers are all alike or absent backward. Any
other recipe has primitives of its own, in `_recipe_product.py`, of the same tangent.

The second is what MLX does: each operand is quantized anew along the axis that the product
sums over, zero-padded to whole groups; x's and w's global scales are kept, and g's is its amax.
In nvfp4 without global scales MLX loses most cotangents, which are too small for its scales. Here
an unpacked operand whose amax is below 1 gets a global scale, 2688 times a power of two.
Both sum over rows: dx over n, dw over m, and over every batch axis that the result lacks. dx
through a packed w is a primitive of its own, `qqmm_pullback`, so that w is moved between devices
as it is packed.

Where x is not quantized, y = x Q(w)^T is linear in it, and its derivative is no matter of taste:

    y' = x' Q(w)^T + x w'^T    dx = g Q(w)    dw = g^T x

Only w's own term is straight-through. dx is `qqmm_pullback` there, of an unpacked w too.

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
from jaxqq._reference import (
  Operands,
  dequantized,
  dequantized_for,
  matmul,
  pulled_back,
  times_alpha,
  to_quantize_anew,
  unflatten,
)
from jaxqq._row_sums import (
  amax,
  operands_of_gradient,
  quantized_product,
  straight_through_product,
  sum_over_rows,
)
from jaxqq._sharding import out_aval
from jaxqq._split import forward, pullback

Backward: TypeAlias = Literal["straight_through", "quantized"]
BACKWARDS: tuple[Backward, ...] = get_args(Backward)

qqmm_tangent_p = Primitive("qqmm_tangent")
qqmm_pullback_p = Primitive("qqmm_pullback")


# Forward mode


def _jvp(
  primals: Any, tangents: Any, *, operands: tuple[str, ...], quantize_input: bool, **params: Any
) -> Any:
  """y' = x' w^T + x w'^T."""
  out = qqmm_p.bind(*primals, operands=operands, quantize_input=quantize_input, **params)
  at, tangent = unflatten(operands, primals), unflatten(operands, tangents)
  refuse_gradient_of_packed(tangent.scales, "qqmm" if quantize_input else "quantized_matmul")
  terms = []
  if not is_zero(tangent.x):
    quantize_w = at.scales is None and not quantize_input
    moved = dataclasses.replace(at, x=tangent.x)
    terms.append(_tangent(moved, wrt="x", quantize_w=quantize_w, **params))
  if not is_zero(tangent.w):
    moved = dataclasses.replace(at, w=tangent.w)
    terms.append(_tangent(moved, wrt="w", quantize_w=False, **params))
  return out, _total(terms, out)


def refuse_gradient_of_packed(scales: Any, function: str = "qqmm") -> None:
  """Packed words are integers, which JAX never differentiates; float8 scales it would."""
  if scales is not None and not is_zero(scales):
    raise ValueError(
      f"{function}: asked for the gradient of the scales of a packed w; to receive gradients, w "
      "must be provided unquantized."
    )


def is_zero(tangent: Any) -> bool:
  return isinstance(tangent, ad.Zero)


def _total(terms: list[jax.Array], out: jax.Array) -> Any:
  return functools.reduce(jnp.add, terms) if terms else ad.Zero(jax.typeof(out).to_tangent_aval())


def _tangent(operands: Operands, *, wrt: str, quantize_w: bool, **params: Any) -> jax.Array:
  """x @ w.T, linear in the operand that `wrt` names, of an x that is not quantized.

  w is packed, or as it is; or quantized on the fly, with respect to x alone.
  """
  own = {"operands": operands.names, "wrt": wrt, "quantize_w": quantize_w}
  return qqmm_tangent_p.bind(*operands.flatten(), **own, **params)


def _tangent_product(
  *args: jax.Array,
  operands: tuple[str, ...],
  mode: str,
  out_dtype: np.dtype,
  quantize_w: bool,
  **_: Any,
) -> jax.Array:
  """What `qqmm_tangent` computes."""
  ops = unflatten(operands, args).untransposed()
  if ops.scales is None and not quantize_w:
    out = matmul(ops.x, jnp.swapaxes(ops.w, -1, -2))
  else:
    fmt = FORMATS[mode]
    w = dequantized_for(ops.x.dtype, ops, fmt)
    out = matmul(ops.x, jnp.swapaxes(w, -1, -2))
    out = times_alpha(out, None, ops.global_scale_w, fmt, ops.row_scales)
  # A batch axis may come from a global scale alone.
  return jnp.broadcast_to(out, ops.batch_shape + out.shape[-2:]).astype(out_dtype)


def _tangent_lowering(ctx: Any, *args: Any, operands: tuple[str, ...], **params: Any) -> Any:
  """XLA splits a plain product by itself, but gathers a quantized w dequantized."""
  fmt = FORMATS[params["mode"]] if "scales" in operands or params["quantize_w"] else None
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
  primals: Any,
  tangents: Any,
  *,
  operands: tuple[str, ...],
  wrt: str,
  quantize_w: bool,
  **params: Any,
) -> Any:
  """The product rule: linear in one operand, and straight-through in the other."""
  how = {"operands": operands, "wrt": wrt, "quantize_w": quantize_w}
  out = qqmm_tangent_p.bind(*primals, **how, **params)
  at, tangent = unflatten(operands, primals), unflatten(operands, tangents)
  refuse_gradient_of_packed(tangent.scales)
  terms = []
  for name in ("x", "w"):
    if not is_zero(getattr(tangent, name)):
      moved = dataclasses.replace(at, **{name: getattr(tangent, name)})
      own = params if name == wrt else {**params, "backward": "straight_through"}
      terms.append(_tangent(moved, wrt=name, quantize_w=quantize_w and name == "x", **own))
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
  if is_zero(cotangent):
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
  quantize_w: bool,
  mode: str,
  backward: str,
  precision: lax.Precision | None,
  implementation: str | None,
) -> jax.Array:
  """The cotangent of x or w, of that operand's shape and dtype."""
  fmt, ops = FORMATS[mode], unflatten(operands, known)
  how = _primitive.How(precision, implementation)
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
    return _pullback(at, mode, target.dtype, backward, how)
  if quantize_w:
    at = dataclasses.replace(ops.untransposed(["w"]), x=cotangent)
    is_whole = target.shape[:-2] == cotangent.shape[:-2]
    dtype = target.dtype if is_whole else np.dtype(jnp.float32)
    out = _pullback(at, mode, dtype, backward, how)
    return summed_to(out, target.shape).astype(target.dtype)
  if backward == "quantized":
    if ops.scales is not None:
      others = dequantized(ops, fmt)
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


def summed_to(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The sum over the batch axes that shape lacks, or has once."""
  missing = a.ndim - len(shape)
  a = jnp.sum(a, axis=range(missing)) if missing else a
  ones = [i for i, size in enumerate(shape) if size != a.shape[i]]
  return jnp.sum(a, axis=ones, keepdims=True) if ones else a


# dx through a quantized w: dx[..., m, k] = sum_n g[..., m, n] * w_hat[..., n, k], where x names g.
# w is packed; or, where the forward product quantizes w alone, it is quantized again, along k.


def _pullback(
  operands: Operands,
  mode: str,
  out_dtype: np.dtype,
  backward: str,
  how: _primitive.How,
) -> jax.Array:
  return qqmm_pullback_p.bind(
    *operands.flatten(),
    operands=operands.names,
    mode=mode,
    out_dtype=np.dtype(out_dtype),
    backward=backward,
    precision=how.precision,
    implementation=how.implementation,
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
  mode, how = params["mode"], _primitive.How.of(params)
  fmt, quantized = FORMATS[mode], params["backward"] == "quantized"
  platform = _primitive.platform_of(ctx)

  def product(ops: Operands, out_dtype: np.dtype) -> jax.Array:
    if quantized:
      ready = to_quantize_anew(ops, fmt)
      return _primitive.run(ready, mode, out_dtype, how, platform)
    out = pulled_back(ops, fmt)
    return jnp.broadcast_to(out, ops.batch_shape + out.shape[-2:]).astype(out_dtype)

  layout = pullback(fmt, quantized=quantized)
  label = f"qqmm_pullback_{_primitive.label(params)}"
  return _primitive.lower_split(ctx, args, operands, product, layout, label)


def _pullback_jvp(
  primals: Any,
  tangents: Any,
  *,
  operands: tuple[str, ...],
  mode: str,
  out_dtype: np.dtype,
  backward: str,
  **params: Any,
) -> Any:
  """Linear in g, straight-through where g or w is quantized."""
  of_all = {"operands": operands, "mode": mode, "out_dtype": out_dtype, "backward": backward}
  out = qqmm_pullback_p.bind(*primals, **of_all, **params)
  at, tangent = unflatten(operands, primals), unflatten(operands, tangents)
  refuse_gradient_of_packed(tangent.scales)
  terms = []
  if not is_zero(tangent.x):
    moved = dataclasses.replace(at, x=tangent.x, global_scale_x=None)
    terms.append(_pullback(moved, mode, out_dtype, BACKWARDS[0], _primitive.How.of(params)))
  if not is_zero(tangent.w):  # g w', whose contracted axis is the first of w'
    moved = Operands(at.x, tangent.w, transposed=("w",))
    own = {"mode": mode, "out_dtype": out_dtype, "backward": BACKWARDS[0], **params}
    term = _tangent(moved, wrt="w", quantize_w=False, **own)
    terms.append(jnp.broadcast_to(term, out.shape))  # an axis may come from a global scale alone
  return out, _total(terms, out)


def _pullback_transpose(
  cotangent: Any, *args: Any, operands: tuple[str, ...], out_dtype: np.dtype, **params: Any
) -> list[Any]:
  """The cotangent of g, of `qqmm_pullback` as its jvp has it: a product with w as it came."""
  if is_zero(cotangent):
    return [None for _ in operands]
  ops = unflatten(operands, args)
  g = ops.x.aval
  at = dataclasses.replace(ops, x=cotangent)
  sums = np.dtype(jnp.float32)
  result = _tangent(at, wrt="x", quantize_w=ops.scales is None, out_dtype=sums, **params)
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
