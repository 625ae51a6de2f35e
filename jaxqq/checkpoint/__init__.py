"""Quantized checkpoints of MLX, ModelOpt and compressed-tensors, read and written as they are.

No number is computed anew: codes and scales are the bytes of the files. `pip install
'jaxqq[checkpoint]'` brings safetensors, which this needs, and tqdm for a progress bar.
"""

from jaxqq.checkpoint._load import Checkpoint as Checkpoint
from jaxqq.checkpoint._load import load as load
from jaxqq.checkpoint._save import save as save
