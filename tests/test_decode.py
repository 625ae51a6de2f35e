"""examples/decode.py: decoders on packed weights, against one in numpy and float64."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxqq.nn import QQLinear
from tests.support import oracle
from tests.support.kernels import on_gpu
from tests.support.processes import run_example_without

ROOT = pathlib.Path(__file__).parent.parent
PATH = ROOT / "examples" / "decode.py"
MODES = ("bf16", "mxfp8", "nvfp4")
PACKED = MODES[1:]
BATCH, PROMPT, STEPS = 2, 7, 5


def load(name):
  """An example, which finds those beside it."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(PATH.parent))
    return importlib.import_module(name)


decoder, example, decoder_nnx = map(load, ("decoder", "decode", "decoder_nnx"))


@pytest.fixture(autouse=True)
def standard_promotion():
  """`jax.nn.dot_product_attention` counts on it."""
  with jax.numpy_dtype_promotion("standard"):
    yield


# ---- the decoder in float64, without a cache


def rms_norm(x, gain):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain


def rotate(x, theta):
  """A pair of numbers is a complex number, which position p turns by p times its frequency."""
  half = x.shape[-1] // 2
  turns = np.outer(np.arange(x.shape[1]), theta ** -np.linspace(0, 1, half, endpoint=False))
  z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turns)[:, None]
  return np.concatenate([z.real, z.imag], axis=-1)


def attend(q, k, v):
  """One sequence, one head and one query at a time; head h of q reads head h // group of k, v."""
  out = np.zeros_like(q)
  group = q.shape[2] // k.shape[2]
  for b, s, h in np.ndindex(q.shape[:3]):
    keys, values = k[b, : s + 1, h // group], v[b, : s + 1, h // group]
    scores = keys @ q[b, s, h] / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max())
    out[b, s, h] = weights @ values / weights.sum()
  return out.reshape(*q.shape[:2], -1)


def exact_logits(params, tokens, cfg):
  """params as mode "bf16" has them; quantized here, by the oracle, for the other modes."""
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

  def linear(x, layer):
    w = layer["w"]
    if cfg.mode in PACKED:
      amax = {"w": np.abs(w).max(), "x": 64.0} if cfg.mode == "nvfp4" else {"w": None, "x": None}
      x, w = (oracle.round_trip(a, cfg.mode, amax[name]) for name, a in (("x", x), ("w", w)))
    return x @ w.T

  x = params["embed"][tokens]
  for layer in params["layers"]:
    qkv = linear(rms_norm(x, layer["attention_norm"]), layer["qkv"])
    qkv = qkv.reshape(*tokens.shape, -1, cfg.head_size)
    q, k, v = np.split(qkv, [cfg.heads, cfg.heads + cfg.kv_heads], axis=2)
    attended = attend(rotate(q, cfg.rope_theta), rotate(k, cfg.rope_theta), v)
    x = x + linear(attended, layer["out"])
    gate_up = linear(rms_norm(x, layer["ffn_norm"]), layer["gate_up"])
    gate, up = gate_up[..., : cfg.ffn], gate_up[..., cfg.ffn :]
    x = x + linear(gate / (1 + np.exp(-gate)) * up, layer["down"])
  return linear(rms_norm(x, params["norm"]), params["head"])


# ---- the decoder under test

# ||error|| / ||exact|| of logits from float32 activations. Unquantized, only rounding is left.
# Where activations are quantized, rounding may tip a few to their other neighbour; the widest gap,
# e2m1's from 4 to 6, in one of 64 activations of like size moves a product by 2 / 6 / sqrt(64).
TOLERANCE = {"bf16": 1e-5, "mxfp8": 0.02, "nvfp4": 0.04}


def config(mode):
  return dataclasses.replace(decoder.TINY, dtype="float32", mode=mode)


@functools.cache
def make_params(cfg):
  """The example's, with gains that are not all one."""
  rng = np.random.default_rng(4)

  def gain(path, a):
    is_norm = "norm" in jax.tree_util.keystr(path)
    return jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype) if is_norm else a

  return jax.tree_util.tree_map_with_path(gain, decoder.make_params(cfg, seed=3))


def random_tokens(cfg, length):
  return np.random.default_rng(5).integers(cfg.vocab, size=(BATCH, length)).astype(np.int32)


