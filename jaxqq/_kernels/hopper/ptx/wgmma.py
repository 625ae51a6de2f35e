"""`wgmma`, the tensor cores' instruction: the product of one step of k, begun and waited for apart.

Mosaic's accumulators start as zeros that the tensor cores add to. Where sums are taken out after
every step, setting 64 registers a thread to zero costs half as much as adding them up. The
instruction can also ignore what its registers hold, and give parts of a step sums of their own.

ptxas 13.0 may move an addition past a later `wgmma` that writes to the register it reads: it did so
where totals were zeros, and the sums were garbage. It moves nothing past a branch, even one that is
never taken. Whoever changes this file counts the HGMMA in the SASS.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jaxlib.mlir import ir

from jaxqq._kernels.hopper.ptx import registers
from jaxqq._kernels.hopper.ptx.interpreter import finish_loads, interpreting
from jaxqq._kernels.hopper.ptx.layouts import ROWS
from jaxqq._kernels.hopper.ptx.named_barriers import BOTH, COUNT, own_and_other
from jaxqq._kernels.hopper.tiles import TILE_ROWS

STEP_BYTES = 128  # of k: a row of swizzled shared memory
_INSTRUCTION_BYTES = 32  # of k
_INSTRUCTIONS = STEP_BYTES // _INSTRUCTION_BYTES
PROMOTED_ROWS = 64  # of the right operand, that `add_promoted` multiplies at a time
_PTX_TYPES = {"float8_e4m3fn": "e4m3", "float16": "f16", "bfloat16": "bf16"}


def begin(
  a: Any,
  b: Any,
  transforms: tuple[Any, ...],
  dtype: Any,
  *,
  sums: jax.Array | None = None,
  parts: int = 1,
  a_transforms: tuple[Any, ...] | None = None,
  of_b: tuple[int, int] | None = None,
) -> list[jax.Array]:
  """Begins a b^T over one step: `finish` waits for it, before that nothing may read it.

  Args:
    a: (64, 128 bytes): a reference to shared memory, or an array in registers, as the tensor cores
      have it (WGMMA_8BIT or WGMMA).
    b: (n, 128 bytes), in shared memory.
    transforms: of the references, with a swizzle of 128 bytes.
    dtype: of the numbers in a and b: float8_e4m3fn, float16 or bfloat16.
    sums: float32 (64, n) in the layout WGMMA, to which the one part is added; None for zeros.
    parts: 1, 2 or 4 of the step along k, each summed up for itself.
    a_transforms: of a, if they are others.
    of_b: where b is several such, one after the other: which of them, and how many of its rows.
      Then one descriptor serves for all.

  Returns:
    as many float32 (64, n) in the layout WGMMA.
  """
  if interpreting():
    b = b if of_b is None else b.at[of_b[0], pl.ds(0, of_b[1])]
    return _begin_interpreted(a, b, sums, parts)
  which, n = (0, b.shape[0]) if of_b is None else of_b
  before = () if sums is None else (sums,)

  @plgpu.inline_mgpu(
    arg_types=(
      *_operand_types(a, transforms, a_transforms, dtype),
      *[plgpu.Layout.WGMMA] * len(before),
    ),
    return_type=[_sums_type(n)] * parts,
  )
  def multiply(ctx: Any, a: Any, b: Any, *before: Any) -> Any:
    del ctx
    values = registers.floats(before[0]) if before else []
    offset = which and which * _bytes_apart(b, 0)
    sums = _multiply(values, _left(a), _descriptor(b), n, dtype, parts, offset)
    return registers.as_arrays(sums, n)

  return multiply(a, b, *before)


def finish(
  sums: list[jax.Array],
  in_use: jax.Array | None = None,
  ready: jax.Array | None = None,
  *,
  at_end: bool = True,
) -> list[jax.Array]:
  """The sums that were begun: all are done.

  Args:
    sums: of `begin`.
    in_use: the left operand in registers, which stays in them until then.
    ready: another one, computed before this waits.
    at_end: whether it is the end of a loop's body, or before additions. There ptxas would have
      arithmetic wait for the tensor cores, but moves nothing past a branch, even one never taken.
  """
  if interpreting():
    finish_loads()
    return sums
  n = sums[0].shape[1]
  operands = [a for a in (in_use, ready) if a is not None]

  @plgpu.inline_mgpu(
    arg_types=[plgpu.Layout.WGMMA] * len(sums) + [_layout(a.dtype) for a in operands],
    return_type=[_sums_type(n)] * len(sums),
  )
  def wait(ctx: Any, *args: Any) -> Any:
    del ctx
    values = [value for array in args[: len(sums)] for value in registers.floats(array)]
    words = [word for array in args[len(sums) :] for word in registers.words(array)]
    text = "wgmma.wait_group.sync.aligned 0;"
    if ready is not None and at_end:
      # No launch has such a grid. Its size costs nothing to read, unlike a special register.
      never = "mov.u32 t, %nctaid.z; setp.eq.u32 never, t, 54321; @never trap;"
      text = f"{{ .reg .b32 t; .reg .pred never; {never} }}{text}"
    tied = [str(i) for i in range(len(values))]
    constraints = ",".join(["=f"] * len(values) + tied + ["r"] * len(words))
    results = registers.asm_of_floats(text, values + words, constraints, len(values))
    return registers.as_arrays(results, n)

  return wait(*sums, *operands)


def add_promoted(
  totals: jax.Array,
  a: jax.Array,
  b: Any,
  warpgroup: Any,
  transforms: tuple[Any, ...],
  dtype: Any,
) -> jax.Array:
  """totals + a b^T over one step, by two warpgroups in ping-pong: added outside the tensor cores.

  With the left operand in registers a warpgroup cannot run ahead: it passes a wgmma only when the
  tensor cores are about to begin it. So this goes part by part of b's rows, with two parts under
  way, and is one block, which no compiler puts in another order:

      tensor cores    | part 0 | part 1 | part 2 | part 3 | part 0 of the other warpgroup | ...
      this warpgroup  | begin 0, 1 | add 0, begin 2 | add 1, begin 3, arrive | add 2 | add 3

  A branch that is never taken follows every part's additions, for the reason at the head of this
  file.

  Args:
    totals: float32 (64, n) in the layout WGMMA, n a multiple of PROMOTED_ROWS.
    a: (64, 128 bytes), in registers.
    b: (n, 128 bytes), in shared memory.
    warpgroup: int32, 0 or 1.
    transforms, dtype: as of `begin`.
  """
  if interpreting():
    (sums,) = finish(_begin_interpreted(a, b, None, 1))
    return totals + sums

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.Layout.WGMMA,
      _layout(dtype),
      plgpu.RefType(transforms),
      plgpu.Layout.WG_SPLAT,
    ),
    return_type=_sums_type(totals.shape[1]),
  )
  def add(ctx: Any, totals: Any, a: Any, b: Any, warpgroup: Any) -> Any:
    del ctx
    operands = [*registers.words(a), _descriptor(b), *own_and_other(warpgroup)]
    part_bytes = PROMOTED_ROWS // TILE_ROWS * tile_bytes(b)
    sums = _add_promoted(registers.floats(totals), operands, part_bytes, dtype)
    return registers.as_arrays(sums, totals.shape[1])[0]

  return add(totals, a, b, warpgroup)


def zeros(n: int) -> jax.Array:
  """float32 (64, n) as sums are."""
  return plgpu.layout_cast(jnp.zeros((ROWS, n), jnp.float32), plgpu.Layout.WGMMA)


def _operand_types(
  a: Any, transforms: tuple[Any, ...], a_transforms: tuple[Any, ...] | None, dtype: Any
) -> tuple[Any, Any]:
  of_a = plgpu.RefType(transforms if a_transforms is None else a_transforms)
  return (_layout(dtype) if isinstance(a, jax.Array) else of_a, plgpu.RefType(transforms))


def _layout(dtype: Any) -> Any:
  return plgpu.Layout.WGMMA_8BIT if jnp.dtype(dtype).itemsize == 1 else plgpu.Layout.WGMMA


def _sums_type(n: int) -> Any:
  return plgpu.ShapeDtypeStruct((ROWS, n), np.dtype(np.float32), layout=plgpu.Layout.WGMMA)


# For the interpreter


def _begin_interpreted(a: Any, b: Any, sums: Any, parts: int) -> list[jax.Array]:
  a, b = (_numbers(operand[...]).reshape(operand.shape[0], parts, -1) for operand in (a, b))
  products = [jnp.dot(a[:, i], b[:, i].T, precision=lax.Precision.HIGHEST) for i in range(parts)]
  return products if sums is None else [sums + products[0]]


def _numbers(a: Any) -> Any:
  """float32, of numbers or of words of four e4m3 numbers."""
  if a.dtype != jnp.uint32:
    return a.astype(jnp.float32)
  shifts = lax.broadcasted_iota(jnp.uint32, (1, 1, 4), 2) * np.uint32(8)
  codes = ((a[..., None] >> shifts) & np.uint32(0xFF)).astype(jnp.uint8)
  values = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
  return values.reshape(a.shape[0], -1)


# On MLIR values


def _multiply(
  before: list[Any], left: list[Any], right: Any, n: int, dtype: Any, parts: int, offset: int
) -> list[Any]:
  """The instructions of one step, which are on their way when this is past.

  The right operand begins `offset` bytes behind its descriptor.
  """
  a_sum = n // 2
  outputs = a_sum * parts
  first_left = outputs + len(before)
  names = [f"${first_left + i}" for i in range(len(left))]
  lines = ["wgmma.fence.sync.aligned;"]
  for i in range(_INSTRUCTIONS):
    part, index = divmod(i, _INSTRUCTIONS // parts)
    sums = [f"${part * a_sum + j}" for j in range(a_sum)]
    add = bool(before or index)
    right_name = f"${first_left + len(left)}"
    lines += _instruction(i, sums, names, right_name, dtype, offset, add=add)
  lines.append("wgmma.commit_group.sync.aligned;")
  tied = [str(i) for i in range(len(before))]
  constraints = ["=f"] * outputs + tied + ["l" if len(left) == 1 else "r"] * len(left) + ["l"]
  operands = [*before, *left, right]
  return registers.asm_of_floats(_block(lines), operands, ",".join(constraints), outputs)


def _add_promoted(totals: list[Any], operands: list[Any], part_bytes: int, dtype: Any) -> list[Any]:
  """As `add_promoted` draws it; from a part of the right operand to the next are `part_bytes`.

  The operands are the words of the left one, the descriptor of the right one, and both barriers.
  """
  count, part_sums = len(totals), PROMOTED_ROWS // 2
  parts = count // part_sums
  *names, right, own_barrier, other_barrier = (f"${2 * count + i}" for i in range(len(operands)))
  lines = [f"setp.ge.u32 never, {own_barrier}, {COUNT};", f"bar.sync {own_barrier}, {BOTH};"]

  def sums_of(part: int) -> list[str]:
    return [f"sum{part % 2 * part_sums + j}" for j in range(part_sums)]

  def begin(part: int) -> None:
    lines.append("wgmma.fence.sync.aligned;")
    offset = part * part_bytes
    for i in range(_INSTRUCTIONS):
      lines.extend(_instruction(i, sums_of(part), names, right, dtype, offset, add=i > 0))
    lines.append("wgmma.commit_group.sync.aligned;")
    if part == parts - 1:
      lines.append(f"bar.arrive {other_barrier}, {BOTH};")

  def add(part: int, younger: int) -> None:
    lines.append(f"wgmma.wait_group.sync.aligned {younger};")
    for j, each in enumerate(sums_of(part)):
      total = f"${part * part_sums + j}"
      lines.append(f"add.rn.f32 {total}, {total}, {each};")
    lines.append("@never trap;")

  begin(0)
  for part in range(1, parts):
    begin(part)
    add(part - 1, younger=1)
  add(parts - 1, younger=0)
  tied = [str(i) for i in range(count)]
  constraints = ["=f"] * count + tied + ["r"] * len(names) + ["l", "r", "r"]
  text = _block(lines, f".reg .pred never; .reg .f32 sum<{2 * part_sums}>;")
  return registers.asm_of_floats(text, [*totals, *operands], ",".join(constraints), count)


def _instruction(
  i: int,
  sums: list[str],
  left: list[str],
  right: str,
  dtype: Any,
  offset: int = 0,
  *,
  add: bool,
) -> list[str]:
  """Instruction i of a step, (sums +) its part of k; the right operand begins `offset` bytes on."""
  n = 2 * len(sums)
  shared, fp8 = len(left) == 1, jnp.dtype(dtype).itemsize == 1
  along_k = i * _INSTRUCTION_BYTES
  # Descriptors count in 16 bytes.
  lines = [f"add.s64 b, {right}, {(offset + along_k) >> 4};"]
  if shared:
    lines.append(f"add.s64 a, {left[0]}, {along_k >> 4};")
  operand = "a" if shared else "{" + ", ".join(left[4 * i : 4 * i + 4]) + "}"
  # Scales of 1 and, of 16 bit operands in shared memory, no transposition.
  flags = ", 1, 1" + ("" if fp8 else ", 0, 0" if shared else ", 0")
  ptx_type = _PTX_TYPES[jnp.dtype(dtype).name]
  lines.append(
    f"wgmma.mma_async.sync.aligned.m64n{n}k{32 if fp8 else 16}.f32.{ptx_type}.{ptx_type} "
    f"{{{', '.join(sums)}}}, {operand}, b, {'yes' if add else 'no'}{flags};"
  )
  return lines


def _block(lines: list[str], declarations: str = "") -> str:
  return """{
    .reg .pred yes, no;
    .reg .b64 a, b;
    DECLARATIONS
    setp.eq.u32 yes, 0, 0;
    setp.ne.u32 no, 0, 0;
    BODY
  }""".replace("DECLARATIONS", declarations).replace("BODY", "\n".join(lines))


def _left(a: Any) -> list[Any]:
  """The words in registers, or the one descriptor of a reference."""
  return registers.words(a) if isinstance(a, mgpu.FragmentedArray) else [_descriptor(a)]


def _descriptor(ref: Any) -> Any:
  """Of rows in tiles of 8 by 128 bytes; from 8 rows to the next it may be any distance.

  Or of rows that are 128 bytes apart, in no tiles (`layouts.row_transforms`).
  """
  return mma_utils.encode_descriptor(
    ref, leading_byte_offset=0, stride_byte_offset=tile_bytes(ref), swizzle=STEP_BYTES
  )


def tile_bytes(ref: Any) -> int:
  """Bytes from 8 rows to the next 8."""
  rank = ir.MemRefType(ref.type).rank
  rows = TILE_ROWS if rank <= 3 else 1  # a stride is from one row, or tile, to the next
  return rows * _bytes_apart(ref, (rank - 2) % 2)


def _bytes_apart(ref: Any, axis: int) -> int:
  """From one place along an axis to the next."""
  kind = ir.MemRefType(ref.type)
  strides, _ = kind.get_strides_and_offset()
  return int(strides[axis]) * int(mgpu.utils.bytewidth(kind.element_type))
