"""Checkpoints that a disk or a tool damaged: an error that says what, or exactly what is there."""

from __future__ import annotations

import shutil
import warnings
import zlib

import ml_dtypes
import numpy as np
import pytest

import jaxqq
from jaxqq import checkpoint
from tests.support import checkpoints
from tests.support.faults import INDEX, faults, read_reference

KINDS = (*checkpoints.KINDS, "mlx-mxfp8")
PARTS = {
  "mlx": ("weight", "scales"),
  "modelopt": ("weight", "weight_scale"),
  "compressed-tensors": ("weight_packed", "weight_scale"),
}
# numpy's types of what safetensors names, of what these checkpoints hold.
DTYPES = {
  "U8": np.uint8,
  "I8": np.int8,
  "U32": np.uint32,
  "I32": np.int32,
  "BOOL": np.bool_,
  "F16": np.float16,
  "F32": np.float32,
  "F64": np.float64,
  "I64": np.int64,
  "U64": np.uint64,
  "F8_E4M3": checkpoints.E4M3,
  "F8_E8M0": checkpoints.E8M0,
  "BF16": ml_dtypes.bfloat16,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "U16": np.uint16,
  "I16": np.int16,
  "C64": np.complex64,
}


def whole(folder, kind, sharded):
  """A checkpoint, in two files with an index or in one, as jaxqq is given it."""
  checkpoints.write_kind(folder, kind)
  if sharded:
    tensors = dict(checkpoint.load(folder))
    shutil.rmtree(folder)
    config = checkpoints.configs(kind)["config_json"]
    format = {"modelopt": "modelopt"}.get(
      kind, "mlx" if kind[:3] == "mlx" else "compressed-tensors"
    )
    checkpoint.save(folder, tensors, format=format, config=config, max_shard_size=2400)
    assert (folder / INDEX).exists()
  return folder


def check_loaded(loaded, raw):
  """Every tensor of the files is there, under its name or in a `QuantizedWeight`, bit for bit."""
  used = set()
  for name, value in loaded.items():
    if not isinstance(value, jaxqq.QuantizedWeight):
      dtype, shape, data = raw[name]
      array = np.asarray(value)
      assert (array.dtype, array.shape) == (np.dtype(DTYPES[dtype]), shape), name
      assert array.tobytes() == data, name
      used.add(name)
      continue
    layer = name.removesuffix(".weight")
    codes, scales = PARTS[loaded.format]
    codes = codes if value.mode == "nvfp4" else "weight"
    assert np.asarray(value.packed).tobytes() == raw[f"{layer}.{codes}"][2], name
    assert np.asarray(value.scales).tobytes() == raw[f"{layer}.{scales}"][2], name
    used |= {f"{layer}.{codes}", f"{layer}.{scales}"}
    scalars = checkpoints.SCALARS.get(
      "modelopt" if loaded.format == "modelopt" else "nvfp4-pack-quantized"
    )
    for suffix, field in zip(scalars, ("global_scale", "input_global_scale"), strict=True):
      part = f"{layer}.{suffix}"
      if loaded.format != "mlx" and value.mode == "nvfp4" and part in raw:
        used.add(part)
        stored = np.frombuffer(raw[part][2], np.float32).reshape(())
        assert loaded.stored_scales[name][field].tobytes() == stored.tobytes(), part
  assert used == raw.keys()


def check_sentence(error, fault, folder):
  sentence = str(error)
  assert sentence.startswith("load: ") and sentence.endswith(".") and "\n" not in sentence, sentence
  assert len(sentence) < 2000
  assert str(folder) in sentence, sentence
  if "expected a whole safetensors file" in sentence:
    assert str(folder / fault.file) in sentence, sentence
  if fault.about:
    assert any(word in sentence for word in fault.about), (fault.about, sentence)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_faults(kind, sharded, tmp_path):
  check_faults(kind, sharded, tmp_path, seed=0, count=120)


def check_faults(kind, sharded, tmp_path, seed, count):
  """So many of the faults of a seed, each on a copy of the checkpoint."""
  rng = np.random.default_rng([seed, zlib.crc32(f"{kind} {sharded}".encode())])
  source = whole(tmp_path / "whole", kind, sharded)
  assert read_reference(source).keys() == checkpoints.read_raw(source).keys()
  check_loaded(checkpoint.load(source), read_reference(source))
  every = list(faults(source, rng))
  outcomes = {"error": 0, "loaded": 0}
  for i in rng.permutation(len(every))[:count]:
    fault, folder = every[i], tmp_path / "damaged"
    shutil.copytree(source, folder)
    fault.apply(folder / fault.file)
    raw = read_reference(folder)
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of scales that are no calibration
        loaded = checkpoint.load(folder, progress=False)
    except (ValueError, FileNotFoundError) as error:
      outcomes["error"] += 1
      check_sentence(error, fault, folder)
      # What safetensors reads is damaged only where a name is there twice, and it takes the last.
      damaged = "expected a whole safetensors file" in str(error)
      assert raw is None or not damaged or "is there twice" in str(error), (fault, error)
    else:
      outcomes["loaded"] += 1
      assert raw is not None, fault
      check_loaded(loaded, raw)
    shutil.rmtree(folder)
  assert min(outcomes.values()) > 10 and sum(outcomes.values()) == min(count, len(every))
