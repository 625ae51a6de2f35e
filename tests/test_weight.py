"""QuantizedWeight: what it holds, as a tree, and in w's place."""

from __future__ import annotations

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxqq
from tests.support import oracle
from tests.support.messages import check_sentence
from tests.support.operands import amax

RNG = np.random.default_rng(0)
W = oracle.random(RNG, (8, 64), "float32")
STACK = oracle.random(RNG, (3, 8, 64), "float32") * np.float32([[[1]], [[20]], [[0.1]]])
X = oracle.random(RNG, (4, 64), "float32")


CASES = [
  ("nvfp4", None),
  ("nvfp4", "amax"),
  ("nvfp4", np.float32(7)),
  ("mxfp8", None),
  ("mxfp4", None),
]
IDS = [f"{mode}-{scale}" for mode, scale in CASES]


@pytest.mark.parametrize(
  ("mode", "scale", "dtype"),
  [*((*case, "float32") for case in CASES), ("nvfp4", "amax", "bfloat16")],
)
def test_holds_the_bits_of_the_oracle(mode, scale, dtype):
  w = W.astype(oracle.DTYPES[dtype])
  weight = jaxqq.quantize_weight(w, mode, global_scale=scale)
  number = amax(w) if isinstance(scale, str) else scale
  packed, scales = oracle.quantize(w, mode, number)
  np.testing.assert_array_equal(weight.packed, packed)
  np.testing.assert_array_equal(weight.scales, scales)
  assert (weight.global_scale is None) == (scale is None)
  assert scale is None or weight.global_scale == number
  assert (weight.shape, weight.ndim, weight.size, weight.dtype) == ((8, 64), 2, 512, w.dtype)
  assert weight.nbytes == packed.nbytes + scales.nbytes + (0 if scale is None else 4)
  want = oracle.round_trip(w, mode, number)
  got = weight.dequantize(jnp.float32)
  np.testing.assert_allclose(got, want, rtol=2**-22, atol=0)
  assert weight.dequantize().dtype == w.dtype
  assert weight.dequantize(jnp.float16).dtype == jnp.float16


@pytest.mark.parametrize(
  "number",
  [5, 5.0, np.float64(5), np.float16(5), jnp.bfloat16(5), jnp.ones((1, 1), jnp.bfloat16) * 5],
  ids=["int", "float", "float64", "float16", "bfloat16", "size1"],
)
def test_global_scales_are_any_number(number):
  weight = jaxqq.quantize_weight(W, global_scale=number)
  own = jaxqq.QuantizedWeight(weight.packed, weight.scales, "nvfp4", number, "float32", number)
  for scale in (weight.global_scale, own.global_scale, own.input_global_scale):
    assert (scale.shape, scale.dtype, float(scale)) == ((), jnp.float32, 5)
  each = jaxqq.quantize_weight(STACK, global_scale=np.float16([3, 60, 0.5]))
  assert each.global_scale.dtype == jnp.float32 and each.global_scale.tolist() == [3, 60, 0.5]
  assert jaxqq.quantize_weight(STACK, global_scale=number).global_scale.tolist() == [5, 5, 5]
  abstract = jax.eval_shape(lambda: each)
  half = jax.ShapeDtypeStruct((3,), jnp.float16)
  assert dataclasses.replace(abstract, global_scale=half).global_scale.dtype == jnp.float32


@pytest.mark.parametrize(("mode", "scale"), CASES, ids=IDS)
def test_stacked_matrices_are_quantized_one_by_one(mode, scale):
  stacked = jaxqq.quantize_weight(STACK, mode, global_scale=scale)
  assert stacked.shape == STACK.shape
  for i, w in enumerate(STACK):
    one = jaxqq.quantize_weight(w, mode, global_scale=scale)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a, i=i: a[i], stacked), one)
    np.testing.assert_array_equal(stacked.dequantize()[i], one.dequantize())
  mapped = jax.vmap(lambda w: jaxqq.quantize_weight(w, mode, global_scale=scale))(STACK)
  jax.tree.map(np.testing.assert_array_equal, mapped, stacked)


