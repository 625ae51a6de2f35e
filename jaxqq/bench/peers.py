"""The implementations that do one case: jaxqq, and what JAX offers beside it.

Each is two functions: `prepare`, which turns the unquantized operands into what the work starts
from and is not timed, and `run`, which is. Makers are cached, so that cases which differ in their
sizes alone share one jitted function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

import jaxqq
from jaxqq._formats import FORMATS, Format, Mode
from jaxqq._gradient import BACKWARDS, Backward
from jaxqq.bench.cases import FORMS, RECIPE_FORMS, Case

CUBLAS = "cublas bf16"  # jnp.dot, which XLA gives to cuBLAS on an NVIDIA GPU
COPY = "copy"
PEERS = {
  "cublas": "jnp.dot of unquantized operands, what ratios are to",
  "xla": "XLA quantizes x, dequantizes both and multiplies in bfloat16",
  "scaled_matmul": "jax.nn.scaled_matmul, with x quantized by XLA",
  "copy": "a pass over memory, what the ratios of quantize are to",
}

Run = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to do a case."""

  name: str
  run: Run  # (*prepare(*operands)) -> result; traced, and timed
  prepare: Run  # (*operands of the form's equation) -> tuple
  packed: bool = True  # whether it moves packed operands as such
  quantized: bool = True  # whether its result is that of quantized operands
  checked: bool = True
  explain: Run | None = None  # (*prepare(*operands)) -> which kernel that is


def implementations(case: Case, peers: Sequence[str] = tuple(PEERS)) -> list[Implementation]:
  """What can do a case: the peers that are named and fit, then jaxqq."""
  form = FORMS[case.form]
  found = []
  if form.is_product:
    if "cublas" in peers:
      dot = _dot(form.equation)
      found.append(Implementation(CUBLAS, dot, _as_given, packed=False, quantized=False))
    if form.contracted == "k" and form.quantizes_x:
      found += [maker(case) for name, maker in _QUANTIZED_PEERS.items() if name in peers]
  elif "copy" in peers:
    # Written back negated: an identity would be no kernel at all.
    found.append(Implementation(COPY, _negate, _as_given, packed=False, checked=False))
  return found + _JAXQQ[case.form](case)


def _as_given(*operands: jax.Array) -> tuple[jax.Array, ...]:
  return operands


def _negate(a: jax.Array) -> jax.Array:
  return -a


@functools.cache
def _dot(equation: str) -> Run:
  """A product with the operands' dtype out; on a GPU, cuBLAS sums in float32 all the same."""
  return functools.partial(jnp.einsum, equation)


# ---- jaxqq


def _jaxqq_product(case: Case) -> list[Implementation]:
  form = FORMS[case.form]
  prepare = pack_last(case.mode) if form.packed else _as_given
  function = jaxqq.qqmm if form.quantizes_x else jaxqq.quantized_matmul
  explain = functools.partial(jaxqq.explain, function, mode=case.mode)
  return [Implementation("jaxqq", _in_mode(function, case.mode), prepare, explain=explain)]


@functools.cache
def _in_mode(function: Run, mode: Mode) -> Run:
  return functools.partial(function, mode=mode)


@dataclasses.dataclass(frozen=True)
class PackLast:
  """Packs the last operand and leaves the others as they are."""

  pack: Any  # jitted, so that it can be compiled ahead

  def __call__(self, *operands: jax.Array) -> tuple[jax.Array, ...]:
    return *operands[:-1], *self.pack(operands[-1])


@functools.cache
def pack_last(mode: Mode) -> PackLast:
  return PackLast(jax.jit(functools.partial(jaxqq.quantize, mode=mode)))


def _jaxqq_backward(case: Case) -> list[Implementation]:
  return [
    Implementation(
      f"jaxqq {backward}",
      _gradient(case.mode, case.form, backward),
      _as_given,
      quantized=backward == "quantized",
    )
    for backward in BACKWARDS
  ]


@functools.cache
def _gradient(mode: Mode, form: str, backward: Backward) -> Run:
  return gradient_of(functools.partial(jaxqq.qqmm, mode=mode, backward=backward), form)


