"""Random programs, split in random ways over random meshes, against the same program on one device.

Each is drawn from a seed: where operands come from (arguments, constants, made inside of jit), how
they are stored (reshaped, transposed), how arguments and what is in between are split, and what is
done with the product (accumulated in a scan, mapped, chained). All return the product and its
gradients.

    JAXQQ_SHARDING_SEED=1000 JAXQQ_SHARDING_DRAWS=500 python -m pytest tests/test_sharding_random.py

Operands are small whole numbers. So sums are exact in any order, and a code cannot come out
otherwise because a sum did: the results differ by the last roundings at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxqq
from tests.support import oracle
from tests.support.operands import BACKWARDS, MODES
from tests.support.sharding import where_it_divides

FIRST = int(os.environ.get("JAXQQ_SHARDING_SEED", "0"))
DRAWS = int(os.environ.get("JAXQQ_SHARDING_DRAWS", "50"))

# On 6 devices XLA may take the factors in another order than jaxqq does: K is gathered then. Not
# on 2 * 3: there XLA itself aborts on some reshards ("tile assignment", JAX 0.11.2).
MESHES = [(4,), (8,), (2, 2), (4, 2), (2, 4), (4, 2), (8,), (6,)]
ROWS = [1, 2, 3, 4, 5, 6, 8, 8, 12, 16, 24, 32]
GROUPS = [1, 2, 3, 4, 6, 8, 12]
BATCHES = [  # of x, of w
  *[((), ())] * 4,
  *[((b,), w) for b in (4, 6, 8) for w in ((), (b,), (1,))],
  ((), (8,)),
  ((3, 4), (4,)),
  ((4, 2), (4, 2)),
]
CLOSE = {"float32": 1e-5, "bfloat16": 1e-2}  # of the largest element


def whole_numbers(xp: Any, shape: tuple[int, ...], salt: int) -> Any:
  """-2 ... 2, hashed from the place: the same from numpy and from jax.numpy inside of jit."""
  bits = xp.arange(math.prod(shape), dtype=np.uint32) + np.uint32(salt * 7919 % 2**32)
  for factor in (2654435761, 2246822519):
    bits = bits * np.uint32(factor)
    bits = bits ^ (bits >> np.uint32(15))
  return ((bits % np.uint32(5)).astype(np.float32) - np.float32(2)).reshape(shape)


# Layouts in memory, as lists of (the name of numpy's function, arguments)


def storage(rng: Any, shape: tuple[int, ...]) -> tuple[list, list]:
  """Up to two reshapes or transposes to what is stored, and those back again."""
  there, back = [], []
  for kind in rng.choice(["split", "merge", "swap", "none", "none"], size=2):
    before = shape
    if kind == "split":
      axis = int(rng.integers(len(shape)))
      factors = [f for f in (2, 3, 4, 8) if shape[axis] % f == 0 and shape[axis] > f]
      if factors:
        f = int(rng.choice(factors))
        parts = (f, shape[axis] // f) if rng.random() < 0.5 else (shape[axis] // f, f)
        shape = (*shape[:axis], *parts, *shape[axis + 1 :])
    elif kind == "merge" and len(shape) > 1:
      axis = int(rng.integers(len(shape) - 1))
      shape = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    elif kind == "swap" and len(shape) > 1:
      i, j = (int(axis) for axis in rng.choice(len(shape), size=2, replace=False))
      order = list(range(len(shape)))
      order[i], order[j] = j, i
      shape = tuple(shape[axis] for axis in order)
      there.append(("transpose", order))
      back.insert(0, ("transpose", order))
      continue
    if shape != before:
      there.append(("reshape", shape))
      back.insert(0, ("reshape", before))
  return there, back


def apply(steps: list, a: Any, xp: Any = jnp) -> Any:
  for function, argument in steps:
    a = getattr(xp, function)(a, argument)
  return a


# Splits


def random_spec(
  rng: Any, mesh_shape: dict[str, int], shape: tuple[int, ...], *, even: bool = True
) -> P:
  """Each mesh axis splits some axis of the array, or none; `even`: where it divides."""
  dims: list[list[str]] = [[] for _ in shape]
  for name in rng.permutation(list(mesh_shape)):
    fits = [
      axis
      for axis, size in enumerate(shape)
      if size > 1
      and (not even or size % math.prod(mesh_shape[n] for n in (*dims[axis], str(name))) == 0)
    ]
    if fits and rng.random() < 0.8:
      dims[int(rng.choice(fits))].append(str(name))
  return P(*(tuple(names) or None for names in dims))


# Programs


@dataclasses.dataclass(frozen=True)
class Operand:
  """An array of a program: what it is, where it comes from, how it is stored and split."""

  shape: tuple[int, ...]
  source: str  # argument, constant, made
  salt: int
  dtype: str
  back: list  # from what is stored
  stored: Any  # the array itself, of an argument or a constant
  spec: P  # of what is stored
  constraint: P | None  # of what is restored

  def restored(self, argument: Any, constrain: Any) -> Any:
    if self.source == "made":
      a = whole_numbers(jnp, self.shape, self.salt).astype(self.dtype)
    else:
      a = apply(self.back, self.stored if self.source == "constant" else argument)
    return a if self.constraint is None else constrain(a, self.constraint)

  def __str__(self) -> str:
    text = f"{self.dtype}{list(self.shape)} {self.source}"
    if self.source != "made":
      text += f" {list(self.stored.shape)} {self.spec}"
    return text + (f" constrained {self.constraint}" if self.constraint is not None else "")


@dataclasses.dataclass(frozen=True)
class Program:
  mode: str
  backward: str
  kind: str  # plain, scan (of micro-batches), vmap, chain (of two products)
  mesh_shape: dict[str, int]
  explicit: bool
  shardy: bool
  packed: str | None  # None, given, inside
  global_scales: bool
  steps: int  # of the scan
  operands: dict[str, Operand]  # x, w or (p, s), g, and w2 of a chain
  out: list  # storage of the product
  out_constraint: P | None

  def __str__(self) -> str:
    head = (self.mode, self.backward, self.kind, f"packed {self.packed}", str(self.mesh_shape))
    flags = ["explicit" * self.explicit, "GSPMD" * (not self.shardy)]
    flags += ["global scales" * self.global_scales, f"out {self.out_constraint}"]
    operands = [f"{name}: {operand}" for name, operand in self.operands.items()]
    return "; ".join((", ".join((*head, *filter(None, flags))), *operands))

  def function(self, mesh: Mesh | None) -> Any:
    """Of the arguments, in the operands' order: the product and its gradients."""

    def constrain(a: Any, spec: P) -> Any:
      if mesh is None:
        return a
      return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec))

    def restored(name: str, arguments: dict[str, Any]) -> Any:
      return self.operands[name].restored(arguments.get(name), constrain)

    def weights(arguments: dict[str, Any]) -> tuple[Any, ...]:
      if self.packed == "given":
        return restored("p", arguments), restored("s", arguments)
      w = restored("w", arguments)
      scale = np.float32(2) if self.global_scales else None
      return jaxqq.quantize(w, mode=self.mode, global_scale=scale) if self.packed else (w,)

    def qqmm(x: Any, *w: Any) -> Any:
      scales = {"global_scale_x": np.float32(2), "global_scale_w": np.float32(2)}
      scales = scales if self.global_scales else {}
      own = functools.partial(jaxqq.qqmm, mode=self.mode, backward=self.backward, **scales)
      if self.kind != "vmap":
        return own(x, *w)
      over_w = 0 if w[0].ndim == x.ndim else None
      return jax.vmap(own, in_axes=(0, *(over_w for _ in w)))(x, *w)

    def product(arguments: dict[str, Any]) -> Any:
      out = qqmm(restored("x", arguments), *weights(arguments))
      if self.out_constraint is not None:
        out = constrain(out, self.out_constraint)
      return qqmm(out, restored("w2", arguments)) if self.kind == "chain" else out

    def with_gradients(arguments: dict[str, Any], fixed: dict[str, Any], g: Any) -> Any:
      out, pull = jax.vjp(lambda own: product({**fixed, **own}), arguments)
      g = g.astype(out.dtype)
      if self.explicit and mesh is not None:
        g = jax.sharding.reshard(g, jax.typeof(out).sharding)
      return (apply(self.out, out), *jax.tree.leaves(pull(g)))

    def accumulated(arguments: dict[str, Any], fixed: dict[str, Any], g: Any) -> Any:
      """Micro-batches of rows: the gradients of w are summed, all else is stacked."""

      def split(a: Any) -> Any:
        return a.reshape(self.steps, -1, *a.shape[1:])

      def step(total: Any, rows: Any) -> Any:
        x, g = rows
        f = lambda x, w: qqmm(x, *(w or weights(fixed)))  # noqa: E731
        out, pull = jax.vjp(f, x, w)
        dx, dw = pull(g.astype(out.dtype))
        return jax.tree.map(jnp.add, total, dw), (out, dx)

      x = restored("x", {**fixed, **arguments})
      w = weights(arguments) if "w" in arguments else ()
      zeros = jax.tree.map(jnp.zeros_like, w)
      total, (out, dx) = jax.lax.scan(step, zeros, (split(x), split(g)))
      return (apply(self.out, out.reshape(-1, out.shape[-1])), dx, *total)

    def whole(*values: Any) -> Any:
      arguments = dict(zip(self.arguments(), values, strict=True))
      g = restored("g", arguments)
      names = ("x", "w2") if self.packed else ("x", "w", "w2")
      own = {name: a for name, a in arguments.items() if name in names}
      fixed = {name: a for name, a in arguments.items() if name not in names}
      return (accumulated if self.kind == "scan" else with_gradients)(own, fixed, g)

    return whole

  def arguments(self) -> list[str]:
    return [name for name, operand in self.operands.items() if operand.source == "argument"]


