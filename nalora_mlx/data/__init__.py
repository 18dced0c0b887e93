"""Training data, from files or the Hugging Face Hub to padded batches.

Reads and checks rows, renders chats, builds loss masks, tokenizes, and forms batches and packs. NumPy only; may import
`core`.
"""

from nalora_mlx.data.batches import Batch, evaluation_batches, training_batches
from nalora_mlx.data.checks import read_rows
from nalora_mlx.data.preview import preview
from nalora_mlx.data.rows.formats import Features, Row
from nalora_mlx.data.sources.loading import load_hub, load_local, read_jsonl
from nalora_mlx.data.tokenization import Example, Split, tokenize_split

__all__ = [
    "Batch",
    "Example",
    "Features",
    "Row",
    "Split",
    "evaluation_batches",
    "load_hub",
    "load_local",
    "preview",
    "read_jsonl",
    "read_rows",
    "tokenize_split",
    "training_batches",
]
