"""The implementations of the product, and which of them one product gets.

An implementation is one row of `IMPLEMENTATIONS`; the first that a platform has and that
does not refuse the problem is taken. The last row takes everything. A row is all that a new
kernel needs: the primitive's lowerings, and `jaxqq.explain`, are made from the table. Kernels are
imported when a product first asks for them. `conversions.py` has tables for what quantizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxqq import _compat, _reference
from jaxqq._formats import FORMATS
from jaxqq._reference import Operands


@dataclasses.dataclass(frozen=True)
class Problem:
  """One product, as far as the choice of an implementation depends on it."""

  mode: str
  operands: Operands  # of shapes and dtypes
  out_dtype: np.dtype
  precision: jax.lax.Precision | None
  # Of the sum of all devices' parts, where this is one and float32.
  result_dtype: np.dtype | None = None


@dataclasses.dataclass(frozen=True)
class Implementation:
  name: str
  summary: str  # what it does, to follow "The product is computed by"
  platforms: tuple[str, ...] | None  # as JAX names them; None is any
  refuses: Callable[[Any], str | None]  # why it cannot take the problem, or None
  run: Callable[..., Any]  # (operands, problem) -> out
  details: Callable[[Any], str | None] | None = None  # what else to tell of the problem at hand


def _refusal_of_hopper(problem: Problem) -> str | None:
  """Why no Hopper kernel can take a problem, whatever its mode."""
  operands = problem.operands
  return refusal_of_arrays(operands.present, (operands.global_scale_x, operands.global_scale_w))


def refusal_of_arrays(arrays: Sequence[Any], global_scales: Sequence[Any]) -> str | None:
  """Why no Hopper kernel can take arrays of these shapes; a global scale may be None."""
  if jax.__version_info__ < (0, 11):
    return f"it needs JAX 0.11 or newer, and this is {jax.__version__}"
  capability = _compat.cuda_compute_capability()
  if capability != "9.0":
    return f"it is for compute capability 9.0 (H100, H200), not {capability}"
  if not all(isinstance(size, int) for a in arrays for size in a.shape):
    return "a size is symbolic"
  if any(0 in a.shape for a in arrays):
    return "an axis is empty"
  if any(_is_split_explicitly(a) for a in arrays):
    return "an operand is split along an explicit axis of a mesh"
  if any(math.prod(s.shape) > 1 for s in global_scales if s is not None):
    return "global scales differ from matrix to matrix"
  return None


def _is_split_explicitly(a: Any) -> bool:
  sharding = jax.typeof(a).sharding if isinstance(a, jax.Array) else getattr(a, "sharding", None)
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return False
  explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
  return explicit and any(axes is not None for axes in sharding.spec)


def _wants_exact_sums(problem: Problem) -> bool:
  high = (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST)
  return problem.precision in high or (problem.result_dtype or problem.out_dtype) == np.float32


def _refusal_of_fp8(problem: Problem) -> str | None:
  refusal = _refusal_of_hopper(problem)
  if refusal is not None:
    return refusal
  fmt = FORMATS[problem.mode]
  if fmt.element != ml_dtypes.float8_e4m3fn:
    return f"{problem.mode} has no e4m3 elements to feed fp8 tensor cores with"
  if _wants_exact_sums(problem):
    return "float32 output, or precision above DEFAULT, takes exact operands and float32 sums"
  return None


def _refusal_of_few_rows(problem: Problem) -> str | None:
  refusal = _refusal_of_hopper(problem)
  if refusal is not None:
    return refusal
  from jaxqq._kernels.few_rows_config import MAX_ROWS
  from jaxqq._kernels.hopper import chunk_of, rows_of_a_matrix

  fmt = FORMATS[problem.mode]
  packed = problem.operands.scales is not None
  if not packed and problem.operands.transposed:
    return "w is not packed, and an operand's contracted axis comes first"
  if not packed and np.dtype(problem.operands.w.dtype).itemsize != 2:
    return f"w is not packed but {problem.operands.w.dtype}, and it quantizes 16 bit floats"
  rows = rows_of_a_matrix(problem.operands)
  if rows > MAX_ROWS:
    return f"{rows} rows of x meet a matrix w, and it is for at most {MAX_ROWS}"
  k, chunk_k = problem.operands.k, chunk_of(problem.operands, fmt).k
  if k % chunk_k:
    return f"k = {k} is no multiple of {chunk_k}, which its loads are made of"
  if packed and fmt.scale_is_power_of_two:
    return _refusal_of_fp8(problem)
  return None


def _run_few_rows(operands: Operands, problem: Problem) -> jax.Array:
  from jaxqq._kernels import hopper

  return hopper.few_rows(operands, problem.mode, problem.out_dtype, _wants_exact_sums(problem))


def _few_rows_details(problem: Problem) -> str:
  from jaxqq._kernels import hopper

  fmt = FORMATS[problem.mode]
  chunk, columns, _ = hopper.few_rows_layout(problem.operands, fmt)
  config = hopper.few_rows_config(problem.operands, fmt, _wants_exact_sums(problem))
  return f"tiles {chunk} {config}" + (f" with {columns}" if columns else "") + _sms()


def _run_fp8(operands: Operands, problem: Problem) -> jax.Array:
  from jaxqq._kernels import hopper

  return hopper.fp8(operands, problem.mode, problem.out_dtype)


def _run_exact(operands: Operands, problem: Problem) -> jax.Array:
  from jaxqq._kernels import hopper

  promote = _wants_exact_sums(problem)
  return hopper.exact(operands, problem.mode, problem.out_dtype, promote)


def _tiles(problem: Problem, promote: bool) -> str:
  from jaxqq._kernels import hopper

  operands, fmt = problem.operands, FORMATS[problem.mode]
  config = hopper.tiles(operands, fmt, problem.out_dtype, promote)
  slabs = operands.scales is not None and hopper.takes_slabs(config)
  return f"tiles {config}" + (", packed w expanded a slab at a time" if slabs else "") + _sms()


def _sms() -> str:
  from jaxqq._kernels.tiles import num_sms

  known = _compat.cuda_sm_count() is not None
  return f", for {num_sms()} SMs" + ("" if known else " (assumed: no device at hand says so)")


IMPLEMENTATIONS: tuple[Implementation, ...] = (
  Implementation(
    name="hopper_few_rows",
    summary=(
      "a kernel that streams w through the tensor cores: packed codes in fp8 (mxfp8, and nvfp4 of "
      "up to 8 rows), where each group's sum is scaled in float32, or expanded to float16 in "
      "registers; unquantized numbers quantized in registers. Beside packed w it quantizes x "
      "itself (a row of nvfp4, eight of mxfp8), else another kernel does"
    ),
    platforms=("cuda",),
    refuses=_refusal_of_few_rows,
    run=_run_few_rows,
    details=_few_rows_details,
  ),
  Implementation(
    name="hopper_fp8",
    summary=(
      "fp8 tensor cores: a kernel quantizes x (and w, unless packed) to e4m3 codes under one power "
      "of two a row, another multiplies them (packed w expanded in its registers, or before) and "
      "adds every 128 products in float32"
    ),
    platforms=("cuda",),
    refuses=_refusal_of_fp8,
    run=_run_fp8,
    details=lambda problem: _tiles(problem, promote=True),
  ),
  Implementation(
    name="hopper_exact",
    summary=(
      "16 bit tensor cores on exact operands: a kernel quantizes x (and w, unless packed), another "
      "multiplies them (packed w expanded in its registers, or before)"
    ),
    platforms=("cuda",),
    refuses=_refusal_of_hopper,
    run=_run_exact,
    details=lambda problem: _tiles(problem, promote=_wants_exact_sums(problem)),
  ),
  Implementation(
    name="xla",
    summary=(
      "XLA: x (and w, unless packed) is quantized, both are dequantized, and float32 matrices "
      "are multiplied at float32 precision; this is the definition (jaxqq/_reference.py), exact "
      "and not fast"
    ),
    platforms=None,
    refuses=lambda problem: None,
    run=lambda operands, problem: _reference.product(
      operands, mode=problem.mode, out_dtype=problem.out_dtype
    ),
  ),
)

# The platforms that have rows of their own.
PLATFORMS = tuple(sorted({p for row in IMPLEMENTATIONS for p in row.platforms or ()}))


def choose(
  problem: Any, platform: str, table: Sequence[Implementation] = IMPLEMENTATIONS
) -> tuple[Implementation, list[str]]:
  """The implementation that a problem gets on a platform, and why not those before it."""
  refusals: list[str] = []
  for row in table:
    if row.platforms is not None and platform not in row.platforms:
      reason: str | None = f"it is for {' and '.join(row.platforms)}, not {platform}"
    else:
      reason = row.refuses(problem)
    if reason is None:
      return row, refusals
    refusals.append(f"{row.name}: {reason}")
  raise AssertionError("the last row of a table takes every problem")
