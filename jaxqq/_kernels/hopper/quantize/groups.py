"""Groups in registers: how the quantizers look at arrays, load them and are launched.

All of them look at an array as (n, ..., lanes, vector): a group of neighbours that share a
scale is in a few neighbouring lanes of a warp, and each thread holds `vector` neighbouring
elements, 16 bytes of a 16 bit float. A group's maximum is then a few instructions in the
thread and one or two shuffles, and needs no shared memory.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper.pipeline import compiler_params
from jaxqq._kernels.hopper.ptx.layouts import WARP, WARPS

VECTOR = 8  # elements a thread holds side by side


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """What may change the speed and nothing else."""

  # Tiles that a warpgroup loads before it works on any: bytes in flight against registers. A
  # tile is 1024 elements: eight a thread, in `rebased_operand` twice as many.
  tiles_per_step: int = 4
  # A row of so many bytes or fewer stays in registers between the two sweeps of `rebased_operand`
  # (32 KiB are 64 registers a thread); a longer one is read again, from the caches.
  resident_bytes: int = 32768


DEFAULT_CONFIG = TuningConfig()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["first"], meta_fields=["rows"])
@dataclasses.dataclass(frozen=True)
class Window:
  """Some rows of an operand."""

  first: Any  # int32 (first row, ...), known when the kernel runs
  rows: int


# How an array is stored in registers.


@dataclasses.dataclass(frozen=True, init=False)
class View:
  """Arrays (n, *minor): minor[-1] elements in a thread, minor[:-1] over the lanes of a warp."""

  minor: tuple[int, ...]

  def __init__(self, *minor: int):
    object.__setattr__(self, "minor", minor)

  @property
  def tile(self) -> int:
    """The n of the smallest array that a warpgroup can hold."""
    return WARPS * WARP // math.prod(self.minor[:-1])

  @property
  def layout(self) -> Any:
    whole, of_warp = (self.tile, *self.minor), (self.tile // WARPS, *self.minor)
    lane_dims = tuple(i - len(of_warp) for i, size in enumerate(of_warp[:-1]) if size > 1)
    # Where a warp has one entry, JAX takes no second tile.
    tiles = (whole, of_warp) if of_warp[0] > 1 else (whole,)
    warp_dim = -len(tiles) * len(whole)
    return plgpu.Layout.TILED(
      plgpu.Tiling(tiles), warp_dims=(warp_dim,), lane_dims=lane_dims, vector_dim=-1
    )

  def reduced(self, ndim: int) -> Any:
    """The layout of what is left of such an array when only its first axes are."""
    return self.layout.reduce(tuple(range(ndim, 1 + len(self.minor))))


def per_group(values: jax.Array, like: jax.Array) -> jax.Array:
  """Broadcasts values of groups over the elements of `like`."""
  return lax.broadcast_in_dim(values, like.shape, tuple(range(values.ndim)))


def positions(shape: tuple[int, ...], layout: Any) -> jax.Array:
  """0, 1, ... along the elements of a thread."""
  iota = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
  return plgpu.layout_cast(iota, layout)


# Launching.


@dataclasses.dataclass
class Beside:
  """A small kernel that needs nothing of another one: further CTAs of that one's launch have it.

  A launch of its own costs more than its work: of groups' table of tiles 1.7 us on an H200.

  Attributes:
    body: (step, *operands, *results), of references.
    name, steps, operands, out_type: of a launch.
    found: the results, once a launch has it.
  """

  body: Callable[..., None]
  name: str
  steps: int
  operands: tuple[jax.Array, ...]
  out_type: tuple[jax.ShapeDtypeStruct, ...]
  found: tuple[jax.Array, ...] | None = None

  def results(self) -> tuple[jax.Array, ...]:
    """Of the launch that has it, or of one of its own."""
    if self.found is None:

      def alone(*refs: Any) -> None:
        self.body(lax.axis_index("step"), *refs)

      run = make_kernel(alone, self.name, grid=(self.steps,), out_type=self.out_type)
      self.found = tuple(run(*self.operands))
    return self.found


def make_kernel(
  body: Callable[..., None],
  name: str,
  *,
  grid: tuple[int, ...],
  out_type: tuple[jax.ShapeDtypeStruct, ...],
  scratch_types: tuple[Any, ...] = (),
  beside: Sequence[Beside] = (),
) -> Callable[..., Any]:
  """A kernel, and behind its own steps those `beside`.

  None reads what it has written, but through shared memory, and there it waits.
  """
  if beside:
    return _with_others(body, name, grid, out_type, scratch_types, beside)
  return plgpu.kernel(
    body,
    grid=grid,
    grid_names=("step",),
    out_type=out_type,
    scratch_types=scratch_types,
    compiler_params=compiler_params(),
    kernel_name=f"jaxqq_{name}",
  )


def _with_others(
  body: Callable[..., None],
  name: str,
  grid: tuple[int, ...],
  out_type: tuple[jax.ShapeDtypeStruct, ...],
  scratch_types: tuple[Any, ...],
  beside: Sequence[Beside],
) -> Callable[..., Any]:
  """The others' steps come behind the kernel's own."""
  steps = [*grid, *(other.steps for other in beside)]
  ends = list(itertools.accumulate(steps))
  types = [out_type, *(other.out_type for other in beside)]

  def run(*operands: jax.Array) -> Any:
    assert all(other.found is None for other in beside), "another launch has it"
    given = [operands, *(other.operands for other in beside)]

    def all_of_them(*refs: Any) -> None:
      rest = iter(refs)
      of_each = [tuple(itertools.islice(rest, len(own))) for own in given]
      results = [tuple(itertools.islice(rest, len(own))) for own in types]
      own_refs, *others = (a + b for a, b in zip(of_each, results, strict=True))
      scratch, step = tuple(rest), lax.axis_index("step")
      pl.when(step < ends[0])(lambda: body(*own_refs, *scratch))
      for other, refs_of, first, end in zip(beside, others, ends[:-1], ends[1:], strict=True):
        work = functools.partial(other.body, step - first, *refs_of)
        pl.when((step >= first) & (step < end))(work)

    out_types = tuple(itertools.chain(*types))
    how: Any = {"grid": (ends[-1],), "out_type": out_types, "scratch_types": scratch_types}
    found = iter(make_kernel(all_of_them, name, **how)(*itertools.chain(*given)))
    own = tuple(itertools.islice(found, len(out_type)))
    for other in beside:
      other.found = tuple(itertools.islice(found, len(other.out_type)))
    return own

  return run


def pad(a: jax.Array, axis: int, least: int) -> jax.Array:
  """Zeros at the end of an axis shorter than `least`."""
  missing = [(0, max(0, least - a.shape[axis]) if i == axis else 0) for i in range(a.ndim)]
  return jnp.pad(a, missing) if any(after for _, after in missing) else a


def by_blocks(
  body: Callable[..., None],
  name: str,
  operands: tuple[jax.Array, ...],
  out_types: tuple[jax.ShapeDtypeStruct, ...],
  view: View,
  config: TuningConfig,
  scalars: tuple[jax.Array, ...] = (),
  staging: jax.ShapeDtypeStruct | None = None,
  entries: int = 0,
  window: Window | None = None,
  beside: Sequence[Beside] = (),
) -> list[jax.Array]:
  """Runs body(slice, *refs) over the first axis of all operands; scalars, (1,), come behind them.

  out_types are those of one entry of the first axis. The last step starts early enough to be a
  whole one, and writes some of the same values again. staging is an entry in shared memory. The
  results have at least so many entries; what goes beyond the operands' is not written. Of operands
  with a window, whose rows have `entries` together, nothing else is seen. The launch has `beside`
  as well.
  """
  n = operands[0].shape[0] if window is None else entries
  if window is None:
    operands = tuple(pad(a, 0, view.tile) for a in operands)
  padded = max(n, view.tile)
  block = view.tile * min(config.tiles_per_step, padded // view.tile)

  def kernel(*refs: Any) -> None:
    if window is not None:
      *whole, first_ref = refs[: len(operands) + 1]
      seen = pl.ds(first_ref[0] * (n // window.rows), n)
      refs = (*(a.at[seen] for a in whole), *refs[len(operands) + 1 :])
    start = jnp.minimum(lax.axis_index("step") * block, padded - block)
    body(pl.ds(start, block), *refs)

  run = make_kernel(
    kernel,
    name,
    grid=(pl.cdiv(padded, block),),
    out_type=tuple(
      jax.ShapeDtypeStruct((max(padded, entries), *t.shape), t.dtype) for t in out_types
    ),
    scratch_types=(plgpu.SMEM((block, *staging.shape), staging.dtype),) if staging else (),
    beside=beside,
  )
  first = () if window is None else (window.first,)
  return [out[: max(n, entries)] for out in run(*operands, *first, *scalars)]


def load_gmem(ref: Any, layout: Any) -> jax.Array:
  return plgpu.load(ref, layout=layout, optimized=False)  # optimized is for shared memory


def store_gmem(ref: Any, values: jax.Array) -> None:
  """ref[...] = values, of any number of bytes a thread: JAX 0.12 must be told not to refuse."""
  store = getattr(plgpu, "store", None)  # there since JAX 0.12
  if store is None:
    ref[...] = values
  else:
    store(ref, values, optimized=False)


def load_elements(a_ref: Any, rows: Any, view: View) -> jax.Array:
  return load_gmem(a_ref.at[rows], view.layout).astype(jnp.float32)
