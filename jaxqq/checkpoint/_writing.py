"""What `save` writes: files in a folder of their own, which then takes the place of the other."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxqq.checkpoint._files import RECORDED, WEIGHTS, Recorded
from jaxqq.checkpoint._safetensors import file_chunks

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
  """Bytes, from an int or "5GB"."""
  words = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
  unit = None if words is None else _UNITS.get(words[2].upper())
  if words is None or unit is None or isinstance(size, bool) or float(words[1]) * unit < 1:
    raise ValueError(
      f"save: max_shard_size must be a positive number of bytes or a string such as '5GB', got "
      f"{size!r}."
    )
  return int(float(words[1]) * unit)


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
  with open(file, "wb") as out:
    for chunk in file_chunks(tensors, metadata):
      out.write(chunk)
  _sync(file)


def write_json(file: pathlib.Path, value: dict[str, Any]) -> None:
  file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  _sync(file)


def _sync(path: pathlib.Path) -> None:
  """Onto the disk before the folder gets its name."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def check_target(path: pathlib.Path, overwrite: bool) -> None:
  if path.exists() and not path.is_dir():
    raise FileExistsError(f"save: {path} is a file; path must be a folder, new or empty.")
  if not overwrite and path.exists() and any(path.iterdir()):
    raise FileExistsError(
      f"save: {path} is not empty; path must be a new or empty folder, or pass overwrite=True."
    )


@contextlib.contextmanager
def replacing(path: pathlib.Path, replaced: list[str]) -> Iterator[pathlib.Path]:
  """A folder to write in that takes path's name once all is written, and is gone otherwise.

  What path holds stays, but for the files that `replaced` matches.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  written, old = (path.parent / f".{path.name}.{uuid.uuid4().hex}.{end}" for end in ("tmp", "old"))
  try:
    if path.exists():
      shutil.copytree(path, written, ignore=shutil.ignore_patterns(*replaced), symlinks=True)
    else:
      written.mkdir()
    yield written
    _sync(written)
    if path.exists():
      os.replace(path, old)
    try:
      os.replace(written, path)
    except OSError:
      if old.exists():
        os.replace(old, path)
      raise
  finally:
    shutil.rmtree(written, ignore_errors=True)
  shutil.rmtree(old, ignore_errors=True)
  _sync(path.parent)
