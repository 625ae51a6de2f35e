"""Rows in groups on Hopper: the table of tiles, the plans, and the kernels interpreted."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq import _kernels
from jaxqq._formats import FORMATS
from jaxqq._given import Given
from jaxqq._kernels.ragged import RAGGED
from jaxqq._ragged import checked_ragged
from jaxqq._ragged_primitive import Params
from jaxqq._ragged_primitive import problem_of as problem_of_operands
from jaxqq._ragged_reference import Groups, RaggedOperands, folded
from tests.support import oracle, ragged_products
from tests.support.cases import Program
from tests.support.interpreter import interpreted
from tests.support.kernels import on_gpu
from tests.support.products import same_bits
from tests.support.ragged_products import RaggedCase, RaggedProgram

pytestmark = [
  pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 (Mosaic GPU's warpgroups)"
  ),
  pytest.mark.usefixtures("quick_compiles"),
]

HOPPER = _kernels.Device("cuda", "9.0", 132)


# The table of tiles


TABLES = [  # batch, groups, matrices, rows of a tile, rows
  (3, 5, 3, 8, 50),
  (1, 1, 3, 64, 50),
  (1, 19, 4, 8, 50),
  (2, 300, 280, 16, 4000),
  (1, 128, 128, 24, 512),
  (1, 8, 8, 256, 4096),
]


def check_tiles(run, batch, groups, matrices, block_m, rows):
  """Tiles cover every row once, and say which group it has.

  Args:
    run: calls a function that has kernels.
  """
  from jaxqq._kernels.hopper import grouped

  rng = np.random.default_rng(batch)
  x, w = np.zeros((batch, rows, 1), np.float32), np.zeros((matrices, 1, 1), np.float32)
  table_of = jax.jit(
    lambda sizes, offset: grouped.tiles_of(
      grouped.group_tiles(RaggedOperands(sizes, offset, x, w), matrices, block_m)
    )
  )

  @jax.jit
  def own_groups(sizes, offset):
    own = folded(RaggedOperands(sizes, offset, x, w), matrices)[0]
    return own.starts, own.sizes

  even = [1 / groups] * groups
  draws = [rng.multinomial(size, even, batch) for size in (0, 20, rows, 2 * rows)]
  draws += [np.eye(batch, groups, k=groups // 2, dtype=int) * size for size in (1, rows)]
  draws += [rng.integers(-5, 20, (batch, groups)) for _ in range(3)]
  draws += [np.full((batch, groups), 2**31 - 1)]
  offsets = [0, groups - matrices, -1, 1, groups, 0, groups // 2, 2**31 - 1, -(2**31), 0]
  for sizes, offset in zip(draws, offsets, strict=True):
    sizes, offset = np.int32(sizes), np.int32(offset)
    starts, of_groups = map(np.asarray, own_groups(sizes, offset))
    tiles, zeros = tiles_of(run(table_of, sizes, offset))
    got = np.full(batch * rows, -2)
    for group, matrix, first, count in tiles:
      assert 0 < count <= block_m and matrix == group % matrices
      assert (got[first : first + count] == -2).all()
      got[first : first + count] = group
    for first, count in zeros:
      assert 0 < count <= block_m and (got[first : first + count] == -2).all()
      got[first : first + count] = -1
    want = np.full(batch * rows, -1)
    for group, (start, size) in enumerate(zip(starts, of_groups, strict=True)):
      want[start : start + size] = group
    np.testing.assert_array_equal(got, want)
    assert len(tiles) == sum(-(-int(size) // block_m) for size in of_groups)


def tiles_of(table):
  """(group, matrix, first, rows) of each tile of a group, and (first, rows) of those of none."""
  table = jax.tree.map(np.asarray, table)
  assert all(table.counts <= len(table.rows))
  columns = table.group, table.matrix, table.first, table.rows
  of_zeros = table.first_zeros, table.rows_of_zeros
  return [
    list(zip(*(a[:count].tolist() for a in of_kind), strict=True))
    for of_kind, count in zip((columns, of_zeros), table.counts, strict=True)
  ]


@pytest.mark.parametrize("case", TABLES, ids=str)
def test_tiles_cover_every_row_once(case):
  def run(f, *args):
    with interpreted():
      return f(*args)

  check_tiles(run, *case)


def test_scales_of_rows():
  from jaxqq._kernels.hopper.grouped import scales_of_rows

  groups = Groups(jnp.int32([1, 3, 3]), jnp.int32([2, 0, 1]), jnp.arange(3))
  scales = scales_of_rows(groups, jnp.float32([5, 6, 7]), 5)
  assert scales.tolist() == [0, 5, 5, 7, 0]


# Plans


def problem_of(mode, tokens, top, groups, n, k, dtype=jnp.bfloat16, packed=True, **how):
  fmt, rows = FORMATS[mode], tokens * top
  shape = functools.partial(jax.ShapeDtypeStruct)
  w, scales = shape((groups, n, k), jnp.bfloat16), None
  if packed:
    w = shape((groups, n, k * fmt.bits // 32), jnp.uint32)
    scales = shape((groups, n, k // fmt.group_size), jnp.uint8)
  given = Given(shape((rows, k), dtype), w, scales, mode=mode, **how)
  operands, params = checked_ragged("explain", given, shape((groups,), jnp.int32), None)
  return operands, problem_of_operands(operands, params)


QWEN3, GPT_OSS, MIXTRAL = (128, 1536, 2048), (32, 5760, 2880), (8, 28672, 4096)
PLANS = [  # mode, tokens, experts of each, shape; kernel, mainloop, rows of a tile
  ("nvfp4", 1, 8, QWEN3, "skinny_gemm", "sixteens", 8),
  ("mxfp8", 64, 8, QWEN3, "skinny_gemm", "group_sums", 8),
  ("mxfp4", 8, 8, QWEN3, "skinny_gemm", "sixteens", 8),
  ("nvfp4", 512, 8, QWEN3, "dequant_gemm", "packed_e2m1", 64),
  ("mxfp8", 4096, 8, QWEN3, "dequant_gemm", "rebased_e4m3", 256),
  ("nvfp4", 64, 4, GPT_OSS, "skinny_gemm", "sixteens", 16),
  ("mxfp8", 512, 4, GPT_OSS, "dequant_gemm", "rebased_e4m3", 96),
  ("mxfp8", 64, 2, MIXTRAL, "skinny_gemm", "group_sums", 24),
  ("nvfp4", 64, 2, MIXTRAL, "dequant_gemm", "packed_e2m1", 24),
  ("nvfp4", 128, 4, GPT_OSS, "dequant_gemm", "packed_e2m1", 24),
  ("nvfp4", 4096, 2, MIXTRAL, "dequant_gemm", "packed_e2m1", 192),
]
ON_THE_FLY = [
  ("nvfp4", 4096, 8, QWEN3, "gemm", "ready", 256),
  ("mxfp8", 8, 2, MIXTRAL, "gemm", "ready", 128),
]


@pytest.mark.parametrize(
  ("mode", "tokens", "top", "shape", "kernel", "mainloop", "block_m"), PLANS + ON_THE_FLY
)
def test_plans(mode, tokens, top, shape, kernel, mainloop, block_m):
  _, problem = problem_of(mode, tokens, top, *shape, packed=mainloop != "ready")
  plan = _kernels.plan(problem, HOPPER, RAGGED).kernel
  own = plan.of_group
  assert (own.kernel, own.mainloop, plan.block_m) == (kernel, mainloop, block_m)
  assert own.tiles.cluster == 1
  if own.mainloop == "sixteens":
    assert own.tiles.block_n == 128
  if own.kernel == "skinny_gemm":
    assert not own.quantizes_x and own.padded_k("w") == problem.k


def test_a_part_of_a_sum_has_the_kernel_of_its_result():
  """float32, of which the devices' are added up before they are rounded."""
  operands, problem = problem_of("mxfp8", 512, 8, *QWEN3)
  params = Params("mxfp8", np.dtype(np.float32), None)
  part = problem_of_operands(operands, params, np.dtype(jnp.bfloat16))
  names = [_kernels.plan(each, HOPPER, RAGGED).name for each in (problem, part)]
  assert names == ["hopper_fp8"] * 2
  alone = problem_of_operands(operands, params)
  assert _kernels.plan(alone, HOPPER, RAGGED).name == "hopper_exact"


