"""quantize and dequantize as a Hopper GPU would run them, as far as a CPU can tell: the program.

This process sees eight devices (conftest.py), so that nothing here hangs on there being one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from jaxqq import _kernels
from jaxqq._formats import FORMATS
from jaxqq._kernels import conversions
from jaxqq._kernels.problem import Conversion
from tests.support import oracle

if jax.__version_info__ < (0, 11):
  pytest.skip("the kernels need JAX 0.11", allow_module_level=True)

from tests.support.operands import data
from tests.support.programs import count_kernels, lowered_for_cuda
from tests.support.quantizers import interpreted

W = jax.ShapeDtypeStruct((3, 40, 96), jnp.bfloat16)
SCALE = jax.ShapeDtypeStruct((), jnp.float32)
BATCH_OF_SCALES = jax.ShapeDtypeStruct((3,), jnp.float32)
EACH_MODE = pytest.mark.parametrize("mode", oracle.MODES)


def kernels(f, *args):
  """How many kernels the program holds that is lowered for CUDA."""
  return count_kernels(lowered_for_cuda(f, *args))


def quantize_and_back(w, global_scale=None, *, mode="nvfp4", axis=-1, scale_back=None):
  packed, scales = jaxqq.quantize(w, mode=mode, global_scale=global_scale, axis=axis)
  return jaxqq.dequantize(packed, scales, mode=mode, global_scale=scale_back)


def with_scale_on_both_ways(w, global_scale):
  return quantize_and_back(w, global_scale, scale_back=global_scale)


def of_mode(mode, **kwargs):
  return functools.partial(quantize_and_back, mode=mode, **kwargs)


@EACH_MODE
def test_on_one_device_of_several(mode):
  assert jax.device_count() == 8
  assert kernels(of_mode(mode), W) == 2
  assert kernels(of_mode(mode), W.update(shape=(96,))) == 2


def test_a_global_scale():
  assert kernels(with_scale_on_both_ways, W, SCALE) == 2


@EACH_MODE
def test_no_transpose_is_written_of_one_matrix(mode):
  f = lambda w: jaxqq.quantize(w, mode=mode, axis=-2)  # noqa: E731
  for shape in ((96, 130), (1, 96, 130)):
    text = lowered_for_cuda(f, W.update(shape=shape))
    assert count_kernels(text) == 1 and "stablehlo.transpose" not in text
  several = lowered_for_cuda(f, W.update(shape=(2, 96, 130)))
  assert count_kernels(several) == 1 and "stablehlo.transpose" in several


def test_with_64_bit_types():
  with jax.enable_x64(True):
    for mode in oracle.MODES:
      assert kernels(of_mode(mode), W) == 2


def test_vmap():
  assert kernels(jax.vmap(quantize_and_back), W) == 2
  assert kernels(jax.vmap(jax.vmap(quantize_and_back)), W) == 2
  assert kernels(jax.vmap(with_scale_on_both_ways, (0, None)), W, SCALE) == 2
  # A global scale for each matrix: no kernel has that.
  assert kernels(jax.vmap(quantize_and_back), W, BATCH_OF_SCALES) == 1
  assert kernels(jax.vmap(with_scale_on_both_ways), W, BATCH_OF_SCALES) == 0
  # Scales of each matrix with the codes of one.
  packed = jax.eval_shape(jaxqq.quantize, W.update(shape=(40, 96)))[0]
  scales = jax.eval_shape(jaxqq.quantize, W)[1]
  assert kernels(jax.vmap(jaxqq.dequantize, (None, 0)), packed, scales) == 1


def test_grad_goes_around_the_kernels():
  def f(w, scale):
    back = with_scale_on_both_ways(w, scale)
    return jnp.sum(back.astype(jnp.float32)) + jnp.sum(w.astype(jnp.float32))

  assert kernels(jax.value_and_grad(f), W, SCALE) == 2


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("spec", [P("data"), P("data", "tensor")], ids=str)
@EACH_MODE
def test_in_shard_map(mode, spec, axis):
  """Each device converts its own part, of whole groups."""
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  out = P(*(*spec, None)[1::-1]) if axis == -2 else spec
  f = jax.shard_map(of_mode(mode, axis=axis), mesh=mesh, in_specs=spec, out_specs=out)
  assert kernels(f, W.update(shape=(256, 256))) == 2


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("spec", [P(), P("data"), P("data", "tensor"), P(None, "tensor")], ids=str)
def test_on_explicit_axes(spec, axis):
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
  w = W.update(shape=(256, 256), sharding=NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    assert kernels(of_mode("mxfp8", axis=axis), w) == 2
    exported = export.export(jax.jit(of_mode("mxfp8", axis=axis)), platforms=("cpu", "cuda"))(w)
    assert count_kernels(exported.mlir_module()) == 2


def test_on_explicit_axes_of_one_device():
  mesh = jax.make_mesh((1,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    assert kernels(quantize_and_back, W.update(sharding=NamedSharding(mesh, P("data")))) == 2


def partitioned_kernels(rules, f, mesh, args, results):
  """How many kernels a device's part of one conversion has under `jit` of sharded arrays."""
  rules.clear()
  text = lowered_for_cuda(f, *args)
  assert text.count("@CustomSPMDPartitioning") == 1 and "mosaic_gpu" not in text
  (rule,) = rules
  _, part, _, shardings = rule["partition"](mesh, args, results)
  parts = [
    jax.ShapeDtypeStruct(sharding.shard_shape(a.shape), a.dtype)
    for a, sharding in zip(args, shardings, strict=True)
  ]
  assert [p.shape for p in parts] != [a.shape for a in args]
  assert jax.make_jaxpr(part)(*parts).effects == set()
  return kernels(part, *parts)


