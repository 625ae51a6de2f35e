"""The elements of the formats: float32 to the nearest code, and what a code means, in registers.

The bits are those of `jaxqq._rounding`. Stochastic rounding is one for all of them: `Stochastic` in
`ptx/rounding.py`.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from jaxqq._formats import Format
from jaxqq._kernels.hopper.quantize.groups import per_group

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
SIGN = np.int32(-(2**31))  # the bit of a float32's
_EXPONENT_FIELD = 0x7F800000


class Element(Protocol):
  """How kernels round to an element: to nearest even, and saturating."""

  @staticmethod
  def codes(a: jax.Array, factor: jax.Array) -> jax.Array:
    """int32 codes of a * factor, signs included."""

  @staticmethod
  def values(a: jax.Array, factor: jax.Array, blank: jax.Array) -> jax.Array:
    """float32, what these codes mean; zeros without signs where a group is blank."""

  @staticmethod
  def decode(codes: jax.Array) -> jax.Array:
    """float32 of uint32 codes."""


class _E4M3:
  """The hardware converts."""

  @staticmethod
  def codes(a: jax.Array, factor: jax.Array) -> jax.Array:
    codes = (a * factor).astype(E4M3)
    return lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.int32)

  @staticmethod
  def values(a: jax.Array, factor: jax.Array, blank: jax.Array) -> jax.Array:
    del blank  # a factor of 0 leaves zeros
    return (a * factor).astype(E4M3).astype(jnp.float32)

  @staticmethod
  def decode(codes: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(codes.astype(jnp.uint8), E4M3).astype(jnp.float32)


class _E2M1:
  """Hopper has no conversion: an addition rounds, whose last bits are the code's."""

  @staticmethod
  def codes(a: jax.Array, factor: jax.Array) -> jax.Array:
    _, bits = round_to_e2m1(jnp.abs(a) * factor)
    # The shifted number counts halves, wholes or twos in its last bits, and its exponent field,
    # 149 to 151, says which: a step of two codes each.
    codes = (bits & 7) + ((bits >> 22) - 2 * 149)
    return codes | ((as_bits(a) >> 28) & 8)

  @staticmethod
  def values(a: jax.Array, factor: jax.Array, blank: jax.Array) -> jax.Array:
    rounded, _ = round_to_e2m1(jnp.abs(a) * factor)
    sign = per_group(jnp.where(blank, 0, SIGN), a)
    return as_float(as_bits(rounded) | (as_bits(a) & sign))

  @staticmethod
  def decode(codes: jax.Array) -> jax.Array:
    # As float16, whose exponent field then ends where theirs does: 2**-14 of their value.
    bits = ((codes & 7) << 9) | ((codes & 8) << 12)
    halves = lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16)
    return halves.astype(jnp.float32) * jnp.float32(2.0**14)


_ELEMENTS: dict[np.dtype, type[Element]] = {
  E4M3: _E4M3,
  np.dtype(ml_dtypes.float4_e2m1fn): _E2M1,
}


def element_of(fmt: Format) -> type[Element]:
  return _ELEMENTS[np.dtype(fmt.element)]


def round_to_e2m1(magnitudes: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Magnitudes to e2m1, to nearest even and saturating: the values, and bits that hold codes.

  Adding 2**(exponent + 22) leaves float32 one bit after the leading one, or a step of 0.5
  below 1, and the hardware rounds. No fused multiply-add may take the product before it
  is rounded: the minimum stands between. With the power of two it may, whose product is exact.
  """
  magnitudes = jnp.minimum(magnitudes, 6.0)
  power = as_float(as_bits(jnp.maximum(magnitudes, 1.0)) & _EXPONENT_FIELD)
  shifter = power * np.float32(2.0**22)
  shifted = magnitudes + shifter
  return shifted - shifter, as_bits(shifted)


def as_bits(a: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(a, jnp.int32)


def as_float(bits: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(bits, jnp.float32)
