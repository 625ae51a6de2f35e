"""The layers of Flax NNX that multiply, with `qqmm` as their product."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxqq import _einsum
from jaxqq._dot_general import DotGeneral
from jaxqq._formats import FORMATS, Mode
from jaxqq._given import DEFAULT_MODE
from jaxqq._global_scales import DEFAULT, GlobalScale
from jaxqq._gradient import Backward
from jaxqq._out_sharding import OutSharding, placed
from jaxqq._recipe import Recipe
from jaxqq._weight import QuantizedWeight
from jaxqq.nn.base import NO_NUMBERS, QuantizedLayer
from jaxqq.nn.expert_linear import QQExpertLinear
from jaxqq.nn.kernel import KernelAxes, axes_of_einsum, known_axes


class QQLinear(QuantizedLayer):
  """A linear layer that quantizes its inputs and its kernel: `nnx.Linear` by `qqmm`.

  y[..., n] = sum_k x_hat[..., k] * kernel_hat[k, n] + bias[n]. While it trains, the kernel is an
  `nnx.Param` of shape (in_features, out_features) in full precision, as that of `nnx.Linear`, and
  quantized in every call. `pack()` replaces it by its packed weight, for serving, and `unpack()`
  goes back.

  Args:
    in_features: K, a multiple of the mode's group size.
    out_features: N.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    backward: "straight_through" or "quantized", as for `qqmm`.
    global_scale: nvfp4 only. "weight", there the default, gives the kernel a global scale, its
      amax, taken in every call (of a packed kernel, once); "amax" gives the inputs one too, in
      every call; "row" the kernel, and each row of the inputs a power of two; None gives none.
    implementation: what computes the product, as for `qqmm`.
    quantize_input: False multiplies inputs as they are, as `quantized_matmul` does.
    recipe: a `jaxqq.Recipe` for training, or the name of one, in place of mode and backward. What
      is random in it comes from a stream of rngs, "recipe"; the layer draws a key in every call.
      `pack` quantizes the kernel in rows then, with mode and global_scale as for `dot_general`.
    rngs: as for `nnx.Linear`.
    options: use_bias, dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype,
      preferred_element_type, kernel_metadata and bias_metadata, as for `nnx.Linear`.

  Raises:
    ValueError: in_features makes no whole groups; mode, backward, global_scale or implementation
      is not as above, or backward is "quantized" and quantize_input False.

  Example:
    >>> layer = jaxqq.nn.QQLinear(64, 32, mode="mxfp8", rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((2, 5, 64)))
    >>> layer.pack()
    >>> layer.weight
    QuantizedWeight(mxfp8, float32 (32, 64))
    >>> bool((layer(jnp.ones((2, 5, 64))) == y).all())
    True

  Source: `mlx.nn.QQLinear`; `flax.nnx.Linear`.
  """

  original = nnx.Linear
  copied = ("in_features", "out_features", "use_bias")
  in_features: int
  out_features: int
  use_bias: bool

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    mode: Mode = DEFAULT_MODE,
    backward: Backward = "straight_through",
    global_scale: GlobalScale = DEFAULT,
    implementation: str | None = None,
    quantize_input: bool = True,
    recipe: Recipe | str | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    linear = nnx.Linear(in_features, out_features, rngs=rngs, **options)
    dot_general = DotGeneral(
      mode, backward, global_scale, implementation, quantize_input, "QQLinear", recipe
    )
    self._take("QQLinear", linear, dot_general, rngs)

  @classmethod
  def from_linear(
    cls,
    linear: nnx.Linear,
    *,
    mode: Mode = DEFAULT_MODE,
    backward: Backward = "straight_through",
    global_scale: GlobalScale = DEFAULT,
    implementation: str | None = None,
    quantize_input: bool = True,
    recipe: Recipe | str | None = None,
    rngs: nnx.Rngs | None = None,
  ) -> Self:
    """The same layer as an `nnx.Linear`, whose variables it shares.

    Raises:
      TypeError: linear is no `nnx.Linear`, or of a class made from it.
      ValueError: its in_features make no whole groups, or it has a dot_general of its own.

    Example:
      >>> linear = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
      >>> layer = jaxqq.nn.QQLinear.from_linear(linear, mode="mxfp8")
      >>> layer.kernel is linear.kernel
      True
    """
    dot_general = DotGeneral(
      mode, backward, global_scale, implementation, quantize_input, cls.__name__, recipe
    )
    return cls._from("from_linear", linear, dot_general, rngs)

  @classmethod
  def from_weight(
    cls,
    weight: QuantizedWeight,
    bias: jax.Array | None = None,
    *,
    dtype: DTypeLike | None = None,
    global_scale: GlobalScale = DEFAULT,
    implementation: str | None = None,
    quantize_input: bool | None = None,
  ) -> Self:
    """A packed layer of a weight that exists, as one from a checkpoint.

    Args:
      weight: (N, K).
      bias: (N,), or None.
      dtype: that of the computation; None is inferred from inputs, weight and bias.
      global_scale: "amax" gives inputs a global scale in every call, where the weight has one and
        brings no static one for them.
      implementation: what computes the product, as for `qqmm`.
      quantize_input: whether inputs are quantized; None is as the weight says.

    Example:
      >>> weight = jaxqq.quantize_weight(jnp.ones((32, 64)))
      >>> jaxqq.nn.QQLinear.from_weight(weight)(jnp.ones((2, 64))).shape
      (2, 32)
    """
    dot_general = DotGeneral(
      weight.mode,
      global_scale=global_scale,
      implementation=implementation,
      function=cls.__name__,
    )
    layer = cls._placeholder(dot_general, dtype=dtype)
    layer.dot_general = dot_general
    layer.out_features, layer.in_features = weight.shape[-2:]
    layer.use_bias = bias is not None
    if bias is not None:
      layer.bias = nnx.Param(jnp.asarray(bias))
    if quantize_input is not None:
      weight = dataclasses.replace(weight, quantize_input=quantize_input)
    layer.set_weight(weight)
    return layer

  def _kernel_axes(self) -> KernelAxes:
    return KernelAxes((self.in_features, self.out_features), (), (1,), (0,))

  def __call__(self, inputs: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
    """(..., in_features) to (..., out_features)."""
    inputs, kernel, bias = self._promoted(inputs)
    y = placed(self._product(inputs, kernel, (inputs.ndim - 1,), ()), out_sharding)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class QQLinearGeneral(QuantizedLayer):
  """A linear layer over several axes: `nnx.LinearGeneral` by `qqmm`, as attention projects.

  The contracted axes are flattened in the kernel's order, and groups run along them.

  Args:
    in_features, out_features, axis, batch_axis, rngs: as for `nnx.LinearGeneral`; the product of
      in_features is a multiple of the mode's group size.
    mode, backward, global_scale, implementation, quantize_input, recipe: as for `QQLinear`. Each
      matrix of a batch has its own scale.
    options: the other arguments of `nnx.LinearGeneral`.

  Raises:
    ValueError: in_features makes no whole groups; mode, backward, global_scale or implementation
      is not as above.

  Example:
    >>> layer = jaxqq.nn.QQLinearGeneral(64, (4, 16), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 64))).shape
    (2, 5, 4, 16)

  Source: `flax.nnx.LinearGeneral`.
  """

  original = nnx.LinearGeneral
  copied = ("in_features", "out_features", "axis", "batch_axis", "use_bias")
  in_features: tuple[int, ...]
  out_features: tuple[int, ...]
  axis: tuple[int, ...]
  batch_axis: Mapping[int, int]
  use_bias: bool

  def __init__(
    self,
    in_features: int | Sequence[int],
    out_features: int | Sequence[int],
    *,
    axis: int | Sequence[int] = -1,
    batch_axis: Mapping[int, int] | None = None,
    mode: Mode = DEFAULT_MODE,
    backward: Backward = "straight_through",
    global_scale: GlobalScale = DEFAULT,
    implementation: str | None = None,
    quantize_input: bool = True,
    recipe: Recipe | str | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    linear = nnx.LinearGeneral(
      in_features, out_features, axis=axis, batch_axis=batch_axis or {}, rngs=rngs, **options
    )
    dot_general = DotGeneral(
      mode, backward, global_scale, implementation, quantize_input, "QQLinearGeneral", recipe
    )
    self._take("QQLinearGeneral", linear, dot_general, rngs)

  @classmethod
  def from_linear(
    cls,
    linear: nnx.LinearGeneral,
    *,
    mode: Mode = DEFAULT_MODE,
    backward: Backward = "straight_through",
    global_scale: GlobalScale = DEFAULT,
    implementation: str | None = None,
    quantize_input: bool = True,
    recipe: Recipe | str | None = None,
    rngs: nnx.Rngs | None = None,
  ) -> Self:
    """The same layer as an `nnx.LinearGeneral`, whose variables it shares; as for `QQLinear`."""
    dot_general = DotGeneral(
      mode, backward, global_scale, implementation, quantize_input, cls.__name__, recipe
    )
    return cls._from("from_linear", linear, dot_general, rngs)

  def _kernel_axes(self) -> KernelAxes:
    parts = (tuple(self.batch_axis.values()), self.in_features, self.out_features)
    batch, contracting, end = np.cumsum([len(part) for part in parts]).tolist()
    return KernelAxes(
      shape=tuple(size for part in parts for size in part),
      batch=tuple(range(batch)),
      free=tuple(range(contracting, end)),
      contracting=tuple(range(batch, contracting)),
    )

  def __call__(self, inputs: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
    """Contracts the axes `axis`: (batch, others, in_features) to (batch, others, out_features)."""
    name = type(self).__name__
    axis, batch = (known_axes(name, axes, inputs) for axes in (self.axis, self.batch_axis))
    rows = tuple(size if i in batch else 1 for i, size in enumerate(inputs.shape) if i not in axis)
    inputs, kernel, bias = self._promoted(inputs)
    y = placed(self._product(inputs, kernel, axis, batch), out_sharding)
    return y if bias is None else y + bias.reshape(*rows, *self.out_features)


class QQEinsum(QuantizedLayer):
  """An einsum of the inputs and a kernel: `nnx.Einsum` by `qqmm`.

  Args:
    einsum_str, kernel_shape, bias_shape, rngs: as for `nnx.Einsum`; the indices in both operands
      and not in the output have a product of sizes that is a multiple of the mode's group size.
    mode, backward, global_scale, implementation, quantize_input, recipe: as for `QQLinear`. Each
      matrix of a batch has its own scale.
    options: the other arguments of `nnx.Einsum`.

  Raises:
    ValueError: the einsum is no product of matrices, or sums over what makes no whole groups;
      mode, backward, global_scale or implementation is not as above.

  Example:
    >>> layer = jaxqq.nn.QQEinsum("btd,dhk->bthk", (64, 4, 16), (4, 16), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 64))).shape
    (2, 5, 4, 16)

  Source: `flax.nnx.Einsum`.
  """

  original = nnx.Einsum
  copied = ("einsum_str", "kernel_shape", "bias_shape")
  einsum_str: str
  kernel_shape: tuple[int, ...]
  bias_shape: tuple[int, ...] | None

  def __init__(
    self,
    einsum_str: str,
    kernel_shape: Sequence[int],
    bias_shape: Sequence[int] | None = None,
    *,
    mode: Mode = DEFAULT_MODE,
    backward: Backward = "straight_through",
    global_scale: GlobalScale = DEFAULT,
    implementation: str | None = None,
    quantize_input: bool = True,
    recipe: Recipe | str | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    einsum = nnx.Einsum(einsum_str, tuple(kernel_shape), bias_shape, rngs=rngs, **options)
    dot_general = DotGeneral(
      mode, backward, global_scale, implementation, quantize_input, "QQEinsum", recipe
    )
    self._take("QQEinsum", einsum, dot_general, rngs)

  @classmethod
  def from_einsum(
    cls,
    einsum: nnx.Einsum,
    *,
    mode: Mode = DEFAULT_MODE,
    backward: Backward = "straight_through",
    global_scale: GlobalScale = DEFAULT,
    implementation: str | None = None,
    quantize_input: bool = True,
    recipe: Recipe | str | None = None,
    rngs: nnx.Rngs | None = None,
  ) -> Self:
    """The same layer as an `nnx.Einsum`, whose variables it shares; as `QQLinear.from_linear`."""
    dot_general = DotGeneral(
      mode, backward, global_scale, implementation, quantize_input, cls.__name__, recipe
    )
    return cls._from("from_einsum", einsum, dot_general, rngs)

  @classmethod
  def _placeholder(cls, dot_general: DotGeneral, **options: Any) -> Self:
    build: Any = cls
    shape = (FORMATS[dot_general.mode].group_size, 1)
    return build("ab,bc->ac", shape, mode=dot_general.mode, **NO_NUMBERS, **options)

  def _kernel_axes(self) -> KernelAxes:
    return axes_of_einsum("QQEinsum", self.einsum_str, self.kernel_shape)

  def __call__(
    self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: OutSharding = None
  ) -> jax.Array:
    """einsum(inputs, kernel) + bias; einsum_str may only be the layer's own."""
    if einsum_str is not None and einsum_str.replace(" ", "") != self.einsum_str:
      raise ValueError(
        f"QQEinsum: einsum_str {einsum_str!r} is not the layer's {self.einsum_str!r}, by which its "
        "kernel is quantized; make a layer for each."
      )
    plan = _einsum.plan("QQEinsum", self.einsum_str, inputs.ndim, len(self.kernel_shape))
    inputs, kernel, bias = self._promoted(inputs)
    y = plan.in_order(self._product(inputs, kernel, plan.x_contracting, plan.x_batch))
    y = placed(y, out_sharding)
    if bias is None:
      return y
    shape = (1 if i is None else self.kernel_shape[i] for i in plan.w_in_out)
    return y + bias.reshape(*shape)


LAYERS: dict[type[nnx.Module], type[QuantizedLayer]] = {
  layer.original: layer for layer in (QQLinear, QQLinearGeneral, QQEinsum, QQExpertLinear)
}
