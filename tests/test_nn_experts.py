"""Layers of experts of Flax NNX against float64: sorted rows, tokens, buffers, packed and not."""

from __future__ import annotations

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxqq
import jaxqq.nn
from tests.support import oracle, ragged
from tests.support.training import falls

E, K, N, TOKENS, TOP = 5, 64, 96, 9, 2
M = TOKENS * TOP
NORMAL = nnx.initializers.normal()
# mode, global_scale, quantize_input, dtype of the computation
CASES = {
  "nvfp4": ("nvfp4", "weight", True, None),
  "nvfp4, inputs scaled": ("nvfp4", "amax", True, "bfloat16"),
  "nvfp4, rows scaled": ("nvfp4", "row", True, None),
  "nvfp4, unscaled weights alone": ("nvfp4", None, False, "bfloat16"),
  "mxfp8": ("mxfp8", None, True, "bfloat16"),
  "mxfp4, weights alone": ("mxfp4", None, False, None),
}


def random(shape, seed=0, dtype="float32"):
  return oracle.random(np.random.default_rng(seed), shape, dtype)


def spread(kernel):
  """Experts far apart in size, so that one global scale for all would show."""
  return kernel * np.float32(10.0) ** (np.arange(len(kernel)) - 3).reshape(-1, 1, 1)


def linear(mode="mxfp8", global_scale=None, **options):
  layer = jaxqq.nn.QQExpertLinear(
    E, K, N, mode=mode, global_scale=global_scale, rngs=nnx.Rngs(0), **options
  )
  layer.kernel[...] = jnp.asarray(spread(random((E, K, N), 1)))
  return layer


def row_scaled(x):
  """Each row by a power of two to where nvfp4's scales reach, quantized, and back."""
  amax = np.max(np.abs(x.astype(np.float64)), axis=-1, keepdims=True)
  power = 2.0 ** np.ceil(np.log2(amax / 2688))
  return oracle.round_trip((x / power).astype(np.float32), "nvfp4", 2688.0) * power


def x_hat_of(x, mode, scale, quantize):
  if not quantize:
    return x.astype(np.float64)
  if scale == "row":
    return row_scaled(x)
  amax = np.max(np.abs(x.astype(np.float32)))
  return oracle.round_trip(x, mode, {"weight": np.float32(2688), "amax": amax}.get(scale))


def w_hat_of(kernel, mode, scale, dtype):
  """(E, N, K), each expert under its own amax."""
  w = kernel.swapaxes(1, 2).astype(dtype or "float32")
  each = [None if scale is None else np.max(np.abs(a.astype(np.float32))) for a in w]
  return np.stack([oracle.round_trip(a, mode, amax) for a, amax in zip(w, each, strict=True)])


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_in_groups_and_buffers(case):
  """Unpacked and packed, by the bounds of the oracle."""
  mode, scale, quantize, dtype = case
  layer = linear(mode, scale, quantize_input=quantize, dtype=dtype and jnp.dtype(dtype))
  w_hat = w_hat_of(np.asarray(layer.kernel[...]), mode, scale, dtype and jnp.dtype(dtype))
  x = random((M, K), 2, dtype or "float32")
  sizes = np.int32([4, 0, 7, 1, 2])  # below M
  of_row = ragged.groups_of(sizes, M)
  in_buffers = random((E, 3, K), 3, dtype or "float32")
  exact, mag = ragged.product(x_hat_of(x, mode, scale, quantize), w_hat, of_row)
  of_buffers = np.stack([x_hat_of(a, mode, scale, quantize) for a in in_buffers])
  outs = []
  for packed in (False, True):
    if packed:
      layer.pack()
    run = jax.jit(lambda layer, x, sizes, buffers: (layer(x, sizes), layer.buffers(buffers)))
    out, got = map(np.asarray, run(layer, x, sizes, in_buffers))
    oracle.assert_within_bound(out, exact, mag)
    oracle.assert_within_bound(got, *oracle.product(of_buffers, w_hat))
    assert out.dtype == x.dtype and not out[of_row < 0].any()
    outs.append((out, got))
  np.testing.assert_array_equal(outs[0][0], outs[1][0])
  np.testing.assert_array_equal(outs[0][1], outs[1][1])
  layer.unpack()
  assert layer.kernel.shape == (E, K, N)
  np.testing.assert_allclose(layer.kernel[...].swapaxes(1, 2), w_hat, rtol=1e-6, atol=0)


def experts(kind=jaxqq.nn.QQExperts, **options):
  options = {"use_bias": True, "bias_init": NORMAL, **options}
  if kind is jaxqq.nn.QQExperts:
    options = {"mode": "mxfp8", **options}
  return kind(E, K, N, rngs=nnx.Rngs(3), **options)


