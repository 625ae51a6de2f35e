"""What Hopper's kernels do not take, whatever their tiles, in the words of `explain`."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np

from jaxqq._kernels.plan import Device, Unsupported
from jaxqq._kernels.problem import Problem


def check_hopper(obstacle: str | None, device: Device) -> None:
  """Raises Unsupported where no Hopper kernel can take a problem, whatever its mode."""
  if jax.__version_info__ < (0, 11):
    raise Unsupported(f"it needs JAX 0.11 or newer, and this is {jax.__version__}")
  if device.compute_capability != "9.0":
    raise Unsupported(
      f"it is for compute capability 9.0 (H100, H200), not {device.compute_capability}"
    )
  if obstacle is not None:
    raise Unsupported(obstacle)


def check_product(problem: Problem, device: Device) -> None:
  """Raises Unsupported where no kernel of a product here can take a problem."""
  check_hopper(problem.obstacle, device)
  if problem.quantize_input:
    return
  if problem.x_dtype.itemsize != 2:
    raise Unsupported(f"x is {problem.x_dtype} and not quantized, and tensor cores take 16 bits")
  if problem.x_dtype == np.float16 and problem.fmt.scale_is_power_of_two:
    raise Unsupported(f"x is float16 and not quantized, and scales of {problem.fmt.mode} leave it")


def check_fp8(problem: Problem, device: Device) -> None:
  check_hopper(problem.obstacle, device)
  if not problem.quantize_input:
    raise Unsupported("x is not quantized, and fp8 does not hold it")
  fmt = problem.fmt
  if fmt.element != ml_dtypes.float8_e4m3fn:
    raise Unsupported(f"{fmt.mode} has no e4m3 elements to feed fp8 tensor cores with")
  if problem.wants_exact_sums:
    raise Unsupported(
      "float32 output, or precision above DEFAULT, takes exact operands and float32 sums"
    )


def for_sms(device: Device) -> str:
  """How many a plan is for."""
  known = "" if device.knows_sms else " (assumed: no device at hand says so)"
  return f", for {device.num_sms} SMs{known}"
