"""jaxqq: products of block-quantized matrices (nvfp4, mxfp8) as a primitive of JAX."""

from jaxqq._convert import dequantize as dequantize
from jaxqq._convert import quantize as quantize
from jaxqq._qqmm import explain as explain
from jaxqq._qqmm import qqmm as qqmm

__version__ = "0.1.0"
