"""`examples/pretrain.py`: its text, what it keeps, and going on where it ended."""

from __future__ import annotations

import json

import pytest

from tests.support.examples import load_example

SIZES = ["--layers", "1", "--d-model", "32", "--heads", "2", "--seq", "16", "--batch", "2"]
SIZES += ["--attention", "xla", "--steps", "3", "--modes", "unquantized", "--recipe"]
PARAGRAPHS = [
  f"Paragraph {i} of the text, {'which is long enough to be told ' * 2}" for i in range(40)
]


@pytest.fixture(scope="module")
def example():
  load_example("train_lm")
  return load_example("pretrain")


@pytest.fixture
def text(tmp_path):
  folder = tmp_path / "text"
  folder.mkdir()
  (folder / "a.md").write_text("\n\n".join(PARAGRAPHS[:30]))
  (folder / "b.py").write_text("\n\n".join(PARAGRAPHS[20:]))
  (folder / "c.bin").write_text("\n\n".join(PARAGRAPHS))
  (folder / "d.txt").write_bytes(b"\xff" * 200)
  return folder


def results_of(example, text, out, *flags):
  return example.main([*SIZES, "--text", str(text), "--out", str(out), *flags])


def test_a_paragraph_is_there_once(example, text):
  cfg = example.train_lm.parse_config(["--text", str(text), "--seq", "16"], example.Config, "")
  train, held_out = example.read_corpus(cfg)
  whole = b"".join(a.tobytes() for a in (train, held_out)).decode()
  assert [whole.count(paragraph) for paragraph in PARAGRAPHS] == [1] * len(PARAGRAPHS)
  assert len(held_out) == -(-len(whole) // 10)


@pytest.mark.usefixtures("quick_compiles")
def test_goes_on_where_it_ended(example, text, tmp_path, capsys):
  """The same losses as of a run that is not cut off."""
  at_once = results_of(example, text, tmp_path / "whole")
  for step in (1, 2):  # a run does one, and is over
    part = results_of(example, text, tmp_path / "parts", "--seconds", "1e-9")
    assert len(part["unquantized"]["losses"]) == step and not part["unquantized"]["done"]
    assert f"step {step} of 3" in capsys.readouterr().out
  parts = results_of(example, text, tmp_path / "parts")
  for of_run in (at_once, parts):
    assert of_run["unquantized"].pop("done") and len(of_run["unquantized"].pop("ms")) == 3
  assert parts == at_once and list(parts["unquantized"]["val_losses"])[-1] == "3"
  files = sorted(path.name for path in (tmp_path / "parts").iterdir())
  assert files == ["results.json"]  # a model that is done needs no state
  kept = json.loads((tmp_path / "parts" / "results.json").read_text())
  assert kept["models"]["unquantized"]["losses"] == at_once["unquantized"]["losses"]
  assert results_of(example, text, tmp_path / "parts")["unquantized"]["done"]  # nothing is left


@pytest.mark.usefixtures("quick_compiles")
def test_other_settings_are_refused(example, text, tmp_path):
  results_of(example, text, tmp_path / "out", "--seconds", "1e-9")
  with pytest.raises(SystemExit, match="of another text or of other settings"):
    results_of(example, text, tmp_path / "out", "--lr", "1")


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--save-seconds", "0"], "--save-seconds must be positive"),
    (["--text", "nowhere"], "--text must be a folder that exists"),
  ],
)
def test_mistakes(example, capsys, flags, words):
  with pytest.raises(SystemExit):
    example.main(flags)
  assert words in capsys.readouterr().err


def test_a_recipe_without_a_part(example):
  """Each part is gone from all operands, and nothing else changes."""
  lm = example.train_lm
  whole = lm.recipe_of("recipe nvfp4")
  for part, change in lm.PARTS.items():
    recipe = lm.recipe_of(f"recipe nvfp4 without {part}")
    assert recipe != whole
    ((field, value),) = change.items()
    for name in ("forward_x", "forward_w", "dx_g", "dx_w", "dw_g", "dw_x"):
      got, had = getattr(recipe, name), getattr(whole, name)
      assert getattr(got, field) == value
      others = [f for f in ("mode", "square", "rounding", "rotation", "scale") if f != field]
      assert [getattr(got, f) for f in others] == [getattr(had, f) for f in others]


def test_table(example):
  """A model that is not done has the gaps so far, and one without losses none."""
  base = {"val_losses": {"3": 2.0, "6": 1.0}, "done": True}
  worse = base | {"val_losses": {"3": 2.1, "6": 1.02}}
  part = {"val_losses": {"3": 1.9}, "done": False}
  models = {"unquantized": base, "recipe mxfp8": worse, "recipe nvfp4": part, "nvfp4": {}}
  head, _, *rows = example.table(models).splitlines()
  assert head == "| model | 3 steps | 6 steps |"
  assert rows == [
    "| bfloat16 | 2.0000 | 1.0000 |",
    "| recipe mxfp8 | +5.00% | +2.00% |",
    "| recipe nvfp4 | -5.00% |  |",
  ]


def test_plot(example, tmp_path):
  """Of models that are done; what a file of results has are strings."""
  assert example.plot({"unquantized": {"done": False, "val_losses": {}}}, "") == (
    "No plot: no model is done."
  )
  done = {"val_losses": {"1": 2.0, "2": 1.0}, "losses": [2.5, 1.5], "done": True}
  said = example.plot({"unquantized": done, "recipe mxfp8": done}, str(tmp_path / "a.png"))
  assert "a.png" in said and (tmp_path / "a.png").stat().st_size > 0
