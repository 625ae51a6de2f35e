"""Layers that come dequantized, FP8 and MLX's affine, and FP8 as mxfp8."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from jaxqq import checkpoint
from jaxqq.checkpoint._dense import rounded
from tests.support import schemes
from tests.support.checkpoints import E4M3, E8M0
from tests.support.messages import refused
from tests.support.schemes import (
  BF16,
  CT_NVFP4,
  LINEAR,
  NVFP4,
  SHAPE,
  Generated,
  compressed,
  modelopt,
  one,
)


def rng():
  return np.random.default_rng(0)


def nearest(values, dtype):
  """float64 to the nearest number of a dtype, the even one of two: by all numbers of the dtype."""
  dtype = np.dtype(dtype)
  if dtype == np.float32:
    return values.astype(np.float32)
  all_of = np.arange(1 << 16, dtype=np.uint16).view(dtype)
  magnitudes = np.unique(np.abs(all_of[np.isfinite(all_of.astype(np.float32))]).astype(np.float64))
  i = np.clip(np.searchsorted(magnitudes, np.abs(values)), 1, len(magnitudes) - 1)
  low, high = magnitudes[i - 1], magnitudes[i]
  middle = (low + high) / 2
  is_even = (low.astype(dtype).view(np.uint16) & 1) == 0
  down = (np.abs(values) < middle) | ((np.abs(values) == middle) & is_even)
  return np.copysign(np.where(down, low, high), values).astype(dtype)


FP8_KINDS = {
  "FP8": (schemes.fp8("tensor"), "a scale for the tensor"),
  "FP8_PER_CHANNEL_PER_TOKEN": (schemes.fp8("channel"), "a scale for each row"),
  "FP8_PB_WO": (schemes.fp8("block", block=(128, 128)), "a scale for each 128 x 128"),
}


@pytest.mark.parametrize("algorithm", FP8_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fp8_layers_beside_nvfp4(algorithm, dtype, tmp_path):
  """The numbers are exact in float64: a code of 4 bits times a scale of 24."""
  layer, report = FP8_KINDS[algorithm]
  made, numbers = Generated("modelopt"), rng()
  made.add("up", NVFP4, numbers)
  made.add("q", layer, numbers, (130, 160))
  entries = {"up": schemes.modelopt_entry("NVFP4"), "q": {"quant_algo": algorithm}}
  config = schemes.modelopt_config("MIXED_PRECISION", quantized_layers=entries)
  made.configs = {"hf_quant_config.json": config}
  made.write(tmp_path / "m")
  loaded = checkpoint.load(tmp_path / "m", dtype=dtype)
  assert loaded.keys() == {"up.weight", "q.weight"}
  assert loaded.dequantized == {"q.weight": f"modelopt {algorithm}, {report}"}
  out = np.asarray(loaded["q.weight"])
  assert out.dtype == np.dtype(dtype) and out.shape == (130, 160)
  assert out.tobytes() == nearest(made.wants["q.weight"].values, dtype).tobytes()
  np.testing.assert_array_equal(loaded["up.weight"].packed, made.wants["up.weight"].packed)

  # It is saved as numbers, and said not to be quantized.
  checkpoint.save(tmp_path / "again", loaded, format="modelopt")
  again = checkpoint.load(tmp_path / "again")
  assert again.dequantized == {} and np.asarray(again["q.weight"]).tobytes() == out.tobytes()
  with pytest.raises(ValueError, match=rf"^load: .*quant_algo of layer 'q'.*found '{algorithm}'"):
    checkpoint.load(tmp_path / "m", fp8="refuse")


def test_scales_of_blocks_as_modelopt_keeps_them(tmp_path):
  """(N / 128, 1, K / 128, 1)."""
  made, numbers = Generated("modelopt"), rng()
  made.add("q", schemes.fp8("block", block=(128, 128)), numbers, (130, 160))
  made.tensors["q.weight_scale"] = made.tensors["q.weight_scale"].reshape(2, 1, 2, 1)
  made.configs = {"hf_quant_config.json": schemes.modelopt_config("FP8_PB_REAL")}
  made.write(tmp_path)
  out = np.asarray(checkpoint.load(tmp_path, dtype="float32")["q.weight"])
  assert out.tobytes() == made.wants["q.weight"].values.astype(np.float32).tobytes()


@pytest.mark.parametrize("of", ["tensor", "channel", "block"])
def test_float_quantized_layers(of, tmp_path):
  """In the group of their name, with a scale in bfloat16; and where a pattern leaves them out."""
  group = schemes.ct_group("fp8", ["re:.*q$"], strategy=of, block=[4, 32] * (of == "block") or None)
  layers = {"up": CT_NVFP4, "q": schemes.fp8(of, dtype=BF16)}
  for ignore in ([], ["re:q"]):
    folder = tmp_path / str(len(ignore))
    made = compressed(folder, layers, [LINEAR | {"targets": ["re:.*up"]}, group], ignore)
    loaded = checkpoint.load(folder, dtype="float32")
    out = np.asarray(loaded["q.weight"])
    assert out.tobytes() == made.wants["q.weight"].values.astype(np.float32).tobytes()
    assert set(loaded.dequantized) == {"q.weight"}
  with pytest.raises(ValueError, match=r"format of 'group_1'.*found 'float-quantized'"):
    checkpoint.load(folder, fp8="refuse")


def test_blocks_of_deepseek_and_of_experts(tmp_path):
  """weight_scale_inv is a factor; stacked experts have a parameter's name and its ending."""
  layer = schemes.fp8("block", "weight_scale_inv")
  made, numbers = Generated("transformers"), rng()
  made.add("q", layer, numbers)
  ending = {"weight": "", "weight_scale_inv": "_scale_inv"}.__getitem__
  made.add_parameter("m.experts.down_proj", layer, numbers, (3, *SHAPE), ending)
  config = {"quant_method": "fp8", "weight_block_size": [4, 32], "fmt": "e4m3"}
  made.configs = {"config.json": {"quantization_config": config}}
  made.write(tmp_path)
  loaded = checkpoint.load(tmp_path, dtype="float32")
  assert loaded.keys() == loaded.dequantized.keys() == made.wants.keys()
  for name, want in made.wants.items():
    assert np.asarray(loaded[name]).tobytes() == want.values.astype(np.float32).tobytes()


