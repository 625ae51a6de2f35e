"""Bad input of ragged and gathered products: one sentence, as of `test_errors.py`."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxqq
from tests.support.messages import check_sentence

X, W, SIZES = np.ones((6, 64), np.float32), np.ones((3, 8, 64), np.float32), np.int32([2, 0, 3])
Q, S = (np.asarray(a) for a in jaxqq.quantize(W))
ONE, TWO = np.float32(1), np.ones(2, np.float32)
ONES = {"global_scale_x": ONE, "global_scale_w": ONE}

# (what is wrong, error, words of the message, x, w, group_sizes, other arguments)
RAGGED = [
  ("sizes of two groups", ValueError, ["group_sizes", "(3,)", "(2,)", "group_offset"], X, W, SIZES[:2], {}),
  ("sizes of four groups", ValueError, ["group_sizes", "(3,)", "(4,)"], X, W, np.int32([1, 1, 1, 1]), {}),
  ("more matrices than groups", ValueError, ["group_sizes", "at least 3", "(2,)"], X, W, SIZES[:2], {"group_offset": 0}),
  ("sizes of two axes", ValueError, ["group_sizes", "one dimension", "(1, 3)"], X, W, SIZES[None], {}),
  ("a scalar size", ValueError, ["group_sizes", "one dimension", "()"], X, W, np.int32(6), {}),
  ("float sizes", TypeError, ["group_sizes", "integers", "float32"], X, W, SIZES.astype(np.float32), {}),
  ("bool sizes", TypeError, ["group_sizes", "integers", "bool"], X, W, SIZES > 0, {}),
  ("a list of sizes", TypeError, ["group_sizes", "list"], X, W, [2, 0, 3], {}),
  ("sizes forgotten", TypeError, ["group_sizes", "NoneType"], X, W, None, {}),
  ("scales in their place", ValueError, ["group_sizes", "one dimension", "(3, 8, 4)"], X, Q, S, {}),
  ("float offset", TypeError, ["group_offset", "integers", "float32"], X, W, SIZES, {"group_offset": ONE}),
  ("offset True", TypeError, ["group_offset", "bool"], X, W, SIZES, {"group_offset": True}),
  ("two offsets", ValueError, ["group_offset", "() or (1,)", "(2,)"], X, W, SIZES, {"group_offset": np.int32([0, 1])}),
  ("a matrix w", ValueError, ["w", "three dimensions", "(G, N, K)", "(8, 64)"], X, W[0], SIZES, {}),
  ("w of four axes", ValueError, ["w", "three dimensions", "(1, 3, 8, 64)"], X, W[None], SIZES, {}),
  ("a QuantizedWeight of one matrix", ValueError, ["w", "three dimensions", "(8, 64)"], X, jaxqq.quantize_weight(W[0]), SIZES, {}),
  ("w None", TypeError, ["w", "NoneType"], X, None, SIZES, {}),
  ("a vector x", ValueError, ["x", "two dimensions", "(M, K)", "(64,)"], X[0], W, SIZES, {}),
  ("x of three axes", ValueError, ["x", "two dimensions", "(1, 6, 64)"], X[None], W, SIZES, {}),
  ("x a list", TypeError, ["x", "list"], X.tolist(), W, SIZES, {}),
  ("integer x", TypeError, ["x", "int32"], X.astype(np.int32), W, SIZES, {}),
  ("float64 w", TypeError, ["w", "float64"], X, W.astype(np.float64), SIZES, {}),
  ("w (G, K, N)", ValueError, ["x", "w", "K = 8", "(6, 64)"], X, W.swapaxes(1, 2), SIZES, {}),
  ("K no multiple of the group", ValueError, ["x", "16", "(6, 40)"], X[:, :40], W[..., :40], SIZES, {}),
  ("packed without scales", ValueError, ["w", "packed", "scales"], X, Q, SIZES, {}),
  ("scales with unquantized w", ValueError, ["scales", "unquantized"], X, W, SIZES, {"scales": S}),
  ("scales of two matrices", ValueError, ["scales", "(3, 8, 4)", "(2, 8, 4)"], X, Q, SIZES, {"scales": S[:2]}),
  ("unknown mode", ValueError, ["mode", "'int4'", "'nvfp4', 'mxfp8'"], X, W, SIZES, {"mode": "int4"}),
  ("unknown backward", ValueError, ["backward", "'ste'"], X, W, SIZES, {"backward": "ste"}),
  ("group_size", ValueError, ["group_size=3", "16"], X, W, SIZES, {"group_size": 3}),
  ("one global scale of two", ValueError, ["global_scale_x", "global_scale_w"], X, W, SIZES, {"global_scale_x": ONE}),
  ("two global scales of three matrices", ValueError, ["global_scale_w", "(2,)", "one a matrix, (3,)"], X, W, SIZES, {**ONES, "global_scale_w": TWO}),
  ("a global scale in mxfp8", ValueError, ["global_scale_x", "'mxfp8'"], X, W, SIZES, {**ONES, "mode": "mxfp8"}),
  ("preferred_element_type", TypeError, ["preferred_element_type", "int8"], X, W, SIZES, {"preferred_element_type": "int8"}),
  ("precision", TypeError, ["precision", "'exact'"], X, W, SIZES, {"precision": "exact"}),
  ("a precision that has no hash", TypeError, ["precision", "{}"], X, W, SIZES, {"precision": {}}),
]  # fmt: skip


@pytest.mark.parametrize("case", RAGGED, ids=[case[0] for case in RAGGED])
def test_ragged_qqmm(case):
  _, error, words, x, w, sizes, how = case
  with pytest.raises(error) as caught:
    jaxqq.ragged_qqmm(x, w, sizes, **how)
  check_sentence(str(caught.value), "ragged_qqmm", words)
  with pytest.raises(error) as caught:
    jaxqq.explain(jaxqq.ragged_qqmm, x, w, sizes, **how)
  check_sentence(str(caught.value), "explain", words)


WEIGHTS = [case for case in RAGGED if not {"backward", "global_scale_x"} & set(case[-1])]


@pytest.mark.parametrize("case", WEIGHTS, ids=[case[0] for case in WEIGHTS])
def test_ragged_quantized_matmul(case):
  _, error, words, x, w, sizes, how = case
  with pytest.raises(error) as caught:
    jaxqq.ragged_quantized_matmul(x, w, sizes, **how)
  check_sentence(str(caught.value), "ragged_quantized_matmul", words)


@pytest.mark.parametrize(
  ("sizes", "offset", "want"),
  [
    (np.uint32([2**32 - 1, 1, 1]), None, [1] * 6),
    (np.int64([-(2**33), 2**33, 1]), None, [2] * 6),
    (np.int32([2, 1, 3]), 2**31, [0] * 6),
    (np.int32([2, 1, 3]), np.int64(-(2**40)), [0] * 6),
  ],
  ids=str,
)
def test_numbers_beyond_int32_are_as_large(sizes, offset, want):
  """They count as the nearest that int32 has, and do not begin anew."""
  w = W * np.float32([1, 2, 3])[:, None, None]
  out = np.asarray(jaxqq.ragged_qqmm(X, w, sizes, mode="mxfp8", group_offset=offset))
  np.testing.assert_array_equal(out[:, 0], 64 * np.float32(want))


def test_a_symbolic_number_of_groups():
  (groups,) = jax.export.symbolic_shape("g")
  shapes = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((6, 64), np.float32),
      ((groups, 8, 64), np.float32),
      ((groups,), np.int32),
    )
  ]
  for function, args in (
    (jaxqq.ragged_qqmm, shapes),
    (lambda x, w, _: jaxqq.gather_qqmm(x, w, None), shapes),
  ):
    with pytest.raises(ValueError) as caught:
      jax.export.export(jax.jit(function))(*args)
    name = "ragged_qqmm" if function is jaxqq.ragged_qqmm else "gather_qqmm"
    check_sentence(str(caught.value), name, ["must be known", "(g, 8, 64)", "M and N"])


def test_the_same_under_jit():
  for name in ("sizes of two groups", "float sizes", "a matrix w", "scales of two matrices"):
    _, error, words, x, w, sizes, how = next(case for case in RAGGED if case[0] == name)
    with pytest.raises(error) as caught:
      jax.jit(jaxqq.ragged_qqmm)(x, w, sizes, **how)
    check_sentence(str(caught.value), "ragged_qqmm", words)


XS = np.ones((5, 2, 64), np.float32)
GATHER = [
  ("float indices", TypeError, ["lhs_indices", "integers", "x", "float32"], XS, W, {"lhs_indices": ONE}),
  ("bool indices", TypeError, ["rhs_indices", "integers", "w", "bool"], XS, W, {"rhs_indices": SIZES > 0}),
  ("a list of indices", TypeError, ["rhs_indices", "list"], XS, W, {"rhs_indices": [0, 1]}),
  ("indices that do not broadcast", ValueError, ["lhs_indices", "rhs_indices", "(3,)", "(2,)"], XS, W, {"lhs_indices": SIZES, "rhs_indices": SIZES[:2]}),
  ("no indices", ValueError, ["lhs_indices", "rhs_indices", "(5,)", "(3,)"], XS, W, {}),
  ("a vector x", ValueError, ["x", "two dimensions", "(64,)"], XS[0, 0], W, {}),
  ("a vector w", ValueError, ["w", "two dimensions", "(64,)"], XS, W[0, 0], {}),
  ("K", ValueError, ["x", "w", "K", "(5, 2, 64)", "(3, 8, 32)"], XS, W[..., :32], {}),
  ("packed without scales", ValueError, ["w", "packed", "scales"], XS, Q, {}),
  ("sorted_indices", TypeError, ["sorted_indices", "True or False", "1"], XS, W, {"sorted_indices": 1}),
  ("a scale for each x", ValueError, ["global_scale_x", "(3,)", "(5,)"], XS, W, {"global_scale_x": np.ones(5, np.float32), "global_scale_w": ONE}),
  ("one global scale of two", ValueError, ["global_scale_x", "global_scale_w"], XS, W, {"global_scale_w": ONE}),
]  # fmt: skip


@pytest.mark.parametrize("case", GATHER, ids=[case[0] for case in GATHER])
def test_gather_qqmm(case):
  _, error, words, x, w, how = case
  with pytest.raises(error) as caught:
    jaxqq.gather_qqmm(x, w, **how)
  check_sentence(str(caught.value), "gather_qqmm", words)
