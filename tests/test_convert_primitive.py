"""quantize and dequantize under JAX's transformations and on meshes: the oracle's bits in each."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from tests.support import oracle
from tests.support.jaxprs import count
from tests.support.operands import amax, data
from tests.support.sharding import QUICK, collectives, sharding_error

EACH_MODE = pytest.mark.parametrize("mode", oracle.MODES)
# name: (mode, whether with a global scale)
KINDS = {"nvfp4": ("nvfp4", False), "nvfp4 scaled": ("nvfp4", True), "mxfp8": ("mxfp8", False)}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def assert_quantized(got, w, mode, global_scale=None, axis=-1):
  """packed, scales are the oracle's for w."""
  w = np.asarray(w)
  want = oracle.quantize(np.swapaxes(w, -1, -2) if axis == -2 else w, mode, global_scale)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(np.asarray(a), b)


def values_of(packed, scales, mode, global_scale=None):
  codes = oracle.unpack(np.asarray(packed), mode)
  out = oracle.values(codes, np.asarray(scales), mode)
  return out if global_scale is None else out * float(global_scale) / 2688


def assert_dequantized(got, packed, scales, mode, global_scale=None):
  """float32 numbers are the oracle's: exactly, or within float32's two roundings."""
  want = values_of(packed, scales, mode, global_scale)
  rtol = 0 if global_scale is None else 2.0**-22
  np.testing.assert_allclose(np.asarray(got), want, rtol=rtol, atol=0)


def equations(f, *args):
  jaxpr = jax.make_jaxpr(f)(*args).jaxpr
  names = ("quantize", "dequantize", "scan", "while")
  return {name: found for name in names if (found := count(jaxpr, name))}


# vmap


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("in_axis", [0, 1, 2])
@EACH_MODE
def test_vmap_of_quantize(mode, in_axis, axis):
  (w,) = data((64, 128, 192))
  f = jax.vmap(functools.partial(jaxqq.quantize, mode=mode, axis=axis), in_axis)
  assert equations(f, w) == {"quantize": 1}
  assert_quantized(f(w), jnp.moveaxis(w, in_axis, 0), mode, axis=axis)


@pytest.mark.parametrize("shape", [(3, 64), (3, 2, 64), (3, 2, 2, 64)], ids=str)
@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)], ids=str)
def test_vmap_over_global_scales(in_axes, shape):
  """Also one w under several scales; of a vector, of a matrix and of several."""
  (w,) = data(shape)
  scales = amax(w) * np.float32([1, 0.5, 2])
  args = w if in_axes[0] == 0 else w[0], scales if in_axes[1] == 0 else scales[1]
  quantize = jax.vmap(lambda w, s: jaxqq.quantize(w, global_scale=s), in_axes)
  assert equations(quantize, *args) == {"quantize": 1}
  got = quantize(*args)

  def dequantize_one(packed, scales, s):
    return jaxqq.dequantize(packed, scales, global_scale=s, dtype=jnp.float32)

  dequantize = jax.vmap(dequantize_one, (0, 0, in_axes[1]))
  assert equations(dequantize, *got, args[1]) == {"dequantize": 1}
  back = dequantize(*got, args[1])
  for i in range(3):
    scale = scales[i] if in_axes[1] == 0 else scales[1]
    each = got[0][i], got[1][i]
    assert_quantized(each, w[i] if in_axes[0] == 0 else w[0], "nvfp4", scale)
    assert_dequantized(back[i], *each, "nvfp4", scale)


@pytest.mark.parametrize("in_axes", [(0, 0), (1, 2), (2, 1), (0, None), (None, 1)], ids=str)
@EACH_MODE
def test_vmap_of_dequantize(mode, in_axes):
  """Every axis; codes of each matrix with one's scales, and scales of each with one's codes."""
  (w,) = data((3, 8, 64))
  packed, scales = (np.asarray(a) for a in jaxqq.quantize(w, mode=mode))
  args = [
    a[0] if at is None else np.moveaxis(a, 0, at)
    for a, at in zip((packed, scales), in_axes, strict=True)
  ]
  f = jax.vmap(functools.partial(jaxqq.dequantize, mode=mode, dtype=jnp.float32), in_axes)
  assert equations(f, *args) == {"dequantize": 1}
  got = f(*args)
  for i in range(3):
    each = [a[0 if at is None else i] for a, at in zip((packed, scales), in_axes, strict=True)]
    assert_dequantized(got[i], *each, mode)


