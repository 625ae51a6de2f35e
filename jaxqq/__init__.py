"""jaxqq: products of block-quantized matrices (nvfp4, mxfp8) as a primitive of JAX."""

import importlib as _importlib
import typing as _typing
from importlib import util as _util

from jaxqq import checkpoint_policies
from jaxqq._concatenate import concatenate
from jaxqq._convert import dequantize, quantize
from jaxqq._dot_general import dot_general
from jaxqq._explain import explain
from jaxqq._gather import gather_qqmm
from jaxqq._qqmm import qqmm
from jaxqq._quantize_weight import quantize_weight
from jaxqq._quantized_matmul import quantized_matmul
from jaxqq._quantizer import Quantizer
from jaxqq._ragged import ragged_qqmm, ragged_quantized_matmul
from jaxqq._recipe import Recipe
from jaxqq._trees import combine, partition
from jaxqq._weight import QuantizedWeight

__all__ = [
  "QuantizedWeight",
  "Quantizer",
  "Recipe",
  "checkpoint_policies",
  "combine",
  "concatenate",
  "dequantize",
  "dot_general",
  "explain",
  "gather_qqmm",
  "partition",
  "qqmm",
  "quantize",
  "quantize_weight",
  "quantized_matmul",
  "ragged_qqmm",
  "ragged_quantized_matmul",
]

__version__ = "0.1.0"  # pyproject.toml reads it here

# Subpackages and the package that each needs. They are imported when first asked for, and not in
# `__all__`: `from jaxqq import *` would need them all.
_SUBPACKAGES = {"bench": "jax", "checkpoint": "jax", "nn": "flax"}

if _typing.TYPE_CHECKING:
  from . import bench as bench
  from . import checkpoint as checkpoint
  from . import nn as nn
else:  # a type checker that saw this would let any misspelled name pass

  def __getattr__(name: str):
    if name in _SUBPACKAGES:
      return _importlib.import_module(f"jaxqq.{name}")
    raise AttributeError(f"module 'jaxqq' has no attribute {name!r}")


def __dir__() -> list[str]:
  """Subpackages that can be imported only: `help` and `inspect` get each name they find here."""
  ready = [name for name, needs in _SUBPACKAGES.items() if _util.find_spec(needs)]
  return sorted([*__all__, *ready, "__version__"])
