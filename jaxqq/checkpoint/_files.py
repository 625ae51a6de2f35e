"""safetensors files: what is in them, one tensor at a time, and writing a folder as a whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

try:
  import safetensors
  from safetensors.numpy import save_file
except ImportError:
  raise ImportError(
    'jaxqq.checkpoint needs safetensors, which is not installed: pip install "jaxqq[checkpoint]".'
  ) from None

try:
  from tqdm import tqdm
except ImportError:
  tqdm = None

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

RECORDED = "jaxqq.amax"  # in the metadata of a file: JSON of `Recorded`
Recorded = dict[str, dict[str, float]]

# safetensors' numpy side asks numpy itself for these types, which has none of them.
_BY_BYTES = {
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
# numpy's names of what safetensors writes.
WRITTEN_DTYPES = (
  *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
  *("float16", "bfloat16", "float32", "float64", "complex64"),
  *(dtype.name for dtype in _BY_BYTES.values()),
)
DTYPES = _BY_BYTES | {"U8": np.dtype(np.uint8), "U32": np.dtype(np.uint32)}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """What a file's header says of a tensor."""

  name: str
  file: pathlib.Path
  dtype: str  # safetensors' name
  shape: tuple[int, ...]


def describe(tensor: TensorInfo) -> str:
  return f"{tensor.dtype} of shape {tensor.shape}"


@contextlib.contextmanager
def progress_bar(title: str, total: int, wanted: bool) -> Iterator[Callable[[int], object]]:
  """Counts tensors, where tqdm is installed and stderr is a terminal."""
  if tqdm is None or not wanted:
    yield lambda count: None
    return
  with tqdm(total=total, desc=title, unit=" tensors", disable=None) as bar:
    yield bar.update


class Reader:
  """The tensors of a checkpoint, whose files stay memory-mapped while it is open."""

  def __init__(self, path: pathlib.Path):
    """path: a folder, a .safetensors file, or an index."""
    self.folder = path if path.is_dir() else path.parent
    self.tensors: dict[str, TensorInfo] = {}
    self.recorded: Recorded = {}
    self._open_files = contextlib.ExitStack()
    self._handles: dict[pathlib.Path, Any] = {}
    with contextlib.ExitStack() as on_error:
      on_error.callback(self.close)
      for file, names in _files_of(path).items():
        self._open(file, names)
      on_error.pop_all()

  def __enter__(self) -> Reader:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    self._open_files.close()

  def _open(self, file: pathlib.Path, names: set[str] | None) -> None:
    """names: what the index says is there; None without an index."""
    if not file.is_file():
      wanted = "" if names is None else f", which the index says holds {min(names)!r}"
      raise FileNotFoundError(f"load: {file}: there is no such file{wanted}.")
    try:
      handle = self._open_files.enter_context(safetensors.safe_open(file, framework="np"))
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(
        f"load: {file}: expected a whole safetensors file, found {os.path.getsize(file)} bytes "
        f"that are not one ({error})."
      ) from None
    self._handles[file] = handle
    present = set(handle.keys())
    if names is not None and present != names:
      name = min(present ^ names)
      there, says = ("is", "does not list it") if name in present else ("is not", "lists it")
      raise ValueError(f"load: {file}: tensor {name!r} {there} in the file, but {INDEX} {says}.")
    self.recorded |= _recorded(file, (handle.metadata() or {}).get(RECORDED, "{}"))
    for name in handle.keys():  # noqa: SIM118, a handle is no mapping
      header = handle.get_slice(name)
      shape = tuple(header.get_shape())
      self.tensors[name] = TensorInfo(name, file, header.get_dtype(), shape)

  def read(self, tensor: TensorInfo) -> np.ndarray:
    """One tensor, in memory of its own."""
    dtype = _BY_BYTES.get(tensor.dtype)
    if dtype is not None:
      return _read_bytes(tensor).view(dtype).reshape(tensor.shape)
    try:
      out: np.ndarray = self._handles[tensor.file].get_tensor(tensor.name)
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:
      raise ValueError(
        f"load: {tensor.file}: tensor {tensor.name!r} must be of a dtype that numpy and ml_dtypes "
        f"have, found {describe(tensor)} ({error})."
      ) from None
    return out


def _recorded(file: pathlib.Path, text: str) -> Recorded:
  try:
    layers = {layer: dict(fields) for layer, fields in json.loads(text).items()}
    return {layer: {k: float(v) for k, v in fields.items()} for layer, fields in layers.items()}
  except (AttributeError, TypeError, ValueError):
    raise ValueError(
      f"load: {file}: the metadata {RECORDED!r} must be JSON of layers to numbers, found {text!r}."
    ) from None


def _read_bytes(tensor: TensorInfo) -> np.ndarray:
  """A tensor's bytes at the offsets of the header: its length in 8 bytes, JSON, then the data."""
  with open(tensor.file, "rb") as file:
    header_size = int.from_bytes(file.read(8), "little")
    begin, end = json.loads(file.read(header_size))[tensor.name]["data_offsets"]
    return np.fromfile(file, np.uint8, end - begin, offset=begin)


def _files_of(path: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
  """The files of a checkpoint, with the names that its index, if there is one, says they hold."""
  if not path.exists():
    raise FileNotFoundError(f"load: {path}: there is no such file or folder.")
  if path.is_file() and path.suffix != ".json":
    return {path: None}
  index = path / INDEX if path.is_dir() else path
  if index.is_file():
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
      raise ValueError(
        f"load: {index}: expected a 'weight_map' of tensor names to files, found {weight_map!r}."
      )
    files: dict[pathlib.Path, set[str] | None] = {}
    for name, file in weight_map.items():
      if not isinstance(file, str) or pathlib.PurePath(file).name != file:
        raise ValueError(
          f"load: {index}: tensor {name!r} must be in a file beside the index, found {file!r}."
        )
      files.setdefault(index.parent / file, set()).add(name)  # type: ignore[union-attr]
    return files
  if (path / WEIGHTS).is_file():
    return {path / WEIGHTS: None}
  found = sorted(path.glob("*.safetensors"))
  if len(found) == 1:
    return {found[0]: None}
  raise FileNotFoundError(
    f"load: {path}: expected {WEIGHTS}, or {INDEX} and the files it names, found "
    f"{', '.join(file.name for file in found) or 'no .safetensors file'}."
  )


def read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except (ValueError, OSError) as error:
    raise ValueError(f"load: {file}: expected JSON, found what is not ({error}).") from None
  if not isinstance(value, dict):
    raise ValueError(f"load: {file}: expected a JSON object, found {type(value).__name__}.")
  return value


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
  save_file(tensors, file, metadata=metadata)
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
