"""Surveys: runs that add up to one file, what a budget leaves, and the summary's numbers."""

from __future__ import annotations

import dataclasses
import json
import logging
import re

import jax
import pytest

from jaxqq.bench import __main__ as bench
from jaxqq.bench import kept, measure, report, results_page
from jaxqq.bench.cases import LLAMA, MODELS, MODES, SUITES, Case, covering, is_survey, select
from jaxqq.bench.compile_ahead import compile_ahead
from jaxqq.bench.markdown import TIMES
from jaxqq.bench.peers import CUBLAS, implementations
from jaxqq.bench.summary import every_shape, group, summary

CPU = measure.Timer("wall time", measure.wall_seconds, 0)
TINY = ["--suite", "models", "--shapes", "48x64", "32x96", "--rows", "1", "40", "--modes", "nvfp4"]
TINY += ["--seconds", "0.01", "--rounds", "2"]


def survey(path, *arguments):
  return bench.main([*TINY, "--json", str(path), *arguments])


@pytest.fixture
def measured(monkeypatch):
  """The cases that are measured from here on, each with made-up times."""
  cases = []

  def run_cases(compared, *_):
    ((case, implementations),) = compared.items()
    cases.append(case)
    row = measure.Row(case.name, **dataclasses.asdict(case), implementation="")
    rows = [dataclasses.replace(row, implementation=each.name, us=10.0) for each in implementations]
    return {case: measure._with_ratios([dataclasses.replace(row, gbps=1.0) for row in rows])}

  monkeypatch.setattr(bench, "run_cases", run_cases)
  return cases


# ---- the suite


def test_the_suite_of_models():
  cases = select(["models"])
  assert len(set(MODELS)) == 25 and not set(MODELS) & set(LLAMA)
  assert len(cases) == len(set(cases)) == (25 + len(LLAMA)) * 15 * 2
  assert is_survey(["models"]) and not is_survey(["models", "goals"]) and not is_survey(["mine"])
  assert {(case.n, case.k) for case in select(["models"], shapes=[(48, 64)])} == {(48, 64)}
  assert {case.k for case in select(["quantize"], shapes=[(48, 64)])} == {8192}


def test_every_shape_comes_early():
  cases = covering(select(["models"]))
  assert sorted(cases, key=str) == sorted(select(["models"]), key=str)
  shapes = len(SUITES["models"].shapes)
  assert [case.m for case in cases[:: 2 * shapes]][:4] == [1, 192, 32, 2048]
  assert len({(case.n, case.k, case.mode) for case in cases[: 2 * shapes]}) == 2 * shapes
  assert covering([]) == [] and covering(cases[:1]) == cases[:1]


@pytest.fixture
def compilations_are_logged():
  with jax.log_compiles():
    yield


def test_what_is_compiled_ahead_is_not_compiled_again(compilations_are_logged, caplog):
  case = Case("packed", "mxfp8", 24, 48, 96)
  compared = {case: implementations(case, ["none"])}
  timer = dataclasses.replace(CPU, rotate_bytes=5 * 48 * 96 * 2)
  with caplog.at_level(logging.WARNING):
    compile_ahead(compared, timer)
    ahead = re.findall("Finished XLA compilation of (.*?) in", caplog.text)
    caplog.clear()
    (rows,) = measure.run_cases(compared, timer, measure.Settings(seconds=0.01, rounds=2)).values()
    again = re.findall("Finished XLA compilation of (.*?) in", caplog.text)
  assert len(ahead) >= 7 and not again  # operands, packing, the product, rows for the check
  assert all(row.us and row.error_share <= 1 for row in rows) and rows[0].copies > 5


def test_what_cannot_be_compiled_ahead_is_left_to_the_measurement():
  def fail(*operands):
    raise NotImplementedError("no such kernel")

  case = Case("packed", "nvfp4", 40, 48, 64)
  mine = implementations(case, ["none"])[0]
  broken = [dataclasses.replace(mine, run=fail), dataclasses.replace(mine, prepare=fail)]
  compile_ahead({case: broken}, CPU)


def test_what_cases_have_in_common_is_measured_once():
  cases = [Case("packed", mode, 24, 48, 96) for mode in ("nvfp4", "mxfp8")]
  compared = {case: implementations(case, ["cublas"]) for case in cases}
  timed = []

  def sample(f, args, calls):
    timed.append(f)
    return measure.wall_seconds(f, args, 1)

  quick = measure.Settings(seconds=0.01, rounds=1)
  found = measure.run_cases(compared, measure.Timer("", sample, 0), quick)
  assert len(timed) == len(set(timed)) == 3
  (dot, first), (same, second) = found.values()
  assert dot.us == same.us and [first.mode, second.mode] == [dot.mode, same.mode] != [dot.mode] * 2
  assert all(row.ratio == dot.us / row.us and row.error_share <= 1 for row in (first, second))


