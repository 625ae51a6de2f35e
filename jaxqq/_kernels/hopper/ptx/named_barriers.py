"""The hardware's named barriers: one warpgroup waits for another, or for itself."""

from __future__ import annotations

import enum
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith

from jaxqq._kernels.hopper.ptx.interpreter import interpreting
from jaxqq._kernels.hopper.ptx.registers import constant, void_asm

COUNT = 16  # that the hardware has
BOTH = 2 * 128  # threads of two warpgroups


class NamedBarrier(enum.IntEnum):
  """Which barriers jaxqq uses. Mosaic has the first few."""

  WARPGROUP_0 = 8  # may multiply
  WARPGROUP_1 = 9


# Ping-pong: two warpgroups multiply in turn


def arrive(warpgroup: Any) -> None:
  """Lets the other of two warpgroups multiply."""
  if not interpreting():
    _ping_pong("bar.arrive $1", warpgroup)


def wait(warpgroup: Any) -> None:
  """Waits until this warpgroup may multiply."""
  if not interpreting():
    _ping_pong("bar.sync $0", warpgroup)


def _ping_pong(instruction: str, warpgroup: Any) -> None:
  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,), return_type=None)
  def run(ctx: Any, warpgroup: Any) -> None:
    del ctx
    void_asm(f"{instruction}, {BOTH};", own_and_other(warpgroup), "r,r,~{memory}")

  run(warpgroup)


def own_and_other(warpgroup: Any) -> list[Any]:
  """The barriers of this warpgroup and of the other, MLIR values."""
  (index,) = warpgroup.registers.flat
  return [
    arith.addi(constant(NamedBarrier.WARPGROUP_0), index),
    arith.subi(constant(NamedBarrier.WARPGROUP_1), index),
  ]


# Within a warpgroup


def sync_warpgroup() -> None:
  """All threads of this warpgroup wait for each other."""
  if interpreting():
    return

  @plgpu.inline_mgpu(arg_types=(), return_type=None)
  def sync(ctx: Any) -> None:
    del ctx
    mgpu.utils.warpgroup_barrier()

  sync()
