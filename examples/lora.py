"""Trains adapters (LoRA) around a language model whose weights are packed in nvfp4.

  pip install 'jaxqq[examples]'    # from a checkout: pip install '.[examples]'
  python examples/lora.py          # about two minutes on two CPU cores

The base is the model of `train_lm.py`, trained in bfloat16 on Python's documentation. Its linear
layers are packed, 4.5 bits a weight, and stay as they are; adapters of low rank beside them learn
Python's own source code (Hu et al. 2021, arXiv:2106.09685; of a quantized base, Dettmers et al.
2023, arXiv:2305.14314). They are served beside the packed base, and merged into it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import sysconfig
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import train_lm
from jax import lax

import jaxqq

Params = dict[str, Any]
VAL_WINDOWS = 300  # of each text


@dataclasses.dataclass(frozen=True)
class Config(train_lm.Training):
  steps: int = train_lm.flag(400, "optimizer steps of the base, and then of the adapters")
  rank: int = train_lm.flag(8, "of the adapters")
  mode: str = train_lm.flag("nvfp4", "of the packed base", choices=("nvfp4", "mxfp8"))

  def mistake(self) -> str | None:
    if self.rank < 1:
      return f"--rank must be positive, got {self.rank}."
    return super().mistake()


def read_code() -> tuple[np.ndarray, np.ndarray]:
  """Bytes of the standard library's source to train on, and other files of it, held out."""
  files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
  parts = (
    [file.read_bytes() for i, file in enumerate(files) if i % 10],
    [file.read_bytes() for file in files[::10]],
  )
  train, held_out = (np.frombuffer(b"\n\n".join(part), np.uint8) for part in parts)
  return train, held_out[:60_000]


# The model: what stands for a weight is an array, or a packed weight with adapters


def pack(params: Params, mode: str) -> Params:
  """The base: every linear layer a `QuantizedWeight`, one global scale to each layer's."""
  packed = {name: jaxqq.quantize_weight(params["blocks"][name], mode) for name in train_lm.LINEARS}
  return {**params, "blocks": {**params["blocks"], **packed}}


def with_adapters(base: Params, rank: int, seed: int) -> Params:
  """Adapters a, of normal numbers, and b, zeros, beside each packed weight."""
  blocks = dict(base["blocks"])
  for key, name in zip(jax.random.split(jax.random.key(seed), 4), train_lm.LINEARS, strict=True):
    layers, n, k = blocks[name].shape
    a = k**-0.5 * jax.random.normal(key, (layers, rank, k), jnp.float32)
    blocks[name] = {"w": blocks[name], "lora_a": a, "lora_b": jnp.zeros((layers, n, rank))}
  return {**base, "blocks": blocks}


def merged(params: Params, mode: str) -> Params:
  """The sum of base and adapters, packed again."""
  blocks = dict(params["blocks"])
  for name in train_lm.LINEARS:
    layer = blocks[name]
    delta = jnp.matmul(layer["lora_b"], layer["lora_a"], precision=lax.Precision.HIGHEST)
    blocks[name] = jaxqq.quantize_weight(layer["w"].dequantize(jnp.float32) + delta, mode)
  return {**params, "blocks": blocks}


def linear(x: jax.Array, w: Any) -> jax.Array:
  """x (..., k) times w (n, k): an array, a packed weight, or one with adapters."""
  if isinstance(w, jaxqq.QuantizedWeight):
    return jaxqq.qqmm(x, w)
  if isinstance(w, dict):
    a, b = (w[name].astype(x.dtype) for name in ("lora_a", "lora_b"))
    return jaxqq.qqmm(x, w["w"]) + x @ a.T @ b.T
  return x @ w.astype(x.dtype).T


