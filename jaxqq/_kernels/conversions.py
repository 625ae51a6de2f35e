"""The tables of `quantize` and `dequantize`, and their rows for every platform."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxqq._kernels import rows_of
from jaxqq._kernels.plan import FunctionPlan, Implementation
from jaxqq._kernels.problem import Conversion
from jaxqq._quantize import pack, quantize_groups
from jaxqq._reference import dequantize_packed
from jaxqq._rounding import arithmetic_of


def _quantize_by_xla(
  problem: Conversion, arrays: Sequence[jax.Array], platform: str
) -> list[jax.Array]:
  w, scale = problem.in_order(arrays[0]), _global_scale(problem, arrays)
  codes, scales = quantize_groups(w, problem.fmt, scale, arithmetic_of(platform))
  return [pack(codes, problem.fmt), scales.astype(jnp.uint8)]


def _dequantize_by_xla(
  problem: Conversion, arrays: Sequence[jax.Array], platform: str
) -> list[jax.Array]:
  del platform
  w, scales = arrays[:2]
  out = dequantize_packed(w, scales, problem.fmt, _global_scale(problem, arrays))
  return [out.astype(problem.out_dtype)]


def _by_xla(function: Callable[..., list[jax.Array]]) -> Implementation:
  return Implementation(
    name="xla",
    summary="XLA, from the definition (jaxqq/_quantize.py)",
    platforms=None,
    plan=lambda problem, device: FunctionPlan(
      problem, functools.partial(function, platform=device.platform)
    ),
  )


def _global_scale(problem: Conversion, arrays: Sequence[Any]) -> Any:
  return arrays[-1] if problem.has_global_scale else None


QUANTIZE = *rows_of("quantize"), _by_xla(_quantize_by_xla)
DEQUANTIZE = *rows_of("dequantize"), _by_xla(_dequantize_by_xla)
