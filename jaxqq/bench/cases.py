"""What is measured: forms of work, cases of them, and named suites of cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxqq._formats import FORMATS, Mode


@dataclasses.dataclass(frozen=True)
class Form:
  """A kind of work, written as an einsum; what is quantized is so along the last dim."""

  name: str
  equation: str
  packed: str | None  # "lhs", "rhs" or "out": the array that is packed, in or out of the work
  about: str
  quantizes_x: bool = True  # else that operand is multiplied as it is

  @property
  def inputs(self) -> tuple[str, ...]:
    return tuple(self.equation.split("->")[0].split(","))

  @property
  def out(self) -> str:
    return self.equation.split("->")[1]

  @property
  def is_product(self) -> bool:
    return len(self.inputs) == 2

  @property
  def contracted(self) -> str:
    """The dim that a product sums over; for the rest, the one that groups run along."""
    return next((a for a in self.inputs[0] if a not in self.out), self.out[-1])


# What a `Quantizer` does beside `quantize`, of rows or columns; rotations are of 16.
QUANTIZERS = ("stochastic", "rotated", "stochastic rotated", "squares")
RECIPE_FORMS = tuple(f"{words}{columns}" for words in QUANTIZERS for columns in ("", " columns"))

FORMS = {
  form.name: form
  for form in (
    Form("packed", "mk,nk->mn", "rhs", "qqmm, w quantized beforehand"),
    Form("on the fly", "mk,nk->mn", None, "qqmm, x and w quantized in the call"),
    Form(
      "weights alone",
      "mk,nk->mn",
      "rhs",
      "quantized_matmul, w quantized beforehand and x as it is",
      quantizes_x=False,
    ),
    Form("dx", "mn,nk->mk", None, "the gradient of x under jax.grad, from g and w"),
    Form("dw", "mn,mk->nk", None, "the gradient of w under jax.grad, from g and x"),
    Form("quantize", "mk->mk", "out", "quantize, groups along rows"),
    Form("quantize columns", "mk->km", "out", "quantize of the transpose"),
    Form("dequantize", "mk->mk", "lhs", "dequantize to bfloat16"),
    *(
      Form(name, "mk->km" if "columns" in name else "mk->mk", "out", f"Quantizer: {name}")
      for name in RECIPE_FORMS
    ),
  )
}
BACKWARD_FORMS = ("dx", "dw")


@dataclasses.dataclass(frozen=True)
class Case:
  """One piece of work; n is 0 where the form has none."""

  form: str
  mode: Mode
  m: int
  n: int
  k: int
  dtype: str = "bfloat16"  # of what is not packed, the result included

  @property
  def name(self) -> str:
    sizes = (str(size) for size in (self.m, self.n, self.k) if size)
    return f"{self.form} {self.mode} {'x'.join(sizes)}"

  def fields(self) -> dict[str, Any]:
    """By name, without those that a subclass adds."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(Case)}

  def shape(self, dims: str) -> tuple[int, ...]:
    return tuple(getattr(self, dim) for dim in dims)

  @property
  def flops(self) -> int:
    return 2 * self.m * self.n * self.k

  def num_bytes(self, *, packed: bool = True) -> int:
    """Bytes of every input and of the output, each once.

    Args:
      packed: whether what the form has packed counts so; else as the case's dtype.
    """
    form = FORMS[self.form]
    roles = dict(zip(("lhs", "rhs"), form.inputs, strict=False)) | {"out": form.out}
    total = 0
    for role, dims in roles.items():
      size = math.prod(self.shape(dims))
      if packed and role == form.packed:
        fmt = FORMATS[self.mode]
        total += size * fmt.bits // 8 + size // fmt.group_size
      else:
        total += size * np.dtype(self.dtype).itemsize
    return total


@dataclasses.dataclass(frozen=True)
class Suite:
  """Every form at every m and every (n, k)."""

  about: str
  forms: tuple[str, ...]
  rows: tuple[int, ...]
  shapes: tuple[tuple[int, int], ...]  # (n, k)
  survey: bool = False  # many cases, each measured briefly, by runs that add up


