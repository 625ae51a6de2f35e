"""out = x_hat w_hat^T from packed w, expanded a panel of rows at a time, for many rows of x.

Where packed w is multiplied by many tiles of x, `dequant_gemm` expands it anew for each of them.
Here two kernels run in turn, and each number of w is expanded once (staged dequantization):

    expand w[0:4096]  |  gemm -> out[:, 0:4096]  |  expand w[4096:8192]  |  gemm -> ...

- A panel is written to memory and read again, but most are small enough to stay in the L2 cache,
  and the next one takes its place: there is never more of expanded w. `plan.panel_rows` says how
  many rows.
- Expanded, e4m3 codes are rebased to one scale a row; those that must stay exact become 16 bit
  floats (`packed.dequantize`).
- All panels have the same size, so that the kernels are compiled once: the last one starts early
  enough to be a whole one, and some columns are computed twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxqq._formats import Format
from jaxqq._kernels.hopper import dequant_gemm, gemm
from jaxqq._kernels.hopper.ptx.reshape import words_as_codes
from jaxqq._kernels.hopper.quantize.elements import E4M3
from jaxqq._kernels.hopper.quantize.group_rescale import rescale_half
from jaxqq._kernels.hopper.quantize.groups import (
  DEFAULT_CONFIG,
  View,
  Window,
  by_blocks,
  load_gmem,
  per_group,
)
from jaxqq._kernels.hopper.quantize.packed import dequantize
from jaxqq._kernels.hopper.tiles import Grid, WideTiles

_WORDS = View(2, 4)  # of a group: 8 words of four codes
_CODES = View(2, 16)


def staged_gemm(
  operands: dequant_gemm.Operands,  # of one matrix; of exact x, scales are as they came
  fmt: Format,
  out_dtype: Any,
  tiles: WideTiles,
  grid: Grid,
  rows: int,
  unit: float = 1.0,
) -> jax.Array:
  """(1, m, n), as `gemm` has it of expanded w, `rows` at a time.

  n and rows are multiples of STAGED_BLOCK_N.
  """
  m, n = operands.x.shape[1], operands.w.shape[1]
  if operands.x.dtype == E4M3:  # whose scales may have zeros behind them (`launch.py`)
    groups = operands.w.shape[2] // math.prod(_WORDS.minor)
    operands = dataclasses.replace(operands, scales=operands.scales[:, :, :groups])
  out = jax.freeze(jax.empty_ref(gemm.out_type(1, m, n, out_dtype, tiles)))
  for start in range(0, n, rows):
    first = min(start, n - rows)
    # Two numbers that differ: an array of one constant XLA has a kernel fill.
    bounds = jnp.stack([jnp.int32(first), jnp.int32(first + rows)])
    # Else XLA might expand all panels before it multiplies one.
    bounds, out = lax.optimization_barrier((bounds, out))
    out = _with_panel(
      out, Window(bounds, rows), operands, fmt=fmt, tiles=tiles, grid=grid, unit=unit
    )
  return out[:, :m, :n]


# Under a jit of its own it is traced and lowered once, not once for each panel.
@functools.partial(jax.jit, static_argnames=("fmt", "tiles", "grid", "unit"))
def _with_panel(
  out: jax.Array,
  window: Window,
  operands: dequant_gemm.Operands,
  *,
  fmt: Format,
  tiles: WideTiles,
  grid: Grid,
  unit: float,
) -> jax.Array:
  """`out` with the columns of one panel."""
  x, words, scales = operands.x, operands.w[0], operands.scales[0]
  if x.dtype == E4M3:
    w = rebased_panel(words, scales, window)
  else:
    w = dequantize(words, scales, fmt, None, x.dtype, window=window)
  ref, names = jax.new_ref(out), ("global_scale_x", "global_scale_w", "x_scales", "w_scales")
  scales_of = {name: getattr(operands, name) for name in names}
  panel = gemm.Operands(x, w[None], **scales_of, panel=window.first, out=ref)
  gemm.gemm(panel, out.dtype, tiles, dataclasses.replace(grid, n=window.rows), unit=unit)
  return jax.freeze(ref)


def rebased_panel(
  words: jax.Array,  # uint32 (n, k / 4)
  rescale: jax.Array,  # uint8 (n, k / 32), of `rescale_rows`
  window: Window,
) -> jax.Array:
  """float8_e4m3fn (rows, k): the codes rebased as `dequant_gemm` rebases them."""
  (out,) = by_blocks(
    _rebase_kernel,
    "rebase_panel",
    (words.reshape(-1, *_WORDS.minor), rescale.reshape(-1)),
    (jax.ShapeDtypeStruct(_CODES.minor, E4M3),),
    _WORDS,
    DEFAULT_CONFIG,
    entries=window.rows * rescale.shape[1],
    window=window,
  )
  return out.reshape(window.rows, -1)


def _rebase_kernel(rows: Any, words_ref: Any, rescale_ref: Any, out_ref: Any) -> None:
  words = load_gmem(words_ref.at[rows], _WORDS.layout)
  codes = words_as_codes(words, _WORDS.layout, _CODES.layout)
  rescale = rescale_half(load_gmem(rescale_ref.at[rows], _CODES.reduced(1)).astype(jnp.uint16))
  out_ref[rows] = (codes.astype(jnp.float16) * per_group(rescale, codes)).astype(E4M3)
