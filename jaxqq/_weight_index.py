"""What an index takes of a `QuantizedWeight`: of its leading axes and rows, never of a group."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqq._checks import as_int32


def checked_index(index: Any, shape: tuple[int, ...]) -> tuple[Any, slice]:
  """What an index takes of the leading axes, and of the rows."""
  parts = list(index) if isinstance(index, tuple) else [index]
  ellipses = [i for i, part in enumerate(parts) if part is Ellipsis]
  missing = len(shape) - len(parts) + len(ellipses)
  if len(ellipses) == 1:
    parts[ellipses[0] : ellipses[0] + 1] = [slice(None)] * missing
  else:
    parts += [slice(None)] * missing
  if len(ellipses) > 1 or missing < 0 or len(parts) != len(shape):
    raise IndexError(f"QuantizedWeight: {index!r} is too long an index of shape {shape}.")
  *of_stack, of_rows, of_k = parts
  if not isinstance(of_k, slice) or of_k.indices(shape[-1]) != (0, shape[-1], 1):
    raise IndexError(
      f"QuantizedWeight: the last axis of {shape} is packed in groups and cannot be indexed; got "
      f"{index!r}."
    )
  if not isinstance(of_rows, slice):
    raise IndexError(
      f"QuantizedWeight: the rows of {shape} can only be sliced, so that a matrix stays one; got "
      f"{index!r}."
    )
  arrays = [part for part in of_stack if not isinstance(part, (slice, int, np.integer))]
  if len(arrays) > 1 or not all(_is_integers(a) for a in arrays):
    raise IndexError(
      f"QuantizedWeight: leading axes of {shape} take slices, integers and one array of integers; "
      f"got {index!r}."
    )
  for part, size in zip(of_stack, shape, strict=False):
    is_known = isinstance(part, (int, np.integer, np.ndarray))
    known = np.asarray(part if is_known else [], None if is_known else int)
    wrong = known[(known < -size) | (known >= size)]
    if wrong.size:
      raise IndexError(
        f"QuantizedWeight: {wrong.flat[0]} is out of range for an axis of {size} matrices."
      )
  return tuple(as_int32(a) if isinstance(a, jax.Array) else a for a in of_stack), of_rows


def _is_integers(a: Any) -> bool:
  dtype = getattr(a, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jnp.integer)
