"""Quantized checkpoints of MLX, ModelOpt, compressed-tensors and transformers, as they are stored.

No number is computed anew: codes and scales are the bytes of the files. Nothing more has to be
installed; `pip install 'jaxqq[checkpoint]'` brings tqdm, for a progress bar.
"""

from jaxqq.checkpoint._checkpoint import Checkpoint
from jaxqq.checkpoint._into import load_into
from jaxqq.checkpoint._load import LoadedTensors, load, load_each
from jaxqq.checkpoint._save import save

__all__ = [
  "Checkpoint",
  "LoadedTensors",
  "load",
  "load_each",
  "load_into",
  "save",
]


def __dir__() -> list[str]:
  return list(__all__)
