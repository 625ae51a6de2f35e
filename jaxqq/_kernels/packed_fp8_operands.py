"""Both operands of the fp8 product with packed w, in one launch: x quantized, w's scales lowered.

    CTA 0 .. m - 1   a row of x            `operands.fp8_row`
    CTA m ..         some rows of scales   `lowered_scales.lower_rows`

Each alone is over in a few microseconds, which a launch costs too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._formats import Format
from jaxqq._kernels import lowered_scales
from jaxqq._kernels.codes import E4M3
from jaxqq._kernels.groups import DEFAULT_CONFIG, make_kernel, pad
from jaxqq._kernels.operands import check_fp8, fp8_codes, fp8_groups, fp8_row


def packed_fp8_operands(
  x: jax.Array, scales: jax.Array, fmt: Format
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """`fp8_operand` of x, and w's scales lowered.

  Args:
    x: float32, float16 or bfloat16, (m, k).
    scales: uint8 (n, groups).
    fmt: a format of e4m3 elements and power of two scales.

  Returns:
    codes: float8_e4m3fn (m, k).
    row_scales: float32 (m,), of x.
    downs: uint8 (n, groups), as `lower_rows` writes them.
    row_scales: float32 (n,), of w.
  """
  check_fp8(fmt)
  m, n = x.shape[0], scales.shape[0]
  grouped, x_view = fp8_groups(x, fmt)
  vectors, w_view = lowered_scales.scale_vectors(scales)
  vectors = pad(vectors, 0, w_view.tile)
  rows = vectors.shape[0]
  block = lowered_scales.rows_a_step(rows, w_view)
  steps = m + pl.cdiv(rows, block)

  def kernel(
    x_ref: Any,
    scales_ref: Any,
    codes_ref: Any,
    x_scales_ref: Any,
    downs_ref: Any,
    w_scales_ref: Any,
  ) -> None:
    step = lax.axis_index("step")

    @pl.when(step < m)
    def _x() -> None:
      of_x = (x_ref, codes_ref, x_scales_ref)
      fp8_row(step, *of_x, fmt=fmt, view=x_view, config=DEFAULT_CONFIG)

    @pl.when(step >= m)
    def _w() -> None:
      # The last step starts early enough to be a whole one.
      here = pl.ds(jnp.minimum((step - m) * block, rows - block), block)
      lowered_scales.lower_rows(here, scales_ref, downs_ref, w_scales_ref, view=w_view)

  run = make_kernel(
    kernel,
    grid=(steps,),
    out_type=(
      jax.ShapeDtypeStruct(grouped.shape, E4M3),
      jax.ShapeDtypeStruct((m,), jnp.float32),
      jax.ShapeDtypeStruct(vectors.shape, jnp.uint8),
      jax.ShapeDtypeStruct((rows,), jnp.float32),
    ),
    kernel_name="jaxqq_packed_fp8_operands",
  )
  codes, x_scales, downs, w_scales = run(grouped, vectors)
  downs = downs[:n].reshape(scales.shape)
  return fp8_codes(codes, x.shape), x_scales, downs, w_scales[:n]
