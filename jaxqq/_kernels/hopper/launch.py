"""Runs a plan: quantizers, the product's kernel, in order, on the operands of one product."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxqq import _ragged_reference
from jaxqq._formats import Format
from jaxqq._kernels.hopper import (
  dequant_gemm,
  gemm,
  grouped,
  row_sums,
  skinny_gemm,
  staged_gemm,
)
from jaxqq._kernels.hopper.mainloops.table import (
  PART_K,
  operand_dtype,
  packed_operands,
  skinny_mainloops,
)
from jaxqq._kernels.hopper.pipeline import GroupTiles, pad_rows, rounded_up
from jaxqq._kernels.hopper.ptx.layouts import interleaved
from jaxqq._kernels.hopper.quantize import columns
from jaxqq._kernels.hopper.quantize.blockdiag import blockdiag_operand
from jaxqq._kernels.hopper.quantize.code_words import SHIFTS, code_words
from jaxqq._kernels.hopper.quantize.exact import exact_operand
from jaxqq._kernels.hopper.quantize.group_rescale import rebased_operands_of_packed
from jaxqq._kernels.hopper.quantize.groups import Beside, TuningConfig
from jaxqq._kernels.hopper.quantize.rebased import rebased_operand
from jaxqq._kernels.hopper.ragged_plan import GradientPlan, RaggedPlan
from jaxqq._kernels.hopper.skinny_plan import SkinnyPlan
from jaxqq._kernels.hopper.tiles import Grid, planes_of, rows_of_scales
from jaxqq._kernels.hopper.wide_plan import WidePlan, row_unit
from jaxqq._kernels.problem import fold, pad_k
from jaxqq._ragged_reference import RaggedOperands
from jaxqq._reference import Operands, round_trip

# Tiles of many rows, or of few by many of w


def wide(plan: WidePlan, operands: Operands) -> jax.Array:
  """out (..., m, n)."""
  fmt = plan.problem.fmt
  folded = fold(operands)
  if plan.fp8:  # loads go past the end of k
    ready = _rebased(plan, _with_even_scales(folded))
  elif plan.kernel == "dequant_gemm":
    ready = _exact(plan, _with_whole_rows(plan, folded))
  else:
    ready = _exact(plan, pad_k(folded, gemm.step_k(operand_dtype(plan.problem)), fmt))
  out = _KERNELS[plan.kernel](plan, ready)
  return out.reshape(*operands.batch_shape, operands.m, operands.n)


def _exact(
  plan: WidePlan,
  operands: Operands,
  x_hat: jax.Array | None = None,
  beside: Sequence[Beside] = (),
) -> dequant_gemm.Operands:
  """16 bit floats that hold code * scale, or x as it is; packed w as it came.

  x_hat: x quantized, where it is already.
  beside: what the launch that quantizes x may have as well.
  """
  problem, fmt, mainloop = plan.problem, plan.problem.fmt, MAINLOOPS.get(plan.mainloop)
  interleave = mainloop is not None and mainloop.interleaved

  def operand(name: str, global_scale: jax.Array | None) -> jax.Array:
    a = getattr(operands, name)
    is_transposed = name in operands.transposed
    quantizer: Any = columns.exact_operand_of_transpose
    if not is_transposed:
      quantizer = functools.partial(exact_operand, beside=beside if name == "x" else ())
    matrix = a.reshape(-1, a.shape[-1])
    out = quantizer(
      matrix, fmt, _scalar(global_scale), dtype=operand_dtype(problem), interleave=interleave
    )
    return out.reshape(a.shape[0], -1, out.shape[-1])

  if x_hat is not None:
    x = x_hat
  elif problem.quantize_input:
    x = operand("x", operands.global_scale_x)
  else:
    x = operands.untransposed(["x"]).x
  w = operands.w if problem.is_packed else operand("w", operands.global_scale_w)
  of_x, of_w = _in_line(operands.global_scale_x), _in_line(operands.global_scale_w)
  return dequant_gemm.Operands(x, w, operands.scales, of_x, of_w)


def _with_whole_rows(plan: WidePlan, operands: Operands) -> Operands:
  """Zeros behind k where the TMA wants them, and where x is interleaved.

  A row of w is whole units of the TMA's; else no copy of it is made, since loads go past its end.
  """
  fmt = plan.problem.fmt
  operands = pad_k(operands, row_unit(fmt), fmt)
  missing = -operands.k % PART_K if MAINLOOPS[plan.mainloop].interleaved else 0
  if not missing:
    return operands
  widths = [(0, 0)] * 3
  widths[operands.axes("x")[1]] = (0, missing)
  return dataclasses.replace(operands, x=jnp.pad(operands.x, widths))


# Scales of rows behind those of one matrix, as many as a tile has, which reach no result.
_SCALES_BEHIND = 256


def _rebased(
  plan: WidePlan, operands: Operands, beside: Sequence[Beside] = ()
) -> dequant_gemm.Operands:
  """e4m3 codes, a row's on one power of two; packed w as it came, and how to rebase it.

  beside: as of `_exact`.
  """
  fmt = plan.problem.fmt

  def matrix(a: jax.Array) -> jax.Array:
    return a.reshape(-1, a.shape[-1])

  def behind(a: jax.Array) -> int:
    return _SCALES_BEHIND if a.shape[0] == 1 else 0

  def of_rows(a: jax.Array, scales: jax.Array) -> jax.Array:
    return scales.reshape(a.shape[0], -1)

  if plan.problem.is_packed:
    x, scales = operands.x, operands.scales
    both = behind(x), behind(scales)
    found = rebased_operands_of_packed(matrix(x), matrix(scales), fmt, beside, both)
    codes, x_scales, rescale, w_scales = found
    return dequant_gemm.Operands(
      codes.reshape(x.shape),
      operands.w,
      rescale.reshape(scales.shape),
      x_scales=of_rows(x, x_scales),
      w_scales=of_rows(scales, w_scales),
    )

  def operand(name: str, beside: Sequence[Beside] = ()) -> tuple[jax.Array, jax.Array]:
    a = getattr(operands, name)
    if name in operands.transposed:
      out = columns.rebased_operand_of_transpose(matrix(a), fmt)
    else:
      out = rebased_operand(matrix(a), fmt, beside=beside, behind=behind(a))
    return out.codes.reshape(a.shape[0], -1, operands.k), of_rows(a, out.row_scales)

  x, x_scales = operand("x", beside)
  w, w_scales = operand("w")
  return dequant_gemm.Operands(x, w, None, x_scales=x_scales, w_scales=w_scales)


def product_of_exact(
  plan: WidePlan, x: tuple[jax.Array, jax.Array | None], w: tuple[jax.Array, jax.Array | None]
) -> jax.Array:
  """out (m, n) of exact operands (m, k) and (n, k), K in whole steps, and their global scales."""
  of_x, of_w = _in_line(x[1]), _in_line(w[1])
  return _run_gemm(plan, dequant_gemm.Operands(x[0][None], w[0][None], None, of_x, of_w))[0]


MAINLOOPS = packed_operands()
SKINNY_MAINLOOPS = skinny_mainloops()


def _run_gemm(plan: WidePlan, ready: dequant_gemm.Operands, grid: Grid | None = None) -> jax.Array:
  operands = gemm.Operands(
    ready.x,
    ready.w,
    ready.global_scale_x,
    ready.global_scale_w,
    ready.x_scales,
    ready.w_scales,
    groups=ready.groups,
  )
  how = plan.problem.out_dtype, plan.tiles, grid or plan.grid
  return gemm.gemm(operands, *how, unit=_unit(plan.problem.fmt, ready))


def _run_dequant_gemm(
  plan: WidePlan, ready: dequant_gemm.Operands, grid: Grid | None = None
) -> jax.Array:
  mainloop, out_dtype = MAINLOOPS[plan.mainloop], plan.problem.out_dtype
  unit = _unit(plan.problem.fmt, ready) * 2.0**mainloop.unit_exponent
  return dequant_gemm.dequant_gemm(ready, mainloop, out_dtype, plan.tiles, grid or plan.grid, unit)


def _run_staged_gemm(plan: WidePlan, ready: dequant_gemm.Operands) -> jax.Array:
  fmt, out_dtype = plan.problem.fmt, plan.problem.out_dtype
  how = plan.tiles, plan.grid, plan.panel_rows, _unit(fmt, ready)
  return staged_gemm.staged_gemm(ready, fmt, out_dtype, *how)


_KERNELS = {
  "gemm": _run_gemm,
  "dequant_gemm": _run_dequant_gemm,
  "staged_gemm": _run_staged_gemm,
}


# Up to 64 rows


def skinny(plan: SkinnyPlan, operands: Operands) -> jax.Array:
  """out (..., m, n)."""
  folded = _pad_skinny(plan, fold(operands))
  x, x_scales = folded.x, None
  if not plan.quantizes_x:
    x, x_scales = _skinny_x(plan, folded, plan.padded_m)
  ready = _ready_for_skinny(folded, x, x_scales)
  out = _run_skinny_gemm(plan, ready, folded.x.shape[1])
  return out.reshape(*operands.batch_shape, operands.m, operands.n)


def _ready_for_skinny(
  folded: Operands, x: jax.Array, x_scales: jax.Array | None, groups: GroupTiles | None = None
) -> skinny_gemm.Operands:
  of_x, of_w = _in_line(folded.global_scale_x), _in_line(folded.global_scale_w)
  return skinny_gemm.Operands(x, folded.w, folded.scales, of_x, of_w, x_scales, groups)


def _run_skinny_gemm(
  plan: SkinnyPlan, ready: skinny_gemm.Operands, m: int, grid: Grid | None = None
) -> jax.Array:
  unit = _unit(plan.problem.fmt, ready) * SKINNY_MAINLOOPS[plan.mainloop].unit(plan.problem)
  return skinny_gemm.skinny_gemm(ready, m, plan, unit, plan.problem.out_dtype, grid)


# Global scales, which kernels take as they are: any arithmetic here would cost a kernel of XLA's


def _unit(fmt: Format, ready: dequant_gemm.Operands | skinny_gemm.Operands) -> float:
  """What sums are to be multiplied by beside the global scales that there are."""
  scales = ready.global_scale_x, ready.global_scale_w
  return math.prod(1 / fmt.largest_value for scale in scales if scale is not None)


def _in_line(global_scale: jax.Array | None) -> jax.Array | None:
  """(1,) or (groups,)."""
  return None if global_scale is None else global_scale.reshape(-1)


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


def _skinny_x(
  plan: SkinnyPlan, folded: Operands, padded_m: int, tables: Beside | None = None
) -> tuple[jax.Array, jax.Array | None]:
  """x as the kernel takes it, quantized by one of its own, and its scales.

  tables: of groups, which that kernel has beside it.
  """
  fmt = plan.problem.fmt
  batch, _, k = folded.x.shape
  global_scale = _scalar(folded.global_scale_x)
  if plan.blockdiag is not None:
    x, x_scales = blockdiag_operand(folded.x[0], fmt, global_scale, plan.blockdiag)
    return x[None], x_scales.reshape(1, 1, -1)
  if not plan.problem.quantize_input:
    return folded.x if plan.x_in_rows else pad_rows(folded.x, padded_m), None
  # The rows of one matrix need no zeros behind them, those of several do.
  x = folded.x if batch == 1 else pad_rows(folded.x, padded_m)
  x, rows, beside = x.reshape(-1, k), batch * padded_m, [] if tables is None else [tables]
  if plan.mainloop == "group_sums":
    x, x_scales = code_words(x, fmt, rows, shifted=tables is not None, beside=beside)
    if tables is not None:
      return x[None], x_scales
    x_scales = jnp.swapaxes(x_scales.reshape(-1, batch, padded_m), 0, 1)
    return x.reshape(batch, padded_m, -1), x_scales
  out = exact_operand(
    x,
    fmt,
    global_scale,
    dtype=operand_dtype(plan.problem),
    interleave=SKINNY_MAINLOOPS[plan.mainloop].interleaved,
    rows=rows,
    config=TuningConfig(tiles_per_step=1),
    beside=beside,
  )
  return out.reshape(batch, padded_m, -1), None


def _scalar(global_scale: jax.Array | None) -> jax.Array | None:
  """One number, or as many as there are."""
  if global_scale is None:
    return None
  return global_scale.reshape(()) if global_scale.size == 1 else global_scale


# Rows in groups


def ragged(plan: RaggedPlan, operands: RaggedOperands) -> jax.Array:
  """out (..., m, n), the rows of each group multiplied with its matrix."""
  problem = plan.problem
  groups, own = _ragged_reference.folded(operands, problem.groups)
  tables = grouped.group_tiles(operands, problem.groups, plan.block_m)
  scale = operands.global_scale_x
  of_all = Operands(
    own.x[None],
    own.w,
    None if own.scales is None else lax.bitcast_convert_type(own.scales, jnp.uint8),
    scale if scale is not None and scale.size == 1 else own.global_scale_x,
    own.global_scale_w,
  )
  if problem.all_groups == 1 and problem.batch == 1 and problem.groups > 1:
    of_all = _without_other_matrices(plan, of_all, -operands.group_offset.reshape(()))
  of_rows = None
  if problem.quantize and problem.scales_by_group:
    of_rows = grouped.scales_of_rows(groups, own.global_scale_x, own.x.shape[0])
  run = _ragged_skinny if isinstance(plan.of_group, SkinnyPlan) else _ragged_wide
  out = run(plan, of_all, of_rows, tables)
  return out.reshape(*operands.batch_shape, problem.m, problem.n)


def _without_other_matrices(plan: RaggedPlan, operands: Operands, index: Any) -> Operands:
  """Where all rows are multiplied by one matrix, that one alone of what is padded or rebased first.

  Kernels take an operand of one matrix as all groups'. Of an index out of range, rows have no
  tiles.
  """
  own, k = plan.of_group, plan.problem.k
  if operands.scales is None:
    return operands
  n, of_row, prepares_w = plan.problem.n, operands.scales.shape[-1], False
  prepares_scales = rows_of_scales(n, planes_of(of_row, 0, n)) != n
  if isinstance(own, WidePlan):
    prepares_w = not own.fp8 and k % row_unit(own.problem.fmt) != 0
    prepares_scales |= prepares_w or own.fp8

  def one(a: Any) -> Any:
    return lax.dynamic_slice_in_dim(a, index, 1)

  return dataclasses.replace(
    operands,
    w=one(operands.w) if prepares_w else operands.w,
    scales=one(operands.scales) if prepares_scales else operands.scales,
  )


def _ragged_skinny(
  plan: RaggedPlan, operands: Operands, of_rows: jax.Array | None, tables: Beside
) -> jax.Array:
  own, m = cast(SkinnyPlan, plan.of_group), operands.m
  operands = _pad_skinny(own, operands)
  if of_rows is None:
    # A row of the scales of all rows is a multiple of what the TMA loads.
    x, x_scales = _skinny_x(own, operands, rounded_up(m, SHIFTS), tables)
  else:
    x, x_scales = _quantized_by_rows(plan, operands.x, of_rows), None
  ready = _ready_for_skinny(operands, x, x_scales, grouped.tiles_of(tables))
  return _run_skinny_gemm(own, ready, m, plan.grid)


def _ragged_wide(
  plan: RaggedPlan, operands: Operands, of_rows: jax.Array | None, tables: Beside
) -> jax.Array:
  own = cast(WidePlan, plan.of_group)
  if own.fp8:  # loads go past the end of k
    ready = _rebased(own, _with_even_scales(operands), [tables])
  else:
    if own.problem.is_packed:
      operands = _with_whole_rows(own, operands)
    x = None if of_rows is None else _quantized_by_rows(plan, operands.x, of_rows)
    ready = _exact(own, operands, x, [tables])
  ready = dataclasses.replace(ready, groups=grouped.tiles_of(tables))
  return (_run_dequant_gemm if own.problem.is_packed else _run_gemm)(own, ready, plan.grid)


def _with_even_scales(operands: Operands) -> Operands:
  """Zeros behind an odd number of scales, of which `rescale_rows` takes two or four at a time."""
  scales = operands.scales
  if scales is None or (scales.shape[2] % 2 == 0 and scales.shape[2] > 2):
    return operands
  missing = -scales.shape[2] % 4
  return dataclasses.replace(operands, scales=jnp.pad(scales, ((0, 0), (0, 0), (0, missing))))


def _quantized_by_rows(plan: RaggedPlan, x: jax.Array, of_rows: jax.Array) -> jax.Array:
  """x_hat (1, m, k) for the mainloop, by XLA: of rows with global scales of their own, (m,)."""
  own = plan.of_group
  problem = own.problem
  x_hat = round_trip(x[0][:, None], problem.fmt, of_rows)[:, 0].astype(operand_dtype(problem))
  mainloop = (SKINNY_MAINLOOPS | MAINLOOPS).get(own.mainloop)
  if mainloop is not None and mainloop.interleaved:
    x_hat = interleaved(x_hat)
  return x_hat.reshape(1, *x.shape[1:])


def ragged_gradient(plan: GradientPlan, operands: RaggedOperands) -> jax.Array:
  """dx (..., m, k), or dw (..., groups, n, k), of unquantized operands."""
  problem, shape = plan.problem, operands.batch_shape
  groups, own = _ragged_reference.folded(operands, problem.groups)
  if plan.tiles is None:
    ready = row_sums.Operands(own.x, own.y, groups.starts, groups.sizes)
    sums = row_sums.row_sums(ready, problem.out_dtype, plan.device.num_sms)
    return sums.reshape(*shape, problem.groups, problem.n, problem.k)
  tiles = grouped.tiles_of(grouped.group_tiles(operands, problem.groups, plan.tiles.block_m))
  of_gemm = gemm.Operands(own.x[None], own.w, groups=tiles)
  out = gemm.gemm(of_gemm, problem.out_dtype, plan.tiles, plan.grid, w_transposed=True)
  return out.reshape(*shape, problem.m, problem.k)
