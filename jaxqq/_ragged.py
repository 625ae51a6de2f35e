"""The public products of rows in groups: each group of rows of x has a matrix w of its own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from jaxqq._checks import as_array, as_int32, describe
from jaxqq._formats import Mode
from jaxqq._given import DEFAULT_MODE, Given
from jaxqq._gradient import Backward
from jaxqq._kernels.ragged import RAGGED
from jaxqq._out_sharding import OutSharding
from jaxqq._qqmm import (
  NAME,
  check_implementation,
  checked,
  is_by_rows,
  placed_product,
  product_by_rows,
)
from jaxqq._ragged_primitive import Params
from jaxqq._ragged_primitive import ragged_qqmm as bind
from jaxqq._ragged_reference import RaggedOperands, unflatten
from jaxqq._reference import Operands
from jaxqq._weight import QuantizedWeight


def ragged_qqmm(
  x: ArrayLike,
  w: ArrayLike | QuantizedWeight,
  group_sizes: ArrayLike,
  scales: ArrayLike | None = None,
  group_size: int | None = None,
  bits: int | None = None,
  mode: Mode = DEFAULT_MODE,
  global_scale_x: ArrayLike | Literal["amax", "row"] | None = None,
  global_scale_w: ArrayLike | Literal["amax"] | None = None,
  *,
  group_offset: ArrayLike | None = None,
  backward: Backward = "straight_through",
  precision: lax.PrecisionLike = None,
  preferred_element_type: DTypeLike | None = None,
  out_sharding: OutSharding = None,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies rows of x in groups, each group by a matrix w of its own: `qqmm` for experts.

  out[i, n] = sum_k x_hat[i, k] * w_hat[g, n, k], where row i is in group g: the first
  group_sizes[0] rows of x are group 0, the next group_sizes[1] rows group 1, and so on. Rows past
  the sum of group_sizes are 0 in the result, whatever x has there. x_hat, w_hat and the sum are
  those of `qqmm`. Groups are found on the device, and one without rows costs nothing.

  It is one primitive of JAX, `ragged_qqmm`, and composes with jit, grad, vmap, scan, remat and
  shard_map. Policies of `jax.checkpoint` know the result by the name "qqmm".

  Args:
    x: float32, float16 or bfloat16, (M, K), sorted by group; K a multiple of the group size of the
      mode.
    w: (G, N, K), float32, float16 or bfloat16, not necessarily x's: quantized on the fly, and
      receives gradients. Or uint32, (G, N, K * bits / 32), as `quantize` packs it. Or a
      `QuantizedWeight` (G, N, K), which brings scales, mode and global_scale_w.
    group_sizes: integers, (G,): how many rows of x each group has. Values are not checked: a size
      below 0 counts as 0, and of sizes that add up to more than M the groups end with row M.
    scales: for packed w only, (G, N, K / group_size), as for `qqmm`.
    group_size: the mode's own, or None; not to be taken for group_sizes.
    bits: the mode's own, or None.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    global_scale_x: nvfp4 only: a scalar, the amax of x, or one for each group, (G,), by which the
      rows of that group are quantized; "amax" takes it from all of x, rows of no group included;
      "row" as for `qqmm`. With global_scale_w or not at all.
    global_scale_w: nvfp4 only: a scalar, the amax of w, or one for each matrix, (G,). "amax", of
      unquantized w only, takes one from each matrix.
    group_offset: an integer, of shape () or (1,): the group of w[0]. Then w may have fewer matrices
      than there are groups, say those of one device of many: rows of the groups that it lacks are 0
      in the result, so that the sum over devices is the whole. None is 0, and w has all groups.
    backward: "straight_through": dx[i] = g[i] w[group of i] and dw[g] = sum of g[i]^T x[i] over the
      rows of group g, of the unquantized operands. "quantized": both are quantized again, along N
      for dx, and for dw along the rows of each group, zero-padded to whole groups of the mode;
      global scales as for `qqmm`, the cotangent's being one for all of its rows that have a group.
      For packed w, which receives no gradient, dx is taken through the dequantized w. A group
      without rows has a gradient of 0, as has a row of no group.
    precision: as for `qqmm`.
    preferred_element_type: float32, float16 or bfloat16: the dtype of the result. None is x's.
    out_sharding: where the result goes, as for `qqmm`. On explicit axes it is needed where x and w
      are both split along K, or M of x and N of w over one axis of the mesh. Rows of the result are
      split as those of x, columns as those of w; experts may be split over any axis.
    implementation: what computes the product, by its name in `explain` or the beginning of one:
      "hopper", "hopper_skinny", "xla". Where it cannot, lowering fails and says why. "xla" computes
      the gradients, too; those of the others are computed by the first that can. None takes the
      first that can.

  Returns:
    (M, N).

  Raises:
    TypeError: an argument has a dtype, or is of a type, that it may not be.
    ValueError: mode, group_size, bits, backward, implementation or a shape is not as above; scales
      without packed w or packed w without scales; one global scale of two; what a `QuantizedWeight`
      brings, given once more. Or, when lowered: `implementation` cannot compute it on that
      platform.

  Example:
    >>> x, w = jnp.full((6, 64), 3.0), jnp.ones((3, 8, 64)) * jnp.arange(3.0)[:, None, None]
    >>> out = jaxqq.ragged_qqmm(x, w, jnp.array([2, 0, 3]), mode="mxfp8")
    >>> out[:, 0].tolist()  # of w[0], w[2], and no group
    [0.0, 0.0, 384.0, 384.0, 384.0, 0.0]
    >>> experts = jaxqq.quantize_weight(w)
    >>> jaxqq.ragged_qqmm(x, experts, jnp.array([1, 2, 3])).shape
    (6, 8)

  Source: `jax.lax.ragged_dot`, whose rhs is (G, K, N).
  """
  function = "ragged_qqmm"
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
    implementation=implementation,
  )
  operands, params = checked_ragged(function, given, group_sizes, group_offset)
  by_rows = is_by_rows(global_scale_x)
  return placed_ragged(function, operands, params, out_sharding, by_rows=by_rows)


