"""Layers of experts on eight devices, some experts on each: as on one, and no weight moves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxqq.nn
from tests.support import oracle
from tests.support.sharding import collectives

E, K, N, TOKENS, TOP = 16, 64, 32, 24, 2
RNG = np.random.default_rng(0)
X = oracle.random(RNG, (TOKENS, K), "float32")
# Some experts have no token, some tokens no expert; the devices' shares are not alike.
CHOSEN = np.where(RNG.uniform(size=(TOKENS, TOP)) < 0.1, -1, RNG.integers(0, 11, (TOKENS, TOP)))
CHOSEN = CHOSEN.astype(np.int32)
WEIGHTS = RNG.uniform(size=(TOKENS, TOP)).astype(np.float32)


def layer_of(kind, packed):
  """Biases of numbers, so that one of an expert that is elsewhere would show."""
  options = {"use_bias": True, "bias_init": nnx.initializers.normal(), "rngs": nnx.Rngs(0)}
  if kind == "plain":
    return jaxqq.nn.Experts(E, K, N, **options)
  layer = jaxqq.nn.QQExperts(E, K, N, mode=kind, **options)
  if packed:
    jaxqq.nn.pack(layer)
  return layer


CASES = [("plain", False), ("mxfp8", False), ("nvfp4", False), ("nvfp4", True)]


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(("kind", "packed"), CASES)
def test_experts_of_eight_devices_are_those_of_one(kind, packed):
  """Results, and gradients of tokens, weights, kernels and biases."""
  graph, params, rest = nnx.split(layer_of(kind, packed), nnx.Param, ...)
  mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))

  def loss(params, x, weights, rest, offset=None, total=lambda a: a):
    layer = nnx.merge(graph, params, rest)
    out = total(layer(x, CHOSEN, weights, group_offset=offset))
    return jnp.sum(jnp.sin(out)), out

  of_loss = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)

  def inside(params, x, weights, rest):
    total = lambda a: jax.lax.psum(a, "expert")  # noqa: E731
    first = jax.lax.axis_index("expert") * (E // 8)
    return of_loss(params, x, weights, rest, first, total)

  one, split = P(), P("expert")
  specs = {"in_specs": (split, one, one, split), "out_specs": ((one, one), (split, one, one))}
  program = jax.jit(jax.shard_map(inside, mesh=mesh, **specs))
  args = params, X, WEIGHTS, rest
  got, want = program(*args), jax.jit(of_loss)(*args)
  assert np.abs(want[0][1]).max() > 0.1
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  moved = collectives(program.lower(*args).compile())
  assert moved and {kind for kind, _ in moved} == {"all-reduce"}
