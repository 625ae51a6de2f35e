"""An MLP on one device and on several: `python -m jaxqq.bench.mesh`.

    y = (silu(x gate^T) * (x up^T)) down^T     gate, up (N, K) split on N, down (K, N) split on N

The shapes are those of Llama 3 70B. x is whole on every device, and so is y: the devices' parts of
it are added up by one all-reduce. Forward, the weights of the quantized modes are packed. In a
training step they are in bfloat16, quantized on the fly, and so are the cotangents: four of its
seven products give gradients (x gets none), and plain SGD takes them.

Times are of the clock on the wall, several calls after the other. With them is said how far the
result is from that of one device, how wrong its products are, on a sample, and which kernels and
collectives the compiled program holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jaxqq
from jaxqq import _formats
from jaxqq.bench import report
from jaxqq.bench.cases import MODES, Case
from jaxqq.bench.check import error_share
from jaxqq.bench.kept import make_header
from jaxqq.bench.markdown import TIMES

HIDDEN, INTERMEDIATE = 8192, 28672  # of Llama 3 70B
BFLOAT16: Final = "bfloat16"
FORWARD, TRAINING = "forward", "training step"
_AXIS = "tensor"
_SPECS = {
  "gate": PartitionSpec(_AXIS, None),
  "up": PartitionSpec(_AXIS, None),
  "down": PartitionSpec(None, _AXIS),
}
_COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
_ROUNDS = 7
_LEARNING_RATE = 1e-7  # the loss is a sum

Mode: TypeAlias = _formats.Mode | Literal["bfloat16"]
Arrays = dict[str, jax.Array]
Weights = dict[str, tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Result:
  """One program."""

  work: str
  rows: int  # of x
  weights: str
  devices: int
  us: float  # median
  us_min: float
  kernels: int  # of jaxqq, how often the program names one
  collectives: dict[str, int]
  off_by: float  # norm of the difference to one device's result, relative
  error_shares: dict[str, float | None]  # worst error of a product / bound of the specification


def _dot(x: jax.Array, w: tuple[jax.Array, ...], mode: Mode) -> jax.Array:
  """x w^T. By the barriers it multiplies what the result has, x and cotangents rounded."""
  x = lax.optimization_barrier(x)
  if mode == BFLOAT16:
    out = jnp.einsum("mk,nk->mn", x, w[0])
  else:
    scales = w[1] if len(w) > 1 else None
    out = jaxqq.qqmm(x, w[0], scales, mode=mode, backward="quantized")
  return lax.optimization_barrier(out)


def _activation(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.silu(gate) * up


def forward(x: jax.Array, weights: Weights, mode: Mode) -> Arrays:
  """y, and what its products are made of; x (rows, hidden)."""
  gate, up = (_dot(x, weights[name], mode) for name in ("gate", "up"))
  hidden = _activation(gate, up)
  return {"gate": gate, "hidden": hidden, "y": _dot(hidden, weights["down"], mode)}


def training_step(x: jax.Array, weights: Weights, target: jax.Array, mode: Mode) -> Arrays:
  """The weights after a step on sum((y - target)**2) / 2, and what it was made of."""

  def with_pullback(x: jax.Array, name: str) -> Any:
    return jax.vjp(lambda x, w: _dot(x, (w,), mode), x, *weights[name])

  gate, of_gate = with_pullback(x, "gate")
  up, of_up = with_pullback(x, "up")
  hidden, of_hidden = jax.vjp(_activation, gate, up)
  y, of_y = with_pullback(hidden, "down")
  g = y - target
  d_hidden, d_down = of_y(g)
  d_gate, d_up = of_hidden(d_hidden)
  gradients = {"gate": of_gate(d_gate)[1], "up": of_up(d_up)[1], "down": d_down}
  return {
    "gate": gate,
    "hidden": hidden,
    "y": y,
    "g": g,
    "d_hidden": d_hidden,
    "d_gate": d_gate,
    "d_gate_weight": gradients["gate"],
    "d_down_weight": d_down,
    "loss": jnp.sum(jnp.square(g.astype(jnp.float32))) / 2,
  } | {
    f"new_{name}": weights[name][0] - (_LEARNING_RATE * d).astype(d.dtype)
    for name, d in gradients.items()
  }


# Of a result: the product's form, and what it multiplies; up's are as gate's. y is the row-parallel
# one.
_PRODUCTS = {
  "gate": ("on the fly", "x", "w gate"),
  "y": ("on the fly", "hidden", "w down"),
  "d_hidden": ("dx", "g", "w down"),
  "d_down_weight": ("dw", "g", "hidden"),
  "d_gate_weight": ("dw", "d_gate", "x"),
}


def _error_shares(result: Arrays, x: jax.Array, weights: Weights, mode: Any) -> dict[str, Any]:
  arrays = {"x": x} | {f"w {name}": w for name, (w,) in weights.items()} | result
  shares = {}
  for name, (form, *names) in _PRODUCTS.items():
    if name not in result:
      continue
    lhs, rhs = (arrays[name] for name in names)
    m, n = lhs.shape
    if form == "on the fly":
      n = rhs.shape[0]
    case = Case(form, mode, m, n, rhs.shape[1])
    share, _ = error_share(case, (lhs, rhs), result[name], quantized=mode != BFLOAT16)
    shares[name] = share
  return shares


def make_weights(hidden: int, intermediate: int, mesh: jax.sharding.Mesh) -> Weights:
  """Random ones, each made on the devices that hold it."""
  tall = (intermediate, hidden)
  shapes = {"gate": tall, "up": tall, "down": (hidden, intermediate)}
  weights: Weights = {}
  for i, (name, shape) in enumerate(shapes.items()):
    split = NamedSharding(mesh, _SPECS[name])
    # A program of its own: fused with it, XLA would quantize numbers that were never bfloat16.
    normal = functools.partial(_normal, shape=shape)
    weights[name] = (jax.jit(normal, out_shardings=split)(jax.random.key(i)),)
  return weights


def _packed(weights: Weights, mode: _formats.Mode, mesh: jax.sharding.Mesh) -> Weights:
  packed: Weights = {}
  for name, (w,) in weights.items():
    split = NamedSharding(mesh, _SPECS[name])
    quantize = functools.partial(jaxqq.quantize, mode=mode)
    packed[name] = jax.jit(quantize, out_shardings=(split, split))(w)
  return packed


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)


def _shardings(mesh: jax.sharding.Mesh, result: Arrays) -> dict[str, NamedSharding]:
  """What has the intermediate axis is split along it."""
  whole, columns = PartitionSpec(), PartitionSpec(None, _AXIS)
  specs = {name: _SPECS[name.removeprefix("new_")] for name in result if "new_" in name}
  specs |= {f"d_{name}_weight": spec for name, spec in _SPECS.items()}
  specs |= dict.fromkeys(("gate", "hidden", "d_hidden", "d_gate"), columns)
  return {name: NamedSharding(mesh, specs.get(name, whole)) for name in result}


def measure(
  modes: Sequence[Mode],
  all_work: Sequence[tuple[str, int]],  # and rows of x
  all_devices: Sequence[int],
  hidden: int,
  intermediate: int,
  seconds: float,
) -> Iterator[Result]:
  for mode in modes:
    first: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
    for count in all_devices:
      mesh = jax.make_mesh(
        (count,),
        (_AXIS,),
        devices=jax.devices()[:count],
        axis_types=(jax.sharding.AxisType.Auto,),
      )
      weights = make_weights(hidden, intermediate, mesh)
      packed = weights if mode == BFLOAT16 else _packed(weights, mode, mesh)
      whole = NamedSharding(mesh, PartitionSpec())
      for work, rows in all_work:
        x, target = (
          jax.device_put(jax.random.normal(jax.random.key(i), (rows, hidden), jnp.bfloat16), whole)
          for i in (9, 8)
        )
        args: tuple[Any, ...] = (x, packed) if work == FORWARD else (x, weights, target)
        f = functools.partial(forward if work == FORWARD else training_step, mode=mode)
        shardings = _shardings(mesh, jax.eval_shape(f, *args))
        program = jax.jit(f, out_shardings=shardings).lower(*args).compile()
        result = program(*args)
        shares = _error_shares(result, x, weights, mode)
        compared = (
          result["y"] if work == FORWARD else result["d_down_weight"][:: max(1, hidden // 64)]
        )
        out = np.asarray(compared.astype(jnp.float32))
        base = first.setdefault((work, rows), out)
        del result, compared
        times = _times(functools.partial(program, *args), seconds)
        yield Result(
          work,
          rows,
          mode,
          count,
          1e6 * statistics.median(times),
          1e6 * min(times),
          *_contents(program.as_text() or ""),
          float(np.linalg.norm(out - base) / np.linalg.norm(base)),
          shares,
        )


def _times(run: Callable[[], Any], seconds: float) -> list[float]:
  """Seconds a call, of so many calls that all rounds together take about `seconds`."""
  begin = time.perf_counter()
  jax.block_until_ready(run())
  calls = max(1, int(seconds / _ROUNDS / (time.perf_counter() - begin)))
  times = []
  for _ in range(_ROUNDS):
    begin = time.perf_counter()
    for _ in range(calls):
      out = run()
    jax.block_until_ready(out)
    times.append((time.perf_counter() - begin) / calls)
  return times


def _contents(text: str) -> tuple[int, dict[str, int]]:
  """How many kernels of ours and which collectives a compiled program holds."""
  found = {name: len(re.findall(rf"\b{name}(?:-start)?\(", text)) for name in _COLLECTIVES}
  return text.count("jaxqq_"), {name: count for name, count in found.items() if count}


def markdown(results: Sequence[Result]) -> str:
  """Work, rows of x and weights down, devices across."""
  counts = sorted({result.devices for result in results})
  of = {(r.work, r.rows, r.weights, r.devices): r for r in results}
  lines = [
    "| | rows of x | weights | " + " | ".join(f"devices: {count}" for count in counts) + " |",
    "|" + "---|" * (3 + len(counts)),
  ]
  for key in sorted({key[:3] for key in of}):
    one = of.get((*key, counts[0]))
    cells = []
    for count in counts:
      result = of.get((*key, count))
      text = "-" if result is None else f"{result.us:.0f} µs"
      if result and one and count != counts[0]:
        text += f", {one.us / result.us:.2f}{TIMES}"
      cells.append(text)
    lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
  return "\n".join(lines)


def read(path: pathlib.Path) -> tuple[dict[str, Any], list[Result]]:
  content = json.loads(path.read_text())
  return content["header"], [Result(**result) for result in content["mlp"]]


def main(arguments: Sequence[str] | None = None) -> list[Result]:
  parser = argparse.ArgumentParser(
    prog="python -m jaxqq.bench.mesh", description="An MLP on one device and on several."
  )
  add = parser.add_argument
  names = (BFLOAT16, *MODES)
  add("--weights", nargs="+", choices=names, default=names, metavar="NAME", help="(all)")
  add("--rows", nargs="*", type=int, default=[16, 4096], metavar="M", help="forward (16 4096)")
  add("--train-rows", nargs="*", type=int, default=[4096], metavar="M", help="training (4096)")
  add("--devices", nargs="+", type=int, metavar="N", help="how many (1 and all there are)")
  add("--hidden", type=int, default=HIDDEN, help=f"({HIDDEN})")
  add("--intermediate", type=int, default=INTERMEDIATE, help=f"({INTERMEDIATE})")
  add("--seconds", type=float, default=1.0, help="of measuring, a program (1)")
  add("--json", type=pathlib.Path, metavar="FILE", help="keep the results")
  add("--show", type=pathlib.Path, metavar="FILE", help="print the table of kept ones")
  options = parser.parse_args(arguments)
  if options.show:
    header, results = read(options.show)
    print(*report.header_lines(header)[:1], "", markdown(results), sep="\n")
    return results
  available = len(jax.devices())
  devices = options.devices or sorted({1, available})
  if not all(1 <= count <= available for count in devices):
    parser.error(f"--devices: there are {available}, got {' '.join(map(str, devices))}")
  header = make_header("wall time", hidden=options.hidden, intermediate=options.intermediate)
  print(*report.header_lines(header)[:1], sep="\n")
  results = []
  all_work = [(FORWARD, m) for m in options.rows] + [(TRAINING, m) for m in options.train_rows]
  for result in measure(
    options.weights, all_work, devices, options.hidden, options.intermediate, options.seconds
  ):
    results.append(result)
    print(result, flush=True)
    if options.json:  # after every program, so that a run cut short leaves what it has
      content = {"header": header, "mlp": [dataclasses.asdict(each) for each in results]}
      options.json.write_text(json.dumps(content, indent=1) + "\n")
  print("", markdown(results), sep="\n")
  return results


if __name__ == "__main__":
  main()
