"""The implementations of `quantize` and `dequantize`: tables of rows as the product's.

Both refuse what the product's kernels refuse, so that one runs wherever the others do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxqq._formats import FORMATS, Format
from jaxqq._kernels import Implementation, refusal_of_arrays
from jaxqq._quantize import pack, quantize_groups
from jaxqq._reference import TRANSPOSED, dequantize_packed


@dataclasses.dataclass(frozen=True)
class Conversion:
  """One `quantize` or `dequantize`, as far as the choice of an implementation depends on it."""

  mode: str
  names: tuple[str, ...]  # of the arrays, as the primitives' parameter `operands` has them
  arrays: tuple[Any, ...]  # of shapes and dtypes
  out_dtype: Any = None  # that `dequantize` rounds to

  @property
  def fmt(self) -> Format:
    return FORMATS[self.mode]

  @property
  def is_transposed(self) -> bool:
    return self.names[0].endswith(TRANSPOSED)

  def global_scale(self, arrays: Sequence[Any]) -> Any:
    return arrays[-1] if self.names[-1] == "global_scale" else None

  @property
  def batch_shape(self) -> tuple[int, ...]:
    shapes = [a.shape[:-2] for a in self.arrays]
    scale = self.global_scale(self.arrays)
    if scale is not None:
      shapes[-1] = scale.shape
    return lax.broadcast_shapes(*shapes)

  @property
  def rows(self) -> int:
    return self.arrays[0].shape[-1 if self.is_transposed else -2]

  @property
  def is_one_matrix(self) -> bool:
    return all(size == 1 for size in self.arrays[0].shape[:-2])


def _refusal(problem: Conversion) -> str | None:
  return refusal_of_arrays(problem.arrays, (problem.global_scale(problem.arrays),))


def _scalar(global_scale: Any) -> Any:
  return None if global_scale is None else global_scale.reshape(())


def _quantize_by_kernel(arrays: Sequence[jax.Array], problem: Conversion) -> list[jax.Array]:
  from jaxqq._kernels import quantize as kernels
  from jaxqq._kernels import transposed

  w, one = arrays[0], _scalar(problem.global_scale(arrays))
  if problem.is_transposed and problem.is_one_matrix:
    results = transposed.quantize_transpose(w.reshape(w.shape[-2:]), problem.fmt, one)
  else:
    w = _in_order(w, problem)
    results = kernels.quantize(w.reshape(-1, w.shape[-1]), problem.fmt, one)
  return [a.reshape(*problem.batch_shape, problem.rows, a.shape[-1]) for a in results]


def _in_order(w: jax.Array, problem: Conversion) -> jax.Array:
  return jnp.swapaxes(w, -1, -2) if problem.is_transposed else w


def _quantize_by_xla(arrays: Sequence[jax.Array], problem: Conversion) -> list[jax.Array]:
  w = _in_order(arrays[0], problem)
  codes, scales = quantize_groups(w, problem.fmt, problem.global_scale(arrays))
  return [pack(codes, problem.fmt), scales.astype(jnp.uint8)]


def _dequantize_by_kernel(arrays: Sequence[jax.Array], problem: Conversion) -> list[jax.Array]:
  from jaxqq._kernels import quantize as kernels

  codes, scales = (  # one of them may be the same for every matrix
    jnp.broadcast_to(a, (*problem.batch_shape, *a.shape[-2:])).reshape(-1, a.shape[-1])
    for a in arrays[:2]
  )
  one = _scalar(problem.global_scale(arrays))
  out = kernels.dequantize(codes, scales, problem.fmt, one, problem.out_dtype)
  return [out.reshape(*problem.batch_shape, problem.rows, out.shape[-1])]


def _dequantize_by_xla(arrays: Sequence[jax.Array], problem: Conversion) -> list[jax.Array]:
  w, scales = arrays[:2]
  out = dequantize_packed(w, scales, problem.fmt, problem.global_scale(arrays))
  return [out.astype(problem.out_dtype)]


def _order_of_quantize(problem: Conversion) -> str | None:
  if not problem.is_transposed:
    return None
  if problem.is_one_matrix:
    return "it reads columns as they are stored, and no transpose is written"
  return "of several matrices XLA writes the transpose first"


QUANTIZE: tuple[Implementation, ...] = (
  Implementation(
    name="hopper_quantize",
    summary="a kernel that reads w once and writes codes and scales, bound by memory",
    platforms=("cuda",),
    refuses=_refusal,
    run=_quantize_by_kernel,
    details=_order_of_quantize,
  ),
  Implementation(
    name="xla",
    summary="XLA, from the definition (jaxqq/_quantize.py)",
    platforms=None,
    refuses=lambda problem: None,
    run=_quantize_by_xla,
  ),
)

DEQUANTIZE: tuple[Implementation, ...] = (
  Implementation(
    name="hopper_dequantize",
    summary="a kernel that reads codes and scales once and writes numbers, bound by memory",
    platforms=("cuda",),
    refuses=_refusal,
    run=_dequantize_by_kernel,
  ),
  Implementation(
    name="xla",
    summary="XLA, from the definition (jaxqq/_quantize.py)",
    platforms=None,
    refuses=lambda problem: None,
    run=_dequantize_by_xla,
  ),
)
