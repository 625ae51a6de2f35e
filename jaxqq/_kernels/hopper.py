"""The product on Hopper (H100, H200): which kernels, on which operands.

    x --quantizer--> x_hat --+
                             +--> matmul -------------> out      w quantized on the fly
    w --quantizer--> w_hat --+
    words, scales -----------+--> packed_matmul ------> out      w packed
                             +--> slab_matmul --------> out      mxfp8 packed, x of many more rows
                             +--> few_rows -----------> out      w packed, x of up to 64 rows
    w -----------------------+--> few_rows -----------> out      w in 16 bits, x of up to 64 rows
    x, words, scales --------+--> few_rows -----------> out      w packed, x of one row (mxfp8: 8)

One matrix whose contracted axis comes first is quantized down its columns, as it lies.

In 16 bits the operands are exact: float16 for e2m1 codes times e4m3 scales, bfloat16 for e4m3 codes
times powers of two. In fp8, twice as fast, a row's codes share one power of two, and the tensor
cores keep 14 bits of a sum: README says what both lose.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq._formats import FORMATS, Format
from jaxqq._kernels import (
  apart,
  expand,
  matmul,
  packed_matmul,
  quantized_rows,
  slabs,
  tuning,
)
from jaxqq._kernels import few_rows as few_rows_kernel
from jaxqq._kernels import few_rows_config as few_rows_tiles
from jaxqq._kernels.apart import apart_operand
from jaxqq._kernels.codes_operand import codes_operand
from jaxqq._kernels.groups import TuningConfig
from jaxqq._kernels.operands import exact_dtype, exact_operand, fp8_operand
from jaxqq._kernels.packed_fp8_operands import packed_fp8_operands
from jaxqq._kernels.quantized_rows import QuantizedRows
from jaxqq._kernels.transposed import exact_operand_of_transpose, fp8_operand_of_transpose
from jaxqq._quantize import alpha_factors
from jaxqq._reference import Operands


def exact(operands: Operands, mode: str, out_dtype: np.dtype, promote: bool) -> jax.Array:
  """The product of exact 16 bit operands; `promote` adds their sums up in float32."""
  fmt, problem = FORMATS[mode], _folded(operands)
  dtype = exact_dtype(fmt)
  config = tiles(operands, fmt, out_dtype, promote)
  packed = problem.scales is not None and not takes_slabs(config)
  problem = _padded_k(problem, matmul.step_k(dtype), fmt)

  def operand(name: str, global_scale: jax.Array | None) -> jax.Array:
    a = getattr(problem, name)
    of = exact_operand_of_transpose if name in problem.transposed else exact_operand
    matrix, scale = a.reshape(-1, a.shape[-1]), _scalar(global_scale)
    out = of(matrix, fmt, scale, dtype=dtype, interleave=packed)
    return out.reshape(a.shape[0], -1, problem.k)

  x = operand("x", problem.global_scale_x)
  expansion = expand.E4M3_EXACT if fmt.scale_is_power_of_two else expand.E2M1
  unit_exponent = expansion.unit_exponent if packed else 0
  if problem.global_scale_x is None and problem.global_scale_w is None:
    factors = _factors(2.0**unit_exponent)
  else:
    global_scales = _scalar(problem.global_scale_x), _scalar(problem.global_scale_w)
    factors = _factors(*alpha_factors(*global_scales, fmt, unit_exponent))
  if packed:
    out = packed_matmul.packed_matmul(
      x,
      problem.w,
      problem.scales,
      factors,
      None,
      expansion=expansion,
      out_dtype=out_dtype,
      config=config,
    )
  elif problem.scales is not None:
    out = slabs.slab_matmul(
      x,
      problem.w,
      problem.scales,
      factors,
      None,
      fmt=fmt,
      out_dtype=out_dtype,
      config=config,
    )
  else:
    w = operand("w", problem.global_scale_w)
    out = matmul.matmul(x, w, factors, None, out_dtype=out_dtype, config=config)
  return _unfolded(out, operands)


def fp8(operands: Operands, mode: str, out_dtype: np.dtype) -> jax.Array:
  """The product of e4m3 codes that are rebased: a row's share one power of two."""
  fmt, problem = FORMATS[mode], _folded(operands)
  problem = _padded_k(problem, matmul.step_k(jnp.float8_e4m3fn), fmt)
  config = tiles(operands, fmt, out_dtype, promote=True)
  factors = _factors()

  def operand(name: str) -> tuple[jax.Array, jax.Array]:
    a = getattr(problem, name)
    of = fp8_operand_of_transpose if name in problem.transposed else fp8_operand
    out = of(a.reshape(-1, a.shape[-1]), fmt)
    return out.codes.reshape(a.shape[0], -1, problem.k), out.row_scales.reshape(a.shape[0], -1)

  if problem.scales is None:
    x, x_scales = operand("x")
    w, w_scales = operand("w")
    row_scales = x_scales, w_scales
    out = matmul.matmul(x, w, factors, row_scales, out_dtype=out_dtype, config=config)
  else:
    scales = problem.scales.reshape(-1, problem.scales.shape[-1])
    matrix = problem.x.reshape(-1, problem.k)
    x, x_scales, downs, w_scales = packed_fp8_operands(matrix, scales, fmt)
    x, x_scales = x.reshape(problem.x.shape), x_scales.reshape(problem.x.shape[:-1])
    downs = downs.reshape(problem.scales.shape)
    w_scales = w_scales.reshape(problem.scales.shape[:-1])

    args = x, problem.w, downs, factors, (x_scales, w_scales)
    if takes_slabs(config):
      out = slabs.slab_matmul(*args, fmt=fmt, out_dtype=out_dtype, config=config)
    else:
      out = packed_matmul.packed_matmul(
        *args, expansion=expand.E4M3, out_dtype=out_dtype, config=config
      )
  return _unfolded(out, operands)


