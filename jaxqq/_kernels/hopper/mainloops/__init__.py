"""Where the left operand of the tensor cores comes from: one small class a file.

`dequant_gemm` takes one of those that expand packed codes (`packed_e2m1`, `packed_e4m3`, and
`in_order` beside x as it is): their layout, their loads, and what makes an operand of one step.

`skinny_gemm` takes one of those that add a block of k to its sums: `expanded` (packed codes, made
float16), `in_order` (packed codes beside x as it is), `group_sums` (mxfp8, each group scaled after
it is summed up), `blockdiag` (nvfp4, whose groups have columns of their own), `quantized` (numbers,
quantized in the registers) and, with an instruction of a warp instead of a warpgroup, `sixteens`
(packed e2m1 codes, a thread 16 neighbours of a row, beside x in the order of memory).
"""
