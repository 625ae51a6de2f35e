"""The kernels that lower packed w's scales: interpreted anywhere, compiled with `-m gpu`."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxqq._kernels import operands
from jaxqq._kernels.lowered_scales import rows_a_step, scale_vectors
from jaxqq._kernels.packed_fp8_operands import packed_fp8_operands
from tests.test_kernels_matmul import downs_of, powers
from tests.test_kernels_quantize import (
  MX,
  check_fp8,
  compiled,
  groups_of_many_sizes,
  interpreted,
  lower,
  on_gpu,
  twins,
)

__all__ = ["twins"]  # a fixture

# (rows, groups): of one row, of rows that end within a step, of one vector a lane and of several,
# at multiples of 16, 8 and 4 bytes, and rows that take several steps.
SHAPES = ((1, 128), (40, 256), (130, 32), (21, 600), (9, 260), (5, 1796))
GPU_SHAPES = (*SHAPES, (8192, 256), (1000, 448), (77, 1792), (4099, 132), (3, 9000))
LOWERED = ((8192, 256), (128256, 128), (33, 1796))


def lowered_scales(scales):
  """Beside a row of x: downs, row scales, wild."""
  x = np.zeros((1, 2048), np.float32)
  _, _, downs, row_scales, wild = packed_fp8_operands(x, scales, MX)
  return downs, row_scales, wild[1:]


def of_steps(scales):
  """Which rows the kernel has together: the last step starts early enough to be a whole one."""
  _, view = scale_vectors(scales)
  rows = max(len(scales), view.tile)
  size = rows_a_step(rows, view)
  return [slice(min(i, rows - size), i + size) for i in range(0, rows, size)]


def alone(scales):
  """Each row among others that are tame, so that a step tells of it alone."""
  size = of_steps(np.zeros((1 << 12, scales.shape[1]), np.uint8))[0].stop
  out = np.full((len(scales), size, scales.shape[1]), 127, np.uint8)
  place = np.arange(len(scales))
  out[place, place % size] = scales
  return out.reshape(-1, scales.shape[1])


def check(run, scales):
  downs, rows, wild = run(lowered_scales, scales)
  nan = (scales == 0xFF).any(axis=-1)
  want = np.max(scales.astype(int), axis=-1)
  lowest = np.min(scales.astype(int), axis=-1, where=scales != 0, initial=255)
  np.testing.assert_array_equal(rows, powers(want))
  np.testing.assert_array_equal(downs[~nan], downs_of(scales, want)[~nan])
  beyond = (want > 0) & (abs(want - 127) > 80)
  wild_rows = ((want - lowest > operands.MAX_SHIFT) | beyond) & ~nan
  np.testing.assert_array_equal(wild, [wild_rows[rows].any() for rows in of_steps(scales)])
  assert (downs.dtype, rows.dtype, wild.dtype) == (np.uint8, np.float32, np.int32)
  return wild


def check_every_distance(run):
  """Of two scales: a row has 0 to its largest, with some that are NaN; then one of NaN alone."""
  largest = np.arange(256)[:, None]
  scales = np.minimum(np.arange(256), largest).astype(np.uint8)
  scales[::3, 5] = 0xFF
  wild = check(run, alone(scales))
  assert len(wild) == len(scales) and 0 < wild.sum() < len(wild)


def check_every_step(run):
  """One scale below the others, by little or by too much, wherever the kernel reads it last."""
  places = np.arange(1796)[:: 1796 // 60]
  scales = np.full((2, places.size, 1796), 100 + operands.MAX_SHIFT, np.uint8)
  scales[:, np.arange(places.size), places] = [[100], [99]]
  wild = check(run, alone(scales.reshape(-1, 1796)))
  np.testing.assert_array_equal(wild, np.repeat([0, 1], places.size))


def random_scales(shape):
  rng = np.random.default_rng(shape)
  middle = rng.integers(0, 256, (shape[0], 1))
  spread = rng.integers(0, 8, (shape[0], 1))
  scales = np.clip(rng.integers(middle - spread, middle + spread + 1, shape), 0, 255)
  scales[rng.random(shape) < 1 / shape[1]] = 0xFF
  scales[rng.random(shape) < 0.05] = 0
  scales[0], scales[-1] = 0, 0xFF
  return scales.astype(np.uint8)


def check_random(run, shape):
  check(run, random_scales(shape))


def check_with_x(run, x_shape, scales_shape):
  """One launch does what two do."""
  x, scales = groups_of_many_sizes(x_shape, "bfloat16"), random_scales(scales_shape)
  f = functools.partial(packed_fp8_operands, fmt=MX)
  codes, x_scales, downs, w_scales, wild = run(lambda *args: f(*args), x, scales)
  of_x, of_w = wild[: x_shape[0]], wild[x_shape[0] :]
  check_fp8(lambda *_: operands.Fp8Operand(codes, x_scales, of_x), x)
  check(lambda *_: (downs, w_scales, of_w), scales)


@pytest.mark.parametrize("f", [check_every_distance, check_every_step])
def test_distances(f):
  f(interpreted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random(shape):
  check_random(interpreted, shape)


@pytest.mark.parametrize("shapes", [((5, 4160), (1, 128)), ((1, 2048), (21, 600))], ids=str)
def test_with_x(shapes, twins):
  check_with_x(interpreted, *shapes)


@pytest.mark.parametrize("shape", LOWERED, ids=str)
def test_lowers_for_cuda(shape):
  lower(lowered_scales, jax.ShapeDtypeStruct(shape, np.uint8))


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("f", [check_every_distance, check_every_step])
  def test_distances(self, f):
    f(compiled)

  def test_random(self):
    for shape in GPU_SHAPES:
      check_random(compiled, shape)

  @pytest.mark.parametrize("x_shape", [(33, 4096), (1000, 28672)])
  def test_with_x(self, x_shape):
    check_with_x(compiled, x_shape, (4099, 256))
