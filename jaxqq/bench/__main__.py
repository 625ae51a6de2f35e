"""The command line: `python -m jaxqq.bench`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxqq._formats import FORMATS
from jaxqq.bench import kept, moe, processes, report, training, training_cells
from jaxqq.bench.cases import FORMS, MODES, SUITES, Case, covering, is_survey, select
from jaxqq.bench.chain import with_chains
from jaxqq.bench.measure import Row, Settings, Timer, make_timer, run_cases
from jaxqq.bench.peers import PEERS, Implementation, implementations
from jaxqq.bench.summary import summary

try:
  from tqdm import tqdm
except ImportError:
  tqdm = None

_CHAIN = 24
MOE, TRAINING = "moe", "training"
_MOE_ABOUT = "layers of experts, by ragged_qqmm, beside JAX's and torch's; --rows are tokens"
_TRAINING_ABOUT = "products and a block of Llama 3 8B, with gradients; --rows are tokens"
_BLOCK_ABOUT = f"a transformer block, forward and backward, of --suite {TRAINING}"
# What is so where the command line does not say it, and for a survey, which has many cases.
_DEFAULTS = {"peers": tuple(PEERS), "seconds": 2.0, "rounds": 5, "chain": _CHAIN, "resume": False}
_OF_SURVEYS = {"peers": ("cublas",), "seconds": 0.3, "rounds": 3, "chain": 0, "resume": True}
_OF_TRAINING = {**_DEFAULTS, "chain": 0, "resume": True}


def main(arguments: Sequence[str] | None = None) -> list[Any]:
  begin = time.monotonic()
  parser = _parser()
  options = parser.parse_args(arguments)
  survey = is_survey([name for name in options.suite if name != MOE])
  defaults = _OF_TRAINING if TRAINING in options.suite else _DEFAULTS
  for name, value in (_OF_SURVEYS if survey else defaults).items():
    if getattr(options, name) is None:
      setattr(options, name, value)
  _check(parser, options)
  if MOE in options.suite:
    return _experts(parser, options, begin)
  if TRAINING in options.suite:
    return _training(parser, options, begin)
  cases = select(
    options.suite,
    options.modes,
    options.rows,
    options.forms,
    shapes=options.shapes,
    backward=options.backward,
  )
  if not cases:
    parser.error(f"no case of {', '.join(options.suite)} has a form of {', '.join(options.forms)}")
  if tqdm is None:
    raise SystemExit(report.install("tqdm"))
  if options.plot and importlib.util.find_spec("matplotlib") is None:
    raise SystemExit(report.install("matplotlib"))

  if options.processes > 1:
    processes.share_the_device()
  timer = make_timer()
  settings = Settings(options.seconds, options.rounds, options.seed, options.chain)
  header = kept.make_header(timer.method, suites=options.suite, **dataclasses.asdict(settings))
  rows: list[Row] = []
  if options.json and options.resume:
    try:
      header, rows = kept.resume(options.json, header)
    except ValueError as error:
      parser.error(f"--resume: {error}")
  chain = settings.chain > 0
  compared = {
    case: implementations(case, options.peers) for case in (covering(cases) if survey else cases)
  }
  left = kept.missing(compared, rows, chain=chain)
  of_case = functools.partial(implementations, peers=options.peers)
  work = processes.Work(of_case, settings, begin + options.seconds_total)
  with tqdm(total=len(cases), initial=len(cases) - len(left), unit="case", disable=None) as bar:
    for text in ("", *report.header_lines(header), "", report.titles(chain)):
      tqdm.write(text)
    if options.processes > 1:
      measured = processes.measured(processes.groups_of(left), work, options.processes)
    else:
      measured = _measured(left, compared, timer, work, bar.set_postfix_str)
    for found in measured:
      for new in found.values():
        rows = kept.replaced(rows, new)
        for row in new:
          tqdm.write(report.row_line(row, chain, header["platform"]))
      sys.stdout.flush()
      if options.json:  # after every case, so that a run cut short leaves what it has
        kept.write(options.json, header, rows)
      bar.update(len(found))
  if survey:
    table = report.of_platform(summary(rows), header["platform"])
    print("", table, "", _what_is_left(compared, rows, chain), sep="\n")
  if options.plot:
    report.plot(options.plot, header, rows)
  return rows


def _experts(
  parser: argparse.ArgumentParser, options: argparse.Namespace, begin: float
) -> list[moe.Row]:
  """The suite of layers of experts, whose rows are its own."""
  if options.suite != [MOE]:
    parser.error(f"--suite {MOE} stands alone")
  forms = [form for form in options.forms or ("packed",) if form in moe.FORMS]
  if not forms:
    parser.error(f"--suite {MOE} has the forms {', '.join(moe.FORMS)}")
  if options.backward:
    forms.append("training")
  peers = moe.PEERS if "none" not in options.peers else ()
  layers = [layer for layer in moe.LAYERS if not options.shapes or layer.shape in options.shapes]
  rows = moe.run(
    options.modes,
    options.rows or moe.TOKENS,
    forms,
    Settings(options.seconds, options.rounds, options.seed),
    options.json,
    layers=layers,
    peers=peers,
    deadline=begin + options.seconds_total,
  )
  print("", moe.markdown(rows), sep="\n")
  return rows


def _training(
  parser: argparse.ArgumentParser, options: argparse.Namespace, begin: float
) -> list[training.Row]:
  """The suite of training, whose rows are its own."""
  if options.suite != [TRAINING]:
    parser.error(f"--suite {TRAINING} stands alone")
  for name in ("backward", "plot", "chain"):
    if getattr(options, name):
      parser.error(f"--suite {TRAINING} takes no --{name}")
  if options.processes > 1:
    parser.error(f"--suite {TRAINING} compiles on threads of one process, not --processes")
  forms = [form for form in options.forms or training_cells.FORMS if form in training_cells.FORMS]
  if not forms:
    parser.error(f"--suite {TRAINING} has the forms {', '.join(training_cells.FORMS)}")
  try:
    suite = training.Suite(
      modes=options.modes,
      tokens=options.rows or training.TOKENS,
      forms=forms,
      shapes=options.shapes,
      model=training_cells.MODEL,
      has_peer="none" not in options.peers,
      settings=Settings(options.seconds, options.rounds, options.seed, chain=0),
    )
  except ValueError as error:
    parser.error(f"--rows: {error}")
  try:
    rows = training.run(
      suite, options.json, resume=options.resume, deadline=begin + options.seconds_total
    )
  except ValueError as error:  # results that are not of this device, JAX or environment
    parser.error(f"--resume: {error}")
  print("", training.markdown(rows), sep="\n")
  return rows


def _measured(
  cases: Sequence[Case],
  compared: Mapping[Case, Sequence[Implementation]],
  timer: Timer,
  work: processes.Work,
  progress: Callable[[str], None],
) -> Iterator[processes.Found]:
  """The cases in this process, one after the other, until the deadline."""
  for case in cases:
    if time.monotonic() >= work.deadline:
      return
    (found,) = run_cases({case: compared[case]}, timer, work.settings, progress).values()
    yield {case: with_chains(case, compared[case], found, work.settings, progress)}


def _what_is_left(
  compared: Mapping[Case, Sequence[Implementation]], rows: Sequence[Row], chain: bool
) -> str:
  left = len(kept.missing(compared, rows, chain=chain))
  text = f"{len(compared) - left} of {len(compared)} cases are measured."
  return text + " The same command measures the others." if left else text


def shape_of(text: str) -> tuple[int, int]:
  n, _, k = text.partition("x")
  if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
    raise argparse.ArgumentTypeError(f"{text!r} is not of the form 2880x4096")
  return int(n), int(k)


def _parser() -> argparse.ArgumentParser:
  lists = {
    "suites": {name: suite.about for name, suite in SUITES.items()}
    | {MOE: _MOE_ABOUT, TRAINING: _TRAINING_ABOUT},
    "forms": {name: form.about for name, form in FORMS.items()}
    | {training_cells.BLOCK: _BLOCK_ABOUT},
    "peers": PEERS,
  }
  parser = argparse.ArgumentParser(
    prog="python -m jaxqq.bench",
    description="Measures jaxqq beside its peers: speed and error, in one process, in turn.",
    epilog="A survey is a suite of many cases, of which several runs make one file: "
    f"{', '.join(name for name, suite in SUITES.items() if suite.survey)}.\n\n"
    + "\n".join(
      f"{title}:\n" + "\n".join(f"  {name:18}{about}" for name, about in entries.items())
      for title, entries in lists.items()
    ),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )

  def several(flag: str, choices: Any, default: Any, text: str) -> None:
    parser.add_argument(
      flag, nargs="+", choices=choices, default=default, metavar="NAME", help=text
    )

  several("--suite", (*SUITES, MOE, TRAINING), ["goals"], "which cases, see below (goals)")
  several("--modes", tuple(FORMATS), MODES, f"of {', '.join(FORMATS)} ({', '.join(MODES)})")
  several(
    "--forms", (*FORMS, training_cells.BLOCK), (), "only these forms of the suites, see below"
  )
  several("--peers", (*PEERS, "none"), None, "measured beside jaxqq, or none (all)")
  parser.add_argument("--rows", nargs="+", type=int, default=(), metavar="M", help="of products")
  parser.add_argument(
    "--shapes", nargs="+", type=shape_of, default=(), metavar="NxK", help="of products"
  )
  parser.add_argument("--backward", action="store_true", help="adds dx and dw for every product")
  parser.add_argument(
    "--seconds", type=float, help="of measuring a case, kernels and chains each (2; a survey 0.3)"
  )
  parser.add_argument("--rounds", type=int, help="turns of each implementation (5; a survey 3)")
  parser.add_argument(
    "--chain",
    type=int,
    nargs="?",
    const=_CHAIN,
    metavar="N",
    help="products in one program, of which the wall clock is taken; 0 for none "
    f"({_CHAIN}; a survey none, {_CHAIN} for --chain alone)",
  )
  parser.add_argument(
    "--processes",
    type=int,
    default=1,
    metavar="P",
    help="that compile side by side and measure in turn, for many cases; about one a core (1)",
  )
  parser.add_argument(
    "--seconds-total",
    type=float,
    default=float("inf"),
    metavar="S",
    help="of the whole run, after which no case is begun",
  )
  parser.add_argument("--seed", type=int, default=0, help="of the random operands")
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="keep the results")
  parser.add_argument(
    "--resume",
    action=argparse.BooleanOptionalAction,
    help="add the cases that FILE lacks, of the same device and JAX, instead of writing it anew "
    f"(a survey and {TRAINING} do)",
  )
  parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="speed over M")
  return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
  """What argparse cannot know, before anything is measured."""
  if any(m < 1 for m in options.rows):
    parser.error(f"--rows must be positive, got {' '.join(map(str, options.rows))}")
  for name in ("seconds", "rounds", "seconds_total", "processes"):
    if not getattr(options, name) > 0:
      parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
  for name in ("seed", "chain"):
    if getattr(options, name) < 0:
      parser.error(f"--{name} must not be negative, got {getattr(options, name)}")
  for name in ("json", "plot"):
    path = getattr(options, name)
    if path and not path.resolve().parent.is_dir():
      parser.error(f"--{name}: there is no folder {path.resolve().parent}")


if __name__ == "__main__":
  main()