@pytest.mark.parametrize(
  ("how", "reason"),
  [
    ({"packed": False, "global_scale_x": 1.0, "global_scale_w": "amax"}, "for each matrix"),
    ({"dtype": jnp.float32, "quantize_input": False}, "x is float32 and not quantized"),
    ({"packed": False, "tokens": 1}, "fewer rows than groups"),
    ({"tokens": 0}, "an axis is empty"),
  ],
  ids=str,
)
def test_what_xla_multiplies(how, reason):
  sizes = {"mode": "nvfp4", "tokens": 8, "top": 2, "groups": 4, "n": 64, "k": 512}
  _, problem = problem_of(**{**sizes, **how})
  plan = _kernels.plan(problem, HOPPER, RAGGED)
  assert plan.name == "xla" and any(reason in refusal for refusal in plan.refusals)


LAUNCHES = [  # tokens, of what, kernel, launches; whether one makes the table of tiles alone
  (8, {}, "skinny_gemm", 2, False),
  (512, {}, "dequant_gemm", 2, False),
  (512, {"packed": False}, "gemm", 3, False),
  (8, {"quantize_input": False}, "skinny_gemm", 2, True),
  (512, {"quantize_input": False}, "dequant_gemm", 2, True),
]


@pytest.mark.parametrize("case", LAUNCHES, ids=str)
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8", "mxfp4"])
def test_one_launch_for_all_groups(mode, case):
  """And one for each quantizer. That of x makes the table of tiles as well."""
  tokens, how, kernel, launches, is_alone = case
  operands, problem = problem_of(mode, tokens, 4, *GPT_OSS, **how)
  plan = _kernels.plan(problem, HOPPER, RAGGED)

  def product(*arrays):
    return plan.run(RaggedOperands(**dict(zip(operands.names, arrays, strict=True))))

  lowered = jax.jit(product).trace(*operands.flatten()).lower(lowering_platforms=("cuda",))
  text = lowered.as_text()
  assert text.count("@mosaic_gpu") == launches and f"jaxqq_{kernel}" in text
  assert ("jaxqq_group_tiles" in text) == is_alone


