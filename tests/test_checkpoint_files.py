"""The files of a checkpoint: what they say, how they are read, and others who write meanwhile."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

import jaxqq
from jaxqq import checkpoint
from jaxqq.checkpoint import _files
from tests.support import checkpoints
from tests.support.messages import refused

INDEX = "model.safetensors.index.json"
# Where names cannot be exchanged, `save` says so.
pytestmark = pytest.mark.filterwarnings("ignore:save. .* this system cannot exchange")


def contents(loaded):
  """All that a load gave, to compare."""
  arrays = {name: [np.asarray(a) for a in jax.tree.leaves(value)] for name, value in loaded.items()}
  return {
    name: [(a.dtype.name, a.shape, a.tobytes()) for a in leaves] for name, leaves in arrays.items()
  }


def write_sharded(folder, seed):
  """A small checkpoint in two files, float8 in both, without jaxqq."""
  rng = np.random.default_rng(seed)
  tensors = checkpoints.layers("nvfp4-pack-quantized", rng)[0] | checkpoints.others(rng)
  folder.mkdir()
  weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
  for file in ("0.safetensors", "1.safetensors"):
    save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
  (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
  config = checkpoints.configs("nvfp4-pack-quantized")["config_json"] | {"seed": seed}
  (folder / "config.json").write_text(json.dumps(config))
  return folder


# One version, or an error


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
  """Two checkpoints of the same names and shapes, and what each holds."""
  folder = tmp_path_factory.mktemp("versions")
  folders = [write_sharded(folder / name, seed) for seed, name in enumerate("ab")]
  return folders, [contents(checkpoint.load(path)) for path in folders]


def test_a_save_from_loads_own_callback(versions, tmp_path):
  (a, b), (a_contents, b_contents) = versions
  shutil.copytree(a, tmp_path / "m")
  other, calls = checkpoint.load(b), []

  def device(name, shape):
    calls.append(name)
    if len(calls) in (1, 4):
      options = {"format": "compressed-tensors", "overwrite": True, "max_shard_size": 700}
      checkpoint.save(tmp_path / "m", other, **options)

  assert contents(checkpoint.load(tmp_path / "m", device=device)) == a_contents
  assert contents(checkpoint.load(tmp_path / "m")) == b_contents


def copy_in_place(source, target):
  """Into the file that is there."""
  target.write_bytes(source.read_bytes())


def put_in_place(source, target):
  shutil.copy(source, target.with_suffix(".new"))
  os.replace(target.with_suffix(".new"), target)


class Writer:
  """Makes folder `path` version b, in two parts, at the loader's steps `first` and `second`."""

  def __init__(self, path, b, how, steps):
    self.path, self.b, self.how, self.steps, self.step, self.busy = path, b, how, steps, -1, False

  def __call__(self, real):
    def looked_up(*args, **options):
      if not self.busy:
        self.busy = True
        self.step += 1
        self.write()
        self.busy = False
      return real(*args, **options)

    return looked_up

  def write(self):
    files = sorted(self.b.iterdir())
    for part, step in enumerate(self.steps):
      if self.step != step:
        continue
      if self.how == "folder":
        if part == 0:
          self.path.rename(self.path.with_suffix(".old"))
          shutil.copytree(self.b, self.path)
        else:
          shutil.rmtree(self.path.with_suffix(".old"))
        continue
      put = copy_in_place if self.how == "in place" else put_in_place
      for file in files[:2] if part == 0 else files[2:]:
        put(file, self.path / file.name)


@pytest.mark.parametrize("opens_folders", [True, False])
@pytest.mark.parametrize("how", ["folder", "in place", "file by file"])
def test_a_writer_at_every_step_of_a_load(how, opens_folders, versions, tmp_path, monkeypatch):
  """Its first half at any step, the second at the next one, some later, or late."""
  (a, b), wanted = versions
  monkeypatch.setattr(_files, "OPENS_FOLDERS", opens_folders)
  count = Writer(a, b, how, ())
  with monkeypatch.context() as patch:
    watch(patch, count)
    checkpoint.load(a)
  last = count.step - 5  # before the names of a folder and its four files are looked up again
  outcomes = []
  for first in range(last + 1):
    for second in {first + 1, first + 5, last} - set(range(first + 1)) - {last + 1}:
      path = tmp_path / f"{first}-{second}"
      shutil.copytree(a, path)
      with monkeypatch.context() as patch:
        watch(patch, Writer(path, b, how, (first, second)))
        try:
          loaded = checkpoint.load(path)
        except (ValueError, OSError) as error:
          assert str(error).startswith(f"load: {path}"), error
          outcomes.append("error")
          continue
      outcomes.append(wanted.index(contents(loaded)))
      assert loaded.config["seed"] == outcomes[-1]
  assert ({0, 1} if how == "folder" else {1}) <= set(outcomes) and len(outcomes) > 20
  if how == "folder" and opens_folders:
    assert "error" not in outcomes