def full() -> jaxqq.QuantizedWeight:
  weight = jaxqq.quantize_weight(W, global_scale="amax")
  return dataclasses.replace(weight, input_global_scale=jnp.float32(5))


def test_is_a_tree_of_arrays():
  weight = full()
  leaves, structure = jax.tree.flatten(weight)
  assert [leaf.dtype.name for leaf in leaves] == ["uint32", "uint8", "float32", "float32"]
  again = jax.tree.unflatten(structure, leaves)
  assert (again.mode, again.dtype, again.shape) == ("nvfp4", np.float32, (8, 64))
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(weight)]
  assert paths == [".packed", ".scales", ".global_scale", ".input_global_scale"]
  other = jaxqq.quantize_weight(W, "mxfp8")
  assert jax.tree.structure(other) != structure
  assert hash(jax.tree.structure(full())) == hash(structure)
  with pytest.raises(dataclasses.FrozenInstanceError):
    weight.mode = "mxfp8"


@pytest.mark.parametrize("leaf", [None, object(), 0, "a", PartitionSpec("x"), (1, 2)])
def test_any_leaves_make_a_tree_of_the_same_kind(leaf):
  tree = jax.tree.map(lambda _: leaf, full())
  assert tree.packed is leaf and tree.input_global_scale is leaf
  assert "QuantizedWeight" in repr(tree)
  jax.tree.structure(tree)


def test_abstract_arrays_are_taken():
  weight = jax.eval_shape(full)
  assert weight.shape == (8, 64) and weight.nbytes == full().nbytes
  struct = jax.ShapeDtypeStruct
  made = jaxqq.QuantizedWeight(struct((8, 8), jnp.uint32), struct((8, 4), ml_dtypes.float8_e4m3fn))
  assert made.shape == (8, 64) and made.scales.dtype == np.uint8
  assert "nvfp4" in jaxqq.explain(jax.ShapeDtypeStruct((4, 64), jnp.float32), made)


def test_scales_as_float8_are_the_same_bytes():
  packed, scales = oracle.quantize(W, "mxfp8")
  for made in (scales, scales.view(ml_dtypes.float8_e8m0fnu), jnp.asarray(scales)):
    weight = jaxqq.QuantizedWeight(packed, made, "mxfp8")
    np.testing.assert_array_equal(weight.scales, scales)
    assert weight.scales.dtype == np.uint8 and weight.dtype == jnp.bfloat16


@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
def test_in_the_place_of_w(mode):
  weight = jaxqq.quantize_weight(W, mode)
  scales = {}
  if mode == "nvfp4":  # of x none
    scales = {"global_scale_x": 2688, "global_scale_w": weight.global_scale}
  want = jaxqq.qqmm(X, weight.packed, weight.scales, mode=mode, **scales)
  np.testing.assert_array_equal(jaxqq.qqmm(X, weight), want)
  np.testing.assert_array_equal(jaxqq.qqmm(X, weight, mode=mode), want)
  np.testing.assert_array_equal(jax.jit(jaxqq.qqmm)(X, weight), want)
  np.testing.assert_array_equal(jaxqq.qqmm(X[0], weight), want[0])
  assert f"qqmm {mode}" in jaxqq.explain(X, weight) and " packed" in jaxqq.explain(X, weight)


def test_static_scale_of_the_input():
  weight = full()
  plain = dataclasses.replace(weight, input_global_scale=None)
  want = jaxqq.qqmm(X, plain, global_scale_x=np.float32(5))
  np.testing.assert_array_equal(jaxqq.qqmm(X, weight), want)
  own = jaxqq.qqmm(X, weight, global_scale_x=np.float32(3))
  np.testing.assert_array_equal(own, jaxqq.qqmm(X, plain, global_scale_x=np.float32(3)))
  assert (own != want).any()
  raw = (weight.packed, weight.scales)
  scales = {"global_scale_x": np.float32(5), "global_scale_w": weight.global_scale}
  np.testing.assert_array_equal(jaxqq.qqmm(X, *raw, **scales), want)


