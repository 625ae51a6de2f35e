"""The quantizers: x and w as the products take them, and `quantize` and `dequantize` themselves.

groups         how arrays are stored in registers, and how these kernels are launched
codes          scales of groups and codes of elements, in registers
parts          what a `jaxqq.Quantizer` does besides: stochastic rounding, rotations
squares        rows of squares that share a scale
packed         packed codes and scale bytes: `quantize`, `dequantize`
exact          code * scale in 16 bits, for exact products
rebased        e4m3 codes on one power of two a row, for fp8 products
group_rescale  the same of packed w: by how much each group's codes are rebased
amax           of a matrix that is rotated
columns        all of these for a matrix whose contracted axis comes first
code_words     packed codes and factors, for `skinny_gemm`'s mxfp8
blockdiag      block-diagonal x, for `skinny_gemm`'s nvfp4
in_kernel      these two, and `exact` of nvfp4, within `skinny_gemm`
"""
