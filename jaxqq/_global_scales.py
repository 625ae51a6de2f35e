"""Which global scales operands get where a caller leaves that to jaxqq.

nvfp4's scales of groups reach from 2**-9 to 448. A global scale, the amax of its tensor, moves the
tensor into that range. Weights and cotangents are often below it, activations seldom are.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq import _rounding
from jaxqq._checks import check_global_scale, check_has_global_scale
from jaxqq._formats import Format

# Of an operation that has both operands: w its amax and x none; each its amax; none.
# Or w its amax, and each row of x a power of two.
GlobalScale: TypeAlias = Literal["weight", "amax", "row"] | None


class _Default(str):
  """A choice that nobody asked for, so that it is none in a mode without global scales."""


DEFAULT = cast(GlobalScale, _Default("weight"))
DEFAULT_OF_WEIGHT = cast(Literal["amax"], _Default("amax"))


def is_default(choice: Any) -> bool:
  return isinstance(choice, _Default)


def checked_choice(function: str, choice: Any, fmt: Format) -> GlobalScale:
  """The choice itself, or the error that the caller should see; of a default, what it is."""
  if is_default(choice):
    return cast(GlobalScale, str(choice)) if fmt.has_global_scale else None
  if choice is None:
    return None
  if not isinstance(choice, str) or choice not in ("weight", "amax", "row"):
    raise ValueError(
      f"{function}: global_scale must be 'weight' (the amax of the weight), 'amax' (of both "
      f"operands), 'row' (of the weight and of each row of x) or None, got {choice!r}; it is taken "
      "from the operands of each call."
    )
  check_has_global_scale(function, "global_scale", fmt)
  return cast(GlobalScale, choice)


def unscaled(fmt: Format) -> jax.Array:
  """The global scale that is none: what it is mapped to is itself."""
  return jnp.float32(fmt.largest_value)


def amax_of_each_matrix(a: jax.Array, batch_ndim: int) -> jax.Array:
  """float32, over all but the first batch_ndim axes; global scales have no gradient."""
  return _rounding.amax(lax.stop_gradient(a), tuple(range(batch_ndim, a.ndim)))


def scale_that_reaches(amax: jax.Array, fmt: Format) -> jax.Array:
  """A global scale for what has none: none, 2688, unless amax is below 1; then 2688 * 2**e.

  With an amax of 1 or more only groups are lost that matter little beside the largest, and the bits
  are those without a global scale. Below, it is the smallest 2688 * 2**e that amax does not exceed.
  """
  largest = int(np.float32(fmt.largest_value).view(np.int32))
  bits = _rounding.magnitude_bits(amax)
  power = _rounding.exponent_to_reach(bits, fmt.largest_value) - 127
  power = jnp.maximum(power, 1 - (largest >> 23))  # the scale is normal
  scale = lax.bitcast_convert_type(largest + (power << 23), jnp.float32)
  return jnp.where((bits == 0) | (bits >= _ONE_BITS), unscaled(fmt), scale)


_ONE_BITS = 0x3F800000


def by_rows(x: jax.Array, fmt: Format) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Each row of x times a power of two, and two factors, (..., 1), that undo it together.

  The power moves a row's amax to above half of 2688 and no further than that, so that without a
  global scale no row depends on another. A row of zeros, or one that is not finite, stays.
  """
  bits = _rounding.magnitude_bits(_rounding.amax(x, (x.ndim - 1,), keepdims=True))
  power = _rounding.exponent_to_reach(bits, fmt.largest_value) - 127
  power = jnp.where((bits == 0) | (bits >= _rounding.INFINITY_BITS), 0, power)
  half = power >> 1
  # Two, since one alone may be out of float32's range.
  factors = _rounding.power_of_two(half), _rounding.power_of_two(power - half)
  moved = x.astype(jnp.float32)
  for exponent in (-half, half - power):
    moved = moved * _rounding.power_of_two(exponent)
  return moved.astype(x.dtype), factors


def scale_of_each_matrix(
  function: str,
  name: str,
  value: Any,
  *,
  fmt: Format,
  batch_shape: tuple[int, ...],
  rows: int | None = None,
) -> Any:
  """float32 of batch_shape, from one number each or one for all; None from None.

  Or (*batch_shape, rows), where there may be one for each row.
  """
  is_float32 = getattr(value, "dtype", None) == np.float32
  right = (batch_shape,) if rows is None else (batch_shape, (*batch_shape, rows))
  if is_float32 and fmt.has_global_scale and tuple(value.shape) in right:
    return value  # of numpy, as it came
  value = check_global_scale(function, name, value, fmt, batch_shapes=right, abstract=True)
  if value is None or tuple(value.shape) in right:
    return value
  if isinstance(value, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(batch_shape, value.dtype)
  return jnp.broadcast_to(value, batch_shape)
