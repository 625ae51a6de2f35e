"""The package as a user meets it: imports, README, examples, layers of the code."""

from __future__ import annotations

import ast
import doctest
import functools
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


FUNCTIONS = (
  *("qqmm", "quantize", "dequantize", "explain", "quantize_weight", "dot_general", "concatenate"),
  *("partition", "combine", "quantized_matmul", "ragged_qqmm", "ragged_quantized_matmul"),
  "gather_qqmm",
)
POLICIES = ("dots_saveable", "dots_with_no_batch_dims_saveable")


def test_public_names():
  public = {
    name
    for name, value in vars(jaxqq).items()
    if not name.startswith("_") and not isinstance(value, types.ModuleType)
  }
  assert public == set(FUNCTIONS) | {"QuantizedWeight", "Quantizer", "Recipe"}
  assert (ROOT / "jaxqq" / "py.typed").exists()


@pytest.mark.parametrize("name", (*FUNCTIONS, *POLICIES))
def test_examples_in_docstrings(name):
  function = getattr(jaxqq, name, None) or getattr(jaxqq.checkpoint_policies, name)
  parts = ["Args:", "Returns:", "Example:"] + ["Raises:"] * (name in FUNCTIONS)
  assert all(part in function.__doc__ for part in parts)
  names = {"functools": functools, "jax": jax, "jnp": jnp, "np": np, "jaxqq": jaxqq}
  example = doctest.DocTestParser().get_doctest(function.__doc__, names, name, None, 0)
  assert example.examples
  assert doctest.DocTestRunner().run(example).failed == 0


def pages() -> list[str]:
  """Every Markdown file of the project, as a path from its root."""
  found = list(ROOT.glob("*.md"))
  for folder in ("jaxqq", "examples", "tests"):
    found += (ROOT / folder).rglob("*.md")
  return sorted(path.relative_to(ROOT).as_posix() for path in found)


def snippets() -> dict[str, str]:
  """The python blocks of every page, by page and number."""
  return {
    f"{page} {i}": block
    for page in pages()
    for i, block in enumerate(
      re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    )
  }


def test_the_pages_have_snippets():
  for page in ("README.md", *(f"jaxqq/{p}README.md" for p in ("", "nn/", "checkpoint/"))):
    assert f"{page} 0" in snippets()
  assert "README.md 2" in snippets() and "jaxqq/SHARDING.md 1" in snippets()


@pytest.mark.parametrize("name", snippets())
def test_snippets_run(name):
  """Each python block runs by itself; `# ...` behind an expression is what it prints."""
  names: dict = {}
  exec(compile(snippets()[name], f"snippet of {name}", "exec"), names)


def test_the_readme_is_short():
  lines = README.splitlines()
  assert len(lines) < 250 and max(map(len, lines)) <= 150


def test_the_readme_has_the_two_commands_of_a_newcomer():
  """One that trains a model, then one that runs the tests, in one line each, as CI reads it."""
  commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
  assert len(commands) == 2
  assert commands[0].endswith("train_lm.py") and commands[1].endswith("-m pytest")


@pytest.mark.parametrize("page", [page for page in pages() if page != "CHANGELOG.md"])
def test_pages_name_files_that_exist(page):
  for name in re.findall(r"`((?:jaxqq|tests|examples)/[\w./]*)`", (ROOT / page).read_text()):
    assert (ROOT / name).exists(), name


def anchors(path: pathlib.Path) -> set[str]:
  """The headings of a page, as GitHub names them in links."""
  titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", pages())