# Derivatives


def test_global_scales_have_gradient_zero():
  """As in a product: around both conversions the two would cancel, and one alone mislead."""
  (w,) = data((3, 8, 64))

  def there_and_back(w):
    scale = jnp.max(jnp.abs(w))
    packed, scales = jaxqq.quantize(w, global_scale=scale)
    return jaxqq.dequantize(packed, scales, global_scale=scale, dtype=jnp.float32)

  out, tangent = jax.jit(lambda w: jax.jvp(there_and_back, (w,), (w,)))(w[0])
  np.testing.assert_array_equal(out, there_and_back(w[0]))
  assert not np.asarray(tangent).any()
  gradient = jax.jit(jax.vmap(jax.grad(lambda w: jnp.sum(there_and_back(w) ** 2))))(w)
  assert gradient.shape == w.shape and not np.asarray(gradient).any()


def test_quantize_has_no_derivative():
  """Its results are integers; a gradient goes around it, under remat and scan too."""
  (w,) = data((4, 8, 64))

  @jax.checkpoint
  def step(total, w):
    packed, scales = jaxqq.quantize(w, mode="mxfp8")
    back = jaxqq.dequantize(packed, scales, mode="mxfp8", dtype=jnp.float32)
    return total + jnp.sum(w * lax.stop_gradient(back)), None

  gradient = jax.grad(lambda w: lax.scan(step, jnp.float32(0), w)[0])(w)
  np.testing.assert_array_equal(gradient, oracle.round_trip(np.asarray(w), "mxfp8"))
  got = jax.grad(lambda w: jnp.sum(jaxqq.dequantize(*jaxqq.quantize(w), dtype=jnp.float32)))(w)
  assert not np.asarray(got).any()
  _, tangents = jax.jvp(jaxqq.quantize, (w,), (w,))
  assert {t.dtype for t in tangents} == {jax.dtypes.float0}


def test_float8_scales_are_the_same_bytes():
  (w,) = data((8, 64))
  packed, scales = jaxqq.quantize(w)
  as_floats = lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
  got, pull = jax.vjp(lambda s: jaxqq.dequantize(packed, s, dtype=jnp.float32), as_floats)
  assert_dequantized(got, packed, scales, "nvfp4")
  assert not np.asarray(pull(jnp.ones_like(got))[0], np.float32).any()


# shard_map


@functools.cache
def mesh_of(kind=AxisType.Auto, shape=(4, 2)):
  names = ("data", "tensor")[: len(shape)]
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def place(a, mesh, spec):
  return jax.device_put(a, NamedSharding(mesh, spec))


def transposed_spec(spec, axis):
  return P(*(*spec, None, None)[1::-1]) if axis == -2 else spec


SPECS = (P("data"), P(None, "data"), P("data", "tensor"), P("tensor", "data"))


def converters(kind, axis=-1):
  """quantize(w, *scale) and dequantize(packed, scales, *scale), the mode, and the scale."""
  mode, scaled = KINDS[kind]

  def quantize(w, *scale):
    return jaxqq.quantize(w, mode=mode, axis=axis, global_scale=scale[0] if scale else None)

  def dequantize(packed, scales, *scale):
    scale = scale[0] if scale else None
    return jaxqq.dequantize(packed, scales, mode=mode, global_scale=scale, dtype=jnp.float32)

  return quantize, dequantize, mode, scaled


