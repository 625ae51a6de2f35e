"""The command line: `python -m jaxqq.bench`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxqq.bench import kept, report
from jaxqq.bench.cases import FORMS, MODES, SUITES, select
from jaxqq.bench.chain import with_chains
from jaxqq.bench.measure import Row, Settings, make_timer, run_case
from jaxqq.bench.peers import PEERS, implementations

try:
  from tqdm import tqdm
except ImportError:
  tqdm = None


def main(arguments: Sequence[str] | None = None) -> list[Row]:
  parser = _parser()
  options = parser.parse_args(arguments)
  _check(parser, options)
  cases = select(
    options.suite, options.modes, options.rows, options.forms, backward=options.backward
  )
  if not cases:
    parser.error(f"no case of {', '.join(options.suite)} has a form of {', '.join(options.forms)}")
  if tqdm is None:
    raise SystemExit(report.install("tqdm"))
  if options.plot and importlib.util.find_spec("matplotlib") is None:
    raise SystemExit(report.install("matplotlib"))

  timer = make_timer()
  settings = Settings(options.seconds, options.rounds, options.seed, options.chain)
  header = kept.make_header(timer.method, suites=options.suite, **dataclasses.asdict(settings))
  rows: list[Row] = []
  chain = settings.chain > 0
  with tqdm(total=len(cases), unit="case", disable=None) as bar:
    for text in ("", *report.header_lines(header), "", report.titles(chain)):
      tqdm.write(text)
    for case in cases:
      compared = implementations(case, options.peers)
      found = run_case(case, compared, timer, settings, bar.set_postfix_str)
      found = with_chains(case, compared, found, settings, bar.set_postfix_str)
      rows += found
      for row in found:
        tqdm.write(report.row_line(row, chain))
      sys.stdout.flush()
      if options.json:  # after every case, so that a run cut short leaves what it has
        kept.write(options.json, header, rows)
      bar.update()
  if options.plot:
    report.plot(options.plot, header, rows)
  return rows


def _parser() -> argparse.ArgumentParser:
  lists = {
    "suites": {name: suite.about for name, suite in SUITES.items()},
    "forms": {name: form.about for name, form in FORMS.items()},
    "peers": PEERS,
  }
  parser = argparse.ArgumentParser(
    prog="python -m jaxqq.bench",
    description="Measures jaxqq beside its peers: speed and error, in one process, in turn.",
    epilog="\n".join(
      f"{title}:\n" + "\n".join(f"  {name:18}{about}" for name, about in entries.items())
      for title, entries in lists.items()
    ),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )

  def several(flag: str, choices: Any, default: Any, text: str) -> None:
    parser.add_argument(
      flag, nargs="+", choices=choices, default=default, metavar="NAME", help=text
    )

  several("--suite", tuple(SUITES), ["goals"], "which cases, see below (goals)")
  several("--modes", MODES, MODES, f"of {', '.join(MODES)} (all)")
  several("--forms", tuple(FORMS), (), "only these forms of the suites, see below")
  several("--peers", (*PEERS, "none"), tuple(PEERS), "measured beside jaxqq, or none (all)")
  parser.add_argument("--rows", nargs="+", type=int, default=(), metavar="M", help="of products")
  parser.add_argument("--backward", action="store_true", help="adds dx and dw for every product")
  parser.add_argument(
    "--seconds", type=float, default=2.0, help="of measuring a case, kernels and chains each (2)"
  )
  parser.add_argument("--rounds", type=int, default=5, help="turns of each implementation (5)")
  parser.add_argument(
    "--chain",
    type=int,
    default=24,
    metavar="N",
    help="products in one program, of which the wall clock is taken; 0 for none (24)",
  )
  parser.add_argument("--seed", type=int, default=0, help="of the random operands")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="keep the results")
  parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="speed over M")
  return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
  """What argparse cannot know, before anything is measured."""
  if any(m < 1 for m in options.rows):
    parser.error(f"--rows must be positive, got {' '.join(map(str, options.rows))}")
  for name in ("seconds", "rounds"):
    if not getattr(options, name) > 0:
      parser.error(f"--{name} must be positive, got {getattr(options, name)}")
  for name in ("seed", "chain"):
    if getattr(options, name) < 0:
      parser.error(f"--{name} must not be negative, got {getattr(options, name)}")
  for name in ("json", "plot"):
    path = getattr(options, name)
    if path and not path.resolve().parent.is_dir():
      parser.error(f"--{name}: there is no folder {path.resolve().parent}")


if __name__ == "__main__":
  main()
