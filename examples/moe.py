"""Trains a mixture of experts, a small language model, in bfloat16, mxfp8 and nvfp4, and serves it.

  pip install 'jaxqq[examples]'                      # from a checkout: pip install '.[examples]'
  python examples/moe.py                             # four minutes on two CPU cores
  python examples/moe.py --devices 4 --modes nvfp4   # experts and windows split over four devices

Every block has attention and, in place of one perceptron, experts of which a router chooses some
for each token. The model is of Flax NNX: `jaxqq.nn.Experts` and nnx.Linear, which `quantize_model`
converts for training and `pack` packs for serving. The text, the batches and the optimizer are
those of `train_lm.py`.

On several devices each has some of the experts, whole, and some of the windows. Tokens are
exchanged: every device gathers them, computes those of its experts, and the sums go back to where
the tokens are. No weight moves, and the losses are those of one device, up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import train_lm
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from train_lm import PROMPT, UNQUANTIZED, Result, flag

try:
  from flax import nnx

  import jaxqq.nn
except ImportError:
  sys.exit(f"moe needs flax, optax and tqdm: {train_lm.INSTALL}")

AXIS = "expert"
VAL_WINDOWS = 120
# A router is small, and its choice all or nothing; the head is as in train_lm.py.
LEFT_OUT = ("router", "head")


@dataclasses.dataclass(frozen=True)
class Config(train_lm.Training):
  batch: int = flag(8, "windows a step")
  steps: int = flag(500, "optimizer steps")
  experts: int = flag(8, "experts of each block")
  top: int = flag(2, "experts that each token takes")
  hidden: int = flag(128, "width of an expert, a multiple of 32")
  balance: float = flag(0.01, "weight of the loss that keeps experts equally busy")
  devices: int = flag(1, "devices to split experts and windows over; a CPU is taken for as many")
  temperature: float = flag(0.7, "of the sampled text")
  sample_bytes: int = flag(96, "length of the sampled text with its prompt")

  def mistake(self) -> str | None:
    for name in ("experts", "top", "hidden", "devices", "temperature"):
      if not 0 < getattr(self, name) < float("inf"):
        return f"--{name} must be positive, got {getattr(self, name)}."
    if self.top > self.experts:
      return f"--top must not be more than --experts {self.experts}, got {self.top}."
    if self.hidden % 32:
      return f"--hidden must be a multiple of 32, the group size of mxfp8, got {self.hidden}."
    for name in ("experts", "batch"):
      if getattr(self, name) % self.devices:
        value = getattr(self, name)
        return f"--{name} must be a multiple of --devices {self.devices}, got {value}."
    if self.sample_bytes <= len(PROMPT):
      return f"--sample-bytes must exceed the prompt's {len(PROMPT)}, got {self.sample_bytes}."
    return super().mistake()


# The model. `axis` is that of the mesh inside of `shard_map`, and None on one device.


class RMSNorm(nnx.Module):
  """That of train_lm.py."""

  def __init__(self, cfg: Config):
    self.gain = nnx.Param(jnp.ones((cfg.d_model,), jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    return train_lm.rms_norm(x, self.gain[...])


class Block(nnx.Module):
  """Attention, and experts."""

  def __init__(self, cfg: Config, rngs: nnx.Rngs):
    d, dtype = cfg.d_model, train_lm.DTYPES[cfg.dtype]
    linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
    self.heads, self.top = cfg.heads, cfg.top
    self.attention_norm, self.experts_norm = RMSNorm(cfg), RMSNorm(cfg)
    self.qkv, self.out = linear(d, 3 * d), linear(d, d)
    self.router = linear(d, cfg.experts, dtype=jnp.float32)
    self.experts = jaxqq.nn.Experts(cfg.experts, d, cfg.hidden, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """x of (batch, seq, d_model), and how unequally experts are busy: 1 where they all are."""
    qkv = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], self.heads, -1)
    q, k, v = jnp.split(qkv, 3, axis=-1)
    attended = train_lm.attend(train_lm.rotate(q), train_lm.rotate(k), v)
    x = x + self.out(attended.reshape(x.shape))
    tokens = self.experts_norm(x)
    chances = jax.nn.softmax(self.router(tokens))
    weights, chosen = lax.top_k(chances, self.top)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return x + exchanged(self.experts, tokens, chosen, weights, axis), unequal(
      chances, chosen, axis
    )


def exchanged(
  experts: jaxqq.nn.Experts, x: jax.Array, chosen: jax.Array, weights: jax.Array, axis: str | None
) -> jax.Array:
  """The experts' result for the tokens of this device, which has some of the experts."""
  if axis is None:
    return experts(x, chosen, weights)
  gathered = [lax.all_gather(a, axis, tiled=True) for a in (x, chosen, weights)]
  first = lax.axis_index(axis) * (experts.num_experts // lax.axis_size(axis))
  of_own_experts = experts(*gathered, group_offset=first)
  return lax.psum_scatter(of_own_experts, axis, scatter_dimension=0, tiled=True)


def unequal(chances: jax.Array, chosen: jax.Array, axis: str | None) -> jax.Array:
  """The loss that balances experts (Fedus et al. 2021, arXiv:2101.03961)."""
  count = chances.shape[-1]
  taken = jax.nn.one_hot(chosen, count).sum(axis=-2) / chosen.shape[-1]
  means = (jnp.mean(a, axis=(0, 1)) for a in (taken, chances))
  taken, chances = (a if axis is None else lax.pmean(a, axis) for a in means)
  return count * jnp.sum(taken * chances)


class Model(nnx.Module):
  """Bytes (batch, seq) to float32 logits (batch, seq, 256), and the blocks' mean `unequal`."""

  def __init__(self, cfg: Config):
    rngs, dtype = nnx.Rngs(cfg.seed), train_lm.DTYPES[cfg.dtype]
    init = nnx.initializers.normal(1.0)
    self.embed = nnx.Embed(256, cfg.d_model, dtype=dtype, embedding_init=init, rngs=rngs)
    self.blocks = nnx.List([Block(cfg, rngs) for _ in range(cfg.layers)])
    self.norm = RMSNorm(cfg)
    self.head = nnx.Linear(cfg.d_model, 256, use_bias=False, dtype=dtype, rngs=rngs)

  def __call__(self, tokens: jax.Array, axis: str | None = None) -> tuple[jax.Array, jax.Array]:
    x, busy = self.embed(tokens), []
    for block in self.blocks:
      x, unequally = block(x, axis)
      busy.append(unequally)
    return self.head(self.norm(x)).astype(jnp.float32), jnp.mean(jnp.stack(busy))


def make_model(cfg: Config, mode: str) -> Model:
  model = Model(cfg)
  if mode != UNQUANTIZED:
    jaxqq.nn.quantize_model(
      model,
      mode,
      backward=cfg.backward,
      predicate=lambda path, layer: not path.endswith(LEFT_OUT),
    )
  return model


def served(model: Model, mode: str) -> Model:
  """Its quantized layers packed."""
  if mode != UNQUANTIZED:
    jaxqq.nn.pack(model)
  return model


# On a mesh, or on one device


def specs_of(state: Any) -> Any:
  """How each array is split: those of experts along their first axis, packed or not."""

  def one(path: Any, _: Any) -> P:
    return P(AXIS) if any(getattr(key, "key", None) == "experts" for key in path) else P()

  return jax.tree_util.tree_map_with_path(one, state)


def losses_of(graph: Any, state: Any, windows: jax.Array, mesh: Mesh | None) -> Any:
  """Mean nats per byte of windows, uint8 (batch, seq + 1), and the mean `unequal`."""

  def of_part(state: Any, windows: jax.Array) -> Any:
    axis, windows = mesh and AXIS, windows.astype(jnp.int32)
    logits, unequally = nnx.merge(graph, state)(windows[:, :-1], axis)
    losses = train_lm.optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    loss = losses.mean()
    return loss if mesh is None else lax.pmean(loss, axis), unequally

  if mesh is None:
    return of_part(state, windows)
  return jax.shard_map(
    of_part, mesh=mesh, in_specs=(specs_of(state), P(AXIS)), out_specs=(P(), P())
  )(state, windows)


def placed(state: Any, mesh: Mesh | None) -> Any:
  if mesh is None:
    return state
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_of(state))
  return jax.device_put(state, shardings)


