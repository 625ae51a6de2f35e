"""Random products: one integer seed draws the program, and each of its draws the data.

A `Program` is what is compiled: sizes, dtypes, mode, precision. A `Case` is one product of it. Both
print as what makes them again.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from tests.support import data, oracle

DRAWS = 8  # of data, for each program
# What a case may cost: products, and elements to be quantized by the oracle.
MOST_PRODUCTS, MOST_ELEMENTS = 1.2e8, 1.2e6
# Through the interpreter, on a CPU.
FEW_PRODUCTS, FEW_ELEMENTS = 6e6, 1.5e5

DTYPES = ("bfloat16", "float16", "float32")
MODES = ("nvfp4", "mxfp8")  # that are drawn first
BATCHES = (((3,), ()), ((2, 3), ()), ((), (3,)), ((4,), (4,)), ((2, 1), (1, 3)), ((3,), (1,)))


class _Terse:
  """Prints the fields that are not their defaults."""

  def __repr__(self) -> str:
    fields = (
      f"{f.name}={value!r}"
      for f in dataclasses.fields(self)  # type: ignore[arg-type]
      if (value := getattr(self, f.name)) != f.default
    )
    return f"{type(self).__name__}({', '.join(fields)})"


@dataclasses.dataclass(frozen=True, repr=False)
class Program(_Terse):
  """What is compiled once: everything about a product but the numbers in it."""

  mode: str
  m: int
  n: int
  k: int
  x_dtype: str = "bfloat16"
  w_dtype: str = "bfloat16"  # of what is quantized, on the fly or before
  packed: bool = False
  highest: bool = False
  global_scales: bool = False
  x_batch: tuple[int, ...] = ()
  w_batch: tuple[int, ...] = ()
  quantize_input: bool = True  # else it is `quantized_matmul`

  @property
  def batch(self) -> tuple[int, ...]:
    return np.broadcast_shapes(self.x_batch, self.w_batch)

  @property
  def products(self) -> int:
    return math.prod(self.batch) * self.m * self.n * self.k

  @property
  def elements(self) -> int:
    return (math.prod(self.x_batch) * self.m + math.prod(self.w_batch) * self.n) * self.k

  @property
  def wants_exact_sums(self) -> bool:
    return self.highest or self.x_dtype == "float32"

  @property
  def may_use_fp8_sums(self) -> bool:
    return self.mode == "mxfp8" and self.quantize_input and not self.wants_exact_sums


@dataclasses.dataclass(frozen=True, repr=False)
class Case(_Terse):
  """One product."""

  program: Program
  x: str = "normal"  # kinds of data
  w: str = "normal"  # or "random codes", where w is packed
  x_exponent: int = 0
  w_exponent: int = 0
  bad: tuple[str, ...] = ()  # which of "x" and "w" hold a NaN or an infinity
  global_scale_over_amax: float = 1.0
  seed: int | tuple[int, ...] = 0


@dataclasses.dataclass(frozen=True)
class Arrays:
  """A case's numbers: the arguments of the product, and what the oracle quantizes them to."""

  x: np.ndarray
  w: np.ndarray | None  # unquantized; None of random codes
  x_codes: np.ndarray
  x_scales: np.ndarray
  w_codes: np.ndarray
  w_scales: np.ndarray
  global_scale_x: np.float32 | None
  global_scale_w: np.float32 | None
  mode: str
  packed: bool
  quantize_input: bool = True

  @property
  def args(self) -> tuple[Any, ...]:
    """In the order of `product_of`."""
    w = (oracle.pack(self.w_codes, self.mode), self.w_scales) if self.packed else (self.w,)
    return (self.x, *w, *self.global_scales)

  @property
  def global_scales(self) -> tuple[np.float32, ...]:
    """Those that the product takes."""
    of_x = self.global_scale_x if self.quantize_input else None
    return tuple(scale for scale in (of_x, self.global_scale_w) if scale is not None)

  @property
  def alpha(self) -> float:
    return math.prod(float(scale) / 2688 for scale in self.global_scales)


# What is compiled


