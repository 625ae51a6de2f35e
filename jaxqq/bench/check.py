"""How wrong a result is: on a sample of its rows and columns, in numpy, ml_dtypes and float64.

Nothing here is code that is measured, so a wrong kernel is caught: operands are quantized anew
from the numbers that they were made of.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxqq.bench.cases import BACKWARD_FORMS, FORMS, Case

SAMPLE = 64  # rows, and columns


@dataclasses.dataclass(frozen=True)
class _Mode:
  element: type
  scale: type
  group: int
  power_of_two: bool


# Not jaxqq's table, on purpose.
_MODES = {
  "nvfp4": _Mode(ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn, 16, False),
  "mxfp8": _Mode(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, 32, True),
  "mxfp4": _Mode(ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e8m0fnu, 32, True),
}
_LARGEST_NVFP4 = 2688.0
# A bound is this share of |exact|, and that of |x_hat| |w_hat|^T.
_BOUNDS = {
  "float32": (0.0, 2.0**-18),
  "bfloat16": (2.0**-8, 2.0**-12),
  "float16": (2.0**-10, 2.0**-12),
}


def quantize(a: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
  """Codes (..., k) and scale bytes (..., k / group), uint8, of finite numbers."""
  row = _MODES[mode]
  largest = float(ml_dtypes.finfo(row.element).max)
  groups = a.astype(np.float32).reshape(*a.shape[:-1], -1, row.group)
  amax = np.max(np.abs(groups), axis=-1, keepdims=True)
  if row.power_of_two:
    fraction, exponent = np.frexp(amax / np.float32(largest))
    exponent = exponent - (fraction == 0.5)  # frexp has 2**e as 0.5 * 2**(e + 1)
    biased = np.where(amax == 0, 0, np.clip(exponent + 127, 0, 254))
    scaled, scale = np.ldexp(groups.astype(np.float64), 127 - biased), biased.astype(np.uint8)
  else:
    largest_scale = np.float32(ml_dtypes.finfo(row.scale).max)
    rounded: np.ndarray = np.minimum(amax / np.float32(largest), largest_scale).astype(row.scale)
    divisor = rounded.astype(np.float32)
    with np.errstate(divide="ignore"):
      reciprocal = np.where(divisor == 0, np.float32(0), np.float32(1) / divisor)
    scaled, scale = groups * reciprocal, rounded.view(np.uint8)
  codes = np.clip(scaled, -largest, largest).astype(row.element).view(np.uint8)
  return codes.reshape(a.shape), scale.squeeze(-1)


def round_trip(a: np.ndarray, mode: str) -> np.ndarray:
  """What is left of a after quantization, float64; the last axis is padded to whole groups."""
  row = _MODES[mode]
  padded = np.pad(a.astype(np.float32), ((0, 0), (0, -a.shape[-1] % row.group)))
  codes, scales = quantize(padded, mode)
  values = codes.view(row.element).astype(np.float64)
  return values * np.repeat(scales.view(row.scale).astype(np.float64), row.group, axis=-1)


@dataclasses.dataclass(frozen=True)
class Taken:
  """The sampled rows of a case's operands and result, in the host's memory."""

  case: Case
  rows: tuple[np.ndarray, ...]  # of each operand, the contracted axis last
  powers: tuple[int, ...]  # see _power_for
  result: tuple[np.ndarray, ...]  # rows of it, or of its words and scales
  columns: np.ndarray  # which columns of the result

  def error_share(self, *, quantized: bool) -> tuple[float | None, str]:
    """As the function of this name."""
    form = FORMS[self.case.form]
    if not form.is_product:
      return _bits_share(self.case, self.rows[0], self.result)
    rows = list(self.rows)
    if quantized:
      for i in range(0 if form.quantizes_x else 1, len(rows)):
        scaled = np.ldexp(rows[i].astype(np.float32), -self.powers[i])
        rows[i] = np.ldexp(round_trip(scaled, self.case.mode), self.powers[i])
    lhs, rhs = (a.astype(np.float64) for a in rows)
    result = self.result[0][:, self.columns]
    return _product_share(result, lhs @ rhs.T, np.abs(lhs) @ np.abs(rhs).T)


def take(case: Case, operands: tuple[jax.Array, ...], out: Any, *, seed: int = 0) -> Taken:
  """What a check needs of the device; the check itself needs none.

  Args:
    case: what was computed.
    operands: of the form's equation, unquantized.
    out: the result, or for quantize the words and scales.
    seed: of the sample.
  """
  form = FORMS[case.form]
  rng = np.random.default_rng(seed)
  samples = {dim: _sample(rng, getattr(case, dim)) for dim in form.out}
  rows = (
    _take(a, dims, form.contracted, samples) for a, dims in zip(operands, form.inputs, strict=True)
  )
  results = out if isinstance(out, tuple) else (out,)
  return Taken(
    case,
    tuple(rows),
    tuple(_power_for(a, case) for a in operands),
    tuple(np.asarray(take_rows(a, samples[form.out[0]], axis=0)) for a in results),
    samples[form.out[1]],
  )


def error_share(
  case: Case, operands: tuple[jax.Array, ...], out: Any, *, quantized: bool, seed: int = 0
) -> tuple[float | None, str]:
  """The worst error as a share of the specification's bound: at most 1 is right.

  Args:
    case: what was computed.
    operands: of the form's equation, unquantized.
    out: the result, or for quantize the words and scales.
    quantized: whether the result should be that of quantized operands.
    seed: of the sample.

  Returns:
    The share, 0 for equal bits, None where there is no number for it; and what is wrong.
  """
  return take(case, operands, out, seed=seed).error_share(quantized=quantized)


def _power_for(a: jax.Array, case: Case) -> int:
  """The exponent of what an operand is divided by before it is quantized.

  In the quantized backward nvfp4 takes the global scale 2688 * 2**power of an operand whose amax is
  below 1: the least that the amax does not exceed.
  """
  if case.form not in BACKWARD_FORMS or _MODES[case.mode].power_of_two:
    return 0
  amax = float(jnp.max(jnp.abs(a)))
  if amax == 0 or amax >= 1:
    return 0
  fraction, power = math.frexp(amax / _LARGEST_NVFP4)
  return power if fraction > 0.5 else power - 1


def _product_share(
  result: np.ndarray, exact: np.ndarray, magnitude: np.ndarray
) -> tuple[float | None, str]:
  values = result.astype(np.float64)
  if not np.isfinite(values).all():
    return None, "the result is not finite"
  of_exact, of_magnitude = _BOUNDS[result.dtype.name]
  bound = of_exact * np.abs(exact) + of_magnitude * magnitude
  share = float(np.max(np.abs(values - exact) / np.maximum(bound, np.finfo(np.float64).tiny)))
  return share, "" if share <= 1 else "beyond the bound"


def _bits_share(
  case: Case, rows: np.ndarray, result: tuple[np.ndarray, ...]
) -> tuple[float | None, str]:
  """Quantizing and dequantizing are exact, so their results are compared as bits."""
  found: np.ndarray
  if FORMS[case.form].packed == "out":
    codes, scales = quantize(rows, case.mode)
    words, found_scales = result
    found = np.concatenate([words.view(np.uint8), found_scales], axis=-1)
    wanted = np.concatenate([_packed_bytes(codes, case.mode), scales], axis=-1)
  else:
    (found,) = result
    wanted = round_trip(rows, case.mode).astype(found.dtype)
  wrong = int(np.sum(found != wanted))
  if wrong:
    return None, f"{wrong} of {wanted.size} sampled values differ from the definition"
  return 0.0, ""


def _packed_bytes(codes: np.ndarray, mode: str) -> np.ndarray:
  """Codes as they are stored: one a byte, or two with the first in the low half."""
  per_byte = 8 // int(ml_dtypes.finfo(_MODES[mode].element).bits)
  pairs = codes.reshape(*codes.shape[:-1], -1, per_byte)
  shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(8 // per_byte)
  return np.bitwise_or.reduce(pairs << shifts, axis=-1)


def _sample(rng: np.random.Generator, size: int) -> np.ndarray:
  """Random indices, the first and the last always among them."""
  sample = np.sort(rng.choice(size, min(SAMPLE, size), replace=False)).astype(np.int32)
  sample[0], sample[-1] = 0, size - 1
  return sample


def _take(a: Any, dims: str, last: str, samples: dict[str, np.ndarray]) -> np.ndarray:
  """The sampled rows of a, as numpy, with the axis named `last` behind."""
  axis = 1 - dims.index(last)
  taken = np.asarray(take_rows(a, samples[dims[axis]], axis=axis))
  return taken if axis == 0 else taken.T


@functools.partial(jax.jit, static_argnames="axis")
def take_rows(a: jax.Array, sample: jax.Array, *, axis: int) -> jax.Array:
  return jnp.take(a, sample, axis=axis, mode="clip")
