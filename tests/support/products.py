"""Random products, each checked by its bounds: for the tests, and from a command line.

    python -m tests.support.products --seed 123 --draw 4      one product, told in full
    python -m tests.support.products --seed 0 --products 2000 --workers 12 --out found.jsonl

The second starts workers that share one device, and tells what failed, each with a line that makes
it again. Product number i is draw i % DRAWS of seed + i // DRAWS.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import bounds, cases, data, oracle
from tests.support.cases import Arrays, Case, Program

ROOT = Path(__file__).parents[2]
KERNELS = re.compile(r"jaxqq_[a-z_0-9]+?(?=_mosaic_gpu|_\d+\b|\b)")


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program, and which implementation and kernels it became."""

  run: Any  # (*Arrays.args) -> out
  implementation: str
  kernels: tuple[str, ...]


def product_of(program: Program, **params: Any):
  """qqmm, or `quantized_matmul`, as a function of `Arrays.args`."""
  import jax

  import jaxqq

  precision = jax.lax.Precision.HIGHEST if program.highest else None

  def product(x, w, *rest):
    scales, rest = (rest[0], rest[1:]) if program.packed else (None, rest)
    how = dict(zip(names_of_scales(program), rest, strict=True))
    multiply = jaxqq.qqmm if program.quantize_input else jaxqq.quantized_matmul
    return multiply(x, w, scales, mode=program.mode, precision=precision, **how, **params)

  return product


def names_of_scales(program: Program) -> tuple[str, ...]:
  if not program.global_scales:
    return ()
  return ("global_scale_x", "global_scale_w") if program.quantize_input else ("global_scale",)


def compiled(program: Program, args: tuple[Any, ...]) -> Compiled:
  import jax

  lowered = jax.jit(product_of(program)).lower(*args)
  kernels = tuple(sorted(set(KERNELS.findall(lowered.as_text()))))
  return Compiled(lowered.compile(), implementation_of(program, args), kernels)


def implementation_of(program: Program, args: tuple[Any, ...]) -> str:
  """The row of the table that `explain` names."""
  import jax

  import jaxqq

  x, w, *rest = args
  how: dict[str, Any] = {"mode": program.mode}
  if program.packed:
    how["scales"] = rest.pop(0)
  how |= dict(zip(names_of_scales(program), rest, strict=True))
  if program.highest:
    how["precision"] = jax.lax.Precision.HIGHEST
  function = jaxqq.qqmm if program.quantize_input else jaxqq.quantized_matmul
  return jaxqq.explain(function, x, w, **how).plan.name


def rules_for(case: Case, implementation: str, platform: str) -> bounds.Rules:
  """On a CPU, XLA's reference keeps the bound of HIGHEST whatever is asked for."""
  program = case.program
  by_xla, in_bfloat16 = implementation.startswith("xla"), implementation == "xla_bfloat16"
  far = oracle.MODES[program.mode].power_of_two  # bfloat16 is short of bits below 2**-126
  return bounds.Rules(
    highest=program.highest or implementation == "xla",
    fp8=program.may_use_fp8_sums and not by_xla,
    fp8_sums=platform != "cpu",  # the interpreter sums up in float32
    bfloat16=far and (in_bfloat16 or not (by_xla or program.may_use_fp8_sums)),
    flushes=platform == "cpu",
    # Interpreted, products of nvfp4 beside x as it is are flushed at 2**-7 of their value.
    unit=2.0**7 if platform == "cpu" and not (by_xla or program.quantize_input) else 1.0,
    norm_wise=case.x in data.NORM_WISE and case.w in data.NORM_WISE,
    wide=case.x == case.w == "large outliers",
  )


def verdict_on(out: np.ndarray, arrays: Arrays, rules: bounds.Rules) -> bounds.Verdict:
  x: bounds.Operand = bounds.Unquantized(arrays.x)
  if arrays.quantize_input:
    x = bounds.Quantized(arrays.x_codes, arrays.x_scales, arrays.mode)
  w = bounds.Quantized(arrays.w_codes, arrays.w_scales, arrays.mode)
  return bounds.check(out, x, w, arrays.alpha, rules)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  return a.tobytes() == b.tobytes()


