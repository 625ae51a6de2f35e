"""Trains one byte-level language model three times: in bfloat16, mxfp8 and nvfp4.

  pip install 'jaxqq[examples]'    # from a checkout: pip install '.[examples]'
  python examples/train_lm.py      # two to three minutes on two CPU cores
  python examples/train_lm.py --recipe nvfp4 mxfp8    # and two that train by a recipe

Same seed, same batches, same optimizer; only `linear`, the product in the blocks' linear layers,
differs. The text is the reference manual that every Python carries as `pydoc_data.topics`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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

try:
  import optax
  from tqdm import tqdm
except ImportError:
  optax = tqdm = None

Params = dict[str, Any]
Result = dict[str, Any]

UNQUANTIZED = "unquantized"
MODES = (UNQUANTIZED, "mxfp8", "nvfp4")
BY_RECIPE = "recipe "  # begins the mode of a model that trains by one
PARTS: dict[str, dict[str, Any]] = {  # of a recipe, and what an operand has without it
  "stochastic rounding": {"rounding": "nearest"},
  "rotations": {"rotation": None},
  "squares": {"square": False},
}
WITHOUT_PARTS = tuple(f"nvfp4 without {part}" for part in PARTS)
BUT_ENDS = ", ends in bfloat16"  # of a model's blocks, the first and the last one
NVFP4_BUT_ENDS = "nvfp4" + BUT_ENDS
RECIPES = ("nvfp4", "nvfp4-4over6", "mxfp8", "quartet2", NVFP4_BUT_ENDS, *WITHOUT_PARTS)
BACKWARDS = ("straight_through", "quantized")
DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}
ATTENTIONS = ("xla", "cudnn")
LINEARS = ("qkv", "out", "gate_up", "down")
PROMPT = b"The "
NUM_EVALS = 5
INSTALL = "pip install 'jaxqq[examples]' (from a checkout: pip install '.[examples]')."


def flag(default: Any, text: str, **options: Any) -> Any:
  """A field of `Config` that is also a command-line flag."""
  return dataclasses.field(default=default, metadata={"help": text, **options})


@dataclasses.dataclass(frozen=True)
class Training:
  """A model and how it is trained."""

  layers: int = flag(2, "transformer blocks")
  d_model: int = flag(128, "width, a multiple of 32")
  heads: int = flag(4, "attention heads")
  seq: int = flag(128, "bytes that a window predicts")
  # Six windows keep a step's temporaries below 32 MB, above which glibc would map them anew, and
  # the kernel clear them, in every step.
  batch: int = flag(6, "windows a step")
  steps: int = flag(700, "optimizer steps")
  lr: float = flag(4e-3, "peak learning rate")
  seed: int = flag(0, "of weights, batches and samples")
  modes: tuple[str, ...] = flag(MODES, "which models to train", nargs="+", choices=MODES)
  backward: str = flag(BACKWARDS[0], "qqmm's gradients", choices=BACKWARDS)
  dtype: str = flag("bf16", "of activations and unquantized products", choices=tuple(DTYPES))
  attention: str = flag("xla", "how it is computed, cudnn on a GPU alone", choices=ATTENTIONS)

  @property
  def d_ff(self) -> int:
    """8/3 d_model, as usual for SwiGLU, up to the next multiple of 32."""
    return -(-8 * self.d_model // (3 * 32)) * 32

  def mistake(self) -> str | None:
    """What is wrong with the values, in a sentence."""
    for name in ("layers", "d_model", "heads", "seq", "batch", "steps", "lr"):
      if not 0 < getattr(self, name) < float("inf"):
        return f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}."
    if self.seed < 0:
      return f"--seed must not be negative, got {self.seed}."
    if self.d_model % 32:
      return f"--d-model must be a multiple of 32, the group size of mxfp8, got {self.d_model}."
    if self.d_model % (2 * self.heads):
      return f"--heads must split --d-model {self.d_model} into even parts, got {self.heads}."
    if NVFP4_BUT_ENDS in getattr(self, "recipe", ()) and self.layers < 3:
      return f"--recipe '{NVFP4_BUT_ENDS}' needs three --layers or more, got {self.layers}."
    num_val_bytes = len(read_text()[1])
    if self.seq >= num_val_bytes:
      return f"--seq must be less than {num_val_bytes}, the bytes held out, got {self.seq}."
    return None


@dataclasses.dataclass(frozen=True)
class Config(Training):
  recipe: tuple[str, ...] = flag((), "models to train by a recipe", nargs="+", choices=RECIPES)
  seeds: int = flag(1, "how many seeds to average over, --seed and those after it")
  temperature: float = flag(0.7, "of the sampled text")
  sample_bytes: int = flag(128, "length of the sampled text with its prompt")
  plot: str = flag("train_lm.png", "file for the loss curves, '' for none")

  def mistake(self) -> str | None:
    if self.seeds < 1:
      return f"--seeds must be positive, got {self.seeds}."
    if not 0 < self.temperature < float("inf"):
      return f"--temperature must be positive, got {self.temperature}."
    if self.sample_bytes <= len(PROMPT):
      return f"--sample-bytes must exceed the prompt's {len(PROMPT)}, got {self.sample_bytes}."
    if self.plot and not pathlib.Path(self.plot).absolute().parent.is_dir():
      return f"--plot must be in a directory that exists, got {self.plot!r}."
    return super().mistake()


def linear(
  x: jax.Array, w: Any, mode: str, backward: str, key: jax.Array | None = None
) -> jax.Array:
  """x (..., k) times w (n, k) transposed; quantized, unless the mode says otherwise.

  For serving, w is what `pack` made of it: arguments of `qqmm`.
  """
  if mode == UNQUANTIZED:
    return x @ w.astype(x.dtype).T
  if mode.startswith(BY_RECIPE) and not isinstance(w, dict):
    recipe = recipe_of(mode)
    key = key if recipe.needs_key else None
    return jaxqq.qqmm(x, w.astype(x.dtype), recipe=recipe, key=key)
  mode = served_mode(mode)
  if not isinstance(w, dict):
    w = w.astype(x.dtype)
    w = {"w": w, **global_scale("w", w, mode)}
  return jaxqq.qqmm(x, mode=mode, backward=backward, **w, **global_scale("x", x, mode))


def recipe_of(mode: str) -> jaxqq.Recipe:
  """That of a mode, all of it or without one of its parts: "recipe nvfp4 without rotations"."""
  name, _, part = mode.removeprefix(BY_RECIPE).removesuffix(BUT_ENDS).partition(" without ")
  recipe = jaxqq.Recipe.named(name)
  change = PARTS[part] if part else {}
  values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
  changed = {
    name: dataclasses.replace(value, **change)
    for name, value in values.items()
    if isinstance(value, jaxqq.Quantizer)
  }
  return dataclasses.replace(recipe, **changed)


def served_mode(mode: str) -> str:
  """The mode of a model's packed weights: of a recipe, that of its forward product."""
  if not mode.startswith(BY_RECIPE):
    return mode
  quantizer = recipe_of(mode).forward_w
  return UNQUANTIZED if quantizer is None else quantizer.mode


