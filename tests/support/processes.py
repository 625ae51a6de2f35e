"""Python in a process of its own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
HIDE = """
import sys
class Hide:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] == {package!r}: raise ImportError(name)
sys.meta_path.insert(0, Hide())
"""


def run_without(package: str, code: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
  """Runs code with this checkout's jaxqq, as if a package were not installed."""
  return run(HIDE.format(package=package) + code, cwd)


def run(
  code: str, cwd: pathlib.Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
  """Runs code with this checkout's jaxqq, and more in the environment."""
  path = os.pathsep.join(map(str, (ROOT, ROOT / "examples")))
  return subprocess.run(
    [sys.executable, "-c", code, *arguments],
    cwd=cwd,
    env={**os.environ, "PYTHONPATH": path, **environment},
    capture_output=True,
    text=True,
    check=False,
  )


def exits_without(packages: list[str], name: str, cwd: pathlib.Path) -> dict[str, str]:
  """What `examples/<name>.py` exits with without each of some packages, which it imports in order.

  All in one process: most of the time of each would be the import of JAX.
  """
  path = str(ROOT / "examples" / f"{name}.py")
  code = """
import json, runpy
class HideOneOf:
  hidden = None
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] == self.hidden: raise ImportError(name)
finder, told = HideOneOf(), {}
sys.meta_path.insert(0, finder)
for finder.hidden in PACKAGES:
  assert finder.hidden not in sys.modules
  try: runpy.run_path(PATH, run_name="__main__")
  except SystemExit as error: told[finder.hidden] = error.code
print(json.dumps(told))
"""
  done = run(
    f"import sys; sys.argv = [{path!r}]; PATH, PACKAGES = {path!r}, {packages}\n{code}", cwd
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def run_example_without(
  package: str, name: str, cwd: pathlib.Path, *flags: str
) -> subprocess.CompletedProcess[str]:
  """Runs `examples/<name>.py` so."""
  path = str(ROOT / "examples" / f"{name}.py")
  code = (
    f"import runpy; sys.argv = {[path, *flags]!r}; runpy.run_path({path!r}, run_name='__main__')"
  )
  return run_without(package, code, cwd)
