"""`jaxqq.Recipe` and products by one: against published formulas in numpy, and transformed."""

from __future__ import annotations

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxqq
from jaxqq import Quantizer, Recipe, _recipe_product
from jaxqq._recipe import OPERANDS
from jaxqq._reference import Operands
from tests.support import oracle, recipes
from tests.support.examples import load_example
from tests.support.messages import check_sentence
from tests.support.recipes import Spec
from tests.support.sharding import QUICK, collectives, explicit_mesh, place

pytestmark = QUICK

KEY = jax.random.key(11)
M, N, K = 24, 48, 64  # M is no whole number of groups of mxfp8, nor are both of rotations of 32

ROW, SQUARE = Spec(), Spec(square=True)
STOCHASTIC = Spec(rounding="stochastic")
FOUR_OVER_SIX = Spec(scale="four_over_six")
UNBIASED = Spec(rotation=128, scale="unbiased")
# x and w forward; g and w for dx; g and x for dw: as the papers have them.
PUBLISHED = {
  "nvfp4": (
    *(ROW, SQUARE, STOCHASTIC, SQUARE),
    *(Spec(rounding="stochastic", rotation=16), Spec(rotation=16)),
  ),
  "nvfp4-4over6": (
    *(FOUR_OVER_SIX, Spec(square=True, scale="four_over_six")),
    *(STOCHASTIC, Spec(square=True, scale="four_over_six")),
    *(Spec(rounding="stochastic", rotation=16), Spec(rotation=16)),
  ),
  "mxfp8": 6 * (Spec("mxfp8"),),
  "quartet2": (FOUR_OVER_SIX, FOUR_OVER_SIX, *4 * (UNBIASED,)),
}
OTHERS = {
  "all random": Recipe(
    *2 * [Quantizer("mxfp8", rounding="stochastic")],
    *4 * [Quantizer("nvfp4", rounding="stochastic", rotation=32)],
  ),
  "forward as it is": dataclasses.replace(Recipe.named("nvfp4"), forward_x=None, forward_w=None),
  "dequantized w and x": Recipe(*2 * [Quantizer(rounding="stochastic")], from_forward=True),
  "g alone": Recipe(dx_g=Quantizer(rounding="stochastic"), dw_g=Quantizer(rounding="stochastic")),
}


def recipe_of(name):
  return OTHERS[name] if name in OTHERS else Recipe.named(name)


def specs_of(name):
  if name in PUBLISHED:
    return PUBLISHED[name]
  values = (getattr(OTHERS[name], field) for field in OPERANDS)
  return [None if value is None else Spec.of(value) for value in values]


def key_for(recipe, key=KEY):
  return key if recipe.needs_key else None


def numbers(shape, seed):
  """Short enough that sums of rotations are exact, over some binades."""
  rng = np.random.default_rng(seed)
  a = rng.standard_normal(shape) * 2.0 ** rng.integers(-3, 3, shape)
  return (np.round(a * 2**10) / 2**10).astype(np.float32)


@pytest.fixture(scope="module")
def operands():
  return numbers((M, K), 0), numbers((N, K), 1), numbers((M, N), 2)


def product(recipe, x, w, key=KEY):
  return jaxqq.qqmm(x, w, recipe=recipe, key=key_for(recipe, key))


@functools.partial(jax.jit, static_argnums=0)
def all_three(recipe, x, w, g, key):
  """y, dx, dw."""
  y, pull = jax.vjp(lambda x, w: product(recipe, x, w, key), x, w)
  return y, *pull(g)


# Recipes


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_recipes_are_the_published_ones(name):
  recipe = Recipe.named(name)
  assert tuple(Spec.of(getattr(recipe, field)) for field in OPERANDS) == PUBLISHED[name]
  assert recipe.from_forward == (name == "quartet2")
  assert Recipe.named(name) == recipe_of(name) and hash(Recipe.named(name)) == hash(recipe_of(name))


def products(name, x, w, g):
  """y, dx and dw of the dequantized operands, quantized as the formulas have it, in float64.

  Each with what bounds the error of its sums.
  """
  data = np.asarray(jax.random.key_data(KEY))
  specs, left = specs_of(name), (x, w)
  if recipe_of(name).from_forward:  # in their own dtype
    left = (recipes.left_of(a, specs[i], data, (i, 2)).astype(a.dtype) for i, a in enumerate(left))
  x_left, w_left = left
  for index, pair in enumerate(((x, w), (g, w_left.T), (g.T, x_left.T))):
    first, second, of_signs = range(3 * index, 3 * index + 3)
    hats = [
      recipes.left_of(a, spec, data, (own, of_signs))
      for a, spec, own in zip(pair, specs[2 * index :], (first, second), strict=False)
    ]
    longest = max(hat.shape[-1] for hat in hats)  # with zeros up to whole groups
    hats = [np.pad(hat, [(0, 0), (0, longest - hat.shape[-1])]) for hat in hats]
    yield oracle.product(*hats)


