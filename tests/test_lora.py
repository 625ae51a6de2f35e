"""examples/lora.py: adapters around a packed base."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from tests.support import oracle
from tests.support.examples import load_example
from tests.support.processes import run_example_without

SIZES = ["--layers", "1", "--d-model", "32", "--heads", "2", "--seq", "32", "--batch", "2"]


@pytest.fixture(scope="module")
def example():
  load_example("train_lm")
  return load_example("lora")


@pytest.mark.usefixtures("quick_compiles")
def test_main(example, capsys):
  """Adapters learn the other text, which the base does not know, and merged they still do."""
  results = example.main([*SIZES, "--steps", "30", "--rank", "4"])
  losses = [result["code"] for result in results.values()]
  assert list(results)[1:] == ["base, nvfp4", "with adapters beside it", "adapters merged, nvfp4"]
  assert np.isfinite(losses).all()
  assert max(losses[2:]) < min(losses[:2]) - 0.01
  assert abs(losses[0] - losses[1]) < 0.05 and abs(losses[2] - losses[3]) < 0.05
  sizes = [result["bytes"] for result in results.values()]
  assert sizes[1] == sizes[3] and sizes[1] / sizes[0] == pytest.approx(4.5 / 16, rel=0.01)
  assert "numbers trained" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_compiles")
def test_the_base_stays_and_adapters_are_added(example):
  cfg = example.train_lm.parse_config([*SIZES, "--steps", "2"], example.Config, "")
  base = example.pack(example.train_lm.init_params(cfg), "nvfp4")
  before = example.with_adapters(base, 4, 0)
  text = np.arange(4000, dtype=np.uint8)
  after = example.train_adapters(before, text, cfg)
  layer, start = after["blocks"]["out"], before["blocks"]["out"]
  jax.tree.map(np.testing.assert_array_equal, layer["w"], base["blocks"]["out"])
  np.testing.assert_array_equal(after["embed"], base["embed"])
  assert np.asarray(layer["lora_b"]).any() and not np.asarray(start["lora_b"]).any()
  x = oracle.random(np.random.default_rng(0), (3, 32), "float32")
  one = jax.tree.map(lambda a: a[0], layer)
  got = example.linear(x, one)
  delta = np.float64(one["lora_b"]) @ np.float64(one["lora_a"])
  x_hat, w_hat = oracle.round_trip(x, "nvfp4"), np.float64(one["w"].dequantize(jnp.float32))
  assert oracle.relative_error(got, x_hat @ w_hat.T + x.astype(np.float64) @ delta.T) < 1e-5
  merged = example.merged(after, "nvfp4")["blocks"]["out"]
  assert isinstance(merged, jaxqq.QuantizedWeight)
  sum_of_both = w_hat + delta
  assert oracle.relative_error(np.float64(merged[0].dequantize(jnp.float32)), sum_of_both) < 0.12


def test_bad_arguments_and_the_missing_extra(example, tmp_path, capsys):
  with pytest.raises(SystemExit):
    example.main(["--rank", "0"])
  assert "--rank must be positive" in capsys.readouterr().err
  done = run_example_without("optax", "lora", tmp_path)
  assert done.returncode != 0 and "jaxqq[examples]" in done.stderr
