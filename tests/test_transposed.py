"""Operands whose contracted axis comes first: the same product, and no copy in order."""

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
from jaxqq import _kernels, _primitive
from jaxqq._formats import FORMATS
from jaxqq._reference import Operands
from tests.support import oracle
from tests.support.interpreter import interpreted
from tests.support.operands import BACKWARDS, MODES, amax, data, quantized_product, vjp
from tests.support.programs import lowered_for_cuda
from tests.support.sharding import CLOSE, GRADIENTS_CLOSE, MOVED, QUICK, SPLITS, collectives, mesh

SOME = (("x",), ("w",), ("x", "w"))
EACH = pytest.mark.parametrize("transposed", SOME, ids="".join)
kernels = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 (Mosaic GPU's warpgroups)"
)


def qqmm(x, w, *scales, transposed, mode="mxfp8", backward="straight_through"):
  """The product of operands that lie as `transposed` says."""
  return _primitive.qqmm(
    Operands(x, w, None, *(scales or (None, None)), transposed),
    mode=mode,
    out_dtype=np.dtype(x.dtype),
    backward=backward,
    precision=None,
  )


def lay(transposed, x, w):
  return tuple(a.swapaxes(-1, -2) if name in transposed else a for name, a in (("x", x), ("w", w)))


def of_rows(transposed, **params):
  """The same as a function of x (..., m, k) and w (..., n, k)."""
  return lambda x, w, *s: qqmm(*lay(transposed, x, w), *s, transposed=transposed, **params)


@EACH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("x_batch", "w_batch"), [((), ()), ((2, 3), (3,)), ((), (4,))], ids=str)
def test_product(x_batch, w_batch, mode, transposed):
  x, w = data((*x_batch, 33, 96), (*w_batch, 40, 96))
  out = np.asarray(jax.jit(of_rows(transposed, mode=mode))(x, w))
  hats = (oracle.round_trip(np.asarray(a), mode) for a in (x, w))
  oracle.assert_within_bound(out, *oracle.product(*hats))


@EACH
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode, backward, transposed):
  """With global scales in nvfp4; m and n are no whole groups."""
  x, w, g = map(np.asarray, data((33, 96), (40, 96), (33, 40)))
  scales = (amax(x), amax(w)) if mode == "nvfp4" else ()
  f = of_rows(transposed, mode=mode, backward=backward)
  dx, dw = vjp(lambda x, w: f(x, w, *map(jnp.asarray, scales)), x, w, g=g)
  wants = g.astype(np.float64) @ w, g.T.astype(np.float64) @ x
  if backward == "quantized":
    of_x, of_w, of_g = (*scales, amax(g)) if scales else (None,) * 3
    wants = (
      quantized_product(g, w.T, mode, of_g, of_w),
      quantized_product(g.T, x.T, mode, of_g, of_x),
    )
  for grad, want in zip((dx, dw), wants, strict=True):
    assert oracle.relative_error(grad, want) <= 1e-6


BATCHES = [((2, 3), ()), ((), (4,)), ((3,), (2, 1)), ((2, 3), (2, 3))]


@functools.cache
def gradients_of_batches(backward, transposed):
  """{batches of x and w: dx, dw}, by one program; with `transposed` None, qqmm's own."""
  f = functools.partial(jaxqq.qqmm, mode="mxfp8", backward=backward)
  f = f if transposed is None else of_rows(transposed, backward=backward)
  operands = [
    data((*x_batch, 32, 96), (*w_batch, 64, 96), (*np.broadcast_shapes(x_batch, w_batch), 32, 64))
    for x_batch, w_batch in BATCHES
  ]
  pull = jax.jit(lambda operands: [jax.vjp(f, x, w)[1](g) for x, w, g in operands])
  return dict(zip(BATCHES, jax.tree.map(np.asarray, pull(operands)), strict=True))


@pytest.mark.usefixtures("quick_compiles")
@EACH
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize(("x_batch", "w_batch"), BATCHES, ids=str)
def test_gradients_of_batches(x_batch, w_batch, backward, transposed):
  got, want = (gradients_of_batches(backward, t)[x_batch, w_batch] for t in (transposed, None))
  for a, b in zip(got, want, strict=True):
    assert oracle.relative_error(a, b) <= 1e-6