@jax.jit
def run(layer, *args):
  return layer(*args)


@jax.jit
def each_and_total(layer, x, numbers, weights):
  return layer(x, numbers), layer(x, numbers, weights)


def routed(seed=4, dtype="float32"):
  """Tokens, numbers of their experts (some none at all), and weights."""
  rng = np.random.default_rng(seed)
  numbers = np.stack([rng.permutation(E)[:TOP] for _ in range(TOKENS)]).astype(np.int32)
  numbers[1, 0], numbers[2], numbers[3, 1] = -1, E, -7
  numbers = np.where(numbers == 3, 0, numbers).reshape(3, 3, TOP)  # expert 3 has no token
  weights = rng.uniform(size=numbers.shape).astype(np.float32)
  return random((3, 3, K), seed, dtype), numbers, weights


def dense(layer, x, trip=lambda a: a.astype(np.float64)):
  """Every expert of every token, (E, tokens, K), in float64."""
  of = lambda part: np.float64(part.kernel[...])  # noqa: E731
  silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
  out = []
  for e in range(E):

    def product(part, a, e=e):
      w = trip(np.float32(of(part)[e].T))
      return trip(np.float32(a)) @ w.T + (0 if part.bias is None else np.float64(part.bias[...])[e])

    up = product(layer.up_proj, x)
    hidden = silu(product(layer.gate_proj, x)) * up if layer.gate_proj is not None else silu(up)
    out.append(product(layer.down_proj, hidden))
  return np.stack(out)


def chosen_of(all_experts, numbers):
  """(tokens, top, K): zeros of what is no expert."""
  flat = numbers.reshape(-1, TOP)
  is_one = (flat >= 0) & (flat < E)
  rows = np.arange(len(flat))[:, None]
  return np.where(is_one[..., None], all_experts[np.where(is_one, flat, 0), rows], 0)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("gated", [True, False])
