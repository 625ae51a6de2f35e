"""Weights that share x in one product: each part keeps its own global scale."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxqq
from jaxqq import _kernels, _primitive, checkpoint
from jaxqq._formats import FORMATS
from jaxqq._reference import Operands
from tests.support import oracle
from tests.support.jaxprs import count
from tests.support.kernels import needs_kernels
from tests.support.messages import check_sentence
from tests.support.operands import amax, quantized_product, vjp

pytestmark = pytest.mark.usefixtures("quick_compiles")
RNG = np.random.default_rng(11)
X = oracle.random(RNG, (6, 64), "float32")
# As q, k and v are: of several sizes, and here a thousandfold apart.
SIZES = ((16, 1), (32, 1e-3), (32, 50))
PARTS = [oracle.random(RNG, (n, 64), "float32") * np.float32(s) for n, s in SIZES]
W = np.concatenate(PARTS)
STACKS = [np.stack([w, w * np.float32(0.01)]) for w in PARTS]
P = PartitionSpec


@functools.cache
def weights_of(mode="nvfp4", stacked=False):
  return [jaxqq.quantize_weight(w, mode) for w in (STACKS if stacked else PARTS)]


def fused(mode="nvfp4", stacked=False):
  return jaxqq.concatenate(weights_of(mode, stacked))


def hat(parts=PARTS, mode="nvfp4"):
  scaled = mode == "nvfp4"
  return np.concatenate([oracle.round_trip(w, mode, amax(w) if scaled else None) for w in parts])


@pytest.mark.parametrize(
  ("mode", "dtype"), [("nvfp4", "float32"), ("nvfp4", "bfloat16"), ("mxfp8", "float16")]
)
def test_the_product_is_that_of_the_parts(mode, dtype):
  x = X.astype(oracle.DTYPES[dtype])
  weights = weights_of(mode)
  both = jaxqq.concatenate(weights)
  assert both.shape == (80, 64) and both.dtype == jnp.float32 and both.mode == mode
  out = jax.jit(jaxqq.qqmm)(x, both)
  oracle.assert_within_bound(
    np.asarray(out), *oracle.product(oracle.round_trip(x, mode), hat(mode=mode))
  )
  parts = np.concatenate([jaxqq.qqmm(x, w) for w in weights], axis=-1)
  assert out.dtype == dtype
  np.testing.assert_allclose(
    np.float32(out), np.float32(parts), rtol=2.0**-21 if dtype == "float32" else 2.0**-7
  )
  assert count(jax.make_jaxpr(jaxqq.qqmm)(x, both).jaxpr, "qqmm") == 1


def test_parts_come_out_again():
  both = fused()
  start = 0
  for w in PARTS:
    part = both[start : start + len(w)]
    start += len(w)
    want = oracle.round_trip(w, "nvfp4", amax(w))
    np.testing.assert_allclose(part.dequantize(), want, rtol=2.0**-22)
  np.testing.assert_allclose(both.dequantize(), hat(), rtol=2.0**-22)
  first, *others = weights_of()
  nested = jaxqq.concatenate([jaxqq.concatenate([first, others[0]]), others[1]])
  jax.tree.map(np.testing.assert_array_equal, nested, both)
  abstract = jax.eval_shape(jaxqq.concatenate, [first, *others])
  assert abstract.shape == (80, 64) and abstract.has_row_scales
  none = jaxqq.quantize_weight(PARTS[2], global_scale=None)
  mixed = jaxqq.concatenate([first, none])
  np.testing.assert_array_equal(mixed.global_scale[16:], 2688)
  np.testing.assert_array_equal(mixed[16:].dequantize(), oracle.round_trip(PARTS[2], "nvfp4"))
  assert jaxqq.concatenate([none, none]).global_scale is None


def test_stacks_are_scanned_mapped_and_multiplied():
  both = fused(stacked=True)
  assert both.shape == (2, 80, 64) and both.global_scale.shape == (2, 80)
  weights = weights_of(stacked=True)
  want = np.stack([np.concatenate([jaxqq.qqmm(X, w[i]) for w in weights], -1) for i in range(2)])
  close = functools.partial(np.testing.assert_allclose, desired=want, rtol=2.0**-20, atol=0)
  close(jax.jit(jaxqq.qqmm)(X[None], both))
  close(jax.jit(jax.vmap(jaxqq.qqmm, (None, 0)))(X, both))
  close(jax.lax.scan(lambda c, w: (c, jaxqq.qqmm(X, w)), 0, both)[1])
  close(jnp.stack([jaxqq.qqmm(X, both[i]) for i in range(2)]))
  again = jax.vmap(lambda *ws: jaxqq.concatenate(ws))(*weights)
  jax.tree.map(np.testing.assert_array_equal, again, both)
  np.testing.assert_array_equal(jax.vmap(jaxqq.qqmm, (0, None))(X, both[1]), jaxqq.qqmm(X, both[1]))


@pytest.mark.parametrize("stacked", [False, True], ids=["matrix", "stack"])
@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_gradient_reaches_x(backward, stacked):
  """Also of one x for a stack, where the sum goes over both matrices."""
  both, by = fused(stacked=stacked), np.float32([1, 0.01] if stacked else [1])
  w_hats = [hat([w * s for w in PARTS]) for s in by]
  g = oracle.random(RNG, (len(by), 6, 80), "float32") / np.float32(1000)
  product = functools.partial(jaxqq.qqmm, backward=backward)
  (dx,) = vjp(lambda x: product(x, both), X, g=g if stacked else g[0])
  want = sum(a.astype(np.float64) @ b for a, b in zip(g, w_hats, strict=True))
  if backward == "quantized":  # under one scale for all rows
    largest = [max(amax(w * s) for w in PARTS) for s in by]
    rounded = np.asarray(both.dequantize(jnp.float32)).reshape(len(by), 80, 64)
    each = zip(g, rounded, largest, strict=True)
    want = sum(quantized_product(a, b.T, "nvfp4", amax(a), s) for a, b, s in each)
  assert oracle.relative_error(dx, want) <= 2e-6
  if stacked:
    return
  _, tangent = jax.jvp(lambda x: product(x, both), (X,), (X,))
  assert oracle.relative_error(tangent, X.astype(np.float64) @ w_hats[0].T) <= 1e-6
  _, hvp = jax.jvp(jax.grad(lambda x: jnp.sum(product(x, both) ** 2) / 2), (X,), (X,))
  assert oracle.relative_error(hvp, X.astype(np.float64) @ w_hats[0].T @ w_hats[0]) <= 1e-5


def test_gradient_in_bfloat16():
  both = fused()
  g = oracle.random(RNG, (6, 80), "bfloat16")
  (dx,) = vjp(lambda x: jaxqq.qqmm(x, both), X.astype(g.dtype), g=g)
  assert oracle.relative_error(dx, g.astype(np.float64) @ hat()) <= 1e-2


def meshes(kind):
  types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * 2
  return jax.make_mesh((2, 4), ("a", "b"), axis_types=types)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("b", None), P(None, "b")], ids=["N split", "K split"])
def test_split_over_devices(spec, kind):
  """Rows and their global scales are split alike; of a split K partial sums are added."""
  mesh = meshes(kind)
  both = fused()
  place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
  rows = place(both.global_scale, spec[0])
  weight = jaxqq.QuantizedWeight(
    place(both.packed, *spec), place(both.scales, *spec), "nvfp4", rows, "float32"
  )
  x = place(X, "a", None)

  def f(x, weight):
    y, pull = jax.vjp(lambda x: jaxqq.qqmm(x, weight, backward="straight_through"), x)
    return y, pull(y)[0]

  with jax.set_mesh(mesh):
    got = jax.jit(f)(x, weight)
  for a, b in zip(got, f(X, both), strict=True):
    assert oracle.relative_error(np.asarray(a), np.asarray(b, np.float64)) <= 1e-6
  if kind == "explicit":
    assert jax.typeof(got[0]).sharding.spec == P("a", spec[0])


# Kernels take one global scale of w


@needs_kernels
@pytest.mark.parametrize("scales", ["rows", "matrices"])
def test_a_kernel_gets_w_without_what_it_lacks(scales, monkeypatch):
  """XLA's block-scaled dot, which runs on a CPU: its float32 result is multiplied by the scales."""
  device = _kernels.Device("cuda", "10.0")
  monkeypatch.setattr(_kernels, "device_of", lambda platform: device)
  weight, x = fused(), X.astype(jnp.bfloat16)
  if scales == "matrices":
    weight, x = jaxqq.quantize_weight(np.stack([w[:16] for w in PARTS])), np.stack([x] * 3)
  operands = weight._operands(x, jnp.float32(64))
  run = jax.jit(
    lambda x: _primitive.run(
      dataclasses.replace(operands, x=x), "nvfp4", jnp.dtype(jnp.bfloat16), _primitive.How(), "cuda"
    )
  )
  plan, inner = _primitive.planned(
    operands, FORMATS["nvfp4"], jnp.dtype(jnp.bfloat16), _primitive.How(), device
  )
  assert (
    plan.name == "block_scaled_dot" and inner.row_scales is None and inner.global_scale_w == 2688
  )
  w_hat = hat() if scales == "rows" else np.stack([hat([w[:16]]) for w in PARTS])
  exact, mag = oracle.product(oracle.round_trip(x, "nvfp4", np.float32(64)), w_hat)
  oracle.assert_within_bound(np.asarray(run(x)), exact, mag)


