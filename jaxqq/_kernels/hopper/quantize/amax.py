"""The amax of a matrix that is rotated, which is never written: largest magnitudes of its parts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxqq._formats import Format
from jaxqq._kernels.hopper.quantize.columns import amax_by_tiles
from jaxqq._kernels.hopper.quantize.groups import DEFAULT_CONFIG, VECTOR, by_blocks
from jaxqq._kernels.hopper.quantize.parts import Given, Parts, Rows


def rotated_amax(a: jax.Array, fmt: Format, signs: jax.Array) -> jax.Array:
  """float32, the largest magnitude of `a` rotated, NaN being larger.

  Args:
    a: float32, float16 or bfloat16, (rows, k), k a multiple of a group and of the rotation.
    fmt: of whose groups it is taken first.
    signs: float32 (rotation,), 1 or -1.
  """
  parts = Parts(rotation=signs.shape[0])
  seen = Rows.of(a.shape[1], fmt, parts, VECTOR)
  arrays, given = jax.tree.flatten(seen.given(Given.of(fmt, parts, None, signs=signs)))
  (found,) = by_blocks(
    functools.partial(_kernel, seen=seen, given=given),
    "rotated_amax",
    (a.reshape(-1, *seen.view.minor),),
    (jax.ShapeDtypeStruct(seen.view.minor[:-2], jnp.int32),),
    seen.view,
    DEFAULT_CONFIG,
    tuple(arrays),
  )
  return lax.bitcast_convert_type(jnp.max(found), jnp.float32)


def rotated_amax_of_transpose(a: jax.Array, fmt: Format, signs: jax.Array) -> jax.Array:
  """`rotated_amax` of the transpose of `a`, (k, rows), with a rotation of up to 64."""
  parts = Parts(rotation=signs.shape[0])
  found = amax_by_tiles(a, fmt, parts, Given.of(fmt, parts, None, signs=signs))
  return lax.bitcast_convert_type(jnp.max(found).astype(jnp.int32), jnp.float32)


def _kernel(here: Any, a_ref: Any, *refs: Any, seen: Rows, given: Any) -> None:
  *arrays, found_ref = refs
  _, bits = seen.load(a_ref, here, jax.tree.unflatten(given, arrays))
  found_ref[here] = bits
