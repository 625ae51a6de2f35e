"""Several weights of one x as one: their rows, one after the other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxqq._formats import FORMATS
from jaxqq._global_scales import unscaled
from jaxqq._weight import QuantizedWeight


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
  """One weight of several that are multiplied by the same x: their rows, one after the other.

  qqmm(x, concatenate([a, b])) is the products by a and by b side by side, in one call, as q, k and
  v of attention or gate and up of an MLP are fused. Each part keeps its global scale: of parts with
  them the result has one for each row, (..., N).

  Args:
    weights: at least one, of shapes (..., N_i, K), all of one mode, K, leading axes, dtype and
      quantize_input. Static scales of the activations, input_global_scale, are of all or of none;
      the largest is the result's.

  Returns:
    The weight of shape (..., sum of N_i, K). Its rows are sliced as those of any, w[..., :N, :].

  Raises:
    TypeError: weights are no sequence of `QuantizedWeight`s.
    ValueError: there is none, or they differ as above.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> a, b = (jaxqq.quantize_weight(jax.random.normal(key, (8, 64))) for key in keys)
    >>> both = jaxqq.concatenate([a, b])
    >>> both.shape, both.global_scale.shape
    ((16, 64), (16,))
    >>> x = jnp.ones((2, 64))
    >>> bool(jnp.allclose(jaxqq.qqmm(x, both)[:, 8:], jaxqq.qqmm(x, b)))
    True

  Source: `jnp.concatenate`, along axis -2.
  """
  parts = _checked_parts("concatenate", weights)
  first = parts[0]
  of_input = first.input_global_scale
  if of_input is not None:
    scales = (jnp.asarray(part.input_global_scale) for part in parts)
    of_input = functools.reduce(jnp.maximum, scales)
  return QuantizedWeight(
    jnp.concatenate([jnp.asarray(part.packed) for part in parts], axis=-2),
    jnp.concatenate([jnp.asarray(part.scales) for part in parts], axis=-2),
    first.mode,
    _scales_of_rows(parts),
    first.dtype,
    of_input,
    first.quantize_input,
  )


def _checked_parts(function: str, weights: Any) -> list[QuantizedWeight]:
  parts = list(weights) if isinstance(weights, (list, tuple)) else [weights]
  if not isinstance(weights, (list, tuple)) or any(type(p) is not QuantizedWeight for p in parts):
    kinds = ", ".join(dict.fromkeys(type(part).__name__ for part in parts))
    raise TypeError(
      f"{function}: weights must be a list or tuple of QuantizedWeights, got {kinds}; quantize "
      "each with quantize_weight."
    )
  if not parts:
    raise ValueError(f"{function}: weights are empty; give at least one QuantizedWeight.")
  first = parts[0]
  for part in parts[1:]:
    one, other = (
      (w.mode, w.dtype, w.quantize_input, w.shape[-1], w.shape[:-2]) for w in (first, part)
    )
    if one != other:
      raise ValueError(
        f"{function}: weights must have one mode, dtype, quantize_input, K (the last axis) and "
        f"leading axes, got {first!r} and {part!r}."
      )
    if (part.input_global_scale is None) != (first.input_global_scale is None):
      raise ValueError(
        f"{function}: input_global_scale, that of the x which all are multiplied by, must be of "
        f"all weights or of none, got {first!r} and {part!r}; set it with dataclasses.replace."
      )
  return parts


def _scales_of_rows(parts: list[QuantizedWeight]) -> jax.Array | None:
  """A global scale for each row; 2688 is that of a part that has none."""
  if all(part.global_scale is None for part in parts):
    return None
  rows = []
  for part in parts:
    scale: Any = part.global_scale
    if scale is None:
      scale = unscaled(FORMATS[part.mode])
    elif not part.has_row_scales:
      scale = jnp.asarray(scale)[..., None]
    rows.append(jnp.broadcast_to(scale, part.shape[:-1]))
  return jnp.concatenate(rows, axis=-1)
