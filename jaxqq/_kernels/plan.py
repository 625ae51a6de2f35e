"""What runs a problem, and why: a lowering runs the plan, `explain` prints it, tests read it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from jaxqq import _compat

TARGET = "JAXQQ_TARGET"  # the compute capability that programs are made for, as 9.0
_ASSUMED_CAPABILITY = "9.0"
_ASSUMED_SMS = 132  # of an H100 SXM or H200; an H100 PCIe has 114, an H20 78


class Unsupported(Exception):
  """Why an implementation cannot take a problem; `from_table` then goes on to the next."""


@dataclasses.dataclass(frozen=True)
class Device:
  """What a plan depends on of the device that a program is made for."""

  platform: str  # as JAX names it when it lowers: cpu, cuda, rocm, tpu
  compute_capability: str | None = None  # of NVIDIA's
  num_sms: int = _ASSUMED_SMS
  knows_sms: bool = True  # else that number is an assumption
  knows_capability: bool = True
  max_cluster: int = 8  # CTAs in one

  def num_clusters(self, size: int) -> int:
    """How many clusters of so many CTAs run at once: each has to find room in one GPC.

    132 SMs had room for 66 of two CTAs, for 33 but not for 40 of three, for 28 but not for 32 of
    four, for 16 but not for 18 of six, and for 12 but not for 16 of eight.
    """
    if size > self.max_cluster:
      return 0
    share = {1: 1.0, 2: 1.0, 3: 0.76, 4: 0.85, 6: 0.75, 8: 0.73}[size]
    return int(self.num_sms * share) // size


def device_of(platform: str) -> Device:
  """That which the environment names, or the one at hand; if none is, an H200 is assumed."""
  if platform != "cuda":
    return Device(platform)
  capability, num_sms = _compat.cuda_compute_capability(), _compat.cuda_sm_count()
  target = os.environ.get(TARGET)
  if target and target != capability:
    capability, num_sms = target, None
  return Device(
    platform,
    capability or _ASSUMED_CAPABILITY,
    num_sms or _ASSUMED_SMS,
    num_sms is not None,
    capability is not None,
  )


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One row of a table: all that a new kernel needs."""

  name: str
  summary: str  # what it does, to follow "The product is computed by"
  platforms: tuple[str, ...] | None  # as JAX names them; None is any
  # (problem, device) -> something with `run(operands)` and `details`; raises Unsupported.
  plan: Callable[[Any, Device], Any]
  takes_row_scales: bool = False  # a global scale for each row of packed w, or for each matrix


@dataclasses.dataclass(frozen=True)
class Plan:
  """What runs a problem on a device.

  Attributes:
    implementation: the first row of the table that takes the problem.
    kernel: its own plan: which kernels, tiles, operands and epilogue.
    refusals: why not the rows before it, a sentence each.
  """

  implementation: Implementation
  kernel: Any
  refusals: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    return self.implementation.name

  @property
  def details(self) -> str | None:
    """What else to tell of the problem at hand."""
    return self.kernel.details

  def run(self, operands: Any) -> Any:
    """The results, of operands as the problem has them."""
    return self.kernel.run(operands)


@dataclasses.dataclass(frozen=True)
class FunctionPlan:
  """A problem, and the function that runs it."""

  problem: Any
  function: Callable[..., Any]  # of the problem, and of what `run` gets
  details: str | None = None

  def run(self, *operands: Any) -> Any:
    return self.function(self.problem, *operands)


@dataclasses.dataclass(frozen=True)
class Rows:
  """What the GPUs of one architecture have kernels for: its rows in each table.

  Attributes:
    product: of `qqmm` and `quantized_matmul`.
    ragged: of products of rows in groups, and their gradients.
    quantize, dequantize: of the functions of these names.
    quantizer: of `Quantizer.quantize`.
    recipe: of the products of a `Recipe`.
  """

  product: tuple[Implementation, ...] = ()
  ragged: tuple[Implementation, ...] = ()
  quantize: tuple[Implementation, ...] = ()
  dequantize: tuple[Implementation, ...] = ()
  quantizer: tuple[Implementation, ...] = ()
  recipe: tuple[Implementation, ...] = ()


TURNED_OFF = "JAXQQ_DISABLE"  # names of rows, or what they begin with, and commas between them


def turned_off() -> tuple[str, ...]:
  """What the environment says not to use."""
  return tuple(filter(None, (name.strip() for name in os.environ.get(TURNED_OFF, "").split(","))))


def from_table(
  problem: Any, device: Device, table: Sequence[Implementation], chosen: str | None = None
) -> Plan:
  """The plan by the first row of a table that takes the problem; the last row takes everything.

  If one is `chosen`, only rows whose names begin with that are asked.
  """
  refusals: list[str] = []
  for row in table:
    if chosen is not None and not row.name.startswith(chosen):
      reason = f"implementation={chosen!r} was asked for"
    elif chosen is None and row is not table[-1] and row.name.startswith(turned_off()):
      reason = f"the environment variable {TURNED_OFF} turns it off"
    elif row.platforms is not None and device.platform not in row.platforms:
      reason = f"it is for {' and '.join(row.platforms)}, not {device.platform}"
    else:
      try:
        return Plan(row, row.plan(problem, device), tuple(refusals))
      except Unsupported as error:
        reason = str(error)
    refusals.append(f"{row.name}: {reason}")
  if chosen is None:
    raise AssertionError("the last row of a table takes every problem")
  reasons = [refusal for refusal in refusals if refusal.startswith(chosen)]
  raise ValueError(
    f"{problem.function}: implementation {chosen!r} cannot compute this product on "
    f"{device.platform}: {'; '.join(reasons)}."
  )
