"""A quantized weight as one value: packed codes, scales, and what is needed to multiply by them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeAlias

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import GetAttrKey
from jax.typing import ArrayLike, DTypeLike

from jaxqq._checks import (
  FLOATS,
  as_array,
  as_int32,
  check_bool,
  check_format,
  check_packed,
  describe,
  names,
)
from jaxqq._convert import dequantize
from jaxqq._formats import FORMATS, Mode
from jaxqq._global_scales import scale_of_each_matrix
from jaxqq._reference import Operands
from jaxqq._weight_index import checked_index

# What `w @ x` is, put here by `_quantized_matmul.py`: a weight itself knows no product.
MATMUL: dict[str, Callable[..., jax.Array]] = {}

# The product with a `StackedLayer`, put here by `_stacked_layer.py`.
STACKED_LAYER: dict[str, Callable[..., jax.Array]] = {}

# Asked before a weight is taken apart into its arrays, and may refuse: `jaxqq.nn` puts here what a
# layer of Flax would take for an array.
BEFORE_FLATTEN: list[Callable[[QuantizedWeight], None]] = []

LEAVES = ("packed", "scales", "global_scale", "input_global_scale")


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class QuantizedWeight:
  """A packed weight of logical shape (..., N, K), which `qqmm` takes in w's place.

  w_hat[n, k] = code[n, k] * scale[n, k / group_size] * (global_scale / 2688), the last factor
  where there is a global scale. It is a pytree: its arrays pass through jit, vmap, scan and
  checkpoints as those of any other tree, and mode, dtype and quantize_input are part of its
  structure. Every array has the leading axes of packed, so that an axis of stacked layers can be
  mapped over.

  Args:
    packed: uint32, (..., N, K * bits / 32), as `quantize` packs.
    scales: (..., N, K / group_size), uint8 or the same bytes as float8_e4m3fn (nvfp4) or
      float8_e8m0fnu (mxfp8, mxfp4).
    mode: "nvfp4", "mxfp8" or "mxfp4".
    global_scale: nvfp4 only, a number, taken as float32, or one for each matrix, (...), or for each
      row, (..., N), as `concatenate` makes them: the amax that it was quantized with
      (compressed-tensors has a reciprocal under this name).
    dtype: float32, float16 or bfloat16: that of the weight before, and of `dequantize`.
    input_global_scale: nvfp4 only, likewise: a static amax of the activations, as some checkpoints
      bring it. `qqmm` uses it as global_scale_x where it is given none.
    quantize_input: whether x is quantized too, in products that are not told: layers, what
      `dot_general` returns, weight @ x. `qqmm` always quantizes x, and `quantized_matmul` never.
      `dataclasses.replace(weight, quantize_input=False)` is the same weight for an x as it is.

  Raises:
    TypeError: an array or dtype is of a type that it may not be.
    ValueError: mode or a shape is not as above.

  Example:
    >>> weight = jaxqq.QuantizedWeight(*jaxqq.quantize(jnp.ones((8, 64))))
    >>> weight.shape, weight.nbytes
    ((8, 64), 288)
    >>> jaxqq.qqmm(jnp.ones((2, 64)), weight).shape
    (2, 8)

  Source: the operands of `mlx.core.qqmm`; OCP Microscaling Formats v1.0.
  """

  NO_ARRAY: ClassVar[str] = "only products take one, as w; elsewhere pass its dequantize()"
  packed: jax.Array
  scales: jax.Array
  global_scale: jax.Array | None
  input_global_scale: jax.Array | None
  mode: Mode
  dtype: np.dtype
  quantize_input: bool

  def __init__(
    self,
    packed: ArrayLike | jax.ShapeDtypeStruct,
    scales: ArrayLike | jax.ShapeDtypeStruct,
    mode: Mode = "nvfp4",
    global_scale: ArrayLike | jax.ShapeDtypeStruct | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    input_global_scale: ArrayLike | jax.ShapeDtypeStruct | None = None,
    quantize_input: bool = True,
  ) -> None:
    function = "QuantizedWeight"
    fmt = check_format(function, mode, None, None)
    codes, of_groups = check_packed(function, packed, scales, fmt, name="packed", abstract=True)
    if len(codes.shape) < 2:
      raise ValueError(
        f"{function}: packed must have at least two dimensions, (N, K * {fmt.bits} / 32) or "
        f"(..., N, K * {fmt.bits} / 32), got {describe(codes)}."
      )
    batch_shape = tuple(codes.shape[:-2])
    scale_of = functools.partial(scale_of_each_matrix, function, fmt=fmt, batch_shape=batch_shape)
    rows = codes.shape[-2]
    self._set(
      packed=codes,
      scales=_as_bytes(of_groups),
      global_scale=scale_of("global_scale", global_scale, rows=rows),
      input_global_scale=scale_of("input_global_scale", input_global_scale),
      mode=fmt.mode,
      dtype=_checked_dtype(function, dtype),
      quantize_input=check_bool(function, "quantize_input", quantize_input),
    )

  def _set(self, **fields: Any) -> None:
    for name, value in fields.items():
      object.__setattr__(self, name, value)

  @property
  def shape(self) -> tuple[int, ...]:
    """The logical shape, (..., N, K)."""
    return (*self.packed.shape[:-1], self.packed.shape[-1] * FORMATS[self.mode].codes_per_word)

  @property
  def ndim(self) -> int:
    return len(self.packed.shape)

  @property
  def size(self) -> int:
    """How many numbers it stands for."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """What its arrays take, scales included."""
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(self))

  def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
    """The weight as numbers, (..., N, K).

    Args:
      dtype: float32, float16 or bfloat16; None is the weight's own.

    Returns:
      w_hat, rounded to dtype.

    Raises:
      TypeError: dtype is none of the three.

    Example:
      >>> weight = jaxqq.quantize_weight(jnp.full((4, 64), 3.0))
      >>> weight.dequantize()[0, 0].item()
      3.0
    """
    dtype = _checked_dtype("QuantizedWeight.dequantize", self.dtype if dtype is None else dtype)

    def one(packed: Any, scales: Any, global_scale: Any) -> jax.Array:
      out: jax.Array = dequantize(
        packed, scales, mode=self.mode, global_scale=global_scale, dtype=dtype
      )
      return out

    of_each = one
    for _ in range(0 if self.global_scale is None else jnp.ndim(self.global_scale)):
      of_each = jax.vmap(of_each)
    if self.has_row_scales:
      matrices = (self.packed[..., None, :], self.scales[..., None, :])
      return of_each(*matrices, self.global_scale).squeeze(-2)
    return of_each(self.packed, self.scales, self.global_scale)

  @property
  def has_row_scales(self) -> bool:
    """Whether each row has a global scale, as after `concatenate`, and not each matrix."""
    return self.global_scale is not None and len(self.global_scale.shape) == self.ndim - 1

  def _operands(self, x: Any, global_scale_x: Any) -> Operands:
    """Of the product of x and this weight."""
    rows, of_w = (self.global_scale, None) if self.has_row_scales else (None, self.global_scale)
    return Operands(x, self.packed, self.scales, global_scale_x, of_w, row_scales=rows)

  def __getitem__(self, index: Any) -> QuantizedWeight:
    """Matrices of a stack, or rows of w: what numpy's indexing gives of (..., N, K).

    w[3] is a matrix of a stack, w[:, :64] the first 64 rows of each, w[jnp.array([2, 0])] two
    matrices. N stays an axis, and K is whole.

    Args:
      index: an index of each axis but the last, as of an array: slices, an Ellipsis and, of
        leading axes, integers or one array of integers.

    Raises:
      IndexError: the index is not as above, or an integer is out of range.

    Example:
      >>> stack = jaxqq.quantize_weight(jnp.ones((3, 8, 64)), global_scale="amax")
      >>> stack[0], stack[..., :4, :].shape
      (QuantizedWeight(nvfp4, float32 (8, 64), with global_scale), (3, 4, 64))
    """
    of_stack, of_rows = checked_index(index, self.shape)
    packed, scales = (a[of_stack][..., of_rows, :] for a in (self.packed, self.scales))
    of_w, of_input = (
      None if scale is None else scale[of_stack]
      for scale in (self.global_scale, self.input_global_scale)
    )
    if self.has_row_scales:
      assert of_w is not None
      of_w = of_w[..., of_rows]
    static = self.mode, of_w, self.dtype, of_input, self.quantize_input
    return QuantizedWeight(packed, scales, *static)

  def layer(self, index: ArrayLike) -> StackedLayer:
    """A matrix of a stack, (L, N, K), for `qqmm` and `quantized_matmul` to read where it is.

    `stack[i]` is a copy of the matrix where i is known on the device alone, as in `lax.scan` over
    layers: a kernel has to have its operand whole. The product with `stack.layer(i)` makes none
    where N is a multiple of 8 and K of 64. Else it pads the one matrix, or for N alone its scales.
    From 26 rows of x on, mxfp8 rebases the scales of the one matrix, 1/32 of its bytes.

    Args:
      index: an integer, also an array of one, below L; below 0 it counts from the end. Of an array
        of JAX's that is out of range the product is zeros.

    Raises:
      TypeError: index is no integer.
      ValueError: the weight has not three dimensions, or index not (); or it is a number, of Python
        or numpy, that is out of range.

    Example:
      >>> stack = jaxqq.quantize_weight(jnp.ones((3, 64, 64)))
      >>> def body(x, i):
      ...   return jaxqq.qqmm(x, stack.layer(i)) / 64, None
      >>> jax.lax.scan(body, jnp.ones((2, 64)), jnp.arange(3))[0].shape
      (2, 64)
    """
    function = "QuantizedWeight.layer"
    if self.ndim != 3:
      raise ValueError(
        f"{function}: the weight must be a stack of matrices, (L, N, K), got shape {self.shape}; "
        "index other leading axes first."
      )
    layers = self.shape[0]
    is_number = isinstance(index, (int, float)) and not isinstance(index, bool)
    if not (is_number or hasattr(index, "dtype") or hasattr(index, "__jax_array__")):
      raise TypeError(f"{function}: index must be an integer, got {type(index).__name__}.")
    given = as_array(function, "index", np.asarray(index) if is_number else index)
    if not jnp.issubdtype(given.dtype, jnp.integer):
      raise TypeError(f"{function}: index must be an integer, got {describe(given)}.")
    if given.shape:
      raise ValueError(f"{function}: index must be one integer, got {describe(given)}.")
    if isinstance(given, (np.ndarray, np.generic)):
      number = int(given)
      if not layers:
        raise ValueError(f"{function}: index is {index}, and the weight has no matrix.")
      if not -layers <= number < layers:
        raise ValueError(
          f"{function}: index is {index}, and the weight has {layers} matrices; pass one from "
          f"{-layers} to {layers - 1}."
        )
      return StackedLayer(self, jnp.int32(number % layers))
    place = as_int32(given)
    return StackedLayer(self, jnp.where(place < 0, place + layers, place))

  def __iter__(self) -> Iterator[QuantizedWeight]:
    if self.ndim == 2:
      raise TypeError(
        f"{self!r} is one matrix, whose rows cannot be gone through; take(rows) looks rows up, and "
        "dequantize() gives numbers."
      )
    return (self[i] for i in range(self.shape[0]))

  def __matmul__(self, x: ArrayLike) -> jax.Array:
    """w @ x, (..., N, K) times (K,) or (..., K, M), as layers that multiply so need it.

    It is `qqmm`, or where the weight's quantize_input is False `quantized_matmul`.
    """
    return MATMUL["product"](self, x)

  def __rmatmul__(self, x: Any) -> Any:
    raise TypeError(
      "QuantizedWeight: it cannot be the right operand of @, since it is (N, K) and groups run "
      "along K; write jaxqq.qqmm(x, w) for x times its transpose."
    )

  @property
  def T(self) -> Any:
    raise AttributeError(
      "QuantizedWeight has no transpose: groups run along its last axis, the one that qqmm sums "
      "over; quantize the transposed weight, quantize_weight(w, axis=-2), or dequantize it."
    )

  def take(self, rows: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:
    """Rows of the weight as numbers, as a table of embeddings is looked up in.

    out[..., k] = w_hat[rows[...], k]. Only the rows that are taken are dequantized.

    Args:
      rows: integers of any shape. Negative ones count from the end; as of `jnp.take`, a row that is
        not there is NaN.
      dtype: float32, float16 or bfloat16; None is the weight's own.

    Returns:
      An array of shape rows.shape + (K,).

    Raises:
      TypeError: dtype is none of the three, or rows are no integers.
      ValueError: the weight is a stack of matrices; take one, w[i].take(rows).

    Example:
      >>> table = jaxqq.quantize_weight(jnp.full((4, 64), 3.0))
      >>> table.take(jnp.array([[0, 2, 2]])).shape
      (1, 3, 64)

    Source: `mlx.nn.QuantizedEmbedding`.
    """
    function = "QuantizedWeight.take"
    dtype = _checked_dtype(function, self.dtype if dtype is None else dtype)
    indices = as_array(function, "rows", rows)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
      raise TypeError(f"{function}: rows must be integers, got {describe(indices)}.")
    if self.ndim != 2:
      raise ValueError(
        f"{function}: the weight must have two dimensions, (N, K), got shape {self.shape}; take a "
        "matrix of the stack first, w[i]."
      )
    flat = jnp.ravel(as_int32(indices))

    def taken(a: Any, fill: float) -> jax.Array:
      return jnp.asarray(a).at[flat].get(mode="fill", fill_value=fill)

    packed, scales = taken(self.packed, 0), taken(self.scales, FORMATS[self.mode].scale_nan)
    of_rows = functools.partial(dequantize, mode=self.mode, dtype=dtype)
    if self.global_scale is None or not jnp.ndim(self.global_scale):
      out = of_rows(packed, scales, global_scale=self.global_scale)
    else:  # one for each row
      out = jax.vmap(lambda p, s, g: of_rows(p[None], s[None], global_scale=g)[0])(
        packed, scales, taken(self.global_scale, 1)
      )
    return out.reshape(*indices.shape, self.shape[-1])

  def __array__(self, *_: Any, **__: Any) -> Any:
    raise TypeError(
      f"{self!r} is not an array: it is packed codes and scales; call its dequantize(), or take "
      ".packed and .scales."
    )

  def __repr__(self) -> str:
    shapes = [getattr(self.packed, "shape", ()), getattr(self.scales, "shape", ())]
    try:
      is_weight = all(len(shape) >= 2 for shape in shapes)
    except TypeError:
      is_weight = False
    if is_weight:
      shape: Any = self.shape
    else:  # a tree of shardings, of axes, of dtypes, of None
      leaves = ", ".join(f"{name}={getattr(self, name)!r}" for name in LEAVES)
      words = f"{leaves}, mode={self.mode!r}, dtype={self.dtype.name}"
      return f"QuantizedWeight({words}{self._words_of_input()})"
    scaled = [name for name in LEAVES[2:] if getattr(self, name) is not None]
    words = "".join(f", with {name}" for name in scaled) + self._words_of_input()
    return f"QuantizedWeight({self.mode}, {self.dtype.name} {shape}{words})"

  def _words_of_input(self) -> str:
    return "" if self.quantize_input else ", quantize_input=False"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stack", "index"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class StackedLayer:
  """A matrix of a stack: `QuantizedWeight.layer`."""

  stack: QuantizedWeight  # (L, N, K)
  index: jax.Array  # int32, ()

  # To follow "got StackedLayer" where no function knows it (`_checks.as_array`).
  NO_ARRAY: ClassVar[str] = "only qqmm and quantized_matmul take one, others stack[i]"

  @property
  def shape(self) -> tuple[int, ...]:
    """(N, K)."""
    return self.stack.shape[1:]

  def __array__(self, *_: Any, **__: Any) -> Any:
    raise TypeError(
      "StackedLayer is no array: it stands in w's place in qqmm and quantized_matmul; for an array "
      "take stack[i].dequantize()."
    )

  def __repr__(self) -> str:
    return f"a layer of {self.stack!r}"


def _as_bytes(scales: Any) -> Any:
  """Scales as uint8, whichever type of one byte they came in."""
  if np.dtype(scales.dtype) == np.uint8:
    return scales
  if isinstance(scales, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(scales.shape, np.uint8)
  if isinstance(scales, np.ndarray):
    return scales.view(np.uint8)
  return lax.bitcast_convert_type(scales, jnp.uint8)


def _checked_dtype(function: str, dtype: Any) -> np.dtype:
  try:
    checked = np.dtype(dtype)
  except TypeError:
    checked = None
  if checked not in FLOATS:
    raise TypeError(f"{function}: dtype must be {names(FLOATS)}, got {dtype!r}.")
  return checked


Static: TypeAlias = tuple[str, np.dtype, bool]  # mode, dtype, quantize_input


def _flatten(weight: QuantizedWeight) -> tuple[tuple[Any, ...], Static]:
  for check in BEFORE_FLATTEN:
    check(weight)
  static = weight.mode, weight.dtype, weight.quantize_input
  return tuple(getattr(weight, name) for name in LEAVES), static


def _flatten_with_keys(weight: QuantizedWeight) -> Any:
  leaves, static = _flatten(weight)
  return tuple(zip(map(GetAttrKey, LEAVES), leaves, strict=True)), static


def _unflatten(static: Static, leaves: Any) -> QuantizedWeight:
  """Unchecked: trees of shardings, of axes, of None have this structure too."""
  weight = object.__new__(QuantizedWeight)
  names = ("mode", "dtype", "quantize_input")
  fields = zip((*LEAVES, *names), (*leaves, *static), strict=True)
  weight._set(**dict(fields))
  return weight


jax.tree_util.register_pytree_with_keys(QuantizedWeight, _flatten_with_keys, _unflatten, _flatten)


def _serialized(static: Static) -> bytes:
  mode, dtype, quantize_input = static
  return json.dumps([mode, dtype.name, quantize_input]).encode()


def _deserialized(data: bytes) -> Static:
  """Programs of jaxqq 0.1.0 say nothing of the input, which was always quantized."""
  mode, dtype, *quantize_input = json.loads(data)
  return mode, np.dtype(dtype), quantize_input[0] if quantize_input else True


jax.export.register_pytree_node_serialization(
  QuantizedWeight,
  serialized_name="jaxqq.QuantizedWeight",
  serialize_auxdata=_serialized,
  deserialize_auxdata=_deserialized,
)
jax.export.register_pytree_node_serialization(
  StackedLayer,
  serialized_name="jaxqq.StackedLayer",
  serialize_auxdata=lambda _: b"",
  deserialize_auxdata=lambda _: (),
)
