"""What the tables in Markdown have in common."""

from __future__ import annotations

from collections.abc import Sequence

TIMES = "\N{MULTIPLICATION SIGN}"


def markdown_row(cells: Sequence[str], *, head: bool = False) -> list[str]:
  """A line of a table, and below a head the line that makes it one."""
  text = [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"]
  return [*text, "|" + "---|" * len(cells)] if head else text