def watch(patch, writer):
  for name in ("open", "stat", "fstat"):
    patch.setattr(os, name, writer(getattr(os, name)))


def test_a_folder_that_never_stays(versions, tmp_path, monkeypatch):
  (a, _), _ = versions
  shutil.copytree(a, tmp_path / "m")
  fstat = os.fstat

  def touch(descriptor):
    os.utime(tmp_path / "m" / "config.json", ns=(0, touch.time))
    touch.time += 1
    return fstat(descriptor)

  touch.time = 1
  monkeypatch.setattr(os, "fstat", touch)
  refused(tmp_path / "m", tmp_path / "m" / "config.json")


def test_a_file_that_shrinks_while_it_is_read(versions, tmp_path):
  (a, _), _ = versions
  shutil.copytree(a, tmp_path / "m")

  def device(name, shape):
    for file in ("0.safetensors", "1.safetensors"):
      os.truncate(tmp_path / "m" / file, 900)

  with pytest.raises(ValueError, match=r"load: .*safetensors: .*tensor '.*' was read; load it"):
    checkpoint.load(tmp_path / "m", device=device)


@pytest.mark.parametrize("opens_folders", [True, False])
def test_each_file_is_opened_and_its_header_read_once(opens_folders, versions, monkeypatch):
  """However many float8 tensors it has: load takes time that is linear in their number."""
  (a, _), _ = versions
  opened, parsed, real_open, real_parse = [], [], os.open, _files.parse_header
  monkeypatch.setattr(_files, "OPENS_FOLDERS", opens_folders)
  monkeypatch.setattr(
    os, "open", lambda path, *args, **kw: opened.append(path) or real_open(path, *args, **kw)
  )
  monkeypatch.setattr(_files, "parse_header", lambda *args: parsed.append(1) or real_parse(*args))
  loaded = checkpoint.load(a)
  assert sum(isinstance(value, jaxqq.QuantizedWeight) for value in loaded.values()) == 2
  files = [os.path.basename(path) for path in opened if str(path) != str(a)]
  assert sorted(files) == sorted(path.name for path in a.iterdir()) and len(parsed) == 2


# What files say


def test_an_index_is_the_authority(tmp_path):
  """A file may hold more than is listed, or an older copy of what another one holds."""
  folder = write_sharded(tmp_path / "m", 0)
  before = contents(checkpoint.load(folder))
  weight_map = checkpoints.read_json(folder / INDEX)["weight_map"]
  raw = {file: load_all(folder / file) for file in sorted(set(weight_map.values()))}
  for file, tensors in raw.items():
    others = {name: np.zeros_like(a) for t in raw.values() for name, a in t.items()}
    extra = {"up.weight": np.ones((8, 64), np.float32), "down.weight_packed.old": np.ones(3)}
    save_file(others | extra | tensors, folder / file)
  assert contents(checkpoint.load(folder)) == before
  (folder / "model.safetensors").write_bytes(b"no part of it")
  assert contents(checkpoint.load(folder)) == before


def load_all(file):
  with safetensors.safe_open(file, "np") as handle:
    names = list(handle.keys())
  data, raw = file.read_bytes(), checkpoints.read_raw(file.parent)
  assert len(data) and set(names) <= raw.keys()
  dtypes = {"F8_E4M3": checkpoints.E4M3, "BF16": ml_dtypes.bfloat16, "U8": np.uint8}
  dtypes |= {"F32": np.float32, "F16": np.float16, "I64": np.int64, "BOOL": np.bool_}
  return {
    name: np.frombuffer(raw[name][2], dtypes[raw[name][0]]).reshape(raw[name][1]) for name in names
  }


