"""How far a product may be off: section 3 of the specification, element by element.

Numpy and float64 alone; no code of the library.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from tests.support import fp8, oracle

# Float32 itself, and a processor that flushes what is no normal number, need not have this.
SMALLEST_NORMAL = 2.0**-126
LARGEST = float(np.finfo(np.float32).max)

RELATIVE = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-10}
NORM_WISE = {"float32": 1e-5, "bfloat16": 3e-3, "float16": 1.5e-3}
NORM_WISE_HIGHEST = {**NORM_WISE, "float16": 4e-4}

# Of whole matrices


@dataclasses.dataclass(frozen=True)
class Quantized:
  """An operand as the oracle has it: codes (..., rows, K), scale bytes (..., rows, K / group)."""

  codes: np.ndarray
  scales: np.ndarray
  mode: str

  def values(self) -> np.ndarray:
    """Without a global scale; NaN where a group is bad."""
    m = oracle.MODES[self.mode]
    if m.power_of_two:
      scale = np.ldexp(1.0, self.scales.astype(np.int64) - 127)
      scale = np.where(self.scales == 0xFF, np.nan, scale)
      elements = np.arange(256, dtype=np.uint8).view(m.element).astype(np.float64)
      return elements[self.codes] * scale.repeat(m.group, axis=-1)
    return oracle.values(self.codes, self.scales, self.mode)


@dataclasses.dataclass(frozen=True)
class Unquantized:
  """An operand that is multiplied as it is."""

  codes: np.ndarray
  mode: str = ""

  def values(self) -> np.ndarray:
    return self.codes.astype(np.float64)


Operand = Quantized | Unquantized


@dataclasses.dataclass(frozen=True)
class Rules:
  """Which of the bounds hold."""

  highest: bool = False  # 2**-18 of mag instead of 2**-12
  fp8: bool = False  # re-based codes, and sums of fp8 tensor cores
  fp8_sums: bool = True  # the latter
  bfloat16: bool = False  # operands of mxfp8 in bfloat16, whose subnormal numbers have few bits
  flushes: bool = False  # a processor that takes subnormal float32 for 0, as XLA's for CPUs does
  unit: float = 1.0  # beside that: what sums are multiplied by in the end
  norm_wise: bool = False
  wide: bool = False  # both operands have channels 1000 times the others


@dataclasses.dataclass(frozen=True)
class Verdict:
  """How near a product came to its bounds, and what is wrong with it."""

  # The largest error / bound. If many elements need the fp8 term, some bounds are without its sums.
  worst: float
  plain: float  # the same, the fp8 term left out of the bound
  norm: float  # ||error|| / ||exact||, 0 where nothing bounds it
  wrong: str  # or ''


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A product beside the exact one: arrays of the output's shape."""

  got: np.ndarray
  exact: np.ndarray
  mag: np.ndarray
  error: np.ndarray  # 0 where nothing is asked
  rounding: np.ndarray  # the part of the bound that the output's type takes
  bound: np.ndarray  # all of it but the fp8 term
  counted: np.ndarray  # neither NaN nor beyond float32
  misplaced: np.ndarray  # a NaN, or none, in the wrong place
  flushed: bool  # something was taken for 0, or had fewer bits


