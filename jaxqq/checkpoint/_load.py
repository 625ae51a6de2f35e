"""`load`: the files' headers first, all of them checked, then one tensor after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxqq._checks import FLOATS, names
from jaxqq._weight import QuantizedWeight
from jaxqq.checkpoint._files import Reader, TensorInfo, progress_bar
from jaxqq.checkpoint._layouts import Layout, check_layer, read_layer
from jaxqq.checkpoint._only import Only
from jaxqq.checkpoint._schemes import CONFIGS, QUANTIZATION_KEYS, Scheme, read_scheme

DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json

Tensor: TypeAlias = jax.Array | np.ndarray | QuantizedWeight
Placement: TypeAlias = jax.Device | jax.sharding.Sharding | None


class Checkpoint(dict[str, Tensor]):
  """Tensors by name, and what their files said besides.

  It is a dict, and to `jax.tree` a tree as a dict is; what `jax.tree.map` returns has the tensors
  only.

  Attributes:
    format: "mlx", "modelopt" or "compressed-tensors".
    config: what config.json held, but for how the weights are quantized: `save` writes it again.
    stored_scales: for each `QuantizedWeight` the scalars of its files, by the field that they
      became. `save` writes them again where they still stand for that field.
  """

  def __init__(
    self,
    tensors: Iterable[tuple[str, Tensor]] = (),
    format: str | None = None,
    config: dict[str, Any] | None = None,
    stored_scales: dict[str, dict[str, np.ndarray]] | None = None,
  ):
    super().__init__(tensors)
    self.format = format
    self.config = config or {}
    self.stored_scales = stored_scales or {}


def _flatten_with_keys(checkpoint: Checkpoint) -> tuple[Any, tuple[str, ...]]:
  keys = sorted(checkpoint)
  return [(jax.tree_util.DictKey(key), checkpoint[key]) for key in keys], tuple(keys)


jax.tree_util.register_pytree_with_keys(
  Checkpoint, _flatten_with_keys, lambda keys, leaves: Checkpoint(zip(keys, leaves, strict=True))
)


def load(
  path: str | os.PathLike[str],
  *,
  only: str | Iterable[str] | None = None,
  dtype: DTypeLike | None = None,
  device: Placement | Callable[[str, tuple[int, ...]], Placement] = None,
  progress: bool = True,
) -> Checkpoint:
  """Reads a quantized checkpoint of MLX, ModelOpt or compressed-tensors.

  Which of them it is, and which layers are quantized, is what its configuration says. A layer `X`
  that is becomes one `QuantizedWeight` under `X.weight`, the name that its weight has where it is
  not quantized; every other tensor keeps its name and dtype. The bits are those of the file:

    packed = the bytes of the codes as uint32, scales = the bytes of the scales as uint8,
    global_scale = 2688 * weight_scale_2 (ModelOpt) or 2688 / weight_global_scale
    (compressed-tensors) in float32, and input_global_scale likewise where the file has a static
    scale of the activations.

  A static scale of the activations that is no calibration (0 or infinite, or an amax of at most
  2688 * 2**-126: an expert that calibration never reached) is left out, with a warning: the weight
  has no input_global_scale, so `qqmm` asks for global_scale_x, and layers take the amax of each
  input. `save` writes the scalar again as it was.

  Layers that a server would fuse keep a global scale each. Each file is opened once, and read one
  tensor at a time after the headers of all of them were checked. What is loaded is one version of
  the folder, whoever writes to it meanwhile, or an error.

  Args:
    path: a folder with config.json (or hf_quant_config.json) and model.safetensors, or
      model.safetensors.index.json and the files it names; or one of these two files.
    only: names of what is loaded, or patterns as of a shell ("model.layers.0.*"), one or several;
      each must be found. None loads all. Layers that are not named may be of any format.
    dtype: float32, float16 or bfloat16, the dtype of each `QuantizedWeight`; None is the one that
      config.json names, and bfloat16 where it names none of them.
    device: where the arrays go, as of `jax.device_put`: a `jax.Device`, a sharding, None for the
      default; or a function that says so for each from its tensor's name and its own shape. For a
      `QuantizedWeight` it is asked for packed, for scales and for each global scale.
    progress: a progress bar, where tqdm is installed and stderr is a terminal.

  Returns:
    A `Checkpoint`: a dict of names to arrays and `QuantizedWeight`s. A tensor of 64 bits is a numpy
    array unless `jax_enable_x64` is on, as JAX would halve it.

  Raises:
    FileNotFoundError: the path, the configuration, or a file that the index names is not there.
    ValueError: a file is cut short or no safetensors file; a tensor is missing or has another dtype
      or shape than its layout; an amax is NaN or negative, or a weight's is infinite, or 0 beside
      codes that are not zeros; the format, or a layer's, is none of those above (MLX's "affine",
      ModelOpt's FP8, ...); only names what is not there. The sentence names the file, the tensor,
      what was expected and found.
    TypeError: dtype is none of the three, or only holds what is no string.

  Example:
    >>> import tempfile
    >>> weight = jaxqq.quantize_weight(jnp.ones((8, 64)), global_scale="amax")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   checkpoint.save(folder, {"proj.weight": weight}, format="modelopt")
    ...   tensors = checkpoint.load(folder)
    >>> tensors.format, tensors["proj.weight"]
    ('modelopt', QuantizedWeight(nvfp4, float32 (8, 64), with global_scale))

  Source: of each layout in `jaxqq/checkpoint/_layouts.py`, of the configurations in `_schemes.py`.
  """
  stream = LoadedTensors(path, only, dtype, device, progress)
  checkpoint = Checkpoint(stream.read(), stream.format, stream.config, stream.stored_scales)
  stream.warn(stacklevel=3)
  return checkpoint


def load_each(
  path: str | os.PathLike[str],
  *,
  only: str | Iterable[str] | None = None,
  dtype: DTypeLike | None = None,
  device: Placement | Callable[[str, tuple[int, ...]], Placement] = None,
  progress: bool = False,
) -> LoadedTensors:
  """What `load` reads, one tensor after the other, each when it is asked for.

  All headers and the configuration are checked in this call, as in `load`. A tensor is read when
  the iterator comes to it, so memory need not hold more than one.

  Args:
    path, only, dtype, device, progress: as for `load`.

  Returns:
    An iterator of (name, array or `QuantizedWeight`), which also has `names` (all that it will
    yield, in order), `format` and `config` as a `Checkpoint`, and `stored_scales` of what it has
    yielded. The files are closed when it is exhausted or no longer held; it may be used in `with`.

  Raises:
    FileNotFoundError, ValueError, TypeError: as `load`, in this call or when a tensor is read.

  Example:
    >>> import tempfile
    >>> weight = jaxqq.quantize_weight(jnp.ones((8, 64)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   checkpoint.save(folder, {"proj.weight": weight, "norm": jnp.ones(64)}, format="mlx")
    ...   for name, tensor in checkpoint.load_each(folder):
    ...     print(name, tensor.shape)
    proj.weight (8, 64)
    norm (64,)

  Source: as for `load`.
  """
  return LoadedTensors(path, only, dtype, device, progress)


class LoadedTensors(Iterator[tuple[str, Tensor]]):
  """What `load_each` returns.

  Attributes:
    names: of all tensors that it yields, in order.
    format: "mlx", "modelopt" or "compressed-tensors".
    config: what config.json held, but for how the weights are quantized.
    stored_scales: those of a `Checkpoint`, of the weights that it has yielded.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    only: str | Iterable[str] | None,
    dtype: DTypeLike | None,
    device: Placement | Callable[[str, tuple[int, ...]], Placement],
    progress: bool,
  ):
    wanted = Only(only)
    _check_dtype(dtype)
    self.stored_scales: dict[str, dict[str, np.ndarray]] = {}
    self._place = _placing(device)
    self._progress = progress
    self._uncalibrated: list[tuple[TensorInfo, np.ndarray]] = []
    path = pathlib.Path(path)
    with contextlib.ExitStack() as on_error:
      self._reader = on_error.enter_context(Reader(path, CONFIGS))
      scheme, config = read_scheme(self._reader.folder, self._reader.configs)
      self._items = _items(self._reader, scheme, wanted)
      wanted.check_found(path, self._items, self._reader.tensors)
      on_error.pop_all()
    self._close_files = weakref.finalize(self, self._reader.close)
    self.names = list(self._items)
    self.format, self.config = scheme.format, _without_quantization(config)
    self._dtype = _dtype_of(config) if dtype is None else np.dtype(dtype)
    self._iterator = self.read()

  def __enter__(self) -> LoadedTensors:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the files; nothing more is yielded."""
    self._iterator.close()
    self._close_files()

  def __next__(self) -> tuple[str, Tensor]:
    try:
      return next(self._iterator)
    except StopIteration:
      self.warn(stacklevel=3)
      raise

  def read(self) -> Generator[tuple[str, Tensor], None, None]:
    """A new iterator, which does not warn."""
    total = sum(len(item.parts) for item in self._items.values())
    with self._reader, progress_bar("load", total, self._progress) as advance:
      for name, item in self._items.items():
        yield name, self._read(name, item)
        advance(len(item.parts))
      self._reader.check_one_version()

  def _read(self, name: str, item: _Item) -> Tensor:
    if item.layout is None:
      return self._place(name, self._reader.read(item.parts[""]))
    layout, parts = item.layout, item.parts
    recorded = self._reader.recorded.get(name.removesuffix(".weight"), {})
    fields, stored = read_layer(parts, layout, self._reader.read, recorded, self._dtype)
    for field, value in fields.items():
      if isinstance(value, np.ndarray):
        fields[field] = self._place(name, value)
    self.stored_scales[name] = stored
    if (field := "input_global_scale") in stored.keys() - fields.keys():
      self._uncalibrated.append((parts[layout.scalars[field]], stored[field]))
    return QuantizedWeight(**fields)

  def warn(self, stacklevel: int) -> None:
    """Of scales that were left out, once."""
    if not self._uncalibrated:
      return
    tensor, scalar = self._uncalibrated[0]
    others = f", and {len(self._uncalibrated) - 1} more" if len(self._uncalibrated) > 1 else ""
    self._uncalibrated.clear()
    warnings.warn(
      f"load: {tensor.file}: tensor {tensor.name!r} is {scalar}, which is no calibration of the "
      f"activations{others}; a weight of which that holds has no input_global_scale: give qqmm "
      "global_scale_x, the amax of x, as layers do by themselves.",
      stacklevel=stacklevel,
    )


@dataclasses.dataclass(frozen=True)
class _Item:
  """What is read for one name: the parts of a layer by suffix, or a tensor as it is, under ""."""

  parts: dict[str, TensorInfo]
  layout: Layout | None = None


def _items(reader: Reader, scheme: Scheme, wanted: Only) -> dict[str, _Item]:
  """What is loaded, by name: the quantized layers first."""
  layers = _layers(reader, scheme, wanted)
  items = {f"{layer}.weight": _Item(parts, layout) for layer, (layout, parts) in layers.items()}
  used = {part.name for item in items.values() for part in item.parts.values()}
  for name, tensor in reader.tensors.items():
    if name not in used:
      items[name] = _Item({"": tensor})
  return {name: item for name, item in items.items() if wanted.wants(name)}


def _layers(
  reader: Reader, scheme: Scheme, wanted: Only
) -> dict[str, tuple[Layout, dict[str, TensorInfo]]]:
  """The quantized layers, each with its layout and the tensors of it, all checked.

  Layers without a tensor that is wanted are left out, whatever they are.
  """
  by_layer: dict[str, dict[str, TensorInfo]] = {layer: {} for layer in scheme.layers()}
  for name, tensor in reader.tensors.items():
    layer, _, suffix = name.rpartition(".")
    by_layer.setdefault(layer, {})[suffix] = tensor
  layers = {}
  for layer, tensors in by_layer.items():
    if not any(wanted.wants(f"{layer}.{suffix}") for suffix in ("weight", *tensors)):
      continue
    layout = scheme.layout(layer, tensors)
    if layout is not None:
      check_layer(layer, tensors, layout, scheme.file)
      parts = {
        suffix: tensors[suffix]
        for suffix in (*layout.required, *layout.scalars.values())
        if suffix in tensors
      }
      layers[layer] = (layout, parts)
  return layers


def _check_dtype(dtype: Any) -> None:
  try:
    right = dtype is None or np.dtype(dtype) in FLOATS
  except TypeError:
    right = False
  if not right:
    raise TypeError(f"load: dtype must be {names(FLOATS)}, or None, got {dtype!r}.")


def _dtype_of(config: dict[str, Any]) -> np.dtype:
  """That of the weights before they were quantized."""
  parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
  named = [part.get(key) for part in parts for key in DTYPE_KEYS]
  by_name = {dtype.name: dtype for dtype in FLOATS}
  return next(
    (by_name[name] for name in map(str, named) if name in by_name), np.dtype(jnp.bfloat16)
  )


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}


def _placing(device: Any) -> Callable[[str, np.ndarray], Any]:
  """Puts a tensor's array where it belongs, as long as JAX keeps all its bits."""

  def place(name: str, array: np.ndarray) -> Any:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
      return array
    asked = callable(device) and not isinstance(device, jax.Device | jax.sharding.Sharding)
    return jax.device_put(array, device(name, array.shape) if asked else device)

  return place