@QUICK
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@EACH_KIND
def test_shard_map(kind, spec, axis):
  """Every device converts its part, under the default checks; a global scale is everyone's."""
  quantize, dequantize, mode, scaled = converters(kind, axis)
  (w,) = data((256, 256))
  scale = (amax(w),) if scaled else ()
  out = transposed_spec(spec, axis)
  rest = (P(),) * scaled
  map_over = functools.partial(jax.shard_map, mesh=mesh_of())
  split = jax.jit(map_over(quantize, in_specs=(spec, *rest), out_specs=(out, out)))
  got = split(w, *scale)
  assert_quantized(got, w, mode, *scale, axis=axis)
  if axis == -2:
    return  # codes and scales are those of another spec along axis -1
  back = map_over(dequantize, in_specs=(out, out, *rest), out_specs=out)
  executable = jax.jit(back).lower(*got, *scale).compile()
  assert collectives(executable) == []
  assert_dequantized(executable(*got, *scale), *got, mode, *scale)


def test_shard_map_eagerly_and_one_operand_that_all_devices_share():
  (w,) = data((64, 64))
  scale = np.float32(2)
  packed, scales = jaxqq.quantize(w, global_scale=scale)

  def f(packed, scales, scale):
    return jaxqq.dequantize(packed, scales, global_scale=scale, dtype=jnp.float32)

  for specs in ((P("data"), P("data"), P()), (P(), P(), P())):
    mapped = jax.shard_map(f, mesh=mesh_of(), in_specs=specs, out_specs=specs[0])
    assert_dequantized(mapped(packed, scales, scale), packed, scales, "nvfp4", scale)


def test_shard_map_over_some_axes_only():
  """XLA splits over the other."""
  (w,) = data((64, 64))
  f = jax.shard_map(
    jaxqq.quantize, mesh=mesh_of(), in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
  )
  assert_quantized(jax.jit(f)(w), w, "nvfp4")


# jit of sharded arrays, on meshes of one axis and of two


def table():
  for shape in ((8,), (2,), (4, 2)):
    for spec in SPECS[: 2 if len(shape) == 1 else None]:
      for axis in (-1, -2):
        yield pytest.param(shape, spec, axis, id=f"{shape}-{spec}-{axis}")


@QUICK
@EACH_KIND
@pytest.mark.parametrize(("shape", "spec", "axis"), list(table()))
def test_jit(shape, spec, axis, kind):
  """Nothing moves, and results are split as operands are."""
  quantize, dequantize, mode, scaled = converters(kind, axis)
  (w,) = data((256, 256))
  scale = (amax(w),) if scaled else ()
  placed = place(w, mesh_of(shape=shape), spec)
  executable = jax.jit(quantize).lower(placed, *scale).compile()
  assert collectives(executable) == []
  got = executable(placed, *scale)
  assert_quantized(got, w, mode, *scale, axis=axis)
  split = NamedSharding(mesh_of(shape=shape), transposed_spec(spec, axis))
  assert all(a.sharding.is_equivalent_to(split, 2) for a in got)
  if axis == -2:
    return  # codes and scales are those of another spec along axis -1
  executable = jax.jit(dequantize).lower(*got, *scale).compile()
  assert collectives(executable) == []
  back = executable(*got, *scale)
  assert back.sharding.is_equivalent_to(split, 2)
  assert_dequantized(back, *got, mode, *scale)


@QUICK
@pytest.mark.parametrize("shape", [(8,), (4, 2)], ids=str)
@EACH_MODE
def test_what_is_moved_is_packed(mode, shape):
  """Results that every device wants are quantized where w is, and then gathered."""
  mesh = mesh_of(shape=shape)
  (w,) = data((64, 256))
  placed = place(w, mesh, P(mesh.axis_names))
  quantize = functools.partial(jaxqq.quantize, mode=mode)
  quantize = jax.jit(quantize, out_shardings=NamedSharding(mesh, P()))
  executable = quantize.lower(placed).compile()
  assert collectives(executable) == [("all-gather", "u32"), ("all-gather", "u8")]
  assert_quantized(executable(placed), w, mode)


