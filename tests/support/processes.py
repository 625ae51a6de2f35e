"""Python in a process of its own."""

from __future__ import annotations

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
  return subprocess.run(
    [sys.executable, "-c", HIDE.format(package=package) + code],
    cwd=cwd,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples")))},
    capture_output=True,
    text=True,
    check=False,
  )


def run_example_without(
  package: str, name: str, cwd: pathlib.Path, *flags: str
) -> subprocess.CompletedProcess[str]:
  """Runs `examples/<name>.py` so."""
  path = str(ROOT / "examples" / f"{name}.py")
  code = (
    f"import runpy; sys.argv = {[path, *flags]!r}; runpy.run_path({path!r}, run_name='__main__')"
  )
  return run_without(package, code, cwd)
