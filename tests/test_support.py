"""The checks themselves: what they let pass is right, and what is wrong does not pass."""

from __future__ import annotations

import collections
import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from jax._src import compiler

from tests.support import bounds, cases, climb, compiling, data, fp8, messages, oracle, products
from tests.support.cases import Case, Program

EXAMPLES = (
  Case(Program("nvfp4", 20, 30, 96, packed=True, global_scales=True), bad=("x",)),
  Case(Program("mxfp8", 20, 30, 96, "float32", x_batch=(2,), w_batch=(2,)), "outliers"),
  Case(Program("mxfp8", 20, 30, 96, "float16"), bad=("w",)),
)


def right_product(case):
  """By float64, rounded once; and what `verdict_on` takes beside it."""
  arrays = cases.arrays_of(case)
  x, w = (
    bounds.Quantized(codes, scales, arrays.mode).values()
    for codes, scales in ((arrays.x_codes, arrays.x_scales), (arrays.w_codes, arrays.w_scales))
  )
  with np.errstate(over="ignore"):
    out = (x @ w.swapaxes(-1, -2) * arrays.alpha).astype(oracle.DTYPES[case.program.x_dtype])
  return out, arrays, products.rules_for(case, "a kernel", "gpu")


@pytest.mark.parametrize("case", EXAMPLES, ids=repr)
def test_the_exact_product_is_right(case):
  out, arrays, rules = right_product(case)
  verdict = products.verdict_on(out, arrays, rules)
  assert (verdict.wrong, verdict.worst <= 1) == ("", True)


def changed(out, index, by):
  """One element, by so many times its magnitude or to a number."""
  out = out.copy()
  out[index] = by(out[index])
  return out


@pytest.mark.parametrize("case", EXAMPLES, ids=repr)
def test_one_wrong_element_is_wrong(case):
  out, arrays, rules = right_product(case)
  finite = [tuple(i) for i in np.argwhere(np.isfinite(out.astype(np.float64)))]
  largest = max(finite, key=lambda i: abs(float(out[i])))
  for index, by in (
    (largest, lambda a: a * 1.02),
    (largest, lambda a: -a),
    (finite[0], lambda a: np.nan),
    (finite[-1], lambda a: np.inf),
    (finite[-1], lambda a: np.float64(out[largest])),
  ):
    wrong = products.verdict_on(changed(out, index, by), arrays, rules).wrong
    assert wrong, (index, by)
  if case.bad:
    bad = tuple(np.argwhere(np.isnan(out.astype(np.float64)))[0])
    assert "NaN" in products.verdict_on(changed(out, bad, lambda a: 0), arrays, rules).wrong


def test_the_norm_is_bounded_too(monkeypatch):
  """A product whose elements all keep their bounds, and whose norm does not."""
  out, arrays, rules = right_product(Case(Program("mxfp8", 40, 40, 512), "positive", "positive"))
  assert rules.norm_wise and not rules.highest
  assert products.verdict_on(out, arrays, rules).wrong == ""
  monkeypatch.setitem(bounds.NORM_WISE, "bfloat16", 1e-3)
  verdict = products.verdict_on(out, arrays, rules)
  assert verdict.worst <= 1 and "norm-wise" in verdict.wrong


def test_beyond_the_range_is_infinite_or_the_largest():
  case = Case(Program("mxfp8", 4, 4, 64, "float16"), "positive", "positive", 8, 8)
  out, arrays, rules = right_product(case)
  assert np.isposinf(out).all()
  assert products.verdict_on(out, arrays, rules).wrong == ""
  assert products.verdict_on(np.full_like(out, 65504), arrays, rules).wrong == ""
  assert products.verdict_on(np.full_like(out, -65504), arrays, rules).wrong
  assert products.verdict_on(np.full_like(out, 60000), arrays, rules).wrong


# The fp8 term


@pytest.mark.parametrize("kind", data.KINDS)
def test_sums_of_14_bits_are_within_the_term(kind):
  """Re-based codes, and every addend cut off below the largest: the term covers what that loses."""
  rng = np.random.default_rng(0)
  x, w = (
    data.array(rng, kind, (64, 1024), 0, oracle.DTYPES["float32"]).astype(np.float32) for _ in "xw"
  )
  x, w = (bounds.Quantized(*oracle.quantize_codes(a, "mxfp8"), "mxfp8") for a in (x, w))
  term = fp8.term(x.codes, x.scales, w.codes, w.scales)
  unit = np.ldexp(1.0, fp8.row_exponent(x.scales) + fp8.row_exponent(w.scales))
  rebased = [fp8.rebased(a.codes, a.scales)[1] for a in (x, w)]
  sums = fp8.chains(*rebased)[0].sum(axis=-1)
  error = np.abs(sums * unit - (x.values() * w.values()).sum(axis=-1))
  assert (error <= term).all()
  if kind in data.NORM_WISE:
    assert (error > term / 200).any()  # it is no promise of anything at all


