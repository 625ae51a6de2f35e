"""Which implementation computes a product, where a caller chooses, and for which GPU."""

from __future__ import annotations

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxqq
import jaxqq.nn
from jaxqq._kernels.plan import TARGET
from tests.support import oracle
from tests.support.programs import lowered_for_cuda

needs_kernels = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels need JAX 0.11")
X, W = (jax.ShapeDtypeStruct((size, 256), jnp.bfloat16) for size in (96, 128))


def explained(**how):
  return jaxqq.explain(X, W, device="cuda", **how)


def test_the_error_names_the_function():
  how = {"device": "cpu", "implementation": "hopper"}
  with pytest.raises(ValueError, match=r"^quantized_matmul: implementation 'hopper' cannot"):
    jaxqq.explain(jaxqq.quantized_matmul, X, W, **how)
  with pytest.raises(ValueError, match=r"^qqmm: implementation 'hopper' cannot"):
    jaxqq.explain(X, W, **how)


@needs_kernels
def test_the_first_that_can_unless_one_is_asked_for():
  assert explained(mode="mxfp8").plan.name == "hopper_fp8"
  text = explained(mode="mxfp8", implementation="hopper_exact")
  assert text.plan.name == "hopper_exact"
  assert "Not hopper_fp8: implementation='hopper_exact' was asked for." in text


def test_what_several_names_begin_with():
  assert explained(implementation="xla").plan.name == "xla_bfloat16"
  assert explained(implementation="xla", precision="highest").plan.name == "xla"
  assert jaxqq.explain(X, W, device="cpu", implementation="xla").plan.name == "xla"


@pytest.mark.parametrize("backward", ["straight_through", "quantized"])
def test_no_kernel_is_in_the_program_nor_in_its_gradient(backward):
  def loss(x, w):
    out = jaxqq.qqmm(x, w, mode="mxfp8", backward=backward, implementation="xla")
    return out.astype(jnp.float32).sum()

  assert "mosaic_gpu" not in lowered_for_cuda(jax.grad(loss, argnums=(0, 1)), X, W)


def test_the_result_is_right():
  rng = np.random.default_rng(0)
  x, w = (oracle.random(rng, (3, size, 64), "float32") for size in (5, 7))
  run = jax.vmap(lambda x, w: jaxqq.qqmm(x, w, mode="mxfp8", implementation="xla"))
  exact, mag = oracle.product(*(oracle.round_trip(a, "mxfp8") for a in (x, w)))
  oracle.assert_within_bound(np.asarray(jax.jit(run)(x, w)), exact, mag)


# Rows in groups

EXPERTS = jax.ShapeDtypeStruct((4, 128, 256), jnp.bfloat16)
SIZES = jax.ShapeDtypeStruct((4,), jnp.int32)


@needs_kernels
def test_groups_have_implementations_of_their_own():
  def explained(**how):
    return jaxqq.explain(jaxqq.ragged_qqmm, X, EXPERTS, SIZES, mode="mxfp8", device="cuda", **how)

  assert explained().plan.name == "hopper_fp8"
  assert explained(implementation="hopper_exact").plan.name == "hopper_exact"
  assert explained(implementation="x").plan.name == "xla"
  with pytest.raises(
    ValueError, match=r"^ragged_qqmm: implementation 'hopper_skinny' cannot .*not"
  ):
    explained(implementation="hopper_skinny")


@needs_kernels
@pytest.mark.parametrize(("asked", "kernels"), [("xla", False), ("hopper_fp8", True)])
def test_gradients_of_groups(asked, kernels):
  """XLA computes its own; what multiplies forward alone leaves them to others."""

  def loss(x, w, sizes):
    out = jaxqq.ragged_qqmm(x, w, sizes, mode="mxfp8", implementation=asked)
    return out.astype(jnp.float32).sum()

  text = lowered_for_cuda(jax.grad(loss, argnums=(0, 1)), X, EXPERTS, SIZES)
  assert ("mosaic_gpu" in text) == kernels


