"""The two forms of the steps that decide bits: in integers, and a CPU's shorter one."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq import _quantize
from jaxqq._formats import FORMATS
from jaxqq._rounding import ANYWHERE, ON_CPU
from tests.support import oracle

NVFP4 = FORMATS["nvfp4"]
BOTH = pytest.mark.parametrize("arithmetic", [ANYWHERE, ON_CPU], ids=["anywhere", "cpu"])
NO_AMAX = [np.float32(g) for g in (-1, -0.0, 0, np.inf, -np.inf, np.nan)]


@functools.cache
def quantized(arithmetic, scaled):
  if not scaled:
    return jax.jit(lambda a: _quantize.quantize_groups(a, NVFP4, None, arithmetic))
  return jax.jit(lambda a, g: _quantize.quantize_groups(a, NVFP4, g, arithmetic))


def numbers(rng, shape, low, high):
  """Positive normal float32, uniform in their bits: of every exponent, every mantissa."""
  ends = (int(np.float32(2.0**e).view(np.int32)) for e in (low, high))
  return rng.integers(*ends, shape).astype(np.int32).view(np.float32)


def groups(rng, rows=512):
  """Groups of every size from subnormal numbers on, some of them near a tie of their scale."""
  a = numbers(rng, (rows, 64), -126, 126) * rng.choice([-1, 1], (rows, 64)).astype(np.float32)
  sizes = numbers(rng, (rows, 4, 1), -149 + 23, 126)
  alike = rng.uniform(-1, 1, (rows, 4, 16)) * sizes.astype(np.float64)
  alike[:, :2, :1] = np.float64(6) * rng.integers(16, 32, (rows, 2, 1)) / 16 * sizes[:, :2]
  alike[: rows // 8] *= 2.0**-30
  with np.errstate(over="ignore"):
    alike = np.clip(alike, -3e38, 3e38).astype(np.float32).reshape(rows, 64)
  return np.concatenate([a, alike])


@BOTH
def test_quotients_are_those_of_numpy(arithmetic):
  rng = np.random.default_rng(0)
  a, b = numbers(rng, 200_000, -60, 60), numbers(rng, 200_000, -60, 60)
  divide = jax.jit(arithmetic.divide)
  np.testing.assert_array_equal(divide(a, b), a / b)
  np.testing.assert_array_equal(divide(np.float32(2688), b), np.float32(2688) / b)
  for constant, bits in ((NVFP4.element_max, NVFP4.element_max_bits), (2688, 5)):
    by_constant = jax.jit(lambda a, c=constant, n=bits: arithmetic.divide(a, jnp.float32(c), n))
    np.testing.assert_array_equal(by_constant(a), a / np.float32(constant))
    of_one = jax.jit(lambda g, f=by_constant: f(jnp.broadcast_to(g, (2, 3, 1))))
    for g in b[:200]:
      assert (of_one(g) == g / np.float32(constant)).all()
  of_one = jax.jit(lambda g: arithmetic.divide(jnp.float32(2688), g.reshape(1, 1, 1)))
  for g in b[:500]:
    assert of_one(g).item() == np.float32(2688) / g


@BOTH
@pytest.mark.parametrize("scaled", [False, True])
def test_bits_are_those_of_the_oracle(arithmetic, scaled):
  rng = np.random.default_rng(1)
  a = groups(rng)
  scales = [np.max(np.abs(a)), *numbers(rng, 8, -126, 127), np.float32(2.0**-140)]
  for g in scales if scaled else [None]:
    codes, of_groups = quantized(arithmetic, scaled)(*([a] if g is None else [a, g]))
    want_codes, want = oracle.quantize_codes(a, "nvfp4", g)
    np.testing.assert_array_equal(of_groups, want)
    np.testing.assert_array_equal(codes, want_codes)


def test_both_agree_on_what_is_no_amax_and_on_what_is_not_finite():
  rng = np.random.default_rng(2)
  a = groups(rng)
  a[rng.random(a.shape) < 0.005] = np.nan
  a[rng.random(a.shape) < 0.005] = -np.inf
  for g in [*NO_AMAX, np.float32(1e-40), np.float32(3e38), None]:
    args = [a] if g is None else [a, g]
    one, other = (quantized(arithmetic, g is not None)(*args) for arithmetic in (ANYWHERE, ON_CPU))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_both_agree_on_the_factors_of_a_product():
  rng = np.random.default_rng(3)
  factors = [
    jax.jit(lambda x, w, a=arithmetic: _quantize.alpha_factors(x, w, NVFP4, arithmetic=a))
    for arithmetic in (ANYWHERE, ON_CPU)
  ]
  xs = [*NO_AMAX, *numbers(rng, 200, -126, 127), *np.float32(2.0) ** rng.integers(-149, 127, 50)]
  for x, w in zip(xs, rng.permutation(np.array(xs)), strict=True):
    one, other = (f(x, w) for f in factors)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("platforms", [("cpu",), ("tpu",), ("cuda",), ("tpu", "cpu")])
@pytest.mark.parametrize("name", ["qqmm", "quantize"])
def test_only_a_cpu_divides(name, platforms, monkeypatch):
  monkeypatch.setenv("JAXQQ_DISABLE", "hopper,block_scaled_dot")
  shape = jax.ShapeDtypeStruct((8, 64), jnp.float32)
  call = {
    "qqmm": lambda a: jaxqq.qqmm(a, a, global_scale_x="amax", global_scale_w="amax"),
    "quantize": lambda a: jaxqq.quantize(a, global_scale=jnp.float32(3)),
  }[name]
  text = jax.jit(call).trace(shape).lower(lowering_platforms=platforms).as_text()
  divides = re.search(r"stablehlo\.divide .*xf?32>|stablehlo\.divide .*f32", text) is not None
  assert divides == ("cpu" in platforms)


@pytest.mark.parametrize(("scale", "most"), [(None, 520), ("amax", 1300)])
def test_a_cpu_compiles_little(scale, most):
  """Instructions, fused ones too. In integers, and with scalars in each loop: 741 and 2624."""
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  scales = {"global_scale_x": scale, "global_scale_w": scale}
  compiled = jax.jit(lambda x, w: jaxqq.qqmm(x, w, **scales)).lower(x, x).compile()
  assert len(re.findall(r"^ +(?:ROOT )?%?\S+ = ", compiled.as_text(), re.MULTILINE)) < most
