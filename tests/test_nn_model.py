"""quantize_model, pack and unpack over a whole model of Flax NNX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqq
import jaxqq.nn
from tests.support import oracle
from tests.support.jaxprs import count
from tests.support.messages import check_sentence

TOKENS = jnp.arange(12).reshape(2, 6)


class Block(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.norm = nnx.LayerNorm(64, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
    self.mlp = nnx.Sequential(
      nnx.Linear(64, 96, rngs=rngs), nnx.gelu, nnx.Linear(96, 64, use_bias=False, rngs=rngs)
    )
    self.mix = nnx.Einsum("...d,dhk->...hk", (64, 4, 16), (4, 16), rngs=rngs)

  def __call__(self, x):
    x = x + self.attention(self.norm(x))
    x = x + self.mlp(x)
    return x + self.mix(x).reshape(x.shape)


class Model(nnx.Module):
  """One of everything; `odd` is contracted over 24 numbers, `gate` is no layer of nnx."""

  def __init__(self, rngs: nnx.Rngs, blocks: int = 1):
    self.embed = nnx.Embed(12, 64, rngs=rngs)
    self.conv = nnx.Conv(64, 64, (3,), rngs=rngs)
    self.blocks = nnx.List([Block(rngs) for _ in range(blocks)])
    self.odd = nnx.Linear(24, 8, rngs=rngs)
    self.lora = nnx.LoRALinear(64, 64, lora_rank=2, rngs=rngs)
    self.gate = nnx.Param(jnp.ones(()))
    self.pair = nnx.data((nnx.Linear(64, 64, rngs=rngs), 3))
    self.head = nnx.Linear(64, 12, rngs=rngs)
    self.tied = self.head

  def __call__(self, tokens):
    x = self.conv(self.embed(tokens))
    for block in self.blocks:
      x = block(x)
    return self.tied(self.pair[0](self.lora(x)) * self.gate[...])


LAYERS = {
  "blocks.0.attention.query": (64, 4, 16),
  "blocks.0.attention.key": (64, 4, 16),
  "blocks.0.attention.value": (64, 4, 16),
  "blocks.0.attention.out": (4, 16, 64),
  "blocks.0.mlp.layers.0": (64, 96),
  "blocks.0.mlp.layers.2": (96, 64),
  "blocks.0.mix": (64, 4, 16),
  "pair.0": (64, 64),
  "head": (64, 12),
}
REST = {
  "": "no layer of nnx",
  "embed": "looked up",
  "conv": "convolution",
  "blocks.0.norm": "element by element",
  "odd": "24 numbers, no multiple of the group size 32",
  "lora": "nnx.Linear would be lost",
  "lora.lora": "no layer of nnx",
}


@nnx.jit
def run(model, tokens):
  return model(tokens)


def arrays(model):
  return nnx.to_pure_dict(nnx.state(model))


@pytest.mark.usefixtures("quick_compiles")
def test_what_can_be_is_converted_and_the_rest_is_reported():
  model = Model(nnx.Rngs(0))
  structure, before = jax.tree.structure(arrays(model)), run(model, TOKENS)
  kernel = np.asarray(model.blocks[0].mlp.layers[0].kernel[...])
  report = jaxqq.nn.quantize_model(model, "mxfp8")
  assert {row.path: row.shape for row in report.converted} == LAYERS
  assert {row.path for row in report.not_converted} == set(REST)
  for path, words in REST.items():
    assert words in report[path].reason and report[path].relative_error is None
  row = report["blocks.0.mlp.layers.0"]
  assert (row.kind, row.mode, row.reason) == ("Linear", "mxfp8", None)
  hat = oracle.round_trip(kernel.T, "mxfp8").T
  want = np.linalg.norm(hat - kernel) / np.linalg.norm(kernel)
  assert row.relative_error == pytest.approx(want, rel=1e-4)
  assert report.bytes_before == report.bytes_after  # not packed
  # The same tree, so that checkpoints and optimizers go on.
  assert jax.tree.structure(arrays(model)) == structure
  assert model.head is model.tied and isinstance(model.tied, jaxqq.nn.QQLinear)
  assert type(model.blocks[0].attention.out) is jaxqq.nn.QQLinearGeneral
  assert type(model.pair[0]) is jaxqq.nn.QQLinear
  after = run(model, TOKENS)
  assert 0 < oracle.relative_error(np.asarray(after), np.asarray(before, np.float64)) < 0.2
  again = jaxqq.nn.quantize_model(model, "mxfp8")
  assert not again.converted and "already" in again["head"].reason


def test_report_is_a_table():
  model = Model(nnx.Rngs(0))
  report = jaxqq.nn.quantize_model(model, "mxfp8", packed=True)
  lines = str(report).splitlines()
  assert len(lines) == len(report) + 4 == len(list(report)) + 4
  assert lines[0].split()[:4] == ["layer", "kind", "kernel", "mode"]
  [head] = [line for line in lines if line.startswith("head ")]
  kernel, bias = 64 * 12, 12 * 4
  after = kernel + kernel // 32 + bias
  words = ["Linear", "64x12", "mxfp8", f"{4 * kernel + bias:,}", f"{after:,}"]
  assert head.split()[1:6] == words and head.split()[6].startswith("0.02")
  assert "9 of 16 converted" in lines[-1] and f"{report.bytes_after:,}" in lines[-1]
  sizes = sum(a.nbytes for a in jax.tree.leaves(arrays(model)))
  assert report.bytes_after == sizes < report.bytes_before
  with pytest.raises(KeyError):
    report["no such layer"]


@pytest.mark.parametrize("function", ["pack", "unpack"])
def test_a_model_with_nothing_to_do_is_refused(function):
  model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu)
  message = f"{function}: Sequential holds no layer of jaxqq.nn, .* jaxqq.nn.quantize_model"
  with pytest.raises(ValueError, match=message):
    getattr(jaxqq.nn, function)(model)
  assert type(model.layers[0]) is nnx.Linear


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(("mode", "scale", "blocks"), [("nvfp4", "amax", 0), ("mxfp8", None, 1)])
def test_packed_unpacked_split_saved(mode, scale, blocks):
  model = Model(nnx.Rngs(0), blocks)
  jaxqq.nn.quantize_model(model, mode, global_scale=scale)
  unpacked = run(model, TOKENS)
  jaxqq.nn.pack(model)
  np.testing.assert_array_equal(run(model, TOKENS), unpacked)
  np.testing.assert_array_equal(run(nnx.merge(*nnx.split(model)), TOKENS), unpacked)
  # A checkpoint: arrays of one model, into another that was packed without numbers.
  saved = jax.tree.map(np.asarray, arrays(model))
  other = nnx.eval_shape(lambda: Model(nnx.Rngs(1), blocks))
  report = jaxqq.nn.quantize_model(other, mode, global_scale=scale, packed=True)
  assert report["head"].relative_error is None and report["head"].bytes_after > 0
  nnx.update(other, saved)
  np.testing.assert_array_equal(run(other, TOKENS), unpacked)
  grads = nnx.eval_shape(nnx.grad(lambda m: jnp.mean(m(TOKENS) ** 2)), model)
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
  assert any("bias" in name for name in names) and not any("packed" in name for name in names)
  jaxqq.nn.unpack(model)
  np.testing.assert_allclose(run(model, TOKENS), unpacked, rtol=1e-3, atol=1e-4)
  assert model.head.kernel.shape == (64, 12)


def test_the_jaxpr_of_a_packed_model_holds_no_dequantized_weight():
  model = nnx.Sequential(Block(nnx.Rngs(0)), nnx.Linear(64, 128, rngs=nnx.Rngs(0)))
  jaxqq.nn.quantize_model(model, "nvfp4", packed=True, global_scale="amax")
  graph, state = nnx.split(model)
  x = jnp.ones((2, 64))
  jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, x[:, None]).jaxpr
  assert count(jaxpr, "qqmm") == 8
  words = []

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "qqmm":
        words.append(eqn.invars[1].aval)
      for sub in jax.extend.core.jaxprs_in_params(eqn.params):
        walk(sub)
      for v in eqn.outvars:
        is_float = jnp.issubdtype(v.aval.dtype, jnp.floating)
        assert not is_float or v.aval.size < 64 * 64, eqn

  walk(jaxpr)
  assert all(aval.dtype == jnp.uint32 for aval in words)
  assert sorted(aval.shape for aval in words) == sorted(
    [(64, 8)] * 5 + [(96, 8), (64, 12), (128, 8)]
  )


def test_predicate_leaves_out_and_chooses():
  asked = []

  def predicate(path, layer):
    asked.append((path, type(layer)))
    return {"head": False, "pair.0": "mxfp8"}.get(path, True)

  model = Model(nnx.Rngs(0))
  report = jaxqq.nn.quantize_model(model, "nvfp4", global_scale="amax", predicate=predicate)
  assert dict(asked)["head"] is nnx.Linear and dict(asked)["blocks.0.mix"] is nnx.Einsum
  assert "predicate" in report["head"].reason and type(model.head) is nnx.Linear
  assert report["pair.0"].mode == model.pair[0].mode == "mxfp8"
  assert report["blocks.0.mix"].mode == "nvfp4"
  assert model.blocks[0].mix.dot_general.global_scale == "amax"
  assert model.pair[0].dot_general.global_scale is None


def test_a_function_of_its_own_is_not_replaced():
  own = nnx.Linear(64, 8, dot_general=lambda *args, **kwargs: None, rngs=nnx.Rngs(0))
  ours = nnx.Linear(64, 8, dot_general=jaxqq.dot_general(), rngs=nnx.Rngs(0))
  report = jaxqq.nn.quantize_model(nnx.List([own, ours]), "mxfp8")
  assert "own dot_general" in report["0"].reason and report["1"].converted


def test_containers_of_python_and_layers_stacked():
  @nnx.vmap(in_axes=0, out_axes=0)
  def stack(key):
    return nnx.Linear(64, 64, rngs=nnx.Rngs(key))

  @nnx.vmap(in_axes=0, out_axes=1)
  def stack_behind(key):
    return nnx.Linear(64, 64, use_bias=False, rngs=nnx.Rngs(key))

  class Holder(nnx.Module):
    def __init__(self):
      keys = jax.random.split(jax.random.key(0), 3)
      self.many = nnx.data({"a": [stack(keys)], "b": stack_behind(keys)})

  model = Holder()
  report = jaxqq.nn.quantize_model(model, "mxfp8", packed=True)
  assert model.many["a"][0].weight.shape == (3, 64, 64)
  assert "no stack of (64, 64)" in report["many.b"].reason


ERRORS = [
  ("no module", TypeError, ["nnx.Module", "dict"], {}, {}),
  ("a layer", TypeError, ["nnx.Linear", "QQLinear"], nnx.Linear(64, 8, rngs=nnx.Rngs(0)), {}),
  ("mode", ValueError, ["'int4'"], nnx.List([]), {"mode": "int4"}),
  ("backward", ValueError, ["backward"], nnx.List([]), {"backward": "ste"}),
  ("scale", ValueError, ["'mxfp8'"], nnx.List([]), {"mode": "mxfp8", "global_scale": "amax"}),
]


@pytest.mark.parametrize("case", ERRORS, ids=[case[0] for case in ERRORS])
def test_what_cannot_be_converted(case):
  _, error, words, model, kwargs = case
  with pytest.raises(error) as caught:
    jaxqq.nn.quantize_model(model, **kwargs)
  check_sentence(str(caught.value), "quantize_model", words)
