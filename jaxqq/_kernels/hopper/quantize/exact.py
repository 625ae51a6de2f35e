"""Code * scale in 16 bits, in one kernel: what the exact products multiply."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxqq._formats import Format
from jaxqq._kernels.hopper.ptx.layouts import WARPS
from jaxqq._kernels.hopper.ptx.reshape import store_flat, swap_with_neighbour
from jaxqq._kernels.hopper.quantize.codes import (
  amax_bits_of,
  scalar_of,
  scales_of,
  values_of,
)
from jaxqq._kernels.hopper.quantize.groups import (
  DEFAULT_CONFIG,
  VECTOR,
  Beside,
  TuningConfig,
  View,
  by_blocks,
  load_elements,
  store_gmem,
)
from jaxqq._kernels.hopper.quantize.parts import NEAREST, Given, Parts, Rows, load_scaled
from jaxqq._kernels.hopper.quantize.squares import Squares

_MATRIX = (8, 8)  # how the 64 elements are seen that `interleave` permutes among themselves
_BLOCK = math.prod(_MATRIX)


def exact_operand(
  a: jax.Array,
  fmt: Format,
  global_scale: jax.Array | None = None,
  *,
  dtype: Any = jnp.bfloat16,
  interleave: bool = False,
  rows: int | None = None,
  config: TuningConfig = DEFAULT_CONFIG,
  parts: Parts = NEAREST,
  key: jax.Array | None = None,
  signs: jax.Array | None = None,
  beside: Sequence[Beside] = (),
) -> jax.Array:
  """What is left of `a` after quantization, without its global scale: code * scale.

  bfloat16 holds it exactly, down to its smallest subnormal, 2**-133. float16 holds what has float
  scales: 6 * 448 down to 0.5 * 2**-9.

  Args:
    a: float32, float16 or bfloat16, (rows, k).
    fmt: the format.
    global_scale: None, or a float32 scalar.
    dtype: bfloat16 or float16.
    interleave: whether k is to be `layouts.interleaved`. The caller pads: it is a multiple of 64,
      any number of rows will do.
    rows: how many the result has, None for those of `a`: further ones are not written.
    parts: what else of a `jaxqq.Quantizer`; not where elements are interleaved.
    key, signs: as of `packed.quantize`.
    beside: what else the launch has; not with squares.

  Returns:
    dtype (rows, k).
  """
  check_dtype(dtype, fmt)
  k = a.shape[1]
  rows = a.shape[0] if rows is None else rows
  if parts.is_square:
    squares = Squares.of(a, fmt, parts)
    arrays, given = jax.tree.flatten(squares.given(Given.of(fmt, parts, global_scale, key, signs)))
    body: Any = functools.partial(_exact_kernel, fmt=fmt, seen=squares, given=given)
    types = (jax.ShapeDtypeStruct(squares.tile[3:], dtype),)
    (out,) = squares.run(body, "exact_operand", a, types, tuple(arrays))
    return out.reshape(a.shape)
  of_rows = Rows.of(k, fmt, parts, VECTOR)
  view = of_rows.view
  if interleave:
    view = View(_BLOCK // fmt.group_size, fmt.group_size // VECTOR, VECTOR)
  blocks = a.reshape(-1, *view.minor)
  arrays, given = jax.tree.flatten(of_rows.given(Given.of(fmt, parts, global_scale, key, signs)))
  body = functools.partial(_exact_kernel, seen=of_rows, given=given)
  if interleave:
    body = functools.partial(_interleaved_kernel, view=view)
  (out,) = by_blocks(
    functools.partial(body, fmt=fmt),
    "exact_operand",
    (blocks,),
    (jax.ShapeDtypeStruct(_MATRIX if interleave else view.minor, dtype),),
    view,
    config,
    tuple(arrays),
    staging=jax.ShapeDtypeStruct(_MATRIX, dtype) if interleave else None,
    entries=rows * k // math.prod(view.minor),
    beside=beside,
  )
  return out.reshape(rows, k)


def check_dtype(dtype: Any, fmt: Format) -> None:
  if fmt.scale_is_power_of_two and jnp.dtype(dtype) == jnp.float16:
    raise NotImplementedError(
      f"exact_operand: float16 does not have the exponents of {fmt.mode}'s scales; bfloat16 does."
    )


def _exact_kernel(
  here: Any, a_ref: Any, *refs: Any, fmt: Format, seen: Rows | Squares, given: Any
) -> None:
  *arrays, out_ref = refs
  a, scales, random = load_scaled(seen, a_ref, here, jax.tree.unflatten(given, arrays), fmt)
  values = values_of(a, scales, fmt, seen.layout, random)
  store_gmem(out_ref.at[here], values.astype(out_ref.dtype))


def _interleaved_kernel(rows: Any, a_ref: Any, *refs: Any, fmt: Format, view: View) -> None:
  """As `_exact_kernel`, then `layouts.interleaved`: neighbours swap, and a matrix is transposed.

  Matrices of 8 by 8 go to shared memory and come back through ldmatrix, which transposes those of
  16 bits: a warp then holds one, and a thread two neighbours of a row.
  """
  *global_scale, out_ref, staging_ref = refs
  a = load_elements(a_ref, rows, view)
  scales = scales_of(amax_bits_of(a), fmt, scalar_of(global_scale), a_ref.dtype)
  values = values_of(a, scales, fmt).astype(staging_ref.dtype)
  store_flat(swap_with_neighbour(values, view.layout), staging_ref)
  plgpu.commit_smem()
  tiling = plgpu.Tiling(((WARPS, *_MATRIX), (2,)))
  layout = plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
  out_ref[rows] = plgpu.load(staging_ref.transpose((0, 2, 1)), layout=layout)