def test_gradient_reaches_x():
  weight = full()

  def loss(x, *w, **kwargs):
    return jnp.sum(jnp.sin(jaxqq.qqmm(x, *w, **kwargs)))

  got = jax.grad(loss)(X, weight)
  scales = {"global_scale_x": np.float32(5), "global_scale_w": weight.global_scale}
  np.testing.assert_array_equal(got, jax.grad(loss)(X, weight.packed, weight.scales, **scales))
  assert np.abs(got).min() > 0


@pytest.mark.parametrize(("mode", "scale"), [("nvfp4", "amax"), ("mxfp8", None)])
def test_scan_vmap_and_batches_over_stacked_layers(mode, scale):
  square = oracle.random(RNG, (3, 64, 64), "float32")
  stacked = jaxqq.quantize_weight(square, mode, global_scale=scale)
  if scale is not None:
    stacked = dataclasses.replace(stacked, input_global_scale=np.float32([4, 5, 6]))
  ones = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(3)]
  step = jax.jit(jaxqq.qqmm)
  x = X
  for one in ones:
    x = step(x, one)
  scanned, _ = jax.lax.scan(lambda x, w: (jaxqq.qqmm(x, w), None), X, stacked)
  np.testing.assert_array_equal(scanned, x)
  want = np.stack([step(X, one) for one in ones])
  np.testing.assert_array_equal(jax.vmap(jaxqq.qqmm, (None, 0))(X, stacked), want)
  np.testing.assert_array_equal(jaxqq.qqmm(X, stacked), want)
  xs = np.stack([X] * 3)
  np.testing.assert_array_equal(jax.vmap(jaxqq.qqmm)(xs, stacked), want)


def test_a_tree_of_shardings():
  mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))

  def place(a):
    return NamedSharding(mesh, PartitionSpec("tensor") if a.ndim else PartitionSpec())

  weight = full()
  placed = jax.device_put(weight, jax.tree.map(place, weight))
  assert placed.packed.sharding.spec == PartitionSpec("tensor")
  out = jax.jit(jaxqq.qqmm)(X, placed)
  np.testing.assert_allclose(out, jaxqq.qqmm(X, weight), rtol=1e-5, atol=1e-5)


def test_orbax_saves_and_restores(tmp_path):
  import orbax.checkpoint as ocp  # comes with flax

  tree = {"layer": full(), "bias": jnp.ones(8)}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "one", tree)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "one", jax.eval_shape(lambda: tree))
  assert isinstance(restored["layer"], jaxqq.QuantizedWeight)
  jax.tree.map(np.testing.assert_array_equal, restored, tree)


Q, S = oracle.quantize(W, "nvfp4")
ONE = np.float32(1)

MAKE = [
  ("mode", ValueError, ["mode", "'int4'", "'nvfp4'"], (Q, S, "int4"), {}),
  ("packed dtype", TypeError, ["packed", "uint32", "int32"], (Q.view(np.int32), S), {}),
  ("packed a list", TypeError, ["packed", "list"], (Q.tolist(), S), {}),
  ("one axis", ValueError, ["packed", "two dimensions", "(8,)"], (Q[0], S[0]), {}),
  ("scales shape", ValueError, ["scales", "(8, 4)", "(8, 3)"], (Q, S[:, :3]), {}),
  ("scales dtype", TypeError, ["scales", "uint8", "float32"], (Q, S.astype(np.float32)), {}),
  ("scales of another mode", ValueError, ["scales", "(8, 1)", "(8, 4)"], (Q, S, "mxfp8"), {}),
  ("dtype", TypeError, ["dtype", "bfloat16", "int8"], (Q, S), {"dtype": np.int8}),
  ("scale shape", ValueError, ["global_scale", "scalar", "(5,)", "(8,)"], (Q, S), {"global_scale": np.ones(5, np.float32)}),
  ("scale dtype", TypeError, ["global_scale", "float32", "float64"], (Q, S), {"global_scale": np.ones((), np.float64)}),
  ("input scale", TypeError, ["input_global_scale", "int32", "amax"], (Q, S), {"input_global_scale": np.int32([1])}),
]  # fmt: skip