def loss_of(params: Params, windows: jax.Array, cfg: Config) -> jax.Array:
  """Mean nats per byte of windows, uint8 (batch, seq + 1)."""
  dtype, windows = train_lm.DTYPES[cfg.dtype], windows.astype(jnp.int32)
  x = params["embed"].astype(dtype)[windows[:, :-1]]

  def block(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
    return train_lm.block(x, layer, cfg.heads, linear), None

  x, _ = lax.scan(block, x, params["blocks"])
  logits = train_lm.rms_norm(x, params["norm"]) @ params["head"].astype(dtype).T
  labels = windows[:, 1:]
  losses = train_lm.optax.softmax_cross_entropy_with_integer_labels
  return losses(logits.astype(jnp.float32), labels).mean()


def windows_of(text: np.ndarray, cfg: Config) -> np.ndarray:
  return np.lib.stride_tricks.sliding_window_view(text, cfg.seq + 1)


@functools.partial(jax.jit, static_argnums=2)
def mean_loss(params: Params, batches: jax.Array, cfg: Config) -> jax.Array:
  return lax.map(functools.partial(loss_of, params, cfg=cfg), batches).mean()


def evaluate(params: Params, text: np.ndarray, cfg: Config) -> float:
  """On windows of the text that do not overlap."""
  windows = windows_of(text, cfg)[:: cfg.seq][:VAL_WINDOWS]
  batch = min(cfg.batch, len(windows))
  batches = windows[: len(windows) // batch * batch].reshape(-1, batch, cfg.seq + 1)
  return float(mean_loss(params, batches, cfg))


def train_adapters(params: Params, text: np.ndarray, cfg: Config) -> Params:
  """Steps of the optimizer on the adapters alone; all else is frozen."""
  trainable, frozen = jaxqq.partition(params, lambda path, _: "lora" in path)
  optimizer = train_lm.make_optimizer(cfg)
  state = optimizer.init(trainable)

  @functools.partial(jax.jit, donate_argnums=1)
  def step(trainable: Params, state: Any, frozen: Params, windows: jax.Array) -> Any:
    def loss(trainable: Params) -> jax.Array:
      return loss_of(jaxqq.combine(trainable, frozen), windows, cfg)

    value, grads = jax.value_and_grad(loss)(trainable)
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state, trainable)
    return train_lm.optax.apply_updates(trainable, updates), state, value

  windows = windows_of(text, cfg)
  order = np.random.default_rng(cfg.seed).integers(len(windows), size=(cfg.steps, cfg.batch))
  with train_lm.tqdm(order, desc="adapters") as bar:
    for rows in bar:
      trainable, state, value = step(trainable, state, frozen, windows[rows])
      bar.set_postfix_str(f"loss {float(value):.3f}", refresh=False)
  return jaxqq.combine(trainable, frozen)


def bytes_of_linears(params: Params) -> int:
  return sum(a.nbytes for a in jax.tree.leaves([params["blocks"][n] for n in train_lm.LINEARS]))


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
  """Trains base and adapters, prints how the models compare, and returns the numbers by model."""
  if train_lm.optax is None:
    sys.exit(f"lora needs optax and tqdm: {train_lm.INSTALL}")
  cfg = train_lm.parse_config(argv, Config, __doc__)
  docs, code = train_lm.read_text(), read_code()
  params, _ = train_lm.train(cfg, train_lm.UNQUANTIZED, windows_of(docs[0], cfg), lambda _: 0.0)
  base = pack(params, cfg.mode)
  adapted = train_adapters(with_adapters(base, cfg.rank, cfg.seed), code[0], cfg)
  linears = {name: params["blocks"][name].astype(jnp.bfloat16) for name in train_lm.LINEARS}
  bf16 = {**params, "blocks": {**params["blocks"], **linears}}
  models = {
    "base, bfloat16": bf16,
    f"base, {cfg.mode}": base,
    "with adapters beside it": adapted,
    f"adapters merged, {cfg.mode}": merged(adapted, cfg.mode),
  }
  results = {}
  print("| model | loss on documentation | loss on source code | bytes of linear layers |")
  print("|---|---|---|---|")
  for name, model in models.items():
    r = {"docs": evaluate(model, docs[1], cfg), "code": evaluate(model, code[1], cfg)}
    results[name] = {**r, "bytes": bytes_of_linears(model)}
    print(f"| {name} | {r['docs']:.4f} | {r['code']:.4f} | {results[name]['bytes']:,} |")
  trained, _ = jaxqq.partition(adapted, lambda path, _: "lora" in path)
  count = sum(a.size for a in jax.tree.leaves(trained))
  print(f"Adapters of rank {cfg.rank}: {count:,} numbers trained, in float32.")
  return results


if __name__ == "__main__":
  main()
