"""Layers of Flax that multiply quantized matrices, and the conversion of whole models.

For Flax NNX: `QQLinear` and its kin, `quantize_model`, `pack` and `unpack`. For Flax Linen:
`QQDense`, `quantize_params` and `quantized_apply`.
"""

try:
  import flax as _flax  # noqa: F401
except ImportError as _error:
  raise ImportError(
    'jaxqq.nn needs flax, which is not installed: pip install "jaxqq[flax]".'
  ) from _error

from jaxqq.nn.base import Packed as Packed
from jaxqq.nn.convert import pack as pack
from jaxqq.nn.convert import quantize_model as quantize_model
from jaxqq.nn.convert import unpack as unpack
from jaxqq.nn.layers import QQEinsum as QQEinsum
from jaxqq.nn.layers import QQLinear as QQLinear
from jaxqq.nn.layers import QQLinearGeneral as QQLinearGeneral
from jaxqq.nn.linen import QQDense as QQDense
from jaxqq.nn.linen import quantized_apply as quantized_apply
from jaxqq.nn.params import quantize_params as quantize_params
from jaxqq.nn.report import LayerReport as LayerReport
from jaxqq.nn.report import Report as Report
