"""Bad input gets one sentence that names the function, the argument, what it was, what is right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxqq
from tests.support.messages import check_sentence

X, W = np.ones((4, 64), np.float32), np.ones((8, 64), np.float32)
Q, S = (np.asarray(a) for a in jaxqq.quantize(W))
Q8, S8 = (np.asarray(a) for a in jaxqq.quantize(W, mode="mxfp8"))
QW = jaxqq.quantize_weight(W)
ONE = np.float32(1)

# (what is wrong, error, words of the message, x, w, scales, other arguments)
PRODUCT = [
  ("unknown mode", ValueError, ["mode", "'int4'", "'nvfp4', 'mxfp8'"], X, W, None, {"mode": "int4"}),
  ("mode is no string", ValueError, ["mode", "4"], X, W, None, {"mode": 4}),
  ("group_size", ValueError, ["group_size=32", "16"], X, W, None, {"group_size": 32}),
  ("bits", ValueError, ["bits=4", "8"], X, W, None, {"bits": 4, "mode": "mxfp8"}),
  ("group_size is a float", TypeError, ["group_size", "Python int", "float", "16"], X, W, None, {"group_size": 16.0}),
  ("bits is an array", TypeError, ["bits", "Python int", "pass 4"], X, W, None, {"bits": np.ones(2, int)}),
  ("backward is an array", ValueError, ["backward", "'straight_through'"], X, W, None, {"backward": np.ones(2)}),
  ("packed without scales", ValueError, ["w", "packed", "scales"], X, Q, None, {}),
  ("scales with unquantized w", ValueError, ["scales", "unquantized"], X, W, S, {}),
  ("shape of scales", ValueError, ["scales", "(8, 4)", "(8, 3)"], X, Q, S[:, :3], {}),
  ("rows of scales", ValueError, ["scales", "(8, 4)", "(7, 4)"], X, Q, S[:7], {}),
  ("dtype of scales", TypeError, ["scales", "uint8 or float8_e4m3fn", "int32"], X, Q, S.astype(np.int32), {}),
  ("float8 of the other mode", TypeError, ["scales", "float8_e8m0fnu", "float8_e4m3fn"], X, Q8, S8.view(ml_dtypes.float8_e4m3fn), {"mode": "mxfp8"}),
  ("packed in another mode", ValueError, ["scales", "(8, 1)", "(8, 4)"], X, Q, S, {"mode": "mxfp8"}),
  ("K mismatch", ValueError, ["x", "w", "K", "(4, 64)", "(8, 32)"], X, W[:, :32], None, {}),
  ("K mismatch, packed", ValueError, ["x", "w", "K = 64", "(4, 32)"], X[:, :32], Q, S, {}),
  ("K no multiple of the group", ValueError, ["x", "16", "(4, 40)"], X[:, :40], W[:, :40], None, {}),
  ("K no multiple, mxfp8", ValueError, ["x", "32", "(4, 48)"], X[:, :48], W[:, :48], None, {"mode": "mxfp8"}),
  ("packed w is no whole group", ValueError, ["packed w", "multiple of 2", "(8, 7)"], X, Q[:, :7], S, {}),
  ("float64 x", TypeError, ["x", "float64", "float32"], X.astype(np.float64), W, None, {}),
  ("integer x", TypeError, ["x", "int32"], X.astype(np.int32), W, None, {}),
  ("complex x", TypeError, ["x", "complex64"], X.astype(np.complex64), W, None, {}),
  ("float64 w", TypeError, ["w", "float64"], X, W.astype(np.float64), None, {}),
  ("int32 w", TypeError, ["w", "int32", "uint32"], X, Q.astype(np.int32), S, {}),
  ("complex w", TypeError, ["w", "complex64"], X, W.astype(np.complex64), None, {}),
  ("float8 x", TypeError, ["x", "float8_e4m3fn"], X.astype(ml_dtypes.float8_e4m3fn), W, None, {}),
  ("one global scale of two", ValueError, ["global_scale_x", "global_scale_w"], X, W, None, {"global_scale_x": ONE}),
  ("the other of two", ValueError, ["global_scale_w", "global_scale_x"], X, W, None, {"global_scale_w": ONE}),
  ("global scale with mxfp8", ValueError, ["global_scale_x", "'mxfp8'", "'nvfp4'"], X, W, None, {"global_scale_x": ONE, "global_scale_w": ONE, "mode": "mxfp8"}),
  ("global scale no scalar", ValueError, ["global_scale_x", "(4,)", "scalar"], X, W, None, {"global_scale_x": np.ones(4, np.float32), "global_scale_w": ONE}),
  ("global scale float64", TypeError, ["global_scale_x", "float64", "amax", "largest magnitude"], X, W, None, {"global_scale_x": np.ones((), np.float64), "global_scale_w": ONE}),
  ("global scale int32", TypeError, ["global_scale_w", "int32", "jnp.max(jnp.abs"], X, W, None, {"global_scale_x": ONE, "global_scale_w": np.int32([1])}),
  ("global scale a word", ValueError, ["global_scale_x", "'max'", "'amax'", "a number"], X, W, None, {"global_scale_x": "max", "global_scale_w": ONE}),
  ("global scale True", TypeError, ["global_scale_x", "a number", "bool", "amax"], X, W, None, {"global_scale_x": True, "global_scale_w": ONE}),
  ("amax of packed w", ValueError, ["global_scale_w", "'amax'", "packed", "quantized with"], X, Q, S, {"global_scale_x": "amax", "global_scale_w": "amax"}),
  ("amax with mxfp8", ValueError, ["global_scale_x", "'mxfp8'"], X, W, None, {"global_scale_x": "amax", "global_scale_w": "amax", "mode": "mxfp8"}),
  ("one global scale a matrix", ValueError, ["global_scale_w", "(2,)", "one a matrix, (3,)"], np.stack([X] * 3), np.stack([W] * 3), None, {"global_scale_x": ONE, "global_scale_w": np.ones(2, np.float32)}),
  ("packed x", TypeError, ["x", "QuantizedWeight", "as w", "dequantize()"], QW, QW, None, {}),
  ("packed weight for a scale", TypeError, ["global_scale_x", "QuantizedWeight", "dequantize()"], X, W, None, {"global_scale_x": QW, "global_scale_w": ONE}),
  ("0-d x", ValueError, ["x", "scalar"], ONE, W, None, {}),
  ("1-d w", ValueError, ["w", "(64,)", "(N, K)"], X, W[0], None, {}),
  ("unknown backward", ValueError, ["backward", "'ste'", "'straight_through', 'quantized'"], X, W, None, {"backward": "ste"}),
  ("precision", TypeError, ["precision", "'exact'", "jax.lax.Precision"], X, W, None, {"precision": "exact"}),
  ("a precision that has no hash", TypeError, ["precision", "[]"], X, W, None, {"precision": []}),
  ("preferred_element_type", TypeError, ["preferred_element_type", "int8", "float32"], X, W, None, {"preferred_element_type": "int8"}),
  ("x a ShapeDtypeStruct", TypeError, ["x", "ShapeDtypeStruct", "explain"], jax.ShapeDtypeStruct((4, 64), np.float32), W, None, {}),
  ("x a list", TypeError, ["x", "list"], X.tolist(), W, None, {}),
  ("w None", TypeError, ["w", "NoneType"], X, None, None, {}),
  ("x of keys", TypeError, ["x", "key<fry>"], jax.random.split(jax.random.key(0), 64), W, None, {}),
  ("scales a list", TypeError, ["scales", "list"], X, Q, S.tolist(), {}),
  ("batch axes", ValueError, ["batch", "(2,)", "(3,)"], np.ones((2, 4, 64), np.float32), np.ones((3, 8, 64), np.float32), None, {}),
]  # fmt: skip


def of_weights(case):
  """The same of `quantized_matmul`, which has no scale of x and one backward; None if it is no case."""
  *rest, words, x, w, scales, kwargs = case
  if "backward" in kwargs or "global_scale_x" in words:
    return None
  words = [word.replace("global_scale_w", "global_scale") for word in words]
  kwargs = {k.replace("_scale_w", "_scale"): v for k, v in kwargs.items() if k != "global_scale_x"}
  return (*rest, words, x, w, scales, kwargs)


WEIGHTS = [*filter(None, map(of_weights, PRODUCT))]
WEIGHTS += [
  ("a scale with mxfp4", ValueError, ["global_scale", "'mxfp4'"], X, W, None, {"global_scale": ONE, "mode": "mxfp4"}),
  ("a word", ValueError, ["global_scale 'row'", "'amax', a number"], X, W, None, {"global_scale": "row"}),
]  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS, ids=[case[0] for case in WEIGHTS])
def test_quantized_matmul(case):
  _, error, words, x, w, scales, kwargs = case
  with pytest.raises(error) as caught:
    jaxqq.quantized_matmul(x, w, scales, **kwargs)
  check_sentence(str(caught.value), "quantized_matmul", words)


@pytest.mark.parametrize("function", [jaxqq.qqmm, jaxqq.explain], ids=["qqmm", "explain"])
@pytest.mark.parametrize("case", PRODUCT, ids=[case[0] for case in PRODUCT])
def test_product(case, function):
  _, error, words, x, w, scales, kwargs = case
  if isinstance(x, jax.ShapeDtypeStruct) and function is jaxqq.explain:
    assert function(x, w).startswith("qqmm nvfp4, x float32 (4, 64)")  # what explain is for
    return
  with pytest.raises(error) as caught:
    function(x, w, scales, **kwargs)
  check_sentence(str(caught.value), function.__name__, words)


def survives_jit(case) -> bool:
  """jit itself makes float64 float32 and takes lists apart."""
  _, _, _, x, w, scales, kwargs = case
  arrays = [a for a in (x, w, scales, *kwargs.values()) if a is not None]
  return w is not None and not any(
    isinstance(a, (list, jax.ShapeDtypeStruct)) or getattr(a, "dtype", None) == np.float64
    for a in arrays
  )


TRACED = [case for case in PRODUCT if survives_jit(case)]


@pytest.mark.parametrize("case", TRACED, ids=[case[0] for case in TRACED])
def test_product_while_tracing(case):
  """The same sentence under jit, before an equation is made."""
  _, error, words, x, w, scales, kwargs = case
  arrays = {k: v for k, v in kwargs.items() if hasattr(v, "dtype")}
  rest = {k: v for k, v in kwargs.items() if k not in arrays}
  f = jax.jit(lambda x, w, scales, arrays: jaxqq.qqmm(x, w, scales, **arrays, **rest))
  with pytest.raises(error) as caught:
    f(x, w, scales, arrays)
  check_sentence(str(caught.value), "qqmm", words)


QUANTIZE = [
  ("unknown mode", ValueError, ["mode", "'fp4'", "'mxfp4'"], W, {"mode": "fp4"}),
  ("group_size", ValueError, ["group_size=64", "16"], W, {"group_size": 64}),
  ("bits", ValueError, ["bits=8", "4"], W, {"bits": 8}),
  ("dtype", TypeError, ["w", "int32", "float32, float16 or bfloat16"], Q.astype(np.int32), {}),
  ("float64", TypeError, ["w", "float64"], W.astype(np.float64), {}),
  ("scalar", ValueError, ["w", "scalar"], ONE, {}),
  ("K", ValueError, ["w", "16", "(8, 40)", "pad"], W[:, :40], {}),
  ("global scale", ValueError, ["global_scale", "'mxfp8'"], W, {"mode": "mxfp8", "global_scale": ONE}),
  ("global scale is a list", TypeError, ["global_scale", "a number", "list", "amax"], W, {"global_scale": [1.0]}),
  ("global scale's dtype", TypeError, ["global_scale", "int32"], W, {"global_scale": np.int32([1])}),
  ("list", TypeError, ["w", "list"], [[1.0] * 16], {}),
  ("axis", ValueError, ["axis", "-1 or -2", "0"], W, {"axis": 0}),
  ("a global scale of 400 digits", ValueError, ["global_scale", "float32", "1329 bits"], W, {"global_scale": 10**400}),
  ("no such axis", ValueError, ["w", "axis -2", "leave axis out"], W[0], {"axis": -2}),
  ("K of an axis", ValueError, ["w", "axis -2", "16", "(5, 64)", "pad"], W[:5], {"axis": -2}),
]  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZE, ids=[case[0] for case in QUANTIZE])
def test_quantize(case):
  _, error, words, w, kwargs = case
  with pytest.raises(error) as caught:
    jaxqq.quantize(w, **kwargs)
  check_sentence(str(caught.value), "quantize", words)


DEQUANTIZE = [
  ("unknown mode", ValueError, ["mode", "None"], Q, S, {"mode": None}),
  ("w not packed", TypeError, ["w", "float32", "uint32"], W, S, {}),
  ("w a scalar", ValueError, ["w", "()"], np.uint32(1), S, {}),
  ("w no whole group", ValueError, ["w", "multiple of 2", "(8, 5)"], Q[:, :5], S, {}),
  ("shape of scales", ValueError, ["scales", "(8, 4)", "(8, 2)"], Q, S[:, :2], {}),
  ("dtype of scales", TypeError, ["scales", "float32"], Q, S.astype(np.float32), {}),
  ("dtype", TypeError, ["dtype", "int8", "bfloat16"], Q, S, {"dtype": jnp.int8}),
  ("dtype is none", TypeError, ["dtype", "'word'"], Q, S, {"dtype": "word"}),
  ("global scale", ValueError, ["global_scale", "'mxfp8'"], Q8, S8, {"mode": "mxfp8", "global_scale": ONE}),
]  # fmt: skip


@pytest.mark.parametrize("case", DEQUANTIZE, ids=[case[0] for case in DEQUANTIZE])
def test_dequantize(case):
  _, error, words, w, scales, kwargs = case
  with pytest.raises(error) as caught:
    jaxqq.dequantize(w, scales, **kwargs)
  check_sentence(str(caught.value), "dequantize", words)


def test_scalars_of_size_one_are_global_scales():
  want = np.asarray(jaxqq.qqmm(X, W, global_scale_x=ONE, global_scale_w=ONE))
  ones = (np.ones((), np.float32), np.ones((1,), np.float32), jnp.ones((1, 1)), 1, 1.0)
  for one in (*ones, np.float64(1), np.float16(1), jnp.bfloat16(1)):
    got = jaxqq.qqmm(X, W, global_scale_x=one, global_scale_w=one)
    np.testing.assert_array_equal(got, want)


def test_amax_is_taken_from_the_operands():
  """Of all of x beside one w, and of each matrix beside several."""
  scales = {"global_scale_x": np.abs(X).max(), "global_scale_w": np.abs(W).max()}
  of_operands = dict.fromkeys(scales, "amax")
  want = jaxqq.qqmm(X, W, **scales)
  np.testing.assert_array_equal(jaxqq.qqmm(X, W, **of_operands), want)
  np.testing.assert_array_equal(jax.jit(lambda x: jaxqq.qqmm(x, W, **of_operands))(X), want)
  assert jaxqq.explain(X, W, **of_operands, device="cpu").plan.name == "xla"
  xs, ws = (np.stack([a, 100 * a, a / 100]) for a in (X, W))
  whole = {"global_scale_x": np.abs(xs).max(), "global_scale_w": np.abs(W).max()}
  np.testing.assert_array_equal(jaxqq.qqmm(xs, W, **of_operands), jaxqq.qqmm(xs, W, **whole))
  each = {f"global_scale_{n}": np.abs(a).max((1, 2)) for n, a in (("x", xs), ("w", ws))}
  want = np.stack(
    [
      jaxqq.qqmm(x, w, global_scale_x=np.abs(x).max(), global_scale_w=np.abs(w).max())
      for x, w in zip(xs, ws, strict=True)
    ]
  )
  for how in (each, of_operands):
    np.testing.assert_allclose(jaxqq.qqmm(xs, ws, **how), want, rtol=2e-6, atol=0)


def test_any_byte_order_is_taken():
  swapped = jaxqq.qqmm(X.astype(">f4"), Q.astype(">u4"), S)
  np.testing.assert_array_equal(swapped, jaxqq.qqmm(X, Q, S))


def test_what_wraps_an_array_is_taken():
  class Parameter:
    def __jax_array__(self):
      return jnp.asarray(W)

  np.testing.assert_array_equal(jaxqq.qqmm(X, Parameter()), jaxqq.qqmm(X, W))
  np.testing.assert_array_equal(jaxqq.quantize(Parameter())[0], Q)