# The kernels, interpreted

M = 37


def rows_in_groups(mode, k=512, m=M, packed=True, **how):
  scales, groups = how.pop("scales", "none"), how.pop("groups", 5)
  program = Program(mode, m, how.pop("n", 72), k, w_dtype="float32", packed=packed, **how)
  return RaggedProgram(program, groups, groups, scales)


def check(program, cases, implementation):
  with interpreted(sms=3):
    compiled = None
    for case in cases:
      arrays = ragged_products.arrays_of(case)
      compiled = compiled or ragged_products.compiled(program, arrays.args)
      assert compiled.implementation == implementation
      result = ragged_products.run(case, compiled, twice=False)
      assert not result["wrong"], f"{result['wrong']}\n{result['case']}"


FEW = {
  "nvfp4, scales, a last block": rows_in_groups("nvfp4", 544, scales="of groups"),
  "mxfp8, a last block": rows_in_groups("mxfp8", 544),
  # Tiles of up to 24 rows, with programs for 8, 16 and 24.
  "nvfp4 alone": rows_in_groups("nvfp4", 256, m=80, scales="one", quantize_input=False),
  "nvfp4 alone, half of a last tile": rows_in_groups(
    "nvfp4", 544, n=192, groups=2, quantize_input=False
  ),
  "nvfp4 alone, half of a tile": rows_in_groups("nvfp4", 256, n=64, groups=2, quantize_input=False),
  "mxfp4": rows_in_groups("mxfp4"),
}


