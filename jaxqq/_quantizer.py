"""`Quantizer`: how one operand of a product is quantized, and the steps that it names.

The way of the data: array -> rotated -> global scale, of its amax -> scales, of groups or squares
-> codes, nearest or stochastic, or nearest, by which scales are corrected. What comes out is what
`quantize` gives: packed codes, and a scale for every group. Where one scale serves a square of
groups, it is there once for each.

Every step is integers, or float32 operations that round the same wherever they are computed, so the
bits depend on the numbers, the key and the places in the tensor alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.typing import ArrayLike

from jaxqq import _hadamard, _random_bits, _rounding, _unbiased
from jaxqq._checks import (
  FLOATS,
  as_array,
  check_bool,
  check_dtype,
  check_format,
  check_global_scale,
  check_groups,
  check_has_global_scale,
  describe,
)
from jaxqq._formats import FORMATS, Format, Mode
from jaxqq._quantize import ERROR_BITS, Encoding, amax_bits_of, encoding_of, pack, with_axes_of
from jaxqq._rounding import ANYWHERE, Arithmetic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
  """Keys of streams of random bits, uint32 (..., 2); None where there are none."""

  rounding: Any = None
  rotation: Any = None


Rounding: TypeAlias = Literal["nearest", "stochastic"]
ScaleRule: TypeAlias = Literal["amax", "four_over_six", "unbiased"]
Rotation: TypeAlias = Literal[16, 32, 64, 128]

FUNCTION = "Quantizer"
_ROUNDING, _ROTATION = 0, 1  # streams of a key

# What the tensor's amax is mapped to, where it is not the largest value of the format.
_TENSOR_MAX = {
  "four_over_six": 6 * 256,
  "unbiased": _unbiased.ELEMENT_MAX * _unbiased.SCALE_MAX,
}

# Of a value for each group (..., groups, 1), one for each block, reduced by the function.
_OverBlock: TypeAlias = Callable[[jax.Array, Callable[..., jax.Array]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Quantizer:
  """How an operand is quantized: block shape, rounding, rotation, and the choice of scales.

  With its defaults it is `quantize`, in nvfp4 under the tensor's amax. Two with the same attributes
  are equal and hash alike, so that one may be a static argument of `jax.jit`. It has no arrays:
  what is random is given to `quantize` as a key.

  Attributes:
    mode: "nvfp4", "mxfp8" or "mxfp4".
    square: whether a scale serves a square of 16 x 16 (nvfp4) or 32 x 32, not a group of one row:
      then the transpose of a matrix is quantized to the same numbers. At the end of the rows a
      square may be cut.
    rounding: "nearest" rounds ties to even. "stochastic" takes one of the two neighbouring elements
      f < a < c, the upper one with the probability (a - f) / (c - f), so that the mean over keys is
      a. No element is clipped then, which would be a bias: nvfp4's scale is rounded up, to the
      smallest s >= amax / 6 * enc, where "nearest" rounds it to nearest. In mxfp8 and mxfp4 a scale
      is always rounded up.
    rotation: None, or the size of a random Hadamard transform along the last axis, 16, 32, 64 or
      128, which comes first: every `rotation` neighbours are multiplied by an orthonormal matrix
      with random signs, in float32 sums rounded to bfloat16 (with "unbiased" scales they stay
      float32). Amaxes are those of the result.
    scale: "amax" maps the amax of a block to 6 (nvfp4, mxfp4) or 448. "four_over_six", of nvfp4
      with nearest rounding, maps it to 6 or to 4, whichever has the smaller squared error (6 where
      they are equal), and the tensor's amax to 6 * 256, so that there is room for the larger scale.
      "unbiased", of rows in nvfp4 with nearest rounding and a rotation, is MS-EDEN: with y the
      numbers divided by the scales, and q the elements that they are rounded to, scales are
      multiplied by S = sum(y * y) / sum(y * q) over each rotation, and rounded stochastically. The
      mean over keys of what is left, rotated back, is a (nearly: the signs of a rotation are few),
      with less variance than of "stochastic" elements. The amax of a group is mapped to
      6 / (17/16 * 0.93), and the tensor's largest scale to 255.99, so that there is room for S; a
      scale that rounds to 0 is 1 instead.

  Raises:
    ValueError, TypeError: an attribute is not as above; "four_over_six" in another mode, or with
      stochastic rounding, whose mean a choice by errors would move; "unbiased" in another mode, of
      squares, with stochastic rounding, or without a rotation.

  Example:
    >>> gradients = jaxqq.Quantizer("nvfp4", rounding="stochastic", rotation=16)
    >>> packed, scales, amax = gradients.quantize(jnp.ones((4, 64)), jax.random.key(0))
    >>> packed.shape, scales.shape, amax.shape
    ((4, 8), (4, 4), ())

  Source: arXiv:2509.25149 (squares, stochastic rounding, rotations); arXiv:2512.02010 (four over
  six); arXiv:2601.22813 (that nothing may be clipped; unbiased scales, as its code has them at
  github.com/IST-DASLab/Quartet-II, 8776a90: schemes/quartet_2.py).
  """

  mode: Mode = "nvfp4"
  square: bool = False
  rounding: Rounding = "nearest"
  rotation: Rotation | None = None
  scale: ScaleRule = "amax"

  def __post_init__(self) -> None:
    fmt = check_format(FUNCTION, self.mode, None, None)
    check_bool(FUNCTION, "square", self.square)
    _check_one_of("rounding", self.rounding, get_args(Rounding))
    _check_one_of("scale", self.scale, get_args(ScaleRule))
    is_size = isinstance(self.rotation, (int, np.integer)) and not isinstance(self.rotation, bool)
    if self.rotation is not None and not (is_size and self.rotation in _hadamard.SIZES):
      raise ValueError(
        f"{FUNCTION}: rotation must be None, or the size of a Hadamard transform, one of "
        f"{', '.join(map(str, _hadamard.SIZES))}, got {self.rotation!r}."
      )
    if self.scale == "four_over_six" and not fmt.has_global_scale:
      raise ValueError(
        f"{FUNCTION}: scale is 'four_over_six', but the scales of mode {self.mode!r} are powers of "
        "two, which it cannot choose between; use mode 'nvfp4', or scale 'amax'."
      )
    if self.scale == "unbiased":
      self._check_unbiased()
    if self.scale == "four_over_six" and self.is_stochastic:
      raise ValueError(
        f"{FUNCTION}: scale is 'four_over_six' and rounding 'stochastic', but choosing between "
        "scales by their errors would move the mean; use rounding 'nearest', or scale 'amax'."
      )

  def _check_unbiased(self) -> None:
    for is_so, what, instead in (
      (
        not FORMATS[self.mode].has_global_scale,
        f"mode {self.mode!r}, whose scales are powers of two",
        "use mode 'nvfp4'",
      ),
      (self.square, "square True, and a square has no row to correct", "use square False"),
      (self.is_stochastic, "rounding 'stochastic'", "use rounding 'nearest'"),
      (self.rotation is None, "rotation None, and its mean is over rotations", "use rotation 128"),
    ):
      if is_so:
        raise ValueError(f"{FUNCTION}: scale is 'unbiased' and {what}; {instead}, or scale 'amax'.")

  @property
  def is_stochastic(self) -> bool:
    return self.rounding == "stochastic"

  @property
  def rounds_at_random(self) -> bool:
    """Whether elements, or scales, are rounded stochastically."""
    return self.is_stochastic or self.scale == "unbiased"

  @property
  def is_plain(self) -> bool:
    """Whether it is `quantize`."""
    return self == Quantizer(self.mode)

  @property
  def needs_key(self) -> bool:
    """Whether anything is random: rounding, or the signs of a rotation."""
    return self.rounds_at_random or self.rotation is not None

  @property
  def multiple(self) -> int:
    """What the size of the last axis is a multiple of: group size and rotation."""
    return max(FORMATS[self.mode].group_size, self.rotation or 1)

  def quantize(
    self,
    a: ArrayLike,
    key: ArrayLike | None = None,
    *,
    rotation_key: ArrayLike | None = None,
    amax: ArrayLike | None = None,
    axis: int = -1,
  ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Quantizes an array along its last axis: packed codes, scales, and the global scale.

    dequantize(packed, scales, mode=..., global_scale=global_scale) is what is left of a, or of a
    rotated; `qqmm` takes them too. Under `jit` a may be split over devices: the amax is the whole
    array's, and the bits are the same. Within `jax.shard_map` a is a device's part alone.

    Args:
      a: float32, float16 or bfloat16, (..., K), K a multiple of the group size and of the rotation.
      key: of `jax.random`, for what is random: the same key gives the same bits on every platform,
        and an element's are those of its place in a.
      rotation_key: whose signs the rotation has; None for those of `key`. The two operands of a
        product share it, and not `key`.
      amax: nvfp4 only, of a as it is quantized: after the rotation. None takes it from there. What
        is larger than amax is clipped to it, but for its block's scale.
      axis: -1, or -2 for a of (..., K, N): the results are those of its transpose (..., N, K),
        which a Hopper GPU never writes.

    Returns:
      packed: uint32, (..., K * bits / 32); the first code in the lowest bits.
      scales: uint8, (..., K / group_size), of a square repeated in each of its rows.
      global_scale: nvfp4: float32, what `dequantize` and `qqmm` take for it, 2688 times what the
        product of code and scale is multiplied by: amax, or with "four_over_six" 1.75 amax, since
        6 * 256 is 2688 / 1.75, and with "unbiased" 1.7293 amax. None in other modes.

    Raises:
      TypeError: a, key or amax is of a type that it may not be.
      ValueError: K is no such multiple; no key, though something is random; a key, though nothing
        is; a square block of a vector; an amax in a mode without global scales; another axis.

    Example:
      >>> quantizer = jaxqq.Quantizer("nvfp4", square=True, scale="four_over_six")
      >>> packed, scales, global_scale = quantizer.quantize(jnp.full((16, 32), 3.0))
      >>> float(global_scale)
      5.25
      >>> float(jaxqq.dequantize(packed, scales, global_scale=global_scale)[0, 0])
      3.0
    """
    a = _checked(self, a, axis)
    words, of_signs = self._keys(key, rotation_key)
    if amax is not None:
      check_has_global_scale(FUNCTION, "amax", FORMATS[self.mode])
      amax = check_global_scale(FUNCTION, "amax", amax, FORMATS[self.mode])
    results = _quantize(jnp.asarray(a), Streams(words, of_signs), amax, self, axis == -2)
    packed, scales, *global_scale = results
    return packed, scales, global_scale[0] if global_scale else None

  def _keys(self, key: Any, rotation_key: Any) -> tuple[jax.Array | None, jax.Array | None]:
    """The keys of the streams that are needed."""
    if rotation_key is None and not self.rounds_at_random:
      key, rotation_key = None, key
    elif rotation_key is None and self.rotation is not None:
      rotation_key = key
    random = "rounding is 'stochastic'" if self.is_stochastic else "scale is 'unbiased'"
    for name, given, needed, what in (
      ("key", key, self.rounds_at_random, random),
      ("key", rotation_key, self.rotation is not None, f"rotation is {self.rotation}"),
    ):
      if needed and given is None:
        raise ValueError(
          f"{FUNCTION}: a {name} is needed where {what}, and none was given; pass one, as "
          "jax.random.key(0)."
        )
      if given is not None and not needed:
        raise ValueError(
          f"{FUNCTION}: a {name} was given, but {self!r} has nothing random for it; leave it out."
        )
    return (
      None if key is None else _stream("key", key, _ROUNDING),
      None if rotation_key is None else _stream("rotation_key", rotation_key, _ROTATION),
    )


