"""The block formats: one row a mode, and nothing about a mode anywhere else.

A format is an element type, the number of neighbouring elements (a group) that share a
scale, and the type of that scale. Everything else follows from those, most of it from
`ml_dtypes.finfo`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Format:
  """A block format; see `FORMATS` for the rows."""

  mode: Mode
  element: np.dtype
  group_size: int
  scale: np.dtype
  has_global_scale: bool  # an optional float32 scale for the whole tensor
  definition: str

  @property
  def bits(self) -> int:
    return int(ml_dtypes.finfo(self.element).bits)

  @property
  def codes_per_word(self) -> int:
    return 32 // self.bits

  @property
  def element_max(self) -> float:
    return float(ml_dtypes.finfo(self.element).max)

  @property
  def element_max_bits(self) -> int:
    """Significant bits of the largest element, by which amax is divided."""
    return significant_bits(self.element_max)

  @property
  def scale_bits(self) -> int:
    """Significant bits of a scale."""
    return int(ml_dtypes.finfo(self.scale).nmant) + 1

  @property
  def largest_value_bits(self) -> int:
    """Significant bits of the largest value, by which a global scale is divided."""
    return significant_bits(self.largest_value)

  @property
  def scale_is_power_of_two(self) -> bool:
    return int(ml_dtypes.finfo(self.scale).nmant) == 0

  @property
  def scale_nan(self) -> int:
    """The byte of the NaN scale, which makes a whole group NaN."""
    return int(np.array(np.nan, self.scale).view(np.uint8))

  @property
  def largest_value(self) -> float:
    """Largest element times largest scale: what the global scale (an amax) is mapped to."""
    return self.element_max * float(ml_dtypes.finfo(self.scale).max)


def significant_bits(value: float) -> int:
  odd, _ = value.as_integer_ratio()
  return (odd // (odd & -odd)).bit_length()


_E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)

_MX = "https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf"
_NVFP4 = (
  "https://developer.nvidia.com/blog/"
  "introducing-nvfp4-for-efficient-and-accurate-low-precision-inference/"
)

# The modes of the table below, as signatures name them.
Mode: TypeAlias = Literal["nvfp4", "mxfp8", "mxfp4"]

FORMATS: dict[str, Format] = {
  row.mode: row
  for row in (
    #       mode    element group scale  global definition
    Format("nvfp4", _E2M1, 16, _E4M3, True, _NVFP4),
    Format("mxfp8", _E4M3, 32, _E8M0, False, _MX),
    Format("mxfp4", _E2M1, 32, _E8M0, False, _MX),
  )
}