def few_rows(operands: Operands, mode: str, out_dtype: np.dtype, promote: bool) -> jax.Array:
  """The product of few rows of x and w, packed or in 16 bits."""
  fmt, problem = FORMATS[mode], _folded(operands)
  chunk, columns, held = few_rows_layout(operands, fmt)
  m = problem.x.shape[1]
  # As they come: XLA would have a kernel for each that makes something of them.
  global_scales = (problem.global_scale_x, problem.global_scale_w)
  factors = tuple(a.reshape(1) for a in global_scales if a is not None)
  unit = fmt.largest_value ** -len(factors)
  x, x_scales, quantized = problem.x, None, few_rows_quantized(operands, fmt)
  if quantized is None:
    x, x_scales = _few_rows_operand(problem, fmt, chunk, columns, held)
  if columns is not None:
    unit *= apart.UNIT
  elif problem.scales is not None and not fmt.scale_is_power_of_two:
    unit *= expand.E2M1.unit
  out = few_rows_kernel.few_rows(
    x,
    x_scales,
    problem.w,
    problem.scales,
    factors,
    m,
    unit=unit,
    chunk=chunk,
    columns=columns,
    quantized_x=quantized,
    quantized_w=fmt if problem.scales is None else None,
    out_dtype=out_dtype,
    config=few_rows_config(operands, fmt, promote),
  )
  return _unfolded(out, operands)


