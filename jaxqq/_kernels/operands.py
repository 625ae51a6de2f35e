"""What the matrix kernels multiply: arrays quantized, but left as numbers, in one kernel each.

`exact_operand` gives 16 bit floats that hold code * scale, for 16 bit tensor cores, and
`fp8_operand` e4m3 codes under a scale a row, for those of fp8. `groups` says how the arrays
lie in registers and `codes` what is computed there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxqq import _rounding
from jaxqq._formats import Format
from jaxqq._kernels.amax import thread_amax_bits
from jaxqq._kernels.codes import (
  E4M3,
  amax_bits_of,
  exponents_of,
  finite_bits,
  inverse_power,
  power,
  rebasing_bits,
  scalar_of,
  scalars_of,
  scales_of,
  values_of,
)
from jaxqq._kernels.groups import (
  DEFAULT_CONFIG,
  VECTOR,
  WARPS,
  TuningConfig,
  View,
  by_blocks,
  load_elements,
  load_gmem,
  make_kernel,
  pad,
  per_group,
  store_gmem,
)

# Elements that a thread of `fp8_operand` holds side by side, 16 bytes of codes: two threads share a
# group, and compute its factors twice. With four, that was a third of all instructions. Of shorter
# rows a thread holds fewer, so that only those of less than 256 are padded.
_FP8_VECTOR = 16

_MATRIX = (8, 8)  # how the 64 elements lie that `interleave` permutes among themselves
_BLOCK = math.prod(_MATRIX)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["codes", "row_scales"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Fp8Operand:
  """An operand for fp8 tensor cores: x_hat = codes * row_scales, but for what rebasing loses."""

  codes: Any  # float8_e4m3fn (rows, k)
  row_scales: Any  # float32 (rows,), powers of two


def exact_operand(
  a: jax.Array,
  fmt: Format,
  global_scale: jax.Array | None = None,
  *,
  dtype: Any = jnp.bfloat16,
  interleave: bool = False,
  rows: int | None = None,
  config: TuningConfig = DEFAULT_CONFIG,
) -> jax.Array:
  """What is left of `a` after quantization, without its global scale: code * scale.

  bfloat16 holds it exactly, down to its smallest subnormal, 2**-133. float16 holds what has float
  scales: 6 * 448 down to 0.5 * 2**-9.

  Args:
    a: float32, float16 or bfloat16, (rows, k).
    fmt: the format.
    global_scale: None, or a float32 scalar.
    dtype: bfloat16 or float16.
    interleave: within every 64 of k, put k = 8 * j + i at 8 * i + j. The caller pads: k is a
      multiple of 64, any number of rows will do.
    rows: how many the result has, None for those of `a`: further ones are not written.

  Returns:
    dtype (rows, k).
  """
  check_dtype(dtype, fmt)
  k = a.shape[1]
  rows = a.shape[0] if rows is None else rows
  entry = _BLOCK if interleave else fmt.group_size
  lanes = fmt.group_size // VECTOR
  view = View(_BLOCK // fmt.group_size, lanes, VECTOR) if interleave else View(lanes, VECTOR)
  blocks = a.reshape(-1, *view.minor)
  body = _interleaved_kernel if interleave else _exact_kernel
  (out,) = by_blocks(
    functools.partial(body, fmt=fmt, view=view),
    (blocks,),
    (jax.ShapeDtypeStruct(_MATRIX if interleave else view.minor, dtype),),
    view,
    config,
    scalars_of(global_scale),
    staging=jax.ShapeDtypeStruct(_MATRIX, dtype) if interleave else None,
    entries=rows * k // entry,
  )
  return out.reshape(rows, k)


def fp8_operand(a: jax.Array, fmt: Format, config: TuningConfig = DEFAULT_CONFIG) -> Fp8Operand:
  """Quantizes rows of `a` to e4m3 codes under one power of two a row: rebased.

  With e_g the groups' exponents (section 2 of the specification) and E their maximum in the row,
  codes are multiplied by 2**(e_g - E) and rounded to e4m3, to nearest even. That is exact down to
  e4m3's normal range, 2**-6; below, an element is off by up to 2**-10, and one below 2**-10 becomes
  zero, all in units of 2**(E - 127), of which the row's largest element has 224 to 448. Groups with
  a NaN or an infinity become NaN and do not count for E.

  Args:
    a: float32, float16 or bfloat16, (rows, k).
    fmt: a format of e4m3 elements and power of two scales.
  """
  check_fp8(fmt)
  grouped, view = fp8_groups(a, fmt)
  rows = a.shape[0]

  def kernel(*refs: Any) -> None:
    fp8_row(lax.axis_index("step"), *refs, fmt=fmt, view=view, config=config)

  run = make_kernel(
    kernel,
    grid=(rows,),
    out_type=(
      jax.ShapeDtypeStruct(grouped.shape, E4M3),
      jax.ShapeDtypeStruct((rows,), jnp.float32),
    ),
  )
  codes, row_scales = run(grouped)
  return Fp8Operand(fp8_codes(codes, a.shape), row_scales)


def fp8_groups(a: jax.Array, fmt: Format) -> tuple[jax.Array, View]:
  """Rows (rows, k) as `fp8_row` takes them, (rows, groups, lanes, vector), zeros behind."""
  groups = a.shape[1] // fmt.group_size
  # A thread has at least two elements: conversions go in pairs.
  vector = min(_FP8_VECTOR, max(2, 1 << (groups.bit_length() - 1) >> 2))
  view = View(fmt.group_size // vector, vector)
  return pad(a.reshape(a.shape[0], -1, *view.minor), 1, view.tile), view


def fp8_codes(codes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """What `fp8_row` wrote, in the shape of the rows."""
  return codes.reshape(shape[0], -1)[:, : shape[1]]


def check_fp8(fmt: Format) -> None:
  if fmt.element != E4M3 or not fmt.scale_is_power_of_two:
    raise NotImplementedError(
      f"fp8_operand: {fmt.mode} has no e4m3 elements under powers of two for fp8 tensor cores."
    )


def exact_dtype(fmt: Format) -> Any:
  """The 16 bit floats that hold code * scale exactly."""
  return jnp.dtype(jnp.bfloat16 if fmt.scale_is_power_of_two else jnp.float16)


def check_dtype(dtype: Any, fmt: Format) -> None:
  if fmt.scale_is_power_of_two and jnp.dtype(dtype) == jnp.float16:
    raise NotImplementedError(
      f"exact_operand: float16 does not have the exponents of {fmt.mode}'s scales; bfloat16 does."
    )


def _exact_kernel(rows: Any, a_ref: Any, *refs: Any, fmt: Format, view: View) -> None:
  *global_scale, out_ref = refs
  a = load_elements(a_ref, rows, view)
  scales = scales_of(amax_bits_of(a), fmt, scalar_of(global_scale), a_ref.dtype)
  out_ref[rows] = values_of(a, scales, fmt).astype(out_ref.dtype)


def _interleaved_kernel(rows: Any, a_ref: Any, *refs: Any, fmt: Format, view: View) -> None:
  """As `_exact_kernel`, then every block of 8 by 8 is transposed on its way out.

  The blocks go to shared memory as they are and come back through ldmatrix, which transposes
  8 by 8 matrices of 16 bits: a warp then holds a block, and a thread two neighbours of a row.
  """
  *global_scale, out_ref, staging_ref = refs
  a = load_elements(a_ref, rows, view)
  scales = scales_of(amax_bits_of(a), fmt, scalar_of(global_scale), a_ref.dtype)
  _stage(values_of(a, scales, fmt).astype(staging_ref.dtype), staging_ref)
  plgpu.commit_smem()
  tiling = plgpu.Tiling(((WARPS, *_MATRIX), (2,)))
  layout = plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
  out_ref[rows] = plgpu.load(staging_ref.transpose((0, 2, 1)), layout=layout)


def _stage(values: jax.Array, staging_ref: Any) -> None:
  """staging_ref[...] = values. The interpreter cannot reshape a reference: tests have a twin."""
  staging_ref.reshape(values.shape)[...] = values


def fp8_row(
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
    return jnp.max(thread_amax_bits(a, view), axis=-1)

  def write_row(largest: jax.Array) -> jax.Array:
    top = exponents_of(largest, fmt)
    row_scales_ref[pl.ds(row, 1)] = power(jnp.full((1,), top))
    return top

  def write(start: Any, a: jax.Array, amax_bits: jax.Array, top: jax.Array) -> None:
    codes = rebased_codes(a.astype(jnp.float32), amax_bits, top, fmt)
    store_gmem(codes_row.at[pl.ds(start, a.shape[0])], codes)

  if row_bytes <= config.resident_bytes:
    chunks = _whole_and_rest(groups, view.tile)
    loaded = [load(start, size) for start, size in chunks]
    amax_bits = [amax_bits_of(a) for a in loaded]
    top = write_row(functools.reduce(jnp.maximum, (jnp.max(finite_bits(b)) for b in amax_bits)))
    for (start, _), a, bits in zip(chunks, loaded, amax_bits, strict=True):
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
  exponents = exponents_of(amax_bits, fmt)
  finite = amax_bits < _rounding.INFINITY_BITS
  factor = jnp.where(finite, inverse_power(exponents), jnp.float32(np.nan))
  codes = (a * per_group(factor, a)).astype(E4M3)
  rebasing = lax.bitcast_convert_type(rebasing_bits(top - exponents).astype(jnp.int16), jnp.float16)
  return (codes.astype(jnp.float16) * per_group(rebasing, a)).astype(E4M3)
