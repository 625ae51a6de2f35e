"""Which kernel a product gets on Hopper, and which tiles.

    x --quantizer--> x_hat --+
                             +--> gemm ------------> out    w quantized on the fly
    w --quantizer--> w_hat --+
    words, scales -----------+--> dequant_gemm ----> out    w packed
                             +--> staged_gemm -----> out    mxfp8 packed, x of many more rows
                             +--> skinny_gemm -----> out    w packed, x of up to 64 rows (mxfp8: 32)
    w -----------------------+--> skinny_gemm -----> out    w in 16 bits, x of up to 64 rows
    x, words, scales --------+--> skinny_gemm -----> out    w packed, x of one row (mxfp8: 8)

`skinny_gemm` loads K in blocks, of 256 or 512 (packed w) or 128, and zeros past its end; smaller K
go to the others.

An x that is not to be quantized goes to the same kernels as it is, with nothing launched before.

In 16 bits the operands are exact: float16 for e2m1 codes times e4m3 scales, bfloat16 for codes
times powers of two, or the dtype of x as it is, which holds w_hat too. In fp8, twice as fast, a
row's codes share one power of two, and the tensor cores keep 14 bits of a sum:
jaxqq/EXACTNESS.md says what both lose.

Nothing here imports Pallas: a plan can be made, and explained, without it.
"""

from __future__ import annotations

from jaxqq._kernels.hopper.skinny_plan import skinny_plan
from jaxqq._kernels.hopper.wide_plan import exact_plan, fp8_plan
from jaxqq._kernels.plan import Implementation

IMPLEMENTATIONS: tuple[Implementation, ...] = (
  Implementation(
    name="hopper_skinny",
    summary=(
      "a kernel that streams w through the tensor cores: packed codes in fp8 (mxfp8, and nvfp4 of "
      "up to 4 rows), where each group's sum is scaled in float32, or expanded to float16 in "
      "registers; unquantized numbers quantized in registers. x that is not to be quantized it "
      "takes as it is, beside codes expanded to its dtype. Beside packed w it quantizes x "
      "itself (of nvfp4 one, or up to eight where w is small; of mxfp8 eight, or sixteen), else "
      "another kernel does"
    ),
    platforms=("cuda",),
    plan=skinny_plan,
  ),
  Implementation(
    name="hopper_fp8",
    summary=(
      "fp8 tensor cores: a kernel quantizes x (and w, unless packed) to e4m3 codes under one power "
      "of two a row, another multiplies them (packed w expanded in its registers, or before) and "
      "adds every 128 products in float32"
    ),
    platforms=("cuda",),
    plan=fp8_plan,
  ),
  Implementation(
    name="hopper_exact",
    summary=(
      "16 bit tensor cores on exact operands: a kernel quantizes x (and w, unless packed), another "
      "multiplies them (packed w expanded in its registers, or before); x that is not to be "
      "quantized is taken as it is"
    ),
    platforms=("cuda",),
    plan=exact_plan,
  ),
)
