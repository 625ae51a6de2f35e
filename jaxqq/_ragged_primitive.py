"""The ragged product as primitives of JAX, and their derivatives.

`ragged_qqmm` multiplies each row of x with the matrix w of its group, and sums over k or, as dx
needs it, over n. `ragged_row_sums` sums products of rows over each group, as dw needs it:

    out[i, n] = sum_k x[i, k] w[g(i), n, k]
    out[i, k] = sum_n x[i, n] w[g(i), n, k]
    out[g, n, k] = sum_{i in g} x[i, n] y[i, k]

Where nothing is quantized, each is linear in either operand, and its transpose is another one of
the three: so derivatives of every order stay these primitives. Where operands are quantized, the
tangent is that of `_gradient.py`, straight-through: of the unquantized operands, or through the
dequantized w that came packed. With backward="quantized" the transposes of the tangent quantize
both operands anew, along n for dx and along the rows of each group for dw, zero-padded to whole
groups; what they compute is differentiated straight-through. Rows of no group have results and
gradients of zero.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxqq import _kernels, _primitive, _rounding
from jaxqq._formats import FORMATS, Format
from jaxqq._global_scales import scale_that_reaches, unscaled
from jaxqq._gradient import is_zero, refuse_gradient_of_packed, summed_to
from jaxqq._kernels.problem import Contracted, RaggedProblem, obstacle
from jaxqq._kernels.ragged import RAGGED
from jaxqq._ragged_explicit import out_sharding, over_explicit_axes, with_batch
from jaxqq._ragged_reference import NUM_AXES, RaggedOperands, in_groups, unflatten
from jaxqq._ragged_split import Layout, layout_of, partitioned
from jaxqq._sharding import vary_alike

ragged_qqmm_p = Primitive("ragged_qqmm")
ragged_row_sums_p = Primitive("ragged_row_sums")


@dataclasses.dataclass(frozen=True)
class Params:
  """Those of `ragged_qqmm`. Those of `ragged_row_sums` are the same, of which it needs fewer."""

  mode: str
  out_dtype: np.dtype
  precision: jax.lax.Precision | None
  backward: str = "straight_through"  # what the transposes of its tangent are
  contracted: Contracted = "k"
  quantize: bool = True  # x, and an unpacked w, along the contracted axis
  quantize_w: bool = False  # w alone, along k, unless it is packed
  wrt: str | None = None  # of a tangent, the operand that it is the tangent of
  groups: int = 0  # of ragged_row_sums: how many matrices there are
  function: str = "ragged_qqmm"  # whose product it is, for errors
  implementation: str | None = None  # that a caller asks for: the beginning of a name

  @property
  def implementation_of_gradients(self) -> str | None:
    """XLA computes those of what it was asked to compute; others are computed by what can."""
    is_xla = self.implementation is not None and "xla".startswith(self.implementation)
    return self.implementation if is_xla else None

  @property
  def fmt(self) -> Format:
    return FORMATS[self.mode]


def ragged_qqmm(operands: RaggedOperands, params: Params) -> jax.Array:
  return _bind(ragged_qqmm_p, operands, params)


def _row_sums(operands: RaggedOperands, params: Params) -> jax.Array:
  return _bind(ragged_row_sums_p, operands, params)


def _bind(primitive: Primitive, operands: RaggedOperands, params: Params) -> jax.Array:
  arrays = vary_alike([jnp.asarray(a) for a in operands.flatten()])
  return primitive.bind(*arrays, operands=operands.names, params=params)


# Abstract evaluation


def problem_of(
  ops: RaggedOperands, params: Params, result_dtype: np.dtype | None = None
) -> RaggedProblem:
  """Of operands, or their shapes and dtypes; `result_dtype` as of `Problem.of`."""
  is_packed = ops.scales is not None
  if ops.y is not None:
    groups, n, k = params.groups, ops.x.shape[-1], ops.y.shape[-1]
    contracted: Contracted = "m"
    w_dtype = ops.y.dtype
  else:
    groups, n, k = ops.w.shape[-3:]
    k *= params.fmt.codes_per_word if is_packed else 1
    contracted, w_dtype = params.contracted, ops.w.dtype
  global_scales = [s for s in (ops.global_scale_x, ops.global_scale_w) if s is not None]
  return RaggedProblem(
    params.fmt,
    contracted,
    ops.x.shape[-2],
    groups,
    n,
    k,
    is_packed,
    params.quantize,
    params.quantize_w,
    np.dtype(ops.x.dtype),
    np.dtype(w_dtype),
    params.out_dtype,
    params.precision,
    params.function,
    math.prod(ops.batch_shape),
    result_dtype=result_dtype or params.out_dtype,
    has_global_scales=bool(global_scales),
    scales_by_group=_differs(ops.global_scale_x),
    scales_of_matrices=_differs(ops.global_scale_w),
    all_groups=ops.group_sizes.shape[-1],
    obstacle=(
      obstacle(ops.flatten(), ())
      if ops.row_scales is None
      else "global scales differ from row to row"
    ),
  )


def _differs(scales: Any) -> bool:
  """Whether there is one for each group."""
  return scales is not None and _primitive.has_several(scales.shape)


def _abstract_eval(*avals: Any, operands: tuple[str, ...], params: Params) -> Any:
  ops = unflatten(operands, avals)
  problem = problem_of(ops, params)
  rows = {"k": (problem.m, problem.n), "n": (problem.m, problem.k)}
  matrices = problem.groups, problem.n, problem.k
  shape = (*ops.batch_shape, *rows.get(problem.contracted, matrices))
  layout = with_batch(layout_of_problem(problem), len(ops.batch_shape))
  sharding = out_sharding(params.function, operands, avals, layout, problem.groups)
  manual = ops.x.manual_axis_type
  return jax.core.ShapedArray(shape, params.out_dtype, sharding=sharding, manual_axis_type=manual)


def layout_of_problem(problem: RaggedProblem) -> Layout:
  has_w_hat = problem.is_packed or problem.quantize_w
  return layout_of(problem.contracted, problem.fmt, quantize=problem.quantize, has_w_hat=has_w_hat)


# Lowering


def _lowering(ctx: Any, *args: Any, operands: tuple[str, ...], params: Params) -> Any:
  device = _kernels.device_of(_primitive.platform_of(ctx))
  shapes = unflatten(operands, ctx.avals_in)
  problem = problem_of(shapes, params)

  def product(ops: RaggedOperands, groups: int, out_dtype: np.dtype) -> jax.Array:
    own = dataclasses.replace(params, out_dtype=out_dtype)
    own = dataclasses.replace(own, groups=groups if ops.y is not None else 0)
    problem = problem_of(ops, own, params.out_dtype)
    return _kernels.plan(problem, device, RAGGED, chosen=params.implementation).run(ops)

  def whole(*values: jax.Array) -> jax.Array:
    return product(unflatten(operands, values), problem.groups, params.out_dtype)

  def zeros(*_: jax.Array) -> jax.Array:
    return jax.sharding.reshard(jnp.zeros(out.shape, out.dtype), out.sharding)

  (out,), sizes = ctx.avals_out, (problem.groups, problem.m)
  is_empty = 0 in (size for aval in (*ctx.avals_in, out) for size in aval.shape)
  run = whole
  if out.sharding.mesh.explicit_axes and is_empty:  # sums of nothing, or rows of no group
    run = zeros
  elif out.sharding.mesh.explicit_axes:
    layout = with_batch(layout_of_problem(problem), len(shapes.batch_shape))
    run = over_explicit_axes(product, operands, layout, *sizes, ctx.avals_in, out)
  elif not (is_empty or shapes.batch_shape) and _primitive.is_partitioned_by_xla(ctx):
    layout = layout_of_problem(problem)
    run = partitioned(product, operands, layout, *sizes, params.out_dtype, _label(params))
  return mlir.lower_fun(run, multiple_results=False)(ctx, *args)


def _label(params: Params) -> str:
  """What the lowering depends on, beside the operands."""
  precision = params.precision.name if params.precision else "default"
  words = [f"sum_{params.contracted}", params.mode, params.out_dtype.name, precision]
  words += ["quantized"] * params.quantize + ["weights"] * params.quantize_w
  words += [params.implementation] if params.implementation is not None else []
  return "_".join(("ragged", *words))


# Forward mode


def _jvp(
  primals: Any, tangents: Any, *, operands: tuple[str, ...], params: Params
) -> tuple[Any, Any]:
  """y' = x' w + x w', with w as it came, or dequantized where it came packed."""
  out = ragged_qqmm_p.bind(*primals, operands=operands, params=params)
  at, tangent = unflatten(operands, primals), unflatten(operands, tangents)
  refuse_gradient_of_packed(tangent.scales, params.function)
  terms = []
  for name in ("x", "w"):
    if is_zero(getattr(tangent, name)):
      continue
    keeps_w_hat = name == "x" and params.quantize_w
    own = dataclasses.replace(
      params,
      quantize=False,
      quantize_w=keeps_w_hat,
      wrt=name,
      implementation=params.implementation_of_gradients,
    )
    if params.wrt not in (None, name):
      own = dataclasses.replace(own, backward="straight_through")
    terms.append(ragged_qqmm(dataclasses.replace(at, **{name: getattr(tangent, name)}), own))
  return out, _total(terms, out)


