"""The tensor cores' sums of one step, begun and waited for in two calls.

Mosaic's accumulators start as zeros that the tensor cores add to: where sums are taken out after
every step, setting 64 registers a thread to zero costs half as much as adding them up. The
instruction can also ignore what its registers hold, and give parts of a step sums of their own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

ROWS = 64  # of the left operand
STEP = 128  # bytes of k: a row of swizzled shared memory
_INSTRUCTION = 32  # bytes of k
_INSTRUCTIONS = STEP // _INSTRUCTION
PROMOTED_ROWS = 64  # of the right operand, that `add_promoted` has in a part
_BOTH = 2 * 128  # threads that meet at a turn
_BARRIERS = 16  # that the hardware has
_FIRST_TURN = 8  # of them; Mosaic has the first few
_PTX_TYPES = {"float8_e4m3fn": "e4m3", "float16": "f16", "bfloat16": "bf16"}


def begin(
  a: Any,
  b: Any,
  transforms: tuple[Any, ...],
  dtype: Any,
  *,
  sums: jax.Array | None = None,
  parts: int = 1,
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

  Returns:
    as many float32 (64, n) in the layout WGMMA.
  """
  n = b.shape[0]
  before = () if sums is None else (sums,)

  @plgpu.inline_mgpu(
    arg_types=(*_operand_types(a, transforms, dtype), *[plgpu.Layout.WGMMA] * len(before)),
    return_type=[_sums_type(n)] * parts,
  )
  def multiply(ctx: Any, a: Any, b: Any, *before: Any) -> Any:
    del ctx
    values = floats(before[0]) if before else []
    return as_arrays(_multiply(values, _left(a), _descriptor(b), n, dtype, parts), n)

  return multiply(a, b, *before)


def finish(
  sums: list[jax.Array], held: jax.Array | None = None, ready: jax.Array | None = None
) -> list[jax.Array]:
  """The sums that were begun: all are done.

  Args:
    sums: of `begin`.
    held: the left operand in registers, which stays in them until then.
    ready: another one, computed before this waits. The assembler (ptxas) would have arithmetic
      wait for the tensor cores, but moves nothing past a branch, even of one never taken.
  """
  n = sums[0].shape[1]
  operands = [a for a in (held, ready) if a is not None]

  @plgpu.inline_mgpu(
    arg_types=[plgpu.Layout.WGMMA] * len(sums) + [_layout(a.dtype) for a in operands],
    return_type=[_sums_type(n)] * len(sums),
  )
  def wait(ctx: Any, *args: Any) -> Any:
    del ctx
    values = [value for array in args[: len(sums)] for value in floats(array)]
    words = [word for array in args[len(sums) :] for word in _words(array)]
    asm = "wgmma.wait_group.sync.aligned 0;"
    if ready is not None:
      asm = f"{{ .reg .pred never; setp.ne.u32 never, ${2 * len(values)}, 0; @never trap; }}{asm}"
      words.insert(0, _zero())
    tied = [str(i) for i in range(len(values))]
    constraints = ["=f"] * len(values) + tied + ["r"] * len(words)
    return as_arrays(asm_of_floats(asm, values + words, ",".join(constraints), len(values)), n)

  return wait(*sums, *operands)


def add_promoted(
  totals: jax.Array,
  a: jax.Array,
  b: Any,
  warpgroup: Any,
  transforms: tuple[Any, ...],
  dtype: Any,
) -> jax.Array:
  """totals + a b^T over one step, by two warpgroups in turn: added outside of the tensor cores.

  A left operand in registers keeps its warpgroup from running ahead: it is past an instruction
  for the tensor cores when they are about to begin it. So this goes part by part of b's rows,
  with two parts under way, and is one block, which no compiler puts in another order:

      tensor cores    | part 0 | part 1 | part 2 | part 3 | part 0 of the other warpgroup | ...
      this warpgroup  | begin 0, 1 | add 0, begin 2 | add 1, begin 3, pass turn | add 2 | add 3

  Measured (mxfp8, m = 1024, n = k = 8192): 112 us. With one part under way 134, in parts of 128
  rows 117, of 32 rows 128, and with the turn passed at an earlier part, or never taken, 117 to 123.
  One part under way, no turns, and the next operand expanded piece by piece meanwhile: 142.

  A branch that is never taken follows every part's additions. Without it the assembler (ptxas
  13.0) moves additions of zero totals, which a single step has, past the multiplication that
  writes to the same registers two parts on: it takes those for other values, drops the first
  part's instructions, and the sums of 64 rows are garbage. It moves nothing past a branch.

  Args:
    totals: float32 (64, n) in the layout WGMMA, n a multiple of 2 * PROMOTED_ROWS.
    a: (64, 128 bytes), in registers.
    b: (n, 128 bytes), in shared memory.
    warpgroup: int32, 0 or 1.
    transforms, dtype: as of `begin`.
  """

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
    operands = [*_words(a), _descriptor(b), *_turns(warpgroup)]
    part_bytes = PROMOTED_ROWS // 8 * _tile_bytes(b)
    sums = _add_promoted(floats(totals), operands, part_bytes, dtype)
    return as_arrays(sums, totals.shape[1])[0]

  return add(totals, a, b, warpgroup)


