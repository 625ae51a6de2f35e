"""Results in files: where and how they came about, and their rows."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import jax

import jaxqq
from jaxqq.bench.measure import Row

Header = dict[str, Any]


def make_header(timing: str, **settings: Any) -> Header:
  """Where and how results came about."""
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "driver": _driver(),
    "jax": jax.__version__,
    "jaxqq": jaxqq.__version__,
    "commit": _commit(),
    "python": platform.python_version(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "timing": timing,
    **settings,
  }


def _driver() -> str | None:
  """NVIDIA's driver version, where there is one."""
  if shutil.which("nvidia-smi") is None:
    return None
  command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
  done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
  return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None


def _commit() -> str | None:
  """The commit of the checkout that jaxqq runs from, "-dirty" where files differ from it."""
  package = pathlib.Path(jaxqq.__file__).parent
  command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--match="]
  # A checkout of jaxqq, not of a project whose environment it is installed in.
  if shutil.which("git") is None or not (package.parent / ".git").exists():
    return None
  done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
  return done.stdout.strip() or None


def write(path: pathlib.Path, header: Header, rows: Sequence[Row]) -> None:
  """Replaces the file in one step, so that it is whole whenever the run is stopped."""
  head = json.dumps(header, indent=1, allow_nan=False).replace("\n", "\n ")
  body = ",\n".join(map(_row_text, rows))
  part = path.with_name(path.name + ".part")
  part.write_text(f'{{\n "header": {head},\n "rows": [\n{body}\n ]\n}}\n')
  os.replace(part, path)


@functools.cache  # a file is written after every case, and most of its rows are not new
def _row_text(row: Row) -> str:
  """A line, without the fields that have their default."""
  fields = dataclasses.fields(row)
  values = {field.name: getattr(row, field.name) for field in fields}
  said = {f.name: values[f.name] for f in fields if values[f.name] != f.default}
  return "  " + json.dumps(said, allow_nan=False)


def read(paths: Sequence[pathlib.Path]) -> tuple[Header, list[Row]]:
  """The rows of some files together, under the first one's header.

  Files of examples/decode.py, which has tables of its own, may be among them: they have no rows.
  """
  contents = [json.loads(path.read_text()) for path in paths]
  tables = [content["rows"] for content in contents if "models" not in content]
  return contents[0]["header"], [Row(**row) for table in tables for row in table]
