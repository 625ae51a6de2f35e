"""A part of a checkpoint: `only`, and `load_each`, which yields tensors as they are read."""

from __future__ import annotations

import gc
import json
import os

import jax
import numpy as np
import pytest

import jaxqq
from jaxqq import checkpoint
from jaxqq.checkpoint import _files
from tests.support import checkpoints
from tests.support.messages import check_sentence

LAYERS = {"up.weight", "down.weight"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder, _, _ = checkpoints.write_kind(tmp_path_factory.mktemp("parts") / "m", "modelopt")
  return folder, checkpoint.load(folder)


def assert_same(loaded, wanted):
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(wanted), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
  ("only", "names"),
  [
    ("up.weight", {"up.weight"}),
    (["up.weight", "mask"], {"up.weight", "mask"}),
    ("up.*", {"up.weight", "up.bias"}),
    (("*.weight",), LAYERS | {"embed.weight", "norm.weight"}),
    (iter(["d?wn.*", "n[op]rm.weight"]), {"down.weight", "down.k_scale", "norm.weight"}),
    ("*", None),
    (None, None),
    ([], set()),
  ],
)
def test_only(only, names, whole):
  folder, everything = whole
  loaded = checkpoint.load(folder, only=only)
  assert loaded.keys() == (everything.keys() if names is None else names)
  assert_same(loaded, {name: everything[name] for name in loaded})
  assert loaded.stored_scales.keys() == LAYERS & loaded.keys()
  assert (loaded.format, loaded.config) == (everything.format, everything.config)


def test_only_reads_what_it_names(whole, monkeypatch):
  read, real = [], _files.Folder.read

  def watched(self, name, begin, end, what):
    read.append(what)
    return real(self, name, begin, end, what)

  monkeypatch.setattr(_files.Folder, "read", watched)
  checkpoint.load(whole[0], only="up.weight")
  tensors = [what for what in read if what.startswith("tensor ")]
  parts = ("weight", "weight_scale", "weight_scale_2", "input_scale")
  assert sorted(tensors) == sorted(f"tensor 'up.{part}'" for part in parts)


@pytest.mark.parametrize("only", ["up", "weight_scale", ["up.weight", "upp.*"], "up.weight_scale"])
def test_only_names_what_is_there(only, whole):
  with pytest.raises(ValueError) as caught:
    checkpoint.load(whole[0], only=only)
  wrong = only if isinstance(only, str) else only[1]
  words = [str(whole[0]), "'down.input_scale', 'down.k_scale'", f"found {wrong!r}", "14 tensors"]
  check_sentence(str(caught.value), "load", words)


@pytest.mark.parametrize("only", [3, ["up.weight", 3], [None]])
def test_only_is_names(only, whole):
  with pytest.raises(TypeError, match=r"^load: only must be names or patterns, .*got (3|None)"):
    checkpoint.load_each(whole[0], only=only)


def test_what_is_not_wanted_may_be_of_any_format(tmp_path):
  """A router of MLX's affine mode; a tensor that numpy has no type for."""
  folder, wanted, _ = checkpoints.write_kind(tmp_path / "m", "mlx")
  config = checkpoints.read_json(folder / "config.json")
  config["quantization"]["down"] = {"group_size": 64, "bits": 8, "mode": "affine"}
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="affine"):
    checkpoint.load(folder)
  loaded = checkpoint.load(folder, only=["up.*", "norm.weight"])
  assert loaded.keys() == {"up.weight", "up.bias", "norm.weight"}
  np.testing.assert_array_equal(loaded["up.weight"].packed, wanted["up.weight"]["packed"])


@pytest.mark.parametrize("only", [None, ["up.*", "mask"]])
def test_load_each_yields_what_load_returns(only, whole):
  folder, _ = whole
  wanted = checkpoint.load(folder, only=only)
  each = checkpoint.load_each(folder, only=only, dtype="float16")
  assert each.names == list(wanted) and each.stored_scales == {}
  assert (each.format, each.config) == (wanted.format, wanted.config)
  loaded = dict(each)
  assert list(loaded) == each.names
  assert_same(loaded, dict(wanted))
  assert loaded["up.weight"].dtype == np.float16
  assert each.stored_scales == wanted.stored_scales
  assert list(each) == []


def open_files(folder):
  found = []
  for name in os.listdir("/proc/self/fd"):
    try:
      found.append(os.readlink(f"/proc/self/fd/{name}"))
    except OSError:  # that of the listing itself
      continue
  return [path for path in found if path.startswith(str(folder))]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system shows no open files")
@pytest.mark.filterwarnings("error")
def test_files_are_closed(whole):
  folder, _ = whole
  each = checkpoint.load_each(folder)
  next(each)
  assert str(folder / "model.safetensors") in open_files(folder)
  del each
  gc.collect()
  assert open_files(folder) == []
  with checkpoint.load_each(folder) as each:
    next(each)
  assert list(each) == [] and open_files(folder) == []
  each = checkpoint.load_each(folder)
  for _ in each:
    assert open_files(folder)
  assert open_files(folder) == []
  for wrong in ({"only": "no"}, {"dtype": "int8"}):
    with pytest.raises((ValueError, TypeError)):
      checkpoint.load_each(folder, **wrong)
    assert open_files(folder) == []
  checkpoint.load(folder)
  assert open_files(folder) == []


def test_each_tensor_is_read_when_its_turn_comes(whole, monkeypatch):
  folder, _ = whole
  read, real = [], _files.Reader.read
  monkeypatch.setattr(
    _files.Reader, "read", lambda self, tensor: read.append(tensor.name) or real(self, tensor)
  )
  with checkpoint.load_each(folder) as each:
    assert read == []
    name, weight = next(each)
    assert isinstance(weight, jaxqq.QuantizedWeight)
    assert {part.rpartition(".")[0] for part in read} == {name.removesuffix(".weight")}
    for name, _ in each:
      assert name.rpartition(".")[0] == read[-1].rpartition(".")[0]


def test_a_scale_that_is_no_calibration_is_told_where_the_caller_is(tmp_path):
  folder, _, _ = checkpoints.write_kind(tmp_path / "m", "modelopt")
  tensors, _ = checkpoints.layers("modelopt", np.random.default_rng(0))
  tensors["up.input_scale"] = np.zeros((), np.float32)
  checkpoints.write(folder, tensors, **checkpoints.configs("modelopt"))
  with pytest.warns(UserWarning, match="'up.input_scale' is 0.0") as caught:
    list(checkpoint.load_each(folder))
  with pytest.warns(UserWarning, match="'up.input_scale' is 0.0") as again:
    checkpoint.load(folder)
  assert [w.filename for w in [*caught, *again]] == [__file__] * 2