def program_of(seed: int, *, small: bool = False) -> Program:
  """Everything that is likely to matter, often; `small` is for the interpreter."""
  rng = np.random.default_rng([seed, 1])
  mode = str(rng.choice(MODES))
  x_dtype, w_dtype = (str(rng.choice(DTYPES, p=[0.5, 0.25, 0.25])) for _ in range(2))
  k, m, n = _k(rng, mode, small), _m(rng), _n(rng)
  packed = bool(rng.random() < 0.6)
  if mode == "mxfp8" and packed and not small and rng.random() < 0.04:
    # So many rows that packed w is expanded a panel at a time.
    m, n, k = int(rng.integers(3072, 3300)), 128, int(32 * rng.integers(1, 9))
  x_batch, w_batch = BATCHES[rng.integers(len(BATCHES))] if rng.random() < 0.3 else ((), ())
  program = Program(
    mode,
    m,
    n,
    k,
    x_dtype,
    w_dtype,
    packed,
    highest=bool(rng.random() < 0.3),
    global_scales=bool(mode == "nvfp4" and rng.random() < 0.5),
    x_batch=tuple(x_batch),
    w_batch=tuple(w_batch),
  )
  return _within_budget(_varied(program, np.random.default_rng([seed, 6])), small)


def _varied(program: Program, rng: np.random.Generator) -> Program:
  """What was added since, drawn apart, so that the seeds before stay what they were."""
  if program.mode == "mxfp8" and rng.random() < 0.3:  # groups of 32 too
    program = dataclasses.replace(program, mode="mxfp4")
  return dataclasses.replace(program, quantize_input=bool(rng.random() < 0.7))


