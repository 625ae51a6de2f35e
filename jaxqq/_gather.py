"""`gather_qqmm`: products of matrices of x and w that indices name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxqq._checks import as_int32, check_bool, describe
from jaxqq._formats import Mode
from jaxqq._given import DEFAULT_MODE, Given
from jaxqq._gradient import Backward
from jaxqq._out_sharding import OutSharding, checked_out_sharding, told
from jaxqq._qqmm import checked, is_by_rows
from jaxqq._ragged import as_ragged, check_groups_are_known, checked_integers, ragged_product
from jaxqq._ragged_explicit import batch_dims, mesh_of, spec_of
from jaxqq._reference import Operands, unflatten, with_ndim
from jaxqq._weight import QuantizedWeight


def gather_qqmm(
  x: ArrayLike,
  w: ArrayLike | QuantizedWeight,
  scales: ArrayLike | None = None,
  lhs_indices: ArrayLike | None = None,
  rhs_indices: ArrayLike | None = None,
  group_size: int | None = None,
  bits: int | None = None,
  mode: Mode = DEFAULT_MODE,
  global_scale_x: ArrayLike | Literal["amax", "row"] | None = None,
  global_scale_w: ArrayLike | Literal["amax"] | None = None,
  *,
  sorted_indices: bool = False,
  backward: Backward = "straight_through",
  precision: lax.PrecisionLike = None,
  preferred_element_type: DTypeLike | None = None,
  out_sharding: OutSharding = None,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies matrices of x and w that indices name: `qqmm` of x[lhs_indices], w[rhs_indices].

  out[i, m, n] = sum_k x_hat[lhs[i], m, k] * w_hat[rhs[i], n, k], where lhs and rhs count the
  matrices of x and w, their batch axes flattened. No matrix of w is copied: matrices of x are
  sorted by that of w, and multiplied in groups by `ragged_qqmm`, whose gradients it has, those of
  `lhs_indices` and `rhs_indices` being none.

  An index is as of `jnp.take`: negative ones count from the end, and for one that is not there the
  result is NaN, since under jit there is nobody to tell.

  Args:
    x: float32, float16 or bfloat16, (..., M, K), K a multiple of the group size.
    w: (..., N, K), unquantized, or packed beside scales, or a `QuantizedWeight`, as for `qqmm`.
    scales: for packed w only, (..., N, K / group_size), as for `qqmm`.
    lhs_indices: integers of any shape, which broadcasts with that of rhs_indices: which matrix of
      x, in the order of its batch axes flattened. None is each in turn, of the shape of x's batch
      axes.
    rhs_indices: likewise of w.
    group_size: the mode's own, or None.
    bits: the mode's own, or None.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    global_scale_x: nvfp4 only: a scalar, the amax of x, or one for all that is multiplied with each
      matrix of w, of the shape of w's batch axes; "amax" or "row" as for `qqmm`. With
      global_scale_w or not at all.
    global_scale_w: nvfp4 only: a scalar, or one for each matrix, of the shape of w's batch axes;
      "amax", of unquantized w only, takes one from each matrix.
    sorted_indices: whether rhs_indices, broadcast and flattened, never decrease, counted from the
      start: then nothing is sorted. Where that is not so, the result is wrong without a word.
    backward: as for `ragged_qqmm`, a group being all that is multiplied with one matrix of w.
    precision: as for `qqmm`.
    preferred_element_type: float32, float16 or bfloat16: the dtype of the result. None is x's.
    out_sharding: where the result goes, as for `qqmm`. On explicit axes indices say how the first
      axes of the result are split, or where there are none, batch axes; M and N are split as in x
      and w. What that leaves open, as K that is split in both, is told here.
    implementation: what computes it, as for `ragged_qqmm`.

  Returns:
    The shape of the indices, broadcast, + (M, N).

  Raises:
    TypeError: an argument has a dtype, or is of a type, that it may not be.
    ValueError: mode, group_size, bits, backward, implementation or a shape is not as above; scales
      without packed w or packed w without scales; one global scale of two; what a `QuantizedWeight`
      brings, given once more. Or, when lowered: `implementation` cannot compute it on that
      platform.

  Example:
    >>> x = jnp.ones((5, 1, 64))  # five tokens
    >>> w = jnp.ones((3, 32, 64)) * jnp.arange(3.0)[:, None, None]
    >>> experts = jaxqq.quantize_weight(w, "mxfp8")
    >>> chosen = jnp.array([[2, 1], [0, 1], [1, 1], [0, 2], [2, 0]])
    >>> out = jaxqq.gather_qqmm(x, experts, None, jnp.arange(5)[:, None], chosen)
    >>> out.shape, out[0, :, 0, 0].tolist()
    ((5, 2, 1, 32), [128.0, 64.0])

  Source: `mlx.core.gather_qqmm`, which has no gradient.
  """
  function = "gather_qqmm"
  given = Given(
    x,
    w,
    scales,
    group_size=group_size,
    bits=bits,
    mode=mode,
    global_scale_x=global_scale_x,
    global_scale_w=global_scale_w,
    backward=backward,
    precision=precision,
    preferred_element_type=preferred_element_type,
    broadcasts=False,
  )
  operands, params = checked(function, given)
  is_sorted = check_bool(function, "sorted_indices", sorted_indices)
  if len(operands.x.shape) < 2:
    raise ValueError(
      f"{function}: x must have at least two dimensions, (M, K) or (..., M, K), got "
      f"{describe(operands.x)}."
    )
  of_x = _scale_of_x(function, global_scale_x, operands)
  operands = dataclasses.replace(operands, global_scale_x=of_x)
  check_groups_are_known(function, operands.w.shape)
  lhs, rhs = _checked_indices(function, lhs_indices, rhs_indices, operands)
  by_rows, names = is_by_rows(global_scale_x), operands.names

  def of_arrays(lhs: jax.Array, rhs: jax.Array, *arrays: jax.Array) -> jax.Array:
    own = unflatten(names, arrays)
    return _gathered(own, params, lhs, rhs, is_sorted, by_rows, implementation)

  out_sharding = checked_out_sharding(function, out_sharding)
  arrays = (lhs, rhs, *map(jnp.asarray, operands.flatten()))
  mesh = mesh_of([jax.typeof(a) for a in arrays])
  if out_sharding is None and mesh.explicit_axes:  # sorted, gathered and put back
    indices = {"lhs": lhs, "rhs": rhs}
    has_indices = {
      name for name, a in (("lhs", lhs_indices), ("rhs", rhs_indices)) if a is not None
    }
    spec = _spec_of_types(function, operands, indices, has_indices)
    out_sharding = NamedSharding(mesh, spec)
  return told(of_arrays, out_sharding, *arrays)


