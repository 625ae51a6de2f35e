"""What a `Quantizer`, and the products of a `Recipe`, get on Hopper.

`refusal` is the one place that says which quantizers have kernels. In a product x and w become
exact operands, each by its quantizer, of one `gemm`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxqq import _random_bits, _rounding
from jaxqq._formats import FORMATS, Format
from jaxqq._kernels.hopper.checks import check_hopper
from jaxqq._kernels.hopper.mainloops.table import exact_dtype
from jaxqq._kernels.hopper.wide_plan import WidePlan, exact_plan
from jaxqq._kernels.plan import Device, FunctionPlan, Implementation, Unsupported
from jaxqq._kernels.problem import Problem, Quantizing, RecipeProblem
from jaxqq._quantizer import Quantizer, Streams, global_scale_of
from jaxqq._reference import Operands

STEP_K = 64  # of the product's kernel, in 16 bits
LARGEST_ROTATION = 64  # of columns and of squares, whose tiles have as many


def refusal(quantizer: Quantizer, *, is_transposed: bool, is_packed: bool) -> str | None:
  """Why no kernel quantizes so, or None.

  Args:
    is_transposed: whether groups run down the columns of what is stored.
    is_packed: whether codes come out, not code * scale.
  """
  if quantizer.scale == "unbiased":
    return "no kernel corrects scales over a rotation, as scale 'unbiased' does"
  of_tiles = is_transposed or quantizer.square
  if of_tiles and (quantizer.rotation or 0) > LARGEST_ROTATION:
    what = "columns" if is_transposed else "squares"
    return f"a kernel of {what} rotates up to {LARGEST_ROTATION} elements, not {quantizer.rotation}"
  if is_packed and FORMATS[quantizer.mode].bits == 8 and not quantizer.is_plain:
    return "no kernel packs codes of 8 bits that are not of rows, to nearest, as they are"
  return None


# Quantizers


def _plan_quantizing(problem: Quantizing, device: Device) -> FunctionPlan:
  check_hopper(problem.obstacle, device)
  reason = refusal(problem.quantizer, is_transposed=problem.is_transposed, is_packed=True)
  if reason is not None:
    raise Unsupported(reason)
  return FunctionPlan(problem, _quantize_by_kernel)


QUANTIZER = Implementation(
  name="hopper_quantizer",
  summary="a kernel that reads the array once, and one before it for the amax, if that is wanted",
  platforms=("cuda",),
  plan=_plan_quantizing,
)


def _quantize_by_kernel(
  problem: Quantizing, a: jax.Array, streams: Streams, amax: jax.Array | None
) -> list[jax.Array]:
  from jaxqq._kernels.hopper.quantize import columns, packed

  kernel = columns.quantize_transpose if problem.is_transposed else packed.quantize
  given = _Given.of(problem.quantizer, a, streams, amax, problem.is_transposed)
  results = list(kernel(a, given.fmt, given.global_scale, **given.how))
  return results if given.global_scale is None else [*results, given.global_scale]


@dataclasses.dataclass(frozen=True)
class _Given:
  """What a kernel takes beside an array."""

  fmt: Format
  global_scale: jax.Array | None
  how: dict[str, Any]

  @classmethod
  def of(
    cls,
    quantizer: Quantizer,
    a: jax.Array,
    streams: Streams,
    amax: jax.Array | None,
    is_transposed: bool,
  ) -> _Given:
    """Of a matrix; its amax is that of all of it, rotated, where none is given."""
    from jaxqq._kernels.hopper.quantize.parts import Parts

    fmt, signs = FORMATS[quantizer.mode], None
    if quantizer.rotation is not None:
      assert streams.rotation is not None
      signs = _random_bits.signs(streams.rotation, quantizer.rotation)
    if fmt.has_global_scale and amax is None:
      amax = _amax(a, fmt, signs, is_transposed)
    global_scale = global_scale_of(quantizer, a, amax, axes=(0, 1))
    chooses = quantizer.scale == "four_over_six"
    parts = Parts(quantizer.is_stochastic, quantizer.rotation, quantizer.square, chooses)
    how = {"parts": parts, "key": streams.rounding, "signs": signs}
    return cls(fmt, global_scale, how)


def _amax(a: jax.Array, fmt: Format, signs: jax.Array | None, is_transposed: bool) -> jax.Array:
  from jaxqq._kernels.hopper.quantize import amax

  if signs is None:
    return _rounding.amax(a, (0, 1))
  return (amax.rotated_amax_of_transpose if is_transposed else amax.rotated_amax)(a, fmt, signs)


# Products of a recipe


@dataclasses.dataclass(frozen=True)
class RecipePlan:
  """Two quantizers, and the kernel of the product."""

  problem: RecipeProblem
  product: WidePlan

  @property
  def details(self) -> str:
    ops = self.problem.operands
    found = [f"{name} by columns" for name in ops.transposed]
    how = f", {' and '.join(found)}" if found else ""
    padded = f", K padded to a multiple of {STEP_K} by XLA" if ops.k % STEP_K else ""
    return f"{self.product.kernel} with {self.product.tiles}{how}{padded}"

  def run(self, operands: Operands, streams: tuple[Streams, Streams]) -> jax.Array:
    """out (..., m, n)."""
    from jaxqq._kernels.hopper import launch

    streams = jax.tree.map(lambda key: key.reshape(2), streams)  # of one matrix
    ready = []
    for name, quantizer, own in zip(("x", "w"), self.problem.quantizers, streams, strict=True):
      assert quantizer is not None
      a = getattr(operands, name)
      a, is_transposed = a.reshape(a.shape[-2:]), name in operands.transposed
      ready.append(_exact_operand(quantizer, a, own, is_transposed))
    out = launch.product_of_exact(self.product, *ready)
    return out.reshape(*operands.batch_shape, operands.m, operands.n)


def _exact_operand(
  quantizer: Quantizer, a: jax.Array, streams: Streams, is_transposed: bool
) -> tuple[jax.Array, jax.Array | None]:
  """code * scale in 16 bits (rows, whole steps of k), and the global scale."""
  from jaxqq._kernels.hopper.quantize import columns, exact

  axis = 0 if is_transposed else 1
  widths = [(0, 0), (0, 0)]
  widths[axis] = (0, -a.shape[axis] % math.lcm(STEP_K, quantizer.multiple))
  a = jnp.pad(a, widths)
  given = _Given.of(quantizer, a, streams, None, is_transposed)
  kernel = columns.exact_operand_of_transpose if is_transposed else exact.exact_operand
  dtype = exact_dtype(given.fmt)
  return kernel(a, given.fmt, given.global_scale, dtype=dtype, **given.how), given.global_scale


def _plan_product(problem: RecipeProblem, device: Device) -> RecipePlan:
  check_hopper(problem.obstacle, device)
  ops, (first, second) = problem.operands, problem.quantizers
  if first is None or second is None:
    raise Unsupported("an operand is not quantized")
  if first.mode != second.mode:
    raise Unsupported(f"its operands have two modes, {first.mode} and {second.mode}")
  for name, quantizer in (("x", first), ("w", second)):
    is_transposed = name in ops.transposed
    reason = refusal(quantizer, is_transposed=is_transposed, is_packed=False)
    if reason is not None:
      raise Unsupported(reason)
  k = -(-ops.k // math.lcm(STEP_K, first.multiple)) * math.lcm(STEP_K, first.multiple)
  x, w = (
    jax.ShapeDtypeStruct((1, rows, k), exact_dtype(FORMATS[first.mode])) for rows in (ops.m, ops.n)
  )
  of_gemm = Problem.of(Operands(x, w), FORMATS[first.mode], problem.out_dtype, problem.precision)
  return RecipePlan(problem, exact_plan(of_gemm, device))


RECIPE = Implementation(
  name="hopper_recipe",
  summary=(
    "16 bit tensor cores on exact operands: a kernel quantizes each of x and w as the recipe says, "
    "another multiplies them"
  ),
  platforms=("cuda",),
  plan=_plan_product,
)