@functools.cache
def transformed(backward, transposed):
  """vmap, forward mode, and second derivatives of each kind; with `transposed` None, of qqmm."""
  product = functools.partial(jaxqq.qqmm, mode="mxfp8", backward=backward)
  if transposed is not None:
    product = of_rows(transposed, backward=backward)

  @jax.jit
  def results(x, w, dx, dw, xs, ws):
    def loss(x, w):
      return jnp.sum(jnp.sin(product(x, w)))

    def dot(x, w):
      gx, gw = jax.grad(loss, (0, 1))(x, w)
      return jnp.vdot(gx, dx) + jnp.vdot(gw, dw)

    out = [jax.vmap(product, (0, None))(xs, w), jax.vmap(product, (0, 2), 1)(xs, ws)]
    out.append(jax.jvp(product, (x, w), (dx, dw))[1])
    out += jax.jvp(jax.grad(loss, (0, 1)), (x, w), (dx, dw))[1]
    if backward == BACKWARDS[0]:  # else the order of sums may turn a rounding
      out += jax.grad(dot, (0, 1))(x, w)
    return out

  shapes = [(16, 64), (32, 64)] * 2
  return results(*data(*shapes), *data((3, 16, 64), (32, 64, 3)))


@pytest.mark.usefixtures("quick_compiles")
@EACH
@pytest.mark.parametrize("backward", BACKWARDS)
def test_transforms(backward, transposed):
  for got, want in zip(transformed(backward, transposed), transformed(backward, None), strict=True):
    assert oracle.relative_error(got, want) <= 1e-6


# Split over devices


def placed(a, spec, is_transposed, on):
  """`a`, or its transpose, with the axes of `a` split as spec says."""
  spec = (*spec, None, None)[:2]
  spec, a = (spec[::-1], a.T) if is_transposed else (spec, a)
  return jax.device_put(a, NamedSharding(on, P(*spec)))


@QUICK
@EACH
@pytest.mark.parametrize("split", MOVED)
def test_split_as_if_in_order(split, transposed):
  x, w = data((128, 256), (64, 256))
  x_spec, w_spec, out_spec = SPLITS[split]
  args = [
    placed(a, spec, name in transposed, mesh())
    for name, a, spec in (("x", x, x_spec), ("w", w, w_spec))
  ]
  options = {} if out_spec is None else {"out_shardings": NamedSharding(mesh(), out_spec)}
  f = functools.partial(qqmm, transposed=transposed)
  program = jax.jit(f, **options).lower(*args)
  executable = program.compile()
  np.testing.assert_allclose(executable(*args), jaxqq.qqmm(x, w, mode="mxfp8"), **CLOSE)
  moved = MOVED[split]
  assert collectives(executable) == (moved[False] if isinstance(moved, dict) else moved)
  # The program's pointer to the rule may be that of another one: its name tells them apart.
  name = "_".join(("qqmm_mxfp8_straight_through_default", *(f"{a}_transposed" for a in transposed)))
  assert f"@{name}(" in program.as_text()


@functools.cache
def product_and_gradients(transposed, backward):
  """Of x, w, g."""

  @jax.jit
  def gradients(x, w, g):
    f = functools.partial(qqmm, transposed=transposed, backward=backward)
    out, pull = jax.vjp(f, x, w)
    return out, *pull(g)

  return gradients


@QUICK
@EACH
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_split_gradients(backward, kind, transposed):
  x, w, g = data((128, 256), (64, 256), (128, 64))
  want = [np.asarray(a) for a in product_and_gradients((), backward)(x, w, g)]
  want = want[0], *lay(transposed, *want[1:])
  on = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)
  args = [
    (
      placed(x, x_spec, "x" in transposed, on),
      placed(w, w_spec, "w" in transposed, on),
      placed(g, (x_spec[0], (*w_spec, None)[0]), False, on),
    )
    for x_spec, w_spec in ((P("data"), P("tensor")), (P("data", "tensor"), P()))
  ]
  f = product_and_gradients(transposed, backward)
  for got in jax.jit(lambda args: [f(*own) for own in args])(args):
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, **GRADIENTS_CLOSE)


# The kernels