LLAMA = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192), (8192, 28672))
# Layers of language and image models: attention, MLPs, experts, adapters of a low rank, a head.
MODELS = (
  *((4096, 12288), (12288, 4096), (7168, 2048), (2048, 7168), (2880, 2880)),
  *((5120, 25600), (1024, 4096), (5376, 21504), (3072, 3072), (6144, 4096)),
  *((10240, 5120), (5120, 8192), (51200, 5120), (8192, 5376), (43008, 5376)),
  *((5120, 2880), (2880, 4096), (576, 7168), (24576, 1536), (7168, 16384)),
  *((4096, 7168), (4096, 2048), (12288, 2048), (2048, 6144), (151936, 2048)),
)
SUITES = {
  "goals": Suite(
    "what is shown of one shape",
    ("packed", "on the fly"),
    (256, 1024, 4096, 8192),
    ((8192,) * 2,),
  ),
  "few-rows": Suite("decoding", ("packed", "on the fly"), (1, 8, 16, 32, 64), ((8192,) * 2,)),
  "few-rows-llama": Suite("decoding, layers of Llama 3", ("packed",), (1, 8, 64), LLAMA),
  "llama": Suite("layers of Llama 3 8B and 70B", ("packed", "on the fly"), (1024, 4096), LLAMA),
  "chain": Suite(
    "for wall clock, from one row of x to many", ("packed",), (1, 256, 1024, 4096), ((8192,) * 2,)
  ),
  "quantize": Suite(
    "formats alone", ("quantize", "quantize columns", "dequantize"), (8192,), ((0, 8192),)
  ),
  "recipe": Suite("what recipes ask of quantizers", RECIPE_FORMS, (8192,), ((0, 8192),)),
  "models": Suite(
    "layers of many models, from one row of x to many: a survey",
    ("packed",),
    (1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192),
    MODELS + LLAMA,
    survey=True,
  ),
  "weights": Suite(
    "the same layers by quantized_matmul: a survey",
    ("weights alone",),
    (1, 4, 16, 32, 64, 128, 256, 1024, 4096),
    MODELS + LLAMA,
    survey=True,
  ),
  "tiny": Suite(
    "a test of the bench itself",
    tuple(form for form in FORMS if form not in RECIPE_FORMS),
    (64,),
    ((48, 64),),
  ),
}


def is_survey(suites: Sequence[str]) -> bool:
  """Whether each of some suites is one; a name that is no suite is none."""
  return all(name in SUITES and SUITES[name].survey for name in suites)


MODES: tuple[Mode, ...] = ("nvfp4", "mxfp8")  # that are measured where none are named

# The speed relative to cuBLAS in bfloat16 that is aimed at, at this (n, k), by mode, form and m;
# at the other shapes of Llama, 0.9 of it, or 0.85 where there are few rows. The smallest shape is
# little but launches then.
GOAL_SHAPE, SMALLEST_SHAPE = (8192, 8192), (4096, 4096)
FEW_ROWS = 64
_GOALS = {
  ("nvfp4", "packed"): {1: 3.2, 8: 3.1, 16: 3.0, 32: 2.7, 64: 2.4}
  | {256: 1.1, 1024: 1.05, 4096: 1.05, 8192: 1.05},
  ("mxfp8", "packed"): {1: 1.95, 8: 1.95, 16: 1.9, 32: 1.8, 64: 1.7}
  | {256: 1.4, 1024: 1.5, 4096: 1.6, 8192: 1.65},
  ("nvfp4", "on the fly"): {4096: 0.98, 8192: 1.0},
  ("mxfp8", "on the fly"): {4096: 1.45, 8192: 1.5},
}
_SMALLEST = {"nvfp4": 1.5, "mxfp8": 1.3}


def goal(mode: str, form: str, m: int, n: int, k: int) -> float | None:
  """How many times as fast as cuBLAS a product should be, where that is said."""
  found = _GOALS.get((mode, form), {}).get(m)
  if found is None or (n, k) not in LLAMA:
    return None
  if (n, k) == GOAL_SHAPE:
    return found
  if m > FEW_ROWS:
    return 0.9 * found
  return _SMALLEST[mode] if (n, k) == SMALLEST_SHAPE else 0.85 * found


def select(
  suites: Sequence[str],
  modes: Sequence[Mode] = MODES,
  rows: Sequence[int] = (),
  forms: Sequence[str] = (),
  *,
  shapes: Sequence[tuple[int, int]] = (),
  backward: bool = False,
) -> list[Case]:
  """The cases of some suites, each once.

  Args:
    suites: keys of `SUITES`.
    modes: keys of `FORMATS`.
    rows: m of the products, instead of the suites' own.
    forms: keys of `FORMS` to keep; all if empty.
    shapes: (n, k) instead of those of suites that have products.
    backward: adds "dx" and "dw" for every product of the suites.
  """
  cases = []
  for suite in (SUITES[name] for name in suites):
    all_forms = suite.forms
    products = any(FORMS[form].is_product for form in all_forms)
    if backward and products:
      all_forms += BACKWARD_FORMS
    for n, k in shapes if shapes and products else suite.shapes:
      for form in (form for form in all_forms if not forms or form in forms):
        product = FORMS[form].is_product
        for mode in modes:
          for m in (rows or suite.rows) if product else suite.rows:
            cases.append(Case(form, mode, m, n if product else 0, k))
  return list(dict.fromkeys(cases))


def covering(cases: Sequence[Case]) -> list[Case]:
  """The cases, all shapes of one m after the other, in an order of m that is spread at any time.

  A run that is cut short then has every shape, at few m, instead of few shapes.
  """
  rows = sorted({case.m for case in cases})
  width = (len(rows) - 1).bit_length()
  order = {m: int(f"{i:0{width}b}"[::-1], 2) for i, m in enumerate(rows)}
  return sorted(cases, key=lambda case: order[case.m])
