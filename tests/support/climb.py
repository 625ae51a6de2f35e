"""A search that climbs: data changed step by step, kept where error / bound grows.

    python -m tests.support.climb --seed 0 --steps 300
    python -m tests.support.climb --program 3 --seed 7 --steps 300 --objective sums

A product of M by N rows is M * N candidates. Its rows belong to a few islands, each with a best
pair of rows so far; an island's rows are changes of that pair, and the best pair among them is the
next one. `bound` climbs error / bound, which must stay below 1. `sums` climbs what is left of both
without the rounding of the output, so that the sums' own error shows; it must stay there too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable

import numpy as np

from tests.support import bounds, cases, data, oracle, products
from tests.support.cases import Case, Program

ISLANDS = 8
CLOSER = 24  # pairs of an island, those of the largest error, whose fp8 term is computed

PROGRAMS = (
  Program("mxfp8", 128, 128, 512),
  Program("mxfp8", 128, 128, 512, packed=True),
  Program("mxfp8", 128, 128, 4096, "float16", packed=True),
  Program("mxfp8", 128, 128, 4096, "float16"),
  Program("mxfp8", 16, 128, 2048, packed=True),
  Program("mxfp8", 64, 64, 4096, "float16", packed=True),
  Program("mxfp8", 16, 128, 1024),
  Program("mxfp8", 128, 128, 128, "float16", packed=True),
  Program("mxfp8", 128, 128, 1024, packed=True, highest=True),
  Program("mxfp8", 128, 128, 1024, "float32", "float32"),
  Program("nvfp4", 128, 128, 1024, packed=True),
  Program("nvfp4", 128, 128, 1024, "float16"),
  Program("nvfp4", 8, 128, 2048, packed=True),
  Program("nvfp4", 32, 128, 2048, "float32", packed=True),
  Program("nvfp4", 128, 128, 512, "float32", packed=True),
)
STARTS = ("normal", "positive", "heavy tails", "outliers", "groups within reach", "cancelling")

# Changes of a pair of rows, in place: (rng, one row, the other)

Change = Callable[[np.random.Generator, np.ndarray, np.ndarray], None]


def _part(rng: np.random.Generator, k: int) -> slice:
  """Some elements, a group, an instruction's worth, a step's, or all."""
  size = min(k, int(rng.choice([1, 2, 4, 8, 16, 32, 32, 64, 128, k])))
  start = size * int(rng.integers(k // size))
  return slice(start, start + size)


def scale(rng, a, b):
  a[_part(rng, a.size)] *= 2.0 ** rng.integers(-8, 9)


def nudge(rng, a, b):
  """Codes may change, and where a sum is between two numbers of the output."""
  a[_part(rng, a.size)] *= 1 + rng.uniform(-0.1, 0.1)


def flip(rng, a, b):
  a[_part(rng, a.size)] *= -1


def align(rng, a, b):
  """All products of one sign there."""
  part = _part(rng, a.size)
  a[part] = np.abs(a[part]) * np.where(b[part] < 0, -1, 1) * rng.choice([-1, 1])


def copy(rng, a, b):
  part = _part(rng, a.size)
  size = part.stop - part.start
  start = int(rng.integers(a.size - size + 1))
  a[part] = (a if rng.random() < 0.5 else b)[start : start + size].copy()


def shuffle(rng, a, b):
  part = _part(rng, a.size)
  order = rng.permutation(part.stop - part.start)
  a[part], b[part] = a[part][order], b[part][order]


def sort(rng, a, b):
  """The largest products of a part come first, or last."""
  part = _part(rng, a.size)
  order = np.argsort(np.abs(a[part] * b[part]))[:: rng.choice([-1, 1])]
  a[part], b[part] = a[part][order], b[part][order]


def level(rng, a, b):
  part = _part(rng, a.size)
  a[part] = np.abs(a[part]).max() * np.sign(a[part])


def blank(rng, a, b):
  a[_part(rng, a.size)] = 0


def spike(rng, a, b):
  a[int(rng.integers(a.size))] = (
    rng.standard_normal() * np.abs(a).max() * 2.0 ** rng.integers(-3, 4)
  )


def move(rng, a, b):
  """Magnitude from one to the other."""
  part, power = _part(rng, a.size), 2.0 ** rng.integers(-8, 9)
  a[part] *= power
  b[part] /= power


def cancel(rng, a, b):
  """The second half of a part takes the first's products back."""
  part = _part(rng, a.size)
  half = (part.stop - part.start) // 2
  first = slice(part.start, part.start + half)
  second = slice(part.start + half, part.start + 2 * half)
  a[second], b[second] = -a[first], b[first]


CHANGES: tuple[Change, ...] = (
  *(scale, nudge, nudge, flip, align, copy, shuffle, sort, level, blank, spike, move, cancel),
)


@dataclasses.dataclass
class Island:
  x: np.ndarray
  w: np.ndarray
  best: float = 0.0


