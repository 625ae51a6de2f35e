"""How far a product may be off: section 3 of the specification, element by element.

Numpy and float64 alone; no code of the library.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np

from tests import oracle

# What fp8 tensor cores lose. An instruction sums up this many products with what was there before,
# and every addend loses up to UNIT of the largest one.
INSTRUCTION = 32
CHAIN = 4  # instructions that follow each other from zero, until float32 takes over
UNIT = 2.0**-13
LOST = (INSTRUCTION + 1) * UNIT

# Float32 itself, and a processor that flushes what is no normal number, need not have this.
SMALLEST_NORMAL = 2.0**-126
LARGEST = float(np.finfo(np.float32).max)

RELATIVE = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-10}
NORM_WISE = {"float32": 1e-5, "bfloat16": 3e-3, "float16": 1.5e-3}
NORM_WISE_HIGHEST = {**NORM_WISE, "float16": 4e-4}

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
GROUP = 32


# Sums in fp8


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows (P, K) of mxfp8 in units of their largest scale, as fp8 tensor cores get them."""

  rebased: np.ndarray  # codes on the power of two of the row's largest group, rounded to e4m3
  magnitude: np.ndarray  # without that rounding
  change: np.ndarray  # what it is off by
  unit: np.ndarray  # (P,): the exponent of the largest scale

  @classmethod
  def of(cls, codes: np.ndarray, scales: np.ndarray) -> Rows:
    # A scale of NaN is no power of two, and its row no business of a bound's.
    exponents = np.where(scales == 0xFF, 0, scales.astype(np.int64))
    top = exponents.max(axis=-1, keepdims=True)
    exact = E4M3[codes] * np.ldexp(1.0, exponents - top).repeat(GROUP, axis=-1)
    rebased = exact.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return cls(rebased, np.abs(exact), np.abs(exact - rebased), top[..., 0] - 127)

  def __getitem__(self, at: np.ndarray) -> Rows:
    return Rows(self.rebased[at], self.magnitude[at], self.change[at], self.unit[at])


def fp8_term(
  x_codes: np.ndarray,
  x_scales: np.ndarray,
  w_codes: np.ndarray,
  w_scales: np.ndarray,
  *,
  lost: float = LOST,
) -> np.ndarray:
  """What mxfp8's products in fp8 may lose, of P pairs of rows: (P, K) codes, (P, K/32) scales."""
  return fp8_term_of(Rows.of(x_codes, x_scales), Rows.of(w_codes, w_scales), lost)


def fp8_term_of(x: Rows, w: Rows, lost: float = LOST) -> np.ndarray:
  """`fp8_term` of rows that are ready.

  Re-basing changes element k of x by dx_k: sum |dx_k||w_k| + |x_k||dw_k| + |dx_k||dw_k|. Then each
  instruction may be off by lost * A, A the largest of its products and the sum so far, with what
  that may be off by itself. An interpreter that sums up in float32 has no such loss.
  """
  term = sum(
    np.einsum("pk,pk->p", a, b)
    for a, b in ((x.change, w.magnitude), (x.magnitude, w.change), (x.change, w.change))
  )
  if lost:
    products = x.rebased * w.rebased
    missing = -products.shape[-1] % (INSTRUCTION * CHAIN)
    products = np.pad(products, ((0, 0), (0, missing))) if missing else products
    products = products.reshape(len(products), -1, CHAIN, INSTRUCTION)
    sums = products.sum(axis=-1)
    largest = np.abs(products, out=products).max(axis=-1)
    error, so_far = np.zeros(sums.shape[:2]), np.zeros(sums.shape[:2])
    for i in range(CHAIN):
      error = error + lost * np.maximum(largest[..., i], np.abs(so_far) + error)
      so_far = so_far + sums[..., i]
    term = term + error.sum(axis=-1)
  return np.ldexp(term, x.unit + w.unit)


# Of whole matrices


@dataclasses.dataclass(frozen=True)
class Quantized:
  """An operand as the oracle has it: codes (..., rows, K), scale bytes (..., rows, K / group)."""

  codes: np.ndarray
  scales: np.ndarray
  mode: str

  def values(self) -> np.ndarray:
    """Without a global scale; NaN where a group is bad."""
    if self.mode == "mxfp8":
      scale = np.ldexp(1.0, self.scales.astype(np.int64) - 127)
      scale = np.where(self.scales == 0xFF, np.nan, scale)
      return E4M3[self.codes] * scale.repeat(GROUP, axis=-1)
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
  lost: float = LOST  # by the latter
  flushes: bool = False  # a processor that takes subnormal float32 for 0, as XLA's for CPUs does
  norm_wise: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
  """How near a product came to its bounds, and what is wrong with it."""

  worst: float  # the largest error / bound
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
  flushed: bool  # something was taken for 0


