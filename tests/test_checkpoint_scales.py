"""Global scales that a checkpoint brings and that are no amax: what calibration never reached."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxqq
from jaxqq import checkpoint
from tests.support import checkpoints, oracle
from tests.support.messages import refused

KINDS = ("modelopt", "nvfp4-pack-quantized")
WEIGHT = {kind: weight for kind, (weight, _) in checkpoints.SCALARS.items()}
INPUT = {kind: own for kind, (_, own) in checkpoints.SCALARS.items()}
OF_ZERO = dict(zip(KINDS, (0.0, np.inf), strict=True))  # what an amax of 0 is stored as
TINY = float(np.finfo(np.float32).tiny)


def written(folder, kind, **changed):
  """A checkpoint in which tensors of layer "up" are others: names with "__" for "."."""
  tensors, wanted = checkpoints.layers(kind, np.random.default_rng(0))
  for suffix, value in changed.items():
    old = tensors[f"up.{suffix}"]
    tensors[f"up.{suffix}"] = np.full(old.shape, value, old.dtype)
  checkpoints.write(folder, tensors, **checkpoints.configs(kind))
  return folder, wanted


def loaded(folder, *words):
  with pytest.warns(UserWarning) as caught:
    tensors = checkpoint.load(folder)
  assert len(caught) == 1 and caught[0].filename == __file__
  sentence = str(caught[0].message)
  assert sentence.startswith("load: ") and sentence.endswith(".") and "\n" not in sentence
  for word in words:
    assert str(word) in sentence, sentence
  return tensors


# An amax up to 2688 * TINY is what tools write in place of 0.
NO_CALIBRATION = [(kind, scalar) for kind in KINDS for scalar in (0.0, -0.0, np.inf)]
NO_CALIBRATION += [("modelopt", 1e-40), ("modelopt", TINY / 2688), ("modelopt", TINY)]
NO_CALIBRATION += [("nvfp4-pack-quantized", 1e38), ("nvfp4-pack-quantized", 1e-37)]


@pytest.mark.parametrize(("kind", "scalar"), NO_CALIBRATION)
def test_a_scale_of_activations_that_is_no_calibration(kind, scalar, tmp_path):
  folder, wanted = written(tmp_path / "m", kind, **{INPUT[kind]: scalar})
  tensors = loaded(folder, "model.safetensors", f"'up.{INPUT[kind]}' is {np.float32(scalar)}")
  up, down = tensors["up.weight"], tensors["down.weight"]
  assert up.input_global_scale is None and down.input_global_scale is not None
  assert float(up.global_scale) == float(wanted["up.weight"]["global_scale"])

  # x has none then, unless its amax is asked for.
  x = oracle.random(np.random.default_rng(1), (4, 64), "float32")
  values = wanted["up.weight"]["values"]
  unscaled = oracle.product(oracle.round_trip(x, "nvfp4"), values)
  oracle.assert_within_bound(np.asarray(jaxqq.qqmm(x, up)), *unscaled)
  exact, mag = oracle.product(oracle.round_trip(x, "nvfp4", np.abs(x).max()), values)
  oracle.assert_within_bound(
    np.asarray(jaxqq.qqmm(x, up, global_scale_x=np.abs(x).max())), exact, mag
  )
  batched = jax.tree.map(lambda a: a[None], up)
  dot = jaxqq.dot_general("nvfp4", global_scale="amax")
  out = dot.packed(x[None], batched, contracting=(2,), batch=(0,), out_features=(8,))
  oracle.assert_within_bound(np.asarray(out)[0], exact, mag)

  # Saved again it has the bytes it had, in its own format, and is loaded as here.
  checkpoint.save(tmp_path / "again", tensors, format=tensors.format)
  assert checkpoints.read_raw(tmp_path / "again") == checkpoints.read_raw(folder)
  loaded(tmp_path / "again")


def test_one_warning_for_all(tmp_path):
  tensors, _ = checkpoints.layers("modelopt", np.random.default_rng(0))
  tensors["up.input_scale"] = tensors["down.input_scale"] = np.zeros((), np.float32)
  checkpoints.write(tmp_path, tensors, **checkpoints.configs("modelopt"))
  loaded(tmp_path, "and 1 more")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_no_calibration_in_the_other_format(kind, sign, tmp_path):
  """It is what an amax of 0 is there, and the layer stays one whose activations are quantized."""
  scalar = OF_ZERO[kind] or sign * 0.0
  folder, _ = written(tmp_path / "m", kind, **{INPUT[kind]: scalar})
  other = next(name for name in KINDS if name != kind)
  format = {"modelopt": "modelopt"}.get(other, "compressed-tensors")
  checkpoint.save(tmp_path / "other", loaded(folder), format=format)
  dtype, _, data = checkpoints.read_raw(tmp_path / "other")[f"up.{INPUT[other]}"]
  assert (dtype, np.frombuffer(data, np.float32).item()) == ("F32", OF_ZERO[other])
  tensors = loaded(tmp_path / "other")
  assert tensors["up.weight"].input_global_scale is None


def test_what_was_left_out_is_not_written_for_another_weight(tmp_path):
  folder, _ = written(tmp_path / "m", "modelopt", input_scale=0.0)
  tensors = loaded(folder)
  w = jnp.ones((8, 64))
  tensors["up.weight"] = jaxqq.quantize_weight(w, global_scale="amax")
  checkpoint.save(tmp_path / "other", tensors, format="modelopt")
  assert "up.input_scale" not in checkpoints.read_raw(tmp_path / "other")
  packed, scales = jaxqq.quantize(w, global_scale=jnp.float32(1))
  tensors["up.weight"] = jaxqq.QuantizedWeight(
    packed, scales, global_scale=jnp.float32(1), input_global_scale=jnp.float32(5)
  )
  checkpoint.save(tmp_path / "calibrated", tensors, format="modelopt")
  again = checkpoint.load(tmp_path / "calibrated")
  assert float(again["up.weight"].input_global_scale) == 5


@pytest.mark.parametrize("value", [np.nan, -1.0, -np.inf])
@pytest.mark.parametrize("of", [WEIGHT, INPUT], ids=["weight", "input"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_meant(kind, of, value, tmp_path):
  folder, _ = written(tmp_path / "m", kind, **{of[kind]: value})
  meaning = {"modelopt": "amax / 2688 of an amax"}.get(kind, "2688 / amax of an amax")
  refused(folder, "model.safetensors", f"'up.{of[kind]}' must be {meaning}", f"found {value}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_infinite_amax(kind, tmp_path):
  value = 1 / OF_ZERO[kind] if OF_ZERO[kind] else np.inf
  folder, _ = written(tmp_path / "m", kind, **{WEIGHT[kind]: value})
  refused(folder, f"'up.{WEIGHT[kind]}' must be", "finite", f"found {value}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_amax_zero(kind, tmp_path):
  """That of zeros, whether its codes or its scales say so, and of nothing else."""
  codes = checkpoints.CODES[kind]
  zero = {WEIGHT[kind]: OF_ZERO[kind]}
  folder, _ = written(tmp_path / "codes", kind, **zero)
  refused(folder, f"'up.{WEIGHT[kind]}' must be", f"found {OF_ZERO[kind]}", "not zeros")
  # compressed-tensors' own arithmetic makes NaN scales of zeros: 0 * inf.
  scales = np.full((8, 4), 0x7F, np.uint8).view(checkpoints.E4M3)
  folder, _ = written(tmp_path / "nan", kind, **zero, **{codes: 0, "weight_scale": scales})
  refused(folder, f"'up.{WEIGHT[kind]}' must be")
  signs = np.uint8(0x88)
  for name, change in {"a": {codes: signs}, "b": {"weight_scale": -0.0}}.items():
    folder, _ = written(tmp_path / name, kind, **zero, **change)
    tensors = checkpoint.load(folder)
    weight = tensors["up.weight"]
    assert float(weight.global_scale) == 0
    assert not np.asarray(weight.dequantize(), np.float32).any()
    assert not np.asarray(jaxqq.qqmm(jnp.ones((2, 64)), weight)).any()
    checkpoint.save(tmp_path / f"{name} again", tensors, format=tensors.format)
    assert checkpoints.read_raw(tmp_path / f"{name} again") == checkpoints.read_raw(folder)


@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.0])
def test_save_refuses_what_load_would(format, value, tmp_path):
  packed, scales = jaxqq.quantize(jnp.ones((8, 64)))
  weight = jaxqq.QuantizedWeight(packed, scales, global_scale=np.float32(value))
  with pytest.raises(ValueError, match=r"^save: 'up.weight' must have a .*global_scale.*got \S+"):
    checkpoint.save(tmp_path / "m", {"up.weight": weight}, format=format)
  assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)])
def test_a_weight_without_numbers(shape, tmp_path):
  weight = jaxqq.quantize_weight(jnp.zeros(shape), global_scale="amax")
  checkpoint.save(tmp_path, {"a.weight": weight}, format="modelopt")
  loaded = checkpoint.load(tmp_path)["a.weight"]
  assert loaded.shape == shape and np.asarray(loaded.global_scale) == 0
