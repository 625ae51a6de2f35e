"""Measures many cases by several processes, of which one at a time has the device.

    process 1 | compile | measure | check, compile       | measure | ...
    process 2 | compile           | measure | check, compile       | measure | ...
    process 3 | compile                     | measure | check, ...

Lowering a kernel is Python's work and takes seconds, so threads of one process would not do.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxqq.bench.cases import Case
from jaxqq.bench.chain import with_chains
from jaxqq.bench.compile_ahead import compile_ahead
from jaxqq.bench.measure import Row, Settings, Timer, make_timer, run_cases
from jaxqq.bench.peers import Implementation

_MEMORY_SHARE = 0.9  # of the device's, for all processes together

Found = dict[Case, list[Row]]


@dataclasses.dataclass(frozen=True)
class Work:
  """What every process is told once."""

  compared: Callable[[Case], Sequence[Implementation]]  # what is measured of a case; pickled
  settings: Settings
  deadline: float = float("inf")  # of time.monotonic, after which no case is begun


def share_the_device() -> None:
  """Leaves others their part of a GPU's memory; to be called before JAX starts."""
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def measured(groups: Sequence[Sequence[Case]], work: Work, processes: int) -> Iterator[Found]:
  """The rows of groups of cases, in the order in which they are done.

  Args:
    groups: of cases that differ in their mode alone.
    work: what is measured of each.
    processes: how many. They are started anew, and import this module.
  """
  context = multiprocessing.get_context("spawn")
  environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY_SHARE / processes:.3f}"}
  os.environ |= environment  # what a started process has from its first import on
  pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start, (work, context.Lock()))
  with pool:
    futures = [pool.submit(_measure, group) for group in groups]
    try:
      for future in concurrent.futures.as_completed(futures):
        if found := future.result():
          yield found
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Process:
  work: Work
  turn: Any  # a lock of all processes
  timer: Timer


_process: _Process | None = None


def _start(work: Work, turn: Any) -> None:
  global _process
  with turn:
    timer = make_timer()
  _process = _Process(work, turn, timer)


def _measure(group: Sequence[Case]) -> Found:
  assert _process is not None, "a process begins with _start"
  work, turn, timer = _process.work, _process.turn, _process.timer
  if time.monotonic() >= work.deadline:
    return {}
  compared = {case: work.compared(case) for case in group}
  compile_ahead(compared, timer)
  if time.monotonic() >= work.deadline:
    return {}
  found = run_cases(compared, timer, work.settings, turn=turn)
  with turn:
    return {
      case: with_chains(case, compared[case], rows, work.settings) for case, rows in found.items()
    }


def groups_of(cases: Sequence[Case]) -> list[list[Case]]:
  """Cases that differ in their mode alone, together; in the order of the first of each."""
  groups: dict[Case, list[Case]] = {}
  for case in cases:
    groups.setdefault(dataclasses.replace(case, mode="nvfp4"), []).append(case)
  return list(groups.values())