INDICES = [
  np.s_[0],
  np.s_[-1],
  np.s_[1:],
  np.s_[:, :4],
  np.s_[1, 2:6],
  np.s_[..., 2:4, :],
  np.s_[:, ::2, :],
  np.s_[np.array([2, 0])],
  np.s_[np.array([2, 0]), 1:5],
  np.s_[np.int64(1), ..., :],
]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize(("mode", "scale"), CASES[1:4], ids=IDS[1:4])
def test_matrices_and_rows_are_taken_as_from_an_array(mode, scale, index):
  stack = jaxqq.quantize_weight(STACK, mode, global_scale=scale)
  part = stack[index]
  want = np.asarray(stack.dequantize(jnp.float32))[index]
  assert part.shape == want.shape and part.mode == mode and part.dtype == stack.dtype
  np.testing.assert_array_equal(part.dequantize(jnp.float32), want)
  jitted = jax.jit(lambda weight: weight[index])(stack)
  np.testing.assert_array_equal(jitted.packed, part.packed)


def test_a_matrix_is_taken_by_a_traced_index():
  stack = jaxqq.quantize_weight(STACK, global_scale="amax")
  x_scale = np.float32(3)
  picked = jax.jit(lambda i: jaxqq.qqmm(X, stack[i], global_scale_x=x_scale))(1)
  np.testing.assert_array_equal(picked, jaxqq.qqmm(X, stack[1], global_scale_x=x_scale))


WRONG_INDICES = [
  (np.s_[0, 1], ["rows", "(3, 8, 64)", "sliced"]),
  (np.s_[..., :32], ["last axis", "(3, 8, 64)", "groups"]),
  (np.s_[0, :, :, 0], ["too long", "(3, 8, 64)"]),
  (np.s_[..., 0, ...], ["too long"]),
  (np.s_[3], ["3", "out of range", "3 matrices"]),
  (np.s_[np.array([True, False, True])], ["integers"]),
  (np.s_[None], ["integers"]),
]


@pytest.mark.parametrize(("index", "words"), WRONG_INDICES, ids=str)
def test_what_is_no_index(index, words):
  stack = jaxqq.quantize_weight(STACK)
  with pytest.raises(IndexError) as caught:
    stack[index]
  check_sentence(str(caught.value), "QuantizedWeight", words)


def test_is_no_array_and_has_no_transpose():
  weight = jaxqq.quantize_weight(W)
  for convert in (np.asarray, jnp.asarray, lambda a: np.sum(a)):
    with pytest.raises(TypeError, match="dequantize"):
      convert(weight)
  with pytest.raises(AttributeError, match="quantize_weight"):
    _ = weight.T


def test_is_no_right_operand_of_matmul():
  weight = jaxqq.quantize_weight(W)
  for w in (weight, jaxqq.quantize_weight(oracle.random(RNG, (64, 64), "float32"))):
    with pytest.raises(TypeError) as caught:
      jnp.asarray(X) @ w
    check_sentence(str(caught.value), "QuantizedWeight", ["jaxqq.qqmm(x, w)"])


def test_repr_of_any_tree():
  weight = jaxqq.quantize_weight(W, global_scale="amax")
  for leaf in (np.dtype("int32"), jax.ShapeDtypeStruct((), "float32"), "name", None, 3, ()):
    tree = jax.tree.unflatten(jax.tree.structure(weight), [leaf] * 3)
    assert repr(tree).startswith("QuantizedWeight(") and "mode=" in repr(tree)
  abstract = jax.eval_shape(lambda: jaxqq.quantize_weight(W))
  assert repr(abstract) == "QuantizedWeight(nvfp4, float32 (8, 64), with global_scale)"


@pytest.mark.parametrize(("mode", "scale"), CASES, ids=IDS)
def test_along_the_axis_of_a_kernel(mode, scale):
  kernel = np.swapaxes(STACK, -1, -2)
  got = jaxqq.quantize_weight(kernel, mode, global_scale=scale, axis=-2)
  want = jaxqq.quantize_weight(STACK, mode, global_scale=scale)
  assert got.shape == want.shape == STACK.shape
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_exported_programs_take_one():
  weight = jaxqq.quantize_weight(W, global_scale="amax")
  f = jax.jit(lambda x, weight: jaxqq.qqmm(x, weight, global_scale_x=np.float32(4)))
  exported = jax.export.export(f)(X, weight)
  again = jax.export.deserialize(exported.serialize())
  np.testing.assert_array_equal(again.call(X, weight), f(X, weight))


