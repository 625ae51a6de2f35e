"""What jaxqq should compute, by other means: numpy, ml_dtypes and float64, no code of the library.

Formats as the OCP Microscaling specification and MLX's documentation give them; rounding to
a narrow type is ml_dtypes'.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

F32 = np.float32


@dataclasses.dataclass(frozen=True)
class Mode:
  element: type
  bits: int
  group: int
  element_max: float
  scale: type
  power_of_two: bool


MODES = {
  "nvfp4": Mode(ml_dtypes.float4_e2m1fn, 4, 16, 6.0, ml_dtypes.float8_e4m3fn, False),
  "mxfp8": Mode(ml_dtypes.float8_e4m3fn, 8, 32, 448.0, ml_dtypes.float8_e8m0fnu, True),
  "mxfp4": Mode(ml_dtypes.float4_e2m1fn, 4, 32, 6.0, ml_dtypes.float8_e8m0fnu, True),
}
PRODUCT_MODES = ("nvfp4", "mxfp8")  # those that kernels multiply; `operands.PRODUCTS` has all
DTYPES = {
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def _saturate(a: np.ndarray, dtype: type) -> np.ndarray:
  largest = float(ml_dtypes.finfo(dtype).max)
  return np.clip(a, -largest, largest).astype(dtype)


@np.errstate(over="ignore", divide="ignore", invalid="ignore", under="ignore")
def quantize_codes(
  w: np.ndarray, mode: str, global_scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Codes (..., K) and scale bytes (..., K / group), uint8 both."""
  m = MODES[mode]
  a = np.asarray(w).astype(F32)
  a = a.reshape(*a.shape[:-1], a.shape[-1] // m.group, m.group)
  amax = np.max(np.abs(a), axis=-1, keepdims=True, initial=0)
  bad = ~np.isfinite(a).all(axis=-1, keepdims=True)
  amax = np.where(bad, F32(1), amax)
  a = np.where(bad, F32(1), a)
  if m.power_of_two:
    ideal = amax / F32(m.element_max)
    fraction, exponent = np.frexp(ideal)
    exponent = np.where(fraction == 0.5, exponent - 1, exponent)
    biased = np.where(ideal == 0, 0, np.clip(exponent + 127, 0, 254))
    codes = _saturate(np.ldexp(a.astype(np.float64), -(biased - 127)), m.element)
    scales = biased.astype(np.uint8)
    codes = codes.view(np.uint8)
  else:
    if global_scale is not None:
      global_scale = F32(global_scale)
      if global_scale == 0:  # the amax of zeros, and of nothing else
        bad |= amax >= np.finfo(F32).tiny
        global_scale, a, amax = F32(1), a * F32(0), amax * F32(0)
      elif global_scale < 2.0**-40:
        # Everything is in proportion to it, and float32 is too short for 2688 / global_scale.
        a, amax, global_scale = (_times_2_to_the_90(v) for v in (a, amax, global_scale))
    enc = F32(1) if global_scale is None else F32(2688) / F32(global_scale)
    s = _saturate(amax / F32(m.element_max) * enc, m.scale)
    codes = _saturate(a * (enc / s.astype(F32)), m.element).view(np.uint8)
    scales = s.view(np.uint8)
    codes = np.where(scales == 0, 0, codes)
  nan = np.array(np.nan, m.scale).view(np.uint8)
  scales = np.where(bad, nan, scales).squeeze(-1)
  codes = np.where(bad, 0, codes)
  return codes.astype(np.uint8).reshape(np.shape(w)), scales.astype(np.uint8)


def _times_2_to_the_90(a: np.ndarray) -> np.ndarray:
  """Exact, but for what is above float32's range, which becomes its largest number."""
  largest = float(np.finfo(F32).max)
  return np.clip(np.asarray(a, np.float64) * 2.0**90, -largest, largest).astype(F32)


def pack(codes: np.ndarray, mode: str) -> np.ndarray:
  bits = MODES[mode].bits
  per_word = 32 // bits
  words = codes.astype(np.uint64).reshape(*codes.shape[:-1], codes.shape[-1] // per_word, per_word)
  shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
  return (words << shifts).sum(axis=-1).astype(np.uint32)


def unpack(packed: np.ndarray, mode: str) -> np.ndarray:
  bits = MODES[mode].bits
  shifts = np.arange(0, 32, bits, dtype=np.uint32)
  codes = (packed[..., None] >> shifts) & np.uint32((1 << bits) - 1)
  return codes.astype(np.uint8).reshape(*packed.shape[:-1], packed.shape[-1] * shifts.size)


def quantize(
  w: np.ndarray, mode: str, global_scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
  codes, scales = quantize_codes(w, mode, global_scale)
  return pack(codes, mode), scales


def values(codes: np.ndarray, scales: np.ndarray, mode: str) -> np.ndarray:
  """code * scale in float64, without a global scale."""
  m = MODES[mode]
  s = scales.view(m.scale).astype(np.float64)
  return codes.view(m.element).astype(np.float64) * np.repeat(s, m.group, axis=-1)


def round_trip(w: np.ndarray, mode: str, global_scale: float | None = None) -> np.ndarray:
  """What is left of w after quantization, global scale included, in float64."""
  hat = values(*quantize_codes(w, mode, global_scale), mode)
  return hat if global_scale is None else hat * float(global_scale) / 2688


def product(x_hat: np.ndarray, w_hat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The exact product, and |x_hat| |w_hat|^T that bounds are made of; float64 both."""
  w_t = np.swapaxes(w_hat, -1, -2)
  return x_hat @ w_t, np.abs(x_hat) @ np.abs(w_t)


def assert_within_bound(
  out: np.ndarray, exact: np.ndarray, mag: np.ndarray, *, highest: bool = False
) -> None:
  """Section 3 of the specification, element by element."""
  name = out.dtype.name
  relative = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-10}[name]
  of_mag = 2.0**-18 if highest or name == "float32" else 2.0**-12
  # What the output type cannot hold is no error of the product: below its smallest subnormal.
  smallest = float(ml_dtypes.finfo(out.dtype).smallest_subnormal)
  assert out.shape == exact.shape
  error = np.abs(out.astype(np.float64) - exact)
  bound = relative * np.abs(exact) + of_mag * mag + smallest
  worst = np.max(error / bound, initial=0)
  assert np.isfinite(out.astype(np.float64)).all()
  assert worst <= 1, f"{worst:.3g} times the bound"


def relative_error(out: np.ndarray, exact: np.ndarray) -> float:
  """||out - exact|| / ||exact||."""
  difference = np.linalg.norm((np.asarray(out, np.float64) - exact).ravel())
  return float(difference / np.linalg.norm(np.asarray(exact, np.float64).ravel()))


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
  return rng.standard_normal(shape).astype(DTYPES[dtype])


def with_outliers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
  """One channel of 64 is 200 times the others."""
  a = rng.standard_normal(shape)
  a[..., ::64] *= 200
  return a.astype(DTYPES[dtype])
