"""dot_general: any contraction as a qqmm, and the layers of Flax that take one."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from tests.support import oracle
from tests.support.messages import check_sentence

DENSE = (((1,), (0,)), ((), ()))

# (shape of lhs, shape of rhs, dimension numbers)
CONTRACTIONS = {
  "dense": ((4, 64), (64, 6), DENSE),
  "leading axes": ((2, 3, 64), (64, 6), (((2,), (0,)), ((), ()))),
  "w as (n, k)": ((4, 64), (6, 64), (((1,), (1,)), ((), ()))),
  "first axis of x": ((64, 4), (64, 6), (((0,), (0,)), ((), ()))),
  "to heads": ((2, 3, 64), (64, 4, 5), (((2,), (0,)), ((), ()))),
  "from heads": ((2, 3, 4, 16), (4, 16, 5), (((2, 3), (0, 1)), ((), ()))),
  "two axes, the other way round": ((2, 3, 4, 16), (16, 5, 4), (((3, 2), (0, 2)), ((), ()))),
  "axes apart": ((4, 3, 16), (4, 16, 5), (((0, 2), (0, 1)), ((), ()))),
  "batch": ((3, 4, 64), (3, 64, 6), (((2,), (1,)), ((0,), (0,)))),
  "batch behind": ((4, 64, 3), (64, 3, 6), (((1,), (0,)), ((2,), (1,)))),
  "two batch axes, swapped": ((3, 2, 4, 64), (2, 3, 64, 6), (((3,), (2,)), ((1, 0), (0, 1)))),
  "batch and two rows": ((3, 4, 2, 64), (3, 64, 6), (((3,), (1,)), ((0,), (0,)))),
  "vectors": ((64,), (64,), (((0,), (0,)), ((), ()))),
  "vector of x": ((64,), (64, 6), (((0,), (0,)), ((), ()))),
  "vector of w": ((4, 64), (64,), (((1,), (0,)), ((), ()))),
  "batch of vectors": ((3, 64), (3, 64), (((1,), (1,)), ((0,), (0,)))),
}


def matrices(a: np.ndarray, batch, contracting, *, order) -> np.ndarray:
  """(batch, rows, k) in float64, k in the order given."""
  free = [i for i in range(a.ndim) if i not in batch and i not in contracting]
  k = math.prod(a.shape[i] for i in contracting)
  shape = [a.shape[i] for i in batch]
  rows = math.prod(a.shape[i] for i in free)
  return np.transpose(a, [*batch, *free, *order]).reshape(*shape, rows, k)


def expected(lhs, rhs, numbers, mode, *, amax=False):
  """The exact product of the quantized operands, and mag, both as the contraction's result.

  With amaxes of each matrix, or else in nvfp4 with that of the whole of w.
  """
  (lc, rc), (lb, rb) = numbers
  pairs = sorted(zip(lc, rc, strict=True))
  x = matrices(lhs, lb, lc, order=[i for i, _ in pairs])
  w = matrices(rhs, rb, rc, order=[j for _, j in pairs])

  def hat(a, number=None):
    if not amax:
      return oracle.round_trip(a, mode, number)
    flat = a.reshape(-1, *a.shape[-2:])
    one = [oracle.round_trip(m, mode, np.max(np.abs(m.astype(np.float32)))) for m in flat]
    return np.stack(one).reshape(a.shape)

  of_w = np.max(np.abs(w.astype(np.float32)), initial=0) if mode == "nvfp4" else None
  free = [s for i, s in enumerate(lhs.shape) if i not in (*lb, *lc)]
  features = [s for i, s in enumerate(rhs.shape) if i not in (*rb, *rc)]
  shape = [lhs.shape[i] for i in lb] + free + features
  return (a.reshape(shape) for a in oracle.product(hat(x), hat(w, of_w)))


def table():
  """Contractions in one mode or the other, in turn; some in both."""
  for i, name in enumerate(CONTRACTIONS):
    for j, mode in enumerate(oracle.PRODUCT_MODES):
      if (i + j) % 2 or name in ("dense", "batch", "vectors"):
        yield pytest.param(name, mode, id=f"{name}-{mode}")


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(("name", "mode"), list(table()))
def test_any_contraction_is_a_qqmm(name, mode):
  lhs_shape, rhs_shape, numbers = CONTRACTIONS[name]
  rng = np.random.default_rng(1)
  lhs, rhs = (oracle.random(rng, shape, "float32") for shape in (lhs_shape, rhs_shape))
  out = jax.jit(jaxqq.dot_general(mode), static_argnums=2)(lhs, rhs, numbers)
  assert out.shape == jax.eval_shape(lambda *a: lax.dot_general(*a, numbers), lhs, rhs).shape
  oracle.assert_within_bound(np.asarray(out), *expected(lhs, rhs, numbers, mode))


@pytest.mark.parametrize("name", ["dense", "from heads", "two batch axes, swapped"])
def test_global_scales_are_those_of_each_matrix(name):
  lhs_shape, rhs_shape, numbers = CONTRACTIONS[name]
  rng = np.random.default_rng(2)
  lhs, rhs = (1e-4 * oracle.random(rng, shape, "float32") for shape in (lhs_shape, rhs_shape))
  out, plain = (
    jax.jit(jaxqq.dot_general("nvfp4", global_scale=scale), static_argnums=2)(lhs, rhs, numbers)
    for scale in ("amax", None)
  )
  exact, mag = expected(lhs, rhs, numbers, "nvfp4", amax=True)
  oracle.assert_within_bound(np.asarray(out), exact, mag)
  assert oracle.relative_error(np.asarray(plain), exact) > 0.5  # out of the scales' reach


@pytest.mark.parametrize("preferred", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("rhs", oracle.DTYPES)
@pytest.mark.parametrize("lhs", oracle.DTYPES)
def test_dtype_is_that_of_lax(lhs, rhs, preferred):
  x, w = np.ones((2, 32), oracle.DTYPES[lhs]), np.ones((32, 3), oracle.DTYPES[rhs])
  with jax.numpy_dtype_promotion("standard"):
    want, f = (
      functools.partial(product, dimension_numbers=DENSE, preferred_element_type=preferred)
      for product in (lax.dot_general, jaxqq.dot_general("mxfp8"))
    )
    want = jax.eval_shape(want, x, w).dtype
    assert jax.eval_shape(f, x, w).dtype == want
    if preferred is None:
      out = f(x, w)
      assert out.dtype == want
      np.testing.assert_array_equal(out.astype(jnp.float32), 32)


def test_a_preferred_type_is_summed_and_stored_in():
  rng = np.random.default_rng(3)
  x, w = oracle.random(rng, (4, 64), "bfloat16"), oracle.random(rng, (64, 6), "bfloat16")
  out = jaxqq.dot_general("mxfp8")(x, w, DENSE, preferred_element_type=jnp.float32)
  oracle.assert_within_bound(np.asarray(out), *expected(x, w, DENSE, "mxfp8"))

  def f(x):
    return jaxqq.dot_general("mxfp8")(x, w, DENSE, preferred_element_type=jnp.float32).sum()

  assert jax.grad(f)(jnp.asarray(x)).dtype == jnp.bfloat16


HIGHEST = lax.Precision.HIGHEST


@pytest.mark.parametrize(
  ("given", "passed"),
  [
    (None, None),
    ("highest", HIGHEST),
    (HIGHEST, HIGHEST),
    ((None, HIGHEST), HIGHEST),
    (("default", "highest"), HIGHEST),
    ("default", lax.Precision.DEFAULT),
  ],
)
def test_precision_is_passed_on(given, passed):
  x = jnp.ones((4, 64), jnp.bfloat16)

  def f(x, w):
    return jaxqq.dot_general("mxfp8")(x, w, DENSE, given)

  [eqn] = [e for e in jax.make_jaxpr(f)(x, x.T).eqns if e.primitive.name == "qqmm"]
  assert eqn.params["precision"] == passed


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("mode", "backward"), [("nvfp4", "quantized"), ("mxfp8", "straight_through")]
)
def test_gradients_are_those_of_qqmm(mode, backward):
  rng = np.random.default_rng(4)
  x, kernel = oracle.random(rng, (4, 64), "float32"), oracle.random(rng, (64, 32), "float32")
  dot_general = jaxqq.dot_general(mode, backward=backward)
  scales = {"global_scale_x": 2688, "global_scale_w": "amax"} if mode == "nvfp4" else {}

  def ours(x, kernel):
    return jnp.sum(jnp.sin(dot_general(x, kernel, DENSE)))

  qqmm = functools.partial(jaxqq.qqmm, mode=mode, backward=backward, **scales)

  def theirs(x, kernel):
    return jnp.sum(jnp.sin(qqmm(x, kernel.T)))

  gradients = (jax.jit(jax.grad(loss, (0, 1)))(x, kernel) for loss in (ours, theirs))
  for got, want in zip(*gradients, strict=True):
    assert oracle.relative_error(got, want) <= 1e-6  # the order of sums is another


@pytest.mark.parametrize(
  ("name", "moves"),
  [
    ("dense", []),
    ("leading axes", []),
    ("w as (n, k)", []),
    ("from heads", ["reshape", "reshape"]),  # of which neither moves anything
    ("batch", []),
    ("vector of w", ["reshape"]),
    ("axes apart", ["transpose", "reshape", "reshape"]),  # of x
    ("batch behind", ["transpose", "transpose"]),
  ],
)
def test_what_lies_in_an_order_that_qqmm_takes_is_not_moved(name, moves):
  lhs_shape, rhs_shape, numbers = CONTRACTIONS[name]

  def f(x, w):
    return jaxqq.dot_general("mxfp8")(x, w, numbers)

  jaxpr = jax.make_jaxpr(f)(jnp.ones(lhs_shape), jnp.ones(rhs_shape))
  names = [eqn.primitive.name for eqn in jaxpr.eqns]
  assert names[: names.index("qqmm")] == moves


def test_equal_arguments_make_equal_functions():
  assert jaxqq.dot_general("mxfp8") == jaxqq.dot_general("mxfp8", backward="straight_through")
  assert jaxqq.dot_general("mxfp8") != jaxqq.dot_general("nvfp4")
  assert len({jaxqq.dot_general(), jaxqq.dot_general()}) == 1


EINSUMS = [
  ("btd,df->btf", (2, 3, 64), (64, 5)),
  ("...d,df->...f", (2, 3, 64), (64, 5)),
  ("...d,dhk->...hk", (3, 64), (64, 2, 5)),
  ("bthk,hkd->btd", (2, 3, 4, 16), (4, 16, 5)),
  ("btd,dhk->bhtk", (2, 3, 64), (64, 2, 5)),
  ("ecd,edf->ecf", (3, 4, 64), (3, 64, 5)),
  ("bqhd,bkhd->bhqk", (2, 3, 4, 64), (2, 5, 4, 64)),
  ("...qhd,...khd->...hqk", (2, 3, 4, 64), (2, 5, 4, 64)),
  ("d, df -> f", (64,), (64, 5)),
  ("td,fd->ft", (3, 64), (5, 64)),
]


@pytest.mark.parametrize(("subscripts", "x", "w"), EINSUMS, ids=[e[0] for e in EINSUMS])
def test_einsum(subscripts, x, w):
  """Of numbers that mxfp8 holds exactly, so that jnp.einsum is right."""
  rng = np.random.default_rng(5)
  x, w = (rng.integers(-8, 9, shape).astype(np.float32) for shape in (x, w))
  got = jaxqq.dot_general("mxfp8").einsum(subscripts, x, w)
  np.testing.assert_array_equal(got, np.einsum(subscripts.replace(" ", ""), x, w))


X, W = np.ones((4, 64), np.float32), np.ones((64, 6), np.float32)

CALLS = [
  ("nothing contracted", ValueError, ["no axis of lhs", "(4, 64)"], X, W, (((), ()), ((), ()))),
  ("no whole group", ValueError, ["lhs", "(1,)", "40", "32", "'mxfp8'"], X[:, :40], W[:40], DENSE),
  ("sizes", ValueError, ["contracting", "(64,)", "(6,)"], X, W, (((1,), (1,)), ((), ()))),
  ("batch sizes", ValueError, ["batch", "(4,)", "(6,)"], X, W, (((1,), (0,)), ((0,), (1,)))),
  ("axis too large", ValueError, ["lhs", "(2,)", "0 and 1"], X, W, (((2,), (0,)), ((), ()))),
  ("axis twice", ValueError, ["rhs", "(0, 0)"], X, W, (((0, 1), (0, 0)), ((), ()))),
  ("no dimension numbers", ValueError, ["dimension_numbers", "None"], X, W, None),
  ("too few", ValueError, ["dimension_numbers", "((1,), (0,))"], X, W, ((1,), (0,))),
  ("float64", TypeError, ["lhs", "float64"], X.astype(np.float64), W, DENSE),
  ("integer", TypeError, ["rhs", "int32"], X, W.astype(np.int32), DENSE),
  ("list", TypeError, ["lhs", "list"], X.tolist(), W, DENSE),
]


@pytest.mark.parametrize("case", CALLS, ids=[case[0] for case in CALLS])
def test_what_is_no_qqmm(case):
  _, error, words, lhs, rhs, numbers = case
  with pytest.raises(error) as caught:
    jaxqq.dot_general("mxfp8")(lhs, rhs, numbers)
  check_sentence(str(caught.value), "dot_general", words)


OPTIONS = [
  ("mode", ValueError, ["'int4'", "'nvfp4'"], {"mode": "int4"}),
  ("backward", ValueError, ["backward", "'ste'"], {"backward": "ste"}),
  ("global_scale", ValueError, ["global_scale", "'amax'", "1.0"], {"global_scale": 1.0}),
  ("mxfp8", ValueError, ["'mxfp8'"], {"mode": "mxfp8", "global_scale": "amax"}),
]


@pytest.mark.parametrize("case", OPTIONS, ids=[case[0] for case in OPTIONS])
def test_options_that_there_are_not(case):
  _, error, words, kwargs = case
  with pytest.raises(error) as caught:
    jaxqq.dot_general(**kwargs)
  check_sentence(str(caught.value), "dot_general", words)


@pytest.mark.parametrize(
  ("words", "kwargs"),
  [
    (["precision", "'most'"], {"precision": "most"}),
    (["preferred_element_type", "int32"], {"preferred_element_type": jnp.int32}),
  ],
)
def test_options_of_a_call(words, kwargs):
  with pytest.raises(TypeError) as caught:
    jaxqq.dot_general("mxfp8")(X, W, DENSE, **kwargs)
  check_sentence(str(caught.value), "dot_general", words)


@pytest.mark.parametrize(
  ("subscripts", "words"),
  [
    ("td,df", ["subscripts", "'td,df'"]),
    ("td,df,f->t", ["two operands"]),
    ("td,df->f", ["'t'", "one operand"]),
    ("td,df->tfz", ["'z'", "no operand"]),
    ("tt,tf->f", ["twice", "x"]),
    ("btd,df->btf", ["x", "2 axes"]),
    ("...d,df->f", ["ellipsis", "one operand"]),
    ("1d,df->1f", ["subscripts"]),
  ],
)
def test_einsums_that_are_no_product(subscripts, words):
  with pytest.raises(ValueError) as caught:
    jaxqq.dot_general("mxfp8").einsum(subscripts, X, W)
  check_sentence(str(caught.value), "dot_general.einsum", words)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_out_sharding_places_the_result(kind):
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
  x = jax.device_put(X, NamedSharding(mesh, P("data")))
  w = jax.device_put(np.ones((64, 8), np.float32), NamedSharding(mesh, P(None, "tensor")))
  spec = NamedSharding(mesh, P(None, "tensor"))

  @jax.jit
  def f(x, w):
    return jaxqq.dot_general("mxfp8")(x, w, DENSE, out_sharding=spec)

  with jax.set_mesh(mesh):
    out = f(x, w)
  assert out.sharding.is_equivalent_to(spec, 2)
  np.testing.assert_array_equal(out, 64)
