"""Trains the language model of train_lm.py on a mesh of devices: data times tensor parallel.

  pip install 'jaxqq[examples]'
  # One process, all devices of this machine that the mesh needs (here a CPU taken for four):
  python examples/train_sharded.py --data 2 --tensor 2 --cpu-devices 4
  # Two processes on this machine, two devices each; without --cpu-devices, one GPU each:
  python examples/train_sharded.py --data 2 --tensor 2 --spawn 2 --cpu-devices 2
  # One of several processes on several hosts, as a launcher would start each:
  python examples/train_sharded.py --data 4 --tensor 2 \
    --coordinator host0:1234 --num-processes 2 --process-id 0

Windows are split over `data`. Of each pair of linear layers, the first (qkv, gate_up) is split over
`tensor` along its outputs and the second (out, down) along its inputs, so that one sum over
`tensor` ends the pair. The losses are those of one device (--data 1 --tensor 1), up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import train_lm
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from train_lm import Params, Result, flag

# Every product is a collective, and in several processes on CPUs those are slow.
NUM_VAL_WINDOWS = 64
SPECS = {
  "qkv": P(None, "tensor"),
  "gate_up": P(None, "tensor"),
  "out": P(None, None, "tensor"),
  "down": P(None, None, "tensor"),
  "head": P("tensor"),
}


@dataclasses.dataclass(frozen=True)
class Config(train_lm.Training):
  batch: int = flag(8, "windows a step")
  steps: int = flag(200, "optimizer steps")
  data: int = flag(1, "devices that windows are split over")
  tensor: int = flag(1, "devices that weights are split over")
  cpu_devices: int = flag(0, "devices that each process takes its CPU for; 0 leaves it to JAX")
  spawn: int = flag(0, "start so many processes on this machine, and be none of them")
  coordinator: str = flag("", "host:port of process 0, for one process of several")
  num_processes: int = flag(1, "how many processes there are")
  process_id: int = flag(0, "which of them this is")
  local_device: int = flag(-1, "the one GPU that this process takes; -1 for all")

  @property
  def d_ff(self) -> int:
    """The same for every mesh: up to four ways, a split leaves whole groups."""
    return -(-8 * self.d_model // (3 * 128)) * 128

  def mistake(self) -> str | None:
    if mistake := super().mistake():
      return mistake
    for name in ("data", "tensor", "num_processes"):
      if getattr(self, name) < 1:
        return f"--{name.replace('_', '-')} must be positive, got {getattr(self, name)}."
    if self.batch % self.data:
      return f"--batch must be a multiple of --data {self.data}, got {self.batch}."
    if self.heads % self.tensor:
      return f"--heads must be a multiple of --tensor {self.tensor}, got {self.heads}."
    for name in ("d_model", "d_ff"):
      if getattr(self, name) % (32 * self.tensor):
        return (
          f"{name} must be a multiple of 32 times --tensor {self.tensor}, for whole groups on "
          f"every device, got {getattr(self, name)}."
        )
    if not 0 <= self.process_id < self.num_processes:
      return f"--process-id must be below --num-processes, got {self.process_id}."
    if (self.num_processes > 1) != bool(self.coordinator):
      return "--coordinator and --num-processes go together: of several processes, one is asked."
    return None


def shardings_of(params: Params, mesh: Mesh) -> Params:
  """How each weight is split; norms and the embedding are everywhere."""

  def one(path: Any, _: Any) -> NamedSharding:
    return NamedSharding(mesh, SPECS.get(path[-1].key, P()))

  return jax.tree_util.tree_map_with_path(one, params)


def make_state(cfg: Config, optimizer: Any, mesh: Mesh) -> tuple[Params, Any, dict[str, Any]]:
  """Weights and optimizer state, each device making its own part, and the step's shardings."""
  import optax

  init = functools.partial(train_lm.init_params, cfg)
  of_params = shardings_of(jax.eval_shape(init), mesh)
  params = jax.jit(init, out_shardings=of_params)()
  everywhere = NamedSharding(mesh, P())
  of_state = optax.tree_map_params(
    optimizer,
    lambda _, sharding: sharding,
    jax.eval_shape(optimizer.init, params),
    of_params,
    transform_non_params=lambda _: everywhere,
  )
  state = jax.jit(optimizer.init, out_shardings=of_state)(params)
  return params, state, {"out_shardings": (of_params, of_state, everywhere)}


