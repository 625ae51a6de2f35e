"""The kernels' whole path through Mosaic GPU's interpreter: every kernel, then random products.

JAXQQ_SEED and JAXQQ_INTERPRETED choose which products and how many programs, three draws each.
"""

from __future__ import annotations

import itertools
import os

import jax
import jax.numpy as jnp
import pytest

import jaxqq
from tests.support import cases, products
from tests.support.cases import Case, Program
from tests.support.interpreter import interpreted

pytestmark = [
  pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 (Mosaic GPU's warpgroups)"
  ),
  pytest.mark.usefixtures("quick_compiles"),
]

SEED = int(os.environ.get("JAXQQ_SEED", "0"))
PROGRAMS = int(os.environ.get("JAXQQ_INTERPRETED", "8"))
DRAWS = range(1, 4)  # beyond the first, which is normal

# A kernel's step is 64 or 128 of k, and its tiles are of 64 to 256 rows and 128 columns.
SIZES = {
  "part of a step and tile": (5, 40, 32),
  "one of each": (64, 128, 128),  # of 64: two
  "two steps, parts": (70, 130, 160),
  "many tiles": (140, 270, 64),
}
# The last blocks of k of two are parts, whose scales threads load: four bytes at once, two or one.
FEW_SIZES = {
  "one": (1, 64, 512),
  "two": (3, 70, 1088),
  "three": (17, 130, 1120),
  "four": (7, 130, 1120),
}
KINDS = (("normal", "groups within reach"), ("outliers", "heavy tails"))


def check(program, implementation):
  with interpreted():
    arrays = products.cases.arrays_of(Case(program))
    compiled = products.compiled(program, arrays.args)
    assert compiled.implementation == implementation
    for i, (x, w) in enumerate(KINDS):
      result = products.run(Case(program, x, w, seed=i), compiled, twice=False)
      assert not result["wrong"], f"{result['wrong']}\n{result['case']}"


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
@pytest.mark.parametrize("highest", [False, True], ids=["default", "highest"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_many_rows(mode, sizes, highest, packed):
  program = Program(mode, *sizes, packed=packed, highest=highest, w_dtype="float32")
  fp8 = mode == "mxfp8" and not highest
  check(program, "hopper_fp8" if fp8 else "hopper_exact")


@pytest.mark.parametrize("k", [64, 96, 224, 256])
def test_a_panel_at_a_time(k):
  """Rows of scales have zeros behind them where there are two, or an odd number."""
  w = jax.eval_shape(lambda: jaxqq.quantize(jnp.zeros((128, k)), mode="mxfp8"))
  x = jax.ShapeDtypeStruct((3072, k), jnp.bfloat16)
  told = jaxqq.explain(x, *w, mode="mxfp8", device="cuda")
  assert told.plan.kernel.kernel == "staged_gemm"
  check(Program("mxfp8", 3072, 128, k, packed=True), "hopper_fp8")


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
@pytest.mark.parametrize("sizes", FEW_SIZES.values(), ids=FEW_SIZES)
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_few_rows(mode, sizes, packed):
  check(Program(mode, *sizes, packed=packed), "hopper_skinny")


# Scales of x and w as powers of two, whose product float32 holds, and not with any sum before it.
EXTREMES = ((41, 41), (-41, -41), (100, -110), (-110, 100), (-6, 119), (119, -6), (119, -13))


@pytest.mark.parametrize("sizes", [(70, 40, 128), (8, 64, 512), (20, 64, 512)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_scales_near_the_ends_of_the_range(mode, packed, sizes):
  program = Program(mode, *sizes, packed=packed, global_scales=mode == "nvfp4")
  cases = [Case(program, "constant", "constant", *e) for e in EXTREMES]
  cases += [Case(program, "rows apart", "normal", *e) for e in EXTREMES[:2]]
  with interpreted():
    compiled = products.compiled(program, products.cases.arrays_of(cases[0]).args)
    assert not compiled.implementation.startswith("xla")
    results = [products.run(case, compiled, twice=False) for case in cases]
  failed = [f"{r['wrong']}\n  {r['case']}" for r in results if r["wrong"]]
  assert not failed, "\n".join(failed)


def has_kernel(seed):
  program = cases.program_of(seed, small=True)
  dtypes = ("bfloat16", "float16") if program.mode == "nvfp4" else ("bfloat16",)  # of x as it is
  return program.quantize_input or program.x_dtype in dtypes


@pytest.mark.parametrize(
  "seed", list(itertools.islice(filter(has_kernel, itertools.count(SEED)), PROGRAMS))
)
def test_random(seed):
  with interpreted():
    results = list(products.run_seed(seed, DRAWS, small=True, twice=False))
  assert len(results) == len(DRAWS)
  assert not any(r["implementation"].startswith("xla") for r in results)
  failed = [f"{r['wrong']}\n  {r['case']}" for r in results if r["wrong"]]
  assert not failed, "\n".join(failed)


def test_a_broken_kernel_is_noticed(monkeypatch):
  """Packed w, expanded, is off by a part in sixteen."""
  from jaxqq._kernels.hopper.mainloops.in_order import InOrderOperand

  right = InOrderOperand.expand
  monkeypatch.setattr(InOrderOperand, "expand", lambda *args: right(*args) * 1.0625)
  with pytest.raises(AssertionError, match="of the bound"):
    check(Program("mxfp8", 5, 40, 32, packed=True, highest=True), "hopper_exact")
