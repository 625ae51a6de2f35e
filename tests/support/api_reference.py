"""The reference of every public name, jaxqq/API.md, from signatures and docstrings.

python -m tests.support.api_reference    # writes it anew
"""

from __future__ import annotations

import importlib
import inspect
import pathlib
from typing import Any

from jaxqq._dot_general import DotGeneral

PAGE = pathlib.Path(__file__).parent.parent.parent / "jaxqq" / "API.md"
TITLES = {
  "jaxqq": "Products, conversions, weights",
  "jaxqq.checkpoint_policies": "Policies of `jax.checkpoint`",
  "jaxqq.nn": "Layers of Flax",
  "jaxqq.checkpoint": "Checkpoints",
}
INTRODUCTION = """\
# API

Every public name, from its docstring, as `help(...)` shows it. This page is made by
`python -m tests.support.api_reference`. What the words mean, with snippets: [in detail](README.md).
"""


def public(module: str) -> dict[str, Any]:
  """The names of a module that are documented here, but for modules."""
  namespace = importlib.import_module(module)
  found = {name: getattr(namespace, name) for name in namespace.__all__}
  found = {name: value for name, value in found.items() if not inspect.ismodule(value)}
  return found | ({"DotGeneral": DotGeneral} if module == "jaxqq" else {})


def methods(value: Any) -> dict[str, Any]:
  """The documented methods and properties that a class itself defines."""
  if not inspect.isclass(value):
    return {}
  own = {name: a for name, a in vars(value).items() if name[0] != "_" or name in _OPERATORS}
  called = {name: _called(value, name, a) for name, a in own.items()}
  return {name: a for name, a in called.items() if a is not None and a.__doc__}


_OPERATORS = ("__call__", "__getitem__", "__matmul__")


def _called(owner: type, name: str, a: Any) -> Any:
  if isinstance(a, property):
    return a
  a = getattr(owner, name)
  is_own = inspect.isroutine(a) and a.__qualname__.startswith(f"{owner.__name__}.")
  return a if is_own else None


def signature(name: str, value: Any) -> str:
  """As it is called; of what has none of its own, the name."""
  if isinstance(value, property):
    return name
  fields = getattr(value, "__dataclass_params__", None)
  is_generated = "__init__" not in getattr(value, "__dict__", ()) if fields is None else fields.init
  if inspect.isclass(value) and is_generated:  # the docstring tells its fields
    return name
  parameters = inspect.signature(value).parameters
  shown = [p.replace(annotation=inspect.Parameter.empty) for p in parameters.values()]
  shown = [p for p in shown if p.name != "self"]
  return name + str(inspect.Signature(shown))


def section(level: int, name: str, value: Any) -> list[str]:
  text = inspect.getdoc(value) or ""
  return [f"{'#' * level} {name}", "", "```text", signature(name, value), "", text, "```", ""]


def page() -> str:
  lines = [INTRODUCTION]
  for module, title in TITLES.items():
    lines += [f"## {title}", "", f"In `{module}`.", ""]
    for name, value in public(module).items():
      lines += section(3, name, value)
      for method, own in methods(value).items():
        lines += section(4, f"{name}.{method}", own)
  return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
  PAGE.write_text(page())