def global_scale(name: str, a: jax.Array, mode: str) -> dict[str, jax.Array]:
  """nvfp4's group scales reach down to 2**-9 only: gradients quantized without this one vanish."""
  if mode != "nvfp4":
    return {}
  return {f"global_scale_{name}": jnp.max(jnp.abs(a)).astype(jnp.float32)}


def pack(params: Params, mode: str, dtype: Any) -> Params:
  """The model as it is served: every linear layer quantized."""
  quantized = served_mode(mode)

  def pack_one(w: jax.Array) -> dict[str, jax.Array]:
    w = w.astype(dtype)  # as in `linear`, so that the codes are those the training saw
    scale = global_scale("w", w, quantized)
    words, scales = jaxqq.quantize(w, mode=quantized, global_scale=scale.get("global_scale_w"))
    return {"w": words, "scales": scales, **scale}

  if quantized == UNQUANTIZED:
    return params
  params = with_ends_apart(params, mode, dtype)
  packed = {name: jax.vmap(pack_one)(params["blocks"][name]) for name in LINEARS}
  return {**params, "blocks": {**params["blocks"], **packed}}


def with_ends_apart(params: Params, mode: str, dtype: Any) -> Params:
  """Where a mode leaves the first and the last block as they are, these two apart, in a dtype."""
  if not mode.endswith(BUT_ENDS) or "ends" in params:
    return params
  blocks = params["blocks"]
  ends = jax.tree.map(lambda a: jnp.stack([a[0], a[-1]]).astype(dtype), blocks)
  return {**params, "blocks": jax.tree.map(lambda a: a[1:-1], blocks), "ends": ends}


