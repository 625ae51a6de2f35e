"""`load`: the files' headers first, all of them checked, then one tensor after the other."""

from __future__ import annotations

import contextlib
import os
import pathlib
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxqq._checks import FLOATS, names
from jaxqq._weight import QuantizedWeight
from jaxqq.checkpoint._checkpoint import Checkpoint, Notes, Tensor
from jaxqq.checkpoint._experts import read_item
from jaxqq.checkpoint._files import Reader, TensorInfo, progress_bar
from jaxqq.checkpoint._layers import Item, read_items
from jaxqq.checkpoint._only import Only
from jaxqq.checkpoint._read import Loaded
from jaxqq.checkpoint._schemes import CONFIGS, QUANTIZATION_KEYS, Choices, read_scheme

DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json

FP8: TypeAlias = Literal["dequantize", "mxfp8", "refuse"]
Affine: TypeAlias = Literal["dequantize", "refuse"]
Experts: TypeAlias = Literal["stack"] | None
Placement: TypeAlias = jax.Device | jax.sharding.Sharding | None


def load(
  path: str | os.PathLike[str],
  *,
  only: str | Iterable[str] | None = None,
  dtype: DTypeLike | None = None,
  device: Placement | Callable[[str, tuple[int, ...]], Placement] = None,
  fp8: FP8 = "dequantize",
  affine: Affine = "refuse",
  experts: Experts = None,
  quantize_input: bool | None = None,
  progress: bool = True,
) -> Checkpoint:
  """Reads a quantized checkpoint of MLX, ModelOpt, compressed-tensors or transformers.

  Which of them it is, and which layers are quantized, is what its configuration says. A layer `X`
  that is becomes one `QuantizedWeight` under `X.weight`, the name that its weight has where it is
  not quantized; every other tensor keeps its name and dtype. Stacked experts that are a parameter
  are under its name, `model.experts.gate_up_proj`. The bits are those of the file:

    packed = the bytes of the codes as uint32, scales = the bytes of the scales as uint8,
    global_scale = 2688 * weight_scale_2 (ModelOpt), 2688 / weight_global_scale
    (compressed-tensors) or global_scale (MLX) in float32, and input_global_scale likewise where the
    file has a static scale of the activations; one for each matrix of a stack.

  Codes and scales of a layer that the configuration leaves out become a `QuantizedWeight` all the
  same, where they are those of its format. Any other code, scale or rotation that no layer takes is
  an error, and so are rotations that a model applies as it runs, `pre_quant_scale` and zero points.

  A static scale of the activations that is no calibration (0 or infinite, or an amax of at most
  2688 * 2**-126: an expert that calibration never reached) is left out, with a warning: the weight
  has no input_global_scale, so `qqmm` and layers leave x unscaled, unless they are told to take its
  amax. `save` writes the scalar again as it was.

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
    fp8: "dequantize" reads layers of FP8 as arrays of dtype, w = code * scale rounded once, and
      `Checkpoint.dequantized` names them; "mxfp8" makes those a `QuantizedWeight` of the same
      numbers whose scales are powers of two in groups of 32; "refuse" raises.
    affine: "dequantize" reads layers of MLX's mode affine in the same way, w = scale * q + bias;
      "refuse" raises.
    experts: "stack" makes packed layers of all experts, `a.experts.0.up.weight` and so on, one
      `QuantizedWeight` under `a.experts.up.weight`, (E, N, K), which `save` takes apart again, and
      weights that are not packed, biases and the like one array, where all experts have one of the
      same shape and dtype. only means the stacks then. None leaves them.
    quantize_input: that of each `QuantizedWeight`: True, False, or None for what the files say of
      its layer's activations. W4A16_NVFP4, NVFP4A16, gpt-oss's mxfp4, and MLX unless it sets
      "quantize_activations", leave them as they are, and so do layers that multiply by the weight.
    progress: a progress bar, where tqdm is installed and stderr is a terminal.

  Returns:
    A `Checkpoint`: a dict of names to arrays and `QuantizedWeight`s. A tensor of 64 bits is a numpy
    array unless `jax_enable_x64` is on, as JAX would halve it.

  Raises:
    FileNotFoundError: the path, the configuration, or a file that the index names is not there.
    ValueError: a file is cut short or no safetensors file; a tensor is missing or has another dtype
      or shape than its layout; an amax is NaN or negative, or a weight's is infinite, or 0 beside
      codes that are not zeros; the format, or a layer's, is none of those above; a code, a scale
      or a rotation would be left over; a number is beyond dtype; experts cannot be stacked; only
      names what is not there; fp8, affine or experts is none of the above. The sentence names the
      file, the tensor, what was expected and found.
    TypeError: dtype is none of the three, only holds what is no string, or quantize_input is none
      of True, False and None.

  Example:
    >>> import tempfile
    >>> weight = jaxqq.quantize_weight(jnp.ones((8, 64)), global_scale="amax")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   checkpoint.save(folder, {"proj.weight": weight}, format="modelopt")
    ...   tensors = checkpoint.load(folder)
    >>> tensors.format, tensors["proj.weight"]
    ('modelopt', QuantizedWeight(nvfp4, float32 (8, 64), with global_scale))

  Source: of each layout in `jaxqq/checkpoint/_layouts.py`, of the configurations in the files of
  their projects beside it.
  """
  choices = Choices(fp8, affine, experts, quantize_input)
  stream = LoadedTensors(path, only, dtype, device, choices, progress)
  checkpoint = Checkpoint(stream.read(), stream.format, stream.config, stream.notes)
  stream.warn(stacklevel=3)
  return checkpoint


