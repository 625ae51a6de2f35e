"""Flax Linen: a layer, the conversion of a tree of parameters, and models applied with it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, serialization
from flax.core import meta
from flax.linen import module as linen_module
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike

from jaxqq import _einsum
from jaxqq._checks import check_format
from jaxqq._dot_general import DotGeneral
from jaxqq._formats import Mode
from jaxqq._given import DEFAULT_MODE
from jaxqq._global_scales import DEFAULT, GlobalScale
from jaxqq._gradient import Backward
from jaxqq._recipe import Recipe
from jaxqq._weight import BEFORE_FLATTEN, LEAVES, QuantizedWeight
from jaxqq.nn.kernel import Axes, KernelAxes, axes_of_einsum, known_axes

Predicate = Callable[[str, linen.Module], bool | str]
STREAM = "recipe"  # of random keys, for layers whose recipe has something random


class QQDense(linen.Module):
  """A dense layer that quantizes its inputs and its kernel: `nn.Dense` of Flax Linen by `qqmm`.

  y[..., n] = sum_k x_hat[..., k] * kernel_hat[k, n] + bias[n]. The parameters are those of
  `nn.Dense`, and the kernel may be a `QuantizedWeight`, as `quantize_params` makes it.

  Attributes:
    features: N.
    mode: "nvfp4", "mxfp8" or "mxfp4"; of a `QuantizedWeight`, its own holds.
    backward: "straight_through" or "quantized", as for `qqmm`.
    global_scale: nvfp4 only. "weight", there the default, gives the kernel a global scale, its
      amax, taken in every call; "amax" gives the inputs one too, "row" each row of them a power of
      two; None gives none. A `QuantizedWeight` has its own, and the inputs none beside it, unless
      this is "amax" or "row".
    implementation: what computes the product, as for `qqmm`.
    quantize_input: False multiplies inputs as they are, as `quantized_matmul` does. None is as a
      `QuantizedWeight` says, and True otherwise.
    recipe: a `jaxqq.Recipe` for training, or the name of one, in place of mode and backward. What
      is random in it comes from the stream "recipe": apply(..., rngs={"recipe": key}).
    use_bias, dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype: as for
      `nn.Dense`.

  Example:
    >>> layer = jaxqq.nn.QQDense(32, mode="mxfp8")
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 64)))
    >>> params, report = jaxqq.nn.quantize_params(variables["params"], "mxfp8")
    >>> params["kernel"]
    QuantizedWeight(mxfp8, float32 (32, 64))
    >>> layer.apply({"params": params}, jnp.ones((2, 64))).shape
    (2, 32)

  Source: `mlx.nn.QQLinear`; `flax.linen.Dense`.
  """

  features: int
  mode: Mode = DEFAULT_MODE
  backward: Backward = "straight_through"
  global_scale: GlobalScale = DEFAULT
  implementation: str | None = None
  quantize_input: bool | None = None
  recipe: Recipe | str | None = None
  use_bias: bool = True
  dtype: DTypeLike | None = None
  param_dtype: DTypeLike = jnp.float32
  precision: lax.PrecisionLike = None
  kernel_init: Any = linen.initializers.lecun_normal()
  bias_init: Any = linen.initializers.zeros_init()
  promote_dtype: Any = promote_dtype

  @linen.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """(..., K) to (..., features)."""
    kernel = None
    if self.has_variable("params", "kernel"):
      kernel = kernel_of(self)
    if not isinstance(kernel, QuantizedWeight):
      shape = (inputs.shape[-1], self.features)
      kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
    bias = None
    if self.use_bias:
      bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
    options = self.backward, self.global_scale, self.implementation, self.quantize_input
    dot_general = DotGeneral(self.mode, *options, "QQDense", self.recipe)
    return contraction(self, inputs).apply(dot_general, self, inputs, kernel, bias)


@dataclasses.dataclass(frozen=True)
class Contraction:
  """What a layer of Linen computes of its inputs, kernel and bias."""

  kernel: KernelAxes
  contracting: Axes  # of the inputs
  batch: Axes  # of the inputs
  bias_shape: tuple[int, ...]  # that broadcasts with the result
  order: Axes | None = None  # of the result's axes, where the product has them in another

  def apply(
    self, dot_general: DotGeneral, layer: Any, inputs: jax.Array, kernel: Any, bias: Any
  ) -> jax.Array:
    """The product and the bias, promoted as the layer says."""
    weight = kernel if isinstance(kernel, QuantizedWeight) else None
    if weight is not None:
      kernel = jnp.zeros((0,), weight.dtype)
    inputs, kernel, bias = layer.promote_dtype(inputs, kernel, bias, dtype=layer.dtype)
    options = (layer.precision, getattr(layer, "preferred_element_type", None))
    if weight is not None:
      features = self.kernel.features
      out = dot_general.packed(inputs, weight, self.contracting, self.batch, features, *options)
    else:
      numbers = ((self.contracting, self.kernel.contracting), (self.batch, self.kernel.batch))
      key = layer.make_rng(STREAM) if dot_general.needs_key else None
      out = dot_general(inputs, kernel, numbers, *options, key=key)
    if self.order is not None:
      out = jnp.transpose(out, self.order)
    return out if bias is None else out + bias.reshape(self.bias_shape)


def contraction(layer: Any, inputs: jax.Array, einsum_str: str | None = None) -> Contraction:
  """That of a layer in `LAYERS`, or ValueError."""
  return LAYERS[type(layer)](layer, inputs, einsum_str)


def _of_dense(layer: Any, inputs: jax.Array, _: str | None) -> Contraction:
  kernel = KernelAxes((inputs.shape[-1], layer.features), (), (1,), (0,))
  bias_shape = (1,) * (inputs.ndim - 1) + (layer.features,)
  return Contraction(kernel, (inputs.ndim - 1,), (), bias_shape)


def _of_dense_general(layer: Any, inputs: jax.Array, _: str | None) -> Contraction:
  features, axis, batch = map(_as_tuple, (layer.features, layer.axis, layer.batch_dims))
  name = type(layer).__name__
  axis, batch = (known_axes(name, own, inputs) for own in (axis, batch))
  parts = [tuple(inputs.shape[i] for i in batch), tuple(inputs.shape[i] for i in axis), features]
  ends = np.cumsum([len(part) for part in parts]).tolist()
  kernel = KernelAxes(
    shape=sum(parts, ()),
    batch=tuple(range(ends[0])),
    free=tuple(range(ends[1], ends[2])),
    contracting=tuple(range(ends[0], ends[1])),
  )
  rows = tuple(size if i in batch else 1 for i, size in enumerate(inputs.shape) if i not in axis)
  return Contraction(kernel, axis, batch, (*rows, *features))


def _of_einsum(layer: Any, inputs: jax.Array, einsum_str: str | None) -> Contraction:
  einsum_str, shape = einsum_str or layer.einsum_str, tuple(layer.shape)
  plan = _einsum.plan("Einsum", einsum_str, inputs.ndim, len(shape))
  return Contraction(
    axes_of_einsum("Einsum", einsum_str, shape),
    plan.x_contracting,
    plan.x_batch,
    tuple(1 if i is None else shape[i] for i in plan.w_in_out),
    plan.order,
  )


def _as_tuple(value: Any) -> Axes:
  return (value,) if isinstance(value, int) else tuple(value)


LAYERS: dict[type[linen.Module], Callable[..., Contraction]] = {
  QQDense: _of_dense,
  linen.Dense: _of_dense,
  linen.DenseGeneral: _of_dense_general,
  linen.Einsum: _of_einsum,
}


def quantized_apply(
  model: linen.Module,
  mode: Mode | None = None,
  *,
  predicate: Predicate | None = None,
  backward: Backward = "straight_through",
  global_scale: GlobalScale = DEFAULT,
  implementation: str | None = None,
  quantize_input: bool | None = None,
  recipe: Recipe | str | None = None,
) -> Callable[..., Any]:
  """`model.apply`, in which the layers of any Linen model multiply by `qqmm`.

  The layers are nn.Dense, nn.DenseGeneral (so the projections of attention) and nn.Einsum. One
  whose kernel is a `QuantizedWeight`, as `quantize_params` makes it, is multiplied by that. With a
  mode, the others quantize their kernels in every call, for training.

  Args:
    model: any module of Flax Linen.
    mode: None, "nvfp4", "mxfp8" or "mxfp4": that of kernels which are not packed. None leaves
      them alone.
    predicate: a function of (path, layer), path as "blocks_0.attention.query", that says whether
      to quantize a layer whose kernel is not packed; it may also answer with the mode for that
      layer. None says yes to those that can be.
    backward: "straight_through" or "quantized", as for `qqmm`.
    global_scale: nvfp4 only: "weight", there the default, "amax", "row" or None, as for
      `QQDense`. What it says of inputs holds beside packed kernels too.
    implementation: what computes the products, as for `qqmm`.
    quantize_input: False multiplies inputs as they are, as for `QQDense`; None is as a packed
      kernel says, and True otherwise.
    recipe: a `jaxqq.Recipe`, or the name of one, by which kernels that are not packed are
      multiplied, in place of mode and backward; as for `QQDense`.

  Returns:
    A function with the arguments of `model.apply`.

  Raises:
    ValueError: mode, backward, global_scale or implementation is not as above.

  Example:
    >>> model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(8)])
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 64)))
    >>> apply = jaxqq.nn.quantized_apply(model, "mxfp8")
    >>> apply(variables, jnp.ones((2, 64))).shape
    (2, 8)

  Source: `flax.linen.intercept_methods`.
  """
  function = "quantized_apply"
  options = backward, global_scale, implementation, quantize_input, function
  packed = DotGeneral("nvfp4", *options)
  on_the_fly = None
  if mode is not None or recipe is not None:
    on_the_fly = DotGeneral(DEFAULT_MODE if mode is None else mode, *options, recipe)

  def intercept(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
    layer = context.module
    if not is_call_of_layer(context) or not layer.has_variable("params", "kernel"):
      return next_method(*args, **kwargs)
    kernel = kernel_of(layer)
    dot_general = packed if isinstance(kernel, QuantizedWeight) else on_the_fly
    if dot_general is None:
      return next_method(*args, **kwargs)
    plan = planned(layer, args, kwargs)
    if isinstance(plan, str):
      if dot_general is packed:
        path = ".".join(layer.path)
        raise ValueError(f"{function}: the kernel of {path!r} is packed, and {plan}.")
      return next_method(*args, **kwargs)
    if dot_general is on_the_fly:
      chosen = True if predicate is None else predicate(".".join(layer.path), layer)
      if isinstance(chosen, str):
        mode_of_layer = check_format(function, chosen, None, None).mode
        dot_general = dot_general._in_mode(mode_of_layer, global_scale)
      if not chosen or plan.kernel.why_not(kernel, dot_general.mode) is not None:
        return next_method(*args, **kwargs)
    inputs, _ = arguments(*args, **kwargs)
    bias = meta.unbox(layer.get_variable("params", "bias")) if layer.use_bias else None
    return plan.apply(dot_general, layer, inputs, kernel, bias)

  def apply(*args: Any, **kwargs: Any) -> Any:
    with linen.intercept_methods(intercept):
      return model.apply(*args, **kwargs)

  return apply


def kernel_of(layer: linen.Module) -> Any:
  """That of a layer, out of its box."""
  kernel: Any = layer.get_variable("params", "kernel")
  # A copy, which `_refuse_to_flax` tells from the layer's own.
  return meta.unbox(copy.copy(kernel) if isinstance(kernel, QuantizedWeight) else kernel)


def is_call_of_layer(context: Any) -> bool:
  return context.method_name == "__call__" and type(context.module) in LAYERS


def arguments(inputs: Any, einsum_str: str | None = None) -> tuple[Any, str | None]:
  """Those of any layer's call."""
  return inputs, einsum_str


