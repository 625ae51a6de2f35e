"""`Recipe`: how each operand of a linear layer's three products is quantized, and the named ones.

    forward    y  = x w^T      x (m, k), w (n, k), summed over k
    dx         dx = g w        g (m, n), w (n, k), summed over n
    dw         dw = g^T x      g (m, n), x (m, k), summed over m

Each operand is quantized along the axis that its product sums over, from high precision: twice in
all, in both directions. `None` in place of a `Quantizer` multiplies an operand as it is. Where a
recipe says so, w for dx and x for dw are what the forward product left of them.

What `qqmm` has without a recipe are recipes too: `Recipe.of_mode`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

import jax

from jaxqq import _random_bits
from jaxqq._checks import check_bool
from jaxqq._formats import FORMATS, Mode
from jaxqq._quantizer import Quantizer

Product: TypeAlias = Literal["forward", "dx", "dw"]
PRODUCTS: tuple[Product, ...] = ("forward", "dx", "dw")
OPERANDS = ("forward_x", "forward_w", "dx_g", "dx_w", "dw_g", "dw_x")
FUNCTION = "Recipe"


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How each of the six operands of a linear layer's three products is quantized.

  y = x w^T forward, dx = g w and dw = g^T x backward, with g the cotangent of y; every operand is
  quantized along the axis that its product sums over, under the amax of its own tensor. For
  `qqmm(x, w, recipe=...)`, `dot_general` and layers. Two with the same attributes are equal and
  hash alike; another one is made of one by `dataclasses.replace`.

  Attributes:
    forward_x, forward_w: a `Quantizer`, or None for an operand as it is.
    dx_g, dx_w: of the gradient of x.
    dw_g, dw_x: of the gradient of w.
    from_forward: whether w for dx and x for dw are what the forward product left of them, its codes
      times scales in their own dtype, so that dx_w and dw_x quantize that. It is computed again
      from w and x, with the same bits: nothing else is kept for the backward pass.

  Raises:
    TypeError: an attribute is no `Quantizer` and not None; from_forward is no bool.
    ValueError: the operands of one product are rotated differently, which would be another product;
      from_forward, though the forward product rotates its operands.

  Example:
    >>> import dataclasses
    >>> recipe = jaxqq.Recipe.named("nvfp4")
    >>> recipe.dw_g
    Quantizer(mode='nvfp4', square=False, rounding='stochastic', rotation=16, scale='amax')
    >>> late = dataclasses.replace(recipe, forward_x=None, forward_w=None)  # forward in bfloat16
    >>> late.dw_g == recipe.dw_g, late == recipe
    (True, False)

  Source: arXiv:2509.25149, whose recipe for nvfp4 is "nvfp4".
  """

  forward_x: Quantizer | None = None
  forward_w: Quantizer | None = None
  dx_g: Quantizer | None = None
  dx_w: Quantizer | None = None
  dw_g: Quantizer | None = None
  dw_x: Quantizer | None = None
  from_forward: bool = dataclasses.field(default=False, kw_only=True)

  def __post_init__(self) -> None:
    check_bool(FUNCTION, "from_forward", self.from_forward)
    for name in OPERANDS:
      value = getattr(self, name)
      if value is not None and not isinstance(value, Quantizer):
        raise TypeError(
          f"{FUNCTION}: {name} must be a jaxqq.Quantizer, or None for an operand as it is, "
          f"got {value!r}."
        )
    for product in PRODUCTS:
      one, other = (None if q is None else q.rotation for q in self.of(product))
      if one != other:
        first, second = _OPERANDS[product]
        raise ValueError(
          f"{FUNCTION}: {first} has the rotation {one} and {second} the rotation {other}, which "
          "would not be the same product; rotate both alike, or neither."
        )
    forward = self.forward_x and self.forward_x.rotation
    if self.from_forward and forward is not None:
      raise ValueError(
        f"{FUNCTION}: from_forward is True, but forward_x and forward_w have the rotation "
        f"{forward}, and what they leave is not x and w; use rotation None, or from_forward False."
      )

  def of(self, product: Product) -> tuple[Quantizer | None, Quantizer | None]:
    """The two operands of "forward" (x, w), "dx" (g, w) or "dw" (g, x)."""
    first, second = _OPERANDS[product]
    return getattr(self, first), getattr(self, second)

  @property
  def needs_key(self) -> bool:
    """Whether anything is random: stochastic rounding, or the signs of a rotation."""
    quantizers = (q for product in PRODUCTS for q in self.of(product))
    return any(q.needs_key for q in quantizers if q is not None)

  @classmethod
  def named(cls, name: str) -> Recipe:
    """A published recipe, by its name.

      "nvfp4"         NVIDIA's: w in squares of 16 x 16, to nearest, the same in both products. x
                      and g in rows of 16; x to nearest, g stochastic. Both operands of dw are
                      rotated by 16.
      "nvfp4-4over6"  the same with four over six where nothing is rotated or stochastic: x and w
                      forward, and w in dx.
      "mxfp8"         e4m3 for all six, gradients too, in rows of 32 to nearest, whose scales are
                      rounded up.
      "quartet2"      Quartet II's: x and w forward in rows of 16 with four over six. For dx and dw
                      g, and what the forward product left of w and x, are rotated by 128, with
                      unbiased scales in rows of 16.

    In "nvfp4" rotations have random signs, and the scales of g are rounded up, so that no element
    is clipped: see `Quantizer`. The paper also keeps some layers in bfloat16, which is for a model
    to say. In "quartet2" dx and dw have signs of their own, where the paper's code has the same for
    both, elements half way between two round to even, as in its CUDA kernels, and chances are
    multiples of 2**-16.

    Args:
      name: one of these.

    Returns:
      A `Recipe`.

    Raises:
      ValueError: there is none of that name.

    Example:
      >>> jaxqq.Recipe.named("mxfp8") == jaxqq.Recipe.of_mode("mxfp8", "quantized")
      True

    Source: arXiv:2509.25149 and TransformerEngine's NVFP4BlockScaling ("nvfp4"); arXiv:2512.02010
    ("nvfp4-4over6"); arXiv:2506.08027 ("mxfp8"); arXiv:2601.22813 and its code
    (IST-DASLab/Quartet-II at 8776a90: schemes/quartet_2.py; "quartet2").
    """
    if not isinstance(name, str) or name not in _NAMED:
      raise ValueError(
        f"{FUNCTION}: unknown recipe {name!r}; it must be one of "
        f"{', '.join(map(repr, _NAMED))}, or a jaxqq.Recipe."
      )
    return _NAMED[name]

  @classmethod
  def of_mode(
    cls, mode: Mode, backward: Literal["straight_through", "quantized"] = "straight_through"
  ) -> Recipe:
    """What `qqmm` does without a recipe, with global_scale_x and global_scale_w "amax" in nvfp4.

    Every operand is quantized to nearest in rows: those of the forward product alone, and for
    backward="quantized" those of the gradients too.

    Args:
      mode: "nvfp4", "mxfp8" or "mxfp4".
      backward: "straight_through" or "quantized", as for `qqmm`.

    Returns:
      A `Recipe`.

    Raises:
      ValueError: mode or backward is not as above.

    Example:
      >>> jaxqq.Recipe.of_mode("mxfp8").dx_g is None
      True
    """
    if backward not in ("straight_through", "quantized"):
      raise ValueError(
        f"{FUNCTION}: unknown backward {backward!r}; it must be one of 'straight_through', "
        "'quantized'."
      )
    own = Quantizer(mode)
    return cls(own, own, *(4 * [own if backward == "quantized" else None]))

  def as_mode(self) -> tuple[Mode, Literal["straight_through", "quantized"]] | None:
    """The mode and backward of which it is `of_mode`, if there are such."""
    for mode in FORMATS:
      for backward in _BACKWARDS:
        if self == Recipe.of_mode(mode, backward):  # type: ignore[arg-type]
          return mode, backward  # type: ignore[return-value]
    return None


