"""A folder that takes another one's place: at every moment its name means the old one or the new.

The new one is written beside it, as `.<name>.<id>.tmp`, and the two exchange their names at once
where the system can. Elsewhere the old one is renamed to `.<name>.<id>.old` first, and for a moment
none has the name. Who writes holds a lock on the new folder, which ends with the process: a folder
of such a name that nobody holds was left by a save that was killed, and the next one tidies it up.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fnmatch
import functools
import hashlib
import os
import pathlib
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

try:
  import fcntl
except ImportError:  # Windows: what a killed save left is not told from what a live one writes
  fcntl = None  # type: ignore[assignment]

_LONGEST_PREFIX = 200  # bytes; file systems have names of 255, and an id and ".tmp" take 38
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' fcntl.h and fs.h


@dataclasses.dataclass
class Target:
  """The folder to write in, and how it got its name."""

  folder: pathlib.Path
  at_once: bool = True


def check_target(path: pathlib.Path, overwrite: bool) -> None:
  if path.exists() and not path.is_dir():
    raise FileExistsError(f"save: {path} is a file; path must be a folder, new or empty.")
  if not overwrite and path.exists() and any(path.iterdir()):
    raise FileExistsError(
      f"save: {path} is not empty; path must be a new or empty folder, or pass overwrite=True."
    )


@contextlib.contextmanager
def replacing(path: pathlib.Path, replaced: list[str], overwrite: bool) -> Iterator[Target]:
  """A folder to write in that takes path's name once all is written, and is gone otherwise.

  What the folder at path holds stays, but for its own files that `replaced` matches: those in its
  subfolders stay too. Where path is a link, the folder that it leads to is replaced.
  """
  path = pathlib.Path(os.path.realpath(path))
  with contextlib.ExitStack() as exit_stack:
    exit_stack.enter_context(_naming(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path)
    check_target(path, overwrite)
    target = Target(_locked_folder(path, exit_stack))
    try:
      yield target
      if path.exists():
        _take_others(path, target.folder, replaced)
        shutil.copymode(path, target.folder)
      for folder, _, _ in os.walk(target.folder):
        sync(folder)
      with _staying_in(path):
        target.at_once = _put(target.folder, path, overwrite)
      sync(path.parent)
    finally:  # by now the old one, if it had its name
      shutil.rmtree(target.folder, ignore_errors=True)
    if not target.at_once:
      shutil.rmtree(_old(target.folder), ignore_errors=True)


@contextlib.contextmanager
def _staying_in(path: pathlib.Path) -> Iterator[None]:
  """A process that works in the folder works in the new one then, not in one that has no name."""
  try:
    working = pathlib.Path.cwd()
  except OSError:  # it is in such a one already
    working = path.parent
  yield
  if path in (working, *working.parents):
    with contextlib.suppress(OSError):
      os.chdir(working)


def sync(path: str | os.PathLike[str]) -> None:
  """Onto the disk, before the folder gets its name."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Errors of the system as a sentence that names what was to be saved."""
  try:
    yield
  except OSError as error:
    if str(error).startswith("save: "):
      raise
    reason = error.strerror or str(error)
    file = pathlib.Path(os.fsdecode(error.filename)) if error.filename else path
    what = file.name if file.parent.name.startswith(_prefix(path)) else file
    sentence = type(error)(f"save: {path}: {what} could not be written ({reason}).")
    sentence.errno = error.errno
    raise sentence from error


def _locked_folder(path: pathlib.Path, exit_stack: contextlib.ExitStack) -> pathlib.Path:
  """A new folder beside path, whose lock is held until the exit."""
  while True:
    folder = path.with_name(f"{_prefix(path)}{uuid.uuid4().hex}.tmp")
    folder.mkdir()
    if fcntl is None:
      return folder
    with contextlib.suppress(FileNotFoundError):
      descriptor = os.open(folder, os.O_RDONLY)
      exit_stack.callback(os.close, descriptor)
      with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
      if os.path.samestat(os.stat(folder), os.fstat(descriptor)):
        return folder
    # Another save took it for one left by a killed save, before it was locked.