def linear_bytes(params: Params) -> int:
  parts = [params[part] for part in ("blocks", "ends") if part in params]
  return sum(a.nbytes for a in jax.tree.leaves([part[name] for part in parts for name in LINEARS]))


def init_params(cfg: Training) -> Params:
  """Float32 weights, (out, in); those of the blocks stacked along a leading axis of layers."""
  d, f, n = cfg.d_model, cfg.d_ff, cfg.layers
  keys = iter(jax.random.split(jax.random.key(cfg.seed), 6))

  def normal(std: float, *shape: int) -> jax.Array:
    return std * jax.random.normal(next(keys), shape, jnp.float32)

  blocks = {
    "attention_norm": jnp.ones((n, d), jnp.float32),
    "qkv": normal(d**-0.5, n, 3 * d, d),
    "out": normal((2 * n * d) ** -0.5, n, d, d),
    "mlp_norm": jnp.ones((n, d), jnp.float32),
    "gate_up": normal(d**-0.5, n, 2 * f, d),
    "down": normal((2 * n * f) ** -0.5, n, d, f),
  }
  embed, head = normal(1.0, 256, d), normal(0.1 * d**-0.5, 256, d)
  return {"embed": embed, "blocks": blocks, "norm": jnp.ones((d,), jnp.float32), "head": head}


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
  wide = x.astype(jnp.float32)
  wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
  return (wide * gain.reshape(1, 1, -1)).astype(x.dtype)


def rotate(x: jax.Array) -> jax.Array:
  """Rotary positions (Su et al. 2021, arXiv:2104.09864) for x of (batch, seq, heads, size)."""
  half = x.shape[-1] // 2
  angles = np.outer(np.arange(x.shape[1]), 10_000.0 ** (-np.arange(half) / half))
  angles = angles.astype(np.float32)[None, :, None, :]
  cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, how: str = "xla") -> jax.Array:
  """Causal attention, each (batch, seq, heads, size)."""
  if how == "cudnn":
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
  causal = jnp.tri(q.shape[1], dtype=bool)[None, None]
  weights = jax.nn.softmax(jnp.where(causal, scores * q.shape[-1] ** -0.5, -jnp.inf))
  return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def block(
  x: jax.Array, layer: Params, heads: int, product: Callable[..., Any], attention: str = "xla"
) -> jax.Array:
  """Rows of qkv go head by head, and gate_up's in turns: split over devices, they stay together."""
  qkv = product(rms_norm(x, layer["attention_norm"]), layer["qkv"])
  q, k, v = jnp.split(qkv.reshape(*x.shape[:2], heads, -1), 3, axis=-1)
  attended = attend(rotate(q), rotate(k), v, attention)
  x = x + product(attended.reshape(x.shape), layer["out"])
  gate_up = product(rms_norm(x, layer["mlp_norm"]), layer["gate_up"])
  gate, up = jnp.moveaxis(gate_up.reshape(*x.shape[:2], -1, 2), -1, 0)
  return x + product(jax.nn.silu(gate) * up, layer["down"])


def logits_of(
  params: Params, tokens: jax.Array, cfg: Training, mode: str, key: jax.Array | None = None
) -> jax.Array:
  """Tokens (batch, seq) to float32 logits (batch, seq, 256); a recipe rounds by a key."""
  dtype = DTYPES[cfg.dtype]
  # As a product: the gradient of a gather adds up what one byte gets a row after the other.
  x = jax.nn.one_hot(tokens, 256, dtype=dtype) @ params["embed"].astype(dtype)

  def of_layer(x: jax.Array, weights: Params, keys: jax.Array | None, mode: str) -> jax.Array:
    each = iter(LINEARS if keys is None else keys)  # one for each linear layer

    def product(x: jax.Array, w: Any) -> jax.Array:
      own = next(each)
      return linear(x, w, mode, cfg.backward, None if keys is None else own)

    return block(x, weights, cfg.heads, product, cfg.attention)

  params = with_ends_apart(params, mode, jnp.float32)
  keys = None if key is None else jax.random.split(key, (cfg.layers, len(LINEARS)))
  last = None
  if "ends" in params:
    first, last = (jax.tree.map(lambda a, i=i: a[i], params["ends"]) for i in range(2))
    x, keys = of_layer(x, first, None, UNQUANTIZED), None if keys is None else keys[1:-1]
  x, _ = lax.scan(lambda x, layer: (of_layer(x, *layer, mode), None), x, (params["blocks"], keys))
  if last is not None:
    x = of_layer(x, last, None, UNQUANTIZED)
  return (rms_norm(x, params["norm"]) @ params["head"].astype(dtype).T).astype(jnp.float32)


