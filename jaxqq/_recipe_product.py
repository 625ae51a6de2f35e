"""The products of a `Recipe`, as primitives of JAX with their derivatives.

    recipe_product    out[..., m, n] = sum_k x_hat[..., m, k] * w_hat[..., n, k]
    recipe_tangent    out[..., m, n] = sum_k x[..., m, k] * w[..., n, k]

The first quantizes its operands as the recipe says of one of its three products. Its tangent is
the straight-through one, x' w^T + x w'^T, each term a `recipe_tangent`, linear in one operand.
Transposed, that is a `recipe_product` again: of g and w for dx, and of g and x for dw. So forward
mode is straight-through, reverse mode is the recipe's, and derivatives of gradients are
straight-through.

Every matrix of a batch is a tensor of its own, with its own amax, and places that begin anew. A key
has streams for each operand of each product, and for the signs that the two operands of a product
share. By a recipe that says `from_forward`, w for dx and x for dw are first quantized as for the
forward product, by its streams, and what is left of them is multiplied.

Rows of zeros are added where an axis that is summed over is no whole number of groups or rotations.
What runs a product on a device `planned` says, by a table of rows as the plain product's. The last
row is the definition, plain jnp, which XLA splits over devices by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxqq import _kernels, _primitive, _random_bits
from jaxqq._formats import FORMATS
from jaxqq._gradient import is_zero, summed_to
from jaxqq._kernels.plan import Device, Implementation, Plan
from jaxqq._kernels.problem import RecipeProblem
from jaxqq._quantize import dequantize_groups, dequantize_to_multiply
from jaxqq._quantizer import (
  Quantizer,
  Streams,
  global_scale_of,
  quantized,
  random_of,
  rotated,
)
from jaxqq._recipe import PRODUCTS, Product, Recipe
from jaxqq._reference import Operands, matmul, times_alpha, unflatten, with_ndim
from jaxqq._rounding import Arithmetic, arithmetic_of
from jaxqq._sharding import out_aval, vary_alike
from jaxqq._split import forward

recipe_product_p = Primitive("recipe_product")
recipe_tangent_p = Primitive("recipe_tangent")


@dataclasses.dataclass(frozen=True)
class Params:
  """Those of both primitives."""

  recipe: Recipe
  out_dtype: np.dtype
  precision: lax.Precision | None
  product: Product = "forward"  # which of the recipe's
  wrt: str | None = None  # of a tangent, the operand that it is linear in
  implementation: str | None = None  # the caller's choice, of all three products

  @property
  def quantizers(self) -> tuple[Quantizer | None, Quantizer | None]:
    return self.recipe.of(self.product)

  @property
  def is_from_forward(self) -> bool:
    """Whether the second operand is what the forward product left of it."""
    return self.recipe.from_forward and self.product != "forward"


_STRAIGHT_THROUGH = Recipe()


def product_of_rows(operands: Operands, params: Params) -> jax.Array:
  """The product of x (..., k) and w (n, k), or batches of both, by one key (4,) or none.

  w may be transposed.

  Beside one matrix w all of x is one matrix. Each matrix of a batch has a key of its own.
  """
  x, w, key = operands.x, operands.w, operands.key
  rows, batch, transposed = x.shape[:-1], w.shape[:-2], operands.transposed
  if not batch:
    x = x.reshape(math.prod(rows), x.shape[-1])
    out = recipe_product(Operands(x, w, key=key, transposed=transposed), params)
    return out.reshape(*rows, operands.n)
  if not rows:
    x = x[None, :]
  if key is not None:
    whole = lax.broadcast_shapes(batch, x.shape[:-2])
    key = _random_bits.key_of_each(key, math.prod(whole)).reshape(*whole, _random_bits.WORDS)
  out = recipe_product(Operands(x, w, key=key, transposed=transposed), params)
  return out if rows else out.squeeze(-2)


def recipe_product(operands: Operands, params: Params) -> jax.Array:
  """The product, of x (..., m, k), w (..., n, k) and, where the recipe needs it, a key (..., 4)."""
  return _bind(recipe_product_p, operands, params)


def _tangent(operands: Operands, params: Params, wrt: str) -> jax.Array:
  return _bind(recipe_tangent_p, operands, dataclasses.replace(params, wrt=wrt))


def _bind(primitive: Primitive, operands: Operands, params: Params) -> jax.Array:
  arrays = vary_alike([jnp.asarray(a) for a in operands.flatten()])
  return primitive.bind(*arrays, operands=operands.names, params=params)


# What they compute


def planned(ops: Operands, params: Params, platform: str, why_not: str | None = None) -> Plan:
  """What runs a product on one device, of arrays or their shapes and dtypes.

  why_not: why no kernel may take it, such as that XLA splits its operands; or None.
  """
  if why_not is None and params.is_from_forward:
    why_not = "its second operand is what the forward product left of it"
  problem = RecipeProblem.of(params.quantizers, ops, params.out_dtype, params.precision, why_not)
  table = *_kernels.rows_of("recipe"), _definition_of(params, platform)
  device = _kernels.device_of(platform)
  return _kernels.plan(problem, device, table, chosen=params.implementation)


def run(ops: Operands, params: Params, platform: str, why_not: str | None = None) -> jax.Array:
  """The product as it is planned."""
  of_x_bits, of_w_bits, of_signs = _streams(ops, params)
  streams = Streams(of_x_bits, of_signs), Streams(of_w_bits, of_signs)
  plan = planned(ops, params, platform, why_not)
  return _finished(plan.kernel.run(ops, streams), ops, params)


def _definition_of(params: Params, platform: str) -> Implementation:
  def plan(problem: RecipeProblem, device: Device) -> _Definition:
    del problem, device
    return _Definition(params, platform)

  return Implementation(
    name="xla",
    summary="XLA, from the definition (jaxqq/_recipe_product.py)",
    platforms=None,
    plan=plan,
  )


@dataclasses.dataclass(frozen=True)
class _Definition:
  """Both operands quantized and dequantized, and multiplied with float32 sums."""

  params: Params
  platform: str
  details: str | None = None

  def run(self, ops: Operands, streams: tuple[Streams, Streams]) -> jax.Array:
    return _product(ops.untransposed(), self.params, self.platform, streams)


def _product(
  ops: Operands, params: Params, platform: str, streams: tuple[Streams, Streams]
) -> jax.Array:
  first, second = params.quantizers
  arithmetic = arithmetic_of(platform)
  if params.is_from_forward:
    ops = dataclasses.replace(ops, w=_left_by_forward(ops, params, arithmetic))
  x, w = _whole_groups(ops.x, ops.w, first, second)
  x_hat, of_x = _left_of(x, first, streams[0], arithmetic)
  w_hat, of_w = _left_of(w, second, streams[1], arithmetic)
  exact_in_16_bits = first is not None and second is not None
  if platform != "cpu" and exact_in_16_bits and _takes_16_bits(params):
    x_hat, w_hat = x_hat.astype(jnp.bfloat16), w_hat.astype(jnp.bfloat16)
  out = matmul(x_hat, jnp.swapaxes(w_hat, -1, -2))
  return times_alpha(out, of_x, of_w, FORMATS["nvfp4"], arithmetic=arithmetic)


def _streams(ops: Operands, params: Params) -> list[jax.Array | None]:
  """Those of the roundings of both operands and of the signs, where there are such."""
  first, second = params.quantizers
  needed = [
    first is not None and first.rounds_at_random,
    second is not None and second.rounds_at_random,
    first is not None and first.rotation is not None,  # as the second
  ]
  if ops.key is None or not any(needed):
    return [None] * len(needed)
  begin = len(needed) * PRODUCTS.index(params.product)
  keys = iter(_random_bits.streams(ops.key, [begin + i for i, n in enumerate(needed) if n]))
  return [next(keys) if is_needed else None for is_needed in needed]


def _takes_16_bits(params: Params) -> bool:
  """Matrix units may cut off sums, which 16-bit results allow for."""
  is_default = params.precision in (None, lax.Precision.DEFAULT)
  return params.out_dtype != jnp.float32 and is_default


def _finished(out: jax.Array, ops: Operands, params: Params) -> jax.Array:
  """Its shape, where a batch axis may come from the key alone, and dtype."""
  shape = ops.batch_shape + out.shape[-2:]
  return jnp.broadcast_to(with_ndim(out, len(shape)), shape).astype(params.out_dtype)


def _whole_groups(
  x: jax.Array, w: jax.Array, first: Quantizer | None, second: Quantizer | None
) -> tuple[jax.Array, jax.Array]:
  multiple = max(1 if q is None else q.multiple for q in (first, second))
  missing = -x.shape[-1] % multiple
  return (_with_zeros(x, missing), _with_zeros(w, missing)) if missing else (x, w)


def _with_zeros(a: jax.Array, count: int) -> jax.Array:
  return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, count)])


def _left_of(
  a: jax.Array,
  quantizer: Quantizer | None,
  streams: Streams,
  arithmetic: Arithmetic,
) -> tuple[jax.Array, jax.Array | None]:
  """What is left of an operand, in float32 without its global scale, and that, of each matrix."""
  if quantizer is None:
    return a, None
  codes, scales, global_scale = _quantized(a, quantizer, streams, arithmetic)
  return dequantize_to_multiply(codes, scales, FORMATS[quantizer.mode]), global_scale


def _left_by_forward(ops: Operands, params: Params, arithmetic: Arithmetic) -> jax.Array:
  """Of the second operand (..., k, n) of a gradient's product, or (..., k, m), in its dtype."""
  index = 1 if params.product == "dx" else 0
  quantizer = params.recipe.of("forward")[index]
  if quantizer is None:
    return ops.w
  rounding = _streams(ops, dataclasses.replace(params, product="forward"))[index]
  a = jnp.swapaxes(ops.w, -1, -2)
  k = a.shape[-1]
  padded = _with_zeros(a, -k % quantizer.multiple)
  codes, scales, global_scale = _quantized(padded, quantizer, Streams(rounding), arithmetic)
  hat = dequantize_groups(codes, scales, FORMATS[quantizer.mode], global_scale)
  if a.dtype != jnp.float32:
    hat = _rounded_to(hat, a.dtype)
  return jnp.swapaxes(hat[..., :k].astype(a.dtype), -1, -2)


