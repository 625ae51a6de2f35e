"""Tiles that are measured, and costs that are fitted to them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources

import jax
import numpy as np
import pytest

import jaxqq
from jaxqq._kernels.hopper import costs, wide_plan
from jaxqq._kernels.hopper.tiles import Grid, cdiv
from jaxqq.bench import measure, processes, tune
from jaxqq.bench.cases import Case
from tests.support.programs import lowered_for_cuda

pytestmark = pytest.mark.skipif(
  jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11 (Mosaic GPU's warpgroups)"
)
TUNED = importlib.resources.files("jaxqq") / "_kernels" / "tuned"
SHAPES = ((4096, 4096), (2048, 7168), (12288, 4096), (5120, 25600), (8192, 8192))


def test_tiles_that_may_be_the_fastest():
  case = Case("packed", "nvfp4", 192, 5120, 25600)
  plans = tune.plans_of(case)
  assert len(plans) > 3 and {each.kernel for each in plans} == {"dequant_gemm"}
  times = [each.estimate_us for each in plans]
  assert max(times) <= tune.SLOWER * min(times)
  tiles = [tune.Tile.of(each) for each in plans]
  assert len({tile.name for tile in tiles}) == len(tiles)
  assert {tile.product for tile in tiles} == {("nvfp4", 192, 5120, 25600)}
  assert any(tile.stream_k for tile in tiles) and any(tile.cluster > 1 for tile in tiles)
  other = Case("packed", "mxfp8", 128, 4096, 4096)
  found = tune.tile_cases([case, other])  # what the planner takes of each comes first
  assert [c.tile for c in found[:2]] == [tune.Tile.of(tune.plans_of(c)[0]) for c in (case, other)]
  assert {c.tile for c in found} >= set(tiles) and tiles[0] == tune.Tile.of(
    wide_plan.fastest(plans)
  )


def test_each_is_a_program_of_its_own():
  case = Case("packed", "mxfp8", 128, 256, 256)
  specs = [
    jax.ShapeDtypeStruct(s, d) for s, d in (((128, 256), "bfloat16"), ((256, 256), "bfloat16"))
  ]
  texts = set()
  for tile_case in tune.tile_cases([case])[:2]:
    (each,) = tune.implementations(tile_case)
    prepared = jax.eval_shape(each.prepare, *specs)
    text = lowered_for_cuda(each.run, *prepared)
    assert "jaxqq_dequant_gemm" in text
    texts.add(text)
  assert len(texts) == 2


def test_a_product_by_a_tile_has_a_row_of_its_own():
  """Measured as any case, here by a product that runs on a CPU."""
  case, *_ = tune.tile_cases([Case("packed", "nvfp4", 96, 128, 256)])
  (own,) = tune.implementations(case)
  own = dataclasses.replace(own, run=functools.partial(jaxqq.qqmm, mode="nvfp4"))
  settings = measure.Settings(0.01, rounds=1, chain=0)
  (row,) = measure.run_cases({case: [own]}, measure.make_timer(), settings)[case]
  assert row.us > 0 and tune.is_right(row) and row.implementation == case.tile.name


def made_up(timed):
  """Times that its costs make, of products of many sizes."""
  times = {}
  for m in (96, 200, 700, 1500):
    for n, k in SHAPES:
      for cluster, stream_k in ((1, False), (2, False), (4, False), (1, True)):
        how = timed.block_m, timed.block_n, cluster, stream_k, timed.parts
        tile = tune.Tile("nvfp4", m, n, k, *how)
        sizes = 1, m, n, timed.block_m, timed.block_n, 132
        grid = Grid(*sizes, cluster=cluster, stream_k=stream_k)
        if stream_k and not grid.dealt_tiles:
          continue
        times[tile] = timed.time(grid, cdiv(k, 64 * timed.parts), timed.parts, m)
  return times


def test_the_costs_that_times_were_made_of_are_found():
  before = costs.DEQUANT_E2M1[0].launch_us, costs.DEQUANT_E2M1[0].x_us
  want = costs.Timed(128, 192, 0.5, 1.0, 2.0, (0.6, 8.0, 0.5), 2, *before, exchange_us=4.0)
  other = costs.Timed(64, 128, 0.3, 1.0, 4.0, (0.4, 7.0, 0.0), 4, *before)
  times = made_up(want) | made_up(other)
  assert tune.fitted(times, "nvfp4") == [other, want]
  assert tune.fitted(times, "mxfp8") == []
  # Of few times a step may seem to take less with stream-K, where it can but take as long.
  faster = made_up(dataclasses.replace(want, stream_k=(0.4, 8.0, 0.5)))
  (found,) = tune.fitted(faster, "nvfp4")
  assert found.stream_k == (0.4, 8.0, 0.5)
  few = [tile for tile in faster if tile.stream_k][4:]
  (found,) = tune.fitted({t: us for t, us in faster.items() if t not in few}, "nvfp4")
  assert found.stream_k[0] == want.part_us and found.stream_k[1] < 8.0
  # Clusters of one size do not tell what is exchanged from the rest.
  twos = {tile: us for tile, us in made_up(want).items() if tile.cluster <= 2}
  (found,) = tune.fitted(twos, "nvfp4")
  assert (found.cluster_us, found.exchange_us) == (4.0, 0.0)
  few = dict(list(made_up(want).items())[:2])
  assert tune.fitted(few, "nvfp4") == []


def test_costs_are_those_that_are_fitted():
  """Of the tiles whose times are all kept."""
  times = tune.read(TUNED / "h200_tiles.json")
  assert tune.fitted(times, "mxfp8") == list(costs.DEQUANT_E4M3)
  fitted = tune.fitted(times, "nvfp4")
  sizes = {(16, 128), (16, 192), (32, 128), (32, 192), (32, 256)}
  lines = [line for line in costs.DEQUANT_E2M1 if (line.block_m, line.block_n) in sizes]
  assert [line for line in fitted if (line.block_m, line.block_n) in sizes] == lines


def test_how_far_the_planner_is_from_the_fastest():
  times = tune.read(TUNED / "h200_tiles.json")
  plans = tune.plans_of(Case("packed", "nvfp4", 256, 8192, 8192))
  chosen = tune.Tile.of(wide_plan.fastest(plans))
  faster = dataclasses.replace(chosen, block_m=64, block_n=64)
  found = tune.choices(times | {chosen: 50.0, faster: 40.0})
  assert (1.25, chosen, faster) in found and found == sorted(found, key=lambda c: -c[0])
  assert tune.choices({faster: 40.0}) == [(np.inf, chosen, faster)]
  assert "1.25 nvfp4 256 x 8192 x 8192" in tune.report({chosen: 50.0, faster: 40.0})


def test_runs_add_up(tmp_path, monkeypatch, capsys):
  """What is measured, right and new is added; a wrong result has no time."""
  begun = []

  def measured(groups, work, workers):
    assert workers == 2
    assert work.settings.chain == 0
    for i, (case,) in enumerate(groups):
      begun.append(case)
      (only,) = work.compared(case)
      row = measure.Row(case.name, **case.fields(), implementation=only.name)
      yield {case: [dataclasses.replace(row, us=10.0 + i, error_share=0.5 + (i == 1))]}

  monkeypatch.setattr(processes, "measured", measured)
  path = tmp_path / "tiles.json"
  arguments = ["--json", str(path), "--shapes", "4096x4096", "--processes", "2", "--modes", "nvfp4"]
  times = tune.main([*arguments, "--rows", "128"])
  plans = tune.plans_of(Case("packed", "nvfp4", 128, 4096, 4096))
  assert len(times) == len(plans) - 1 and tune.read(path) == times
  again = tune.main([*arguments, "--rows", "128", "256"])
  of_first = [case for case in begun if case.m == 128]
  assert len(begun) > len(of_first) == len(plans) + 1 and len(again) > len(times)
  assert of_first[1] == of_first[-1]  # the one that was wrong
  assert tune.main([*arguments, "--fit"]) == again == tune.read(path)
  assert "of 2 products" in capsys.readouterr().out
