"""`explain`: which implementation a product or a conversion gets, in words."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxqq import _compat, _kernels, _quantizer_lowering, _recipe_product
from jaxqq._convert import checked_dequantize, checked_quantize, dequantize, quantize
from jaxqq._convert_split import Shapes
from jaxqq._convert_split import described as described_conversion
from jaxqq._formats import FORMATS
from jaxqq._given import Given
from jaxqq._kernels import conversions
from jaxqq._kernels.plan import TARGET, Device, Implementation, Plan
from jaxqq._kernels.problem import Conversion
from jaxqq._kernels.ragged import RAGGED
from jaxqq._out_sharding import checked_out_sharding
from jaxqq._primitive import How, planned
from jaxqq._qqmm import checked, checked_by_recipe, qqmm
from jaxqq._quantized_matmul import quantized_matmul
from jaxqq._quantizer import Quantizer
from jaxqq._ragged import checked_ragged, ragged_qqmm, ragged_quantized_matmul
from jaxqq._ragged_primitive import Params, layout_of_problem, problem_of
from jaxqq._ragged_reference import RaggedOperands
from jaxqq._ragged_split import described as described_ragged
from jaxqq._reference import Operands, matrix_ndim
from jaxqq._split import described, named_sharding
from jaxqq._stacked_layer import checked_layer
from jaxqq._weight import StackedLayer

# Platforms as JAX names them; "gpu" is one of the two, whichever is here.
PLATFORMS = ("cpu", "cuda", "gpu", "rocm", "tpu")


class Explanation(str):
  """What `explain` returns: some sentences, and the plan that they tell of.

  Attributes:
    plan: what runs on one device. `plan.name` is the implementation's name, `plan.kernel` its own
      plan (tiles, and what becomes of the operands), `plan.refusals` why not those before it.
      Fields may change from version to version; the text is for readers.
  """

  __slots__ = ("plan",)
  plan: Plan

  def __new__(cls, text: str, plan: Plan) -> Explanation:
    self = super().__new__(cls, text)
    self.plan = plan
    return self

  def __reduce__(self) -> tuple[type[str], tuple[str]]:
    """Copies and pickles are plain text."""
    return str, (str(self),)


def explain(*args: Any, device: jax.Device | str | None = None, **kwargs: Any) -> Explanation:
  """Says which implementation a call of `qqmm` or another function runs, and why.

  The others are `quantized_matmul`, `ragged_qqmm`, `ragged_quantized_matmul`, `quantize`,
  `dequantize`, and the method `quantize` of a `Quantizer`. Of a product by a recipe the forward one
  is told of.

  Args:
    args: the function, unless it is `qqmm`, and what it takes, with the same checks; a
      `jax.ShapeDtypeStruct` serves for an array or a key. Where arrays are split over devices, what
      one device computes is told.
    device: a `jax.Device`, or a platform as JAX names it ("cpu", "cuda", "rocm", "tpu"). None
      is where the first array is, or for what is nowhere yet, JAX's default backend.
    kwargs: what the function takes by name.

  Returns:
    Some sentences, a `str`, whose attribute `plan` is what they tell of.

  Raises:
    TypeError, ValueError: as the function; or it is none of those, or does not take these.

  Example:
    >>> x = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
    >>> print(jaxqq.explain(x, x, mode="mxfp8", device="cpu").split(":")[0])
    qqmm mxfp8, x bfloat16 (8, 64), w bfloat16 (8, 64) quantized on the fly, on cpu
    >>> print(jaxqq.explain(jaxqq.quantize, x, mode="mxfp8", device="cpu").split(":")[0])
    quantize mxfp8, w bfloat16 (8, 64), on cpu
  """
  function: Any = qqmm
  if args and callable(args[0]) and not hasattr(args[0], "dtype"):
    function, *args = args  # type: ignore[assignment]
  explained = next((e for f, e in _EXPLAINED if f is function), None)
  if getattr(function, "__func__", None) is Quantizer.quantize:
    explained = functools.partial(_explain_quantizer, function.__self__)
  if explained is None:
    raise TypeError(
      "explain: the function must be jaxqq.qqmm, jaxqq.quantized_matmul, jaxqq.ragged_qqmm, "
      "jaxqq.ragged_quantized_matmul, jaxqq.quantize, jaxqq.dequantize or the method quantize of a "
      "jaxqq.Quantizer, got "
      f"{getattr(function, '__name__', type(function).__name__)}."
    )
  try:
    call = inspect.signature(function).bind(*args, **kwargs)
  except TypeError as error:
    raise TypeError(
      f"explain: jaxqq.{function.__name__} would not take these arguments: {error}; "
      "pass it and what it takes, and device."
    ) from None
  call.apply_defaults()
  return explained(device, **call.arguments)


def _explain_qqmm(device: Any, **arguments: Any) -> Explanation:
  given = Given(**arguments)
  if (given.recipe is None and given.key is None) or isinstance(given.w, StackedLayer):
    return _explain_plain("qqmm", device, given)
  checked_out_sharding("explain", given.out_sharding)
  by_recipe = checked_by_recipe("explain", given)
  if "mode" not in by_recipe.params:
    return _explain_recipe(device, by_recipe.operands, by_recipe.params["params"])
  return _explain_product("qqmm", device, by_recipe.operands, by_recipe.params)


def _explain_quantized_matmul(device: Any, global_scale: Any, **arguments: Any) -> Explanation:
  given = Given(**arguments, global_scale_w=global_scale, quantize_input=False)
  return _explain_plain("quantized_matmul", device, given)


def _explain_plain(function: str, device: Any, given: Given) -> Explanation:
  checked_out_sharding("explain", given.out_sharding)
  if isinstance(given.w, StackedLayer):
    return _explain_groups(function, device, *checked_layer("explain", given))
  return _explain_product(function, device, *checked("explain", given))


def _explain_recipe(device: Any, operands: Operands, params: _recipe_product.Params) -> Explanation:
  """The forward product, as its operands are on one device."""
  target = _kernels.device_of(_platform(operands.x, device))
  x = operands.x
  rows = jax.ShapeDtypeStruct((int(np.prod(x.shape[:-1])), x.shape[-1]), x.dtype)
  as_matrix = dataclasses.replace(operands, x=rows if len(operands.w.shape) == 2 else x)
  plan = _recipe_product.planned(as_matrix, params, target.platform)
  heading = f"qqmm by a recipe, forward, {_of('x', x)}, {_of('w', operands.w)}"
  return _sentences(heading, plan, target, [])


def _explain_quantizer(
  quantizer: Quantizer, device: Any, *, a: Any, axis: int, **others: Any
) -> Explanation:
  del others
  target = _kernels.device_of(_platform(a, device))
  plan = _quantizer_lowering.planned(quantizer, a, axis == -2, target.platform)
  heading = f"{quantizer!r}.quantize, {_of('a', a)}" + (f" along axis {axis}" if axis == -2 else "")
  return _sentences(heading, plan, target, [])


def _explain_product(
  function: str, device: Any, operands: Operands, params: dict[str, Any]
) -> Explanation:
  platform = _platform(operands.x, device)
  as_matrix = operands
  if len(operands.x.shape) == 1:
    as_matrix = dataclasses.replace(operands, x=_as_matrix(operands.x))
  part, summed, about_split = described(as_matrix, FORMATS[params["mode"]])
  part_dtype = np.dtype(np.float32) if summed else params["out_dtype"]
  fmt = FORMATS[params["mode"]]
  how, target = How.of(params), _kernels.device_of(platform)
  plan, inner = planned(part, fmt, part_dtype, how, target, params["out_dtype"])
  if inner is not part:
    about_split = ["Its float32 result is multiplied by the global scales of w.", *about_split]
  w_words = _of("w", operands.w)
  w_words += " quantized on the fly" if operands.scales is None else " packed"
  heading = f"{function} {params['mode']}, {_of('x', operands.x)}, {w_words}"
  return _sentences(heading, plan, target, about_split)


def _explain_ragged_qqmm(device: Any, **arguments: Any) -> Explanation:
  return _explain_ragged("ragged_qqmm", device, **arguments)


def _explain_ragged_quantized_matmul(
  device: Any, *, global_scale: Any, **arguments: Any
) -> Explanation:
  of_w = {"global_scale_w": global_scale, "quantize_input": False}
  return _explain_ragged("ragged_quantized_matmul", device, **arguments, **of_w)


def _explain_ragged(
  function: str, device: Any, *, group_sizes: Any, group_offset: Any, **arguments: Any
) -> Explanation:
  given = Given(**arguments)
  checked_out_sharding("explain", given.out_sharding)
  operands, params = checked_ragged("explain", given, group_sizes, group_offset)
  return _explain_groups(function, device, operands, params)


def _explain_groups(
  function: str, device: Any, operands: RaggedOperands, params: Params
) -> Explanation:
  """As the operands of one device are."""
  target = _kernels.device_of(_platform(operands.x, device))
  params = dataclasses.replace(params, function=function)
  whole = problem_of(operands, params)
  part, about_split = described_ragged(operands, layout_of_problem(whole), whole.groups)
  sums = dataclasses.replace(params, out_dtype=np.dtype(np.float32))
  is_sum = part.x.shape[-1] < operands.x.shape[-1]
  problem = problem_of(part, sums if is_sum else params, params.out_dtype)
  plan = _kernels.plan(problem, target, RAGGED, chosen=params.implementation)
  w_words = _of("w", operands.w)
  w_words += " quantized on the fly" if operands.scales is None else " packed"
  heading = f"{function} {params.mode}, {_of('x', operands.x)}, {w_words}"
  return _sentences(heading, plan, target, about_split)


def _explain_quantize(device: Any, *, axis: int, **arguments: Any) -> Explanation:
  (w, *scale), names, mode = checked_quantize("explain", axis=axis, **arguments)
  heading = f"quantize {mode}, {_of('w', w)}" + (f" along axis {axis}" if axis == -2 else "")
  problem, about_split = _conversion([w, *scale], names, mode)
  return _explain_conversion(
    heading, problem, _platform(w, device), conversions.QUANTIZE, about_split
  )


def _explain_dequantize(device: Any, **arguments: Any) -> Explanation:
  arrays, names, mode, out_dtype = checked_dequantize("explain", **arguments)
  w, scales = arrays[:2]
  heading = f"dequantize {mode}, {_of('w', w)}, {_of('scales', scales)}, to {out_dtype.name}"
  problem, about_split = _conversion(arrays, names, mode, out_dtype)
  return _explain_conversion(
    heading, problem, _platform(w, device), conversions.DEQUANTIZE, about_split
  )


def _conversion(
  arrays: list[Any], names: tuple[str, ...], mode: str, out_dtype: np.dtype | None = None
) -> tuple[Conversion, list[str]]:
  """The problem of one device, and how it came to that."""
  matrices = [
    _as_matrix(a) if matrix_ndim(name) and len(a.shape) == 1 else a
    for name, a in zip(names, arrays, strict=True)
  ]
  part, about_split = described_conversion(Shapes(names, tuple(matrices), FORMATS[mode]))
  return Conversion.of(FORMATS[mode], names, part.operands, out_dtype), about_split


def _explain_conversion(
  heading: str,
  problem: Conversion,
  platform: str,
  table: tuple[Implementation, ...],
  about_split: list[str],
) -> Explanation:
  device = _kernels.device_of(platform)
  return _sentences(heading, _kernels.plan(problem, device, table), device, about_split)


def _sentences(heading: str, plan: Plan, device: Device, about_split: list[str]) -> Explanation:
  sentences = [
    f"{heading}, on {device.platform}: computed by {plan.implementation.summary}"
    + (f"; {plan.details}." if plan.details else "."),
    *(f"Not {refusal}." for refusal in plan.refusals),
  ]
  needs_newer_jax = any("it needs JAX" in refusal for refusal in plan.refusals)
  if needs_newer_jax and sys.version_info < (3, 12):
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    sentences.append(f"That JAX needs Python 3.12 or newer, and this is {python}.")
  if not device.knows_capability:
    sentences.append(
      "A GPU of compute capability 9.0 is assumed, since none is at hand; the environment variable "
      f"{TARGET} names another."
    )
  if plan.implementation.platforms is None and not plan.refusals:
    sentences.append(f"No kernel is made for {device.platform} yet, so there was no other choice.")
  return Explanation(" ".join([*sentences, *about_split]), plan)


def _of(name: str, a: Any) -> str:
  return f"{name} {np.dtype(a.dtype).name} {tuple(a.shape)}"


def _as_matrix(a: Any) -> jax.ShapeDtypeStruct:
  """A vector as one row."""
  sharding = named_sharding(a)
  if sharding is not None:
    sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
  return jax.ShapeDtypeStruct((1, *a.shape), a.dtype, sharding=sharding)


_EXPLAINED: tuple[tuple[Any, Callable[..., Explanation]], ...] = (
  (qqmm, _explain_qqmm),
  (quantized_matmul, _explain_quantized_matmul),
  (ragged_qqmm, _explain_ragged_qqmm),
  (ragged_quantized_matmul, _explain_ragged_quantized_matmul),
  (quantize, _explain_quantize),
  (dequantize, _explain_dequantize),
)


def _platform(x: Any, device: jax.Device | str | None) -> str:
  """The platform as lowering names it."""
  if device is None and isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
    device = next(iter(x.devices()))
  if device is None:
    platform = jax.default_backend()
  elif isinstance(device, str):
    platform = device.lower()
    if platform not in PLATFORMS:
      raise ValueError(
        f"explain: unknown platform {device!r}; it must be one of "
        f"{', '.join(repr(name) for name in PLATFORMS)}."
      )
  elif isinstance(device, jax.Device):
    platform = device.platform
  else:
    raise TypeError(
      f"explain: device must be a jax.Device, a platform such as 'cuda', or None, got "
      f"{type(device).__name__}."
    )
  return _compat.platform_of_gpus() if platform == "gpu" else platform