@pytest.mark.parametrize("axis", [-1, -2])
@EACH_MODE
def test_what_the_partitioner_gets(mode, axis, partition_rules):
  """XLA asks for a device's part when it compiles."""
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

  def split(spec, *shapes):
    return [a.update(sharding=NamedSharding(mesh, spec)) for a in shapes]

  quantize = functools.partial(jaxqq.quantize, mode=mode, axis=axis)
  (w,) = split(P("data", "tensor"), W.update(shape=(256, 256)))
  back = P("tensor", "data") if axis == -2 else P("data", "tensor")
  results = split(back, *jax.eval_shape(quantize, w))
  assert partitioned_kernels(partition_rules, quantize, mesh, [w], results) == 1
  dequantize = functools.partial(jaxqq.dequantize, mode=mode)
  out = split(back, jax.eval_shape(dequantize, *results))
  assert partitioned_kernels(partition_rules, dequantize, mesh, results, out) == 1


def test_exported_where_there_is_no_gpu():
  exported = export.export(jax.jit(with_scale_on_both_ways), platforms=("cpu", "cuda"))(W, SCALE)
  assert count_kernels(exported.mlir_module()) == 2


def test_sizes_that_are_not_known():
  (b,) = export.symbolic_shape("b")
  x, w = jax.ShapeDtypeStruct((b, 64), jnp.bfloat16), jax.ShapeDtypeStruct((32, 64), jnp.bfloat16)
  for f, args in ((jaxqq.qqmm, (x, w)), (quantize_and_back, (x,))):
    exported = export.export(jax.jit(f), platforms=("cuda",))(*args)
    assert "mosaic_gpu" not in exported.mlir_module()


def test_empty_axes():
  for shape in ((0, 64), (4, 0), (2, 0, 64)):
    assert kernels(quantize_and_back, W.update(shape=shape)) == 0


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize(
  ("name", "shape"),
  [("w", (2, 1, 3, 64)), ("w_transposed", (2, 64, 5)), ("w_transposed", (1, 64, 5))],
)
def test_rows_of_the_tables_agree(name, shape, scaled):
  """Kernels run by the interpreter, and the definition: batch axes, and codes of one matrix."""
  (w,) = data(shape)
  scale = [np.float32([3])] if scaled else []

  def run(table, row, names, arrays, *dtype):
    arrays, names = [*arrays, *scale], (*names, *["global_scale"] * scaled)
    platform = {0: "cuda", -1: "cpu"}[row]

    def f(*arrays):
      problem = Conversion.of(FORMATS["nvfp4"], names, arrays, *dtype)
      plan = _kernels.plan(problem, _kernels.device_of(platform), table)
      assert plan.implementation is table[row]
      return plan.run(arrays)

    return interpreted(f, *arrays) if row == 0 else jax.jit(f)(*arrays)

  quantized = [run(conversions.QUANTIZE, row, [name], [w]) for row in (0, -1)]
  packed, scales = quantized[1]
  both = [packed, scales[:1]]
  float32 = np.dtype(np.float32)
  numbers = [run(conversions.DEQUANTIZE, r, ["w", "scales"], both, float32) for r in (0, -1)]
  for kernel, definition in (quantized, numbers):
    for a, b in zip(kernel, definition, strict=True):
      np.testing.assert_array_equal(a, b)


def test_other_platforms_get_xla():
  """The same program on the CPU that runs the tests."""
  w = oracle.random(np.random.default_rng(1), (5, 64), "float32")
  packed, scales = jaxqq.quantize(w)
  want = oracle.quantize(w, "nvfp4")
  np.testing.assert_array_equal(packed, want[0])
  np.testing.assert_array_equal(scales, want[1])
  text = jax.jit(quantize_and_back).trace(W).lower(lowering_platforms=("tpu",)).as_text()
  assert "mosaic_gpu" not in text


def test_other_gpus_get_xla(monkeypatch):
  monkeypatch.setattr("jaxqq._compat.cuda_compute_capability", lambda: "8.0")
  jax.clear_caches()
  assert kernels(quantize_and_back, W) == 0
  jax.clear_caches()