def test_groups_by_what_is_asked_for():
  rng = np.random.default_rng(0)
  x, w = (oracle.random(rng, shape, "float32") for shape in ((6, 64), (3, 8, 64)))
  sizes, how = np.int32([2, 0, 3]), {"mode": "mxfp8", "implementation": "xla"}
  out = jaxqq.ragged_qqmm(x, w, sizes, **how)
  own = {"lhs_indices": np.arange(5), "rhs_indices": np.int32([0, 0, 2, 2, 2])}
  gathered = jaxqq.gather_qqmm(x[:5, None], w, None, **own, **how)
  np.testing.assert_array_equal(gathered[:, 0], out[:5])
  stack = jaxqq.quantize_weight(w, "mxfp8")
  np.testing.assert_array_equal(jaxqq.qqmm(x[2:5], stack.layer(2), implementation="xla"), out[2:5])
  for product in (jaxqq.ragged_qqmm, jaxqq.ragged_quantized_matmul):
    with pytest.raises(
      ValueError, match=rf"^{product.__name__}: unknown implementation 'block'; it"
    ):
      product(x, w, sizes, implementation="block")


@pytest.mark.parametrize(
  ("platform", "how", "reason"),
  [
    ("cpu", {"implementation": "hopper"}, "hopper_fp8: it is for cuda, not cpu"),
    ("cuda", {"implementation": "hopper_fp8"}, "hopper_fp8: (it needs JAX|nvfp4 has no e4m3)"),
    ("cuda", {"implementation": "block_scaled_dot"}, "block_scaled_dot: it is for compute cap"),
  ],
)
def test_why_it_cannot_be_had(platform, how, reason):
  message = (
    f"qqmm: implementation '{how['implementation']}' cannot compute this product on {platform}"
  )
  with pytest.raises(ValueError, match=rf"{message}: .*{reason}"):
    jaxqq.explain(X, W, device=platform, **how)
  traced = jax.jit(lambda x, w: jaxqq.qqmm(x, w, **how)).trace(X, W)
  with pytest.raises(ValueError, match=message):
    traced.lower(lowering_platforms=(platform,))


DENSE = (((1,), (0,)), ((), ()))
DENSE_OF_LINEN = linen.Dense(128, use_bias=False)
XLA = {"mode": "mxfp8", "implementation": "xla"}


KERNEL = np.ones((256, 128), np.float32)
WEIGHT = jaxqq.quantize_weight(KERNEL.T, "mxfp8")
RNGS = nnx.Rngs(0)
LINEAR = nnx.Linear(256, 128, rngs=RNGS)
EINSUM = nnx.Einsum("mk,kn->mn", (256, 128), rngs=RNGS)


def packed(layer):
  layer.pack()
  return layer


def converted():
  model = nnx.Sequential(nnx.Linear(256, 128, rngs=RNGS))
  jaxqq.nn.quantize_model(model, **XLA)
  return model


def of_linen(apply, kernel):
  return functools.partial(apply, {"params": {"kernel": kernel}})