def _spec_of_types(
  function: str, operands: Operands, indices: dict[str, jax.Array], has_indices: set[str]
) -> PartitionSpec:
  """How the result is split. Indices that are not given are those of batch axes."""
  batch = batch_dims(indices["lhs"].ndim)
  typed = []
  for name, a, dims, of in (("x", operands.x, "mk", "lhs"), ("w", operands.w, "nk", "rhs")):
    aval = jax.typeof(jnp.asarray(a))
    count = aval.ndim - 2
    own = "." * count
    if of not in has_indices:
      axes = zip(batch[len(batch) - count :], aval.shape, strict=False)
      own = "".join("." if size == 1 else dim for dim, size in axes)
    typed.append((name, aval, own + dims))
  typed += [(f"{name}_indices", jax.typeof(a), batch) for name, a in indices.items()]
  return spec_of(function, typed, batch + "mn", "k")


def _gathered(
  operands: Operands,
  params: dict[str, Any],
  lhs: jax.Array,
  rhs: jax.Array,
  is_sorted: bool,
  by_rows: bool,
  implementation: Any,
) -> jax.Array:
  """Matrices of x in the order of those of w, multiplied in groups, and put back in their own."""
  flat = _flat(operands)
  (_, m, k), matrices = flat.x.shape, flat.w.shape[0]
  shape, (lhs, rhs) = lhs.shape, (a.reshape(-1) for a in (lhs, rhs))
  rhs = jnp.where(rhs < 0, rhs + matrices, rhs)
  is_there = (rhs >= 0) & (rhs < matrices)
  rhs = jnp.where(is_there, rhs, matrices)  # what is not there comes last, and is in no group
  counts = jnp.zeros(matrices, jnp.int32).at[rhs].add(1, mode="drop")
  order = None if is_sorted else jnp.argsort(rhs, stable=True)
  matrices_of_x = jnp.asarray(flat.x)
  if not isinstance(flat.x.shape[0], int) or flat.x.shape[0]:
    of_lhs = lhs if order is None else lhs[order]
    x = matrices_of_x.at[of_lhs].get(mode="fill", fill_value=jnp.nan)
  else:  # of none XLA takes none
    x = jnp.full((*lhs.shape, m, k), jnp.nan, matrices_of_x.dtype)
  rows = dataclasses.replace(flat, x=x.reshape(lhs.shape[0] * m, k))
  product = as_ragged("gather_qqmm", rows, params, counts * m, jnp.int32(0), implementation)
  out = ragged_product(*product, by_rows=by_rows)
  out = out.reshape(lhs.shape[0], m, out.shape[-1])
  if order is not None:
    out = out.at[jnp.argsort(order)].get(mode="promise_in_bounds", unique_indices=True)
  out = jnp.where(is_there[:, None, None], out, jnp.array(jnp.nan, out.dtype))
  return out.reshape(*shape, *out.shape[1:])


