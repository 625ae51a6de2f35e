"""What MLX's CUDA backend computed: codes, scales, products and gradients of the same numbers."""

from __future__ import annotations

import pathlib

import numpy as np

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "data" / "mlx_cuda.npz")
SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
