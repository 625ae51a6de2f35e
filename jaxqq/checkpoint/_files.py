"""The files of a checkpoint: each opened once, all of one version, read one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import io
import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jaxqq.checkpoint._replace import left_beside
from jaxqq.checkpoint._safetensors import (
  DTYPES,
  DamagedError,
  Entry,
  header_size,
  parse_header,
)

try:
  from tqdm import tqdm
except ImportError:
  tqdm = None

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

RECORDED = "jaxqq.amax"  # in the metadata of a file: JSON of `Recorded`
Recorded = dict[str, dict[str, float]]
# Of a layer there: 1 where inputs are quantized, and the configuration has no words for it.
QUANTIZE_INPUT = "quantize_input"

LARGEST_F32 = float(np.finfo(np.float32).max)
# Whether the system looks names up in a folder that is open; it is looked up by its path otherwise.
OPENS_FOLDERS = {os.open, os.stat} <= os.supports_dir_fd and os.listdir in os.supports_fd
ATTEMPTS = 10  # to open a folder that a writer keeps replacing


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """What a file's header says of a tensor."""

  name: str
  file: pathlib.Path
  dtype: str  # safetensors' name
  shape: tuple[int, ...]
  begin: int = 0  # bytes of the file
  end: int = 0


def describe(tensor: TensorInfo) -> str:
  return f"{tensor.dtype} of shape {tensor.shape}"


def shown(value: Any) -> str:
  """As much of a value's repr as a sentence has room for."""
  text = repr(value)
  return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


@contextlib.contextmanager
def progress_bar(title: str, total: int, wanted: bool) -> Iterator[Callable[[int], object]]:
  """Counts tensors, where tqdm is installed and stderr is a terminal."""
  if tqdm is None or not wanted:
    yield lambda count: None
    return
  with tqdm(total=total, desc=title, unit=" tensors", disable=None) as bar:
    yield bar.update


