"""What `jaxqq.Quantizer` and `jaxqq.Recipe` should compute, by other means: numpy and ml_dtypes.

None of its numbers are the library's: Philox with 64 bit integers, neighbours found in tables of
every value of a type, rotations by a matrix in float64.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxqq import Quantizer
from tests.support import oracle
from tests.support.oracle import F32, MODES

ROUNDING, ROTATION = 0, 1  # the streams of a key


@dataclasses.dataclass(frozen=True)
class Spec:
  """How an operand is quantized, by the words of `jaxqq.Quantizer`."""

  mode: str = "nvfp4"
  square: bool = False
  rounding: str = "nearest"
  rotation: int | None = None
  scale: str = "amax"

  @classmethod
  def of(cls, quantizer: Any) -> Spec:
    return cls(**{field.name: getattr(quantizer, field.name) for field in dataclasses.fields(cls)})


# Every part of a quantizer, alone or with others.
QUANTIZERS = (
  Quantizer(square=True),
  Quantizer(rounding="stochastic"),
  Quantizer(scale="four_over_six"),
  Quantizer(square=True, scale="four_over_six", rotation=16),
  Quantizer(rounding="stochastic", rotation=64),
  Quantizer("mxfp8", square=True, rounding="stochastic", rotation=32),
  Quantizer("mxfp4", rounding="stochastic"),
  Quantizer(rotation=128, scale="unbiased"),
)


def numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  """Magnitudes over some binades, and all of a group small; short enough to be summed exactly."""
  rng = np.random.default_rng(seed)
  a = rng.standard_normal(shape) * 2.0 ** rng.integers(-4, 3, shape)
  a[1:3, :32] *= 2.0**-9
  a[3] = 0
  return np.round(a * 2**12).astype(np.float32) / 2**12


def words_of(key: jax.Array) -> np.ndarray:
  return np.asarray(jax.random.key_data(key))


def check_bits(quantizer: Quantizer, key: jax.Array) -> tuple[Any, Any, Any]:
  """What a quantizer makes of some numbers has the bits that are computed here."""
  a = numbers((40, 128))
  want_codes, want_scales, want_global = quantized(a, Spec.of(quantizer), words_of(key))
  packed, scales, global_scale = quantizer.quantize(a, key if quantizer.needs_key else None)
  np.testing.assert_array_equal(scales, want_scales)
  np.testing.assert_array_equal(oracle.unpack(np.asarray(packed), quantizer.mode), want_codes)
  assert (global_scale is None) == (want_global is None)
  assert global_scale is None or float(global_scale) == want_global
  return packed, scales, global_scale


# Random bits


def philox(counter: Any, key: Any, rounds: int = 7) -> list[np.ndarray]:
  """Philox 4x32 of Salmon, Moraes, Dror and Shaw (SC 2011), with 64 bit products."""
  c = [np.asarray(word, np.uint64) for word in counter]
  k = [np.asarray(word, np.uint64) for word in key]
  low = np.uint64(0xFFFFFFFF)
  for _ in range(rounds):
    first, second = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
    c = [
      (second >> np.uint64(32)) ^ c[1] ^ k[0],
      second & low,
      (first >> np.uint64(32)) ^ c[3] ^ k[1],
      first & low,
    ]
    k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
  return c


def stream(key_data: np.ndarray, index: int) -> list[np.ndarray]:
  """The two words of a stream's key; `key_data` are the two or four of a key of `jax.random`."""
  words = [*map(int, key_data), 0, 0][:4]
  return philox((words[2], words[3], index, 0x6A617871), words[:2])[:2]


