"""Programs that do the same work: compiled side by side, and run in turn."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jaxqq.bench.measure import Timer, wall_seconds
from jaxqq.bench.peers import Run

_MOST_CALLS = 20  # in each round
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program, what it is called with, and how often in each round."""

  call: Run
  args: tuple[Any, ...]
  calls: int

  @classmethod
  def warmed_up(cls, call: Run, args: tuple[Any, ...], share: float) -> Program:
    """After two calls, which say how many a round has; `share` is the seconds of a round."""
    took = min(wall_seconds(call, args, 2))
    return cls(call, args, max(1, min(int(share / took), _MOST_CALLS)))


def side_by_side(work: Callable[[_Item], _Made], items: Sequence[_Item]) -> list[_Made | Exception]:
  """What `work` makes of each item, on threads; an error where it cannot."""

  def attempt(item: _Item) -> _Made | Exception:
    try:
      return work(item)
    except Exception as error:
      return error

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(attempt, items))


def in_turn(
  programs: Mapping[str, Program], timer: Timer, rounds: int
) -> dict[str, list[float] | Exception]:
  """The seconds of each program's calls, or the error of one; nobody always runs first."""
  found: dict[str, list[float] | Exception] = {name: [] for name in programs}
  for i in range(rounds):
    names = list(programs)
    shift = i % max(1, len(names))
    for name in names[shift:] + names[:shift]:
      seconds, program = found[name], programs[name]
      if isinstance(seconds, Exception):
        continue
      try:
        seconds += timer.sample(program.call, program.args, program.calls)
      except Exception as error:
        found[name] = error
  return found
