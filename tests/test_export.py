"""Programs that leave the process: exported, compiled ahead of time, cached."""

from __future__ import annotations

import functools
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P

import jaxqq
from tests.support.operands import PRODUCTS, arguments, data
from tests.support.programs import count_kernels
from tests.support.sharding import (
  GATHERED,
  REDUCED,
  SPLITS,
  collectives,
  explicit_mesh,
  place,
  place_explicit,
)

# What quantizes x, what quantizes w where it is not packed, and the product.
KERNELS = {True: 2, False: 3} if jax.__version_info__ >= (0, 11) else {True: 0, False: 0}
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["on the fly", "packed"])
BOTH = ("cpu", "cuda")


@PACKED
@pytest.mark.parametrize("product", [*PRODUCTS[:2], PRODUCTS[3]], ids=str)
def test_one_artifact_for_cpu_and_cuda(product, packed):
  """Kernels included, every check of JAX's on, through bytes; and its gradient."""
  x, w = data((64, 128), (128, 128))
  args = (x, *arguments(w, product.mode, packed))
  f = jax.jit(product)
  exported = export.export(f, platforms=BOTH)(*args)
  assert exported.platforms == BOTH
  kernels = KERNELS[packed] if product.quantizes_x else 0  # of x as it is there is none yet
  assert count_kernels(exported.mlir_module()) == kernels
  back = export.deserialize(exported.serialize(vjp_order=1))
  np.testing.assert_array_equal(back.call(*args), f(*args))
  got = jax.grad(lambda x: jnp.sum(back.call(x, *args[1:]) ** 2))(x)
  want = jax.grad(lambda x: jnp.sum(f(x, *args[1:]) ** 2))(x)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("platforms", "packed"),
  [(("cpu",), True), (("cuda",), False), (BOTH, False), (BOTH, True)],
  ids=str,
)
def test_symbolic_batch(platforms, packed):
  """A size that is not known takes XLA's lowering, on every platform."""
  x, w = data((5, 64), (7, 64))
  args = arguments(w, "nvfp4", packed)
  (rows,) = export.symbolic_shape("rows")
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
  shape = jax.ShapeDtypeStruct((rows, 64), x.dtype)
  exported = export.export(jax.jit(jaxqq.qqmm), platforms=platforms)(shape, *shapes)
  assert "mosaic_gpu" not in exported.mlir_module()
  exported = export.deserialize(exported.serialize())
  if "cpu" in platforms:
    for m in (1, 5):
      want = jaxqq.qqmm(x[:m], *args)
      np.testing.assert_allclose(exported.call(x[:m], *args), want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  "how",
  [{"mode": "mxfp8", "backward": "quantized"}, {"backward": "quantized"}, {"recipe": "nvfp4"}],
  ids=str,
)
def test_gradients_of_a_symbolic_batch(how):
  """Rows of zeros fill up the groups of the sum over a size that is not known."""
  x, w = data((21, 64), (40, 64))
  if "recipe" in how:
    how = {**how, "key": jax.random.key(0)}
  (rows,) = export.symbolic_shape("rows")

  def gradients(x, w):
    return jax.grad(lambda x, w: (jaxqq.qqmm(x, w, **how) ** 2).sum(), argnums=(0, 1))(x, w)

  exported = export.export(jax.jit(gradients))(
    jax.ShapeDtypeStruct((rows, 64), x.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype)
  )
  for m in (1, 21):
    for got, want in zip(exported.call(x[:m], w), jax.jit(gradients)(x[:m], w), strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(np.abs(want).max()))


@pytest.mark.usefixtures("quick_compiles")
def test_a_symbolic_number_of_matrices_with_a_scale_each():
  x, w = data((3, 5, 64), (3, 7, 64))
  (count,) = export.symbolic_shape("count")
  shapes = (jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype) for a in (x, w))

  def product(x, w):
    return jaxqq.qqmm(x, jaxqq.quantize_weight(w), global_scale_x="amax")

  exported = export.export(jax.jit(product))(*shapes)
  for n in (1, 3):
    want = jax.jit(product)(x[:n], w[:n])
    np.testing.assert_allclose(exported.call(x[:n], w[:n]), want, rtol=1e-5, atol=1e-4)