HEADER = {"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}


@pytest.mark.parametrize(
  ("header", "words"),
  [
    (b"[" * 100_000, ("its header is no JSON",)),
    (b"[]", ("its header is no JSON object",)),
    (b'{"x": \xff}', ("its header is no JSON",)),
    (b'{"x": 1, "x": 2}', ("'x' is there twice",)),
    ({"x": 3}, ("tensor 'x' has no dtype",)),
    ({"__metadata__": {"a": 1}}, ("its metadata",)),
    ({"__metadata__": []}, ("its metadata",)),
    ({"shape": [2.0]}, ("tensor 'x' has no shape",)),
    ({"shape": [True, 2]}, ("tensor 'x' has no shape",)),
    ({"shape": [-1, -2]}, ("tensor 'x' has no shape",)),
    ({"shape": [10**60]}, ("tensor 'x' has no shape",)),
    ({"shape": [1 << 62, 1 << 62, 0, 5]}, ("tensor 'x' is U8 of shape",)),
    ({"shape": [3]}, ("tensor 'x' is U8 of shape (3,)", "2 bytes")),
    ({"dtype": "U16"}, ("tensor 'x' is U16 of shape (2,)", "2 bytes")),
    ({"data_offsets": [2, 0]}, ("tensor 'x' has no data_offsets",)),
    ({"data_offsets": [0, 2, 2]}, ("tensor 'x' has no data_offsets",)),
    ({"data_offsets": [1, 3]}, ("tensor 'x' begins at byte",)),
    ({"data_offsets": [0, 1], "shape": [1]}, ("tensor 'x', its last",)),
    ({"data_offsets": [0, 3], "shape": [3]}, ("tensor 'x', its last",)),
    ({"y": HEADER["x"]}, ("tensor 'y' begins at byte",)),
  ],
)
def test_a_header_that_lies(header, words, tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "mlx")
  if isinstance(header, dict):
    whole = "x" in header or "y" in header or "__metadata__" in header
    header = HEADER | header if whole else {"x": HEADER["x"] | header}
    header = json.dumps(header).encode()
  file = folder / "model.safetensors"
  file.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
  refused(folder, file, "whole safetensors file", *words)


@pytest.mark.parametrize(
  "text", ["[" * 100_000, '{"a": ' * 100_000, '{"weight_map": 1%s}' % ("0" * 5000)]
)
def test_json_that_is_too_deep_or_too_long(text, tmp_path):
  folder = write_sharded(tmp_path / "m", 0)
  for name in (INDEX, "config.json"):
    before = (folder / name).read_text()
    (folder / name).write_text(text)
    assert len(refused(folder, folder / name)) < 1000
    (folder / name).write_text(before)


@pytest.mark.parametrize("file", ["", ".", "..", "a\0b", "sub/x.safetensors", "sub", "pipe"])
def test_what_an_index_cannot_name(file, tmp_path):
  folder = write_sharded(tmp_path / "m", 0)
  (folder / "sub").mkdir()
  os.mkfifo(folder / "pipe")
  index = checkpoints.read_json(folder / INDEX)
  index["weight_map"]["mask"] = file
  (folder / INDEX).write_text(json.dumps(index))
  kind = ValueError if file == "." or {"/", "\0"} & set(file) else FileNotFoundError
  refused(folder, folder, "'mask'", kind=kind)


@pytest.mark.parametrize(
  "number", ["1" + "0" * 400, "1" + "0" * 5000, "1e999", "-1", "NaN", "1e39", "true"]
)
def test_an_amax_that_is_none(number, tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "modelopt")
  tensors, _ = checkpoints.layers("modelopt", np.random.default_rng(0))
  text = '{"up": {"global_scale": ' + number + "}}"
  save_file(tensors, folder / "model.safetensors", {"jaxqq.amax": text})
  assert len(refused(folder, "model.safetensors", "'jaxqq.amax'")) < 1000


@pytest.mark.parametrize("value", [["a"], "float16", 3, True, None, {"dtype": ["x"]}])
def test_a_text_config_that_is_no_object(value, tmp_path):
  folder, wanted, _ = checkpoints.write_kind(tmp_path / "m", "mlx")
  config = checkpoints.read_json(folder / "config.json") | {"text_config": value}
  (folder / "config.json").write_text(json.dumps(config))
  loaded = checkpoint.load(folder)
  assert loaded.config["text_config"] == value
  np.testing.assert_array_equal(loaded["up.weight"].packed, wanted["up.weight"]["packed"])


def test_an_amax_of_a_file_that_the_index_does_not_ask(tmp_path):
  """Two amax of one scalar: that of the file whose tensor is read holds."""
  amax = np.random.default_rng(0).uniform(1, 32, 100).astype(np.float32)
  scalar = checkpoints.scalar_of("modelopt", amax)
  at = next(i for i, s in enumerate(scalar) if checkpoints.amax_of("modelopt", s) != amax[i])
  other = checkpoints.amax_of("modelopt", scalar[at])
  assert checkpoints.scalar_of("modelopt", other) == scalar[at]
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "modelopt")
  tensors, _ = checkpoints.layers("modelopt", np.random.default_rng(0))
  tensors["up.weight_scale_2"] = np.asarray(scalar[at])
  for file, exact in (("a", amax[at]), ("b", other)):
    metadata = {"jaxqq.amax": json.dumps({"up": {"global_scale": float(exact)}})}
    save_file(tensors, folder / file, metadata)
  for asked, wanted in (("a", amax[at]), ("b", other)):
    unasked = "b" if asked == "a" else "a"
    weight_map = dict.fromkeys(tensors, asked) | {"down.input_scale": unasked}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert checkpoint.load(folder)["up.weight"].global_scale == wanted


