"""Which axes of a kernel are what, and the same kernel as the matrices that are quantized."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq import _einsum
from jaxqq._checks import FLOATS, describe, names
from jaxqq._formats import FORMATS, Mode
from jaxqq._global_scales import GlobalScale, amax_of_each_matrix
from jaxqq._quantize_weight import quantize_weight
from jaxqq._weight import QuantizedWeight

Axes = tuple[int, ...]


def known_axes(function: str, axes: Iterable[int], inputs: jax.Array) -> Axes:
  """Sorted and counted from the first; of inputs that have them."""
  count = inputs.ndim
  for axis in axes:
    if not -count <= axis < count:
      raise ValueError(f"{function}: there is no axis {axis} of inputs, {describe(inputs)}.")
  return tuple(sorted(axis % count for axis in axes))


@dataclasses.dataclass(frozen=True)
class KernelAxes:
  """The axes of one layer's kernel, in the order that its products have them.

  A kernel may have more axes in front, those of stacked layers. Its matrices are (..., N, K):
  stacked and batch axes, then the free axes and the contracting axes, flattened.
  """

  shape: tuple[int, ...]
  batch: Axes
  free: Axes
  contracting: Axes

  @property
  def features(self) -> tuple[int, ...]:
    """Sizes of the free axes."""
    return tuple(self.shape[i] for i in self.free)

  @property
  def matrices_shape(self) -> tuple[int, ...]:
    """That of the matrices of one layer."""
    sizes = (self.shape[i] for i in self.batch)
    return (*sizes, math.prod(self.features), math.prod(self.shape[i] for i in self.contracting))

  def fits(self, shape: tuple[int, ...]) -> bool:
    return shape[max(0, len(shape) - len(self.shape)) :] == self.shape

  def as_matrices(self, kernel: jax.Array) -> jax.Array:
    stacked = kernel.shape[: kernel.ndim - len(self.shape)]
    ordered = jnp.transpose(kernel, self._order(kernel.ndim))
    return ordered.reshape(*stacked, *self.matrices_shape)

  def from_matrices(self, matrices: jax.Array) -> jax.Array:
    """The inverse of `as_matrices`."""
    sizes = (self.shape[i] for i in (*self.free, *self.contracting))
    ordered = matrices.reshape(*matrices.shape[:-2], *sizes)
    return jnp.transpose(ordered, np.argsort(self._order(ordered.ndim)).tolist())

  def quantized(
    self, kernel: jax.Array, mode: Mode, choice: GlobalScale, dtype: Any = None
  ) -> QuantizedWeight:
    """The packed kernel, as a layer that computes in dtype quantizes it; it remembers its own."""

    def quantize(kernel: jax.Array) -> QuantizedWeight:
      matrices = self.as_matrices(kernel if dtype is None else kernel.astype(dtype))
      return quantize_weight(matrices, mode, global_scale=self._global_scale(matrices, choice))

    is_abstract = isinstance(kernel, jax.ShapeDtypeStruct)
    weight = jax.eval_shape(quantize, kernel) if is_abstract else quantize(jnp.asarray(kernel))
    return dataclasses.replace(weight, dtype=np.dtype(kernel.dtype))

  def _global_scale(self, matrices: jax.Array, choice: GlobalScale) -> Any:
    """As `DotGeneral` gives it to a kernel: one to each matrix, or one to all of a layer."""
    if choice in (None, "amax"):
      return choice
    batch = matrices.shape[:-2]
    amax = amax_of_each_matrix(matrices, len(batch) - len(self.batch))
    return jnp.broadcast_to(lax.expand_dims(amax, range(amax.ndim, len(batch))), batch)

  def _order(self, ndim: int) -> Axes:
    stacked = ndim - len(self.shape)
    axes = (*self.batch, *self.free, *self.contracting)
    return (*range(stacked), *(i + stacked for i in axes))

  def names_of_matrices(self, names: Any, ndim: int) -> tuple[Any, ...] | None:
    """Logical names of the matrices' axes: a flattened axis has the name of its first part.

    None where names is None or does not name every axis of the kernel.
    """
    if names is None:
      return None
    names, stacked = tuple(names), ndim - 2 - len(self.batch)
    if len(names) != stacked + len(self.shape):
      return None
    matrix = (names[own[0] + stacked] if own else None for own in (self.free, self.contracting))
    return (*names[:stacked], *(names[i + stacked] for i in self.batch), *matrix)

  def why_not(self, kernel: Any, mode: str) -> str | None:
    """Why a kernel with these axes cannot be quantized; None if it can."""
    dtype, shape = np.dtype(kernel.dtype), tuple(kernel.shape)
    if not self.fits(shape):
      return f"its kernel has shape {shape}, which is no stack of {self.shape}"
    if dtype not in FLOATS:
      return f"its kernel is {dtype.name}, none of {names(FLOATS)}"
    if not self.contracting:
      return "it sums over no axis"
    k, group_size = self.matrices_shape[-1], FORMATS[mode].group_size
    if k % group_size:
      return f"it sums over {k} numbers, no multiple of the group size {group_size} of {mode!r}"
    return None


def axes_of_einsum(function: str, einsum_str: str, kernel_shape: tuple[int, ...]) -> KernelAxes:
  """Those of the second operand; how many axes an ellipsis of the first stands for is the same."""
  inputs_letters, kernel_letters = _einsum.num_letters(einsum_str)
  inputs_ndim = inputs_letters + max(0, len(kernel_shape) - kernel_letters)
  plan = _einsum.plan(function, einsum_str, inputs_ndim, len(kernel_shape))
  return KernelAxes(tuple(kernel_shape), plan.w_batch, plan.w_free, plan.w_contracting)
