"""Layers of experts: ragged products beside those of JAX and torch, by `--suite moe`.

    out[i] = x[i] w[expert of i]^T       w (experts, N, K); each token goes to `top` of the experts

Rows of x are sorted by expert; which experts a token gets is drawn at random, without repeats, and
anew for each product of a program, so that a weight is rarely in the L2 cache when it is needed.
Times are of the device, the kernels of a call together. The shapes are those of Qwen3, gpt-oss,
Mixtral and DeepSeek V3.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxqq
from jaxqq._formats import FORMATS, Mode
from jaxqq.bench import kept
from jaxqq.bench.check import round_trip
from jaxqq.bench.measure import Settings, Timer, chained, make_timer, quartiles, reason
from jaxqq.bench.turns import Program, in_turn, side_by_side


@dataclasses.dataclass(frozen=True)
class Layer:
  """So many experts of (n, k), of which a token gets `top`."""

  experts: int
  top: int
  n: int
  k: int

  @property
  def shape(self) -> tuple[int, int]:
    return self.n, self.k

  def __str__(self) -> str:
    return f"{self.n} x {self.k} ({self.experts}, {self.top})"


LAYERS = (
  Layer(128, 8, 1536, 2048),
  Layer(32, 4, 5760, 2880),
  Layer(8, 2, 28672, 4096),
  Layer(256, 8, 4096, 7168),
)
TOKENS = (1, 8, 64, 512, 4096)
FORMS = {
  "packed": "ragged_qqmm, w quantized beforehand",
  "weights alone": "ragged_quantized_matmul, w quantized beforehand and x as it is",
  "training": "ragged_qqmm on the fly, and the gradients of x and w",
}
TRAINING_TOKENS = 4096
PEERS = ("lax", "pallas", "torch")
TABLE = "layers"  # where a file has the rows
_SAMPLE = 24  # rows, and columns, whose errors are looked at
_MOST_COPIES, _MOST_BYTES = 8, 8 << 30  # of operands and results that differ from call to call


@dataclasses.dataclass(frozen=True)
class Row:
  """One implementation of one product of a layer; `note` says why there is no time."""

  layer: tuple[int, int, int, int]  # the fields of a Layer
  tokens: int
  form: str
  implementation: str
  us: float | None = None  # median
  us_q1: float | None = None
  us_q3: float | None = None
  copies: int = 0  # products in a program
  used_bytes: int = 0  # of the experts that have rows, of x and the result
  ratio: float | None = None  # to the fastest bfloat16 peer of the same run
  error_share: float | None = None  # worst error / bound of the specification, on a sample
  note: str = ""
  path: str = ""  # what `jaxqq.explain` says of it

  @classmethod
  def of(cls, kept: dict[str, Any]) -> Row:
    """As a file has it."""
    return cls(**{**kept, "layer": tuple(kept["layer"])})

  @property
  def cell(self) -> tuple[Any, ...]:
    return tuple(self.layer), self.tokens, self.form, self.implementation


@dataclasses.dataclass(frozen=True)
class Routing:
  """Operands that a product has of its own."""

  x: jax.Array  # bfloat16 (tokens * top, k)
  sizes: jax.Array  # int32 (experts,)


def routing(layer: Layer, tokens: int, seed: int) -> Routing:
  """Each token's experts, drawn without repeats, and its row once for each."""
  rng = np.random.default_rng([seed, tokens])
  chosen = np.argsort(rng.random((tokens, layer.experts)), axis=1)[:, : layer.top]
  sizes = np.bincount(chosen.reshape(-1), minlength=layer.experts)
  shape = tokens * layer.top, layer.k
  x = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
  return Routing(x, jnp.asarray(sizes, jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def _weights(layer: Layer) -> jax.Array:
  """One expert after the other: random numbers of all would take several times their bytes."""
  return lax.map(
    lambda key: jax.random.normal(key, (layer.n, layer.k), jnp.bfloat16),
    jax.random.split(jax.random.key(0), layer.experts),
  )


# Ways to do it: (w, *what it is prepared to) and (routing) to a function of a routing's arrays


@dataclasses.dataclass(frozen=True)
class Way:
  """An implementation: what becomes of w beforehand, and the product."""

  name: str
  prepare: Callable[[jax.Array], tuple[jax.Array, ...]]
  run: Callable[..., Any]  # (x, sizes, *prepared)
  mode: Mode | None = None  # None: of unquantized operands
  form: str = "packed"

  def explain(self, x: jax.Array, sizes: jax.Array, *w: jax.Array) -> str:
    if self.mode is None:
      return ""
    scales = w[1] if len(w) > 1 else None
    function = _function(self.form)
    return str(jaxqq.explain(function, x, w[0], sizes, scales=scales, mode=self.mode))


def _function(form: str) -> Any:
  return jaxqq.ragged_quantized_matmul if form == "weights alone" else jaxqq.ragged_qqmm


def _gradients(product: Callable[..., jax.Array]) -> Callable[..., Any]:
  """out, and the gradients of x and w where out is its own cotangent."""

  def step(x: jax.Array, sizes: jax.Array, w: jax.Array) -> Any:
    out, pull = jax.vjp(lambda x, w: product(x, sizes, w), x, w)
    return out, *pull(out)

  return step


def jaxqq_ways(form: str, modes: Sequence[Mode]) -> list[Way]:
  ways = []
  for mode in modes:
    if form == "training":
      product = functools.partial(_on_the_fly, mode=mode)
      ways.append(Way(f"jaxqq {mode}", _as_given, _gradients(product), mode, form))
    else:
      run = functools.partial(_packed, mode=mode, function=_function(form))
      prepare = jax.jit(functools.partial(_pack, mode=mode))
      ways.append(Way(f"jaxqq {mode}", prepare, run, mode, form))
  return ways


def _as_given(w: jax.Array) -> tuple[jax.Array, ...]:
  return (w,)


def _pack(w: jax.Array, mode: Mode) -> tuple[jax.Array, ...]:
  return tuple(lax.map(functools.partial(jaxqq.quantize, mode=mode), w))


def _packed(
  x: jax.Array, sizes: jax.Array, w: jax.Array, scales: jax.Array, *, mode: Mode, function: Any
) -> jax.Array:
  return function(x, w, sizes, scales, mode=mode)


def _on_the_fly(x: jax.Array, sizes: jax.Array, w: jax.Array, *, mode: Mode) -> jax.Array:
  return jaxqq.ragged_qqmm(x, w, sizes, mode=mode)


def peer_ways(layer: Layer, tokens: int, form: str, peers: Sequence[str]) -> list[Way]:
  """Those of JAX. torch is timed apart."""
  ways = []
  if "lax" in peers:
    product = _lax_ragged_dot
    run = _gradients(product) if form == "training" else product
    ways.append(Way("lax.ragged_dot", _as_given, run))
  if "pallas" in peers and form != "training" and jax.default_backend() == "gpu":
    rows = tokens * layer.top
    for block_m, block_n, steps in ((64, 64, 6), (64, 128, 6), (128, 128, 4), (128, 64, 6)):
      if layer.k % 64 == 0 and rows >= 64:
        run = functools.partial(_pallas_ragged_dot, block_m=block_m, block_n=block_n, steps=steps)
        ways.append(Way(f"pallas ragged_dot {block_m} x {block_n}", _as_given, run))
  return ways


def _lax_ragged_dot(x: jax.Array, sizes: jax.Array, w: jax.Array) -> jax.Array:
  return lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), sizes)


