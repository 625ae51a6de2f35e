"""The bench of layers of experts."""

from __future__ import annotations

import numpy as np
import pytest

from jaxqq.bench import __main__ as bench
from jaxqq.bench import moe
from jaxqq.bench.measure import Settings

LAYER = moe.Layer(4, 2, 32, 64)
QUICK = Settings(seconds=0.01, rounds=1)


def test_a_file_is_added_to(tmp_path):
  path, told = tmp_path / "moe.json", []
  how = {"layers": (LAYER,), "tell": told.append}
  first = moe.run(("nvfp4",), (3,), ("packed", "training"), QUICK, path, **how)
  names = ["lax.ragged_dot", "jaxqq nvfp4"]
  assert [(row.form, row.implementation) for row in first] == [
    (form, name) for form in ("packed", "training") for name in names
  ]
  assert all(row.us and not row.note and row.error_share <= 1 for row in first)
  assert all(
    row.ratio == pytest.approx(first[i // 2 * 2].us / row.us) for i, row in enumerate(first)
  )
  assert moe.run(("nvfp4",), (3,), ("packed", "training"), QUICK, path, **how) == first
  assert len(told) == 4
  assert len(moe.run(("mxfp4",), (3,), ("weights alone",), QUICK, path, **how)) == 6
  table = moe.markdown(moe.read(path)[1])
  assert "| 32 x 64 (4, 2) | jaxqq nvfp4 |" in table and "T=3" in table


def test_a_token_has_different_experts():
  of = moe.routing(moe.Layer(4, 3, 8, 64), 10, seed=1)
  sizes = np.asarray(of.sizes)
  assert sizes.sum() == 30 == len(of.x) and sizes.max() <= 10


def test_what_fails_is_said():
  def product(x, sizes, w):
    raise ValueError("no such luck")

  way = moe.Way("broken", lambda w: (w,), product)
  (row,) = moe.measure(LAYER, 2, "packed", [way], bench.make_timer(), QUICK)
  assert row.us is None and row.note == "failed: ValueError: no such luck"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--suite", "moe", "goals"], "--suite moe stands alone"),
    (["--suite", "moe", "--forms", "quantize"], "--suite moe has the forms packed"),
  ],
)
def test_bad_options(arguments, message, capsys):
  with pytest.raises(SystemExit):
    bench.main(arguments)
  assert message in capsys.readouterr().err