def wrong_bits(arrays: Arrays) -> str:
  """Which of `quantize`'s results for x and w are not the oracle's, bit by bit; '' if all are."""
  import jaxqq

  wants = [("x", arrays.x, arrays.x_codes, arrays.x_scales, arrays.global_scale_x)]
  if arrays.w is not None:
    wants.append(("w", arrays.w, arrays.w_codes, arrays.w_scales, arrays.global_scale_w))
  for name, a, codes, scales, global_scale in wants:
    packed, got_scales = jaxqq.quantize(a, mode=arrays.mode, global_scale=global_scale)
    if not np.array_equal(np.asarray(got_scales), scales):
      return f"quantize({name}): {_first_difference(np.asarray(got_scales), scales)} in its scales"
    got_codes = oracle.unpack(np.asarray(packed), arrays.mode)
    if not np.array_equal(got_codes, codes):
      return f"quantize({name}): {_first_difference(got_codes, codes)} in its codes"
  return ""


def _first_difference(got: np.ndarray, want: np.ndarray) -> str:
  i = tuple(int(j) for j in np.argwhere(got != want)[0])
  return f"{got[i]} for {want[i]} at {i}"


def run(
  case: Case, program: Compiled | None = None, *, bits: bool = False, twice: bool = True
) -> dict[str, Any]:
  """One product, or the same one twice. What came of it: `wrong` is empty, or says what is."""
  import jax

  arrays = cases.arrays_of(case)
  program = program or compiled(case.program, arrays.args)
  first = np.asarray(program.run(*arrays.args))
  second = np.asarray(program.run(*arrays.args)) if twice else first
  platform = jax.default_backend()
  rules = rules_for(case, program.implementation, platform)
  verdict = verdict_on(first, arrays, rules)
  wrong = verdict.wrong
  if not wrong and not same_bits(first, second):
    wrong = f"{int((first != second).sum())} elements differ when the product runs again"
  if not wrong and bits:
    wrong = wrong_bits(arrays)
  function = "qqmm" if case.program.quantize_input else "quantized_matmul"
  return told(case, case.program, function, program, verdict, wrong)


def told(
  case: Any,
  program: Program,
  function: str,
  compiled: Compiled,
  verdict: bounds.Verdict,
  wrong: str,
) -> dict[str, Any]:
  """What came of a product."""
  return {
    "case": repr(case),
    "mode": program.mode,
    "packed": program.packed,
    "dtype": program.x_dtype,
    "highest": program.highest,
    "function": function,
    "implementation": compiled.implementation,
    "kernels": compiled.kernels,
    "worst": verdict.worst,
    "plain": verdict.plain,
    "norm": verdict.norm,
    "wrong": wrong,
  }


def run_seed(
  seed: int, draws: range = range(cases.DRAWS), *, small: bool = False, twice: bool = True
) -> Iterator[dict[str, Any]]:
  """The products of one seed's program, compiled once. Every fourth seed's bits are checked too."""
  program = None
  for draw in draws:
    case = cases.case_of(seed, draw, small=small)
    again = f"python -m tests.support.products --seed {seed} --draw {draw}"
    again += " --small" if small else ""
    try:
      program = program or compiled(case.program, cases.arrays_of(case).args)
      result = run(case, program, bits=seed % 4 == 0, twice=twice)
    except Exception as error:  # what a program raises is a failure as well
      result = {"case": repr(case), "wrong": f"{type(error).__name__}: {str(error)[:400]}"}
    yield {"seed": seed, "draw": draw, "again": again, **result}


# The command line


def seeds_of(first: int, products: int) -> list[tuple[int, range]]:
  """Which draws of which seeds make so many products."""
  whole, rest = divmod(products, cases.DRAWS)
  all_draws = [(first + i, range(cases.DRAWS)) for i in range(whole)]
  return all_draws + ([(first + whole, range(rest))] if rest else [])


def runner(args: argparse.Namespace) -> Any:
  """What runs a seed: of plain products, or of ragged ones."""
  if not args.ragged:
    return run_seed
  from tests.support import ragged_products

  return ragged_products.run_seed


