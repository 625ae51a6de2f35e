"""The decoder of decoder.py as a model of Flax NNX, for `decode.py --nnx`.

It is written with `nnx.Linear`, as for bfloat16, and `jaxqq.nn.quantize_model` packs its layers: a
block when it is made, so that no more than one is in bfloat16 at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import decoder
import jax
import jax.numpy as jnp
from decoder import Cache, Config, KeysValues
from flax import nnx

from jaxqq.nn import QQLinear, quantize_model


def linear(key: jax.Array, n: int, k: int, std: float, dtype: str) -> nnx.Linear:
  """The same numbers as in decoder.py, where a weight is (n, k); a kernel of Flax is (k, n)."""
  return nnx.Linear(
    k,
    n,
    use_bias=False,
    param_dtype=jnp.dtype(dtype),
    kernel_init=lambda *_: decoder.random_matrix(key, n, k, std, dtype).T,
    rngs=nnx.Rngs(0),  # which it asks for, and kernel_init passes over
  )


class RMSNorm(nnx.Module):
  """That of decoder.py."""

  def __init__(self, cfg: Config):
    self.gain = nnx.Param(jnp.ones((cfg.hidden,), cfg.dtype))

  def __call__(self, x: jax.Array) -> jax.Array:
    return decoder.rms_norm(x, self.gain[...])


class Block(nnx.Module):
  """Attention and a gated perceptron."""

  def __init__(self, cfg: Config, key: jax.Array):
    self.cfg = cfg
    self.attention_norm, self.ffn_norm = RMSNorm(cfg), RMSNorm(cfg)
    self.qkv, self.out, self.gate_up, self.down = (
      linear(jax.random.fold_in(key, i), *sizes, cfg.dtype)
      for i, sizes in enumerate(cfg.linears().values())
    )

  def __call__(
    self, cache: KeysValues, x: jax.Array, positions: jax.Array
  ) -> tuple[KeysValues, jax.Array]:
    qkv = self.qkv(self.attention_norm(x))
    cache, attended = decoder.attention(qkv, cache, positions, self.cfg)
    x = x + self.out(attended)
    return cache, x + self.down(decoder.gated(self.gate_up(self.ffn_norm(x))))


# A module is a tree of arrays, and blocks differ in those alone: it is traced once for all.
@jax.jit
def run_block(block: Block, *args: Any) -> tuple[KeysValues, jax.Array]:
  return block(*args)


class Decoder(nnx.Module):
  """Blocks between an embedding and the lm head."""

  def __init__(self, cfg: Config, blocks: list[Block], embed_key: jax.Array, head_key: jax.Array):
    self.embed = nnx.Param(decoder.random_matrix(embed_key, cfg.vocab, cfg.hidden, 1.0, cfg.dtype))
    self.layers = nnx.List(blocks)
    self.norm = RMSNorm(cfg)
    self.head = linear(head_key, cfg.vocab, cfg.hidden, cfg.hidden**-0.5, cfg.dtype)

  def __call__(self, cache: Cache, tokens: jax.Array) -> tuple[Cache, jax.Array]:
    positions = cache["length"] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    x = self.embed[...][tokens]
    layers = []
    for block, keys_values in zip(self.layers, cache["layers"], strict=True):
      keys_values, x = run_block(block, keys_values, x, positions)
      layers.append(keys_values)
    return {"layers": layers, "length": cache["length"] + tokens.shape[1]}, x

  def logits(self, x: jax.Array) -> jax.Array:
    return self.head(self.norm(x)).astype(jnp.float32)


# By these `decoder.prefill` and `decoder.decode` run it.
@decoder.forward.register
def _(model: Decoder, cache: Cache, tokens: jax.Array, cfg: Config) -> tuple[Cache, jax.Array]:
  return model(cache, tokens)


@decoder.logits_of.register
def _(model: Decoder, x: jax.Array, cfg: Config) -> jax.Array:
  return model.logits(x)


def pack(module: nnx.Module, cfg: Config) -> None:
  """For serving; what is packed already stays as it is."""
  if cfg.mode == decoder.UNQUANTIZED:
    return
  options = {"global_scale": "amax" if cfg.mode == "nvfp4" else None}
  quantize_model(module, cfg.mode, packed=True, quantize_input=cfg.quantize_input, **options)
  for _, layer in nnx.iter_graph(module):
    if isinstance(layer, QQLinear) and layer.weight.global_scale is not None:
      # As calibration finds it, instead of the amax of the inputs in every call.
      scale = jnp.float32(decoder.ACTIVATION_AMAX)
      layer.set_weight(dataclasses.replace(layer.weight, input_global_scale=scale))


def make_model(cfg: Config, seed: int, made: Callable[[], Any] = lambda: None) -> Decoder:
  """With the weights of `decoder.make_params`; calls `made` after each layer."""
  *layer_keys, embed_key, head_key = decoder.keys_of(cfg, seed)
  blocks = []
  for key in layer_keys:
    blocks.append(Block(cfg, key))
    pack(blocks[-1], cfg)
    made()
  model = Decoder(cfg, blocks, embed_key, head_key)
  pack(model, cfg)
  return jax.block_until_ready(model)
