"""`lax.dot_general` and `jnp.einsum` of two operands, computed by `qqmm`.

Any contraction is a batch of matrix products once its axes are in order: x is (batch, m, k) and
w (batch, n, k) or (batch, k, n), with k the contracted axes, flattened. `DotGeneral` does that for
unquantized operands, as the layers of Flax call it, and its `packed` for a weight quantized before.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxqq import _einsum
from jaxqq._checks import (
  check_bool,
  check_format,
  check_out_dtype,
  check_precision,
  describe,
)
from jaxqq._contraction import (
  Axes,
  AxesOf,
  as_w,
  as_x,
  checked_axes,
  operand,
  rows,
  sizes,
)
from jaxqq._formats import FORMATS, Format, Mode
from jaxqq._given import DEFAULT_MODE, is_default_mode
from jaxqq._global_scales import (
  DEFAULT,
  GlobalScale,
  amax_of_each_matrix,
  checked_choice,
  is_default,
  unscaled,
)
from jaxqq._gradient import BACKWARDS, Backward
from jaxqq._out_sharding import OutSharding, checked_out_sharding, errors_of, produced
from jaxqq._qqmm import (
  check_implementation,
  product,
  product_by_recipe,
  product_by_rows,
)
from jaxqq._recipe import PRODUCTS, Recipe, checked_key, checked_recipe
from jaxqq._recipe_product import Params as RecipeParams
from jaxqq._reference import Operands
from jaxqq._weight import QuantizedWeight

FUNCTION = "dot_general"


def dot_general(
  mode: Mode = DEFAULT_MODE,
  *,
  backward: Backward = "straight_through",
  global_scale: GlobalScale = DEFAULT,
  implementation: str | None = None,
  quantize_input: bool | None = None,
  recipe: Recipe | str | None = None,
) -> DotGeneral:
  """Makes a `jax.lax.dot_general` that quantizes both operands, or rhs alone, for layers.

  What is returned has the arguments of `jax.lax.dot_general`. lhs (activations) is x, rhs (a
  kernel) is w, and out = sum_k x_hat[..., k] * w_hat[..., k] over all contracted axes together.
  Groups run along the contracted axes in lhs's order, the last one fastest; the product of their
  sizes is a multiple of the group size. The dtype is that of `jax.lax.dot_general`. Its method
  `einsum(subscripts, x, w)` is for layers that take an einsum. Two results of the same arguments
  are equal, so that no program is compiled twice.

  Args:
    mode: "nvfp4", "mxfp8" or "mxfp4".
    backward: "straight_through" or "quantized", as for `qqmm`.
    global_scale: nvfp4 only. "weight", there the default, gives w a global scale, its largest
      magnitude, taken anew in every call, and lhs none: weights are often smaller than nvfp4's
      scales reach, activations seldom are. "amax" gives both operands one, the largest magnitude
      of each matrix. "row" gives w its own, and each row of lhs a power of two, so that no row
      depends on another. None gives none. What it says of lhs holds where lhs is quantized.
    implementation: what computes it, as for `qqmm`: "xla", say, or None for the first that can.
    quantize_input: whether lhs is quantized. False leaves it as it is, as `quantized_matmul` does,
      with its gradients, which backward="quantized" would contradict. None is as a
      `QuantizedWeight` says, and True beside an array.
    recipe: a `Recipe` for training, or the name of one, in place of backward: how each operand of
      a product with an array and of its gradients is quantized, as for `qqmm`. mode, the
      recipe's by default, and global_scale, there "amax", then say how a `QuantizedWeight` is
      multiplied.

  Returns:
    A function of (lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, *,
    out_sharding=None, key=None).

  Raises:
    TypeError, ValueError: mode, backward, global_scale, implementation, quantize_input or recipe is
      not as above; or, in a call, the contraction is no `qqmm`: no axis is contracted, sizes make
      no whole groups, or an operand is none of float32, float16 and bfloat16; or no key is given
      where the recipe needs one.

  Example:
    >>> dot_general = jaxqq.dot_general("mxfp8")
    >>> x, kernel = jnp.ones((2, 8, 64)), jnp.ones((64, 4, 16))
    >>> dot_general(x, kernel, (((2,), (0,)), ((), ()))).shape
    (2, 8, 4, 16)
    >>> dot_general.einsum("btd,dhk->bthk", x, kernel).shape
    (2, 8, 4, 16)

  Source: `jax.lax.dot_general`; `mlx.core.qqmm`.
  """
  options = backward, global_scale, implementation, quantize_input
  return DotGeneral(mode, *options, recipe=recipe)


@dataclasses.dataclass(frozen=True)
class _Call:
  """Of one call: what its errors name, and what it asks of the product."""

  function: str
  precision: Any
  preferred_element_type: Any
  key: Any = None

  def out_dtype(self, lhs: Any, rhs: Any) -> np.dtype:
    preferred = cast(Hashable, self.preferred_element_type)
    return check_out_dtype(self.function, _dtype_of_lax(lhs, rhs, preferred))


@dataclasses.dataclass(frozen=True)
class DotGeneral:
  """A `jax.lax.dot_general` that quantizes both operands, or rhs alone, made by `dot_general`.

  out = sum_k x_hat[..., k] * w_hat[..., k], x_hat and w_hat the operands quantized along the
  contracted axes, or x_hat lhs as it is. Two with the same attributes are equal and hash alike, so
  that one may be a static argument of `jax.jit` or an attribute of a layer.

  Attributes:
    mode: "nvfp4", "mxfp8" or "mxfp4".
    backward: "straight_through" or "quantized", as for `qqmm`.
    global_scale: "weight", "amax", "row" or None, as for `dot_general`.
    implementation: what computes it, as for `qqmm`.
    quantize_input: True, False or None, as for `dot_general`.
    recipe: a `Recipe` or None.

  Raises:
    ValueError: mode, backward, global_scale, implementation or recipe is not as above.
    TypeError: quantize_input or recipe is not as above.

  Example:
    >>> import functools
    >>> @functools.partial(jax.jit, static_argnames="dot")
    ... def project(x, kernel, dot):
    ...   return dot(x, kernel, (((1,), (0,)), ((), ())))
    >>> project(jnp.ones((2, 64)), jnp.ones((64, 8)), jaxqq.dot_general("mxfp8")).shape
    (2, 8)

  Source: `jax.lax.dot_general`; `mlx.core.qqmm`.
  """

  mode: Mode
  backward: Backward = "straight_through"
  global_scale: GlobalScale = DEFAULT
  implementation: str | None = None
  quantize_input: bool | None = None
  function: str = dataclasses.field(default=FUNCTION, compare=False, repr=False)  # in errors
  recipe: Recipe | str | None = None

  def __post_init__(self) -> None:
    function = self.function
    self._take_recipe()
    fmt = check_format(function, self.mode, None, None)
    if not isinstance(self.backward, str) or self.backward not in BACKWARDS:
      raise ValueError(
        f"{function}: unknown backward {self.backward!r}; it must be one of "
        f"{', '.join(repr(name) for name in BACKWARDS)}."
      )
    choice = checked_choice(function, self.global_scale, fmt)
    object.__setattr__(self, "global_scale", choice)
    check_implementation(function, self.implementation)
    if self.quantize_input is not None:
      check_bool(function, "quantize_input", self.quantize_input)
      self._check_backward(self.quantize_input)

  def _in_mode(self, mode: Mode, global_scale: GlobalScale) -> DotGeneral:
    """The same in a layer's own mode; a recipe is not for other modes."""
    return dataclasses.replace(
      self,
      mode=mode,
      global_scale=global_scale if FORMATS[mode].has_global_scale else None,
      recipe=self.recipe if mode == self.mode else None,
    )

  def _take_recipe(self) -> None:
    """The recipe itself, and what it means for a packed rhs."""
    if self.recipe is None:
      return
    recipe = checked_recipe(self.function, self.recipe)
    object.__setattr__(self, "recipe", recipe)
    if self.backward != BACKWARDS[0]:
      raise ValueError(
        f"{self.function}: backward was given with a recipe, which says how gradients are "
        "computed; leave backward out."
      )
    if self.quantize_input is False:
      raise ValueError(
        f"{self.function}: quantize_input is False, but a recipe says how the input is quantized; "
        "leave it out, and take a recipe whose forward_x is None."
      )
    modes = [q.mode for product in PRODUCTS for q in recipe.of(product)[::-1] if q is not None]
    if modes and is_default_mode(self.mode):
      object.__setattr__(self, "mode", modes[0])
    if modes and self.mode not in modes:
      raise ValueError(
        f"{self.function}: mode is {self.mode!r}, but the recipe is of {modes[0]!r}; leave mode "
        "out."
      )
    if is_default(self.global_scale):
      has_one = FORMATS[self.mode].has_global_scale
      object.__setattr__(self, "global_scale", "amax" if has_one else None)

  @property
  def needs_key(self) -> bool:
    """Whether a product with an array needs a key."""
    return isinstance(self.recipe, Recipe) and self.recipe.needs_key

  def _check_backward(self, quantize_input: bool) -> None:
    if not quantize_input and self.backward == "quantized":
      raise ValueError(
        f"{self.function}: backward is 'quantized', which quantizes the operands of gradients, but "
        "quantize_input is False; take 'straight_through', or quantize the input."
      )

  def __call__(
    self,
    lhs: ArrayLike,
    rhs: ArrayLike | QuantizedWeight,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: OutSharding = None,
    key: ArrayLike | None = None,
  ) -> jax.Array:
    """`jax.lax.dot_general(lhs, rhs, dimension_numbers)` of the quantized operands.

    Args:
      lhs: x, float32, float16 or bfloat16; any shape with an axis to contract.
      rhs: w, float32, float16 or bfloat16; or a `QuantizedWeight`, as its logical shape (batch, N,
        K) has it, contracted along the last axis. It brings its mode and global scale, and whether
        lhs is quantized, unless `self.quantize_input` says.
      dimension_numbers: ((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch)), as of
        `jax.lax.dot_general`. The product of the contracted sizes is a multiple of the group size.
      precision: None, a `jax.lax.Precision` or its name, or two of them, of which the higher
        counts; HIGHEST is as for `qqmm`.
      preferred_element_type: float32, float16 or bfloat16: the dtype of the result. None is that
        of `jax.lax.dot_general`.
      out_sharding: where the result goes, as of `jax.lax.dot_general`. On explicit axes it is
        needed where both operands are split along what is summed over.
      key: of `jax.random`, where `self.recipe` has something random.

    Returns:
      (batch, free axes of lhs, free axes of rhs).

    Raises:
      TypeError: an operand or preferred_element_type is none of float32, float16 and bfloat16, or
        precision is not as above.
      ValueError: dimension_numbers do not fit the operands, contract no axis, or contract what
        makes no whole groups.
    """
    call = _Call(self.function, precision, preferred_element_type, key)
    lhs = operand(call.function, "lhs", lhs)
    if not isinstance(rhs, QuantizedWeight):
      rhs = operand(call.function, "rhs", rhs)
    return self._contracted(call, lhs, rhs, dimension_numbers, out_sharding)

  def _contracted(
    self,
    call: _Call,
    lhs: jax.Array,
    rhs: Any,
    dimension_numbers: Any,
    out_sharding: Any,
    in_order: Callable[[jax.Array], jax.Array] = lambda out: out,
  ) -> jax.Array:
    """The product, `in_order` of whose axes is the result."""
    out_sharding = checked_out_sharding(call.function, out_sharding)
    axes = checked_axes(call.function, lhs, rhs, dimension_numbers)
    is_packed = isinstance(rhs, QuantizedWeight)

    def contract(lhs: jax.Array, rhs: Any) -> jax.Array:
      return in_order((self._by_packed_rhs if is_packed else self._by_array)(call, lhs, rhs, *axes))

    with errors_of(call.function):
      return produced(contract, out_sharding, lhs, rhs)

  def _by_array(
    self, call: _Call, lhs: jax.Array, rhs: jax.Array, of_lhs: AxesOf, of_rhs: AxesOf
  ) -> jax.Array:
    if self.recipe is not None or call.key is not None:
      return self._by_recipe(call, lhs, rhs, of_lhs, of_rhs)
    self._check_groups(call.function, lhs, of_lhs, FORMATS[self.mode])
    x, (w, transposed) = as_x(lhs, of_lhs), as_w(rhs, of_rhs)
    quantize_input = self.quantize_input is not False
    of_x, of_w = self._global_scales(x, w, len(of_lhs.batch))
    operands = Operands(x, w, None, of_x if quantize_input else None, of_w, transposed=transposed)
    out_dtype = call.out_dtype(lhs.dtype, rhs.dtype)
    out = self._product(operands, self.mode, quantize_input, call, out_dtype)
    return out.reshape(*rows(lhs, of_lhs), *sizes(rhs, of_rhs.free))

  def _by_recipe(
    self, call: _Call, lhs: jax.Array, rhs: jax.Array, of_lhs: AxesOf, of_rhs: AxesOf
  ) -> jax.Array:
    recipe = self.recipe
    if not isinstance(recipe, Recipe):
      raise ValueError(
        f"{call.function}: a key was given without a recipe, which it is for; leave it out."
      )
    key = checked_key(call.function, recipe, call.key)
    plain = recipe.as_mode()
    if plain is not None:
      mode, backward = plain
      scale: GlobalScale = "amax" if FORMATS[mode].has_global_scale else None
      changed = {"mode": mode, "backward": backward, "global_scale": scale, "recipe": None}
      own = dataclasses.replace(self, **cast(dict[str, Any], changed))
      return own._by_array(dataclasses.replace(call, key=None), lhs, rhs, of_lhs, of_rhs)
    for quantizer in recipe.of("forward"):
      if quantizer is not None:
        self._check_groups(call.function, lhs, of_lhs, FORMATS[quantizer.mode])
    if self.implementation not in (None, "xla"):
      raise ValueError(
        f"{call.function}: implementation is {self.implementation!r}, but of a recipe only 'xla' "
        "may be asked for; leave implementation out."
      )
    x, (w, transposed) = as_x(lhs, of_lhs), as_w(rhs, of_rhs)
    operands = Operands(x, w, transposed=transposed, key=key)
    out_dtype = call.out_dtype(lhs.dtype, rhs.dtype)
    precision = check_precision(call.function, call.precision)
    params = RecipeParams(recipe, out_dtype, precision, implementation=self.implementation)
    out = product_by_recipe(operands, {"params": params})
    return out.reshape(*rows(lhs, of_lhs), *sizes(rhs, of_rhs.free))

  def _by_packed_rhs(
    self, call: _Call, lhs: jax.Array, weight: QuantizedWeight, of_lhs: AxesOf, of_rhs: AxesOf
  ) -> jax.Array:
    """The same of a weight (batch, N, K), whose axes are in this order."""
    k = weight.ndim - 1
    if of_rhs.contracting != (k,) or of_rhs.free != (k - 1,):
      raise ValueError(
        f"{call.function}: a packed rhs is contracted along its last axis, {k}, in which its "
        "groups run, and the axes before its rows are batch axes, got contracting axes "
        f"{of_rhs.contracting} and batch axes {of_rhs.batch} of {weight!r}."
      )
    order = sorted(range(k - 1), key=lambda i: of_rhs.batch[i])
    batch = tuple(of_lhs.batch[i] for i in order)
    features = (weight.shape[-2],)
    out = self._by_packed(call, lhs, weight, of_lhs.contracting, batch, features)
    back = [order.index(i) for i in range(k - 1)]
    return jnp.transpose(out, [*back, *range(k - 1, out.ndim)]) if back != sorted(back) else out

  def einsum(
    self,
    subscripts: str,
    x: ArrayLike,
    w: ArrayLike | QuantizedWeight,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: OutSharding = None,
    key: ArrayLike | None = None,
  ) -> jax.Array:
    """`jnp.einsum(subscripts, x, w)` of the quantized operands, for layers that take an einsum.

    Args:
      subscripts: two operands and the output, as "...d,df->...f".
      x: float32, float16 or bfloat16.
      w: float32, float16 or bfloat16, or a `QuantizedWeight`, as in a call.
      precision, preferred_element_type, out_sharding, key: as in a call.

    Returns:
      The axes that subscripts name after the arrow.

    Raises:
      TypeError, ValueError: as in a call; subscripts without an output, or that sum over an
        index of one operand only.

    Example:
      >>> einsum = jaxqq.dot_general("nvfp4").einsum
      >>> einsum("...d,df->...f", jnp.ones((2, 3, 64)), jnp.ones((64, 5))).shape
      (2, 3, 5)
    """
    call = _Call(f"{self.function}.einsum", precision, preferred_element_type, key)
    x = operand(call.function, "x", x)
    if not isinstance(w, QuantizedWeight):
      w = operand(call.function, "w", w)
    plan = _einsum.plan(call.function, subscripts, x.ndim, w.ndim)
    return self._contracted(call, x, w, plan.dimension_numbers, out_sharding, plan.in_order)

  def packed(
    self,
    lhs: ArrayLike,
    weight: QuantizedWeight,
    contracting: Axes,
    batch: Axes,
    out_features: Axes,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
  ) -> jax.Array:
    """The same product by a weight quantized before, whose mode and global scale it takes.

    It takes the weight's quantize_input too, unless `self.quantize_input` says.

    Args:
      lhs: x, float32, float16 or bfloat16.
      weight: of logical shape (batch, N, K), K the contracted axes of lhs, flattened. Where it has
        a global scale, that of x is its input_global_scale, or without one, if `self.global_scale`
        is "amax", the amax of each matrix.
      contracting: axes of lhs.
      batch: axes of lhs.
      out_features: sizes whose product is N.
      precision, preferred_element_type: as in a call.

    Returns:
      (batch, free axes of lhs, out_features), of lhs's dtype unless another is preferred.

    Raises:
      TypeError: as in a call.
      ValueError: weight does not have that shape, or is of a mode that is not multiplied.

    Example:
      >>> weight = jaxqq.quantize_weight(jnp.ones((12, 64)))
      >>> dot_general = jaxqq.dot_general("nvfp4")
      >>> dot_general.packed(jnp.ones((2, 5, 64)), weight, (2,), (), (3, 4)).shape
      (2, 5, 3, 4)
    """
    call = _Call(self.function, precision, preferred_element_type)
    lhs = operand(call.function, "lhs", lhs)
    with errors_of(call.function):
      return self._by_packed(call, lhs, weight, contracting, batch, out_features)

  def _by_packed(
    self,
    call: _Call,
    lhs: jax.Array,
    weight: QuantizedWeight,
    contracting: Axes,
    batch: Axes,
    out_features: Axes,
  ) -> jax.Array:
    fmt = check_format(call.function, weight.mode, None, None)
    axes = AxesOf.of(lhs.ndim, contracting, batch)
    x = as_x(lhs, axes)
    batch_shape = sizes(lhs, axes.batch)
    right = (*batch_shape, math.prod(out_features), x.shape[-1])
    if weight.shape != right:
      raise ValueError(
        f"{call.function}: a packed weight of shape {right} is needed for lhs ({describe(lhs)}) "
        f"contracted along axes {axes.contracting}, got {weight!r}."
      )
    quantize_input = weight.quantize_input if self.quantize_input is None else self.quantize_input
    self._check_backward(quantize_input)
    global_scale_x = None
    if quantize_input and weight.global_scale is not None:
      global_scale_x = weight.input_global_scale
      if global_scale_x is None:
        global_scale_x = self._global_scale_of_x(x, len(axes.batch), fmt)
    operands = weight._operands(x, global_scale_x)
    out_dtype = call.out_dtype(lhs.dtype, lhs.dtype)
    out = self._product(operands, fmt.mode, quantize_input, call, out_dtype)
    return out.reshape(*rows(lhs, axes), *out_features)

  def _global_scales(self, x: jax.Array, w: jax.Array, batch_ndim: int) -> tuple[Any, Any]:
    """Those of x and w."""
    if self.global_scale is None:
      return None, None
    # Of a whole w one number is enough, and kernels take one.
    of_w = amax_of_each_matrix(w, batch_ndim if self.global_scale == "amax" else 0)
    return self._global_scale_of_x(x, batch_ndim, FORMATS[self.mode]), of_w

  def _global_scale_of_x(self, x: jax.Array, batch_ndim: int, fmt: Format) -> jax.Array:
    return amax_of_each_matrix(x, batch_ndim) if self.global_scale == "amax" else unscaled(fmt)

  def _product(
    self, operands: Operands, mode: str, quantize_input: bool, call: _Call, out_dtype: np.dtype
  ) -> jax.Array:
    scales_rows = self.global_scale == "row" and FORMATS[mode].has_global_scale
    is_by_rows = scales_rows and quantize_input
    return (product_by_rows if is_by_rows else product)(
      operands,
      {
        "mode": mode,
        "out_dtype": out_dtype,
        "backward": self.backward,
        "precision": check_precision(call.function, call.precision),
        "implementation": self.implementation,
        "quantize_input": quantize_input,
      },
    )

  def _check_groups(self, function: str, lhs: jax.Array, axes: AxesOf, fmt: Format) -> None:
    group_size = fmt.group_size
    contracted = sizes(lhs, axes.contracting)
    if not contracted:
      raise ValueError(
        f"{function}: no axis of lhs ({describe(lhs)}) is contracted, and a qqmm sums over at "
        "least one; multiply by broadcasting instead."
      )
    k = math.prod(contracted)
    if k % group_size:
      raise ValueError(
        f"{function}: the contracted axes {axes.contracting} of lhs ({describe(lhs)}) have {k} "
        f"elements, which must be a multiple of the group size {group_size} of mode {fmt.mode!r}; "
        "pad them with zeros."
      )


@functools.cache
def _dtype_of_lax(lhs: Any, rhs: Any, preferred: Any) -> np.dtype:
  """What `jax.lax.dot_general` gives of these two, or what is preferred."""
  scalars = (jax.ShapeDtypeStruct((), dtype) for dtype in (lhs, rhs))
  dot = functools.partial(
    lax.dot_general, dimension_numbers=(((), ()), ((), ())), preferred_element_type=preferred
  )
  return np.dtype(jax.eval_shape(dot, *scalars).dtype)