def _row_sums_jvp(
  primals: Any, tangents: Any, *, operands: tuple[str, ...], params: Params
) -> tuple[Any, Any]:
  """Linear in either operand, and straight-through where they are quantized."""
  out = ragged_row_sums_p.bind(*primals, operands=operands, params=params)
  at, tangent = unflatten(operands, primals), unflatten(operands, tangents)
  at = dataclasses.replace(at, global_scale_x=None, global_scale_w=None)
  own = dataclasses.replace(params, quantize=False)
  terms = [
    _row_sums(dataclasses.replace(at, **{name: getattr(tangent, name)}), own)
    for name in ("x", "y")
    if not is_zero(getattr(tangent, name))
  ]
  return out, _total(terms, out)


def _total(terms: list[jax.Array], out: jax.Array) -> Any:
  if not terms:
    return ad.Zero(jax.typeof(out).to_tangent_aval())
  # A batch axis may come from a global scale alone.
  return functools.reduce(jnp.add, (jnp.broadcast_to(term, out.shape) for term in terms))


# Reverse mode


def _transpose(cotangent: Any, *args: Any, operands: tuple[str, ...], params: Params) -> list[Any]:
  """The cotangent of x or w, whichever a tangent is linear in; None for the others."""
  ops = unflatten(operands, args)
  wrt = "x" if ad.is_undefined_primal(ops.x) else "w"
  if is_zero(cotangent):
    return [None for _ in operands]
  target = getattr(ops, wrt).aval
  names = [name for name in operands if name != wrt]
  own = dataclasses.replace(params, wrt=None)

  def pull(cotangent: jax.Array, *values: jax.Array) -> jax.Array:
    of_wrt = _pulled_to_x if wrt == "x" else _pulled_to_w
    result = of_wrt(cotangent, unflatten(names, values), target, own)
    return summed_to(result, target.shape).astype(target.dtype)

  explicit = target.sharding.mesh.explicit_axes
  if explicit:  # what is summed may be split, and how is not told twice
    pull = jax.sharding.auto_axes(pull, axes=explicit, out_sharding=target.sharding)
  result = pull(cotangent, *(getattr(ops, name) for name in names))
  return [result if name == wrt else None for name in operands]


