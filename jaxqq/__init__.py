"""jaxqq: products of block-quantized matrices (nvfp4, mxfp8) as a primitive of JAX."""

from jaxqq._qqmm import explain as explain
from jaxqq._qqmm import qqmm as qqmm
from jaxqq._quantize import dequantize as dequantize
from jaxqq._quantize import quantize as quantize

__version__ = "0.1.0"
