"""Random bits from a counter: a number's own are those of its place in the tensor.

Stochastic rounding and rotations take them from Philox 4x32 with 7 rounds, the fewest that pass
every test of its authors (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
3", SC 2011). It is integer arithmetic on a key and a counter, and the counter is the place in the
whole tensor. So the bits are the same on every platform, under every transformation and however the
tensor is split: XLA's partitioner gives each device its own places. `jax.random` promises that only
in some of its configurations.

    128 bits at (column // 8, row, matrix, 0)    16 for each of 8 neighbours along the last axis
    128 bits at (group // 8, row, matrix, 1)     16 for each scale of 8 neighbouring groups
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxqq._checks import describe

WORDS = 4  # of a key, as `key_words` returns it
ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_OF_STREAMS, _OF_MATRICES = 0x6A617871, 0x6A617872  # the last word of counters that keys are of
PER_CALL = 8  # numbers that one call has bits for
ELEMENTS, SCALES = 0, 1  # the last word of counters: what is rounded
_U16 = np.uint32(0xFFFF)


def key_words(function: str, name: str, key: Any) -> jax.Array:
  """uint32 (..., 4) of a key of `jax.random`, or the error that the caller should see.

  Of the shape and dtype of a key, as `explain` takes it, those of the result.
  """
  is_shape = isinstance(key, jax.ShapeDtypeStruct)
  if is_shape and function == "explain":
    return jax.eval_shape(lambda key: key_words(function, name, key), key)
  is_array = hasattr(key, "dtype") and hasattr(key, "shape") and not is_shape
  if is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    words = jax.random.key_data(key)
  elif is_array and key.dtype == jnp.uint32 and key.shape and key.shape[-1] in (2, WORDS):
    words = jnp.asarray(key)
  else:
    got = describe(key) if is_array else repr(key)
    raise TypeError(f"{function}: {name} must be a key, as jax.random.key(0) makes it, got {got}.")
  missing = WORDS - words.shape[-1]
  return jnp.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, missing)])


def streams(words: jax.Array, indices: Sequence[int]) -> list[jax.Array]:
  """Keys of streams of their own, each uint32 (..., 2), of `key_words` (..., 4)."""
  if not indices:
    return []
  index = np.asarray(indices, np.uint32)
  counter = (words[..., 2, None], words[..., 3, None], index, np.uint32(_OF_STREAMS))
  first, second, *_ = philox(counter, (words[..., 0, None], words[..., 1, None]))
  pairs = jnp.stack([first, second], axis=-1)
  return [pairs[..., i, :] for i in range(len(indices))]


def stream(words: jax.Array, index: int) -> jax.Array:
  """That of one."""
  (key,) = streams(words, [index])
  return key


def key_of_each(words: jax.Array, count: int) -> jax.Array:
  """uint32 (count, 4): keys of their own for so many matrices, of `key_words` (4,)."""
  counter = (words[2], words[3], jnp.arange(count, dtype=jnp.uint32), np.uint32(_OF_MATRICES))
  return jnp.stack(philox(counter, (words[0], words[1])), axis=-1)


def uniform16(
  key: jax.Array, shape: Sequence[int], matrix: jax.Array | int = 0, of: int = ELEMENTS
) -> jax.Array:
  """int32 of shape (..., rows, columns), uniform in 0 to 65535.

  Args:
    key: of `stream`, (..., 2), whose leading axes broadcast with those of shape.
    shape: of the tensor.
    matrix: which matrix of the tensor each is, broadcasts with its leading axes.
    of: ELEMENTS, or SCALES, whose columns are groups.
  """
  *batch, rows, columns = shape
  blocks = -(-columns // PER_CALL)
  ones = (1,) * len(batch)
  column = lax.broadcasted_iota(jnp.uint32, (*ones, rows, blocks), len(batch) + 1)
  row = lax.broadcasted_iota(jnp.uint32, (*ones, rows, blocks), len(batch))
  matrix = jnp.asarray(matrix, jnp.uint32)[..., None, None]
  words = philox(
    (column, row, matrix, np.uint32(of)), (key[..., None, None, 0], key[..., None, None, 1])
  )
  words = lax.optimization_barrier(words)  # else XLA may compute all of them for each
  bits = halves(words)
  bits = bits.reshape(*bits.shape[:-2], blocks * PER_CALL)[..., :columns]
  return jnp.broadcast_to(bits, tuple(shape))


def halves(words: Sequence[jax.Array]) -> jax.Array:
  """int32 (..., 8), 0 to 65535, of the four words (...) of one call: low halves first."""
  parts = [half for word in words for half in (word & _U16, word >> 16)]
  return jnp.stack(parts, axis=-1).astype(jnp.int32)


def signs(key: jax.Array, size: int) -> jax.Array:
  """float32 (..., size), 1 or -1, of a `stream`'s key (..., 2); size up to 128."""
  zero = np.uint32(0)
  words = philox((zero, zero, zero, zero), (key[..., 0], key[..., 1]))
  bits = jnp.stack(words, axis=-1)[..., None]
  bits = bits >> lax.broadcasted_iota(jnp.uint32, (*bits.shape[:-1], 32), bits.ndim - 1)
  bits = bits.reshape(*bits.shape[:-2], 128)[..., :size] & np.uint32(1)
  return 1 - 2 * bits.astype(jnp.float32)


@functools.partial(jax.jit, inline=True)  # else 200 operations run one by one for a key alone
def philox(counter: Sequence[Any], key: Sequence[Any]) -> tuple[jax.Array, ...]:
  """Philox 4x32: four words of four of a counter and two of a key, uint32, which broadcast."""
  shape = jnp.broadcast_shapes(*(jnp.shape(a) for a in (*counter, *key)))
  a, b, c, d, first, second = (
    jnp.broadcast_to(jnp.asarray(word, jnp.uint32), shape) for word in (*counter, *key)
  )
  for _ in range(ROUNDS):
    high_a, low_a = _wide_product(a, MULTIPLIERS[0])
    high_c, low_c = _wide_product(c, MULTIPLIERS[1])
    a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
    first, second = first + np.uint32(WEYL[0]), second + np.uint32(WEYL[1])
  return a, b, c, d


def _wide_product(a: jax.Array, constant: int) -> tuple[jax.Array, jax.Array]:
  """The high and the low word of a product, by halves: JAX has no 64 bit integers by default."""
  of_low, of_high = np.uint32(constant & 0xFFFF), np.uint32(constant >> 16)
  low, high = a & _U16, a >> 16
  crossed = low * of_high
  middle = (low * of_low >> 16) + (crossed & _U16) + high * of_low
  return high * of_high + (crossed >> 16) + (middle >> 16), a * np.uint32(constant)
