"""What every public function asks of its arguments, and the sentence that says so.

Each message names the function, the argument, what it was and what would be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq._formats import FORMATS, Format

FLOATS = (np.dtype(jnp.float32), np.dtype(jnp.float16), np.dtype(jnp.bfloat16))
PACKED = np.dtype(jnp.uint32)


def names(dtypes: tuple[Any, ...]) -> str:
  """'float32, float16 or bfloat16'."""
  words = [np.dtype(dtype).name for dtype in dtypes]
  return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def describe(a: Any) -> str:
  """'float32 of shape (3, 4)'."""
  return f"{np.dtype(a.dtype).name} of shape {tuple(a.shape)}"


def as_array(function: str, name: str, a: Any, *, abstract: bool = False) -> Any:
  """An array of numpy or JAX, a tracer, a `jax.ShapeDtypeStruct`, or what wraps one."""
  abstract = abstract or function == "explain"
  if getattr(a, "__jax_array__", None) is not None:  # None on tracers
    a = a.__jax_array__()
  is_array = (isinstance(a, np.generic) or hasattr(a, "shape")) and hasattr(a, "dtype")
  if not is_array or hasattr(a, "NO_ARRAY"):
    instead = getattr(a, "NO_ARRAY", f"wrap it, for example as jnp.asarray({name})")
    raise TypeError(
      f"{function}: {name} must be a numpy or JAX array, got {type(a).__name__}; {instead}."
    )
  if isinstance(a, jax.ShapeDtypeStruct) and not abstract:
    raise TypeError(
      f"{function}: {name} must be a numpy or JAX array, got a ShapeDtypeStruct ({describe(a)}); "
      "only explain takes one, or jax.eval_shape."
    )
  if isinstance(a, np.ndarray) and not a.dtype.isnative:
    a = a.astype(a.dtype.newbyteorder("="))
  try:
    np.dtype(a.dtype)
  except TypeError:
    raise TypeError(
      f"{function}: {name} must be an array of numbers, got dtype {a.dtype} of shape "
      f"{tuple(a.shape)}."
    ) from None
  return a


def as_int32(a: Any) -> jax.Array:
  """Integers as int32; what that does not hold becomes its nearest end, and so is out of range."""
  ends, own = np.iinfo(np.int32), jnp.iinfo(a.dtype)
  xp: Any = np if isinstance(a, (np.ndarray, np.generic)) else jnp
  if own.max > ends.max:
    a = xp.minimum(a, xp.asarray(ends.max, a.dtype))
  if own.min < ends.min:
    a = xp.maximum(a, xp.asarray(ends.min, a.dtype))
  return jnp.asarray(a.astype(np.int32))


def check_dtype(function: str, name: str, a: Any, allowed: tuple[np.dtype, ...]) -> None:
  if np.dtype(a.dtype) not in allowed:
    raise TypeError(f"{function}: {name} must be {names(allowed)}, got {describe(a)}.")


def check_format(function: str, mode: Any, group_size: Any, bits: Any) -> Format:
  """The row of `FORMATS` that mode names, once group_size and bits agree with it."""
  listed = ", ".join(repr(name) for name in FORMATS)
  if not isinstance(mode, str) or mode not in FORMATS:
    raise ValueError(f"{function}: unknown mode {mode!r}; it must be one of {listed}.")
  fmt = FORMATS[mode]
  for name, value, right in (("group_size", group_size, fmt.group_size), ("bits", bits, fmt.bits)):
    if value is not None and not isinstance(value, (int, np.integer)):
      raise TypeError(
        f"{function}: {name} must be a Python int or None, known before tracing, got "
        f"{type(value).__name__}; pass {right}, or None for the mode's own."
      )
    if value is not None and value != right:
      raise ValueError(
        f"{function}: {name}={value!r} is not a {name} of mode {mode!r}; "
        f"pass {right}, or None for the mode's own."
      )
  return fmt


def check_groups(function: str, name: str, a: Any, fmt: Format, axis: int = -1) -> None:
  if len(a.shape) == 0:
    raise ValueError(
      f"{function}: {name} is a scalar ({describe(a)}), but groups run along a last axis; "
      "give it at least one dimension."
    )
  if a.shape[axis] % fmt.group_size:
    raise ValueError(
      f"{function}: {'the last axis' if axis == -1 else f'axis {axis}'} of {name} must be a "
      f"multiple of the group size "
      f"{fmt.group_size} of mode {fmt.mode!r}, got {describe(a)}; pad it with zeros."
    )


def check_packed(
  function: str, w: Any, scales: Any, fmt: Format, *, name: str = "w", abstract: bool = False
) -> tuple[Any, Any]:
  """Packed w is uint32 and whole groups of words, and its scales fit it; both as arrays."""
  w = as_array(function, name, w, abstract=abstract)
  scales = as_array(function, "scales", scales, abstract=abstract)
  check_dtype(function, name, w, (PACKED,))
  check_dtype(function, "scales", scales, (np.dtype(jnp.uint8), fmt.scale))
  words = fmt.group_size // fmt.codes_per_word
  if len(w.shape) == 0 or w.shape[-1] % words:
    raise ValueError(
      f"{function}: the last axis of packed w must be a multiple of {words}, the uint32 words of "
      f"one group of mode {fmt.mode!r}, got {describe(w)}."
    )
  right = (*w.shape[:-1], w.shape[-1] // words)
  if tuple(scales.shape) != right:
    raise ValueError(
      f"{function}: scales of a packed w ({describe(w)}) must have shape {right} in mode "
      f"{fmt.mode!r}, one scale a group of {fmt.group_size}, got {describe(scales)}."
    )
  return w, scales


def check_has_global_scale(function: str, name: str, fmt: Format) -> None:
  if not fmt.has_global_scale:
    able = ", ".join(repr(row.mode) for row in FORMATS.values() if row.has_global_scale)
    raise ValueError(
      f"{function}: {name} was given, but mode {fmt.mode!r} has no global scale; "
      f"leave it None, or use mode {able}."
    )


def check_global_scale(
  function: str,
  name: str,
  value: Any,
  fmt: Format,
  *,
  batch_shapes: Sequence[Any] = (),
  abstract: bool = False,
) -> Any:
  """The float32 scalar, of shape (), or None; or one for each matrix, of one of batch_shapes."""
  if value is None:
    return None
  check_has_global_scale(function, name, fmt)
  if isinstance(value, (int, float, np.floating)) and not isinstance(value, bool):
    try:
      return jnp.float32(value)
    except OverflowError:
      raise ValueError(
        f"{function}: {name} must be a number that float32 holds, got an integer of "
        f"{int(value).bit_length()} bits."
      ) from None
  batch_shapes = [shape for shape in batch_shapes if shape]
  one_each = " or ".join(dict.fromkeys(map(str, batch_shapes)))
  right = "a float32 scalar" + (f", or one a matrix, {one_each}" if one_each else "")
  if not hasattr(value, "dtype") and not hasattr(value, "__jax_array__"):
    raise TypeError(
      f"{function}: {name} must be a number or {right}, got {type(value).__name__}; it is an amax, "
      "the largest magnitude of the tensor."
    )
  value = as_array(function, name, value, abstract=abstract)
  if np.dtype(value.dtype) not in FLOATS:
    raise TypeError(
      f"{function}: {name} must be {right}, got {describe(value)}; it is an amax, the largest "
      f"magnitude of the tensor: jnp.max(jnp.abs(...)).astype(jnp.float32)."
    )
  is_one_each = tuple(value.shape) in batch_shapes
  if not is_one_each and any(size != 1 for size in value.shape):
    raise ValueError(
      f"{function}: {name} must be {right}, got {describe(value)}; it is an amax, the largest "
      "magnitude of the whole tensor."
    )
  if isinstance(value, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(value.shape if is_one_each else (), np.float32)
  value = jnp.asarray(value).astype(jnp.float32)
  return value if is_one_each else value.reshape(())


def check_bool(function: str, name: str, value: Any) -> bool:
  if not isinstance(value, (bool, np.bool_)):
    raise TypeError(f"{function}: {name} must be True or False, got {value!r}.")
  return bool(value)


def check_precision(function: str, precision: Any) -> lax.Precision | None:
  """A precision, or None, from that or its name; of two the higher, as each operand has its own."""
  if precision is None or isinstance(precision, lax.Precision):
    return precision
  if isinstance(precision, (tuple, list)) and len(precision) == 2:
    both = [check_precision(function, one) for one in precision]
    return max(both, key=lambda one: -1 if one is None else int(one.value))
  try:
    return lax.Precision(precision)
  except (TypeError, ValueError):  # of what cannot be hashed, too
    raise TypeError(
      f"{function}: precision must be None, a jax.lax.Precision or its name, or two of them, got "
      f"{precision!r}."
    ) from None


def check_out_dtype(function: str, preferred: Any) -> np.dtype:
  """The dtype that preferred_element_type names."""
  try:
    dtype = np.dtype(preferred)
  except TypeError:
    dtype = None
  if dtype not in FLOATS:
    raise TypeError(
      f"{function}: preferred_element_type must be {names(FLOATS)}, got {preferred!r}."
    )
  return dtype
