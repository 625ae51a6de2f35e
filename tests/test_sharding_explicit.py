"""Meshes of explicit axes: shardings in the types, in the product and in both backward passes."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from tests.support.operands import BACKWARDS, KINDS, Product, amax, arguments, data
from tests.support.sharding import (
  EACH,
  GATHERED,
  GRADIENTS_CLOSE,
  QUICK,
  REDUCED,
  collectives,
  explicit_mesh,
  mesh,
  place_explicit,
  sharding_error,
)

SPLITS = {
  "column": (P("data"), P("tensor")),
  "columns of w": (P("data"), P(None, "data")),
  "x on k only": (P("data", "tensor"), P()),
  "w on k only": (P("data"), P(None, "tensor")),
  "nothing": (P(), P()),
}


def gradients_of(kind, backward, g, packed, **scales):
  def gradients(x, *args):
    product = functools.partial(kind, backward=backward, **scales)
    pull_args = (x,) if packed else (x, *args)
    fixed = args if packed else ()
    out, pull = jax.vjp(lambda x, *w: product(x, *w, *fixed), *pull_args)
    sharding = jax.typeof(out).sharding
    return out, *pull(g if sharding.mesh.empty else jax.sharding.reshard(g, sharding))

  return gradients


@functools.cache
def case(product, backward, packed):
  x, w, g = data((128, 256), (64, 256), (128, 64))
  args = arguments(w, product.mode, packed)
  f = gradients_of(product, backward, g, packed)
  return (x, *args), f, jax.jit(f)(x, *args)


def table():
  """Every split, packed and not, the modes and backwards in turn."""
  for i, split in enumerate(SPLITS):
    for packed in (False, True):
      kind, backward = KINDS[(i + 3 * packed) % len(KINDS)]
      yield pytest.param(split, kind, backward, packed, id=f"{split}-{kind}-{backward}-{packed}")


@QUICK
@pytest.mark.parametrize(("split", "product", "backward", "packed"), list(table()))
def test_product_and_gradients(split, product, backward, packed):
  """Gradients are split as their operands, the product as jnp.einsum's, and little moves."""
  (x, *args), f, want = case(product, backward, packed)
  x_spec, w_spec = SPLITS[split]
  placed = place_explicit(x, x_spec), *(place_explicit(a, w_spec) for a in args)
  # A mesh that is set, or only in the arrays.
  with jax.set_mesh(explicit_mesh()) if split != "w on k only" else contextlib.nullcontext():
    executable = jax.jit(f).lower(*placed).compile()
    got = executable(*placed)
    einsum = jax.eval_shape(
      functools.partial(jnp.einsum, "mk,nk->mn"),
      placed[0],
      place_explicit(jnp.zeros((64, 256)), w_spec),
    )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, **GRADIENTS_CLOSE)
  assert got[0].sharding.spec == einsum.sharding.spec
  for gradient, operand in zip(got[1:], placed[:1] if packed else placed, strict=True):
    assert gradient.sharding.is_equivalent_to(operand.sharding, 2)
  moved = collectives(executable)
  if (product.mode, backward) == ("nvfp4", "quantized"):  # amaxes, a number each
    moved = [one for one in moved if one != ("all-reduce", "s32")]
  if split == "columns of w" and packed:
    assert moved == GATHERED[True]
  if split in ("column", "x on k only") and packed:
    assert moved == REDUCED
  if split == "nothing":
    assert moved == []


@QUICK
@EACH
def test_k_split_on_both_sides(mode, packed):
  """As ambiguous as for jnp.einsum; under auto_axes it is told how the output is split."""
  x, w, g = data((16, 256), (32, 256), (16, 32))
  args = arguments(w, mode, packed)
  placed = (
    place_explicit(x, P("data", "tensor")),
    *(place_explicit(a, P(None, "tensor")) for a in args),
  )
  f = functools.partial(jaxqq.qqmm, mode=mode)
  with jax.set_mesh(explicit_mesh()):
    with pytest.raises(sharding_error(), match="qqmm: x and w are both split along K"):
      f(*placed)
    with pytest.raises(sharding_error()):
      jnp.einsum("mk,nk->mn", placed[0], place_explicit(w, P(None, "tensor")))
    product = jax.jit(jax.sharding.auto_axes(f, out_sharding=P("data")))
    executable = product.lower(*placed).compile()
    assert collectives(executable) == REDUCED
    out = executable(*placed)
    assert out.sharding.spec == P("data", None)
    np.testing.assert_allclose(out, f(x, *args), **GRADIENTS_CLOSE)
    loss = lambda x, *w: jnp.sum(jax.sharding.reshard(g, P("data")) * product(x, *w))  # noqa: E731
    dx = jax.jit(jax.grad(loss))(*placed)
    assert dx.sharding.spec == P("data", "tensor")
  want = jax.jit(jax.grad(lambda x: jnp.vdot(g, f(x, *args))))(x)
  np.testing.assert_allclose(dx, want, **GRADIENTS_CLOSE)


def test_what_einsum_refuses_is_refused_in_a_sentence():
  x, w = data((16, 64), (32, 64))
  with pytest.raises(sharding_error(), match="qqmm: two axes of the output would be split over"):
    jaxqq.qqmm(place_explicit(x, P("data")), place_explicit(w, P("data")))
  x, w = data((8, 16, 64), (8, 32, 64))
  with pytest.raises(sharding_error(), match="qqmm: a batch axis is split over 'data' in one"):
    jaxqq.qqmm(place_explicit(x, P("data")), place_explicit(w, P("tensor")))