_BACKWARDS: tuple[Literal["straight_through", "quantized"], ...] = ("straight_through", "quantized")
_OPERANDS: dict[Product, tuple[str, str]] = {
  "forward": ("forward_x", "forward_w"),
  "dx": ("dx_g", "dx_w"),
  "dw": ("dw_g", "dw_x"),
}


def checked_recipe(function: str, recipe: Any) -> Recipe:
  """A recipe, or the one of a name, or the error that the caller should see."""
  if isinstance(recipe, Recipe):
    return recipe
  if isinstance(recipe, str) and recipe in _NAMED:
    return _NAMED[recipe]
  kind = ValueError if isinstance(recipe, str) else TypeError
  raise kind(
    f"{function}: recipe must be a jaxqq.Recipe, or the name of one, "
    f"{', '.join(map(repr, _NAMED))}, got {recipe!r}."
  )


def checked_key(function: str, recipe: Recipe, key: Any) -> jax.Array | None:
  """The words of one key, where the recipe needs one; or the error that the caller should see."""
  if recipe.needs_key and key is None:
    raise ValueError(
      f"{function}: a key is needed, since the recipe rounds or rotates at random, and none was "
      "given; pass one, as jax.random.key(0), and another one in every step."
    )
  if key is None:
    return None
  if not recipe.needs_key:
    raise ValueError(
      f"{function}: a key was given, but nothing in the recipe is random; leave it out."
    )
  words = _random_bits.key_words(function, "key", key)
  if words.ndim != 1:
    raise ValueError(
      f"{function}: key must be one key, got keys of shape {words.shape[:-1]}; use jax.vmap."
    )
  return words


def _nvidia() -> Recipe:
  row, square = Quantizer("nvfp4"), Quantizer("nvfp4", square=True)
  return Recipe(
    forward_x=row,
    forward_w=square,
    dx_g=Quantizer("nvfp4", rounding="stochastic"),
    dx_w=square,
    dw_g=Quantizer("nvfp4", rounding="stochastic", rotation=16),
    dw_x=Quantizer("nvfp4", rotation=16),
  )


def _four_over_six() -> Recipe:
  square = Quantizer("nvfp4", square=True, scale="four_over_six")
  return dataclasses.replace(
    _nvidia(),
    forward_x=Quantizer("nvfp4", scale="four_over_six"),
    forward_w=square,
    dx_w=square,
  )


def _quartet2() -> Recipe:
  row = Quantizer("nvfp4", scale="four_over_six")
  unbiased = Quantizer("nvfp4", rotation=128, scale="unbiased")
  return Recipe(row, row, *4 * [unbiased], from_forward=True)


_NAMED: dict[str, Recipe] = {
  "nvfp4": _nvidia(),
  "nvfp4-4over6": _four_over_six(),
  "mxfp8": Recipe.of_mode("mxfp8", "quantized"),
  "quartet2": _quartet2(),
}
