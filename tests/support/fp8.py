"""What Hopper's fp8 tensor cores compute, bit for bit: measured on an H200.

One instruction adds 32 products of e4m3 numbers to a sum so far:

    e        the largest exponent: of the products, the sum of both factors' (a subnormal one's is
             -6), and of the sum so far
    addends  each loses its bits below 2**(e - 13), towards zero; then they are added up exactly
    result   loses its bits below its own leading 14, towards zero

Checked against 32 * 6 * 4096 results of the instruction, random codes of all kinds and sums so far,
without one difference (`test_kernels_fp8.py` has a GPU do it again).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

INSTRUCTION = 32  # products of one instruction
CHAIN = 4  # instructions that follow each other from zero, until float32 takes over
BITS = 13  # that are kept below the leading one

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
GROUP = 32
_SMALLEST = -6  # the exponent of e4m3's subnormal numbers
_NONE = -900  # the exponent of zero


def exponent(a: np.ndarray) -> np.ndarray:
  """floor(log2 |a|)."""
  return np.where(a == 0, _NONE, np.frexp(a)[1] - 1)


def _truncated(a: np.ndarray, unit: np.ndarray) -> np.ndarray:
  return np.ldexp(np.trunc(np.ldexp(a, -unit)), unit)


def instruction(x: np.ndarray, w: np.ndarray, so_far: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The sum after one instruction, and at most what it lost: x and w (..., 32), float64 e4m3."""
  products = x * w
  exponents = np.maximum(exponent(x), _SMALLEST) + np.maximum(exponent(w), _SMALLEST)
  exponents = np.where(products == 0, _NONE, exponents)
  unit = np.maximum(exponents.max(axis=-1), exponent(so_far)) - BITS
  addends = _truncated(products, unit[..., None]).sum(axis=-1) + _truncated(so_far, unit)
  total = _truncated(addends, exponent(addends) - BITS)
  count = np.count_nonzero(products, axis=-1) + np.count_nonzero(so_far[..., None], axis=-1)
  lost = np.where(count > 0, count * np.ldexp(1.0, unit), 0)
  return total, lost + np.where(addends == 0, 0, np.ldexp(1.0, exponent(addends) - BITS))


def chains(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Sums of every 128 products, and at most what each lost: x and w (P, K) to (P, K / 128)."""
  missing = -x.shape[-1] % (INSTRUCTION * CHAIN)
  x, w = (np.pad(a, ((0, 0), (0, missing))) for a in (x, w))
  x, w = (a.reshape(len(a), -1, CHAIN, INSTRUCTION) for a in (x, w))
  total = np.zeros(x.shape[:2])
  lost = np.zeros(x.shape[:2])
  for i in range(CHAIN):
    total, more = instruction(x[:, :, i], w[:, :, i], total)
    lost = lost + more
  return total, lost


def rebased(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rows (P, K) of mxfp8 in units of their largest scale: as they are, and as e4m3 codes.

  The kernel for many rows puts all of a row's codes on the power of two of its largest group,
  rounded to nearest. A scale of NaN is no power of two, and its row no business of a bound's.
  """
  exponents = np.where(scales == 0xFF, 0, scales.astype(np.int64))
  top = exponents.max(axis=-1, keepdims=True)
  distance = (exponents - top).repeat(GROUP, axis=-1)
  exact = np.ldexp(E4M3[codes], distance)
  return exact, exact.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def row_exponent(scales: np.ndarray) -> np.ndarray:
  """Of the unit of `rebased`."""
  return np.where(scales == 0xFF, 0, scales.astype(np.int64)).max(axis=-1) - 127


def rebased_values(a: Any) -> np.ndarray:
  """What the codes of `rebased` mean, of a matrix (..., P, K) with its codes and scales."""
  return np.ldexp(rebased(a.codes, a.scales)[1], row_exponent(a.scales)[..., None])


def rebasing_term(x: tuple[np.ndarray, np.ndarray], w: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
  """At most what re-basing changes of sums over pairs of rows, each (as it is, rebased)."""
  dx, dw = (np.abs(exact - code) for exact, code in (x, w))
  return (dx * np.abs(w[0]) + np.abs(x[0]) * dw + dx * dw).sum(axis=-1)


def rebasing_terms(x: Any, w: Any) -> np.ndarray:
  """The same of whole matrices (..., m, K) and (..., n, K), each with its codes and scales."""
  (x_exact, x_code), (w_exact, w_code) = (rebased(a.codes, a.scales) for a in (x, w))
  dx, dw = np.abs(x_exact - x_code), np.abs(w_exact - w_code).swapaxes(-1, -2)
  lost = dx @ np.abs(w_exact).swapaxes(-1, -2) + (np.abs(x_exact) + dx) @ dw
  exponents = row_exponent(x.scales)[..., :, None] + row_exponent(w.scales)[..., None, :]
  return np.ldexp(lost, exponents)


def term(
  x_codes: np.ndarray,
  x_scales: np.ndarray,
  w_codes: np.ndarray,
  w_scales: np.ndarray,
  *,
  sums: bool = True,
) -> np.ndarray:
  """What mxfp8's products in fp8 may lose, of P pairs of rows: (P, K) codes, (P, K/32) scales.

  By re-basing, and by the tensor cores' sums. An interpreter adds up in float32: without `sums`.
  """
  x, w = rebased(x_codes, x_scales), rebased(w_codes, w_scales)
  lost = rebasing_term(x, w)
  if sums:
    lost = lost + lost_by_sums(x[1], w[1])
  return np.ldexp(lost, row_exponent(x_scales) + row_exponent(w_scales))


def lost_by_sums(x: np.ndarray, w: np.ndarray) -> np.ndarray:
  """At most, of P pairs of rows of rebased codes."""
  return chains(x, w)[1].sum(axis=-1)
