"""Runs a plan: quantizers, the product's kernel, in order, on the operands of one product."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxqq._kernels.hopper import dequant_gemm, gemm, skinny_gemm, staged_gemm
from jaxqq._kernels.hopper.dequant_gemm import PackedOperand
from jaxqq._kernels.hopper.epilogue import alpha_operand
from jaxqq._kernels.hopper.mainloops import blockdiag, in_order
from jaxqq._kernels.hopper.mainloops.packed_e2m1 import PackedE2M1
from jaxqq._kernels.hopper.mainloops.packed_e4m3 import RebasedE4M3
from jaxqq._kernels.hopper.pipeline import pad_rows
from jaxqq._kernels.hopper.plan import SkinnyPlan, WidePlan, operand_dtype, packed_operand
from jaxqq._kernels.hopper.quantize import columns
from jaxqq._kernels.hopper.quantize.blockdiag import blockdiag_operand
from jaxqq._kernels.hopper.quantize.code_words import code_words
from jaxqq._kernels.hopper.quantize.exact import exact_operand
from jaxqq._kernels.hopper.quantize.group_rescale import rebased_operands_of_packed
from jaxqq._kernels.hopper.quantize.groups import TuningConfig
from jaxqq._kernels.hopper.quantize.rebased import rebased_operand
from jaxqq._kernels.problem import fold, pad_k
from jaxqq._quantize import alpha_factors
from jaxqq._reference import Operands

# More than 64 rows


def wide(plan: WidePlan, operands: Operands) -> jax.Array:
  """out (..., m, n)."""
  fmt = plan.problem.fmt
  dtype = jnp.dtype(jnp.float8_e4m3fn) if plan.fp8 else operand_dtype(plan.problem)
  folded = pad_k(fold(operands), gemm.step_k(dtype), fmt)
  ready = (_rebased if plan.fp8 else _exact)(plan, folded)
  out = _KERNELS[plan.kernel](plan, ready)
  return out.reshape(*operands.batch_shape, operands.m, operands.n)


def _exact(plan: WidePlan, operands: Operands) -> dequant_gemm.Operands:
  """16 bit floats that hold code * scale, or x as it is; packed w as it came."""
  problem, fmt, mainloop = plan.problem, plan.problem.fmt, MAINLOOPS.get(plan.mainloop)
  interleave = mainloop is not None and mainloop.interleaved

  def operand(name: str, global_scale: jax.Array | None) -> jax.Array:
    a = getattr(operands, name)
    is_transposed = name in operands.transposed
    quantizer = columns.exact_operand_of_transpose if is_transposed else exact_operand
    matrix = a.reshape(-1, a.shape[-1])
    out = quantizer(
      matrix, fmt, _scalar(global_scale), dtype=operand_dtype(problem), interleave=interleave
    )
    return out.reshape(a.shape[0], -1, operands.k)

  if problem.quantize_input:
    x = operand("x", operands.global_scale_x)
  else:
    x = operands.untransposed(["x"]).x
  unit_exponent = 0 if mainloop is None else mainloop.unit_exponent
  if problem.has_global_scales:
    global_scales = _scalar(operands.global_scale_x), _scalar(operands.global_scale_w)
    alpha = alpha_operand(*alpha_factors(*global_scales, fmt, unit_exponent))
  else:
    alpha = alpha_operand(2.0**unit_exponent)
  w = operands.w if problem.is_packed else operand("w", operands.global_scale_w)
  return dequant_gemm.Operands(x, w, operands.scales, alpha)


def _rebased(plan: WidePlan, operands: Operands) -> dequant_gemm.Operands:
  """e4m3 codes, a row's on one power of two; packed w as it came, and how to rebase it."""
  fmt, alpha = plan.problem.fmt, alpha_operand()
  if plan.problem.is_packed:
    scales = operands.scales.reshape(-1, operands.scales.shape[-1])
    matrix = operands.x.reshape(-1, operands.k)
    x, x_scales, rescale, w_scales = rebased_operands_of_packed(matrix, scales, fmt)
    x, x_scales = x.reshape(operands.x.shape), x_scales.reshape(operands.x.shape[:-1])
    rescale = rescale.reshape(operands.scales.shape)
    w_scales = w_scales.reshape(operands.scales.shape[:-1])
    return dequant_gemm.Operands(x, operands.w, rescale, alpha, x_scales, w_scales)

  def operand(name: str) -> tuple[jax.Array, jax.Array]:
    a = getattr(operands, name)
    is_transposed = name in operands.transposed
    quantizer = columns.rebased_operand_of_transpose if is_transposed else rebased_operand
    out = quantizer(a.reshape(-1, a.shape[-1]), fmt)
    codes = out.codes.reshape(a.shape[0], -1, operands.k)
    return codes, out.row_scales.reshape(a.shape[0], -1)

  x, x_scales = operand("x")
  w, w_scales = operand("w")
  return dequant_gemm.Operands(x, w, None, alpha, x_scales, w_scales)


