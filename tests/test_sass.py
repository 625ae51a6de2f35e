"""What is read from machine code, and that a product has Mosaic GPU modules to make it of."""

from __future__ import annotations

import pytest

from tests.support import sass
from tests.support.kernels import needs_kernels

TEXT = """
	.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FADD R2, R2, R3 ;
.L_x_1:
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   HGMMA.64x16x16.F32 R24, R96, gdesc[UR4], R24 ;
        /*0040*/                   F2FP.F16.E4M3.UNPACK_B R4, R5.H1 ;
        /*0050*/                   F2FP.F16.E4M3.UNPACK_B R5, R5 ;
        /*0060*/                   HGMMA.64x16x16.F32 R24, R96, gdesc[UR4], R24, gsb0 ;
        /*0070*/              @!P1 BRA `(.L_x_2) ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/              @UP0 UIADD3 UR10, UR8, -0x1, URZ ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/               @P0 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
.L_x_2:
        /*00d0*/                   BPT.TRAP 0x1 ;
.L_x_3:
        /*00e0*/                   BRA `(.L_x_3) ;
"""


def test_innermost_loops_that_multiply():
  (loop,) = sass.loops(TEXT)
  assert len(loop.instructions) == 9
  assert loop.kinds == {"HGMMA": 2, "F2FP": 2, "BRA": 2, "WARPGROUP": 2, "UIADD3": 1}
  assert loop.order == "1 MMA, 2 F2FP, 1 MMA, WAIT"


@needs_kernels
@pytest.mark.parametrize("groups", [0, 4])
def test_modules_of_a_product(groups):
  """A quantizer and a product; in groups the quantizer's launch makes the table of tiles."""
  modules = list(sass.modules("nvfp4", 64, 512, 1024, groups=groups, alone=False))
  assert len(modules) == 2
  assert all(module.startswith(b"ML\xefR") for module in modules)