def work(args: argparse.Namespace) -> None:
  """A worker's share, written as it comes."""
  until = time.monotonic() + args.seconds
  index, count = args.share
  with args.out.open("a") as file:
    for seed, draws in seeds_of(args.seed, args.products)[index::count]:
      for result in runner(args)(seed, draws, small=args.small):
        file.write(json.dumps(result) + "\n")
        file.flush()
      if time.monotonic() > until:
        return


def start_workers(args: argparse.Namespace) -> None:
  """Each a process with a part of the device's memory, and one thread of its own."""
  threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
  env = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false", **dict.fromkeys(threads, "1"))
  env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.8 / args.workers:.3f}"
  command = [sys.executable, "-m", "tests.support.products", "--out", str(args.out.resolve())]
  command += ["--seed", str(args.seed), "--products", str(args.products)]
  command += ["--seconds", str(args.seconds)]
  command += [f"--{flag}" for flag in ("small", "ragged") if getattr(args, flag)]
  shares = ([*command, "--share", str(i), str(args.workers)] for i in range(args.workers))
  workers = [subprocess.Popen(share, env=env, cwd=ROOT) for share in shares]
  for i, worker in enumerate(workers):
    if code := worker.wait():
      print(f"worker {i} ended with {code}")


def summary(results: list[dict[str, Any]]) -> str:
  """What failed, and the worst of each kind of product."""
  failed = [r for r in results if r["wrong"]]
  lines = [f"FAILED {r['wrong']}\n  {r['case']}\n  {r['again']}" for r in failed]
  kinds = defaultdict(list)
  for r in results:
    if "mode" in r:
      way = "packed" if r["packed"] else "on the fly"
      kind = (r["function"], r["mode"], way, r["dtype"])
      kind += ("highest" if r["highest"] else "default",)
      kinds[(*kind, r["implementation"], "+".join(r["kernels"]))].append(r)
  lines.append("products failed error/bound without-fp8 norm-wise  kind")
  for kind, group in sorted(kinds.items()):
    kept = [r for r in group if not r["wrong"]]
    worst = [max((r[name] for r in kept), default=0) for name in ("worst", "plain", "norm")]
    count, bad = len(group), len(group) - len(kept)
    lines.append(
      f"{count:8} {bad:6} {worst[0]:11.3f} {worst[1]:11.3f} {worst[2]:9.2e}  {' '.join(kind)}"
    )
  lines.append(f"{len(results)} products, {len(failed)} failures")
  return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--seed", type=int, default=0, help="the first")
  p.add_argument("--draw", type=int, help="one draw of this seed, alone")
  p.add_argument("--products", type=int, default=cases.DRAWS)
  p.add_argument("--workers", type=int, default=0, help="processes; 0 is this one")
  p.add_argument("--seconds", type=float, default=1e9, help="after which no program is begun")
  p.add_argument("--out", type=Path, help="where results go, a line of JSON each")
  p.add_argument("--small", action="store_true", help="sizes for a CPU")
  p.add_argument("--ragged", action="store_true", help="products of rows in groups")
  p.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
  return p


def main(argv: list[str] | None = None) -> int:
  args = parser().parse_args(argv)
  if args.share:
    work(args)
    return 0
  started = time.monotonic()
  if args.workers:
    args.out = args.out or Path(f"products-{args.seed}.jsonl")
    args.out.unlink(missing_ok=True)
    start_workers(args)
    results = [json.loads(line) for line in args.out.read_text().splitlines()]
  else:
    seeds = seeds_of(args.seed, args.products)
    if args.draw is not None:
      seeds = [(args.seed, range(args.draw, args.draw + 1))]
    results = []
    for seed, draws in seeds:
      for result in runner(args)(seed, draws, small=args.small):
        if args.draw is not None or len(seeds) == 1:
          print(json.dumps(result, indent=2))
        results.append(result)
    if args.out:
      args.out.write_text("".join(json.dumps(r) + "\n" for r in results))
  print(summary(results))
  print(f"seed {args.seed}, {time.monotonic() - started:.0f} s")
  return int(any(r["wrong"] for r in results))


if __name__ == "__main__":
  sys.exit(main())
