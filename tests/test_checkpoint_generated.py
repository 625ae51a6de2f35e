"""Checkpoints of every kind, loaded, saved and loaded again, with what nothing of jaxqq wrote."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import jaxqq
from jaxqq import checkpoint
from tests.support import checkpoints, generated, schemes
from tests.support.faults import json_lies

SEEDS = range(32)
LYING = range(100, 112)
FORMATS = ("mlx", "modelopt", "compressed-tensors", "transformers")


def assert_wanted(loaded, wants):
  assert loaded.keys() == wants.keys()
  for name, want in wants.items():
    value = loaded[name]
    if want.mode is None:
      exact = want.array if want.values is None else want.values.astype(np.float32)
      value = np.asarray(value)
      assert (value.dtype, value.shape) == (exact.dtype, exact.shape), name
      assert value.tobytes() == exact.tobytes(), name
      assert (name in loaded.dequantized) == (want.values is not None)
    else:
      assert isinstance(value, jaxqq.QuantizedWeight) and value.mode == want.mode, name
      np.testing.assert_array_equal(value.packed, want.packed, name)
      np.testing.assert_array_equal(value.scales, want.scales, name)
      for field in ("global_scale", "input_global_scale"):
        amax = getattr(value, field)
        if field in want.amax:
          wanted = np.broadcast_to(want.amax[field], value.shape[:-2])
          assert np.asarray(amax).tobytes() == wanted.tobytes(), (name, field)
        else:
          assert amax is None, (name, field)
      assert (name in loaded.weight_only) == want.weight_only, name


def assert_numbers(loaded, wants):
  """The tensors, by whatever they are said to be."""
  assert loaded.keys() == wants.keys()
  for name, want in wants.items():
    if isinstance(loaded[name], jaxqq.QuantizedWeight):
      assert loaded[name].mode == want.mode
      np.testing.assert_array_equal(loaded[name].packed, want.packed, name)
      np.testing.assert_array_equal(loaded[name].scales, want.scales, name)
    else:
      exact = want.array if want.values is None else want.values.astype(np.float32)
      assert np.asarray(loaded[name]).tobytes() == exact.tobytes(), name


def packed_of(tensors):
  """The arrays of each `QuantizedWeight`, as bytes."""
  return {
    name: [np.asarray(a).tobytes() for a in (w.packed, w.scales)]
    for name, w in tensors.items()
    if isinstance(w, jaxqq.QuantizedWeight)
  }


def groups_of(kv_cache):
  """Without the names of groups, which count them."""
  return {
    key: list(value.values()) if key == "config_groups" else value
    for key, value in kv_cache.items()
  }


@pytest.mark.parametrize("seed", SEEDS)
def test_a_generated_checkpoint(seed, tmp_path):
  made, shards, rng = generated.generate(seed)
  folder = made.write(tmp_path / "m", shards, rng)
  loaded = checkpoint.load(folder, **made.options)
  assert loaded.format == made.format
  assert_wanted(loaded, made.wants)
  packed = packed_of(loaded)
  if not packed:
    return

  # Saved again, it has the bytes it had, but for what came dequantized.
  checkpoint.save(tmp_path / "again", loaded, format=made.format, max_shard_size=2000)
  raw, again = (checkpoints.read_raw(path) for path in (folder, tmp_path / "again"))
  of_dense = tuple(name.removesuffix("weight") for name in loaded.dequantized)
  for name, tensor in raw.items():
    if not name.startswith(of_dense or ("\0",)):
      assert again[name] == tensor, name
  reloaded = checkpoint.load(tmp_path / "again")
  as_numbers = {
    name: schemes.Want(array=want.values.astype(np.float32)) if want.values is not None else want
    for name, want in made.wants.items()
  }
  assert_wanted(reloaded, as_numbers)
  assert (reloaded.kv_cache == {}) == (not made.kv_cache)
  if made.format == "compressed-tensors":
    assert groups_of(reloaded.kv_cache) == groups_of(loaded.kv_cache)

  # In another project's format it has the same numbers, or one sentence says why it cannot be.
  other = str(rng.choice([format for format in FORMATS if format != made.format]))
  try:
    checkpoint.save(tmp_path / "other", loaded, format=other)
  except ValueError as error:
    assert re.fullmatch(r"save: [^\n]*\.", str(error))
    assert not (tmp_path / "other").exists()
  else:
    there = checkpoint.load(tmp_path / "other", experts="stack")
    whole = {}
    for name, arrays in packed.items():  # experts, in their order, are a stack by now
      stack = re.sub(r"experts\.\d+\.", "experts.", name)
      whole[stack] = [a + b for a, b in zip(whole.get(stack, [b"", b""]), arrays, strict=True)]
    assert packed_of(there) == whole


@pytest.mark.parametrize("seed", LYING)
def test_a_configuration_that_lies(seed, tmp_path):
  """One sentence refuses it, or the numbers are those of the tensors all the same."""
  made, _, rng = generated.generate(seed)
  folder = made.write(tmp_path)
  for file, config in made.configs.items():
    for fault in json_lies(file, config, 8, rng):
      fault.apply(folder / file)
      try:
        loaded = checkpoint.load(folder, dtype="float32", **made.options)
      except (ValueError, FileNotFoundError) as error:
        sentence = str(error)
        assert re.fullmatch(r"load: [^\n]{,1000}\.", sentence) and str(folder) in sentence
      else:
        assert_numbers(loaded, made.wants)
    (folder / file).write_text(json.dumps(config))
  assert_wanted(checkpoint.load(folder, **made.options), made.wants)
