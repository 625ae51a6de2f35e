"""Layers of Flax that multiply quantized matrices, and the conversion of whole models.

For Flax NNX: `QQLinear` and its kin, `QQExperts`, `quantize_model`, `pack` and `unpack`. For Flax
Linen: `QQDense`, `quantize_params` and `quantized_apply`.
"""

try:
  import flax as _flax  # noqa: F401
except ImportError as _error:
  raise ImportError(
    'jaxqq.nn needs flax, which is not installed: pip install "jaxqq[flax]".'
  ) from _error

from jaxqq.nn.base import Packed
from jaxqq.nn.convert import pack, quantize_model, unpack
from jaxqq.nn.expert_linear import ExpertLinear, QQExpertLinear
from jaxqq.nn.experts import Experts, QQExperts
from jaxqq.nn.layers import QQEinsum, QQLinear, QQLinearGeneral
from jaxqq.nn.linen import QQDense, quantized_apply
from jaxqq.nn.params import quantize_params
from jaxqq.nn.report import LayerReport, Report

__all__ = [
  "ExpertLinear",
  "Experts",
  "LayerReport",
  "Packed",
  "QQDense",
  "QQEinsum",
  "QQExpertLinear",
  "QQExperts",
  "QQLinear",
  "QQLinearGeneral",
  "Report",
  "pack",
  "quantize_model",
  "quantize_params",
  "quantized_apply",
  "unpack",
]


def __dir__() -> list[str]:
  return list(__all__)