@pytest.mark.parametrize("name", FEW)
def test_few_rows(name):
  program = FEW[name]
  m, groups = program.product.m, program.groups
  a_part, one_has_all = (0, 9, 0, 20, 3), (0, 0, m, 0, 0)
  if groups == 2:
    a_part, one_has_all = (9, 20), (0, m)
  cases = [RaggedCase(program, sizes) for sizes in (a_part, one_has_all)]
  check(program, cases, "hopper_skinny")


MANY = {
  "nvfp4, scales in planes": rows_in_groups("nvfp4", 544, m=40, groups=2),
  "mxfp8, scales in planes": rows_in_groups("mxfp8", 576, m=76, groups=2),
  "nvfp4": rows_in_groups("nvfp4", 96, m=76, groups=2, scales="of groups"),
  "nvfp4, tiles of 24 rows": rows_in_groups("nvfp4", 512, m=40, groups=2, n=200),
  "nvfp4, float32": rows_in_groups("nvfp4", 64, m=76, groups=2, x_dtype="float32"),
  "mxfp8": rows_in_groups("mxfp8", 160, m=76, groups=2),
  "mxfp8, exact": rows_in_groups("mxfp8", 64, m=76, groups=1, highest=True),
  "mxfp4 alone": rows_in_groups("mxfp4", 64, m=76, groups=2, quantize_input=False),
  "nvfp4 on the fly": rows_in_groups("nvfp4", 96, m=76, groups=2, packed=False),
  "mxfp8 on the fly": rows_in_groups("mxfp8", 160, m=76, groups=2, packed=False),
  # Tiles of more than 128 rows, and the last one of fewer, which takes less time.
  "mxfp8, large tiles": rows_in_groups("mxfp8", 160, m=400, groups=1),
  "nvfp4, large tiles": rows_in_groups("nvfp4", 64, m=380, groups=1),
}


@pytest.mark.parametrize("name", MANY)
def test_many_rows(name):
  program = MANY[name]
  is_fp8 = program.product.may_use_fp8_sums
  m = program.product.m
  sizes = [(13, min(42, m - 16)), (0, m)]
  sizes = [of_groups[-program.groups :] for of_groups in sizes]
  if name.endswith("large tiles"):
    k = program.product.k
    _, problem = problem_of(program.product.mode, program.product.m, 1, 1, program.product.n, k)
    plan = _kernels.plan(problem, _kernels.Device("cuda", "9.0", 3), RAGGED).kernel
    assert plan.block_m > 128
  cases = [RaggedCase(program, of_groups, x="outliers") for of_groups in sizes]
  check(program, cases, "hopper_fp8" if is_fp8 else "hopper_exact")


