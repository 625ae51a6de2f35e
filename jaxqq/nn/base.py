"""What the layers of Flax NNX share: a kernel that can be packed, and its product with inputs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxqq._dot_general import DotGeneral
from jaxqq._formats import FORMATS, Mode
from jaxqq._global_scales import DEFAULT, GlobalScale
from jaxqq._weight import LEAVES, QuantizedWeight
from jaxqq.nn.kernel import Axes, KernelAxes

# Attributes of every layer of nnx.
COPIED = ("dtype", "param_dtype", "precision", "promote_dtype", "preferred_element_type")
# Functions that a layer of nnx may have been given, and what they are in one that was given none.
OVERRIDES: dict[str, tuple[Any, ...]] = {
  "dot_general": (None, lax.dot_general),
  "dot_general_cls": (None,),
  "einsum_op": (None, jnp.einsum),
}
# Metadata of a variable that says where it lives, and holds for a packed kernel too.
PLACEMENT = ("mesh", "sharding_rules", "eager_sharding")


class _NoKeys:
  """Random keys for initializers that use none."""

  def params(self) -> None:
    return None


NO_NUMBERS: Any = {
  "kernel_init": lambda key, shape, dtype: np.zeros(shape, dtype),
  "rngs": _NoKeys(),
}


STREAM = "recipe"  # of random keys, for layers whose recipe has something random


def check_rngs(function: str, dot_general: DotGeneral, rngs: Any) -> None:
  """There is a random stream, where one is needed."""
  if not dot_general.needs_key:
    return
  got = type(rngs).__name__
  if isinstance(rngs, nnx.Rngs):
    if STREAM in rngs or "default" in rngs:
      return
    got = f"nnx.Rngs with {', '.join(map(repr, rngs))}"
  raise ValueError(
    f"{function}: the recipe rounds or rotates at random, for which rngs needs a stream "
    f"{STREAM!r}, got {got}; pass rngs=nnx.Rngs({STREAM}=0)."
  )


def stream_of(function: str, dot_general: DotGeneral, rngs: Any) -> nnx.RngStream | None:
  """The random stream of one layer, of its own, where it needs one."""
  check_rngs(function, dot_general, rngs)
  return rngs[STREAM].fork() if dot_general.needs_key else None


class Packed(nnx.Variable[Any]):
  """An array of a packed kernel. It is no `nnx.Param`: gradients and optimizers pass it by."""


class QuantizedLayer(nnx.Module):
  """A kernel, unpacked as `kernel` or packed as `weight`, and a bias.

  A subclass says which axes of its kernel are what, and calls `_product`. More axes in front
  are those of stacked layers, as `nnx.vmap` makes them.
  """

  dot_general: DotGeneral
  dtype: Any
  param_dtype: Any
  precision: Any
  promote_dtype: Any
  preferred_element_type: Any
  input_global_scale: Packed | None
  recipe_rngs: nnx.RngStream | None

  original: ClassVar[type[nnx.Module]]  # the layer of nnx that it stands for
  copied: ClassVar[tuple[str, ...]]  # and attributes of that

  def _take(
    self, function: str, layer: Any, dot_general: DotGeneral, rngs: nnx.Rngs | None = None
  ) -> None:
    """Becomes the same layer as one of nnx, and shares its variables."""
    reason = why_not(type(self), layer, dot_general.mode)
    if reason is not None:
      raise ValueError(f"{function}: {reason}.")
    for name in (*self.copied, *COPIED):
      setattr(self, name, getattr(layer, name))
    self.dot_general = dot_general
    self.recipe_rngs = nnx.data(stream_of(function, dot_general, rngs))
    self.kernel: nnx.Variable[Any] | None = layer.kernel
    self.bias: nnx.Variable[Any] | None = nnx.data(None) if layer.bias is None else layer.bias
    for name in LEAVES:
      setattr(self, name, nnx.data(None))
    self._remember_kernel(layer.kernel)

  def _remember_kernel(self, kernel: nnx.Variable[Any]) -> None:
    """What `unpack` makes the kernel with."""
    self.kernel_type: type[nnx.Variable[Any]] = type(kernel)
    self.kernel_metadata: tuple[tuple[str, Any], ...] = tuple(kernel.get_metadata().items())

  @classmethod
  def _from(
    cls, method: str, layer: Any, dot_general: DotGeneral, rngs: nnx.Rngs | None = None
  ) -> Self:
    function = f"{cls.__name__}.{method}"
    if type(layer) is not cls.original:
      raise TypeError(
        f"{function}: the layer must be an {full_name(cls.original)}, got "
        f"{type(layer).__module__}.{type(layer).__name__}; what a class made from it does "
        "would be lost."
      )
    own = cls._placeholder(dot_general)
    own._take(function, layer, dot_general, rngs)
    return own

  @classmethod
  def _placeholder(cls, dot_general: DotGeneral, **options: Any) -> Self:
    """The smallest layer there is."""
    build: Any = cls
    k = FORMATS[dot_general.mode].group_size
    return build(k, 1, mode=dot_general.mode, use_bias=False, **NO_NUMBERS, **options)

  @classmethod
  def _scale_of_kernel(cls, choice: GlobalScale) -> GlobalScale:
    """What `KernelAxes.quantized` is to give the kernel, of a layer's choice."""
    return choice

  def _kernel_axes(self) -> KernelAxes:
    """Also of the layer of nnx that this one stands for, given as self."""
    raise NotImplementedError

  @property
  def mode(self) -> Mode:
    return self.dot_general.mode

  @property
  def quantize_input(self) -> bool:
    return self.dot_general.quantize_input is not False

  @property
  def is_packed(self) -> bool:
    return self.kernel is None

  @property
  def weight(self) -> QuantizedWeight | None:
    """The packed kernel, (..., N, K); None while it is unpacked."""
    if not self.is_packed:
      return None
    variables = {name: getattr(self, name) for name in LEAVES}
    values: Any = {name: None if v is None else v.get_value() for name, v in variables.items()}
    static = {"mode": self.mode, "dtype": self.param_dtype, "quantize_input": self.quantize_input}
    return QuantizedWeight(**values, **static)

  def pack(self) -> None:
    """Replaces the kernel by its packed weight, by which the layer computes the same.

    What it multiplies by is quantized: the kernel in the layer's dtype, where it has one. Another
    layer that shares the kernel keeps it: `jaxqq.nn.pack` packs them together.
    """
    if self.is_packed:
      return
    self.set_weight(self.quantized())

  def quantized(self) -> QuantizedWeight:
    """What `pack` would set; of a packed layer, its weight."""
    weight = self.weight
    if weight is not None:
      return weight
    assert self.kernel is not None
    kernel = self.kernel.get_value()

    choice = self._scale_of_kernel(self.dot_general.global_scale)
    weight = self._kernel_axes().quantized(kernel, self.mode, choice, self.dtype)
    scale = self.input_global_scale
    return dataclasses.replace(
      weight,
      input_global_scale=None if scale is None else scale.get_value(),
      quantize_input=self.quantize_input,
    )

  def set_weight(self, weight: QuantizedWeight) -> None:
    """Makes the layer a packed one, with this weight.

    Args:
      weight: of logical shape (..., N, K): N and K are the flattened output and contracted
        axes, before them come the axes of stacked layers and of batches. The layer takes its mode,
        and whether inputs are quantized.

    Raises:
      TypeError: weight is no `QuantizedWeight`.
      ValueError: its shape does not fit the layer; or it leaves inputs as they are, and the layer
        has the quantized backward.
    """
    if not isinstance(weight, QuantizedWeight):
      raise TypeError(
        f"{type(self).__name__}.set_weight: weight must be a QuantizedWeight, as "
        f"jaxqq.quantize_weight(w), got {type(weight).__name__}."
      )
    axes = self._kernel_axes()
    right = axes.matrices_shape
    if weight.shape[-len(right) :] != right:
      raise ValueError(
        f"{type(self).__name__}.set_weight: the weight must have the logical shape {right}, got "
        f"{weight!r}."
      )
    choice = self.dot_general.global_scale or DEFAULT
    fits = weight.mode == self.mode and weight.quantize_input
    self.dot_general = dataclasses.replace(
      self.dot_general,
      recipe=self.dot_general.recipe if fits else None,
      mode=weight.mode,
      global_scale=None if weight.global_scale is None else choice,
      quantize_input=weight.quantize_input,
    )
    if self.kernel is not None:
      self._remember_kernel(self.kernel)
      self.kernel = nnx.data(None)
    metadata = dict(self.kernel_metadata)
    self.param_dtype = weight.dtype
    placement: Any = {name: metadata[name] for name in PLACEMENT if name in metadata}
    names = axes.names_of_matrices(metadata.get("out_sharding"), weight.ndim)
    for name in LEAVES:
      value = getattr(weight, name)
      if value is None:
        setattr(self, name, nnx.data(None))
        continue
      if names is not None:
        placement["out_sharding"] = names[: len(value.shape)]
      setattr(self, name, Packed(value, **placement))

  def _share_kernel_of(self, other: QuantizedLayer) -> None:
    """Holds the variables of another layer as its own kernel, packed or not as they are there.

    What is of this layer alone stays: a static scale of its inputs, its backward pass.
    """
    if self.kernel is not None:
      self._remember_kernel(self.kernel)
    self.kernel = nnx.data(None) if other.kernel is None else other.kernel
    for name in LEAVES[:3]:
      variable = getattr(other, name)
      setattr(self, name, nnx.data(None) if variable is None else variable)
    self.param_dtype = other.param_dtype
    mode, scale = other.dot_general.mode, other.dot_general.global_scale
    if scale is not None:  # what inputs get is this layer's own choice
      scale = self.dot_general.global_scale or scale
    recipe = self.dot_general.recipe if mode == self.mode else None
    self.dot_general = dataclasses.replace(
      self.dot_general, mode=mode, global_scale=scale, recipe=recipe
    )

  def unpack(self) -> None:
    """Replaces the packed weight by a kernel of what it stands for, to be trained further."""
    weight = self.weight
    if weight is None:
      return
    is_abstract = isinstance(weight.packed, jax.ShapeDtypeStruct)

    def kernel_of(weight: QuantizedWeight) -> jax.Array:
      return self._kernel_axes().from_matrices(weight.dequantize())

    kernel = jax.eval_shape(kernel_of, weight) if is_abstract else kernel_of(weight)
    self.kernel = self.kernel_type(kernel, **dict(self.kernel_metadata))
    for name in LEAVES[:3]:  # a static scale of the inputs stays for the next pack()
      setattr(self, name, nnx.data(None))

  def _promoted(self, inputs: jax.Array) -> tuple[jax.Array, Any, Any]:
    """Inputs, kernel and bias as nnx promotes them; of a packed kernel, nothing but its dtype."""
    packed_dtype = jnp.zeros((0,), self.param_dtype)
    kernel = packed_dtype if self.kernel is None else self.kernel[...]
    bias = None if self.bias is None else self.bias[...]
    promoted = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
    return promoted[0], promoted[1], promoted[2]

  def _product(
    self, inputs: jax.Array, kernel: jax.Array, contracting: Axes, batch: Axes
  ) -> jax.Array:
    """The product with axes (batch, free axes of inputs, free axes of the kernel)."""
    axes, weight = self._kernel_axes(), self.weight
    options = (self.precision, self.preferred_element_type)
    if weight is not None:
      return self.dot_general.packed(inputs, weight, contracting, batch, axes.features, *options)
    numbers = ((contracting, axes.contracting), (batch, axes.batch))
    key = None if self.recipe_rngs is None else self.recipe_rngs()
    return self.dot_general(inputs, kernel, numbers, *options, key=key)


def packing(kind: type[QuantizedLayer], layer: Any, dot_general: DotGeneral) -> tuple[Any, ...]:
  """What decides the bits of a packed kernel, besides the kernel: of a layer of nnx, or its own."""
  scale = kind._scale_of_kernel(dot_general.global_scale)
  return (dot_general.mode, scale, layer.dtype, kind._kernel_axes(layer))


def full_name(kind: type[nnx.Module]) -> str:
  """nnx.Linear, or jaxqq.nn.ExpertLinear."""
  package = "nnx" if kind.__module__.startswith("flax.") else "jaxqq.nn"
  return f"{package}.{kind.__name__}"


def why_not(kind: type[QuantizedLayer], layer: Any, mode: str) -> str | None:
  """Why a layer of nnx cannot become one of this kind; None if it can."""
  for name, usual in OVERRIDES.items():
    value = getattr(layer, name, None)
    if not any(value is own for own in usual) and not isinstance(value, DotGeneral):
      return f"it has its own {name}, which qqmm would replace"
  try:
    axes = kind._kernel_axes(layer)
  except ValueError as error:
    return str(error).rstrip(".").partition(": ")[2]
  return axes.why_not(layer.kernel, mode)
