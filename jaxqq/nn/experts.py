"""Experts: feed-forward layers of which each token takes some, as a router outside chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from jaxqq._checks import as_array, as_int32, check_bool, describe
from jaxqq._formats import Mode
from jaxqq._global_scales import DEFAULT, GlobalScale
from jaxqq._gradient import Backward
from jaxqq._out_sharding import OutSharding, checked_out_sharding, placed, told
from jaxqq._ragged_explicit import mesh_of
from jaxqq._split import dims_of, to_spec
from jaxqq.nn.expert_linear import ExpertLinear, QQExpertLinear, check_inputs

Linear = ExpertLinear | QQExpertLinear
Activation = Callable[[jax.Array], jax.Array]


class Experts(nnx.Module):
  """The experts of a mixture of experts; the router is outside.

  expert_e(x) = down_proj_e(activation(gate_proj_e(x)) * up_proj_e(x)), or without a gate
  down_proj_e(activation(up_proj_e(x))). A call gives sum_t weights[..., t] * expert_e(x), where
  e = experts[..., t]. Tokens are sorted by expert, multiplied in groups, and put back: a token
  costs what its experts cost, and none is dropped.

  Its layers, `gate_proj`, `up_proj` and `down_proj`, are `ExpertLinear`s, which `quantize_model`
  converts, or of `QQExperts` `QQExpertLinear`s.

  Args:
    num_experts: E.
    features: K, of a token, and of what comes out.
    hidden_features: N, of an expert.
    activation: a function of an array.
    gated: whether there is a gate_proj.
    rngs: as for `nnx.Linear`.
    options: use_bias and the others of `ExpertLinear`, for each layer.

  Raises:
    TypeError: a size is no integer, or activation no function.
    ValueError: there is no expert, or an axis is empty.

  Example:
    >>> layer = jaxqq.nn.Experts(4, 64, 128, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 5, 64))
    >>> router = jax.random.normal(jax.random.key(0), (2, 5, 4))
    >>> weights, experts = jax.lax.top_k(jax.nn.softmax(router), 2)
    >>> layer(x, experts, weights).shape
    (2, 5, 64)

  Source: MLX LM's `SwitchGLU`, which has no weights; Mixtral (arXiv:2401.04088).
  """

  gate_proj: Linear | None
  up_proj: Linear
  down_proj: Linear

  def __init__(
    self,
    num_experts: int,
    features: int,
    hidden_features: int,
    *,
    activation: Activation = nnx.silu,
    gated: bool = True,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    name = type(self).__name__
    sizes = {"num_experts": num_experts, "features": features, "hidden_features": hidden_features}
    for what, size in sizes.items():
      if not isinstance(size, (int, np.integer)):
        raise TypeError(f"{name}: {what} must be an integer, got {size!r}.")
      if size < 1:
        raise ValueError(f"{name}: {what} must be at least 1, got {size!r}.")
    if not callable(activation):
      raise TypeError(f"{name}: activation must be a function of an array, got {activation!r}.")
    self.num_experts, self.features, self.hidden_features = num_experts, features, hidden_features
    self.activation = activation
    up, down = (features, hidden_features), (hidden_features, features)
    is_gated = check_bool(type(self).__name__, "gated", gated)
    self.gate_proj = nnx.data(self._linear(*up, rngs, options) if is_gated else None)
    self.up_proj = self._linear(*up, rngs, options)
    self.down_proj = self._linear(*down, rngs, options)

  def _linear(self, k: int, n: int, rngs: nnx.Rngs, options: dict[str, Any]) -> Linear:
    return ExpertLinear(self.num_experts, k, n, rngs=rngs, **options)

  def __call__(
    self,
    inputs: jax.Array,
    experts: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    group_offset: ArrayLike | None = None,
    out_sharding: OutSharding = None,
  ) -> jax.Array:
    """Tokens through the experts that each of them takes.

    Args:
      inputs: (..., features).
      experts: integers, (..., top), numbers of experts; one that is none, -1 or num_experts for
        example, stands for no expert, whose result is zero.
      weights: floats, (..., top), by which results are summed, in float32. Not normalized here.
      group_offset: the first expert that is here, where the layer has fewer than num_experts, say
        those of one device of many: others count as zeros, so that the sum over devices is whole.
      out_sharding: where the result goes, as for `qqmm`. On explicit axes None is as inputs are
        split.

    Returns:
      (..., features); without weights (..., top, features).

    Raises:
      TypeError: experts are no integers, or weights no floats.
      ValueError: a shape is not as above.
    """
    function = type(self).__name__
    numbers, factors = self._checked(function, inputs, experts, weights)
    out_sharding = checked_out_sharding(function, out_sharding)
    x = jnp.asarray(inputs)
    mesh = mesh_of([jax.typeof(a) for a in (x, numbers)])
    if not mesh.explicit_axes:
      return placed(self._of_tokens(x, numbers, factors, group_offset), out_sharding)
    if out_sharding is None:
      *of_tokens, of_features = dims_of(jax.typeof(x).sharding, x.ndim)
      top = [()] if factors is None else []
      out_sharding = NamedSharding(mesh, to_spec([*of_tokens, *top, of_features]))
    graph, state = nnx.split(self)
    leaves, tree = jax.tree.flatten(state)
    offset = None if group_offset is None else jnp.asarray(group_offset)

    def whole(leaves: Any, *args: Any) -> jax.Array:
      return nnx.merge(graph, jax.tree.unflatten(tree, leaves))._of_tokens(*args)

    return told(whole, out_sharding, leaves, x, numbers, factors, offset)

  def _of_tokens(
    self,
    inputs: jax.Array,
    numbers: jax.Array,
    factors: jax.Array | None,
    group_offset: ArrayLike | None,
  ) -> jax.Array:
    """Sorted by expert, multiplied in groups, put back in their order and summed."""
    tokens = inputs.reshape(-1, self.features)
    top, shape = numbers.shape[-1], numbers.shape
    chosen = numbers.reshape(-1)
    is_one = (chosen >= 0) & (chosen < self.num_experts)
    chosen = jnp.where(is_one, chosen, self.num_experts)  # what is none comes last
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.zeros(self.num_experts, jnp.int32).at[chosen].add(1, mode="drop")
    out = self.grouped(tokens[order // max(top, 1)], sizes, group_offset)
    out = out.at[jnp.argsort(order)].get(mode="promise_in_bounds", unique_indices=True)
    out = out.reshape(*shape, out.shape[-1])
    if factors is None:
      return out
    factors = jnp.where(is_one.reshape(shape), factors, jnp.zeros((), factors.dtype))  # of NaN, too
    total = jnp.sum(out.astype(jnp.float32) * factors[..., None].astype(jnp.float32), axis=-2)
    return total.astype(out.dtype)

  def _checked(
    self, function: str, inputs: Any, experts: Any, weights: Any
  ) -> tuple[jax.Array, jax.Array | None]:
    """Numbers of experts as int32, and weights."""
    shape = tuple(as_array(function, "inputs", inputs).shape)
    if not shape or shape[-1] != self.features:
      raise ValueError(
        f"{function}: inputs must have shape (..., {self.features}), got {describe(inputs)}."
      )
    given = as_array(function, "experts", experts)
    if not jnp.issubdtype(given.dtype, jnp.integer):
      raise TypeError(
        f"{function}: experts must be integers, the numbers of each token's experts, got "
        f"{describe(given)}."
      )
    if tuple(given.shape[:-1]) != shape[:-1] or not given.shape:
      raise ValueError(
        f"{function}: experts must have the shape {_with_top(shape)}, some for each token, got "
        f"{describe(given)}."
      )
    numbers = as_int32(given)
    if weights is None:
      return numbers, None
    factors = as_array(function, "weights", weights)
    if not jnp.issubdtype(factors.dtype, jnp.floating):
      raise TypeError(
        f"{function}: weights must be floats, one for each of a token's experts, got "
        f"{describe(factors)}."
      )
    if tuple(factors.shape) != tuple(given.shape):
      raise ValueError(
        f"{function}: weights must have the shape of experts, {tuple(given.shape)}, got "
        f"{describe(factors)}."
      )
    return numbers, jnp.asarray(factors)

  def grouped(
    self,
    inputs: jax.Array,
    group_sizes: ArrayLike,
    group_offset: ArrayLike | None = None,
    out_sharding: OutSharding = None,
  ) -> jax.Array:
    """Rows that are sorted by expert, (M, features) to (M, features), as for `QQExpertLinear`.

    Args:
      inputs: (M, features).
      group_sizes: integers, (num_experts,): how many rows each expert has.
      group_offset: as in a call.
      out_sharding: where the result goes, as for `ragged_qqmm`: that of down_proj.
    """
    check_inputs(f"{type(self).__name__}.grouped", inputs, ("M", self.features))

    def product(layer: Linear, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
      return layer(x, group_sizes, group_offset, out_sharding)

    return self._through(product, inputs, out_sharding)

  def buffers(self, inputs: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
    """Buffers of so many rows for each expert, (num_experts, C, features) to the same shape.

    out_sharding is where the result goes, as for `qqmm`.
    """

    def product(layer: Linear, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
      return layer.buffers(x, out_sharding)

    return self._through(product, inputs, out_sharding)

  def _through(
    self, product: Callable[..., jax.Array], x: jax.Array, out_sharding: OutSharding
  ) -> jax.Array:
    up = product(self.up_proj, x)
    if self.gate_proj is None:
      return product(self.down_proj, self.activation(up), out_sharding)
    x = self.activation(product(self.gate_proj, x)) * up
    return product(self.down_proj, x, out_sharding)


class QQExperts(Experts):
  """`Experts` that quantize their inputs and kernels: for training and, packed, for serving.

  Args:
    num_experts, features, hidden_features, activation, gated, rngs, options: as for `Experts`;
      features and hidden_features are multiples of the mode's group size.
    mode, backward, global_scale, quantize_input: as for `QQExpertLinear`.

  Raises:
    ValueError: as for `QQExpertLinear`.

  Example:
    >>> layer = jaxqq.nn.QQExperts(4, 64, 128, mode="mxfp8", rngs=nnx.Rngs(0))
    >>> jaxqq.nn.pack(layer)
    >>> layer.down_proj.weight
    QuantizedWeight(mxfp8, float32 (4, 64, 128))
    >>> layer(jnp.ones((5, 64)), jnp.array([[0, 3]] * 5), jnp.full((5, 2), 0.5)).shape
    (5, 64)

  Source: as for `Experts`.
  """

  def __init__(
    self,
    num_experts: int,
    features: int,
    hidden_features: int,
    *,
    activation: Activation = nnx.silu,
    gated: bool = True,
    mode: Mode = "nvfp4",
    backward: Backward = "straight_through",
    global_scale: GlobalScale = DEFAULT,
    quantize_input: bool = True,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    if "recipe" in options:
      raise TypeError(
        f"{type(self).__name__}: products in groups have no recipe; mode and backward say how they "
        "are quantized."
      )
    own: dict[str, Any] = {"mode": mode, "backward": backward, "global_scale": global_scale}
    own["quantize_input"] = quantize_input
    super().__init__(
      num_experts,
      features,
      hidden_features,
      activation=activation,
      gated=gated,
      rngs=rngs,
      **own,
      **options,
    )

  def _linear(self, k: int, n: int, rngs: nnx.Rngs, options: dict[str, Any]) -> Linear:
    return QQExpertLinear(self.num_experts, k, n, rngs=rngs, **options)


def _with_top(shape: tuple[int, ...]) -> str:
  return "(" + "".join(f"{size}, " for size in shape[:-1]) + "top)"
