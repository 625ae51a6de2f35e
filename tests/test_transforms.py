"""Products under JAX's transformations, crossed with modes and with packed and unpacked w."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from jaxqq import _qqmm
from tests.support.jaxprs import count
from tests.support.operands import BACKWARDS, KINDS, MODES, PRODUCTS, amax, arguments, data

CLOSE = {"rtol": 2e-6, "atol": 2e-5}


def equations(f, *args):
  jaxpr = jax.make_jaxpr(f)(*args).jaxpr
  return {name: count(jaxpr, name) for name in ("qqmm", "scan", "while")}


OTHERS = [(PRODUCTS[3], True), (PRODUCTS[4], False)]  # x as it is
each = functools.partial(
  pytest.mark.parametrize,
  ("product", "packed"),
  [*((product, packed) for product in PRODUCTS[:2] for packed in (False, True)), *OTHERS],
  ids=str,
)


@each()
def test_one_equation(product, packed):
  x, w = data((5, 64), (7, 64))
  args = arguments(w, product.mode, packed)
  f = product
  assert equations(f, x, *args) == {"qqmm": 1, "scan": 0, "while": 0}
  gradient = jax.grad(lambda x, *a: jnp.sum(f(x, *a) ** 2))
  assert equations(gradient, x, *args)["qqmm"] == 1
  assert equations(jax.jit(gradient), x, *args)["qqmm"] == 1
  batched = jax.vmap(f, in_axes=(0, *(None for _ in args)))
  assert equations(batched, x[None], *args) == {"qqmm": 1, "scan": 0, "while": 0}


def test_the_quantized_backward_is_two_more_equations():
  x, w = data((5, 64), (7, 64))
  loss = lambda x, w: jnp.sum(jaxqq.qqmm(x, w, backward="quantized") ** 2)  # noqa: E731
  assert equations(jax.grad(loss, argnums=(0, 1)), x, w)["qqmm"] == 3


@pytest.mark.usefixtures("quick_compiles")
@each()
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("batched", ["x", "w", "both"])
def test_vmap(product, packed, batched, axis):
  x, w = data((3, 5, 64) if batched != "w" else (5, 64), (3, 7, 64) if batched != "x" else (7, 64))
  args = arguments(w, product.mode, packed)
  f = product
  want = np.stack(
    [
      f(x[i] if batched != "w" else x, *(a[i] if batched != "x" else a for a in args))
      for i in range(3)
    ]
  )
  x_axis, w_axis = (axis if batched != "w" else None), (axis if batched != "x" else None)
  move = lambda a, at: a if at is None else jnp.moveaxis(a, 0, at)  # noqa: E731
  moved = (move(x, x_axis), *(move(a, w_axis) for a in args))
  mapped = jax.vmap(f, in_axes=(x_axis, *(w_axis for _ in args)))
  np.testing.assert_allclose(mapped(*moved), want, **CLOSE)
  np.testing.assert_allclose(jax.jit(mapped)(*moved), want, **CLOSE)
  out_last = jax.vmap(f, in_axes=(x_axis, *(w_axis for _ in args)), out_axes=-1)(*moved)
  np.testing.assert_allclose(jnp.moveaxis(out_last, -1, 0), want, **CLOSE)
  assert equations(mapped, *moved) == {"qqmm": 1, "scan": 0, "while": 0}


@each()
def test_nested_vmap(product, packed):
  """An outer axis of w, an inner one of x: every pair."""
  x, w = data((2, 5, 64), (3, 7, 64))
  args = arguments(w, product.mode, packed)
  f = product
  inner = jax.vmap(f, in_axes=(0, *(None for _ in args)))
  mapped = jax.vmap(inner, in_axes=(None, *(0 for _ in args)))
  want = [[f(x[j], *(a[i] for a in args)) for j in range(2)] for i in range(3)]
  np.testing.assert_allclose(mapped(x, *args), np.array(want), **CLOSE)
  assert equations(mapped, x, *args) == {"qqmm": 1, "scan": 0, "while": 0}


def of_scales(args):
  return jaxqq.qqmm(**args)


@functools.partial(jax.jit, static_argnums=0)
def with_derivatives(f, args):
  """The product, a tangent of it, and the gradient of its sum of squares."""

  def product(x):
    return f({**args, "x": x})

  x = args["x"]
  out, tangent = jax.jvp(product, (x,), (jnp.ones_like(x),))
  return out, tangent, jax.grad(lambda x: jnp.sum(product(x) ** 2))(x)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("batched", "packed"),
  [
    ("global_scale_x", False),
    ("global_scale_w", False),
    ("global_scale_x global_scale_w", False),
    ("x w global_scale_x global_scale_w", False),
    ("global_scale_x", True),
    ("global_scale_w", True),
    ("scales", True),
    ("w scales global_scale_w", True),
    ("x w scales global_scale_x global_scale_w", True),
  ],
)
def test_vmap_over_scales(batched, packed):
  """The rows are of one program in all cases."""
  x, w = data((3, 5, 64), (3, 7, 64))
  operands = {"x": x, "w": w}
  if packed:
    parts = jaxqq.quantize(w, global_scale=jnp.float32(5))
    operands["w"], operands["scales"] = map(np.asarray, parts)
  operands["global_scale_x"] = np.float32([2.0, 4.0, 8.0])
  operands["global_scale_w"] = np.float32([3.0, 6.0, 5.0])
  args = {name: a if name in batched.split() else a[0] for name, a in operands.items()}
  axes = {name: 0 if name in batched.split() else None for name in operands}
  mapped = jax.vmap(of_scales, in_axes=(axes,))
  assert equations(mapped, args) == {"qqmm": 1, "scan": 0, "while": 0}
  out, tangent, gradient = with_derivatives(mapped, args)
  rows = [
    with_derivatives(of_scales, {n: a if axes[n] is None else a[i] for n, a in args.items()})
    for i in range(3)
  ]
  outs, tangents, gradients = (np.stack(each) for each in zip(*rows, strict=True))
  np.testing.assert_allclose(out, outs, **CLOSE)
  np.testing.assert_allclose(tangent, tangents, **CLOSE)
  # The derivative of the batched product is the sum of the derivatives of its rows.
  want = gradients.sum(0) if axes["x"] is None else gradients
  np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("mode", MODES)
def test_per_example_gradients(mode, backward):
  x, w, g = data((4, 5, 64), (7, 64), (4, 5, 7))

  def loss(w, x, g):
    return jnp.vdot(g, jaxqq.qqmm(x, w, mode=mode, backward=backward))

  per_example = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))
  one = jax.jit(jax.grad(loss))
  want = [one(w, x[i], g[i]) for i in range(4)]
  np.testing.assert_allclose(jax.jit(per_example)(w, x, g), np.stack(want), **CLOSE)
  n = 2 if backward == "quantized" else 1
  assert equations(per_example, w, x, g) == {"qqmm": n, "scan": 0, "while": 0}


@pytest.mark.parametrize("backward", BACKWARDS)
def test_per_example_gradients_with_global_scales(backward):
  """Each example has scales of its own, and in the quantized backward its own amax of g."""
  x, w, g = data((4, 5, 64), (7, 64), (4, 5, 7))
  x, g = (a * np.float32(4) ** np.arange(4, dtype=np.float32).reshape(4, 1, 1) for a in (x, g))
  sx, sw = np.abs(x).max(axis=(1, 2)), amax(w)

  def loss(w, x, sx, g):
    y = jaxqq.qqmm(x, w, global_scale_x=sx, global_scale_w=sw, backward=backward)
    return jnp.vdot(g, y)

  @jax.jit
  def gradients(w, x, sx, g):
    per_example = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0))(w, x, sx, g)
    # The other order: one gradient of the sum, along whose axis the scales differ.
    return per_example, jax.grad(lambda w: jnp.sum(jax.vmap(loss, (None, 0, 0, 0))(w, x, sx, g)))(w)

  per_example, total = gradients(w, x, sx, g)
  one = jax.jit(jax.grad(loss))
  want = np.stack([one(w, x[i], sx[i], g[i]) for i in range(4)])
  np.testing.assert_allclose(per_example, want, rtol=1e-5, atol=1e-3)
  np.testing.assert_allclose(total, want.sum(0), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("product", "backward"), KINDS, ids=str)
def test_scan_and_remat(product, packed, backward):
  """Stacked layers in a scan, with and without rematerialization, against a Python loop."""
  x, w = data((5, 64), (3, 64, 64))
  w = w / 8
  args = arguments(w, product.mode, packed)

  def layer(x, args):
    return jnp.tanh(product(x, *args, backward=backward)), None

  def looped(x, args):
    for i in range(3):
      x, _ = layer(x, tuple(a[i] for a in args))
    return jnp.sum(x**2)

  def scanned(body):
    return lambda x, args: jnp.sum(jax.lax.scan(body, x, args)[0] ** 2)

  wrt = (0,) if packed else (0, 1)
  ways = looped, scanned(layer), scanned(jax.checkpoint(layer))
  all_of_them = jax.jit(lambda *a: [jax.value_and_grad(f, argnums=wrt)(*a) for f in ways])
  want, *others = all_of_them(x, args)
  for got in others:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@each()
def test_eval_shape(product, packed):
  x = jax.ShapeDtypeStruct((2, 5, 64), jnp.bfloat16)
  w = jax.ShapeDtypeStruct((7, 64), jnp.float32)
  args = jax.eval_shape(functools.partial(jaxqq.quantize, mode=product.mode), w) if packed else (w,)
  out = jax.eval_shape(product, x, *args)
  assert out.shape == (2, 5, 7) and out.dtype == jnp.bfloat16
  back = jax.eval_shape(jax.grad(lambda x, *a: product(x, *a).sum().astype(jnp.float32)), x, *args)
  assert back.shape == x.shape and back.dtype == x.dtype


def mesh(*names, kind=AxisType.Auto):
  shape = {1: (8,), 2: (4, 2)}[len(names)]
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


@each()
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_shard_map_over_rows_and_columns(product, packed, jit):
  """Each device multiplies its rows of x with its rows of w; the default checks are on."""
  x, w = data((16, 64), (32, 64))
  args = arguments(w, product.mode, packed)
  f = jax.shard_map(
    product,
    mesh=mesh("data", "tensor"),
    in_specs=(P("data"), *(P("tensor") for _ in args)),
    out_specs=P("data", "tensor"),
  )
  out = (jax.jit(f) if jit else f)(x, *args)
  np.testing.assert_allclose(out, product(x, *args), **CLOSE)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("kind", "backward", "global_scale"),
  [
    *((*kind, False) for kind in KINDS),
    *((PRODUCTS[0], backward, True) for backward in BACKWARDS),
    (PRODUCTS[3], BACKWARDS[0], True),
  ],
  ids=str,
)
def test_shard_map_gradient(kind, backward, global_scale):
  """x split over devices, w on all of them: dw is summed over devices by the check's rule."""
  x, w, g = data((8 * 32, 64), (32, 64), (8 * 32, 32))
  scales = (amax(x), amax(w)) if global_scale else (None, None)

  def product(x, w, *scales):
    names = ("global_scale_x", "global_scale_w")
    return kind(x, w, backward=backward, **dict(zip(names, scales, strict=True)))

  sharded = jax.shard_map(
    product,
    mesh=mesh("data"),
    in_specs=(P("data"), P(), *(P() if s is not None else None for s in scales)),
    out_specs=P("data"),
  )

  def gradients(product, x, w, g):
    out, pullback = jax.vjp(lambda x, w: product(x, w, *scales), x, w)
    return out, *pullback(g)

  def step(x, w, g):  # the gradient inside of shard_map, with a collective around
    loss = lambda w: jax.lax.psum(jnp.vdot(g, product(x, w, *scales)), "data")  # noqa: E731
    return jax.grad(loss)(w)

  inside = jax.shard_map(
    step, mesh=mesh("data"), in_specs=(P("data"), P(), P("data")), out_specs=P()
  )
  both = lambda *a: (gradients(sharded, *a), inside(*a))  # noqa: E731
  eager = (kind.mode, backward, global_scale) == ("mxfp8", "quantized", False)  # one an operation
  (out, *got), dw = both(x, w, g) if eager else jax.jit(both)(x, w, g)
  want, *wants = jax.jit(functools.partial(gradients, product))(x, w, g)
  np.testing.assert_allclose(out, want, **CLOSE)
  if not (global_scale and backward == "quantized"):  # there a shard's amax is its own
    for a, b in zip(got, wants, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(dw, got[1], rtol=1e-5, atol=1e-4)


@each()
def test_split_by_jit(product, packed):
  """Under jit the partitioner may split the operands as it likes; the numbers stay."""
  x, w = data((16, 64), (32, 64))
  args = arguments(w, product.mode, packed)
  m = mesh("data", "tensor")
  place = lambda a, spec: jax.device_put(a, NamedSharding(m, spec))  # noqa: E731
  f = jax.jit(product)
  out = f(place(x, P("data")), *(place(a, P("tensor")) for a in args))
  np.testing.assert_allclose(out, product(x, *args), **CLOSE)


@each()
def test_explicit_mesh(product, packed):
  """In a mesh of explicit axes the output is split as x's rows and w's rows are."""
  x, w = data((16, 64), (32, 64))
  args = arguments(w, product.mode, packed)
  want = product(x, *args)
  with jax.set_mesh(mesh("data", "tensor", kind=AxisType.Explicit)):
    placed = [jax.device_put(x, P("data")), *(jax.device_put(a, P("tensor")) for a in args)]
    out = jax.jit(product)(*placed)
    assert out.sharding.spec == P("data", "tensor")
    np.testing.assert_allclose(out, want, **CLOSE)


@each()
def test_export(product, packed):
  """One artifact for several platforms."""
  x, w = data((5, 64), (7, 64))
  args = (x, *arguments(w, product.mode, packed))
  f = jax.jit(product)
  exported = jax.export.export(f, platforms=("cpu", "cuda"))(*args)
  np.testing.assert_array_equal(exported.call(*args), f(*args))


@each()
def test_with_64_bit_types_enabled(product, packed):
  """Nothing turns into float64 or int64 on the way."""
  x, w = data((5, 64), (7, 64))
  want = product(x, *arguments(w, product.mode, packed))
  with jax.enable_x64(True):
    args = jaxqq.quantize(w, mode=product.mode) if packed else (w,)

    @jax.jit
    def with_gradient(x, *args):
      out, pullback = jax.vjp(lambda x: product(x, *args, backward="quantized"), x)
      return out, *pullback(out)

    got, dx = with_gradient(x, *args)
  np.testing.assert_array_equal(got, want)
  assert got.dtype == dx.dtype == jnp.float32


def test_export_of_a_split_program():
  x, w = data((16, 64), (32, 64))
  m = mesh("data", "tensor")
  placed = [
    jax.device_put(a, NamedSharding(m, P(axis))) for a, axis in ((x, "data"), (w, "tensor"))
  ]
  exported = jax.export.export(jax.jit(jaxqq.qqmm))(*placed)
  np.testing.assert_allclose(exported.call(*placed), jaxqq.qqmm(x, w), **CLOSE)


def test_aot_and_symbolic_batch():
  x, w = data((5, 64), (7, 64))
  compiled = jax.jit(jaxqq.qqmm).lower(x, w).compile()
  np.testing.assert_array_equal(compiled(x, w), jaxqq.qqmm(x, w))
  (batch,) = jax.export.symbolic_shape("b")
  shape = jax.ShapeDtypeStruct((batch, 64), jnp.float32)
  exported = jax.export.export(jax.jit(jaxqq.qqmm))(shape, jax.ShapeDtypeStruct(w.shape, w.dtype))
  np.testing.assert_array_equal(exported.call(x, w), jaxqq.qqmm(x, w))
  np.testing.assert_array_equal(exported.call(x[:2], w), jaxqq.qqmm(x[:2], w))


# jax.checkpoint with a policy


@pytest.mark.parametrize(
  ("policy", "forward", "of_batches"),
  [
    (None, 2, 2),
    (jax.checkpoint_policies.dots_saveable, 2, 2),
    (jaxqq.checkpoint_policies.dots_saveable, 1, 1),
    (jaxqq.checkpoint_policies.checkpoint_dots, 1, 1),
    (jaxqq.checkpoint_policies.dots_with_no_batch_dims_saveable, 1, 2),
    (jax.checkpoint_policies.save_only_these_names("qqmm"), 1, 1),
    (jax.checkpoint_policies.save_only_these_names("dot"), 2, 2),
    (jax.checkpoint_policies.save_any_names_but_these("qqmm"), 2, 2),
  ],
)
def test_policies_save_products(policy, forward, of_batches):
  """How often a product is computed in a gradient: without a policy, once more on the way back."""

  @functools.partial(jax.checkpoint, policy=policy)
  def block(x, w):
    return jnp.sin(jaxqq.qqmm(x, w, mode="mxfp8")).sum()

  x, w = jnp.ones((2, 4, 64)), jnp.ones((8, 64))
  for weight, want in ((w, forward), (jnp.stack([w, w]), of_batches)):
    jaxpr = jax.make_jaxpr(jax.grad(block, argnums=1))(x, weight).jaxpr
    assert count(jaxpr, "qqmm") == want


BY_NAME = jax.checkpoint_policies.save_only_these_names("qqmm")
OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
  names_which_can_be_saved=[],
  names_which_can_be_offloaded=["qqmm"],
  offload_src="device",
  offload_dst="pinned_host",
)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize(
  "product",
  [
    functools.partial(jaxqq.qqmm, mode="mxfp8"),
    functools.partial(jaxqq.qqmm, global_scale_x="row", global_scale_w="amax"),
    lambda x, w, **how: jaxqq.dot_general("mxfp8", **how).einsum("mk,nk->nm", x, w),
  ],
  ids=["qqmm", "by rows", "einsum"],
)
def test_a_product_is_saved_by_its_name(product, backward):
  """In the forward pass, which is once, with the same gradient."""

  def layers(policy):
    @functools.partial(jax.checkpoint, policy=policy)
    def block(x, w):
      return jnp.sin(product(x, w, backward=backward)), None

    return lambda x, w: jnp.sum(jax.lax.scan(block, x, w)[0] ** 2)

  x, w = data((64, 64), (2, 64, 64))

  def gradient(policy):
    return jax.grad(layers(policy), argnums=(0, 1))

  def products(policy):
    return count(jax.make_jaxpr(gradient(policy))(x, w).jaxpr, "qqmm")

  assert products(None) - products(BY_NAME) == 1
  assert products(OFFLOAD) == products(BY_NAME)
  assert "f32<host>[2,64,64]" in str(jax.make_jaxpr(gradient(OFFLOAD))(x, w))


