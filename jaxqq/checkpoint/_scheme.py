"""What a configuration says of layers: `Scheme`, of which each project has its own."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
import re
from collections.abc import Iterable
from typing import Any, ClassVar

from jaxqq.checkpoint._dense import FP8, Dense
from jaxqq.checkpoint._files import TensorInfo, shown
from jaxqq.checkpoint._layouts import LAYOUTS, Layout

Tensors = dict[str, TensorInfo]


class Scheme(abc.ABC):
  """How a checkpoint is quantized, as its configuration says.

  Attributes:
    kv_cache: what it says of the cache of keys and values, as it is there.
    scales_activations: whether layers that are not quantized may have scales of their activations.
  """

  format: ClassVar[str]

  def __init__(self, file: pathlib.Path, config: dict[str, Any]):
    self.file = file
    self.config = config
    self.kv_cache: dict[str, Any] = {}
    self.scales_activations = False

  @abc.abstractmethod
  def layout(self, path: str, tensors: Tensors) -> Layout | Dense | None:
    """The layout of a layer that has these tensors, by suffix; None for one not quantized."""

  def layers(self) -> list[str]:
    """Layers that the configuration names as quantized: their tensors must be there."""
    return []

  @abc.abstractmethod
  def is_weight_only(self, path: str, layout: Layout) -> bool:
    """Whether the activations of a quantized layer are left as they are."""

  def field(self, key: str, kind: type) -> Any:
    """A value of the configuration that is a dict or a list, empty where there is none."""
    return self.as_kind(repr(key), self.config.get(key), kind)

  def as_kind(self, key: str, value: Any, kind: type) -> Any:
    """A value that is a dict or a list, empty where there is none."""
    if value is not None and not isinstance(value, kind):
      raise self.refuse(key, value, f"a JSON {'object' if kind is dict else 'list'}")
    return kind() if value is None else value

  def check_group_size(self, key: str, entry: Any, layout: Layout) -> None:
    right = layout.fmt.group_size
    found = entry.get("group_size") if isinstance(entry, dict) else entry
    if found not in (None, right):
      raise self.refuse(key, found, f"{right}, that of {layout.name}")

  def refuse(self, key: str, found: Any, expected: str) -> ValueError:
    return ValueError(f"load: {self.file}: {key} must be {expected}, found {shown(found)}.")


@dataclasses.dataclass(frozen=True)
class Names:
  """Layers by name and by pattern. Names are looked up, however many there are."""

  names: frozenset[str]
  patterns: tuple[re.Pattern[str], ...]

  def has(self, path: str) -> bool:
    return path in self.names or any(pattern.match(path) for pattern in self.patterns)


def either(words: Iterable[object]) -> str:
  return " or ".join(map(repr, words))


def packed_by(format: str, tensors: Tensors) -> Layout | None:
  """The layout of a format that these tensors have, by their names and dtypes."""
  for row in LAYOUTS:
    codes, scales = tensors.get(row.codes), tensors.get(row.scales)
    if row.format != format or codes is None or scales is None:
      continue
    right = codes.dtype == row.codes_dtype and scales.dtype in row.scales_dtypes
    if right and (row.fmt.bits == 4 or not _has_blocks(codes, scales, row.fmt.group_size)):
      return row
  return None


def _has_blocks(codes: TensorInfo, scales: TensorInfo, group_size: int) -> bool:
  """Codes of 8 bits under powers of two that are no groups of a row: blocks, FP8's."""
  return scales.shape != (*codes.shape[:-1], codes.shape[-1] // group_size)


def fp8_by(
  format: str, tensors: Tensors, name: str = "FP8", block: tuple[int, int] | None = None
) -> Dense | None:
  """FP8, where the tensors are codes and scales of it."""
  weight = tensors.get("weight")
  if weight is None or weight.dtype not in FP8:
    return None
  scales = next((s for s in ("weight_scale", "weight_scale_inv") if s in tensors), None)
  return None if scales is None else Dense(format, "fp8", name, scales, block)
