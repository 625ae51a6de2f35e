"""Saves that are killed at every step that changes the file system, and what each kill left.

Run as a program, in a process of its own: each save is a fork of it that ends by SIGKILL, so that
locks, open files and half-written ones are what a real kill leaves. No array is one of JAX, whose
threads a fork would not have.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import shutil
import signal
import sys
import traceback
import warnings

import numpy as np

from jaxqq import QuantizedWeight
from jaxqq.checkpoint import _replace, save

STEPS = ("mkdir", "rename", "link", "symlink", "unlink", "rmdir", "chmod", "write", "open")
DONE, DIED = 0, -signal.SIGKILL


def snapshot(folder: pathlib.Path):
  """Every path of a folder, with what is there; None if there is no folder."""
  if not folder.is_dir():
    return None
  out = {}
  for path in sorted(folder.rglob("*")):
    name = str(path.relative_to(folder))
    if path.is_symlink():
      out[name] = f"link to {os.readlink(path)}"
    else:
      out[name] = "a folder" if path.is_dir() else path.read_bytes()
  return out


def tensors(seed: int) -> dict:
  rng = np.random.default_rng(seed)
  words = rng.integers(0, 1 << 32, (2, 8, 8), np.uint32)
  weights = {
    f"{i}.weight": QuantizedWeight(
      codes, np.full((8, 4), 0x38, np.uint8), mode="nvfp4", dtype=np.float32
    )
    for i, codes in enumerate(words)
  }
  return weights | {"norm": rng.standard_normal(40).astype(np.float32)}


def write(path: pathlib.Path, seed: int) -> None:
  """In two files and an index."""
  save(path, tensors(seed), format="mlx", max_shard_size=500, overwrite=True, progress=False)


def add_others(folder: pathlib.Path) -> None:
  """What a save leaves: files and links, a folder with a configuration and weights of its own."""
  (folder / "1_Pooling" / "more").mkdir(parents=True)
  (folder / "1_Pooling" / "config.json").write_text("[]")
  (folder / "1_Pooling" / "more" / "adapter.safetensors").write_bytes(b"weights")
  (folder / "tokenizer.json").write_text("{}")
  (folder / "vocabulary").symlink_to("tokenizer.json")


class Killer:
  """Kills this process before step number `at` of those that change the file system.

  A write is two steps: before it, and when half is written.
  """

  def __init__(self, at: int):
    self.at, self.step = at, -1
    for name in STEPS:
      setattr(os, name, self.watched(name, getattr(os, name)))
    _replace.exchange = self.watched("exchange", _replace.exchange)

  def watched(self, name, real):
    def call(*args, **options):
      if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
        return real(*args, **options)
      self.next(name)
      if name == "write" and self.step + 1 == self.at:
        real(args[0], memoryview(args[1])[: len(args[1]) // 2])
      if name == "write":
        self.next(name)
      return real(*args, **options)

    return call

  def next(self, name):
    self.step += 1
    if self.step == self.at:
      os.kill(os.getpid(), signal.SIGKILL)


def killed_at(step: int, path: pathlib.Path) -> int:
  """The status of a save to path that is killed at a step, DONE if it has fewer."""
  child = os.fork()
  if child == 0:
    status = 1
    try:
      Killer(step)
      write(path, 1)
      status = DONE
    except BaseException:
      traceback.print_exc()
    finally:
      os._exit(status)
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcomes(folder: pathlib.Path, exists: bool) -> dict:
  """What a kill at each step left at the path and beside it, and what the next save then did."""
  old, path = folder / "versions" / "old", folder / "saves" / "m"
  write(old, 0)
  add_others(old)
  shutil.copytree(old, path, symlinks=True)
  write(path, 1)
  if not exists:
    shutil.rmtree(path)
    write(path, 1)
  before, after = snapshot(old) if exists else None, snapshot(path)
  found = {"states": [], "beside": [], "next": []}
  for step in itertools.count():
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    if exists:
      shutil.copytree(old, path, symlinks=True)
    status = killed_at(step, path)
    state = snapshot(path)
    names = {"old": before, "new": after, "none": None}
    found["states"].append(next((name for name, s in names.items() if s == state), "torn"))
    others = [p for p in path.parent.iterdir() if p != path]
    found["beside"].append(
      sorted(p.suffix + (" old" if snapshot(p) == snapshot(old) else "") for p in others)
    )
    write(path, 1)
    tidy = [p.name for p in path.parent.iterdir()] == ["m"]
    found["next"].append(tidy and snapshot(path) == after)
    if status != DIED:
      break
  return found | {"last": status}


def main() -> None:
  warnings.simplefilter("ignore")
  os.fsync = lambda descriptor: None  # a kill loses nothing that is written
  folder = pathlib.Path(sys.argv[1])
  exchange = _replace.exchange
  found = {}
  for name, exists in (("exchanged", True), ("renamed", True), ("created", False)):
    _replace.exchange = (lambda one, other: False) if name == "renamed" else exchange
    (folder / name).mkdir()
    found[name] = outcomes(folder / name, exists)
  can = folder / "can"
  (can / "a").mkdir(parents=True)
  (can / "b").mkdir()
  found["can exchange"] = exchange(can / "a", can / "b")
  print(json.dumps(found))


if __name__ == "__main__":
  main()
