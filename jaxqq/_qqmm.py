"""The public product: every check of the caller's input, then the primitive."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from jaxqq import _primitive
from jaxqq._checks import (
  FLOATS,
  PACKED,
  as_array,
  check_dtype,
  check_format,
  check_global_scale,
  check_groups,
  check_has_global_scale,
  check_out_dtype,
  check_packed,
  check_precision,
  describe,
  names,
)
from jaxqq._formats import FORMATS, Format, Mode
from jaxqq._given import DEFAULT_MODE, Given, is_default_mode
from jaxqq._global_scales import amax_of_each_matrix, by_rows, unscaled
from jaxqq._gradient import BACKWARDS, Backward
from jaxqq._kernels import IMPLEMENTATIONS
from jaxqq._kernels.plan import Implementation
from jaxqq._out_sharding import OutSharding, checked_out_sharding, errors_of, produced
from jaxqq._recipe import Recipe, checked_key, checked_recipe
from jaxqq._recipe_product import Params as RecipeParams
from jaxqq._recipe_product import product_of_rows
from jaxqq._reference import Operands, unflatten
from jaxqq._sharding import vary_alike
from jaxqq._weight import STACKED_LAYER, QuantizedWeight, StackedLayer

# By this name policies of `jax.checkpoint` save a product. It lowers to nothing.
NAME = "qqmm"


def qqmm(
  x: ArrayLike,
  w: ArrayLike | QuantizedWeight | StackedLayer,
  scales: ArrayLike | None = None,
  group_size: int | None = None,
  bits: int | None = None,
  mode: Mode = DEFAULT_MODE,
  global_scale_x: ArrayLike | Literal["amax", "row"] | None = None,
  global_scale_w: ArrayLike | Literal["amax"] | None = None,
  *,
  backward: Backward = "straight_through",
  precision: lax.PrecisionLike = None,
  preferred_element_type: DTypeLike | None = None,
  out_sharding: OutSharding = None,
  implementation: str | None = None,
  recipe: Recipe | str | None = None,
  key: ArrayLike | None = None,
) -> jax.Array:
  """Multiplies two block-quantized matrices: x quantized on the fly, w packed or on the fly too.

  out[..., n] = sum_k x_hat[..., k] * w_hat[n, k], where x_hat = dequantize(quantize(x)), w_hat
  likewise, and the sum is in float32. It is one primitive of JAX, `qqmm`, and composes with
  jit, grad, vmap, scan, remat and shard_map. Policies of `jax.checkpoint` know the result by the
  name "qqmm".

  Args:
    x: float32, float16 or bfloat16, (..., K) or (K,); K a multiple of the group size.
    w: (N, K), float32, float16 or bfloat16, not necessarily x's: quantized on the fly, and
      receives gradients. Or uint32, (N, K * bits / 32), as `quantize` packs it. Leading batch
      axes, (..., N, K) against x of (..., M, K), broadcast as in `jnp.matmul`. Or a
      `QuantizedWeight`, which brings scales, mode and global_scale_w; or, against all of x, a
      matrix of a stack of them, stack.layer(i).
    scales: for packed w only, (..., N, K / group_size), uint8 or the same bytes as
      float8_e4m3fn (nvfp4) or float8_e8m0fnu (mxfp8, mxfp4).
    group_size: the mode's own, or None.
    bits: the mode's own, or None.
    mode: "nvfp4", "mxfp8" or "mxfp4", which MLX's qqmm does not multiply.
    global_scale_x: nvfp4 only, a scalar, taken as float32: the amax of x (compressed-tensors has a
      reciprocal under this name), 0 for zeros only (beside other numbers of x it makes NaN of
      them). "amax" takes it from x. Against a w with batch axes it may be one for each matrix, of
      x's batch axes. "row" multiplies each row of x by a power of two instead, by which the result
      is divided again, so that no row of x depends on another: not on garbage in rows of padding.
      With global_scale_w or not at all: 2688 is none. None beside a
      `QuantizedWeight` is the weight's own input_global_scale, and without that none.
    global_scale_w: nvfp4 only, likewise of w; "amax" of unquantized w only. A w packed with a
      global scale must be multiplied with it; without it the result is off by a factor.
    backward: "straight_through": dx = g w, dw = g^T x, of the unquantized operands. "quantized", as
      in MLX: dx = qqmm(g, w^T), dw = qqmm(g^T, x^T), each operand quantized again along the axis
      that is then contracted, with rows zero-padded to whole groups. With global scales, g's is its
      amax. Without them, in nvfp4, each of g, x and w whose amax is below 1 gets one, 2688 times a
      power of two, where MLX loses small numbers. For packed w, which receives no gradient, dx is
      taken through the dequantized w. Global scales have gradient zero. Forward mode is the
      straight-through tangent.
    precision: `jax.lax.Precision.HIGHEST`, or "highest", asks for exact operands and float32 sums,
      within 2^-18 of |x_hat| |w_hat|^T, where fp8 tensor cores would lose more
      (jaxqq/EXACTNESS.md).
    preferred_element_type: float32, float16 or bfloat16: the dtype of the result. None is x's.
    out_sharding: where the result goes, a `NamedSharding` or `PartitionSpec`, as of `jnp.matmul`.
      On explicit axes it is needed where x and w are both split along K.
    implementation: what computes it, by its name in `explain` or the beginning of one: "hopper",
      "hopper_fp8", "block_scaled_dot", "xla". The products of the quantized backward are computed
      by it, too. Where it cannot, lowering fails and says why. None takes the first that can.
    recipe: a `Recipe` for training, or the name of one: how each operand of this product and of
      those of its gradients is quantized, under amaxes that are taken here. It stands in place of
      mode, global scales and backward, and w is not packed. All of x is one tensor, or beside a w
      with batch axes each matrix. XLA computes it, but for `Recipe.of_mode`, as "mxfp8" is.
    key: of `jax.random`, where the recipe has something random; another one in every step.

  Returns:
    x.shape[:-1] + (N,), batch axes broadcast.

  Raises:
    TypeError: an argument has a dtype, or is of a type, that it may not be.
    ValueError: mode, group_size, bits, backward or a shape is not as above; scales without
      packed w or packed w without scales; one global scale of two; what a `QuantizedWeight`
      brings, or a recipe, given once more; no key where a recipe needs one. Or, as the program is
      lowered: `implementation` cannot compute it on that platform.

  Example:
    >>> x, w = jnp.full((8, 64), 3.0), jnp.full((4, 64), 3.0)
    >>> jaxqq.qqmm(x, w, mode="mxfp8").shape
    (8, 4)
    >>> packed, scales = jaxqq.quantize(w)
    >>> float(jaxqq.qqmm(x, packed, scales)[0, 0])
    576.0

  Source: `mlx.core.qqmm`.
  """
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
    out_sharding=out_sharding,
    implementation=implementation,
    recipe=recipe,
    key=key,
  )
  if isinstance(w, StackedLayer):
    return STACKED_LAYER["product"]("qqmm", given)
  if recipe is not None or key is not None:
    operands, params, by_recipe = checked_by_recipe("qqmm", given)
    return placed_product("qqmm", operands, params, out_sharding, by_recipe)
  operands, params = checked("qqmm", given)
  multiply = product_by_rows if is_by_rows(global_scale_x) else product
  return placed_product("qqmm", operands, params, out_sharding, multiply)


class ByRecipe(NamedTuple):
  """A product by a recipe, checked: what is multiplied, and how."""

  operands: Operands
  params: dict[str, Any]
  multiply: Callable[[Operands, dict[str, Any]], jax.Array]


def checked_by_recipe(function: str, given: Given) -> ByRecipe:
  """`qqmm` by a recipe, by the plain product where that is the same; or the caller's error."""
  _check_beside_recipe(function, given)
  recipe, w = checked_recipe(function, given.recipe), given.w
  if isinstance(w, QuantizedWeight):
    raise ValueError(
      f"{function}: w is {w!r}, but a recipe quantizes w itself; pass w unquantized, or leave the "
      "recipe out."
    )
  x, w = as_array(function, "x", given.x), as_array(function, "w", w)
  check_dtype(function, "w", w, FLOATS)
  words = checked_key(function, recipe, given.key)
  plain = recipe.as_mode()
  if plain is not None:
    mode, backward = plain
    amax = "amax" if FORMATS[mode].has_global_scale else None
    by_mode = dataclasses.replace(
      given, x=x, w=w, mode=mode, backward=backward, global_scale_x=amax, global_scale_w=amax
    )
    return ByRecipe(*checked(function, by_mode), product)
  check_dtype(function, "x", x, FLOATS)
  _check_w(function, w, None, FORMATS["nvfp4"])
  for name, array, quantizer in (("x", x, recipe.forward_x), ("w", w, recipe.forward_w)):
    if quantizer is not None:
      check_groups(function, name, array, FORMATS[quantizer.mode])
  _check_shapes(function, x, w, None, FORMATS["nvfp4"], broadcasts=True)
  implementation = check_implementation(function, given.implementation)
  if implementation not in (None, "xla"):
    raise ValueError(
      f"{function}: implementation is {given.implementation!r}, but of a recipe only 'xla' may be "
      "asked for; leave implementation out."
    )
  out_dtype = _out_dtype(function, x, given.preferred_element_type)
  precision = check_precision(function, given.precision)
  params = RecipeParams(recipe, out_dtype, precision, implementation=implementation)
  return ByRecipe(Operands(x, w, key=words), {"params": params}, product_by_recipe)


