"""What a product is on Hopper: so many kernels of jaxqq's, and none of XLA's around them."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

import jaxqq
from jaxqq._formats import FORMATS
from tests.support.kernels import needs_kernels
from tests.support.programs import count_kernels, lowered_for_cuda

pytestmark = needs_kernels
# Those that XLA makes no kernel of; the last two where they only move axes of one element.
FREE = {"bitcast_convert", "custom_call", "reshape", "return", "broadcast_in_dim", "transpose"}
PACKED = [  # mode, m, k, kernels
  ("nvfp4", 1, 8192, 1),
  ("nvfp4", 2, 8192, 1),
  ("nvfp4", 5, 8192, 1),
  ("nvfp4", 9, 8192, 2),
  ("nvfp4", 4, 4096, 1),
  ("nvfp4", 1, 1280, 2),
  ("nvfp4", 1, 2880, 2),
  ("nvfp4", 3, 2880, 2),
  ("nvfp4", 16, 2880, 2),
  ("nvfp4", 64, 8192, 2),
  ("nvfp4", 128, 8192, 2),
  ("nvfp4", 512, 2880, 2),
  ("nvfp4", 8192, 8192, 2),
  ("nvfp4", 33, 8192, 2),
  ("nvfp4", 100, 8192, 2),
  ("nvfp4", 1001, 2880, 2),
  ("mxfp8", 8, 8192, 1),
  ("mxfp8", 9, 8192, 1),
  ("mxfp8", 17, 8192, 2),
  ("mxfp8", 4, 2880, 2),
  ("mxfp8", 32, 5376, 2),
  ("mxfp8", 64, 8192, 2),
  ("mxfp8", 512, 2880, 2),
  ("mxfp8", 33, 8192, 2),
  ("mxfp8", 100, 2880, 2),
  ("mxfp8", 1001, 8192, 2),
]


def work_of_xla(text: str) -> list[str]:
  """Operations of a program's StableHLO that XLA may make a kernel of."""
  found = []
  for line in text.splitlines():
    for op in re.findall(r"\bstablehlo\.(\w+)", line):
      shapes = [
        [int(n) for n in re.findall(r"\d+(?=x)", shape)]
        for shape in re.findall(r"tensor<((?:\d+x)*)", line)
      ]
      is_free = op in FREE
      if op == "broadcast_in_dim":
        is_free = len({math.prod(shape) for shape in shapes}) == 1
      if op == "transpose":
        order = [int(i) for i in re.findall(r"\d+", re.findall(r"dims = \[(.*?)\]", line)[0])]
        long = [i for i in order if shapes[0][i] > 1]
        is_free = long == sorted(long)
      if op == "custom_call":
        is_free = "@mosaic_gpu_v2" in line
      if not is_free:
        found.append(line.strip())
  return found


def scales_of(mode: str) -> dict[str, jax.ShapeDtypeStruct]:
  scale = jax.ShapeDtypeStruct((), jnp.float32)
  return {"global_scale_x": scale, "global_scale_w": scale} if mode == "nvfp4" else {}


@pytest.mark.parametrize(("mode", "m", "k", "kernels"), PACKED)
def test_packed_w(mode, m, k, kernels):
  """With global scales, which each kernel takes as they are."""
  spec, fmt = jax.ShapeDtypeStruct, FORMATS[mode]
  w = spec((512, k * fmt.bits // 32), jnp.uint32), spec((512, k // fmt.group_size), jnp.uint8)
  names = list(scales_of(mode))

  def product(x, w, scales, *given):
    return jaxqq.qqmm(x, w, scales, mode=mode, **dict(zip(names, given, strict=True)))

  text = lowered_for_cuda(product, spec((m, k), jnp.bfloat16), *w, *scales_of(mode).values())
  assert count_kernels(text) == kernels
  assert work_of_xla(text) == []


@pytest.mark.parametrize("m", [7, 17, 31, 40, 63, 127, 4099])
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_packed_w_and_any_number_of_rows(mode, m):
  spec, fmt, n, k = jax.ShapeDtypeStruct, FORMATS[mode], 136, 1088
  w = spec((n, k * fmt.bits // 32), jnp.uint32), spec((n, k // fmt.group_size), jnp.uint8)
  text = lowered_for_cuda(functools.partial(jaxqq.qqmm, mode=mode), spec((m, k), jnp.bfloat16), *w)
  assert work_of_xla(text) == []


@pytest.mark.parametrize(("m", "n"), [(1024, 512), (1001, 2880), (100, 576)])
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_w_on_the_fly(mode, m, n):
  spec, names = jax.ShapeDtypeStruct, list(scales_of(mode))

  def product(x, w, *given):
    return jaxqq.qqmm(x, w, mode=mode, **dict(zip(names, given, strict=True)))

  operands = spec((m, 2048), jnp.bfloat16), spec((n, 2048), jnp.float32)
  text = lowered_for_cuda(product, *operands, *scales_of(mode).values())
  assert count_kernels(text) == 3
  assert work_of_xla(text) == []


@pytest.mark.parametrize("m", [1, 32, 128, 70, 2001])
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4", "mxfp8"])
def test_weights_alone(mode, m):
  spec, fmt, k = jax.ShapeDtypeStruct, FORMATS[mode], 4096
  w = spec((512, k * fmt.bits // 32), jnp.uint32), spec((512, k // fmt.group_size), jnp.uint8)
  product = functools.partial(jaxqq.quantized_matmul, mode=mode)
  text = lowered_for_cuda(product, spec((m, k), jnp.bfloat16), *w)
  assert work_of_xla(text) == []


@pytest.mark.parametrize("m", [1, 8, 40, 200])
@pytest.mark.parametrize("mode", ["nvfp4", "mxfp8"])
def test_packed_w_is_copied_for_no_number_of_its_rows(mode, m):
  """As of 50257, GPT-2's vocabulary: scales are."""
  spec, fmt, n, k = jax.ShapeDtypeStruct, FORMATS[mode], 1009, 4096
  w = spec((n, k * fmt.bits // 32), jnp.uint32), spec((n, k // fmt.group_size), jnp.uint8)
  text = lowered_for_cuda(functools.partial(jaxqq.qqmm, mode=mode), spec((m, k), jnp.bfloat16), *w)
  assert not [line for line in work_of_xla(text) if "xui32>" in line]


def test_work_of_xla_is_seen():
  assert not work_of_xla(lowered_for_cuda(lambda x: x.mT, jax.ShapeDtypeStruct((1, 8), "int8")))
  assert work_of_xla(lowered_for_cuda(lambda x: x.mT, jax.ShapeDtypeStruct((2, 8), "int8")))

  def product(x, w, scales, scale):
    return jaxqq.qqmm(x, w, scales, global_scale_x=scale * 2, global_scale_w=scale)

  spec = jax.ShapeDtypeStruct
  operands = spec((8, 512), jnp.bfloat16), spec((64, 64), jnp.uint32), spec((64, 32), jnp.uint8)
  (found,) = (
    line
    for line in work_of_xla(lowered_for_cuda(product, *operands, spec((), jnp.float32)))
    if "constant" not in line
  )
  assert "multiply" in found
