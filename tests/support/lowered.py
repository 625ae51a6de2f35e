"""Hashes of the programs lowered for CUDA, of a table of products: what a refactoring must keep.

    python -m tests.support.lowered --json before.json
    python -m tests.support.lowered --against before.json

A hash is of StableHLO and of every Mosaic GPU kernel in it, without locations and without names:
of functions, and of kernels. A Hopper GPU is assumed, with 132 SMs, whatever is at hand.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import core as mosaic

import jaxqq

HIGHEST = jax.lax.Precision.HIGHEST
BITS, GROUP = {"nvfp4": 4, "mxfp8": 8, "mxfp4": 4}, {"nvfp4": 16, "mxfp8": 32, "mxfp4": 32}
Case = tuple[Callable[..., Any], tuple[Any, ...]]


def spec(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def packed(*shape: int, mode: str) -> tuple[Any, Any]:
  *rows, k = shape
  words = spec(*rows, k * BITS[mode] // 32, dtype=jnp.uint32)
  return words, spec(*rows, k // GROUP[mode], dtype=jnp.uint8)


def product(
  mode: str,
  m: int,
  n: int,
  k: int,
  *,
  is_packed: bool = True,
  dtype: Any = jnp.bfloat16,
  w_dtype: Any = jnp.bfloat16,
  scaled: bool = False,
  precision: Any = None,
  x_batch: tuple[int, ...] = (),
  w_batch: tuple[int, ...] = (),
) -> Case:
  w = packed(*w_batch, n, k, mode=mode) if is_packed else (spec(*w_batch, n, k, dtype=w_dtype),)
  one = spec(dtype=jnp.float32)
  names = ("global_scale_x", "global_scale_w")

  def f(x: Any, w: Any, scales: Any) -> Any:
    by_name = dict(zip(names, scales, strict=False))
    return jaxqq.qqmm(x, *w, mode=mode, precision=precision, **by_name)

  return f, (spec(*x_batch, m, k, dtype=dtype), w, (one, one) if scaled else ())


def gradient(mode: str, m: int, n: int, k: int, backward: str, *, is_packed: bool = False) -> Case:
  _, (x, w, _) = product(mode, m, n, k, is_packed=is_packed)

  def loss(x: Any, *w: Any) -> Any:
    out = jaxqq.qqmm(x, *w, mode=mode, backward=backward)
    return out.astype(jnp.float32).sum()

  return jax.grad(loss, argnums=0 if is_packed else (0, 1)), (x, *w)


def by_recipe(name: str, m: int, n: int, k: int) -> Case:
  """All three products of a recipe."""

  def loss(x: Any, w: Any, key: Any) -> Any:
    return jaxqq.qqmm(x, w, recipe=name, key=key).astype(jnp.float32).sum()

  return jax.grad(loss, argnums=(0, 1)), (spec(m, k), spec(n, k), spec(2, dtype=jnp.uint32))


def quantizer(quantizer: jaxqq.Quantizer, rows: int, k: int, axis: int) -> Case:
  def quantize(a: Any, key: Any, amax: Any) -> Any:
    return quantizer.quantize(a, key if quantizer.needs_key else None, amax=amax, axis=axis)

  shape = (rows, k) if axis == -1 else (k, rows)
  return quantize, (spec(*shape), spec(2, dtype=jnp.uint32), spec(dtype=jnp.float32))


def conversions(mode: str, rows: int, k: int, dtype: Any) -> Iterator[tuple[str, Case]]:
  tag, w = f"{mode} {rows} {k} {np.dtype(dtype).name}", spec(rows, k, dtype=dtype)
  yield f"quantize {tag}", (lambda w: jaxqq.quantize(w, mode=mode), (w,))
  columns = spec(k, rows, dtype=dtype)
  yield f"quantize columns {tag}", (lambda w: jaxqq.quantize(w, mode=mode, axis=-2), (columns,))
  codes = packed(rows, k, mode=mode)
  yield f"dequantize {tag}", (lambda *a: jaxqq.dequantize(*a, mode=mode, dtype=dtype), codes)
  if mode == "nvfp4":
    one = spec(dtype=jnp.float32)
    scaled = lambda w, g: jaxqq.quantize(w, global_scale=g)  # noqa: E731
    yield f"quantize scaled {tag}", (scaled, (w, one))
    back = lambda *a: jaxqq.dequantize(*a[:2], global_scale=a[2], dtype=dtype)  # noqa: E731
    yield f"dequantize scaled {tag}", (back, (*codes, one))


def table() -> Iterator[tuple[str, Case]]:
  """Names and cases: every kernel, each of its ways, and sizes of models."""
  for mode, is_packed in itertools.product(("nvfp4", "mxfp8"), (True, False)):
    sizes = [(m, 1024, 1024) for m in (1, 2, 5, 8, 16, 33, 64)]
    sizes += [(m, 8192, 8192) for m in (1, 16, 64, 96, 128, 256, 1024, 4096)]
    sizes += [(1, 128, 4096), (100, 136, 160), (1, 2880, 2880), (300, 2880, 2880), (513, 136, 32)]
    for m, n, k in sizes:
      yield (
        f"{mode} {'packed' if is_packed else 'fly'} {m} {n} {k}",
        product(mode, m, n, k, is_packed=is_packed),
      )
    for m, n, k in ((1, 1024, 1024), (64, 136, 512), (300, 136, 320)):
      way = f"{mode} {'packed' if is_packed else 'fly'} {m} {n} {k}"
      p = {"is_packed": is_packed}
      for dtype, precision in (
        (jnp.float32, None),
        (jnp.float16, None),
        (jnp.float16, HIGHEST),
        (jnp.bfloat16, HIGHEST),
      ):
        name = f"{way} {np.dtype(dtype).name} {'highest' if precision else 'default'}"
        yield name, product(mode, m, n, k, dtype=dtype, precision=precision, **p)
      if mode == "nvfp4":
        yield f"{way} scaled", product(mode, m, n, k, scaled=True, **p)
      if not is_packed:
        yield f"{way} w float32", product(mode, m, n, k, w_dtype=jnp.float32, **p)
      yield f"{way} x batch", product(mode, m, n, k, x_batch=(2, 3), **p)
      yield f"{way} batches", product(mode, m, n, k, x_batch=(3,), w_batch=(3,), **p)
  for mode, m, n, k in (("nvfp4", 192, 5120, 25600), ("mxfp8", 128, 5376, 21504)):
    yield f"{mode} stream-K {m} {n} {k}", product(mode, m, n, k)
  yield "mxfp8 staged exact", product("mxfp8", 3200, 256, 1024, dtype=jnp.float32)
  for mode, backward in itertools.product(("nvfp4", "mxfp8"), ("straight_through", "quantized")):
    for m, n, k in ((256, 384, 512), (32, 64, 2880)):
      tag = f"{mode} {backward} {m} {n} {k}"
      yield f"gradients {tag}", gradient(mode, m, n, k, backward)
      yield f"gradient packed {tag}", gradient(mode, m, n, k, backward, is_packed=True)
  for mode, (rows, k), dtype in itertools.product(
    ("nvfp4", "mxfp8", "mxfp4"), ((33, 96), (4096, 4096)), (jnp.bfloat16, jnp.float32)
  ):
    yield from conversions(mode, rows, k, dtype)
  for name, (m, n, k) in itertools.product(
    ("nvfp4", "nvfp4-4over6"), ((256, 384, 512), (33, 72, 96))
  ):
    yield f"recipe {name} {m} {n} {k}", by_recipe(name, m, n, k)
  for own, (rows, k), axis in itertools.product(
    (
      jaxqq.Quantizer(rounding="stochastic", rotation=16),
      jaxqq.Quantizer(square=True, scale="four_over_six"),
    ),
    ((33, 96), (4096, 4096)),
    (-1, -2),
  ):
    yield f"{own} {rows} {k} axis {axis}", quantizer(own, rows, k, axis)


NAMES = r"jaxqq_\w+|\w+_mosaic_gpu(?:_\w+)?|@\w+|jit_\w+|(?<=dump_basename = )\"[^\"]*\""


def fingerprint(case: Case) -> str:
  f, args = case
  kernels: list[str] = []
  serde = mosaic._run_serde_pass

  def seen(module: Any, *args: Any, **kwargs: Any) -> Any:
    kernels.append(str(module))
    return serde(module, *args, **kwargs)

  jax.clear_caches()
  with mock.patch.object(mosaic, "_run_serde_pass", seen):
    lowered = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))
  text = re.sub(r'(module|kernel_hash) = "(?:[^"\\]|\\.)*"', "", lowered.as_text())
  assert kernels or "mosaic" not in text
  whole = "\n".join(anonymous(part) for part in (text, *kernels))
  return f"{hashlib.sha256(whole.encode()).hexdigest()[:16]} {len(kernels)}"


def anonymous(text: str) -> str:
  """With names numbered, in the order in which they come."""
  names = iter(range(1 << 20))
  known: dict[str, str] = {}
  return re.sub(NAMES, lambda m: known.setdefault(m[0], f"name{next(names)}"), text)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--json", type=Path)
  parser.add_argument("--against", type=Path)
  parser.add_argument("--only", default="", help="cases whose name has this")
  parser.add_argument("--share", type=int, nargs=2, default=(0, 1))
  args = parser.parse_args()
  index, count = args.share
  cases = [c for c in table() if args.only in c[0]][index::count]
  found = {}
  for name, case in cases:
    found[name] = fingerprint(case)
    print(found[name], name, flush=True)
  if args.json:
    args.json.write_text(json.dumps(found, indent=1) + "\n")
  if args.against:
    before = json.loads(args.against.read_text())
    changed = [name for name in found if before.get(name) != found[name]]
    print(f"{len(found)} programs, {len(changed)} changed", *changed, sep="\n  ")
    return int(bool(changed))
  return 0


if __name__ == "__main__":
  sys.exit(main())