def _pulled_to_x(
  cotangent: jax.Array, ops: RaggedOperands, target: Any, params: Params
) -> jax.Array:
  """dx: a product of the cotangent with w, summed over its other axis."""
  ops = dataclasses.replace(ops, x=cotangent, global_scale_x=None)
  own = dataclasses.replace(
    params,
    contracted="n" if params.contracted == "k" else "k",
    out_dtype=_dtype_of(target, ops, target.shape[:-2]),
  )
  if params.backward == "quantized":
    of_w = ops.global_scale_w
    if ops.row_scales is not None:  # w_hat is quantized anew, under one for all rows
      of_w = jnp.max(ops.row_scales, axis=-1)
    w = ops.w if ops.scales is None else None
    of_g, of_w = _scales_to_quantize_anew(ops, of_w, w, ops.w.shape[-3], params.fmt)
    ops = dataclasses.replace(ops, global_scale_x=of_g, global_scale_w=of_w)
    own = dataclasses.replace(own, quantize=True, backward="straight_through")
  return ragged_qqmm(ops, own)


def _pulled_to_w(
  cotangent: jax.Array, ops: RaggedOperands, target: Any, params: Params
) -> jax.Array:
  """dw: sums over the rows of each group, of cotangent times x."""
  of_n, of_k = (cotangent, ops.x) if params.contracted == "k" else (ops.x, cotangent)
  rows = RaggedOperands(ops.group_sizes, ops.group_offset, of_n, y=of_k)
  own = dataclasses.replace(
    params,
    groups=target.shape[-3],
    quantize=False,
    quantize_w=False,
    backward="straight_through",
    out_dtype=_dtype_of(target, rows, target.shape[:-3]),
  )
  if params.backward == "quantized":
    of_x = ops.global_scale_x
    of_g, of_x = _scales_to_quantize_anew(rows, of_x, of_k, own.groups, params.fmt)
    rows = dataclasses.replace(rows, global_scale_x=of_g, global_scale_w=of_x)
    own = dataclasses.replace(own, quantize=True)
  return _row_sums(rows, own)


