"""The package as a user meets it: imports, README, examples, layers of the code."""

from __future__ import annotations

import ast
import doctest
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from tests.support.examples import load_example
from tests.support.processes import run_example_without, run_without

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_import_needs_the_four_packages_only():
  code = (
    "import sys, jaxqq; extra = {'optax', 'tqdm', 'matplotlib', 'flax', 'safetensors', 'pytest'};"
    "print(sorted(extra & set(sys.modules)))"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == "[]"


FUNCTIONS = ("qqmm", "quantize", "dequantize", "explain", "quantize_weight", "dot_general")


def test_public_names():
  public = {
    name
    for name, value in vars(jaxqq).items()
    if not name.startswith("_") and not isinstance(value, types.ModuleType)
  }
  assert public == set(FUNCTIONS) | {"QuantizedWeight"}
  assert (ROOT / "jaxqq" / "py.typed").exists()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_in_docstrings(name):
  function = getattr(jaxqq, name)
  assert all(part in function.__doc__ for part in ("Args:", "Returns:", "Raises:", "Example:"))
  names = {"jax": jax, "jnp": jnp, "np": np, "jaxqq": jaxqq}
  example = doctest.DocTestParser().get_doctest(function.__doc__, names, name, None, 0)
  assert example.examples
  assert doctest.DocTestRunner().run(example).failed == 0


def snippets() -> list[str]:
  return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_has_snippets():
  assert len(snippets()) >= 4


@pytest.mark.parametrize("index", range(len(snippets())))
def test_readme_snippets_run(index):
  """Each python block runs by itself; `# ...` behind an expression is what it prints."""
  names: dict = {}
  exec(compile(snippets()[index], f"README snippet {index}", "exec"), names)


def test_readme_names_files_that_exist():
  for name in re.findall(r"`((?:jaxqq|tests|examples)/[\w./]*)`", README):
    assert (ROOT / name).exists(), name


def imports(path: pathlib.Path) -> set[str]:
  """The modules of the package that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxqq"):
      if node.module == "jaxqq":
        found |= {alias.name for alias in node.names}
      else:
        found.add(node.module.split(".")[1])
  return found


def test_a_file_imports_only_from_files_above_it():
  order = [
    *("_compat", "_formats", "_checks", "_rounding", "_quantize", "_reference", "_kernels"),
    *("_split", "_sharding", "_primitive", "_convert_split", "_convert_primitive", "_convert"),
    *("_weight", "_row_sums", "_gradient", "_qqmm", "_explain", "_einsum", "_contraction"),
    *("_dot_general", "__init__"),
  ]
  files = {path.stem: path for path in (ROOT / "jaxqq").glob("*.py")}
  files["_kernels"] = ROOT / "jaxqq" / "_kernels" / "__init__.py"
  assert set(files) == set(order)
  kernels = [("_kernels", path) for path in files["_kernels"].parent.glob("*.py")]
  for name, path in [*files.items(), *kernels]:
    above = set(order[: order.index(name)])
    others = imports(path) - {name}  # the files of a package import each other
    assert others <= above, f"{path.name} imports {others - above}"


def test_train_lm(tmp_path, capsys):
  """The language model, small: three models, a table, a line of text from each, a plot."""
  example = load_example("train_lm")
  plot = tmp_path / "loss.png"
  sizes = ["--layers", "1", "--d-model", "32", "--heads", "2", "--seq", "32", "--batch", "2"]
  results = example.main([*sizes, "--steps", "4", "--sample-bytes", "12", "--plot", str(plot)])
  assert list(results) == ["unquantized", "mxfp8", "nvfp4"]
  for result in results.values():
    assert np.isfinite(result["losses"]).all() and len(result["losses"]) == 4
    assert 5 < result["first_loss"] < 6 and 4 < result["val_loss"] < 6
    assert result["sample"].startswith("The")
  first = [result["first_loss"] for result in results.values()]
  assert first[0] == pytest.approx(first[1], rel=0.02) and first[0] != first[1]
  ratio = {mode: r["bytes"] / r["bf16_bytes"] for mode, r in results.items()}
  assert ratio["unquantized"] == 1  # each layer's amax, 4 bytes, is counted too
  assert ratio["mxfp8"] == pytest.approx(8.25 / 16, rel=0.01)
  assert ratio["nvfp4"] == pytest.approx(4.5 / 16, rel=0.01)
  assert plot.stat().st_size > 1000
  printed = capsys.readouterr().out
  assert all(word in printed for word in ("validation loss", "ms/step", "nvfp4", str(plot)))


@pytest.mark.parametrize("flags", [["--d-model", "40"], ["--heads", "3"], ["--steps", "0"]])
def test_train_lm_refuses_sizes_that_cannot_be(flags, capsys):
  with pytest.raises(SystemExit):
    load_example("train_lm").main(flags)
  assert f"{flags[0]} must" in capsys.readouterr().err


def test_train_lm_names_the_extra_that_is_missing(tmp_path):
  done = run_example_without("optax", "train_lm", tmp_path)
  assert done.returncode != 0 and "jaxqq[examples]" in done.stderr


def test_train_lm_without_a_plot(tmp_path):
  """Trained models are not lost for want of matplotlib; here they are no models."""
  code = """
import train_lm
result = {"val_loss": 5.0, "bytes": 9, "bf16_bytes": 9, "ms_per_step": 1.0, "sample": "The end"}
train_lm.run = lambda *args: result
assert train_lm.main(["--modes", "unquantized"]) == {"unquantized": result}
"""
  done = run_without("matplotlib", code, tmp_path)
  assert done.returncode == 0, done.stderr
  assert "The end" in done.stdout
  assert done.stdout.splitlines()[-1].startswith("No plot: that needs matplotlib")
  assert "jaxqq[examples]" in done.stdout and not list(tmp_path.iterdir())
