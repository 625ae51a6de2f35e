"""The kernels' whole path on a CPU: `qqmm` lowered as for a Hopper GPU, its kernels interpreted.

Which functions a GPU runs otherwise is told by `interpreting()` in `jaxqq/_kernels/hopper/`, whose
README lists them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src import callback as callbacks

from jaxqq import _explain, _kernels, _primitive, _ragged, _ragged_primitive
from jaxqq._kernels import ragged as ragged_kernels

if jax.__version_info__ >= (0, 11):
  import jax.experimental.pallas.mosaic_gpu as plgpu
  from jax._src.pallas.mosaic_gpu.interpret import shared_memory


def _callback(*args: Any, callback: Any, **_: Any) -> Any:
  """`io_callback_impl` for arrays of numpy. JAX's puts each on a device, the longer part of it."""
  return jax.tree.map(np.asarray, callback(*(np.asarray(a)[()] for a in args)))


@contextlib.contextmanager
def interpreted_kernels(*, detect_races: bool = False) -> Iterator[None]:
  """Within it Mosaic GPU's kernels are interpreted.

  JAX does not check its own work then: programs of the interpreter are long, and those for CUDA are
  checked when tests lower them.
  """
  to_int = getattr(shared_memory, "_to_int", int)  # of arrays of JAX

  def number(a: Any) -> Any:
    return a.item() if isinstance(a, np.generic) else to_int(a)

  params = plgpu.InterpretGPUParams(detect_races=detect_races)
  with (
    jax.enable_checks(False),
    mock.patch.object(callbacks, "io_callback_impl", _callback),
    mock.patch.object(shared_memory, "_to_int", number, create=True),
    plgpu.force_gpu_interpret_mode(params),
  ):
    yield


def _as_on_a_gpu(operands, *, mode, out_dtype, backward, **how):
  """`qqmm` without its primitive: a lowering may not have the effects of interpreted kernels."""
  del backward
  return _primitive.run(operands, mode, out_dtype, _primitive.How.of(how), "cuda")


def _ragged_as_on_a_gpu(operands, params):
  """`ragged_qqmm` likewise."""
  problem = _ragged_primitive.problem_of(operands, params)
  device = _kernels.device_of("cuda")
  return _kernels.plan(problem, device, ragged_kernels.RAGGED).run(operands)


@contextlib.contextmanager
def interpreted(*, sms: int = 2) -> Iterator[None]:
  """Within it a CPU is taken for a Hopper GPU of so many SMs, and without clusters.

  Each SM then has several tiles, as on a GPU with larger matrices.
  """
  device = _kernels.Device("cuda", "9.0", sms, max_cluster=1)

  def device_of(platform: str) -> _kernels.Device:
    return device if platform == "cuda" else _kernels.Device(platform)

  with contextlib.ExitStack() as stack:
    for module, name, value in (
      (_primitive, "qqmm", _as_on_a_gpu),
      (_ragged, "bind", _ragged_as_on_a_gpu),
      (_explain, "_platform", lambda x, device: "cuda"),
      (_kernels, "device_of", device_of),
    ):
      stack.enter_context(mock.patch.object(module, name, value))
    stack.enter_context(interpreted_kernels())
    yield
