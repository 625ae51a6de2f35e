"""Random ragged products: one seed draws the program, and each of its draws sizes and data.

    python -m tests.support.products --ragged --seed 123 --draw 4

As of `products`, whose command line this shares. Sizes of groups are operands, so that all draws of
a program run what is compiled once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.support import bounds, cases, data, oracle, ragged
from tests.support.cases import Program

SIZES = ("even", "random", "skewed", "most empty", "one has all", "below m", "above m")
SCALES = ("none", "one", "of groups")  # of x; w has one for each matrix


@dataclasses.dataclass(frozen=True, repr=False)
class RaggedProgram(cases._Terse):
  """What is compiled once; `product.m` is the rows of all groups."""

  product: Program
  groups: int
  matrices: int  # fewer than groups: those of one device of several
  scales: str = "none"


@dataclasses.dataclass(frozen=True, repr=False)
class RaggedCase(cases._Terse):
  """One product."""

  program: RaggedProgram
  sizes: tuple[int, ...]
  offset: int = 0
  x: str = "normal"
  w: str = "normal"
  x_exponent: int = 0
  w_exponent: int = 0
  bad: tuple[str, ...] = ()
  seed: Any = 0


def program_of(seed: int, *, small: bool = False) -> RaggedProgram:
  rng = np.random.default_rng([seed, 7])
  mode = str(rng.choice(("nvfp4", "mxfp8", "mxfp4")))
  groups = int(rng.choice([1, 2, 3, 5, 8] if small else [1, 2, 3, 5, 8, 16, 32, 128]))
  m = int(
    rng.choice([1, 7, 8, 20, 64, 100, 300] if small else [1, 8, 33, 64, 300, 512, 1000, 3100])
  )
  k, n = cases._k(rng, mode, small), cases._n(rng)
  quantize_input = bool(rng.random() < 0.7)
  scales = str(rng.choice(SCALES)) if mode == "nvfp4" else "none"
  program = Program(
    mode,
    m,
    n,
    k,
    x_dtype=str(rng.choice(cases.DTYPES, p=[0.6, 0.2, 0.2])),
    w_dtype="float32",
    packed=bool(rng.random() < 0.8),
    highest=bool(rng.random() < 0.25),
    quantize_input=quantize_input,
  )
  few = cases.FEW_ELEMENTS if small else cases.MOST_ELEMENTS
  while (groups * program.n + program.m) * k > few and program.n > 1:
    program = dataclasses.replace(program, n=-(-program.n // 2))
  matrices = groups if groups == 1 or rng.random() < 0.7 else int(rng.integers(1, groups))
  return RaggedProgram(program, groups, matrices, scales)


def case_of(seed: int, draw: int, *, small: bool = False) -> RaggedCase:
  program = program_of(seed, small=small)
  rng = np.random.default_rng([seed, 8, draw])
  kinds = [kind for kind in data.KINDS if kind != "zeros"]
  x, w = (str(rng.choice(kinds)) for _ in range(2)) if draw else ("normal", "normal")
  exponents = (0, 0)
  if program.product.mode != "nvfp4" or program.scales != "none":
    exponents = (int(rng.integers(-20, 21)), int(rng.integers(-20, 21)))
  if program.product.x_dtype == "float16":
    exponents = (0, exponents[1] // 4)
  return RaggedCase(
    program,
    _sizes(rng, program.product.m, program.groups),
    int(rng.integers(0, program.groups - program.matrices + 1)),
    x,
    w,
    *exponents,
    bad=tuple(name for name in "xw" if rng.random() < 0.12),
    seed=(seed, 9, draw),
  )


def _sizes(rng: np.random.Generator, m: int, groups: int) -> tuple[int, ...]:
  kind = str(rng.choice(SIZES))
  weights = {
    "skewed": rng.pareto(0.7, groups) + 1e-3,
    "most empty": (rng.random(groups) < 0.2) + 1e-9,
    "one has all": np.arange(groups) == rng.integers(groups),
  }.get(kind, np.ones(groups))
  rows = m // 2 if kind == "below m" else 2 * m if kind == "above m" else m
  if kind == "even":
    return tuple(int(size) for size in np.full(groups, rows // groups))
  return tuple(int(size) for size in rng.multinomial(rows, weights / weights.sum()))


@dataclasses.dataclass(frozen=True)
class RaggedArrays:
  """A case's numbers, and what the oracle quantizes them to, of the rows of each matrix."""

  args: tuple[Any, ...]
  x: np.ndarray
  of_row: np.ndarray  # the matrix of each row, or -1
  w_codes: np.ndarray
  w_scales: np.ndarray
  scale_x: np.ndarray | None  # of each matrix
  scale_w: np.ndarray | None
  program: RaggedProgram

  def operands_of(self, matrix: int) -> tuple[np.ndarray, bounds.Operand, bounds.Operand, float]:
    """Of the rows of one matrix: which they are, both operands, and alpha."""
    p = self.program.product
    rows = ragged.rows_of(self.of_row, matrix)
    scales = [a[matrix] for a in (self.scale_x, self.scale_w) if a is not None]
    x: bounds.Operand = bounds.Unquantized(self.x[rows])
    if p.quantize_input:
      scale = None if self.scale_x is None else self.scale_x[matrix]
      x = bounds.Quantized(*oracle.quantize_codes(self.x[rows], p.mode, scale), p.mode)
    w = bounds.Quantized(self.w_codes[matrix], self.w_scales[matrix], p.mode)
    return rows, x, w, math.prod(float(scale) / 2688 for scale in scales)


