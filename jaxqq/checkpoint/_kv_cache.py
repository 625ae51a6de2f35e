"""The configuration of the cache of keys and values, from one project's words to another's.

Its scales are tensors like any other (`k_scale`, `v_scale`), which `load` and `save` leave alone.
Source: NVIDIA/Model-Optimizer modelopt/torch/export/convert_hf_config.py;
vllm-project/compressed-tensors src/compressed_tensors/quantization/quant_config.py.
"""

from __future__ import annotations

from typing import Any

ALGORITHM, SCHEME, GROUPS = "kv_cache_quant_algo", "kv_cache_scheme", "config_groups"
_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}


def in_modelopt(kv_cache: dict[str, Any]) -> tuple[str | None, Any]:
  """ "kv_cache_quant_algo" and "kv_cache_scheme"; None where there is none."""
  if GROUPS in kv_cache:
    raise _no_place("modelopt", GROUPS, kv_cache[GROUPS])
  algorithm, scheme = kv_cache.get(ALGORITHM), kv_cache.get(SCHEME)
  if algorithm is None and isinstance(scheme, str):
    algorithm = scheme
  if algorithm is None and scheme is not None:
    if not _is_fp8(scheme):
      raise _no_place("modelopt", SCHEME, scheme)
    algorithm = "FP8"
  if scheme is None and algorithm is not None:
    scheme = _FP8 if algorithm == "FP8" else algorithm
  return algorithm, scheme


def in_compressed_tensors(kv_cache: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
  """ "kv_cache_scheme", None where there is none, and the groups of activations alone."""
  algorithm, scheme = kv_cache.get(ALGORITHM), kv_cache.get(SCHEME)
  if isinstance(scheme, str):
    algorithm, scheme = scheme, None
  if scheme is None and algorithm is not None:
    if algorithm != "FP8":
      raise _no_place("compressed-tensors", ALGORITHM, algorithm)
    scheme = {**_FP8, "strategy": "tensor", "symmetric": True}
  return scheme, dict(kv_cache.get(GROUPS) or {})


def check_none(format: str, kv_cache: dict[str, Any]) -> None:
  """Raises where a format without such a configuration would lose one."""
  for key, value in kv_cache.items():
    raise _no_place(format, key, value)


def _is_fp8(scheme: Any) -> bool:
  """Of one static scale for each of keys and values."""
  if not isinstance(scheme, dict):
    return False
  kind = [scheme.get(key) for key in ("num_bits", "type", "symmetric", "strategy", "dynamic")]
  return all(
    found in right
    for found, right in zip(
      kind, ((8,), ("float",), (None, True), (None, "tensor"), (None, False)), strict=True
    )
  )


def _no_place(format: str, key: str, value: Any) -> ValueError:
  return ValueError(
    f"save: {key!r} of the checkpoint's kv_cache is {value!r}, for which format {format!r} has no "
    "words; save it in the format that it came in, or set kv_cache to {} to save without it."
  )
