"""examples/train_sharded.py: one process and two, the losses of one device."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compiling import EMITTERS, PARTS

ROOT = pathlib.Path(__file__).parent.parent
SIZES = ["--layers", "1", "--d-model", "64", "--heads", "2", "--seq", "32", "--batch", "4"]
SIZES += ["--steps", "3", "--dtype", "f32", "--modes", "mxfp8", "--backward", "quantized"]


def run(*flags):
  """What a process of its own prints."""
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as in conftest.py, and XLA's options
  env["XLA_FLAGS"] = f"--xla_backend_extra_options={EMITTERS} --{PARTS}=1"
  return subprocess.run(
    [sys.executable, str(ROOT / "examples" / "train_sharded.py"), *SIZES, *flags],
    env=env,
    capture_output=True,
    text=True,
    check=False,
    timeout=240,
  )


def losses(text):
  """First, last and validation loss of each model of the table."""
  rows = re.findall(
    r"^(unquantized|mxfp8|nvfp4) +\| ([\d.]+) +\| ([\d.]+) +\| ([\d.]+)", text, re.M
  )
  return {mode: [float(number) for number in numbers] for mode, *numbers in rows}


@pytest.fixture(scope="module")
def example():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(ROOT / "examples"))
    import train_sharded

    # Checks triple the time; other tests have them.
    with jax.enable_checks(False):
      yield train_sharded


@pytest.fixture(scope="module")
def one_device(example):
  return example.main(SIZES)["mxfp8"]


def test_losses_are_those_of_one_device(example, one_device, capsys):
  """One process with a mesh of four devices."""
  split = example.main([*SIZES, "--data", "2", "--tensor", "2"])["mxfp8"]
  # A rounding of a sum may move a code to its neighbour: not more than a few.
  np.testing.assert_allclose(split["losses"], one_device["losses"], rtol=1e-3)
  assert split["val_loss"] == pytest.approx(one_device["val_loss"], rel=1e-3)
  assert split["bytes_per_device"] < 0.52 * one_device["bytes_per_device"]
  assert "bytes a device" in capsys.readouterr().out


def test_bytes_are_counted_as_train_lm_counts_them(example):
  cfg = example.train_lm.parse_config(SIZES, example.Config, "")
  params = example.train_lm.init_params(cfg)
  dtype = example.train_lm.DTYPES["bf16"]
  for mode in example.train_lm.MODES:
    shapes = jax.eval_shape(lambda p, m=mode: example.train_lm.pack(p, m, dtype), params)
    served = jax.tree.map(lambda a: jnp.asarray(np.zeros(a.shape, a.dtype)), shapes)
    want = example.train_lm.linear_bytes(served) // (2 if mode == "unquantized" else 1)
    assert example.bytes_per_device(served, mode) == want


def test_two_processes(one_device):
  """Each with two devices."""
  two = run("--data", "2", "--tensor", "2", "--spawn", "2", "--cpu-devices", "2")
  assert two.returncode == 0, two.stderr
  assert "2 processes" in two.stdout
  want = [*(one_device["losses"][i] for i in (0, -1)), one_device["val_loss"]]
  assert losses(two.stdout)["mxfp8"] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (["--data", "3"], "--batch must be a multiple of --data 3, got 4."),
    (["--tensor", "3"], "--heads must be a multiple of --tensor 3, got 2."),
    (["--tensor", "4", "--heads", "4"], "d_model must be a multiple of 32 times --tensor 4"),
    (["--num-processes", "2"], "--coordinator and --num-processes go together"),
    (["--process-id", "1"], "--process-id must be below --num-processes, got 1."),
    (["--d-model", "40"], "--d-model must be a multiple of 32"),
  ],
)
def test_refusals(flags, sentence, example, capsys):
  with pytest.raises(SystemExit):
    example.main([*SIZES, *flags])
  assert sentence in " ".join(capsys.readouterr().err.split())