def load_each(
  path: str | os.PathLike[str],
  *,
  only: str | Iterable[str] | None = None,
  dtype: DTypeLike | None = None,
  device: Placement | Callable[[str, tuple[int, ...]], Placement] = None,
  fp8: FP8 = "dequantize",
  affine: Affine = "refuse",
  experts: Experts = None,
  quantize_input: bool | None = None,
  progress: bool = False,
) -> LoadedTensors:
  """What `load` reads, one tensor after the other, each when it is asked for.

  All headers and the configuration are checked in this call, as in `load`. A tensor is read when
  the iterator comes to it, so memory need not hold more than one.

  Args:
    path, only, dtype, device, fp8, affine, experts, quantize_input, progress: as for `load`.

  Returns:
    An iterator of (name, array or `QuantizedWeight`), which also has `names` (all that it will
    yield, in order), `format` and `config` as a `Checkpoint`, and `stored_scales` and `notes` of
    what it has yielded. The files are closed when it is exhausted or no longer held; it may be used
    in `with`.

  Raises:
    FileNotFoundError, ValueError, TypeError: as `load`, in this call or when a tensor is read.

  Example:
    >>> import tempfile
    >>> weight = jaxqq.quantize_weight(jnp.ones((8, 64)), mode="mxfp8")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   checkpoint.save(folder, {"proj.weight": weight, "norm": jnp.ones(64)}, format="mlx")
    ...   for name, tensor in checkpoint.load_each(folder):
    ...     print(name, tensor.shape)
    proj.weight (8, 64)
    norm (64,)

  Source: as for `load`.
  """
  choices = Choices(fp8, affine, experts, quantize_input)
  return LoadedTensors(path, only, dtype, device, choices, progress)


class LoadedTensors(Iterator[tuple[str, Tensor]]):
  """What `load_each` returns.

  Attributes:
    names: of all tensors that it yields, in order.
    format: "mlx", "modelopt", "compressed-tensors" or "transformers".
    config: what config.json held, but for how the weights are quantized.
    stored_scales: those of a `Checkpoint`, of the weights that it has yielded.
    notes: the same, and stored_forms, input_quantized, dequantized and kv_cache as of a
      `Checkpoint`.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    only: str | Iterable[str] | None,
    dtype: DTypeLike | None,
    device: Placement | Callable[[str, tuple[int, ...]], Placement],
    choices: Choices,
    progress: bool,
  ):
    wanted = Only(only)
    _check_dtype(dtype)
    choices.check()
    self._choices = choices
    self._place = _placing(device)
    self._progress = progress
    self._uncalibrated: list[tuple[TensorInfo, np.ndarray]] = []
    path = pathlib.Path(path)
    with contextlib.ExitStack() as on_error:
      self._reader = on_error.enter_context(Reader(path, CONFIGS))
      scheme, config = read_scheme(self._reader.folder, self._reader.configs, choices)
      self._items = read_items(self._reader.tensors, scheme, choices, wanted.wants)
      wanted.check_found(path, self._items, self._reader.tensors)
      on_error.pop_all()
    self._close_files = weakref.finalize(self, self._reader.close)
    self.names = list(self._items)
    self.notes = Notes(kv_cache=scheme.kv_cache)
    self.stored_scales = self.notes.stored_scales
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
    total = sum(_count(item) for item in self._items.values())
    with self._reader, progress_bar("load", total, self._progress) as advance:
      for name, item in self._items.items():
        yield name, self._read(name, item)
        advance(_count(item))
      self._reader.check_one_version()

  def _read(self, name: str, item: Item) -> Tensor:
    if isinstance(item, TensorInfo):
      return self._place(name, self._reader.read(item))
    reader = self._reader
    loaded = read_item(item, reader.read, reader.recorded, self._dtype, self._choices.fp8)
    if loaded.fields is not None and self._choices.quantize_input is not None:
      loaded.fields["quantize_input"] = self._choices.quantize_input
    self.notes.add(item, loaded)
    if loaded.uncalibrated is not None:
      self._uncalibrated.append(loaded.uncalibrated)
    return _placed(name, loaded, self._place)

  def warn(self, stacklevel: int) -> None:
    """Of scales that were left out, once."""
    if not self._uncalibrated:
      return
    tensor, scalar = self._uncalibrated[0]
    others = f", and {len(self._uncalibrated) - 1} more" if len(self._uncalibrated) > 1 else ""
    self._uncalibrated.clear()
    warnings.warn(
      f"load: {tensor.file}: tensor {tensor.name!r} is {scalar}, which is no calibration of the "
      f"activations{others}; a weight of which that holds has no input_global_scale, and x "
      'no global scale: give qqmm global_scale_x="amax", or a layer global_scale="amax".',
      stacklevel=stacklevel,
    )


def _count(item: Item) -> int:
  """How many tensors it is of."""
  return 1 if isinstance(item, TensorInfo) else len(item.parts)


def _placed(name: str, loaded: Loaded, place: Callable[[str, np.ndarray], Any]) -> Tensor:
  if loaded.fields is None:
    out: Tensor = place(name, loaded.array)  # type: ignore[arg-type]
    return out
  fields = {
    field: place(name, value) if isinstance(value, np.ndarray) else value
    for field, value in loaded.fields.items()
  }
  return QuantizedWeight(**fields)


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
