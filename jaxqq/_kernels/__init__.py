"""The implementations of the product, and the plan that one product gets.

`plan(problem, device)` is the one place that decides what runs. It asks the rows of
`IMPLEMENTATIONS` in turn, and takes the first that does not refuse the problem; the last row takes
everything. A row is all that a new kernel needs: the primitive's lowerings, and `jaxqq.explain`,
are made from the table. Kernels are imported when a product first runs one. `conversions.py` has
the tables of `quantize` and `dequantize`.
"""

from __future__ import annotations

from typing import Any

from jaxqq._kernels import block_scaled_dot, xla
from jaxqq._kernels.hopper import plan as hopper
from jaxqq._kernels.plan import Device, Implementation, Plan, device_of, from_table
from jaxqq._kernels.problem import Problem

__all__ = ["IMPLEMENTATIONS", "PLATFORMS", "Device", "Plan", "Problem", "device_of", "plan"]

IMPLEMENTATIONS: tuple[Implementation, ...] = (
  *hopper.IMPLEMENTATIONS,
  block_scaled_dot.PRODUCT,
  xla.BFLOAT16,
  xla.PRODUCT,
)

# The platforms that have rows of their own.
PLATFORMS = tuple(sorted({p for row in IMPLEMENTATIONS for p in row.platforms or ()}))


def plan(
  problem: Any,
  device: Device,
  table: tuple[Implementation, ...] = IMPLEMENTATIONS,
  *,
  chosen: str | None = None,
) -> Plan:
  """What runs a product on a device; or a conversion, by its own table.

  Raises:
    ValueError: no row whose name begins with `chosen` takes it.
  """
  return from_table(problem, device, table, chosen)
