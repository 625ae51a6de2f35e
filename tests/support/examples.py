"""The files of `examples/`, which are no package, as modules."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).parent.parent.parent


def load_example(name: str) -> types.ModuleType:
  """`examples/<name>.py`, imported anew."""
  spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module