def test_tokens_are_those_of_every_expert_in_float64(gated):
  """Plain ones to rounding; quantized ones as their own rounded operands are."""
  x, numbers, weights = routed()
  for kind in (jaxqq.nn.Experts, jaxqq.nn.QQExperts):
    layer = experts(kind, gated=gated)
    trip = lambda a: oracle.round_trip(a, "mxfp8")  # noqa: E731
    of_all = dense(layer, x.reshape(-1, K), *([] if kind is jaxqq.nn.Experts else [trip]))
    want = chosen_of(of_all, numbers)
    each, total = each_and_total(layer, x, numbers, weights)
    assert each.shape == (3, 3, TOP, K) and total.shape == (3, 3, K)
    # A hidden number on the edge of two codes may be rounded to either.
    tolerance = 1e-5 if kind is jaxqq.nn.Experts else 2e-3
    assert oracle.relative_error(np.asarray(each).reshape(want.shape), want) < tolerance
    assert not np.asarray(each)[(numbers < 0) | (numbers >= E)].any()
    summed = np.sum(np.float64(each) * weights[..., None], axis=-2)
    np.testing.assert_allclose(total, summed, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("quick_compiles")
def test_tokens_rows_and_buffers_agree():
  """One layer, called in three ways, packed in between."""
  layer = experts(global_scale="weight", mode="nvfp4", gated=False)
  x, numbers, _ = routed()
  numbers = np.clip(numbers, 0, E - 1)
  of_tokens = lambda: np.asarray(run(layer, x, numbers)).reshape(-1, K)  # noqa: E731
  before = of_tokens()
  jaxqq.nn.pack(layer)
  np.testing.assert_array_equal(of_tokens(), before)
  flat = numbers.reshape(-1)
  order = np.argsort(flat, kind="stable")
  rows = np.repeat(x.reshape(-1, K), TOP, axis=0)[order]
  sizes = np.bincount(flat, minlength=E)
  grouped = np.asarray(jax.jit(lambda layer, *args: layer.grouped(*args))(layer, rows, sizes))
  np.testing.assert_array_equal(grouped, before[order])
  buffers = np.zeros((E, int(sizes.max()), K), np.float32)
  place = [(e, i) for e, size in enumerate(sizes) for i in range(size)]
  buffers[tuple(np.transpose(place))] = rows
  got = np.asarray(jax.jit(lambda layer, x: layer.buffers(x))(layer, buffers))[
    tuple(np.transpose(place))
  ]
  np.testing.assert_allclose(got, grouped, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_gradients_are_those_of_plain_products(backward):
  """Of inputs, kernels, biases and router weights: each row by `qqmm` with its expert's kernel."""
  layer = jaxqq.nn.QQExpertLinear(
    2, 64, 32, mode="mxfp8", backward=backward, use_bias=True, bias_init=NORMAL, rngs=nnx.Rngs(0)
  )
  x, sizes = random((8, 64), 1), np.int32([3, 4])

  def loss(layer, x):
    return jnp.sum(jnp.sin(layer(x, sizes)))

  def plain(parts, x):
    kernel, bias = parts
    out = [
      jaxqq.qqmm(x[a:b], kernel[e].T, mode="mxfp8", backward=backward) + bias[e][None]
      for e, (a, b) in enumerate([(0, 3), (3, 7)])
    ]
    return jnp.sum(jnp.sin(jnp.concatenate(out)))

  of_loss = nnx.value_and_grad(loss, argnums=(0, 1))
  value, (of_layer, of_x) = nnx.jit(of_loss)(layer, x)
  parts = layer.kernel[...], layer.bias[...]
  wanted, (want, want_x) = jax.jit(jax.value_and_grad(plain, (0, 1)))(parts, x)
  assert oracle.relative_error(value, wanted) < 1e-6
  for got, one in zip((of_layer["kernel"], of_layer["bias"], of_x), (*want, want_x), strict=True):
    assert oracle.relative_error(np.asarray(got[...]), np.asarray(one)) < 1e-5
  assert not np.asarray(of_x)[7:].any()


@pytest.mark.usefixtures("quick_compiles")
def test_trains_packs_and_is_trained_further():
  layer = experts(gated=False)
  x, numbers, weights = routed()
  target = jnp.sin(2 * x)

  graph, params, rest = nnx.split(layer, nnx.Param, ...)
  of_params = lambda params: nnx.merge(graph, params, rest)(x, numbers, weights)  # noqa: E731
  falls(lambda params: jnp.mean((of_params(params) - target) ** 2), params)
  _, before = each_and_total(layer, x, numbers, weights)
  jaxqq.nn.pack(layer)
  each, total = each_and_total(layer, x, numbers, weights)
  np.testing.assert_array_equal(total, before)
  of_both = nnx.grad(lambda layer, weights: jnp.sum(layer(x, numbers, weights)), argnums=(0, 1))
  of_packed, of_weights = nnx.jit(of_both)(layer, weights)
  paths = {".".join(map(str, path)) for path in nnx.to_flat_state(of_packed).paths}
  assert paths == {f"{name}_proj.bias" for name in ("up", "down")}
  np.testing.assert_allclose(of_weights, np.sum(each, axis=-1), rtol=1e-4, atol=1e-4)
  jaxqq.nn.unpack(layer)
  _, total = each_and_total(layer, x, numbers, weights)
  np.testing.assert_allclose(total, before, rtol=1e-4, atol=1e-4)


def test_a_model_is_converted():
  """`quantize_model` takes the linear layers of `Experts`; the report says so."""

  class Model(nnx.Module):
    def __init__(self):
      self.router = nnx.Linear(K, E, rngs=nnx.Rngs(0))
      self.experts = experts(jaxqq.nn.Experts)

  model = Model()
  kernel = model.experts.up_proj.kernel
  before = nnx.to_flat_state(nnx.state(model)).paths
  keep = lambda path, layer: path != "router"  # noqa: E731
  report = jaxqq.nn.quantize_model(model, "mxfp8", predicate=keep)
  assert nnx.to_flat_state(nnx.state(model)).paths == before
  assert report["experts.up_proj"].kind == "ExpertLinear"
  assert report["experts.up_proj"].shape == (E, K, N)
  assert len(report.converted) == 3 and not report.lossy
  assert model.experts.up_proj.kernel is kernel
  x, numbers, weights = routed()
  _, want = each_and_total(experts(jaxqq.nn.QQExperts), x, numbers, weights)
  _, total = each_and_total(model.experts, x, numbers, weights)
  np.testing.assert_array_equal(total, want)
  jaxqq.nn.pack(model)
  _, total = each_and_total(model.experts, x, numbers, weights)
  np.testing.assert_array_equal(total, want)

  abstract = nnx.eval_shape(Model)
  report = jaxqq.nn.quantize_model(abstract, packed=True, predicate=keep)
  weight = abstract.experts.down_proj.weight
  assert (weight.shape, weight.global_scale.shape) == ((E, K, N), (E,))
  again = jaxqq.nn.quantize_model(abstract)
  assert again["experts.up_proj"].reason == "it is quantized already"

  by_name = jaxqq.nn.quantize_model(Model(), "mxfp8", implementation="xla")
  assert [layer.path for layer in by_name.converted] == ["router"]
  assert "no implementation by name" in by_name["experts.up_proj"].reason


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("mode", "of_einsum"), [("mxfp8", None), ("nvfp4", "amax"), ("nvfp4", "weight")]
)
def test_an_einsum_over_buffers_shares_the_kernel(mode, of_einsum):
  """In nvfp4 an einsum has a global scale for each expert with "amax" alone; else it is refused."""
  layer = linear(mode, "weight" if mode == "nvfp4" else None)
  einsum = jaxqq.nn.QQEinsum(
    "ecd,edf->ecf", (E, K, N), mode=mode, global_scale=of_einsum, rngs=nnx.Rngs(1)
  )
  einsum.kernel = layer.kernel
  model = nnx.List([layer, einsum])
  if of_einsum == "weight":
    with pytest.raises(ValueError, match="packs it in another way"):
      jaxqq.nn.pack(model)
    return
  x = random((E, 3, K))
  run = jax.jit(lambda model, x: (model[1](x), model[0].buffers(x)))
  before = run(model, x)
  jaxqq.nn.pack(model)
  assert einsum.packed is layer.packed
  assert einsum.dot_general.global_scale == of_einsum  # what its inputs get
  jax.tree.map(np.testing.assert_array_equal, run(model, x), before)


@pytest.mark.usefixtures("quick_compiles")
def test_a_layer_of_weights_that_exist():
  weight = jaxqq.quantize_weight(random((E, N, K)))
  bias, x, sizes = random((E, N)), random((M, K)), np.int32([4, 0, 7, 1, 2])
  layer = jaxqq.nn.QQExpertLinear.from_weight(weight, bias)
  buffers = random((E, 3, K))
  of_buffers = jax.jit(lambda layer, x: layer.buffers(x))(layer, buffers)
  np.testing.assert_array_equal(of_buffers, jax.jit(jaxqq.qqmm)(buffers, weight) + bias[:, None])
  without = jaxqq.nn.QQExpertLinear.from_weight(weight, quantize_input=False)
  of_row = ragged.groups_of(sizes, M)
  rows = np.where((of_row < 0)[:, None], 0, bias[of_row])
  multiplied = jax.jit(jaxqq.ragged_qqmm)(x, weight, sizes)
  np.testing.assert_array_equal(run(layer, x, sizes), multiplied + rows)
  want = jax.jit(jaxqq.ragged_quantized_matmul)(x, weight, sizes)
  np.testing.assert_array_equal(run(without, x, sizes), want)
  static = np.arange(1, E + 1, dtype=np.float32)
  layer.set_weight(dataclasses.replace(weight, input_global_scale=static))
  layer.bias = nnx.data(None)
  scaled = jax.jit(lambda *args: jaxqq.ragged_qqmm(*args, global_scale_x=static))
  np.testing.assert_array_equal(run(layer, x, sizes), scaled(x, weight, sizes))


def test_experts_begin_as_dense_layers_do():
  """Fans are those of one expert, whatever their number."""
  layer = jaxqq.nn.ExpertLinear(64, 64, 64, rngs=nnx.Rngs(0))
  dense = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
  assert float(jnp.std(layer.kernel[...])) == pytest.approx(
    float(jnp.std(dense.kernel[...])), rel=0.05
  )


@pytest.mark.usefixtures("quick_compiles")
def test_plain_experts_of_one_device():
  """Groups before and behind those that are here, or none of them at all: one program."""
  layer = jaxqq.nn.ExpertLinear(2, K, N, use_bias=True, bias_init=NORMAL, rngs=nnx.Rngs(0))
  x, sizes = random((M, K)), np.int32([4, 0, 7, 1, 2])
  w = np.asarray(layer.kernel[...]).swapaxes(1, 2)
  for offset in (-2, 0, 2, 3, 4, 7):
    of_row = ragged.groups_of(sizes, M, offset, 2)
    exact, _ = ragged.product(np.float64(x), np.float64(w), of_row)
    bias = np.where((of_row < 0)[:, None], 0, np.float64(layer.bias[...])[of_row])
    got = run(layer, x, sizes, np.int32(offset))
    np.testing.assert_allclose(got, exact + bias, rtol=1e-5, atol=1e-5)


DOCUMENTED = [
  "ExpertLinear",
  "QQExpertLinear",
  "QQExpertLinear.from_weight",
  "Experts",
  "QQExperts",
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_in_docstrings(name):
  function = jaxqq.nn
  for part in name.split("."):
    function = getattr(function, part)
  names = {"jax": jax, "jnp": jnp, "jaxqq": jaxqq, "nnx": nnx}
  example = doctest.DocTestParser().get_doctest(function.__doc__, names, name, None, 0)
  assert example.examples
  assert doctest.DocTestRunner().run(example).failed == 0
