"""The product split over eight devices: the same numbers, and no more moved than the rule says."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from tests import oracle
from tests.test_product import amax
from tests.test_transforms import BACKWARDS, MODES, arguments, data

CLOSE = {"rtol": 1e-5, "atol": 1e-4}
# name: x (M, K), w (N, K), output asked for (None: XLA's choice)
SPLITS = {
  "column": (P("data"), P("tensor"), None),
  "row": (P("data", "tensor"), P(None, "tensor"), None),
  "row, all axes": (P(None, ("data", "tensor")), P(None, ("data", "tensor")), None),
  "row, output split on n": (P(None, "tensor"), P(None, "tensor"), P(None, "tensor")),
  "row, output split on m": (P(None, "tensor"), P(None, "tensor"), P("tensor")),
  "rows of w": (P("data"), P("data"), P("data")),
  "columns of w": (P("data"), P(None, "data"), P("data")),
  "x on k only": (P(None, "tensor"), P(), None),
  "w on k only": (P(), P(None, "tensor"), None),
  "different axes on k": (P(None, "data"), P(None, "tensor"), None),
  "same axis on m and n": (P("tensor"), P("tensor"), None),
  "nothing": (P(), P(), P("data", "tensor")),
}


@functools.cache
def mesh():
  return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def place(a, spec):
  return jax.device_put(a, NamedSharding(mesh(), spec))


def compiled(f, split, x, args):
  x_spec, w_spec, out_spec = SPLITS[split]
  placed = place(x, x_spec), *(place(a, w_spec) for a in args)
  options = {} if out_spec is None else {"out_shardings": NamedSharding(mesh(), out_spec)}
  return jax.jit(f, **options).lower(*placed).compile(), placed


def collectives(executable):
  """[(operation, type)] of every collective in the compiled text."""
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  found = re.findall(rf"= (\w+)\[[^=]* ({kinds})(?:-start)?\(", executable.as_text())
  return sorted((kind, dtype) for dtype, kind in found)


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", SPLITS)
def test_forward(split, mode, packed):
  x, w = data((16, 512), (24, 512))
  args = arguments(w, mode, packed)
  f = functools.partial(jaxqq.qqmm, mode=mode)
  executable, placed = compiled(f, split, x, args)
  np.testing.assert_allclose(executable(*placed), f(x, *args), **CLOSE)


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
@pytest.mark.parametrize("mode", MODES)
def test_what_moves(mode, packed):
  x, w = data((16, 512), (24, 512))
  args = arguments(w, mode, packed)
  f = functools.partial(jaxqq.qqmm, mode=mode)
  moved = {split: collectives(compiled(f, split, x, args)[0]) for split in SPLITS}
  assert moved["column"] == []
  assert moved["row"] == moved["row, all axes"] == [("all-reduce", "f32")]
  assert moved["row, output split on n"] == [("reduce-scatter", "f32")]
  assert moved["row, output split on m"] == [("reduce-scatter", "f32")]
  gathered = [("all-gather", "u32"), ("all-gather", "u8")] if packed else [("all-gather", "f32")]
  assert moved["rows of w"] == moved["columns of w"] == gathered


@pytest.mark.parametrize("mode", MODES)
def test_row_parallel_sums_in_float32_and_rounds_once(mode):
  rng = np.random.default_rng(40)
  x, w = (oracle.with_outliers(rng, shape, "float32") / 64 for shape in ((16, 1024), (24, 1024)))
  x = x.astype(jnp.bfloat16)
  f = functools.partial(jaxqq.qqmm, mode=mode)
  executable, placed = compiled(f, "row, all axes", x, (w,))
  exact, mag = oracle.product(oracle.round_trip(x, mode), oracle.round_trip(w, mode))
  oracle.assert_within_bound(np.asarray(executable(*placed)), exact, mag, highest=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_split_that_would_cut_a_group_is_gathered(mode):
  """K is 3 groups, split in two."""
  k = 3 * oracle.MODES[mode].group
  x, w = data((8, 2 * k), (16, 2 * k))
  x, w = x[:, ::2], w[:, ::2]
  f = functools.partial(jaxqq.qqmm, mode=mode)
  executable, placed = compiled(f, "row", x, (w,))
  np.testing.assert_allclose(executable(*placed), f(x, w), **CLOSE)
  assert "all-reduce" not in {kind for kind, _ in collectives(executable)}


@pytest.mark.parametrize("shape", [(8, 8, 32), (4, 8, 64), (8, 0, 64), (8, 8, 0)], ids=str)
def test_small_and_empty(shape):
  m, n, k = shape
  x, w = data((m, k), (n, k))
  f = functools.partial(jaxqq.qqmm, mode="mxfp8")
  splits = ["column", "row"]
  if 0 not in shape:  # JAX 0.10.2 cannot read an empty array whose sharding was asked for
    splits += ["rows of w", "nothing"]
  for split in splits:
    executable, placed = compiled(f, split, x, (w,))
    np.testing.assert_allclose(executable(*placed), f(x, w), **CLOSE)


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["column", "row", "rows of w", "columns of w"])
def test_backward(split, mode, backward, packed):
  x, w, g = data((128, 256), (128, 256), (128, 128))
  args = arguments(w, mode, packed)
  wrt = (0,) if packed else (0, 1)

  def gradients(x, *args):
    loss = lambda *a: jnp.vdot(g, jaxqq.qqmm(*a, mode=mode, backward=backward))  # noqa: E731
    return jax.grad(loss, argnums=wrt)(x, *args)

  x_spec, w_spec, _ = SPLITS[split]
  placed = place(x, x_spec), *(place(a, w_spec) for a in args)
  for got, want in zip(jax.jit(gradients)(*placed), gradients(x, *args), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("split", ["column", "row", "rows of w"])
def test_global_scales_are_the_whole_tensors(split):
  """In the quantized backward, g's amax too."""
  x, w, g = data((128, 256), (128, 256), (128, 128))
  scales = {"global_scale_x": amax(x), "global_scale_w": amax(w)}

  def gradients(x, w):
    loss = lambda x, w: jnp.vdot(g, jaxqq.qqmm(x, w, **scales, backward="quantized"))  # noqa: E731
    return jax.grad(loss, argnums=(0, 1))(x, w)

  x_spec, w_spec, _ = SPLITS[split]
  placed = place(x, x_spec), place(w, w_spec)
  for got, want in zip(jax.jit(gradients)(*placed), gradients(x, w), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
def test_batch_axes(packed):
  """A stack of products split on the stack moves nothing; vmap over it is the same."""
  x, w = data((8, 16, 64), (8, 32, 64))
  args = arguments(w, "nvfp4", packed)
  spec = P(("data", "tensor"))
  placed = place(x, spec), *(place(a, spec) for a in args)
  for f in (jaxqq.qqmm, jax.vmap(jaxqq.qqmm)):
    executable = jax.jit(f).lower(*placed).compile()
    assert collectives(executable) == []
    np.testing.assert_allclose(executable(*placed), jaxqq.qqmm(x, *args), **CLOSE)
  # x with a batch axis, w without: rows of x split, w on every device.
  placed = place(x, P("data")), *(place(a[0], P("tensor")) for a in args)
  executable = jax.jit(jaxqq.qqmm).lower(*placed).compile()
  assert collectives(executable) == []
  np.testing.assert_allclose(executable(*placed), jaxqq.qqmm(x, *(a[0] for a in args)), **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_inside_of_scan_and_with_collectives_of_others(mode):
  x, w = data((32, 64), (3, 64, 64))

  def layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(jaxqq.qqmm(x, w, mode=mode)), None), x, w)[0]

  placed = place(x, P("data")), place(w, P(None, "tensor"))
  np.testing.assert_allclose(jax.jit(layers)(*placed), layers(x, w), **CLOSE)


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("spec", [P("data"), P(None, "tensor"), P("data", "tensor")], ids=str)
def test_quantize_and_dequantize(spec, mode):
  (w,) = data((16, 256))
  want = jaxqq.quantize(w, mode=mode)
  f = jax.jit(functools.partial(jaxqq.quantize, mode=mode))
  executable = f.lower(place(w, spec)).compile()
  got = executable(place(w, spec))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
  assert collectives(executable) == []
  back = jax.jit(functools.partial(jaxqq.dequantize, mode=mode))
  executable = back.lower(*(place(a, spec) for a in want)).compile()
  assert collectives(executable) == []
  np.testing.assert_array_equal(
    np.asarray(executable(*(place(a, spec) for a in want)), np.float32),
    np.asarray(jaxqq.dequantize(*want, mode=mode), np.float32),
  )
