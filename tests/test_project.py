"""What a user expects of any package: its names, version, types and links."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import pytest

import jaxqq
from jaxqq import _formats
from jaxqq._dot_general import DotGeneral
from jaxqq._gradient import BACKWARDS
from tests.support import api_reference

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(code: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
  )


# Names


@pytest.mark.parametrize(
  "name", ["jaxqq", "jaxqq.checkpoint", "jaxqq.checkpoint_policies", "jaxqq.nn"]
)
def test_all_is_what_completion_shows(name):
  module = importlib.import_module(name)
  subpackages = {"bench", "checkpoint", "nn", "__version__"} if name == "jaxqq" else set()
  assert set(dir(module)) == set(module.__all__) | subpackages
  assert module.__all__ == sorted(module.__all__)
  for public in dir(module):
    assert getattr(module, public).__doc__
  names: dict = {}
  exec(f"from {name} import *", names)
  assert set(module.__all__) == set(names) - {"__builtins__"}


def test_subpackages_are_imported_when_asked_for():
  code = (
    "import sys, jaxqq; dir(jaxqq); assert not {'flax', 'jaxqq.checkpoint'} & set(sys.modules);"
    "jaxqq.checkpoint.load; assert 'flax' not in sys.modules; jaxqq.nn.QQLinear"
  )
  done = run(code)
  assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there():
  with pytest.raises(AttributeError, match="module 'jaxqq' has no attribute 'qqqm'"):
    jaxqq.qqqm  # noqa: B018


def test_a_missing_extra_is_named_and_not_listed():
  code = """
import sys, importlib.machinery
class Without(importlib.machinery.PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] == "flax" else super().find_spec(name, path, target)
sys.meta_path = [Without if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
import inspect, jaxqq
assert "nn" not in dir(jaxqq)
inspect.getmembers(jaxqq)
jaxqq.nn
"""
  done = run(code)
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith("ImportError: ") and "jaxqq[flax]" in last, done.stderr


# Types


def test_modes_of_signatures_are_those_of_the_table():
  assert set(get_args(_formats.Mode)) == set(_formats.FORMATS)
  assert all(fmt.mode == mode for mode, fmt in _formats.FORMATS.items())


TYPED = (
  *(jaxqq.qqmm, jaxqq.quantize, jaxqq.dequantize, jaxqq.quantize_weight, jaxqq.dot_general),
  *(jaxqq.ragged_qqmm, jaxqq.ragged_quantized_matmul, jaxqq.gather_qqmm),
  *(jaxqq.QuantizedWeight.__init__, jaxqq.QuantizedWeight.dequantize),
  *(DotGeneral.__call__, DotGeneral.einsum, DotGeneral.packed),
)


@pytest.mark.parametrize("function", TYPED, ids=lambda f: f.__qualname__)
def test_public_signatures_say_what_they_take(function):
  hints = get_type_hints(function)
  assert set(hints) >= set(inspect.signature(function).parameters) - {"self"}
  assert "typing.Any" not in map(str, hints.values())
  if "mode" in hints:
    assert hints["mode"] == _formats.Mode
  if "backward" in hints:
    assert get_args(hints["backward"]) == BACKWARDS


LAYERS = (
  *(jaxqq.nn.QQLinear, jaxqq.nn.QQLinearGeneral, jaxqq.nn.QQEinsum),
  *(jaxqq.nn.QQExpertLinear, jaxqq.nn.QQExperts),
)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_say_which_modes_they_take(layer):
  hints = get_type_hints(layer.__init__)
  assert hints["mode"] == _formats.Mode and get_args(hints["backward"]) == BACKWARDS


@pytest.mark.parametrize("name", ["", "packed"])
def test_examples_of_what_dot_general_returns(name):
  documented = getattr(DotGeneral, name) if name else DotGeneral
  names = {"jax": jax, "jnp": jnp, "jaxqq": jaxqq}
  example = doctest.DocTestParser().get_doctest(documented.__doc__, names, name, None, 0)
  assert example.examples
  assert doctest.DocTestRunner().run(example).failed == 0


def test_the_reference_is_made_of_the_docstrings():
  text = api_reference.PAGE.read_text()
  assert text == api_reference.page(), "python -m tests.support.api_reference writes it anew"
  for name in jaxqq.__all__:
    assert name == "checkpoint_policies" or f"\n### {name}\n" in text


# The version and links


def test_the_version_stands_in_one_place():
  project = PYPROJECT["project"]
  assert "version" not in project and project["dynamic"] == ["version"]
  assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "jaxqq.__version__"}
  try:
    installed = metadata.version("jaxqq")
  except metadata.PackageNotFoundError:
    pytest.skip("jaxqq runs from its folder, not installed")
  assert jaxqq.__version__ == installed


def test_an_editable_install_puts_the_checkout_on_the_path():
  """Its folder has the package's name: a finder behind the path would find that, empty."""
  assert PYPROJECT["tool"]["setuptools"]["package-dir"] == {"": "."}
  code = (
    "import importlib.machinery as m; spec = m.PathFinder.find_spec('jaxqq', ['..', '.']);"
    "assert spec.origin and spec.origin.endswith('__init__.py'), spec"
  )
  done = run(code)
  assert done.returncode == 0, done.stderr


def test_the_changelog_has_the_version():
  changelog = (ROOT / "CHANGELOG.md").read_text()
  headings = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
  assert headings[0] == ("Unreleased", "")
  assert headings[1][0] == jaxqq.__version__ and all(date for _, date in headings[1:])
  links = re.findall(r"^\[(.*?)\]: (\S+)$", changelog, re.MULTILINE)
  assert [name for name, _ in links] == [name for name, _ in headings]
  source = PYPROJECT["project"]["urls"]["Source"]
  assert all(url.startswith(source + "/") for _, url in links)


def test_urls_are_of_one_repository():
  urls = PYPROJECT["project"]["urls"]
  assert set(urls) == {"Homepage", "Source", "Changelog", "Issues"}
  assert all(url.startswith(urls["Source"]) for url in urls.values())
