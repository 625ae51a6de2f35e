"""Trains a language model of 100 million parameters by recipes, and by parts of one.

  pip install 'jaxqq[examples]'    # from a checkout: pip install '.[examples]'
  python examples/pretrain.py --out runs      # on a GPU; the same command goes on where it ended

The model is that of `train_lm.py`, over bytes. The text is what every Python brings: the sources
and the documentation of its library and of the packages that are installed, each paragraph once.
Every model has the same weights to begin with and the same batches. What is measured is in
`results.json` after every save, and the state of the model under way beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import train_lm
from train_lm import NVFP4_BUT_ENDS, UNQUANTIZED, WITHOUT_PARTS, flag

RECIPES = ("mxfp8", "nvfp4", "nvfp4-4over6", NVFP4_BUT_ENDS, *WITHOUT_PARTS)
SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
HELD_OUT = 50  # one file of so many
LEAST_PARAGRAPH = 64  # bytes: a shorter one may come again
MOST_HELD_OUT = 1 << 20  # bytes, of which the validation loss is taken


@dataclasses.dataclass(frozen=True)
class Config(train_lm.Training):
  layers: int = flag(8, "transformer blocks")
  d_model: int = flag(1024, "width, a multiple of 32")
  heads: int = flag(16, "attention heads")
  seq: int = flag(512, "bytes that a window predicts")
  batch: int = flag(64, "windows a step")
  steps: int = flag(3200, "optimizer steps")
  lr: float = flag(6e-4, "peak learning rate")
  attention: str = flag("cudnn", "how it is computed, xla elsewhere", choices=train_lm.ATTENTIONS)
  modes: tuple[str, ...] = flag(
    (UNQUANTIZED,), "models without a recipe", nargs="*", choices=train_lm.MODES
  )
  recipe: tuple[str, ...] = flag(RECIPES, "then those by a recipe", nargs="*", choices=RECIPES)
  text: str = flag("", "a folder of text, '' for Python's own")
  most_bytes: int = flag(150_000_000, "of text, at most")
  out: str = flag("pretrain", "folder for results and what a later run needs")
  save_seconds: float = flag(120.0, "of training between two saves")
  seconds: float = flag(1e9, "after which no step is begun")
  plot: str = flag("", "file for the loss curves of models that are done, '' for none")

  def mistake(self) -> str | None:
    for name in ("most_bytes", "save_seconds", "seconds"):
      if not getattr(self, name) > 0:
        return f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}."
    if self.text and not pathlib.Path(self.text).is_dir():
      return f"--text must be a folder that exists, got {self.text!r}."
    return super().mistake()


# ---- text


def files_of(folders: Sequence[pathlib.Path]) -> Iterator[pathlib.Path]:
  """In an order that does not depend on the file system."""
  for folder in folders:
    yield from sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)


def read_corpus(cfg: Config) -> tuple[np.ndarray, np.ndarray]:
  """Bytes to train on, and those of files that are held out; no long paragraph is there twice."""
  names = ("stdlib", "purelib", "platlib")
  own = dict.fromkeys(pathlib.Path(sysconfig.get_path(name)) for name in names)
  folders = [pathlib.Path(cfg.text)] if cfg.text else list(own)
  seen: set[bytes] = set()
  parts: dict[bool, list[bytes]] = {False: [], True: []}
  size = 0
  for path in files_of(folders):
    try:
      text = path.read_bytes()
      text.decode()
    except (OSError, UnicodeDecodeError):
      continue
    kept = []
    for paragraph in text.split(b"\n\n"):
      digest = hashlib.blake2b(paragraph.strip(), digest_size=16).digest()
      if len(paragraph) < LEAST_PARAGRAPH or digest not in seen:
        kept.append(paragraph)
      seen.add(digest)
    new = b"\n\n".join(kept)
    if len(new) < LEAST_PARAGRAPH:
      continue
    name = hashlib.blake2b(path.name.encode(), digest_size=4).digest()
    parts[int.from_bytes(name, "big") % HELD_OUT == 0].append(new)
    size += len(new)
    if size >= cfg.most_bytes:
      break
  train, held_out = (
    np.frombuffer(b"\n\n".join(parts[is_out]), np.uint8) for is_out in (False, True)
  )
  if len(held_out) <= cfg.seq:  # of a few files none may be held out
    train, held_out = np.split(train, [len(train) * 9 // 10])
  if len(held_out) <= cfg.seq:
    sys.exit(f"The text has {len(held_out)} bytes to hold out; --seq must be less, got {cfg.seq}.")
  return train, held_out[:MOST_HELD_OUT]


# ---- what is kept


def replace(path: pathlib.Path, content: bytes) -> None:
  """In one step: a run that is cut off leaves the old file or the new one."""
  part = path.with_name(path.name + ".part")
  part.write_bytes(content)
  os.replace(part, path)


def save(path: pathlib.Path, tree: Any, step: int) -> None:
  part = path.with_name("part.npz")
  leaves = {f"leaf{i}": np.asarray(a) for i, a in enumerate(jax.tree.leaves(tree))}
  np.savez(part, step=step, **leaves)
  os.replace(part, path)


def load(path: pathlib.Path, tree: Any) -> tuple[Any, int]:
  """What `save` has written, in the structure of a tree like it."""
  with np.load(path) as kept:
    leaves, structure = jax.tree.flatten(tree)
    found = [jax.device_put(kept[f"leaf{i}"]) for i in range(len(leaves))]
    return jax.tree.unflatten(structure, found), int(kept["step"])


# ---- training


def train(
  cfg: Config,
  mode: str,
  windows: np.ndarray,
  evaluate: Callable[[train_lm.Params], float],
  result: dict[str, Any],
  keep: Callable[[], None],
  deadline: float,
) -> bool:
  """Goes on with a model until the deadline (`time.monotonic`); whether it is done.

  What is measured goes into `result`, and `keep` writes it.
  """
  state_file = pathlib.Path(cfg.out) / f"state-{mode.replace(' ', '-')}.npz"
  optimizer = train_lm.make_optimizer(cfg)
  params, state, _ = train_lm.make_state(cfg, optimizer)
  first = 0
  if state_file.exists():
    (params, state), first = load(state_file, (params, state))
  for name in ("losses", "ms"):
    result[name] = result.get(name, [])[:first]
  points = result.get("val_losses", {})
  result["val_losses"] = {step: loss for step, loss in points.items() if int(step) <= first}
  step = train_lm.make_step(cfg, mode, optimizer)
  order = np.random.default_rng(cfg.seed).integers(len(windows), size=(cfg.steps, cfg.batch))
  saved = time.monotonic()
  for i in range(first, cfg.steps):
    begin = time.monotonic()
    params, state, loss = step(params, state, windows[order[i]])
    result["losses"].append(round(float(loss), 5))
    result["ms"].append(round(1e3 * (time.monotonic() - begin), 1))
    is_last = i + 1 == cfg.steps
    if is_last or (i + 1) % -(-cfg.steps // train_lm.NUM_EVALS) == 0:
      result["val_losses"][str(i + 1)] = evaluate(params)
    now = time.monotonic()
    is_over = now >= deadline
    if is_last or is_over or now - saved > cfg.save_seconds:
      if not is_last:
        save(state_file, (params, state), i + 1)
      result["done"] = is_last
      keep()
      saved = time.monotonic()
      print(f"{mode}: step {i + 1} of {cfg.steps}, loss {result['losses'][-1]:.4f}", flush=True)
    if is_last:
      state_file.unlink(missing_ok=True)
    elif is_over:
      return False
  return True


def table(results: dict[str, dict[str, Any]]) -> str:
  """The validation losses of the first model, and how far above them those of the others are.

  Of a model that is not done, the losses so far.
  """
  models = {mode: result["val_losses"] for mode, result in results.items() if result}
  first, *others = models
  base = models[first]
  steps = sorted({step for losses in models.values() for step in losses}, key=int)
  rows = [["model", *(f"{int(step):,} steps" for step in steps)], ["---"] * (1 + len(steps))]
  rows.append([train_lm.name_of(first), *(f"{base[s]:.4f}" if s in base else "" for s in steps)])
  for mode in others:
    own = models[mode]
    gaps = {s: f"{100 * (own[s] / base[s] - 1):+.2f}%" for s in steps if s in own and s in base}
    rows.append([train_lm.name_of(mode), *(gaps.get(step, "") for step in steps)])
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(results: dict[str, dict[str, Any]], path: str) -> str:
  """Draws what `train_lm.plot` does, of the models that are done."""
  done = {
    mode: result | {"val_losses": {int(step): loss for step, loss in result["val_losses"].items()}}
    for mode, result in results.items()
    if result.get("done")
  }
  return train_lm.plot(done, path) if done else "No plot: no model is done."


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Trains what is not done yet, and returns the results by mode."""
  if train_lm.optax is None:
    sys.exit(f"pretrain needs optax and tqdm: {train_lm.INSTALL}")
  begin = time.monotonic()
  cfg = train_lm.parse_config(argv, Config, __doc__)
  out = pathlib.Path(cfg.out)
  out.mkdir(parents=True, exist_ok=True)
  texts = read_corpus(cfg)
  train_windows, val_windows = (
    np.lib.stride_tricks.sliding_window_view(text, cfg.seq + 1) for text in texts
  )
  same = {
    name: getattr(cfg, name)
    for name in ("layers", "d_model", "heads", "seq", "batch", "steps", "lr", "seed", "dtype")
  }
  header = {
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "bytes": [len(text) for text in texts],
    "text": hashlib.blake2b(texts[0].tobytes(), digest_size=8).hexdigest(),
    "settings": same,
  }
  kept = out / "results.json"
  content = {"header": header, "models": {}}
  if kept.exists():
    content = json.loads(kept.read_text())
    if content["header"]["settings"] != same or content["header"]["text"] != header["text"]:
      sys.exit(f"{kept} is of another text or of other settings; give another --out.")

  def keep() -> None:
    replace(kept, json.dumps(content).encode())

  print(f"{header}", flush=True)
  models = content["models"]
  for mode in cfg.modes:
    result = models.setdefault(mode, {})
    if result.get("done"):
      continue
    evaluate = train_lm.make_evaluate(cfg, mode, val_windows)
    if not train(cfg, mode, train_windows, evaluate, result, keep, begin + cfg.seconds):
      break
  print(table(models))
  if cfg.plot:
    print(plot(models, cfg.plot))
  return models


if __name__ == "__main__":
  main()