@pytest.mark.parametrize("name", [*PUBLISHED, *OTHERS])
def test_six_operands_in_three_products(name, operands):
  dtype = np.dtype(oracle.DTYPES["bfloat16" if name == "quartet2" else "float32"])
  x, w, g = (a.astype(dtype) for a in operands)
  outs = all_three(recipe_of(name), x, w, g, KEY)
  for out, want in zip(outs, products(name, x, w, g), strict=True):
    oracle.assert_within_bound(np.asarray(out), *want)


def test_gradients_of_what_the_forward_product_left(operands):
  """Of each matrix of a batch, by the same random bits: seen by ones on a diagonal."""
  recipe = Recipe(forward_w=Quantizer(rounding="stochastic"), from_forward=True)
  w = jnp.stack([operands[1], operands[1]])
  x, g = (jnp.broadcast_to(jnp.eye(K, n), (2, K, n)) for n in (K, N))
  left, dx, _ = jax.jit(functools.partial(all_three, recipe))(x, w, g, KEY)
  np.testing.assert_allclose(dx[:, :N], left.swapaxes(1, 2), rtol=1e-6)
  assert (left[0] != left[1]).any()


@pytest.mark.parametrize("exponent", [-13, -16, -20, -24])
def test_what_is_left_may_be_subnormal(exponent):
  """float16 has multiples of 2**-24 below 2**-14: rounded as numpy rounds to them."""
  recipe = Recipe(Quantizer(), Quantizer(), from_forward=True)
  rng = np.random.default_rng(0)
  x = np.ldexp(rng.standard_normal((16, 64)), exponent).astype(np.float16)
  packed, scales, global_scale = Quantizer().quantize(x)
  codes, w = oracle.unpack(np.asarray(packed), "nvfp4"), np.ones((16, 64), np.float16)
  want = oracle.values(codes, np.asarray(scales), "nvfp4") * (np.float64(global_scale) / 2688)
  want = want.astype(np.float32).astype(np.float16)

  @jax.jit
  def dw(x):
    _, pull = jax.vjp(lambda w: jaxqq.qqmm(x, w, recipe=recipe), w)
    return pull(jnp.eye(16, dtype=jnp.float16))[0]

  assert want.any()
  np.testing.assert_array_equal(dw(x), want)


