"""Generates with one decoder three times: weights in bfloat16, in mxfp8 and in nvfp4.

  pip install 'jaxqq[examples]'       # from a checkout: pip install '.[examples]'
  python examples/decode.py           # the shapes of Llama 3 8B: bfloat16 takes 16 GB of a GPU
  python examples/decode.py --tiny    # on a CPU

The weights are random, the same in every mode, and made on the device a matrix at a time: besides
the packed model it holds no more than one matrix and what quantizing that takes. Every linear
layer is packed, the lm head too; the embedding stays bfloat16. Prompts are read at once, then
tokens are chosen greedily, all of them in one program.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxqq
from jaxqq.bench.report import make_header

try:
  from tqdm import tqdm
except ImportError:
  tqdm = None

Params = dict[str, Any]
KeysValues = tuple[jax.Array, jax.Array]
Cache = dict[str, Any]
Result = dict[str, Any]

UNQUANTIZED = "bf16"
MODES = (UNQUANTIZED, "mxfp8", "nvfp4")
# What nvfp4 takes for the amax of every x: a real model's is calibrated, once, for each layer.
# This one's inputs cannot exceed it where RMSNorm made them: sqrt(4096) is the most it lets pass.
ACTIVATION_AMAX = 64.0
INSTALL = "pip install 'jaxqq[examples]' (from a checkout: pip install '.[examples]')."


@dataclasses.dataclass(frozen=True)
class Config:
  """A decoder; the defaults are the sizes of Llama 3 8B (arXiv:2407.21783, table 3)."""

  layers: int = 32
  hidden: int = 4096
  heads: int = 32
  kv_heads: int = 8
  head_size: int = 128
  ffn: int = 14336
  vocab: int = 128256
  rope_theta: float = 500_000.0
  dtype: str = "bfloat16"
  mode: str = UNQUANTIZED

  def linears(self) -> dict[str, tuple[int, int, float]]:
    """N, K and the standard deviation of each linear layer in a block."""
    qkv = (self.heads + 2 * self.kv_heads) * self.head_size
    attended, depth = self.heads * self.head_size, 2 * self.layers
    return {
      "qkv": (qkv, self.hidden, self.hidden**-0.5),
      "out": (self.hidden, attended, (depth * attended) ** -0.5),
      "gate_up": (2 * self.ffn, self.hidden, self.hidden**-0.5),
      "down": (self.hidden, self.ffn, (depth * self.ffn) ** -0.5),
    }


TINY = Config(layers=2, hidden=64, heads=4, kv_heads=2, head_size=16, ffn=64, vocab=128)


# ---- weights


@functools.partial(jax.jit, static_argnames=("n", "k", "dtype"))
def random_matrix(key: jax.Array, n: int, k: int, std: float, dtype: str) -> jax.Array:
  """(n, k), some rows at a time: the random bits would take more memory than the matrix."""
  blocks = math.gcd(n, 64)

  def rows(key: jax.Array) -> jax.Array:
    return (std * jax.random.normal(key, (n // blocks, k), jnp.float32)).astype(dtype)

  return lax.map(rows, jax.random.split(key, blocks)).reshape(n, k)


@functools.partial(jax.jit, static_argnames="mode")
def pack(w: jax.Array, mode: str) -> Params:
  """What `linear` multiplies with: w itself, or arguments of `qqmm`."""
  if mode == UNQUANTIZED:
    return {"w": w}
  scale = {}
  if mode == "nvfp4":  # whose group scales lose bits below 2**-6, where these weights' are
    scale["global_scale_w"] = jnp.max(jnp.abs(w)).astype(jnp.float32)
    scale["global_scale_x"] = jnp.float32(ACTIVATION_AMAX)
  words, scales = jaxqq.quantize(w, mode=mode, global_scale=scale.get("global_scale_w"))
  return {"w": words, "scales": scales, **scale}


def make_params(cfg: Config, seed: int, made: Callable[[], Any] = lambda: None) -> Params:
  """The model, each layer in arrays of its own; calls `made` after each layer.

  Stacked along an axis of layers, as for `lax.scan`, a layer's weights would have to be cut out,
  and so copied, for every token: a kernel reads whole arrays.
  """

  def make(key: jax.Array, n: int, k: int, std: float) -> Params:
    w = random_matrix(key, n, k, std, cfg.dtype)
    return jax.block_until_ready(pack(w, cfg.mode))

  def make_layer(key: jax.Array) -> Params:
    layer = {name: jnp.ones((cfg.hidden,), cfg.dtype) for name in ("attention_norm", "ffn_norm")}
    for i, (name, sizes) in enumerate(cfg.linears().items()):
      layer[name] = make(jax.random.fold_in(key, i), *sizes)
    made()
    return layer

  *layer_keys, embed_key, head_key = jax.random.split(jax.random.key(seed), cfg.layers + 2)
  return {
    "embed": random_matrix(embed_key, cfg.vocab, cfg.hidden, 1.0, cfg.dtype),
    "layers": [make_layer(key) for key in layer_keys],
    "norm": jnp.ones((cfg.hidden,), cfg.dtype),
    "head": make(head_key, cfg.vocab, cfg.hidden, cfg.hidden**-0.5),
  }


def num_bytes(tree: Any) -> int:
  return sum(a.nbytes for a in jax.tree.leaves(tree))


def linear_bytes(params: Params) -> int:
  """Of the linear layers and the lm head: what every token reads."""
  packed = [w for layer in params["layers"] for w in layer.values() if isinstance(w, dict)]
  return num_bytes([packed, params["head"]])


# ---- the decoder


def linear(x: jax.Array, w: Params, mode: str) -> jax.Array:
  """x (..., k) times w (n, k) transposed, accumulated in float32, in x's dtype."""
  if mode == UNQUANTIZED:
    out = jnp.einsum("...k,nk->...n", x, w["w"], preferred_element_type=jnp.float32)
    return out.astype(x.dtype)
  return jaxqq.qqmm(x, mode=mode, **w)


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
  wide = x.astype(jnp.float32)
  wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
  return (wide * gain.astype(jnp.float32).reshape(1, 1, -1)).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Rotary positions (arXiv:2104.09864) for x (batch, seq, heads, size).

  The two numbers of a pair are half a head apart, as in Llama's checkpoints for transformers.
  """
  half = x.shape[-1] // 2
  frequencies = (theta ** (-np.arange(half) / half)).astype(np.float32)
  angles = positions.astype(jnp.float32)[None, :, None, None] * frequencies[None, None, None]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
  """Grouped-query attention (arXiv:2305.13245): neighbouring heads of q share one of k and v.

  q is (batch, seq, heads, size) at `positions`; k and v are (batch, kv_heads, length, size), and
  what lies behind a query's own position is not seen.
  """
  batch, seq, heads, size = q.shape
  q = q.reshape(batch, seq, k.shape[1], heads // k.shape[1], size)
  scores = jnp.einsum("bsngd,bntd->bngst", q, k, preferred_element_type=jnp.float32)
  seen = jnp.arange(k.shape[2])[None, :] <= positions[:, None]
  weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores * size**-0.5, -jnp.inf))
  out = jnp.einsum("bngst,bntd->bsngd", weights.astype(v.dtype), v)
  return out.reshape(batch, seq, heads * size)


# Under a jit of its own it is traced and lowered once, not once for each layer.
@functools.partial(jax.jit, static_argnames="cfg")
def block(
  layer: Params, cache: KeysValues, x: jax.Array, positions: jax.Array, cfg: Config
) -> tuple[KeysValues, jax.Array]:
  """x (batch, seq, hidden) at `positions`, where its keys and values are written to the cache."""
  qkv = linear(rms_norm(x, layer["attention_norm"]), layer["qkv"], cfg.mode)
  qkv = qkv.reshape(*x.shape[:2], -1, cfg.head_size)
  q, k, v = jnp.split(qkv, [cfg.heads, cfg.heads + cfg.kv_heads], axis=2)
  q, k = (rotate(a, positions, cfg.rope_theta) for a in (q, k))
  new = (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
  write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=positions[0], axis=2)
  cache = tuple(map(write, cache, new))
  x = x + linear(attend(q, *cache, positions), layer["out"], cfg.mode)
  gate_up = linear(rms_norm(x, layer["ffn_norm"]), layer["gate_up"], cfg.mode)
  gate, up = jnp.split(gate_up, 2, axis=-1)
  return cache, x + linear(jax.nn.silu(gate) * up, layer["down"], cfg.mode)


def empty_cache(cfg: Config, batch: int, length: int) -> Cache:
  """Keys and values of each layer, (batch, kv_heads, length, head_size), and how many are there."""
  sizes = (batch, cfg.kv_heads, length, cfg.head_size)
  layers = [tuple(jnp.zeros(sizes, cfg.dtype) for _ in "kv") for _ in range(cfg.layers)]
  return {"layers": layers, "length": jnp.int32(0)}


def forward(
  params: Params, cache: Cache, tokens: jax.Array, cfg: Config
) -> tuple[Cache, jax.Array]:
  """Appends tokens (batch, seq) to what the cache holds; the hidden states (batch, seq, hidden)."""
  positions = cache["length"] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
  x = params["embed"][tokens]
  layers = []
  for layer, keys_values in zip(params["layers"], cache["layers"], strict=True):
    keys_values, x = block(layer, keys_values, x, positions, cfg)
    layers.append(keys_values)
  return {"layers": layers, "length": cache["length"] + tokens.shape[1]}, x


def logits_of(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
  return linear(rms_norm(x, params["norm"]), params["head"], cfg.mode).astype(jnp.float32)


@jax.jit
def greedy(logits: jax.Array) -> jax.Array:
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("length", "cfg"))
def prefill(
  params: Params, prompts: jax.Array, length: int, cfg: Config
) -> tuple[Cache, jax.Array]:
  """Reads prompts (batch, seq): a cache with room for `length`, and the logits (batch, vocab)."""
  cache, x = forward(params, empty_cache(cfg, prompts.shape[0], length), prompts, cfg)
  return cache, logits_of(params, x[:, -1:], cfg)[:, 0]


@functools.partial(jax.jit, static_argnames=("steps", "cfg"), donate_argnames="cache")
def decode(
  params: Params, cache: Cache, token: jax.Array, steps: int, cfg: Config
) -> tuple[Cache, jax.Array]:
  """Goes on from token (batch,), appending to the cache in place: the tokens (batch, steps)."""

  def step(carry: tuple[Cache, jax.Array], _: None) -> Any:
    cache, x = forward(params, carry[0], carry[1][:, None], cfg)
    token = greedy(logits_of(params, x, cfg)[:, 0])
    return (cache, token), token

  (cache, _), tokens = lax.scan(step, (cache, token), length=steps)
  return cache, tokens.T


# ---- the measurement


def time_batch(
  params: Params, prompts: jax.Array, cfg: Config, options: argparse.Namespace, bar: Any
) -> tuple[Result, np.ndarray]:
  """Compiles, then generates some times: medians, and the logits (batch, vocab) after the prompts.

  The first time, which loads the kernels, is not counted.
  """
  (batch, seq), steps = prompts.shape, options.tokens
  bar.set_postfix_str(f"compiling for batch {batch}")
  begin = time.perf_counter()
  lowered = prefill.lower(params, prompts, seq + steps, cfg)
  cache, logits = lowered.out_info
  token = jax.eval_shape(greedy, logits)
  run_prefill = lowered.compile()
  run_decode = decode.lower(params, cache, token, steps, cfg).compile()
  compile_s = time.perf_counter() - begin
  bar.update()
  bar.set_postfix_str(f"generating at batch {batch}")
  prefill_s, decode_s = [], []
  for _ in range(1 + options.repeats):
    begin = time.perf_counter()
    cache, logits = jax.block_until_ready(run_prefill(params, prompts))
    prefill_s.append(time.perf_counter() - begin)
    token = jax.block_until_ready(greedy(logits))
    begin = time.perf_counter()
    cache, tokens = jax.block_until_ready(run_decode(params, cache, token))
    decode_s.append(time.perf_counter() - begin)
    bar.update()
  step_s = statistics.median(decode_s[1:]) / steps
  return {
    "batch": batch,
    "compile_s": compile_s,
    "prefill_ms": 1e3 * statistics.median(prefill_s[1:]),
    "step_ms": 1e3 * step_s,
    "step_ms_all": [1e3 * s / steps for s in decode_s[1:]],
    "tokens_per_s": batch / step_s,
    "weights_gb_per_s": 1e-9 * linear_bytes(params) / step_s,
    "first_tokens": np.asarray(tokens[0]).tolist(),
  }, np.asarray(logits)


def run(cfg: Config, options: argparse.Namespace) -> tuple[Result, np.ndarray]:
  """One model, made, timed and freed: its numbers, and its logits at the largest batch."""
  batches, sizes = options.batches, (max(options.batches), options.prompt)
  prompts = jax.random.randint(jax.random.key(options.seed + 1), sizes, 0, cfg.vocab, jnp.int32)
  total = cfg.layers + len(batches) * (2 + options.repeats)
  with tqdm(total=total, desc=f"{cfg.mode:<5}", disable=None) as bar:
    bar.set_postfix_str("making weights")
    params = make_params(cfg, options.seed, bar.update)
    timed = [time_batch(params, prompts[:batch], cfg, options, bar) for batch in batches]
  elements = cfg.layers * sum(n * k for n, k, _ in cfg.linears().values())
  result = {
    "mode": cfg.mode,
    "bytes": num_bytes(params),
    "linear_bytes": linear_bytes(params),
    "bf16_linear_bytes": 2 * (elements + cfg.vocab * cfg.hidden),
    "runs": [numbers for numbers, _ in timed],
  }
  jax.tree.map(lambda a: a.delete(), params)
  return result, timed[batches.index(max(batches))][1]


def compare(logits: np.ndarray, reference: np.ndarray | None) -> Result:
  """How far logits are from bf16's, and how often both choose the same token."""
  if reference is None:
    return {"logits_error": None, "same_tokens": None}
  same = logits.argmax(axis=-1) == reference.argmax(axis=-1)
  error = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
  return {"logits_error": float(error), "same_tokens": int(same.sum())}


