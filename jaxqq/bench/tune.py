"""Measures the tiles of packed products on a Hopper GPU, and fits the planner's costs to them.

    python -m jaxqq.bench.tune --json tiles.json --processes 15     measures, and adds to the file
    python -m jaxqq.bench.tune --json tiles.json --fit              costs of all that is in it

What comes out are lines of `_kernels/hopper/costs.py`, and how far from the fastest tile the
planner's choice is. The files in `_kernels/tuned` are such files, of which tests tell what a change
of the costs moves.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxqq import _kernels
from jaxqq._formats import FORMATS, Mode
from jaxqq._kernels.hopper import costs, wide_plan
from jaxqq._kernels.hopper.mainloops.table import PARTS, Part
from jaxqq._kernels.hopper.tiles import Grid, cdiv
from jaxqq._kernels.hopper.wide_plan import WidePlan
from jaxqq._kernels.problem import Problem
from jaxqq._reference import Operands
from jaxqq.bench import processes
from jaxqq.bench.__main__ import shape_of
from jaxqq.bench.cases import LLAMA, MODELS, MODES, Case
from jaxqq.bench.measure import Row, Settings
from jaxqq.bench.peers import Implementation, pack_last

ROWS = (16, 32, 64, 96, 128, 192, 256, 512, 1024)
SLOWER = 1.5  # what is not measured, since the costs say that it takes so many times the fastest
SMALL_ROWS = 32  # of a tile; larger ones are not tried where half of their rows would be zeros
_WHAT = "Device time of products of packed w by tiles, quantization of x included, medians."


@dataclasses.dataclass(frozen=True)
class Tile:
  """One way to tile one product."""

  mode: Mode
  m: int
  n: int
  k: int
  block_m: int
  block_n: int
  cluster: int = 1
  stream_k: bool = False
  parts: int = 1

  @classmethod
  def of(cls, planned: WidePlan) -> Tile:
    problem, tiles = planned.problem, planned.tiles
    how = tiles.block_m, tiles.block_n, tiles.cluster, tiles.stream_k, tiles.parts
    return cls(problem.fmt.mode, problem.rows, problem.n, problem.k, *how)

  @property
  def name(self) -> str:
    """Of an implementation; `compile_ahead` knows jaxqq's own by how their names begin."""
    parts = f" parts {self.parts}" if self.parts > 1 else ""
    shared = f" cluster {self.cluster}" if self.cluster > 1 else ""
    return f"jaxqq {self.block_m}x{self.block_n}{parts}{shared}{' stream-K' * self.stream_k}"

  @property
  def product(self) -> tuple[Mode, int, int, int]:
    return self.mode, self.m, self.n, self.k


# Measuring


@dataclasses.dataclass(frozen=True)
class TileCase(Case):
  """A product by one tile, so that processes compile the tiles of a product side by side."""

  tile: Tile | None = None


