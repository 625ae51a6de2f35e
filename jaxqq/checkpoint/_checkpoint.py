"""What `load` returns: tensors by name, and what their files said besides."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxqq._weight import QuantizedWeight
from jaxqq.checkpoint._dense import DenseLayer
from jaxqq.checkpoint._experts import PlainStack, Stack
from jaxqq.checkpoint._layouts import Form, Layer
from jaxqq.checkpoint._read import Loaded
from jaxqq.checkpoint._scalars import Scalars

Tensor: TypeAlias = jax.Array | np.ndarray | QuantizedWeight


@dataclasses.dataclass
class Notes:
  """What files said of weights, by their names; see `Checkpoint`."""

  stored_scales: dict[str, Scalars] = dataclasses.field(default_factory=dict)
  stored_forms: dict[str, Form] = dataclasses.field(default_factory=dict)
  input_quantized: set[str] = dataclasses.field(default_factory=set)
  dequantized: dict[str, str] = dataclasses.field(default_factory=dict)
  kv_cache: dict[str, Any] = dataclasses.field(default_factory=dict)

  def add(self, layer: Layer | DenseLayer | Stack | PlainStack, loaded: Loaded) -> None:
    if isinstance(layer, PlainStack):
      self.stored_forms[layer.name] = layer.form
      first = layer.items[0]
      if isinstance(first, DenseLayer) and loaded.fields is None:
        self.dequantized[layer.name] = first.report
      return
    if isinstance(layer, DenseLayer):
      if loaded.fields is None:
        self.dequantized[layer.name] = layer.report
      return
    self.stored_scales[layer.name] = loaded.stored
    if layer.form != Form():
      self.stored_forms[layer.name] = layer.form
    if not layer.weight_only:
      self.input_quantized.add(layer.name)


class Checkpoint(dict[str, Tensor]):
  """Tensors by name, and what their files said besides.

  It is a dict, and to `jax.tree` a tree as a dict is; what `jax.tree.map` returns has the tensors
  only.

  Attributes:
    format: "mlx", "modelopt", "compressed-tensors" or "transformers".
    config: what config.json held, but for how the weights are quantized: `save` writes it again.
    stored_scales: for each `QuantizedWeight` the scalars of its files, by the field that they
      became. `save` writes them again where they still stand for that field.
    stored_forms: for those that are no layers `X.weight`, how their tensors were called and their
      axes ordered, or which experts are in a stack. `save` writes them so again.
    input_quantized: the names of those of whose layers the configuration says that activations are
      quantized. `save` says so again, unless the weight says otherwise.
    dequantized: the names of arrays whose layers were quantized as jaxqq does not, and what they
      were, such as "modelopt FP8, a scale for the tensor". `save` writes them as numbers.
    kv_cache: how the configuration said to quantize keys and values, in its own words: `save` says
      so again. Its scales are tensors like others.
  """

  def __init__(
    self,
    tensors: Iterable[tuple[str, Tensor]] = (),
    format: str | None = None,
    config: dict[str, Any] | None = None,
    notes: Notes | None = None,
  ):
    super().__init__(tensors)
    self.format = format
    self.config = config or {}
    notes = notes or Notes()
    self.stored_scales, self.stored_forms = notes.stored_scales, notes.stored_forms
    self.input_quantized, self.dequantized = notes.input_quantized, notes.dequantized
    self.kv_cache = notes.kv_cache

  @property
  def weight_only(self) -> set[str]:
    """The names of each `QuantizedWeight` that is multiplied with activations as they are.

    Files say so (W4A16_NVFP4, NVFP4A16, gpt-oss, and MLX unless "quantize_activations" is set), or
    who loaded them did.
    """
    weights = ((n, w) for n, w in self.items() if isinstance(w, QuantizedWeight))
    return {name for name, weight in weights if not weight.quantize_input}


def _flatten_with_keys(checkpoint: Checkpoint) -> tuple[Any, tuple[str, ...]]:
  keys = sorted(checkpoint)
  return [(jax.tree_util.DictKey(key), checkpoint[key]) for key in keys], tuple(keys)


jax.tree_util.register_pytree_with_keys(
  Checkpoint, _flatten_with_keys, lambda keys, leaves: Checkpoint(zip(keys, leaves, strict=True))
)
