"""Linear layers of experts: a stack of kernels, one for each group of rows of the inputs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike, DTypeLike

from jaxqq._checks import as_array, describe
from jaxqq._dot_general import DotGeneral
from jaxqq._formats import FORMATS, Mode
from jaxqq._given import DEFAULT_MODE, Given
from jaxqq._global_scales import DEFAULT, GlobalScale
from jaxqq._gradient import Backward
from jaxqq._out_sharding import OutSharding, checked_out_sharding, produced, told
from jaxqq._qqmm import checked as checked_plain
from jaxqq._qqmm import is_by_rows, placed_product, product, product_by_rows
from jaxqq._ragged import checked_groups, checked_ragged, placed_ragged
from jaxqq._ragged_explicit import mesh_of, spec_of
from jaxqq._split import dims_of, to_spec
from jaxqq._weight import QuantizedWeight
from jaxqq.nn.base import COPIED, NO_NUMBERS, QuantizedLayer
from jaxqq.nn.kernel import KernelAxes

EINSUM = "ecd,edf->ecf"
# A matrix of (in, out) for each expert, and none of them counts for another's fan.
KERNEL_INIT = nnx.initializers.lecun_normal(batch_axis=(0,))


class ExpertLinear(nnx.Module):
  """A linear layer for each expert, as people train them: what `quantize_model` converts.

  y[i] = inputs[i] @ kernel[e] + bias[e], where row i is one of expert e: the first group_sizes[0]
  rows are expert 0's, and so on, as of `jax.lax.ragged_dot`, which computes it. It becomes a
  `QQExpertLinear`.

  Args:
    num_experts: E.
    in_features: K.
    out_features: N.
    use_bias: whether there is a bias, (E, N).
    kernel_init: by default `lecun_normal`, of each expert by itself.
    rngs: as for `nnx.Linear`.
    options: dtype, param_dtype, precision, bias_init, promote_dtype, preferred_element_type,
      kernel_metadata and bias_metadata, as for `nnx.Linear`. The kernel is (E, K, N).

  Raises:
    ValueError: there is no expert.

  Example:
    >>> layer = jaxqq.nn.ExpertLinear(3, 64, 32, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((6, 64)), jnp.array([2, 0, 4])).shape
    (6, 32)

  Source: `flax.nnx.Linear`, `jax.lax.ragged_dot`; MLX LM's `SwitchLinear`.
  """

  dtype: Any
  param_dtype: Any
  precision: Any
  promote_dtype: Any
  preferred_element_type: Any

  def __init__(
    self,
    num_experts: int,
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = False,
    kernel_init: Any = KERNEL_INIT,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    if num_experts < 1:
      raise ValueError(f"ExpertLinear: num_experts must be at least 1, got {num_experts!r}.")
    shape = (num_experts, in_features, out_features)
    of_bias = (num_experts, out_features) if use_bias else None
    einsum = nnx.Einsum(EINSUM, shape, of_bias, kernel_init=kernel_init, rngs=rngs, **options)
    self.num_experts, self.in_features, self.out_features = shape
    self.use_bias = use_bias
    self.einsum_op = einsum.einsum_op
    for name in COPIED:
      setattr(self, name, getattr(einsum, name))
    self.kernel = einsum.kernel
    self.bias = nnx.data(None) if einsum.bias is None else einsum.bias

  def __call__(
    self,
    inputs: jax.Array,
    group_sizes: ArrayLike,
    group_offset: ArrayLike | None = None,
    out_sharding: OutSharding = None,
  ) -> jax.Array:
    """As for `QQExpertLinear`."""
    function = "ExpertLinear"
    check_inputs(function, inputs, ("M", self.in_features))
    kernel = self.kernel[...]
    sizes, offset = checked_groups(function, group_sizes, group_offset, kernel.shape[0])
    out_sharding = checked_out_sharding(function, out_sharding)
    bias = None if self.bias is None else self.bias[...]
    x, w, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
    own = None if group_offset is None else offset
    mesh = mesh_of([jax.typeof(a) for a in (x, w)])
    if out_sharding is None and mesh.explicit_axes:  # of which `ragged_dot` has no rule
      typed = [("inputs", jax.typeof(x), "mk"), ("kernel", jax.typeof(w), "gkn")]
      out_sharding = NamedSharding(mesh, spec_of(function, typed, "mn", "k"))
    y = told(self._ragged, out_sharding, x, w, sizes, own)
    return y if bias is None else with_bias(y, bias, sizes, offset)

  def _ragged(self, x: jax.Array, w: jax.Array, sizes: jax.Array, offset: Any) -> jax.Array:
    first = None
    if offset is not None:  # which `ragged_dot` does not have everywhere
      number = jnp.arange(sizes.shape[0], dtype=jnp.int32)
      first = jnp.sum(jnp.where(number < offset, sizes, 0))
      own = offset + jnp.arange(w.shape[0], dtype=jnp.int32)
      own = jnp.where(own < 0, sizes.shape[0], own)
      sizes = sizes.at[own].get(mode="fill", fill_value=0)
      x = jnp.roll(x, -first, axis=0)
    options = {"precision": self.precision, "preferred_element_type": self.preferred_element_type}
    y: jax.Array = lax.ragged_dot(x, w, sizes, **options)
    return y if first is None else jnp.roll(y, first, axis=0)

  def buffers(self, inputs: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
    """As for `QQExpertLinear`."""
    kernel = self.kernel[...]
    function = "ExpertLinear.buffers"
    check_inputs(function, inputs, (kernel.shape[0], "C", self.in_features))
    out_sharding = checked_out_sharding(function, out_sharding)
    bias = None if self.bias is None else self.bias[...]
    x, w, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
    options = {"precision": self.precision, "preferred_element_type": self.preferred_element_type}
    y = produced(functools.partial(jnp.einsum, EINSUM, **options), out_sharding, x, w)
    return y if bias is None else with_bias_of_buffers(y, bias)


class QQExpertLinear(QuantizedLayer):
  """A linear layer for each expert, which quantizes its inputs and its kernels.

  y[i, n] = sum_k inputs_hat[i, k] * kernel_hat[e, k, n] + bias[e, n], where row i is one of expert
  e: the first group_sizes[0] rows are expert 0's, and so on. While it trains, the kernel is an
  `nnx.Param` of shape (num_experts, in_features, out_features). `pack()` replaces it by its packed
  weight, (num_experts, N, K), in which every expert has a global scale of its own, packed or not:
  so an expert is the same on whichever device it is. `Experts` has the layers of whole experts, and
  sorts tokens.

  Args:
    num_experts: E.
    in_features: K, a multiple of the mode's group size.
    out_features: N.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    backward: "straight_through" or "quantized", as for `ragged_qqmm`.
    global_scale: nvfp4 only. "weight", there the default, gives each expert's kernel a global
      scale, its amax; "amax" also all of the inputs; "row" the kernels, and each row of the inputs
      a power of two; None gives none.
    quantize_input: False multiplies inputs as they are, as `ragged_quantized_matmul` does.
    rngs: as for `nnx.Linear`.
    options: those of `ExpertLinear`.

  Raises:
    ValueError: in_features makes no whole groups; there is no expert; mode, backward or
      global_scale is not as above, or backward is "quantized" and quantize_input False.

  Example:
    >>> layer = jaxqq.nn.QQExpertLinear(3, 64, 32, mode="mxfp8", rngs=nnx.Rngs(0))
    >>> x, sizes = jnp.ones((6, 64)), jnp.array([2, 0, 4])
    >>> y = layer(x, sizes)
    >>> layer.pack()
    >>> layer.weight
    QuantizedWeight(mxfp8, float32 (3, 32, 64))
    >>> bool((layer(x, sizes) == y).all())
    True

  Source: MLX LM's `QuantizedSwitchLinear`; `jax.lax.ragged_dot`.
  """

  original = ExpertLinear
  copied = ("num_experts", "in_features", "out_features", "use_bias")
  num_experts: int
  in_features: int
  out_features: int
  use_bias: bool

  def __init__(
    self,
    num_experts: int,
    in_features: int,
    out_features: int,
    *,
    mode: Mode = "nvfp4",
    backward: Backward = "straight_through",
    global_scale: GlobalScale = DEFAULT,
    quantize_input: bool = True,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    linear = ExpertLinear(num_experts, in_features, out_features, rngs=rngs, **options)
    dot_general = _dot_general(mode, backward, global_scale, quantize_input)
    self._take("QQExpertLinear", linear, dot_general)

  @classmethod
  def from_linear(
    cls,
    linear: ExpertLinear,
    *,
    mode: Mode = "nvfp4",
    backward: Backward = "straight_through",
    global_scale: GlobalScale = DEFAULT,
    quantize_input: bool = True,
  ) -> Self:
    """The same layer as an `ExpertLinear`, whose variables it shares; as `QQLinear.from_linear`."""
    dot_general = _dot_general(mode, backward, global_scale, quantize_input)
    return cls._from("from_linear", linear, dot_general)

  @classmethod
  def from_weight(
    cls,
    weight: QuantizedWeight,
    bias: jax.Array | None = None,
    *,
    dtype: DTypeLike | None = None,
    global_scale: GlobalScale = DEFAULT,
    quantize_input: bool | None = None,
  ) -> Self:
    """A packed layer of weights that exist, as those of a checkpoint.

    Args:
      weight: (num_experts, N, K).
      bias: (num_experts, N), or None.
      dtype, global_scale, quantize_input: as for `QQLinear.from_weight`.

    Raises:
      ValueError: weight or bias has another shape.

    Example:
      >>> weight = jaxqq.quantize_weight(jnp.ones((3, 32, 64)))
      >>> layer = jaxqq.nn.QQExpertLinear.from_weight(weight)
      >>> layer(jnp.ones((6, 64)), jnp.array([2, 0, 4])).shape
      (6, 32)
    """
    function = f"{cls.__name__}.from_weight"
    if weight.ndim != 3:
      raise ValueError(
        f"{function}: weight must have three dimensions, (num_experts, N, K), got {weight!r}."
      )
    if bias is not None and jnp.shape(bias) != weight.shape[:2]:
      raise ValueError(
        f"{function}: bias must have shape {weight.shape[:2]}, (num_experts, N), got "
        f"{describe(bias)}."
      )
    if quantize_input is not None:
      weight = dataclasses.replace(weight, quantize_input=quantize_input)
    dot_general = _dot_general(weight.mode, "straight_through", global_scale, weight.quantize_input)
    layer = cls._placeholder(dot_general, dtype=dtype)
    layer.num_experts, layer.out_features, layer.in_features = weight.shape
    layer.use_bias = bias is not None
    if bias is not None:
      layer.bias = nnx.Param(jnp.asarray(bias))
    layer.set_weight(weight)
    return layer

  @classmethod
  def _placeholder(cls, dot_general: DotGeneral, **options: Any) -> Self:
    build: Any = cls
    k = FORMATS[dot_general.mode].group_size
    return build(1, k, 1, mode=dot_general.mode, **NO_NUMBERS, **options)

  @classmethod
  def _scale_of_kernel(cls, choice: GlobalScale) -> GlobalScale:
    return None if choice is None else "amax"

  def _kernel_axes(self) -> KernelAxes:
    shape = (self.num_experts, self.in_features, self.out_features)
    return KernelAxes(shape, batch=(0,), free=(2,), contracting=(1,))

  def __call__(
    self,
    inputs: jax.Array,
    group_sizes: ArrayLike,
    group_offset: ArrayLike | None = None,
    out_sharding: OutSharding = None,
  ) -> jax.Array:
    """Rows in groups, (M, in_features) to (M, out_features); rows of no expert become zeros.

    Args:
      inputs: (M, in_features), sorted by expert.
      group_sizes: integers, (num_experts,): how many rows each expert has.
      group_offset: the expert of the layer's first kernel, where it has fewer than there are sizes,
        those of one device of many: rows of the others become zeros.
      out_sharding: where the result goes, as for `ragged_qqmm`.
    """
    function = type(self).__name__
    check_inputs(function, inputs, ("M", self.in_features))
    matrices = self._num_matrices()
    sizes, offset = checked_groups(function, group_sizes, group_offset, matrices)
    x, kernel, bias = self._promoted(inputs)
    given = self._given(x, kernel)
    operands, params = checked_ragged(function, given, sizes, offset)
    by_rows = is_by_rows(given.global_scale_x)
    y = placed_ragged(function, operands, params, out_sharding, by_rows=by_rows)
    return y if bias is None else with_bias(y, bias, sizes, offset)

  def buffers(self, inputs: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
    """Buffers of so many rows for each expert: the einsum "ecd,edf->ecf" of the same kernels.

    Args:
      inputs: (num_experts, C, in_features), C being the capacity of each expert.
      out_sharding: where the result goes, as for `qqmm`.

    Returns:
      (num_experts, C, out_features).
    """
    function = f"{type(self).__name__}.buffers"
    check_inputs(function, inputs, (self._num_matrices(), "C", self.in_features))
    x, kernel, bias = self._promoted(inputs)
    given = self._given(x, kernel)
    operands, params = checked_plain(function, given)
    multiply = product_by_rows if is_by_rows(given.global_scale_x) else product
    y = placed_product(function, operands, params, out_sharding, multiply)
    return y if bias is None else with_bias_of_buffers(y, bias)

  def _num_matrices(self) -> int:
    """How many experts are here, which inside of a `jax.shard_map` may be a device's own."""
    held: Any = self.weight if self.kernel is None else self.kernel
    return int(held.shape[0])

  def _given(self, x: jax.Array, kernel: jax.Array) -> Given:
    """What the layer gives to a product."""
    w, mode, of_x, of_w = self._weight_and_scales(kernel)
    return Given(
      x,
      w,
      mode=mode,
      global_scale_x=of_x,
      global_scale_w=of_w,
      backward=self.dot_general.backward,
      precision=self.precision,
      preferred_element_type=self.preferred_element_type,
      implementation=self.dot_general.implementation,
      quantize_input=self.quantize_input,
    )

  def _weight_and_scales(self, kernel: jax.Array) -> tuple[Any, Mode, Any, Any]:
    """w, its mode, and the global scales of inputs and w, as `ragged_qqmm` takes them."""
    weight, choice = self.weight, self.dot_general.global_scale
    if weight is not None:
      is_asked = choice == "row" or (choice == "amax" and weight.input_global_scale is None)
      return weight, DEFAULT_MODE, choice if is_asked and self.quantize_input else None, None
    w, of_w = jnp.swapaxes(kernel, 1, 2), None if choice is None else "amax"
    of_x = FORMATS[self.mode].largest_value if choice == "weight" else choice
    return w, self.mode, of_x if self.quantize_input else None, of_w


