"""Generates with one decoder three times: weights in bfloat16, in mxfp8 and in nvfp4.

  pip install 'jaxqq[examples]'       # from a checkout: pip install '.[examples]'
  python examples/decode.py           # the shapes of Llama 3 8B: bfloat16 takes 16 GB of a GPU
  python examples/decode.py --nnx     # the same of layers of Flax, packed by quantize_model
  python examples/decode.py --weights-only --modes bf16 mxfp4 nvfp4     # x stays bfloat16
  python examples/decode.py --scan    # layers in stacks, under lax.scan: compiles in less time
  python examples/decode.py --tiny    # on a CPU

The decoder is in decoder.py, written by hand, and in decoder_nnx.py as a model of Flax NNX.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import decoder
import jax
import jax.numpy as jnp
import numpy as np
from decoder import MODES, UNQUANTIZED, Config

import jaxqq
from jaxqq.bench.decode_tables import tables as table
from jaxqq.bench.kept import make_header

try:
  from tqdm import tqdm
except ImportError:
  tqdm = None

Result = dict[str, Any]

CHOICES = (*MODES, "mxfp4")
WARM_UPS = 3  # prompts, before any is timed
INSTALL = "pip install 'jaxqq[examples]' (from a checkout: pip install '.[examples]')."


def compile_all(params: Any, cfg: Config, options: argparse.Namespace) -> list[tuple[Any, Any]]:
  """`prefill` and `decode` for each batch; XLA compiles them at the same time."""
  seq, steps = options.prompt, options.tokens
  with ThreadPoolExecutor() as pool:
    jobs = []
    for batch in options.batches:
      prompts = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
      cache = jax.eval_shape(functools.partial(decoder.empty_cache, cfg, batch, seq + steps))
      prefill = decoder.prefill.lower(params, cache, prompts, cfg)
      prefill_job = pool.submit(prefill.compile)
      cache, logits = prefill.out_info
      token = jax.eval_shape(decoder.greedy, logits)
      decode = decoder.decode.lower(params, cache, token, steps, cfg)
      jobs.append((prefill_job, pool.submit(decode.compile)))
    return [(prefill.result(), decode.result()) for prefill, decode in jobs]


def time_batch(
  params: Any,
  prompts: jax.Array,
  programs: tuple[Any, Any],
  cfg: Config,
  options: argparse.Namespace,
  bar: Any,
) -> tuple[Result, np.ndarray]:
  """Generates some times: medians, and the logits (batch, vocab) after the prompts.

  The first time is not counted, nor are prompts before it: XLA loads kernels, and then records
  CUDA graphs, which takes longer than to read a prompt.
  """
  batch, steps = prompts.shape[0], options.tokens
  run_prefill, run_decode = programs
  cache = decoder.empty_cache(cfg, batch, prompts.shape[1] + steps)
  bar.set_postfix_str(f"generating at batch {batch}")
  prefill_s, decode_s = [], []

  def emptied(cache: Any) -> Any:
    return jax.block_until_ready(cache | {"length": jnp.int32(0)})

  for _ in range(WARM_UPS):
    cache, logits = jax.block_until_ready(run_prefill(params, emptied(cache), prompts))
  for _ in range(1 + options.repeats):
    cache = emptied(cache)
    begin = time.perf_counter()
    cache, logits = jax.block_until_ready(run_prefill(params, cache, prompts))
    prefill_s.append(time.perf_counter() - begin)
    token = jax.block_until_ready(decoder.greedy(logits))
    begin = time.perf_counter()
    cache, tokens = jax.block_until_ready(run_decode(params, cache, token))
    decode_s.append(time.perf_counter() - begin)
    bar.update()
  step_s = statistics.median(decode_s[1:]) / steps
  return {
    "batch": batch,
    "prefill_ms": 1e3 * statistics.median(prefill_s[1:]),
    "step_ms": 1e3 * step_s,
    "step_ms_all": [1e3 * s / steps for s in decode_s[1:]],
    "tokens_per_s": batch / step_s,
    "weights_gb_per_s": 1e-9 * decoder.linear_bytes(params) / step_s,
    "first_tokens": np.asarray(tokens[0]).tolist(),
  }, np.asarray(logits)


def run(cfg: Config, options: argparse.Namespace) -> tuple[Result, np.ndarray]:
  """One model, made, timed and freed: its numbers, and its logits at the largest batch."""
  batches, sizes = options.batches, (max(options.batches), options.prompt)
  prompts = jax.random.randint(jax.random.key(options.seed + 1), sizes, 0, cfg.vocab, jnp.int32)
  total = cfg.layers + 1 + len(batches) * (1 + options.repeats)
  with tqdm(total=total, desc=f"{cfg.mode:<5}", disable=None) as bar:
    bar.set_postfix_str("making weights")
    params = options.make(cfg, options.seed, bar.update)
    bar.set_postfix_str("compiling")
    begin = time.perf_counter()
    programs = compile_all(params, cfg, options)
    compile_s = time.perf_counter() - begin
    bar.update()
    timed = [
      time_batch(params, prompts[:batch], of_batch, cfg, options, bar)
      for batch, of_batch in zip(batches, programs, strict=True)
    ]
  elements = cfg.layers * sum(n * k for n, k, _ in cfg.linears().values())
  result = {
    "name": cfg.mode + ("" if cfg.quantize_input else ", weights only") + options.suffix,
    "mode": cfg.mode,
    "bytes": decoder.num_bytes(params),
    "linear_bytes": decoder.linear_bytes(params),
    "bf16_linear_bytes": 2 * (elements + cfg.vocab * cfg.hidden),
    "compile_s": compile_s,
    "runs": [numbers for numbers, _ in timed],
  }
  for array in jax.tree.leaves(params):
    array.delete()
  return result, timed[batches.index(max(batches))][1]


def maker(nnx: bool, scan: bool) -> tuple[Callable[..., Any], str]:
  """What makes the model, and what tables add to its name."""
  if not nnx:
    return decoder.make_params, ", scan" if scan else ""
  try:
    from decoder_nnx import make_model
  except ImportError:
    sys.exit(f"decode --nnx needs flax: {INSTALL}")
  return make_model, ", NNX"


def compare(logits: np.ndarray, reference: np.ndarray | None) -> Result:
  """How far logits are from bf16's, and how often both choose the same token."""
  if reference is None:
    return {"logits_error": None, "same_tokens": None}
  same = logits.argmax(axis=-1) == reference.argmax(axis=-1)
  error = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
  return {"logits_error": float(error), "same_tokens": int(same.sum())}