@pytest.mark.parametrize(
  ("mode", "rows", "n", "k", "kernel"),
  [
    ("nvfp4", 9, 72, 544, "hopper_skinny"),
    ("nvfp4", 9, 69, 544, "hopper_skinny"),  # all rows of eight: w is padded
    ("nvfp4", 70, 72, 144, "hopper_exact"),  # whole steps of k: w is padded
    ("mxfp8", 9, 72, 544, "hopper_skinny"),
    ("mxfp8", 40, 72, 192, "hopper_fp8"),  # scales are rebased
  ],
)
def test_a_layer_of_stacked_weights(mode, rows, n, k, kernel):
  """One group has all rows, and its place says which matrix it meets."""
  rng = np.random.default_rng(0)
  stack = jaxqq.quantize_weight(jnp.asarray(rng.standard_normal((4, n, k)), jnp.bfloat16), mode)
  x = jnp.asarray(rng.standard_normal((rows, k)), jnp.bfloat16)
  x_hat = oracle.round_trip(np.asarray(x), mode).astype(np.float64)
  how = {"global_scale_x": 2688.0} if mode == "nvfp4" else {}
  product = jax.jit(lambda x, layer: jaxqq.qqmm(x, layer, **how))
  w_hats = np.asarray(stack.dequantize(jnp.float32), np.float64)
  for index in (0, 3):
    with interpreted():
      plan = jaxqq.explain(jaxqq.qqmm, x, stack.layer(index), **how).plan
      out = np.asarray(product(x, stack.layer(index)))
    assert plan.name == kernel
    w_hat = w_hats[index]
    oracle.assert_within_bound(out, x_hat @ w_hat.T, np.abs(x_hat) @ np.abs(w_hat).T)


@pytest.mark.parametrize("mode", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("product", [jaxqq.qqmm, jaxqq.quantized_matmul])
def test_a_layer_beside_thousands_of_rows(product, mode):
  """One group of so many rows that a matrix alone would be expanded a panel at a time."""
  stack = jax.eval_shape(
    functools.partial(jaxqq.quantize_weight, mode=mode), jnp.zeros((2, 8192, 512), jnp.bfloat16)
  )
  x = jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16)
  traced = jax.jit(lambda x, stack: product(x, stack.layer(1))).trace(x, stack)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "jaxqq_dequant_gemm" in text and "staged" not in text


def test_a_wrong_tile_is_noticed(monkeypatch):
  """One that meets the matrix of the next group."""
  from jaxqq._kernels.hopper import grouped

  right = grouped.tiles_of

  def wrong(*args):
    tiles = right(*args)
    return dataclasses.replace(tiles, matrix=(tiles.matrix + 1) % 5)

  monkeypatch.setattr(grouped, "tiles_of", wrong)
  program = FEW["mxfp8, a last block"]
  with pytest.raises(AssertionError, match="of the bound"):
    check(program, [RaggedCase(program, (0, 9, 0, 20, 3))], "hopper_skinny")


# Straight-through gradients


def gradient_operands(contracted, rng, dtype):
  """80 rows of four groups and of none, which are NaN; n = 72, k = 128."""
  m, n, k = 80, 72, 128
  sizes = np.int32([0, 10, 1, 66])
  x, w, y = (rng.standard_normal(shape).astype(dtype) for shape in ((m, n), (4, n, k), (m, k)))
  x[77:], y[77:] = np.nan, np.nan
  other = {"w": w} if contracted == "n" else {"y": y}
  operands = RaggedOperands(jnp.asarray(sizes), jnp.int32(0), x, **other)
  starts = np.cumsum(sizes) - sizes
  rows = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
  return operands, rows


@pytest.mark.parametrize(("contracted", "dtype"), [("n", jnp.bfloat16), ("m", np.float16)])
def test_gradients(contracted, dtype):
  rng, dtype = np.random.default_rng(0), np.dtype(dtype)
  operands, rows = gradient_operands(contracted, rng, dtype)
  params = Params(
    "nvfp4", dtype, None, contracted=contracted, quantize=False, groups=4, function="ragged_qqmm"
  )
  device = _kernels.Device("cuda", "9.0", 3, max_cluster=1)
  plan = _kernels.plan(problem_of_operands(operands, params), device, RAGGED)
  assert plan.name == "hopper_gradient"

  def product(*arrays):
    return plan.run(RaggedOperands(**dict(zip(operands.names, arrays, strict=True))))

  with interpreted(sms=3):
    out = np.asarray(jax.jit(product)(*operands.flatten()))
  x = np.asarray(operands.x, np.float64)
  for group, of_group in enumerate(rows):
    if contracted == "n":
      got, left = out[of_group], x[of_group]
      right = np.asarray(operands.w[group], np.float64)
    else:
      got, left = out[group], x[of_group].T
      right = np.asarray(operands.y, np.float64)[of_group]
    oracle.assert_within_bound(got, left @ right, np.abs(left) @ np.abs(right))
  if contracted == "n":
    assert not out[77:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(12))