def gradient_of(product: Run, form: str) -> Run:
  """ "dx" or "dw" of x w^T; neither the operand's value nor the forward product enters.

  Args:
    product: of x and w, and perhaps more arguments, which the gradient then takes too.
    form: "dx", of g and w, or "dw", of g and x.
  """

  def dx(g: jax.Array, w: jax.Array, *more: jax.Array) -> jax.Array:
    x = jnp.zeros((g.shape[0], w.shape[1]), g.dtype)
    return jax.vjp(lambda x: product(x, w, *more), x)[1](g)[0]

  def dw(g: jax.Array, x: jax.Array, *more: jax.Array) -> jax.Array:
    w = jnp.zeros((g.shape[1], x.shape[1]), g.dtype)
    return jax.vjp(lambda w: product(x, w, *more), w)[1](g)[0]

  return {"dx": dx, "dw": dw}[form]


def _jaxqq_format(case: Case) -> list[Implementation]:
  prepare = pack_last(case.mode) if case.form == "dequantize" else _as_given
  return [Implementation(f"jaxqq {case.form}", _format(case.mode, case.form), prepare)]


@functools.cache
def _format(mode: Mode, form: str) -> Run:
  quantize = functools.partial(jaxqq.quantize, mode=mode)
  functions: dict[str, Run] = {
    "quantize": quantize,
    "quantize columns": functools.partial(quantize, axis=-2),
    "dequantize": functools.partial(jaxqq.dequantize, mode=mode),
  }
  return functions[form]


def _jaxqq_quantizer(case: Case) -> list[Implementation]:
  """Under an amax that is known before, codes and scales alone; and with its own."""
  run, explain = _quantizer(case.mode, case.form)
  has_amax = FORMATS[case.mode].has_global_scale
  names = {"": True, ", and amax": False} if has_amax else {"": False}
  return [
    Implementation(
      f"jaxqq {case.form}{name}", run, _with_key(given), checked=False, explain=explain
    )
    for name, given in names.items()
  ]


def _quantizer_of(mode: Mode, form: str) -> jaxqq.Quantizer:
  words = form.split()
  return jaxqq.Quantizer(
    mode,
    square="squares" in words,
    rounding="stochastic" if "stochastic" in words else "nearest",
    rotation=16 if "rotated" in words else None,
  )


@functools.cache
def _quantizer(mode: Mode, form: str) -> tuple[Run, Run]:
  """Of an array and the data of a key, and an amax or none; and which kernel that is."""
  quantizer, axis = _quantizer_of(mode, form), -2 if "columns" in form else -1

  def run(a: jax.Array, key: jax.Array, amax: jax.Array | None = None) -> Any:
    return quantizer.quantize(a, key if quantizer.needs_key else None, amax=amax, axis=axis)

  def explain(a: jax.Array, *rest: jax.Array) -> Any:
    del rest
    return jaxqq.explain(quantizer.quantize, a, axis=axis)

  return run, explain


@functools.cache
def _with_key(has_amax: bool) -> Run:
  @jax.jit
  def prepare(a: jax.Array) -> tuple[jax.Array, ...]:
    key = jnp.arange(2, dtype=jnp.uint32)
    return (a, key, jnp.max(jnp.abs(a)).astype(jnp.float32)) if has_amax else (a, key)

  return prepare


_JAXQQ: dict[str, Callable[[Case], list[Implementation]]] = {
  "packed": _jaxqq_product,
  "on the fly": _jaxqq_product,
  "weights alone": _jaxqq_product,
  "dx": _jaxqq_backward,
  "dw": _jaxqq_backward,
  "quantize": _jaxqq_format,
  "quantize columns": _jaxqq_format,
  "dequantize": _jaxqq_format,
  **dict.fromkeys(RECIPE_FORMS, _jaxqq_quantizer),
}

# ---- XLA and jax.nn.scaled_matmul, as one would write them by hand


def _xla(case: Case) -> Implementation:
  packed = FORMS[case.form].packed is not None
  prepare = pack_last(case.mode) if packed else _as_given
  return Implementation("xla dequantize", _dequantize_and_dot(case.mode, packed), prepare)