def compare(out: np.ndarray, x: Operand, w: Operand, alpha: float, rules: Rules) -> Comparison:
  """Elements are left out only where float32 cannot hold mag, so that no sum need be finite.

  Those beyond the output's range are infinite or the largest number there is.
  """
  x_hat, w_hat = x.values(), w.values()
  bad_x, bad_w = np.isnan(x_hat).any(axis=-1), np.isnan(w_hat).any(axis=-1)
  x_hat[bad_x], w_hat[bad_w] = 0, 0
  exact, mag = oracle.product(x_hat, w_hat)
  sums_overflow = mag > LARGEST / 2
  lost = np.minimum(mag, x_hat.shape[-1] * SMALLEST_NORMAL * rules.unit)
  flushed = _flushed(x, x_hat, w, w_hat) if rules.flushes else None
  if flushed is not None:
    lost = lost + flushed
  changed = _change(x_hat, w_hat, ml_dtypes.bfloat16) if rules.bfloat16 else np.zeros(())
  # What is lost is rounded to the output's dtype with the rest.
  lost = (lost + changed) * (1 + RELATIVE[out.dtype.name])
  exact, mag, lost = exact * alpha, mag * alpha, lost * abs(alpha)
  want_nan = np.broadcast_to(bad_x[..., :, None] | bad_w[..., None, :], exact.shape)

  name, got = out.dtype.name, out.astype(np.float64)
  narrow = ml_dtypes.finfo(out.dtype)
  of_mag = 2.0**-18 if rules.highest or name == "float32" else 2.0**-12
  if rules.bfloat16 and _has_subnormals(x_hat, w_hat):
    mag_of_sums = oracle.product(_as_normal(x_hat), _as_normal(w_hat))[1] * alpha
  else:
    mag_of_sums = mag
  rounding = RELATIVE[name] * np.abs(exact) + float(narrow.smallest_subnormal)
  bound = rounding + of_mag * mag_of_sums + lost + SMALLEST_NORMAL
  # An infinity is as good as the largest number, and stands for all beyond.
  largest = float(narrow.max)
  with np.errstate(invalid="ignore"):
    error = np.where(
      np.abs(got) >= largest,
      np.maximum(largest - np.sign(got) * exact, 0),
      np.abs(got - exact),
    )
  counted = ~want_nan & ~sums_overflow
  return Comparison(
    got,
    exact,
    mag,
    np.where(counted, error, 0),
    rounding,
    bound,
    counted,
    misplaced=(np.isnan(got) & counted) | (want_nan & ~np.isnan(got)),
    flushed=flushed is not None or bool(changed.any()),
  )


def check(out: np.ndarray, x: Operand, w: Operand, alpha: float, rules: Rules) -> Verdict:
  """Every element of a product against its bound, and every NaN by its place."""
  shape = np.broadcast_shapes(x.codes.shape[:-2], w.codes.shape[:-2])
  shape += (x.codes.shape[-2], w.codes.shape[-2])
  if out.shape != shape:
    return Verdict(np.inf, np.inf, np.inf, f"shape {out.shape} for {shape}")
  c = compare(out, x, w, alpha, rules)
  if c.misplaced.any():
    i = tuple(int(j) for j in np.argwhere(c.misplaced)[0])
    count = int(c.misplaced.sum())
    wrong = f"NaN misplaced in {count} elements: out{i} = {c.got[i]}"
    return Verdict(np.inf, np.inf, np.inf, wrong)
  ratio = c.error / c.bound
  plain = float(np.max(ratio, initial=0))
  if rules.fp8 and np.count_nonzero(ratio > 1) > _MANY:
    # Most are within what re-basing alone may change.
    bound = c.bound + alpha * fp8.rebasing_terms(x, w) * (1 + RELATIVE[out.dtype.name])
    ratio = np.where(ratio > 1, c.error / bound, ratio)
  if rules.fp8 and plain > 1:
    at = np.argwhere(ratio > 1)
    bound = c.bound[tuple(at.T)] + alpha * fp8_terms(x, w, at, out.dtype, rules.fp8_sums)
    ratio[tuple(at.T)] = c.error[tuple(at.T)] / bound
  worst = float(np.max(ratio, initial=0))
  wrong = ""
  if not worst <= 1:
    i = tuple(int(j) for j in np.unravel_index(np.argmax(ratio), ratio.shape))
    count = int((ratio > 1).sum())
    wrong = f"{worst:.3g} of the bound; {count} elements of {ratio.size} beyond it"
    wrong += f"; out{i} = {c.got[i]:.6g} for {c.exact[i]:.6g}, mag {c.mag[i]:.3g}"
  bounded = rules.norm_wise and not c.flushed
  norm = _norm_wise(c.got, c.exact, c.counted, ml_dtypes.finfo(out.dtype)) if bounded else 0.0
  limit = (NORM_WISE_HIGHEST if rules.highest else NORM_WISE)[out.dtype.name]
  off = norm
  if norm > limit and rules.fp8 and rules.wide:
    # Rebasing leaves few bits to most channels. What is left is to be multiplied as any other data.
    rebased = fp8.rebased_values(x) @ fp8.rebased_values(w).swapaxes(-1, -2) * alpha
    off = _norm_wise(c.got, rebased, c.counted, ml_dtypes.finfo(out.dtype))
  if off > limit and not wrong:
    wrong = f"norm-wise error {off:.3g}, and at most {limit:.3g} it may be"
  return Verdict(worst, plain, norm, wrong)


