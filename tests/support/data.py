"""Kinds of data for x and w, in float64: what is easy, and what costs a kernel its bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Rng = np.random.Generator
Shape = tuple[int, ...]

GROUP = 16  # the smallest group there is: blocks of it lie in one group of either mode


def normal(rng: Rng, shape: Shape) -> np.ndarray:
  return rng.standard_normal(shape)


def uniform(rng: Rng, shape: Shape) -> np.ndarray:
  return rng.uniform(-1, 1, shape)


def positive(rng: Rng, shape: Shape) -> np.ndarray:
  return np.abs(rng.standard_normal(shape))


def heavy_tails(rng: Rng, shape: Shape) -> np.ndarray:
  """Student's t with 2 degrees of freedom."""
  return rng.standard_t(2, shape)


def outliers_of(size: float, every: int, base: Callable[[Rng, Shape], np.ndarray] = normal):
  def f(rng: Rng, shape: Shape) -> np.ndarray:
    """Some channels are so many times the others: those of x are not those of w."""
    a, k = base(rng, shape), shape[-1]
    a[..., rng.choice(k, max(1, k // every), replace=False)] *= size
    return a

  return f


def rows_apart(rng: Rng, shape: Shape) -> np.ndarray:
  return rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 13, (*shape[:-1], 1))


def groups_apart_by(lowest: int):
  def f(rng: Rng, shape: Shape) -> np.ndarray:
    """The groups of a row differ by powers of two, 2**0 to 2**lowest."""
    powers = rng.integers(lowest, 1, (*shape[:-1], -(-shape[-1] // 32)))
    return rng.standard_normal(shape) * 2.0 ** powers.repeat(32, axis=-1)[..., : shape[-1]]

  return f


def one_large_group(rng: Rng, shape: Shape) -> np.ndarray:
  """One group of a row counts, and the others are beyond what its scale can hold."""
  count = -(-shape[-1] // 32)
  powers = np.where(rng.permuted(np.indices((*shape[:-1], count))[-1], axis=-1) == 0, 0, -14)
  return rng.standard_normal(shape) * 2.0 ** powers.repeat(32, axis=-1)[..., : shape[-1]]


def sparse(rng: Rng, shape: Shape) -> np.ndarray:
  return rng.standard_normal(shape) * (rng.random(shape) < 1 / 32)


def half(rng: Rng, shape: Shape) -> np.ndarray:
  """Zero along half of k, the first or the last."""
  a, k = rng.standard_normal(shape), shape[-1]
  a[..., slice(k // 2) if rng.random() < 0.5 else slice(k // 2, None)] = 0
  return a


def zeros(rng: Rng, shape: Shape) -> np.ndarray:
  """Of both signs."""
  return np.where(rng.random(shape) < 0.5, 0.0, -0.0)


def ties(rng: Rng, shape: Shape) -> np.ndarray:
  """Multiples of a quarter: rounding has to choose."""
  return np.round(rng.standard_normal(shape) * 8) / 4


def constant(rng: Rng, shape: Shape) -> np.ndarray:
  return np.full(shape, rng.uniform(1, 2))


def cancelling(rng: Rng, shape: Shape) -> np.ndarray:
  """Neighbours of either sign, or of one: a product of the two kinds is 0, or far from it."""
  a = rng.standard_normal((*shape[:-1], shape[-1] // 2)).repeat(2, axis=-1)
  if rng.random() < 0.5:
    a[..., 1::2] *= -1
  return a


KINDS = {
  "normal": normal,
  "uniform": uniform,
  "positive": positive,
  "heavy tails": heavy_tails,
  "outliers": outliers_of(200, 64),
  "large outliers": outliers_of(1000, 128),
  "positive outliers": outliers_of(200, 64, positive),
  "rows apart": rows_apart,
  "groups within reach": groups_apart_by(-13),
  "groups apart": groups_apart_by(-40),
  "groups far apart": groups_apart_by(-110),
  "one large group": one_large_group,
  "sparse": sparse,
  "half": half,
  "zeros": zeros,
  "ties": ties,
  "constant": constant,
  "cancelling": cancelling,
}
# Those that section 3 of the specification bounds the norm of the error on.
NORM_WISE = ("normal", "uniform", "positive", "heavy tails", "outliers", "large outliers")


def array(rng: Rng, kind: str, shape: Shape, exponent: int, dtype: np.dtype) -> np.ndarray:
  """Data of a kind times 2**exponent, in dtype, and finite there.

  Not quite up to the largest float32: codes are rounded up to powers of two beyond it.
  """
  a = np.ldexp(KINDS[kind](rng, shape), exponent)
  largest = 65504.0 if dtype == np.float16 else 2.0**120
  return np.clip(a, -largest, largest).astype(np.float32).astype(dtype)


def random_codes(rng: Rng, shape: Shape, mode: str, group: int) -> tuple[np.ndarray, np.ndarray]:
  """Any codes under any scales, such as no quantizer makes: codes and scale bytes.

  nvfp4's scales of every kind, negative ones too; powers of two as far apart as 2**80, in a random
  place.
  """
  scale_shape = (*shape[:-1], shape[-1] // group)
  if mode == "mxfp8":
    codes = rng.integers(0, 127, shape) + 128 * rng.integers(0, 2, shape)
  else:
    codes = rng.integers(0, 16, shape)
  if mode == "nvfp4":
    scales = rng.integers(0, 127, scale_shape)
    if rng.random() < 0.25:
      scales += 128 * rng.integers(0, 2, scale_shape)
  else:
    middle, spread = rng.integers(117, 138), rng.choice([0, 2, 6, 13, 14, 30, 80])
    scales = np.clip(middle + rng.integers(-spread, spread + 1, scale_shape), 0, 254)
    scales[rng.random(scale_shape) < 0.03] = 0
  return codes.astype(np.uint8), scales.astype(np.uint8)


def poisoned(
  rng: Rng, scales: np.ndarray, codes: np.ndarray, mode: str
) -> tuple[np.ndarray, np.ndarray]:
  """Packed w with a NaN somewhere: in a scale, or in a code where codes have one."""
  scales, codes = scales.copy(), codes.copy()
  if mode != "mxfp8" or rng.random() < 0.5:
    place = tuple(rng.integers(size) for size in scales.shape)
    scales[place] = 0x7F if mode == "nvfp4" else 0xFF
  else:
    codes[tuple(rng.integers(size) for size in codes.shape)] = rng.choice([0x7F, 0xFF])
  return scales, codes
