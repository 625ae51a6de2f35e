"""An einsum of two operands as the dimension numbers of `lax.dot_general` and a transpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp

Axes = tuple[int, ...]
Labels = list[Hashable]  # a letter, or the number of an axis that an ellipsis stands for


@dataclasses.dataclass(frozen=True)
class Plan:
  """x and w contracted as `dimension_numbers` say, then `order` of the axes of the result."""

  x_contracting: Axes
  w_contracting: Axes
  x_batch: Axes
  w_batch: Axes
  w_free: Axes
  order: Axes  # of (batch, free axes of x, free axes of w)
  w_in_out: tuple[int | None, ...]  # for each axis of the output, that of w, None if it is x's

  @property
  def dimension_numbers(self) -> tuple[tuple[Axes, Axes], tuple[Axes, Axes]]:
    return (self.x_contracting, self.w_contracting), (self.x_batch, self.w_batch)

  def in_order(self, out: jax.Array) -> jax.Array:
    is_in_order = self.order == tuple(range(len(self.order)))
    return out if is_in_order else jnp.transpose(out, self.order)


def plan(function: str, subscripts: str, x_ndim: int, w_ndim: int) -> Plan:
  """How to compute "x,w->out"; ValueError where no product of matrices does."""
  x, w, out = _labels(function, subscripts, x_ndim, w_ndim)
  for name, labels in (("x", x), ("w", w), ("the output", out)):
    if len(set(labels)) != len(labels):
      raise ValueError(
        f"{function}: an index appears twice in {name} of subscripts {subscripts!r}, which is no "
        "product of matrices; take the diagonal before."
      )
  unknown = set(out) - set(x) - set(w)
  lonely = (set(x) ^ set(w)) - set(out)
  if unknown or lonely:
    what = "is in no operand" if unknown else "is summed over but in one operand only"
    raise ValueError(
      f"{function}: index {_name(unknown or lonely)} of subscripts {subscripts!r} {what}, which is "
      "no product of matrices; sum before, or name it in both operands."
    )
  batch = [label for label in x if label in w and label in out]
  contracting = [label for label in x if label in w and label not in out]
  x_free = [label for label in x if label not in w]
  w_free = [label for label in w if label not in x]
  result = [*batch, *x_free, *w_free]
  return Plan(
    x_contracting=tuple(x.index(label) for label in contracting),
    w_contracting=tuple(w.index(label) for label in contracting),
    x_batch=tuple(x.index(label) for label in batch),
    w_batch=tuple(w.index(label) for label in batch),
    w_free=tuple(w.index(label) for label in w_free),
    order=tuple(result.index(label) for label in out),
    w_in_out=tuple(w.index(label) if label in w else None for label in out),
  )


def num_letters(subscripts: str) -> tuple[int, int]:
  """How many axes of x and of w are named by letters."""
  operands = subscripts.replace(" ", "").replace("...", "").partition("->")[0]
  x, _, w = operands.partition(",")
  return len(x), len(w)


def _labels(
  function: str, subscripts: str, x_ndim: int, w_ndim: int
) -> tuple[Labels, Labels, Labels]:
  words = subscripts.replace(" ", "") if isinstance(subscripts, str) else ""
  operands, arrow, out = words.partition("->")
  terms = operands.split(",")
  letters = words.replace("...", "").replace("->", "").replace(",", "")
  if not arrow or len(terms) != 2 or (letters and not letters.isalpha()):
    raise ValueError(
      f"{function}: subscripts must name two operands and the output, as in '...d,df->...f', got "
      f"{subscripts!r}."
    )
  num_dots = 0
  expanded = []
  for name, term, ndim in (("x", terms[0], x_ndim), ("w", terms[1], w_ndim)):
    dots = ndim - len(term.replace("...", ""))
    if dots < 0 or (dots and "..." not in term):
      raise ValueError(
        f"{function}: subscripts {subscripts!r} do not fit {name}, which has {ndim} axes."
      )
    num_dots = max(num_dots, dots)
    expanded.append(_expand(term, dots))
  return expanded[0], expanded[1], _expand(out, num_dots)


def _expand(term: str, dots: int) -> Labels:
  """The axes of an ellipsis are aligned from the right."""
  before, ellipsis, after = term.partition("...")
  return [*before, *(reversed(range(dots)) if ellipsis else ()), *after]


def _name(labels: set[Hashable]) -> str:
  """One of them, the same one each time."""
  first = min(map(str, labels))
  return "of an ellipsis" if first.isdigit() else repr(first)