def test_gradients_on_a_gpu(seed):
  """Straight through, of random sizes: of the rows of each group, and the same bits twice."""
  rng = np.random.default_rng([seed, 11])
  groups, m = int(rng.choice([1, 3, 8, 33])), int(rng.choice([5, 64, 300, 1500]))
  n, k = 8 * int(rng.integers(1, 60)), 64 * int(rng.integers(1, 20))
  sizes = rng.multinomial(int(m * rng.choice([1, 0.7])), np.ones(groups) / groups)
  if rng.random() < 0.3:  # one has all
    sizes = np.roll(np.eye(1, groups, dtype=int)[0] * m, rng.integers(groups))
  dtype = np.dtype(rng.choice([jnp.bfloat16, np.float16]))
  x, w, g = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k), (groups, n, k), (m, n)))

  @jax.jit
  def pulled_back(x, w, sizes, g):
    return jax.vjp(lambda x, w: jaxqq.ragged_qqmm(x, w, sizes, mode="mxfp8"), x, w)[1](g)

  arguments = x, w, np.int32(sizes), g
  text = pulled_back.lower(*arguments).as_text()
  assert "jaxqq_row_sums" in text and "jaxqq_gemm" in text
  dx, dw = map(np.asarray, pulled_back(*arguments))
  assert all(map(same_bits, (dx, dw), map(np.asarray, pulled_back(*arguments))))
  x, w, g = (a.astype(np.float64) for a in (x, w, g))
  ends = np.cumsum(sizes)
  assert not dx[ends[-1] :].any()
  for group, (end, size) in enumerate(zip(ends, sizes, strict=True)):
    rows, of_w = slice(end - size, end), w[group]
    products = (dx[rows], g[rows], of_w), (dw[group], g[rows].T, x[rows])
    for got, left, right in products:
      oracle.assert_within_bound(got, left @ right, np.abs(left) @ np.abs(right))


@pytest.mark.parametrize("contracted", ["n", "m"])
def test_gradients_lower_for_cuda(contracted):
  operands, _ = gradient_operands(contracted, np.random.default_rng(0), np.dtype(jnp.bfloat16))
  params = Params(
    "nvfp4", np.dtype(jnp.bfloat16), None, contracted=contracted, quantize=False, groups=4
  )
  plan = _kernels.plan(problem_of_operands(operands, params), HOPPER, RAGGED)

  def gradient(*arrays):
    return plan.run(RaggedOperands(**dict(zip(operands.names, arrays, strict=True))))

  lowered = jax.jit(gradient).trace(*operands.flatten()).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("@mosaic_gpu") == (2 if contracted == "n" else 1)


SEEDS = (0, 4)


def test_random():
  with interpreted(sms=3):
    results = [
      r
      for seed in SEEDS
      for r in ragged_products.run_seed(seed, range(1, 3), small=True, twice=False)
    ]
  failed = [f"{r['wrong']}\n  {r['case']}" for r in results if r["wrong"]]
  assert not failed, "\n".join(failed)
  assert not any(r["implementation"] == "xla" for r in results)


def test_explain_says_how():
  with interpreted():
    x = jax.ShapeDtypeStruct((48, 512), jnp.bfloat16)
    w = jaxqq.quantize_weight(jnp.ones((4, 64, 512)))
    text = str(jaxqq.explain(jaxqq.ragged_qqmm, x, w, jnp.full((4,), 12)))
  assert "all groups in one launch, in tiles of up to 16 rows" in text, text


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("case", TABLES, ids=str)
  def test_tiles_cover_every_row_once(self, case):
    check_tiles(lambda f, *args: f(*args), *case)
