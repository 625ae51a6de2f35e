"""A decoder with the shapes of Llama 3 8B and random weights, in bfloat16, mxfp8 or nvfp4.

The weights are the same in every mode, and made on the device a matrix at a time: besides the
packed model it holds no more than one matrix and what quantizing that takes. Every linear layer
is packed, the lm head too; the embedding stays bfloat16. Prompts are read at once, then tokens
are chosen greedily, all of them in one program. `decode.py` measures it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr

import jaxqq

Params = dict[str, Any]
KeysValues = tuple[jax.Array, jax.Array]
Cache = dict[str, Any]

UNQUANTIZED = "bf16"
MODES = (UNQUANTIZED, "mxfp8", "nvfp4")  # and "mxfp4"
# What nvfp4 takes for the amax of every x: a real model's is calibrated, once, for each layer.
# This one's inputs cannot exceed it where RMSNorm made them: sqrt(4096) is the most it lets pass.
ACTIVATION_AMAX = 64.0


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
  quantize_input: bool = True  # else linear layers multiply x as it is
  scan: bool = False  # layers are in stacks, and `lax.scan` goes over them

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
  """What `linear` multiplies with: w itself, or what `qqmm` takes for it."""
  if mode == UNQUANTIZED:
    return {"w": w}
  scale = {}
  if mode == "nvfp4":  # whose group scales lose bits below 2**-6, where these weights' are
    scale["global_scale_w"] = jnp.max(jnp.abs(w)).astype(jnp.float32)
    scale["global_scale_x"] = jnp.float32(ACTIVATION_AMAX)
  words, scales = jaxqq.quantize(w, mode=mode, global_scale=scale.get("global_scale_w"))
  return {"w": words, "scales": scales, **scale}


def keys_of(cfg: Config, seed: int) -> list[jax.Array]:
  """Random keys of each layer, of the embedding and of the head."""
  return list(jax.random.split(jax.random.key(seed), cfg.layers + 2))


def make_params(cfg: Config, seed: int, made: Callable[[], Any] = lambda: None) -> Params:
  """The model, each layer in arrays of its own, or all in stacks; calls `made` after each layer."""

  def make(key: jax.Array, n: int, k: int, std: float) -> Params:
    w = random_matrix(key, n, k, std, cfg.dtype)
    return jax.block_until_ready(pack(w, cfg.mode))

  def make_layer(key: jax.Array) -> Params:
    layer = {name: jnp.ones((cfg.hidden,), cfg.dtype) for name in ("attention_norm", "ffn_norm")}
    for i, (name, sizes) in enumerate(cfg.linears().items()):
      layer[name] = make(jax.random.fold_in(key, i), *sizes)
    made()
    return layer

  *layer_keys, embed_key, head_key = keys_of(cfg, seed)
  layers: Any = [make_layer(key) for key in layer_keys]
  return {
    "embed": random_matrix(embed_key, cfg.vocab, cfg.hidden, 1.0, cfg.dtype),
    "layers": stacked(layers, cfg) if cfg.scan else layers,
    "norm": jnp.ones((cfg.hidden,), cfg.dtype),
    "head": make(head_key, cfg.vocab, cfg.hidden, cfg.hidden**-0.5),
  }


def stacked(layers: list[Params], cfg: Config) -> Params:
  """All layers in one: the arrays of each name in a stack. Empties the list."""
  names = list(layers[0])
  of_names = {name: [layer.pop(name) for layer in layers] for name in names}
  layers.clear()
  stack = {}
  for name in names:
    own = jax.tree.map(lambda *arrays: jnp.stack(arrays), *of_names.pop(name))
    if isinstance(own, dict) and "scales" in own:
      own = jaxqq.QuantizedWeight(
        own["w"], own["scales"], cfg.mode, own.get("global_scale_w"), cfg.dtype
      )
    stack[name] = jax.block_until_ready(own)
  return stack


def layer_of(stack: Params, index: jax.Array, cfg: Config) -> Params:
  """A layer of `stacked`, as `block` takes it.

  `weight[index]` would copy a packed matrix for every token, since a kernel reads whole arrays.
  `weight.layer(index)` has it read one of the stack where that is.
  """

  def own(weight: Any) -> Any:
    if not isinstance(weight, jaxqq.QuantizedWeight):
      return jax.tree.map(lambda a: a[index], weight)
    scale = {"global_scale_x": jnp.float32(ACTIVATION_AMAX)} if cfg.mode == "nvfp4" else {}
    return {"w": weight.layer(index), **scale}

  return {name: own(weight) for name, weight in stack.items()}


def num_bytes(tree: Any) -> int:
  return sum(a.nbytes for a in jax.tree.leaves(tree))


def linear_bytes(params: Any) -> int:
  """Of the linear layers and the lm head, so all but embedding and norms: every token's reading."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return num_bytes([a for path, a in leaves if not re.search("embed|norm", keystr(path))])


# ---- the decoder


