"""The kernels' whole path on a CPU: `qqmm` lowered as for a Hopper GPU, its kernels interpreted.

Here is every place that the interpreter cannot follow, and what stands there instead. What only a
GPU runs is what these replace, and the `interpret` branches of the kernels themselves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import jax

if jax.__version_info__ >= (0, 11):
  import jax.experimental.pallas.mosaic_gpu as plgpu

  from jaxqq import _explain, _primitive
  from jaxqq._kernels import (
    amax,
    codes,
    few_rows,
    few_rows_config,
    matmul,
    operands,
    packed_matmul,
    slabs,
    tiles,
    transposed,
    tuning,
  )

# Entry points that must be told: what they run differs.
ENTRY_POINTS = (
  (
    (matmul, "matmul"),
    (packed_matmul, "packed_matmul"),
    (few_rows, "few_rows"),
    (slabs, "slab_matmul"),
  )
  if jax.__version_info__ >= (0, 11)
  else ()
)


def stage_in_slices(values, staging_ref):
  """`operands._stage` without a reshaped reference."""
  for i in range(values.shape[1]):
    for j in range(values.shape[2]):
      staging_ref[:, i * values.shape[2] + j, :] = values[:, i, j, :]


def _as_on_a_gpu(operands, *, mode, out_dtype, precision, backward):
  """`qqmm` without its primitive: a lowering may not have the effects of interpreted kernels."""
  del backward
  return _primitive.run(operands, mode, out_dtype, precision, "cuda")


@contextlib.contextmanager
def interpreted(*, ctas: int = 2) -> Iterator[None]:
  """Within it a CPU is taken for a Hopper GPU of so many multiprocessors.

  Each then has several tiles, as on a GPU with larger matrices. It has no clusters: there is but
  one multiprocessor to share a tile.
  """
  params = plgpu.InterpretGPUParams()
  with contextlib.ExitStack() as stack:

    def put(module, name, value):
      stack.enter_context(mock.patch.object(module, name, value))

    put(_primitive, "qqmm", _as_on_a_gpu)
    put(_explain, "_platform", lambda x, device: "cuda")
    for module, name in ENTRY_POINTS:
      put(module, name, functools.partial(getattr(module, name), interpret=params))
    put(tiles, "num_sms", lambda: ctas)
    put(tuning, "num_sms", lambda: 1)
    put(few_rows_config, "num_sms", lambda: 1)
    put(codes, "quotient", codes.quotient_twin)
    put(operands, "thread_amax_bits", amax.thread_amax_bits_twin)
    put(operands, "_stage", stage_in_slices)
    put(transposed, "regrouped", transposed.regrouped_twin)
    put(slabs, "as_codes", slabs.as_codes_twin)
    stack.enter_context(plgpu.force_gpu_interpret_mode(params))
    yield