def _check_beside_recipe(function: str, given: Given) -> None:
  """What a recipe says by itself may not be given with it, nor a key without one."""
  if given.recipe is None:
    raise ValueError(
      f"{function}: a key was given without a recipe, which it is for; leave it out."
    )
  beside = {
    "mode": None if is_default_mode(given.mode) else given.mode,
    "scales": given.scales,
    "group_size": given.group_size,
    "bits": given.bits,
    "global_scale_x": given.global_scale_x,
    "global_scale_w": given.global_scale_w,
    "backward": None if given.backward == BACKWARDS[0] else given.backward,
  }
  for name, value in beside.items():
    if value is not None:
      raise ValueError(
        f"{function}: {name} was given with a recipe, which says how operands are quantized; leave "
        f"{name} out."
      )


def _out_dtype(function: str, x: Any, preferred_element_type: Any) -> np.dtype:
  if preferred_element_type is None:
    return np.dtype(x.dtype)
  return check_out_dtype(function, preferred_element_type)


def product_by_recipe(operands: Operands, params: dict[str, Any]) -> jax.Array:
  """What `checked_by_recipe` returns, multiplied, and named."""
  return checkpoint_name(product_of_rows(operands, params["params"]), NAME)


def placed_product(
  function: str,
  operands: Any,
  params: Any,
  out_sharding: OutSharding,
  multiply: Callable[[Any, Any], jax.Array],
  rebuild: Callable[[Any, Any], Any] = unflatten,
) -> jax.Array:
  """What `checked` returns, multiplied, where out_sharding says.

  rebuild: operands of their names and arrays.
  """
  names = operands.names

  def of_arrays(*arrays: Any) -> jax.Array:
    return multiply(rebuild(names, arrays), params)

  out_sharding = checked_out_sharding(function, out_sharding)
  with errors_of(function):
    return produced(of_arrays, out_sharding, *map(jnp.asarray, operands.flatten()))


