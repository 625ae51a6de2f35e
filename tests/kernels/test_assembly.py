"""What ptxas says of the kernels, in a process of its own that writes it down."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from tests.support import processes
from tests.support.kernels import needs_kernels, on_gpu


@dataclasses.dataclass(frozen=True)
class Product:
  """A product, and which kernel multiplies: how many CTAs share a tile, and by how many rows."""

  mode: str
  m: int
  n: int
  k: int
  kernel: str
  cluster: int = 1
  stream_k: bool = False
  block_n: int = 128
  packed: bool = True
  groups: int = 0  # of rows, with a matrix each
  function: str = "qqmm"
  precision: str | None = None
  has_global_scales: bool = False

  @property
  def how(self) -> dict[str, Any]:
    return {"mode": self.mode, "precision": self.precision}

  @property
  def operands(self) -> tuple[Any, ...]:
    """The shapes and dtypes of x and w."""
    x = jax.ShapeDtypeStruct((self.m, self.k), jnp.bfloat16)
    shape = (self.groups, self.n, self.k) if self.groups else (self.n, self.k)
    ws = (jax.ShapeDtypeStruct(shape, jnp.bfloat16),)
    if self.packed:
      ws = jax.eval_shape(lambda w: jaxqq.quantize(w, mode=self.mode), *ws)
    return x, *ws

  def call(self) -> tuple[Any, tuple[Any, ...]]:
    """A function of arrays, and their shapes and dtypes."""
    how, operands, scale = self.how, self.operands, jax.ShapeDtypeStruct((), jnp.float32)
    function = getattr(jaxqq, self.function)
    if self.groups:
      sizes = jax.ShapeDtypeStruct((self.groups,), np.int32)
      return (lambda x, w, s, sizes: jaxqq.ragged_qqmm(x, w, sizes, s, **how)), (*operands, sizes)
    if not self.has_global_scales:
      return (lambda *operands: function(*operands, **how)), operands

    def scaled(of_x: Any, of_w: Any, *operands: Any) -> Any:
      return function(*operands, global_scale_x=of_x, global_scale_w=of_w, **how)

    return scaled, (scale, scale, *operands)

  def plan(self) -> Any:
    """Of a product without groups, on a Hopper GPU."""
    function = getattr(jaxqq, self.function)
    return jaxqq.explain(function, *self.operands, device="cuda", **self.how).plan.kernel


P = Product
PRODUCTS = {
  "clusters": P("nvfp4", 256, 4096, 7168, "dequant_gemm", cluster=2),
  "clusters of three": P("nvfp4", 96, 4096, 7168, "dequant_gemm", cluster=3),
  "clusters, few rows": P("nvfp4", 64, 3072, 3072, "dequant_gemm", cluster=4),
  "clusters, 192 rows of w": P("nvfp4", 128, 5120, 8192, "dequant_gemm", cluster=4, block_n=192),
  "clusters, 256 rows of w": P("mxfp4", 64, 7168, 16384, "dequant_gemm", cluster=4, block_n=256),
  "clusters, fp8": P("mxfp8", 256, 4096, 7168, "dequant_gemm", cluster=2),
  "clusters, fp8, few rows": P("mxfp8", 96, 4096, 4096, "dequant_gemm", cluster=3),
  "clusters, 192 rows of both": P("nvfp4", 192, 12288, 4096, "dequant_gemm", 2, block_n=192),
  "clusters, 96 rows of x by 256": P("nvfp4", 96, 16384, 16384, "dequant_gemm", 2, block_n=256),
  "stream-K": P("nvfp4", 256, 51200, 5120, "dequant_gemm", stream_k=True),
  "stream-K, 128 rows of both": P("nvfp4", 128, 4096, 14336, "dequant_gemm", stream_k=True),
  "stream-K, 192 rows of x": P("nvfp4", 192, 5120, 25600, "dequant_gemm", stream_k=True),
  "stream-K, 192 rows of w": P(
    "nvfp4", 128, 51200, 5120, "dequant_gemm", stream_k=True, block_n=192
  ),
  "stream-K, 256 rows of w": P(
    "nvfp4", 32, 51200, 5376, "dequant_gemm", stream_k=True, block_n=256
  ),
  "stream-K, 16 rows of x": P("nvfp4", 16, 5760, 14336, "dequant_gemm", stream_k=True, block_n=256),
  "16 rows of x": P("nvfp4", 16, 28672, 4096, "dequant_gemm", block_n=256),
  "64 rows of x by 256": P("nvfp4", 64, 28672, 4096, "dequant_gemm", block_n=256),
  "clusters, 64 rows of x by 256": P("nvfp4", 64, 7168, 16384, "dequant_gemm", 4, block_n=256),
  "stream-K, 192 rows of both": P(
    "nvfp4", 192, 51200, 5120, "dequant_gemm", stream_k=True, block_n=192
  ),
  "stream-K, 96 rows of x by 256": P(
    "nvfp4", 96, 36864, 2560, "dequant_gemm", stream_k=True, block_n=256
  ),
  "stream-K, fp8, many rows": P("mxfp8", 256, 5120, 25600, "dequant_gemm", stream_k=True),
  "stream-K, fp8": P("mxfp8", 128, 5376, 21504, "dequant_gemm", stream_k=True),
  "stream-K, 192 rows of both, global scales": P(
    *("nvfp4", 192, 51200, 5120, "dequant_gemm"), stream_k=True, block_n=192, has_global_scales=True
  ),
  "rows that are no tiles": P("nvfp4", 1001, 8192, 8192, "dequant_gemm"),
  "rows that are no tiles, fp8": P("mxfp8", 1001, 8192, 8192, "dequant_gemm"),
  "rows that are no tiles, on the fly": P("nvfp4", 1001, 4096, 4096, "gemm", packed=False),
  "a tile a CTA": P("nvfp4", 1024, 8192, 8192, "dequant_gemm"),
  "a tile a CTA, fp8": P("mxfp8", 1024, 8192, 8192, "dequant_gemm"),
  "exact sums": P("nvfp4", 256, 4096, 7168, "dequant_gemm", cluster=2, precision="highest"),
  "mxfp4": P("mxfp4", 256, 4096, 7168, "dequant_gemm", cluster=2),
  "weights alone": P("mxfp8", 256, 4096, 7168, "dequant_gemm", 2, function="quantized_matmul"),
  "staged": P("mxfp8", 4096, 8192, 8192, "staged_gemm"),
  "w on the fly": P("nvfp4", 1024, 4096, 4096, "gemm", packed=False),
  "w on the fly, fp8": P("mxfp8", 1024, 4096, 4096, "gemm", packed=False),
  "few rows": P("nvfp4", 32, 4096, 7168, "skinny_gemm", cluster=2, block_n=64),
  "few rows, fp8": P("mxfp8", 32, 4096, 7168, "skinny_gemm", cluster=2, block_n=64),
  "few rows, quantized": P("nvfp4", 8, 4096, 4096, "skinny_gemm", cluster=2, block_n=64),
  "few rows, quantized, fp8": P("mxfp8", 16, 4096, 4096, "skinny_gemm", cluster=2, block_n=64),
  "few rows, stream-K": P("nvfp4", 8, 5120, 25600, "skinny_gemm", stream_k=True, block_n=64),
  "few rows, stream-K, fp8": P("mxfp8", 32, 5120, 25600, "skinny_gemm", stream_k=True, block_n=64),
  "few rows, uneven": P("nvfp4", 16, 2048, 7168, "skinny_gemm", cluster=3, block_n=64),
  "few rows, fp8, last shared": P("mxfp8", 32, 28672, 4096, "skinny_gemm", cluster=2, block_n=64),
  "one row, last shared": P("nvfp4", 1, 28672, 4096, "skinny_gemm", cluster=2, block_n=64),
  "groups, many rows": P("nvfp4", 4096, 28672, 4096, "dequant_gemm", groups=8),
  "groups, many rows, fp8": P("mxfp8", 4096, 28672, 4096, "dequant_gemm", groups=8),
  "groups": P("nvfp4", 512, 28672, 4096, "dequant_gemm", groups=8),
  "groups, fp8": P("mxfp8", 512, 28672, 4096, "dequant_gemm", groups=8),
  "groups, scales in planes": P("nvfp4", 512, 5760, 2880, "dequant_gemm", groups=8),
  "scales in planes": P("nvfp4", 64, 2880, 2880, "dequant_gemm", cluster=4),
  "fp8, scales in planes": P("mxfp8", 512, 5760, 2880, "dequant_gemm", groups=8),
}
CODE = """
import json, sys, jax
from tests.kernels.test_assembly import Product
f, args = Product(**json.loads(sys.argv[1])).call()
jax.jit(f).lower(*args).compile()
"""


@needs_kernels
@pytest.mark.parametrize("name", [name for name in PRODUCTS if not PRODUCTS[name].groups])
def test_products_have_the_tiles_that_they_are_here_for(name):
  product, plan = PRODUCTS[name], PRODUCTS[name].plan()
  found = plan.kernel, plan.tiles.cluster, getattr(plan.tiles, "stream_k", False)
  assert found == (product.kernel, product.cluster, product.stream_k)
  assert plan.tiles.block_n == product.block_n


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("name", PRODUCTS)
  def test_instructions_for_the_tensor_cores_overlap(self, name, tmp_path: pathlib.Path):
    """Where ptxas cannot tell what registers they read, it has each end before the next begins."""
    product = json.dumps(dataclasses.asdict(PRODUCTS[name]))
    written = {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    done = processes.run(CODE, tmp_path, product, **written)
    assert done.returncode == 0, done.stderr
    said = [path.read_text() for path in tmp_path.glob("*gemm*.ptxas")]
    assert said and all("Used" in text for text in said)
    assert not any("serialized" in text for text in said)