def _rounded_to(a: jax.Array, dtype: Any) -> jax.Array:
  """float32 numbers that 16 bits hold. A conversion to them and back XLA drops; this it does not.

  `reduce_precision` makes subnormals zeros. Of float16 they are multiples of the smallest one.
  """
  info = jnp.finfo(dtype)
  rounded = lax.reduce_precision(a, info.nexp, info.nmant)
  if info.smallest_subnormal < np.finfo(np.float32).tiny:  # float32 flushes them, too
    return rounded
  unit = np.float32(info.smallest_subnormal)
  of_units = lax.round(a / unit, lax.RoundingMethod.TO_NEAREST_EVEN) * unit
  return jnp.where(jnp.abs(a) < np.float32(info.tiny), of_units, rounded)


def _quantized(
  a: jax.Array, quantizer: Quantizer, streams: Streams, arithmetic: Arithmetic
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Codes, scales, and the global scale of each matrix."""
  key, rotation_key = streams.rounding, streams.rotation
  keys = [own for own in (key, rotation_key) if own is not None]
  if keys and quantizer.needs_key:  # each makes a matrix of its own
    batch = lax.broadcast_shapes(a.shape[:-2], *(own.shape[:-1] for own in keys))
    a = jnp.broadcast_to(with_ndim(a, len(batch) + 2), batch + a.shape[-2:])
  if key is not None:
    key = key.reshape((1,) * (a.ndim - 1 - key.ndim) + key.shape)
  a = rotated(quantizer, a, rotation_key)
  global_scale = global_scale_of(quantizer, a, axes=(-2, -1))
  random = random_of(quantizer, key, a.shape)
  return *quantized(quantizer, a, global_scale, random, arithmetic), global_scale


def _tangent_product(
  ops: Operands, params: Params, platform: str, why_not: str | None = None
) -> jax.Array:
  del platform, why_not
  ops = ops.untransposed()
  return _finished(matmul(ops.x, jnp.swapaxes(ops.w, -1, -2)), ops, params)


# Abstract evaluation and lowering


def _abstract_eval(*avals: Any, operands: tuple[str, ...], params: Params) -> Any:
  return out_aval(unflatten(operands, avals), forward(None), params.out_dtype)


def _lowering(ctx: Any, *args: Any, compute: Any, operands: tuple[str, ...], params: Params) -> Any:
  platform, (out,) = _primitive.platform_of(ctx), ctx.avals_out
  splits = None
  if out.sharding.mesh.explicit_axes or _primitive.is_partitioned_by_xla(ctx):
    splits = "XLA splits its operands over devices"

  def whole(*values: jax.Array) -> jax.Array:
    return compute(unflatten(operands, values), params, platform, splits)

  if out.sharding.mesh.explicit_axes:  # the definition does not tell how each step is split
    whole = jax.sharding.auto_axes(whole, out_sharding=out.sharding)
  return mlir.lower_fun(whole, multiple_results=False)(ctx, *args)


# Derivatives


def _jvp(primals: Any, tangents: Any, *, operands: tuple[str, ...], params: Params) -> Any:
  """y' = x' w^T + x w'^T; only what is differentiated first has the recipe's transposes."""
  out = recipe_product_p.bind(*primals, operands=operands, params=params)
  of_tangents = params
  if params.product != "forward":
    of_tangents = dataclasses.replace(params, recipe=_STRAIGHT_THROUGH, product="forward")
  at, tangent = unflatten(operands, primals), unflatten(operands, tangents)
  terms = []
  for name in ("x", "w"):
    moved = getattr(tangent, name)
    if not is_zero(moved):
      terms.append(_tangent(dataclasses.replace(at, **{name: moved}), of_tangents, name))
  return out, _total(terms, out)


def _total(terms: list[jax.Array], out: jax.Array) -> Any:
  if not terms:
    return ad.Zero(jax.typeof(out).to_tangent_aval())
  return functools.reduce(jnp.add, terms)


def _tangent_jvp(primals: Any, tangents: Any, *, operands: tuple[str, ...], params: Params) -> Any:
  """The product rule: linear in one operand, and straight-through in the other."""
  out = recipe_tangent_p.bind(*primals, operands=operands, params=params)
  at, tangent = unflatten(operands, primals), unflatten(operands, tangents)
  terms = []
  for name in ("x", "w"):
    moved = getattr(tangent, name)
    if not is_zero(moved):
      own = params
      if name != params.wrt:
        own = dataclasses.replace(params, recipe=_STRAIGHT_THROUGH)
      terms.append(_tangent(dataclasses.replace(at, **{name: moved}), own, name))
  return out, _total(terms, out)


def _transpose(cotangent: Any, *args: Any, operands: tuple[str, ...], params: Params) -> list[Any]:
  """dx = g w or dw = g^T x, as the recipe quantizes them."""
  if is_zero(cotangent):
    return [None for _ in operands]
  ops = unflatten(operands, args)
  target = getattr(ops, str(params.wrt)).aval
  known = [None if ad.is_undefined_primal(a) else a for a in args]

  def pull(g: jax.Array, known: list[Any]) -> jax.Array:
    given = unflatten(operands, known)
    if params.wrt == "x":
      product: Product = "dx"
      transposed: tuple[str, ...] = () if "w" in given.transposed else ("w",)
      pair = Operands(g, given.w, key=given.key, transposed=transposed)
    else:
      product = "dw"
      transposed = ("x",) if "x" in given.transposed else ("x", "w")
      pair = Operands(g, given.x, key=given.key, transposed=transposed)
    is_whole = pair.batch_shape == target.shape[:-2]
    dtype = target.dtype if is_whole else np.dtype(jnp.float32)
    own = dataclasses.replace(params, product=product, out_dtype=dtype, wrt=None)
    out = recipe_product(pair, own)
    if params.wrt in given.transposed:
      out = jnp.swapaxes(out, -1, -2)
    return summed_to(out, target.shape).astype(target.dtype)

  if target.sharding.mesh.explicit_axes:  # what is summed may be split, and how is not told twice
    pull = jax.sharding.auto_axes(pull, out_sharding=target.sharding)
  return [pull(cotangent, known) if ad.is_undefined_primal(a) else None for a in args]


# Registrations

ad.primitive_jvps[recipe_product_p] = _jvp
ad.primitive_jvps[recipe_tangent_p] = _tangent_jvp
ad.primitive_transposes[recipe_tangent_p] = _transpose
for primitive, compute in ((recipe_product_p, run), (recipe_tangent_p, _tangent_product)):
  primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
  primitive.def_abstract_eval(_abstract_eval)
  batching.primitive_batchers[primitive] = functools.partial(_primitive.batch, primitive)
  _primitive.register_lowering(primitive, functools.partial(_lowering, compute=compute))