def prefill(params, tokens, length, cfg):
  """Into a cache of its own."""
  return decoder.prefill(params, decoder.empty_cache(cfg, len(tokens), length), tokens, cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def append(params, cache, tokens, cfg):
  cache, x = decoder.forward(params, cache, tokens, cfg)
  return cache, decoder.logits_of(params, x, cfg)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("mode", MODES)
def test_with_a_cache_as_in_float64_without(mode):
  """The prompt at once, then token by token, in a cache with room to spare."""
  cfg = config(mode)
  params, tokens = make_params(cfg), random_tokens(cfg, PROMPT + STEPS)
  exact = exact_logits(make_params(config("bf16")), tokens, cfg)
  cache = decoder.empty_cache(cfg, BATCH, PROMPT + STEPS + 3)
  ends = [0, *range(PROMPT, PROMPT + STEPS + 1)]
  for start, stop in itertools.pairwise(ends):
    cache, logits = append(params, cache, tokens[:, start:stop], cfg)
    assert cache["length"] == stop
    for i in range(start, stop):
      error = oracle.relative_error(logits[:, i - start], exact[:, i])
      assert error < TOLERANCE[mode], f"position {i}"


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("mode", ["bf16", "nvfp4"])
def test_generates_the_tokens_with_the_largest_logits(mode):
  """Every token that `prefill` and `decode` choose, by the float64 logits of the whole text."""
  cfg = config(mode)
  params, text = make_params(cfg), random_tokens(cfg, PROMPT)
  cache, logits = prefill(params, text, PROMPT + STEPS, cfg)
  token = decoder.greedy(logits)
  after, tokens = decoder.decode(params, cache, token, STEPS, cfg)
  assert after["length"] == PROMPT + STEPS and tokens.shape == (BATCH, STEPS)
  text = np.concatenate([text, token[:, None], tokens], axis=1)
  exact = exact_logits(make_params(config("bf16")), text[:, :-1], cfg)[:, PROMPT - 1 :]
  chosen = np.take_along_axis(exact, text[:, PROMPT:, None], axis=-1)[..., 0]
  # Two logits, each off by the tolerance times their root mean square, 5 sigma out.
  slack = 10 * TOLERANCE[mode] * np.sqrt(np.mean(exact**2))
  assert (exact.max(axis=-1) - chosen <= slack).all()
  assert np.unique(text[:, PROMPT:]).size > STEPS  # not one token over and over


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("mode", "quantize_input"), [*((mode, True) for mode in MODES), ("nvfp4", False)]
)
def test_the_model_of_flax_is_the_same(mode, quantize_input):
  """Logits to the bit, tokens, and bytes; a block is packed before the next one is made.

  Packed ones run one layer at the sizes of SMALL, which are those of `test_main`'s programs.
  """
  cfg = dataclasses.replace(decoder.TINY, mode=mode, quantize_input=quantize_input)
  kinds = []
  models = decoder.make_params(cfg, 3), decoder_nnx.make_model(cfg, 3, lambda: kinds.append(mode))
  assert len(kinds) == cfg.layers
  for size in (decoder.num_bytes, decoder.linear_bytes):
    assert size(models[0]) == size(models[1])
  linears = [layer for _, layer in nnx.iter_graph(models[1]) if hasattr(layer, "in_features")]
  assert len(linears) == 4 * cfg.layers + 1
  assert all(type(layer) is (QQLinear if mode in PACKED else nnx.Linear) for layer in linears)
  if mode in PACKED:
    cfg = dataclasses.replace(cfg, layers=1)
    models = decoder.make_params(cfg, 3), decoder_nnx.make_model(cfg, 3)
  results = []
  for model in models:
    cache, logits = prefill(model, random_tokens(cfg, 4), 4 + 3, cfg)
    _, tokens = decoder.decode(model, cache, decoder.greedy(logits), 3, cfg)
    results.append((logits, tokens))
  for by_hand, of_flax in zip(*results, strict=True):
    np.testing.assert_array_equal(by_hand, of_flax)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
  ("mode", "quantize_input"), [*((mode, True) for mode in MODES), ("mxfp4", False)]
)
def test_layers_in_stacks_are_the_same(mode, quantize_input):
  """Tokens, bytes, and logits but for the order of sums."""
  own = dataclasses.replace(config(mode), quantize_input=quantize_input)
  results = []
  for cfg in (own, dataclasses.replace(own, scan=True)):
    params = decoder.make_params(cfg, 3)
    cache, logits = prefill(params, random_tokens(cfg, PROMPT), PROMPT + STEPS, cfg)
    _, tokens = decoder.decode(params, cache, decoder.greedy(logits), STEPS, cfg)
    results.append((logits, tokens, decoder.linear_bytes(params)))
  (logits, tokens, size), (of_stack, tokens_of_stack, size_of_stack) = results
  assert oracle.relative_error(of_stack, logits) < (1e-5 if mode == "bf16" else TOLERANCE["mxfp8"])
  np.testing.assert_array_equal(tokens_of_stack, tokens)
  scales_of_x = 4 * 4 * own.layers if mode == "nvfp4" else 0  # float32, beside each linear layer
  assert size_of_stack == size - scales_of_x


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels need JAX 0.11")
@pytest.mark.parametrize("mode", PACKED)
def test_no_layer_of_a_stack_is_copied(mode):
  """On a GPU: a kernel reads one of the packed matrices where they are.

  Matrices are of two shapes only, so that they share kernels.
  """
  sizes = {"layers": 3, "vocab": 128, "kv_heads": 16, "ffn": 4096}
  cfg = dataclasses.replace(decoder.Config(), **sizes, mode=mode, scan=True)
  params = jax.eval_shape(lambda: decoder.make_params(cfg, 3))
  cache = jax.eval_shape(lambda: decoder.empty_cache(cfg, BATCH, 8))
  token = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
  traced = decoder.decode.trace(params, cache, token, STEPS, cfg)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "jaxqq_skinny_gemm" in text
  for name, (n, *_) in cfg.linears().items():
    words = params["layers"][name].packed.shape[-1]
    assert f"tensor<3x{n}x{words}xui32>" in text
    for one in (f"tensor<1x{n}x{words}xui32>", f"tensor<{n}x{words}xui32>"):
      assert one not in text


