"""What the message of an error must be: one sentence with these words."""

from __future__ import annotations

import re

import pytest


def check_sentence(message: str, function: str, words: list[str]) -> None:
  """Of the first line: it starts with the function's name, and holds these words."""
  first_line = message.splitlines()[0]
  assert first_line.startswith(f"{function}: ") and first_line.endswith(".")
  assert not re.search(r"\{\w", first_line), "an f-string without its f"
  for word in words:
    assert word in first_line, f"{word!r} is not in {first_line!r}"


def refused(folder, *words, kind=ValueError):
  """load raises one sentence that starts with its name and holds these words."""
  from jaxqq import checkpoint

  with pytest.raises(kind) as caught:
    checkpoint.load(folder)
  sentence = str(caught.value)
  assert sentence.startswith("load: ") and sentence.endswith(".") and "\n" not in sentence
  for word in words:
    assert str(word) in sentence, sentence
