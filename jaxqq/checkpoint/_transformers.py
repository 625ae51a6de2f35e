"""The configuration of transformers' own formats: quant_method "mxfp4", "mxfp8" and "fp8"."""

from __future__ import annotations

import pathlib
from typing import Any, ClassVar

from jaxqq.checkpoint._dense import FP8_BLOCK, Dense
from jaxqq.checkpoint._layouts import Layout
from jaxqq.checkpoint._scheme import Scheme, Tensors, fp8_by, packed_by

LEAVES_INPUTS = "mxfp4"  # the quant_method that does, where no activation_format is named


class Transformers(Scheme):
  """`quant_method`, and `modules_to_not_convert`, which the tensors say as well.

  "mxfp4": stacked experts as of gpt-oss, `X_blocks` and `X_scales`, for activations that are left
  as they are. "mxfp8": `X.weight` and `X.weight_scale_inv`, a factor of the codes whatever it is
  called. "fp8": the same in blocks of `weight_block_size`.
  Source: huggingface/transformers src/transformers/utils/quantization_config.py, and
  src/transformers/quantizers/finegrained/.
  """

  format = "transformers"
  METHODS: ClassVar[tuple[str, ...]] = ("mxfp4", "mxfp8", "fp8")

  def __init__(self, file: pathlib.Path, config: dict[str, Any]):
    super().__init__(file, config)
    self._method = config["quant_method"]
    block = config.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
    sizes = block if isinstance(block, list) else []
    if block is not None and not (
      len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes)
    ):
      raise self.refuse("'weight_block_size'", block, "rows and columns of a block")
    self._block = (sizes[0], sizes[1]) if sizes and self._method == "fp8" else None

  def layout(self, path: str, tensors: Tensors) -> Layout | Dense | None:
    return packed_by(self.format, tensors) or fp8_by(
      self.format, tensors, self._method, self._block
    )

  def is_weight_only(self, path: str, layout: Layout) -> bool:
    activations = self.config.get("activation_format")
    return activations == "bf16" if activations is not None else self._method == LEAVES_INPUTS