def test_runs_where_jaxqq_was_never_imported(tmp_path):
  x, w = data((16, 128), (32, 128))
  packed, scales = jaxqq.quantize(w)
  exported = export.export(jax.jit(jaxqq.qqmm), platforms=BOTH)(x, packed, scales)
  (tmp_path / "program").write_bytes(exported.serialize())
  np.savez(tmp_path / "arrays", x=x, packed=packed, scales=scales)
  code = """
import sys, pathlib, numpy as np
from jax import export
program = export.deserialize(bytearray(pathlib.Path("program").read_bytes()))
arrays = np.load("arrays.npz")
np.save("out", program.call(arrays["x"], arrays["packed"], arrays["scales"]))
assert not any(name.startswith("jaxqq") for name in sys.modules)
"""
  subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
  np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), jaxqq.qqmm(x, packed, scales))


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("split", "packed"),
  [("column", True), ("x on k only", False), ("columns of w", False), ("columns of w", True)],
)
def test_explicit_shardings_are_exported_with_the_rule(split, packed):
  """Their types say all, so that nothing has to be asked of the partitioner.

  Of 8 rows a device, x would be quantized in the kernel.
  """
  x, w = data((64, 512), (24, 512))
  args = arguments(w, "nvfp4", packed)
  x_spec, w_spec, _ = SPLITS[split]
  with jax.set_mesh(explicit_mesh()):
    placed = place_explicit(x, x_spec), *(place_explicit(a, w_spec) for a in args)
    exported = export.export(jax.jit(jaxqq.qqmm), platforms=BOTH)(*placed)
    assert count_kernels(exported.mlir_module()) == KERNELS[packed]
    exported = export.deserialize(exported.serialize())
    executable = jax.jit(exported.call).lower(*placed).compile()
    np.testing.assert_allclose(executable(*placed), jaxqq.qqmm(x, *args), rtol=1e-5, atol=1e-4)
  moved = {"column": [], "x on k only": REDUCED, "columns of w": GATHERED[packed]}
  assert collectives(executable) == moved[split]


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("split", ["column", "row", "columns of w"])
def test_automatic_shardings_are_exported_without(split):
  """XLA splits the reference by itself; the numbers are the same."""
  x, w = data((16, 512), (24, 512))
  x_spec, w_spec, _ = SPLITS[split]
  placed = place(x, x_spec), place(w, w_spec)
  exported = export.deserialize(export.export(jax.jit(jaxqq.qqmm))(*placed).serialize())
  got = jax.jit(exported.call)(*placed)
  np.testing.assert_allclose(got, jaxqq.qqmm(x, w), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("quick_compiles")
@PACKED
def test_ahead_of_time_and_the_executable_as_bytes(packed):
  x, w = data((16, 512), (24, 512))
  args = arguments(w, "nvfp4", packed)
  for put in (lambda a, spec: a, place_explicit):
    placed = put(x, P("data")), *(put(a, P("tensor")) for a in args)
    compiled = jax.jit(jaxqq.qqmm).lower(*placed).compile()
    want = compiled(*placed)
    np.testing.assert_allclose(want, jaxqq.qqmm(x, *args), rtol=1e-5, atol=1e-4)
    as_bytes = pickle.dumps(serialize_executable.serialize(compiled))
    devices = sorted(want.sharding.device_set, key=lambda device: device.id)
    loaded = serialize_executable.deserialize_and_load(
      *pickle.loads(as_bytes), execution_devices=devices
    )
    np.testing.assert_array_equal(loaded(*placed), want)


def place_nowhere(a, spec):
  return a


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("put", [place_nowhere, place_explicit, place])
def test_persistent_compilation_cache(tmp_path, put):
  """The second time nothing is compiled, and modes are not mistaken for each other."""
  x, w = data((16, 512), (24, 512))
  placed = put(x, P("data")), put(w, P("tensor"))
  settings = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": str(tmp_path),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # The rule that XLA's partitioner asks is in the program as a pointer, new in every process.
    "jax_remove_custom_partitioning_ptr_from_cache_key": True,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  events = []
  listener = lambda event, **_: events.append(event)  # noqa: E731
  jax.monitoring.register_event_listener(listener)
  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    outs = []
    for mode, again in (("nvfp4", False), ("nvfp4", True), ("mxfp8", False)):
      jax.clear_caches()
      f = jax.jit(functools.partial(jaxqq.qqmm, mode=mode))
      lowered = f.lower(*placed)
      events.clear()
      outs.append(lowered.compile()(*placed))
      assert ("/jax/compilation_cache/cache_hits" in events) == again
  finally:
    jax.monitoring.unregister_event_listener(listener)
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
  np.testing.assert_array_equal(outs[0], outs[1])
  for out, mode in zip(outs[1:], ("nvfp4", "mxfp8"), strict=True):
    np.testing.assert_allclose(out, jaxqq.qqmm(x, w, mode=mode), rtol=1e-5, atol=1e-4)
