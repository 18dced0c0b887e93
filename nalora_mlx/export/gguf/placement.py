"""Which tensors of a GGUF file a parameter of a model becomes: their names, and their rows, columns and values."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Placement:
    """A tensor of the file made from one parameter of the model: choose rows and columns, then change values."""

    name: str  # in GGUF, or one that gguf-py's map from Hugging Face's names knows
    rows: np.ndarray | None = None  # indices in the order to write, int64 [rows]; None keeps all in place
    columns: np.ndarray | None = None  # likewise, of the last axis
    # Changes the chosen values, float32 to float32; elementwise unless `shape` is given.
    values: Callable[[np.ndarray], np.ndarray] | None = None
    # Shape of the tensor in the file, if not that of the chosen rows and columns.
    shape: tuple[int, ...] | None = None
    part: int | None = None  # position in a tensor that stacks several parameters along a new first axis
    full_precision: bool = False  # whether llama.cpp needs float32
    # Parameter with a factor for the output of each expert. llama.cpp does not apply it to the output of a LoRA.
    expert_scale: str | None = None
    ignores_lora: bool = False  # whether llama.cpp would load a LoRA of the tensor without applying it

    @property
    def takes_lora(self) -> bool:
        """Whether a LoRA of the parameter is one of the tensor: it has the parameter's values, and LoRA is applied."""
        # A tensor of one axis stands for a matrix of one row.
        is_reshaped = self.shape is not None and len(self.shape) > 1
        return self.values is self.part is None and not is_reshaped and not self.ignores_lora


# (mlx-lm's ModelArgs, path of a parameter): the tensors made from it. None: see `Architecture.placements`.
Placements = Callable[[Any, str], list[Placement] | None]


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder row indices [heads * d] from halves (i, i + d/2) to pairs (2i, 2i + 1) within each head."""
    return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def negative_exp(values: np.ndarray) -> np.ndarray:
    """Return -exp(values): of a state's decay, mlx-lm stores log(-A) and llama.cpp A."""
    return -np.exp(values)


def layer_and_rest(path: str) -> tuple[int, str]:
    """Split the path of a layer's parameter into the layer's number and the rest; -1 and the path for others."""
    match = re.match(r"(?:model|backbone|transformer)\.(?:(?:layers|blocks)\.)+(\d+)\.(.+)", path)
    return (int(match[1]), match[2]) if match else (-1, path)


# Names outside the layers that most models share.
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def renamed(
    names: Mapping[str, str], *, offset: float = 0.0, without_lora: Collection[str] = ()
) -> Placements:
    """Return a function that gives parameters other names. Biases stay float32, also those of experts.

    It returns None for a parameter without another name.

    Args:
        names: path inside a layer, or whole path outside the layers -> GGUF's name, inside the block for a layer. Both
            are without the last part (`weight`, `bias`), or both with it.
        offset: what is added to the weights of norms.
        without_lora: paths, as in `names`, for which llama.cpp does not apply adapters.
    """
    names = {**_OUTSIDE, **names}

    def placements(args: Any, path: str) -> list[Placement] | None:
        layer, inside = layer_and_rest(path)
        stem, _, leaf = inside.rpartition(".")
        name = names.get(inside) or (f"{names[stem]}.{leaf}" if stem in names else None)
        if name is None:
            return None
        shifts = offset and stem.endswith("norm")
        placement = Placement(
            name if layer < 0 else f"blk.{layer}.{name}",
            values=(lambda array: array + np.float32(offset)) if shifts else None,
            full_precision=name.endswith(".bias"),
            ignores_lora=stem in without_lora,
        )
        return [placement]

    return placements