def _dtype_of(target: Any, ops: RaggedOperands, batch: tuple[int, ...]) -> np.dtype:
  """The cotangent's, unless batch axes are summed over afterwards."""
  return np.dtype(target.dtype if ops.batch_shape == batch else jnp.float32)


def _scales_to_quantize_anew(
  ops: RaggedOperands,  # x names the cotangent
  of_other: jax.Array | None,  # the global scale of w or of x
  other: jax.Array | None,  # w or x, unless it is packed
  groups: int,
  fmt: Format,
) -> tuple[jax.Array | None, jax.Array | None]:
  """Global scales of the cotangent and of the other operand: (..., 1) or (..., groups).

  The cotangent's is its amax. Without global scales, each operand whose amax is below 1 gets one,
  a power of two times 2688. Rows of no group count for nothing.
  """
  if not fmt.has_global_scale:
    return None, None
  rows = in_groups(ops, groups)[..., None]
  of_g = _amax_of_rows(ops.x, rows)
  if of_other is not None:
    return of_g, of_other
  if other is None:
    return scale_that_reaches(of_g, fmt), unscaled(fmt)[None]
  if other is ops.y:
    amax = _amax_of_rows(other, rows)
  else:
    amax = _rounding.amax(other, (-3, -2, -1), keepdims=False)[..., None]
  return scale_that_reaches(of_g, fmt), scale_that_reaches(amax, fmt)


def _amax_of_rows(a: jax.Array, keep: jax.Array) -> jax.Array:
  """(..., 1): over (..., m, k) without the rows that are not kept, (..., m, 1)."""
  ndim = max(a.ndim, keep.ndim)
  a, keep = (b.reshape((1,) * (ndim - b.ndim) + b.shape) for b in (a, keep))
  kept = jnp.where(keep, a, jnp.zeros((), a.dtype))
  return _rounding.amax(kept, (ndim - 2, ndim - 1))[..., None]


def _row_sums_transpose(
  cotangent: Any, *args: Any, operands: tuple[str, ...], params: Params
) -> list[Any]:
  """The cotangent (..., groups, n, k) of rows of x times y: a product of the other rows with it."""
  ops = unflatten(operands, args)
  wrt = "x" if ad.is_undefined_primal(ops.x) else "y"
  if is_zero(cotangent):
    return [None for _ in operands]
  target, other = getattr(ops, wrt).aval, ops.y if wrt == "x" else ops.x
  rows = RaggedOperands(ops.group_sizes, ops.group_offset, other, cotangent)
  own = dataclasses.replace(
    params,
    out_dtype=np.dtype(jnp.float32),
    contracted="k" if wrt == "x" else "n",
    groups=0,
  )
  result = summed_to(ragged_qqmm(rows, own), target.shape).astype(target.dtype)
  return [result if name == wrt else None for name in operands]


# Registrations

for _primitive_p, _rule, _back in (
  (ragged_qqmm_p, _jvp, _transpose),
  (ragged_row_sums_p, _row_sums_jvp, _row_sums_transpose),
):
  _primitive_p.def_impl(functools.partial(xla.apply_primitive, _primitive_p))
  _primitive_p.def_abstract_eval(_abstract_eval)
  ad.primitive_jvps[_primitive_p] = _rule
  ad.primitive_transposes[_primitive_p] = _back
  batching.primitive_batchers[_primitive_p] = functools.partial(
    _primitive.batch, _primitive_p, num_axes=NUM_AXES.__getitem__
  )
  _primitive.register_lowering(_primitive_p, _lowering)
