"""Gradient descent on a small loss."""

from __future__ import annotations

import jax


def falls(loss, params, rate=0.3) -> None:
  """Gradient descent; the loss at the end is well below that at the start."""

  @jax.jit
  def step(params):
    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

  values = []
  for _ in range(40):
    params, value = step(params)
    values.append(float(value))
  assert values[-1] < 0.8 * values[0], values