def loss_of(
  params: Params, windows: jax.Array, cfg: Training, mode: str, key: jax.Array | None = None
) -> jax.Array:
  """Mean nats per byte of windows, uint8 (batch, seq + 1)."""
  windows = windows.astype(jnp.int32)
  logits = logits_of(params, windows[:, :-1], cfg, mode, key)
  return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def read_text() -> tuple[np.ndarray, np.ndarray]:
  """The bytes to train on, and the last tenth, held out."""
  from pydoc_data.topics import topics

  data = np.frombuffer("\n\n".join(topics[key] for key in sorted(topics)).encode(), np.uint8)
  return data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]


def make_evaluate(cfg: Training, mode: str, windows: np.ndarray) -> Callable[[Params], float]:
  """The loss, on windows that do not overlap, of the model as it is served."""
  windows = windows[:: cfg.seq]
  batch = min(cfg.batch, len(windows))
  batches = windows[: len(windows) // batch * batch].reshape(-1, batch, cfg.seq + 1)

  @jax.jit
  def mean_loss(params: Params, batches: jax.Array) -> jax.Array:
    served = pack(params, mode, DTYPES[cfg.dtype])
    return lax.map(lambda windows: loss_of(served, windows, cfg, mode), batches).mean()

  return lambda params: float(mean_loss(params, batches))


def make_optimizer(cfg: Training) -> Any:
  warmup = min(100, cfg.steps // 10 + 1)
  decayed = max(cfg.steps, warmup + 1)
  lr = optax.warmup_cosine_decay_schedule(0.0, cfg.lr, warmup, decayed, end_value=0.05 * cfg.lr)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr, b2=0.98, weight_decay=0.01))


def make_state(cfg: Training, optimizer: Any) -> tuple[Params, Any, dict[str, Any]]:
  """Weights, the optimizer's state, and options for `jax.jit` of the step."""
  params = init_params(cfg)
  return params, optimizer.init(params), {}


def key_of(cfg: Training, mode: str, state: Any) -> jax.Array | None:
  """Another key in every step, where a recipe needs one: by the optimizer's count of steps."""
  if not mode.startswith(BY_RECIPE):
    return None
  count = optax.tree_utils.tree_get_all_with_path(state, "count")[0][1]
  return jax.random.fold_in(jax.random.key(cfg.seed), count)


def make_step(cfg: Training, mode: str, optimizer: Any, **options: Any) -> Any:
  @functools.partial(jax.jit, donate_argnums=(0, 1), **options)
  def step(params: Params, state: Any, windows: jax.Array) -> tuple[Params, Any, jax.Array]:
    loss, grads = jax.value_and_grad(loss_of)(params, windows, cfg, mode, key_of(cfg, mode, state))
    # optax raises floats to an integer count, which fails where a caller made promotion strict.
    with jax.numpy_dtype_promotion("standard"):
      updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  return step


