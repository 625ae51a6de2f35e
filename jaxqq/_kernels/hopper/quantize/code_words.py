"""x as packed e4m3 codes and the factors of their groups, for `skinny_gemm`'s mxfp8."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._formats import Format
from jaxqq._kernels.hopper.quantize.codes import amax_bits_of, codes_of, scales_of
from jaxqq._kernels.hopper.quantize.groups import (
  Beside,
  View,
  load_gmem,
  make_kernel,
  per_group,
  positions,
  store_gmem,
)
from jaxqq._kernels.hopper.quantize.rebased import check_rebasable
from jaxqq._kernels.hopper.tiles import TMA_BYTES

# The TMA loads float32 from columns on that are multiples of four. There are four copies, each a
# column further to the left, so that one of them has a given row at such a column.
SHIFTS = TMA_BYTES // 4


def code_words(
  a: jax.Array,
  fmt: Format,
  rows: int,
  *,
  shifted: bool = False,
  beside: Sequence[Beside] = (),
) -> tuple[jax.Array, jax.Array]:
  """Packed codes of `a`, and what they are to be multiplied by.

  Args:
    a: float32, float16 or bfloat16, (m, k), k whole groups, 512 or more.
    fmt: a format of e4m3 elements and power of two scales.
    rows: how many rows the results have, m or more: further ones are not written.
    shifted: whether factors are to be loaded from any row on.
    beside: what else the launch has.

  Returns:
    words: uint32 (rows, k / 4).
    factors: float32 (k / group_size, rows): the groups' scales, NaN for groups with a NaN or an
      infinity. If shifted, (SHIFTS, k / group_size, SHIFTS + rows): row r at SHIFTS + r - i of
      copy i.
  """
  check_rebasable(fmt)
  m, k = a.shape
  groups = k // fmt.group_size
  view = View(fmt.group_size // fmt.codes_per_word, fmt.codes_per_word)
  run = make_kernel(
    functools.partial(_kernel, fmt=fmt, view=view, groups=groups, shifts=SHIFTS if shifted else 0),
    "code_words",
    grid=(m * pl.cdiv(groups, view.tile),),
    out_type=(
      jax.ShapeDtypeStruct((rows, groups, *view.minor[:-1]), jnp.uint32),
      jax.ShapeDtypeStruct(
        (SHIFTS, groups, SHIFTS + rows) if shifted else (groups, rows), jnp.float32
      ),
    ),
    beside=beside,
  )
  words, factors = run(a.reshape(m, groups, *view.minor))
  return words.reshape(rows, k // fmt.codes_per_word), factors


def _kernel(
  a_ref: Any,
  words_ref: Any,
  factors_ref: Any,
  *,
  fmt: Format,
  view: View,
  groups: int,
  shifts: int,
) -> None:
  steps, step = pl.cdiv(groups, view.tile), lax.axis_index("step")
  row = lax.div(step, jnp.int32(steps))
  start = jnp.minimum(lax.rem(step, jnp.int32(steps)) * view.tile, groups - view.tile)
  here = pl.ds(start, view.tile)
  a = load_gmem(a_ref.at[row, here], view.layout).astype(jnp.float32)
  scales = scales_of(amax_bits_of(a), fmt, None, a_ref.dtype)
  codes = codes_of(a, scales, fmt) << (positions(a.shape, view.layout) * fmt.bits)
  words = jnp.sum(codes, axis=-1, dtype=jnp.int32)
  words = jnp.where(per_group(scales.blank, words), 0, words)
  words_ref.at[row][here] = lax.bitcast_convert_type(words, jnp.uint32)
  if not shifts:
    store_gmem(factors_ref.at[here, row], scales.scale)
  for i in range(shifts):
    store_gmem(factors_ref.at[i, here, shifts + row - i], scales.scale)


def first_of_scales(row: Any) -> tuple[Any, Any]:
  """The copy of the shifted scales, and its column, at which those of rows from `row` on begin."""
  copy = lax.rem(row, jnp.int32(SHIFTS))
  return copy, row + SHIFTS - copy