def explain(cfg: Config, batch: int) -> str:
  """What computes a block's largest product."""
  if cfg.mode == UNQUANTIZED:
    return f"{cfg.mode}: XLA's own product"
  n, k, _ = cfg.linears()["gate_up"]
  w = jax.eval_shape(lambda w: decoder.pack(w, cfg.mode), jax.ShapeDtypeStruct((n, k), cfg.dtype))
  x = jax.ShapeDtypeStruct((batch, k), cfg.dtype)
  if cfg.quantize_input:
    return jaxqq.explain(x, mode=cfg.mode, **w)
  packed = w["w"], w["scales"]
  scale = w.get("global_scale_w")
  return jaxqq.explain(jaxqq.quantized_matmul, x, *packed, mode=cfg.mode, global_scale=scale)


def together(contents: Sequence[Result]) -> Result:
  """The models of several files of results."""
  for name in ("device", "jax", "model", "tokens", "prompt", "seed"):
    values = [content["header"][name] for content in contents]
    if any(value != values[0] for value in values):
      sys.exit(f"decode --show: results to compare must have the same {name}, got {values}.")
  return contents[0] | {"models": [model for content in contents for model in content["models"]]}


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
  )
  add = parser.add_argument
  add("--tiny", action="store_true", help="a small model, for a CPU")
  add("--nnx", action="store_true", help="the decoder as a model of Flax NNX")
  add("--scan", action="store_true", help="layers in stacks, under lax.scan (not with --nnx)")
  add("--layers", type=int, help="that many, instead of the shape's")
  add("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences at once")
  add("--modes", nargs="+", default=list(MODES), choices=CHOICES, help="which models")
  weights_only = "multiply x as it is by packed weights (not of bf16)"
  add("--weights-only", action="store_true", help=weights_only)
  add("--tokens", type=int, default=64, help="tokens to generate in each sequence")
  add("--prompt", type=int, default=128, help="tokens in each prompt")
  add("--repeats", type=int, default=5, help="timed runs, of which the median counts")
  add("--seed", type=int, default=0, help="of weights and prompts")
  add("--json", type=pathlib.Path, help="file for the results")
  show = "print the tables of such files together, no more"
  add("--show", type=pathlib.Path, nargs="+", default=[], metavar="JSON", help=show)
  given = parser.parse_args(argv)
  for name in ("layers", "batches", "tokens", "prompt", "repeats"):
    value = getattr(given, name)
    if value is not None and np.min(value) < 1:
      parser.error(f"--{name} must be positive, got {np.min(value)}.")
  if given.seed < 0:
    parser.error(f"--seed must not be negative, got {given.seed}.")
  if given.json and not given.json.absolute().parent.is_dir():
    parser.error(f"--json must be in a directory that exists, got {str(given.json)!r}.")
  for path in given.show:
    if not path.is_file():
      parser.error(f"--show must be a file that --json wrote, got {str(path)!r}.")
  cfg = decoder.TINY if given.tiny else Config()
  if given.scan and given.nnx:
    parser.error("--scan must be without --nnx, whose layers are modules of their own.")
  given.cfg = dataclasses.replace(cfg, layers=given.layers or cfg.layers, scan=given.scan)
  given.modes = [mode for mode in CHOICES if mode in given.modes]  # bf16, the reference, is first
  given.batches = list(dict.fromkeys(given.batches))
  return given


def main(argv: Sequence[str] | None = None) -> Result:
  """Times the models, prints how they compare, and returns the numbers."""
  options = parse_options(argv)
  if options.show:
    content = together([json.loads(path.read_text()) for path in options.show])
    print(table(content["models"]))
    return content
  if tqdm is None:
    sys.exit(f"decode needs tqdm: {INSTALL}")
  options.make, options.suffix = maker(options.nnx, options.cfg.scan)
  settings = {name: getattr(options, name) for name in ("tokens", "prompt", "repeats", "seed")}
  sizes = dataclasses.asdict(options.cfg)
  for name in ("mode", "quantize_input", "scan"):
    del sizes[name]
  header = make_header("wall clock, until results are ready", model=sizes, **settings)
  print(" ".join(f"{name}={value}" for name, value in header.items()), flush=True)
  content, reference = {"header": header, "models": []}, None
  for mode in options.modes:
    quantize_input = mode == UNQUANTIZED or not options.weights_only
    cfg = dataclasses.replace(options.cfg, mode=mode, quantize_input=quantize_input)
    print(explain(cfg, min(options.batches)), flush=True)
    result, logits = run(cfg, options)
    reference = logits if mode == UNQUANTIZED else reference
    content["models"].append(result | compare(logits, reference))
    if options.json:  # after every model, so that a run cut short leaves what it has
      options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
  print(table(content["models"]))
  return content


if __name__ == "__main__":
  main()