def _stream(name: str, key: Any, index: int) -> jax.Array:
  words = _random_bits.key_words(FUNCTION, name, key)
  if words.ndim != 1:
    raise ValueError(
      f"{FUNCTION}: {name} must be one key, got keys of shape {words.shape[:-1]}; use jax.vmap."
    )
  return _random_bits.stream(words, index)


def _check_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
  if not isinstance(value, str) or value not in allowed:
    raise ValueError(
      f"{FUNCTION}: unknown {name} {value!r}; it must be one of {', '.join(map(repr, allowed))}."
    )


def _checked(quantizer: Quantizer, a: Any, axis: Any) -> Any:
  a, fmt = as_array(FUNCTION, "a", a), FORMATS[quantizer.mode]
  check_dtype(FUNCTION, "a", a, FLOATS)
  is_integer = isinstance(axis, (int, np.integer))
  if not is_integer or axis not in (-1, -2) or (axis == -2 and len(a.shape) < 2):
    raise ValueError(
      f"{FUNCTION}: axis must be -1, or -2 of an array with two axes or more, got {axis!r} for "
      f"{describe(a)}."
    )
  check_groups(FUNCTION, "a", a, fmt, axis)
  if a.shape[axis] % quantizer.multiple:
    which = "last axis" if axis == -1 else "axis before the last"
    raise ValueError(
      f"{FUNCTION}: the {which} of a must be a multiple of the rotation {quantizer.rotation}, "
      f"got {describe(a)}; pad it with zeros."
    )
  if quantizer.square and len(a.shape) < 2:
    raise ValueError(
      f"{FUNCTION}: square blocks need two axes, got a vector ({describe(a)}); use square=False."
    )
  return a


