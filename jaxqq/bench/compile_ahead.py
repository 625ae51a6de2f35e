"""Compiles the programs of cases before their turn on the device.

A program that was compiled for shapes is what a call with arrays of these shapes then finds in
JAX's cache. Peers' programs are left to their turn: where XLA tries several algorithms for a
product, it runs them on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxqq.bench.cases import FORMS, Case
from jaxqq.bench.check import SAMPLE, take_rows
from jaxqq.bench.measure import Timer, chained, normal, operand_specs, prepared
from jaxqq.bench.peers import Implementation, PackLast


def compile_ahead(compared: Mapping[Case, Sequence[Implementation]], timer: Timer) -> None:
  """Compiles what `run_cases` runs, but for peers' programs.

  Args:
    compared: the cases, and what is measured of each.
    timer: that they are measured with.
  """
  number = len({each for implementations in compared.values() for each in implementations})
  _compile_operands_and_check(next(iter(compared)))
  for case, implementations in compared.items():
    for implementation in implementations:
      if implementation.name.startswith("jaxqq"):
        try:
          _compile_product(case, implementation, timer, number)
        except Exception:
          continue  # the case meets the error again, and makes a row of it


def _compile_product(
  case: Case, implementation: Implementation, timer: Timer, implementations: int
) -> None:
  specs, copies = prepared(case, implementation, timer, implementations)
  if isinstance(implementation.prepare, PackLast):
    implementation.prepare.pack.lower(operand_specs(case)[-1]).compile()
  chained(implementation.run).lower([specs] * copies).compile()


def _compile_operands_and_check(case: Case) -> None:
  form, seed = FORMS[case.form], np.uint32(0)
  for dims, spec in zip(form.inputs, operand_specs(case), strict=True):
    _compile(normal, seed, spec.shape, case.dtype)
    if form.is_product:
      _compile_rows(spec, axis=1 - dims.index(form.contracted))
  if form.is_product:
    _compile_rows(jax.ShapeDtypeStruct(case.shape(form.out), np.dtype(case.dtype)), axis=0)


def _compile_rows(spec: jax.ShapeDtypeStruct, axis: int) -> None:
  sample = jax.ShapeDtypeStruct((min(SAMPLE, spec.shape[axis]),), np.int32)
  _compile(take_rows, spec, sample, axis=axis)


def _compile(function: Any, *args: Any, **static: Any) -> None:
  function.lower(*args, **static).compile()