def test_a_cache_is_used_again_in_place():
  """What other prompts have left there is not seen."""
  cfg = config("bf16")
  params, text = make_params(cfg), random_tokens(cfg, PROMPT)
  empty = decoder.empty_cache(cfg, BATCH, PROMPT + STEPS)
  cache, logits = decoder.prefill(params, empty, text, cfg)
  used, tokens = decoder.decode(params, cache, decoder.greedy(logits), STEPS, cfg)
  assert all(a.is_deleted() for a in jax.tree.leaves((empty, cache)))
  used, _ = decoder.prefill(params, used | {"length": jnp.int32(0)}, text[::-1] ^ 1, cfg)
  cache, again = decoder.prefill(params, used | {"length": jnp.int32(0)}, text, cfg)
  np.testing.assert_array_equal(again, logits)
  _, tokens_again = decoder.decode(params, cache, decoder.greedy(again), STEPS, cfg)
  np.testing.assert_array_equal(tokens_again, tokens)


class TestOnGpu:
  pytestmark = on_gpu

  @pytest.mark.parametrize("heads", [(4, 2), (32, 8)])
  def test_attention_by_cudnn(self, heads):
    """A prompt's, and the next token's; what is behind in the cache is not seen."""
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((BATCH, 12, n, 64)) for n in (heads[0], *2 * heads[1:]))
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in (q, k, v))
    exact = attend(*(np.asarray(a, np.float64) for a in (q, k, v)))
    for start, stop in ((0, 7), (7, 8), (8, 12)):
      positions = jnp.arange(start, stop, dtype=jnp.int32)
      out = jax.jit(decoder.attend)(q[:, start:stop], k, v, positions)
      assert oracle.relative_error(out, exact[:, start:stop]) < 0.01


# ---- weights