def draw(seed: int) -> Program:
  rng = np.random.default_rng(seed)

  def choice(options: Any) -> Any:
    return options[int(rng.integers(len(options)))]

  mesh_shape = dict(zip("ab", choice(MESHES), strict=False))
  mode, backward = choice(MODES), choice(BACKWARDS)
  explicit = rng.random() < 0.15
  kind = "plain" if explicit else choice(["plain", "plain", "plain", "scan", "chain"])
  # quantize does not take explicit axes that split K.
  packed = choice([None, None, "given", "given", "given" if explicit else "inside"])
  scaled = mode == "nvfp4" and kind != "chain" and rng.random() < 0.3
  group = oracle.MODES[mode].group
  m, n, k = choice(ROWS), choice(ROWS), group * choice(GROUPS)
  x_batch, w_batch = choice(BATCHES)
  if kind == "scan":
    x_batch, w_batch, m = (), (), choice([8, 16, 24, 32])
  elif kind == "chain":
    n = group * choice([1, 2, 3, 4, 6])
  elif not explicit and x_batch and w_batch in ((), x_batch) and rng.random() < 0.5:
    kind = "vmap"
  salt = itertools.count(10 * seed)

  def operand(
    shape: tuple[int, ...], sources: list[str], dtype: str = "float32", value: Any = None
  ) -> Operand:
    own, source = next(salt), choice(sources)
    value = whole_numbers(np, shape, own).astype(dtype) if value is None else np.asarray(value)
    there, back = ([], []) if explicit else storage(rng, shape)
    stored = apply(there, value, np)
    constraint = None
    # Constants have none: XLA folds a constraint, a transpose and quantizing to wrong numbers.
    if not explicit and source == "argument" and rng.random() < 0.25:
      constraint = random_spec(rng, mesh_shape, shape, even=rng.random() < 0.5)
    spec = random_spec(rng, mesh_shape, stored.shape)
    return Operand(shape, source, own, str(value.dtype), back, stored, spec, constraint)

  sources = ["argument", "argument", "argument", "constant", "made"]
  dtype = "float32" if kind == "chain" else choice(["float32", "float32", "bfloat16"])
  operands = {"x": operand((*x_batch, m, k), sources, dtype)}
  w_sources = sources if operands["x"].source == "argument" else ["argument"]
  w_shape = (*w_batch, n, k)
  if packed == "given":
    scale = np.float32(2) if scaled else None
    parts = oracle.quantize(whole_numbers(np, w_shape, next(salt)), mode, scale)
    w_sources = [source for source in w_sources if source != "made"]
    operands |= {
      name: operand(a.shape, w_sources, value=a) for name, a in zip("ps", parts, strict=True)
    }
    if explicit or rng.random() < 0.7:  # as people split them
      spec = random_spec(rng, mesh_shape, parts[0].shape)
      for name, a in zip("ps", parts, strict=True):
        same = where_it_divides(spec, mesh_shape, a.shape)
        operands[name] = Operand(
          a.shape, operands[name].source, 0, str(a.dtype), [], np.asarray(a), same, None
        )
  else:
    operands["w"] = operand(w_shape, w_sources, "bfloat16" if rng.random() < 0.2 else "float32")
  out_shape = (*np.broadcast_shapes(x_batch, w_batch), m, n)
  if kind == "chain":
    operands["w2"] = operand((choice([4, 6, 8, 16]), n), sources)
  g_shape = (*out_shape[:-1], operands["w2"].shape[0] if kind == "chain" else n)
  operands["g"] = operand(g_shape, ["argument"] if explicit else sources)
  if explicit:
    operands = agreeing(operands)
  constrained = not explicit and kind != "scan" and rng.random() < 0.3
  return Program(
    mode=mode,
    backward=backward,
    kind=kind,
    mesh_shape=mesh_shape,
    explicit=explicit,
    shardy=explicit or rng.random() < 0.9,
    packed=packed,
    global_scales=scaled,
    steps=choice([2, 4]),
    operands=operands,
    out=[] if explicit else storage(rng, g_shape)[0],
    out_constraint=random_spec(rng, mesh_shape, out_shape, even=rng.random() < 0.5)
    if constrained
    else None,
  )