def explain(cfg: Config, batch: int) -> str:
  """What computes a block's largest product."""
  if cfg.mode == UNQUANTIZED:
    return f"{cfg.mode}: jnp.einsum"
  n, k, _ = cfg.linears()["gate_up"]
  w = jax.eval_shape(lambda w: pack(w, cfg.mode), jax.ShapeDtypeStruct((n, k), cfg.dtype))
  return jaxqq.explain(jax.ShapeDtypeStruct((batch, k), cfg.dtype), mode=cfg.mode, **w)


def table(content: Result) -> str:
  """Markdown: how fast each model is at each batch; how large and how exact it is."""
  models = content["models"]
  base = {run["batch"]: run for m in models if m["mode"] == UNQUANTIZED for run in m["runs"]}
  titles = "model | batch | tokens/s | vs bf16 | ms/token | weights GB/s | prefill ms"
  rows = [titles.split(" | ")]
  for model in models:
    for run in model["runs"]:
      batch, step = run["batch"], run["step_ms"]
      ratio = f"{base[batch]['step_ms'] / step:.2f}x" if base else "-"
      row = (model["mode"], f"{batch}", f"{run['tokens_per_s']:.1f}", ratio, f"{step:.3f}")
      rows.append([*row, f"{run['weights_gb_per_s']:.1f}", f"{run['prefill_ms']:.2f}"])
  speeds = markdown(rows)
  titles = "model | all weights | linear layers and lm head | vs bf16 | logits off by | same tokens"
  rows = [titles.split(" | ")]
  for model in models:
    linear, off = model["linear_bytes"], model["logits_error"]
    part = f"{100 * linear / model['bf16_linear_bytes']:.1f}%"
    of = max(run["batch"] for run in model["runs"])
    exact = ("-", "-") if off is None else (f"{100 * off:.1f}%", f"{model['same_tokens']} of {of}")
    rows.append([model["mode"], f"{model['bytes']:,} bytes", f"{linear:,} bytes", part, *exact])
  return f"{speeds}\n\n{markdown(rows)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  titles, *lines = (f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
  return "\n".join([titles, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines])


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
  )
  add = parser.add_argument
  add("--tiny", action="store_true", help="a small model, for a CPU")
  add("--layers", type=int, help="that many, instead of the shape's")
  add("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences at once")
  add("--modes", nargs="+", default=list(MODES), choices=MODES, help="which models")
  add("--tokens", type=int, default=64, help="tokens to generate in each sequence")
  add("--prompt", type=int, default=128, help="tokens in each prompt")
  add("--repeats", type=int, default=5, help="timed runs, of which the median counts")
  add("--seed", type=int, default=0, help="of weights and prompts")
  add("--json", type=pathlib.Path, help="file for the results")
  add("--show", type=pathlib.Path, metavar="JSON", help="print the tables of such a file, no more")
  given = parser.parse_args(argv)
  for name in ("layers", "batches", "tokens", "prompt", "repeats"):
    value = getattr(given, name)
    if value is not None and np.min(value) < 1:
      parser.error(f"--{name} must be positive, got {np.min(value)}.")
  if given.seed < 0:
    parser.error(f"--seed must not be negative, got {given.seed}.")
  if given.json and not given.json.absolute().parent.is_dir():
    parser.error(f"--json must be in a directory that exists, got {str(given.json)!r}.")
  if given.show and not given.show.is_file():
    parser.error(f"--show must be a file that --json wrote, got {str(given.show)!r}.")
  cfg = TINY if given.tiny else Config()
  given.cfg = dataclasses.replace(cfg, layers=given.layers or cfg.layers)
  given.modes = [mode for mode in MODES if mode in given.modes]  # bf16, the reference, comes first
  given.batches = list(dict.fromkeys(given.batches))
  return given


def main(argv: Sequence[str] | None = None) -> Result:
  """Times the models, prints how they compare, and returns the numbers."""
  options = parse_options(argv)
  if options.show:
    content = json.loads(options.show.read_text())
    print(table(content))
    return content
  if tqdm is None:
    sys.exit(f"decode needs tqdm: {INSTALL}")
  settings = {name: getattr(options, name) for name in ("tokens", "prompt", "repeats", "seed")}
  sizes = dataclasses.asdict(options.cfg)
  del sizes["mode"]
  header = make_header("wall clock, until results are ready", model=sizes, **settings)
  print(" ".join(f"{name}={value}" for name, value in header.items()), flush=True)
  content, reference = {"header": header, "models": []}, None
  for mode in options.modes:
    cfg = dataclasses.replace(options.cfg, mode=mode)
    print(explain(cfg, min(options.batches)), flush=True)
    result, logits = run(cfg, options)
    reference = logits if mode == UNQUANTIZED else reference
    content["models"].append(result | compare(logits, reference))
    if options.json:  # after every model, so that a run cut short leaves what it has
      options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
  print(table(content))
  return content


if __name__ == "__main__":
  main()
