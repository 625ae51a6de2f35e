"""explain says in words what runs and why; the primitive runs that."""

from __future__ import annotations

import collections
import copy
import itertools
import json
import pickle
import sys
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from jaxqq import _compat, _kernels
from jaxqq._formats import FORMATS
from jaxqq._kernels.hopper import wide_plan
from jaxqq._kernels.hopper.mainloops.table import PARTS
from jaxqq._kernels.hopper.tiles import DEALT_STEPS, cdiv
from jaxqq._kernels.problem import Problem
from jaxqq._reference import Operands
from jaxqq.bench import tune
from jaxqq.bench.cases import Case
from tests.support import oracle

X = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
W = jax.ShapeDtypeStruct((16, 64), jnp.float32)
KERNEL_NAMES = ("hopper_quantize", "hopper_dequantize")


@pytest.mark.parametrize("device", [None, "cpu", "gpu", "cuda", "tpu"])
@pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
def test_shapes_and_platforms(mode, device):
  text = jaxqq.explain(X, W, mode=mode, device=device)
  platform = {"gpu": "cuda", None: jax.default_backend()}.get(device, device)
  for word in (mode, "bfloat16 (8, 64)", "float32 (16, 64)", "on the fly", f"on {platform}"):
    assert word in text
  on_hopper = platform == "cuda" and jax.__version_info__ >= (0, 11)
  of_hopper = "fp8 tensor cores" if mode == "mxfp8" else "16 bit tensor cores"
  assert f"computed by {of_hopper if on_hopper else 'XLA'}" in text


def test_the_text_is_a_string_that_can_be_kept():
  x = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
  text = jaxqq.explain(x, x, device="cpu")
  assert text.plan.name == "xla" and text.plan.refusals
  for kept in (pickle.loads(pickle.dumps(text)), copy.deepcopy(text), json.loads(json.dumps(text))):
    assert type(kept) is str and kept == text


def test_arrays_and_devices():
  x, w = np.ones((8, 64), np.float32), np.ones((16, 64), np.float32)
  packed, scales = jaxqq.quantize(w)
  for args in ((x, packed, scales), (jnp.asarray(x), packed, scales)):
    for device in (None, jax.devices()[0]):
      text = jaxqq.explain(*args, device=device)
      assert f"packed, on {jax.devices()[0].platform}" in text
  one = np.float32(1)
  text = jaxqq.explain(x, w, global_scale_x=one, global_scale_w=one, backward="quantized")
  assert "computed by XLA" in text
  with pytest.raises(TypeError, match="explain: device must be"):
    jaxqq.explain(x, w, device=3)
  with pytest.raises(ValueError, match="explain: unknown platform 'cdua'; it must be one of 'cpu'"):
    jaxqq.explain(x, w, device="cdua")


def test_under_jit():
  said = []

  @jax.jit
  def f(x, w):
    said.append(jaxqq.explain(x, w))
    return jaxqq.qqmm(x, w)

  f(np.ones((8, 64), np.float32), np.ones((16, 64), np.float32))
  assert f"on {jax.default_backend()}" in said[0]


def of(m, n, k, mode, packed, dtype=jnp.bfloat16, **kwargs):
  w = jax.ShapeDtypeStruct((n, k), dtype)
  if packed:
    w = jax.eval_shape(lambda: jaxqq.quantize(jnp.zeros((n, k)), mode=mode))
  x = jax.ShapeDtypeStruct((m, k), dtype)
  return jaxqq.explain(x, *(w if packed else (w,)), mode=mode, device="cuda", **kwargs)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="kernels need JAX 0.11")
def test_old_jax_gets_xla_and_is_told_why():
  text = of(256, 512, 4096, "mxfp8", True)
  assert "computed by XLA" in text
  assert f"needs JAX 0.11 or newer, and this is {jax.__version__}" in text
  assert ("needs Python 3.12 or newer" in text) == (sys.version_info < (3, 12))