@QUICK
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("num_groups", [1, 3, 6, 12])
@EACH_MODE
def test_a_split_that_would_cut_a_group_is_gathered(mode, num_groups, axis):
  """Over one axis of eight and over two, groups and devices sharing a factor or none."""
  k = num_groups * oracle.MODES[mode].group
  (w,) = data((16, k))
  w = w.T if axis == -2 else w
  quantize = jax.jit(functools.partial(jaxqq.quantize, mode=mode, axis=axis))
  dequantize = jax.jit(functools.partial(jaxqq.dequantize, mode=mode, dtype=jnp.float32))
  for shape, spec in (((8,), P(None, "data")), ((4, 2), P("tensor", "data"))):
    mesh = mesh_of(shape=shape)
    got = quantize(place(w, mesh, transposed_spec(spec, axis)))
    assert_quantized(got, w, mode, axis=axis)
    if axis == -2:
      continue  # codes and scales are those along axis -1
    parts = [place(a, mesh, spec if a.shape[1] % mesh.shape["data"] == 0 else P()) for a in got]
    assert_dequantized(dequantize(*parts), *got, mode)


@QUICK
def test_parts_of_a_mesh_axis_and_constants():
  """What XLA may ask for: a split over 4 of 8 devices, which no axis of the mesh is."""
  mesh = mesh_of(shape=(8,))
  (w,) = data((8, 4, 64))

  @jax.jit
  def reshaped(w):
    w = w.reshape(4, 8, 64)
    packed, scales = jaxqq.quantize(w, mode="mxfp8")
    columns = jaxqq.quantize(w.swapaxes(1, 2), mode="mxfp8", axis=-2)
    back = jaxqq.dequantize(packed, scales, mode="mxfp8", dtype=jnp.float32)
    return (packed, scales), columns, back.reshape(8, 4, 64)

  for spec in (P("data"), P(None, None, "data")):
    got, columns, back = reshaped(place(w, mesh, spec))
    for each in (got, columns):
      assert_quantized(each, w.reshape(4, 8, 64), "mxfp8")
    np.testing.assert_array_equal(back, oracle.round_trip(np.asarray(w), "mxfp8"))
  packed, scales = jaxqq.quantize(w)
  of_constant = jax.jit(lambda p: jaxqq.dequantize(p, scales, dtype=jnp.float32))
  assert_dequantized(
    of_constant(place(packed, mesh, P(None, None, "data"))), packed, scales, "nvfp4"
  )


@QUICK
@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)], ids=str)
def test_vmap_of_sharded_arrays(in_axes):
  mesh = mesh_of()
  (w,) = data((8, 16, 128))
  scales = amax(w) * np.float32(2) ** np.arange(-4, 4, dtype=np.float32)
  args = [a if at == 0 else a[0] for a, at in zip((w, scales), in_axes, strict=True)]
  specs = [P("data"), P(("data", "tensor"))]
  placed = [
    place(a, mesh, spec if at == 0 else P())
    for a, spec, at in zip(args, specs, in_axes, strict=True)
  ]
  f = jax.jit(jax.vmap(lambda w, s: jaxqq.quantize(w, global_scale=s), in_axes))
  got = f(*placed)
  for i in range(8):
    own = [a[i] if at == 0 else a for a, at in zip(args, in_axes, strict=True)]
    assert_quantized([a[i] for a in got], own[0], "nvfp4", own[1])


@QUICK
def test_vmap_twice_of_sharded_arrays():
  """Each of some w with each of some scales: axes that one of the two does not have."""
  mesh = mesh_of()
  (w,) = data((2, 16, 128))
  scales = amax(w) * np.float32([1, 2, 0.5, 4])
  quantize = jax.vmap(lambda w, s: jaxqq.quantize(w, global_scale=s), (None, 0))
  quantize = jax.vmap(quantize, (0, None))
  assert equations(quantize, w, scales) == {"quantize": 1}
  got = jax.jit(quantize)(place(w, mesh, P("tensor")), place(scales, mesh, P("data")))
  assert got[0].shape == (2, 4, 16, 16)
  for i in range(2):
    for j in range(4):
      assert_quantized([a[i, j] for a in got], w[i], "nvfp4", scales[j])