def test_fp8_experts_whose_axes_cannot_be_told(tmp_path):
  """(E, K, N) with a scale for each of N: it is the last axis, or, if both are as long, unknown."""
  codes = schemes.e4m3(rng(), (2, 32, 64))
  scale = rng().uniform(0.1, 1, (2, 64)).astype(np.float32)
  made = Generated("modelopt")
  made.tensors = {"m.experts.w": codes, "m.experts.w_weight_scale": scale}
  made.configs = {"hf_quant_config.json": schemes.modelopt_config("FP8_PER_CHANNEL_PER_TOKEN")}
  made.write(tmp_path / "a")
  out = np.asarray(checkpoint.load(tmp_path / "a", dtype="float32")["m.experts.w"])
  exact = codes.astype(np.float64) * scale[:, None].astype(np.float64)
  assert out.tobytes() == exact.astype(np.float32).tobytes()
  made.tensors["m.experts.w"] = schemes.e4m3(rng(), (2, 64, 64))
  made.write(tmp_path / "b")
  refused(tmp_path / "b", "'m.experts.w_weight_scale' must be", "found F32 of shape (2, 64)")


@pytest.mark.parametrize("of", ["tensor", "channel", "block"])
def test_fp8_as_mxfp8_where_its_scales_are_powers_of_two(of, tmp_path):
  made, numbers = Generated("compressed-tensors"), rng()
  made.add("a", schemes.fp8(of, powers=True), numbers)
  made.add("b", schemes.fp8(of), numbers)
  group = schemes.ct_group("fp8", ["Linear"], strategy=of, block=[4, 32] * (of == "block") or None)
  made.configs = {"config.json": {"quantization_config": schemes.ct_config([group], [])}}
  made.write(tmp_path)
  loaded = checkpoint.load(tmp_path, fp8="mxfp8", dtype="float32")
  weight = loaded["a.weight"]
  assert weight.mode == "mxfp8" and loaded.dequantized.keys() == {"b.weight"}
  np.testing.assert_array_equal(weight.dequantize(), made.wants["a.weight"].values)
  assert np.asarray(weight.packed).tobytes() == made.tensors["a.weight"].tobytes()
  checkpoint.save(tmp_path / "again", loaded, format="mlx")
  again = checkpoint.load(tmp_path / "again")["a.weight"]
  np.testing.assert_array_equal(again.scales, weight.scales)


@pytest.mark.parametrize("dtype", [E8M0, np.float32])
def test_powers_of_two_that_are_no_groups_of_32(dtype, tmp_path):
  """Blocks of 4 x 32 in e8m0, as DeepSeek's ue8m0: FP8, not mxfp8, and exact as either."""
  made = Generated("transformers")
  made.add("q", schemes.fp8("block", "weight_scale_inv", dtype, powers=True), rng())
  config = {"quant_method": "fp8", "weight_block_size": [4, 32], "scale_fmt": "ue8m0"}
  made.configs = {"config.json": {"quantization_config": config}}
  made.write(tmp_path)
  values = made.wants["q.weight"].values
  dense = checkpoint.load(tmp_path, dtype="float32")["q.weight"]
  np.testing.assert_array_equal(dense, values)
  weight = checkpoint.load(tmp_path, fp8="mxfp8")["q.weight"]
  np.testing.assert_array_equal(weight.dequantize("float32"), values)