def agreeing(operands: dict[str, Operand]) -> dict[str, Operand]:
  """Of explicit axes, no more than JAX takes without asking for the output's split."""
  x, w = operands["x"], operands["p" if "p" in operands else "w"]
  used: set[str] = set()
  specs: list[list[Any]] = []
  for operand in (x, w):
    dims: list[Any] = []
    for axis, names in enumerate(operand.spec):
      in_other = bool(specs) and names is not None and bool(used & set(names))
      summed = axis == len(operand.spec) - 1 and specs and specs[0][-1] is not None
      dims.append(None if in_other or summed or operand.source != "argument" else names)
    used |= {name for names in dims for name in names or ()}
    specs.append(dims)
  x_batch, w_batch = specs[0][:-2], specs[1][:-2]
  for i in range(1, min(len(x_batch), len(w_batch)) + 1):  # split in one of them
    if x_batch[-i] is not None:
      w_batch[-i] = None
  specs[1][:-2] = w_batch
  agreed = {"x": P(*specs[0]), "w": P(*specs[1]), "p": P(*specs[1])}
  if "s" in operands:
    kept = [a and b for a, b in zip(operands["s"].spec, specs[1], strict=True)]
    agreed["s"] = P(*kept)
  return {
    name: dataclasses.replace(operand, spec=agreed.get(name, operand.spec))
    for name, operand in operands.items()
  }


