"""The loops of a product's kernels as a Hopper GPU runs them, seen on a machine without one.

    pip install --no-deps --target cuda jax-cuda13-pjrt==$JAX_VERSION nvidia-cuda-nvcc==13.0.88 \\
      nvidia-cuda-nvdisasm
    python -m tests.support.sass --packages cuda nvfp4 64 28672 4096 [--groups 8] [--alone]

JAX's plugin for CUDA makes PTX of Mosaic GPU's kernels without a GPU, if something stands in for
the driver's library: a few functions, for which there has to be a C compiler. ptxas makes machine
code of it, as on a GPU that has the same version, and nvdisasm a text. Of each innermost loop that
multiplies is printed how many instructions it has, of each kind, and in which order those for the
tensor cores are begun (MMA), codes converted (F2FP) and sums waited for (WAIT).
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What `MosaicGpuCompile` asks of a driver before it writes PTX, for compute capability 9.0.
_DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuCtxGetCurrent(void** context) { *context = (void*) 1; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 132;
  return 0;
}
"""
_PLUGIN = "jax_plugins/xla_cuda13/xla_cuda_plugin.so"
_LABEL = re.compile(r"\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA .*`\(\.(L_x_\d+)\)")


@dataclasses.dataclass(frozen=True)
class Loop:
  """Instructions in order, the branch back to the first included."""

  instructions: tuple[str, ...]

  @property
  def kinds(self) -> collections.Counter[str]:
    return collections.Counter(map(_kind, self.instructions))

  @property
  def multiplies(self) -> bool:
    return any(map(_is_mma, self.kinds)) and "EXIT" not in self.kinds  # which is not in a loop

  @property
  def order(self) -> str:
    """MMA, F2FP and WAIT in order, and how many of the first two follow each other."""
    names = (_step(instruction) for instruction in self.instructions)
    runs = ((name, len(list(run))) for name, run in itertools.groupby(filter(None, names)))
    return ", ".join(name if name == "WAIT" else f"{count} {name}" for name, count in runs)


def _kind(instruction: str) -> str:
  """HMUL2 of "@!P0 HMUL2.BF16_V2 R4, R4, R5"."""
  return re.sub(r"^@!?U?P\w+ +", "", instruction).split()[0].split(".")[0]


def _is_mma(kind: str) -> bool:
  return kind in ("HGMMA", "QGMMA", "HMMA")


def _step(instruction: str) -> str | None:
  """What `Loop.order` calls it, if anything."""
  kind = _kind(instruction)
  if "WARPGROUP.DEPBAR" in instruction:
    return "WAIT"
  if _is_mma(kind):
    return "MMA"
  return kind if kind == "F2FP" else None


def loops(sass: str) -> list[Loop]:
  """Those of a text of nvdisasm that multiply and have no other such loop inside."""
  labels: dict[str, int] = {}
  instructions: list[str] = []
  for line in sass.splitlines():
    if label := _LABEL.match(line):
      labels[label[1]] = len(instructions)
    elif instruction := _INSTRUCTION.match(line):
      instructions.append(instruction[1])
  spans = []
  for end, instruction in enumerate(instructions):
    branch = _BRANCH.search(instruction)
    if branch and labels.get(branch[1], end + 1) <= end:
      loop = Loop(tuple(instructions[labels[branch[1]] : end + 1]))
      if loop.multiplies:
        spans.append((labels[branch[1]], end, loop))
  return [
    loop
    for begin, end, loop in spans
    if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e, _ in spans)
  ]


# From a product to its kernels' PTX