def uniform16(key: Any, shape: tuple[int, ...], of: int = 0) -> np.ndarray:
  """16 bits for each place (..., row, column): one half of one word of a call for 8 columns.

  of: 0 elements, 1 scales.
  """
  *batch, rows, columns = shape
  matrix = np.arange(int(np.prod(batch))).reshape(*batch, 1, 1)
  row, column = np.arange(rows)[:, None], np.arange(columns)
  words = np.stack(np.broadcast_arrays(*philox((column // 8, row, matrix, of), key)))
  own = np.take_along_axis(words, np.broadcast_to(column // 2 % 4, words.shape[1:])[None], 0)[0]
  return (own >> (column % 2 * 16).astype(np.uint64) & np.uint64(0xFFFF)).astype(np.int64)


def signs(key: Any, size: int) -> np.ndarray:
  words = [int(word) for word in philox((0, 0, 0, 0), key)]
  return np.array([1.0 - 2 * (words[i // 32] >> i % 32 & 1) for i in range(size)])


# Rotation


def hadamard(size: int, of: np.ndarray) -> np.ndarray:
  """H diag(s) / sqrt(n) in float64, H[i, j] = (-1)**popcount(i & j)."""
  i = np.arange(size)
  odd = np.array([[bin(int(a & b)).count("1") % 2 for b in i] for a in i])
  return (1.0 - 2 * odd) * of / np.sqrt(size)


def rotate(a: np.ndarray, of: np.ndarray) -> np.ndarray:
  """Every n neighbours of the last axis, in float64."""
  return rotation_sums(a, of) / np.sqrt(len(of))


def rotation_sums(a: np.ndarray, of: np.ndarray) -> np.ndarray:
  """Before they are divided by the root of n; exact, of short numbers."""
  size = len(of)
  ones = np.sign(hadamard(size, of))
  return (np.asarray(a, np.float64).reshape(*a.shape[:-1], -1, size) @ ones.T).reshape(a.shape)


# Quantizing


def magnitudes(dtype: Any) -> np.ndarray:
  """Every finite magnitude of a narrow type, in order: its index is its code."""
  codes = np.arange(1 << (ml_dtypes.finfo(dtype).bits - 1), dtype=np.uint8)
  values = codes.view(dtype).astype(np.float64)
  return values[np.isfinite(values)]


def stochastic_codes(magnitude: np.ndarray, random: np.ndarray, dtype: Any) -> np.ndarray:
  """The upper neighbour with a probability of a multiple of 2**-16; ties of that go up."""
  table = magnitudes(dtype)
  a = np.minimum(np.asarray(magnitude, np.float64), table[-1])
  lower = np.searchsorted(table, a, side="right") - 1
  upper = np.minimum(lower + 1, len(table) - 1)
  step = np.where(upper > lower, table[upper] - table[lower], 1)
  chance = np.floor((a - table[lower]) / step * 65536 + 0.5)
  return np.where(random >= 65536 - chance, upper, lower)


def codes_up(magnitude: np.ndarray, dtype: Any) -> np.ndarray:
  table = magnitudes(dtype)
  return np.searchsorted(table, np.minimum(magnitude, table[-1]), side="left")


def block_amax(a: np.ndarray, spec: Spec) -> np.ndarray:
  """(..., rows, groups), of groups or of squares."""
  group = MODES[spec.mode].group
  amax = np.abs(a.reshape(*a.shape[:-1], -1, group)).max(axis=-1)
  return over_squares(amax, group, np.max) if spec.square else amax


def over_squares(values: np.ndarray, size: int, reduce: Any) -> np.ndarray:
  parts = [values[..., i : i + size, :] for i in range(0, values.shape[-2], size)]
  wide = [np.broadcast_to(reduce(p, axis=-2, keepdims=True), p.shape) for p in parts]
  return np.concatenate(wide, axis=-2)


def quantize_codes(
  a: np.ndarray, spec: Spec, key_data: Any = None, amax: float | None = None, index: int = ROUNDING
) -> tuple[np.ndarray, np.ndarray, float | None]:
  """Codes (..., rows, k), scale bytes and the global scale of a finite matrix, rotated before."""
  m = MODES[spec.mode]
  a = np.asarray(a).astype(F32)
  random = None
  if spec.rounding == "stochastic":
    random = uniform16(stream(key_data, index), a.shape)
  blocks = block_amax(a, spec)
  if spec.scale == "unbiased":
    random = uniform16(stream(key_data, index), blocks.shape, of=1)
    amax = np.abs(a).max()
    codes, scales = _ms_eden(a, blocks, random, amax, spec.rotation or 1)
    return codes, scales, float(amax * F32(2688 * (17 / 16) * 0.93 / 6 / 255.99))
  if m.power_of_two:
    return *_with_powers_of_two(a, blocks, spec, random), None
  global_scale = F32(np.abs(a).max() if amax is None else amax)
  if spec.scale == "four_over_six":
    global_scale = F32(global_scale * F32(1.75))
    return *_four_over_six(a, blocks, spec, global_scale), float(global_scale)
  enc = F32(2688) / global_scale
  scales = _float_scales(blocks, enc, 6, up=random is not None)
  return *_float_codes(a, scales, enc, random), float(global_scale)


def _with_powers_of_two(
  a: np.ndarray, blocks: np.ndarray, spec: Spec, random: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
  m = MODES[spec.mode]
  exponent = np.ceil(np.log2(np.maximum(blocks.astype(np.float64), 1e-300) / m.element_max))
  scales = np.where(blocks == 0, 0, np.clip(exponent + 127, 0, 254)).astype(np.int64)
  ready = np.abs(a.astype(np.float64)) * 2.0 ** (127 - np.repeat(scales, m.group, axis=-1))
  return _signed(ready, a, m.element, random), scales.astype(np.uint8)


def _float_scales(blocks: np.ndarray, enc: F32, largest: int, *, up: bool) -> np.ndarray:
  """uint8: amax / largest * enc in e4m3, as float32 computes it."""
  ideal = blocks / F32(largest) * enc
  if up:
    return codes_up(ideal, ml_dtypes.float8_e4m3fn).astype(np.uint8)
  return np.minimum(ideal, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _float_codes(
  a: np.ndarray, scales: np.ndarray, enc: F32, random: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
  s = scales.view(ml_dtypes.float8_e4m3fn).astype(F32)
  ready = np.abs(a) * np.repeat(enc / s, 16, axis=-1)
  blank = np.repeat(scales == 0, 16, axis=-1)
  ready = np.where(blank, 0, ready)
  codes = _signed(ready, a, ml_dtypes.float4_e2m1fn, random)
  return np.where(blank, 0, codes).astype(np.uint8), scales


def _signed(ready: np.ndarray, a: np.ndarray, dtype: Any, random: np.ndarray | None) -> np.ndarray:
  bits = ml_dtypes.finfo(dtype).bits
  if random is None:
    codes = oracle._saturate(ready, dtype).view(np.uint8)
  else:
    codes = stochastic_codes(ready, random, dtype)
  return (codes | (np.signbit(a).astype(np.int64) << (bits - 1))).astype(np.uint8)


@np.errstate(divide="ignore", invalid="ignore")
def _four_over_six(
  a: np.ndarray, blocks: np.ndarray, spec: Spec, global_scale: F32
) -> tuple[np.ndarray, np.ndarray]:
  """The smaller of two sums of squares, in whole units of 2**-13 of the scale for 4."""
  enc = F32(2688) / global_scale
  tried = [
    _float_codes(a, _float_scales(blocks, enc, largest, up=False), enc, None) for largest in (6, 4)
  ]
  six, four = (scales.view(ml_dtypes.float8_e4m3fn).astype(F32) for _, scales in tried)
  number = np.abs(a) * np.repeat(enc / four, 16, axis=-1)
  errors = []
  for (codes, _), ratio in zip(tried, (six / four, np.ones_like(four)), strict=True):
    value = np.abs(codes.view(ml_dtypes.float4_e2m1fn).astype(F32))
    off = np.abs(value * np.repeat(ratio, 16, axis=-1) - number)
    units = np.where(np.isfinite(off), np.minimum(off, F32(8 - 2.0**-13)) * 8192, 0)
    squares = np.floor(units).astype(np.int64) ** 2
    sums = squares.reshape(*blocks.shape, 16).sum(axis=-1)
    errors.append(over_squares(sums, 16, np.sum) if spec.square else sums)
  takes_four = (errors[1] < errors[0]) & (four != 0)
  codes = np.where(np.repeat(takes_four, 16, axis=-1), tried[1][0], tried[0][0])
  return codes, np.where(takes_four, tried[1][1], tried[0][1])


@np.errstate(divide="ignore", invalid="ignore")
def _ms_eden(
  a: np.ndarray, blocks: np.ndarray, random: np.ndarray, amax: F32, rotation: int
) -> tuple[np.ndarray, np.ndarray]:
  """arXiv:2601.22813, by its code's formulas: numbers are divided by the scales, then corrected."""
  e4m3, e2m1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
  largest = F32(6 / ((17 / 16) * 0.93))
  of_tensor = F32(1) if amax == 0 else amax / F32(255.99) / largest
  s = (blocks / largest / of_tensor).astype(e4m3).astype(F32)
  s = np.where(s == 0, F32(1), s)
  ready = np.abs(a) / (np.repeat(s, 16, axis=-1) * of_tensor)
  codes = _signed(ready, a, e2m1, None)
  y, q = (
    part.astype(np.float64).reshape(*a.shape[:-1], -1, rotation)
    for part in (ready, np.abs(codes.view(e2m1).astype(F32)))
  )
  squares, products = (y * y).sum(axis=-1), (y * q).sum(axis=-1)
  correction = np.where(products == 0, 1, squares / products)
  corrected = s * np.repeat(correction, rotation // 16, axis=-1)
  return codes, stochastic_codes(corrected, random, e4m3).astype(np.uint8)


def quantized(
  a: np.ndarray, spec: Spec, key_data: Any = None, streams: tuple[int, int] = (ROUNDING, ROTATION)
) -> tuple[np.ndarray, np.ndarray, float | None]:
  """`quantize_codes` of what is rotated first, where the spec says so."""
  if spec.rotation is not None:
    of = signs(stream(key_data, streams[1]), spec.rotation)
    if spec.scale == "unbiased":  # in float32
      a = rotation_sums(a, of).astype(F32) * F32(1 / np.sqrt(len(of)))
    else:
      a = rotate(a, of).astype(F32).astype(ml_dtypes.bfloat16)
  return quantize_codes(a, spec, key_data, index=streams[0])


def left_of(
  a: np.ndarray, spec: Spec | None, key_data: Any, streams: tuple[int, int]
) -> np.ndarray:
  """What is left of an operand of a product, in float64, zeros added up to whole groups."""
  if spec is None:
    return np.asarray(a, np.float64)
  multiple = max(MODES[spec.mode].group, spec.rotation or 1)
  a = np.pad(np.asarray(a), [(0, 0), (0, -a.shape[-1] % multiple)])
  codes, scales, global_scale = quantized(a, spec, key_data, streams)
  return value_of(codes, scales, spec.mode, global_scale)


def value_of(codes: np.ndarray, scales: np.ndarray, mode: str, global_scale: Any) -> np.ndarray:
  """What is left of an operand, in float64."""
  hat = oracle.values(codes, scales, mode)
  return hat if global_scale is None else hat * (global_scale / 2688)