@pytest.mark.usefixtures("quick_compiles")
@kernels
@EACH
@pytest.mark.parametrize(("x_batch", "w_batch"), [((), ()), ((2,), ()), ((), (2,))], ids=str)
@pytest.mark.parametrize("which", ["exact nvfp4", "exact mxfp8", "fp8 mxfp8"])
def test_kernels_in_the_interpreter(which, x_batch, w_batch, transposed):
  """k is no whole step of theirs."""
  name, mode = which.split()
  precision = jax.lax.Precision.HIGHEST if which == "exact mxfp8" else None
  x, w = (a.astype(jnp.bfloat16) for a in data((*x_batch, 40, 96), (*w_batch, 72, 96)))

  def run(x, w):
    operands = Operands(x, w, transposed=transposed)
    problem = _kernels.Problem.of(operands, FORMATS[mode], np.dtype(jnp.bfloat16), precision)
    plan = _kernels.plan(problem, _kernels.device_of("cuda"))
    assert plan.name == f"hopper_{name}"
    return plan.run(operands)

  with interpreted():
    out = np.asarray(jax.jit(run)(*lay(transposed, x, w)))
  hats = (oracle.round_trip(np.asarray(a), mode) for a in (x, w))
  oracle.assert_within_bound(out, *oracle.product(*hats))


def lowered(f, *shapes):
  return lowered_for_cuda(f, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))


def transposes(text):
  """The types of what is transposed."""
  return re.findall(r"stablehlo\.transpose.* : \(tensor<([^>]*)>", text)


def kernels_that_read(text, shape):
  """How many have a matrix of that shape for their first operand."""
  first = re.findall(r"custom_call @mosaic_gpu_v2\(.* : \(tensor<([^>]*)x\w+>", text)
  return first.count("x".join(map(str, shape)))


def gradients(product):
  """x, w, g -> dx and dw, but not the product, which nothing uses then."""
  return lambda x, w, g: jax.vjp(product, x, w)[1](g)


DENSE = (((1,), (0,)), ((), ()))
M, N, K = 4096, 384, 1024
# How many kernels read a matrix down its columns: in fp8, one finds the rows' scales before.
READ_BY = {"nvfp4": 1, "mxfp8": 2}


@kernels
@pytest.mark.parametrize(
  ("mode", "scale"), [("nvfp4", None), ("nvfp4", jnp.float32(3)), ("mxfp8", None)], ids=str
)
def test_no_transpose_in_the_quantized_backward(mode, scale):
  scales = {"global_scale_x": scale, "global_scale_w": scale}
  f = gradients(functools.partial(jaxqq.qqmm, mode=mode, backward="quantized", **scales))
  text = lowered(f, (M, K), (N, K), (M, N))
  assert transposes(text) == []
  assert [kernels_that_read(text, a) for a in ((N, K), (M, N), (M, K))] == [READ_BY[mode]] * 3


@kernels
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("mode", MODES)
def test_no_transpose_of_a_kernel_of_flax(mode, backward):
  """(k, n): the product reads it down its columns, and its gradient is in its order."""
  dot_general = jaxqq.dot_general(mode, backward=backward)

  def product(x, kernel):
    return dot_general(x, kernel, DENSE)

  text = lowered(product, (M, K), (K, N))
  assert transposes(text) == []
  assert kernels_that_read(text, (K, N)) == READ_BY[mode]
  if backward == "quantized":
    text = lowered(gradients(product), (M, K), (K, N), (M, N))
    assert transposes(text) == []
    assert kernels_that_read(text, (K, N)) == 0
    assert [kernels_that_read(text, a) for a in ((M, N), (M, K))] == [READ_BY[mode]] * 2


@kernels
@pytest.mark.parametrize("mode", MODES)
def test_no_transpose_of_packed_w_in_the_quantized_backward(mode):
  """It is dequantized, and then read down its columns."""
  packed = jaxqq.quantize(jnp.ones((N, K)), mode=mode)

  def dx(x, g):
    return jax.vjp(lambda x: jaxqq.qqmm(x, *packed, mode=mode, backward="quantized"), x)[1](g)

  text = lowered(dx, (M, K), (M, N))
  assert transposes(text) == []
  assert kernels_that_read(text, (N, K)) == READ_BY[mode]


@kernels
def test_several_matrices_are_put_in_order():
  """The quantizers of columns take one matrix, which rows of several x make up."""
  f = gradients(functools.partial(jaxqq.qqmm, backward="quantized"))
  text = lowered(f, (2, M, K), (2, N, K), (2, M, N))
  matrices = (f"2x{rows}x{columns}xbf16" for rows, columns in ((N, K), (M, K), (M, N)))
  assert sorted(transposes(text)) == sorted(matrices)
  one = lowered(f, (2, M, K), (N, K), (2, M, N))
  assert transposes(one) == []