PASSED_ON = {
  "dot_general": lambda: lambda x: jaxqq.dot_general(**XLA)(x, KERNEL, DENSE),
  "einsum": lambda: lambda x: jaxqq.dot_general(**XLA).einsum("mk,kn->mn", x, KERNEL),
  "packed rhs": lambda: lambda x: jaxqq.dot_general(**XLA)(x, WEIGHT, (((1,), (1,)), ((), ()))),
  "QQLinear": lambda: jaxqq.nn.QQLinear(256, 128, rngs=RNGS, **XLA),
  "QQLinear, packed": lambda: packed(jaxqq.nn.QQLinear(256, 128, rngs=RNGS, **XLA)),
  "from_linear": lambda: jaxqq.nn.QQLinear.from_linear(LINEAR, **XLA),
  "from_weight": lambda: jaxqq.nn.QQLinear.from_weight(WEIGHT, implementation="xla"),
  "QQLinearGeneral": lambda: jaxqq.nn.QQLinearGeneral(256, 128, rngs=RNGS, **XLA),
  "QQEinsum": lambda: jaxqq.nn.QQEinsum("mk,kn->mn", (256, 128), rngs=RNGS, **XLA),
  "from_einsum": lambda: jaxqq.nn.QQEinsum.from_einsum(EINSUM, **XLA),
  "quantize_model": converted,
  "QQDense": lambda: of_linen(jaxqq.nn.QQDense(128, use_bias=False, **XLA).apply, KERNEL),
  "quantized_apply": lambda: of_linen(jaxqq.nn.quantized_apply(DENSE_OF_LINEN, **XLA), KERNEL),
  "quantized_apply, packed": lambda: of_linen(
    jaxqq.nn.quantized_apply(DENSE_OF_LINEN, implementation="xla"), WEIGHT
  ),
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_layers_and_dot_general_pass_it_on(name):
  x = jax.ShapeDtypeStruct((96, 256), jnp.float32)
  assert implementations(jax.make_jaxpr(PASSED_ON[name]())(x).jaxpr) == ["xla"]


def implementations(jaxpr):
  """Of every product in a jaxpr."""
  found = [eqn.params["implementation"] for eqn in jaxpr.eqns if eqn.primitive.name == "qqmm"]
  for eqn in jaxpr.eqns:
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      found += implementations(inner)
  return found


def test_an_implementation_is_part_of_a_dot_general():
  """Equal ones are one program under jit; others are not."""
  one, other = (jaxqq.dot_general(**XLA) for _ in range(2))
  assert one == other and hash(one) == hash(other) and one != jaxqq.dot_general("mxfp8")
  x, w = (np.ones((size, 64), np.float32) for size in (2, 3))
  dims = (((1,), (1,)), ((), ()))
  hopper = jax.jit(lambda x, w: jaxqq.dot_general(implementation="hopper")(x, w, dims))
  with pytest.raises(
    ValueError, match="implementation 'hopper' cannot compute this product on cpu"
  ):
    hopper(x, w)
  np.testing.assert_array_equal(one(x, w, dims), jaxqq.qqmm(x, w, **XLA))


@pytest.mark.parametrize(
  ("name", "call"),
  [
    ("dot_general", lambda: jaxqq.dot_general(implementation="cublas")),
    ("QQLinear", lambda: jaxqq.nn.QQLinear(64, 8, implementation="cublas", rngs=RNGS)),
    ("quantize_model", lambda: jaxqq.nn.quantize_model(LINEAR, implementation="cublas")),
    ("quantized_apply", lambda: jaxqq.nn.quantized_apply(None, implementation="cublas")),
  ],
)
def test_who_was_asked_for_what_is_unknown(name, call):
  with pytest.raises(ValueError, match=rf"^{name}: unknown implementation 'cublas'; .*'xla'"):
    call()


@pytest.mark.parametrize("wrong", ["cublas", "", 3])
def test_unknown(wrong):
  with pytest.raises(ValueError, match=rf"qqmm: unknown implementation {wrong!r}; .*'xla'"):
    jaxqq.qqmm(jnp.ones((1, 64)), jnp.ones((1, 64)), implementation=wrong)


def test_the_gpu_that_a_program_is_made_for(monkeypatch):
  assert "compute capability 9.0 is assumed, since none is at hand" in explained()
  monkeypatch.setenv(TARGET, "8.0")
  text = explained()
  assert text.plan.name == "xla_bfloat16" and "is assumed" not in text
  assert "mosaic_gpu" not in lowered_for_cuda(lambda x, w: jaxqq.qqmm(x, w), X, W)
  monkeypatch.setenv(TARGET, "10.0")
  assert explained().plan.name == "block_scaled_dot"
