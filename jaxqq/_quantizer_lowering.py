"""`Quantizer.quantize` where a platform has kernels: on one device, of one matrix or of rows."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.interpreters import mlir

from jaxqq import _kernels, _primitive
from jaxqq._kernels.plan import FunctionPlan, Implementation, Plan
from jaxqq._kernels.problem import Quantizing, obstacle
from jaxqq._quantizer import Quantizer, Streams, definition, quantizer_p


def _by_xla(
  problem: Quantizing, a: jax.Array, streams: Streams, amax: jax.Array | None
) -> list[jax.Array]:
  return definition(a, streams, amax, problem.quantizer, problem.is_transposed)


QUANTIZER: tuple[Implementation, ...] = (
  *_kernels.rows_of("quantizer"),
  Implementation(
    name="xla",
    summary="XLA, from the definition (jaxqq/_quantizer.py)",
    platforms=None,
    plan=lambda problem, device: FunctionPlan(problem, _by_xla),
  ),
)


def planned(
  quantizer: Quantizer, a: Any, is_transposed: bool, platform: str, why_not: str | None = None
) -> Plan:
  """What quantizes an array, or one of that shape and dtype."""
  found = why_not or obstacle((a,), ())
  batch = a.shape[:-2]
  if found is None and math.prod(batch) > 1 and (quantizer.square or is_transposed):
    found = "there are several matrices"
  problem = Quantizing(quantizer, tuple(a.shape), is_transposed, found)
  return _kernels.plan(problem, _kernels.device_of(platform), QUANTIZER)


def run(
  a: jax.Array,
  streams: Streams,
  amax: jax.Array | None,
  quantizer: Quantizer,
  is_transposed: bool,
  platform: str,
  why_not: str | None = None,
) -> list[jax.Array]:
  """As it is planned for one device."""
  plan = planned(quantizer, a, is_transposed, platform, why_not)
  if plan.implementation.platforms is None:
    return plan.kernel.run(a, streams, amax)
  matrix = a.reshape(-1, a.shape[-1])
  packed, scales, *rest = plan.kernel.run(matrix, streams, amax)
  shape = (*a.shape[:-2], a.shape[-1]) if is_transposed else a.shape[:-1]
  return [packed.reshape(*shape, -1), scales.reshape(*shape, -1), *rest]


def _lowering(
  ctx: Any, *args: Any, structure: Any, quantizer: Quantizer, is_transposed: bool
) -> Any:
  platform = _primitive.platform_of(ctx)
  splits = "XLA splits the array over devices" if _primitive.is_partitioned_by_xla(ctx) else None

  def function(*arrays: jax.Array) -> list[jax.Array]:
    a, streams, amax = jax.tree.unflatten(structure, arrays)
    return run(a, streams, amax, quantizer, is_transposed, platform, splits)

  return mlir.lower_fun(function, multiple_results=True)(ctx, *args)


_primitive.register_lowering(quantizer_p, _lowering)