def ragged_quantized_matmul(
  x: ArrayLike,
  w: ArrayLike | QuantizedWeight,
  group_sizes: ArrayLike,
  scales: ArrayLike | None = None,
  group_size: int | None = None,
  bits: int | None = None,
  mode: Mode = DEFAULT_MODE,
  global_scale: ArrayLike | Literal["amax"] | None = None,
  *,
  group_offset: ArrayLike | None = None,
  precision: lax.PrecisionLike = None,
  preferred_element_type: DTypeLike | None = None,
  out_sharding: OutSharding = None,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies rows of x, as they are, in groups, each by a block-quantized matrix of its own.

  out[i, n] = sum_k x[i, k] * w_hat[g, n, k], where row i is in group g, as of `ragged_qqmm`; x is
  not quantized, as of `quantized_matmul`. Rows past the sum of group_sizes are 0 in the result.

  The gradients are dx[i] = g[i] w_hat[group of i], which is exact, and of an unquantized w
  dw[g] = sum of g[i]^T x[i] over the rows of group g, straight-through. A packed w receives none.

  Args:
    x: float32, float16 or bfloat16, (M, K), sorted by group; K a multiple of the group size of w.
    w: (G, N, K), unquantized, packed beside scales, or a `QuantizedWeight`, as for `ragged_qqmm`.
    group_sizes: integers, (G,), as for `ragged_qqmm`.
    scales: for packed w only, (G, N, K / group_size), as for `qqmm`.
    group_size: the mode's own, or None; not to be taken for group_sizes.
    bits: the mode's own, or None.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    global_scale: nvfp4 only: a scalar, the amax of w, or one for each matrix, (G,). "amax", of
      unquantized w only, takes one from each matrix.
    group_offset: the group of w[0], as for `ragged_qqmm`.
    precision: as for `quantized_matmul`.
    preferred_element_type: float32, float16 or bfloat16: the dtype of the result. None is x's.
    out_sharding: where the result goes, as for `ragged_qqmm`.
    implementation: what computes it, as for `ragged_qqmm`.

  Returns:
    (M, N).

  Raises:
    TypeError: an argument has a dtype, or is of a type, that it may not be.
    ValueError: mode, group_size, bits, implementation or a shape is not as above; scales without
      packed w or packed w without scales; what a `QuantizedWeight` brings, given once more. Or,
      when lowered: `implementation` cannot compute it on that platform.

  Example:
    >>> x, experts = jnp.full((6, 64), 3.25), jaxqq.quantize_weight(jnp.ones((3, 8, 64)), "mxfp4")
    >>> out = jaxqq.ragged_quantized_matmul(x, experts, jnp.array([2, 0, 3]))
    >>> out[:, 0].tolist()  # 64 * 3.25
    [208.0, 208.0, 208.0, 208.0, 208.0, 0.0]

  Source: `jax.lax.ragged_dot`, and `mlx.core.quantized_matmul` with transpose=True.
  """
  function = "ragged_quantized_matmul"
  given = Given(
    x,
    w,
    scales,
    group_size=group_size,
    bits=bits,
    mode=mode,
    global_scale_w=global_scale,
    precision=precision,
    preferred_element_type=preferred_element_type,
    implementation=implementation,
    quantize_input=False,
  )
  operands, params = checked_ragged(function, given, group_sizes, group_offset)
  return placed_ragged(function, operands, params, out_sharding)


def placed_ragged(
  function: str,
  operands: RaggedOperands,
  params: Params,
  out_sharding: OutSharding,
  *,
  by_rows: bool = False,
) -> jax.Array:
  """What `checked_ragged` returns, multiplied, where out_sharding says."""
  multiply = functools.partial(ragged_product, by_rows=by_rows)
  return placed_product(function, operands, params, out_sharding, multiply, unflatten)


def ragged_product(operands: RaggedOperands, params: Params, *, by_rows: bool = False) -> jax.Array:
  """What `checked_ragged` returns, multiplied, and named."""
  if not by_rows:
    return checkpoint_name(bind(operands, params), NAME)

  def multiply(moved: Operands, changed: dict[str, Any]) -> jax.Array:
    own = dataclasses.replace(params, out_dtype=changed["out_dtype"])
    return bind(dataclasses.replace(operands, x=moved.x), own)

  named = {"mode": params.mode, "out_dtype": params.out_dtype}
  return product_by_rows(Operands(operands.x, operands.w), named, multiply)


def checked_ragged(
  function: str, given: Given, group_sizes: Any, group_offset: Any
) -> tuple[RaggedOperands, Params]:
  """The operands and the primitive's parameters, or the error that the caller should see."""
  x, w = as_array(function, "x", given.x), given.w
  if len(x.shape) != 2:
    raise ValueError(
      f"{function}: x must have two dimensions, (M, K), the rows of one group after the other, got "
      f"{describe(x)}."
    )
  if not isinstance(w, QuantizedWeight):
    w = as_array(function, "w", w)
  if len(w.shape) != 3:
    raise ValueError(
      f"{function}: w must have three dimensions, (G, N, K), a matrix for each group, got "
      f"{repr(w) if isinstance(w, QuantizedWeight) else describe(w)}."
    )
  check_groups_are_known(function, w.shape)
  group_sizes, group_offset = checked_groups(function, group_sizes, group_offset, w.shape[0])
  plain = dataclasses.replace(given, x=x, w=w, implementation=None)
  operands, params = checked(function, plain)
  return as_ragged(function, operands, params, group_sizes, group_offset, given.implementation)


def as_ragged(
  function: str,
  operands: Operands,  # x (M, K), w (G, N, K); a global scale for each group, or one
  params: dict[str, Any],
  group_sizes: jax.Array,
  group_offset: jax.Array,
  implementation: Any,
) -> tuple[RaggedOperands, Params]:
  """What `checked` returns, as the ragged product takes it, with an implementation of its own."""
  own = RaggedOperands(
    group_sizes,
    group_offset,
    operands.x,
    operands.w,
    operands.scales,
    _of_groups(operands.global_scale_x),
    _of_groups(operands.global_scale_w),
    operands.row_scales,
  )
  return own, Params(
    mode=params["mode"],
    out_dtype=params["out_dtype"],
    precision=params["precision"],
    backward=params["backward"],
    quantize=params["quantize_input"],
    quantize_w=not params["quantize_input"],
    function=function,
    implementation=check_implementation(function, implementation, RAGGED),
  )


def _of_groups(scale: Any) -> Any:
  """(1,) or (groups,) of () or (groups,)."""
  if scale is None or scale.shape:
    return scale
  return _converted(scale, (1,), jnp.float32)


def check_groups_are_known(function: str, shape: tuple[Any, ...]) -> None:
  """Of w; other sizes may be symbolic, of a program that is exported for any."""
  if not all(isinstance(size, int) for size in shape[:-2]):
    raise ValueError(
      f"{function}: the number of matrices of w must be known, got shape {shape}; M and N may be "
      "symbolic."
    )


def checked_groups(
  function: str, group_sizes: Any, group_offset: Any, matrices: int
) -> tuple[jax.Array, jax.Array]:
  """Sizes and offset as int32, of the shapes (groups,) and ()."""
  words = "how many rows of x each group has"
  group_sizes = checked_integers(function, "group_sizes", group_sizes, words)
  if len(group_sizes.shape) != 1:
    raise ValueError(
      f"{function}: group_sizes must have one dimension, ({matrices},), a size for each matrix of "
      f"w, got {describe(group_sizes)}."
    )
  count = group_sizes.shape[0]
  if group_offset is None and count != matrices:
    raise ValueError(
      f"{function}: group_sizes must have shape ({matrices},), a size for each matrix of w, got "
      f"{describe(group_sizes)}; only with group_offset may w have fewer matrices than there are "
      "groups."
    )
  if count < matrices:
    raise ValueError(
      f"{function}: group_sizes must have a size for each matrix of w, at least {matrices}, got "
      f"{describe(group_sizes)}."
    )
  sizes = _converted(group_sizes, (count,), jnp.int32)
  if group_offset is None:
    return sizes, jnp.int32(0)
  if isinstance(group_offset, int) and not isinstance(group_offset, bool):
    ends = np.iinfo(np.int32)
    group_offset = np.int32(min(max(group_offset, ends.min), ends.max))
  words = "the group of the first matrix of w"
  group_offset = checked_integers(function, "group_offset", group_offset, words)
  if tuple(group_offset.shape) not in ((), (1,)):
    raise ValueError(
      f"{function}: group_offset must have shape () or (1,), got {describe(group_offset)}."
    )
  return sizes, _converted(group_offset, (), jnp.int32)


def _converted(a: Any, shape: tuple[int, ...], dtype: Any) -> Any:
  """An array, or what `explain` is told of one."""
  if isinstance(a, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(shape, dtype)
  converted = as_int32(a) if dtype == jnp.int32 else jnp.asarray(a).astype(dtype)
  return converted.reshape(shape)


def checked_integers(function: str, name: str, a: Any, words: str) -> Any:
  a = as_array(function, name, a)
  if not jnp.issubdtype(a.dtype, jnp.integer):
    raise TypeError(f"{function}: {name} must be integers, {words}, got {describe(a)}.")
  return a