@functools.cache
def _dequantize_and_dot(mode: Mode, packed: bool) -> Run:
  fmt = FORMATS[mode]

  def round_trip(a: jax.Array) -> jax.Array:
    values, scales = _quantize(a, fmt)
    return _times_scales(values, scales, a.dtype)

  def on_the_fly(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(round_trip(x), round_trip(w).T)

  def with_packed(x: jax.Array, w: jax.Array, scales: jax.Array) -> jax.Array:
    scale = lax.bitcast_convert_type(scales, fmt.scale).astype(jnp.float32)
    return jnp.dot(round_trip(x), _times_scales(_unpack(w, fmt), scale, x.dtype).T)

  return with_packed if packed else on_the_fly


def _scaled_matmul(case: Case) -> Implementation:
  packed = FORMS[case.form].packed is not None
  typed = _typed_operand(case.mode)
  return Implementation(
    "jax.nn.scaled_matmul",
    _quantize_and_scaled_matmul(case.mode, packed),
    (lambda x, w: (x, *jax.jit(typed)(w))) if packed else _as_given,
  )


@functools.cache
def _typed_operand(mode: Mode) -> Run:
  """Elements and scales as arrays of their own dtypes, (1, rows, k) and (1, rows, groups)."""
  fmt = FORMATS[mode]

  def typed(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, scales = _quantize(a, fmt)
    return values.astype(fmt.element)[None], scales.astype(fmt.scale)[None]

  return typed


@functools.cache
def _quantize_and_scaled_matmul(mode: Mode, packed: bool) -> Run:
  typed = _typed_operand(mode)

  def run(x: jax.Array, *w: jax.Array) -> jax.Array:
    (lhs, lhs_scales), (rhs, rhs_scales) = typed(x), w if packed else typed(*w)
    out = jax.nn.scaled_matmul(lhs, rhs, lhs_scales, rhs_scales, preferred_element_type=x.dtype)
    return out[0]

  return run


_QUANTIZED_PEERS: dict[str, Callable[[Case], Implementation]] = {
  "xla": _xla,
  "scaled_matmul": _scaled_matmul,
}


def _quantize(a: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
  """Elements (rows, k) and scales (rows, groups) as float32 numbers, not yet codes."""
  groups = a.astype(jnp.float32).reshape(a.shape[0], -1, fmt.group_size)
  amax = jnp.max(jnp.abs(groups), axis=-1)
  if fmt.scale_is_power_of_two:
    # amax / element_max rounded up to a power of two, on the bits: XLA's division is not exact.
    limit = int(np.float32(fmt.element_max).view(np.int32))
    bits = lax.bitcast_convert_type(amax, jnp.int32)
    above = (bits & 0x7FFFFF) > (limit & 0x7FFFFF)
    biased = (bits >> 23) - (limit >> 23) + 127 + above.astype(jnp.int32)
    scales = lax.bitcast_convert_type(jnp.clip(biased, 1, 254) << 23, jnp.float32)
  else:
    scales = _round_to(amax / np.float32(fmt.element_max), fmt.scale)
  reciprocal = jnp.where(scales == 0, np.float32(0), 1 / scales)
  return _round_to(groups * reciprocal[..., None], fmt.element).reshape(a.shape), scales


def _round_to(a: jax.Array, dtype: np.dtype) -> jax.Array:
  """The nearest values of a narrow type, saturating, as float32: no conversion for XLA to undo."""
  info = ml_dtypes.finfo(dtype)
  magnitude = jnp.minimum(jnp.abs(a), np.float32(info.max))
  bits = lax.bitcast_convert_type(magnitude, jnp.int32) & 0x7F800000
  power = lax.bitcast_convert_type(bits, jnp.float32)
  step = jnp.maximum(power * np.float32(2.0**-info.nmant), np.float32(info.smallest_subnormal))
  return jnp.copysign(jnp.round(magnitude / step) * step, a)


def _times_scales(values: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
  """Exact in bfloat16, for want of a global scale."""
  groups = values.reshape(*scales.shape, -1) * scales[..., None]
  return groups.astype(dtype).reshape(values.shape)


def _unpack(w: jax.Array, fmt: Format) -> jax.Array:
  """Words (rows, words) to elements (rows, k), float32."""
  if fmt.bits == 8:
    return lax.bitcast_convert_type(w, fmt.element).astype(jnp.float32).reshape(w.shape[0], -1)
  info = ml_dtypes.finfo(fmt.element)
  shifts = lax.broadcasted_iota(jnp.uint32, (1, 1, fmt.codes_per_word), 2) * np.uint32(fmt.bits)
  codes = (w[..., None] >> shifts).astype(jnp.int32)
  mantissa = codes & ((1 << info.nmant) - 1)
  exponent = (codes >> info.nmant) & ((1 << info.nexp) - 1)
  normal = ((1 << info.nmant) + mantissa) << jnp.maximum(exponent - 1, 0)
  counts = jnp.where(exponent == 0, mantissa, normal).astype(jnp.float32)
  sign = 1 - 2 * ((codes >> (fmt.bits - 1)) & 1).astype(jnp.float32)
  return (counts * sign * np.float32(info.smallest_subnormal)).reshape(w.shape[0], -1)