def test_a_file_that_may_not_be_read(versions, tmp_path, monkeypatch):
  """Also as root, who may read all."""
  (a, _), _ = versions
  real = os.open

  def deny(path, *args, **options):
    if str(path).endswith("1.safetensors"):
      raise PermissionError(13, "Permission denied", path)
    return real(path, *args, **options)

  monkeypatch.setattr(os, "open", deny)
  refused(a, a / "1.safetensors", "Permission denied", kind=PermissionError)


# What is written


def test_files_are_the_same_bytes_from_run_to_run_and_what_safetensors_reads(tmp_path):
  """In the order of names, whatever their hashes are; an amax goes into the metadata."""
  rng = np.random.default_rng(0)
  names = [f"{word}.{i}.weight" for i in range(5) for word in ("up", "norm", "x", "é")]
  tensors = {name: rng.standard_normal((2, 3)).astype(np.float32) for name in names}
  tensors |= {
    str(dtype): np.arange(6).astype(dtype).reshape(2, 3)
    for dtype in map(np.dtype, ("?", "u1", ">i2", "f2", ">f4", "c8", "i8", ml_dtypes.bfloat16))
  }
  tensors |= {
    "empty": np.zeros((0, 3), np.float16),
    "scalar": np.float32(7),
    "t": tensors["up.0.weight"].T,
  }
  packed, scales = jaxqq.quantize(np.ones((8, 64), np.float32))
  amax = rng.uniform(1, 32, 100).astype(np.float32)
  back = checkpoints.amax_of("modelopt", checkpoints.scalar_of("modelopt", amax))
  scale = amax[back != amax][0]
  tensors["q.weight"] = jaxqq.QuantizedWeight(packed, scales, global_scale=scale)
  for i in range(4):
    shuffled = dict(sorted(tensors.items(), key=lambda item: hash((i, item[0]))))
    checkpoint.save(tmp_path / f"{i}", shuffled, format="modelopt")
    loaded = checkpoint.load(tmp_path / f"{i}")
    checkpoint.save(tmp_path / f"again-{i}", loaded, format="modelopt")
  files = [path / "model.safetensors" for path in sorted(tmp_path.iterdir())]
  assert len({file.read_bytes() for file in files}) == 1
  configs = [(tmp_path / f"again-{i}" / "config.json").read_text() for i in range(4)]
  assert len(set(configs)) == 1
  ignored = json.loads(configs[0])["quantization_config"]["ignore"]
  assert ignored == sorted(ignored) and len(ignored) == 20

  with safetensors.safe_open(files[0], "np") as handle:
    assert set(handle.metadata()) == {"format", "jaxqq.amax"}
    for name in tensors.keys() - {"q.weight"}:
      array = np.asarray(tensors[name])
      if array.dtype == ml_dtypes.bfloat16:
        continue
      np.testing.assert_array_equal(handle.get_tensor(name), array)
  raw = checkpoints.read_raw(files[0].parent)
  assert raw["bfloat16"] == ("BF16", (2, 3), tensors["bfloat16"].tobytes())
  header = int.from_bytes(files[0].read_bytes()[:8], "little")
  assert header % 8 == 0


def test_a_name_that_is_no_tensors(tmp_path):
  weight = jaxqq.quantize_weight(np.ones((8, 64), np.float32))
  for name in ("__metadata__", "a\udc80"):
    with pytest.raises(ValueError, match="save: the names of tensors must be"):
      checkpoint.save(tmp_path / "m", {"a.weight": weight, name: np.ones(2)}, format="mlx")
  assert not list(pathlib.Path(tmp_path).iterdir())


def test_a_folder_that_takes_a_files_place_is_closed(tmp_path, monkeypatch):
  """Between the look at it and its opening."""
  folder = write_sharded(tmp_path / "m", 0)
  real, opened = os.open, []

  def swapped(path, *args, **options):
    name = "sub" if str(path).endswith("1.safetensors") else path
    opened.append(real(name, *args, **options))
    return opened[-1]

  (folder / "sub").mkdir()
  monkeypatch.setattr(os, "open", swapped)
  refused(folder, folder / "1.safetensors", "Is a directory", kind=IsADirectoryError)
  for descriptor in opened:
    with pytest.raises(OSError):
      os.fstat(descriptor)