def test_where_operands_and_results_are_split_differently(partition_rules):
  """quantize runs where w is, dequantize where its result is to be."""
  mesh = mesh_of()

  def split(spec, *shapes):
    sharding = NamedSharding(mesh, spec)
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in shapes]

  def parts(f, operands, results):
    """Shapes of what one device has."""
    jax.jit(lambda *a: f(*a)).trace(*operands).lower()  # traced anew
    partition = partition_rules.pop()["partition"]
    _, _, of_results, of_operands = partition(mesh, operands, results)
    pairs = zip([*operands, *results], [*of_operands, *of_results], strict=True)
    return [sharding.shard_shape(a.shape) for a, sharding in pairs]

  (w,) = split(P("data"), jax.ShapeDtypeStruct((16, 256), jnp.float32))
  results = jax.eval_shape(jaxqq.quantize, w)
  assert parts(jaxqq.quantize, [w], split(P(), *results)) == [(4, 256), (4, 32), (4, 16)]
  # What w is not split over costs nothing to split.
  got = parts(jaxqq.quantize, [w], split(P("tensor", "data"), *results))
  assert got == [(4, 256), (4, 32), (4, 16)]
  got = parts(jaxqq.quantize, [w], split(P(None, "tensor"), *results))
  assert got == [(4, 128), (4, 16), (4, 8)]
  out = jax.eval_shape(jaxqq.dequantize, *results)
  got = parts(jaxqq.dequantize, split(P("data"), *results), split(P(), out))
  assert got == [(16, 32), (16, 16), (16, 256)]
  got = parts(jaxqq.dequantize, split(P(), *results), split(P("tensor", "data"), out))
  assert got == [(8, 8), (8, 4), (8, 64)]


@QUICK
@EACH_MODE
def test_the_other_partitioner(mode):
  """GSPMD, as long as JAX has it."""
  (w,) = data((64, 256))
  jax.config.update("jax_use_shardy_partitioner", False)
  try:
    for spec in SPECS:
      placed = place(w, mesh_of(), spec)
      executable = jax.jit(functools.partial(jaxqq.quantize, mode=mode)).lower(placed).compile()
      got = executable(placed)
      dequantize = functools.partial(jaxqq.dequantize, mode=mode, dtype=jnp.float32)
      back = jax.jit(dequantize).lower(*got).compile()
      assert collectives(executable) == collectives(back) == []
      assert_quantized(got, w, mode)
      assert_dequantized(back(*got), *got, mode)
  finally:
    jax.config.update("jax_use_shardy_partitioner", True)


@QUICK
def test_eagerly_on_sharded_arrays():
  (w,) = data((64, 256))
  got = jaxqq.quantize(place(w, mesh_of(), P("data", "tensor")))
  assert_quantized(got, w, "nvfp4")
  back = jaxqq.dequantize(*got, dtype=jnp.float32)
  assert_dequantized(back, *got, "nvfp4")
  assert back.sharding.is_equivalent_to(NamedSharding(mesh_of(), P("data", "tensor")), 2)


