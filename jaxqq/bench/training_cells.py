"""What the suite `training` compares: products of a layer, and a block, by bfloat16 and by jaxqq.

    forward  y  = x w^T      dx  = g w      dw = g^T x      w (n, k); x and g have a row a token

Every operand is in bfloat16 and quantized on the fly. The block, forward and backward, is one
program, which has the gradients of x and of all weights from a given cotangent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import jaxqq
from jaxqq._formats import FORMATS, Mode
from jaxqq.bench.measure import (
  normal,
)
from jaxqq.bench.peers import Run, gradient_of

BLOCK = "block"
FORMS = {"on the fly": "forward", "dx": "dx", "dw": "dw", BLOCK: "forward and backward"}
RECIPES = ("mxfp8", "nvfp4", "nvfp4-4over6")
_DTYPE = "bfloat16"
_NORM_EPSILON, _ROPE_THETA = 1e-5, 500_000.0
Arrays: TypeAlias = dict[str, Any]  # of arrays, or of their shapes and dtypes
Multiply: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # x, w and a key


@dataclasses.dataclass(frozen=True)
class Model:
  """The sizes of a block; by default those of Llama 3 8B."""

  d_model: int = 4096
  heads: int = 32
  kv_heads: int = 8
  head_size: int = 128
  mlp: int = 14336
  sequence: int = 2048  # tokens

  @property
  def layers(self) -> dict[str, tuple[int, int]]:
    """(n, k) of each linear layer; q, k and v are one, gate and up too."""
    attended = self.heads * self.head_size
    return {
      "qkv": (attended + 2 * self.kv_heads * self.head_size, self.d_model),
      "o": (self.d_model, attended),
      "gate_up": (2 * self.mlp, self.d_model),
      "down": (self.d_model, self.mlp),
    }

  def sequences(self, tokens: int) -> tuple[int, int]:
    """How many sequences so many tokens are, and their length."""
    if tokens > self.sequence and tokens % self.sequence:
      raise ValueError(f"{tokens} tokens are no whole sequences of {self.sequence}")
    length = min(tokens, self.sequence)
    return tokens // length, length


MODEL = Model()


@dataclasses.dataclass(frozen=True)
class Way:
  """An implementation of x w^T and its gradients: a mode, a recipe, or bfloat16."""

  mode: Mode | None = None
  recipe: str | None = None

  @property
  def name(self) -> str:
    if self.recipe is not None:
      return f"jaxqq recipe {self.recipe}"
    return "bf16" if self.mode is None else f"jaxqq {self.mode}"

  def multiply(self, x: jax.Array, w: jax.Array, key: jax.Array) -> jax.Array:
    if self == BFLOAT16:
      return jnp.einsum("mk,nk->mn", x, w)
    return jaxqq.qqmm(x, w, **self._options(key))

  def explain(self, x: Any, w: Any, key: Any) -> str:
    return "" if self == BFLOAT16 else str(jaxqq.explain(x, w, **self._options(key)))

  def _options(self, key: Any) -> dict[str, Any]:
    if self.recipe is not None:
      needs_key = jaxqq.Recipe.named(self.recipe).needs_key
      return {"recipe": self.recipe} | ({"key": key} if needs_key else {})
    assert self.mode is not None
    scales = {}
    if FORMATS[self.mode].has_global_scale:  # those that layers have by default
      scales = {
        "global_scale_x": FORMATS[self.mode].largest_value,
        "global_scale_w": "amax",
      }
    return {"mode": self.mode, "backward": "quantized", **scales}


BFLOAT16 = Way()


def ways_of(modes: Sequence[Mode]) -> list[Way]:
  """bfloat16, then the modes, then the recipes in one of them."""
  recipes = [name for name in RECIPES if name.partition("-")[0] in modes]
  return [BFLOAT16, *map(Way, modes), *(Way(recipe=name) for name in recipes)]


@dataclasses.dataclass(frozen=True)
class Block:
  """A transformer block of x (tokens, d_model)."""

  model: Model
  tokens: int
  attention: Literal["cudnn"] | None = None  # of jax.nn.dot_product_attention; None is XLA's

  def step(
    self, multiply: Multiply, x: jax.Array, g: jax.Array, weights: Arrays, keys: Arrays
  ) -> Arrays:
    """The result, and the gradients of x and of all weights, with g the cotangent."""
    forward = functools.partial(self.forward, multiply, keys=keys)
    out, pull = jax.vjp(forward, x, weights)
    dx, dw = pull(g)
    return {"out": out, "dx": dx, "dw": dw}

  def forward(self, multiply: Multiply, x: jax.Array, weights: Arrays, keys: Arrays) -> jax.Array:
    def linear(name: str, x: jax.Array) -> jax.Array:
      return multiply(x, weights[name], keys[name])

    attended = self._attend(linear("qkv", _rms_norm(x, weights["attention_norm"])))
    x = x + linear("o", attended)
    gate, up = jnp.split(linear("gate_up", _rms_norm(x, weights["mlp_norm"])), 2, axis=-1)
    return x + linear("down", jax.nn.silu(gate) * up)

  def _attend(self, qkv: jax.Array) -> jax.Array:
    heads, kv_heads = self.model.heads, self.model.kv_heads
    qkv = qkv.reshape(*self.model.sequences(self.tokens), -1, self.model.head_size)
    q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
    attended = jax.nn.dot_product_attention(
      _rotate(q), _rotate(k), v, is_causal=True, implementation=self.attention
    )
    return attended.reshape(self.tokens, -1)


def _rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
  wide = x.astype(jnp.float32)
  mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(mean + _NORM_EPSILON)).astype(x.dtype) * weight[None]


def _rotate(a: jax.Array) -> jax.Array:
  """Rotary positions for a (batch, sequence, heads, size); pairs are half a head apart."""
  half = a.shape[-1] // 2
  frequencies = _ROPE_THETA ** (-np.arange(half) / half)
  angles = np.arange(a.shape[1])[None, :, None, None] * frequencies[None, None, None]
  cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
  first, second = jnp.split(a.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(a.dtype)


@functools.cache
def attention_of(model: Model, tokens: int) -> Literal["cudnn"] | None:
  """cuDNN's attention where the default device compiles it, forward and backward; else XLA's."""
  if jax.default_backend() != "gpu":
    return None
  block = Block(model, tokens, "cudnn")
  qkv = jax.ShapeDtypeStruct((tokens, model.layers["qkv"][0]), np.dtype(_DTYPE))

  def gradient(qkv: jax.Array) -> Any:
    out, pull = jax.vjp(block._attend, qkv)
    return pull(out)

  try:
    jax.jit(gradient).lower(qkv).compile()
  except Exception:
    return None
  return "cudnn"


@dataclasses.dataclass(frozen=True)
class Cell:
  """A product of a layer, or the block: what implementations are compared at."""

  model: Model
  layer: str  # of the model, or BLOCK
  form: str  # of FORMS
  tokens: int

  @property
  def shape(self) -> tuple[int, int]:
    """(n, k); zeros of the block."""
    return self.model.layers.get(self.layer, (0, 0))

  def __str__(self) -> str:
    sizes = "" if self.layer == BLOCK else " {} x {}".format(*self.shape)
    return f"{self.layer}{sizes} T={self.tokens} {FORMS[self.form]}"

  def run_of(self, way: Way) -> Run:
    """The function of `operands` whose program is timed; its results by name."""
    if self.layer == BLOCK:
      block = Block(self.model, self.tokens, attention_of(self.model, self.tokens))
      return functools.partial(block.step, way.multiply)
    if self.form == "on the fly":
      return _named("out", way.multiply)
    return _named(self.form, gradient_of(way.multiply, self.form))

  def specs(self) -> tuple[Any, ...]:
    """Shapes and dtypes of `operands`."""
    return jax.eval_shape(self.operands, 0)

  def operands(self, seed: Any) -> tuple[Any, ...]:
    """Random operands: numbers of x and g have variance 1, those of w of 1 / k."""
    if self.layer == BLOCK:
      return _block_operands(self.model, self.tokens, seed)
    n, k = self.shape
    x, g, w = (((self.tokens, k), 1.0), ((self.tokens, n), 1.0), ((n, k), k**-0.5))
    chosen = {"on the fly": (x, w), "dx": (g, w), "dw": (g, x)}[self.form]
    arrays = (_random(seed, i, *each) for i, each in enumerate(chosen))
    return (*arrays, _key(seed, 0))

  def explain(self, way: Way) -> str:
    """Which kernels a forward product has, or which attention the block."""
    if self.layer == BLOCK:
      return f"attention: {attention_of(self.model, self.tokens) or 'xla'}"
    if self.form != "on the fly":
      return ""
    x, w, _ = self.specs()
    return way.explain(x, w, _key(0, 0))


def _named(name: str, run: Run) -> Run:
  def named(*operands: Any) -> Arrays:
    return {name: run(*operands)}

  return named


def _block_operands(model: Model, tokens: int, seed: Any) -> tuple[Any, ...]:
  """x, the cotangent, weights and keys of a `Block.step`."""
  x, g = (_random(seed, i, (tokens, model.d_model), 1.0) for i in range(2))
  weights: Arrays = {
    name: _random(seed, 2 + i, (n, k), k**-0.5)
    for i, (name, (n, k)) in enumerate(model.layers.items())
  }
  for name in ("attention_norm", "mlp_norm"):
    weights[name] = jnp.ones(model.d_model, _DTYPE)
  return x, g, weights, {name: _key(seed, i) for i, name in enumerate(model.layers)}


def _random(seed: Any, index: int, shape: tuple[int, ...], std: float) -> jax.Array:
  of_array = jnp.asarray(seed * 16 + index, jnp.uint32)
  return normal(of_array, shape, _DTYPE) * jnp.asarray(std, _DTYPE)


def _key(seed: Any, index: int) -> jax.Array:
  """The data of a key, since barriers take numbers alone."""
  return jnp.asarray([seed, index], jnp.uint32)
