"""The implementations of `quantize` and `dequantize`: tables of rows as the product's.

Both refuse what the product's kernels refuse, so that one runs wherever the others do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq._formats import Format
from jaxqq._kernels.hopper.plan import check_hopper
from jaxqq._kernels.plan import Device, Implementation
from jaxqq._kernels.problem import obstacle
from jaxqq._quantize import pack, quantize_groups
from jaxqq._reference import TRANSPOSED, dequantize_packed
from jaxqq._rounding import arithmetic_of


@dataclasses.dataclass(frozen=True)
class Conversion:
  """One `quantize` or `dequantize`, as far as the choice of an implementation depends on it."""

  fmt: Format
  names: tuple[str, ...]  # of the arrays, as the primitives' parameter `operands` has them
  shapes: tuple[tuple[Any, ...], ...]
  obstacle: str | None  # what no kernel takes, if there is such
  out_dtype: np.dtype | None = None  # that `dequantize` rounds to

  @classmethod
  def of(
    cls,
    fmt: Format,
    names: tuple[str, ...],
    arrays: Sequence[Any],  # or their shapes and dtypes
    out_dtype: np.dtype | None = None,
  ) -> Conversion:
    scale = arrays[-1] if names[-1] == "global_scale" else None
    shapes = tuple(tuple(a.shape) for a in arrays)
    return cls(fmt, names, shapes, obstacle(arrays, (scale,)), out_dtype)

  @property
  def is_transposed(self) -> bool:
    return self.names[0].endswith(TRANSPOSED)

  @property
  def has_global_scale(self) -> bool:
    return self.names[-1] == "global_scale"

  @property
  def batch_shape(self) -> tuple[int, ...]:
    shapes = [shape[:-2] for shape in self.shapes]
    if self.has_global_scale:
      shapes[-1] = self.shapes[-1]
    return lax.broadcast_shapes(*shapes)

  @property
  def rows(self) -> int:
    return self.shapes[0][-1 if self.is_transposed else -2]

  @property
  def is_one_matrix(self) -> bool:
    return all(size == 1 for size in self.shapes[0][:-2])


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
  """A conversion, and the function that runs it."""

  problem: Conversion
  function: Callable[[Sequence[jax.Array], Conversion], list[jax.Array]]
  details: str | None = None

  def run(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return self.function(arrays, self.problem)


def _global_scale(arrays: Sequence[Any], problem: Conversion) -> Any:
  return arrays[-1] if problem.has_global_scale else None


def _scalar(arrays: Sequence[Any], problem: Conversion) -> Any:
  return arrays[-1].reshape(()) if problem.has_global_scale else None


def _in_order(w: jax.Array, problem: Conversion) -> jax.Array:
  return jnp.swapaxes(w, -1, -2) if problem.is_transposed else w


# Kernels


def _quantize_by_kernel(arrays: Sequence[jax.Array], problem: Conversion) -> list[jax.Array]:
  from jaxqq._kernels.hopper.quantize import columns, packed

  w, scale = arrays[0], _scalar(arrays, problem)
  if problem.is_transposed and problem.is_one_matrix:
    results = columns.quantize_transpose(w.reshape(w.shape[-2:]), problem.fmt, scale)
  else:
    w = _in_order(w, problem)
    results = packed.quantize(w.reshape(-1, w.shape[-1]), problem.fmt, scale)
  return [a.reshape(*problem.batch_shape, problem.rows, a.shape[-1]) for a in results]


def _dequantize_by_kernel(arrays: Sequence[jax.Array], problem: Conversion) -> list[jax.Array]:
  from jaxqq._kernels.hopper.quantize import packed

  codes, scales = (  # one of them may be the same for every matrix
    jnp.broadcast_to(a, (*problem.batch_shape, *a.shape[-2:])).reshape(-1, a.shape[-1])
    for a in arrays[:2]
  )
  scale = _scalar(arrays, problem)
  out = packed.dequantize(codes, scales, problem.fmt, scale, np.dtype(problem.out_dtype))
  return [out.reshape(*problem.batch_shape, problem.rows, out.shape[-1])]


def _plan_quantize(problem: Conversion, device: Device) -> ConversionPlan:
  check_hopper(problem.obstacle, device)
  details = None
  if problem.is_transposed and problem.is_one_matrix:
    details = "it reads columns as they are stored, and no transpose is written"
  elif problem.is_transposed:
    details = "of several matrices XLA writes the transpose first"
  return ConversionPlan(problem, _quantize_by_kernel, details)


def _plan_dequantize(problem: Conversion, device: Device) -> ConversionPlan:
  check_hopper(problem.obstacle, device)
  return ConversionPlan(problem, _dequantize_by_kernel)


# XLA


def _quantize_by_xla(
  arrays: Sequence[jax.Array], problem: Conversion, platform: str
) -> list[jax.Array]:
  w, scale = _in_order(arrays[0], problem), _global_scale(arrays, problem)
  codes, scales = quantize_groups(w, problem.fmt, scale, arithmetic_of(platform))
  return [pack(codes, problem.fmt), scales.astype(jnp.uint8)]


def _dequantize_by_xla(
  arrays: Sequence[jax.Array], problem: Conversion, platform: str
) -> list[jax.Array]:
  del platform
  w, scales = arrays[:2]
  out = dequantize_packed(w, scales, problem.fmt, _global_scale(arrays, problem))
  return [out.astype(problem.out_dtype)]


def _by_xla(function: Callable[..., list[jax.Array]]) -> Implementation:
  return Implementation(
    name="xla",
    summary="XLA, from the definition (jaxqq/_quantize.py)",
    platforms=None,
    plan=lambda problem, device: ConversionPlan(
      problem, functools.partial(function, platform=device.platform)
    ),
  )


QUANTIZE: tuple[Implementation, ...] = (
  Implementation(
    name="hopper_quantize",
    summary="a kernel that reads w once and writes codes and scales, bound by memory",
    platforms=("cuda",),
    plan=_plan_quantize,
  ),
  _by_xla(_quantize_by_xla),
)

DEQUANTIZE: tuple[Implementation, ...] = (
  Implementation(
    name="hopper_dequantize",
    summary="a kernel that reads codes and scales once and writes numbers, bound by memory",
    platforms=("cuda",),
    plan=_plan_dequantize,
  ),
  _by_xla(_dequantize_by_xla),
)