# ---- runs that add up


def test_a_survey_end_to_end(tmp_path, capsys):
  path = tmp_path / "models.json"
  rows = survey(path)
  assert len(rows) == 8 and {row.implementation for row in rows} == {CUBLAS, "jaxqq"}
  assert all(row.us and row.error_share <= 1 and not row.chain and not row.note for row in rows)
  printed = capsys.readouterr().out
  assert "4 of 4 cases are measured." in printed and summary(rows) in printed
  report.main([str(path), "--all"])
  printed = capsys.readouterr().out
  assert summary(rows) in printed and "packed nvfp4 40x48x64" in printed
  assert summary(rows) in results_page.page(tmp_path)
  again = survey(path, "--chain", "3", "--rows", "1", "--shapes", "48x64")
  assert len(again) == 8 and [row.m for row in again if row.chain == 3] == [1, 1]
  assert "wall clock in a chain, unrolled" in capsys.readouterr().out
  survey(path)
  assert kept.read([path])[0]["chain"] == 3


def test_a_second_run_measures_what_is_missing(tmp_path, measured):
  path = tmp_path / "models.json"
  survey(path, "--rows", "1")
  assert [(case.m, case.n) for case in measured] == [(1, 48), (1, 32)]
  rows = survey(path)
  assert [(case.m, case.n) for case in measured[2:]] == [(40, 48), (40, 32)]
  assert rows == kept.read([path])[1] and len(rows) == 8
  assert len(survey(path)) == 8 and len(measured) == 4
  assert len(survey(path, "--no-resume", "--rows", "1")) == 4 and len(measured) == 6


def test_several_processes_measure_what_one_does(tmp_path, monkeypatch):
  for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
    monkeypatch.setenv(name, "")  # so that it is as it was, afterwards
  path = tmp_path / "models.json"
  together = ["--modes", "nvfp4", "mxfp8", "--shapes", "48x64", "--processes", "2"]
  rows = survey(path, *together)
  assert len(rows) == 8 and rows == kept.read([path])[1]
  assert {(row.m, row.mode) for row in rows} == {(m, mode) for m in (1, 40) for mode in MODES}
  assert all(row.us and row.error_share <= 1 and not row.note for row in rows)
  late = [*together, "--no-resume", "--seconds-total", "0.001"]
  assert survey(path, *late) == [] and len(kept.read([path])[1]) == 8


def test_failures_are_measured_again_and_last(tmp_path, measured):
  path = tmp_path / "models.json"
  rows = survey(path)
  lost = dataclasses.replace(rows[1], us=None, note="failed: lost")
  left = [row for row in kept.replaced(rows, [lost]) if row.m == 1]
  kept.write(path, kept.read([path])[0], left)
  del measured[:]
  assert len(survey(path)) == 8
  assert [case.m for case in measured] == [40, 40, 1] and measured[-1].n == rows[1].n
  assert not any(row.note for row in kept.read([path])[1])


def test_runs_of_other_cards_and_versions_do_not_add_up(tmp_path, measured, capsys):
  path = tmp_path / "models.json"
  survey(path, "--rows", "1")
  content = json.loads(path.read_text())
  commit = content["header"]["commit"]
  for name in ("device", "jax", "timing"):
    changed = {**content, "header": {**content["header"], name: "other"}}
    path.write_text(json.dumps(changed))
    with pytest.raises(SystemExit):
      survey(path)
    assert f"cannot add to {path}: its {name} is 'other'" in capsys.readouterr().err
    assert json.loads(path.read_text()) == changed
  for broken in ("{}", "no json", "[]", '{"header": {}, "rows": []}'):
    path.write_text(broken)
    with pytest.raises(SystemExit):
      survey(path)
    assert f"cannot read {path}" in capsys.readouterr().err
  content["header"]["commit"] = "0123456"
  path.write_text(json.dumps(content))
  survey(path)
  header, _ = kept.read([path])
  assert header["commit"] == (f"0123456, {commit}" if commit else "0123456")


def test_no_case_is_begun_after_the_budget(tmp_path, measured, monkeypatch, capsys):
  path = tmp_path / "models.json"
  now = iter([0.0, 1.0, 2.0, 5.0])  # the start, then before each case
  monkeypatch.setattr(bench.time, "monotonic", lambda: next(now))
  survey(path, "--seconds-total", "5")
  assert len(measured) == 2 and len(kept.read([path])[1]) == 4
  assert "2 of 4 cases are measured. The same command measures the others." in (
    capsys.readouterr().out
  )


def test_the_file_survives_an_interruption(tmp_path, measured, monkeypatch):
  path = tmp_path / "models.json"
  run_cases = bench.run_cases

  def interrupted(*arguments):
    if len(measured) == 2:
      raise KeyboardInterrupt
    return run_cases(*arguments)

  monkeypatch.setattr(bench, "run_cases", interrupted)
  with pytest.raises(KeyboardInterrupt):
    survey(path)
  assert len(kept.read([path])[1]) == 4
  monkeypatch.setattr(bench, "run_cases", run_cases)
  assert len(survey(path)) == 8 and len(measured) == 4


