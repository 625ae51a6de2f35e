"""The configuration of compressed-tensors."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

from jaxqq.checkpoint._dense import Dense
from jaxqq.checkpoint._layouts import Layout, layouts_of
from jaxqq.checkpoint._scheme import Names, Scheme, Tensors, either, fp8_by, packed_by

KV_CACHE = "kv_cache_scheme"
# Formats whose weights are FP8 where they are floats of 8 bits.
_FP8 = ("float-quantized", "naive-quantized")
_MIXED = "mixed-precision"
_ONLINE = ("input", "output", "k_cache", "q_attn")  # locations of rotations that a model applies


@dataclasses.dataclass(frozen=True)
class _Group:
  """A row of `LAYOUTS` or FP8, and the layers that have it."""

  layout: Layout | Dense
  names: Names  # of layers
  classes: bool  # whether it names classes, such as "Linear", too
  weight_only: bool


class CompressedTensors(Scheme):
  """`format`, or one for each of `config_groups`; `ignore` with names and "re:..." patterns.

  A layer belongs to the first group that has a target of its name, or else of a class; where its
  tensors are those of another group, to that. A layer that is ignored and has codes and scales all
  the same is what its tensors are. Groups without weights are of activations alone; they are kept
  as they are. Activations that are quantized otherwise than the weights are refused, as the product
  would quantize them like the weights.
  Source: vllm-project/compressed-tensors src/compressed_tensors/quantization/quant_config.py and
  quant_args.py, src/compressed_tensors/transform/, and src/compressed_tensors/utils/match.py.
  """

  format = "compressed-tensors"

  def __init__(self, file: pathlib.Path, config: dict[str, Any], fp8: str):
    """fp8: what `load` was told."""
    super().__init__(file, config)
    self._fp8 = fp8
    self._ignored = self._names("'ignore'", self.field("ignore", list))
    self._refuse_rotations()
    sparsity = self.field("sparsity_config", dict).get("format")
    if sparsity not in (None, "dense"):
      raise self.refuse("'format' of 'sparsity_config'", sparsity, "'dense'")
    self._groups: list[_Group] = []
    of_activations = {}
    for key, group in (self.field("config_groups", dict) or {"": {}}).items():
      if not isinstance(group, dict):
        raise self.refuse(f"{key!r} of config_groups", group, "a scheme written out")
      if "weights" in group and group["weights"] is None:
        of_activations[key] = group
      else:
        self._groups.append(self._group(key, group))
    self.kv_cache = {} if config.get(KV_CACHE) is None else {KV_CACHE: config[KV_CACHE]}
    if of_activations:
      self.kv_cache["config_groups"] = of_activations
    self.scales_activations = bool(of_activations)

  def layout(self, path: str, tensors: Tensors) -> Layout | Dense | None:
    group = self._group_of(path)
    packed, fp8 = packed_by(self.format, tensors), fp8_by(self.format, tensors)
    dense = self._dense(group)
    if fp8 is not None and dense is not None:
      fp8 = dataclasses.replace(dense, scales=fp8.scales)
    if self._ignored.has(path):
      return packed or fp8
    rows = [group.layout for group in self._groups]
    if packed in rows:
      return packed
    if fp8 is not None and dense is not None:
      return fp8
    marks = {"weight_packed", "weight_global_scale", "weight_scale"} & tensors.keys()
    weight = tensors.get("weight")
    if not marks and (weight is None or weight.dtype != "F8_E4M3"):
      return None
    if not rows:
      return packed or fp8
    mode = "nvfp4" if marks & {"weight_packed", "weight_global_scale"} else "mxfp8"
    of_mode = (row for row in rows if isinstance(row, Layout) and row.mode == mode)
    return next(of_mode, rows[0])

  def is_weight_only(self, path: str, layout: Layout) -> bool:
    group = self._group_of(path)
    if group is None or group.layout != layout:
      group = next((other for other in self._groups if other.layout == layout), None)
    return group is not None and group.weight_only

  def _group_of(self, path: str) -> _Group | None:
    by_name = (g for g in self._groups if g.names.has(path))
    by_class = (g for g in self._groups if g.classes)
    return next(by_name, next(by_class, None))

  def _dense(self, group: _Group | None) -> Dense | None:
    """The FP8 of a layer's group, or of any."""
    layouts = [g.layout for g in ([group] if group is not None else []) + self._groups]
    return next((layout for layout in layouts if isinstance(layout, Dense)), None)

  def _group(self, key: str, group: dict[str, Any]) -> _Group:
    args = self.as_kind(f"'weights' of {key!r}", group.get("weights"), dict)
    if args.get("symmetric") is False:
      raise self.refuse(
        f"'symmetric' of the weights of {key!r}", False, "true: zero points are not read"
      )
    targets = self.as_kind(f"'targets' of {key!r}", group.get("targets"), list)
    targets = [str(target) for target in targets]
    of_names = [target for target in targets if "." in target or not target[:1].isupper()]
    layout = self._layout(key, group, args)
    self._check_activations(key, group, layout)
    return _Group(
      layout,
      self._names(f"'targets' of {key!r}", of_names),
      classes=len(of_names) < len(targets) or not targets,
      weight_only="weights" in group and group.get("input_activations") is None,
    )

  def _layout(self, key: str, group: dict[str, Any], args: dict[str, Any]) -> Layout | Dense:
    layouts = layouts_of(self.format)
    name = group.get("format") or self.config.get("format")
    if name == _MIXED:
      name = _format_of(args)
    fp8 = [] if self._fp8 == "refuse" else list(_FP8)
    if isinstance(name, str) and name in fp8 and _is_fp8(args):
      return Dense(self.format, "fp8", name, "weight_scale", self._block(key, args))
    if not isinstance(name, str) or name not in layouts:
      where = f"format of {key!r}" if key else "format"
      raise self.refuse(where, name, either([*layouts, *fp8]))
    self.check_group_size(f"group_size of {key!r}", group.get("weights"), layouts[name])
    return layouts[name]

  def _check_activations(self, key: str, group: dict[str, Any], layout: Layout | Dense) -> None:
    """They are left as they are, or quantized as the weights: `qqmm` does nothing else."""
    if group.get("output_activations") is not None:
      raise self.refuse(
        f"'output_activations' of {key!r}",
        group["output_activations"],
        "null: what a layer returns is not quantized",
      )
    args = self.as_kind(f"'input_activations' of {key!r}", group.get("input_activations"), dict)
    if isinstance(layout, Dense):
      return
    of_weights = {
      "num_bits": (layout.fmt.bits,),
      "type": ("float",),
      "group_size": (layout.fmt.group_size,),
      "strategy": ("group", "tensor_group"),
      "symmetric": (True,),
    }
    for name, right in of_weights.items():
      if args.get(name) is not None and args[name] not in right:
        raise self.refuse(
          f"{name!r} of the input_activations of {key!r}",
          args[name],
          f"{either(right)}, as activations are quantized as the weights are, or not at all",
        )

  def _block(self, key: str, args: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where its shape says so."""
    strategy, block = args.get("strategy"), args.get("block_structure")
    group_size = args.get("group_size")
    if strategy == "block" and isinstance(block, str):
      block = [int(size) for size in re.findall(r"\d+", block)]
    if strategy == "block" and block is not None:
      if not (isinstance(block, list) and len(block) == 2 and all(_is_size(b) for b in block)):
        raise self.refuse(f"'block_structure' of {key!r}", block, "rows and columns of a block")
      return block[0], block[1]
    of_groups = strategy == "group" and isinstance(group_size, int) and group_size > 0
    return (1, group_size) if of_groups else None  # type: ignore[return-value]

  def _names(self, key: str, words: list[Any]) -> Names:
    """A name means itself, and "re:..." what begins as that says."""
    patterns = []
    for word in words:
      if str(word).startswith("re:"):
        try:
          patterns.append(re.compile(word[3:]))
        except re.error as error:
          raise self.refuse(key, word, f"of regular expressions ({error})") from None
    return Names(frozenset(map(str, words)), tuple(patterns))

  def _refuse_rotations(self) -> None:
    """Those that a model applies as it runs; one that was multiplied into weights is in them."""
    groups = self.field("transform_config", dict).get("config_groups")
    groups = self.as_kind("'config_groups' of 'transform_config'", groups, dict)
    for name, scheme in groups.items():
      key = f"{name!r} of 'transform_config'"
      apply = self.as_kind(key, scheme, dict).get("apply")
      for args in self.as_kind(f"'apply' in {key}", apply, list):
        location = self.as_kind(f"'apply' in {key}", args, dict).get("location")
        if location in _ONLINE:
          raise self.refuse(
            f"'location' in {key}",
            location,
            "one of a weight: rotations of activations, queries and keys are not applied",
          )


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and value > 0


def _is_fp8(args: dict[str, Any]) -> bool:
  return args.get("type") == "float" and args.get("num_bits") == 8


def _format_of(args: dict[str, Any]) -> str | None:
  """The format of weights of these arguments, where a group of a mixed model does not name it."""
  if args.get("type") != "float":
    return None
  bits, group_size = args.get("num_bits"), args.get("group_size")
  if bits == 4:
    by_size = {16: "nvfp4-pack-quantized", 32: "mxfp4-pack-quantized"}
    return by_size.get(group_size) if isinstance(group_size, int) else None
  is_mxfp8 = group_size == 32 and args.get("scale_dtype") == "torch.uint8"
  return "mxfp8-quantized" if is_mxfp8 else "float-quantized" if bits == 8 else None
