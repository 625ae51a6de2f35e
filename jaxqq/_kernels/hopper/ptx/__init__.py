"""Assembly, and all else that touches MLIR: what Mosaic GPU's own operations do not have.

Nothing outside this folder writes PTX. A function here takes and returns arrays and references of
Pallas. Mosaic GPU's interpreter can run no assembly, so each function has an `_interpreted` version
in array operations, and picks it by `interpreting()`: callers need not know.
"""