def _flat(operands: Operands) -> Operands:
  """x (matrices, M, K) and w (matrices, N, K), batch axes flattened."""
  of_x, of_w = (math.prod(a.shape[:-2]) for a in (operands.x, operands.w))
  each = tuple(operands.w.shape[:-2])

  def flat(a: Any, count: int, own: int) -> Any:
    return None if a is None else jnp.reshape(a, (count, *a.shape[len(a.shape) - own :]))

  def scale(a: Any) -> Any:
    return a if a is None or tuple(a.shape) != each else jnp.reshape(a, of_w)

  return Operands(
    flat(operands.x, of_x, 2),
    flat(operands.w, of_w, 2),
    flat(operands.scales, of_w, 2),
    scale(operands.global_scale_x),
    scale(operands.global_scale_w),
    row_scales=flat(operands.row_scales, of_w, 1),
  )


def _scale_of_x(function: str, given: Any, operands: Operands) -> Any:
  """One for all of x, or for all that is multiplied with one matrix of w."""
  scale, of_w = operands.global_scale_x, tuple(operands.w.shape[:-2])
  if scale is None or not scale.shape:
    return scale
  if isinstance(given, str):  # the amax of each matrix
    return jnp.max(scale)
  if tuple(scale.shape) != of_w:
    raise ValueError(
      f"{function}: global_scale_x must be a float32 scalar, the amax of x, or one for each matrix "
      f"of w, {of_w}, got {describe(scale)}."
    )
  return scale


def _checked_indices(
  function: str, lhs: Any, rhs: Any, operands: Operands
) -> tuple[jax.Array, jax.Array]:
  """int32, of one shape."""
  indices = []
  for name, given, a in (("lhs", lhs, operands.x), ("rhs", rhs, operands.w)):
    batch = tuple(a.shape[:-2])
    if given is None:
      given = jnp.arange(math.prod(batch), dtype=jnp.int32).reshape(batch)
    words = f"which matrix of {'x' if name == 'lhs' else 'w'}"
    given = checked_integers(function, f"{name}_indices", given, words)
    indices.append(as_int32(given))
  try:
    shape = lax.broadcast_shapes(*(a.shape for a in indices))
  except ValueError:
    shapes = " and ".join(str(a.shape) for a in indices)
    raise ValueError(
      f"{function}: lhs_indices and rhs_indices must broadcast, got shapes {shapes} (without "
      "indices, those of the batch axes)."
    ) from None
  of_lhs, of_rhs = (jnp.broadcast_to(with_ndim(a, len(shape)), shape) for a in indices)
  return of_lhs, of_rhs
