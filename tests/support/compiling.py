"""How tests compile their programs fast: LLVM optimizes little, XLA does without MLIR."""

from __future__ import annotations

from typing import Any

import jax
from jax._src import compiler

OPTION = "jax_disable_most_optimizations"
# XLA's own name, in the fields of its CompileOptionsProto: executable_build_options,
# debug_options, xla_backend_extra_options, and there a key and a value. JAX 0.12's XLA ignores it.
NO_MLIR = "xla_cpu_disable_new_fusion_emitters"
PATH = (3, 3, 500)

_options_of_jax = compiler.get_compile_options


def optimizes() -> bool:
  return not jax.config.read(OPTION)


def optimize(on: bool) -> None:
  """As for users from here on, or little. What is compiled already stays as it is."""
  jax.config.update(OPTION, not on)


def _varint(number: int) -> bytes:
  low, rest = number & 0x7F, number >> 7
  return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _field(number: int, content: bytes) -> bytes:
  """A string, or a message within a message, as protocol buffers write it."""
  return _varint(number << 3 | 2) + _varint(len(content)) + content


def _extra() -> bytes:
  message = _field(1, NO_MLIR.encode()) + _field(2, b"")
  for number in reversed(PATH):
    message = _field(number, message)
  return message


EXTRA = _extra()


def _options(*args: Any, **how: Any) -> Any:
  options = _options_of_jax(*args, **how)
  if optimizes():
    return options
  # Messages one after the other are merged.
  return options.ParseFromString(options.SerializeAsString() + EXTRA)


def install() -> None:
  """JAX has a setting for LLVM, and none for MLIR."""
  compiler.get_compile_options = _options
