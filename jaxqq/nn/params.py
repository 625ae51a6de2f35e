"""A tree of parameters of Flax Linen, its kernels replaced by packed weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen
from flax.core import meta

from jaxqq._checks import check_format
from jaxqq._dot_general import DotGeneral
from jaxqq._formats import FORMATS, Mode
from jaxqq._global_scales import DEFAULT, GlobalScale, checked_choice
from jaxqq._weight import QuantizedWeight
from jaxqq.nn.kernel import KernelAxes
from jaxqq.nn.linen import LAYERS, planned
from jaxqq.nn.report import NO_PRODUCT, LayerReport, Report, num_bytes, relative_error

FUNCTION = "quantize_params"
NOTE = (
  "Run the model with these parameters by jaxqq.nn.quantized_apply(model), not by model.apply: "
  "the layers of Flax cannot multiply by a packed kernel."
)
Predicate = Callable[[str, Any], bool | str]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Seen:
  """What a run of the model says about a layer."""

  kind: str
  axes: KernelAxes | None = None
  dtype: Any = None  # that it computes in, if it has one
  reason: str | None = None


def quantize_params(
  params: Mapping[str, Any],
  mode: Mode = "nvfp4",
  *,
  apply: Callable[[Any], Any] | None = None,
  predicate: Predicate | None = None,
  global_scale: GlobalScale = DEFAULT,
  quantize_input: bool = True,
) -> tuple[dict[str, Any], Report]:
  """Packs the kernels in a tree of parameters of Flax Linen, for serving.

  The kernel of a layer becomes a `QuantizedWeight`, which `QQDense` takes, and any other model
  by `quantized_apply`. Metadata of logical axes (`nn.with_partitioning`) goes to its arrays.

  Args:
    params: what `model.init(...)["params"]` is.
    mode: "nvfp4", "mxfp8" or "mxfp4".
    apply: a function of params that runs the model, as
      `lambda params: model.apply({"params": params}, x)`. Its shapes alone are used; it tells
      which axes of each kernel are contracted. Without it, only kernels of two axes are
      converted, which are taken to be those of dense layers.
    predicate: a function of (path, params of the layer), path as "blocks_0.attention.query", that
      says whether to convert a layer; it may also answer with the mode for that layer.
    global_scale: nvfp4 only. "weight", there the default, gives each kernel a global scale, its
      amax, and "amax" one to each of its matrices; None gives none. What inputs get is up to the
      layer that multiplies.
    quantize_input: what the weights say of inputs: False has layers multiply them as they are.

  Returns:
    params: a tree of dicts; what was not converted is as it was.
    report: what became of each layer; `str(report)` is a table.

  Raises:
    TypeError: params is no tree of dicts.
    ValueError: mode or global_scale is not as above.

  Example:
    >>> model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(8)])
    >>> x = jnp.ones((2, 64))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> run = lambda params: model.apply({"params": params}, x)
    >>> params, report = jaxqq.nn.quantize_params(params, "mxfp8", apply=run)
    >>> len(report.converted)
    2
    >>> jaxqq.nn.quantized_apply(model)({"params": params}, x).shape
    (2, 8)

  Source: `mlx.nn.quantize`.
  """
  if not isinstance(params, Mapping):
    raise TypeError(f"{FUNCTION}: params must be a tree of dicts, got {type(params).__name__}.")
  dot_general = DotGeneral(
    mode, global_scale=global_scale, quantize_input=quantize_input, function=FUNCTION
  )
  seen = None if apply is None else _run(apply, params)
  conversion = _Conversion(dot_general.mode, global_scale, quantize_input, predicate, seen)
  converted = conversion.walk((), params)
  rows = tuple(conversion.rows)
  return converted, Report(rows, NOTE if any(row.converted for row in rows) else "")


def _run(apply: Callable[[Any], Any], params: Any) -> dict[Path, Seen]:
  """Every module that holds parameters, by its path."""
  seen: dict[Path, Seen] = {}

  def intercept(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
    layer = context.module
    if context.method_name != "__call__" or layer.path in seen:
      return next_method(*args, **kwargs)
    one = Seen(type(layer).__name__)
    if type(layer) in LAYERS:
      plan = planned(layer, args, kwargs)
      if isinstance(plan, str):
        one = dataclasses.replace(one, reason=plan)
      else:
        one = dataclasses.replace(one, axes=plan.kernel, dtype=layer.dtype)
    seen[layer.path] = one
    return next_method(*args, **kwargs)

  with linen.intercept_methods(intercept):
    jax.eval_shape(lambda params: apply(params), params)  # anew: a trace that is kept shows nothing
  if not seen:
    raise ValueError(
      f"{FUNCTION}: apply ran no module of Flax Linen while it was traced; give a function that "
      "calls model.apply and is not compiled by jax.jit."
    )
  return seen


@dataclasses.dataclass
class _Conversion:
  """One walk over a tree of parameters, and what it finds on the way."""

  mode: Mode
  global_scale: GlobalScale  # of kernels whose mode has one
  quantize_input: bool
  predicate: Predicate | None
  seen: dict[Path, Seen] | None
  rows: list[LayerReport] = dataclasses.field(default_factory=list)

  def walk(self, path: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in params.items() if not isinstance(value, Mapping)}
    after = self.layer(path, own) if own else {}
    for name, value in params.items():
      if isinstance(value, Mapping):
        after[name] = self.walk((*path, name), value)
    return {name: after[name] for name in params}

  def layer(self, path: Path, own: dict[str, Any]) -> dict[str, Any]:
    """The parameters that one module holds itself."""
    seen = self.described(path, own)
    kernel = meta.unbox(own.get("kernel"))
    mode, reason = self.choice(path, own, kernel, seen)
    leaves = [meta.unbox(value) for value in own.values()] if kernel is None else [kernel]
    row = LayerReport(
      path=".".join(path),
      kind=seen.kind,
      shape=max((tuple(a.shape) for a in leaves), key=math.prod),
      mode=mode,
      reason=reason,
      bytes_before=num_bytes(own),
      bytes_after=num_bytes(own),
    )
    if mode is None:
      self.rows.append(row)
      return dict(own)
    assert seen.axes is not None
    weight = self.quantized(kernel, seen, mode)
    after = {**own, "kernel": boxed(weight, own["kernel"], seen.axes)}
    error = relative_error(kernel, weight, seen.axes)
    self.rows.append(dataclasses.replace(row, bytes_after=num_bytes(after), relative_error=error))
    return after

  def described(self, path: Path, own: dict[str, Any]) -> Seen:
    """What is known of a module: from the run, or from its parameters."""
    if self.seen is not None:
      return self.seen.get(path, Seen("?", reason="apply did not run it"))
    kernel = meta.unbox(own.get("kernel"))
    if kernel is None:
      kind = "Embed" if "embedding" in own else "?"
      return Seen(kind, reason=NO_PRODUCT.get(kind, "it has no kernel"))
    if isinstance(kernel, QuantizedWeight):
      return Seen("?")
    if kernel.ndim != 2:
      return Seen("?", reason="its shape does not tell which axes are contracted; give apply")
    return Seen("Dense", KernelAxes(tuple(kernel.shape), (), (1,), (0,)))

  def choice(
    self, path: Path, own: dict[str, Any], kernel: Any, seen: Seen
  ) -> tuple[Mode | None, str | None]:
    """The mode to convert to, or None and why not."""
    if isinstance(kernel, QuantizedWeight):
      return None, "it is quantized already"
    if seen.axes is None or kernel is None:
      unknown = "it is no layer of Linen that multiplies by a kernel"
      return None, seen.reason or NO_PRODUCT.get(seen.kind, unknown)
    mode = self.mode
    chosen = True if self.predicate is None else self.predicate(".".join(path), own)
    if isinstance(chosen, str):
      mode = check_format(FUNCTION, chosen, None, None).mode
    if not chosen:
      return None, "predicate leaves it out"
    reason = seen.axes.why_not(kernel, mode)
    return (mode, None) if reason is None else (None, reason)

  def quantized(self, kernel: Any, seen: Seen, mode: Mode) -> QuantizedWeight:
    assert seen.axes is not None
    fmt = FORMATS[mode]
    scale = checked_choice(FUNCTION, self.global_scale if fmt.has_global_scale else None, fmt)
    weight = seen.axes.quantized(kernel, mode, scale, seen.dtype)
    return dataclasses.replace(weight, quantize_input=self.quantize_input)


def boxed(weight: QuantizedWeight, box: Any, axes: KernelAxes) -> QuantizedWeight:
  """Each array in a box as the kernel's, with the names of its own axes."""
  if not isinstance(box, linen.Partitioned):
    return weight
  names = axes.names_of_matrices(box.names, weight.ndim)
  if names is None:
    return weight
  return jax.tree.map(
    lambda a: dataclasses.replace(box, value=a, names=names[: len(a.shape)]), weight
  )