def test_blocks_narrower_than_a_group_of_mxfp8(tmp_path):
  """Two scales in a group of 32 are no mxfp8, powers of two or not."""
  made = Generated("transformers")
  made.add("q", schemes.fp8("block", "weight_scale_inv", powers=True, block=(4, 16)), rng())
  config = {"quant_method": "fp8", "weight_block_size": [4, 16]}
  made.configs = {"config.json": {"quantization_config": config}}
  made.write(tmp_path)
  loaded = checkpoint.load(tmp_path, fp8="mxfp8", dtype="float32")
  assert loaded.dequantized == {"q.weight": "transformers fp8, a scale for each 4 x 16"}
  np.testing.assert_array_equal(loaded["q.weight"], made.wants["q.weight"].values)


def fp8_wrong(suffix, array):
  return {"q.weight": np.ones((8, 64), E4M3), "q.weight_scale": np.float32(1)} | {
    f"q.{suffix}": array
  }


@pytest.mark.parametrize(
  ("tensors", "words"),
  [
    (
      fp8_wrong("weight_scale", np.ones((3, 2), np.float32)),
      ("'q.weight_scale' must be", "(3, 2)"),
    ),
    (fp8_wrong("weight_scale", np.ones((), np.int8)), ("'q.weight_scale' must be F32", "found I8")),
    (fp8_wrong("weight_scale", np.float32(np.nan)), ("must be finite", "found nan")),
    (fp8_wrong("weight_scale", np.float32(-1)), ("must be finite", "found -1.0")),
    (fp8_wrong("weight", np.ones((8, 64), np.int8)), ("'q.weight' must be F8_E4M3", "found I8")),
    ({"q.weight_scale": np.float32(1)}, ("'q.weight' is missing", "FP8 needs it")),
    ({"q.weight": np.ones((8, 64), E4M3)}, ("'q.weight_scale' is missing", "FP8 needs it")),
    ({}, ("'q.weight' is missing", "no tensor of that layer")),
  ],
)
def test_fp8_layers_that_are_damaged(tensors, words, tmp_path):
  entries = {"up": schemes.modelopt_entry("NVFP4"), "q": {"quant_algo": "FP8"}}
  config = schemes.modelopt_config("MIXED_PRECISION", quantized_layers=entries)
  modelopt(tmp_path, {"up": NVFP4}, config, tensors)
  refused(tmp_path, *words)


def test_numbers_beyond_float16(tmp_path):
  extra = fp8_wrong("weight_scale", np.float32(2**10)) | {"q.weight": np.full((8, 64), 448, E4M3)}
  modelopt(tmp_path, {"up": NVFP4}, schemes.modelopt_config("NVFP4", ["q"]), extra)
  assert float(checkpoint.load(tmp_path)["q.weight"][0, 0]) == 448 * 2**10
  with pytest.raises(ValueError, match=r"^load: .*'q.weight' dequantizes.*beyond float16; .*\.$"):
    checkpoint.load(tmp_path, dtype="float16")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_layers_in_an_mlx_model(bits, tmp_path):
  entry = schemes.mlx_entry("affine", bits, 32)
  layers = {"up": schemes.mlx("nvfp4"), "gate": schemes.affine(bits, 32)}
  config = {"quantization": schemes.mlx_entry("nvfp4") | {"gate": entry}}
  made = one(tmp_path, "mlx", layers, config)
  refused(tmp_path, "'gate.biases' belongs to MLX's mode 'affine'", "affine='dequantize'")
  loaded = checkpoint.load(tmp_path, affine="dequantize", dtype="float32")
  assert loaded.dequantized == {"gate.weight": f"mlx affine, {bits} bits in groups of 32"}
  assert loaded.keys() == {"up.weight", "gate.weight"}
  out = np.asarray(loaded["gate.weight"])
  assert out.tobytes() == made.wants["gate.weight"].values.astype(np.float32).tobytes()


def test_affine_layers_that_are_damaged(tmp_path):
  layers = {"up": schemes.mlx("nvfp4"), "gate": schemes.affine(4, 32)}
  for i, (entry, words) in enumerate(
    [
      (schemes.mlx_entry("affine", 4, 64), ("'gate.scales' must be", "(8, 1)", "(8, 2)")),
      (schemes.mlx_entry("affine", 7, 32), ("bits in 'quantization' of layer 'gate'", "found 7")),
      ({"bits": 4, "group_size": "x"}, ("group_size in 'quantization' of layer 'gate'", "'x'")),
    ]
  ):
    config = {"quantization": schemes.mlx_entry("nvfp4") | {"gate": entry}}
    one(tmp_path / str(i), "mlx", layers, config)
    with pytest.raises(ValueError, match=r"^load: [^\n]*\.$") as caught:
      checkpoint.load(tmp_path / str(i), affine="dequantize")
    assert all(word in str(caught.value) for word in words), caught.value