def _norm_wise(
  got: np.ndarray, exact: np.ndarray, counted: np.ndarray, narrow: ml_dtypes.finfo
) -> float:
  """||error|| / ||exact|| where that is a matter of many elements, all in range; else 0."""
  if counted.sum() < 256 or not np.isfinite(got[counted]).all():
    return 0.0
  exact = exact[counted]
  # Small enough to be subnormal, they have fewer bits.
  if np.sqrt(np.mean(exact**2)) < 2.0**10 * float(narrow.tiny) or np.abs(exact).max() > narrow.max:
    return 0.0
  return float(np.linalg.norm(got[counted] - exact) / np.linalg.norm(exact))


def _flushed(x: Quantized, x_hat: np.ndarray, w: Quantized, w_hat: np.ndarray) -> np.ndarray | None:
  """What is lost where subnormal numbers, 2**-127 among the scales too, are 0; None if nothing."""

  def small(a: Operand, hat: np.ndarray) -> np.ndarray:
    magnitude = np.abs(hat)
    subnormal = magnitude <= SMALLEST_NORMAL  # which a subnormal number is rounded up to
    if isinstance(a, Quantized) and oracle.MODES[a.mode].power_of_two:
      subnormal |= (a.scales == 0).repeat(oracle.MODES[a.mode].group, axis=-1)
    return np.where(subnormal, magnitude, 0)

  x_small, w_small = small(x, x_hat), small(w, w_hat)
  if not x_small.any() and not w_small.any():
    return None
  lost = x_small @ np.abs(w_hat).swapaxes(-1, -2)
  return lost + np.abs(x_hat) @ w_small.swapaxes(-1, -2)


def _has_subnormals(*operands: np.ndarray) -> bool:
  return any(((a != 0) & (np.abs(a) < SMALLEST_NORMAL)).any() for a in operands)


def _as_normal(a: np.ndarray) -> np.ndarray:
  """What tensor cores take a for when they align products: they go by the exponents as stored."""
  return np.where((a != 0) & (np.abs(a) < SMALLEST_NORMAL), SMALLEST_NORMAL, a)


_MANY = 1 << 12  # elements whose sums in fp8 are not simulated one by one unless they have to be
_AT_ONCE = 1 << 17  # numbers of float64, which a cache holds


def _change(x_hat: np.ndarray, w_hat: np.ndarray, dtype: type) -> np.ndarray:
  """At most what rounding both operands to dtype does to the product."""
  with np.errstate(over="ignore"):
    dx, dw = (np.abs(a - a.astype(dtype).astype(np.float64)) for a in (x_hat, w_hat))
  return dx @ np.abs(w_hat).swapaxes(-1, -2) + (np.abs(x_hat) + dx) @ dw.swapaxes(-1, -2)


def fp8_terms(
  x: Quantized, w: Quantized, at: np.ndarray, dtype: np.dtype, sums: bool = True
) -> np.ndarray:
  """The fp8 term of the elements (..., m, n) of a product that the rows of `at` name.

  What is lost is rounded to the output's dtype with the rest.
  """
  lost = fp8.rebasing_terms(x, w)[tuple(at.T)]
  if sums:
    # Of whole matrices once, not of the rows of every pair.
    rebased = [fp8.rebased(a.codes, a.scales)[1] for a in (x, w)]
    exponents = [fp8.row_exponent(a.scales) for a in (x, w)]
    batch = np.broadcast_shapes(x.codes.shape[:-2], w.codes.shape[:-2])

    def rows(a: np.ndarray, at: np.ndarray, axis: int, kept: int) -> np.ndarray:
      whole = np.broadcast_to(a, (*batch, *a.shape[a.ndim - kept :]))
      return whole[(*at.T[:-2], at.T[axis])]

    step = max(1, _AT_ONCE // x.codes.shape[-1])
    parts = [at[i : i + step] for i in range(0, len(at), step)]
    of_sums = [
      fp8.lost_by_sums(*(rows(a, part, i - 2, 2) for i, a in enumerate(rebased))) for part in parts
    ]
    unit = sum(rows(a, at, i - 2, 1) for i, a in enumerate(exponents))
    lost = lost + np.ldexp(np.concatenate([np.zeros(0), *of_sums]), unit)
  return lost * (1 + RELATIVE[dtype.name])
