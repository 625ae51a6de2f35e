"""The mainloops by name: which takes a product, what a part of its steps loads, and its class.

Plans are made from this, so nothing here imports Pallas until a class is asked for.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from jaxqq._formats import FORMATS, Format
from jaxqq._kernels.hopper.costs import DEQUANT_E2M1, DEQUANT_E4M3, GEMM, Timed
from jaxqq._kernels.problem import Problem

if TYPE_CHECKING:
  from jaxqq._kernels.hopper.dequant_gemm import PackedOperand
  from jaxqq._kernels.hopper.skinny_gemm import Mainloop

# `gemm` has "ready", `dequant_gemm` the others


@dataclasses.dataclass(frozen=True)
class Part:
  """What a part of a step takes of a row of w, as the classes have it. Tiles say how many it has.

  Attributes:
    k: elements: 128 bytes of x.
    bytes: of words; of w that is ready, a swizzled row.
    scales: how many; of w that is ready, none.
    costs: of the tiles, which count such parts.
  """

  k: int
  bytes: int
  scales: int
  costs: tuple[Timed, ...]


PART_K = 64  # of what is expanded to 16 bits


def _in_order(fmt: Format, dtype: Any) -> str:
  """The name of the mainloop beside x of a dtype in the order of memory."""
  return f"in_order_{fmt.mode}" + ("_float16" if dtype == np.float16 else "")


# Scales that are powers of two may leave float16's range.
IN_ORDER: dict[str, tuple[Format, np.dtype]] = {
  _in_order(fmt, dtype): (fmt, np.dtype(dtype))
  for fmt in FORMATS.values()
  for dtype in (ml_dtypes.bfloat16, np.float16)[: 1 if fmt.scale_is_power_of_two else 2]
}

PARTS: dict[str, Part] = {
  "ready": Part(128, 128, 0, GEMM),
  "packed_e2m1": Part(PART_K, 32, 4, DEQUANT_E2M1),
  "rebased_e4m3": Part(128, 128, 4, DEQUANT_E4M3),
  **{
    name: Part(PART_K, PART_K * fmt.bits // 8, PART_K // fmt.group_size, DEQUANT_E2M1)
    for name, (fmt, _) in IN_ORDER.items()
  },
}


def operand_dtype(problem: Problem) -> np.dtype:
  """Of both operands in 16 bits."""
  return exact_dtype(problem.fmt) if problem.quantize_input else problem.x_dtype


def exact_dtype(fmt: Format) -> np.dtype:
  """The 16 bit floats that hold code * scale exactly."""
  return np.dtype(ml_dtypes.bfloat16 if fmt.scale_is_power_of_two else np.float16)


def packed_operand(problem: Problem) -> str:
  """What expands packed w to 16 bits."""
  fmt = problem.fmt
  if fmt.scale_is_power_of_two:
    return _in_order(fmt, ml_dtypes.bfloat16)
  return "packed_e2m1" if problem.quantize_input else _in_order(fmt, problem.x_dtype)


def packed_operands() -> dict[str, PackedOperand]:
  """Those of `dequant_gemm`."""
  from jaxqq._kernels.hopper.mainloops.in_order import InOrderOperand
  from jaxqq._kernels.hopper.mainloops.packed_e2m1 import PackedE2M1
  from jaxqq._kernels.hopper.mainloops.packed_e4m3 import RebasedE4M3

  return {
    "packed_e2m1": PackedE2M1(),
    "rebased_e4m3": RebasedE4M3(),
    **{name: InOrderOperand(*own) for name, own in IN_ORDER.items()},
  }


# Up to 64 rows of x: `skinny_gemm`

MAX_BLOCKDIAG_ROWS = 4  # with more, scaling the sums of every group takes longer than expanding w
BLOCKDIAG_MIN_K = 1024  # what its quantizer takes at once
# Of "sixteens", an instruction of a warp; with more rows these, of a warpgroup, are faster.
MAX_ROWS_OF_SIXTEENS = {"expanded": 8, "in_order": 24}
MAX_ROWS_OF_SIXTEENS_IN_GROUPS = 24  # of a tile
ROWS_OF_A_TILE = 1.25  # of those that a group has on average


def skinny_rows(problem: Problem) -> int:
  """Of x in a tile: all of them, or a quarter more than a group has on average."""
  return math.ceil(ROWS_OF_A_TILE * problem.rows) if problem.in_groups else problem.rows


def skinny_mainloop(problem: Problem) -> str:
  if not problem.is_packed:
    return "quantized"
  if problem.fmt.scale_is_power_of_two and problem.fmt.bits == 8 and problem.quantize_input:
    return "group_sums"
  one_matrix = problem.shares_w or math.prod(problem.x_batch) == 1
  one_matrix = one_matrix and not problem.in_groups
  is_interleaved = packed_operand(problem) == "packed_e2m1"  # as of `ptx/expand.py`
  few = problem.rows <= MAX_BLOCKDIAG_ROWS and problem.k >= BLOCKDIAG_MIN_K
  if one_matrix and few and is_interleaved:
    return "blockdiag"
  mainloop = "expanded" if is_interleaved else "in_order"
  most = MAX_ROWS_OF_SIXTEENS[mainloop]
  if problem.in_groups:
    most = MAX_ROWS_OF_SIXTEENS_IN_GROUPS
  return "sixteens" if problem.fmt.bits == 4 and skinny_rows(problem) <= most else mainloop


def skinny_mainloops() -> dict[str, type[Mainloop]]:
  """The classes of `skinny_gemm`."""
  from jaxqq._kernels.hopper.mainloops.blockdiag import BlockDiagonalX
  from jaxqq._kernels.hopper.mainloops.expanded import Expanded
  from jaxqq._kernels.hopper.mainloops.group_sums import GroupSums
  from jaxqq._kernels.hopper.mainloops.in_order import InOrder
  from jaxqq._kernels.hopper.mainloops.quantized import Quantized
  from jaxqq._kernels.hopper.mainloops.sixteens import Sixteens

  return {
    "blockdiag": BlockDiagonalX,
    "expanded": Expanded,
    "group_sums": GroupSums,
    "in_order": InOrder,
    "quantized": Quantized,
    "sixteens": Sixteens,
  }
