"""Splits over a part of a mesh axis: XLA makes them of reshapes, and where groups do not divide."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from jaxqq._sharding import decoded
from tests.support import oracle
from tests.support.operands import BACKWARDS, MODES, arguments, data
from tests.support.sharding import GRADIENTS_CLOSE, QUICK, collectives, where_it_divides


def mesh_of(*sizes, order=None, kind=AxisType.Auto):
  devices = np.array(jax.devices()[: math.prod(sizes)])
  devices = devices if order is None else devices[list(order)]
  return Mesh(devices.reshape(sizes), tuple("abc"[: len(sizes)]), axis_types=(kind,) * len(sizes))


def place(mesh, a, *spec):
  return jax.device_put(a, NamedSharding(mesh, P(*spec)))


# By what a mesh of other axes on the same devices calls it.
@pytest.mark.parametrize(
  ("primes", "other", "order", "spec", "expected"),
  [
    pytest.param((2, 2, 2), (8,), None, P("a"), (("a", "b", "c"), None), id="a whole axis"),
    pytest.param((2, 2, 2), (4, 2), None, P("a", "b"), (("a", "b"), "c"), id="two parts"),
    pytest.param((2, 2, 2), (2, 4), None, P(None, "b"), (None, ("b", "c")), id="the minor part"),
    pytest.param((2, 2, 2), (2, 2, 2), None, P(("c", "a"), "b"), (("c", "a"), "b"), id="turned"),
    pytest.param((2, 2, 2), (8,), None, P(), (None, None), id="nothing"),
    pytest.param((2, 3), (3, 2), None, P("a", "b"), (None, None), id="factors the other way"),
    pytest.param((2, 2), (2, 2), (0, 1, 3, 2), P("a", "b"), ("a", None), id="one axis without"),
  ],
)
def test_decoded(primes, other, order, spec, expected):
  """What has no name is not split, and the rest stays as it is."""
  found = decoded(mesh_of(*primes), NamedSharding(mesh_of(*other, order=order), spec), 2).spec
  assert tuple(found) + (None,) * (2 - len(found)) == expected


@QUICK
@pytest.mark.parametrize("mode", MODES)
def test_a_reshape_moves_nothing(mode):
  """8 ways over the first axis become 4 ways over it and 2 over the second, and 8 again."""
  x, w = data((8, 4, 64), (32, 64))
  f = lambda x, w: jaxqq.qqmm(x.reshape(4, 8, 64), w, mode=mode).reshape(8, 4, 32)  # noqa: E731
  placed = place(mesh_of(8), x, "a"), place(mesh_of(8), w)
  executable = jax.jit(f).lower(*placed).compile()
  np.testing.assert_allclose(executable(*placed), f(x, w), **GRADIENTS_CLOSE)
  assert collectives(executable) == []


@QUICK
@pytest.mark.parametrize("backward", BACKWARDS)
def test_gradients_are_accumulated_over_micro_batches(backward):
  x, w = data((32, 64), (32, 64))

  def accumulated(x, w):
    loss = lambda w, x: jnp.sum(jaxqq.qqmm(x, w, mode="mxfp8", backward=backward))  # noqa: E731
    step = lambda total, x: (total + jax.grad(loss)(w, x), None)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros_like(w), x.reshape(4, 8, 64))[0]

  got = jax.jit(accumulated)(place(mesh_of(8), x, "a"), place(mesh_of(8), w))
  np.testing.assert_allclose(got, jax.jit(accumulated)(x, w), **GRADIENTS_CLOSE)


@QUICK
@pytest.mark.parametrize(
  ("mode", "n", "k", "devices", "split", "kind"),
  [
    ("mxfp8", 32, 192, 4, P(None, "a"), AxisType.Auto),
    ("nvfp4", 32, 96, 4, P(None, "a"), AxisType.Auto),
    ("nvfp4", 32, 1856, 8, P(None, "a"), AxisType.Auto),
    ("mxfp8", 32, 2880, 4, P(None, "a"), AxisType.Auto),
    ("mxfp8", 32, 192, 4, P(None, "a"), AxisType.Explicit),
    ("nvfp4", 32, 96, 4, P(None, "a"), AxisType.Explicit),
    ("nvfp4", 192, 64, 4, P("a"), AxisType.Auto),
    ("mxfp8", 192, 64, 4, P("a"), AxisType.Auto),
  ],
)
def test_dx_through_packed_w(mode, n, k, devices, split, kind):
  """Where groups do not divide, K (or N, which is quantized anew) is gathered."""
  x, w, g = data((8, k), (n, k), (8, n))
  args = oracle.quantize(w, mode)
  mesh = mesh_of(devices, kind=kind)

  def gradient(x, args, backward):
    out, pull = jax.vjp(lambda x: jaxqq.qqmm(x, *args, mode=mode, backward=backward), x)
    own = jax.typeof(out).sharding
    return out, *pull(g if own.mesh.empty else jax.sharding.reshard(g, own))

  def gradients(x, *args):
    return [a for backward in BACKWARDS for a in gradient(x, args, backward)]

  specs = (
    where_it_divides(P(*split, *(None,) * (2 - len(split))), {"a": devices}, a.shape) for a in args
  )
  placed = place(mesh, x), *(place(mesh, a, *spec) for a, spec in zip(args, specs, strict=True))
  for got, want in zip(jax.jit(gradients)(*placed), jax.jit(gradients)(x, *args), strict=True):
    np.testing.assert_allclose(got, want, **GRADIENTS_CLOSE)


@QUICK
@pytest.mark.parametrize("sizes", [(4,), (2, 4)], ids=str)
@pytest.mark.parametrize(("mode", "packed"), [("nvfp4", True), ("mxfp8", False)])
@pytest.mark.parametrize("constant", ["closed over", "made inside", "w"])
def test_the_other_operand_is_a_constant(constant, mode, packed, sizes):
  """6 groups split 4 ways, against an operand that XLA may split as it likes."""
  k = 6 * oracle.MODES[mode].group
  x, w = data((8, k), (32, k))
  args = arguments(w, mode, packed)
  product = functools.partial(jaxqq.qqmm, mode=mode)
  mesh, last = mesh_of(*sizes), "ab"[len(sizes) - 1]
  if constant == "w":
    operands, f = (x,), lambda x: product(x, *args)
  else:
    own = (lambda: jnp.full((8, k), 0.5)) if constant == "made inside" else (lambda: x)
    operands, f = args, lambda *args: product(own(), *args)
  placed = [
    place(mesh, a, *where_it_divides(P(None, last), dict(mesh.shape), a.shape)) for a in operands
  ]
  np.testing.assert_allclose(jax.jit(f)(*placed), jax.jit(f)(*operands), **GRADIENTS_CLOSE)
