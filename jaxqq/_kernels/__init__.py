"""The implementations of the product, and the plan that one product gets.

`plan(problem, device)` is the one place that decides what runs. It asks the rows of a table in
turn, and takes the first that does not refuse the problem; the last row takes everything. A row is
all that a new kernel needs: lowerings, and `jaxqq.explain`, are made from the tables. Kernels are
imported when a product first runs one.

An architecture has rows in each table, `Rows`; another one is a folder with such an object, and a
line here. What follows them in a table runs everywhere: of the product here, of the others in
`ragged.py`, `conversions.py`, `_quantizer_lowering.py` and `_recipe_product.py`.
"""

from __future__ import annotations

from typing import Any

from jaxqq._kernels import block_scaled_dot, xla
from jaxqq._kernels.hopper import rows as hopper
from jaxqq._kernels.plan import Device, Implementation, Plan, Rows, device_of, from_table
from jaxqq._kernels.problem import Problem

__all__ = ["IMPLEMENTATIONS", "PLATFORMS", "Device", "Plan", "Problem", "device_of", "plan"]

ARCHITECTURES: tuple[Rows, ...] = (hopper.ROWS, block_scaled_dot.ROWS)


def rows_of(table: str) -> tuple[Implementation, ...]:
  """Those that architectures have in one table, an attribute of `Rows`."""
  return tuple(row for rows in ARCHITECTURES for row in getattr(rows, table))


IMPLEMENTATIONS: tuple[Implementation, ...] = (*rows_of("product"), xla.BFLOAT16, xla.PRODUCT)

# The platforms that have rows of their own.
PLATFORMS = tuple(sorted({p for row in IMPLEMENTATIONS for p in row.platforms or ()}))


def plan(
  problem: Any,
  device: Device,
  table: tuple[Implementation, ...] = IMPLEMENTATIONS,
  *,
  chosen: str | None = None,
) -> Plan:
  """What runs a product on a device; or anything else, by its own table.

  Raises:
    ValueError: no row whose name begins with `chosen` takes it.
  """
  return from_table(problem, device, table, chosen)
