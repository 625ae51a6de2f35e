"""Stream-K: every CTA gets as many steps of k, whatever tiles they belong to.

Where tiles do not fill the last wave of CTAs, SMs are idle for as long as a tile takes. So the
tiles of the last wave, and of the one before it, are laid end to end, and their steps are dealt
out evenly. In `dequant_gemm` it is in twos: its loop needs two steps or more of a tile, and an odd
last one goes with the two before it. Of three CTAs and four tiles of six steps, each has eight:

    tiles    |      0      |      1      |      2      |      3      |
    CTAs     |        0         |        1         |        2        |

A CTA goes through its range backwards. First comes a part of a tile that a later CTA ends: its sums
go to memory, and a flag says so. Last comes the end of a tile that earlier CTAs began: this CTA
adds up, always in the same order, and stores the result. So a CTA waits only for CTAs of lower
numbers. The device starts those no later, and they publish their sums first.

A CTA has the tiles of whole waves, which are numbered before these, afterwards. Source: Osama et
al., Stream-K (arXiv 2301.03598).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxqq._kernels.hopper.pipeline import WORKER, Steps, Tile, Walk, tile_of
from jaxqq._kernels.hopper.ptx.handover import FLAGS
from jaxqq._kernels.hopper.ptx.registers import recomputed
from jaxqq._kernels.hopper.tiles import ROWS, Grid, cdiv


@dataclasses.dataclass(frozen=True)
class Piece(Tile):
  """Some steps of a tile."""

  steps: Steps
  is_end: Any  # of the tile's steps; else this CTA leaves its sums to the one that has the end
  others: Any  # CTAs just before this one that leave theirs


def walk(grid: Grid, k_steps: int, block_steps: int = 1) -> tuple[Walk, Any]:
  """The pieces and tiles of this CTA, and how many steps they have.

  Args:
    grid: without clusters; as many CTAs as SMs run at once.
    k_steps: of a tile.
    block_steps: steps that share a block of scales.
  """
  assert grid.dealt_tiles * (k_steps // grid.dealt_steps) >= grid.num_sms, "every CTA has steps"
  worker = lax.axis_index(WORKER)
  share = _Share(grid, k_steps, block_steps, worker)

  def tile(t: Any) -> Piece:
    return _Share(grid, k_steps, block_steps, recomputed(worker)).piece(t)

  whole = grid.whole_waves
  return Walk(share.num_pieces + whole, tile), share.end - share.begin + whole * k_steps


def buffers(grid: Grid, warpgroups: int, block_m: int) -> tuple[Any, Any]:
  """References to what CTAs leave each other: sums (CTAs, warpgroups, 64, block_m), and flags."""
  sums = jax.ShapeDtypeStruct((grid.num_sms, warpgroups, ROWS, block_m), jnp.float32)
  flags = jax.ShapeDtypeStruct((grid.num_sms * warpgroups * FLAGS,), jnp.int32)
  return jax.empty_ref(sums), jax.empty_ref(flags)


def flags_of(flags: Any, worker: Any, warpgroups: int, warpgroup: Any) -> Any:
  """Those of a CTA's warpgroup."""
  return flags.at[pl.ds((worker * warpgroups + warpgroup) * FLAGS, FLAGS)]


class _Share:
  """The dealt steps of a CTA: those from `begin` to `end`, counted from the first dealt tile on."""

  def __init__(self, grid: Grid, k_steps: int, block_steps: int, worker: Any):
    self.grid, self.k_steps, self.block_steps, self.worker = grid, k_steps, block_steps, worker
    self.tile_deals = k_steps // grid.dealt_steps  # the last one may have a step more
    self.deals = grid.dealt_tiles * self.tile_deals
    workers, size = jnp.int32(grid.num_sms), jnp.int32(k_steps)
    self.begin, self.end = (
      self.step_of(lax.div((worker + i) * self.deals, workers)) for i in range(2)
    )
    self.first_tile, self.last_tile = lax.div(self.begin, size), lax.div(self.end - 1, size)
    self.num_pieces = self.last_tile - self.first_tile + 1

  def step_of(self, deal: Any) -> Any:
    """The first step of a deal, counted from the first dealt tile on."""
    tile = lax.div(deal, jnp.int32(self.tile_deals))
    return tile * self.k_steps + (deal - tile * self.tile_deals) * self.grid.dealt_steps

  def blocks(self, first: Any, end: Any) -> Any:
    """Blocks of scales of some steps of a tile."""
    size = jnp.int32(self.block_steps)
    return lax.div(end + (self.block_steps - 1), size) - lax.div(first, size)

  def piece(self, t: Any) -> Piece:
    """The t-th: those of dealt tiles, from the last to the first, and then whole tiles."""
    k_steps, workers = self.k_steps, self.grid.num_sms
    first_dealt, later = self.grid.whole_waves * workers, t - self.num_pieces
    is_dealt = later < 0
    own = jnp.where(is_dealt, self.last_tile - t, self.worker + later * workers - first_dealt)
    of_tile = own * k_steps
    first = jnp.where(is_dealt, jnp.maximum(self.begin - of_tile, 0), 0)
    stop = jnp.where(is_dealt, jnp.minimum(self.end - of_tile, k_steps), k_steps)
    before = jnp.where(is_dealt, self.end - stop - of_tile, self.end - self.begin + later * k_steps)
    steps = Steps(first, stop - first, before, self.blocks_before(t, later, is_dealt))
    # The CTA that has the tile's first step.
    first_worker = lax.div((own * self.tile_deals + 1) * workers - 1, jnp.int32(self.deals))
    of = tile_of(self.grid, t, first_dealt + own)
    return Piece(
      *(of.index, of.batch, of.m, of.n),
      steps=steps,
      is_end=stop == k_steps,
      others=jnp.where(first > 0, self.worker - first_worker, 0),
    )

  def blocks_before(self, t: Any, later: Any, is_dealt: Any) -> Any:
    of_last, of_first = self.last_tile * self.k_steps, self.first_tile * self.k_steps
    a_tile = cdiv(self.k_steps, self.block_steps)
    # A CTA's first piece, which is of its last tile; and the piece of its first tile.
    first = self.blocks(jnp.maximum(self.begin - of_last, 0), self.end - of_last)
    last = self.blocks(self.begin - of_first, jnp.minimum(self.end - of_first, self.k_steps))
    between = jnp.maximum(self.num_pieces - 2, 0) * a_tile
    every = between + last + jnp.where(self.num_pieces > 1, first, 0)
    dealt = jnp.where(t > 0, first + (t - 1) * a_tile, 0)
    return jnp.where(is_dealt, dealt, every + later * a_tile)
