"""Which tensors of a checkpoint a caller wants."""

from __future__ import annotations

import fnmatch
import pathlib
import re
from collections.abc import Collection, Iterable
from typing import Any

from jaxqq.checkpoint._files import shown


class Only:
  """Names, and patterns as of a shell: `*`, `?`, `[abc]`. A name that is there means itself."""

  def __init__(self, only: str | Iterable[str] | None):
    words = [only] if isinstance(only, str) else only
    if not (words is None or _is_iterable(words)):
      raise TypeError(f"load: only must be names or patterns, got {shown(only)}.")
    self._words = None if words is None else list(words)
    for word in self._words or ():
      if not isinstance(word, str):
        raise TypeError(f"load: only must be names or patterns, strings, got {shown(word)} in it.")
    self._names = set(self._words or ())
    # One expression, however many names there are.
    patterns = [fnmatch.translate(word) for word in self._names if set("*?[") & set(word)]
    self._pattern = re.compile("|".join(patterns) or r"(?!)")

  def wants(self, name: str) -> bool:
    return self._words is None or name in self._names or bool(self._pattern.match(name))

  def check_found(
    self, path: pathlib.Path, names: Collection[str], tensors: Collection[str]
  ) -> None:
    """Every word means one of the names, at least.

    tensors: what the files hold, of which the sentence says some.
    """
    for word in self._words or ():
      if word not in names and not fnmatch.filter(names, word):
        some = ", ".join(map(repr, sorted(tensors)[:3]))
        raise ValueError(
          f"load: only must name what load returns of {path}, a quantized layer X as 'X.weight', "
          f"or be patterns of such names, found {word!r}, which means nothing beside "
          f"{len(tensors)} tensors such as {some}."
        )


def _is_iterable(words: Any) -> bool:
  return isinstance(words, Iterable)