def train(
  cfg: Training,
  mode: str,
  windows: np.ndarray,
  evaluate: Callable[[Params], float],
  make_state: Callable[..., Any] = make_state,
  put: Callable[[np.ndarray], Any] = lambda windows: windows,
  finish: Callable[[Params], Result] = lambda params: {},
  make_step: Callable[..., Any] = make_step,
) -> tuple[Params, Result]:
  """Weights and losses; `make_state` and `put` may place weights and windows on many devices.

  `finish` is what else to tell of the weights, while the bar is still there. `make_step` may be
  that of another model.
  """
  optimizer = make_optimizer(cfg)
  params, state, options = make_state(cfg, optimizer)
  order = np.random.default_rng(cfg.seed).integers(len(windows), size=(cfg.steps, cfg.batch))
  losses, milliseconds, val_losses = [], [], {}
  quiet = None if jax.process_index() == 0 else True  # None: where there is no terminal
  with tqdm(total=cfg.steps, desc=f"{mode:<{len(UNQUANTIZED)}}", disable=quiet) as bar:
    bar.set_postfix_str("compiling")
    step = make_step(cfg, mode, optimizer, **options)
    step = step.lower(params, state, put(windows[order[0]])).compile()
    for i in range(cfg.steps):
      begin = time.perf_counter()
      params, state, loss = step(params, state, put(windows[order[i]]))
      losses.append(float(loss))
      milliseconds.append(1e3 * (time.perf_counter() - begin))
      if (i + 1) % -(-cfg.steps // NUM_EVALS) == 0 or i + 1 == cfg.steps:
        val_losses[i + 1] = evaluate(params)
      bar.set_postfix_str(f"loss {losses[-1]:.3f}, {milliseconds[-1]:.0f} ms/step", refresh=False)
      bar.update()
    bar.set_postfix_str("packing and sampling")
    told = finish(params)
  return params, told | {
    "losses": losses,
    "first_loss": losses[0],
    "val_losses": val_losses,
    "val_loss": val_losses[cfg.steps],
    "ms_per_step": statistics.median(milliseconds),
  }


def sample(params: Params, cfg: Config, mode: str) -> str:
  """A line of text. Each byte computes the whole window anew, which needs no cache of keys."""

  @jax.jit
  def generate(params: Params, window: jax.Array, key: jax.Array) -> jax.Array:
    def add_byte(i: jax.Array, window: jax.Array) -> jax.Array:
      logits = logits_of(params, window, cfg, mode)[0, i - 1]
      byte = jax.random.categorical(jax.random.fold_in(key, i), logits / cfg.temperature)
      return window.at[0, i].set(byte.astype(window.dtype))

    return lax.fori_loop(len(PROMPT), cfg.sample_bytes, add_byte, window)

  window = np.frombuffer(PROMPT.ljust(cfg.sample_bytes), np.uint8)[None, :].astype(np.int32)
  generated = np.asarray(generate(params, window, jax.random.key(cfg.seed)))[0]
  return " ".join("".join(chr(b) if 32 <= b < 127 else " " for b in generated).split())


def run(cfg: Config, mode: str, train_windows: np.ndarray, val_windows: np.ndarray) -> Result:
  """Trains, packs and samples one model."""

  def finish(params: Params) -> Result:
    served = pack(params, mode, DTYPES[cfg.dtype])
    bf16 = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    return {
      "bytes": linear_bytes(bf16 if mode == UNQUANTIZED else served),
      "bf16_bytes": linear_bytes(bf16),
      "sample": sample(served, cfg, mode),
    }

  evaluate = make_evaluate(cfg, mode, val_windows)
  return train(cfg, mode, train_windows, evaluate, finish=finish)[1]


def name_of(mode: str, dtype: str = "bf16") -> str:
  """As the README calls a model."""
  names = {UNQUANTIZED: {"bf16": "bfloat16", "f32": "float32"}[dtype]}
  return (names | {"nvfp4": "nvfp4, global scales"}).get(mode, mode)


def of_seeds(cfg: Config, mode: str, *windows: np.ndarray) -> Result:
  """The model of the first seed, and the validation losses and times of all."""
  seeds = range(cfg.seed, cfg.seed + cfg.seeds)
  found = [run(dataclasses.replace(cfg, seed=seed), mode, *windows) for seed in seeds]
  every = {f"{name}_of_seeds": [r[name] for r in found] for name in ("val_loss", "ms_per_step")}
  return found[0] | every


def spread(values: Sequence[float], how: str) -> str:
  """Their mean, and of several their standard deviation."""
  mean = format(statistics.fmean(values), how)
  return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{how.lstrip('+')}}"


