"""Compiles the programs of several cases side by side, before they are measured.

    threads   | compile jaxqq's of cases 1 to 16 | ... of 17 to 32 | ... of 33 to 48 |
    measuring |                  compile peers'  | measure 1 to 16 | peers' | measure 17 to 32 | ...

XLA compiles without Python's lock. A program that was compiled for shapes is what a call with
arrays of these shapes then finds in JAX's cache. Nothing is measured while a peer's program is
compiled: where XLA tries several algorithms for a product, it runs them on the device.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax
import numpy as np

from jaxqq.bench.cases import FORMS, Case
from jaxqq.bench.check import SAMPLE, take_rows
from jaxqq.bench.measure import Timer, chained, normal, operand_specs, prepared
from jaxqq.bench.peers import Implementation, PackLast

MAX_THREADS = 16

_Lower = Callable[[], Any]


class CompileAhead:
  """Compiles what `run_case` runs, on threads that end with its context.

  Args:
    timer: that the cases are measured with.
    deadline: of `time.monotonic`, after which no compilation is begun.
  """

  def __init__(self, timer: Timer, deadline: float = float("inf")):
    self._timer, self._deadline = timer, deadline
    self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    self._begun: list[Future[None]] = []
    self._in_turn: list[_Lower] = []

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self._pool.shutdown(cancel_futures=True)

  def begin(self, compared: Mapping[Case, Sequence[Implementation]]) -> None:
    """Has the threads compile programs of cases, whatever is measured meanwhile.

    Args:
      compared: the cases, and what is measured of each.
    """
    together: dict[Hashable, _Lower] = {}
    in_turn: dict[Hashable, _Lower] = {}  # what XLA may try out on the device
    for case, implementations in compared.items():
      together |= _operands_and_checks(case)
      for implementation in implementations:
        try:
          specs, number = prepared(case, implementation, self._timer, len(implementations))
        except Exception:
          continue  # as in _compile
        if isinstance(implementation.prepare, PackLast):
          together |= _program(implementation.prepare.pack, operand_specs(case)[-1])
        programs = together if implementation.name.startswith("jaxqq") else in_turn
        programs |= _program(chained(implementation.run), [specs] * number)
    self._in_turn += in_turn.values()
    self._begun += [self._pool.submit(self._compile, lower) for lower in together.values()]

  def finish(self) -> None:
    """Compiles the others, one after the other, and waits for the threads."""
    for lower in self._in_turn:
      self._compile(lower)
    for each in self._begun:
      each.result()
    self._in_turn, self._begun = [], []

  def _compile(self, lower: _Lower) -> None:
    if time.monotonic() >= self._deadline:
      return
    try:
      lower().compile()
    except Exception:
      return  # the case meets the error again, and makes a row of it


def _operands_and_checks(case: Case) -> dict[Hashable, _Lower]:
  form, seed = FORMS[case.form], np.uint32(0)
  found: dict[Hashable, _Lower] = {}
  for dims, spec in zip(form.inputs, operand_specs(case), strict=True):
    found |= _program(normal, seed, spec.shape, case.dtype)
    if form.is_product:
      found |= _rows_program(spec, axis=1 - dims.index(form.contracted))
  if form.is_product:
    found |= _rows_program(jax.ShapeDtypeStruct(case.shape(form.out), np.dtype(case.dtype)), axis=0)
  return found


def _rows_program(spec: jax.ShapeDtypeStruct, axis: int) -> dict[Hashable, _Lower]:
  sample = jax.ShapeDtypeStruct((min(SAMPLE, spec.shape[axis]),), np.int32)
  return _program(take_rows, spec, sample, axis=axis)


def _program(f: Any, *args: Any, **static: Any) -> dict[Hashable, _Lower]:
  """One program, under what tells it from others, so that none is compiled twice at a time."""
  leaves, tree = jax.tree.flatten((args, static))
  key = f, tree, tuple(map(_described, leaves))
  return {key: functools.partial(f.lower, *args, **static)}


def _described(leaf: Any) -> Hashable:
  return (leaf.shape, str(leaf.dtype)) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