def test_links_point_to_something(page):
  """Relative links, to files, folders and headings."""
  path = ROOT / page
  text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
  for link in re.findall(r"\]\(([^)\s]+)\)", text):
    if re.match(r"[a-z]+:", link):
      continue
    name, _, anchor = link.partition("#")
    target = path.parent / name if name else path
    assert target.exists(), link
    assert not anchor or anchor in anchors(target), link


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
    *("_compat", "_formats", "_checks", "_rounding", "_global_scales", "_quantize"),
    *("_random_bits", "_hadamard", "_unbiased", "_quantizer", "_recipe"),
    *("_reference", "_ragged_reference", "_kernels"),
    *("_split", "_sharding", "_out_sharding", "_primitive", "_quantizer_lowering"),
    "_convert_split",
    *("_convert_primitive", "_convert", "_weight_index", "_weight", "_quantize_weight"),
    *("_concatenate", "_trees", "_row_sums"),
    *(
      "_gradient",
      "_given",
      "_recipe_product",
      "_qqmm",
      "_quantized_matmul",
      "_einsum",
      "_contraction",
    ),
    *(
      "_dot_general",
      "_ragged_split",
      "_ragged_explicit",
      "_ragged_primitive",
      "_ragged",
      "_stacked_layer",
      "_gather",
      "_explain",
      "checkpoint_policies",
      "__init__",
    ),
  ]
  files = {path.stem: path for path in (ROOT / "jaxqq").glob("*.py")}
  files["_kernels"] = ROOT / "jaxqq" / "_kernels" / "__init__.py"
  assert set(files) == set(order)
  kernels = [("_kernels", path) for path in files["_kernels"].parent.rglob("*.py")]
  for name, path in [*files.items(), *kernels]:
    above = set(order[: order.index(name)])
    others = imports(path) - {name}  # the files of a package import each other
    assert others <= above, f"{path.name} imports {others - above}"


# From top to bottom, jaxqq/_kernels/: a file imports only from those above it.
KERNELS = (
  *(
    "plan",
    "problem",
    "xla",
    "block_scaled_dot",
    "hopper.tiles",
    "hopper.costs",
    "hopper.mainloops.table",
    "hopper.checks",
    "hopper.wide_plan",
    "hopper.skinny_plan",
    "hopper.plan",
    "hopper.ragged_plan",
    "hopper.conversion_plan",
    "hopper.quantizer_plan",
    "hopper.rows",
    "__init__",
    "ragged",
    "conversions",
  ),
  *("ptx.interpreter", "ptx.layouts", "ptx.registers", "ptx.named_barriers", "ptx.cluster"),
  "ptx.warp_arrays",
  *("ptx.rounding", "ptx.random_bits", "ptx.rotation", "ptx.reshape", "ptx.loads", "ptx.scales"),
  *("ptx.scale_planes", "ptx.distances"),
  *("ptx.expand", "ptx.expand_in_order"),
  *("ptx.expand_sixteens", "ptx.stores", "ptx.handover", "ptx.wgmma", "ptx.mma"),
  *("pipeline", "quantize.groups", "stream_k", "grouped"),
  "quantize.elements",
  *("quantize.codes", "epilogue", "quantize.parts", "quantize.squares", "quantize.packed"),
  *("quantize.exact", "quantize.rebased"),
  *("quantize.group_rescale", "quantize.columns", "quantize.amax", "quantize.code_words"),
  *("quantize.blockdiag", "quantize.in_kernel"),
  *("mainloops.packed_e2m1", "mainloops.packed_e4m3", "mainloops.expanded"),
  *("mainloops.in_order", "mainloops.group_sums", "mainloops.blockdiag", "mainloops.quantized"),
  "mainloops.sixteens",
  *("gemm", "dequant_store", "dequant_gemm", "staged_gemm", "skinny_store", "skinny_gemm"),
  *("row_sums", "launch"),
)


def test_a_file_of_the_kernels_imports_only_from_files_above_it():
  order = [
    name
    if name in ("plan", "problem", "xla", "block_scaled_dot", "ragged", "__init__")
    or name == "conversions"
    or name[:3] == "hop"
    else f"hopper.{name}"
    for name in KERNELS
  ]
  root = ROOT / "jaxqq" / "_kernels"
  paths = {
    ".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")
  }
  packages = {name for name in paths if name.endswith(".__init__")}
  assert set(paths) - packages == set(order)
  for name in packages:  # nothing but what they are for
    assert not imports(paths[name]), name
  for index, name in enumerate(order):
    tree = ast.parse(paths[name].read_text())
    found = set()
    for node in tree.body:  # what a function imports when it runs does not count
      if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxqq._kernels"):
        module = node.module.removeprefix("jaxqq._kernels").removeprefix(".")
        names = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
        found |= {n for n in names if n in paths} or {module or "__init__"}
    assert found <= set(order[:index]), f"{name} imports {found - set(order[:index])}"