def arrays_of(case: RaggedCase) -> RaggedArrays:
  program, p = case.program, case.program.product
  rng = np.random.default_rng(case.seed)
  x = data.array(rng, case.x, (p.m, p.k), case.x_exponent, oracle.DTYPES[p.x_dtype])
  shape = (program.matrices, p.n, p.k)
  w = data.array(rng, case.w, shape, case.w_exponent, oracle.DTYPES[p.w_dtype])
  of_row = ragged.groups_of(case.sizes, p.m, case.offset, program.matrices)
  scale_x = scale_w = None
  if program.scales != "none":
    scale_w = np.array([cases._amax(a) for a in w], np.float32)
    of_groups = [cases._amax(x[of_row == i]) for i in range(program.matrices)]
    scale_x = np.array(of_groups, np.float32)
    if program.scales == "one":
      scale_x = np.full_like(scale_x, cases._amax(x))
  if "x" in case.bad:
    cases._poison(rng, x)
    if not p.quantize_input:
      x[np.isinf(x)] = np.nan
  if "w" in case.bad:
    cases._poison(rng, w)
  scales = [None] * program.matrices if scale_w is None else scale_w
  pairs = [oracle.quantize_codes(a, p.mode, s) for a, s in zip(w, scales, strict=True)]
  w_codes, w_scales = map(np.stack, zip(*pairs, strict=True))
  of_w = (oracle.pack(w_codes, p.mode), w_scales) if p.packed else (w,)
  args = (x, np.int32(case.sizes), np.int32(case.offset), *of_w)
  if scale_w is not None:
    if p.quantize_input:
      args += (scale_x[0] if program.scales == "one" else scale_x,)
    args += (scale_w,)
  if not p.quantize_input:
    scale_x = None
  return RaggedArrays(args, x, of_row, w_codes, w_scales, scale_x, scale_w, program)


def call(program: RaggedProgram, function: Any, *args: Any, **params: Any) -> Any:
  """A function of the arguments of `ragged_qqmm`, or of its kin, on `RaggedArrays.args`."""
  import jax

  p = program.product
  x, sizes, offset, w, *rest = args
  how: dict[str, Any] = {"mode": p.mode, "group_offset": offset}
  if p.packed:
    how["scales"] = rest.pop(0)
  if program.scales != "none":
    names = ("global_scale_x", "global_scale_w") if p.quantize_input else ("global_scale",)
    how |= dict(zip(names, rest, strict=True))
  if p.highest:
    how["precision"] = jax.lax.Precision.HIGHEST
  return function(x, w, sizes, **how, **params)