def _few_rows_operand(
  problem: Operands,
  fmt: Format,
  chunk: few_rows_tiles.Chunk,
  columns: apart.Columns | None,
  held: int,
) -> tuple[jax.Array, jax.Array | None]:
  """x as the kernel for few rows takes it, quantized by one of its own, and its scales."""
  batch, m, k = problem.x.shape
  global_scale = _scalar(problem.global_scale_x)
  if columns is not None:
    x, x_scales = apart_operand(problem.x[0], fmt, global_scale, columns)
    return x[None], x_scales.reshape(1, k // chunk.k, chunk.k // 256, -1)  # at most 256 in a row
  # The rows of one matrix need no zeros behind them, those of several do.
  x = problem.x if batch == 1 else jnp.pad(problem.x, ((0, 0), (0, held - m), (0, 0)))
  x, rows = x.reshape(-1, k), batch * held
  if problem.scales is not None and fmt.scale_is_power_of_two:
    x, x_scales = codes_operand(x, fmt, rows)
    x_scales = jnp.swapaxes(x_scales.reshape(-1, batch, held), 0, 1)
    return x.reshape(batch, held, -1), x_scales.reshape(batch, k // chunk.k, -1, held)
  out = exact_operand(
    x,
    fmt,
    global_scale,
    dtype=exact_dtype(fmt),
    interleave=True,
    rows=rows,
    config=TuningConfig(tiles_per_step=1),
  )
  return out.reshape(batch, held, -1), None


def _factors(first: Any = 1.0, second: Any = 1.0) -> jax.Array:
  """float32 (1, 2), whose product is that of both.

  They are made to differ: an array of equal constants XLA has a kernel fill, of others it knows
  the bytes. No array of numpy's: `custom_partitioning` refuses functions that hold one.
  """
  both = (jnp.float32(0.5) * first, jnp.float32(2) * second)
  return jnp.stack([jnp.asarray(a, jnp.float32) for a in both]).reshape(1, 2)


def _scalar(global_scale: jax.Array | None) -> jax.Array | None:
  return None if global_scale is None else global_scale.reshape(())


# Batch axes, and the end of k


def _shared_w(operands: Operands) -> bool:
  """Whether one matrix w meets all of x, whose batch axes are then just more rows."""
  batches = [operands.w.shape[:-2]]
  if operands.scales is not None:
    batches.append(operands.scales.shape[:-2])
  return all(math.prod(batch) == 1 for batch in batches)


def tiles(operands: Operands, fmt: Format, out_dtype: np.dtype, promote: bool) -> Any:
  """The tiles of the product's kernel, by the sizes that it sees."""
  m, n = operands.m, operands.n
  batch = math.prod(operands.batch_shape)
  if _shared_w(operands):
    batch, m = 1, batch * m
  packed_bits = None if operands.scales is None else fmt.bits
  return tuning.config(packed_bits, batch, m, n, operands.k, out_dtype, promote)


def takes_slabs(config: Any) -> bool:
  """Whether tiles for packed w are those of slabs of it, expanded."""
  return isinstance(config, matmul.Config)


def rows_of_a_matrix(operands: Operands) -> int:
  """How many rows of x meet one matrix w: batch axes that share w are just more rows."""
  m = operands.x.shape[-2]
  return m * math.prod(operands.batch_shape) if _shared_w(operands) else m


def chunk_of(operands: Operands, fmt: Format) -> few_rows_tiles.Chunk:
  """What the kernel for few rows loads of w at once: k is a multiple of chunk.k."""
  if operands.scales is None:
    # In chunks of 256, of which there are four, one a warpgroup, it takes 2 to 8% longer.
    return few_rows_tiles.Chunk(128, 8 * np.dtype(operands.w.dtype).itemsize, None)
  if fmt.scale_is_power_of_two:
    k = 512
  else:
    # With 16 rows 17.4 us on an H100, in smaller chunks 18.0; with 32 rows 19.5 and 19.1.
    few = _apart(operands, fmt) or rows_of_a_matrix(operands) <= 16
    k = 512 if few and operands.k % 512 == 0 else 256
  return few_rows_tiles.Chunk(k, fmt.bits, fmt.group_size)


def few_rows_layout(
  operands: Operands, fmt: Format
) -> tuple[few_rows_tiles.Chunk, apart.Columns | None, int]:
  """What the kernel for few rows loads of w at once, x's columns, and how many rows or columns."""
  rows, chunk = rows_of_a_matrix(operands), chunk_of(operands, fmt)
  if _apart(operands, fmt):
    columns = apart.Columns.of(rows)
    return chunk, columns, columns.count
  return chunk, None, few_rows_tiles.rows_held(rows)


def few_rows_quantized(operands: Operands, fmt: Format) -> QuantizedRows | None:
  """What becomes of x where the kernel for few rows quantizes it itself."""
  chunk, columns, held = few_rows_layout(operands, fmt)
  rows = rows_of_a_matrix(operands)
  if operands.scales is None or (columns is None and not fmt.scale_is_power_of_two):
    return None
  if rows > quantized_rows.max_rows(columns) or chunk.k != quantized_rows.CHUNK_K:
    return None
  return QuantizedRows(rows, fmt, columns, held)


def _apart(operands: Operands, fmt: Format) -> bool:
  """Whether x, of one matrix, has few enough rows that nvfp4's groups get columns of their own."""
  if operands.scales is None or fmt.scale_is_power_of_two:
    return False
  one_matrix = _shared_w(operands) or math.prod(operands.x.shape[:-2]) == 1
  few = rows_of_a_matrix(operands) <= apart.MAX_ROWS
  return one_matrix and few and operands.x.shape[-1] >= apart.MIN_K


def few_rows_config(operands: Operands, fmt: Format, promote: bool) -> few_rows_tiles.Config:
  """The tiles of the kernel for few rows, by the sizes that it sees."""
  chunk, columns, held = few_rows_layout(operands, fmt)
  if columns is not None:
    x_bytes = held * chunk.k + 4 * max(32, chunk.scales * columns.rows)
  elif operands.scales is not None and fmt.scale_is_power_of_two:
    x_bytes = held * (chunk.k + 4 * chunk.scales)
  else:
    x_bytes = held * chunk.k * 2
  batch = 1 if _shared_w(operands) else math.prod(operands.batch_shape)
  tiles = batch * -(-operands.n // few_rows_tiles.BLOCK_N)
  return few_rows_tiles.config(chunk, x_bytes, held, promote, tiles, operands.k // chunk.k)


def _folded(operands: Operands) -> Operands:
  """Every operand with one batch axis, of size 1 where it is shared; scales as bytes.

  One matrix alone stays transposed, for the quantizers of columns; several are put in order.
  """
  operands = operands.untransposed(
    [n for n in operands.transposed if math.prod(getattr(operands, n).shape[:-2]) > 1]
  )
  batch_shape, one = operands.batch_shape, _shared_w(operands)

  def matrices(a: Any, fold_rows: bool) -> Any:
    if fold_rows:
      a = jnp.broadcast_to(a, (*batch_shape, *a.shape[-2:]))
      return a.reshape(1, -1, a.shape[-1])
    if math.prod(a.shape[:-2]) > 1:
      a = jnp.broadcast_to(a, (*batch_shape, *a.shape[-2:]))
    return a.reshape(-1, *a.shape[-2:])

  x, w, scales = operands.x, operands.w, operands.scales
  if scales is not None:
    common = lax.broadcast_shapes(w.shape[:-2], scales.shape[:-2])
    w = jnp.broadcast_to(w, (*common, *w.shape[-2:]))
    scales = jnp.broadcast_to(scales, (*common, *scales.shape[-2:]))
    scales = matrices(lax.bitcast_convert_type(scales, jnp.uint8), False)
  return Operands(
    matrices(x, one),
    matrices(w, False),
    scales,
    operands.global_scale_x,
    operands.global_scale_w,
    operands.transposed,
  )


def _unfolded(out: jax.Array, operands: Operands) -> jax.Array:
  return out.reshape(*operands.batch_shape, operands.m, operands.n)


def _padded_k(problem: Operands, step_k: int, fmt: Format) -> Operands:
  """Zeros to whole steps of k: a copy, but only where k is no multiple of 64 or 128."""
  missing = -problem.k % step_k
  if not missing:
    return problem

  def pad(a: Any, by: int, axis: int = -1) -> Any:
    widths = [(0, 0)] * 3
    widths[axis] = (0, by)
    return jnp.pad(a, widths)

  packed = problem.scales is not None
  (_, of_x), (_, of_w) = problem.axes("x"), problem.axes("w")
  return Operands(
    pad(problem.x, missing, of_x),
    pad(problem.w, missing // fmt.codes_per_word if packed else missing, of_w),
    pad(problem.scales, missing // fmt.group_size) if packed else None,
    problem.global_scale_x,
    problem.global_scale_w,
    problem.transposed,
  )
