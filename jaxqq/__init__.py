"""jaxqq: products of block-quantized matrices (nvfp4, mxfp8) as a primitive of JAX."""

import importlib as _importlib
from typing import Any as _Any

from jaxqq._convert import dequantize as dequantize
from jaxqq._convert import quantize as quantize
from jaxqq._dot_general import dot_general as dot_general
from jaxqq._explain import explain as explain
from jaxqq._qqmm import qqmm as qqmm
from jaxqq._weight import QuantizedWeight as QuantizedWeight
from jaxqq._weight import quantize_weight as quantize_weight

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
  """Subpackages that need more than jaxqq does are imported when they are first asked for."""
  if name in ("bench", "checkpoint", "nn"):
    return _importlib.import_module(f"jaxqq.{name}")
  raise AttributeError(f"module 'jaxqq' has no attribute {name!r}")