def compare(out: np.ndarray, x: Operand, w: Operand, alpha: float, rules: Rules) -> Comparison:
  """Elements are left out only where float32 cannot hold mag, so that no sum need be finite.

  Those beyond the output's range are infinite or the largest number there is.
  """
  x_hat, w_hat = x.values(), w.values()
  bad_x, bad_w = np.isnan(x_hat).any(axis=-1), np.isnan(w_hat).any(axis=-1)
  x_hat[bad_x], w_hat[bad_w] = 0, 0
  exact, mag = oracle.product(x_hat, w_hat)
  sums_overflow = mag > LARGEST / 2
  lost = np.minimum(mag, x_hat.shape[-1] * SMALLEST_NORMAL)
  flushed = _flushed(x, x_hat, w, w_hat) if rules.flushes else None
  if flushed is not None:
    lost = lost + flushed
  exact, mag, lost = exact * alpha, mag * alpha, lost * abs(alpha)
  want_nan = np.broadcast_to(bad_x[..., :, None] | bad_w[..., None, :], exact.shape)

  name, got = out.dtype.name, out.astype(np.float64)
  narrow = ml_dtypes.finfo(out.dtype)
  of_mag = 2.0**-18 if rules.highest or name == "float32" else 2.0**-12
  rounding = RELATIVE[name] * np.abs(exact) + float(narrow.smallest_subnormal)
  bound = rounding + of_mag * mag + lost + SMALLEST_NORMAL
  largest = float(narrow.max)
  with np.errstate(invalid="ignore"):
    error = np.abs(got - exact)
  counted = ~want_nan & ~sums_overflow
  # Beyond the range: by so much may the exact number be off before the largest takes its place.
  may_overflow = np.abs(exact) + bound >= largest
  right_end = may_overflow & (np.abs(got) >= largest) & (np.sign(got) == np.sign(exact))
  return Comparison(
    got,
    exact,
    mag,
    np.where(counted & ~right_end, error, 0),
    rounding,
    bound,
    counted,
    misplaced=(np.isnan(got) & counted) | (want_nan & ~np.isnan(got)),
    flushed=flushed is not None,
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
  if rules.fp8 and plain > 1:
    at = np.argwhere(ratio > 1)
    bound = c.bound[tuple(at.T)] + alpha * fp8_terms(x, w, at, rules.lost)
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
  if norm > limit and not wrong:
    wrong = f"norm-wise error {norm:.3g}, and at most {limit:.3g} it may be"
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
    subnormal = magnitude < SMALLEST_NORMAL
    if a.mode == "mxfp8":
      subnormal |= (a.scales == 0).repeat(GROUP, axis=-1)
    return np.where(subnormal, magnitude, 0)

  x_small, w_small = small(x, x_hat), small(w, w_hat)
  if not x_small.any() and not w_small.any():
    return None
  lost = x_small @ np.abs(w_hat).swapaxes(-1, -2)
  return lost + np.abs(x_hat) @ w_small.swapaxes(-1, -2)


_AT_ONCE = 1 << 17  # numbers of float64, which a cache holds


def fp8_terms(x: Quantized, w: Quantized, at: np.ndarray, lost: float = LOST) -> np.ndarray:
  """The fp8 term of the elements (..., m, n) of a product that the rows of `at` name."""
  batch = np.broadcast_shapes(x.codes.shape[:-2], w.codes.shape[:-2])
  ready, places = [], []
  for a, axis in ((x, -2), (w, -1)):
    count = a.codes.shape[-2]
    numbers = np.arange(math.prod(a.codes.shape[:-1])).reshape(a.codes.shape[:-1])
    numbers = np.broadcast_to(numbers, (*batch, count))[(*at.T[:-2], at.T[axis])]
    used, place = np.unique(numbers, return_inverse=True)
    flat = (b.reshape(-1, b.shape[-1])[used] for b in (a.codes, a.scales))
    ready.append(Rows.of(*flat))
    places.append(place)
  step = max(1, _AT_ONCE // x.codes.shape[-1])
  terms = [
    fp8_term_of(
      *(rows[place[i : i + step]] for rows, place in zip(ready, places, strict=True)), lost
    )
    for i in range(0, len(at), step)
  ]
  return np.concatenate([np.zeros(0), *terms])