# The test


def check(seed: int) -> None:
  program = draw(seed)
  devices = np.array(jax.devices()[: math.prod(program.mesh_shape.values())])
  kind = AxisType.Explicit if program.explicit else AxisType.Auto
  mesh = Mesh(
    devices.reshape(tuple(program.mesh_shape.values())),
    tuple(program.mesh_shape),
    axis_types=(kind,) * len(program.mesh_shape),
  )
  arguments = [program.operands[name] for name in program.arguments()]
  want = jax.jit(program.function(None))(*(a.stored for a in arguments))
  placed = [jax.device_put(a.stored, NamedSharding(mesh, a.spec)) for a in arguments]
  # Where GSPMD, or a constraint that does not divide, splits a result over a part of an axis, JAX
  # has no name for it and raises, as it does for any function.
  named = program.shardy and program.out_constraint is None
  options = {} if named else {"out_shardings": NamedSharding(mesh, P())}
  jax.config.update("jax_use_shardy_partitioner", program.shardy)
  try:
    with jax.set_mesh(mesh) if program.explicit else contextlib.nullcontext():
      got = jax.jit(program.function(mesh), **options)(*placed)
  finally:
    jax.config.update("jax_use_shardy_partitioner", True)
  assert len(got) == len(want)
  for a, b in zip(got, want, strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = (np.asarray(array, np.float32) for array in (a, b))
    tolerance = CLOSE[program.operands["x"].dtype] * np.max(np.abs(b), initial=0)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("seed", range(FIRST, FIRST + DRAWS))
def test_as_on_one_device(seed):
  try:
    check(seed)
  except Exception as error:
    error.add_note(
      f"{draw(seed)}\nJAXQQ_SHARDING_SEED={seed} JAXQQ_SHARDING_DRAWS=1 "
      "python -m pytest tests/test_sharding_random.py"
    )
    raise
  finally:
    if seed % 20 == 0:  # programs for eight devices add up
      jax.clear_caches()
