"""A layer of stacked weights, chosen by an index on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxqq
from tests.support import oracle
from tests.support.products import same_bits
from tests.support.sharding import GRADIENTS_CLOSE, explicit_mesh, mesh, place, place_explicit

L, N, K = 3, 40, 64
PRODUCTS = {"qqmm": jaxqq.qqmm, "quantized_matmul": jaxqq.quantized_matmul}


def stack_of(mode, **how):
  w = np.random.default_rng(1).standard_normal((L, N, K)).astype(np.float32)
  w *= np.float32([1, 30, 0.1])[:, None, None]
  return jaxqq.quantize_weight(w, mode, **how)


def x_of(*shape, dtype=np.float32):
  return np.random.default_rng(2).standard_normal((*shape, K)).astype(dtype)


def check(out, x, stack, i, quantize_input, highest=False):
  """Against float64, each element; `stack` without global scales."""
  w_hat = np.asarray(stack[i].dequantize(jnp.float32), np.float64)
  x_hat = oracle.round_trip(x, stack.mode) if quantize_input else x
  x_hat = np.asarray(x_hat, np.float64)
  mag = np.abs(x_hat) @ np.abs(w_hat).T
  oracle.assert_within_bound(np.asarray(out), x_hat @ w_hat.T, mag, highest=highest)


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8", "mxfp4"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_is_the_product_with_the_matrix(name, mode):
  """Of any leading axes, known and traced indices, below 0 too."""
  stack = stack_of(mode, global_scale=None)
  multiply = PRODUCTS[name]
  product = jax.jit(lambda x, i: multiply(x, stack.layer(i)))
  for i, x in enumerate((x_of(5), x_of(), x_of(2, 3))):
    out = product(x, i)
    assert out.shape == (*x.shape[:-1], N)
    check(out, x, stack, i, name == "qqmm")
    assert same_bits(np.asarray(product(x, i - L)), np.asarray(out))
  check(multiply(x, stack.layer(-1)), x, stack, 2, name == "qqmm")
  assert not np.asarray(product(x, L)).any()


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_layer_has_its_global_scales(name):
  stack = stack_of("nvfp4", global_scale="amax")
  x = x_of(4)
  how = {"global_scale_x": "amax"} if name == "qqmm" else {}
  for i in range(L):
    out = PRODUCTS[name](x, stack.layer(i), **how)
    want = PRODUCTS[name](x, stack[i], **how)
    np.testing.assert_allclose(out, want, rtol=2e-6, atol=1e-6 * np.abs(want).max())
  if name == "qqmm":
    by_row = jaxqq.qqmm(x, stack.layer(1), global_scale_x="row")
    want = jaxqq.qqmm(x, stack[1], global_scale_x="row")
    np.testing.assert_allclose(by_row, want, rtol=2e-6, atol=1e-6 * np.abs(want).max())


def test_other_arguments():
  stack, x = stack_of("mxfp8"), x_of(4, dtype=jnp.bfloat16)
  out = jaxqq.qqmm(x, stack.layer(0), precision="highest", preferred_element_type=jnp.float32)
  assert out.dtype == jnp.float32
  check(out, np.asarray(x, np.float32), stack, 0, True, highest=True)


@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_gradient_in_a_scan_over_layers(backward):
  """Of x, as of a loop over the matrices."""
  rng = np.random.default_rng(3)
  stack = jaxqq.quantize_weight(rng.standard_normal((L, K, K)).astype(np.float32) / 8, "mxfp8")

  def scanned(x):
    def body(x, i):
      return jnp.tanh(jaxqq.qqmm(x, stack.layer(i), backward=backward)), None

    return jax.lax.scan(body, x, jnp.arange(L))[0].sum()

  def unrolled(x):
    for i in range(L):
      x = jnp.tanh(jaxqq.qqmm(x, stack[i], backward=backward))
    return x.sum()

  x = x_of(6)
  got, want = (jax.jit(jax.value_and_grad(f))(x) for f in (scanned, unrolled))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_vmap_over_indices():
  stack, x = stack_of("mxfp8"), x_of(2)
  out = jax.vmap(lambda i: jaxqq.qqmm(x, stack.layer(i)))(jnp.int32([2, 0]))
  for each, i in zip(out, (2, 0), strict=True):
    check(each, x, stack, i, True)


def scan_over_layers(x, stack):
  def body(x, i):
    return jaxqq.qqmm(x, stack.layer(i)), None

  return jax.lax.scan(body, x, jnp.arange(8))[0]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
@pytest.mark.parametrize(
  ("mode", "rows", "kernel"),
  [
    ("nvfp4", 2, "skinny_gemm"),
    ("nvfp4", 100, "dequant_gemm"),
    ("mxfp8", 2, "skinny_gemm"),
    ("mxfp8", 100, "dequant_gemm"),
  ],
)
def test_no_copy_of_w_for_a_kernel_in_a_scan(mode, rows, kernel, monkeypatch):
  """The kernel has the whole stack as its operand, and no slice of it is taken."""
  from jaxqq import _kernels

  hopper = _kernels.Device("cuda", "9.0", 132)
  monkeypatch.setattr(_kernels, "device_of", lambda platform: hopper)
  k = 1024
  w = jax.ShapeDtypeStruct((8, k, k), jnp.float32)
  stack = jax.eval_shape(lambda w: jaxqq.quantize_weight(w, mode), w)
  x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
  traced = jax.jit(scan_over_layers).trace(x, stack)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count(f"jaxqq_{kernel}") >= 1
  rebased = f"tensor<1x{k}x{stack.scales.shape[-1]}xui8>"  # of one layer, not of all
  assert (rebased in text) == (mode == "mxfp8" and rows > 25)
  words = stack.packed.shape[-1]
  assert f"tensor<8x{k}x{words}xui32>" in text
  for slice_of_w in (f"tensor<1x{k}x{words}xui32>", f"tensor<{k}x{words}xui32>"):
    assert slice_of_w not in text


# x (4, 8, K), w (L, N, K), out_sharding; how the result is split on explicit axes
SPLIT = {
  "batch and columns": (P("data"), P(None, "tensor"), None, ("data", None, "tensor")),
  "sequence": (P(None, "data"), P(), None, (None, "data", None)),
  "both": (P("tensor", "data"), P(), None, ("tensor", "data", None)),
  "K": (P(None, "data", "tensor"), P(None, None, "tensor"), P(), (None, None, None)),
  "the result alone": (P(), P(), P("data", None, "tensor"), ("data", None, "tensor")),
}


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("explicit", [False, True], ids=["automatic", "explicit"])
def test_split_over_devices(explicit, name):
  """The product and dx, in a scan over layers too; leading axes of x keep how they are split."""
  of_x, of_w, out_sharding, want = SPLIT[name]
  own_mesh, own_place = (explicit_mesh(), place_explicit) if explicit else (mesh(), place)
  w = np.random.default_rng(4).standard_normal((L, K, K)).astype(np.float32) / 8
  x, stack = x_of(4, 8), jaxqq.quantize_weight(w, "mxfp8")

  def product(x, stack, i, out_sharding):
    return jaxqq.qqmm(x, stack.layer(i), out_sharding=out_sharding)

  def both(x, stack, out_sharding):
    out, pull = jax.vjp(lambda x: product(x, stack, 1, out_sharding), x)
    kept = None if out_sharding is None else of_x  # as the carry of a scan has to be
    if kept is None:
      return out, pull(out)[0], out
    over = jax.lax.scan(lambda x, i: (product(x, stack, i, kept), None), x, jnp.arange(L))[0]
    return out, pull(out)[0], over

  expected = jax.jit(both, static_argnums=2)(x, stack, None)
  if out_sharding is not None:
    over = x
    for i in range(L):
      over = product(over, stack, i, None)
    expected = (*expected[:2], over)
  args = own_place(x, of_x), jax.tree.map(lambda a: own_place(a, of_w), stack)
  with jax.set_mesh(own_mesh):
    got = jax.jit(both, static_argnums=2)(*args, out_sharding)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, **GRADIENTS_CLOSE)
  if explicit:
    spec = got[0].sharding.spec
    assert (*spec, *[None] * (3 - len(spec))) == want
    dx = got[1].sharding.spec
    assert (*dx, *[None] * (3 - len(dx))) == (*of_x, *[None] * (3 - len(of_x)))


def test_explain():
  stack = stack_of("mxfp8")
  text = jaxqq.explain(jaxqq.qqmm, x_of(2, 3), stack.layer(1), device="cpu")
  assert text.startswith("qqmm mxfp8, x float32 (6, 64), w ") and text.plan.name == "xla"
  shape = jax.ShapeDtypeStruct((2, 3, K), np.float32)
  assert jaxqq.explain(jaxqq.qqmm, shape, stack.layer(1), device="cpu") == text
  text = jaxqq.explain(jaxqq.quantized_matmul, x_of(4), stack.layer(1), device="cpu")
  assert text.startswith("quantized_matmul mxfp8")


def test_what_wraps_an_array_and_export():
  class Wrapped:
    def __jax_array__(self):
      return jnp.asarray(x_of(2, 3))

  stack = stack_of("mxfp8")
  out = jaxqq.qqmm(x_of(2, 3), stack.layer(1))
  assert same_bits(np.asarray(jaxqq.qqmm(Wrapped(), stack.layer(1))), np.asarray(out))
  exported = jax.export.export(jax.jit(jaxqq.qqmm))(x_of(2, 3), stack.layer(0))
  again = jax.export.deserialize(exported.serialize())
  assert same_bits(np.asarray(again.call(x_of(2, 3), stack.layer(1))), np.asarray(out))


ERRORS = [
  (lambda s: s[np.array([0, 3])], IndexError, "3 is out of range for an axis of 3 matrices"),
  (lambda s: s[np.array([2**32])], IndexError, "4294967296 is out of range"),
  (lambda s: list(s[0]), TypeError, "is one matrix, whose rows cannot be gone through; take"),
  (lambda s: s[0].layer(0), ValueError, "must be a stack of matrices"),
  (lambda s: s.layer(3), ValueError, "index is 3, and the weight has 3 matrices; pass one from -3"),
  (lambda s: s.layer(np.array(2**32 + 1)), ValueError, "index is 4294967297, and the weight has 3"),
  (lambda s: s[:0].layer(0), ValueError, "index is 0, and the weight has no matrix"),
  (
    lambda s: jaxqq.ragged_qqmm(x_of(2), s.layer(0), np.int32([2])),
    TypeError,
    r"got StackedLayer; only qqmm and quantized_matmul take one, others stack\[i\]",
  ),
  (lambda s: s.layer(1.0), TypeError, "index must be an integer"),
  (lambda s: s.layer("a"), TypeError, "index must be an integer, got str"),
  (lambda s: s.layer(True), TypeError, "index must be an integer, got bool"),
  (lambda s: np.asarray(s.layer(0)), TypeError, "StackedLayer is no array"),
  (lambda s: s.layer(jnp.arange(2)), ValueError, "index must be one integer"),
  (
    lambda s: jaxqq.qqmm(x_of(2), s.layer(0), implementation="block_scaled_dot"),
    ValueError,
    "unknown implementation .*hopper_skinny",
  ),
  (lambda s: jaxqq.qqmm(x_of(2), s.layer(0), recipe="mxfp8"), ValueError, "leave recipe out"),
  (lambda s: jaxqq.qqmm(x_of(2), s.layer(0), s.scales[0]), ValueError, "leave scales out"),
  (lambda s: jaxqq.qqmm(x_of(2), s.layer(0), mode="nvfp4"), ValueError, "mode"),
  (lambda s: jaxqq.qqmm(x_of(2)[:, :32], s.layer(0)), ValueError, "K|contract|last"),
  (lambda s: jaxqq.qqmm(np.float32(1), s.layer(0)), ValueError, "at least one dimension"),
  (lambda s: jaxqq.qqmm(x_of(2), s.layer(0), out_sharding="data"), TypeError, "out_sharding must"),
]


@pytest.mark.parametrize("case", ERRORS, ids=[case[2][:24] for case in ERRORS])
def test_errors(case):
  wrong, error, words = case
  with pytest.raises(error, match=words) as info:
    wrong(stack_of("mxfp8"))
  assert "\n" not in str(info.value)