def test_the_name_is_not_in_the_program(monkeypatch):
  x, w = data((3, 5, 64), (7, 64))

  def text():
    product = jax.vmap(lambda x, w: jaxqq.qqmm(x, w, backward="quantized"), (0, None))
    gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), argnums=(0, 1))
    assert count(jax.make_jaxpr(gradient)(x, w).jaxpr, "name") == names
    return jax.jit(gradient).lower(x, w).as_text()

  names = 1
  named = text()
  monkeypatch.setattr(_qqmm, "checkpoint_name", lambda result, name: result)
  names = 0
  assert text() == named


def test_policies_save_dots_as_those_of_jax():
  @functools.partial(jax.checkpoint, policy=jaxqq.checkpoint_policies.dots_saveable)
  def block(x, w):
    return jnp.sin(x @ w).sum()

  jaxpr = jax.make_jaxpr(jax.grad(block, argnums=1))(jnp.ones((2, 64)), jnp.ones((64, 8))).jaxpr
  assert count(jaxpr, "dot_general") == 2  # forward, and dw


@pytest.mark.parametrize("mode", MODES)
def test_checkify_sees_the_nan_of_a_product(mode):
  """One that it makes: an infinity in x, a NaN scale in packed w, and in a gradient."""
  x, w = np.ones((4, 64), np.float32), np.ones((8, 64), np.float32)
  packed, scales = (np.array(a) for a in jaxqq.quantize(w, mode=mode))
  infinite, poisoned = x.copy(), scales.copy()
  infinite[0, 0], poisoned[0, 0] = np.inf, {"nvfp4": 0x7F, "mxfp8": 0xFF}[mode]
  product = functools.partial(jaxqq.qqmm, mode=mode)

  def error_of(f, *args):
    return jax.jit(checkify.checkify(f, errors=checkify.nan_checks))(*args)[0].get()

  assert error_of(product, x, packed, scales) is None
  assert error_of(product, x, w) is None
  assert "nan generated by primitive: qqmm" in error_of(product, infinite, w)
  assert "nan generated by primitive: qqmm" in error_of(product, x, packed, poisoned)
  weights = functools.partial(jaxqq.quantized_matmul, mode=mode)
  assert error_of(weights, x, packed, scales) is None
  assert "nan generated by primitive: qqmm" in error_of(weights, x, packed, poisoned)
  dequantize = functools.partial(jaxqq.dequantize, mode=mode)
  assert "nan generated by primitive: dequantize" in error_of(dequantize, packed, poisoned)
  assert error_of(dequantize, packed, scales) is None
  assert error_of(lambda w: jaxqq.quantize(w, mode=mode), infinite) is None  # codes and bytes
  w[0, 0] = 0
  through = lambda g: jax.vjp(lambda x: product(x, w), x)[1](g)[0]  # noqa: E731
  g = np.full((4, 8), np.inf, np.float32)  # inf * 0
  assert "nan generated by primitive" in error_of(through, g)