def test_the_file_is_whole_when_writing_stops(tmp_path, measured, monkeypatch):
  path = tmp_path / "models.json"
  survey(path, "--rows", "1")
  before = path.read_text()

  def stop(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(kept.os, "replace", stop)
  with pytest.raises(KeyboardInterrupt):
    survey(path)
  assert path.read_text() == before


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--shapes", "48"], "'48' is not of the form 2880x4096"),
    (["--shapes", "0x64"], "'0x64' is not of the form"),
    (["--processes", "0"], "--processes must be positive, got 0"),
    (["--seconds-total", "0"], "--seconds-total must be positive, got 0.0"),
  ],
)
def test_command_lines_that_cannot_be(arguments, words, capsys):
  with pytest.raises(SystemExit):
    bench.main([*TINY, *arguments])
  assert words in capsys.readouterr().err


# ---- the summary

LARGE, LARGE_2, SMALL = (8192, 8192), (3072, 3072), (4096, 2048)


def row(m, shape, ratio, mode="nvfp4", **more):
  us = None if ratio is None else 1.0
  name = f"packed {mode} {m}"
  sizes = (m, *shape, "bfloat16", "jaxqq")
  return measure.Row(name, "packed", mode, *sizes, us=us, ratio=ratio, **more)


def test_numbers_of_a_summary():
  rows = [row(1, LARGE, 4.0, chain_ratio=3.0), row(1, LARGE_2, 0.5), row(1, SMALL, 2.0)]
  rows += [row(64, SMALL, 0.9), row(64, LARGE, None, note="failed: OOM")]
  rows += [row(1, LARGE, 1.0, mode="mxfp8")]
  found = group(rows[:3])
  assert found.mean == pytest.approx(4 ** (1 / 3)) and (found.worst, found.shape) == (0.5, LARGE_2)
  assert (found.below_1, found.cells) == (1, 3) and group(rows[4:5]) is None
  text = summary([dataclasses.replace(rows[0], implementation=CUBLAS), *rows]).replace(TIMES, "x")
  sides = (f"w {which} 16 MiB | worst, N x K | below 1x |" for which in ("above", "up to"))
  assert text.count(f"| M | {' '.join(sides)}\n") == 4
  lines = [line for line in text.splitlines() if re.match(r"\| \d|\w|-", line)]
  assert lines == [
    "nvfp4, w packed, device time:",
    "| 1 | 1.41x | 0.50x 3072x3072 | 1 of 2 | 2.00x | 2.00x 4096x2048 | 0 of 1 |",
    "| 64 | - | - | - | 0.90x | 0.90x 4096x2048 | 1 of 1 |",
    "nvfp4, w packed, wall clock in a chain, unrolled:",
    "| 1 | 3.00x | 3.00x 8192x8192 | 0 of 1 | - | - | - |",
    "| 64 | - | - | - | - | - | - |",
    "mxfp8, w packed, device time:",
    "| 1 | 1.00x | 1.00x 8192x8192 | 0 of 1 | - | - | - |",
    "mxfp8, w packed, wall clock in a chain, unrolled:",
    "| 1 | - | - | - | - | - | - |",
    "- packed nvfp4 64, jaxqq: failed: OOM",
  ]


def test_every_shape_has_its_ratios():
  rows = [row(1, SMALL, 2.0), row(1, LARGE, 4.0), row(64, LARGE, 1.256), row(64, SMALL, None)]
  rows += [row(1, LARGE_2, 0.5, mode="mxfp8"), dataclasses.replace(rows[0], implementation=CUBLAS)]
  tables = every_shape(rows).split("\n\n")
  assert tables[0] == "nvfp4, w packed, device time, every shape:"
  assert tables[1].splitlines()[2:] == [
    "| 8192 x 8192 | 4.00 | 1.26 |",
    "| 4096 x 2048 | 2.00 | - |",
  ]
  assert tables[1].startswith("| N x K | 1 | 64 |\n") and "| 3072 x 3072 | 0.50 |" in tables[3]


def test_rows_are_written_without_their_defaults(tmp_path):
  path = tmp_path / "rows.json"
  rows = [row(1, LARGE, 4.0), row(64, LARGE, None, note="failed: OOM")]
  kept.write(path, {"device": "a"}, rows)
  assert kept.read([path]) == ({"device": "a"}, rows)
  assert "null" not in path.read_text() and len(path.read_text().splitlines()) == 9
  with pytest.raises(ValueError, match="not JSON compliant"):
    kept.write(path, {}, [row(1, LARGE, float("nan"))])
  assert kept.read([path])[1] == rows
