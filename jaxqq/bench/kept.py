"""Results in files: where and how they came about, and rows that several runs add up to."""

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
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import jaxqq
from jaxqq.bench.cases import Case
from jaxqq.bench.measure import Row
from jaxqq.bench.peers import Implementation

Header = dict[str, Any]

# What two runs have in common whose rows stand in one file.
_SAME = ("device", "jax", "timing")


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


def write(path: pathlib.Path, header: Header, rows: Sequence[Any], table: str = "rows") -> None:
  """Replaces the file in one step, so that it is whole whenever the run is stopped.

  Args:
    path: the file.
    header: of `make_header`.
    rows: `Row`s, or other frozen dataclasses.
    table: the name that the file has them under.
  """
  head = json.dumps(header, indent=1, allow_nan=False).replace("\n", "\n ")
  body = ",\n".join(map(_row_text, rows))
  part = path.with_name(path.name + ".part")
  part.write_text(f'{{\n "header": {head},\n "{table}": [\n{body}\n ]\n}}\n')
  os.replace(part, path)


@functools.cache  # a file is written after every case, and most of its rows are not new
def _row_text(row: Any) -> str:
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


# ---- several runs


def resume(path: pathlib.Path, header: Header) -> tuple[Header, list[Row]]:
  """The rows of a file that a new run adds to, and the header of both.

  Args:
    path: the file; where there is none yet, there are no rows.
    header: of the new run. The header of both names the commits of all runs, and says how long
      chains are if some run measured them.

  Raises:
    ValueError: the file holds no results, or those of another device, JAX or way of timing.
  """
  if not path.exists():
    return header, []
  try:
    kept, rows = read([path])
    missing = [name for name in (*_SAME, "commit") if name not in kept]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"cannot read {path}: {error!r}") from error
  if missing:
    raise ValueError(f"cannot read {path}: its header has no {missing[0]}")
  chain = header.get("chain") or kept.get("chain", 0)
  return {**joined(path, kept, header), "chain": chain}, rows


def joined(path: pathlib.Path, old: Header, new: Header, also: Sequence[str] = ()) -> Header:
  """The header of a file that a run adds to: the new one, with the commits of both.

  Args:
    path: the file.
    old: its header.
    new: of the run.
    also: what must be the same beside device, JAX and way of timing.

  Raises:
    ValueError: they differ in what must be the same.
  """
  for name in (*_SAME, *also):
    if old.get(name) != new.get(name):
      raise ValueError(
        f"cannot add to {path}: its {name} is {old.get(name)!r}, and here it is {new.get(name)!r}"
      )
  commits = [*str(old.get("commit")).split(", "), str(new["commit"])]
  known = [commit for commit in dict.fromkeys(commits) if commit != "None"]
  return {**new, "commit": ", ".join(known) or None}


def cell(of: Case | Row) -> tuple[Any, ...]:
  """What tells cases apart, also of their rows."""
  return of.form, of.mode, of.m, of.n, of.k, of.dtype


def replaced(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
  """The rows with new ones behind, which take the place of older ones of the same."""
  names = {(cell(row), row.implementation) for row in new}
  return [row for row in rows if (cell(row), row.implementation) not in names] + list(new)


def missing(
  compared: Mapping[Case, Sequence[Implementation]], rows: Sequence[Row], *, chain: bool
) -> list[Case]:
  """The cases that some rows lack; last come those of which an implementation failed.

  Args:
    compared: the cases that are wanted, and the implementations of each.
    rows: that are kept.
    chain: whether the wall clock of chains is wanted.
  """
  kept: dict[tuple[Any, ...], dict[str, Row]] = {}
  for row in rows:
    kept.setdefault(cell(row), {})[row.implementation] = row
  new, failed = [], []
  for case, implementations in compared.items():
    found = [kept.get(cell(case), {}).get(each.name) for each in implementations]
    measured = [row for row in found if row is not None and row.us is not None]
    if any(row is None for row in found):
      new.append(case)
    elif len(measured) < len(found):
      failed.append(case)
    elif chain and not all(row.chain or row.chain_note for row in measured):
      new.append(case)
  return new + failed
