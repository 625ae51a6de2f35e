"""What the products share: the walk over tiles, the TMA's producer, barriers, and the launch.

A CTA has compute warpgroups and, behind them, one that loads:

    producer, warpgroup C   | load k+3 | load k+4  | load k+5  | ...
    warpgroup 0, compute    |  step k   |  step k+1   |  step k+2   | ... | epilogue
    warpgroup 1, compute    |  step k   |  step k+1   |  step k+2   | ... | epilogue

A stage is one step of both operands in shared memory. Its barrier `full` says that the TMA has
filled it, `empty` that the compute warpgroups have released it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper.ptx import cluster
from jaxqq._kernels.hopper.tiles import Grid, cdiv

# Registers of a thread, by how many compute warpgroups there are: together what a launch has.
COMPUTE_REGISTERS = {2: 240, 3: 160, 4: 112}
PRODUCER_REGISTERS = {2: 24, 3: 32, 4: 32}
WORKER = "worker"  # axis of the grid: which CTA, or which cluster


# Named operands and scratch


_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def arrays(cls: type[_T]) -> type[_T]:
  """A dataclass of arrays or, in a kernel, their references; None where there is none."""
  frozen: Any = dataclasses.dataclass(frozen=True)(cls)
  fields = [field.name for field in dataclasses.fields(frozen)]
  return jax.tree_util.register_dataclass(frozen, data_fields=fields, meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Tile:
  """One of the output, counted in tiles: which matrix, rows and columns."""

  index: Any  # tiles that this CTA has had before
  batch: Any
  m: Any
  n: Any

  def row(self, block_m: int) -> Any:
    """The first one of x."""
    return self.m * block_m


@arrays
class GroupTiles:
  """Rows in groups, each of which is multiplied with a matrix of its own (`grouped.py`).

  Tiles of rows that have no matrix are apart: their results are zeros.
  """

  group: Any  # int32 (tiles,): of global scales
  matrix: Any  # of w
  first: Any  # row of x
  rows: Any
  first_zeros: Any
  rows_of_zeros: Any
  counts: Any  # int32 (2,): how many tiles there are of either kind


@dataclasses.dataclass(frozen=True)
class GroupTile(Tile):
  """Some rows of one group; `batch` is its matrix."""

  group: Any
  first: Any
  rows: Any

  def row(self, block_m: int) -> Any:
    del block_m
    return self.first


@dataclasses.dataclass(frozen=True)
class Steps:
  """Which steps along k of a tile a CTA has, and how many it has had before, of other tiles."""

  first: Any
  count: Any
  before: Any
  blocks_before: Any = None  # of scales, which some steps share


@dataclasses.dataclass(frozen=True)
class Walk:
  """Within a kernel: how many tiles this CTA has, and which its t-th is."""

  num_tiles: Any
  tile: Callable[[Any], Tile]


def whole_steps(walk: Walk, k_steps: Any) -> tuple[Callable[[Tile], Steps], Callable[[], Any]]:
  """What `produce` is told where all steps of a tile are one CTA's."""
  return lambda tile: Steps(0, k_steps, tile.index * k_steps), lambda: walk.num_tiles * k_steps


def walk(grid: Grid, groups: GroupTiles | None = None) -> Walk:
  workers, worker = grid.num_workers, lax.axis_index(WORKER)
  if groups is not None:
    return _walk_of_tiles(grid, groups)
  if grid.shares_last:
    return _walk_with_shared(grid)
  own_tiles = lax.div(grid.num_tiles - worker + workers - 1, jnp.int32(workers))
  return Walk(own_tiles, lambda t: tile_of(grid, t, worker + t * workers))


def _walk_with_shared(grid: Grid) -> Walk:
  """Tiles that a CTA has alone, and then one of its cluster's, where there is one."""
  clusters, rounds = grid.num_workers, grid.whole_rounds
  own, index = lax.axis_index(WORKER), cluster_index(grid)
  first_shared = rounds * clusters * grid.cluster
  assert grid.num_tiles - first_shared <= clusters, "each has one at most"

  def tile(t: Any) -> Tile:
    alone = (t * clusters + own) * grid.cluster + index
    return tile_of(grid, t, jnp.where(t < rounds, alone, first_shared + own))

  has_shared = own < grid.num_tiles - first_shared
  return Walk(rounds + has_shared.astype(jnp.int32), tile)


def walk_of_zeros(grid: Grid, groups: GroupTiles) -> Walk:
  """Over the tiles whose rows have no matrix."""

  def tile(index: Any, mi: Any, ni: Any) -> GroupTile:
    return GroupTile(index, 0, mi, ni, 0, groups.first_zeros[mi], groups.rows_of_zeros[mi])

  return _walk_in_bands(grid, groups.counts[1], tile)


def _walk_of_tiles(grid: Grid, groups: GroupTiles) -> Walk:
  def tile(index: Any, mi: Any, ni: Any) -> GroupTile:
    where = groups.group[mi], groups.first[mi], groups.rows[mi]
    return GroupTile(index, groups.matrix[mi], mi, ni, *where)

  return _walk_in_bands(grid, groups.counts[0], tile)


def _walk_in_bands(grid: Grid, m_tiles: Any, of_place: Callable[[Any, Any, Any], Tile]) -> Walk:
  """Over `m_tiles` tiles along m, in bands of them, with all of n."""
  workers, worker = grid.num_workers, lax.axis_index(WORKER)
  n_tiles, width = jnp.int32(grid.tiles[1]), jnp.int32(grid.group_width)

  def tile(t: Any) -> Tile:
    index = worker + t * workers
    band = lax.div(index, n_tiles * width)
    within = index - band * n_tiles * width
    band_width = jnp.minimum(width, m_tiles - band * width)
    ni = lax.div(within, band_width)
    return of_place(t, band * width + within - ni * band_width, ni)

  return Walk(lax.div(m_tiles * n_tiles - worker + workers - 1, jnp.int32(workers)), tile)


