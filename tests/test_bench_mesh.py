"""The MLP on a mesh, on a CPU's forced devices."""

from __future__ import annotations

import pytest

from jaxqq.bench import mesh
from jaxqq.bench.cases import MODES


@pytest.mark.usefixtures("quick_compiles")
def test_one_device_and_two(tmp_path, capsys):
  sizes = ["--hidden", "128", "--intermediate", "256", "--seconds", "0.01", "--devices", "1", "2"]
  file = tmp_path / "mesh.json"
  training = mesh.main([*sizes, "--weights", "nvfp4", "--rows", "--train-rows", "5"])
  forward = mesh.main([*sizes, "--rows", "3", "--train-rows", "--json", str(file)])
  got = [(r.weights, r.devices, r.work, r.rows) for r in training + forward]
  names = (mesh.BFLOAT16, *MODES)
  wanted = [("nvfp4", d, mesh.TRAINING, 5) for d in (1, 2)]
  assert got == [*wanted, *((n, d, mesh.FORWARD, 3) for n in names for d in (1, 2))]
  for result in training + forward:
    assert 0 < result.us_min <= result.us
    products = {"gate", "y"}
    if result.work == mesh.TRAINING:
      products |= {"d_hidden", "d_down_weight", "d_gate_weight"}
    assert set(result.error_shares) == products
    if result.weights != mesh.BFLOAT16:
      assert all(0 < share <= 1 for share in result.error_shares.values())
    if result.devices == 1:
      assert (result.collectives, result.off_by) == ({}, 0)
    else:
      # The parts of y are added up once. A step of nvfp4 has two amax of all devices' numbers too.
      training = result.work == mesh.TRAINING
      assert result.collectives == {"all-reduce": 3 if training else 1}
      # By the rounding of y, of the hidden layer and of cotangents, whose codes then may differ.
      assert result.off_by < 5e-2
  assert mesh.read(file)[1] == forward
  capsys.readouterr()
  assert mesh.main(["--show", str(file)]) == forward
  assert mesh.markdown(forward) in capsys.readouterr().out


def test_more_devices_than_there_are_is_said(capsys):
  with pytest.raises(SystemExit):
    mesh.main(["--devices", "1000"])
  assert "--devices: there are" in capsys.readouterr().err