def test_one_instruction_by_hand():
  """Products below 2**-13 of the largest exponent are cut off; 14 bits of the result are kept."""
  x, w, none = np.zeros((1, 32)), np.ones((1, 32)), np.zeros(1)
  x[0, :3] = 1.75, 2.0**-6, 2.0**-9
  w[0, :3] = 1.75, 2.0**-8, -(2.0**-6)
  # 3.0625, of exponent 0 by its factors, 2**-14, -2**-15: both are below 2**-13.
  total, lost = fp8.instruction(x, w, none)
  assert total == 3.0625 and lost == 3 * 2.0**-13 + 2.0 ** (1 - 13)
  # A larger sum so far takes bits from all.
  total, _ = fp8.instruction(x, w, np.array([2.0**12]))
  assert total == 2.0**12 + 3.0
  # 8193 products of 1 have 14 bits; half of one more has not.
  total, _ = fp8.instruction(np.ones((1, 32)) * 256, np.ones((1, 32)), np.array([1.0 + 2.0**-5]))
  assert total == 8193


def test_the_term_of_one_pair_by_hand():
  """A large product, then small ones; a group re-based to where e4m3 has but a bit."""
  codes = np.zeros((1, 64), np.uint8)
  codes[0, 0], codes[0, 32] = 0x7E, 0x39  # 448; 1.125
  scales = np.array([[127, 117]], np.uint8)
  ones = np.full((1, 64), 0x38, np.uint8), np.full((1, 2), 127, np.uint8)
  # 1.125 * 2**-10 is nearest to 2**-9, off by 0.875 * 2**-10. One product of 2**8, then that sum
  # and another product, then the sum alone, twice; results of as many bits.
  unit = 2.0 ** (8 - 13)
  want = 0.875 * 2.0**-10 + (1 + 2 + 1 + 1) * unit + 4 * unit
  term = fp8.term(codes, scales, *ones)
  np.testing.assert_allclose(term, [want], rtol=1e-9)
  # x in other units.
  np.testing.assert_allclose(fp8.term(codes, scales + 10, *ones), 1024 * term)
  assert codes.view(ml_dtypes.float8_e4m3fn)[0, 32] == 1.125


@pytest.mark.parametrize("kind", ["groups far apart", "outliers"])
def test_the_terms_of_whole_matrices(kind, monkeypatch):
  """Are those of all pairs; and a verdict by them, of many elements, says the same."""
  case = Case(Program("mxfp8", 20, 30, 512), kind, "heavy tails")
  out, arrays, rules = right_product(case)
  x, w = (
    bounds.Quantized(codes, scales, "mxfp8")
    for codes, scales in ((arrays.x_codes, arrays.x_scales), (arrays.w_codes, arrays.w_scales))
  )
  at = np.argwhere(np.ones(out.shape, bool))
  rows = x.codes[at[:, 0]], x.scales[at[:, 0]], w.codes[at[:, 1]], w.scales[at[:, 1]]
  pairs, with_sums = (fp8.term(*rows, sums=sums).reshape(out.shape) for sums in (False, True))
  np.testing.assert_allclose(fp8.rebasing_terms(x, w), pairs, rtol=1e-9)
  terms = bounds.fp8_terms(x, w, at, np.dtype(np.float32)).reshape(out.shape)
  np.testing.assert_allclose(terms, with_sums, rtol=1e-9)
  assert (pairs > 0).any() and (with_sums > pairs).any()

  rules = dataclasses.replace(rules, fp8=True)
  comparison = bounds.compare(out, x, w, arrays.alpha, rules)
  beyond = (comparison.exact + 1.5 * comparison.bound).astype(out.dtype)
  far = (comparison.exact + 4 * (comparison.bound + pairs)).astype(out.dtype)
  for got in (out, beyond, far):
    verdict = products.verdict_on(got, arrays, rules)
    with monkeypatch.context() as patched:
      patched.setattr(bounds, "_MANY", 0)
      by_matrices = products.verdict_on(got, arrays, rules)
    assert by_matrices.wrong == verdict.wrong
    assert by_matrices.worst >= verdict.worst
  assert verdict.wrong


# What is drawn


def test_a_seed_draws_the_same_again():
  first, second = (cases.case_of(5, 3) for _ in range(2))
  assert first == second == eval(repr(first), {"Case": Case, "Program": Program})
  a, b = cases.arrays_of(first), cases.arrays_of(second)
  np.testing.assert_array_equal(a.x, b.x)
  np.testing.assert_array_equal(a.w_scales, b.w_scales)


