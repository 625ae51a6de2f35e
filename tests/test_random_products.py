"""Products drawn from a seed, each element by its bound: `-m gpu` compiled, elsewhere by XLA.

JAXQQ_SEED and JAXQQ_PRODUCTS choose which and how many; JAXQQ_GRADIENTS how many of those.
Thousands at a time, in several processes: `python -m tests.support.products`.
"""

from __future__ import annotations

import os

import jax
import pytest

from tests.support import gradients, products
from tests.support.cases import DRAWS, Case, Program

SEED = int(os.environ.get("JAXQQ_SEED", "0"))
PRODUCTS = int(os.environ.get("JAXQQ_PRODUCTS", "304"))
GRADIENTS = int(os.environ.get("JAXQQ_GRADIENTS", "40"))
GPU_CHUNK = 5  # seeds a test


def seeds(first, count, chunk):
  return [range(first + i, first + min(i + chunk, count)) for i in range(0, count, chunk)]


def assert_right(seeds, *, small=False):
  results = [r for seed in seeds for r in products.run_seed(seed, small=small)]
  failed = [f"{r['wrong']}\n  {r['case']}\n  {r['again']}" for r in results if r["wrong"]]
  assert not failed, "\n".join(failed)
  assert len(results) == len(seeds) * DRAWS


@pytest.mark.gpu
@pytest.mark.parametrize("seeds", seeds(SEED, PRODUCTS // DRAWS, GPU_CHUNK), ids=str)
def test_on_a_gpu(seeds):
  assert jax.default_backend() == "gpu"
  assert_right(seeds)


@pytest.mark.parametrize("seeds", seeds(SEED, 20, 5), ids=str)
def test_by_xla(seeds):
  assert_right(seeds, small=True)


def assert_gradients_are_right(seeds):
  found = {seed: gradients.run(gradients.gradient_of(seed)) for seed in seeds}
  failed = [f"{wrong}\n  {gradients.again(seed)}" for seed, wrong in found.items() if wrong]
  assert not failed, "\n".join(failed)


@pytest.mark.gpu
@pytest.mark.parametrize("seeds", seeds(SEED, GRADIENTS, GPU_CHUNK), ids=str)
def test_gradients_on_a_gpu(seeds):
  assert_gradients_are_right(seeds)


@pytest.mark.parametrize("seeds", seeds(SEED, 16, 8), ids=str)
def test_gradients_by_xla(seeds):
  assert_gradients_are_right(seeds)


# What was found wrong on a GPU, at 45f7063.


def one_step(mode, k, m, n, x_dtype, **how):
  return Case(Program(mode, m, n, k, x_dtype, packed=True, **how))


# Packed w, one step of k, sums promoted: nothing followed the expansion of the left operand.
ONE_STEP = [
  one_step(mode, k, m, n, x_dtype, highest=x_dtype != "float32")
  for mode, sizes in (("nvfp4", (16, 32, 48, 64)), ("mxfp8", (32, 64, 96, 128)))
  for k in sizes
  for (m, n), x_dtype in zip(
    ((1, 5), (2, 136), (7, 64), (63, 129), (100, 32), (513, 136)),
    ("float32", "bfloat16", "float16") * 2,
    strict=True,
  )
]
ONE_STEP += [
  one_step("mxfp8", 32, 40, 72, "float32", x_batch=(3,), w_batch=(3,)),
  one_step("nvfp4", 16, 40, 72, "bfloat16", highest=True, x_batch=(2, 3)),
]

# Sums in fp8, beyond 2**-8 |exact| + 2**-12 mag by as much as the comment says.
BEYOND = [
  # 6.1
  Case(Program("mxfp8", 128, 333, 4096, "float16"), "heavy tails", "heavy tails"),
  Case(Program("mxfp8", 65, 72, 4608), "outliers", "outliers"),  # 1.15
  Case(Program("mxfp8", 255, 136, 7168, packed=True), "positive", "positive"),  # 1.014
  Case(  # 1.007
    Program("mxfp8", 100, 72, 4096, packed=True, x_batch=(3,), w_batch=(3,)),
    "heavy tails",
    "heavy tails",
  ),
]


def assert_case_is_right(case):
  result = products.run(case)
  assert not result["wrong"], f"{result['wrong']}\n{result}"


@pytest.mark.gpu
@pytest.mark.parametrize("case", ONE_STEP + BEYOND, ids=repr)
def test_found_on_a_gpu(case):
  assert_case_is_right(case)


@pytest.mark.parametrize("case", ONE_STEP[::5], ids=repr)
def test_found_on_a_gpu_by_xla(case):
  assert_case_is_right(case)