def pass_turn(warpgroup: Any) -> None:
  """Lets the other of two warpgroups begin `add_promoted`, as the first one needs."""
  _at_turn("bar.arrive $1", warpgroup)


def take_turn(warpgroup: Any) -> None:
  """Waits for the turn that the other warpgroup has passed last."""
  _at_turn("bar.sync $0", warpgroup)


def _at_turn(instruction: str, warpgroup: Any) -> None:
  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,), return_type=None)
  def run(ctx: Any, warpgroup: Any) -> None:
    del ctx
    void = ir.Type.parse("!llvm.void")
    asm = f"{instruction}, {_BOTH};"
    llvm.inline_asm(void, _turns(warpgroup), asm, "r,r,~{memory}", has_side_effects=True)

  run(warpgroup)


def _operand_types(a: Any, transforms: tuple[Any, ...], dtype: Any) -> tuple[Any, Any]:
  reference = plgpu.RefType(transforms)
  return (_layout(dtype) if isinstance(a, jax.Array) else reference, reference)


def _layout(dtype: Any) -> Any:
  return plgpu.Layout.WGMMA_8BIT if jnp.dtype(dtype).itemsize == 1 else plgpu.Layout.WGMMA


def _sums_type(n: int) -> Any:
  return plgpu.ShapeDtypeStruct((ROWS, n), np.dtype(np.float32), layout=plgpu.Layout.WGMMA)


# On MLIR values


