"""By how much packed w's codes are rebased: interpreted anywhere, compiled with `-m gpu`."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
  pytest.skip("the kernels need JAX 0.11", allow_module_level=True)

from jaxqq._kernels.hopper.quantize.group_rescale import rebased_operands_of_packed
from jaxqq._kernels.hopper.quantize.rebased import RebasedOperand
from tests.support.kernels import on_gpu, powers, rescale_bytes
from tests.support.quantizers import (
  MX,
  check_rebased,
  compiled,
  groups_of_many_sizes,
  interpreted,
  lower,
)

# (rows, groups): of one row, of rows that end within a step, of one vector a lane and of several,
# at multiples of 16, 8, 4 and 2 bytes, of few groups, and rows that take several steps.
SHAPES = (
  *((1, 128), (40, 256), (130, 32), (21, 600), (9, 260), (5, 1796)),
  *((30, 4), (7, 8), (300, 16), (3, 20)),
)
GPU_SHAPES = (*SHAPES, (8192, 256), (1000, 448), (77, 1792), (4099, 132), (3, 9000))
LOWERED = ((8192, 256), (128256, 128), (33, 1796), (136, 4))


def rescale_of(scales):
  """Beside a row of x: rescale, row scales."""
  x = np.zeros((1, 2048), np.float32)
  return rebased_operands_of_packed(x, scales, MX)[2:]


def check(run, scales):
  rescale, rows = run(rescale_of, scales)
  nan = (scales == 0xFF).any(axis=-1)
  want = np.max(scales.astype(int), axis=-1)
  np.testing.assert_array_equal(rows, powers(want))
  np.testing.assert_array_equal(rescale[~nan], rescale_bytes(scales, want)[~nan])
  assert (rescale.dtype, rows.dtype) == (np.uint8, np.float32)


def check_every_distance(run):
  """Of two scales: a row has 0 to its largest, with some that are NaN; then one of NaN alone."""
  largest = np.arange(256)[:, None]
  scales = np.minimum(np.arange(256), largest).astype(np.uint8)
  scales[::3, 5] = 0xFF
  check(run, scales)


def check_every_step(run):
  """One scale above the others, wherever the kernel reads it last."""
  places = np.arange(1796)[:: 1796 // 60]
  scales = np.full((places.size, 1796), 100, np.uint8)
  scales[np.arange(places.size), places] = 113
  check(run, scales)


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
  f = functools.partial(rebased_operands_of_packed, fmt=MX)
  codes, x_scales, rescale, w_scales = run(lambda *args: f(*args), x, scales)
  check_rebased(lambda *_: RebasedOperand(codes, x_scales), x)
  check(lambda *_: (rescale, w_scales), scales)


@pytest.mark.parametrize("f", [check_every_distance, check_every_step])
def test_distances(f):
  f(interpreted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random(shape):
  check_random(interpreted, shape)


@pytest.mark.parametrize("shapes", [((5, 4160), (1, 128)), ((1, 2048), (21, 600))], ids=str)
def test_with_x(shapes):
  check_with_x(interpreted, *shapes)


@pytest.mark.parametrize("shape", LOWERED, ids=str)
def test_lowers_for_cuda(shape):
  lower(rescale_of, jax.ShapeDtypeStruct(shape, np.uint8))


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
