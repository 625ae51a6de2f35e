"""What the message of an error must be: one sentence with these words."""

from __future__ import annotations

import re

import pytest


def says(sentence: str, word: str) -> bool:
  """As a whole word: "x" is not said by "mxfp8", nor "4" by "nvfp4"."""
  before = r"(?<!\w)" if re.match(r"\w", word) else ""
  after = r"(?!\w)" if re.search(r"\w$", word) else ""
  return re.search(before + re.escape(word) + after, sentence) is not None


def check_sentence(message: str, function: str, words: list[str]) -> None:
  """Of the first line: it starts with the function's name, and holds these words."""
  first_line = message.splitlines()[0]
  assert first_line.startswith(f"{function}: ") and first_line.endswith(".")
  assert not re.search(r"\{\w", first_line), "an f-string without its f"
  for word in words:
    assert says(first_line, word), f"{word!r} is not in {first_line!r}"


def refused(folder, *words, kind=ValueError) -> str:
  """load raises one sentence that starts with its name and holds these words: that sentence."""
  from jaxqq import checkpoint

  with pytest.raises(kind) as caught:
    checkpoint.load(folder)
  sentence = str(caught.value)
  assert sentence.startswith("load: ") and sentence.endswith(".") and "\n" not in sentence
  for word in words:
    assert says(sentence, str(word)), f"{word!r} is not in {sentence!r}"
  return sentence
