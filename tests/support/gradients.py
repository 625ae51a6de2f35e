"""Gradients of random products: dx and dw against float64, both backwards.

    straight_through    dx = g w             dw = g^T x
    quantized           dx = qqmm(g, w^T)    dw = qqmm(g^T, x^T)

of unquantized operands, or of each quantized anew along the axis that is summed over, with zeros up
to whole groups. Where an operand has no batch axis, the sum is over that axis as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import numpy as np

from tests.support import bounds, cases, data, oracle
from tests.support.cases import BATCHES, DTYPES, Case, Program

BACKWARDS = ("straight_through", "quantized")
KINDS = ("normal", "uniform", "positive", "heavy tails", "outliers", "rows apart", "sparse", "half")


@dataclasses.dataclass(frozen=True)
class Gradient:
  """A product and the cotangent that is pulled back through it."""

  case: Case
  backward: str
  g: str  # kind of data


def gradient_of(seed: int) -> Gradient:
  """Everything is drawn from one seed: sizes too small to be slow."""
  rng = np.random.default_rng([seed, 4])
  mode = str(rng.choice(oracle.PRODUCT_MODES))
  group = oracle.MODES[mode].group
  m, n = (int(rng.integers(1, 161)) for _ in range(2))
  k = group * int(rng.integers(1, 300 // group))
  x_dtype, w_dtype = (str(rng.choice(DTYPES)) for _ in range(2))
  two = [batches for batches in BATCHES if max(map(len, batches)) == 1 and batches[1] != (1,)]
  x_batch, w_batch = two[rng.integers(len(two))] if rng.random() < 0.4 else ((), ())
  program = Program(
    mode,
    m,
    n,
    k,
    x_dtype,
    w_dtype,
    packed=bool(rng.random() < 0.4),
    global_scales=bool(mode == "nvfp4" and rng.random() < 0.5),
    x_batch=tuple(x_batch),
    w_batch=tuple(w_batch),
  )
  x, w, g = (str(rng.choice(KINDS)) for _ in range(3))
  backward = str(rng.choice(BACKWARDS))
  if backward == BACKWARDS[0]:  # drawn apart, so that what was drawn before stays
    rng = np.random.default_rng([seed, 7])
    program = dataclasses.replace(program, quantize_input=bool(rng.random() < 0.6))
    if mode == "mxfp8" and rng.random() < 0.4:
      program = dataclasses.replace(program, mode="mxfp4")
  return Gradient(Case(program, x, w, seed=(seed, 5)), backward, "normal" if m % 2 else g)


def cotangent(gradient: Gradient) -> np.ndarray:
  p = gradient.case.program
  rng = np.random.default_rng([*gradient.case.seed, 1])
  return data.array(rng, gradient.g, (*p.batch, p.m, p.n), 0, oracle.DTYPES[p.x_dtype])


def pulled(
  gradients: list[Gradient], operands: list[tuple[tuple[Any, ...], np.ndarray]]
) -> list[dict[str, np.ndarray]]:
  """What jaxqq has, of (arguments, g) each: dx, and dw of an unquantized w. By one program."""
  import jax

  from tests.support.products import product_of

  def pull(gradient, args, g):
    p = gradient.case.program
    wrt = 1 if p.packed else 2

    def f(*some):
      how = {"backward": gradient.backward} if p.quantize_input else {}
      return product_of(p, **how)(*some, *args[wrt:])

    return jax.vjp(f, *args[:wrt])[1](g)

  @jax.jit
  def pull_all(operands):
    return [pull(each, *own) for each, own in zip(gradients, operands, strict=True)]

  return [
    {f"d{name}": np.asarray(a) for name, a in zip("xw", of_one, strict=False)}
    for of_one in pull_all(operands)
  ]


# What is right


def summed_first(a: np.ndarray, axis: int, with_batch: bool) -> np.ndarray:
  """`a` with what is summed over last: `axis`, and the batch axis before it if `with_batch`."""
  a = np.moveaxis(a, axis, -1)
  if not with_batch:
    return a
  b, rows, k = a.shape
  return a.transpose(1, 0, 2).reshape(rows, b * k)


def operand(
  a: np.ndarray, gradient: Gradient, global_scale: np.float32 | None
) -> bounds.Quantized | bounds.Unquantized:
  """What is multiplied of a matrix whose last axis is summed over."""
  if gradient.backward == "straight_through":
    return bounds.Unquantized(a)
  mode = gradient.case.program.mode
  missing = -a.shape[-1] % oracle.MODES[mode].group
  a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
  return bounds.Quantized(*oracle.quantize_codes(a, mode, global_scale), mode)


def dequantized(arrays: cases.Arrays) -> np.ndarray:
  """Quantized w in float32, rounded as section 2 of the specification has its products."""
  m = oracle.MODES[arrays.mode]
  scales = arrays.w_scales.view(m.scale).astype(np.float32)
  if arrays.global_scale_w is not None:
    scales = scales * (arrays.global_scale_w / np.float32(2688))
  return arrays.w_codes.view(m.element).astype(np.float32) * scales.repeat(m.group, axis=-1)


def run(gradients: list[Gradient]) -> list[str]:
  """What is wrong with each gradient, or ''."""
  arrays = [cases.arrays_of(gradient.case) for gradient in gradients]
  cotangents = [cotangent(gradient) for gradient in gradients]
  args = [own.args for own in arrays]
  got = pulled(gradients, list(zip(args, cotangents, strict=True)))
  return list(map(wrong_with, gradients, arrays, cotangents, got))


def wrong_with(
  gradient: Gradient, arrays: cases.Arrays, g: np.ndarray, got: dict[str, np.ndarray]
) -> str:
  """What is wrong with a gradient, or ''."""
  import jax

  p = gradient.case.program
  w = dequantized(arrays) if p.packed or not p.quantize_input else arrays.w
  g_scale = np.float32(np.max(np.abs(g.astype(np.float32)))) if p.global_scales else None
  quantized = gradient.backward == "quantized"
  on_cpu = jax.default_backend() == "cpu"
  # dx sums over n, dw over m.
  sides = {
    "dx": ((g, -1), (w, -2), not p.x_batch and bool(p.w_batch), arrays.global_scale_w),
    "dw": ((g, -2), (arrays.x, -2), not p.w_batch and bool(p.x_batch), arrays.global_scale_x),
  }
  for name, out in got.items():
    (a, a_axis), (b, b_axis), with_batch, scale = sides[name]
    a, b = summed_first(a, a_axis, with_batch), summed_first(b, b_axis, with_batch)
    alpha = float(g_scale) / 2688 * float(scale) / 2688 if quantized and p.global_scales else 1.0
    rules = bounds.Rules(
      highest=on_cpu or not quantized,
      fp8=quantized and p.mode == "mxfp8" and out.dtype != np.float32 and not on_cpu,
      flushes=on_cpu,
    )
    verdict = bounds.check(
      out, operand(a, gradient, g_scale), operand(b, gradient, scale), alpha, rules
    )
    if verdict.wrong:
      return f"{name}: {verdict.wrong}"
  return ""


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--count", type=int, default=1)
  args = p.parse_args(argv)
  failures = 0
  for seed in range(args.seed, args.seed + args.count):
    [wrong] = run([gradient_of(seed)])
    if wrong:
      failures += 1
      print(f"FAILED {wrong}\n  {gradient_of(seed)}\n  {again(seed)}", flush=True)
  print(f"{args.count} gradients, {failures} failures")
  return int(failures > 0)


def again(seed: int) -> str:
  return f"python -m tests.support.gradients --seed {seed}"


if __name__ == "__main__":
  sys.exit(main())