def planned(layer: Any, args: Any, kwargs: Any) -> Contraction | str:
  """What a call of a layer computes, or why it is no qqmm."""
  for name in ("dot_general", "dot_general_cls"):
    if getattr(layer, name, None) is not None:
      return f"it has its own {name}, which qqmm would replace"
  try:
    return contraction(layer, *arguments(*args, **kwargs))
  except ValueError as error:
    return str(error).rstrip(".").partition(": ")[2]


def _to_state_dict(weight: QuantizedWeight) -> dict[str, Any]:
  arrays = {name: getattr(weight, name) for name in LEAVES}
  return {name: serialization.to_state_dict(a) for name, a in arrays.items() if a is not None}


def _from_state_dict(weight: QuantizedWeight, state: Mapping[str, Any]) -> QuantizedWeight:
  arrays = {
    name: serialization.from_state_dict(getattr(weight, name), a, name) for name, a in state.items()
  }
  checked = dataclasses.replace(meta.unbox(weight), **meta.unbox(arrays))
  boxes = {name: a for name, a in arrays.items() if isinstance(a, meta.AxisMetadata)}
  checked._set(**boxes)
  return checked


def _refuse_to_flax(weight: QuantizedWeight) -> None:
  """TypeError where a layer of Flax takes its packed kernel for an array.

  It compares the shapes of the arrays in it with its own kernel's, and Flax would say no more
  than that they differ (ScopeParamShapeError). No public name tells which layer is running.
  """
  layer: Any = linen_module._context.module_stack[-1]
  if type(layer) not in LAYERS or type(layer) is QQDense or layer.scope is None:
    return
  if layer.get_variable("params", "kernel") is weight:
    raise TypeError(
      f"nn.{type(layer).__name__}: the kernel of {'.'.join(layer.path)!r} is packed, and layers of "
      "Flax cannot multiply by it; run the model by jaxqq.nn.quantized_apply(model), which takes "
      "the arguments of model.apply."
    )


BEFORE_FLATTEN.append(_refuse_to_flax)

# For flax.serialization.to_bytes and what is built on it.
serialization.register_serialization_state(QuantizedWeight, _to_state_dict, _from_state_dict)
