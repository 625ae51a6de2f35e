"""The bench, end to end on a CPU, and that it would notice what it is there to notice."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq.bench import __main__ as bench
from jaxqq.bench import chain, check, measure, report, results_page
from jaxqq.bench.cases import FORMS, LLAMA, MODES, RECIPE_FORMS, Case, goal, select
from jaxqq.bench.kept import read
from jaxqq.bench.markdown import TIMES
from jaxqq.bench.peers import COPY, CUBLAS, Implementation, implementations
from tests.support import oracle

ROOT = pathlib.Path(__file__).parent.parent
QUICK = measure.Settings(seconds=0.01, rounds=2)
CPU = measure.Timer("wall time", measure.wall_seconds, 0)
CHAINED = dataclasses.replace(QUICK, chain=3)
PACKED = Case("packed", "nvfp4", 40, 48, 64)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """The tiny suite, once: its rows, its files, and what it printed."""
  folder = tmp_path_factory.mktemp("bench")
  files = folder / "tiny.json", folder / "tiny.png"
  arguments = ["--suite", "tiny", "--rows", "40", "--seconds", "0.01", "--rounds", "2"]
  arguments += ["--chain", "0"]
  rows = bench.main([*arguments, "--json", str(files[0]), "--plot", str(files[1])])
  return rows, *files


def test_the_tiny_suite(results):
  rows, _, plot = results
  assert {row.form for row in rows} == set(FORMS) - set(RECIPE_FORMS) and {
    row.mode for row in rows
  } == set(MODES)
  names = {row.implementation for row in rows if row.form == "packed"}
  assert names == {CUBLAS, "xla dequantize", "jax.nn.scaled_matmul", "jaxqq"}
  weights = {row.implementation for row in rows if row.form == "weights alone"}
  assert weights == {CUBLAS, "jaxqq"}
  assert {row.implementation for row in rows if row.form == "dw"} == {
    *(CUBLAS, "jaxqq straight_through", "jaxqq quantized")
  }
  for row in rows:
    if row.implementation == "jax.nn.scaled_matmul" and row.us is None:
      assert row.note.startswith("failed: ")  # as this JAX has it
      continue
    assert row.note == "" and row.samples >= 2
    assert 0 < row.us_min <= row.us_q1 <= row.us <= row.us_q3 <= row.us_max
    assert row.gbps > 0 and row.ratio > 0 and (row.tflops is None) != FORMS[row.form].is_product
    if row.implementation != COPY:
      assert 0 <= row.error_share <= 1
    if row.implementation in (CUBLAS, COPY):
      assert row.ratio == 1
  assert "on cpu" in next(row.path for row in rows if row.implementation == "jaxqq")
  assert plot.stat().st_size > 1000


@pytest.mark.parametrize("form", [RECIPE_FORMS[0], RECIPE_FORMS[-3]])
def test_quantizers_of_recipes(form):
  """Under an amax that is given, and with its own, that of the rotated array or less."""
  case = Case(form, "nvfp4", 64, 0, 48)
  a = jnp.ones(case.shape(FORMS[form].inputs[0]), jnp.bfloat16)
  copy, *own = implementations(case, ["copy"])
  assert copy.name == COPY and [each.name for each in own] == [
    f"jaxqq {form}",
    f"jaxqq {form}, and amax",
  ]
  for each in own:
    packed, scales, _ = each.run(*each.prepare(a))
    assert packed.size == a.size // 8 and scales.size == a.size // 16
    assert "on cpu" in each.explain(*each.prepare(a))


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
  """Packed products in chains of 3: their rows, and the file."""
  kept = tmp_path_factory.mktemp("bench") / "chains.json"
  arguments = ["--suite", "tiny", "--forms", "packed", "--rows", "40", "--peers", "cublas", "xla"]
  arguments += ["--seconds", "0.01", "--rounds", "2", "--chain", "3", "--json", str(kept)]
  return bench.main(arguments), kept


def test_wall_clock_of_chains(chains):
  rows, kept = chains
  header, found = read([kept])
  assert found == rows and header["chain"] == 3 and "chain, scan" in report.header_lines(header)[-1]
  base = next(row for row in rows if row.implementation == CUBLAS)
  told = [*report.header_lines(header), report.row_line(base, platform=header["platform"])]
  assert all("jnp.dot bf16" in text and "cublas" not in text for text in told[1:])
  assert CUBLAS in report.row_line(base, platform="gpu")
  assert {row.implementation for row in rows} == {CUBLAS, "xla dequantize", "jaxqq"}
  for row in rows:
    assert row.chain == 3 and row.chain_note == ""
    assert 0 < row.chain_us_q1 <= row.chain_us <= row.chain_us_q3 and row.chain_ratio > 0
    assert 0 < row.scan_us_q1 <= row.scan_us <= row.scan_us_q3 and row.scan_ratio > 0
    if row.implementation == CUBLAS:
      assert row.chain_ratio == row.scan_ratio == 1


def test_chains_in_markdown(chains, results, capsys):
  (rows, kept), (without, plain, _) = chains, results
  report.main([str(kept), "--all"])
  printed = capsys.readouterr().out.replace(TIMES, "x")
  one = r"\d+\.\d\dx [\d.]+ µs"
  assert "Wall clock of a chain of 3 products in one program" in printed
  assert re.search(rf"\| 40 \| [\d.]+ µs; [\d.]+ µs \| {one}; {one} \| {one}; {one} \|", printed)
  assert re.search(r"\| err/bound \| chain us \(q1..q3\) \| ratio \| scan us", printed)
  assert not report.chain_markdown(without)
  report.main([str(plain), "--all"])
  assert "chain" not in capsys.readouterr().out
  mixed = report.rows_markdown([*without[:1], *rows[:1]]).splitlines()
  assert len({line.count("|") for line in mixed}) == 1


@pytest.mark.parametrize("name", ["h100", "h200", "h200_backward", "h200_few_rows_llama"])
def test_results_kept_before_chains_still_load(name, capsys):
  path = ROOT / "jaxqq" / "bench" / "results" / f"{name}.json"
  assert "chain" not in path.read_text()
  report.main([str(path), "--all"])
  printed = capsys.readouterr().out
  assert "8192" in printed and "chain" not in printed


def test_kept_results_come_back(results):
  rows, kept, _ = results
  header, found = read([kept])
  assert found == rows
  assert header["timing"] == "wall time (cpu)" and header["jax"] == jax.__version__
  assert header["jaxqq"] == jaxqq.__version__ and header["suites"] == ["tiny"]
  assert read([kept, kept])[1] == rows * 2


def test_results_of_decode_may_lie_beside(results, tmp_path):
  rows, kept, _ = results
  decode = tmp_path / "decode.json"
  decode.write_text(json.dumps({"header": {}, "models": [{"name": "bf16"}]}))
  assert read([kept, decode])[1] == rows


def test_the_report_in_markdown(results, tmp_path, capsys):
  rows, kept, _ = results
  plot = tmp_path / "again.png"
  report.main([str(kept), "--all", "--plot", str(plot)])
  printed = capsys.readouterr().out
  assert "| N | K | M | jnp.dot bf16 | nvfp4 packed | mxfp8 packed |" in printed
  assert printed.count("jnp.dot bf16") > 2 and "cublas" not in printed
  line = rf"\| 48 \| 64 \| 40 \| [\d.]+ µs \| \d+\.\d\d{TIMES} [\d.]+ µs, \d+ GB/s \(\d+%"
  assert re.search(line, printed)
  assert "quantize columns mxfp8 64x64" in printed
  assert printed.count("\n| ") > len(rows)
  assert plot.stat().st_size > 1000


def test_a_plot_calls_the_product_as_the_platform_has_it(results, tmp_path, monkeypatch):
  from matplotlib.axes import Axes

  rows, kept, _ = results
  header, _ = read([kept])
  labels = []
  draw = Axes.plot
  monkeypatch.setattr(
    Axes, "plot", lambda *args, **how: [labels.append(how.get("label")), draw(*args, **how)][1]
  )
  for platform, name in (("cpu", "jnp.dot bf16"), ("gpu", CUBLAS)):
    labels.clear()
    report.plot(tmp_path / "plot.png", {**header, "platform": platform}, rows)
    assert name in labels and len({"jnp.dot bf16", CUBLAS} & set(labels)) == 1


def test_a_survey_calls_the_product_as_the_platform_has_it(results):
  rows, kept, _ = results
  noted = [dataclasses.replace(row, note="slow") for row in rows]
  header = {**read([kept])[0], "suites": ["models"]}
  told = report.tables(header, noted)
  assert "jnp.dot bf16: slow" in told and "cublas" not in told
  assert "cublas bf16: slow" in report.tables({**header, "platform": "gpu"}, noted)


def test_the_page_of_results_is_what_the_command_writes():
  """If this fails: python -m jaxqq.bench.report."""
  committed = (results_page.FOLDER / results_page.PAGE).read_text()
  assert committed == results_page.page()
  for path in results_page.FOLDER.glob("*.json"):
    assert f"[`{path.name}`]({path.name}): NVIDIA " in committed


def test_the_readme_has_the_ratios_of_the_kept_results():
  assert results_page.ratios_markdown() in (ROOT / "README.md").read_text()


def test_the_report_without_files_writes_the_page(results, tmp_path, monkeypatch, capsys):
  """Sections whose files are there, and what no section names."""
  for name in results_page.RATIO_FILES:
    (tmp_path / name).write_text((results_page.FOLDER / name).read_text())
  (tmp_path / "mine.json").write_text(results[1].read_text())
  monkeypatch.setattr(results_page, "write", functools.partial(results_page.write, tmp_path))
  report.main([])
  page = tmp_path / "README.md"
  picture = tmp_path / results_page.PICTURE
  assert capsys.readouterr().out.split() == [str(page), str(picture)]
  assert re.findall("^## .*", page.read_text(), re.MULTILINE) == [
    "## Layers of many models on an H200",
    *("## `h200.json`", "## `h200_few_rows.json`", "## `mine.json`"),
  ]
  commit = json.loads(results[1].read_text())["header"]["commit"]
  assert (f"commit {commit};" if commit else "commit not recorded;") in page.read_text()
  assert picture.stat().st_size > 1000


@pytest.mark.parametrize("flag", ["--goals", "--all", "--plot=a.png"])
def test_flags_of_the_report_need_files(flag, capsys):
  with pytest.raises(SystemExit):
    report.main([flag])
  assert "needs files of results" in capsys.readouterr().err


def test_the_table_of_the_goals():
  row = measure.Row("", "packed", "mxfp8", 4096, 8192, 8192, "bfloat16", "jaxqq", us=400.0)
  rows = [dataclasses.replace(row, ratio=1.7), dataclasses.replace(row, m=8192, ratio=1.6)]
  rows += [dataclasses.replace(rows[0], n=28672, k=4096, ratio=1.5)]
  rows += [dataclasses.replace(row, m=256, us=None, note="failed: OOM")]
  lines = report.goals_markdown(rows).replace(TIMES, "x").splitlines()
  assert lines[2:] == [
    "| 8192 | 8192 | 256 | - | failed: OOM |",
    "| 8192 | 8192 | 4096 | - | **1.70x** 400 µs (goal 1.6x) |",
    "| 8192 | 8192 | 8192 | - | 1.60x 400 µs (goal 1.65x) |",
    "| 28672 | 4096 | 4096 | - | **1.50x** 400 µs (goal 1.44x) |",
  ]


@pytest.mark.parametrize(
  ("case", "num_bytes", "unpacked", "flops"),
  [
    # x 256 * 8192 * 2, w 8192 * 8192 / 2 and / 16, out as x.
    (Case("packed", "nvfp4", 256, 8192, 8192), 46_137_344, 142_606_336, 34_359_738_368),
    (Case("packed", "mxfp8", 1, 4096, 14336), 60_592_128, 117_477_376, 117_440_512),
    (Case("on the fly", "nvfp4", 2, 3, 32), 128 + 192 + 12, 332, 384),
    (Case("dx", "mxfp8", 2, 3, 32), 12 + 192 + 128, 332, 384),
    (Case("dw", "mxfp8", 2, 3, 32), 12 + 128 + 192, 332, 384),
    (Case("quantize", "nvfp4", 8192, 0, 8192), 134_217_728 + 37_748_736, 268_435_456, 0),
    (Case("quantize columns", "mxfp8", 64, 0, 32), 4096 + 2048 + 64, 8192, 0),
    (Case("dequantize", "mxfp8", 64, 0, 32), 4096 + 2048 + 64, 8192, 0),
    (Case("packed", "mxfp8", 2, 3, 32, "float32"), 256 + 96 + 3 + 24, 664, 384),
  ],
)
def test_bytes_and_flops(case, num_bytes, unpacked, flops):
  assert case.num_bytes() == num_bytes
  assert case.num_bytes(packed=False) == unpacked
  assert case.flops == flops


def test_suites():
  cases = select(["goals", "llama"])
  assert len(cases) == len(set(cases)) == 16 + 2 * 2 * 2 * (len(LLAMA) - 1)
  assert len(select(["goals"], ["nvfp4"], rows=[3], forms=["packed"])) == 1
  assert {case.form for case in select(["goals"], backward=True)} == {
    *("packed", "on the fly", "dx", "dw")
  }
  assert [case.m for case in select(["chain"], ["mxfp8"])] == [1, 256, 1024, 4096]
  assert {case.m for case in select(["quantize"], rows=[3], backward=True)} == {8192}
  assert goal("nvfp4", "packed", 256, 8192, 8192) == 1.1
  assert goal("nvfp4", "packed", 256, 4096, 8192) is None


@pytest.mark.parametrize("mode", MODES)
def test_its_quantizer_is_right(mode):
  rng = np.random.default_rng(0)
  a = rng.standard_normal((64, 128)) * np.exp2(rng.integers(-6, 6, (64, 1)))
  a[3, :64], a[4, ::32] = 0, 448 * 0.25
  a = a.astype(oracle.DTYPES["bfloat16"])
  codes, scales = oracle.quantize_codes(a, mode)
  found_codes, found_scales = check.quantize(a, mode)
  np.testing.assert_array_equal(found_scales, scales)
  np.testing.assert_array_equal(
    check._packed_bytes(found_codes, mode).view("<u4"), oracle.pack(codes, mode)
  )
  np.testing.assert_array_equal(check.round_trip(a, mode), oracle.values(codes, scales, mode))


def run_one(case, change):
  """A case by jaxqq, with its result changed."""
  mine = implementations(case, ["none"])[-1]
  changed = dataclasses.replace(mine, run=lambda *operands: change(mine.run(*operands)))
  return measure.run_case(case, [changed], CPU, QUICK)[0]


@pytest.mark.parametrize(
  ("case", "change"),
  [
    (PACKED, lambda out: out * 1.02),
    (PACKED, lambda out: out.at[-1, -1].add(0.5)),
    (Case("on the fly", "mxfp8", 40, 48, 64), lambda out: jnp.roll(out, 1, 0)),
    (Case("dx", "mxfp8", 40, 48, 64), lambda out: out * 0.98),
    (Case("dw", "nvfp4", 40, 48, 64), lambda out: -out),
  ],
)
def test_a_wrong_product_is_noticed(case, change):
  assert run_one(case, lambda out: out).error_share <= 1
  row = run_one(case, change)
  assert row.error_share > 1 and row.note == "beyond the bound"
  assert "beyond the bound" in report.row_line(row)


@pytest.mark.parametrize(
  ("case", "change", "note"),
  [
    (PACKED, lambda out: out.at[0, 0].set(jnp.nan), "not finite"),
    (Case("quantize", "nvfp4", 40, 0, 64), lambda out: (out[0] ^ 1, out[1]), "differ"),
    (Case("quantize columns", "mxfp8", 64, 0, 40), lambda out: (out[0], out[1] + 1), "differ"),
    (Case("dequantize", "mxfp8", 40, 0, 64), lambda out: out.at[0, 0].add(1), "1 of"),
  ],
)
def test_what_has_no_share_of_a_bound_is_named(case, change, note):
  row = run_one(case, change)
  assert row.error_share is None and note in row.note and row.us > 0


def test_a_product_that_does_not_quantize_is_noticed():
  case = Case("packed", "nvfp4", 40, 48, 64)
  cublas = dataclasses.replace(implementations(case)[0], quantized=True)
  assert measure.run_case(case, [cublas], CPU, QUICK)[0].error_share > 1


def test_a_failure_is_a_row():
  def fail(*operands):
    raise NotImplementedError("no such kernel\nand more")

  broken = Implementation("broken", fail, lambda *operands: operands)
  unprepared = Implementation("unprepared", fail, fail)
  working = implementations(PACKED, ["cublas"])
  rows = measure.run_case(PACKED, [*working, broken, unprepared], CPU, QUICK)
  assert [row.note for row in rows[-2:]] == ["failed: NotImplementedError: no such kernel"] * 2
  assert all(row.us is None and row.ratio is None for row in rows[-2:])
  assert all(row.us for row in rows[:-2])
  assert "no such kernel" in report.row_line(rows[-1])
  json.dumps(dataclasses.asdict(rows[-1]), allow_nan=False)


def test_a_failure_while_measuring_is_a_row():
  def sample(f, args, calls):
    raise RuntimeError("lost")

  working = implementations(PACKED, ["cublas"])
  rows = measure.run_case(PACKED, working, measure.Timer("", sample, 0), QUICK)
  assert {row.note for row in rows} == {"failed: RuntimeError: lost"}


@pytest.mark.parametrize("form", ["packed", "on the fly", "dx", "dw"])
def test_every_copy_is_computed_and_nothing_else(form):
  """XLA neither merges the calls nor keeps the forward product of a gradient."""
  case = Case(form, "mxfp8", 40, 48, 64)
  operands = measure._Operands(case, 0)
  for each in implementations(case, ["cublas"]):
    copies = [each.prepare(*operands[i]) for i in range(3)]
    program = measure.chained(each.run).lower(copies).compile().as_text()
    assert len(re.findall(r"\bdot\(", program)) == 3


@pytest.mark.parametrize("form", ["packed", "on the fly", "dx", "dw"])
def test_every_product_of_a_chain_is_computed(form):
  """Also where all share one x: XLA quantizes it for each, and inside the loop of a scan."""
  case = Case(form, "mxfp8", 40, 48, 64)
  compared = implementations(case, ["cublas"])
  operands = chain._Operands(case, 0, [each.prepare for each in compared])
  operands.make(3)
  for each in compared:
    weights = operands.weights(each.prepare)
    program = measure.chained(each.run, graphs=True).lower([(operands.x, *w) for w in weights])
    unrolled = program.compile().as_text()
    scan, stacked = chain.scanned(each.run), operands.stacked(each.prepare)
    looped = scan.lower(operands.x, stacked).compile().as_text()
    before_the_loop = looped[looped.index("\nENTRY") :]
    assert " while(" in before_the_loop
    for work in ("dot", "reduce"):  # a group's amax is a reduce
      count = len(re.findall(rf"\b{work}\(", looped))
      assert len(re.findall(rf"\b{work}\(", unrolled)) == 3 * count
      assert f" {work}(" not in before_the_loop and (count == 1 or work == "reduce")
    np.testing.assert_array_equal(scan(operands.x, stacked), each.run(operands.x, *weights[-1]))


def chained_rows(case, compared, settings=CHAINED):
  rows = measure.run_case(case, compared, CPU, settings)
  return chain.with_chains(case, compared, rows, settings)


def test_no_chain_where_none_is_asked_for_or_can_be():
  quantize = Case("quantize", "nvfp4", 40, 0, 64)
  for row in [
    *chained_rows(quantize, implementations(quantize)),
    *chained_rows(PACKED, implementations(PACKED, ["cublas"]), dataclasses.replace(QUICK, chain=0)),
  ]:
    assert row.us and row.chain == 0 and row.chain_us is row.scan_us is None and not row.chain_note


def test_a_chain_that_fails_is_a_note(monkeypatch):
  compared = implementations(PACKED, ["cublas"])
  monkeypatch.setattr(chain, "scanned", lambda run: lambda *args: 1 / 0)
  for row in chained_rows(PACKED, compared):
    assert row.chain_us and row.scan_us is row.scan_ratio is None
    assert row.chain_note == "scan failed: ZeroDivisionError: division by zero"
    assert row.chain_note in report.row_line(row, chain=True)
    assert row.chain_note in report.chain_markdown([row]) or row.implementation == CUBLAS
    json.dumps(dataclasses.asdict(row), allow_nan=False)


def test_a_chain_with_a_wrong_result_is_noticed():
  mine = implementations(PACKED, ["none"])[-1]
  wrong = dataclasses.replace(mine, run=lambda *operands: mine.run(*operands) * 1.02)
  row = chained_rows(PACKED, [wrong])[0]
  assert row.chain_note == "chain: beyond the bound; scan: beyond the bound"


@pytest.mark.parametrize(
  ("room", "products", "note"),
  [(5, 3, ""), (2, 2, "chains of 2, for want of memory"), (1, 0, "no chain: the memory")],
)
def test_a_chain_is_as_long_as_the_memory_lets_it(room, products, note, monkeypatch):
  monkeypatch.setattr(chain._Operands, "affordable", lambda self: room)
  for row in chained_rows(PACKED, implementations(PACKED, ["cublas"])):
    assert row.chain == products and (row.chain_note or "").startswith(note)
    assert bool(row.chain_us) == bool(products) and bool(note) == bool(row.chain_note)


def test_what_a_chain_needs_of_the_memory():
  case = Case("packed", "nvfp4", 4096, 8192, 8192)
  prepares = [each.prepare for each in implementations(case, ["cublas", "xla"])]
  w, packed, out = 2 << 26, (1 << 25) + (1 << 22), 1 << 26
  each = w + 2 * (w + packed) + 2 * out  # packed once, for XLA and jaxqq
  wanted = int(0.8 * (16 << 30)) // each  # as on a device that does not tell
  assert chain._Operands(case, 0, prepares).affordable() == wanted


def test_copies_rotate_and_differ():
  timer = dataclasses.replace(CPU, rotate_bytes=5 * 64 * 48 * 2)
  mine, dot = implementations(PACKED, ["cublas"])[::-1]
  rows = measure.run_case(PACKED, [mine, dot], timer, QUICK)
  assert [row.copies for row in rows] == [-(-5 * 32 // 9), 5]  # 4.5 bits of 16
  operands = measure._Operands(PACKED, 0)
  arrays = [np.asarray(a, np.float32) for i in range(3) for a in operands[i]]
  assert len({float(a[0, 0]) for a in arrays}) == 6


def test_device_time_with_kernels_out_of_order(monkeypatch):
  """The profiler refuses to tell such calls apart; then they are measured one by one."""
  profiler = pytest.importorskip("jax.experimental.mosaic.gpu.profiler")

  def fake(f, iterations):
    if iterations > 1:
      raise RuntimeError("Kernel names are not consistent across iterations")
    return lambda *args: (f(*args), 0.25)

  monkeypatch.setattr(profiler, "measure", fake)
  assert measure._cupti_seconds(lambda: 1, (), 3) == [0.25e-3] * 3
  monkeypatch.setattr(profiler, "measure", lambda f, iterations: lambda: (f(), None))
  with pytest.raises(RuntimeError, match="no kernel"):
    measure._cupti_seconds(lambda: 1, (), 1)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--suite", "nonsense"], "invalid choice: 'nonsense'"),
    (["--modes", "nvfp8"], "invalid choice: 'nvfp8'"),
    (["--peers", "torch"], "invalid choice: 'torch'"),
    (["--rows", "0"], "--rows must be positive, got 0"),
    (["--rows", "many"], "invalid int value"),
    (["--seconds", "0"], "--seconds must be positive, got 0.0"),
    (["--seconds", "nan"], "--seconds must be positive, got nan"),
    (["--rounds", "-1"], "--rounds must be positive, got -1"),
    (["--seed", "-1"], "--seed must not be negative"),
    (["--chain", "-1"], "--chain must not be negative, got -1"),
    (["--suite", "quantize", "--forms", "packed"], "no case of quantize has a form of packed"),
    (["--json", "/no/such/folder/a.json"], "--json: there is no folder /no/such/folder"),
    (["--plot", "/no/such/folder/a.png"], "--plot: there is no folder /no/such/folder"),
  ],
)
def test_command_lines_that_cannot_be(arguments, words, capsys):
  with pytest.raises(SystemExit) as exit_info:
    bench.main(arguments)
  assert exit_info.value.code == 2 and words in capsys.readouterr().err


def test_a_report_of_nothing(tmp_path, capsys):
  for text in ("{}", "no json", '{"header": {}, "rows": [{"us": 1}]}'):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(SystemExit):
      report.main([str(tmp_path / "bad.json")])
    assert "cannot read" in capsys.readouterr().err


def test_the_extra_that_is_missing_is_named(monkeypatch, tmp_path):
  monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit, match=r"matplotlib .*pip install 'jaxqq\[bench\]'"):
    bench.main(["--suite", "tiny", "--plot", str(tmp_path / "a.png")])
  monkeypatch.setattr(bench, "tqdm", None)
  with pytest.raises(SystemExit, match=r"tqdm .*pip install 'jaxqq\[bench\]'"):
    bench.main(["--suite", "tiny"])


def test_accuracy(tmp_path, capsys):
  """Kept results print the same table; the errors on a CPU are those of rounding alone."""
  from jaxqq.bench import accuracy

  path = tmp_path / "accuracy.json"
  arguments = ["--modes", "mxfp8", "--dtypes", "bfloat16", "--k", "32", "128", "--json", str(path)]
  rows = accuracy.main(arguments)
  printed = capsys.readouterr().out
  assert accuracy.main(["--show", str(path)]) == rows and capsys.readouterr().out == printed
  assert {row["kind"] for row in rows} == set(accuracy.KINDS)
  for row in rows:
    assert all(1e-3 < error < 2e-3 for error in row["errors"].values()), row


def test_accuracy_refuses_what_is_no_multiple(capsys):
  from jaxqq.bench import accuracy

  with pytest.raises(SystemExit):
    accuracy.main(["--k", "48"])
  assert "--k must be multiples of 32" in capsys.readouterr().err