class Climb:
  """Of one program."""

  def __init__(self, program: Program, seed: int, objective: str):
    self.program, self.objective = program, objective
    self.rng = np.random.default_rng([seed, program.m, program.n, program.k])
    self.islands = [
      Island(*(data.KINDS[kind](self.rng, (program.k,)) for _ in range(2)))
      for kind in (STARTS * ISLANDS)[:ISLANDS]
    ]
    self.compiled: products.Compiled | None = None
    self.best, self.arrays = 0.0, None

  def changed(self, island: Island, count: int, which: int) -> np.ndarray:
    """Rows of x (0) or w (1) of an island: the best itself, then changes of it."""
    rows = [(island.x, island.w)[which]]
    for _ in range(count - 1):
      pair = [island.x.copy(), island.w.copy()]
      for _ in range(int(self.rng.integers(1, 4))):
        change = CHANGES[self.rng.integers(len(CHANGES))]
        change(self.rng, pair[which], pair[1 - which])
      rows.append(pair[which])
    return np.stack(rows)

  def typed(self, a: np.ndarray, dtype: str) -> np.ndarray:
    largest = 60000.0 if dtype == "float16" else 2.0**60
    return np.clip(a, -largest, largest).astype(np.float32).astype(oracle.DTYPES[dtype])

  def step(self) -> None:
    p = self.program
    own_m, own_n = p.m // ISLANDS, p.n // ISLANDS
    x = np.concatenate([self.changed(island, own_m, 0) for island in self.islands])
    w = np.concatenate([self.changed(island, own_n, 1) for island in self.islands])
    x, w = self.typed(x, p.x_dtype), self.typed(w, p.w_dtype)
    arrays = cases.Arrays(
      x,
      w,
      *oracle.quantize_codes(x, p.mode),
      *oracle.quantize_codes(w, p.mode),
      None,
      None,
      p.mode,
      p.packed,
    )
    self.compiled = self.compiled or products.compiled(p, arrays.args)
    out = np.asarray(self.compiled.run(*arrays.args))
    ratios = self.ratios(out, arrays)
    for i, island in enumerate(self.islands):
      own = ratios[i * own_m : (i + 1) * own_m, i * own_n : (i + 1) * own_n]
      row, column = np.unravel_index(np.argmax(own), own.shape)
      if own[row, column] >= island.best:
        island.best = float(own[row, column])
        island.x = x[i * own_m + row].astype(np.float64)
        island.w = w[i * own_n + column].astype(np.float64)
      if own[row, column] > self.best:
        self.best = float(own[row, column])

  def ratios(self, out: np.ndarray, arrays: cases.Arrays) -> np.ndarray:
    """Of each pair of an island's rows, those without a chance at 0."""
    import jax

    p = self.program
    x = bounds.Quantized(arrays.x_codes, arrays.x_scales, p.mode)
    w = bounds.Quantized(arrays.w_codes, arrays.w_scales, p.mode)
    rules = products.rules_for(Case(p), self.compiled.implementation, jax.default_backend())
    c = bounds.compare(out, x, w, 1.0, rules)
    if c.misplaced.any():
      raise AssertionError("a NaN where no operand has one")
    error, bound = c.error, c.bound
    if self.objective == "sums":
      error, bound = np.maximum(error - c.rounding, 0), bound - c.rounding
    ratio = error / bound
    island = np.arange(ISLANDS)
    own = island.repeat(p.m // ISLANDS)[:, None] == island.repeat(p.n // ISLANDS)
    ratio = np.where(own, ratio, 0)
    if not rules.fp8:
      return ratio
    best = np.argpartition(-ratio, ISLANDS * CLOSER, axis=None)[: ISLANDS * CLOSER]
    at = np.stack(np.unravel_index(best, ratio.shape), axis=-1)
    # The best pairs so far are among them whatever their error is.
    corners = island[:, None] * (p.m // ISLANDS, p.n // ISLANDS)
    at = np.concatenate([at, corners])
    index = tuple(at.T)
    terms = bounds.fp8_terms(x, w, at, out.dtype, rules.fp8_sums)
    found = np.zeros_like(ratio)
    found[index] = error[index] / (bound[index] + terms)
    return found

  def run(self, steps: int) -> float:
    for _ in range(steps):
      self.step()
    return self.best


def parser() -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--steps", type=int, default=300)
  p.add_argument("--program", type=int, help="one of the programs, alone")
  p.add_argument("--objective", choices=("bound", "sums"), default="bound")
  return p


def main(argv: list[str] | None = None) -> int:
  args = parser().parse_args(argv)
  chosen = range(len(PROGRAMS)) if args.program is None else [args.program]
  worst = 0.0
  for i in chosen:
    started = time.monotonic()
    climb = Climb(PROGRAMS[i], args.seed, args.objective)
    best = climb.run(args.steps)
    worst = max(worst, best)
    print(
      f"{best:.4f}{' FAILED' if best > 1 else ''}  {PROGRAMS[i]!r} "
      f"{climb.compiled.implementation}  {time.monotonic() - started:.0f} s\n"
      f"  python -m tests.support.climb --program {i} --seed {args.seed} --steps {args.steps} "
      f"--objective {args.objective}",
      flush=True,
    )
  print(f"worst {worst:.4f}")
  return int(worst > 1)


if __name__ == "__main__":
  sys.exit(main())
