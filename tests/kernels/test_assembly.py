"""What ptxas says of the kernels, in a process of its own that writes it down."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.support.kernels import on_gpu
from tests.support.processes import ROOT

# Ways to share a tile and sizes of one: mode, rows of x, n, k, and whether w is packed; or in how
# many groups rows are, of packed w.
PRODUCTS = {
  "clusters": ("nvfp4", 256, 4096, 7168, True),
  "clusters, k not even": ("nvfp4", 256, 2048, 6144, True),
  "clusters, few rows": ("nvfp4", 96, 2880, 2880, True),
  "clusters, fp8": ("mxfp8", 256, 4096, 7168, True),
  "clusters, fp8, few rows": ("mxfp8", 96, 4096, 4096, True),
  "stream-K": ("nvfp4", 192, 5120, 25600, True),
  "stream-K, fp8": ("mxfp8", 128, 5376, 21504, True),
  "a tile a CTA": ("nvfp4", 1024, 8192, 8192, True),
  "a tile a CTA, fp8": ("mxfp8", 1024, 8192, 8192, True),
  "mxfp4": ("mxfp4", 256, 4096, 7168, True),
  "staged": ("mxfp8", 4096, 8192, 8192, True),
  "w on the fly": ("nvfp4", 1024, 4096, 4096, False),
  "w on the fly, fp8": ("mxfp8", 1024, 4096, 4096, False),
  "few rows": ("nvfp4", 32, 4096, 7168, True),
  "few rows, fp8": ("mxfp8", 32, 4096, 7168, True),
  "groups, many rows": ("nvfp4", 4096, 28672, 4096, 8),
  "groups, many rows, fp8": ("mxfp8", 4096, 28672, 4096, 8),
  "groups": ("nvfp4", 512, 28672, 4096, 8),
  "groups, fp8": ("mxfp8", 512, 28672, 4096, 8),
}
CODE = """
import ast, sys, jax, jax.numpy as jnp, numpy as np, jaxqq
mode, m, n, k, how = sys.argv[1], *map(ast.literal_eval, sys.argv[2:])
groups = how if how > 1 else None
x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
w = jax.ShapeDtypeStruct((n, k) if groups is None else (groups, n, k), jnp.bfloat16)
ws = jax.eval_shape(lambda w: jaxqq.quantize(w, mode=mode), w) if how else (w,)
if groups is None:
  f, sizes = lambda x, *ws: jaxqq.qqmm(x, *ws, mode=mode), ()
else:
  f = lambda x, w, scales, sizes: jaxqq.ragged_qqmm(x, w, sizes, scales, mode=mode)
  sizes = (jax.ShapeDtypeStruct((groups,), np.int32),)
jax.jit(f).lower(x, *ws, *sizes).compile()
"""


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("name", PRODUCTS)
  def test_instructions_for_the_tensor_cores_overlap(self, name, tmp_path: pathlib.Path):
    """Where ptxas cannot tell what registers they read, it has each end before the next begins."""
    environment = {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    done = subprocess.run(
      [sys.executable, "-c", CODE, *map(str, PRODUCTS[name])],
      env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [path.read_text() for path in tmp_path.glob("*gemm*.ptxas")]
    assert said and all("Used" in text for text in said)
    assert not any("serialized" in text for text in said)