class Folder:
  """The files of one folder, which stays the same one while its name goes to another.

  A file is looked up in the folder that was opened, not by its path, and opened once: what a writer
  puts in its place later is not seen.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._on_close = contextlib.ExitStack()
    self._opened: dict[str, tuple[io.FileIO, os.stat_result]] = {}  # and what it was then
    self._fd: int | None = None
    if OPENS_FOLDERS:
      try:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
      except OSError as error:
        raise _as_sentence(error, path, "it could not be opened") from None
      self._on_close.callback(os.close, self._fd)
    self._own = os.stat(path if self._fd is None else self._fd)

  def close(self) -> None:
    self._on_close.close()

  def names(self, pattern: str) -> list[str]:
    """The files whose names match, in order."""
    found = os.listdir(self.path if self._fd is None else self._fd)
    return sorted(name for name in found if fnmatch.fnmatchcase(name, pattern) and self.has(name))

  def has(self, name: str) -> bool:
    """Whether there is a file, or a link to one, of this name."""
    try:
      return stat.S_ISREG(self._stat(name).st_mode)
    except (OSError, ValueError):
      return False

  def size(self, name: str) -> int:
    return self.open(name)[1].st_size

  def read(self, name: str, begin: int, end: int, what: str) -> np.ndarray[Any, Any]:
    """Bytes of a file as it was when it was opened, which are `what` of it."""
    file, before = self.open(name)
    out = np.empty(end - begin, np.uint8)
    rest = memoryview(out)
    try:
      file.seek(begin)
      while rest and (count := file.readinto(rest)):
        rest = rest[count:]
    except OSError as error:
      raise _as_sentence(error, self.path / name, f"{what} could not be read") from None
    if rest or _state(os.fstat(file.fileno())) != _state(before):
      raise ValueError(
        f"load: {self.path / name}: expected a file that nobody writes to, found that it changed "
        f"before {what} was read; load it again."
      )
    return out

  def json(self, name: str) -> dict[str, Any]:
    """The JSON object that a file is."""
    file = self.path / name
    text = self.read(name, 0, self.size(name), "it").tobytes()
    try:
      value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
      raise ValueError(f"load: {file}: expected JSON, found what is not ({error}).") from None
    if not isinstance(value, dict):
      raise ValueError(f"load: {file}: expected a JSON object, found {type(value).__name__}.")
    return value

  def open(self, name: str) -> tuple[io.FileIO, os.stat_result]:
    if name not in self._opened:
      # Without waiting, should it be a pipe by now.
      flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
      try:
        file = io.FileIO(
          str(self._at(name)), opener=lambda path, _: os.open(path, flags, dir_fd=self._fd)
        )
        self._on_close.callback(file.close)
        self._opened[name] = file, os.fstat(file.fileno())
      except OSError as error:
        raise _as_sentence(error, self.path / name, "it could not be opened") from None
    return self._opened[name]

  def changed(self) -> pathlib.Path | None:
    """The folder or an opened file, if its name means another one by now, or it was written to."""
    for name, (_, before) in self._opened.items():
      if _state(before) != _state(_found(functools.partial(self._stat, name))):
        return self.path / name if self._has_its_name() else self.path
    return None if self._has_its_name() else self.path

  def _has_its_name(self) -> bool:
    return _state(self._own)[:2] == _state(_found(lambda: os.stat(self.path)))[:2]

  def _at(self, name: str) -> str | pathlib.Path:
    return self.path / name if self._fd is None else name

  def _stat(self, name: str) -> os.stat_result:
    return os.stat(self._at(name), dir_fd=self._fd)


def _found(look: Callable[[], os.stat_result]) -> os.stat_result | None:
  try:
    return look()
  except OSError:
    return None


def _state(found: os.stat_result | None) -> tuple[int, ...]:
  """What tells a file from another one, and from itself after a write."""
  if found is None:
    return ()
  return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _as_sentence(error: OSError, file: pathlib.Path, what: str) -> OSError:
  return type(error)(f"load: {file}: {what} ({error.strerror}).")


class Reader:
  """The tensors of a checkpoint, whose files stay open while it is."""

  def __init__(self, path: pathlib.Path, configs: Iterable[str] = ()):
    """Opens all files, of one version.

    path: a folder, a .safetensors file, or an index.
    configs: names of JSON files that may be beside the weights; `self.configs` has what they hold.
    """
    if not path.exists():
      raise FileNotFoundError(f"load: {path}: there is no such file or folder{_left(path)}.")
    for _ in range(ATTEMPTS):
      self.files = Folder(path if path.is_dir() else path.parent)
      self.folder = self.files.path
      self.configs: dict[str, dict[str, Any]] = {}
      self.tensors: dict[str, TensorInfo] = {}
      self.recorded: Recorded = {}
      try:
        self._open(path, configs)
        changed = self.files.changed()
      except BaseException as error:
        changed = self.files.changed()
        self.close()
        if changed is None or not isinstance(error, (OSError, ValueError)):
          raise
      else:
        if changed is None:
          return
        self.close()
    raise ValueError(
      f"load: {path}: expected files of one version, found that {changed} changed each of "
      f"{ATTEMPTS} times that they were opened; load it again when nobody writes to it."
    )

  def __enter__(self) -> Reader:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    self.files.close()

  def _open(self, path: pathlib.Path, configs: Iterable[str]) -> None:
    self.configs = {name: self.files.json(name) for name in configs if self.files.has(name)}
    found: dict[str, TensorInfo] = {}
    for file, names in _weights_of(self.files, path).items():
      found |= self._tensors_of(file, names)
    self.tensors = dict(sorted(found.items()))

  def _tensors_of(self, file: str, names: list[str] | None) -> dict[str, TensorInfo]:
    """Those of a file. What else it holds than `names`, which an index gives, is not read."""
    where = self.files.path / file
    if not self.files.has(file):
      wanted = "" if names is None else f", which the index says holds {min(names)!r}"
      raise FileNotFoundError(f"load: {where}: there is no such file{wanted}.")
    entries, metadata = self._header(file)
    names = list(entries) if names is None else names
    layers = {name.rpartition(".")[0] for name in names}
    recorded = _recorded(where, metadata.get(RECORDED, "{}"))
    self.recorded |= {layer: recorded[layer] for layer in layers & recorded.keys()}
    missing = set(names) - entries.keys()
    if missing:
      raise ValueError(
        f"load: {where}: tensor {min(missing)!r} is not in the file, but the index lists it."
      )
    return {
      name: TensorInfo(name, where, entry.dtype, entry.shape, entry.begin, entry.end)
      for name, entry in ((name, entries[name]) for name in names)
    }

  def _header(self, file: str) -> tuple[dict[str, Entry], dict[str, str]]:
    size = self.files.size(file)
    try:
      length = header_size(self.files.read(file, 0, min(8, size), "it").tobytes(), size)
      header = self.files.read(file, 8, 8 + length, "its header").tobytes()
      return parse_header(header, size)
    except DamagedError as error:
      raise ValueError(
        f"load: {self.files.path / file}: expected a whole safetensors file, found {size} bytes "
        f"that are not one ({error})."
      ) from None

  def check_one_version(self) -> None:
    """When all is read: that no file has got another one's place in a folder that stayed.

    A whole folder in its place is no matter, since all was read in the one that was opened.
    """
    changed = self.files.changed()
    if changed not in (None, self.folder):
      raise ValueError(
        f"load: {changed}: expected a file that nobody writes to, found that another one took its "
        "place while the checkpoint was read; load it again."
      )

  def read(self, tensor: TensorInfo) -> np.ndarray:
    """One tensor, in memory of its own."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
      raise ValueError(
        f"load: {tensor.file}: tensor {tensor.name!r} must be of a dtype that numpy and ml_dtypes "
        f"have, found {describe(tensor)}."
      )
    what = f"tensor {tensor.name!r}"
    data = self.files.read(tensor.file.name, tensor.begin, tensor.end, what)
    return data.view(dtype).reshape(tensor.shape)


