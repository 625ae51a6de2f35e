"""What `quantize` and `dequantize` get on Hopper.

Both refuse what the product's kernels refuse, so that one runs wherever the others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqq._kernels.hopper.checks import check_hopper
from jaxqq._kernels.plan import Device, FunctionPlan, Implementation
from jaxqq._kernels.problem import Conversion


def _quantize_by_kernel(problem: Conversion, arrays: Sequence[jax.Array]) -> list[jax.Array]:
  from jaxqq._kernels.hopper.quantize import columns, packed

  w, scale = arrays[0], _scalar(problem, arrays)
  if problem.is_transposed and problem.is_one_matrix:
    results = columns.quantize_transpose(w.reshape(w.shape[-2:]), problem.fmt, scale)
  else:
    w = problem.in_order(w)
    results = packed.quantize(w.reshape(-1, w.shape[-1]), problem.fmt, scale)
  return [a.reshape(*problem.batch_shape, problem.rows, a.shape[-1]) for a in results]


def _dequantize_by_kernel(problem: Conversion, arrays: Sequence[jax.Array]) -> list[jax.Array]:
  from jaxqq._kernels.hopper.quantize import packed

  codes, scales = (  # one of them may be the same for every matrix
    jnp.broadcast_to(a, (*problem.batch_shape, *a.shape[-2:])).reshape(-1, a.shape[-1])
    for a in arrays[:2]
  )
  scale = _scalar(problem, arrays)
  out = packed.dequantize(codes, scales, problem.fmt, scale, np.dtype(problem.out_dtype))
  return [out.reshape(*problem.batch_shape, problem.rows, out.shape[-1])]


def _plan_quantize(problem: Conversion, device: Device) -> FunctionPlan:
  check_hopper(problem.obstacle, device)
  details = None
  if problem.is_transposed and problem.is_one_matrix:
    details = "it reads columns as they are stored, and no transpose is written"
  elif problem.is_transposed:
    details = "of several matrices XLA writes the transpose first"
  return FunctionPlan(problem, _quantize_by_kernel, details)


def _plan_dequantize(problem: Conversion, device: Device) -> FunctionPlan:
  check_hopper(problem.obstacle, device)
  return FunctionPlan(problem, _dequantize_by_kernel)


def _scalar(problem: Conversion, arrays: Sequence[Any]) -> Any:
  return arrays[-1].reshape(()) if problem.has_global_scale else None


QUANTIZE = Implementation(
  name="hopper_quantize",
  summary="a kernel that reads w once and writes codes and scales, bound by memory",
  platforms=("cuda",),
  plan=_plan_quantize,
)

DEQUANTIZE = Implementation(
  name="hopper_dequantize",
  summary="a kernel that reads codes and scales once and writes numbers, bound by memory",
  platforms=("cuda",),
  plan=_plan_dequantize,
)
