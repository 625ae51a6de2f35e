"""examples/moe.py: a mixture of experts, on one device and on several."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from tests.support.examples import load_example
from tests.support.processes import run_example_without
from tests.support.sharding import gathered

SIZES = ["--layers", "1", "--d-model", "32", "--heads", "2", "--seq", "32", "--batch", "4"]
SIZES += ["--experts", "4", "--hidden", "32", "--sample-bytes", "8"]


@pytest.fixture(scope="module")
def example():
  load_example("train_lm")
  moe = load_example("moe")
  moe.VAL_WINDOWS = 8
  return moe


@pytest.mark.usefixtures("quick_compiles")
def test_main_on_one_device_and_on_four(example, capsys):
  """It learns, loses nothing when it is packed, and four devices are as one, to rounding."""
  flags = [*SIZES, "--steps", "6", "--dtype", "f32", "--modes", "mxfp8", "--devices", "4"]
  results = example.main(flags)
  assert list(results) == ["mxfp8", "mxfp8, 4 devices"]
  one, four = results.values()
  for result in (one, four):
    losses = result["losses"]
    assert np.isfinite(losses).all() and 5 < losses[0] < 7 and losses[-1] < losses[0] - 0.3
    assert result["packed_loss"] == pytest.approx(result["val_loss"], rel=1e-5)
    assert result["bytes"] / result["bf16_bytes"] == pytest.approx(8.25 / 16, rel=0.01)
    assert result["sample"].startswith("The")
  np.testing.assert_allclose(four["losses"][0], one["losses"][0], rtol=1e-5)
  np.testing.assert_allclose(four["losses"], one["losses"], rtol=5e-3)
  assert four["val_loss"] == pytest.approx(one["val_loss"], rel=5e-3)
  printed = capsys.readouterr().out
  assert all(word in printed for word in ("validation loss", "packed", "ms/step", "and on one"))


@pytest.mark.usefixtures("quick_compiles")
def test_the_table_of_all_models(example, monkeypatch, capsys):
  """Each is made and computes in bfloat16; how they train is tested above."""

  def run(cfg, mode, mesh, windows):
    graph, state = nnx.split(example.make_model(cfg, mode))
    batch = np.stack([windows[0][i] for i in range(cfg.batch)])
    loss, unequally = jax.jit(lambda *args: example.losses_of(graph, *args, mesh))(state, batch)
    assert 0.99 < unequally < 2
    result = {"val_loss": float(loss), "packed_loss": float(loss), "sample": "The"}
    return result | {"bytes": 1, "bf16_bytes": 2, "ms_per_step": 1.0}

  monkeypatch.setattr(example, "run", run)
  results = example.main(SIZES)
  assert list(results) == ["bfloat16", "mxfp8", "nvfp4, global scales"]
  losses = [result["val_loss"] for result in results.values()]
  assert losses == pytest.approx([losses[0]] * 3, rel=0.02) and len(set(losses)) == 3
  assert "nvfp4, global scales: The" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("packed", [False, True])
def test_tokens_are_gathered_and_no_weights(example, packed):
  """The forward pass unpacked and packed; nothing of the width of an expert moves."""
  flags = [*SIZES, "--hidden", "64", "--devices", "4", "--dtype", "f32"]
  cfg = example.train_lm.parse_config(flags, example.Config, "")
  mesh = example.make_mesh(cfg)
  model = example.make_model(cfg, "mxfp8")
  graph, state = nnx.split(example.served(model, "mxfp8") if packed else model)
  loss = jax.jit(lambda state, windows: example.losses_of(graph, state, windows, mesh)[0])
  windows = np.zeros((4, cfg.seq + 1), np.uint8)
  program = loss.lower(example.placed(state, mesh), windows).compile()
  assert gathered(program) == {(4, cfg.seq, cfg.d_model), (4, cfg.seq, cfg.top)}


@pytest.mark.parametrize(
  "flags",
  [["--top", "9"], ["--hidden", "40"], ["--experts", "6", "--devices", "4"], ["--devices", "0"]],
)
def test_what_cannot_be(example, flags, capsys):
  with pytest.raises(SystemExit):
    example.main(flags)
  assert f"{flags[0]} must" in capsys.readouterr().err


def test_the_missing_extra(tmp_path):
  done = run_example_without("optax", "moe", tmp_path)
  assert done.returncode != 0 and "jaxqq[examples]" in done.stderr