def definition(
  a: jax.Array,
  streams: Streams,
  amax: jax.Array | None,
  quantizer: Quantizer,
  is_transposed: bool,
) -> list[jax.Array]:
  """Packed codes, scales, and the global scale where there is one, by plain jnp."""
  arrays, structure = jax.tree.flatten((a, streams, amax))
  how = {"structure": structure, "quantizer": quantizer, "is_transposed": is_transposed}
  return _definition(*arrays, **how)


# As a primitive, which platforms may have kernels for

quantizer_p = Primitive("quantizer")
quantizer_p.multiple_results = True


def _quantize(
  a: jax.Array,
  streams: Streams,
  amax: ArrayLike | None,
  quantizer: Quantizer,
  is_transposed: bool,
) -> list[jax.Array]:
  """Packed codes, scales, and the global scale where there is one."""
  arrays, structure = jax.tree.flatten((a, streams, amax))
  params = {"structure": structure, "quantizer": quantizer, "is_transposed": is_transposed}
  of_a = jax.typeof(a)
  if of_a.sharding.mesh.explicit_axes or of_a.manual_axis_type.varying:  # types that jnp keeps
    return _definition(*arrays, **params)
  return quantizer_p.bind(*arrays, **params)


@functools.partial(
  jax.jit, static_argnames=("structure", "quantizer", "is_transposed"), inline=True
)
def _definition(
  *arrays: jax.Array, structure: Any, quantizer: Quantizer, is_transposed: bool
) -> list[jax.Array]:
  """One tensor, whatever its leading axes, packed."""
  a, streams, amax = jax.tree.unflatten(structure, arrays)
  a = jnp.swapaxes(a, -1, -2) if is_transposed else a
  fmt, k = FORMATS[quantizer.mode], a.shape[-1]
  matrices, batch = a, a.shape[:-2]
  if not quantizer.square:  # rows are rows
    matrices, batch = a.reshape(math.prod(a.shape[:-1]), k), ()
  matrices = rotated(quantizer, matrices, streams.rotation)
  global_scale = global_scale_of(quantizer, matrices, amax, axes=tuple(range(matrices.ndim)))
  matrix = jnp.arange(math.prod(batch), dtype=jnp.uint32).reshape(batch)
  random = random_of(quantizer, streams.rounding, matrices.shape, matrix)
  codes, scales = quantized(quantizer, matrices, global_scale, random)
  packed = pack(codes, fmt).reshape(*a.shape[:-1], k // fmt.codes_per_word)
  scales = scales.astype(jnp.uint8).reshape(*a.shape[:-1], k // fmt.group_size)
  return [packed, scales] if global_scale is None else [packed, scales, global_scale]


def _abstract_eval(*avals: Any, **params: Any) -> Any:
  shapes = jax.eval_shape(functools.partial(_definition, **params), *avals)
  return [jax.core.ShapedArray(a.shape, a.dtype) for a in shapes]


def _batch(args: Any, dims: Any, **params: Any) -> Any:
  """Each a tensor of its own."""
  out = jax.vmap(functools.partial(_definition, **params), in_axes=dims)(*args)
  return out, (0,) * len(out)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
  """Codes are integers, and of global scales the gradient is zero."""
  del tangents
  out = quantizer_p.bind(*primals, **params)
  return out, [ad.Zero(jax.typeof(a).to_tangent_aval()) for a in out]


quantizer_p.def_impl(functools.partial(xla.apply_primitive, quantizer_p))
quantizer_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[quantizer_p] = _batch
ad.primitive_jvps[quantizer_p] = _jvp
mlir.register_lowering(quantizer_p, mlir.lower_fun(_definition, multiple_results=True))


# The steps, of matrices (..., m, k); keys and global scales are one for all, or one for each


def rotated(quantizer: Quantizer, a: jax.Array, key: jax.Array | None) -> jax.Array:
  """`a`, or it rotated by the signs of a stream's key (..., 2): bfloat16, or float32."""
  if quantizer.rotation is None or key is None:
    return a
  dtype = jnp.float32 if quantizer.scale == "unbiased" else jnp.bfloat16
  return _hadamard.rotated(a, _random_bits.signs(key, quantizer.rotation), dtype)


def global_scale_of(
  quantizer: Quantizer, a: jax.Array, amax: jax.Array | None = None, *, axes: tuple[int, ...]
) -> jax.Array | None:
  """float32, what the amax over `axes` of a rotated `a` makes it; None in modes that have none."""
  fmt = FORMATS[quantizer.mode]
  if not fmt.has_global_scale:
    return None
  if amax is None:
    amax = _rounding.amax(lax.stop_gradient(a), axes)
  if quantizer.scale == "amax":
    return amax
  # Below 2**-126 a CPU has zeros. Above float32's range the tensor has less room than it might.
  bits = _rounding.magnitude_bits(amax)
  factor = np.float32(fmt.largest_value / _TENSOR_MAX[quantizer.scale])
  raised = jnp.minimum(amax * factor, np.finfo(np.float32).max)
  raised = jnp.where(bits < _rounding.SMALLEST_NORMAL_BITS, jnp.float32(0), raised)
  return jnp.where(bits < _rounding.INFINITY_BITS, raised, amax)


def random_of(
  quantizer: Quantizer, key: jax.Array | None, shape: tuple[int, ...], matrix: Any = 0
) -> jax.Array | None:
  """int32, uniform in 0 to 65535: of a shape, or of its scales; None where all is to nearest."""
  if not quantizer.rounds_at_random or key is None:
    return None
  if quantizer.is_stochastic:
    return _random_bits.uniform16(key, shape, matrix)
  shape = (*shape[:-1], shape[-1] // FORMATS[quantizer.mode].group_size)
  return _random_bits.uniform16(key, shape, matrix, _random_bits.SCALES)


@functools.partial(jax.jit, static_argnames=("quantizer", "arithmetic"), inline=True)
def quantized(
  quantizer: Quantizer,
  a: jax.Array,
  global_scale: jax.Array | None,
  random: jax.Array | None,
  arithmetic: Arithmetic = ANYWHERE,
) -> tuple[jax.Array, jax.Array]:
  """Codes (..., m, k) and scales (..., m, k / group_size), int32, of what is rotated before."""
  fmt = FORMATS[quantizer.mode]
  a = with_axes_of(a, global_scale)
  num_groups = a.shape[-1] // fmt.group_size
  groups = a.astype(jnp.float32).reshape(*a.shape[:-1], num_groups, fmt.group_size)
  over_block: _OverBlock = _over_groups
  if quantizer.square:
    over_block = functools.partial(_over_squares, size=fmt.group_size)
  amax_bits = over_block(amax_bits_of(groups), jnp.max)
  encoded = functools.partial(encoding_of, a, fmt, global_scale, arithmetic, amax_bits=amax_bits)
  if quantizer.scale == "four_over_six":
    six, four = encoded(largest=6.0), encoded(largest=4.0)
    return _better(a, groups, six, four, fmt, over_block, arithmetic)
  if quantizer.scale == "unbiased":
    assert random is not None and quantizer.rotation is not None
    encoding = encoded(largest=_unbiased.ELEMENT_MAX, encode=_unbiased.encode)
    codes = encoding.codes(a, fmt)
    numbers = jnp.where(encoding.blank, 0, encoding.magnitudes(groups)).reshape(a.shape)
    numbers = lax.bitcast_convert_type(numbers, jnp.float32)
    elements, scales = _rounding.decode(codes, fmt.element), encoding.scales.squeeze(-1)
    return codes, _unbiased.corrected_scales(
      numbers, elements, scales, random, quantizer.rotation, fmt, arithmetic
    )
  # Rounded up, so that no element is larger than a code.
  encode = _rounding.encode_up if quantizer.is_stochastic else _rounding.encode
  encoding = encoded(encode=encode)
  return encoding.codes(a, fmt, random), encoding.scales.squeeze(-1)


def _over_groups(values: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
  """A value for each group is one for each block."""
  del reduce
  return values


def _over_squares(values: jax.Array, reduce: Callable[..., jax.Array], *, size: int) -> jax.Array:
  """int32 (..., m, groups, 1), in each `size` rows those of them all together."""
  *batch, m, groups, _ = values.shape
  missing = -m % size
  widths = [(0, 0)] * len(batch) + [(0, missing), (0, 0), (0, 0)]
  rows = jnp.pad(values, widths).reshape(*batch, (m + missing) // size, size, groups, 1)
  rows = jnp.broadcast_to(reduce(rows, axis=-3, keepdims=True), rows.shape)
  return rows.reshape(*batch, m + missing, groups, 1)[..., :m, :, :]


# Four over six


def _better(
  a: jax.Array,
  groups: jax.Array,
  six: Encoding,
  four: Encoding,
  fmt: Format,
  over_block: _OverBlock,
  arithmetic: Arithmetic,
) -> tuple[jax.Array, jax.Array]:
  """Codes and scales of the encoding with the smaller sum of squared errors in each block.

  Squares are added up as integers, in any order the same: float32 sums would depend on it, and the
  choice on the platform.
  """
  codes = tuple(encoding.codes(a, fmt) for encoding in (six, four))
  number = lax.bitcast_convert_type(four.magnitudes(groups), jnp.float32)
  scale_of_six, scale_of_four = (_rounding.decode(e.scales, fmt.scale) for e in (six, four))
  ratio = arithmetic.divide(scale_of_six, scale_of_four, fmt.scale_bits)
  sums = []
  for own, factor in zip(codes, (ratio, None), strict=True):
    value = _rounding.decode(own.reshape(groups.shape), fmt.element)
    if factor is not None:
      product = _rounding.magnitude_bits(value * factor)
      value = lax.bitcast_convert_type(product, jnp.float32)  # else a fused operation rounds once
    sums.append(_squared_error(jnp.abs(value - number), over_block))
  (high_six, low_six), (high_four, low_four) = sums
  takes_four = (high_four < high_six) | ((high_four == high_six) & (low_four < low_six))
  takes_four = takes_four & ~four.blank
  scales = jnp.where(takes_four, four.scales, six.scales)
  of_six, of_four = (own.reshape(groups.shape) for own in codes)
  return jnp.where(takes_four, of_four, of_six).reshape(a.shape), scales.squeeze(-1)


def _squared_error(errors: jax.Array, over_block: _OverBlock) -> tuple[jax.Array, jax.Array]:
  """The sum of squares over each block, (..., groups, 1): int32s, above 16 bits and below."""
  units = jnp.minimum(errors, np.float32(8 - 2.0**-ERROR_BITS)) * np.float32(2.0**ERROR_BITS)
  units = units.astype(jnp.uint32)  # up to 65535
  squares = units * units
  high, low = (
    over_block(jnp.sum(half.astype(jnp.int32), axis=-1, keepdims=True), jnp.sum)
    for half in (squares >> 16, squares & np.uint32(0xFFFF))
  )
  return high + (low >> 16), low & 0xFFFF