def tile_of(grid: Grid, own_index: Any, index: Any) -> Tile:
  m_tiles, n_tiles = grid.tiles
  a_matrix = jnp.int32(m_tiles * n_tiles)
  within = lax.rem(index, a_matrix)
  mi, ni = plgpu.planar_snake(within, (m_tiles, n_tiles), grid.minor, grid.group_width)
  return Tile(own_index, lax.div(index, a_matrix), mi, ni)


def release_registers(compute_warpgroups: int) -> None:
  """The first that a producer does: `take_registers` waits for it."""
  plgpu.set_max_registers(PRODUCER_REGISTERS[compute_warpgroups], action="decrease")


def take_registers(compute_warpgroups: int) -> None:
  """The first that a compute warpgroup does."""
  plgpu.set_max_registers(COMPUTE_REGISTERS[compute_warpgroups], action="increase")


def produce(
  load: Callable[[Any, Any, Tile], None],  # (stage, k step within the tile, tile)
  empty: Any,  # barriers, one a stage
  walk: Walk,
  steps_of: Callable[[Tile], Steps],
  count_steps: Callable[[], Any],  # of all tiles
) -> None:
  """The producer's work: loads every step of every tile, once its stage is free."""
  (stages,) = empty.shape

  @pl.loop(0, walk.num_tiles)
  def _tile(t: Any) -> None:
    tile = walk.tile(t)
    steps = steps_of(tile)
    first = steps.before

    def load_when_free(ki: Any, stage: Any) -> Any:
      @pl.when(first + ki >= stages)
      def _wait() -> None:
        plgpu.barrier_wait(empty.at[stage])

      load(stage, ki, tile)
      return stage_after(stage, stages)

    lax.fori_loop(0, steps.count, load_when_free, stage_of(first, stages))

  num_steps = count_steps()

  # The last readers: no mbarrier is mid-phase at exit.
  @pl.loop(jnp.maximum(num_steps - stages, 0), num_steps)
  def _drain(step: Any) -> None:
    plgpu.barrier_wait(empty.at[stage_of(step, stages)])


def stage_of(step: Any, stages: int) -> Any:
  """The stage of a step, counted over all tiles. In a loop over steps, carry it instead: ptxas puts
  the division between instructions for the tensor cores.
  """
  return lax.rem(step, jnp.int32(stages))


def stage_after(stage: Any, stages: int, steps: int = 1) -> Any:
  """The stage so many steps later, up to as many as there are."""
  after = stage + jnp.int32(steps)
  return jnp.where(after >= stages, after - stages, after)


def group_of(ref: Any, tile: Tile) -> Any:
  """The index of a tile's group in a reference to one number, or to one for each group."""
  return tile.group if isinstance(tile, GroupTile) and ref.shape[0] > 1 else 0


def batch_of(ref: Any, b: Any) -> Any:
  """The batch index of an operand that may be shared by all batches."""
  return b if ref.shape[0] > 1 else 0


def cluster_index(grid: Grid) -> Any:
  """Which CTA of those that share a tile this is."""
  return lax.axis_index(cluster.AXIS) if grid.cluster > 1 else 0


def share_of_steps(grid: Grid, k_steps: int) -> tuple[Any, Any]:
  """Of all steps along k of a tile that a cluster shares: this CTA's first, and how many it has."""
  index, size = cluster_index(grid), jnp.int32(grid.cluster)
  first, end = (lax.div((index + i) * k_steps, size) for i in range(2))
  return first, end - first


# Launching


def compiler_params() -> plgpu.CompilerParams:
  """Barriers are where the kernels put them: no shared memory is both written and read by one."""
  return plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True
  )


def launch(
  body: Callable[[Any, Any, Any], None],
  operands: Any,
  out_type: Any,
  scratch: Any,
  *,
  name: str,
  grid: Grid,
  compute_warpgroups: int,
) -> Any:
  """Runs body(operands, out, scratch), each of which is references, named as they came.

  Args:
    operands, scratch: dataclasses of `arrays`; scratch has the types.
    out_type: the result's, or () where an operand is written to; `out` then is None.
  """
  leaves, structure = jax.tree.flatten(operands)

  def kernel(*refs: Any) -> None:
    named = jax.tree.unflatten(structure, refs[: len(leaves)])
    *out, scratch_refs = refs[len(leaves) :]
    body(named, out[0] if out else None, scratch_refs)

  shared = grid.cluster > 1
  run = plgpu.kernel(
    kernel,
    out_type=out_type,
    grid=(grid.num_workers,),
    grid_names=(WORKER,),
    cluster=(grid.cluster,) if shared else (),
    cluster_names=(cluster.AXIS,) if shared else (),
    num_threads=compute_warpgroups + 1,
    thread_name="warpgroup",
    compiler_params=compiler_params(),
    scratch_types=[scratch],
    kernel_name=f"jaxqq_{name}",
  )
  return run(*leaves)


# Sizes


def rounded_up(size: int, multiple: int) -> int:
  return cdiv(size, multiple) * multiple


def pad_rows(a: jax.Array, rows: int) -> jax.Array:
  """Zeros along axis 1 up to so many: for loads in tiles of 8 rows, and those that know no end."""
  missing = max(0, rows - a.shape[1])
  return jnp.pad(a, ((0, 0), (0, missing), (0, 0))[: a.ndim]) if missing else a
