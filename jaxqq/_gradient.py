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
Both sum over rows: dx over n, dw over m, and over every batch axis that the result lacks.

Global scales have no gradient. A second derivative differentiates these formulas again,
straight-through where they multiply quantized operands. Residuals are x and w as they came.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxqq import _primitive
from jaxqq._formats import FORMATS, Format
from jaxqq._primitive import qqmm_p
from jaxqq._reference import Operands, dequantize_packed, matmul, named, times_global_scale

BACKWARDS = ("straight_through", "quantized")

qqmm_tangent_p = Primitive("qqmm_tangent")


# Forward mode


def _jvp(primals: Any, tangents: Any, *, operands: tuple[str, ...], **params: Any) -> Any:
  """y' = x' w^T + x w'^T."""
  out = qqmm_p.bind(*primals, operands=operands, **params)
  at, tangent = named(operands, primals), named(operands, tangents)
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
  return qqmm_tangent_p.bind(*operands.present, operands=operands.names, wrt=wrt, **params)


def _tangent_product(
  *args: jax.Array, operands: tuple[str, ...], mode: str, out_dtype: np.dtype, **_: Any
) -> jax.Array:
  """What `qqmm_tangent` computes: a product in which nothing is quantized on the fly."""
  ops = named(operands, args)
  if ops.scales is None:
    out = matmul(ops.x, jnp.swapaxes(ops.w, -1, -2))
  else:
    fmt = FORMATS[mode]
    w = _dequantized_for(ops.x.dtype, ops, fmt)
    out = times_global_scale(matmul(ops.x, jnp.swapaxes(w, -1, -2)), ops.global_scale_w, fmt)
  # A batch axis may come from a global scale alone.
  return jnp.broadcast_to(out, ops.batch_shape + out.shape[-2:]).astype(out_dtype)


def _tangent_jvp(
  primals: Any, tangents: Any, *, operands: tuple[str, ...], wrt: str, **params: Any
) -> Any:
  """The product rule: linear in one operand, and straight-through in the other."""
  out = qqmm_tangent_p.bind(*primals, operands=operands, wrt=wrt, **params)
  at, tangent = named(operands, primals), named(operands, tangents)
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
  mode: str,
  backward: str,
  precision: lax.Precision | None,
  out_dtype: np.dtype,
) -> list[Any]:
  """The cotangent of the operand that `qqmm_tangent` is linear in; None for the others."""
  if _is_zero(cotangent):
    return [None for _ in operands]
  fmt = FORMATS[mode]
  ops = named(operands, args)
  target = getattr(ops, wrt).aval
  if wrt == "x":
    # dx[m, k] = sum_n g[m, n] w[n, k]
    rows, others, global_scale = jnp.swapaxes(cotangent, -1, -2), ops.w, ops.global_scale_w
  else:
    # dw[n, k] = sum_m g[m, n] x[m, k]
    rows, others, global_scale = cotangent, ops.x, ops.global_scale_x
  if backward == "quantized":
    if ops.scales is not None:
      others = dequantize_packed(ops.w, ops.scales, fmt, ops.global_scale_w)
    if ops.global_scale_x is not None:
      shapes = ops.global_scale_x.shape, ops.global_scale_w.shape
      global_scale = jnp.broadcast_to(global_scale, lax.broadcast_shapes(*shapes))
    product = functools.partial(
      _quantized_product, fmt=fmt, precision=precision, dtype=target.dtype
    )
  else:
    if ops.scales is not None:
      others = _dequantized_for(cotangent.dtype, ops, fmt)
    else:
      global_scale = None
    product = functools.partial(_straight_through_product, fmt=fmt)
  result = _sum_over_rows(rows, others, global_scale, target.shape, product)
  return [result.astype(target.dtype) if name == wrt else None for name in operands]