def run(cfg: Config, mode: str, mesh: Mesh, windows: Sequence[np.ndarray]) -> Result:
  """Trains one model on the mesh."""
  split = NamedSharding(mesh, P("data"))

  def put(batch: np.ndarray) -> jax.Array:  # every process has the text, and gives its windows
    return jax.make_array_from_callback(batch.shape, split, lambda at: batch[at])

  evaluate = train_lm.make_evaluate(cfg, mode, windows[1][: NUM_VAL_WINDOWS * cfg.seq])
  state = functools.partial(make_state, mesh=mesh)
  params, result = train_lm.train(cfg, mode, windows[0], evaluate, state, put)
  dtype = train_lm.DTYPES[cfg.dtype]
  served = jax.jit(functools.partial(train_lm.pack, mode=mode, dtype=dtype))(params)
  return {**result, "bytes_per_device": bytes_per_device(served, mode)}


def bytes_per_device(served: Params, mode: str) -> int:
  """Those of the linear layers' weights; in bfloat16 where they are not quantized."""
  arrays = jax.tree.leaves([served["blocks"][name] for name in train_lm.LINEARS])
  size_of = (2 if mode == train_lm.UNQUANTIZED else a.dtype.itemsize for a in arrays)
  shards = (a.addressable_shards[0].data.size for a in arrays)
  return sum(size * count for size, count in zip(size_of, shards, strict=True))


def table(cfg: Config, results: dict[str, Result]) -> str:
  rows = [("model", "first loss", "last loss", "validation loss", "ms/step", "bytes a device")]
  for mode, result in results.items():
    losses = (result["losses"][0], result["losses"][-1], result["val_loss"])
    numbers = (*(f"{loss:.4f}" for loss in losses), f"{result['ms_per_step']:.1f}")
    rows.append((mode, *numbers, f"{result['bytes_per_device']:,}"))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(" | ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def join_the_others(cfg: Config) -> None:
  """Says which devices this process has, and where the others are: before JAX starts."""
  if cfg.cpu_devices:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", cfg.cpu_devices)
  if cfg.num_processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
      cfg.coordinator,
      cfg.num_processes,
      cfg.process_id,
      local_device_ids=None if cfg.local_device < 0 else [cfg.local_device],
    )


def make_mesh(cfg: Config) -> Mesh:
  needed, devices = cfg.data * cfg.tensor, jax.devices()
  if needed > len(devices) or (jax.process_count() > 1 and needed < len(devices)):
    sys.exit(
      f"--data {cfg.data} times --tensor {cfg.tensor} is {needed} devices, and there are "
      f"{len(devices)}; --cpu-devices takes a CPU for several."
    )
  names = ("data", "tensor")
  auto = (AxisType.Auto,) * 2
  return jax.make_mesh((cfg.data, cfg.tensor), names, auto, devices=devices[:needed])


def spawn(cfg: Config, argv: Sequence[str]) -> int:
  """Runs this program as several processes; returns the first exit status that is not 0."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  several = ["--spawn", "0", "--coordinator", f"localhost:{port}", "--num-processes"]
  processes = []
  for i in range(cfg.spawn):
    own = ["--process-id", str(i)]
    if not cfg.cpu_devices:
      own += ["--local-device", str(i)]
    command = [sys.executable, __file__, *argv, *several, str(cfg.spawn), *own]
    processes.append(subprocess.Popen(command))
  try:
    return next((status for p in processes if (status := p.wait())), 0)
  finally:
    for process in processes:
      process.kill()


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
  """Trains the models, prints how they compare, and returns the numbers by mode."""
  if train_lm.optax is None:
    sys.exit(f"train_sharded needs optax and tqdm: {train_lm.INSTALL}")
  cfg = train_lm.parse_config(argv, Config, __doc__)
  if cfg.spawn:
    sys.exit(spawn(cfg, sys.argv[1:] if argv is None else argv))
  join_the_others(cfg)
  mesh = make_mesh(cfg)
  is_first = jax.process_index() == 0
  if is_first:
    print(
      f"jax {jax.__version__}, {jax.process_count()} processes, {dict(mesh.shape)} of "
      f"{mesh.devices.flat[0].device_kind}, batch {cfg.batch}, {cfg.steps} steps, "
      f"backward {cfg.backward}",
      flush=True,
    )
  windows = [
    np.lib.stride_tricks.sliding_window_view(text, cfg.seq + 1) for text in train_lm.read_text()
  ]
  results = {mode: run(cfg, mode, mesh, windows) for mode in cfg.modes}
  if is_first:
    print(table(cfg, results), flush=True)
  if cfg.num_processes > 1:
    jax.distributed.shutdown()
  return results


if __name__ == "__main__":
  main()