def function_of(program: RaggedProgram) -> Any:
  import jaxqq

  quantizes = program.product.quantize_input
  return jaxqq.ragged_qqmm if quantizes else jaxqq.ragged_quantized_matmul


def compiled(program: RaggedProgram, args: tuple[Any, ...]) -> Any:
  """As of `products`."""
  import jax

  import jaxqq
  from tests.support import products

  function = function_of(program)
  lowered = jax.jit(lambda *args: call(program, function, *args)).lower(*args)
  kernels = tuple(sorted(set(products.KERNELS.findall(lowered.as_text()))))

  def explain(*args: Any, **how: Any) -> Any:
    return jaxqq.explain(function, *args, **how)

  return products.Compiled(lowered.compile(), call(program, explain, *args).plan.name, kernels)


def verdict_on(out: np.ndarray, arrays: RaggedArrays, rules: bounds.Rules) -> bounds.Verdict:
  """Group by group; rows of none are zeros."""
  p = arrays.program.product
  worst = bounds.Verdict(0.0, 0.0, 0.0, "")
  if out.shape != (p.m, p.n):
    return dataclasses.replace(worst, wrong=f"shape {out.shape} for {(p.m, p.n)}")
  if np.any(out[arrays.of_row < 0] != 0):
    return dataclasses.replace(worst, wrong="a row of no group is not zero")
  for matrix in range(arrays.program.matrices):
    rows, *operands = arrays.operands_of(matrix)
    if len(rows):
      verdict = bounds.check(out[rows], *operands, rules)
      if verdict.wrong:
        return dataclasses.replace(verdict, wrong=f"matrix {matrix}: {verdict.wrong}")
      worst = bounds.Verdict(
        max(worst.worst, verdict.worst),
        max(worst.plain, verdict.plain),
        max(worst.norm, verdict.norm),
        "",
      )
  return worst


def run(case: RaggedCase, program: Any = None, *, twice: bool = True) -> dict[str, Any]:
  """As of `products`."""
  import jax

  from tests.support import products

  arrays, p = arrays_of(case), case.program.product
  program = program or compiled(case.program, arrays.args)
  first = np.asarray(program.run(*arrays.args))
  second = np.asarray(program.run(*arrays.args)) if twice else first
  plain = cases.Case(p, case.x, case.w)
  rules = products.rules_for(plain, program.implementation, jax.default_backend())
  if program.implementation == "xla" and jax.default_backend() == "gpu":
    # Blocks of rows, each of which may be multiplied in bfloat16.
    far = oracle.MODES[p.mode].power_of_two
    rules = dataclasses.replace(rules, highest=p.highest, bfloat16=far)
  verdict = verdict_on(first, arrays, rules)
  wrong = verdict.wrong
  if not wrong and not products.same_bits(first, second):
    wrong = f"{int((first != second).sum())} elements differ when the product runs again"
  function = function_of(case.program).__name__
  return products.told(case, p, function, program, verdict, wrong)


def run_seed(
  seed: int, draws: range = range(cases.DRAWS), *, small: bool = False, twice: bool = True
) -> Iterator[dict[str, Any]]:
  """The products of one seed's program, compiled once."""
  program = None
  for draw in draws:
    case = case_of(seed, draw, small=small)
    again = f"python -m tests.support.products --ragged --seed {seed} --draw {draw}"
    again += " --small" if small else ""
    try:
      program = program or compiled(case.program, arrays_of(case).args)
      result = run(case, program, twice=twice)
    except Exception as error:  # what a program raises is a failure as well
      result = {"case": repr(case), "wrong": f"{type(error).__name__}: {str(error)[:400]}"}
    yield {"seed": seed, "draw": draw, "again": again, **result}