def _sum_over_rows(
  a: jax.Array,  # (..., r, m)
  b: jax.Array,  # (..., r, n)
  global_scale: jax.Array | None,  # (...), of b
  shape: tuple[int, ...],  # (..., m, n)
  product: Callable[..., jax.Array],
) -> jax.Array:
  """sum_r a[..., r, m] * b[..., r, n], also over the batch axes that are missing from shape.

  Such an axis joins the rows, unless global scales differ along it: a product has one global
  scale a matrix, so those axes are summed after it.
  """
  batch = a.shape[:-2]  # a is a cotangent, or its transpose, and has all of them
  ndim = len(batch)
  b_batch, scale_batch, out_batch = (
    (1,) * (ndim - len(own)) + tuple(own)
    for own in (b.shape[:-2], () if global_scale is None else global_scale.shape, shape[:-2])
  )
  missing = [i for i in range(ndim) if out_batch[i] == 1 and batch[i] != 1]
  joined = [i for i in missing if scale_batch[i] == 1 and b_batch[i] != 1]
  kept = [i for i in range(ndim) if i not in joined]
  if global_scale is not None:
    global_scale = global_scale.reshape([scale_batch[i] for i in kept])
  out = product(
    _join_rows(a, kept, joined),
    _join_rows(b.reshape(b_batch + b.shape[-2:]), kept, joined),
    global_scale,
    sums_follow=len(missing) > len(joined),
  )
  summed = tuple(kept.index(i) for i in missing if i in kept)
  return (jnp.sum(out, axis=summed) if summed else out).reshape(shape)


def _join_rows(a: jax.Array, kept: list[int], joined: list[int]) -> jax.Array:
  """(kept and joined batch axes, r, m) to (kept batch axes, joined * r, m)."""
  if not joined:
    return a
  a = a.transpose(*kept, *joined, a.ndim - 2, a.ndim - 1)
  rows = math.prod(a.shape[len(kept) : -1])
  return a.reshape(*a.shape[: len(kept)], rows, a.shape[-1])


def _straight_through_product(
  a: jax.Array, b: jax.Array, global_scale: jax.Array | None, *, sums_follow: bool, fmt: Format
) -> jax.Array:
  """a^T b in float32; a global scale is that of b, dequantized without it."""
  del sums_follow
  return times_global_scale(matmul(jnp.swapaxes(a, -1, -2), b), global_scale, fmt)


def _quantized_product(
  a: jax.Array,
  b: jax.Array,
  global_scale: jax.Array | None,
  *,
  sums_follow: bool,
  fmt: Format,
  precision: lax.Precision | None,
  dtype: np.dtype,
) -> jax.Array:
  """qqmm(a^T, b^T), both quantized along the rows they are summed over."""
  amax = None
  if global_scale is not None:
    # Over every axis along which b's global scale is one number.
    axes = [i for i in range(a.ndim) if i >= a.ndim - 2 or global_scale.shape[i] == 1]
    magnitude = jnp.abs(a.astype(jnp.float32))
    amax = jnp.max(magnitude, axis=axes, initial=0, keepdims=True).squeeze((-1, -2))
  return _primitive.qqmm(
    Operands(
      _whole_groups(jnp.swapaxes(a, -1, -2), fmt),
      _whole_groups(jnp.swapaxes(b, -1, -2), fmt),
      None,
      amax,
      global_scale,
    ),
    mode=fmt.mode,
    out_dtype=np.dtype(jnp.float32) if sums_follow else dtype,
    backward="quantized",
    precision=precision,
  )


def _whole_groups(a: jax.Array, fmt: Format) -> jax.Array:
  """Zeros up to a multiple of the group size along the last axis."""
  missing = -a.shape[-1] % fmt.group_size
  return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]) if missing else a


def _dequantized_for(dtype: np.dtype, ops: Operands, fmt: Format) -> jax.Array:
  """Packed w without its global scale, to be multiplied with an operand of this dtype.

  bfloat16 holds such a w exactly, so that it can meet a bfloat16 operand on the matrix units.
  """
  w = dequantize_packed(ops.w, ops.scales, fmt)
  return w.astype(dtype) if dtype == jnp.bfloat16 else w


# Registrations

ad.primitive_jvps[qqmm_p] = _jvp

qqmm_tangent_p.def_impl(functools.partial(xla.apply_primitive, qqmm_tangent_p))
qqmm_tangent_p.def_abstract_eval(_primitive.abstract_eval)
ad.primitive_jvps[qqmm_tangent_p] = _tangent_jvp
ad.primitive_transposes[qqmm_tangent_p] = _transpose
batching.primitive_batchers[qqmm_tangent_p] = functools.partial(_primitive.batch, qqmm_tangent_p)
mlir.register_lowering(
  qqmm_tangent_p, mlir.lower_fun(_tangent_product, multiple_results=False), inline=False
)
