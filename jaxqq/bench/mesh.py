"""An MLP on one device and on several: `python -m jaxqq.bench.mesh`.

    y = (silu(x gate^T) * (x up^T)) down^T     gate, up (N, K) split on N, down (K, N) split on N

The shapes are those of Llama 3 70B. The weights of the quantized modes are packed; x is whole on
every device, and so is y: the devices' parts of it are added up by one all-reduce. Times are of the
clock on the wall, several calls after the other; how far the result is from that of one device, and
which kernels and collectives the compiled program holds, is said with them.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxqq
from jaxqq.bench import report
from jaxqq.bench.cases import MODES

HIDDEN, INTERMEDIATE = 8192, 28672  # of Llama 3 70B
BFLOAT16 = "bfloat16"
_AXIS = "tensor"
_SPECS = {
  "gate": PartitionSpec(_AXIS, None),
  "up": PartitionSpec(_AXIS, None),
  "down": PartitionSpec(None, _AXIS),
}
_COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
_ROUNDS = 7

Weights = dict[str, tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Result:
  """One program."""

  rows: int  # of x
  weights: str
  devices: int
  us: float  # median
  us_min: float
  kernels: int  # of jaxqq, how often the program names one
  collectives: dict[str, int]
  off_by: float  # norm of the difference to one device's result, relative


def mlp(x: jax.Array, weights: Weights, mode: str) -> jax.Array:
  """x (rows, hidden) -> (rows, hidden)."""

  def dot(x: jax.Array, w: tuple[jax.Array, ...]) -> jax.Array:
    if mode != BFLOAT16:
      return jaxqq.qqmm(x, w[0], w[1], mode=mode)
    return jnp.einsum("mk,nk->mn", x, *w, preferred_element_type=jnp.float32).astype(x.dtype)

  hidden = jax.nn.silu(dot(x, weights["gate"])) * dot(x, weights["up"])
  return dot(hidden, weights["down"])


def make_weights(mode: str, hidden: int, intermediate: int, mesh: jax.sharding.Mesh) -> Weights:
  """Random ones, each made on the devices that hold it."""
  tall = (intermediate, hidden)
  shapes = {"gate": tall, "up": tall, "down": (hidden, intermediate)}
  weights: Weights = {}
  for i, (name, shape) in enumerate(shapes.items()):
    split = NamedSharding(mesh, _SPECS[name])
    normal = functools.partial(_normal, shape=shape)
    # A program of its own: fused with it, XLA would quantize numbers that were never bfloat16.
    w = jax.jit(normal, out_shardings=split)(jax.random.key(i))
    quantize = functools.partial(jaxqq.quantize, mode=mode)
    packed = jax.jit(quantize, out_shardings=(split, split))
    weights[name] = (w,) if mode == BFLOAT16 else packed(w)
  return weights


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)


def measure(
  modes: Sequence[str],
  all_rows: Sequence[int],
  all_devices: Sequence[int],
  hidden: int,
  intermediate: int,
  seconds: float,
) -> Iterator[Result]:
  for mode in modes:
    first: dict[int, np.ndarray[Any, Any]] = {}
    for count in all_devices:
      mesh = jax.make_mesh(
        (count,),
        (_AXIS,),
        devices=jax.devices()[:count],
        axis_types=(jax.sharding.AxisType.Auto,),
      )
      weights = make_weights(mode, hidden, intermediate, mesh)
      whole = NamedSharding(mesh, PartitionSpec())
      for rows in all_rows:
        x = jax.random.normal(jax.random.key(9), (rows, hidden), jnp.bfloat16)
        x = jax.device_put(x, whole)
        f = functools.partial(mlp, mode=mode)
        program = jax.jit(f, out_shardings=whole).lower(x, weights).compile()
        out = np.asarray(program(x, weights).astype(jnp.float32))
        base = first.setdefault(rows, out)
        times = _times(functools.partial(program, x, weights), seconds)
        yield Result(
          rows,
          mode,
          count,
          1e6 * statistics.median(times),
          1e6 * min(times),
          *_contents(program.as_text() or ""),
          float(np.linalg.norm(out - base) / np.linalg.norm(base)),
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
  """Rows of x and weights down, devices across."""
  counts = sorted({result.devices for result in results})
  of = {(result.rows, result.weights, result.devices): result for result in results}
  lines = [
    "| rows of x | weights | " + " | ".join(f"devices: {count}" for count in counts) + " |",
    "|" + "---|" * (2 + len(counts)),
  ]
  for rows, weights in sorted({key[:2] for key in of}):
    one = of.get((rows, weights, counts[0]))
    cells = []
    for count in counts:
      result = of.get((rows, weights, count))
      text = "-" if result is None else f"{result.us:.0f} µs"
      if result and one and count != counts[0]:
        text += f", {one.us / result.us:.2f}{report.TIMES}"
      cells.append(text)
    lines.append(f"| {rows} | {weights} | " + " | ".join(cells) + " |")
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
  add("--rows", nargs="+", type=int, default=[16, 4096], metavar="M", help="of x (16 4096)")
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
  header = report.make_header("wall time", hidden=options.hidden, intermediate=options.intermediate)
  print(*report.header_lines(header)[:1], sep="\n")
  results = []
  for result in measure(
    options.weights, options.rows, devices, options.hidden, options.intermediate, options.seconds
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