def linear(x: jax.Array, w: Params, cfg: Config) -> jax.Array:
  """x (..., k) times w (n, k) transposed, accumulated in float32, in x's dtype."""
  if cfg.mode == UNQUANTIZED:
    out = jnp.einsum("...k,nk->...n", x, w["w"], preferred_element_type=jnp.float32)
    return out.astype(x.dtype)
  if cfg.quantize_input:
    return jaxqq.qqmm(x, mode=cfg.mode, **w)
  scales, scale = w.get("scales"), w.get("global_scale_w")
  return jaxqq.quantized_matmul(x, w["w"], scales, mode=cfg.mode, global_scale=scale)


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

  q is (batch, seq, heads, size) at `positions`; k and v are (batch, length, kv_heads, size), and
  what is behind a query's own position is not seen. In 16 bits cuDNN has one kernel for all of it.
  """
  batch, seq = q.shape[:2]
  if seq == 1:  # lengths cost less than a mask
    seen: Any = {"key_value_seq_lengths": jnp.broadcast_to(positions + 1, (batch,))}
  else:
    mask = jnp.arange(k.shape[1])[None, :] <= positions[:, None]
    seen = {"mask": mask[None, None]}
  is_cuda = "cuda" in jax.devices()[0].client.platform_version.lower()
  how: Any = "cudnn" if is_cuda and q.dtype != jnp.float32 else "xla"
  return jax.nn.dot_product_attention(q, k, v, **seen, implementation=how).reshape(batch, seq, -1)


def attention(
  qkv: jax.Array, cache: KeysValues, positions: jax.Array, cfg: Config
) -> tuple[KeysValues, jax.Array]:
  """Writes keys and values at `positions` to the cache, and attends to all that are there."""
  qkv = qkv.reshape(*qkv.shape[:2], -1, cfg.head_size)
  q, k, v = jnp.split(qkv, [cfg.heads, cfg.heads + cfg.kv_heads], axis=2)
  q, k = (rotate(a, positions, cfg.rope_theta) for a in (q, k))
  write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=positions[0], axis=1)
  cache = tuple(map(write, cache, (k, v)))
  return cache, attend(q, *cache, positions)


def gated(gate_up: jax.Array) -> jax.Array:
  gate, up = jnp.split(gate_up, 2, axis=-1)
  return jax.nn.silu(gate) * up


# Under a jit of its own it is traced and lowered once, not once for each layer.
@functools.partial(jax.jit, static_argnames="cfg")
def block(
  layer: Params, cache: KeysValues, x: jax.Array, positions: jax.Array, cfg: Config
) -> tuple[KeysValues, jax.Array]:
  """x (batch, seq, hidden) at `positions`, where its keys and values are written to the cache."""
  qkv = linear(rms_norm(x, layer["attention_norm"]), layer["qkv"], cfg)
  cache, attended = attention(qkv, cache, positions, cfg)
  x = x + linear(attended, layer["out"], cfg)
  gate_up = linear(rms_norm(x, layer["ffn_norm"]), layer["gate_up"], cfg)
  return cache, x + linear(gated(gate_up), layer["down"], cfg)


def empty_cache(cfg: Config, batch: int, length: int) -> Cache:
  """Keys and values of each layer, (batch, length, kv_heads, head_size), and how many are there."""
  sizes: tuple[int, ...] = (batch, length, cfg.kv_heads, cfg.head_size)
  if cfg.scan:
    stack = tuple(jnp.zeros((cfg.layers, *sizes), cfg.dtype) for _ in "kv")
    return {"layers": stack, "length": jnp.int32(0)}
  layers = [tuple(jnp.zeros(sizes, cfg.dtype) for _ in "kv") for _ in range(cfg.layers)]
  return {"layers": layers, "length": jnp.int32(0)}


@functools.singledispatch
def forward(
  params: Params, cache: Cache, tokens: jax.Array, cfg: Config
) -> tuple[Cache, jax.Array]:
  """Appends tokens (batch, seq) to what the cache holds; the hidden states (batch, seq, hidden)."""
  positions = cache["length"] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
  x = params["embed"][tokens]
  if cfg.scan:

    def body(x: jax.Array, of_layer: tuple[jax.Array, KeysValues]) -> Any:
      layer = layer_of(params["layers"], of_layer[0], cfg)
      return block(layer, of_layer[1], x, positions, cfg)[::-1]

    x, layers = lax.scan(body, x, (jnp.arange(cfg.layers), cache["layers"]))
    return {"layers": layers, "length": cache["length"] + tokens.shape[1]}, x
  layers = []
  for layer, keys_values in zip(params["layers"], cache["layers"], strict=True):
    keys_values, x = block(layer, keys_values, x, positions, cfg)
    layers.append(keys_values)
  return {"layers": layers, "length": cache["length"] + tokens.shape[1]}, x


@functools.singledispatch
def logits_of(params: Params, x: jax.Array, cfg: Config) -> jax.Array:
  return linear(rms_norm(x, params["norm"]), params["head"], cfg).astype(jnp.float32)


@jax.jit
def greedy(logits: jax.Array) -> jax.Array:
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def prefill(
  params: Params, cache: Cache, prompts: jax.Array, cfg: Config
) -> tuple[Cache, jax.Array]:
  """Reads prompts (batch, seq) into an empty cache, in place: that, and the logits (batch, vocab).

  A cache is empty where its length is 0, whatever its arrays hold, so that every prompt may go to
  the same one. For arrays at other addresses XLA would record its CUDA graphs anew.
  """
  cache, x = forward(params, cache, prompts, cfg)
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
