"""How fast jaxqq is, next to what else JAX offers: `python -m jaxqq.bench --help`.

The way of the data: `cases` (what is measured) and `peers` (what measures itself against it) ->
`measure` (operands, times of the kernels) with `check` (errors) -> `chain` (wall clock of many
products in one program) -> `kept` (JSON) -> `report` (table, Markdown, plot) and `summary` (of a
survey) -> `results_page` (the page of all results that are kept).
"""
