"""e4m3 codes on one power of two a row, in one kernel: what the fp8 products multiply."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxqq import _rounding
from jaxqq._formats import Format
from jaxqq._kernels.hopper.ptx.rounding import thread_amax_bits
from jaxqq._kernels.hopper.quantize.codes import (
  finite_bits,
  inverse_power,
  power,
  rebasing_bits,
)
from jaxqq._kernels.hopper.quantize.elements import E4M3
from jaxqq._kernels.hopper.quantize.groups import (
  DEFAULT_CONFIG,
  Beside,
  TuningConfig,
  View,
  load_gmem,
  make_kernel,
  pad,
  per_group,
  store_gmem,
)
from jaxqq._quantize import scales_of_power_of_two

# Elements that a thread holds side by side, 16 bytes of codes: two threads share a group, and
# compute its factors twice. With four, that was a third of all instructions. Of shorter rows a
# thread holds fewer, so that only those of less than 256 are padded.
_VECTOR = 16


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["codes", "row_scales"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RebasedOperand:
  """An operand for fp8 tensor cores: x_hat = codes * row_scales, but for what rebasing loses."""

  codes: Any  # float8_e4m3fn (rows, k)
  row_scales: Any  # float32 (rows,), powers of two, and what is behind them


def rebased_operand(
  a: jax.Array,
  fmt: Format,
  config: TuningConfig = DEFAULT_CONFIG,
  beside: Sequence[Beside] = (),
  behind: int = 0,
) -> RebasedOperand:
  """Quantizes rows of `a` to e4m3 codes under one power of two a row: rebased.

  With e_g the groups' exponents (section 2 of the specification) and E their maximum in the row,
  codes are multiplied by 2**(e_g - E) and rounded to e4m3, to nearest even. That is exact down to
  e4m3's normal range, 2**-6; below, an element is off by up to 2**-10, and one below 2**-10 becomes
  zero, all in units of 2**(E - 127), of which the row's largest element has 224 to 448. Groups with
  a NaN or an infinity become NaN and do not count for E.

  Args:
    a: float32, float16 or bfloat16, (rows, k).
    fmt: a format of e4m3 elements and power of two scales.
    beside: what else the launch has.
    behind: how many row scales there are beyond those of `a`. They are not written.
  """
  check_rebasable(fmt)
  grouped, view = _row_groups(a, fmt)
  rows = a.shape[0]

  def kernel(*refs: Any) -> None:
    _rebase_row(lax.axis_index("step"), *refs, fmt=fmt, view=view, config=config)

  run = make_kernel(
    kernel,
    "rebased_operand",
    grid=(rows,),
    out_type=(
      jax.ShapeDtypeStruct(grouped.shape, E4M3),
      jax.ShapeDtypeStruct((rows + behind,), jnp.float32),
    ),
    beside=beside,
  )
  codes, row_scales = run(grouped)
  return RebasedOperand(codes.reshape(rows, -1)[:, : a.shape[1]], row_scales)


def _row_groups(a: jax.Array, fmt: Format) -> tuple[jax.Array, View]:
  """Rows (rows, k) as `_rebase_row` takes them, (rows, groups, lanes, vector), zeros behind."""
  groups = a.shape[1] // fmt.group_size
  # A thread has at least two elements: conversions go in pairs.
  vector = min(_VECTOR, max(2, 1 << (groups.bit_length() - 1) >> 2))
  view = View(fmt.group_size // vector, vector)
  return pad(a.reshape(a.shape[0], -1, *view.minor), 1, view.tile), view


def check_rebasable(fmt: Format) -> None:
  if fmt.element != E4M3 or not fmt.scale_is_power_of_two:
    raise NotImplementedError(
      f"rebased_operand: {fmt.mode} has no e4m3 elements under powers of two for fp8 tensor cores."
    )


def _rebase_row(
  row: Any,
  a_ref: Any,  # (rows, groups, lanes, vector)
  codes_ref: Any,  # the same
  row_scales_ref: Any,  # (rows,)
  *,
  fmt: Format,
  view: View,
  config: TuningConfig,
) -> None:
  """One row: a sweep for its groups' exponents, and one that writes its codes."""
  a_row, codes_row = a_ref.at[row], codes_ref.at[row]
  groups = a_ref.shape[1]
  row_bytes = math.prod(a_ref.shape[1:]) * a_ref.dtype.itemsize

  def load(start: Any, size: int) -> jax.Array:
    return load_gmem(a_row.at[pl.ds(start, size)], view.layout)

  def amax_bits_of(a: jax.Array) -> jax.Array:
    return jnp.max(thread_amax_bits(a, view.layout), axis=-1)

  def write_row(largest: jax.Array) -> jax.Array:
    top = scales_of_power_of_two(largest, fmt)
    row_scales_ref[pl.ds(row, 1)] = power(jnp.full((1,), top))
    return top

  def write(start: Any, a: jax.Array, amax_bits: jax.Array, top: jax.Array) -> None:
    codes = rebased_codes(a.astype(jnp.float32), amax_bits, top, fmt)
    store_gmem(codes_row.at[pl.ds(start, a.shape[0])], codes)

  if row_bytes <= config.resident_bytes:
    spans = _whole_and_rest(groups, view.tile)
    loaded = [load(start, size) for start, size in spans]
    amax_bits = [amax_bits_of(a) for a in loaded]
    top = write_row(functools.reduce(jnp.maximum, (jnp.max(finite_bits(b)) for b in amax_bits)))
    for (start, _), a, bits in zip(spans, loaded, amax_bits, strict=True):
      write(start, a, bits, top)
    return

  size = view.tile * min(config.tiles_per_step, groups // view.tile)
  steps = pl.cdiv(groups, size)

  def start_of(step: jax.Array) -> jax.Array:
    return jnp.minimum(step * size, groups - size)

  def find_step(step: jax.Array, so_far: jax.Array) -> jax.Array:
    return jnp.maximum(so_far, finite_bits(amax_bits_of(load(start_of(step), size))))

  nothing = plgpu.layout_cast(jnp.zeros((size,), jnp.int32), view.reduced(1))
  top = write_row(jnp.max(lax.fori_loop(0, steps, find_step, nothing)))

  def write_step(step: jax.Array, _: None) -> None:
    a = load(start_of(step), size)
    write(start_of(step), a, amax_bits_of(a), top)

  lax.fori_loop(0, steps, write_step, None)


def _whole_and_rest(groups: int, tile: int) -> list[tuple[int, int]]:
  """(start, size) of all whole tiles, and of a last one that overlaps them where some is left."""
  whole = groups // tile * tile
  return [(0, whole)] + ([(groups - tile, tile)] if groups > whole else [])


def rebased_codes(a: jax.Array, amax_bits: jax.Array, top: jax.Array, fmt: Format) -> jax.Array:
  """e4m3 codes on the row's exponent `top`, the largest of those of its groups."""
  exponents = scales_of_power_of_two(amax_bits, fmt)
  finite = amax_bits < _rounding.INFINITY_BITS
  factor = jnp.where(finite, inverse_power(exponents), jnp.float32(np.nan))
  codes = (a * per_group(factor, a)).astype(E4M3)
  rebasing = lax.bitcast_convert_type(rebasing_bits(top - exponents).astype(jnp.int16), jnp.float16)
  return (codes.astype(jnp.float16) * per_group(rebasing, a)).astype(E4M3)