def _pallas_ragged_dot(
  x: jax.Array, sizes: jax.Array, w: jax.Array, *, block_m: int, block_n: int, steps: int
) -> jax.Array:
  """JAX's own kernel."""
  from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

  return ragged_dot_mgpu.ragged_dot(
    x,
    w,
    group_sizes=sizes,
    block_m=block_m,
    block_n=block_n,
    block_k=64,
    max_concurrent_steps=steps,
    grid_block_n=1,
    transpose_rhs=True,
  )


# Measuring


def measure(
  layer: Layer,
  tokens: int,
  form: str,
  ways: Sequence[Way],
  timer: Timer,
  settings: Settings,
  *,
  with_torch: bool = False,
) -> list[Row]:
  """Every way to do one product, in turn."""
  w = _weights(layer)
  copies = _num_copies(layer, tokens, form)
  routings = [routing(layer, tokens, settings.seed * 1000 + i) for i in range(copies)]
  share = settings.seconds / settings.rounds / max(1, len(ways))
  rows: dict[str, Row] = {}
  programs: dict[str, Program] = {}

  def compiled(way: Way) -> tuple[Any, Any]:
    prepared = way.prepare(w)
    args = ([(r.x, r.sizes, *prepared) for r in routings],)
    return chained(way.run).lower(*args).compile(), args

  for way, made in zip(ways, side_by_side(compiled, ways), strict=True):
    row = Row(dataclasses.astuple(layer), tokens, form, way.name, copies=copies)
    try:
      if isinstance(made, Exception):
        raise made
      call, args = made
      last = jax.block_until_ready(call(*args))[-1]
      share_of_bound = _error_share(layer, way, routings[-1], w, last, form)
      del last
      programs[way.name] = Program.warmed_up(call, args, share)
      rows[way.name] = dataclasses.replace(
        row,
        error_share=share_of_bound,
        used_bytes=_used_bytes(layer, tokens, way, routings),
        path=way.explain(*args[0][0]),
      )
    except Exception as error:
      programs.pop(way.name, None)
      rows[way.name] = dataclasses.replace(row, note=f"failed: {reason(error)}")
  for name, found in in_turn(programs, timer, settings.rounds).items():
    if isinstance(found, Exception):
      rows[name] = dataclasses.replace(rows[name], note=f"failed: {reason(found)}")
      continue
    q1, median, q3 = quartiles([1e6 * s / copies for s in found])
    rows[name] = dataclasses.replace(rows[name], us=median, us_q1=q1, us_q3=q3)
  if with_torch:
    rows["torch"] = _torch_row(layer, tokens, form, w, routings)
  return with_ratios(list(rows.values()))


