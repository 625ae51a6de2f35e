"""Meshes of eight devices, ways to split a product over them, and what a program moves."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

CLOSE = {"rtol": 1e-5, "atol": 1e-4}
GRADIENTS_CLOSE = {"rtol": 1e-4, "atol": 1e-3}
DT = ("data", "tensor")
# name: x (M, K), w (N, K), output asked for (None: XLA's choice)
SPLITS = {
  "column": (P("data"), P("tensor"), None),
  "row": (P("data", "tensor"), P(None, "tensor"), None),
  "row, all axes": (P(None, DT), P(None, DT), None),
  "row, output split on n": (P(None, "tensor"), P(None, "tensor"), P(None, "tensor")),
  "row, output split on m": (P(None, "tensor"), P(None, "tensor"), P("tensor")),
  "row, rows split on": (P("data", "tensor"), P(None, "tensor"), P(DT)),
  "row, output split the other way": (
    P("data", "tensor"),
    P(None, "tensor"),
    P(("tensor", "data")),
  ),
  "rows of w": (P("data"), P("data"), P("data")),
  "columns of w": (P("data"), P(None, "data"), P("data")),
  "x on k only": (P(None, "tensor"), P(), None),
  "w on k only": (P(), P(None, "tensor"), None),
  "different axes on k": (P(None, "data"), P(None, "tensor"), None),
  "same axis on m and n": (P("tensor"), P("tensor"), None),
  "nothing": (P(), P(), P("data", "tensor")),
}
REDUCED = [("all-reduce", "f32")]
SCATTERED = [("reduce-scatter", "f32")]
GATHERED = {
  True: [("all-gather", "u32"), ("all-gather", "u8")],  # packed
  False: [("all-gather", "f32")],
}
MOVED = {
  "column": [],
  "row": REDUCED,
  "row, all axes": REDUCED,
  "row, output split on n": SCATTERED,
  "row, output split on m": SCATTERED,
  "row, rows split on": SCATTERED,
  "rows of w": GATHERED,
  "columns of w": GATHERED,
}

QUICK = pytest.mark.usefixtures("quick_compiles")
EACH = pytest.mark.parametrize(("mode", "packed"), [("nvfp4", True), ("mxfp8", False)])


@functools.cache
def mesh(*kinds):
  """4 x 2 devices; its axes are XLA's to split over, or of the kinds given."""
  return jax.make_mesh((4, 2), DT, axis_types=kinds or (AxisType.Auto,) * 2)


explicit_mesh = functools.partial(mesh, AxisType.Explicit, AxisType.Explicit)


def place(a, spec):
  return jax.device_put(a, NamedSharding(mesh(), spec))


def place_explicit(a, spec):
  return jax.device_put(a, NamedSharding(explicit_mesh(), spec))


def collectives(executable):
  """[(operation, type)] of every collective in the compiled text."""
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  found = re.findall(rf"= (\w+)\[[^=]* ({kinds})(?:-start)?\(", executable.as_text())
  return sorted((kind, dtype) for dtype, kind in found)


def gathered(executable):
  """The shapes of what is gathered in the compiled text."""
  found = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather\(", executable.as_text())
  return {tuple(map(int, shape.split(","))) for shape in found}


def where_it_divides(spec: P, mesh_shape: dict[str, int], shape: tuple[int, ...]) -> P:
  """`spec` without the axes that it does not split evenly."""
  ways = [math.prod(mesh_shape[name] for name in names or ()) for names in spec]
  return P(
    *(
      names if size % way == 0 else None for names, way, size in zip(spec, ways, shape, strict=True)
    )
  )


@functools.cache
def sharding_error() -> type[Exception]:
  """What JAX's own operations raise of shardings that contradict; it has no public name."""
  x = place_explicit(np.ones((4, 4)), P(None, "tensor"))
  try:
    jnp.einsum("mk,nk->mn", x, x)
  except Exception as error:
    return type(error)
  raise AssertionError("JAX takes what it refused")
