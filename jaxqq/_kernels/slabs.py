"""out = x_hat w_hat^T from packed w, expanded a slab of rows at a time, for many rows of x.

Where packed w meets many tiles of x_hat, `packed_matmul` expands it anew for each of them. Here two
kernels take turns, and each number of w is expanded once:

    expand w[0:4096]  |  matmul -> out[:, 0:4096]  |  expand w[4096:8192]  |  matmul -> ...

- A slab is written to memory and read again, but is small enough to stay in the L2 cache, and the
  next one takes its place: there is never more of expanded w than `SLAB_BYTES`.
- Expanded, e4m3 codes stand under one scale a row, and are lowered to it as `lower_rows` says;
  those that must stay exact become 16 bit floats (`dequantize`).
- All slabs have the same size, so that the kernels are compiled once: the last one starts early
  enough to be a whole one, and some columns are computed twice.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector

from jaxqq._formats import Format
from jaxqq._kernels import matmul
from jaxqq._kernels.codes import E4M3
from jaxqq._kernels.groups import (
  DEFAULT_CONFIG,
  View,
  Window,
  by_blocks,
  load_gmem,
  per_group,
)
from jaxqq._kernels.lowered_scales import rebasing_half
from jaxqq._kernels.quantize import dequantize

# Of an H200's 50 MB of L2 cache. Measured: 16 MiB are 1 to 2% slower, 64 MiB no faster.
SLAB_BYTES = 32 << 20
ROWS = 128  # a slab has a multiple of them, and so has w: those of the largest tile

_WORDS = View(2, 4)  # of a group: 8 words of four codes
_CODES = View(2, 16)


def slab_matmul(
  x: jax.Array,  # (1, m, k) of float8_e4m3fn or, exact, bfloat16
  words: jax.Array,  # uint32 (1, n, k * bits / 32), n a multiple of ROWS
  scales: jax.Array,  # uint8 (1, n, k / group_size); for e4m3 x as `lower_rows` has them
  factors: jax.Array,  # as `matmul` takes them
  row_scales: tuple[jax.Array, jax.Array] | None,
  *,
  fmt: Format,
  out_dtype: Any,
  config: matmul.Config,
  interpret: Any = None,
) -> jax.Array:
  """(1, m, n), as `matmul` has it of expanded w."""
  m, n, k = x.shape[1], words.shape[1], x.shape[2]
  rows = slab_rows(n, k, x.dtype)
  out = jax.freeze(jax.empty_ref(matmul.out_type_of(1, m, n, out_dtype, config)))
  for start in range(0, n, rows):
    first = min(start, n - rows)
    # Two numbers that differ: an array of one constant XLA has a kernel fill.
    bounds = jnp.stack([jnp.int32(first), jnp.int32(first + rows)])
    # Else XLA might expand all slabs before it multiplies one.
    bounds, out = lax.optimization_barrier((bounds, out))
    out = _with_slab(
      out,
      Window(bounds, rows),
      (x, words, scales, factors, row_scales),
      fmt=fmt,
      config=config,
      interpret=interpret,
    )
  return out[:, :m, :n]


# Under a jit of its own it is traced and lowered once, not once for each slab.
@functools.partial(jax.jit, static_argnames=("fmt", "config", "interpret"))
def _with_slab(
  out: jax.Array, window: Window, operands: Any, *, fmt: Format, config: Any, interpret: Any
) -> jax.Array:
  """`out` with the columns of one slab."""
  x, words, scales, factors, row_scales = operands
  if x.dtype == E4M3:
    w = lowered_codes(words[0], scales[0], window)
  else:
    w = dequantize(words[0], scales[0], fmt, None, x.dtype, window=window)
  ref = jax.new_ref(out)
  matmul.matmul(
    x,
    w[None],
    factors,
    row_scales,
    out_dtype=out.dtype,
    config=config,
    interpret=interpret,
    columns_of=(window.first, ref),
  )
  return jax.freeze(ref)


def slab_rows(n: int, k: int, dtype: Any) -> int:
  """How many rows of w are expanded at a time, in slabs of about the same size."""
  most = max(SLAB_BYTES // (k * jnp.dtype(dtype).itemsize) // ROWS, 1)
  return pl.cdiv(n, pl.cdiv(n, most * ROWS) * ROWS) * ROWS


def lowered_codes(
  words: jax.Array,  # uint32 (n, k / 4)
  downs: jax.Array,  # uint8 (n, k / 32), of `lower_rows`
  window: Window,
) -> jax.Array:
  """float8_e4m3fn (rows, k): the codes lowered as the kernels for packed w lower them."""
  (out,) = by_blocks(
    _lower_kernel,
    (words.reshape(-1, *_WORDS.minor), downs.reshape(-1)),
    (jax.ShapeDtypeStruct(_CODES.minor, E4M3),),
    _WORDS,
    DEFAULT_CONFIG,
    entries=window.rows * downs.shape[1],
    window=window,
  )
  return out.reshape(window.rows, -1)


def _lower_kernel(rows: Any, words_ref: Any, downs_ref: Any, out_ref: Any) -> None:
  codes = as_codes(load_gmem(words_ref.at[rows], _WORDS.layout))
  downs = rebasing_half(load_gmem(downs_ref.at[rows], _CODES.reduced(1)).astype(jnp.uint16))
  out_ref[rows] = (codes.astype(jnp.float16) * per_group(downs, codes)).astype(E4M3)


def as_codes(words: jax.Array) -> jax.Array:
  """Words (groups, 2, 4) as codes (groups, 2, 16), in the same registers."""

  @plgpu.inline_mgpu(
    arg_types=(_WORDS.layout,),
    return_type=plgpu.ShapeDtypeStruct((words.shape[0], *_CODES.minor), E4M3, layout=_CODES.layout),
  )
  def in_registers(ctx: Any, words: Any) -> Any:
    del ctx
    layout = _CODES.layout.to_mgpu()
    four = ir.VectorType.get((16,), mgpu.utils.dtype_to_ir_type(E4M3))
    out = np.empty(layout.registers_shape((words.shape[0], *_CODES.minor)), dtype=object)
    out.flat[:] = [vector.bitcast(four, r) for r in words.registers.flat]
    return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

  return in_registers(words)


def as_codes_twin(words: jax.Array) -> jax.Array:
  """`as_codes` in array operations, for the interpreter."""
  codes = lax.bitcast_convert_type(words, jnp.uint8).reshape(words.shape[0], *_CODES.minor)
  return lax.bitcast_convert_type(codes, E4M3)