def _prefix(path: pathlib.Path) -> str:
  """Of the names of folders beside path: a long name's digest, as theirs have no room for both."""
  name = os.fsencode(path.name)
  if len(name) <= _LONGEST_PREFIX:
    return f".{path.name}."
  return f".{hashlib.sha256(name).hexdigest()}."


def _old(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_suffix(".old")


def left_beside(path: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """The folders beside path that saves to it write or wrote, by the id of each save."""
  pattern = re.compile(re.escape(_prefix(path)) + r"([0-9a-f]{32})\.(?:tmp|old)")
  saves: dict[str, list[pathlib.Path]] = {}
  with os.scandir(path.parent) as entries:
    for entry in entries:
      match = pattern.fullmatch(entry.name)
      if match and entry.is_dir(follow_symlinks=False):
        saves.setdefault(match[1], []).append(pathlib.Path(entry.path))
  return saves


def _tidy(path: pathlib.Path) -> None:
  """Removes what killed saves left, and gives the old folder its name back if it has none."""
  if fcntl is None:
    return
  with contextlib.ExitStack() as locks:
    dead, live = [], False
    for folders in left_beside(path).values():
      if all(_lock(folder, locks) for folder in folders):
        dead += folders
      else:
        live = True
    for folder in dead:
      if folder.suffix == ".old" and not live and not path.exists():
        os.rename(folder, path)
      else:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: pathlib.Path, locks: contextlib.ExitStack) -> bool:
  """Whether nobody else holds it, nor can be thought to."""
  try:
    descriptor = os.open(folder, os.O_RDONLY)
    locks.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    return False
  return True


def _take_others(path: pathlib.Path, folder: pathlib.Path, replaced: list[str]) -> None:
  """What stays of the old folder, into the new one: the same files where they can be linked."""
  with os.scandir(path) as entries:
    for entry in sorted(entries, key=lambda entry: entry.name):
      if entry.is_dir(follow_symlinks=False):
        if (folder / entry.name).exists():
          raise FileExistsError(f"save: {path / entry.name} is a folder, where a file is written.")
        shutil.copytree(entry.path, folder / entry.name, symlinks=True, copy_function=_link)
      elif not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in replaced):
        _link(entry.path, str(folder / entry.name))


def _link(source: str, target: str) -> None:
  try:
    os.link(source, target, follow_symlinks=False)
  except OSError:  # a file system without such links, or another one's file
    shutil.copy2(source, target, follow_symlinks=False)
    if not os.path.islink(target):
      sync(target)


def _put(folder: pathlib.Path, path: pathlib.Path, overwrite: bool) -> bool:
  """Gives path's name to a folder; whether no moment was without one of that name."""
  if not overwrite or not path.exists():
    try:
      os.rename(folder, path)
    except OSError as error:
      if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        check_target(path, overwrite)
      raise
    return True
  if exchange(folder, path):
    return True
  os.rename(path, _old(folder))
  try:
    os.rename(folder, path)
  except BaseException:
    os.rename(_old(folder), path)
    raise
  return False


def exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
  """Whether two folders got each other's names in one step; nothing is changed if they did not."""
  renameat2 = _renameat2()
  if renameat2 is None:
    return False
  names = (os.fsencode(one), os.fsencode(other))
  # A file system without it, or a rule against it: the plain renames tell what is wrong, if any is.
  return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


@functools.cache
def _renameat2() -> Callable[..., int] | None:
  """Of Linux' C library: rename, with flags."""
  if not sys.platform.startswith("linux"):
    return None
  function: Any = getattr(ctypes.CDLL(None), "renameat2", None)
  if function is not None:
    function.argtypes = (
      ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
    )  # fmt: skip
    function.restype = ctypes.c_int
  return function