@QUICK
@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
def test_batch_axes_and_vmap(packed):
  x, w = data((8, 16, 64), (8, 32, 64))
  args = arguments(w, "nvfp4", packed)
  want = jaxqq.qqmm(x, *args)
  with jax.set_mesh(explicit_mesh()):
    placed = place_explicit(x, P("data")), *(place_explicit(a, P("data", "tensor")) for a in args)
    for f in (jaxqq.qqmm, jax.vmap(jaxqq.qqmm)):
      executable = jax.jit(f).lower(*placed).compile()
      assert collectives(executable) == []
      out = executable(*placed)
      assert out.sharding.spec == P("data", None, "tensor")
      np.testing.assert_allclose(out, want, **GRADIENTS_CLOSE)
    # Rows of every example against one w: dw sums over a split batch axis.
    shared = [place_explicit(a[0], P("tensor")) for a in args]
    out = jax.jit(jaxqq.qqmm)(placed[0], *shared)
    assert out.sharding.spec == P("data", None, "tensor")
  np.testing.assert_allclose(out, jaxqq.qqmm(x, *(a[0] for a in args)), **GRADIENTS_CLOSE)


@QUICK
@pytest.mark.parametrize("backward", BACKWARDS)
def test_dw_sums_over_a_split_batch_axis(backward):
  x, w, g = data((8, 32, 64), (32, 64), (8, 32, 32))
  f = gradients_of(Product("mxfp8"), backward, g, False)
  want = jax.jit(f)(x, w)
  with jax.set_mesh(explicit_mesh()):
    got = jax.jit(f)(place_explicit(x, P("data")), place_explicit(w, P("tensor")))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, **GRADIENTS_CLOSE)
  assert got[2].sharding.spec == P("tensor", None)


@QUICK
def test_global_scales_and_second_derivatives():
  x, w, g = data((128, 256), (64, 256), (128, 64))
  scales = {"global_scale_x": amax(x), "global_scale_w": amax(w)}
  placed = place_explicit(x, P("data")), place_explicit(w, P("tensor"))
  f = gradients_of(Product("nvfp4"), "quantized", g, False, **scales)

  def hvp(x, w):
    loss = lambda w: jnp.sum(jaxqq.qqmm(x, w, **scales) ** 2)  # noqa: E731
    return jax.jvp(jax.grad(loss), (w,), (w,))

  for function in (f, hvp):
    want = jax.jit(function)(x, w)
    with jax.set_mesh(explicit_mesh()):
      got = jax.jit(function)(*placed)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2)


@QUICK
def test_some_axes_explicit_and_others_not():
  """data explicit and tensor XLA's, and the other way round."""
  mode = "mxfp8"
  x, w = data((16, 256), (32, 256))
  for kinds in ((AxisType.Explicit, AxisType.Auto), (AxisType.Auto, AxisType.Explicit)):
    with jax.set_mesh(mesh(*kinds)):
      put = lambda a, spec: jax.device_put(a, NamedSharding(mesh(*kinds), spec))  # noqa: B023, E731
      out = jax.jit(functools.partial(jaxqq.qqmm, mode=mode))(
        put(x, P("data")), put(w, P("tensor"))
      )
    np.testing.assert_allclose(out, jaxqq.qqmm(x, w, mode=mode), **GRADIENTS_CLOSE)


@QUICK
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_that_is_set_for_the_program(kind):
  """The rule's own functions see none of it."""
  x, w = data((16, 256), (32, 256))
  m = mesh(kind, kind)
  with jax.set_mesh(m):
    placed = [
      jax.device_put(a, NamedSharding(m, P(axis))) for a, axis in ((x, "data"), (w, "tensor"))
    ]
    out = jax.jit(jaxqq.qqmm)(*placed)
    packed, scales = jax.jit(jaxqq.quantize)(placed[1])
    back = jax.jit(jaxqq.dequantize)(packed, scales)
  np.testing.assert_allclose(out, jaxqq.qqmm(x, w), **GRADIENTS_CLOSE)
  np.testing.assert_array_equal(packed, jaxqq.quantize(w)[0])
  for a in (packed, back):
    assert a.sharding.is_equivalent_to(placed[1].sharding, 2)


@QUICK
@pytest.mark.parametrize(
  ("shape", "spec", "axis"),
  [
    ((64,), P(("data", "tensor")), -1),  # 8 numbers a device: a group is 16
    ((32, 64), P("data", "tensor"), -1),
    ((32, 64), P("tensor", "data"), -2),  # 8 of 32
    ((2, 64, 32), P(None, "tensor", "data"), -2),
  ],
  ids=str,
)
def test_conversions_of_what_is_split_along_the_groups(shape, spec, axis):
  """Also where a split would cut a group, in a mesh that is set."""
  (w,) = data(shape)
  want = jaxqq.quantize(w, axis=axis)
  back = jaxqq.dequantize(*want)
  with jax.set_mesh(explicit_mesh()):
    placed = place_explicit(w, spec)
    for quantize in (jaxqq.quantize, jax.jit(jaxqq.quantize, static_argnames="axis")):
      got = quantize(placed, axis=axis)
      jax.tree.map(np.testing.assert_array_equal, got, want)
      np.testing.assert_array_equal(jaxqq.dequantize(*got), back)
      np.testing.assert_array_equal(jax.jit(jaxqq.dequantize)(*got), back)
