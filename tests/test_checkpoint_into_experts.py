"""Checkpoints of experts put into `jaxqq.nn.Experts`, and models with them saved."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import jaxqq
import jaxqq.nn
from jaxqq import checkpoint
from tests.support import checkpoints, oracle

E, K, N, TOP = 4, 64, 32, 2
X = oracle.random(np.random.default_rng(0), (6, K), "float32")
PARTS = ("gate_proj", "up_proj", "down_proj")


class Block(nnx.Module):
  """Of the names that most checkpoints have."""

  def __init__(self, rngs=None, **options):
    rngs = rngs or nnx.Rngs(0)
    self.gate = nnx.Linear(K, E, use_bias=False, rngs=rngs)
    self.experts = jaxqq.nn.Experts(E, K, N, rngs=rngs, **options)

  def __call__(self, x):
    weights, chosen = jax.lax.top_k(jax.nn.softmax(self.gate(x)), TOP)
    return self.experts(x, chosen, weights)


@jax.jit
def run(model, x):
  return model(x)


def packed(mode, **options):
  """A model whose experts are packed, and its tensors."""
  model = nnx.Dict(mlp=Block())
  keep = lambda path, layer: not path.endswith("gate")  # noqa: E731
  jaxqq.nn.quantize_model(model, mode, predicate=keep, packed=True, **options)
  layers = model.mlp.experts
  tensors = {f"mlp.experts.{part}.weight": getattr(layers, part).weight for part in PARTS}
  return model, tensors | {"mlp.gate.weight": np.asarray(model.mlp.gate.kernel[...].T)}


FORMATS = [
  *(("modelopt", "nvfp4"), ("modelopt", "mxfp8"), ("compressed-tensors", "nvfp4")),
  *(("mlx", "mxfp8"), ("transformers", "mxfp8")),
]


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(("format", "mode"), FORMATS)
def test_a_model_saves_and_loads(format, mode, tmp_path):
  """A layer for each expert, but in MLX's, and the same results to the bit."""
  model, tensors = packed(mode)
  checkpoint.save(tmp_path / "m", tensors, format=format)
  stored = checkpoints.read_raw(tmp_path / "m")
  of_experts = {name for name in stored if ".experts.0." in name}
  assert bool(of_experts) == (format in ("modelopt", "compressed-tensors"))
  again = nnx.eval_shape(lambda: nnx.Dict(mlp=Block()))
  checkpoint.load_into(again, tmp_path / "m", dtype="float32", experts="stack")
  layers = again.mlp.experts
  assert all(isinstance(getattr(layers, part), jaxqq.nn.QQExpertLinear) for part in PARTS)
  for part in PARTS:
    one, other = (getattr(m.mlp.experts, part).weight for m in (again, model))
    assert one.quantize_input == other.quantize_input
    jax.tree.map(np.testing.assert_array_equal, one, other)
  np.testing.assert_array_equal(run(again.mlp, X), run(model.mlp, X))
  back = {f"mlp.experts.{part}.weight": getattr(layers, part).weight for part in PARTS}
  back["mlp.gate.weight"] = tensors["mlp.gate.weight"]
  checkpoint.save(tmp_path / "again", back, format=format)
  assert checkpoints.read_raw(tmp_path / "again") == stored


@pytest.mark.usefixtures("quick_compiles")
def test_weights_alone_and_other_names(tmp_path):
  """Experts as parameters, under names that a function maps; inputs are left as files say."""
  model, tensors = packed("nvfp4", quantize_input=False)
  parameters = {
    name.removesuffix(".weight") if "experts" in name else name: value
    for name, value in tensors.items()
  }
  checkpoint.save(tmp_path / "m", parameters, format="modelopt")
  again = nnx.Dict(mlp=Block(nnx.Rngs(1)))
  names = lambda name: f"{name}.weight" if name.endswith("_proj") else name  # noqa: E731
  checkpoint.load_into(again, tmp_path / "m", names=names, dtype="float32")
  assert not again.mlp.experts.up_proj.quantize_input
  np.testing.assert_array_equal(run(again.mlp, X), run(model.mlp, X))


def test_what_is_packed_already_takes_a_checkpoint(tmp_path):
  model, tensors = packed("mxfp8")
  checkpoint.save(tmp_path / "m", tensors, format="modelopt")
  again = nnx.eval_shape(lambda: nnx.Dict(mlp=Block()))
  jaxqq.nn.quantize_model(again, packed=True, predicate=lambda path, _: "experts" in path)
  checkpoint.load_into(again, tmp_path / "m", dtype="float32", experts="stack")
  for part in PARTS:
    one, other = (getattr(m.mlp.experts, part) for m in (again, model))
    assert one.mode == "mxfp8" and one.weight.global_scale is None
    jax.tree.map(np.testing.assert_array_equal, one.weight, other.weight)


def test_experts_that_are_numbers_go_into_kernels_and_biases(tmp_path):
  """(N, K) of each expert, as the transpose of a kernel (K, N); only the router is quantized."""
  rng = np.random.default_rng(1)
  tensors = {"mlp.gate.weight": jaxqq.quantize_weight(rng.standard_normal((E, K), np.float32))}
  wanted = {}
  for part in PARTS:
    n, k = (K, N) if part == "down_proj" else (N, K)
    wanted[part] = (
      rng.standard_normal((E, n, k), np.float32),
      rng.standard_normal((E, n), np.float32),
    )
    for e in range(E):
      path = f"mlp.experts.{e}.{part}"
      tensors |= {f"{path}.weight": wanted[part][0][e], f"{path}.bias": wanted[part][1][e]}
  checkpoint.save(tmp_path / "m", tensors, format="modelopt")
  model = nnx.eval_shape(lambda: nnx.Dict(mlp=Block(use_bias=True)))
  checkpoint.load_into(model, tmp_path / "m", experts="stack")
  assert isinstance(model.mlp.gate, jaxqq.nn.QQLinear)
  for part, (weight, bias) in wanted.items():
    layer = getattr(model.mlp.experts, part)
    assert type(layer) is jaxqq.nn.ExpertLinear
    np.testing.assert_array_equal(layer.kernel[...], weight.swapaxes(1, 2))
    np.testing.assert_array_equal(layer.bias[...], bias)