def product(operands: Operands, params: dict[str, Any]) -> jax.Array:
  """What `checked` returns, multiplied, and named."""
  return checkpoint_name(_product(operands, params), NAME)


def product_by_rows(
  operands: Operands,
  params: dict[str, Any],
  multiply: Callable[[Operands, dict[str, Any]], jax.Array] | None = None,
) -> jax.Array:
  """The same, each row of x moved by a power of two to where nvfp4's scales reach."""
  multiply = multiply or _product
  x, factors = by_rows(jnp.asarray(operands.x), FORMATS[params["mode"]])
  dtype = params["out_dtype"]
  # What is not divided yet may be out of float16's range.
  sums_dtype = np.dtype(jnp.float32) if dtype == jnp.float16 else dtype
  moved = dataclasses.replace(operands, x=x)
  out = multiply(moved, {**params, "out_dtype": sums_dtype})
  for factor in factors:
    ones = (1,) * (out.ndim - factor.ndim)
    out = out * factor.reshape(ones + factor.shape).astype(sums_dtype)
  return checkpoint_name(out.astype(dtype), NAME)


def is_by_rows(global_scale_x: Any) -> bool:
  return isinstance(global_scale_x, str) and global_scale_x == "row"


def _product(operands: Operands, params: dict[str, Any]) -> jax.Array:
  arrays = [jnp.asarray(a) for a in operands.flatten()]
  is_vector = arrays[0].ndim == 1
  if is_vector:
    arrays[0] = arrays[0][None, :]
  out = _primitive.qqmm(unflatten(operands.names, vary_alike(arrays)), **params)
  return out.squeeze(-2) if is_vector else out


