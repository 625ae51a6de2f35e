"""The product by XLA: the definition (`jaxqq/_reference.py`), and that on matrix units.

What the operands in 16 bits cost on a GPU, more than their product, is to write them: a loop of
XLA's has as many threads for 2 bytes as for 4. So they are written as words of two.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq import _reference
from jaxqq._formats import Format
from jaxqq._kernels.plan import Device, Implementation, Unsupported
from jaxqq._kernels.problem import Problem
from jaxqq._quantize import (
  dequantize_to_multiply,
  encoding_of,
  scale_factors,
  times_factors,
  with_axes_of,
)
from jaxqq._reference import Operands
from jaxqq._rounding import arithmetic_of

_GPUS = ("cuda", "rocm")
_MANY_ROWS = 64  # with more, sums written in float32 are worth avoiding


@dataclasses.dataclass(frozen=True)
class Reference:
  """x and w (unless packed) quantized, both dequantized, and multiplied with float32 sums."""

  problem: Problem
  platform: str
  details: str | None = None

  def run(self, operands: Operands) -> jax.Array:
    problem = self.problem
    return _reference.product(
      operands,
      fmt=problem.fmt,
      out_dtype=problem.out_dtype,
      quantize_input=problem.quantize_input,
      arithmetic=arithmetic_of(self.platform),
    )


@dataclasses.dataclass(frozen=True)
class InBfloat16:
  """The same with operands in bfloat16, which has all their bits from 2**-126 on.

  Beside a float16 x that is not quantized, w_hat of nvfp4 is float16, which has its bits too.
  """

  problem: Problem
  platform: str
  details: str | None = None

  def run(self, operands: Operands) -> jax.Array:
    operands = operands.untransposed()
    x, w = operands.x, self.w_hat(operands)
    if self.problem.quantize_input:
      x = self.quantized(x, operands.global_scale_x)
    if min(x.ndim, w.ndim) > 2 or self.reads_w_once:  # else a matrix stays one
      x, w = (_reference.with_ndim(a, max(x.ndim, w.ndim)) for a in (x, w))
    if self.reads_w_once:
      sums = jnp.sum(x.astype(jnp.float32) * w.astype(jnp.float32), axis=-1)[..., None, :]
    else:
      w = jnp.swapaxes(w, -1, -2)
      precision = lax.Precision.HIGHEST  # whatever JAX's default is
      sums = jnp.matmul(x, w, precision=precision, preferred_element_type=self.dtype_of_sums)
    global_scales = operands.global_scale_x, operands.global_scale_w
    sums = _reference.times_alpha(sums, *global_scales, self.problem.fmt, operands.row_scales)
    return sums.astype(self.problem.out_dtype)

  def w_hat(self, operands: Operands) -> jax.Array:
    if operands.scales is None:
      return self.quantized(operands.w, operands.global_scale_w)
    fmt = self.problem.fmt
    codes, scales = _reference.unpacked(operands.w, operands.scales, fmt)
    if self.writes_words:
      return _words_of_two(_halves(codes), scales, fmt, self.dtype)
    return dequantize_to_multiply(codes, scales, fmt).astype(self.dtype)

  def quantized(self, a: jax.Array, global_scale: jax.Array | None) -> jax.Array:
    """In `dtype`, what is left of `a`."""
    fmt = self.problem.fmt
    if not self.writes_words:
      return _reference.round_trip(a, fmt, global_scale).astype(self.dtype)
    a = with_axes_of(a, global_scale)
    encoding = encoding_of(a, fmt, global_scale)
    low, high = (encoding.codes(half, fmt) for half in _halves(a))
    return _words_of_two((low, high), encoding.scales.squeeze(-1), fmt, self.dtype)

  @property
  def dtype(self) -> np.dtype:
    """Of both operands."""
    problem = self.problem
    return np.dtype(jnp.bfloat16) if problem.quantize_input else problem.x_dtype

  @property
  def reads_w_once(self) -> bool:
    """One row of x: w_hat is never written, its rows are summed up as they are dequantized."""
    problem = self.problem
    if self.platform not in _GPUS or not self.knows_rows or problem.m != 1:
      return False
    return not problem.shares_w or math.prod(problem.x_batch) == 1

  @property
  def knows_rows(self) -> bool:
    """An exported program may be made for any number of them."""
    return isinstance(self.problem.m, int)

  @property
  def writes_words(self) -> bool:
    return self.platform in _GPUS and not self.reads_w_once

  @property
  def dtype_of_sums(self) -> Any:
    """What they are rounded to, where nothing is multiplied afterwards."""
    problem = self.problem
    is_final = problem.out_dtype == self.dtype == jnp.bfloat16 and not problem.has_global_scales
    many = self.knows_rows and problem.m > _MANY_ROWS
    return jnp.bfloat16 if is_final and many else jnp.float32


def _halves(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Of (..., k), what is at even and at odd places: (..., k / 2)."""
  pairs = a.reshape(*a.shape[:-1], a.shape[-1] // 2, 2)
  return pairs[..., 0], pairs[..., 1]


def _words_of_two(
  codes: tuple[jax.Array, jax.Array], scales: jax.Array, fmt: Format, dtype: np.dtype
) -> jax.Array:
  """code * scale, (..., k), of codes at even and at odd places; written as words of two."""
  factors = tuple(factor.astype(dtype) for factor in scale_factors(scales, fmt))
  factors = lax.optimization_barrier(factors)  # else XLA may write them in float32
  low, high = (
    lax.bitcast_convert_type(times_factors(half, factors, fmt).astype(dtype), jnp.uint16).astype(
      jnp.uint32
    )
    for half in codes
  )
  numbers = lax.bitcast_convert_type(low | (high << 16), dtype)
  return numbers.reshape(*numbers.shape[:-2], 2 * numbers.shape[-2])


def _plan(problem: Problem, device: Device) -> Reference:
  return Reference(problem, device.platform)


def _plan_bfloat16(problem: Problem, device: Device) -> InBfloat16:
  if problem.wants_exact_sums:
    raise Unsupported(
      "float32 output, or precision above DEFAULT, takes float32 sums, and matrix units may cut "
      "off theirs"
    )
  if not problem.quantize_input and problem.x_dtype == jnp.float32:
    raise Unsupported("x is float32 and not quantized, and matrix units take 16 bits of it")
  if not problem.quantize_input and problem.x_dtype == jnp.float16 and _leaves_float16(problem.fmt):
    raise Unsupported(
      f"x is float16 and not quantized, and the scales of {problem.fmt.mode} leave its range"
    )
  return InBfloat16(problem, device.platform)


def _leaves_float16(fmt: Format) -> bool:
  """Whether there are scales that float16 does not hold."""
  return fmt.scale_is_power_of_two


BFLOAT16 = Implementation(
  name="xla_bfloat16",
  summary=(
    "XLA, on matrix units: x (and w, unless packed) is quantized, both are dequantized to "
    "bfloat16, which holds them exactly, and multiplied with float32 sums; an x that is not to be "
    "quantized is multiplied as it is"
  ),
  platforms=(*_GPUS, "tpu"),
  plan=_plan_bfloat16,
  takes_row_scales=True,
)


PRODUCT = Implementation(
  name="xla",
  summary=(
    "XLA: x (and w, unless packed) is quantized, both are dequantized, and float32 matrices "
    "are multiplied at float32 precision (an x that is not to be quantized as it is); this is the "
    "definition (jaxqq/_reference.py), exact and not fast"
  ),
  platforms=None,
  plan=_plan,
  takes_row_scales=True,
)