def plans_of(case: Case) -> list[WidePlan]:
  """Those of tiles that may be the fastest, by the costs so far; the planner's choice first."""
  fmt, spec = FORMATS[case.mode], jax.ShapeDtypeStruct
  words = spec((case.n, case.k // fmt.codes_per_word), np.dtype(np.uint32))
  scales = spec((case.n, case.k // fmt.group_size), np.dtype(np.uint8))
  dtype = np.dtype(case.dtype)
  operands = Operands(spec((case.m, case.k), dtype), words, scales)
  problem = Problem.of(operands, fmt, dtype, None)
  device = _kernels.device_of("cuda")
  plans = wide_plan.wide_plans(problem, device, fp8=fmt.bits == 8)
  least = min(each.estimate_us for each in plans)
  most, chosen = max(SMALL_ROWS, 2 * case.m - 1), wide_plan.fastest(plans)
  found = [p for p in plans if p is chosen or p.tiles.block_m <= most]
  found = [p for p in found if p.kernel == "dequant_gemm"]
  return sorted((p for p in found if p.estimate_us <= SLOWER * least), key=wide_plan.expected_us)


def tile_cases(cases: Sequence[Case]) -> list[TileCase]:
  """Of every product what the planner takes, then of every one the next by the costs, and so on."""
  ranked = (
    (rank, TileCase(**case.fields(), tile=Tile.of(planned)))
    for case in cases
    for rank, planned in enumerate(plans_of(case))
  )
  return [case for _, case in sorted(ranked, key=lambda each: each[0])]


def implementations(case: Case) -> list[Implementation]:
  """The one: the product by its tile."""
  assert isinstance(case, TileCase)
  (planned,) = (each for each in plans_of(case) if Tile.of(each) == case.tile)
  run = functools.partial(_run, planned)
  return [Implementation(Tile.of(planned).name, run, pack_last(case.mode))]


def _run(planned: WidePlan, x: jax.Array, w: jax.Array, scales: jax.Array) -> jax.Array:
  return planned.run(Operands(x, w, scales))


def measured_times(
  cases: Sequence[TileCase], settings: Settings, workers: int, deadline: float
) -> Iterable[tuple[Tile, float]]:
  """Of one tile after the other that ran and was right: us."""
  work = processes.Work(implementations, settings, deadline)
  for found in processes.measured([[case] for case in cases], work, workers):
    for case, rows in found.items():
      assert isinstance(case, TileCase) and case.tile is not None
      yield from ((case.tile, row.us) for row in rows if row.us and is_right(row))


def is_right(row: Row) -> bool:
  return row.error_share is not None and row.error_share <= 1


# Files


def read(path: pathlib.Path) -> dict[Tile, float]:
  """The times in a file, of `dequant_gemm`."""
  fields = {field.name for field in dataclasses.fields(Tile)}
  return {
    Tile(**{name: value for name, value in row.items() if name in fields}): row["us"]
    for row in json.loads(path.read_text())["rows"]
    if row.get("kernel") == "dequant_gemm"
  }


def write(path: pathlib.Path, times: dict[Tile, float]) -> None:
  head = {
    "what": _WHAT,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "date": time.strftime("%Y-%m-%d"),
  }
  rows = (
    json.dumps({"kernel": "dequant_gemm", **dataclasses.asdict(tile), "us": round(us, 2)})
    for tile, us in times.items()
  )
  part = path.with_name(path.name + ".part")
  lines = ",\n  ".join(rows)
  part.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')
  os.replace(part, path)


# Costs

# `costs.counts` of a product in parts, what share of a tile's sums a CTA reads (with stream-K, how
# many others share it), the product's time but for what comes before, and all of it
_Terms = list[tuple[int, int, float, float, float]]
_FEWEST = 4  # times, to fit to
_MANY = 8  # of stream-K, to tell a part of its own from the rest
_EXCHANGING = 64  # rows of x of a tile: what sums of fewer take is lost in the rest


def fitted(times: dict[Tile, float], mode: Mode, num_sms: int = 132) -> list[costs.Timed]:
  """Costs of each tile with enough times, to least squares of the relative error.

  Times count that have as many parts of a step as the costs so far say. Those of tiles alone and in
  clusters are fitted together, since parts take as long in both. What CTAs exchange is told apart
  from the rest where there are clusters of several sizes, of tiles of 64 rows of x or more.
  """
  own = [(tile, us) for tile, us in times.items() if tile.mode == mode]
  sizes = sorted({(tile.block_m, tile.block_n) for tile, _ in own})
  lines = [line for size in sizes for line in _lines(mode, *size)]
  found = []
  for line in lines:
    size = line.block_m, line.block_n
    terms: dict[str, _Terms] = collections.defaultdict(list)
    for tile, us in own:
      if (tile.block_m, tile.block_n) == size and tile.parts == line.parts:
        way = "stream_k" if tile.stream_k else "cluster" if tile.cluster > 1 else "alone"
        terms[way].append((*_terms(tile, num_sms), us - _before(tile), us))
    if len(terms["alone"]) + len(terms["cluster"]) < _FEWEST or not terms["alone"]:
      continue
    several = len({share for _, _, share, _, _ in terms["cluster"]}) > 1
    rows = [(parts, tiles, 0, 0.0, us, all_us) for parts, tiles, _, us, all_us in terms["alone"]]
    rows += [
      (parts, 0, 1, share if several else 0.0, us, all_us)
      for parts, _, share, us, all_us in terms["cluster"]
    ]
    part_us, tile_us, cluster_us, exchange_us = _least_squares(rows)
    stream_k = _stream_k(terms["stream_k"], part_us)
    timed = costs.Timed(
      *size,
      round(part_us, 3),
      round(tile_us, 1),
      round(cluster_us, 1) if terms["cluster"] else None,
      stream_k and (round(stream_k[0], 3), round(stream_k[1], 1), round(stream_k[2], 1)),
      line.parts,
      line.launch_us,
      line.x_us,
      round(exchange_us, 1),
      line.w_us,
    )
    found.append(timed)
  return found


def _stream_k(terms: _Terms, part_us: float) -> tuple[float, float, float] | None:
  """Few times do not tell that a part is faster than alone."""
  if len(terms) < _FEWEST:
    return None
  found, rest_us, other_us = _least_squares(terms)
  if found < part_us and len(terms) < _MANY:
    rest = [(1, others, us - parts * part_us, all_us) for parts, _, others, us, all_us in terms]
    found, (rest_us, other_us) = part_us, _least_squares(rest)
  return found, rest_us, other_us


def _lines(mode: Mode, block_m: int, block_n: int) -> list[costs.Timed]:
  """The costs so far of a tile: one line, or one for each number of parts."""
  own = [t for t in _part(mode).costs if (t.block_m, t.block_n) == (block_m, block_n)]
  return own or [costs.Timed(block_m, block_n, 0.0, 0.0)]


def _part(mode: Mode) -> Part:
  return PARTS["rebased_e4m3" if FORMATS[mode].bits == 8 else "packed_e2m1"]


def _terms(tile: Tile, num_sms: int) -> tuple[int, int, float]:
  """Parts of steps that follow each other, how often a tile begins and ends, and what is shared."""
  sizes = 1, tile.m, tile.n, tile.block_m, tile.block_n
  grid = Grid(*sizes, num_sms, cluster=tile.cluster, stream_k=tile.stream_k)
  steps, tiles = costs.counts(grid, cdiv(tile.k, tile.parts * _part(tile.mode).k))
  shared = 1 - 1 / tile.cluster if tile.block_m >= _EXCHANGING else 0.0
  return steps * tile.parts, tiles, grid.others if tile.stream_k else shared


def _before(tile: Tile) -> float:
  """How long the launch takes and what comes before it, by the costs so far."""
  line, *_ = _lines(tile.mode, tile.block_m, tile.block_n)
  parts = cdiv(tile.k, tile.parts * _part(tile.mode).k) * tile.parts
  return line.launch_us + parts * (tile.m * line.x_us + tile.n * line.w_us)


def _least_squares(rows: Sequence[tuple[float, ...]]) -> list[float]:
  """The costs of each column but the last two: what is left of a time, and all of it.

  None is negative: a column whose cost would be is left out.
  """
  table = np.array(rows, float)
  counts, own, whole = table[:, :-2], table[:, -2], table[:, -1]
  relative, share, kept = counts / whole[:, None], own / whole, [*range(counts.shape[1])]
  while True:
    found = np.zeros(counts.shape[1])
    found[kept] = np.linalg.lstsq(relative[:, kept], share, rcond=None)[0]
    if (found >= 0).all():
      return found.tolist()
    kept.remove(int(np.argmin(found)))


def choices(times: dict[Tile, float]) -> list[tuple[float, Tile, Tile]]:
  """Of each product how much slower the planner's tile is than the fastest, and both.

  A tile that was not measured is infinitely slower.
  """
  of_product: dict[Any, dict[Tile, float]] = collections.defaultdict(dict)
  for tile, us in times.items():
    of_product[tile.product][tile] = us
  found = []
  for (mode, m, n, k), own in of_product.items():
    plans = plans_of(Case("packed", mode, m, n, k))
    if plans:
      chosen = Tile.of(wide_plan.fastest(plans))
      fastest = min(own, key=own.__getitem__)
      found.append((own.get(chosen, float("inf")) / own[fastest], chosen, fastest))
  return sorted(found, key=lambda choice: -choice[0])


def report(times: dict[Tile, float]) -> str:
  lines = []
  for mode in sorted({tile.mode for tile in times}):
    lines += [f"{mode}:", *(f"  {timed}" for timed in fitted(times, mode)), ""]
  found = choices(times)
  near = sum(slower <= 1.05 for slower, _, _ in found)
  lines.append(
    f"The planner's tile is within 5% of the fastest for {near} of {len(found)} products."
  )
  for slower, chosen, fastest in found[: len(found) - near]:
    mode, m, n, k = chosen.product
    told = f"{chosen.name[6:]}, fastest {fastest.name[6:]}"
    lines.append(f"  {slower:.2f} {mode} {m} x {n} x {k}: {told}")
  return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[Tile, float]:
  begin = time.monotonic()
  parser = argparse.ArgumentParser(prog="python -m jaxqq.bench.tune", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("--json", type=pathlib.Path, required=True, metavar="FILE")
  parser.add_argument("--fit", action="store_true", help="measure nothing")
  parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, metavar="NAME")
  parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M")
  parser.add_argument(
    "--shapes", nargs="+", type=shape_of, default=MODELS + LLAMA, metavar="NxK", help="of w"
  )
  parser.add_argument("--processes", type=int, default=1, metavar="P", help="as of the bench")
  parser.add_argument("--seconds", type=float, default=0.3, help="of measuring a tile (0.3)")
  parser.add_argument("--seconds-total", type=float, default=float("inf"), metavar="S")
  options = parser.parse_args(arguments)
  times = read(options.json) if options.json.exists() else {}
  if not options.fit:
    processes.share_the_device()
    cases = [
      Case("packed", mode, m, n, k)
      for m in options.rows
      for n, k in options.shapes
      for mode in options.modes
    ]
    settings = Settings(options.seconds, rounds=3, chain=0)
    deadline = begin + options.seconds_total
    missing = [case for case in tile_cases(cases) if case.tile not in times]
    for tile, us in measured_times(missing, settings, options.processes, deadline):
      times[tile] = us
      write(options.json, times)  # every time, so that a run cut short leaves what it has
  print(report(times))
  return times


if __name__ == "__main__":
  main()