# Training and serving


def make_step(graph: Any, mesh: Mesh | None, cfg: Config, mode: str, optimizer: Any) -> Any:
  def loss_of(state: Any, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
    loss, unequally = losses_of(graph, state, windows, mesh)
    return loss + cfg.balance * unequally, loss

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(state: Any, of_optimizer: Any, windows: jax.Array) -> tuple[Any, Any, jax.Array]:
    (_, loss), grads = jax.value_and_grad(loss_of, has_aux=True)(state, windows)
    # optax raises floats to an integer count, which fails where a caller made promotion strict.
    with jax.numpy_dtype_promotion("standard"):
      updates, of_optimizer = optimizer.update(grads, of_optimizer, state)
    return train_lm.optax.apply_updates(state, updates), of_optimizer, loss

  return step


def make_evaluate(
  graph: Any, mesh: Mesh | None, cfg: Config, windows: np.ndarray
) -> Callable[[Any], float]:
  """The loss on windows that do not overlap."""
  windows = windows[:: cfg.seq][:VAL_WINDOWS]
  batches = windows[: len(windows) // cfg.batch * cfg.batch].reshape(-1, cfg.batch, cfg.seq + 1)

  @jax.jit
  def mean_loss(state: Any, batches: jax.Array) -> jax.Array:
    return lax.map(lambda windows: losses_of(graph, state, windows, mesh)[0], batches).mean()

  return lambda state: float(mean_loss(state, batches))


def sample(model: Model, cfg: Config) -> str:
  """A line of text. Each byte computes the whole window anew, which needs no cache of keys."""

  @jax.jit
  def generate(model: Model, window: jax.Array, key: jax.Array) -> jax.Array:
    def add_byte(i: jax.Array, window: jax.Array) -> jax.Array:
      logits = model(window)[0][0, i - 1]
      byte = jax.random.categorical(jax.random.fold_in(key, i), logits / cfg.temperature)
      return window.at[0, i].set(byte.astype(window.dtype))

    return lax.fori_loop(len(PROMPT), cfg.sample_bytes, add_byte, window)

  window = np.frombuffer(PROMPT.ljust(cfg.sample_bytes), np.uint8)[None, :].astype(np.int32)
  generated = np.asarray(generate(model, window, jax.random.key(cfg.seed)))[0]
  return " ".join("".join(chr(b) if 32 <= b < 127 else " " for b in generated).split())


def bytes_of_experts(state: Any) -> int:
  """Those of the experts' weights."""
  paths, _ = jax.tree_util.tree_flatten_with_path(state)
  return sum(
    a.nbytes for path, a in paths if any(getattr(key, "key", None) == "experts" for key in path)
  )


def run(cfg: Config, mode: str, mesh: Mesh | None, windows: Sequence[np.ndarray]) -> Result:
  """Trains, packs and samples one model, on one device or on a mesh."""
  graph, state = nnx.split(make_model(cfg, mode))
  evaluate = make_evaluate(graph, mesh, cfg, windows[1])

  def make_state(cfg: Config, optimizer: Any) -> tuple[Any, Any, dict[str, Any]]:
    own = placed(state, mesh)
    return own, optimizer.init(own), {}

  def put(batch: np.ndarray) -> Any:
    return batch if mesh is None else jax.device_put(batch, NamedSharding(mesh, P(AXIS)))

  def finish(state: Any) -> Result:
    one_device = jax.device_put(jax.tree.map(np.asarray, state), jax.devices()[0])
    model = served(nnx.merge(graph, one_device), mode)
    packed_graph, packed = nnx.split(model)
    is_same = mode == UNQUANTIZED
    of_packed = evaluate if is_same else make_evaluate(packed_graph, mesh, cfg, windows[1])
    bf16 = jax.tree.map(lambda a: a.astype(jnp.bfloat16), one_device)
    return {
      "packed_loss": of_packed(placed(packed, mesh)),
      "bytes": bytes_of_experts(bf16 if mode == UNQUANTIZED else packed),
      "bf16_bytes": bytes_of_experts(bf16),
      "sample": sample(model, cfg),
    }

  own_step = functools.partial(make_step, graph, mesh)
  return train_lm.train(
    cfg, mode, windows[0], evaluate, make_state, put, finish, make_step=own_step
  )[1]


def table(cfg: Config, results: dict[str, Result]) -> str:
  """Losses, and what packing saves."""
  titles = ("model", "validation loss", "packed", "bytes of the experts", "ms/step")
  rows = [titles]
  for name, result in results.items():
    share = result["bytes"] / result["bf16_bytes"]
    size = f"{result['bytes']:,}" + ("" if share == 1 else f" ({share:.1%})")
    losses = (f"{result[key]:.4f}" for key in ("val_loss", "packed_loss"))
    rows.append((name, *losses, size, f"{result['ms_per_step']:.1f}"))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(" | ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def make_mesh(cfg: Config) -> Mesh | None:
  """The devices that experts are split over; None of one."""
  if cfg.devices == 1:
    return None
  with contextlib.suppress(RuntimeError):  # of a JAX that has started, with what devices it has
    jax.config.update("jax_num_cpu_devices", cfg.devices)
  devices = jax.devices()
  if len(devices) < cfg.devices:
    sys.exit(f"--devices {cfg.devices} is more than the {len(devices)} that there are.")
  return jax.make_mesh((cfg.devices,), (AXIS,), (AxisType.Auto,), devices=devices[: cfg.devices])


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
  """Trains the models, prints how they compare, and returns the numbers by name.

  With several devices each model is trained twice, on one and on all.
  """
  if train_lm.optax is None:
    sys.exit(f"moe needs optax and tqdm: {train_lm.INSTALL}")
  cfg = train_lm.parse_config(argv, Config, __doc__)
  mesh = make_mesh(cfg)
  settings = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(cfg).items())
  print(f"jax {jax.__version__} on {jax.devices()[: cfg.devices]}: {settings}", flush=True)
  windows = [
    np.lib.stride_tricks.sliding_window_view(text, cfg.seq + 1) for text in train_lm.read_text()
  ]
  results = {}
  for mode in cfg.modes:
    name = train_lm.name_of(mode, cfg.dtype)
    results[name] = run(cfg, mode, None, windows)
    if mesh is not None:
      results[f"{name}, {cfg.devices} devices"] = run(cfg, mode, mesh, windows)
  print(table(cfg, results))
  for name, result in results.items():
    print(f"{name}: {result['sample']}")
  if mesh is not None:
    pairs = zip(*([iter(results.values())] * 2), strict=True)
    gap = max(np.max(np.abs(np.subtract(a["losses"], b["losses"]))) for a, b in pairs)
    print(f"Losses of {cfg.steps} steps on {cfg.devices} devices and on one: {gap:.2g} apart")
  return results


if __name__ == "__main__":
  main()