def modules(mode: str, m: int, n: int, k: int, *, groups: int, alone: bool) -> Iterator[bytes]:
  """The Mosaic GPU modules of a product of packed w, lowered for a Hopper GPU."""
  import jax  # only here: `compile_module` runs without JAX
  import jax.numpy as jnp

  import jaxqq
  from tests.support.lowered import packed, spec

  x, shape = spec(m, k), (groups, n, k) if groups else (n, k)
  words, scales = packed(*shape, mode=mode)
  if groups:
    product = jaxqq.ragged_quantized_matmul if alone else jaxqq.ragged_qqmm
    args: tuple[Any, ...] = x, words, spec(groups, dtype=jnp.int32), scales
  else:
    product, args = jaxqq.quantized_matmul if alone else jaxqq.qqmm, (x, words, scales)
  traced = jax.jit(functools.partial(product, mode=mode)).trace(*args)
  yield from _modules_in(traced.lower(lowering_platforms=("cuda",)).compiler_ir().operation)


def _modules_in(operation: Any) -> Iterator[bytes]:
  for region in operation.regions:
    for block in region.blocks:
      for each in block.operations:
        attributes = each.operation.attributes
        if "mhlo.backend_config" in attributes:
          yield attributes["mhlo.backend_config"]["module"].value_bytes
        yield from _modules_in(each.operation)


def compile_module(path: str, packages: str) -> None:
  """In a process of its own, that says where PTX goes by MOSAIC_GPU_DUMP_TO."""
  ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
  compiles = ctypes.CDLL(str(Path(packages) / _PLUGIN)).MosaicGpuCompile
  compiles.argtypes, compiles.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
  module = Path(path).read_bytes()
  compiles(module, len(module))  # and fails to load the kernel


def ptx_of(module: bytes, packages: Path, folder: Path) -> list[Path]:
  """Of a module's kernels, by name."""
  driver = folder / "libcuda.so.1"
  if not driver.exists():
    source = folder / "driver.c"
    source.write_text(_DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", driver, source], check=True)
  of_module = Path(tempfile.mkdtemp(dir=folder))
  path = of_module / "module"
  path.write_bytes(module)
  env = os.environ | {
    "LD_LIBRARY_PATH": str(folder),
    "PATH": f"{packages / 'nvidia/cu13/bin'}:{os.environ['PATH']}",
    "MOSAIC_GPU_DUMP_TO": str(of_module),
    "MOSAIC_GPU_DUMP_PTX": "1",
  }
  code = "import sys; from tests.support.sass import compile_module as f; f(*sys.argv[1:])"
  command = [sys.executable, "-c", code, str(path), str(packages)]
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  found = sorted(of_module.glob("*.ptx"))
  if not found:
    raise SystemExit(f"no PTX: {done.stderr[-2000:]}")
  return found


def sass_of(ptx: Path, packages: Path) -> tuple[str, str]:
  """And what ptxas says."""
  binaries, cubin = packages / "nvidia/cu13/bin", ptx.with_suffix(".cubin")
  ptxas = [binaries / "ptxas", "-arch=sm_90a", "-O3", "-v", ptx, "-o", cubin]
  said = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
  nvdisasm = [binaries / "nvdisasm", "-c", cubin]
  return subprocess.run(nvdisasm, capture_output=True, text=True, check=True).stdout, said


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("mode")
  for size in ("m", "n", "k"):
    parser.add_argument(size, type=int)
  parser.add_argument("--groups", type=int, default=0, help="of rows, with a matrix each")
  parser.add_argument("--alone", action="store_true", help="x as it is")
  parser.add_argument("--packages", type=Path, required=True, help="where pip put them")
  options = parser.parse_args()
  packages, how = options.packages.resolve(), {"groups": options.groups, "alone": options.alone}
  with tempfile.TemporaryDirectory() as name:
    for module in modules(options.mode, options.m, options.n, options.k, **how):
      for ptx in ptx_of(module, packages, Path(name)):
        sass, said = sass_of(ptx, packages)
        for loop in loops(sass):
          kinds = ", ".join(f"{kind} {count}" for kind, count in loop.kinds.most_common())
          print(f"{ptx.stem}: {len(loop.instructions)} instructions\n  {kinds}\n  {loop.order}")
          spilled = re.findall(r"\d+ bytes spill stores|serialized", said)
          print(f"  ptxas: {', '.join(spilled)}", flush=True)


if __name__ == "__main__":
  main()
