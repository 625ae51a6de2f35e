"""Ragged products under plain jit, split over eight devices: the numbers of one, and what moves."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from jaxqq._ragged_split import sizes_of_part
from tests.support import oracle
from tests.support.operands import data
from tests.support.sharding import CLOSE, DT, QUICK, REDUCED, SCATTERED, collectives, mesh, place

M, G, N, K = 48, 8, 64, 128
SIZES = jnp.int32([3, 0, 9, 1, 0, 10, 20, 2])  # below M
GATHERED = [("all-gather", "f32")]
# name: x (M, K), w (G, N, K), output asked for (None: XLA's choice), what moves
SPLITS = {
  "experts": (P(), P("data"), None, REDUCED),
  "sums": (P(None, "tensor"), P(None, None, "tensor"), None, REDUCED),
  "rows": (P("data"), P(), None, []),
  "rows and columns": (P("data"), P(None, "tensor"), None, []),
  "rows and experts": (P("tensor"), P("data"), P("tensor"), REDUCED),
  "experts and sums": (P(None, "tensor"), P("data", None, "tensor"), P(), REDUCED),
  "experts, rows on the same axis": (P("data"), P("data"), P("data"), GATHERED + SCATTERED),
  "experts, output split on n": (P(), P("data"), P(None, "data"), SCATTERED),
  "sums, output split on m": (P(None, "data"), P(None, None, "data"), P("data"), SCATTERED),
}


def product(x, w, sizes=SIZES, **how):
  if not isinstance(w, jaxqq.QuantizedWeight):
    how = {"mode": "mxfp8", **how}
  return jaxqq.ragged_qqmm(x, w, sizes, **how)


@functools.cache
def case(packed):
  x, w = data((M, K), (G, N, K))
  w = jaxqq.quantize_weight(w, "nvfp4") if packed else w
  return x, w, np.asarray(product(x, w))


def placed(w, spec):
  """Of a weight, each array as its own axes are; a global scale with its expert."""
  return jax.tree.map(lambda a: place(a, P(*tuple(spec)[: a.ndim])), w)


PACKED = ("experts", "rows and columns")


@QUICK
@pytest.mark.parametrize(
  ("split", "packed"), [*((split, False) for split in SPLITS), *((split, True) for split in PACKED)]
)
def test_forward_and_what_moves(split, packed):
  """Neither w nor its codes; x where its rows are split over the devices of the experts."""
  of_x, of_w, of_out, moved = SPLITS[split]
  x, w, want = case(packed)
  options = {} if of_out is None else {"out_shardings": NamedSharding(mesh(), of_out)}
  args = place(x, of_x), placed(w, of_w)
  program = jax.jit(product, **options).lower(*args).compile()
  np.testing.assert_allclose(program(*args), want, **CLOSE)
  assert sorted(set(collectives(program))) == sorted(moved)


@QUICK
def test_gspmd_is_told_the_same():
  x, w, want = case(False)
  of_x, of_w, _, _ = SPLITS["rows and experts"]
  args = place(x, of_x), place(w, of_w)
  jax.config.update("jax_use_shardy_partitioner", False)
  try:
    program = jax.jit(product).lower(*args).compile()
  finally:
    jax.config.update("jax_use_shardy_partitioner", True)
  np.testing.assert_allclose(program(*args), want, **CLOSE)
  assert sorted(set(collectives(program))) == REDUCED


GRADIENTS = {
  "rows and experts": [("all-reduce", "f32")],
  "sums": [("all-reduce", "f32")],
  "experts, rows on the same axis": [("all-gather", "f32"), ("reduce-scatter", "f32")],
}


@QUICK
@pytest.mark.parametrize("split", GRADIENTS)
def test_gradients_and_what_moves(split):
  """dx as x and dw as w: no w is gathered, whole or packed."""
  of_x, of_w, _, _ = SPLITS[split]
  x, w, _ = case(False)
  of_loss = jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), (0, 1))
  shardings = tuple(NamedSharding(mesh(), spec) for spec in (of_x, of_w))
  args = place(x, of_x), place(w, of_w)
  program = jax.jit(of_loss, out_shardings=shardings).lower(*args).compile()
  for got, want in zip(program(*args), jax.jit(of_loss)(x, w), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert sorted(set(collectives(program))) == GRADIENTS[split]


@QUICK
@pytest.mark.parametrize("split", ["rows and experts", "sums"])
def test_the_quantized_backward(split):
  """Groups of rows are quantized as on one device, where rows are split too."""
  of_x, of_w, _, _ = SPLITS[split]
  x, w, _ = case(False)
  loss = lambda x, w: jnp.sum(jnp.sin(product(x, w, mode="nvfp4", backward="quantized")))  # noqa: E731
  of_loss = jax.jit(jax.grad(loss, (0, 1)))
  for got, want in zip(of_loss(place(x, of_x), place(w, of_w)), of_loss(x, w), strict=True):
    # A number on the edge of two codes may be rounded to either.
    assert oracle.relative_error(got, np.float64(want)) < 1e-3


@QUICK
def test_every_kind_of_operand():
  """Scales for each expert or row, offsets, x as it is, a mesh that does not divide sizes."""
  x, w, _ = case(False)
  weight = case(True)[1]
  of_inputs = jnp.arange(1.0, G + 1)
  static = dataclasses.replace(weight, input_global_scale=of_inputs)
  rows = jaxqq.concatenate([weight, jaxqq.quantize_weight(100 * w)])
  ten = jnp.concatenate([jnp.int32([2]), SIZES, jnp.int32([1])])
  alone = lambda x, w: jaxqq.ragged_quantized_matmul(x, w, SIZES)  # noqa: E731
  both = functools.partial(product, mode="nvfp4", global_scale_x="amax", global_scale_w="amax")
  cases = [
    (product, x, static, P(None, None), P("data")),
    (product, x, rows, P("tensor"), P("data")),
    (functools.partial(product, sizes=ten, group_offset=3), x, weight, P("data"), P(DT)),
    (alone, x, weight, P("data"), P("tensor")),
    (both, x, w, P("tensor"), P("data")),
  ]
  for f, a, b, of_x, of_w in cases:
    got = jax.jit(f)(place(a, of_x), placed(b, of_w))
    np.testing.assert_allclose(got, jax.jit(f)(a, b), rtol=1e-4, atol=1e-3)


@QUICK
def test_what_does_not_divide_is_whole():
  """Rows, experts and groups that a mesh does not split evenly; and batch axes, left to XLA."""
  x, w = data((M, 96), (G, 12, 96))
  args = place(x, P(None, "data")), place(w, P(None, None, "data"))  # 96 / 4 cuts groups of 32
  np.testing.assert_allclose(jax.jit(product)(*args), product(x, w), **CLOSE)
  both = jnp.stack([x, 2 * x])
  mapped = jax.jit(jax.vmap(product, (0, None)))
  args = place(both, P("tensor")), place(w, P("data"))
  np.testing.assert_allclose(mapped(*args), mapped(both, w), **CLOSE)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_sizes_of_parts_of_rows(parts):
  """As counted row by row; sizes below 0, and beyond the rows there are."""
  rng = np.random.default_rng(parts)
  for _ in range(20):
    sizes = rng.integers(-3, 12, G)
    ends = np.minimum(np.cumsum(np.clip(sizes, 0, None)), M)
    group = np.searchsorted(ends, np.arange(M), side="right")
    of_parts = [sizes_of_part(jnp.int32(sizes), M, i, parts) for i in range(parts)]
    wanted = [np.bincount(part, minlength=G + 1)[:G] for part in np.split(group, parts)]
    np.testing.assert_array_equal(of_parts, wanted)