@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_what_qqmm_has_without_one_are_recipes(mode, backward, operands):
  """Their products are qqmm's own; and the recipe's primitives compute the same."""
  recipe = Recipe.of_mode(mode, backward)
  assert recipe.as_mode() == (mode, backward)
  amax = "amax" if mode == "nvfp4" else None
  x, w, g = map(jnp.asarray, operands)

  def plain(x, w):
    return jaxqq.qqmm(x, w, mode=mode, global_scale_x=amax, global_scale_w=amax, backward=backward)

  def by_primitives(x, w):
    params = _recipe_product.Params(recipe, np.dtype(np.float32), None)
    return _recipe_product.product_of_rows(Operands(x, w), params)

  y, pull = jax.vjp(plain, x, w)
  want = (y, *pull(g))
  for a, b in zip(all_three(recipe, x, w, g, KEY), want, strict=True):
    np.testing.assert_array_equal(a, b)
  y, pull = jax.vjp(by_primitives, x, w)
  for a, b in zip((y, *pull(g)), want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


PRECISIONS = (None, jax.lax.Precision.HIGHEST)


def multiply_on_tpu(x, w, precision):
  bfloat16 = np.dtype(oracle.DTYPES["bfloat16"])
  params = _recipe_product.Params(Recipe.named("nvfp4-4over6"), bfloat16, precision)
  ops = Operands(x, w, key=jnp.zeros(4, jnp.uint32))
  return _recipe_product.run(ops, params, platform="tpu")


@pytest.fixture(scope="module")
def on_tpu(operands):
  """Operands in bfloat16, and their products by one program, which quantizes once."""
  x, w = (a.astype(oracle.DTYPES["bfloat16"]) for a in operands[:2])
  outs = jax.jit(lambda x, w: [multiply_on_tpu(x, w, precision) for precision in PRECISIONS])(x, w)
  return x, w, dict(zip(PRECISIONS, map(np.asarray, outs), strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_matrix_units(precision, on_tpu):
  """Off a CPU, operands that 16 bits hold exactly are multiplied in them for 16-bit results."""
  x, w, outs = on_tpu
  dtype = np.dtype(np.float32 if precision else oracle.DTYPES["bfloat16"])
  equations = jax.make_jaxpr(functools.partial(multiply_on_tpu, precision=precision))(x, w).eqns
  (dot,) = (own for own in equations if own.primitive.name == "dot_general")
  assert [operand.aval.dtype for operand in dot.invars] == 2 * [dtype]
  specs = specs_of("nvfp4-4over6")[:2]
  hats = [recipes.left_of(a, spec, None, (0, 0)) for a, spec in zip((x, w), specs, strict=True)]
  oracle.assert_within_bound(outs[precision], *oracle.product(*hats), highest=precision is not None)


def test_small_cotangents_are_kept(operands):
  """g has its own amax: gradients of 2**-30 of these are theirs times 2**-30."""
  x, w, g = operands
  small = np.float32(2.0**-30)
  for name in ("nvfp4", "nvfp4-4over6"):
    recipe = recipe_of(name)
    want = all_three(recipe, x, w, g, KEY)[1:]
    for a, b in zip(all_three(recipe, x, w, g * small, KEY)[1:], want, strict=True):
      np.testing.assert_allclose(a / small, b, rtol=1e-5, atol=1e-5)
      assert np.abs(np.asarray(b)).max() > 1


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_dtypes(dtype, operands):
  x, w, g = (a.astype(oracle.DTYPES[dtype]) for a in operands)
  outs = all_three.lower(Recipe.named("nvfp4"), x, w.astype(np.float32), g, KEY).out_info
  assert [out.dtype for out in outs] == [x.dtype, x.dtype, np.float32]

  @jax.jit
  def both(x, w):  # by one program, which quantizes once
    whole = jaxqq.qqmm(x, w, recipe="nvfp4", key=KEY, preferred_element_type="float32")
    return product(Recipe.named("nvfp4"), x, w.astype(jnp.float32)), whole

  y, whole = both(x, w)
  assert y.dtype == x.dtype and whole.dtype == np.float32
  np.testing.assert_allclose(np.asarray(y, np.float32), whole, rtol=2**-8, atol=1e-6)


# Transformations


def test_the_gradient_is_the_mean_of_gradients(operands):
  """Over keys dx comes to g w_hat and dw to g^T x: nothing of g is lost on the average."""
  x, w, g = (a[:16, :32] for a in operands)
  recipe = dataclasses.replace(Recipe.named("nvfp4"), dx_w=None, dw_x=None, dw_g=None)
  keys = jax.random.split(KEY, 2048)
  _, dx, _ = jax.vmap(lambda key: all_three(recipe, x, w, g[:, :16], key))(keys)
  dx, exact = np.asarray(dx, np.float64), g[:, :16].astype(np.float64) @ w
  error = dx.std(axis=0) / np.sqrt(len(keys))
  assert (np.abs(dx.mean(axis=0) - exact) < 4.5 * error + 1e-6).all()
  nearest = all_three(dataclasses.replace(recipe, dx_g=Quantizer()), x, w, g[:, :16], KEY)[1]
  assert (np.abs(nearest - exact) > 4.5 * error).any()


def test_forward_mode_and_second_derivatives_are_straight_through(operands):
  x, w, g = map(jnp.asarray, operands)
  x_dot, w_dot = jnp.asarray(numbers((M, K), 3)), jnp.asarray(numbers((N, K), 4))
  recipe = Recipe.named("nvfp4")

  @jax.jit
  def derivatives(x, w):
    _, tangent = jax.jvp(lambda x, w: product(recipe, x, w), (x, w), (x_dot, w_dot))
    gradient = jax.grad(lambda x, w: jnp.vdot(g, product(recipe, x, w)), argnums=(0, 1))
    return tangent, jax.jvp(gradient, (x, w), (x_dot, w_dot))

  tangent, (first, second) = derivatives(x, w)
  np.testing.assert_allclose(tangent, x_dot @ w.T + x @ w_dot.T, rtol=1e-5, atol=1e-3)
  for own, want in zip(first, all_three(recipe, x, w, g, KEY)[1:], strict=True):
    np.testing.assert_array_equal(own, want)
  np.testing.assert_allclose(second[0], g @ w_dot, rtol=1e-5, atol=1e-3)
  np.testing.assert_allclose(second[1], g.T @ x_dot, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("batched", ["x", "w key"])
def test_vmap_is_a_loop(batched, operands):
  """Each example is a tensor of its own: its amax, its places, its key."""
  x, w, g = map(jnp.asarray, operands)
  axes = [0 if name in batched.split() else None for name in ("x", "w", "key")]
  all_x, all_w = jnp.stack([x, 3 * x[::-1]]), jnp.stack([w, 2 * w[::-1]])
  arrays = [
    all_x if axes[0] == 0 else x,
    all_w if axes[1] == 0 else w,
    jax.random.split(KEY, 2) if axes[2] == 0 else KEY,
  ]
  recipe = Recipe.named("nvfp4")
  one = functools.partial(all_three, recipe)
  outs = jax.vmap(one, in_axes=(axes[0], axes[1], None, axes[2]))(*arrays[:2], g, arrays[2])
  for i in range(2):
    own = [a[i] if axis == 0 else a for a, axis in zip(arrays, axes, strict=True)]
    for out, want in zip(outs, one(*own[:2], g, own[2]), strict=True):
      np.testing.assert_allclose(out[i], want, rtol=1e-6, atol=1e-5)

  def loss(w):  # summed over the examples after each is quantized
    return jnp.sum(jax.vmap(lambda x: jnp.vdot(g, product(recipe, x, w)))(all_x))

  if batched == "x":
    want = sum(one(a, w, g, KEY)[2] for a in all_x)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(w), want, rtol=1e-5, atol=1e-4)


def test_scan_and_remat_have_the_same_bits(operands):
  x, w, g = map(jnp.asarray, operands)
  keys = jax.random.split(KEY, 2)
  recipe = Recipe.named("nvfp4")
  want = [all_three(recipe, x, w, g, key) for key in keys]
  _, scanned = jax.lax.scan(lambda c, key: (c, all_three(recipe, x, w, g, key)), 0, keys)
  block = jax.checkpoint(lambda x, w: jnp.vdot(g, product(recipe, x, w, keys[0])))
  for own, right in zip(jax.jit(jax.grad(block, (0, 1)))(x, w), want[0][1:], strict=True):
    np.testing.assert_array_equal(own, right)
  for i in range(2):
    for own, right in zip(scanned, want[i], strict=True):
      np.testing.assert_array_equal(own[i], right)


def test_policies_save_a_product(operands):
  x, w, _ = map(jnp.asarray, operands)
  policy = jaxqq.checkpoint_policies.dots_with_no_batch_dims_saveable
  block = jax.checkpoint(lambda x, w: jnp.sin(product(Recipe.named("nvfp4"), x, w)), policy=policy)
  text = str(jax.make_jaxpr(jax.grad(lambda x: block(x, w).sum()))(x))
  assert text.count("recipe_product[") == 2  # forward once, and dx


def test_leading_axes(operands):
  """All of x is one tensor; with batches of w, each matrix is one, with bits of its own."""
  x, w, _ = operands
  random = Quantizer(rounding="stochastic")
  recipe = Recipe(random, random)
  whole = product(recipe, x, w)
  np.testing.assert_array_equal(product(recipe, x.reshape(2, 3, 4, K), w).reshape(M, N), whole)
  np.testing.assert_array_equal(product(recipe, x[0], w), product(recipe, x[:1], w)[0])
  batch = np.stack([w, w, 2 * w])
  outs = np.asarray(product(recipe, np.stack([x, x, x]), batch))
  assert (outs[0] != outs[1]).any() and outs.shape == (3, M, N)
  np.testing.assert_allclose(outs[0], x @ w.T, atol=0.3 * np.abs(x @ w.T).max())
  assert jax.eval_shape(functools.partial(product, recipe), x[0], batch).shape == (3, N)
  assert product(recipe, np.zeros((0, K), np.float32), w).shape == (0, N)


# dot_general


def test_dot_general(operands):
  """The product of `qqmm`, gradients too, over flattened axes, batches, and by an einsum."""
  x, w, g = map(jnp.asarray, operands)
  dot_general = jaxqq.dot_general(recipe="nvfp4")
  assert dot_general == jaxqq.dot_general("nvfp4", recipe=Recipe.named("nvfp4"))
  assert dot_general.needs_key and not jaxqq.dot_general(recipe="mxfp8").needs_key
  kernel = w.reshape(N, 4, 16).transpose(1, 2, 0)  # contracted axes first, as Flax has kernels

  def by_axes(x, kernel):
    return dot_general(
      x.reshape(4, 6, 4, 16), kernel, (((2, 3), (0, 1)), ((), ())), key=KEY
    ).reshape(M, N)

  y, pull = jax.vjp(jax.jit(by_axes), x, kernel)
  dx, dkernel = pull(g)
  want = all_three(Recipe.named("nvfp4"), x, w, g, KEY)
  np.testing.assert_allclose(y, want[0], rtol=1e-6, atol=1e-5)
  np.testing.assert_allclose(dx, want[1], rtol=1e-6, atol=1e-5)
  np.testing.assert_allclose(
    dkernel.transpose(2, 0, 1).reshape(N, K), want[2], rtol=1e-6, atol=1e-5
  )
  experts = dot_general.einsum("ecd,edf->ecf", x.reshape(2, 12, K), jnp.stack([w.T, w.T]), key=KEY)
  assert experts.shape == (2, 12, N)
  plain = jaxqq.dot_general(recipe="mxfp8").einsum("md,nd->mn", x, w)
  np.testing.assert_array_equal(plain, jaxqq.qqmm(x, w, mode="mxfp8"))


def test_dot_general_of_a_packed_weight(operands):
  """As without a recipe, x under its amax."""
  x, w, _ = map(jnp.asarray, operands)
  dot_general, weight = jaxqq.dot_general(recipe="nvfp4"), jaxqq.quantize_weight(w)
  assert dot_general.global_scale == "amax"
  out = dot_general(x, weight, (((1,), (1,)), ((), ())))
  np.testing.assert_array_equal(out, jaxqq.qqmm(x, weight, global_scale_x="amax"))


@pytest.mark.parametrize(
  ("arguments", "error", "words"),
  [
    ({"recipe": "int4"}, ValueError, ["recipe must be", "'int4'"]),
    ({"recipe": "nvfp4", "mode": "mxfp8"}, ValueError, ["mode is 'mxfp8'", "'nvfp4'"]),
    ({"recipe": "nvfp4", "backward": "quantized"}, ValueError, ["backward was given"]),
    ({"recipe": "nvfp4", "quantize_input": False}, ValueError, ["quantize_input is False"]),
  ],
)
def test_dot_generals_that_cannot_be(arguments, error, words):
  refused(error, "dot_general", words, lambda: jaxqq.dot_general(**arguments))


@pytest.mark.parametrize(
  ("recipe", "key", "words"),
  [
    ("nvfp4", None, ["a key is needed"]),
    ("mxfp8", KEY, ["nothing in the recipe is random"]),
    (None, KEY, ["a key was given without a recipe"]),
  ],
)
def test_keys_of_dot_general(recipe, key, words):
  dot_general = jaxqq.dot_general(recipe=recipe)
  x, numbers = jnp.ones((4, 64)), (((1,), (0,)), ((), ()))
  refused(ValueError, "dot_general", words, lambda: dot_general(x, x.T, numbers, key=key))


# Devices


def test_on_many_devices():
  """The amax is the whole tensor's and the bits are those of its places. No operand moves."""
  recipe = Recipe.named("nvfp4")
  operands = [numbers(shape, i) for i, shape in enumerate(((128, 32), (64, 32), (128, 64)))]
  specs = P("data"), P("tensor"), P("data", "tensor")
  placed = [place(a, spec) for a, spec in zip(operands, specs, strict=True)]
  compiled = all_three.lower(recipe, *placed, KEY).compile()
  for out, want in zip(compiled(*placed, KEY), products("nvfp4", *operands), strict=True):
    oracle.assert_within_bound(np.asarray(out), *want)
    np.testing.assert_allclose(out, want[0], rtol=1e-5, atol=1e-4)
  kinds = {kind for kind, _ in collectives(compiled)}
  assert kinds == {"all-reduce"}  # of amaxes, and of sums over rows


@pytest.fixture(scope="module")
def of_quartet2(operands):
  """Operands in bfloat16, four keys, and the three products by each."""
  operands = [jnp.asarray(a, jnp.bfloat16) for a in operands]
  keys = jax.random.split(KEY, 4)
  outs = [all_three(Recipe.named("quartet2"), *operands, key) for key in keys]
  assert all((outs[0][i] != outs[1][i]).any() for i in (1, 2))
  return operands, keys, [np.stack(part).astype(np.float32) for part in zip(*outs, strict=True)]


def assert_same_bits(outs, want):
  """Of operands: sums of a product may be in another order, and are then rounded to bfloat16."""
  for out, right in zip(outs, want, strict=True):
    out = np.asarray(out, np.float32).reshape(right.shape)
    np.testing.assert_allclose(out, right, rtol=2**-7, atol=1e-5 * np.abs(right).max())


def test_quartet2_in_vmap_and_scan(of_quartet2):
  operands, keys, want = of_quartet2
  each = jax.vmap(lambda key: all_three(Recipe.named("quartet2"), *operands, key))
  _, outs = jax.lax.scan(lambda c, keys: (c, each(keys)), 0, keys.reshape(2, 2))
  assert_same_bits(outs, want)


def test_quartet2_of_zeros(of_quartet2):
  """Also those of a CPU, where 2688 / 0 is infinite."""
  (x, w, g), keys, _ = of_quartet2
  outs = all_three(Recipe.named("quartet2"), x, w, jnp.zeros_like(g), keys[0])
  assert not outs[1].any() and not outs[2].any()


def test_quartet2_on_many_devices(of_quartet2):
  """Also where a split cuts rotations."""
  operands, keys, want = of_quartet2
  specs = P("data"), P("tensor"), P("data", "tensor")
  placed = [place(a, spec) for a, spec in zip(operands, specs, strict=True)]
  outs = all_three(Recipe.named("quartet2"), *placed, keys[0])
  assert_same_bits(outs, [part[0] for part in want])


def test_on_explicit_axes(operands):
  x, w, g = operands
  recipe = Recipe.named("nvfp4")
  want = all_three(recipe, x, w, g, KEY)
  with jax.set_mesh(explicit_mesh()):
    x, w, g = (
      jax.device_put(a, spec)
      for a, spec in ((x, P("data")), (w, P("tensor")), (g, P("data", "tensor")))
    )
    outs = all_three(recipe, x, w, g, KEY)
    assert [jax.typeof(out).sharding.spec for out in outs] == [
      P("data", "tensor"),
      P("data", None),
      P("tensor", None),
    ]
  for out, right in zip(outs, want, strict=True):
    np.testing.assert_allclose(out, right, rtol=1e-5, atol=1e-4)


def test_within_shard_map_a_part_is_a_tensor(operands):
  x, w, g = operands
  recipe = OTHERS["g alone"]
  halves = [products("g alone", x[i : i + 12], w, g[i : i + 12]) for i in (0, 12)]
  two = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
  mapped = jax.jit(
    jax.shard_map(
      lambda x, w, g: all_three(recipe, x, w, g, KEY),
      mesh=two,
      in_specs=(P("data"), P(), P("data")),
      out_specs=(P("data"), P("data"), P()),
    )
  )
  y, dx, dw = mapped(x, w, g)
  halves = [[exact for exact, _ in half] for half in halves]
  np.testing.assert_allclose(y, np.concatenate([half[0] for half in halves]), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dx, np.concatenate([half[1] for half in halves]), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dw, halves[0][2] + halves[1][2], rtol=1e-5, atol=1e-4)


# Bad input


def refused(error, function, words, call):
  with pytest.raises(error) as caught:
    call()
  check_sentence(str(caught.value), function, words)


@pytest.mark.parametrize(
  ("attributes", "error", "words"),
  [
    ({"dx_g": "nvfp4"}, TypeError, ["dx_g must be a jaxqq.Quantizer", "'nvfp4'"]),
    ({"dw_g": Quantizer(rotation=16)}, ValueError, ["dw_g", "16", "dw_x", "None", "rotate both"]),
    ({"from_forward": 1}, TypeError, ["from_forward must be True or False", "1"]),
    (
      {**dict.fromkeys(OPERANDS[:2], Quantizer(rotation=16)), "from_forward": True},
      ValueError,
      ["from_forward is True", "forward_x", "rotation 16"],
    ),
  ],
)
def test_wrong_recipes(attributes, error, words):
  refused(error, "Recipe", words, lambda: Recipe(**attributes))


def test_wrong_names():
  refused(
    ValueError, "Recipe", ["unknown recipe 'int4'", "nvfp4-4over6"], lambda: Recipe.named("int4")
  )
  refused(ValueError, "Recipe", ["unknown backward"], lambda: Recipe.of_mode("nvfp4", "both"))


@pytest.mark.parametrize(
  ("arguments", "error", "words"),
  [
    ({"recipe": "int4", "key": KEY}, ValueError, ["recipe must be a jaxqq.Recipe", "'int4'"]),
    ({"recipe": 4}, TypeError, ["recipe must be a jaxqq.Recipe", "got 4"]),
    ({"recipe": "nvfp4"}, ValueError, ["a key is needed", "jax.random.key(0)"]),
    ({"recipe": "mxfp8", "key": KEY}, ValueError, ["a key was given", "nothing in the recipe"]),
    ({"key": KEY}, ValueError, ["a key was given without a recipe"]),
    ({"recipe": "nvfp4", "key": 3}, TypeError, ["key must be a key"]),
    ({"recipe": "nvfp4", "key": jax.random.split(KEY)}, ValueError, ["must be one key"]),
    ({"recipe": "mxfp8", "mode": "nvfp4"}, ValueError, ["mode was given with a recipe"]),
    ({"recipe": "mxfp8", "backward": "quantized"}, ValueError, ["backward was given"]),
    ({"recipe": "mxfp8", "global_scale_x": "amax"}, ValueError, ["global_scale_x was given"]),
    ({"recipe": "nvfp4", "key": KEY, "implementation": "hopper"}, ValueError, ["only 'xla'"]),
  ],
)
def test_wrong_arguments(arguments, error, words):
  x, w = jnp.ones((4, 64)), jnp.ones((8, 64))
  refused(error, "qqmm", words, lambda: jaxqq.qqmm(x, w, **arguments))


@pytest.mark.parametrize(
  ("x", "w", "error", "words"),
  [
    ((4, 40), (8, 40), ValueError, ["the last axis of x", "group size 16"]),
    ((4, 64), (8, 48), ValueError, ["x and w must agree in K"]),
    ((4, 64), (64,), ValueError, ["at least two dimensions"]),
  ],
)
def test_wrong_shapes(x, w, error, words):
  refused(
    error,
    "qqmm",
    words,
    lambda: jaxqq.qqmm(jnp.ones(x), jnp.ones(w), recipe="nvfp4", key=KEY),
  )


def test_packed_weights_are_refused():
  weight = jaxqq.quantize_weight(jnp.ones((8, 64)))
  by_recipe = functools.partial(jaxqq.qqmm, jnp.ones((4, 64)), recipe="nvfp4", key=KEY)
  words = ["a recipe quantizes w itself", "unquantized"]
  refused(ValueError, "qqmm", words, lambda: by_recipe(weight))
  words = ["w must be float32, float16 or bfloat16", "uint32"]
  refused(TypeError, "qqmm", words, lambda: by_recipe(weight.packed))


def test_explain():
  """Of a recipe that qqmm has without one too, its plan; of another, that of its own table."""
  x = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
  own = jaxqq.explain(x, x, recipe="mxfp8", device="cpu")
  assert own == jaxqq.explain(x, x, mode="mxfp8", backward="quantized", device="cpu")
  explain = functools.partial(jaxqq.explain, x, x, key=KEY)
  assert explain(recipe="nvfp4", device="cpu").plan.name == "xla"
  assert explain(recipe="quartet2", device="cpu").plan.name == "xla"
  quantize = Quantizer(rounding="stochastic").quantize
  by_quantizer = jaxqq.explain(quantize, x, KEY, device="cuda")
  if jax.__version_info__ < (0, 11):
    assert "Not hopper_quantizer: it needs JAX 0.11" in by_quantizer
    assert "Not hopper_recipe: it needs JAX 0.11" in explain(recipe="nvfp4", device="cuda")
  else:
    assert by_quantizer.plan.name == "hopper_quantizer"
    assert explain(recipe="nvfp4", device="cuda").plan.name == "hopper_recipe"
    assert explain(recipe="quartet2", device="cuda").plan.name == "hopper_recipe"  # forward
    unbiased = jaxqq.explain(Recipe.named("quartet2").dx_g.quantize, x, KEY, device="cuda")
    assert unbiased.plan.name == "xla" and "no kernel corrects scales" in unbiased
    own = explain(recipe=dataclasses.replace(Recipe.named("nvfp4"), forward_x=None), device="cuda")
    assert own.plan.name == "xla" and "not quantized" in own
  assert "quantize" in jaxqq.explain(quantize, x, KEY, axis=-2, device="cpu")
  of_key = jax.ShapeDtypeStruct(KEY.shape, KEY.dtype)
  for shape in (of_key, jax.ShapeDtypeStruct((2,), jnp.uint32)):
    text = jaxqq.explain(x, x, recipe="nvfp4", key=shape, device="cuda")
    assert text == explain(recipe="nvfp4", device="cuda")
  assert jaxqq.explain(quantize, x, of_key, device="cuda") == by_quantizer
  with pytest.raises(TypeError, match="key must be a key"):
    jaxqq.explain(x, x, recipe="nvfp4", key=jax.ShapeDtypeStruct((3,), jnp.uint32), device="cpu")


def test_train_lm_by_a_recipe():
  """Its step, by a key that another step does not have, and the model as it is served."""
  example = load_example("train_lm")
  sizes = ["--layers", "1", "--d-model", "32", "--heads", "2", "--seq", "16", "--batch", "2"]
  cfg = example.parse_config([*sizes, "--modes", "mxfp8", "--recipe", "nvfp4", "mxfp8"])
  assert cfg.modes == ("mxfp8", "recipe nvfp4", "recipe mxfp8")
  windows = np.arange(34, dtype=np.uint8).reshape(2, 17) + 60
  optimizer, mode = example.make_optimizer(cfg), "recipe nvfp4"
  step = example.make_step(cfg, mode, optimizer)
  params, state, _ = example.make_state(cfg, optimizer)
  of_step = jax.eval_shape(step, params, state, windows)
  assert jax.tree.structure(of_step[:2]) == jax.tree.structure((params, state))
  first = example.key_of(cfg, mode, state)
  after = jax.tree.map(lambda a: a + jnp.ones_like(a), state)  # the counts, too
  assert first != example.key_of(cfg, mode, after)
  assert example.key_of(cfg, "mxfp8", state) is None
  packed = example.pack(params, mode, jnp.bfloat16)
  assert packed["blocks"]["qkv"]["w"].dtype == jnp.uint32 and example.served_mode(mode) == "nvfp4"


@pytest.mark.usefixtures("quick_compiles")
def test_train_lm_with_its_first_and_last_block_in_bfloat16():
  """Their products are of unquantized operands, trained and served; the others' by the recipe."""
  example = load_example("train_lm")
  sizes = ["--d-model", "32", "--heads", "2", "--seq", "16", "--batch", "2", "--dtype", "f32"]
  mode = "recipe " + example.NVFP4_BUT_ENDS
  cfg = example.parse_config([*sizes, "--layers", "4", "--recipe", example.NVFP4_BUT_ENDS])
  assert mode in cfg.modes and example.recipe_of(mode) == Recipe.named("nvfp4")
  whole, tokens = example.init_params(cfg), jnp.arange(32).reshape(2, 16)

  def of_blocks(*which):
    """What others add to x is zero."""
    keep = jnp.isin(jnp.arange(4), jnp.array(which)).astype(jnp.float32)[:, None, None]
    blocks = {name: whole["blocks"][name] * keep for name in ("out", "down")}
    return whole | {"blocks": whole["blocks"] | blocks}

  logits = functools.partial(example.logits_of, tokens=tokens, cfg=cfg)
  keyed = functools.partial(logits, key=jax.random.key(3))
  for params, other, far in (
    (of_blocks(0, 3), "unquantized", "recipe nvfp4"),
    (of_blocks(1, 2), "recipe nvfp4", "unquantized"),
  ):
    trained, near = keyed(params, mode=mode), keyed(params, mode=other)
    error, least = jnp.abs(trained - near).max(), jnp.abs(keyed(params, mode=far) - near).max()
    assert error < 1e-4 < 1e-2 < least
    served = logits(example.pack(params, mode, jnp.float32), mode=mode)
    of_other = logits(example.pack(params, other, jnp.float32), mode=other)
    assert jnp.abs(served - of_other).max() < 1e-4

  served = example.pack(whole, mode, jnp.float32)
  sizes_of = [example.linear_bytes(p) for p in (served, whole)]
  packed = example.linear_bytes(example.pack(whole, "recipe nvfp4", jnp.float32))
  assert sizes_of[0] == packed // 2 + sizes_of[1] // 2
  gradients = jax.grad(lambda params: keyed(params, mode=mode).sum())(whole)["blocks"]
  for name, gradient in gradients.items():
    assert jnp.all(jnp.abs(gradient).reshape(4, -1).max(axis=1) > 0), name
  with pytest.raises(SystemExit):
    example.parse_config([*sizes, "--layers", "2", "--recipe", example.NVFP4_BUT_ENDS])


@pytest.mark.parametrize("documented", [Recipe, Recipe.named, Recipe.of_mode])
def test_examples_in_docstrings(documented):
  names = {"jax": jax, "jnp": jnp, "jaxqq": jaxqq}
  example = doctest.DocTestParser().get_doctest(documented.__doc__, names, "example", None, 0)
  assert example.examples
  assert doctest.DocTestRunner().run(example).failed == 0