def table(cfg: Config, results: dict[str, Result]) -> str:
  against = f"against {name_of(UNQUANTIZED, cfg.dtype)}"
  of_weights = "bytes of the linear layers' weights"
  rows = [("model", "validation loss, nats a byte", against, of_weights, "ms/step")]
  base = results.get(UNQUANTIZED, {}).get("val_loss_of_seeds")
  for mode, result in results.items():
    losses, size, bf16 = result["val_loss_of_seeds"], result["bytes"], result["bf16_bytes"]
    change = "-"
    if base is not None and mode != UNQUANTIZED:
      gaps = [100 * (loss / of_base - 1) for loss, of_base in zip(losses, base, strict=True)]
      change = f"{spread(gaps, '+.2f')}%"
    weights = f"{size:,}" + ("" if size == bf16 else f" ({100 * size / bf16:.1f}%)")
    ms_per_step = f"{statistics.median(result['ms_per_step_of_seeds']):.1f}"
    rows.append((name_of(mode, cfg.dtype), spread(losses, ".4f"), change, weights, ms_per_step))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = (" | ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
  return "\n".join(lines)


def plot(results: dict[str, Result], path: str, dtype: str = "bf16") -> str:
  """Draws the losses, and how far they are from those of the first model; says what became of it.

  The curves lie on one another, so the second panel shows what is between them.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError:
    return f"No plot: that needs matplotlib, of the extra `examples`: {INSTALL}"
  figure = Figure(figsize=(8, 7), layout="constrained")
  losses_axes, gap_axes = figure.subplots(2, 1, sharex=True)
  first = next(iter(results))

  def smooth(losses: Sequence[float]) -> np.ndarray:
    span = len(losses) // 50 + 1
    return np.convolve(losses, np.full(span, 1 / span), "valid")

  base, base_points = smooth(results[first]["losses"]), results[first]["val_losses"]
  for mode, result in results.items():
    curve, points = smooth(result["losses"]), result["val_losses"]
    steps = range(len(result["losses"]) - len(curve) + 1, len(result["losses"]) + 1)
    (line,) = losses_axes.plot(steps, curve, label=name_of(mode, dtype), linewidth=1)
    losses_axes.plot(*zip(*points.items(), strict=True), "o", color=line.get_color())
    gap_axes.plot(steps, 100 * (curve / base - 1), linewidth=1, color=line.get_color())
    gaps = [100 * (points[step] / base_points[step] - 1) for step in points]
    gap_axes.plot(list(points), gaps, "o", color=line.get_color())
  losses_axes.set(ylabel="loss, nats a byte", title="Lines: training; points: validation")
  losses_axes.legend()
  gap_axes.set(
    xlabel="step", ylabel=f"% above {name_of(first, dtype)}", title="The gap between them"
  )
  figure.savefig(path, dpi=150)
  return f"Loss curves, and the gap between them: {path}"


def parse_config(argv: Sequence[str] | None, config: Any = Config, about: str = __doc__) -> Any:
  """A `config` from the command line; what it cannot be ends the program with a sentence."""
  parser = argparse.ArgumentParser(
    description=about.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
  )
  for field in dataclasses.fields(config):
    kind = str if isinstance(field.default, tuple) else type(field.default)
    name = "--" + field.name.replace("_", "-")
    parser.add_argument(name, type=kind, default=field.default, **field.metadata)
  cfg = config(**vars(parser.parse_args(argv)))
  if mistake := cfg.mistake():
    parser.error(mistake)
  by_recipe = (BY_RECIPE + name for name in getattr(cfg, "recipe", ()))
  return dataclasses.replace(cfg, modes=tuple(dict.fromkeys([*cfg.modes, *by_recipe])))


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
  """Trains the models, prints how they compare, and returns the numbers by mode.

  Of several seeds, texts and curves are those of the first.
  """
  if optax is None:
    sys.exit(f"train_lm needs optax and tqdm: {INSTALL}")
  cfg = parse_config(argv)
  settings = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(cfg).items())
  print(f"jax {jax.__version__} on {jax.devices()}: {settings} d_ff={cfg.d_ff}", flush=True)
  windows = [np.lib.stride_tricks.sliding_window_view(text, cfg.seq + 1) for text in read_text()]
  results = {mode: of_seeds(cfg, mode, *windows) for mode in cfg.modes}
  print(table(cfg, results))
  for mode, result in results.items():
    print(f"{name_of(mode, cfg.dtype)}: {result['sample']}")
  if cfg.plot:
    print(plot(results, cfg.plot, cfg.dtype))
  return results


if __name__ == "__main__":
  main()
