"""How a save takes the place of what was there: killed, refused, beside another, through a link."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq import checkpoint
from jaxqq.checkpoint import _replace
from tests.support import checkpoints
from tests.support.kills import add_others, snapshot, tensors, write
from tests.support.messages import refused

ROOT = pathlib.Path(__file__).parent.parent
# Where names cannot be exchanged, `save` says so.
pytestmark = pytest.mark.filterwarnings("ignore:save. .* this system cannot exchange")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_save_that_is_killed_at_any_step(tmp_path):
  """Old or new, and the next save removes what is left."""
  command = [sys.executable, "-m", "tests.support.kills", str(tmp_path)]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  kills = json.loads(done.stdout)
  for how in ("exchanged", "renamed", "created"):
    found = kills[how]
    states = found["states"]
    assert found["last"] == 0 and len(states) > (40 if how != "created" else 20)
    # In order, and nothing torn; without an exchange of names there is one moment with none.
    without = how == "renamed" or (how == "exchanged" and not kills["can exchange"])
    order = [state for i, state in enumerate(states) if i == 0 or states[i - 1] != state]
    assert order == ["old", *["none"] * without, "new"] and states.count("none") == without
    if without:
      assert found["beside"][states.index("none")] == [".old old", ".tmp"]
    assert all(found["next"])
    assert any(".tmp" in beside for beside in found["beside"]) and found["beside"][-1] == []


def killed_between_two_renames(path, monkeypatch):
  """What a kill leaves where names cannot be exchanged; the old contents."""
  write(path, 0)
  before, rename = snapshot(path), os.rename

  def die(source, target):
    if target == path:
      raise KeyboardInterrupt
    rename(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(_replace, "exchange", lambda one, other: False)
    patch.setattr(os, "rename", die)
    patch.setattr("jaxqq.checkpoint._replace.shutil.rmtree", lambda *args, **options: None)
    with pytest.raises(KeyboardInterrupt):
      write(path, 1)
  assert not path.exists()
  return before


def test_the_old_folder_gets_its_name_back(tmp_path, monkeypatch):
  path = tmp_path / "m"
  before = killed_between_two_renames(path, monkeypatch)
  (old,) = tmp_path.glob(".m.*.old")
  refused(path, path, old.name, "a save left that was killed", kind=FileNotFoundError)
  with pytest.raises(FileExistsError, match="not empty"):
    checkpoint.save(path, tensors(2), format="mlx")
  assert [p.name for p in tmp_path.iterdir()] == ["m"] and snapshot(path) == before


def test_a_rename_that_fails_is_taken_back(tmp_path, monkeypatch):
  path = tmp_path / "m"
  write(path, 0)
  before, rename = snapshot(path), os.rename

  def fail(source, target):
    if str(source).endswith(".tmp"):
      raise OSError(errno.EBUSY, "Device or resource busy", source, None, target)
    rename(source, target)

  monkeypatch.setattr(_replace, "exchange", lambda one, other: False)
  monkeypatch.setattr(os, "rename", fail)
  with pytest.raises(OSError, match=r"^save: .*/m: .* \(Device or resource busy\)\.$") as caught:
    write(path, 1)
  assert caught.value.errno == errno.EBUSY
  assert [p.name for p in tmp_path.iterdir()] == ["m"] and snapshot(path) == before


def test_a_system_that_cannot_exchange_names_is_told(tmp_path, monkeypatch):
  write(tmp_path / "m", 0)
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # neither a new folder nor an exchange
    write(tmp_path / "new", 1)
    if _replace.exchange(tmp_path / "m", tmp_path / "new"):
      assert _replace.exchange(tmp_path / "m", tmp_path / "new")
      write(tmp_path / "m", 0)
  monkeypatch.setattr(_replace, "_renameat2", lambda: None)
  with pytest.warns(UserWarning, match=r"^save: .*/m: this system cannot exchange") as caught:
    checkpoint.save(tmp_path / "m", tensors(1), format="mlx", max_shard_size=500, overwrite=True)
  assert [w.filename for w in caught] == [__file__]
  assert snapshot(tmp_path / "m") == snapshot(tmp_path / "new")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "new"]


def test_what_save_leaves(tmp_path):
  """Subfolders with files of the names that it replaces, links, other files; one inode each."""
  path = tmp_path / "m"
  write(path, 0)
  add_others(path)
  (path / "1_Pooling" / "to_config").symlink_to("../config.json")
  (path / "stale.safetensors").write_bytes(b"of another save")
  before = {
    p: p.stat().st_ino for p in (path / "1_Pooling" / "config.json", path / "tokenizer.json")
  }
  weight = {"a.weight": jaxqq.quantize_weight(jnp.ones((8, 64)))}
  checkpoint.save(path, weight, format="modelopt", overwrite=True)
  assert {str(p.relative_to(path)) for p in path.rglob("*")} == {
    *("model.safetensors", "config.json", "hf_quant_config.json", "tokenizer.json", "vocabulary"),
    *("1_Pooling", "1_Pooling/config.json", "1_Pooling/more", "1_Pooling/to_config"),
    "1_Pooling/more/adapter.safetensors",
  }
  assert (path / "1_Pooling" / "config.json").read_text() == "[]"
  assert (path / "1_Pooling" / "more" / "adapter.safetensors").read_bytes() == b"weights"
  assert (path / "vocabulary").readlink() == pathlib.Path("tokenizer.json")
  assert checkpoint.load(path).format == "modelopt"
  assert {p: p.stat().st_ino for p in before} == before


def test_files_that_cannot_be_linked_are_copied(tmp_path, monkeypatch):
  path = tmp_path / "m"
  write(path, 0)
  add_others(path)

  def fail(*args, **options):
    raise OSError(errno.EXDEV, "Invalid cross-device link")

  monkeypatch.setattr(os, "link", fail)
  before = snapshot(path)
  write(path, 1)
  after = snapshot(path)
  assert after.keys() == before.keys()
  changed = {name for name in after if after[name] != before[name]}
  assert changed == {name for name in after if "/" not in name and name.startswith("model-")}


@pytest.mark.parametrize("name", [".", "../m", "from within"])
def test_the_working_directory_may_be_the_folder(name, tmp_path, monkeypatch):
  write(tmp_path / "m", 0)
  add_others(tmp_path / "m")
  monkeypatch.chdir(tmp_path / "m" / ("1_Pooling" if name == "from within" else ""))
  write(pathlib.Path(".." if name == "from within" else name), 1)
  assert pathlib.Path.cwd().is_relative_to(tmp_path / "m")
  if name != "from within":
    np.testing.assert_array_equal(checkpoint.load(".")["norm"], tensors(1)["norm"])
  assert (pathlib.Path.cwd() / "config.json").exists()


def test_a_folder_where_a_file_is_written(tmp_path):
  (tmp_path / "m" / "config.json").mkdir(parents=True)
  with pytest.raises(FileExistsError, match=r"^save: .*/m/config.json is a folder"):
    write(tmp_path / "m", 0)
  assert snapshot(tmp_path) == {"m": "a folder", "m/config.json": "a folder"}


@pytest.mark.parametrize("link", ["m", "gone", "chain"])
def test_a_link_is_followed(link, tmp_path):
  (tmp_path / "elsewhere").mkdir()
  write(tmp_path / "elsewhere" / "real", 0)
  (tmp_path / "m").symlink_to("elsewhere/real")
  (tmp_path / "gone").symlink_to(tmp_path / "elsewhere" / "new")
  (tmp_path / "chain").symlink_to("m")
  write(tmp_path / link, 1)
  assert (tmp_path / link).is_symlink()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["chain", "elsewhere", "gone", "m"]
  written = tmp_path / "elsewhere" / ("new" if link == "gone" else "real")
  assert snapshot(tmp_path / link) == snapshot(written)
  loaded = checkpoint.load(written)
  np.testing.assert_array_equal(loaded["norm"], tensors(1)["norm"])


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask(umask, tmp_path):
  before = os.umask(umask)
  try:
    write(tmp_path / "m", 0)
  finally:
    os.umask(before)
  modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "m").iterdir()}
  assert len(modes) == 4 and set(modes.values()) == {0o666 & ~umask}
  assert (tmp_path / "m").stat().st_mode & 0o777 == 0o777 & ~umask
  (tmp_path / "m").chmod(0o750)
  write(tmp_path / "m", 1)
  assert (tmp_path / "m").stat().st_mode & 0o777 == 0o750


def test_a_full_disk_names_the_path(tmp_path, monkeypatch):
  path = tmp_path / "m"
  write(path, 0)
  before = snapshot(path)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
  try:
    with pytest.raises(OSError) as caught:
      write(path, 1)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  sentence = (
    f"save: {path}: model-00001-of-00002.safetensors could not be written (File too large)."
  )
  assert str(caught.value) == sentence and caught.value.errno == errno.EFBIG
  real = os.write

  def full(descriptor, data):
    if b"weight_map" in bytes(data):
      raise OSError(errno.ENOSPC, "No space left on device")
    return real(descriptor, data)

  monkeypatch.setattr(os, "write", full)
  with pytest.raises(
    OSError, match=rf"^save: {re.escape(str(path))}: .*index.json could not .*No sp"
  ):
    write(path, 1)
  assert [p.name for p in tmp_path.iterdir()] == ["m"] and snapshot(path) == before


def test_a_save_beside_another(tmp_path):
  """Each tidies up after the dead, and neither takes the other's folder for one."""
  path = tmp_path / "m"
  write(path, 0)
  for name in (f".m.{'0' * 32}.tmp", f".m.{'1' * 32}.old"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_bytes(b"left")
  (tmp_path / ".m.notes.tmp").mkdir()  # no save's
  (tmp_path / f".n.{'0' * 32}.tmp").mkdir()  # another one's
  with _replace.replacing(path, ["*"], overwrite=True) as target:
    (target.folder / "of the first").write_text("x")
    write(path, 1)
    assert target.folder.exists()
    np.testing.assert_array_equal(checkpoint.load(path)["norm"], tensors(1)["norm"])
  assert snapshot(path) == {"of the first": b"x"}
  assert sorted(p.name for p in tmp_path.iterdir()) == [".m.notes.tmp", f".n.{'0' * 32}.tmp", "m"]


def test_a_folder_that_somebody_else_fills(tmp_path):
  """Without overwrite it is theirs."""
  path = tmp_path / "m"
  replacing = _replace.replacing(path, [], overwrite=False)
  with pytest.raises(FileExistsError, match=r"^save: .*/m is not empty"), replacing:
    write(path, 0)
  assert [p.name for p in tmp_path.iterdir()] == ["m"]
  assert len(checkpoint.load(path)) == 3


@pytest.mark.parametrize("value", [np.float32(1), {1, 2}, float])
def test_a_configuration_that_is_no_json(value, tmp_path):
  with pytest.raises(
    TypeError, match=r"^save: config must be what config.json can hold, JSON, .*\.$"
  ):
    checkpoint.save(tmp_path / "m", tensors(0), format="mlx", config={"a": value})
  assert not list(tmp_path.iterdir())


def test_sizes_of_shards_that_are_none(tmp_path):
  with pytest.raises(ValueError, match="max_shard_size"):
    checkpoint.save(tmp_path / "m", tensors(0), format="mlx", max_shard_size="1" + "0" * 400)


def test_writing_without_jaxqq_agrees(tmp_path):
  """The kill tests' tensors are what a reader of the format sees."""
  write(tmp_path / "m", 3)
  raw = checkpoints.read_raw(tmp_path / "m")
  for name, value in tensors(3).items():
    data = value.packed if name.endswith("weight") else value
    assert raw[name][2] == data.tobytes()


def test_a_name_as_long_as_the_system_takes(tmp_path):
  """What is written beside it has a shorter one; what a killed save left is found by it."""
  folder = tmp_path / ("n" * 255)
  weight = jaxqq.quantize_weight(jnp.ones((8, 64)), mode="mxfp8")
  for name in ("a.weight", "b.weight"):
    checkpoint.save(folder, {name: weight}, format="mlx", overwrite=True)
    left = f".{hashlib.sha256(folder.name.encode()).hexdigest()}.{'0' * 32}.tmp"
    assert checkpoint.load(folder).keys() == {name}
    assert not (tmp_path / left).exists()
    (tmp_path / left).mkdir()