def checked(function: str, given: Given) -> tuple[Operands, dict[str, Any]]:
  """The operands and the primitive's parameters, or the error that the caller should see."""
  w, mode, scales, row_scales = given.w, given.mode, given.scales, None
  global_scale_x, global_scale_w = given.global_scale_x, given.global_scale_w
  if isinstance(w, QuantizedWeight):
    mode = _mode_of(function, given)
    if given.quantize_input:
      global_scale_x = _global_scale_of_x(function, w, global_scale_x)
    packed = w._operands(given.x, global_scale_x)
    w, scales, global_scale_w = packed.w, packed.scales, packed.global_scale_w
    row_scales = packed.row_scales
  fmt = check_format(function, mode, given.group_size, given.bits)
  x, w = as_array(function, "x", given.x), as_array(function, "w", w)
  check_dtype(function, "x", x, FLOATS)
  check_groups(function, "x", x, fmt)
  scales = _check_w(function, w, scales, fmt)
  _check_shapes(function, x, w, scales, fmt, given.broadcasts)
  if is_by_rows(global_scale_x):
    check_has_global_scale(function, "global_scale_x", fmt)
    has_none = global_scale_w is None and row_scales is None
    global_scale_x = None if has_none else unscaled(fmt)
  is_one_of_two = (global_scale_x is None) != (global_scale_w is None)
  if given.quantize_input and row_scales is None and is_one_of_two:
    missing, has = ("x", "w") if global_scale_x is None else ("w", "x")
    check_has_global_scale(function, f"global_scale_{has}", fmt)
    raise ValueError(
      f"{function}: global_scale_{has} was given without global_scale_{missing}; give both, "
      f"each the amax of its tensor ({fmt.largest_value:g} is no scale), or neither."
    )
  batch_of_w = tuple(w.shape[:-2])
  global_scale_x = _global_scale(function, "global_scale_x", global_scale_x, x, fmt, batch_of_w)
  global_scale_w = _global_scale(function, given.name_of_scale, global_scale_w, w, fmt, batch_of_w)
  if not isinstance(given.backward, str) or given.backward not in BACKWARDS:
    raise ValueError(
      f"{function}: unknown backward {given.backward!r}; it must be one of "
      f"{', '.join(repr(name) for name in BACKWARDS)}."
    )
  operands = Operands(x, w, scales, global_scale_x, global_scale_w, row_scales=row_scales)
  return operands, {
    "mode": fmt.mode,
    "out_dtype": _out_dtype(function, x, given.preferred_element_type),
    "backward": given.backward,
    "precision": check_precision(function, given.precision),
    "implementation": check_implementation(function, given.implementation),
    "quantize_input": given.quantize_input,
  }


def check_implementation(
  function: str, implementation: Any, table: tuple[Implementation, ...] = IMPLEMENTATIONS
) -> str | None:
  names = [row.name for row in table]
  if implementation is None:
    return None
  is_one = isinstance(implementation, str) and implementation
  if not is_one or not any(name.startswith(implementation) for name in names):
    raise ValueError(
      f"{function}: unknown implementation {implementation!r}; it must be None, or one of "
      f"{', '.join(repr(name) for name in names)}, or what they begin with."
    )
  return str(implementation)


