"""Ragged products under JAX's transformations, and split over devices."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from tests.support.jaxprs import count
from tests.support.operands import data
from tests.support.sharding import collectives

G, M, N, K = 3, 12, 16, 64
SIZES = np.int32([5, 0, 6])
mxfp8 = functools.partial(jaxqq.ragged_qqmm, mode="mxfp8")


def by_products(x, w, product=jaxqq.qqmm, **how):
  """The same of SIZES, as plain products."""
  parts = [product(x[:5], w[0], **how), product(x[5:11], w[2], **how)]
  return jnp.concatenate([*parts, jnp.zeros((1, w.shape[1]), x.dtype)])


# vmap

BATCHED = [p for p in itertools.product([False, True], repeat=4) if any(p)]


@pytest.mark.parametrize("batched", BATCHED[::2], ids=str)
def test_vmap_is_one_product(batched):
  """Over x, w, sizes and offset, whichever; of w along its last axis but one."""
  x, w = data((2, M, K), (2, N, G, K))
  w = jnp.swapaxes(w, 1, 2)
  sizes, offset = jnp.array([SIZES, [1, 2, 3]], jnp.int32), jnp.int32([0, 1])
  args = (x, w, sizes, offset)
  own = [a if b else a[0] for a, b in zip(args, batched, strict=True)]
  f = lambda x, w, sizes, offset: mxfp8(x, w, sizes, group_offset=offset)  # noqa: E731
  mapped = jax.jit(jax.vmap(f, in_axes=[0 if b else None for b in batched]))
  out = mapped(*own)
  assert count(jax.make_jaxpr(mapped)(*own).jaxpr, "ragged_qqmm") == 1
  each = [[a[i] if b else a for a, b in zip(own, batched, strict=True)] for i in (0, 1)]
  np.testing.assert_allclose(out, np.stack([jax.jit(f)(*a) for a in each]), rtol=1e-5, atol=1e-5)


def test_vmap_of_packed_experts_and_scales():
  """Over stacked layers of experts, twice, with a global scale for each expert."""
  x, w = data((M, K), (2, 2, G, N, K))
  weights = jaxqq.quantize_weight(np.asarray(w) * np.float32([1e-3, 1, 50])[:, None, None])
  f = lambda x, w: jaxqq.ragged_qqmm(x, w, SIZES)  # noqa: E731
  out = jax.jit(jax.vmap(jax.vmap(f, (None, 0)), (None, 0)))(x, weights)
  for i in np.ndindex(2, 2):
    np.testing.assert_allclose(out[i], jax.jit(f)(x, weights[i]), rtol=1e-5)


@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_gradients_of_what_is_mapped_and_of_a_sum_over_it(backward):
  x, w = data((2, M, K), (G, N, K))

  def loss(w, x):
    return jnp.sum(jnp.sin(mxfp8(x, w, SIZES, backward=backward)))

  each = jnp.stack([jax.jit(jax.grad(loss))(w, a) for a in x])
  of_each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(w, x)
  np.testing.assert_allclose(of_each, each, rtol=1e-4, atol=1e-5)
  total = lambda w: jnp.sum(jax.vmap(loss, (None, 0))(w, x))  # noqa: E731
  np.testing.assert_allclose(jax.jit(jax.grad(total))(w), each.sum(0), rtol=1e-4, atol=1e-5)


# Derivatives


SECOND = {
  "straight_through": (jaxqq.ragged_qqmm, jaxqq.qqmm, {}),
  "quantized": (jaxqq.ragged_qqmm, jaxqq.qqmm, {"backward": "quantized", "mode": "mxfp8"}),
  "weights": (jaxqq.ragged_quantized_matmul, jaxqq.quantized_matmul, {}),
}


@pytest.mark.parametrize("kind", SECOND)
def test_second_derivatives_are_those_of_plain_products(kind):
  """Forward over reverse, reverse over forward and over reverse, of x and w.

  What the quantized backward computes is differentiated straight-through, where the plain product
  quantizes once more in reverse over reverse.
  """
  ragged, plain, how = SECOND[kind]
  x, w, dx, dw = data((M, K), (G, N, K), (M, K), (G, N, K))

  def second(f):
    def loss(x, w):
      return jnp.sum(jnp.square(f(x, w)))

    def by_reverse(x, w):
      gradients = jax.grad(loss, (0, 1))(x, w)
      return sum(jnp.vdot(a, b) for a, b in zip(gradients, (dx, dw), strict=True))

    def by_forward(x, w):
      return jnp.vdot(f(dx, dw), jax.jvp(f, (x, w), (dx, dw))[1])

    def all_three(x, w):
      tangent = jax.jvp(jax.grad(loss, (0, 1)), (x, w), (dx, dw))[1]
      functions = (by_forward, by_reverse)[: 1 if kind == "quantized" else 2]
      return tangent, [jax.grad(g, (0, 1))(x, w) for g in functions]

    return jax.jit(all_three)(x, w)

  got = second(lambda x, w: ragged(x, w, SIZES, **how))
  want = second(functools.partial(by_products, product=plain, **how))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_the_gradient_of_packed_scales_is_refused():
  x, w = data((M, K), (G, N, K))
  packed, scales = jaxqq.quantize(w, mode="mxfp8")
  scales = jax.lax.bitcast_convert_type(scales, jnp.float8_e8m0fnu)
  products = {
    "ragged_qqmm": lambda s: mxfp8(x, packed, SIZES, s),
    "ragged_quantized_matmul": lambda s: jaxqq.ragged_quantized_matmul(
      x, packed, SIZES, s, mode="mxfp8"
    ),
    "gather_qqmm": lambda s: jaxqq.gather_qqmm(x, packed, s, mode="mxfp8"),
  }
  for function, product in products.items():
    with pytest.raises(ValueError, match=rf"^{function}: asked for the gradient of the scales"):
      jax.grad(lambda s, product=product: product(s).sum())(scales)


# Programs


@pytest.mark.parametrize(
  ("policy", "products"),
  [
    (jax.checkpoint_policies.dots_saveable, 2),
    (jaxqq.checkpoint_policies.dots_saveable, 1),
    (jaxqq.checkpoint_policies.dots_with_no_batch_dims_saveable, 1),
    (jax.checkpoint_policies.save_only_these_names("qqmm"), 1),
  ],
)
def test_remat(policy, products):
  """How often the forward product is in a program with its gradient."""
  x, w = data((M, K), (G, N, K))
  block = jax.checkpoint(lambda x, w: jnp.sin(mxfp8(x, w, SIZES)), policy=policy)
  text = str(jax.make_jaxpr(jax.grad(lambda x: block(x, w).sum()))(x))
  assert text.count("quantize=True") == products


def test_scan_over_layers():
  x, w = data((M, K), (2, G, K, K))
  weights = jaxqq.quantize_weight(w, "mxfp8")

  @jax.jit
  def run(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(jaxqq.ragged_qqmm(x, w, SIZES)), None), x, weights)[
      0
    ]

  want = x
  for i in range(2):
    want = jnp.tanh(jax.jit(jaxqq.ragged_qqmm)(want, weights[i], SIZES))
  np.testing.assert_allclose(run(x, weights), want, rtol=1e-5, atol=1e-5)


def test_an_exported_program_takes_any_number_of_rows():
  """For several platforms in one: XLA for CPUs compiles it."""
  w = jaxqq.quantize_weight(data((G, N, K))[0], "mxfp8")
  f = jax.jit(lambda x, sizes: jaxqq.ragged_qqmm(x, w, sizes))
  (rows,) = jax.export.symbolic_shape("m")
  shape = jax.ShapeDtypeStruct((rows, K), jnp.float32)
  platforms = "cpu", "cuda", "tpu"
  exported = jax.export.export(f, platforms=platforms)(shape, jax.ShapeDtypeStruct((G,), jnp.int32))
  program = jax.export.deserialize(exported.serialize())
  for m in (3, 90):
    (x,) = data((m, K))
    sizes = jnp.int32([m // 3, 0, m // 2])
    np.testing.assert_allclose(program.call(x, sizes), f(x, sizes), rtol=1e-5, atol=1e-5)


# Devices


def experts_mesh():
  return jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("packed", [False, True])
def test_experts_split_over_devices(packed):
  """The same result and gradients as on one device; what moves are results, and no weights."""
  groups, local = 16, 2
  x, w = data((40, K), (groups, N, K))
  sizes = jnp.int32([3, 0, 9, 1, 0, 0, 2, 5, 4, 0, 0, 7, 1, 1, 0, 2])
  weight = jaxqq.quantize_weight(w) if packed else w
  wrt = (0,) if packed else (0, 1)

  def loss(x, w, offset=None, total=lambda a: a):
    out = jaxqq.ragged_qqmm(x, w, sizes, group_offset=offset)
    return jnp.sum(jnp.sin(total(out))), out

  def inside(x, w):
    total = functools.partial(jax.lax.psum, axis_name="expert")
    offset = local * jax.lax.axis_index("expert")
    (value, out), gradients = jax.value_and_grad(loss, wrt, has_aux=True)(x, w, offset, total)
    return value, total(out), gradients

  gradients = (P(), P("expert"))[: len(wrt)]
  split = jax.jit(
    jax.shard_map(
      inside,
      mesh=experts_mesh(),
      in_specs=(P(), P("expert")),
      out_specs=(P(), P(), gradients),
    )
  )
  (value, out), want = jax.jit(jax.value_and_grad(loss, wrt, has_aux=True))(x, weight)
  got = split(x, weight)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((value, out, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  moved = collectives(split.lower(x, weight).compile())
  assert moved and set(moved) == {("all-reduce", "f32")}


@pytest.mark.parametrize(
  ("of_x", "of_w"), [(P("expert"), P()), (P(), P(None, "expert")), (P(), P("expert"))]
)
def test_automatic_axes_are_split_by_xla(of_x, of_w):
  x, w = data((16, K), (8, N, K))
  sizes = jnp.int32([3, 0, 4, 1, 0, 2, 2, 1])
  f = jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(mxfp8(x, w, sizes))), (0, 1)))
  placed = (
    jax.device_put(a, NamedSharding(experts_mesh(), spec)) for a, spec in ((x, of_x), (w, of_w))
  )
  for a, b in zip(jax.tree.leaves(f(*placed)), jax.tree.leaves(f(x, w)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
