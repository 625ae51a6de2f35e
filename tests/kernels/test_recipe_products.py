"""Products of a recipe by Hopper's kernels: interpreted anywhere, and compiled with `-m gpu`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq import Quantizer, Recipe, _recipe_product
from jaxqq._reference import Operands, unflatten
from tests.support import oracle, recipes

if jax.__version_info__ < (0, 11):
  pytest.skip("the kernels need JAX 0.11", allow_module_level=True)

from tests.support.interpreter import interpreted
from tests.support.kernels import on_gpu
from tests.support.recipes import Spec

KEY = jax.random.key(9)
NVIDIA = Recipe.named("nvfp4")
FOUR = Recipe.named("nvfp4-4over6")
OTHERS = Recipe(*6 * [Quantizer("mxfp4", rounding="stochastic", rotation=32)])
PRODUCTS = ("forward", "dx", "dw")
# How the second axes of the operands are stored: contracted first, as derivatives give them.
TRANSPOSED = {"forward": (), "dx": ("w",), "dw": ("x", "w")}


def numbers(shape, seed):
  """Short enough that sums of rotations are exact, over some binades."""
  rng = np.random.default_rng(seed)
  a = rng.standard_normal(shape) * 2.0 ** rng.integers(-3, 3, shape)
  return (np.round(a * 2**6) / 2**6).astype(oracle.DTYPES["bfloat16"])


def exact(recipe, product, x, w):
  """The float64 product of what is left of both, and the sums of magnitudes."""
  begin = 3 * PRODUCTS.index(product)
  words = recipes.words_of(KEY)
  hats = [
    recipes.left_of(a.astype(np.float32), Spec.of(quantizer), words, (begin + i, begin + 2))
    for i, (a, quantizer) in enumerate(zip((x, w), recipe.of(product), strict=True))
  ]
  return oracle.product(*hats)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("recipe", [NVIDIA, FOUR, OTHERS], ids=["nvfp4", "4over6", "others"])
@pytest.mark.parametrize("shape", [(72, 136, 96)], ids=str)
def test_product(recipe, product, shape):
  m, n, k = shape
  x, w = numbers((m, k), 0), numbers((n, k), 1)
  transposed = TRANSPOSED[product]
  stored = (a.T if name in transposed else a for name, a in (("x", x), ("w", w)))
  dtype = np.dtype(oracle.DTYPES["bfloat16"])
  params = _recipe_product.Params(recipe, dtype, None, product)
  with interpreted():
    key = jnp.pad(jax.random.key_data(KEY), (0, 2))
    ops = Operands(*map(jnp.asarray, stored), key=key, transposed=transposed)
    assert _recipe_product.planned(ops, params, "cuda").name == "hopper_recipe"

    @jax.jit
    def multiply(*arrays):
      return _recipe_product.run(unflatten(ops.names, arrays), params, "cuda")

    out = np.asarray(multiply(*ops.flatten()))
  assert out.dtype == dtype
  oracle.assert_within_bound(out, *exact(recipe, product, x, w))


@pytest.mark.parametrize(
  ("recipe", "why"),
  [
    (Recipe(Quantizer(rounding="stochastic")), "not quantized"),
    (dataclasses.replace(NVIDIA, forward_x=Quantizer("mxfp8")), "two modes"),
    (Recipe(*2 * [Quantizer(square=True, rotation=128)]), "squares rotates up to 64"),
    (Recipe(*2 * [Quantizer(rotation=64, scale="unbiased")]), "no kernel corrects scales"),
  ],
)
def test_what_no_kernel_takes(recipe, why):
  spec = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
  params = _recipe_product.Params(recipe, np.dtype(oracle.DTYPES["bfloat16"]), None)
  plan = _recipe_product.planned(Operands(spec, spec), params, "cuda")
  assert plan.name == "xla" and why in plan.refusals[0]
  params = dataclasses.replace(
    params, recipe=dataclasses.replace(NVIDIA, from_forward=True), product="dx"
  )
  plan = _recipe_product.planned(Operands(spec, spec, transposed=("w",)), params, "cuda")
  assert plan.name == "xla" and "what the forward product left" in plan.refusals[0]
  batch = jax.ShapeDtypeStruct((3, 64, 256), jnp.bfloat16)
  params = dataclasses.replace(params, recipe=NVIDIA, product="forward")
  plan = _recipe_product.planned(Operands(batch, batch), params, "cuda")
  assert plan.name == "xla" and "several matrices" in plan.refusals[0]


def all_three(recipe, x, w, g, key):
  out, pull = jax.vjp(lambda x, w: jaxqq.qqmm(x, w, recipe=recipe, key=key), x, w)
  return out, *pull(g)


@pytest.mark.parametrize("shape", [(512, 1024, 2048), (300, 136, 160)], ids=str)
def test_lowers_for_cuda(shape):
  m, n, k = shape
  x, w, g = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((m, k), (n, k), (m, n)))
  key = jax.ShapeDtypeStruct((), KEY.dtype)
  traced = jax.jit(lambda *a: all_three(NVIDIA, *a)).trace(x, w, g, key)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  for name, count in (
    ("gemm", 3),
    ("exact_operand", 2),  # x forward, g for dx
    ("exact_operand_of_squares", 1),
    ("exact_operand_of_transpose", 3),  # w for dx, g and x for dw
    ("rotated_amax_of_transpose", 2),
  ):
    assert text.count(f"jaxqq_{name}_mosaic_gpu") == count, name


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("shape", [(72, 136, 96), (300, 1000, 544), (1024, 512, 2048)], ids=str)
  @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
  @pytest.mark.parametrize("recipe", [NVIDIA, FOUR, OTHERS], ids=["nvfp4", "4over6", "others"])
  def test_all_three(self, recipe, dtype, shape):
    m, n, k = shape
    x, w, g = (
      a.astype(oracle.DTYPES[dtype])
      for a in (numbers((m, k), 0), numbers((n, k), 1), numbers((m, n), 2))
    )
    assert jaxqq.explain(x, w, recipe=recipe, key=KEY).plan.name == "hopper_recipe"
    outs = jax.jit(lambda x, w, g: all_three(recipe, x, w, g, KEY))(x, w, g)
    pairs = {"forward": (x, w), "dx": (g, w.T), "dw": (g.T, x.T)}
    for out, (product, pair) in zip(outs, pairs.items(), strict=True):
      oracle.assert_within_bound(np.asarray(out), *exact(recipe, product, *pair))
