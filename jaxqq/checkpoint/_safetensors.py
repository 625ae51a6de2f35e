"""The safetensors format: the header of a file, checked as a whole, and how one is written.

A file is the length of its header in 8 bytes (little-endian), the header, and the data. The header
is a JSON object of tensor names to {"dtype", "shape", "data_offsets"}, padded with spaces, and
"__metadata__", strings to strings. The tensors follow each other without holes or overlaps.
Source: huggingface/safetensors README.md ("Format") and safetensors/src/tensor.rs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

# numpy's dtype of each of safetensors'.
DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "U16": np.dtype(np.uint16),
  "I16": np.dtype(np.int16),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "U32": np.dtype(np.uint32),
  "I32": np.dtype(np.int32),
  "F32": np.dtype(np.float32),
  "U64": np.dtype(np.uint64),
  "I64": np.dtype(np.int64),
  "F64": np.dtype(np.float64),
  "C64": np.dtype(np.complex64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

METADATA = "__metadata__"
LARGEST_HEADER = 100_000_000  # bytes, by the format
_ALIGNMENT = 8  # of the data within the file


class DamagedError(Exception):
  """Why bytes are no safetensors file, as a clause."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor as the header of its file has it. Offsets are those of the file."""

  dtype: str
  shape: tuple[int, ...]
  begin: int
  end: int


def header_size(prefix: bytes, file_size: int) -> int:
  """The length of the header, from the first 8 bytes of a file."""
  if len(prefix) < 8:
    raise DamagedError("there is no header")
  size = int.from_bytes(prefix, "little")
  if size > LARGEST_HEADER:
    raise DamagedError(f"its header would have {size} bytes, more than {LARGEST_HEADER}")
  if size > file_size - 8:
    raise DamagedError(f"its header of {size} bytes is cut short")
  return size


def parse_header(header: bytes, file_size: int) -> tuple[dict[str, Entry], dict[str, str]]:
  """The tensors by name, in the order of their data, and the metadata of a file."""
  try:
    parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_without_duplicates)
  except (ValueError, RecursionError) as error:
    raise DamagedError(f"its header is no JSON: {str(error) or type(error).__name__}") from None
  if not isinstance(parsed, dict):
    raise DamagedError("its header is no JSON object")
  metadata = parsed.pop(METADATA, {})
  if not _is_str_map(metadata):
    raise DamagedError("its metadata are not strings by names")
  data = 8 + len(header)
  entries = {name: _entry(name, value, data) for name, value in parsed.items()}
  ordered = sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))
  ends = [(data, "its header"), *((entry.end, f"tensor {name!r}") for name, entry in ordered)]
  gaps = [entry.begin - end for (_, entry), (end, _) in zip(ordered, ends, strict=False)]
  # An overlap tells more of what is wrong than the hole that it leaves elsewhere.
  wrong = next((i for is_wrong in _WRONG for i, gap in enumerate(gaps) if is_wrong(gap)), None)
  if wrong is not None:
    (name, entry), (end, before) = ordered[wrong], ends[wrong]
    raise DamagedError(
      f"tensor {name!r} begins at byte {entry.begin}, not at {end} where {before} ends"
    )
  end, last = ends[-1]
  if end != file_size:
    last += ", its last," if ordered else ""
    raise DamagedError(f"{last} should end at that byte, and does at {end}")
  return dict(ordered), metadata


_WRONG: tuple[Callable[[int], bool], ...] = (lambda gap: gap < 0, lambda gap: gap > 0)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  out = dict(pairs)
  if len(out) != len(pairs):
    seen: set[str] = set()
    name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    raise ValueError(f"{name!r} is there twice")
  return out


def _is_str_map(value: Any) -> bool:
  return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _entry(name: str, value: Any, data: int) -> Entry:
  """data: where the data of the file begins."""
  value = value if isinstance(value, dict) else {}
  dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
  if not isinstance(dtype, str):
    raise DamagedError(f"tensor {name!r} has no dtype")
  if not _are_sizes(shape):
    raise DamagedError(f"tensor {name!r} has no shape")
  if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise DamagedError(f"tensor {name!r} has no data_offsets")
  begin, end = offsets
  known = DTYPES.get(dtype)
  if known is not None and math.prod(shape) * known.itemsize != end - begin:
    raise DamagedError(
      f"tensor {name!r} is {dtype} of shape {tuple(shape)}, which are not {end - begin} bytes"
    )
  return Entry(dtype, tuple(shape), data + begin, data + end)


def _are_sizes(value: Any) -> bool:
  """A list of whole numbers of 63 bits; true and false, Python's ints too, are none."""
  return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def file_chunks(
  tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Iterable[np.ndarray]:
  """The bytes of a file, header first: the same ones for the same arguments."""
  arrays = {
    name: array.astype(array.dtype.newbyteorder("<"), copy=False) for name, array in tensors.items()
  }
  # Large elements first, so that each tensor begins at a multiple of its element's size.
  names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
  header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
  offset = 0
  for name in names:
    array = arrays[name]
    offsets = [offset, offset + array.nbytes]
    header[name] = {
      "dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets
    }  # fmt: skip
    offset = offsets[1]
  text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
  text += b" " * (-len(text) % _ALIGNMENT)
  yield np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
  for name in names:
    yield np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