@pytest.mark.parametrize("mode", PACKED)
def test_weights_are_packed_as_the_format_says(mode):
  """The bits of the oracle, from the weights that mode "bf16" has, and no byte more."""
  cfg, m = config(mode), oracle.MODES[mode]
  plain = decoder.make_params(config("bf16"), seed=3)
  params = decoder.make_params(cfg, seed=3)
  pairs = [(params["head"], plain["head"])]
  for layer, plain_layer in zip(params["layers"], plain["layers"], strict=True):
    pairs += [(layer[name], plain_layer[name]) for name in ("qkv", "out", "gate_up", "down")]
  total = 0
  for packed, w in pairs:
    w = np.asarray(w["w"])
    scale = float(np.abs(w).max()) if mode == "nvfp4" else None
    words, scales = oracle.quantize(w, mode, scale)
    np.testing.assert_array_equal(packed["w"], words)
    np.testing.assert_array_equal(packed["scales"], scales)
    global_scales = {"global_scale_w": scale, "global_scale_x": 64.0} if scale else {}
    assert {name: packed[name] for name in packed if "global" in name} == global_scales
    size = w.size * m.bits // 8 + w.size // m.group + 4 * len(global_scales)
    assert decoder.num_bytes(packed) == size
    total += size
  assert decoder.linear_bytes(params) == total
  others = (2 * cfg.layers + 1 + cfg.vocab) * cfg.hidden * 4  # gains and embedding, float32
  assert decoder.num_bytes(params) == total + others


def test_weights_differ_and_have_their_scale():
  cfg = config("bf16")
  layers = decoder.make_params(cfg, seed=0)["layers"]
  for name, (n, k, std) in cfg.linears().items():
    first, second = (np.asarray(layer[name]["w"]) for layer in layers)
    assert first.shape == (n, k) and np.std(first) == pytest.approx(std, rel=0.05)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    assert np.unique(first, axis=0).shape == (n, k)


def test_the_default_is_llama_3_8b():
  cfg = decoder.Config()
  linears = cfg.layers * sum(n * k for n, k, _ in cfg.linears().values())
  gains = (2 * cfg.layers + 1) * cfg.hidden
  assert linears + gains + 2 * cfg.vocab * cfg.hidden == 8_030_261_248


# ---- the command


SMALL = ["--tiny", "--layers", "1", "--tokens", "3", "--prompt", "4", "--repeats", "2"]


def cells_of(text):
  """Those of each row of the tables in Markdown."""
  lines = [line for line in text.splitlines() if line.startswith("| ")]
  return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def rows_of(printed):
  """The first two cells of each row that was printed, and whether a dash stands in it."""
  return [(row[0], row[1], "-" in row) for row in cells_of(printed)]


@pytest.mark.usefixtures("quick_compiles")
def test_main(tmp_path, capsys):
  """All models: the tables, and the same ones from the JSON that is kept."""
  path = tmp_path / "decode.json"
  flags = ["--modes", "nvfp4", "bf16", "mxfp8", "--batches", "2", "--json", str(path)]
  content = example.main([*SMALL, *flags])
  printed = capsys.readouterr().out
  assert json.loads(path.read_text()) == content
  base, mxfp8, nvfp4 = content["models"]
  assert [model["mode"] for model in content["models"]] == list(MODES)
  assert base["linear_bytes"] == base["bf16_linear_bytes"]
  assert mxfp8["linear_bytes"] / base["linear_bytes"] == 8.25 / 16
  global_scales = 5 * 8  # two float32 for each of four linear layers and the head
  assert (nvfp4["linear_bytes"] - global_scales) / base["linear_bytes"] == 4.5 / 16
  assert base["logits_error"] == 0 and base["same_tokens"] == 2
  assert 0.01 < mxfp8["logits_error"] < nvfp4["logits_error"] < 0.5
  for model in content["models"]:
    (run,) = model["runs"]
    assert model["compile_s"] > 0
    assert len(run["step_ms_all"]) == 2 and len(run["first_tokens"]) == 3
    assert run["tokens_per_s"] == pytest.approx(1e3 * 2 / run["step_ms"])
  first, second = rows_of(printed)[:4], rows_of(printed)[4:]
  assert [row[:2] for row in first] == [("model", "batch"), *((mode, "2") for mode in MODES)]
  assert [row[0] for row in second] == ["model", *MODES]

  assert example.main(["--show", str(path)]) == content
  assert printed.endswith(capsys.readouterr().out)

  nnx_path = tmp_path / "nnx.json"
  flags = ["--nnx", "--modes", "mxfp8", "--batches", "2", "--json", str(nnx_path)]
  (model,) = example.main([*SMALL, *flags])["models"]
  assert model["runs"][0]["first_tokens"] == mxfp8["runs"][0]["first_tokens"]
  capsys.readouterr()
  both = example.main(["--show", str(path), str(nnx_path)])["models"]
  assert both == [base, mxfp8, nvfp4, model]
  names = [row[0] for row in rows_of(capsys.readouterr().out)]
  assert names == 2 * ["model", *MODES, "mxfp8, NNX"]
  other = {"header": content["header"] | {"tokens": 4}, "models": [model]}
  nnx_path.write_text(json.dumps(other))
  with pytest.raises(SystemExit, match="tokens"):
    example.main(["--show", str(path), str(nnx_path)])


