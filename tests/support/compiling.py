"""How tests compile their programs fast: LLVM optimizes little; XLA's passes are the same.

And XLA emits what it fused by its older emitters, in half of the time: the newer ones run MLIR's
passes for each fusion. It does so in one part.
"""

from __future__ import annotations

import collections
import io
from typing import Any

import jax
from jax._src import compiler, core, util
from jax._src.lib import xla_client

OPTION = "jax_disable_most_optimizations"
EMITTERS = "xla_cpu_disable_new_fusion_emitters"
_emits = {"quickly": True}


def optimizes() -> bool:
  return not jax.config.read(OPTION)


def optimize(on: bool) -> None:
  """As for users from here on, or little. What is compiled already stays as it is."""
  jax.config.update(OPTION, not on)


def emits_quickly() -> bool:
  return _emits["quickly"]


def emit_quickly(on: bool) -> None:
  """By the older emitters from here on, unless LLVM optimizes as for users."""
  _emits["quickly"] = on


def _field(number: int, value: bytes) -> bytes:
  """Of a protocol buffer."""
  assert len(value) < 128
  key = number << 3 | 2
  return bytes([key] if key < 128 else [key & 127 | 128, key >> 7]) + bytes([len(value)]) + value


# JAX sets this option for a whole process only, by XLA_FLAGS. Serialized options may be followed by
# more of the same message: executable_build_options, debug_options, xla_backend_extra_options.
_OLDER_EMITTERS = _field(3, _field(3, _field(500, _field(1, EMITTERS.encode()) + _field(2, b""))))
# XLA splits a program into up to 32 parts, for as many threads. That takes a fifth of the time to
# compile, and a process of tests has one core.
PARTS = "xla_cpu_parallel_codegen_split_count"
_compile_options = compiler.get_compile_options


def _get_compile_options(*args: Any, **how: Any) -> xla_client.CompileOptions:
  options = _compile_options(*args, **how)
  if optimizes() or not emits_quickly():
    return options
  options = type(options).ParseFromString(options.SerializeAsString() + _OLDER_EMITTERS)
  options.env_option_overrides = [*options.env_option_overrides, (PARTS, 1)]
  return options


compiler.get_compile_options = _get_compile_options

# JAX forgets what it compiled after each module of tests, and compiles again for each new function.
# Here the last programs are kept, those of one device: others take more memory.
_KEPT = 128
_kept: collections.OrderedDict[Any, Any] = collections.OrderedDict()
_compile = compiler.backend_compile_and_load


def _compile_once(
  backend: Any, module: Any, devices: Any, options: xla_client.CompileOptions, callbacks: Any
) -> Any:
  file = io.BytesIO()
  module.operation.write_bytecode(file)
  code = file.getvalue()
  # What is called back is in a program as a number or an address: another function may get it.
  calls_back = callbacks or b"CustomSPMDPartitioning" in code
  if calls_back or len(devices) > 1 or backend.platform != "cpu":
    return _compile(backend, module, devices, options, callbacks)
  key = backend, code, options.SerializeAsString()
  executable = _kept.pop(key, None) or _compile(backend, module, devices, options, callbacks)
  _kept[key] = executable
  if len(_kept) > _KEPT:
    _kept.popitem(last=False)
  return executable


compiler.backend_compile_and_load = _compile_once

# jax_enable_checks checks a function when it is traced, and again within each that calls it. What
# was traced stays as it is: once is enough.
core.check_jaxpr = util.weakref_lru_cache(core.check_jaxpr)