@pytest.mark.usefixtures("quick_compiles")
def test_train_lm(tmp_path, capsys, monkeypatch):
  """The language model, small: three models, a table, a line of text from each, a plot."""
  example = load_example("train_lm")
  bars, at_the_end = [], []

  class Bar(example.tqdm):
    def __init__(self, *args, **how):
      super().__init__(*args, **how)
      self.told = None
      bars.append(self)

    def set_postfix_str(self, text="", refresh=True):
      self.told = text

    def close(self):
      self.told = "closed"
      super().close()

  sample = example.sample
  monkeypatch.setattr(example, "tqdm", Bar)
  monkeypatch.setattr(
    example, "sample", lambda *args: [at_the_end.append(bars[-1].told), sample(*args)][1]
  )
  monkeypatch.setattr(example, "NUM_EVALS", 2)
  plot = tmp_path / "loss.png"
  sizes = ["--layers", "1", "--d-model", "32", "--heads", "2", "--seq", "32", "--batch", "8"]
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
  assert at_the_end == 3 * ["packing and sampling"] and {bar.told for bar in bars} == {"closed"}
  printed = capsys.readouterr().out
  assert all(word in printed for word in ("validation loss", "ms/step", "nvfp4", str(plot)))
  # The README's words.
  titles = re.search(r"^\| (model .*) \|$", README, re.MULTILINE).group(1).split(" | ")
  assert all(title in printed for title in titles) and "nvfp4, global scales" in printed


def test_train_lm_averages_over_seeds(monkeypatch, capsys):
  """Means and standard deviations; a change is that between two models of one seed."""
  example = load_example("train_lm")
  losses = {"unquantized": (1.0, 2.0, 3.0), "mxfp8": (1.1, 2.0, 3.0)}

  def run(cfg, mode, *_):
    return {
      "val_loss": losses[mode][cfg.seed - 5],
      "bytes": 9,
      "bf16_bytes": 9,
      "ms_per_step": float(cfg.seed),
      "sample": f"seed {cfg.seed}",
    }

  monkeypatch.setattr(example, "run", run)
  options = ["--seed", "5", "--seeds", "3", "--modes", "unquantized", "mxfp8", "--plot", ""]
  example.main(options)
  cells = {
    line.split(" ")[0]: [cell.strip() for cell in line.split("|")]
    for line in capsys.readouterr().out.splitlines()
    if "|" in line
  }
  assert cells["bfloat16"] == ["bfloat16", "2.0000 ± 1.0000", "-", "9", "6.0"]
  assert cells["mxfp8"] == ["mxfp8", "2.0333 ± 0.9504", "+3.33 ± 5.77%", "9", "6.0"]
  example.main([*options[:2], *options[4:]])
  printed = capsys.readouterr().out
  assert "±" not in printed and "+10.00%" in printed and "mxfp8: seed 5" in printed


@pytest.mark.parametrize(
  "flags", [["--d-model", "40"], ["--heads", "3"], ["--steps", "0"], ["--seeds", "0"]]
)
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
[(mode, got)] = train_lm.main(["--modes", "unquantized"]).items()
assert mode == "unquantized" and result.items() <= got.items()
"""
  done = run_without("matplotlib", code, tmp_path)
  assert done.returncode == 0, done.stderr
  assert "The end" in done.stdout
  assert done.stdout.splitlines()[-1].startswith("No plot: that needs matplotlib")
  assert "jaxqq[examples]" in done.stdout and not list(tmp_path.iterdir())