def _multiply(
  before: list[Any], left: list[Any], right: Any, n: int, dtype: Any, parts: int
) -> list[Any]:
  """The instructions of one step, which are on their way when this is past."""
  a_sum = n // 2
  outputs = a_sum * parts
  first_left = outputs + len(before)
  names = [f"${first_left + i}" for i in range(len(left))]
  lines = ["wgmma.fence.sync.aligned;"]
  for i in range(_INSTRUCTIONS):
    part, place = divmod(i, _INSTRUCTIONS // parts)
    sums = [f"${part * a_sum + j}" for j in range(a_sum)]
    add = bool(before or place)
    lines += _instruction(i, sums, names, f"${first_left + len(left)}", dtype, add=add)
  lines.append("wgmma.commit_group.sync.aligned;")
  tied = [str(i) for i in range(len(before))]
  constraints = ["=f"] * outputs + tied + ["l" if len(left) == 1 else "r"] * len(left) + ["l"]
  return asm_of_floats(_block(lines), [*before, *left, right], ",".join(constraints), outputs)


def _add_promoted(totals: list[Any], operands: list[Any], part_bytes: int, dtype: Any) -> list[Any]:
  """As `add_promoted` draws it; from a part of the right operand to the next are `part_bytes`.

  The operands are the words of the left one, the descriptor of the right one, and both turns.
  """
  count, held = len(totals), PROMOTED_ROWS // 2
  parts = count // held
  *names, right_name, own_turn, other_turn = (f"${2 * count + i}" for i in range(len(operands)))
  lines = [f"setp.ge.u32 never, {own_turn}, {_BARRIERS};", f"bar.sync {own_turn}, {_BOTH};"]

  def sums_of(part: int) -> list[str]:
    return [f"sum{part % 2 * held + j}" for j in range(held)]

  def begin(part: int) -> None:
    lines.append("wgmma.fence.sync.aligned;")
    offset = part * part_bytes
    for i in range(_INSTRUCTIONS):
      lines.extend(_instruction(i, sums_of(part), names, right_name, dtype, offset, add=i > 0))
    lines.append("wgmma.commit_group.sync.aligned;")

  def add(part: int, younger: int) -> None:
    lines.append(f"wgmma.wait_group.sync.aligned {younger};")
    for j, each in enumerate(sums_of(part)):
      total = f"${part * held + j}"
      lines.append(f"add.rn.f32 {total}, {total}, {each};")
    lines.append("@never trap;")

  begin(0)
  for part in range(1, parts):
    begin(part)
    if part == parts - 1:
      lines.append(f"bar.arrive {other_turn}, {_BOTH};")
    add(part - 1, younger=1)
  add(parts - 1, younger=0)
  tied = [str(i) for i in range(count)]
  constraints = ["=f"] * count + tied + ["r"] * len(names) + ["l", "r", "r"]
  asm = _block(lines, f".reg .pred never; .reg .f32 sum<{2 * held}>;")
  return asm_of_floats(asm, [*totals, *operands], ",".join(constraints), count)


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
  along_k = i * _INSTRUCTION
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


def _turns(warpgroup: Any) -> list[Any]:
  """The hardware barriers at which this compute warpgroup and the other wait for their turn."""
  (index,) = warpgroup.registers.flat
  return [
    arith.addi(constant(_FIRST_TURN), index),
    arith.subi(constant(_FIRST_TURN + 1), index),
  ]


def _zero() -> Any:
  """0, but the compiler does not know."""
  i32 = ir.IntegerType.get_signless(32)
  asm = "{ .reg .b32 t; mov.u32 t, %smid; shr.u32 $0, t, 20; }"
  return llvm.inline_asm(i32, [], asm, "=r")


def asm_of_floats(asm: str, operands: list[Any], constraints: str, outputs: int) -> list[Any]:
  """The float32 results of inline assembly."""
  f32 = ir.F32Type.get()
  result_type = llvm.StructType.get_literal([f32] * outputs)
  result = llvm.inline_asm(result_type, operands, asm, constraints, has_side_effects=True)
  return [llvm.extractvalue(f32, result, [i]) for i in range(outputs)]


def constant(value: int) -> Any:
  """32 bits, given without a sign."""
  i32 = ir.IntegerType.get_signless(32)
  attribute = ir.IntegerAttr.get(i32, value - (1 << 32) if value >> 31 else value)
  return arith.ConstantOp(i32, attribute).result  # type: ignore[call-arg, arg-type]  # no stub


def packed_array(registers: list[Any], shape: tuple[int, ...], layout: Any) -> Any:
  """What a thread's registers hold, as an array."""
  target = layout.to_mgpu()
  out = np.empty(target.registers_shape(shape), dtype=object)
  out.flat[:] = registers
  signed = None if shape[1:] else False
  return mgpu.FragmentedArray(_registers=out, _layout=target, _is_signed=signed)


def operand_array(words: list[Any], columns: int, dtype: Any, layout: Any) -> Any:
  """A thread's 32 bit registers as its part of a left operand, (64, columns)."""
  element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
  vector_type = ir.VectorType.get((4 // jnp.dtype(dtype).itemsize,), element)
  one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
  registers = [vector.bitcast(vector_type, vector.broadcast(one, word)) for word in words]
  return packed_array(registers, (ROWS, columns), layout)


def as_arrays(sums: list[Any], n: int) -> list[Any]:
  """The registers of one or more (64, n), one after the other."""
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  pairs = zip(sums[::2], sums[1::2], strict=True)
  registers = [vector.from_elements(pair, list(each)) for each in pairs]
  each = n // 4
  return [
    packed_array(registers[i : i + each], (ROWS, n), plgpu.Layout.WGMMA)
    for i in range(0, len(registers), each)
  ]


def floats(sums: Any) -> list[Any]:
  """A thread's numbers, float32, of an array in the layout WGMMA."""
  return [vector.extract(pair, [], [i]) for pair in sums.registers.flat for i in range(2)]


def _left(a: Any) -> list[Any]:
  """The words in registers, or the one descriptor of a reference."""
  return _words(a) if isinstance(a, mgpu.FragmentedArray) else [_descriptor(a)]


def _words(a: Any) -> list[Any]:
  word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
  return [vector.extract(vector.bitcast(word, r), [], [0]) for r in a.registers.flat]


def _descriptor(ref: Any) -> Any:
  """Of rows in tiles of 8 by 128 bytes; from 8 rows to the next it may lie anywhere."""
  return mma_utils.encode_descriptor(
    ref, leading_byte_offset=0, stride_byte_offset=_tile_bytes(ref), swizzle=STEP
  )


def _tile_bytes(ref: Any) -> int:
  """From 8 rows to the next 8."""
  kind = ir.MemRefType(ref.type)
  strides, _ = kind.get_strides_and_offset()
  return int(strides[0]) * int(mgpu.utils.bytewidth(kind.element_type))