@pytest.mark.parametrize("case", MAKE, ids=[case[0] for case in MAKE])
def test_what_is_no_weight(case):
  _, error, words, args, kwargs = case
  with pytest.raises(error) as caught:
    jaxqq.QuantizedWeight(*args, **kwargs)
  check_sentence(str(caught.value), "QuantizedWeight", words)


QUANTIZE = [
  ("mode", ValueError, ["mode", "'fp4'"], W, {"mode": "fp4"}),
  ("one axis", ValueError, ["w", "two dimensions", "(64,)"], W[0], {}),
  ("group", ValueError, ["w", "16", "(8, 40)"], W[:, :40], {}),
  ("dtype", TypeError, ["w", "float64"], W.astype(np.float64), {}),
  ("word", ValueError, ["global_scale", "'max'", "'amax'"], W, {"global_scale": "max"}),
  ("mxfp8", ValueError, ["global_scale", "'mxfp8'"], W, {"mode": "mxfp8", "global_scale": "amax"}),
  ("integers", TypeError, ["global_scale", "int32"], W, {"global_scale": np.int32([2])}),
  ("axis", ValueError, ["axis", "-1 or -2", "-1.0"], W, {"axis": -1.0}),
  ("one a row", ValueError, ["global_scale", "(8,)", "scalar"], W, {"global_scale": W[:, 0]}),
]


@pytest.mark.parametrize("case", QUANTIZE, ids=[case[0] for case in QUANTIZE])
def test_what_cannot_be_quantized(case):
  _, error, words, w, kwargs = case
  with pytest.raises(error) as caught:
    jaxqq.quantize_weight(w, **kwargs)
  check_sentence(str(caught.value), "quantize_weight", words)


PLAIN = jaxqq.quantize_weight(W, global_scale=None)
SCALED = jaxqq.quantize_weight(W, global_scale="amax")
MX = jaxqq.quantize_weight(W, "mxfp8")

PRODUCT = [
  ("scales", ValueError, ["scales", "QuantizedWeight", "leave"], X, PLAIN, {"scales": S}),
  ("global_scale_w", ValueError, ["global_scale_w", "leave"], X, SCALED, {"global_scale_x": ONE, "global_scale_w": ONE}),
  ("another mode", ValueError, ["'mxfp8'", "'nvfp4'", "leave mode out"], X, PLAIN, {"mode": "mxfp8"}),
  ("the usual mode", ValueError, ["'nvfp4'", "'mxfp8'"], X, MX, {"mode": "nvfp4"}),
  ("group_size", ValueError, ["group_size=16", "32"], X, MX, {"group_size": 16}),
  ("no scale of w", ValueError, ["global_scale_x", "no global scale"], X, PLAIN, {"global_scale_x": ONE}),
  ("K", ValueError, ["x", "K = 64", "(4, 32)"], X[:, :32], PLAIN, {}),
  ("no arrays", TypeError, ["w", "NoneType"], X, jax.tree.map(lambda _: None, PLAIN), {}),
]  # fmt: skip


@pytest.mark.parametrize("function", [jaxqq.qqmm, jaxqq.explain], ids=["qqmm", "explain"])
@pytest.mark.parametrize("case", PRODUCT, ids=[case[0] for case in PRODUCT])
def test_products_that_contradict_the_weight(case, function):
  _, error, words, x, w, kwargs = case
  with pytest.raises(error) as caught:
    function(x, w, **kwargs)
  check_sentence(str(caught.value), function.__name__, words)


METHODS = {
  "QuantizedWeight": jaxqq.QuantizedWeight,
  "dequantize": jaxqq.QuantizedWeight.dequantize,
  "einsum": type(jaxqq.dot_general()).einsum,
}


@pytest.mark.parametrize("name", METHODS)
def test_examples_in_docstrings(name):
  names = {"jax": jax, "jnp": jnp, "jaxqq": jaxqq}
  example = doctest.DocTestParser().get_doctest(METHODS[name].__doc__, names, name, None, 0)
  assert example.examples
  assert doctest.DocTestRunner().run(example).failed == 0