def _dot_general(
  mode: Mode, backward: Backward, global_scale: GlobalScale, quantize_input: bool
) -> DotGeneral:
  return DotGeneral(mode, backward, global_scale, None, quantize_input, "QQExpertLinear")


def check_inputs(function: str, inputs: Any, shape: tuple[int | str, ...]) -> None:
  """A name in shape stands for any size."""
  own = tuple(as_array(function, "inputs", inputs).shape)
  fits = len(own) == len(shape) and all(
    isinstance(want, str) or want == size for want, size in zip(shape, own, strict=True)
  )
  if not fits:
    right = ", ".join(map(str, shape))
    raise ValueError(f"{function}: inputs must have shape ({right}), got {describe(inputs)}.")


def with_bias(
  y: jax.Array, bias: jax.Array, group_sizes: jax.Array, group_offset: jax.Array
) -> jax.Array:
  """y + the bias of each row, split as y is."""
  own = functools.partial(bias_of_rows, count=y.shape[0])
  sharding = jax.typeof(y).sharding
  if not sharding.mesh.explicit_axes:
    return y + own(bias, group_sizes, group_offset)
  return y + told(own, sharding, bias, group_sizes, group_offset)


def with_bias_of_buffers(y: jax.Array, bias: jax.Array) -> jax.Array:
  """(E, C, N) + (E, N), split as the former is."""
  bias, sharding = bias[:, None, :], jax.typeof(y).sharding
  if sharding.mesh.explicit_axes:
    experts, _, columns = dims_of(sharding, 3)
    sharding = NamedSharding(sharding.mesh, to_spec([experts, (), columns]))
    bias = jax.sharding.reshard(bias, sharding)
  return y + bias


def bias_of_rows(
  bias: jax.Array, group_sizes: jax.Array, group_offset: jax.Array, count: int
) -> jax.Array:
  """(count, N): that of each row's expert, zeros for a row of none that bias, (E, N), has."""
  ends = jnp.cumsum(jnp.maximum(group_sizes, 0))
  row = jnp.arange(count, dtype=ends.dtype)
  # Past the last end it is as many as there are, and of no group.
  group = jnp.sum(ends[None] <= row[:, None], axis=1, dtype=jnp.int32)
  own = group - group_offset
  is_own = (own >= 0) & (group < group_sizes.shape[0])
  own = jnp.where(is_own, own, bias.shape[0])
  return bias.at[own].get(mode="fill", fill_value=0)