def test_empty_axes_on_a_mesh():
  for shape in ((8, 0, 64), (8, 16, 0)):
    w = jnp.zeros(shape)
    for kind in (AxisType.Auto, AxisType.Explicit):
      packed, scales = jax.jit(jaxqq.quantize)(place(w, mesh_of(kind), P("data")))
      assert packed.shape == (*shape[:2], shape[2] // 8)
      assert scales.shape == (*shape[:2], shape[2] // 16)
      assert jax.jit(jaxqq.dequantize)(packed, scales).shape == shape


# Explicit axes


@QUICK
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@EACH_KIND
def test_explicit_axes(kind, spec, axis):
  """Types say that results are split as operands, and nothing moves."""
  quantize, dequantize, mode, scaled = converters(kind, axis)
  (w,) = data((256, 256))
  scale = (amax(w),) if scaled else ()
  out = P(*transposed_spec(P(*spec, *(None,) * (2 - len(spec))), axis))
  with jax.set_mesh(mesh_of(AxisType.Explicit)):
    placed = place(w, mesh_of(AxisType.Explicit), spec)
    executable = jax.jit(quantize).lower(placed, *scale).compile()
    assert [a.sharding.spec for a in jax.eval_shape(quantize, placed, *scale)] == [out, out]
    got = executable(placed, *scale)
    back_executable = jax.jit(dequantize).lower(*got, *scale).compile()
    assert collectives(executable) == collectives(back_executable) == []
    back = back_executable(*got, *scale)
    assert [a.sharding.spec for a in (*got, back)] == [out] * 3
    vmapped = jax.vmap(quantize, (0, *(None,) * scaled))
    stack = place(jnp.stack([w, 2 * w]), mesh_of(AxisType.Explicit), P(None, *spec))
    assert_quantized(jax.jit(vmapped)(stack, *scale), stack, mode, *scale, axis=axis)
  assert_quantized(got, w, mode, *scale, axis=axis)
  assert_dequantized(back, *got, mode, *scale)


@QUICK
def test_explicit_axes_that_would_cut_a_group_or_differ():
  mesh = mesh_of(AxisType.Explicit)
  (w,) = data((8, 96))
  with jax.set_mesh(mesh):
    got = jax.jit(jaxqq.quantize)(place(w, mesh, P("tensor", "data")))
    assert [a.sharding.spec for a in got] == [P("tensor", None)] * 2
    assert_quantized(got, w, "nvfp4")
    packed, scales = (jax.sharding.reshard(a, P()) for a in got)
    one_of_them = jax.jit(jaxqq.dequantize)(place(packed, mesh, P("data")), scales)
    assert one_of_them.sharding.spec == P("data", None)
    with pytest.raises(sharding_error(), match=r"^dequantize: an axis is split over 'data' in "):
      jaxqq.dequantize(place(packed, mesh, P("data")), place(scales, mesh, P("tensor")))
    with pytest.raises(sharding_error(), match=r"^dequantize: two axes of the result would be "):
      jaxqq.dequantize(place(packed, mesh, P("tensor")), place(scales, mesh, P(None, "tensor")))


@QUICK
def test_some_axes_explicit_and_others_not():
  """XLA's to split, and those of a shard_map around."""
  (w,) = data((64, 256))
  for kinds in ((AxisType.Explicit, AxisType.Auto), (AxisType.Auto, AxisType.Explicit)):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=kinds)
    with jax.set_mesh(mesh):
      got = jax.jit(jaxqq.quantize)(place(w, mesh, P("data", "tensor")))
      back = jax.jit(functools.partial(jaxqq.dequantize, dtype=jnp.float32))(*got)
    assert_quantized(got, w, "nvfp4")
    assert_dequantized(back, *got, "nvfp4")
  mesh = mesh_of(AxisType.Explicit)
  with jax.set_mesh(mesh):
    f = jax.shard_map(jaxqq.quantize, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    got = jax.jit(f)(place(w, mesh, P("data", "tensor")))
  assert_quantized(got, w, "nvfp4")
  assert [a.sharding.spec for a in got] == [P("data", "tensor")] * 2


# Export


@pytest.mark.parametrize("kind", ["Auto", "Explicit", "none"])
@QUICK
def test_export(kind):
  """cpu and cuda in one artifact, which runs without jaxqq; sizes known or not."""
  (w,) = data((16, 256))
  f = jax.jit(lambda w: jaxqq.quantize(w, mode="mxfp8"))
  if kind != "none":
    w = place(w, mesh_of(AxisType[kind]), P("data", "tensor"))
  exported = export.export(f, platforms=("cpu", "cuda"))(w)
  back = export.deserialize(exported.serialize())
  assert_quantized(jax.jit(back.call)(w), w, "mxfp8")


def test_export_of_symbolic_sizes():
  (w,) = data((6, 96))
  rows, groups = export.symbolic_shape("rows, groups")
  shape = jax.ShapeDtypeStruct((rows, 32 * groups), jnp.float32)

  def f(w):
    got = jaxqq.quantize(w, mode="mxfp8")
    return got, jaxqq.dequantize(*got, mode="mxfp8", dtype=jnp.float32)

  exported = export.export(jax.jit(f), platforms=("cpu", "cuda"))(shape)
  exported = export.deserialize(exported.serialize())
  for m, k in ((6, 96), (2, 32)):
    got, back = exported.call(w[:m, :k])
    assert_quantized(got, w[:m, :k], "mxfp8")
    assert_dequantized(back, *got, "mxfp8")
