"""The package as a user meets it: imports, README, examples, layers of the code."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq

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


def test_public_names():
  public = {name for name in vars(jaxqq) if not name.startswith("_")}
  assert public == {"qqmm", "quantize", "dequantize", "explain"}
  assert (ROOT / "jaxqq" / "py.typed").exists()


@pytest.mark.parametrize("name", ["qqmm", "quantize", "dequantize", "explain"])
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
    "_formats", "_checks", "_rounding", "_quantize", "_reference", "_kernels", "_sharding",
    "_primitive", "_gradient", "_qqmm", "__init__",
  ]  # fmt: skip
  files = {path.stem: path for path in (ROOT / "jaxqq").glob("*.py")}
  files["_kernels"] = ROOT / "jaxqq" / "_kernels" / "__init__.py"
  assert set(files) == set(order)
  for name, path in files.items():
    above = set(order[: order.index(name)])
    assert imports(path) <= above, f"{name} imports {imports(path) - above}"


def load_example(name: str):
  spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module
