"""Training on one GPU: products of a linear layer and a block of Llama 3 8B, `--suite training`.

    forward  y  = x w^T      dx  = g w      dw = g^T x      w (n, k); x and g have a row a token

The products are those of a training step: every operand is in bfloat16 and quantized on the fly.
The block, forward and backward, is one program, which has the gradients of x and of all weights
from a given cotangent. Implementations are bfloat16, jaxqq's modes with the quantized backward, and
jaxqq's recipes. Times are of the device, the kernels of a program together, and of the clock on the
wall; programs are launched without CUDA graphs, of whose kernels CUPTI gives no times.

As a check every result is compared with that in bfloat16. Quantization itself makes most of the
difference, so it says of a result whether it is nonsense, not whether it is exact.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import jaxqq
from jaxqq._formats import FORMATS, Mode
from jaxqq._kernels.plan import TURNED_OFF
from jaxqq.bench import kept
from jaxqq.bench.cases import MODES
from jaxqq.bench.markdown import TIMES, markdown_row
from jaxqq.bench.measure import (
  Settings,
  Timer,
  chained,
  make_timer,
  normal,
  quartiles,
  reason,
  wall_seconds,
)
from jaxqq.bench.peers import Run, gradient_of
from jaxqq.bench.turns import Program, in_turn, side_by_side

TOKENS = (8192,)
BLOCK = "block"
FORMS = {"on the fly": "forward", "dx": "dx", "dw": "dw", BLOCK: "forward and backward"}
RECIPES = ("mxfp8", "nvfp4", "nvfp4-4over6")
MOST_ERROR = 0.5  # of a result, relative to that in bfloat16
TABLE = "training"  # where a file has the rows
_DTYPE = "bfloat16"
_NORM_EPSILON, _ROPE_THETA = 1e-5, 500_000.0
_SWITCHES = (TURNED_OFF,)  # of the environment: which kernels are off
_WALL = Timer("wall time", wall_seconds, 0)

Arrays: TypeAlias = dict[str, Any]  # of arrays, or of their shapes and dtypes
Multiply: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # x, w and a key


# What is computed


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


# Measuring


@dataclasses.dataclass(frozen=True)
class Row:
  """One implementation of one cell; `note` says why there is no time, or what is wrong."""

  layer: str
  form: str
  tokens: int
  n: int
  k: int
  implementation: str
  ms: float | None = None  # of the device, median
  ms_q1: float | None = None
  ms_q3: float | None = None
  wall_ms: float | None = None
  wall_ms_q1: float | None = None
  wall_ms_q3: float | None = None
  samples: int = 0  # programs whose kernels were timed
  copies: int = 0  # sets of operands that a program goes through, each once
  ratio: float | None = None  # the time of bf16 of the same run / this one
  wall_ratio: float | None = None
  # ||difference|| / ||bf16's||, Frobenius; of a block's dw that of the worst weight.
  error_out: float | None = None
  error_dx: float | None = None
  error_dw: float | None = None
  note: str = ""
  path: str = ""  # what `jaxqq.explain` says of a forward product; the attention of a block

  @property
  def cell(self) -> tuple[Any, ...]:
    return self.layer, self.form, self.tokens, self.n, self.k, self.implementation

  @property
  def error(self) -> float | None:
    """The worst of its errors."""
    known = [e for e in (self.error_out, self.error_dx, self.error_dw) if e is not None]
    return max(known, default=None)


@dataclasses.dataclass(frozen=True)
class Suite:
  """What is measured, and how; (n, k) in `shapes` keep these layers alone."""

  modes: Sequence[Mode] = MODES
  tokens: Sequence[int] = TOKENS
  forms: Sequence[str] = tuple(FORMS)
  shapes: Sequence[tuple[int, int]] = ()
  model: Model = MODEL
  has_peer: bool = True  # whether bfloat16 is timed; results are compared with it all the same
  settings: Settings = dataclasses.field(default_factory=Settings)

  def __post_init__(self) -> None:
    for tokens in self.tokens:
      self.model.sequences(tokens)

  @property
  def ways(self) -> list[Way]:
    return [way for way in ways_of(self.modes) if self.has_peer or way != BFLOAT16]

  def cells(self) -> Iterator[Cell]:
    """The products layer by layer, then the block."""
    for tokens in self.tokens:
      for layer, shape in self.model.layers.items():
        for form in self.forms:
          if form != BLOCK and (not self.shapes or shape in self.shapes):
            yield Cell(self.model, layer, form, tokens)
      if BLOCK in self.forms and not self.shapes:
        yield Cell(self.model, BLOCK, BLOCK, tokens)

  def row_of(self, cell: Cell, way: Way) -> Row:
    return Row(cell.layer, cell.form, cell.tokens, *cell.shape, way.name)


def measure(suite: Suite, cell: Cell, timer: Timer) -> list[Row]:
  """Every implementation of a cell, in turn; one that fails becomes a row that says so."""
  settings, ways = suite.settings, suite.ways
  specs = cell.specs()
  copies = _num_copies(specs, timer)

  def compiled(work: Run) -> Run:
    return chained(work).lower([specs] * copies).compile()

  compared = list(dict.fromkeys([BFLOAT16, *ways]))  # with the first one's results
  made = side_by_side(compiled, [cell.run_of(way) for way in compared])
  calls = dict(zip(compared, made, strict=True))
  args = ([cell.operands(settings.seed * 1_000 + i) for i in range(copies)],)
  share = settings.seconds / settings.rounds / max(1, len(ways))
  rows: dict[str, Row] = {}
  programs: dict[str, Program] = {}
  want: Arrays | None = None
  for way, call in calls.items():
    row = dataclasses.replace(suite.row_of(cell, way), copies=copies)
    try:
      if isinstance(call, Exception):
        raise call
      got = jax.block_until_ready(call(*args))[-1]
      if way == BFLOAT16:
        want = got
      else:
        row = dataclasses.replace(row, path=cell.explain(way), **_compared(got, want))
      del got
      if way in ways:
        programs[way.name] = Program.warmed_up(call, args, share)
    except Exception as error:
      row = dataclasses.replace(row, note=f"failed: {reason(error)}")
    if way in ways:
      rows[way.name] = row
  del want
  return with_ratios(list(_timed(rows, programs, timer, settings.rounds).values()))


def _num_copies(specs: Any, timer: Timer) -> int:
  """As many sets of operands as are beyond a GPU's L2."""
  num_bytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(specs))
  return max(1, -(-timer.rotate_bytes // num_bytes))


def _compared(got: Arrays, want: Arrays | None) -> dict[str, Any]:
  """The fields of a row that say how far results are from those in bfloat16."""
  if want is None:
    return {"note": "there is no result in bfloat16 to compare with"}
  errors = {f"error_{name}": float(e) for name, e in _relative_errors(got, want).items()}
  if not all(map(math.isfinite, errors.values())):
    return {"note": "the result is not finite"}
  worst = max(errors.values())
  return errors | ({"note": f"{worst:.2f} off from bf16"} if worst > MOST_ERROR else {})


@jax.jit
def _relative_errors(got: Arrays, want: Arrays) -> Arrays:
  def error(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)

  errors = {name: jax.tree.map(error, got[name], want[name]) for name in got}
  return {name: jnp.max(jnp.stack(jax.tree.leaves(e))) for name, e in errors.items()}


def _timed(
  rows: Mapping[str, Row], programs: Mapping[str, Program], timer: Timer, rounds: int
) -> dict[str, Row]:
  """The rows with the times of their programs, of the timer and on the wall."""
  device = in_turn(programs, timer, rounds)
  wall = device if timer.sample is wall_seconds else in_turn(programs, _WALL, rounds)
  timed = dict(rows)
  for name in programs:
    row, failure = timed[name], None
    for field, found in (("wall_ms", wall[name]), ("ms", device[name])):
      if isinstance(found, Exception):
        failure = found
        continue
      q1, median, q3 = quartiles([1e3 * s / row.copies for s in found])
      times: dict[str, Any] = {field: median, f"{field}_q1": q1, f"{field}_q3": q3}
      row = dataclasses.replace(row, **times, samples=len(found))
    if failure is not None:
      row = dataclasses.replace(row, note=f"failed: {reason(failure)}")
    timed[name] = row
  return timed


def with_ratios(rows: Sequence[Row]) -> list[Row]:
  """How many times as fast as bfloat16 in the same run."""
  base = next((row for row in rows if row.implementation == BFLOAT16.name), None)
  if base is None:
    return list(rows)
  return [
    dataclasses.replace(
      row, ratio=_ratio(base.ms, row.ms), wall_ratio=_ratio(base.wall_ms, row.wall_ms)
    )
    for row in rows
  ]


def _ratio(base: float | None, own: float | None) -> float | None:
  return base / own if base and own else None


def run(
  suite: Suite,
  path: pathlib.Path | None = None,
  *,
  resume: bool = True,
  deadline: float = float("inf"),
  tell: Callable[[str], None] = print,
) -> list[Row]:
  """Measures what the file lacks, cell by cell, until the deadline (`time.monotonic`).

  Raises:
    ValueError: the file has results of another device, JAX, way of timing or choice of kernels.
  """
  timer = make_timer()
  switches = {name: os.environ[name] for name in _SWITCHES if os.environ.get(name)}
  how = dataclasses.asdict(suite.settings) | {"environment": switches}
  header = kept.make_header(timer.method, suites=["training"], **how)
  rows: list[Row] = []
  if path is not None and resume and path.exists():
    old, rows = read(path)
    header = kept.joined(path, old, header, also=("environment",))
  for cell in _left(suite, rows):
    if time.monotonic() >= deadline:
      break
    found = measure(suite, cell, timer)
    new = {row.cell for row in found}
    rows = [row for row in rows if row.cell not in new] + found
    for row in found:
      tell(_line(cell, row))
    if path is not None:
      kept.write(path, header, rows, TABLE)
  return rows


def _left(suite: Suite, rows: Sequence[Row]) -> list[Cell]:
  """The cells that lack a row; last come those in which an implementation failed."""
  known = {row.cell: row for row in rows}
  new, failed = [], []
  for cell in suite.cells():
    found = [known.get(suite.row_of(cell, way).cell) for way in suite.ways]
    if any(row is None for row in found):
      new.append(cell)
    elif any(row is not None and row.ms is None for row in found):
      failed.append(cell)
  return new + failed


def read(path: pathlib.Path) -> tuple[kept.Header, list[Row]]:
  content = json.loads(path.read_text())
  return content["header"], [Row(**row) for row in content[TABLE]]


# Text and tables


def _line(cell: Cell, row: Row) -> str:
  parts = [f"{cell} {row.implementation}: {_time(row.ms, row.ratio)}"]
  if row.wall_ms is not None:
    parts.append(f"wall {_time(row.wall_ms, row.wall_ratio)}")
  if row.error is not None:
    parts.append(f"{row.error:.3f} off")
  return ", ".join([*parts, row.note] if row.note else parts)


def _time(ms: float | None, ratio: float | None) -> str:
  if ms is None:
    return "-"
  return f"{ms:.3f} ms" if ratio is None else f"{ms:.3f} ms ({ratio:.2f}{TIMES})"


def markdown(rows: Sequence[Row]) -> str:
  """For each number of tokens a table of the products, and one of the block."""
  tables = []
  for tokens in sorted({row.tokens for row in rows}):
    here = [row for row in rows if row.tokens == tokens]
    products = [row for row in here if row.layer != BLOCK]
    block = [row for row in here if row.layer == BLOCK]
    if products:
      about = f"Products of {tokens} tokens, device time in ms ({TIMES} bf16):"
      tables += [about, "\n".join(_products(products))]
    if block:
      about = f"The block, forward and backward, {tokens} tokens ({TIMES} bf16):"
      tables += [about, "\n".join(_block(block))]
  return "\n\n".join(tables)


def _products(rows: Sequence[Row]) -> list[str]:
  """Layers and their products down, implementations across."""
  names = list(dict.fromkeys(row.implementation for row in rows))
  lines = markdown_row(["layer", f"N {TIMES} K", "product", *names], head=True)
  for layer, n, k, form in dict.fromkeys((r.layer, r.n, r.k, r.form) for r in rows):
    found = {
      r.implementation: r for r in rows if (r.layer, r.n, r.k, r.form) == (layer, n, k, form)
    }
    cells = [_cell(found.get(name)) for name in names]
    lines += markdown_row([layer, f"{n} {TIMES} {k}", FORMS[form], *cells])
  return lines


def _cell(row: Row | None) -> str:
  if row is None:
    return "-"
  text = "-" if row.ms is None else f"{row.ms:.3f}"
  if row.ratio is not None and row.implementation != BFLOAT16.name:
    text += f" ({row.ratio:.2f})"
  return ", ".join(part for part in (text, row.note) if part)


def _block(rows: Sequence[Row]) -> list[str]:
  titles = ["", "device", "wall clock", "error of out", "of dx", "of dw", ""]
  lines = markdown_row(titles, head=True)
  for row in rows:
    times = _time(row.ms, row.ratio), _time(row.wall_ms, row.wall_ratio)
    errors = (row.error_out, row.error_dx, row.error_dw)
    shown = ("-" if e is None else f"{e:.3f}" for e in errors)
    lines += markdown_row([row.implementation, *times, *shown, row.note])
  return lines