MAINLOOPS: dict[str, type[PackedOperand]] = {
  "packed_e2m1": PackedE2M1,
  "rebased_e4m3": RebasedE4M3,
  **in_order.OPERANDS,
}


def _run_gemm(plan: WidePlan, ready: dequant_gemm.Operands) -> jax.Array:
  operands = gemm.Operands(ready.x, ready.w, ready.alpha, ready.x_scales, ready.w_scales)
  return gemm.gemm(operands, plan.problem.out_dtype, plan.tiles, plan.grid)


def _run_dequant_gemm(plan: WidePlan, ready: dequant_gemm.Operands) -> jax.Array:
  mainloop, out_dtype = MAINLOOPS[plan.mainloop], plan.problem.out_dtype
  return dequant_gemm.dequant_gemm(ready, mainloop, out_dtype, plan.tiles, plan.grid)


def _run_staged_gemm(plan: WidePlan, ready: dequant_gemm.Operands) -> jax.Array:
  problem = plan.problem
  return staged_gemm.staged_gemm(ready, problem.fmt, problem.out_dtype, plan.tiles, plan.grid)


_KERNELS = {
  "gemm": _run_gemm,
  "dequant_gemm": _run_dequant_gemm,
  "staged_gemm": _run_staged_gemm,
}


# Up to 64 rows


def skinny(plan: SkinnyPlan, operands: Operands) -> jax.Array:
  """out (..., m, n)."""
  folded, fmt = _pad_skinny(plan, fold(operands)), plan.problem.fmt
  m = folded.x.shape[1]
  # Passed raw: any arithmetic here would cost a kernel of XLA's.
  of_x, of_w = (
    None if scale is None else scale.reshape(1)
    for scale in (folded.global_scale_x, folded.global_scale_w)
  )
  unit = math.prod(1 / fmt.largest_value for scale in (of_x, of_w) if scale is not None)
  unit *= blockdiag.UNIT if plan.mainloop == "blockdiag" else 1.0
  if plan.mainloop in ("expanded", "in_order"):
    unit *= 2.0 ** MAINLOOPS[packed_operand(plan.problem)].unit_exponent
  x, x_scales = folded.x, None
  if not plan.quantizes_x:
    x, x_scales = _skinny_x(plan, folded)
  ready = skinny_gemm.Operands(x, folded.w, folded.scales, of_x, of_w, x_scales)
  out = skinny_gemm.skinny_gemm(ready, m, plan, unit, plan.problem.out_dtype)
  return out.reshape(*operands.batch_shape, operands.m, operands.n)


def _pad_skinny(plan: SkinnyPlan, folded: Operands) -> Operands:
  """Zeros along K, as far as the plan says."""

  def padded(name: str, elements: int) -> Any:
    """`elements` of k are one of the array's."""
    a = getattr(folded, name)
    if a is None or plan.padded_k(name) == plan.problem.k:
      return a
    return jnp.pad(a, ((0, 0), (0, 0), (0, plan.padded_k(name) // elements - a.shape[-1])))

  codes, group = 32 // plan.block.bits if plan.problem.is_packed else 1, plan.block.group_size
  return dataclasses.replace(
    folded, x=padded("x", 1), w=padded("w", codes), scales=padded("scales", group or 1)
  )


def _skinny_x(plan: SkinnyPlan, folded: Operands) -> tuple[jax.Array, jax.Array | None]:
  """x as the kernel takes it, quantized by one of its own, and its scales."""
  fmt, block, padded_m = plan.problem.fmt, plan.block, plan.padded_m
  batch, _, k = folded.x.shape
  global_scale = _scalar(folded.global_scale_x)
  if plan.blockdiag is not None:
    x, x_scales = blockdiag_operand(folded.x[0], fmt, global_scale, plan.blockdiag)
    return x[None], x_scales.reshape(1, k // block.k, block.k // 256, -1)  # at most 256 in a row
  if not plan.problem.quantize_input:
    return pad_rows(folded.x, padded_m), None
  # The rows of one matrix need no zeros behind them, those of several do.
  x = folded.x if batch == 1 else pad_rows(folded.x, padded_m)
  x, rows = x.reshape(-1, k), batch * padded_m
  if plan.mainloop == "group_sums":
    x, x_scales = code_words(x, fmt, rows)
    x_scales = jnp.swapaxes(x_scales.reshape(-1, batch, padded_m), 0, 1)
    return x.reshape(batch, padded_m, -1), x_scales.reshape(batch, k // block.k, -1, padded_m)
  out = exact_operand(
    x,
    fmt,
    global_scale,
    dtype=operand_dtype(plan.problem),
    interleave=plan.mainloop != "in_order",
    rows=rows,
    config=TuningConfig(tiles_per_step=1),
  )
  return out.reshape(batch, padded_m, -1), None


def _scalar(global_scale: jax.Array | None) -> jax.Array | None:
  return None if global_scale is None else global_scale.reshape(())
