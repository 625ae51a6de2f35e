"""The product on NVIDIA's Blackwell, by XLA's block-scaled dot: the tensor cores take the scales.

    x --quantize--> codes, scales --+
                                    +--> jax.nn.scaled_matmul --> times alpha --> out
    w (packed: its bits as they are)+

The operation (`__op$block_scaled_dot`, behind `jax.nn.scaled_matmul`) takes e2m1 codes under e4m3
scales of 16, or e4m3 codes under e8m0 scales of 32, and sums in float32. No machine with such a GPU
was at hand: what is tested is the program, and what the same call computes on a CPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxqq._formats import FORMATS, Format
from jaxqq._kernels.plan import Device, Implementation, Rows, Unsupported
from jaxqq._kernels.problem import Problem, fold
from jaxqq._quantize import pack, quantize_groups
from jaxqq._reference import Operands, times_alpha

CAPABILITIES = ("10.", "12.")  # compute capabilities that begin so
# What `jax.nn.scaled_matmul` says that cuDNN takes; XLA expands all else to bfloat16.
_TENSOR_CORE_FORMATS = (FORMATS["nvfp4"], FORMATS["mxfp8"])


@dataclasses.dataclass(frozen=True)
class BlockScaledDot:
  """One product, as XLA is told of it."""

  problem: Problem
  details: str | None = "jax.nn.scaled_matmul; never run on the hardware"

  def run(self, operands: Operands) -> jax.Array:
    problem = self.problem
    fmt, out_dtype = problem.fmt, problem.out_dtype
    folded = fold(operands).untransposed()
    x, scales_of_x = _quantized(folded.x, fmt, folded.global_scale_x)
    if folded.scales is None:
      w, scales_of_w = _quantized(folded.w, fmt, folded.global_scale_w)
    else:
      w, scales_of_w = _as_floats(folded.w, fmt), _scales(folded.scales, fmt)
    batch = max(x.shape[0], w.shape[0])
    x, w, scales_of_x, scales_of_w = (
      jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in (x, w, scales_of_x, scales_of_w)
    )
    sums_dtype = jnp.float32 if problem.has_global_scales else out_dtype
    sums = jax.nn.scaled_matmul(x, w, scales_of_x, scales_of_w, preferred_element_type=sums_dtype)
    if problem.has_global_scales:
      of_x, of_w = (
        None if scale is None else scale.reshape(())
        for scale in (folded.global_scale_x, folded.global_scale_w)
      )
      sums = times_alpha(sums, of_x, of_w, fmt)
    return sums.astype(out_dtype).reshape(*operands.batch_shape, operands.m, operands.n)


def _quantized(a: Any, fmt: Format, global_scale: Any) -> tuple[jax.Array, jax.Array]:
  """(b, rows, k) as codes in their float type, and the scales of their groups in theirs."""
  scale = None if global_scale is None else global_scale.reshape(())
  codes, scales = quantize_groups(a, fmt, scale)
  return _as_floats(pack(codes, fmt), fmt), _scales(scales.astype(jnp.uint8), fmt)


def _as_floats(words: jax.Array, fmt: Format) -> jax.Array:
  """uint32 (..., k * bits / 32) as (..., k) of the format's elements: the same bits."""
  # In one step: of two, by way of bytes, XLA makes one whose shape it then refuses.
  return lax.bitcast_convert_type(words, fmt.element).reshape(*words.shape[:-1], -1)


def _scales(scales: jax.Array, fmt: Format) -> jax.Array:
  return lax.bitcast_convert_type(scales, fmt.scale)


def _plan(problem: Problem, device: Device) -> BlockScaledDot:
  capability = device.compute_capability or ""
  if not capability.startswith(CAPABILITIES):
    raise Unsupported(f"it is for compute capability 10 and 12 (Blackwell), not {capability}")
  if problem.obstacle is not None:
    raise Unsupported(problem.obstacle)
  if not problem.quantize_input:
    raise Unsupported("x is not quantized, and the tensor cores take two operands with scales")
  if problem.fmt not in _TENSOR_CORE_FORMATS:
    raise Unsupported(f"the tensor cores get no {problem.fmt.mode} from XLA, which expands it")
  if problem.wants_exact_sums:
    raise Unsupported("float32 output, or precision above DEFAULT, takes sums known to be exact")
  return BlockScaledDot(problem)


PRODUCT = Implementation(
  name="block_scaled_dot",
  summary=(
    "XLA's block-scaled dot on the tensor cores of Blackwell, which take codes and scales as they "
    "are: x (and w, unless packed) is quantized before"
  ),
  platforms=("cuda",),
  plan=_plan,
)

ROWS = Rows(product=(PRODUCT,))