def _left(path: pathlib.Path) -> str:
  """What a save that was killed on a system that cannot exchange names left of a folder."""
  for folders in left_beside(path).values() if path.parent.is_dir() else ():
    for folder in folders:
      if folder.suffix == ".old":
        return f", but {folder.name} is what a save left that was killed; the next puts it back"
  return ""


def _recorded(file: pathlib.Path, text: str) -> Recorded:
  try:
    out = {layer: dict(fields) for layer, fields in json.loads(text).items()}
    if all(_is_amax(value) for fields in out.values() for value in fields.values()):
      return {layer: {k: float(v) for k, v in fields.items()} for layer, fields in out.items()}
  except (AttributeError, TypeError, ValueError, RecursionError):
    pass
  raise ValueError(
    f"load: {file}: the metadata {RECORDED!r} must be JSON of layers to numbers, each an amax in "
    f"float32, found {shown(text)}."
  )


def _is_amax(value: Any) -> bool:
  return type(value) in (int, float) and 0 <= value <= LARGEST_F32


def _weights_of(files: Folder, path: pathlib.Path) -> dict[str, list[str] | None]:
  """The weight files by name, with the tensors that the index, if there is one, says they hold."""
  single = path.name if path != files.path else None
  if single is not None and path.suffix != ".json":
    return {single: None}
  index = single or INDEX
  if files.has(index):
    return _indexed(files.path / index, files.json(index).get("weight_map"))
  if files.has(WEIGHTS):
    return {WEIGHTS: None}
  found = files.names("*.safetensors")
  if len(found) == 1:
    return {found[0]: None}
  raise FileNotFoundError(
    f"load: {path}: expected {WEIGHTS}, or {INDEX} and the files it names, found "
    f"{', '.join(found) or 'no .safetensors file'}."
  )


def _indexed(index: pathlib.Path, weight_map: Any) -> dict[str, list[str] | None]:
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(
      f"load: {index}: expected a 'weight_map' of tensor names to files, found {shown(weight_map)}."
    )
  out: dict[str, list[str] | None] = {}
  for name, file in weight_map.items():
    if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.isprintable():
      raise ValueError(
        f"load: {index}: tensor {name!r} must be in a file beside the index, found {shown(file)}."
      )
    out.setdefault(file, []).append(name)  # type: ignore[union-attr]
  return out
