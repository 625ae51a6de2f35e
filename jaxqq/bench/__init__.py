"""How fast jaxqq is, next to what else JAX offers: `python -m jaxqq.bench --help`.

The way of the data: `cases` (what is measured) and `peers` (what measures itself against it) ->
`measure` (operands, times) with `check` (errors) -> `report` (table, JSON, Markdown, plot).
"""
