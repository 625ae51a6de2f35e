"""What the caller of a product gave, on its way to the checks."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from jaxqq._formats import Mode
from jaxqq._gradient import BACKWARDS


class _DefaultMode(str):
  """A mode that nobody asked for, so that a `QuantizedWeight` may bring another."""


DEFAULT_MODE = cast(Mode, _DefaultMode("nvfp4"))


def is_default_mode(mode: Any) -> bool:
  return isinstance(mode, _DefaultMode)


@dataclasses.dataclass(frozen=True)
class Given:
  """The arguments of `qqmm` by their names, unchecked, and which product it is.

  Attributes:
    quantize_input: False of products that take x as it is. They have no global scale of x, and that
      of w is called global_scale.
    broadcasts: whether batch axes have to broadcast; not where indices say which matrices are
      multiplied.
  """

  x: Any
  w: Any
  scales: Any = None
  group_size: Any = None
  bits: Any = None
  mode: Any = DEFAULT_MODE
  global_scale_x: Any = None
  global_scale_w: Any = None
  backward: Any = BACKWARDS[0]
  precision: Any = None
  preferred_element_type: Any = None
  out_sharding: Any = None
  implementation: Any = None
  recipe: Any = None
  key: Any = None
  quantize_input: bool = True
  broadcasts: bool = True

  @property
  def name_of_scale(self) -> str:
    """What the caller knows the global scale of w by."""
    return "global_scale_w" if self.quantize_input else "global_scale"
