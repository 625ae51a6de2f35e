"""Bad input of the layers of experts: one sentence, as of `test_errors.py`."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import jaxqq
import jaxqq.nn
from jaxqq import checkpoint
from tests.support.messages import check_sentence

E, K, N = 3, 64, 32
X, SIZES = np.ones((6, K), np.float32), np.int32([2, 0, 3])
CHOSEN, WEIGHTS = np.int32([[0, 2]] * 6), np.full((6, 2), 0.5, np.float32)
WEIGHT = jaxqq.quantize_weight(np.ones((E, N, K), np.float32), "mxfp8")


def built(kind, *sizes, **options):
  return lambda: getattr(jaxqq.nn, kind)(*(sizes or (E, K, N)), rngs=nnx.Rngs(0), **options)


def linear(packed=False):
  layer = jaxqq.nn.QQExpertLinear(E, K, N, mode="mxfp8", rngs=nnx.Rngs(0))
  if packed:
    layer.pack()
  return layer


LINEAR, PACKED = linear(), linear(packed=True)
PLAIN = jaxqq.nn.ExpertLinear(E, K, N, rngs=nnx.Rngs(0))
EXPERTS = jaxqq.nn.QQExperts(E, K, N, mode="mxfp8", rngs=nnx.Rngs(0))


class Own(jaxqq.nn.ExpertLinear):
  pass


# (what is wrong, error, whose name, words of the message, call)
CASES = [
  ("no experts", ValueError, "QQExperts", ["num_experts", "at least 1", "0"], built("QQExperts", 0, K, N)),
  ("half an expert", TypeError, "QQExperts", ["num_experts", "integer", "1.5"], built("QQExperts", 1.5, K, N)),
  ("no features", ValueError, "QQExperts", ["features", "at least 1", "0"], built("QQExperts", E, 0, N)),
  ("no hidden features", ValueError, "Experts", ["hidden_features", "at least 1", "-1"], built("Experts", E, K, -1)),
  ("a recipe", TypeError, "QQExperts", ["no recipe", "backward"], built("QQExperts", recipe="nvfp4")),
  ("activation by its name", TypeError, "QQExperts", ["activation", "function", "'silu'"], built("QQExperts", activation="silu")),
  ("no kernels", ValueError, "ExpertLinear", ["num_experts", "at least 1", "0"], built("QQExpertLinear", 0, K, N)),
  ("features of no groups", ValueError, "QQExpertLinear", ["40", "16", "'nvfp4'"], built("QQExperts", E, 40, N)),
  ("hidden features of no groups", ValueError, "QQExpertLinear", ["48", "32", "'mxfp8'"], built("QQExperts", E, K, 48, mode="mxfp8")),
  ("mode", ValueError, "QQExpertLinear", ["'int4'"], built("QQExperts", mode="int4")),
  ("backward", ValueError, "QQExpertLinear", ["backward", "'ste'"], built("QQExperts", backward="ste")),
  ("global scale", ValueError, "QQExpertLinear", ["global_scale", "3"], built("QQExpertLinear", global_scale=3)),
  ("a scale that mxfp8 has not", ValueError, "QQExpertLinear", ["global_scale", "mxfp8"], built("QQExpertLinear", mode="mxfp8", global_scale="amax")),
  ("both backwards", ValueError, "QQExpertLinear", ["quantize_input", "backward"], built("QQExpertLinear", backward="quantized", quantize_input=False)),
  ("its own einsum", ValueError, "QQExpertLinear", ["its own einsum_op"], built("QQExpertLinear", einsum_op=lambda *a, **k: None)),
  ("gated", TypeError, "QQExperts", ["gated", "1"], built("QQExperts", gated=1)),
  ("another class", TypeError, "QQExpertLinear.from_linear", ["jaxqq.nn.ExpertLinear", "Own"], lambda: jaxqq.nn.QQExpertLinear.from_linear(Own(E, K, N, rngs=nnx.Rngs(0)))),
  ("nnx.Linear", TypeError, "QQExpertLinear.from_linear", ["jaxqq.nn.ExpertLinear", "Linear"], lambda: jaxqq.nn.QQExpertLinear.from_linear(nnx.Linear(K, N, rngs=nnx.Rngs(0)))),
  ("one layer as a model", TypeError, "quantize_model", ["jaxqq.nn.ExpertLinear", "jaxqq.nn.QQExpertLinear"], lambda: jaxqq.nn.quantize_model(PLAIN)),
  ("a weight of one matrix", ValueError, "QQExpertLinear.from_weight", ["three dimensions", "(32, 64)"], lambda: jaxqq.nn.QQExpertLinear.from_weight(WEIGHT[0])),
  ("a bias of one expert", ValueError, "QQExpertLinear.from_weight", ["bias", "(3, 32)", "(32,)"], lambda: jaxqq.nn.QQExpertLinear.from_weight(WEIGHT, np.ones(N, np.float32))),
  ("a weight of other experts", ValueError, "QQExpertLinear.set_weight", ["(3, 32, 64)", "(2, 32, 64)"], lambda: linear().set_weight(WEIGHT[:2])),
  ("rows of other features", ValueError, "QQExpertLinear", ["inputs", "(M, 64)", "(6, 32)"], lambda: LINEAR(X[:, :32], SIZES)),
  ("rows of three axes", ValueError, "QQExpertLinear", ["inputs", "(M, 64)", "(1, 6, 64)"], lambda: PACKED(X[None], SIZES)),
  ("plain rows of three axes", ValueError, "ExpertLinear", ["inputs", "(M, 64)", "(1, 6, 64)"], lambda: PLAIN(X[None], SIZES)),
  ("a list of rows", TypeError, "QQExpertLinear", ["inputs", "list"], lambda: LINEAR(X.tolist(), SIZES)),
  ("sizes of two experts", ValueError, "QQExpertLinear", ["group_sizes", "(3,)", "(2,)", "group_offset"], lambda: LINEAR(X, SIZES[:2])),
  ("packed, sizes of two experts", ValueError, "QQExpertLinear", ["group_sizes", "(3,)", "(2,)"], lambda: PACKED(X, SIZES[:2])),
  ("plain sizes of two experts", ValueError, "ExpertLinear", ["group_sizes", "(3,)", "(2,)"], lambda: PLAIN(X, SIZES[:2])),
  ("float sizes", TypeError, "QQExpertLinear", ["group_sizes", "integers", "float32"], lambda: LINEAR(X, SIZES.astype(np.float32))),
  ("plain float sizes", TypeError, "ExpertLinear", ["group_sizes", "integers", "float32"], lambda: PLAIN(X, SIZES.astype(np.float32))),
  ("two offsets", ValueError, "QQExpertLinear", ["group_offset", "() or (1,)", "(2,)"], lambda: LINEAR(X, SIZES, np.int32([0, 1]))),
  ("plain float offset", TypeError, "ExpertLinear", ["group_offset", "integers"], lambda: PLAIN(X, SIZES, np.float32(1))),
  ("buffers of rows", ValueError, "QQExpertLinear.buffers", ["inputs", "(3, C, 64)", "(6, 64)"], lambda: LINEAR.buffers(X)),
  ("buffers of other experts", ValueError, "QQExpertLinear.buffers", ["inputs", "(3, C, 64)", "(2, 4, 64)"], lambda: PACKED.buffers(np.ones((2, 4, K), np.float32))),
  ("plain buffers of other experts", ValueError, "ExpertLinear.buffers", ["inputs", "(3, C, 64)", "(2, 4, 64)"], lambda: PLAIN.buffers(np.ones((2, 4, K), np.float32))),
  ("tokens of other features", ValueError, "QQExperts", ["inputs", "(..., 64)", "(6, 32)"], lambda: EXPERTS(X[:, :32], CHOSEN)),
  ("tokens None", TypeError, "QQExperts", ["inputs", "NoneType"], lambda: EXPERTS(None, CHOSEN)),
  ("weights as experts", TypeError, "QQExperts", ["experts", "integers", "float32"], lambda: EXPERTS(X, WEIGHTS, CHOSEN)),
  ("experts of five tokens", ValueError, "QQExperts", ["experts", "(6, top)", "(5, 2)"], lambda: EXPERTS(X, CHOSEN[:5])),
  ("one expert a token without its axis", ValueError, "QQExperts", ["experts", "(6, top)", "(6,)"], lambda: EXPERTS(X, CHOSEN[:, 0])),
  ("a mask of experts", TypeError, "QQExperts", ["experts", "integers", "bool"], lambda: EXPERTS(X, CHOSEN > 0)),
  ("integer weights", TypeError, "QQExperts", ["weights", "floats", "int32"], lambda: EXPERTS(X, CHOSEN, CHOSEN)),
  ("weights of one expert", ValueError, "QQExperts", ["weights", "(6, 2)", "(6, 1)"], lambda: EXPERTS(X, CHOSEN, WEIGHTS[:, :1])),
  ("all router's numbers as weights", ValueError, "QQExperts", ["weights", "(6, 2)", "(6, 3)"], lambda: EXPERTS(X, CHOSEN, np.ones((6, 3), np.float32))),
  ("rows of tokens", ValueError, "QQExperts.grouped", ["inputs", "(M, 64)", "(2, 3, 64)"], lambda: EXPERTS.grouped(X.reshape(2, 3, K), SIZES)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_what_is_refused(case):
  _, error, function, words, call = case
  with pytest.raises(error) as caught:
    call()
  check_sentence(str(caught.value), function, words)


def test_bad_numbers_under_jit_are_of_no_expert():
  """Under jit there is nobody to tell: they count as zeros, as padding does."""
  numbers = np.int32([[0, 2], [3, 1], [-1, 2], [2**31 - 1, -(2**31)], [1, 1], [0, 3]])
  out = np.asarray(jax.jit(lambda x, numbers: EXPERTS(x, numbers))(X, numbers))
  is_one = (numbers >= 0) & (numbers < E)
  assert not out[~is_one].any() and out[is_one].any(axis=-1).all()


def test_a_number_beyond_int32_is_of_no_expert():
  assert not np.asarray(EXPERTS(X, np.full((6, 2), 2**32))).any()


def test_of_no_expert_any_weight_counts_as_zero():
  """A router's softmax over padding alone is NaN."""
  numbers = np.int32([[0, -1]] * 6)
  weights = np.float32([[0.5, np.nan]] * 6)
  want = EXPERTS(X, numbers, np.float32([[0.5, 0]] * 6))
  np.testing.assert_array_equal(EXPERTS(X, numbers, weights), want)
  gradient = jax.grad(lambda x: EXPERTS(x, numbers, weights).sum())(X)
  assert np.isfinite(np.asarray(gradient)).all()


def test_a_checkpoint_that_does_not_fit(tmp_path):
  """Of other experts, or whose inputs are left alone beside the quantized backward."""
  checkpoint.save(tmp_path / "m", {"m.experts.up_proj.weight": WEIGHT[:2]}, format="modelopt")
  model = nnx.Dict(m=nnx.Dict(experts=jaxqq.nn.Experts(E, K, N, rngs=nnx.Rngs(0))))
  options = {"experts": "stack", "partial": True}
  with pytest.raises(ValueError) as caught:
    checkpoint.load_into(model, tmp_path / "m", **options)
  check_sentence(
    str(caught.value), "load_into", ["(2, 32, 64)", "m.experts.up_proj", "(3, 32, 64)"]
  )
  alone = dataclasses.replace(WEIGHT, quantize_input=False)
  checkpoint.save(tmp_path / "alone", {"m.experts.up_proj.weight": alone}, format="modelopt")
  jaxqq.nn.quantize_model(model, "mxfp8", backward="quantized")
  with pytest.raises(ValueError) as caught:
    checkpoint.load_into(model, tmp_path / "alone", **options)
  check_sentence(str(caught.value), "load_into", ["m.experts.up_proj", "'quantized'"])
