"""Rows in groups, and what they are multiplied to in float64."""

from __future__ import annotations

import numpy as np

from tests.support import oracle

M, G = 37, 5
# Of five groups of at most 37 rows; each is the same program.
SIZES = {
  "all": (8, 9, 1, 12, 7),
  "none": (0, 0, 0, 0, 0),
  "one row": (0, 0, 1, 0, 0),
  "first and last empty": (0, 20, 5, 12, 0),
  "one has everything": (0, 0, 0, M, 0),
  "below M": (3, 0, 17, 2, 1),
  "above M": (10, 20, 30, 2, 1),
  "a negative one": (5, -3, 30, 0, 2),
}


def groups_of(sizes, m, offset=0, matrices=None):
  """The matrix of each row; -1 of a row that has none."""
  matrices = len(sizes) - offset if matrices is None else matrices
  out = np.full(m, -1)
  ends = np.minimum(np.cumsum(np.clip(sizes, 0, None)), m)
  for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
    if 0 <= group - offset < matrices:
      out[start:end] = group - offset
  return out


def product(x_hat, w_hat, of_row):
  """The product and its mag in float64, (m, n), of x_hat (m, k) and w_hat (groups, n, k)."""
  exact, mag = (np.zeros((len(x_hat), w_hat.shape[1])) for _ in range(2))
  for i, group in enumerate(of_row):
    if group >= 0:
      exact[i], mag[i] = oracle.product(x_hat[i], w_hat[group])
  return exact, mag


def rows_of(of_row, group):
  """The rows of a group, which may be none."""
  return np.flatnonzero(of_row == group)