@needs_kernels
def test_explain_says_so():
  x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
  text = jaxqq.explain(x, jax.eval_shape(fused), device="cuda")
  assert "float32 result is multiplied by the global scales of w" in text
  assert text.plan.name.startswith("hopper")
  stack = jax.eval_shape(lambda: jaxqq.quantize_weight(STACKS[0]))
  xs = jax.ShapeDtypeStruct((2, 64, 64), jnp.bfloat16)
  assert jaxqq.explain(xs, stack, device="cuda").plan.name.startswith("hopper")
  assert jaxqq.explain(x, jax.eval_shape(fused), device="cpu").plan.name == "xla"
  other = Operands(xs, *jaxqq.quantize(STACKS[0]), jnp.ones(2), jnp.ones(2))
  plan, inner = _primitive.planned(
    other, FORMATS["nvfp4"], jnp.dtype("bfloat16"), _primitive.How(), _kernels.Device("cuda", "9.0")
  )
  assert plan.name.startswith("xla") and inner is other  # scales of x differ too


# Bad input


def other(**how):
  return dataclasses.replace(weights_of()[0], **how)


def with_one(w, mode="nvfp4"):
  return [other(), jaxqq.quantize_weight(w, mode)]


# Made when a test runs: each process of tests imports all modules.
WRONG = [
  ("an array", TypeError, ["weights", "list"], lambda: W),
  ("arrays", TypeError, ["weights", "QuantizedWeights", "ndarray"], lambda: PARTS),
  ("nothing", ValueError, ["weights", "empty"], list),
  ("modes", ValueError, ["mode", "nvfp4", "mxfp8"], lambda: with_one(W, "mxfp8")),
  ("K", ValueError, ["K", "(16, 64)", "(16, 32)"], lambda: with_one(PARTS[0][:, :32])),
  ("axes", ValueError, ["leading axes", "(2, 16, 64)"], lambda: with_one(STACKS[0])),
  ("dtype", ValueError, ["dtype", "bfloat16"], lambda: [other(), other(dtype="bfloat16")]),
  ("inputs", ValueError, ["input_global_scale"], lambda: [other(), other(input_global_scale=3)]),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=[case[0] for case in WRONG])
def test_what_cannot_be_put_together(case):
  _, error, words, weights = case
  with pytest.raises(error) as caught:
    jaxqq.concatenate(weights())
  check_sentence(str(caught.value), "concatenate", words)


def test_static_scales_of_the_one_input():
  parts = [other(input_global_scale=s) for s in (3.0, 7.0)]
  assert jaxqq.concatenate(parts).input_global_scale == 7


def test_checkpoints_hold_one_global_scale_a_tensor(tmp_path):
  both = fused()
  with pytest.raises(ValueError) as caught:
    checkpoint.save(tmp_path / "all", {"qkv.weight": both}, format="modelopt")
  check_sentence(str(caught.value), "save", ["qkv.weight", "each row", "slices"])
  parts = {"q.weight": both[:16], "k.weight": both[16:48]}
  checkpoint.save(tmp_path / "parts", parts, format="modelopt")
  loaded = checkpoint.load(tmp_path / "parts")
  for name, part in parts.items():
    assert not loaded[name].has_row_scales
    np.testing.assert_array_equal(
      loaded[name].dequantize(jnp.float32), part.dequantize(jnp.float32)
    )
