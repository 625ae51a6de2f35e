"""The files that `save` writes: how many, of what names, and their bytes."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxqq.checkpoint._files import RECORDED, WEIGHTS, Recorded
from jaxqq.checkpoint._safetensors import file_chunks

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
  """Bytes, from an int or "5GB"."""
  words = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
  unit = None if words is None else _UNITS.get(words[2].upper())
  count = math.nan if words is None or unit is None else float(words[1]) * unit
  if not 1 <= count < math.inf or isinstance(size, bool):
    raise ValueError(
      f"save: max_shard_size must be a positive number of bytes or a string such as '5GB', got "
      f"{size!r}."
    )
  return int(count)


def shard(sizes: dict[str, int], max_shard_size: int) -> list[list[str]]:
  """Names, in order, in as few files as that allows; a larger one gets a file of its own."""
  shards: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if shards[-1] and filled + size > max_shard_size:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  return shards


def shard_names(count: int) -> list[str]:
  if count == 1:
    return [WEIGHTS]
  return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def write_tensors(
  file: pathlib.Path, tensors: dict[str, np.ndarray], framework: str, recorded: Recorded
) -> None:
  """recorded: each layer's fields that go into the metadata."""
  metadata = {"format": framework} | ({RECORDED: json.dumps(recorded)} if recorded else {})
  _write(file, file_chunks(tensors, metadata))


def as_json(file: str, value: dict[str, Any]) -> str:
  """The text of a file."""
  try:
    return json.dumps(value, indent=2) + "\n"
  except (TypeError, ValueError, RecursionError) as error:
    raise TypeError(
      f"save: config must be what {file} can hold, JSON, got another ({error})."
    ) from None


def write_text(file: pathlib.Path, text: str) -> None:
  _write(file, [np.frombuffer(text.encode(), np.uint8)])


def _write(file: pathlib.Path, chunks: Iterable[np.ndarray]) -> None:
  """A new file, with the mode that the user's umask leaves, and onto the disk."""
  try:
    descriptor = os.open(
      file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666
    )
    try:
      for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
          rest = rest[os.write(descriptor, rest) :]
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
  except OSError as error:
    raise OSError(error.errno, error.strerror or str(error), str(file)) from error
