"""The quantizers of a transpose that is never written: groups run down the columns.

`quantize_transpose` and the `..._of_transpose` operands take (k, rows) and give what `quantize` and
the operands of `exact` and `rebased` give for its transpose, bit for bit. A CTA has one tile, 64 of
k by 128 columns:

    load      a thread has one column: 64 loads, neighbouring lanes side by side in memory
    turn      its 64 numbers become rows of groups, by a change of names: no instruction
    quantize  `codes`, as for rows, with whole groups in one thread: no shuffles
    store     to shared memory, from where the TMA writes rows of 32 to 128 bytes

Scales leave directly, those of one row and tile in one number. The last tile along the columns
starts early enough to be a whole one, and writes some of the same values again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._formats import Format
from jaxqq._kernels.hopper.ptx.layouts import ONE_EACH, WARP, WARPS, tile_transforms
from jaxqq._kernels.hopper.ptx.reshape import regroup
from jaxqq._kernels.hopper.ptx.rotation import rotated_in_thread
from jaxqq._kernels.hopper.ptx.rounding import over_lanes
from jaxqq._kernels.hopper.quantize.codes import (
  Scales,
  amax_bits_of,
  finite_bits,
  power,
  values_of,
  words_of,
)
from jaxqq._kernels.hopper.quantize.elements import E4M3
from jaxqq._kernels.hopper.quantize.exact import check_dtype
from jaxqq._kernels.hopper.quantize.groups import (
  VECTOR,
  load_gmem,
  make_kernel,
  pad,
  per_group,
  store_gmem,
)
from jaxqq._kernels.hopper.quantize.parts import (
  NEAREST,
  Given,
  Parts,
  amax_bits_of_parts,
  random_of_columns,
)
from jaxqq._kernels.hopper.quantize.rebased import (
  RebasedOperand,
  check_rebasable,
  rebased_codes,
)
from jaxqq._quantize import scales_of_power_of_two

TILE_K = 64
TILE_ROWS = WARPS * WARP  # columns of what is loaded, rows of what is stored


def exact_operand_of_transpose(
  a: jax.Array,
  fmt: Format,
  global_scale: jax.Array | None = None,
  *,
  dtype: Any = jnp.bfloat16,
  interleave: bool = False,
  parts: Parts = NEAREST,
  key: jax.Array | None = None,
  signs: jax.Array | None = None,
) -> jax.Array:
  """`exact_operand` of the transpose of `a`.

  Args:
    a: float32, float16 or bfloat16, (k, rows).
    fmt: the format.
    global_scale: None, or a float32 scalar.
    dtype: bfloat16 or float16.
    interleave: whether k is to be `layouts.interleaved`. The caller pads: it is a multiple of 64.
    parts, key, signs: as of `packed.quantize`, with a rotation of up to 64.

  Returns:
    dtype (rows, k).
  """
  check_dtype(dtype, fmt)
  k, rows = a.shape
  arrays, given = jax.tree.flatten(Given.of(fmt, parts, global_scale, key, signs))
  how = {"fmt": fmt, "dtype": a.dtype, "parts": parts, "given": given}
  (out,) = _by_tiles(
    functools.partial(_exact_kernel, interleave=interleave, **how),
    "exact_operand",
    a,
    tuple(arrays),
    staged=jax.ShapeDtypeStruct((TILE_K,), dtype),
    multiple=_multiple(fmt, parts),
  )
  return out[:rows, :k]


def quantize_transpose(
  a: jax.Array,
  fmt: Format,
  global_scale: jax.Array | None = None,
  *,
  parts: Parts = NEAREST,
  key: jax.Array | None = None,
  signs: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`quantize` of the transpose of `a`.

  Args:
    a: float32, float16 or bfloat16, (k, rows).
    fmt: the format.
    global_scale: None, or a float32 scalar.
    parts, key, signs: as of `packed.quantize`, with a rotation of up to 64.

  Returns:
    packed: uint32 (rows, k * bits / 32).
    scales: uint8 (rows, k / group_size).
  """
  k, rows = a.shape
  arrays, given = jax.tree.flatten(Given.of(fmt, parts, global_scale, key, signs))
  packed, scales = _by_tiles(
    functools.partial(_quantize_kernel, fmt=fmt, dtype=a.dtype, parts=parts, given=given),
    "quantize",
    a,
    tuple(arrays),
    staged=jax.ShapeDtypeStruct((TILE_K // fmt.codes_per_word,), jnp.uint32),
    direct=_unsigned(TILE_K // fmt.group_size),
    multiple=_multiple(fmt, parts),
  )
  scales = _bytes_of(scales).reshape(scales.shape[0], -1)
  return packed[:rows, : k // fmt.codes_per_word], scales[:rows, : k // fmt.group_size]


def amax_by_tiles(a: jax.Array, fmt: Format, parts: Parts, given: Given) -> jax.Array:
  """uint32 (rows, tiles): bits of the largest magnitude of 64 neighbours down a column, rotated.

  Args:
    a: float32, float16 or bfloat16, (k, rows).
    fmt: of whose groups it is taken first.
    parts, given: the rotation, of up to 64.
  """
  arrays, structure = jax.tree.flatten(given)
  body = functools.partial(_amax_kernel, fmt=fmt, parts=parts, given=structure)
  (found,) = _by_tiles(body, "rotated_amax", a, tuple(arrays), direct=jnp.uint32)
  return found


def rebased_operand_of_transpose(a: jax.Array, fmt: Format) -> RebasedOperand:
  """`rebased_operand` of the transpose of `a`, which is read twice: (k, rows).

  One kernel finds the largest exponent of each row within each tile. A second one, knowing those
  of the rows, writes the codes.
  """
  check_rebasable(fmt)
  k, rows = a.shape
  (found,) = _by_tiles(
    functools.partial(_top_kernel, fmt=fmt), "row_exponents", a, (), direct=_unsigned(1)
  )
  top = jnp.max(found, axis=1).astype(jnp.int32)
  (codes,) = _by_tiles(
    functools.partial(_rebased_kernel, fmt=fmt),
    "rebased_operand",
    a,
    (top,),
    staged=jax.ShapeDtypeStruct((TILE_K,), E4M3),
  )
  return RebasedOperand(codes[:rows, :k], power(top[:rows]))


# Launching.


def _by_tiles(
  body: Callable[..., None],
  name: str,
  a: jax.Array,
  operands: tuple[jax.Array, ...],
  *,
  staged: jax.ShapeDtypeStruct | None = None,
  direct: Any = None,
  multiple: int = 8,
) -> list[jax.Array]:
  """Runs body(numbers, tile, here, *refs) on every tile of `a`.

  multiple: of 8; a tile begins at one of its rows.

  The results are, of the padded `a`: rows of one `staged` a tile, which the body writes to shared
  memory, its last reference; and one number a row and tile, of the dtype `direct`, which it
  writes to [here, tile].
  """
  a = pad(a, 1, TILE_ROWS)
  # Whole steps of k, and rows of eights: what the TMA moves.
  a = jnp.pad(a, ((0, -a.shape[0] % TILE_K), (0, -a.shape[1] % multiple)))
  k, rows = a.shape
  tiles = k // TILE_K
  types = [jax.ShapeDtypeStruct((rows, tiles), direct)] if direct else []
  scratch = []
  if staged:
    (columns,) = staged.shape
    types.insert(0, jax.ShapeDtypeStruct((rows, tiles * columns), staged.dtype))
    transforms = tile_transforms(columns, staged.dtype)
    scratch = [plgpu.SMEM((TILE_ROWS, columns), staged.dtype, transforms=transforms)]

  def kernel(a_ref: Any, *refs: Any) -> None:
    step = lax.axis_index("step")
    tile = lax.rem(step, jnp.int32(tiles))
    start = jnp.minimum(lax.div(step, jnp.int32(tiles)) * TILE_ROWS, rows - TILE_ROWS)
    here = pl.ds(pl.multiple_of(start, 8), TILE_ROWS)
    numbers = load_gmem(a_ref.at[pl.ds(tile * TILE_K, TILE_K), here], _COLUMNS)
    numbers = numbers.astype(jnp.float32)
    if not staged:
      return body(numbers, tile, here, *refs)
    *refs, staging_ref = refs  # type: ignore[assignment]
    out_ref = refs.pop(len(operands))  # type: ignore[attr-defined]
    body(numbers, tile, here, *refs, staging_ref)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging_ref, out_ref.at[here, pl.ds(tile * columns, columns)])
    return plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  run = make_kernel(
    kernel,
    f"{name}_of_transpose",
    grid=(tiles * pl.cdiv(rows, TILE_ROWS),),
    out_type=tuple(types),
    scratch_types=tuple(scratch),
  )
  return list(run(a, *operands))


def _multiple(fmt: Format, parts: Parts) -> int:
  """At which rows tiles begin: those of whole squares."""
  return fmt.group_size if parts.is_square else 8


def _unsigned(num_bytes: int) -> Any:
  return {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[num_bytes]


def _bytes_of(a: jax.Array) -> jax.Array:
  """uint8 (..., bytes)."""
  return lax.bitcast_convert_type(a, jnp.uint8)


# What a thread has. Its numbers are its registers in order, whatever shape they are given.

# (64, 128): a column.
_COLUMNS = ONE_EACH


def _row_layout(*minor: int) -> Any:
  """(128, *minor): a row, in vectors of minor[-1]."""
  tiling = plgpu.Tiling(((TILE_ROWS, *minor), (WARP, *minor)))
  rank = 1 + len(minor)
  return plgpu.Layout.TILED(tiling, warp_dims=(-2 * rank,), lane_dims=(-rank,), vector_dim=-1)


def _staged_layout(columns: int, length: int) -> Any:
  """(128, columns): a row, in vectors of `length`."""
  tiling = plgpu.Tiling(((TILE_ROWS, columns), (WARP, columns), (length,)))
  return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3,), vector_dim=-1)


def _grouped(numbers: jax.Array, *minor: int) -> tuple[jax.Array, Any]:
  """(128, *minor) of the columns, and its layout."""
  layout = _row_layout(*minor)
  return regroup(numbers, _COLUMNS, (TILE_ROWS, *minor), layout), layout


def _joined(byte: jax.Array) -> jax.Array:
  """The bytes (128, groups) of a row as one number."""
  iota = lax.broadcasted_iota(jnp.int32, byte.shape, 1)
  return jnp.sum(byte << (iota * 8), axis=-1, dtype=jnp.int32)


# The kernels. Their numbers are (64, 128), a thread's in one column.


def _group_shape(fmt: Format) -> tuple[int, int, int]:
  return TILE_K // fmt.group_size, fmt.group_size // VECTOR, VECTOR


def _exact_kernel(
  numbers: jax.Array,
  tile: Any,
  here: Any,
  *refs: Any,
  fmt: Format,
  dtype: Any,
  parts: Parts,
  given: Any,
  interleave: bool,
) -> None:
  *arrays, staging_ref = refs
  own = jax.tree.unflatten(given, arrays)
  place = tile, here.start
  a, scales, random, layout = _scaled(numbers, _group_shape(fmt), place, own, fmt, dtype, parts)
  target = _staged_layout(TILE_K, VECTOR)
  values = values_of(a, scales, fmt, layout, random)
  values = regroup(values, layout, (TILE_ROWS, TILE_K), target, interleave)
  staging_ref[...] = values.astype(staging_ref.dtype)


def _quantize_kernel(
  numbers: jax.Array,
  tile: Any,
  here: Any,
  *refs: Any,
  fmt: Format,
  dtype: Any,
  parts: Parts,
  given: Any,
) -> None:
  *arrays, scales_ref, staging_ref = refs
  own = jax.tree.unflatten(given, arrays)
  groups, words_a_group = TILE_K // fmt.group_size, fmt.group_size // fmt.codes_per_word
  shape = groups, words_a_group, fmt.codes_per_word
  a, scales, random, layout = _scaled(numbers, shape, (tile, here.start), own, fmt, dtype, parts)
  words = regroup(
    words_of(a, scales, fmt, layout, random),
    layout.reduce((3,)),
    staging_ref.shape,
    _staged_layout(staging_ref.shape[1], 4),
  )
  staging_ref[...] = lax.bitcast_convert_type(words, jnp.uint32)
  store_gmem(scales_ref.at[here, tile], _joined(scales.byte).astype(scales_ref.dtype))


def _scaled(
  numbers: jax.Array,
  minor: tuple[int, ...],
  place: tuple[Any, Any],  # the tile, and its first row
  given: Given,
  fmt: Format,
  dtype: Any,
  parts: Parts,
) -> tuple[jax.Array, Scales, jax.Array | None, Any]:
  """As `parts.load_scaled`, and the layout of elements."""
  a, amax_bits, layout = _elements(numbers, minor, given, parts)
  of_groups = layout.reduce((2, 3))
  over_block = _over_block(fmt, parts, of_groups)
  scales = given.scales(a, amax_bits, fmt, parts, dtype, of_groups, layout, over_block)
  return a, scales, random_of_columns(a.shape, *place, given, parts, layout), layout


def _over_block(fmt: Format, parts: Parts, layout: Any) -> Callable[[jax.Array], jax.Array]:
  """int32 (128, groups, parts) of threads to the sums of blocks, (128, groups) in the layout."""

  def total(values: jax.Array) -> jax.Array:
    values = jnp.sum(values, axis=-1, dtype=jnp.int32)
    return over_lanes(values, fmt.group_size, layout, "add") if parts.is_square else values

  return total


def _elements(
  numbers: jax.Array, minor: tuple[int, ...], given: Given, parts: Parts
) -> tuple[jax.Array, jax.Array, Any]:
  """float32 elements (128, *minor), rotated, the bits of the amax of groups, and the layout."""
  a, layout = _grouped(numbers, *minor)
  if parts.rotation is not None:
    a = rotated_in_thread(a, [given.signs[i] for i in range(parts.rotation)], layout)
  bits = amax_bits_of_parts(a, parts, layout)
  if parts.is_square:
    group_size = TILE_K // minor[0]
    bits = over_lanes(bits, group_size, layout.reduce((2, 3)), "max")
  return a.astype(jnp.float32), bits, layout


def _amax_kernel(
  numbers: jax.Array,
  tile: Any,
  here: Any,
  *refs: Any,
  fmt: Format,
  parts: Parts,
  given: Any,
) -> None:
  *arrays, found_ref = refs
  own = jax.tree.unflatten(given, arrays)
  _, bits, _ = _elements(numbers, _group_shape(fmt), own, parts)
  store_gmem(found_ref.at[here, tile], jnp.max(bits, axis=-1).astype(found_ref.dtype))


def _top_kernel(numbers: jax.Array, tile: Any, here: Any, found_ref: Any, *, fmt: Format) -> None:
  """The largest exponent of the groups that are finite."""
  a, _ = _grouped(numbers, *_group_shape(fmt))
  top = scales_of_power_of_two(jnp.max(finite_bits(amax_bits_of(a)), axis=-1), fmt)
  store_gmem(found_ref.at[here, tile], top.astype(found_ref.dtype))


def _rebased_kernel(
  numbers: jax.Array,
  tile: Any,
  here: Any,
  top_ref: Any,
  staging_ref: Any,
  *,
  fmt: Format,
) -> None:
  del tile
  a, layout = _grouped(numbers, *_group_shape(fmt))
  amax_bits = amax_bits_of(a)
  top = load_gmem(top_ref.at[here], layout.reduce((1, 2, 3)))
  codes = rebased_codes(a, amax_bits, per_group(top, amax_bits), fmt)
  staging_ref[...] = regroup(codes, layout, (TILE_ROWS, TILE_K), _staged_layout(TILE_K, VECTOR))