def wide_plans(mode, m, n, k, dtype=np.float32, *, fp8=False):
  """All that a product of packed w, in 16 bits or in fp8, could take on a Hopper GPU."""
  fmt, spec = FORMATS[mode], jax.ShapeDtypeStruct
  packed = spec((n, k // fmt.codes_per_word), np.uint32), spec((n, k // fmt.group_size), np.uint8)
  problem = Problem.of(Operands(spec((m, k), dtype), *packed), fmt, np.dtype(dtype), None)
  return wide_plan.wide_plans(problem, _kernels.device_of("cuda"), fp8=fp8)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels need JAX 0.11")
class TestChoice:
  @pytest.mark.parametrize("packed", [False, True])
  def test_which_kernel_and_why_not_the_other(self, packed):
    for k in (32, 2048, 4096):
      assert "computed by fp8 tensor cores" in of(256, 512, k, "mxfp8", packed)
    for text, reason in (
      (of(256, 512, 4096, "nvfp4", packed), "nvfp4 has no e4m3 elements"),
      (of(256, 512, 4096, "mxfp8", packed, jnp.float32), "float32 output, or precision above"),
      (
        of(256, 512, 4096, "mxfp8", packed, precision=jax.lax.Precision.HIGHEST),
        "float32 output, or precision above",
      ),
    ):
      assert "computed by 16 bit tensor cores" in text
      assert f"Not hopper_fp8: {reason}" in text

  def test_how_many_sms(self, monkeypatch):
    """The device's own decide on tiles; with none at hand it says so."""
    assumed = "for 132 SMs (assumed: no device at hand says so)"
    assert assumed in of(64, 512, 4096, "mxfp8", True)
    text = of(256, 8192, 8192, "nvfp4", True)
    assert text.plan.kernel.tiles.cluster == 2 and assumed in text
    monkeypatch.setattr(_compat, "cuda_sm_count", lambda: 78)  # of an H20
    text = of(256, 8192, 8192, "nvfp4", True)
    assert text.plan.kernel.tiles.cluster == 1 and text.plan.kernel.device.num_sms == 78
    assert "for 78 SMs" in text and "(assumed" not in text

  def test_tiles_take_as_long_as_the_costs_say(self):
    """All that were measured, nearly; and of several, the planner's is nearly the fastest."""
    times = tune.read(resources.files("jaxqq") / "_kernels" / "tuned" / "h200_tiles.json")
    shares = []
    for mode, m, n, k in dict.fromkeys(tile.product for tile in times):
      for plan in tune.plans_of(Case("packed", mode, m, n, k)):
        us = times.get(tune.Tile.of(plan))
        if us is not None:
          shares.append(plan.estimate_us / us)
          assert abs(shares[-1] - 1) < 0.21, tune.Tile.of(plan)
    assert len(shares) > 700 and np.mean(np.abs(np.array(shares) - 1)) < 0.05
    measured = collections.Counter(tile.product for tile in times)
    known = [
      (slower, chosen, fastest)
      for slower, chosen, fastest in tune.choices(times)
      if measured[chosen.product] > 1
    ]
    assert all(np.isfinite(slower) for slower, _, _ in known), "the planner's tile is measured"
    missed = {chosen.product: slower for slower, chosen, _ in known if slower > 1.05}
    assert len(known) >= 150 and missed.keys() <= {
      ("nvfp4", 128, 5120, 8192),
      ("mxfp8", 64, 57344, 8192),
      ("mxfp8", 192, 2048, 6144),
      ("mxfp8", 256, 57344, 8192),
    }, missed
    assert max(missed.values(), default=1) < 1.12, missed

  def test_the_estimate_is_told(self):
    text = of(256, 8192, 8192, "nvfp4", True)
    assert f"about {text.plan.kernel.estimate_us:.0f} us on an H200" in text

  def test_tiles_follow_the_rows(self):
    def tiles(*problem):
      tiles = of(*problem).plan.kernel.tiles
      return tiles.block_m, tiles.cluster

    expected = {65: (96, 2), 192: (192, 2), 256: (256, 2), 1024: (256, 1), 8192: (256, 1)}
    for m, want in expected.items():
      assert tiles(m, 8192, 8192, "nvfp4", True) == want
    # Sums are exchanged by 16 bit results' tiles only; k is split in steps, evenly or not.
    assert tiles(256, 8192, 8192, "nvfp4", True, jnp.float32)[1] == 1
    assert tiles(256, 8192, 8192 + 64, "nvfp4", True)[1] == 2
    assert tiles(256, 8192, 64, "nvfp4", True)[1] == 1

  def test_stream_k_has_steps_for_every_cta(self):
    """K = 2816 is 11 steps of four parts: dealt out in twos they were too few, and it raised."""
    found = 0
    sizes = (16, 64, 100), (1024, 1536, 2048, 3072, 4608), (1408, 2592, 2688, 2816, 5632)
    ways = ("nvfp4", False), ("mxfp4", False), ("mxfp8", False), ("mxfp8", True)
    for (mode, fp8), m, n, k in itertools.product(ways, *sizes):
      for plan in wide_plans(mode, m, n, k, jnp.bfloat16 if fp8 else np.float32, fp8=fp8):
        if plan.tiles.stream_k:
          steps = cdiv(k, plan.tiles.parts * PARTS[plan.mainloop].k)
          assert plan.grid.dealt_tiles * (steps // DEALT_STEPS) >= plan.grid.num_sms, plan
          found += 1
    assert found > 100

  def test_no_step_has_more_parts_than_k(self):
    for mode, k in (("nvfp4", 64), ("mxfp4", 64), ("mxfp8", 128), ("nvfp4", 192)):
      for plan in wide_plans(mode, 64, 66000, k):
        assert plan.tiles.parts <= cdiv(k, PARTS[plan.mainloop].k)

  def test_clusters_run_at_once(self):
    """18 of six CTAs did not: 256 x 1024 x 4096 took twice as long as the costs said."""
    for m, n, k, mode in ((256, 1024, 4096, "nvfp4"), (512, 576, 7168, "mxfp8")):
      plan = of(m, n, k, mode, True).plan.kernel
      assert plan.tiles.cluster > 1
      assert plan.grid.num_tiles <= plan.device.num_clusters(plan.tiles.cluster)
    assert [plan.device.num_clusters(size) for size in (2, 3, 4, 6, 8)] == [66, 33, 28, 16, 12]

  def test_padded_k_is_told(self):
    """Loads go past K. w is padded to rows of whole 16 bytes, and x where it is interleaved.

    Scales are padded with w, and where codes are rescaled by an odd number of them.
    """
    assert ", scales padded along K by XLA" in of(100, 512, 2816 + 32, "mxfp8", True)
    for packed, m in ((True, 100), (True, 4096), (False, 256)):
      assert "K padded" not in of(m, 512, 2880, "mxfp8", packed)
    assert "K padded to a multiple of 64 by XLA" in of(100, 512, 2880 + 32, "nvfp4", False)
    for k, mode, names in (
      (2880, "nvfp4", ""),
      (2880, "mxfp8", ""),
      (2816 + 32, "nvfp4", "x"),
      (2816 + 16, "nvfp4", "x and w and scales"),
      (2816 + 32, "mxfp8", ""),
    ):
      text = of(100, 512, k, mode, True, jnp.float32)
      told = f", {names} padded along K by XLA" if names else "padded"
      assert (told in text) == bool(names), (k, mode)

  def test_few_rows_go_where_they_are_faster(self):
    """Rebased codes from 33 rows on in mxfp8; in nvfp4 from 9 on tiles, where w has many rows."""
    for m, n, mode, kernel in (
      (32, 8192, "mxfp8", "skinny_gemm"),
      (33, 8192, "mxfp8", "dequant_gemm"),
      (64, 4096, "nvfp4", "skinny_gemm"),
      (64, 28672, "nvfp4", "dequant_gemm"),
      (16, 8192, "nvfp4", "skinny_gemm"),
      (16, 28672, "nvfp4", "dequant_gemm"),
      (8, 28672, "nvfp4", "skinny_gemm"),
    ):
      assert of(m, n, 4096, mode, True).plan.kernel.kernel == kernel
    text = of(64, 28672, 4096, "nvfp4", True)
    assert "Not hopper_skinny: it would take about" in text
    assert "33 rows of x, and of mxfp8 it is for at most 32" in of(33, 8192, 4096, "mxfp8", True)

  def test_kernels_follow_the_rows(self):
    for m, packed, kernel in (
      (32, True, "skinny_gemm"),
      (65, True, "dequant_gemm"),
      (65, False, "gemm"),
      (8192, True, "staged_gemm"),
      (8192, False, "gemm"),
    ):
      text = of(m, 8192, 8192, "mxfp8", packed)
      own = text.plan.kernel
      assert own.kernel == kernel and f"{kernel} ({own.mainloop}) with" in text
      assert ("a panel at a time" in text) == (kernel == "staged_gemm")

  def test_few_rows_have_a_kernel_of_their_own(self):
    for mode in oracle.PRODUCT_MODES:
      assert "a kernel that streams w" in of(32, 512, 4096, mode, True)
      assert "num_stages=" in of(32, 512, 4096, mode, True)
      assert "numbers quantized in registers" in of(64, 512, 768, mode, False)
    for text, reason in (
      (of(65, 512, 4096, "nvfp4", True), "65 rows of x are multiplied with one matrix w"),
      (of(8, 512, 4096, "nvfp4", False, jnp.float32), "w is not packed but float32"),
      (of(8, 512, 480, "mxfp8", True), "k = 480, and it loads 512 of k at once"),
      (of(8, 512, 4096, "mxfp8", True, jnp.float32), "float32 output"),
    ):
      assert "a kernel that streams w" not in text
      assert f"hopper_skinny: {reason}" in text

  @pytest.mark.parametrize(
    ("k", "words"),
    [
      (2880, "loaded in rows of 128 bytes since K is no multiple of 256, scales in 4 planes"),
      (3072, None),
    ],
  )
  def test_why_a_k_is_loaded_in_rows(self, k, words):
    text = of(8, 512, k, "nvfp4", True)
    assert "skinny_gemm (sixteens) with" in text
    assert words in text if words else "in rows of 128 bytes" not in text

  def test_a_vector_is_one_row(self):
    w, row = (
      jax.ShapeDtypeStruct((256, 128), jnp.bfloat16),
      jax.ShapeDtypeStruct((128,), "bfloat16"),
    )
    text = jaxqq.explain(row, w, device="cuda")
    assert "(128,)" in text and "a kernel that streams w" in text

  def test_x_as_it_is_has_kernels_for_16_bits_that_hold_w_hat(self):
    def of_weights(m, dtype, mode):
      x = jax.ShapeDtypeStruct((m, 4096), dtype)
      packed = jax.eval_shape(lambda: jaxqq.quantize(jnp.zeros((512, 4096)), mode=mode))
      return jaxqq.explain(jaxqq.quantized_matmul, x, *packed, mode=mode, device="cuda")

    for mode in ("nvfp4", "mxfp4", "mxfp8"):
      assert of_weights(8, "bfloat16", mode).plan.name == "hopper_skinny"
      text = of_weights(200, "bfloat16", mode)
      assert text.plan.name == "hopper_exact"
      assert "Not hopper_fp8: x is not quantized, and fp8 does not hold it" in text
    assert of_weights(8, "float16", "nvfp4").plan.name == "hopper_skinny"
    text = of_weights(8, "float16", "mxfp4")
    assert text.count("x is float16 and not quantized, and scales of mxfp4 leave it") == 2
    text = of_weights(8, "float32", "nvfp4")
    assert text.count("x is float32 and not quantized, and tensor cores take 16 bits") == 2

  def test_mxfp4_has_kernels_of_16_bits(self):
    assert of(8, 512, 4096, "mxfp4", True).plan.name == "hopper_skinny"
    text = of(200, 512, 4096, "mxfp4", True)
    assert text.plan.name == "hopper_exact"
    assert "Not hopper_fp8: mxfp4 has no e4m3 elements" in text

  def test_refusals(self):
    assert "an axis is empty" in of(0, 512, 4096, "mxfp8", False)
    assert "computed by XLA" in of(0, 512, 4096, "mxfp8", False)

  def test_other_gpus(self, monkeypatch):
    monkeypatch.setattr("jaxqq._compat.cuda_compute_capability", lambda: "8.0")
    text = of(256, 512, 4096, "mxfp8", True)
    assert "computed by XLA" in text
    assert "it is for compute capability 9.0 (H100, H200), not 8.0" in text

  @pytest.mark.parametrize("mode", oracle.PRODUCT_MODES)
  @pytest.mark.parametrize("packed", [False, True])
  def test_the_lowering_holds_what_explain_names(self, mode, packed):
    x = jax.ShapeDtypeStruct((256, 4096), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((512, 4096), jnp.bfloat16)
    args = jax.eval_shape(lambda a: jaxqq.quantize(a, mode=mode), w) if packed else (w,)
    traced = jax.jit(lambda *a: jaxqq.qqmm(*a, mode=mode)).trace(x, *args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("jaxqq_dequant_gemm" if packed else "jaxqq_gemm") in text
    assert "dot_general" not in text


HAS_KERNELS = jax.__version_info__ >= (0, 11)


class TestConversions:
  """quantize and dequantize, given as the first argument."""

  def of_both(self, w, mode, device=None, axis=-1):
    quantized = jax.eval_shape(lambda w: jaxqq.quantize(w, mode=mode, axis=axis), w)
    return (
      jaxqq.explain(jaxqq.quantize, w, mode=mode, axis=axis, device=device),
      jaxqq.explain(jaxqq.dequantize, *quantized, None, None, mode, dtype="float16", device=device),
    )

  @pytest.mark.parametrize("device", [None, "cpu", "cuda", "tpu"])
  @pytest.mark.parametrize("mode", oracle.MODES)
  def test_which_and_why_not_another(self, mode, device):
    platform = device or jax.default_backend()
    group = oracle.MODES[mode].group
    heads = (
      f"quantize {mode}, w bfloat16 (8, 64), on {platform}: computed by ",
      f"dequantize {mode}, w uint32 (8, {64 * oracle.MODES[mode].bits // 32}), "
      f"scales uint8 (8, {64 // group}), to float16, on {platform}: computed by ",
    )
    for text, head, name in zip(self.of_both(X, mode, device), heads, KERNEL_NAMES, strict=True):
      assert text.startswith(head)
      if platform == "cuda" and HAS_KERNELS:
        assert text.startswith(f"{head}a kernel that reads") and "Not " not in text
      else:
        reason = "it needs JAX 0.11" if platform == "cuda" else f"it is for cuda, not {platform}"
        assert text.startswith(f"{head}XLA") and f" Not {name}: {reason}" in text

  @pytest.mark.skipif(not HAS_KERNELS, reason="kernels need JAX 0.11")
  def test_transposes(self):
    one = self.of_both(X.update(shape=(64, 8)), "mxfp8", "cuda", axis=-2)[0]
    assert "w bfloat16 (64, 8) along axis -2" in one and "no transpose is written" in one
    several = self.of_both(X.update(shape=(3, 64, 8)), "mxfp8", "cuda", axis=-2)[0]
    assert "writes the transpose first" in several

  @pytest.mark.skipif(not HAS_KERNELS, reason="kernels need JAX 0.11")
  def test_refusals(self, monkeypatch):
    (rows,) = jax.export.symbolic_shape("rows")
    for shape, reason in (((0, 64), "an axis is empty"), ((rows, 64), "a size is symbolic")):
      for text in self.of_both(X.update(shape=shape), "nvfp4", "cuda"):
        assert "computed by XLA" in text and reason in text
    monkeypatch.setattr("jaxqq._compat.cuda_compute_capability", lambda: "8.0")
    for text in self.of_both(X, "nvfp4", "cuda"):
      assert "computed by XLA" in text and "compute capability 9.0 (H100, H200), not 8.0" in text

  def test_arrays_vectors_and_global_scales(self):
    w, scale = jnp.ones((64,)), np.ones((1,), np.float32)
    packed, scales = jaxqq.quantize(w, global_scale=scale)
    for device in (None, jax.devices()[0]):
      text = jaxqq.explain(jaxqq.quantize, w=w, global_scale=scale, device=device)
      assert f"quantize nvfp4, w float32 (64,), on {jax.default_backend()}" in text
      text = jaxqq.explain(jaxqq.dequantize, packed, scales, global_scale=scale, device=device)
      assert "w uint32 (8,), scales uint8 (4,), to bfloat16" in text

  @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
  def test_split(self, kind):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)

    def place(a, spec):
      return jax.device_put(a, NamedSharding(mesh, spec))

    w = place(jnp.ones((16, 256)), P("data", "tensor"))
    text = jaxqq.explain(jaxqq.quantize, w)
    assert text.endswith("Split over 8 devices ({'data': 4, 'tensor': 2}): each takes w (4, 128).")
    columns = jaxqq.explain(jaxqq.quantize, w, axis=-2)  # one group over four devices
    assert "each takes w (16, 128)." in columns
    assert "K = 16 is split over 'data', which would cut a group of 16: it is" in columns
    quantized = [place(a, P("tensor", "data")) for a in jaxqq.quantize(jnp.ones((16, 256)))]
    text = jaxqq.explain(jaxqq.dequantize, *quantized)
    assert text.endswith("each takes w (8, 8) and scales (8, 4).")
    vector = place(jnp.ones((96,)), P("data"))
    text = jaxqq.explain(jaxqq.quantize, vector)
    assert "each takes w (1, 96). K = 96 is split over 'data', which would cut a group" in text
    said = []
    jax.jit(lambda w: said.append(jaxqq.explain(jaxqq.quantize, w)))(w)
    assert ("each takes w (4, 128)." in said[0]) == (kind == AxisType.Explicit)

  def test_what_is_left_to_xla_is_not_split(self):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P(P.UNCONSTRAINED))
    w = jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=sharding)
    assert jaxqq.explain(jaxqq.quantize, w).endswith("each takes w (8, 256).")
    assert "each multiplies x (8, 256) with w (8, 256)." in jaxqq.explain(w, w)

  def test_errors(self):
    for args, kwargs, error, words in (
      ((jnp.sum, X), {}, TypeError, "the function must be jaxqq.qqmm, jaxqq.quantized_matmul, "),
      ((jaxqq.quantize,), {}, TypeError, "missing a required argument: 'w'"),
      ((jaxqq.quantize, X), {"scales": X}, TypeError, "unexpected keyword argument 'scales'"),
      ((jaxqq.qqmm, X), {}, TypeError, "missing a required argument: 'w'"),
      ((X,), {}, TypeError, "missing a required argument: 'w'"),
      ((jaxqq.quantize, X), {"axis": 0}, ValueError, "axis must be -1 or -2"),
      ((jaxqq.quantize, X), {"axis": -1.0}, ValueError, "axis must be -1 or -2"),
      ((jaxqq.quantize, X), {"axis": np.array([-1, -2])}, ValueError, "axis must be -1 or -2"),
      ((jaxqq.quantize, X), {"mode": "fp4"}, ValueError, "unknown mode 'fp4'"),
      ((jaxqq.quantize, [1.0]), {}, TypeError, "w must be a numpy or JAX array"),
      ((jaxqq.dequantize, X, X), {}, TypeError, "w must be uint32"),
      ((jaxqq.quantize, X), {"device": "cdua"}, ValueError, "unknown platform 'cdua'"),
    ):
      with pytest.raises(error) as caught:
        jaxqq.explain(*args, **kwargs)
      message = str(caught.value)
      assert message.startswith("explain: ") and message.endswith(".") and words in message

  def test_qqmm_may_be_named(self):
    assert jaxqq.explain(jaxqq.qqmm, X, W, mode="mxfp8") == jaxqq.explain(X, w=W, mode="mxfp8")


class TestSplit:
  """What one device gets is named, and why K is gathered."""

  def said(self, x_spec, w_spec, k=512, packed=False, m=16, **kwargs):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def of(shape, dtype, spec):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    args = [of((24, k), jnp.bfloat16, w_spec)]
    if packed:
      args = [of((24, k // 8), jnp.uint32, w_spec), of((24, k // 16), jnp.uint8, w_spec)]
    return jaxqq.explain(of((m, k), jnp.bfloat16, x_spec), *args, **kwargs)

  @pytest.mark.parametrize("packed", [False, True])
  def test_parts(self, packed):
    word = 8 if packed else 1
    text = self.said(P("data"), P("tensor"), packed=packed)
    assert "Split over 8 devices" in text
    assert f"each multiplies x (4, 512) with w (12, {512 // word})." in text
    text = self.said(P("data", "tensor"), P(None, "tensor"), packed=packed)
    assert f"x (4, 256) with w (24, {256 // word}), and float32 parts are summed over" in text
    assert "gathered" not in text

  def test_a_split_that_would_cut_a_group(self):
    text = self.said(P("data", "tensor"), P(None, "tensor"), k=48)
    assert "K = 48 is split over 'tensor', which would cut a group of 16: it is gathered." in text
    assert "each multiplies x (4, 48) with w (24, 48)." in text

  def test_arrays_and_explicit_axes_under_jit(self):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((16, 64)), NamedSharding(mesh, P("data")))
    w = jnp.ones((8, 64))
    said = [jaxqq.explain(x, w)]
    jax.jit(lambda x, w: said.append(jaxqq.explain(x, w)))(x, w)
    assert len(said) == 2
    assert all("each multiplies x (2, 64) with w (8, 64)." in text for text in said)
    assert "Split over" not in jaxqq.explain(w, w)

  @pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels need JAX 0.11")
  def test_the_kernel_is_that_of_a_part(self):
    """Its k decides, but not that it is summed up in float32: the whole is rounded after that."""
    for k, name in ((512, "hopper_skinny"), (192, "hopper_fp8")):
      text = self.said(P(), P(None, "tensor"), k=k, m=64, mode="mxfp8", device="cuda")
      assert text.plan.name == name
    assert "k = 96, and it loads 128 of k at once" in text