def test_what_matters_is_drawn_often():
  programs = [cases.program_of(seed) for seed in range(1000)]
  assert {p.k for p in programs} >= set(range(32, 300, 32))
  assert {p.k for p in programs if p.mode == "nvfp4"} >= set(range(16, 300, 16))
  assert max(p.k for p in programs) > 7000
  for wanted in (
    lambda p: p.m <= 64,
    lambda p: p.m > 64,
    lambda p: p.packed,
    lambda p: not p.packed,
    lambda p: p.global_scales,
    lambda p: p.mode == "mxfp4",
    lambda p: not p.quantize_input,
    lambda p: p.highest,
    lambda p: p.x_dtype == "float32",
    lambda p: p.x_dtype == "float16",
    lambda p: p.batch != (),
    lambda p: p.k % 512 == 0,
    lambda p: p.k < 300,
    lambda p: p.m <= 64 and p.k % 512 == 0,
  ):
    assert sum(map(wanted, programs)) >= 100
  assert sum(p.m >= 3072 for p in programs) >= 5
  assert all(p.products <= cases.MOST_PRODUCTS for p in programs)
  drawn = [cases.case_of(seed, draw) for seed in range(200) for draw in range(1, cases.DRAWS)]
  assert {case.x for case in drawn} == set(data.KINDS)
  assert {case.w for case in drawn} == {*data.KINDS, "random codes"}
  assert {case.bad for case in drawn} == {(), ("x",), ("w",), ("x", "w")}


def test_climbing_climbs():
  """On XLA's reference, whose only error in bfloat16 is the last rounding: near 1, never beyond."""
  climber = climb.Climb(Program("mxfp8", 16, 16, 64), 0, "bound")
  climber.step()
  first = climber.best
  assert first < climber.run(25) <= 1


@pytest.mark.parametrize("optimized", [False, True])
def test_programs_for_users_have_the_newer_emitters_and_parts(optimized):
  """And the other options are the same, but for how much LLVM optimizes."""
  compiling.optimize(optimized)
  options = compiler.get_compile_options(1, 1)
  for flag in (compiling.EMITTERS, compiling.PARTS):
    assert (flag.encode() in options.SerializeAsString()) != optimized
  assert (
    options.executable_build_options.debug_options.xla_llvm_disable_expensive_passes != optimized
  )
  assert options.executable_build_options.use_shardy_partitioner


@pytest.mark.newer_emitters
def test_a_test_may_ask_for_the_newer_emitters():
  compiling.optimize(False)
  options = compiler.get_compile_options(1, 1)
  for flag in (compiling.EMITTERS, compiling.PARTS):
    assert flag.encode() not in options.SerializeAsString()
  assert options.executable_build_options.debug_options.xla_llvm_disable_expensive_passes


def test_a_program_is_compiled_once(monkeypatch):
  compiled = []
  compiling.optimize(False)
  monkeypatch.setattr(compiling, "_kept", collections.OrderedDict())
  monkeypatch.setattr(
    compiling, "_compile", lambda *args, do=compiling._compile: compiled.append(1) or do(*args)
  )

  def run(number):
    assert float(jax.jit(lambda x: x + number)(np.float32(1))) == 1 + number
    return len(compiled)

  assert [run(2), run(2), run(3), run(2)] == [1, 1, 2, 2]
  compiling.optimize(True)
  assert run(2) == 3
  compiling._kept.clear()
  monkeypatch.setattr(compiling, "_KEPT", 1)
  assert [run(2), run(2), run(3), run(2)] == [4, 4, 5, 6]


def test_what_calls_back_is_compiled_each_time():
  def called(number):
    result = jax.ShapeDtypeStruct((), np.float32)
    return jax.jit(lambda x: jax.pure_callback(lambda x: np.float32(number), result, x))(0)

  assert [called(1), called(2)] == [1, 2]


@pytest.mark.parametrize("word", ["x", "8", "got 4"])
def test_a_word_within_another_is_not_said(word):
  sentence = "mode must be one of 'nvfp4', 'mxfp8', got 48"
  assert word in sentence and not messages.says(sentence, word)
  assert messages.says(sentence, "mode") and messages.says(sentence, "'mxfp8'")


def test_a_sentence_without_a_word_is_refused():
  messages.check_sentence("qqmm: x must be a matrix.", "qqmm", ["x"])
  for sentence in ("qqmm: mxfp8 must be a matrix.", "explain: x is not.", "qqmm: x", "qqmm: {x}."):
    with pytest.raises(AssertionError):
      messages.check_sentence(sentence, "qqmm", ["x"])


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels need JAX 0.11")
def test_a_lowered_program_has_one_fingerprint():
  from tests.support import lowered

  cases = dict(lowered.table())
  packed, fly = "nvfp4 packed 1 1024 1024", "nvfp4 fly 1 1024 1024"
  first = lowered.fingerprint(cases[packed])
  assert first.endswith(" 1") and lowered.fingerprint(cases[packed]) == first
  assert lowered.fingerprint(cases[fly]) != first
  assert lowered.anonymous("@qqmm @f @qqmm") == lowered.anonymous("@g @h @g") != "@g @h @g"