def with_ratios(rows: Sequence[Row]) -> list[Row]:
  """How many times as fast as the fastest bfloat16 peer."""
  peers = [row.us for row in rows if row.us and not row.implementation.startswith("jaxqq")]
  if not peers:
    return list(rows)
  return [dataclasses.replace(r, ratio=min(peers) / r.us if r.us else None) for r in rows]


def _num_copies(layer: Layer, tokens: int, form: str) -> int:
  rows = tokens * layer.top
  one = 2 * rows * (layer.k + layer.n)
  if form == "training":
    one += 2 * layer.experts * layer.n * layer.k + 2 * rows * layer.k
  return max(1, min(_MOST_COPIES, _MOST_BYTES // one))


def _used_bytes(layer: Layer, tokens: int, way: Way, routings: Sequence[Routing]) -> int:
  """On average: of the experts that have rows, of x and of the result."""
  bits = 16.0
  if way.mode is not None and way.form != "training":
    fmt = FORMATS[way.mode]
    bits = fmt.bits + 8 / fmt.group_size
  used = np.mean([int((np.asarray(r.sizes) > 0).sum()) for r in routings])
  return int(used * layer.n * layer.k * bits / 8 + 2 * tokens * layer.top * (layer.n + layer.k))


def _error_share(
  layer: Layer, way: Way, of: Routing, w: jax.Array, out: Any, form: str
) -> float | None:
  """On some rows and columns, against float64."""
  out = out[0] if form == "training" else out
  rng, ends = np.random.default_rng(0), np.cumsum(np.asarray(of.sizes))
  rows = np.unique(rng.integers(0, len(of.x), _SAMPLE))
  columns = np.unique(rng.integers(0, layer.n, _SAMPLE))
  worst = 0.0
  for row in rows:
    expert = int(np.searchsorted(ends, row, side="right"))
    a = np.asarray(of.x[row], np.float32)[None]
    b = np.asarray(w[expert][jnp.asarray(columns)], np.float32)
    if way.mode is not None:
      b = round_trip(b, way.mode)
      a = a if way.form == "weights alone" else round_trip(a, way.mode)
    a, b = a.astype(np.float64), b.astype(np.float64)
    got = np.asarray(out[row], np.float64)[columns]
    if not np.isfinite(got).all():
      raise ValueError("the result is not finite")
    exact, mag = (a @ b.T)[0], (np.abs(a) @ np.abs(b).T)[0]
    bound = 2.0**-8 * np.abs(exact) + 2.0**-12 * mag
    worst = max(worst, float(np.max(np.abs(got - exact) / bound)))
  return worst


def _torch_row(
  layer: Layer, tokens: int, form: str, w: jax.Array, routings: Sequence[Routing]
) -> Row:
  """`torch._grouped_mm`, replayed as a CUDA graph of all routings."""
  row = Row(dataclasses.astuple(layer), tokens, form, "torch._grouped_mm", copies=len(routings))
  try:
    import torch  # type: ignore[import-not-found,unused-ignore]

    of_w = torch.from_dlpack(w)
    operands = [
      (
        torch.from_dlpack(r.x),
        torch.from_dlpack(jnp.cumsum(r.sizes, dtype=jnp.int32)),
      )
      for r in routings
    ]

    def work() -> Any:
      found = []
      for x, ends in operands:
        out = torch._grouped_mm(x, of_w.transpose(1, 2), offs=ends)
        found.append(out)
        if form == "training":
          found.append(torch._grouped_mm(out, of_w, offs=ends))
          found.append(torch._grouped_mm(out.transpose(0, 1), x, offs=ends))
      return found

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
      work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      kept_alive = work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(12):
      begin.record()
      graph.replay()
      end.record()
      torch.cuda.synchronize()
      seconds.append(1e-3 * begin.elapsed_time(end))
    del kept_alive, graph
    torch.cuda.empty_cache()
  except Exception as error:
    return dataclasses.replace(row, note=f"failed: {reason(error)}")
  q1, median, q3 = quartiles([1e6 * s / len(routings) for s in seconds[2:]])
  return dataclasses.replace(row, us=median, us_q1=q1, us_q3=q3)


# Tables, and results that several runs add up to


def markdown(rows: Sequence[Row]) -> str:
  """A table a form: layers down, tokens across; us, and the ratio to the fastest peer."""
  lines: list[str] = []
  for form in FORMS:
    of_form = [row for row in rows if row.form == form]
    if not of_form:
      continue
    tokens = sorted({row.tokens for row in of_form})
    lines += [f"{form}, us (times the fastest bfloat16 peer):", ""]
    lines.append("| layer (experts, top) | | " + " | ".join(f"T={t}" for t in tokens) + " |")
    lines.append("|---|---|" + "---|" * len(tokens))
    for layer in dict.fromkeys(tuple(row.layer) for row in of_form):
      here = [row for row in of_form if tuple(row.layer) == layer]
      for name in dict.fromkeys(row.implementation for row in here):
        found = {row.tokens: row for row in here if row.implementation == name}
        cells = [_cell(found.get(t)) for t in tokens]
        experts, top, n, k = layer
        lines.append(f"| {Layer(experts, top, n, k)} | {name} | " + " | ".join(cells) + " |")
    lines.append("")
  return "\n".join(lines)


def _cell(row: Row | None) -> str:
  if row is None or row.us is None:
    return "-"
  ratio = f" ({row.ratio:.2f})" if row.ratio and row.implementation.startswith("jaxqq") else ""
  return f"{row.us:.1f}{ratio}"


def read(path: pathlib.Path) -> tuple[dict[str, Any], list[Row]]:
  content = json.loads(path.read_text())
  return content["header"], [Row.of(row) for row in content[TABLE]]


def run(
  modes: Sequence[Mode],
  tokens: Sequence[int],
  forms: Sequence[str],
  settings: Settings,
  path: pathlib.Path | None,
  *,
  layers: Sequence[Layer] = LAYERS,
  peers: Sequence[str] = PEERS,
  resume: bool = True,
  deadline: float = float("inf"),
  tell: Callable[[str], None] = print,
) -> list[Row]:
  """Measures what the file lacks, layer by layer, until the deadline (`time.monotonic`)."""
  timer = make_timer()
  header = kept.make_header(timer.method, suites=["moe"])
  rows: list[Row] = []
  if path is not None and resume and path.exists():
    old, rows = read(path)
    header = kept.joined(path, old, header)
  with_torch = "torch" in peers and jax.default_backend() == "gpu"
  for layer, count, form in _cells(layers, tokens, forms):
    ways = peer_ways(layer, count, form, peers) + jaxqq_ways(form, modes)
    known = {row.cell for row in rows}
    wanted = [(dataclasses.astuple(layer), count, form, way.name) for way in ways]
    if all(cell in known for cell in wanted):
      continue
    if time.monotonic() >= deadline:
      break
    found = measure(layer, count, form, ways, timer, settings, with_torch=with_torch)
    new = {row.cell for row in found}
    rows = [row for row in rows if row.cell not in new] + found
    for row in found:
      tell(f"{layer} T={count} {form} {row.implementation}: {_cell(row)} {row.note}")
    if path is not None:
      kept.write(path, header, rows, TABLE)
  return rows


def _cells(
  layers: Sequence[Layer], tokens: Sequence[int], forms: Sequence[str]
) -> Iterator[tuple[Layer, int, str]]:
  for layer in layers:
    for form in forms:
      for count in tokens:
        if form != "training" or count == max(tokens):
          yield layer, count, form
