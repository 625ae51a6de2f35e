"""Faults of disks and of tools: files cut, bits flipped, JSON that lies.

`faults` yields some of each sort from a seed. What a damaged folder holds is read by
`read_reference`, safetensors' own parser and json, without jaxqq.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import safetensors

INDEX = "model.safetensors.index.json"
CONFIGS = ("config.json", "hf_quant_config.json")


@dataclasses.dataclass(frozen=True)
class Fault:
  """A change of one file.

  Attributes:
    name: of the sort of fault, with what it did.
    file: the file that was changed.
    apply: does it to the file of a folder.
    about: what an error must name besides files, one of these; none where it cannot know more.
  """

  name: str
  file: str
  apply: Callable[[pathlib.Path], None]
  about: tuple[str, ...] = ()


def faults(folder: pathlib.Path, rng: np.random.Generator) -> Iterator[Fault]:
  """Of a checkpoint that is whole: some of each sort, for each of its files."""
  for file in sorted(path.name for path in folder.iterdir()):
    data = (folder / file).read_bytes()
    yield from cuts(file, data, rng)
    yield Fault("removed", file, lambda path: path.unlink())
    if file.endswith(".safetensors"):
      size = 8 + int.from_bytes(data[:8], "little")
      for begin, end, count in ((0, 8, 4), (8, size, 12), (size, len(data), 4)):
        yield from flips(file, data, begin, end, count, rng)
      yield from header_lies(file, data, rng)
    else:
      yield from flips(file, data, 0, len(data), 8, rng)
      yield from json_lies(file, json.loads(data), 8, rng)
      if file == INDEX:
        yield from index_lies(file, json.loads(data), rng)


def written(data: bytes) -> Callable[[pathlib.Path], None]:
  return lambda path: path.write_bytes(data) and None


def cuts(file: str, data: bytes, rng: np.random.Generator) -> Iterator[Fault]:
  sizes = {0, 1, 7, 8, 9, len(data) - 1, *rng.integers(0, len(data), 3).tolist()}
  for size in sorted(sizes):
    yield Fault(f"cut to {size} of {len(data)} bytes", file, written(data[:size]))
  yield Fault("zeros behind", file, written(data + bytes(64)))
  hole = rng.integers(0, len(data) // 2)
  zeroed = data[:hole] + bytes(len(data) // 2) + data[hole + len(data) // 2 :]
  yield Fault(f"zeros from byte {hole} on", file, written(zeroed))


def flips(
  file: str, data: bytes, begin: int, end: int, count: int, rng: np.random.Generator
) -> Iterator[Fault]:
  """Single bits between two bytes of a file."""
  for at in rng.integers(begin, end, count).tolist() if end > begin else ():
    bit = int(rng.integers(8))
    flipped = bytearray(data)
    flipped[at] ^= 1 << bit
    yield Fault(f"bit {bit} of byte {at} flipped", file, written(bytes(flipped)))


def header_lies(file: str, data: bytes, rng: np.random.Generator) -> Iterator[Fault]:
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])
  names = sorted(header.keys() - {"__metadata__"})

  def lie(what: str, name: str, change: Callable[[dict], None], *others: str) -> Fault:
    other = copy.deepcopy(header)
    change(other)
    text = json.dumps(other).encode()
    about = () if what == "gone" else words_of(name, *others)  # what is not there is not known
    made = len(text).to_bytes(8, "little") + text + data[8 + size :]
    return Fault(f"{name!r}: {what}", file, written(made), about)

  for name in rng.permutation(names)[:6].tolist():
    entry = header[name]
    begin, end = entry["data_offsets"]
    other_name = rng.choice([other for other in names if other != name])
    other_dtype = str(rng.choice([d for d in SIZES if d != entry["dtype"]]))
    shape = [*entry["shape"], 1]
    fields = {
      f"dtype {other_dtype}": {"dtype": other_dtype},
      "a dtype that none has": {"dtype": "F5_E3M1"},
      "no dtype": {"dtype": None},
      "an axis more": {"shape": shape},
      "an axis more, of two": {"shape": [*entry["shape"], 2]},
      "one flat axis": {"shape": [int(np.prod(entry["shape"]))]},
      "turned axes": {"shape": entry["shape"][::-1]},
      "a negative size": {"shape": [-1, *entry["shape"]]},
      "a size that is no number": {"shape": ["8"]},
      "no shape": {"shape": None},
      "offsets beyond the file": {"data_offsets": [begin, end + (1 << 40)]},
      "another one's offsets": {"data_offsets": header[other_name]["data_offsets"]},
      "offsets in the wrong order": {"data_offsets": [end, begin]},
      "a byte less": {"data_offsets": [begin, end - 1]},
      "a byte later": {"data_offsets": [begin + 1, end + 1]},
    }
    for what in rng.permutation(list(fields))[:5].tolist():
      yield lie(what, name, lambda h, n=name, f=fields[what]: h[n].update(f))
    yield lie("gone", name, lambda h, n=name: h.pop(n))
    yield lie("an entry that is none", name, lambda h, n=name: h.update({n: [1]}))
    yield lie("renamed", name, lambda h, n=name: h.update({f"{n}.old": h.pop(n)}))
    yield lie(
      f"named {other_name!r}", name,
      lambda h, n=name, o=other_name: h.update({n: h[o], o: h[n]}), other_name,
    )  # fmt: skip


SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "U32": 4, "I32": 4, "F8_E4M3": 1}
SIZES |= {"F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1, "I64": 8, "F64": 8}


def words_of(*names: str) -> tuple[str, ...]:
  """One of these is in a sentence about one of the tensors, or about its layer."""
  layers = [name.rpartition(".")[0] for name in names if "." in name]
  return (*map(repr, names), *(f"'{layer}." for layer in layers), *map(repr, layers))


def index_lies(file: str, index: dict, rng: np.random.Generator) -> Iterator[Fault]:
  weight_map = index["weight_map"]
  files = sorted(set(weight_map.values()))
  for name in rng.permutation(sorted(weight_map))[:6].tolist():
    about = words_of(name, f"{name}.old")
    other = next(other for other in [*files, *files] if other != weight_map[name])
    gone = {key: value for key, value in weight_map.items() if key != name}
    maps = {
      f"in {other}": weight_map | {name: other},
      "in a file that is not there": weight_map | {name: "other.safetensors"},
      "in another folder": weight_map | {name: f"../{other}"},
      "in no file": weight_map | {name: None},
      "not listed": gone,
      "under another name": gone | {f"{name}.old": weight_map[name]},
    }
    for what, lie in maps.items():
      data = json.dumps(index | {"weight_map": lie}).encode()
      yield Fault(f"index: {name!r} {what}", file, written(data), about)


VALUES = (None, True, False, 0, -1, 7, 1e300, "", "x", "nvfp4", "mxfp8", [], ["x"], {}, {"x": 1})


def json_lies(file: str, value: dict, count: int, rng: np.random.Generator) -> Iterator[Fault]:
  """Somewhere in the object another value, or none."""
  places = sorted(places_in(value), key=repr)
  for i in rng.integers(0, len(places), count).tolist():
    *path, key = places[i]
    other = copy.deepcopy(value)
    inner = other
    for part in path:
      inner = inner[part]
    if rng.integers(4) == 0:
      del inner[key]
      what = "gone"
    else:
      inner[key] = VALUES[rng.integers(len(VALUES))]
      what = repr(inner[key])
    yield Fault(
      f"{'.'.join(map(str, places[i]))} {what}", file, written(json.dumps(other).encode())
    )


def places_in(value) -> Iterator[tuple]:
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, inner in items:
    yield (key,)
    if isinstance(inner, (dict, list)):
      yield from ((key, *place) for place in places_in(inner))


def read_reference(folder: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
  """Each tensor as (dtype, shape, bytes) where the index says it is; None if it cannot be had."""
  try:
    files = {"model.safetensors": None}
    if (folder / INDEX).exists():
      files = {}
      for name, file in json.loads((folder / INDEX).read_bytes())["weight_map"].items():
        if pathlib.PurePath(file).name != file:
          return None
        files.setdefault(file, []).append(name)
    out = {}
    for file, names in files.items():
      found = dict(safetensors.deserialize((folder / file).read_bytes()))
      for name in found if names is None else names:
        entry = found[name]
        out[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
  except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError):
    return None
  return out or None
