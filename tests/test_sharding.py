"""The product split over eight devices: the same numbers, and no more moved than the rule says."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from tests.support import oracle
from tests.support.operands import MODES, PRODUCTS, arguments, data
from tests.support.sharding import (
  CLOSE,
  DT,
  EACH,
  MOVED,
  QUICK,
  SCATTERED,
  SPLITS,
  collectives,
  mesh,
  place,
)


def compiled(f, split, x, args):
  x_spec, w_spec, out_spec = SPLITS[split]
  placed = place(x, x_spec), *(place(a, w_spec) for a in args)
  options = {} if out_spec is None else {"out_shardings": NamedSharding(mesh(), out_spec)}
  return jax.jit(f, **options).lower(*placed).compile(), placed


@functools.cache
def case(product, packed):
  """x, w or its packed parts, and their product on one device."""
  x, w = data((16, 512), (24, 512))
  args = arguments(w, product.mode, packed)
  return x, args, np.asarray(product(x, *args))


def table():
  """Each split of each mode, one packed; what sums and what gathers, packed the other way too."""
  for split in SPLITS:
    for product in PRODUCTS[:4]:
      is_usual = split in ("column", "row", "columns of w")
      for packed in (False, True):
        is_other = product not in PRODUCTS[:2]
        chosen = is_usual and (not is_other or packed != product.quantizes_x)
        if chosen or (not is_other and packed == (product.mode == "nvfp4")):
          yield pytest.param(split, product, packed, id=f"{split}-{product}" + "-packed" * packed)


@QUICK
@pytest.mark.parametrize(("split", "product", "packed"), list(table()))
def test_forward_and_what_moves(split, product, packed):
  x, args, want = case(product, packed)
  executable, placed = compiled(product, split, x, args)
  np.testing.assert_allclose(executable(*placed), want, **CLOSE)
  if split in MOVED:
    moved = MOVED[split]
    assert collectives(executable) == (moved[packed] if isinstance(moved, dict) else moved)


@QUICK
@pytest.mark.parametrize(
  ("split", "product", "packed"),
  [
    ("column", PRODUCTS[0], True),
    ("row", PRODUCTS[1], False),
    ("row, rows split on", PRODUCTS[0], True),
    ("row", PRODUCTS[4], True),
    ("columns of w", PRODUCTS[0], True),
    ("columns of w", PRODUCTS[1], False),
  ],
  ids=str,
)
def test_the_other_partitioner(split, product, packed):
  """GSPMD, as long as JAX has it."""
  x, args, want = case(product, packed)
  jax.config.update("jax_use_shardy_partitioner", False)
  try:
    executable, placed = compiled(product, split, x, args)
    np.testing.assert_allclose(executable(*placed), want, **CLOSE)
  finally:
    jax.config.update("jax_use_shardy_partitioner", True)
  moved = MOVED[split]
  assert collectives(executable) == (moved[packed] if isinstance(moved, dict) else moved)


@pytest.mark.parametrize("product", [*PRODUCTS[:2], PRODUCTS[3]], ids=str)
def test_row_parallel_sums_in_float32_and_rounds_once(product):
  rng = np.random.default_rng(40)
  x, w = (oracle.with_outliers(rng, shape, "float32") / 64 for shape in ((16, 1024), (24, 1024)))
  x = x.astype(jnp.bfloat16)
  executable, placed = compiled(product, "row, all axes", x, (w,))
  exact, mag = oracle.product(product.x_hat(x), oracle.round_trip(w, product.mode))
  oracle.assert_within_bound(np.asarray(executable(*placed)), exact, mag, highest=True)


@QUICK
@EACH
def test_a_split_that_would_cut_a_group_is_gathered(mode, packed):
  """K is 3 groups, split in two: not by a split of groups, so that nothing is summed."""
  k = 3 * oracle.MODES[mode].group
  x, w = data((8, k), (16, k))
  args = arguments(w, mode, packed)
  f = functools.partial(jaxqq.qqmm, mode=mode)
  placed = (
    place(x, P("data", "tensor")),
    *(place(a, P(None, "tensor") if a.shape[-1] % 2 == 0 else P()) for a in args),
  )
  executable = jax.jit(f).lower(*placed).compile()
  np.testing.assert_allclose(executable(*placed), f(x, *args), **CLOSE)
  assert "all-reduce" not in {kind for kind, _ in collectives(executable)}


@QUICK
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


@QUICK
@EACH
def test_batch_axes(mode, packed):
  """A stack of products split on the stack moves nothing; vmap over it is the same."""
  x, w = data((8, 16, 64), (8, 32, 64))
  args = arguments(w, mode, packed)
  stacked = functools.partial(jaxqq.qqmm, mode=mode)
  want = stacked(x, *args)
  placed = place(x, P(DT)), *(place(a, P(DT)) for a in args)
  for f in (stacked, jax.vmap(stacked)):
    executable = jax.jit(f).lower(*placed).compile()
    assert collectives(executable) == []
    np.testing.assert_allclose(executable(*placed), want, **CLOSE)
  # x with a batch axis, w without: rows of x split, w on every device.
  want = stacked(x, *(a[0] for a in args))
  placed = place(x, P("data")), *(place(a[0], P("tensor")) for a in args)
  executable = jax.jit(stacked).lower(*placed).compile()
  assert collectives(executable) == []
  np.testing.assert_allclose(executable(*placed), want, **CLOSE)
  # Row-parallel, the sum scattered along the batch axis.
  placed = place(x, P("data", None, "tensor")), *(place(a[0], P(None, "tensor")) for a in args)
  out = NamedSharding(mesh(), P(DT))
  executable = jax.jit(stacked, out_shardings=out).lower(*placed).compile()
  assert collectives(executable) == SCATTERED
  np.testing.assert_allclose(executable(*placed), want, **CLOSE)


@QUICK
@pytest.mark.parametrize("mode", MODES)
def test_inside_of_scan_and_with_collectives_of_others(mode):
  x, w = data((32, 64), (3, 64, 64))

  def layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(jaxqq.qqmm(x, w, mode=mode)), None), x, w)[0]

  placed = place(x, P("data")), place(w, P(None, "tensor"))
  np.testing.assert_allclose(jax.jit(layers)(*placed), layers(x, w), **CLOSE)


@QUICK
@pytest.mark.parametrize(
  ("spec", "mode"),
  [
    *((P("data", "tensor"), mode) for mode in oracle.MODES),
    (P("data"), "nvfp4"),
    (P(None, "tensor"), "mxfp8"),
  ],
  ids=str,
)
def test_quantize_and_dequantize(spec, mode):
  """Split along every axis, but not inside of a group, nothing moves."""
  (w,) = data((16, 256))
  want = jaxqq.quantize(w, mode=mode)
  executable = jax.jit(functools.partial(jaxqq.quantize, mode=mode)).lower(place(w, spec)).compile()
  for a, b in zip(executable(place(w, spec)), want, strict=True):
    np.testing.assert_array_equal(a, b)
  assert collectives(executable) == []
  placed = [place(a, spec) for a in want]
  executable = jax.jit(functools.partial(jaxqq.dequantize, mode=mode)).lower(*placed).compile()
  assert collectives(executable) == []
  np.testing.assert_array_equal(
    np.asarray(executable(*placed), np.float32),
    np.asarray(jaxqq.dequantize(*want, mode=mode), np.float32),
  )


@QUICK
def test_quantize_and_dequantize_a_stack_and_inside_of_a_group():
  (w,) = data((8, 4, 96))
  want = jaxqq.quantize(w)
  placed = place(w, P("tensor", "data"))
  executable = jax.jit(jaxqq.quantize).lower(placed).compile()
  assert collectives(executable) == []
  # 6 groups over 4 devices: data moves, the bits stay.
  for spec in (P("tensor", "data"), P("tensor", None, "data")):
    for a, b in zip(jax.jit(jaxqq.quantize)(place(w, spec)), want, strict=True):
      np.testing.assert_array_equal(a, b)