def _global_scale(
  function: str, name: str, value: Any, a: Any, fmt: Format, batch_of_w: tuple[int, ...]
) -> Any:
  """As `check_global_scale`; "amax" is taken from the operand, one a matrix if w has batch axes."""
  if not isinstance(value, str):
    # With one w, all of x is one matrix.
    batch_shapes = (batch_of_w, tuple(a.shape[:-2])) if batch_of_w else ()
    return check_global_scale(function, name, value, fmt, batch_shapes=batch_shapes)
  if value != "amax":
    words = "'amax', 'row', " if name == "global_scale_x" else "'amax', "
    raise ValueError(f"{function}: unknown {name} {value!r}; it must be {words}a number or None.")
  check_has_global_scale(function, name, fmt)
  if np.dtype(a.dtype) == PACKED:
    raise ValueError(
      f"{function}: {name} is 'amax', but w is packed ({describe(a)}); pass the amax that it was "
      "quantized with."
    )
  batch_ndim = len(a.shape) - 2 if batch_of_w else 0
  if isinstance(a, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(a.shape[:batch_ndim], np.float32)
  return amax_of_each_matrix(jnp.asarray(a), batch_ndim)


def _mode_of(function: str, given: Given) -> str:
  """The mode that w was quantized in; nothing that w brings may be given once more."""
  w: QuantizedWeight = given.w
  if not is_default_mode(given.mode) and given.mode != w.mode:
    raise ValueError(
      f"{function}: mode {given.mode!r} was given with a QuantizedWeight of mode {w.mode!r}; "
      "leave mode out."
    )
  brought = {"scales": given.scales, given.name_of_scale: given.global_scale_w}
  for name, value in brought.items():
    if value is not None:
      raise ValueError(
        f"{function}: {name} was given with w a QuantizedWeight, which brings its own; "
        f"leave {name} out."
      )
  return w.mode


def _global_scale_of_x(function: str, w: QuantizedWeight, global_scale_x: Any) -> Any:
  if w.global_scale is None and not is_by_rows(global_scale_x):
    if global_scale_x is not None:
      raise ValueError(
        f"{function}: global_scale_x was given, but w ({w!r}) has no global scale; leave it out, "
        "or quantize w with one."
      )
    return None
  if global_scale_x is None:
    global_scale_x = w.input_global_scale
  if global_scale_x is None:
    return unscaled(FORMATS[w.mode])
  return global_scale_x


def _check_w(function: str, w: Any, scales: Any, fmt: Format) -> Any:
  """The scales as an array, None for unquantized w."""
  dtype = np.dtype(w.dtype)
  if dtype not in (*FLOATS, PACKED):
    raise TypeError(
      f"{function}: w must be {names(FLOATS)}, or uint32 as quantize packs it, got {describe(w)}."
    )
  if len(w.shape) < 2:
    raise ValueError(
      f"{function}: w must have at least two dimensions, (N, K) or (..., N, K), got {describe(w)}."
    )
  if dtype == PACKED:
    if scales is None:
      raise ValueError(
        f"{function}: w is packed ({describe(w)}) but scales are missing; pass both results of "
        "quantize, or w unquantized."
      )
    return check_packed(function, w, scales, fmt)[1]
  if scales is not None:
    raise ValueError(
      f"{function}: scales were given with an unquantized w ({describe(w)}); leave them out, or "
      "pass w packed, as quantize returns it."
    )
  return None


def _check_shapes(
  function: str, x: Any, w: Any, scales: Any, fmt: Format, broadcasts: bool
) -> None:
  k = w.shape[-1] if scales is None else w.shape[-1] * fmt.codes_per_word
  if x.shape[-1] != k:
    raise ValueError(
      f"{function}: x and w must agree in K, their last axis, got {describe(x)} and K = {k} from w "
      f"({describe(w)}); w is (N, K), contracted on its last axis."
    )
  if not broadcasts:
    return
  try:
    lax.broadcast_shapes(x.shape[:-2], w.shape[:-2])
  except ValueError:
    raise ValueError(
      f"{function}: the batch axes of x and w must broadcast as in jnp.matmul, got "
      f"{tuple(x.shape[:-2])} from x ({describe(x)}) and {tuple(w.shape[:-2])} from w "
      f"({describe(w)})."
    ) from None
