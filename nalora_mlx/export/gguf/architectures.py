"""Model types that can be exported to GGUF, and the reasons why others cannot.

tests/interop/test_gguf_architectures.py compares the logits of every row in mlx-lm and llama.cpp.
"""

from nalora_mlx.export.gguf.architecture import Architecture
from nalora_mlx.export.gguf.dense import DENSE
from nalora_mlx.export.gguf.experts import EXPERTS
from nalora_mlx.export.gguf.recurrent import RECURRENT

ARCHITECTURES: dict[str, Architecture] = DENSE | EXPERTS | RECURRENT
