"""Which tensors belong together: the names that projects give a layer's tensors.

A layer `X` has `X.weight`, `X.weight_scale`, ...: a path and a suffix of its layout. Stacked
experts are parameters of one module, `experts.gate_up_proj`, and their tensors have the parameter's
name and an ending instead: `experts.gate_up_proj_weight_scale` in ModelOpt,
`experts.gate_up_proj_blocks` in gpt-oss.
Source: NVIDIA/Model-Optimizer modelopt/torch/quantization/utils/core_utils.py
quantizer_attr_names; vllm-project/compressed-tensors src/compressed_tensors/compressors/base.py;
huggingface/transformers src/transformers/integrations/mxfp4.py and finegrained/.
"""

from __future__ import annotations

import dataclasses

from jaxqq.checkpoint._files import TensorInfo


@dataclasses.dataclass(frozen=True)
class Naming:
  """What the tensors of a layer are called.

  Attributes:
    endings: what follows the path, by the suffix of a layout.
    weight: what follows the path in the name of the weight, as it is where it is not quantized.
  """

  endings: tuple[tuple[str, str], ...] = ()
  weight: str = ".weight"

  def tensor(self, path: str, suffix: str) -> str:
    return path + dict(self.endings).get(suffix, f".{suffix}")


LAYER = Naming()  # X.<suffix>


def _naming(of_weight: str, **endings: str) -> Naming:
  return Naming(tuple(endings.items()), of_weight)


# fmt: off
OF_PARAMETERS: dict[str, tuple[Naming, ...]] = {
  "mlx": (),
  "modelopt": tuple(
    _naming(weight, weight=weight, weight_scale="_weight_scale", weight_scale_2="_weight_scale_2",
            input_scale="_input_scale")
    for weight in ("", "_weight")
  ),
  "compressed-tensors": (
    _naming("", weight="", weight_packed="_packed", weight_scale="_scale",
            weight_global_scale="_global_scale", input_global_scale="_input_global_scale"),
    _naming("_weight", weight="_weight", weight_packed="_weight_packed",
            weight_scale="_weight_scale", weight_global_scale="_weight_global_scale",
            input_global_scale="_input_global_scale"),
  ),
  "transformers": (
    _naming("", weight="", weight_scale_inv="_scale_inv", blocks="_blocks", scales="_scales"),
  ),
}
# fmt: on
# What codes are stored as, and no weight that is not quantized.
PACKED = ("U8", "I8", "U32", "F8_E4M3", "F8_E5M2")
_CODES = ("weight", "weight_packed", "blocks")
_SCALES = ("weight_scale", "weight_scale_inv", "scales")


@dataclasses.dataclass(frozen=True)
class Group:
  """Tensors that belong together, by suffix."""

  path: str
  naming: Naming
  tensors: dict[str, TensorInfo]

  @property
  def weight(self) -> str:
    """The name of its weight."""
    return self.path + self.naming.weight


def grouped(tensors: dict[str, TensorInfo], format: str) -> list[Group]:
  """Every tensor in one group, those of stacked parameters first, in the order of their names."""
  taken: set[str] = set()
  groups = []
  for naming in OF_PARAMETERS[format]:
    for path in _parameters(tensors, naming):
      found = {suffix: naming.tensor(path, suffix) for suffix, _ in naming.endings}
      names = {suffix: name for suffix, name in found.items() if name in tensors}
      if not taken & set(names.values()):
        taken |= set(names.values())
        groups.append(Group(path, naming, {s: tensors[name] for s, name in names.items()}))
  by_path: dict[str, dict[str, TensorInfo]] = {}
  for name in sorted(tensors.keys() - taken):
    path, _, suffix = name.rpartition(".")
    by_path.setdefault(path, {})[suffix] = tensors[name]
  return groups + [Group(path, LAYER, parts) for path, parts in by_path.items()]


def _parameters(tensors: dict[str, TensorInfo], naming: Naming) -> list[str]:
  """Paths of which both codes and scales are there under these names."""
  endings = dict(naming.endings)
  paths = set()
  for ending in {endings[suffix] for suffix in _SCALES if suffix in endings}:
    for name in tensors:
      path = name.removesuffix(ending)
      if path != name and path.rpartition(".")[2] not in ("", "weight"):
        codes = [path + endings[suffix] for suffix in _CODES if suffix in endings]
        if any(code in tensors and tensors[code].dtype in PACKED for code in codes):
          paths.add(path)
  return sorted(paths)