@pytest.mark.usefixtures("quick_compiles")
def test_main_with_weights_only(capsys):
  """Nearer to bfloat16 than with x quantized too, by as many bytes."""
  flags = [*SMALL, "--modes", "bf16", "nvfp4", "mxfp4", "--batches", "2"]
  _, *alone = example.main([*flags, "--weights-only"])["models"]
  printed = capsys.readouterr().out
  assert "quantized_matmul nvfp4, x bfloat16" in printed and "qqmm" not in printed
  _, *both = example.main(flags)["models"]
  for model, other in zip(alone, both, strict=True):
    assert model["name"] == f"{other['name']}, weights only"
    assert model["linear_bytes"] == other["linear_bytes"]
    assert 0.01 < model["logits_error"] < 0.9 * other["logits_error"]


@pytest.mark.usefixtures("quick_compiles")
def test_main_with_layers_in_stacks(capsys):
  flags = [*SMALL, "--modes", "mxfp8", "--batches", "2"]
  (one_by_one,), (in_stacks,) = (
    example.main([*flags, *more])["models"] for more in ([], ["--scan"])
  )
  assert ("mxfp8, scan", "2") in [row[:2] for row in rows_of(capsys.readouterr().out)]
  assert in_stacks["runs"][0]["first_tokens"] == one_by_one["runs"][0]["first_tokens"]


@pytest.mark.usefixtures("quick_compiles")
def test_main_at_some_batches(capsys):
  content = example.main([*SMALL, "--modes", "bf16", "--batches", "2", "1", "2"])
  (model,) = content["models"]
  assert [run["batch"] for run in model["runs"]] == [2, 1]
  assert model["same_tokens"] == 2
  assert [row[:2] for row in rows_of(capsys.readouterr().out)[1:3]] == [
    ("bf16", "2"),
    ("bf16", "1"),
  ]


def test_tables_without_the_model_to_compare_with():
  run = {"batch": 8, "tokens_per_s": 4e3, "step_ms": 2.0, "weights_gb_per_s": 2.5, "prefill_ms": 1}
  sizes = {"bytes": 12, "linear_bytes": 33, "bf16_linear_bytes": 64, "runs": [run]}
  sizes |= {"name": "mxfp8", "mode": "mxfp8"}
  logits = np.ones((8, 4))
  for reference, dash in ((None, True), (logits, False)):
    model = sizes | example.compare(logits, reference)
    text = example.table([model])
    assert rows_of(text)[1::2] == [("mxfp8", "8", True), ("mxfp8", "12 bytes", dash)]
    assert "51.6%" in text and ("8 of 8" in text) != dash


@pytest.mark.parametrize(("mode", "words"), [("bf16", "XLA"), ("nvfp4", "w uint32 (28672, 512)")])
def test_says_what_computes_the_products(mode, words):
  assert words in example.explain(dataclasses.replace(decoder.Config(), mode=mode), batch=1)


@pytest.mark.parametrize(
  "flags",
  [
    *(["--layers", "0"], ["--batches", "8", "0"], ["--tokens", "0"], ["--prompt", "-1"]),
    *(["--repeats", "0"], ["--seed", "-1"], ["--json", "/no/such/x.json"], ["--show", "/no.json"]),
    ["--scan", "--nnx"],
  ],
)
def test_refuses_what_cannot_be(flags, capsys):
  with pytest.raises(SystemExit):
    example.main(flags)
  assert f"{flags[0]} must" in capsys.readouterr().err


def test_names_the_extra_that_is_missing(tmp_path):
  done = run_example_without("tqdm", "decode", tmp_path, "--tiny")
  assert done.returncode == 1 and "tqdm" in done.stderr and "jaxqq[examples]" in done.stderr