def test_dequantized_numbers_are_rounded_once():
  """Not first to float32: 1 + 2**-8 is a tie in bfloat16, and a part far below decides it."""
  bfloat16, half = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
  tie, tiny = np.float64(1 + 2**-8), np.float64(2**-40)
  values = np.array([tie, tie + tiny, tie - tiny, -tie - tiny, -tie + tiny, 0.0, -0.0])
  up, one_ = 1 + 2**-7, 1.0
  wanted = np.array([one_, up, one_, -up, -one_, 0.0, -0.0])
  assert rounded(values, bfloat16).tobytes() == wanted.astype(bfloat16).tobytes()
  # What is lost in float64, too.
  lost = np.array([2.0**-60, -(2.0**-60), 0.0])
  assert rounded(np.full(3, tie), bfloat16, lost).astype(float).tolist() == [up, one_, one_]
  smallest = np.array([2.0**-25, 2.0**-25 * (1 + 2**-30), -(2.0**-160), 65520.0, 65519.99])
  assert rounded(smallest, half).tolist() == [0.0, 2.0**-24, -0.0, np.inf, 65504.0]
  many = np.random.default_rng(0).standard_normal(10_000) * np.exp2(np.arange(10_000) % 60 - 30)
  for dtype in (bfloat16, half):
    in_range = many[np.abs(many) < 6e4]
    assert rounded(in_range, dtype).tobytes() == nearest(in_range, dtype).tobytes()


@pytest.mark.parametrize(("name", "value"), [("fp8", "no"), ("affine", 3), ("experts", [])])
def test_choices_that_are_none(name, value, tmp_path):
  with pytest.raises(
    ValueError, match=rf"^load: {name} must be '.*, got {re.escape(repr(value))}\.$"
  ):
    checkpoint.load(tmp_path, **{name: value})


def test_a_model_that_fp8_layers_are_loaded_into(tmp_path):
  """load_into takes the choices of load: a kernel of numbers, or a packed one of mxfp8."""
  from flax import nnx

  made = compressed(
    tmp_path,
    {"layers.0": schemes.fp8("channel", powers=True)},
    [schemes.ct_group("fp8", ["Linear"], strategy="channel")],
  )

  def model():
    return nnx.eval_shape(
      lambda: nnx.Sequential(nnx.Linear(64, 8, use_bias=False, rngs=nnx.Rngs(0)))
    )

  values = made.wants["layers.0.weight"].values
  dense = checkpoint.load_into(model(), tmp_path).layers[0]
  np.testing.assert_array_equal(dense.kernel[...], values.T.astype(np.float32))
  packed = checkpoint.load_into(model(), tmp_path, fp8="mxfp8").layers[0]
  assert packed.is_packed
  np.testing.assert_array_equal(packed.weight.dequantize("float32"), values)
  with pytest.raises(ValueError, match=r"format of 'group_0'.*found 'float-quantized'"):
    checkpoint.load_into(model(), tmp_path, fp8="refuse")


# What mlx 0.32.4 made of arange(32) % 2**bits in groups of 32: the words, the scale and the bias.
MLX_WORDS = {
  3: ((0x77053977, 0x39770539, 0x5397705), -1.0, 7.0),
  5: ((0x75BE77DF, 0x3A56D7C6, 0x35CF8465, 0xC74254B6, 0x443214), -1.0, 31.0),
}


@pytest.mark.parametrize("bits", MLX_WORDS)
def test_bits_that_are_no_divisors_of_32_as_mlx_packs_them(bits, tmp_path):
  words, scale, bias = MLX_WORDS[bits]
  made = one(
    tmp_path,
    "mlx",
    {"up": schemes.mlx("nvfp4")},
    {"quantization": schemes.mlx_entry("nvfp4") | {"gate": {"bits": bits, "group_size": 32}}},
    extra={
      "gate.weight": np.array([words], np.uint32),
      "gate.scales": np.full((1, 1), scale, np.float32),
      "gate.biases": np.full((1, 1), bias, np.float32),
    },
  )
  assert made.format == "mlx"
  out = np.asarray(checkpoint.load(tmp_path, affine="dequantize")["gate.weight"], np.float32)
  assert out.tolist() == [[i % (1 << bits) for i in range(32)]]
