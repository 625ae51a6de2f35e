"""How exact a product is on data of many kinds: `python -m jaxqq.bench.accuracy`.

    error = ||out - exact|| / ||exact||

over all elements of a product of (256, K) by (256, K). `exact` is the float64 product of the
dequantized operands, whose quantization is not counted; for the plain bfloat16 product beside it,
of x and w as they are. Rounding the result to bfloat16 alone makes about 1.65e-3.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxqq
from jaxqq._formats import Mode
from jaxqq.bench.cases import MODES
from jaxqq.bench.kept import make_header

ROWS = 256  # of x and of w
KS = (32, 64, 128, 512, 2048, 4096, 16384)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
PLAIN = "plain"  # the product of x and w that are not quantized
HIGHEST = "HIGHEST"

Rng = np.random.Generator
Shape = tuple[int, ...]


def _with_outliers(rng: Rng, a: np.ndarray) -> np.ndarray:
  """One channel of 64, or of fewer, is 200 times what it was."""
  k = a.shape[-1]
  a[:, rng.choice(k, max(1, k // 64), replace=False)] *= 200
  return a


# Each for x and for w, drawn one after the other.
KINDS: dict[str, Callable[[Rng, Shape], np.ndarray]] = {
  "normal": lambda rng, shape: rng.standard_normal(shape),
  "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
  "one sign": lambda rng, shape: np.abs(rng.standard_normal(shape)),
  "heavy tails": lambda rng, shape: rng.standard_t(2, shape),
  "outlier channels": lambda rng, shape: _with_outliers(rng, rng.standard_normal(shape)),
  "one sign, outlier channels": lambda rng, shape: _with_outliers(
    rng, np.abs(rng.standard_normal(shape))
  ),
}


def operands(kind: str, k: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
  """x and w, (256, k) each, in float16 a quarter, so that it holds all sums."""
  rng = np.random.default_rng(k)
  scale = 0.25 if dtype == "float16" else 1.0
  x, w = (KINDS[kind](rng, (ROWS, k)) * scale for _ in range(2))
  return x.astype(DTYPES[dtype]), w.astype(DTYPES[dtype])


def error_of(out: Any, x: Any, w: Any) -> float:
  """Of a product of matrices that are not quantized any more."""
  x, w = (np.asarray(a).astype(np.float64) for a in (x, w))
  exact = x @ w.T
  return float(np.linalg.norm(np.asarray(out).astype(np.float64) - exact) / np.linalg.norm(exact))


@functools.cache  # so that JAX compiles it once for all kinds of data
def _product(mode: Mode, precision: jax.lax.Precision | None) -> Callable[..., jax.Array]:
  return jax.jit(functools.partial(jaxqq.qqmm, mode=mode, precision=precision))


@jax.jit
def _plain(x: jax.Array, w: jax.Array) -> jax.Array:
  return jnp.matmul(x, w.T)


def measure(kind: str, k: int, mode: Mode, dtype: str) -> dict[str, Any]:
  """The errors of one product, by precision, and of the plain one."""
  x, w = operands(kind, k, dtype)
  hats = [
    jaxqq.dequantize(*jaxqq.quantize(a, mode=mode), mode=mode, dtype=jnp.float32) for a in (x, w)
  ]
  errors = {
    "default": error_of(_product(mode, None)(x, w), *hats),
    HIGHEST: error_of(_product(mode, jax.lax.Precision.HIGHEST)(x, w), *hats),
  }
  if dtype == "bfloat16":
    errors[PLAIN] = error_of(_plain(x, w), x, w)
  path = jaxqq.explain(x, w, mode=mode)
  return {"kind": kind, "k": k, "mode": mode, "dtype": dtype, "errors": errors, "path": path}


def table(rows: Sequence[dict[str, Any]], mode: str, dtype: str) -> list[str]:
  """Markdown: a kind of data a row, K a column; 1e-3, at the default precision / ...."""
  own = [row for row in rows if (row["mode"], row["dtype"]) == (mode, dtype)]
  ks = sorted({row["k"] for row in own})
  names = [name for name in ("default", PLAIN, HIGHEST) if all(name in r["errors"] for r in own)]
  lines = [
    f"{mode}, {dtype}, 1e-3: {' / '.join(names)}",
    "",
    "| data | " + " | ".join(f"K = {k}" for k in ks) + " |",
    "|---" * (1 + len(ks)) + "|",
  ]
  for kind in dict.fromkeys(row["kind"] for row in own):
    cells = []
    for k in ks:
      errors = next(row["errors"] for row in own if (row["kind"], row["k"]) == (kind, k))
      cells.append(" / ".join(f"{1e3 * errors[name]:.3g}" for name in names))
    lines.append(f"| {kind} | " + " | ".join(cells) + " |")
  return [*lines, ""]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  parser = argparse.ArgumentParser(
    prog="python -m jaxqq.bench.accuracy", description="Norm-wise errors by kind of data and K."
  )
  parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
  parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
  parser.add_argument("--k", nargs="+", type=int, default=KS, help="multiples of 32")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="keep the results")
  parser.add_argument("--show", type=pathlib.Path, metavar="FILE", help="only print kept results")
  options = parser.parse_args(arguments)
  if any(k < 32 or k % 32 for k in options.k):
    parser.error(f"--k must be multiples of 32, got {' '.join(map(str, options.k))}")
  if options.show:
    rows = json.loads(options.show.read_text())["rows"]
  else:
    rows = [
      measure(kind, k, mode, dtype)
      for mode in options.modes
      for dtype in options.dtypes
      for kind in KINDS
      for k in options.k
    ]
  if options.json:
    header = make_header("no times: norm-wise errors")
    options.json.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
  for mode, dtype in dict.fromkeys((row["mode"], row["dtype"]) for row in rows):
    print("\n".join(table(rows, mode, dtype)))
  return rows


if __name__ == "__main__":
  main()