def _k(rng: np.random.Generator, mode: str, small: bool) -> int:
  """Below 300 about as often as not; few rows have kernels for multiples of 128, 256 and 512."""
  group = oracle.MODES[mode].group
  kind = rng.random()
  if kind < 0.35:
    return group * int(rng.integers(1, 300 // group + 1))
  if kind < 0.47:
    return int(rng.choice([group, 2 * group, 64, 96, 128, 256, 512]))
  if kind < 0.85 or small:
    return int(rng.choice([128, 256, 512])) * int(rng.integers(1, 5 if small else 17))
  return group * round(math.exp(rng.uniform(math.log(300), math.log(8192))) / group)


def _m(rng: np.random.Generator) -> int:
  kind = rng.random()
  if kind < 0.2:
    return int(rng.choice([1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]))
  if kind < 0.45:
    return int(rng.integers(1, 65))
  if kind < 0.6:
    return int(rng.choice([127, 128, 129, 192, 255, 256, 257, 384, 512, 513]))
  return int(rng.integers(65, 701))


def _n(rng: np.random.Generator) -> int:
  kind = rng.random()
  if kind < 0.3:
    return 8 * int(rng.integers(1, 130))
  if kind < 0.5:
    return int(rng.integers(1, 65))
  return int(rng.integers(1, 1033))


def _within_budget(program: Program, small: bool) -> Program:
  products, elements = (FEW_PRODUCTS, FEW_ELEMENTS) if small else (MOST_PRODUCTS, MOST_ELEMENTS)
  while program.products > products or program.elements > elements:
    if program.n >= program.m and program.n > 1:
      program = dataclasses.replace(program, n=-(-program.n // 2))
    elif program.m > 1:
      program = dataclasses.replace(program, m=-(-program.m // 2))
    else:
      program = dataclasses.replace(program, x_batch=(), w_batch=())
  return program


# What is in it


def case_of(seed: int, draw: int, *, small: bool = False) -> Case:
  """Draw number `draw` of a seed's program. The first is of normal numbers."""
  program = program_of(seed, small=small)
  rng = np.random.default_rng([seed, 2, draw])
  kinds = list(data.KINDS)
  weights = np.array([0.3 if kind in ("zeros", "constant") else 1.0 for kind in kinds])
  x, w = (str(rng.choice(kinds, p=weights / weights.sum())) for _ in range(2))
  if rng.random() < 0.3:
    w = x
  if program.packed and rng.random() < 0.15:
    w = "random codes"
  if draw == 0:
    x = w = "normal"
  x_exponent, w_exponent = _exponents(rng, program)
  bad = tuple(name for name in "xw" if rng.random() < 0.12)
  over = float(rng.choice([1, 1, 1, 2, 7, 1000, 0.5])) if program.global_scales else 1.0
  return Case(program, x, w, x_exponent, w_exponent, bad, over, (seed, 3, draw))


def _exponents(rng: np.random.Generator, program: Program) -> tuple[int, int]:
  """Of x and of w: around 1, tiny, large against small."""
  little = [int(e) for e in rng.integers(-4, 5, 2)]
  if "float16" in (program.x_dtype, program.w_dtype):
    return (-12, 4) if rng.random() < 0.1 else (little[0], little[1])
  reaches_far = oracle.MODES[program.mode].power_of_two
  if rng.random() < 0.08 and (reaches_far or program.global_scales):
    # Anywhere, so that the result is in range: what is multiplied first may leave it.
    first = int(rng.integers(-110, 119))
    second = int(rng.integers(max(-110, -110 - first), min(118, 100 - first) + 1))
    return (first, second) if rng.random() < 0.5 else (second, first)
  kind = rng.random()
  if program.mode == "nvfp4" and not program.global_scales:  # e4m3 scales, and those alone
    return (int(rng.integers(-14, -5)), little[1]) if kind < 0.2 else (little[0], little[1])
  if kind < 0.1:
    return 60, -60 + little[0]
  if kind < 0.15:
    return -100, 100
  if kind < 0.2:
    return 95 + little[0], -100
  if kind < 0.3 and reaches_far:  # scale bytes of 0
    return -124 + little[0], 100
  return little[0], little[1]


def arrays_of(case: Case) -> Arrays:
  p = case.program
  rng = np.random.default_rng(case.seed)
  group = oracle.MODES[p.mode].group
  x_shape, w_shape = (*p.x_batch, p.m, p.k), (*p.w_batch, p.n, p.k)
  x = data.array(rng, case.x, x_shape, case.x_exponent, oracle.DTYPES[p.x_dtype])
  w = None
  if case.w != "random codes":
    w = data.array(rng, case.w, w_shape, case.w_exponent, oracle.DTYPES[p.w_dtype])
  scales = (_amax(x), _amax(w)) if p.global_scales else (None, None)
  scales = tuple(s and _scaled(s, case.global_scale_over_amax) for s in scales)
  if "x" in case.bad:
    _poison(rng, x)
    if not p.quantize_input:  # an infinity is a number then
      x[np.isinf(x)] = np.nan
  if "w" in case.bad and w is not None:
    _poison(rng, w)
  x_codes, x_scales = oracle.quantize_codes(x, p.mode, scales[0])
  if w is None:
    w_codes, w_scales = data.random_codes(rng, w_shape, p.mode, group)
    if "w" in case.bad:
      w_scales, w_codes = data.poisoned(rng, w_scales, w_codes, p.mode)
  else:
    w_codes, w_scales = oracle.quantize_codes(w, p.mode, scales[1])
  quantized = x_codes, x_scales, w_codes, w_scales
  return Arrays(x, w, *quantized, *scales, p.mode, p.packed, p.quantize_input)


def _amax(a: np.ndarray | None) -> np.float32:
  """1 where there is nothing else to go by: zeros, or codes that were never numbers."""
  amax = np.float32(0) if a is None else np.max(np.abs(a.astype(np.float32)), initial=0)
  return np.float32(amax or 1)


def _scaled(scale: np.float32, factor: float) -> np.float32:
  """A global scale is finite: the product of an infinite one is NaN throughout."""
  return np.float32(min(float(scale) * factor, float(np.finfo(np.float32).max)))


def _poison(rng: np.random.Generator, a: np.ndarray) -> None:
  a[tuple(rng.integers(size) for size in a.shape)] = rng.choice([np.nan, np.inf, -np.inf])
