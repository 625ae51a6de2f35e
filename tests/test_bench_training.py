"""The bench of training: products of a step, and a block."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxqq.bench import __main__ as bench
from jaxqq.bench import measure, results_page, training, training_cells, turns
from jaxqq.bench.markdown import TIMES
from jaxqq.bench.measure import Settings

TINY = training_cells.Model(d_model=64, heads=4, kv_heads=2, head_size=16, mlp=96, sequence=16)
PRODUCTS = training.Suite(
  modes=("mxfp8",),
  tokens=(32,),
  forms=("on the fly", "dx", "dw"),
  shapes=((64, 64),),
  model=TINY,
  settings=Settings(seconds=0.01, rounds=2),
)
BLOCK = dataclasses.replace(PRODUCTS, forms=(training_cells.BLOCK,), shapes=())
NAMES = ["bf16", "jaxqq mxfp8", "jaxqq recipe mxfp8"]
FIELDS = {"on the fly": "error_out", "dx": "error_dx", "dw": "error_dw"}


@pytest.fixture(autouse=True, scope="module")
def _promotion():
  """`jax.nn.dot_product_attention` is not for strict promotion, nor is its gradient."""
  jax.config.update("jax_numpy_dtype_promotion", "standard")
  yield
  jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def _environment():
  with pytest.MonkeyPatch.context() as patch:
    for name in training._SWITCHES:
      patch.delenv(name, raising=False)
    yield


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """Products and a block, by two runs into one file; the rows, the file, and what was told."""
  path, told = tmp_path_factory.mktemp("bench") / "h200_training.json", []
  training.run(PRODUCTS, path, tell=told.append)
  return training.run(BLOCK, path, tell=told.append), path, told


def test_products_and_a_block(results):
  rows, _, told = results
  assert [(row.form, row.implementation) for row in rows] == [
    (form, name) for form in training_cells.FORMS for name in NAMES
  ]
  assert len(told) == len(rows) and told[1].startswith("o 64 x 64 T=32 forward jaxqq mxfp8: ")
  for i, row in enumerate(rows):
    bf16 = rows[i // len(NAMES) * len(NAMES)]
    assert row.note == "" and row.copies == 1 and row.samples >= 2
    assert 0 < row.ms_q1 <= row.ms <= row.ms_q3 and row.wall_ms > 0
    assert row.ratio == pytest.approx(bf16.ms / row.ms)
    assert row.wall_ratio == pytest.approx(bf16.wall_ms / row.wall_ms)
    errors = {f: getattr(row, f) for f in FIELDS.values() if getattr(row, f) is not None}
    if row is bf16:
      assert errors == {} and row.error is None
    else:
      assert set(errors) == ({FIELDS[row.form]} if row.form in FIELDS else set(FIELDS.values()))
      assert 0.01 < row.error < 0.2
  assert "on cpu" in rows[1].path and rows[-1].path == "attention: xla"


def test_a_file_has_them(results):
  rows, path, _ = results
  header, back = training.read(path)
  assert back == rows and header["suites"] == ["training"] and header["environment"] == {}
  assert training.run(BLOCK, path, tell=pytest.fail) == rows


def test_what_failed_is_measured_again(results, tmp_path):
  rows, path, _ = results
  content = json.loads(path.read_text())
  content["training"][-1] = {**content["training"][-1], "ms": None, "note": "failed: once"}
  again, told = tmp_path / "again.json", []
  again.write_text(json.dumps(content))
  found = training.run(BLOCK, again, tell=told.append)
  assert len(told) == len(NAMES) and len(found) == len(rows) and not any(r.note for r in found)


def test_results_of_other_kernels_stay_apart(results, monkeypatch):
  monkeypatch.setenv("JAXQQ_DISABLE", "hopper_recipe")
  with pytest.raises(ValueError, match=r"environment is \{\}, and here"):
    training.run(BLOCK, results[1])


def test_the_page_has_a_table(results):
  page = results_page.page(results[1].parent)
  assert "## Training on an H200" in page and "`python -m jaxqq.bench --suite training`" in page
  assert f"| layer | N {TIMES} K | product | bf16 | jaxqq mxfp8 | jaxqq recipe mxfp8 |" in page
  assert f"| o | 64 {TIMES} 64 | dx | " in page and "\n| jaxqq recipe mxfp8 | " in page


def test_no_page_without_a_file(tmp_path):
  assert "Training" not in results_page.page(tmp_path)


def test_recipes_with_a_key_and_no_peer():
  suite = dataclasses.replace(PRODUCTS, modes=("nvfp4",), forms=("dw",), has_peer=False)
  rows = training.run(suite, tell=lambda text: None)
  assert [row.implementation for row in rows] == [
    "jaxqq nvfp4",
    "jaxqq recipe nvfp4",
    "jaxqq recipe nvfp4-4over6",
  ]
  assert all(row.ratio is None and row.note == "" and row.error_dw < 0.3 for row in rows)


def test_the_block_is_causal():
  block = training_cells.Block(TINY, 32)
  x, _, weights, keys = training_cells._block_operands(TINY, 32, 0)
  forward = jax.jit(functools.partial(block.forward, training_cells.BFLOAT16.multiply))
  moved = x.at[20].add(jnp.asarray(1, x.dtype))  # the fifth token of the second sequence
  one, other = (np.asarray(forward(a, weights, keys), np.float32) for a in (x, moved))
  differs = np.any(one != other, axis=1)
  assert not differs[:20].any() and differs[20:].all()


def test_sizes_of_llama():
  assert list(training_cells.MODEL.layers.values()) == [
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
  ]
  assert training_cells.MODEL.sequences(8192) == (4, 2048) and training_cells.MODEL.sequences(
    100
  ) == (1, 100)
  cells = list(training.Suite().cells())
  assert len(cells) == 13 and [cell.form for cell in cells[-2:]] == ["dw", "block"]
  x, g, weights, _ = cells[-1].specs()
  assert x.shape == g.shape == (8192, 4096) and len(weights) == 6


@pytest.mark.parametrize(
  ("change", "note"),
  [(lambda a: -a, "2.00 off from bf16"), (lambda a: a * jnp.nan, "the result is not finite")],
)
def test_a_wrong_result_is_noticed(change, note, monkeypatch):
  """It is measured, and the row says so."""
  multiply = training_cells.Way.multiply

  def wrong(way, x, w, key):
    out = multiply(training_cells.BFLOAT16, x, w, key)
    return out if way == training_cells.BFLOAT16 else change(out)

  monkeypatch.setattr(training_cells.Way, "multiply", wrong)
  suite = dataclasses.replace(PRODUCTS, forms=("on the fly",))
  _, row, _ = training.run(suite, tell=lambda text: None)
  assert row.note == note and row.ms > 0
  assert row.error is None or math.isclose(row.error, 2, rel_tol=1e-3)
  assert note in training.markdown([row])


@pytest.mark.parametrize("fails", ["bf16", "jaxqq mxfp8"])
def test_what_fails_is_said(fails, monkeypatch):
  multiply = training_cells.Way.multiply

  def refuse(way, x, w, key):
    if way.name == fails:
      raise ValueError("no such luck")
    return multiply(training_cells.BFLOAT16, x, w, key)

  monkeypatch.setattr(training_cells.Way, "multiply", refuse)
  suite = dataclasses.replace(PRODUCTS, forms=("on the fly",))
  rows = {row.implementation: row for row in training.run(suite, tell=lambda text: None)}
  assert rows[fails].ms is None and rows[fails].note == "failed: ValueError: no such luck"
  other = rows["jaxqq recipe mxfp8"]
  assert other.ms > 0 and (other.ratio is None) == (fails == "bf16")
  assert other.note == ("there is no result in bfloat16 to compare with" if fails == "bf16" else "")


def test_turns_rotate_and_one_that_fails_is_left_out():
  order = []

  def sample(call, args, calls):
    order.append(call)
    if call == "b" and len(order) > 3:
      raise RuntimeError("no more")
    return [1.0] * calls

  programs = {name: turns.Program(name, (), 2) for name in "abc"}
  found = turns.in_turn(programs, measure.Timer("", sample, 0), 3)
  assert "".join(order) == "abc" + "bca" + "ca"
  assert found["a"] == found["c"] == [1.0] * 6 and str(found["b"]) == "no more"


def test_the_command(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(training_cells, "MODEL", TINY)
  path = tmp_path / "training.json"
  arguments = "--suite training --modes mxfp8 --rows 16 --shapes 64x96 --forms dx --peers none"
  rows = bench.main([*arguments.split(), "--seconds", "0.01", "--rounds", "1", "--json", str(path)])
  assert [row.implementation for row in rows] == NAMES[1:]
  assert training.read(path)[1] == rows
  assert f"| down | 64 {TIMES} 96 | dx | " in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["training", "moe"], "stands alone"),
    (["training", "--chain"], "takes no --chain"),
    (["training", "--backward"], "takes no --backward"),
    (["training", "--processes", "2"], "not --processes"),
    (["training", "--forms", "quantize"], "--suite training has the forms on the fly, dx, dw"),
    (["training", "--rows", "3000"], "--rows: 3000 tokens are no whole sequences of 2048"),
  ],
)
def test_bad_options(arguments, message, capsys):
  with pytest.raises(SystemExit):
    bench.main(["--suite", *arguments])
  assert message in capsys.readouterr().err
