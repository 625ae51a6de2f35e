"""Hopper's rows in every table."""

from __future__ import annotations

from jaxqq._kernels.hopper import conversion_plan, plan, quantizer_plan, ragged_plan
from jaxqq._kernels.plan import Rows

ROWS = Rows(
  product=plan.IMPLEMENTATIONS,
  ragged=ragged_plan.IMPLEMENTATIONS,
  quantize=(conversion_plan.QUANTIZE,),
  dequantize=(conversion_plan.DEQUANTIZE,),
  quantizer=(quantizer_plan.QUANTIZER,),
  recipe=(quantizer_plan.RECIPE,),
)
