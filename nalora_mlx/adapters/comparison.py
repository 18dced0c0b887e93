"""A base model and its tuned version in memory together, sharing the base's arrays."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_unflatten

from nalora_mlx.adapters.files import load_any_adapter
from nalora_mlx.adapters.merge import base_layer
from nalora_mlx.models.loading import local_directory, open_module, quantized
from nalora_mlx.models.vision.loading import open_vision_model
from nalora_mlx.models.vision.model import is_vision_language_model


def load_tuned(
    base: nn.Module,
    name: str,
    adapter: str | Path,
    trust_remote_code: bool = False,
    quantize: int | None = None,
) -> nn.Module:
    """Return a base model with an adapter; `base` itself stays unchanged and shares its arrays with the result.

    Args:
        base: the model that `load_model(name)` returned.
        name: directory or Hugging Face repo of the base model.
        adapter: directory of the adapter.
        trust_remote_code: run code that comes with the model.
        quantize: bits that the base model was quantized to when it was loaded; None if it was not.

    Raises:
        InputError: the adapter cannot be read, or does not fit the model.
    """
    tuned = share_weights(base, name, trust_remote_code, quantize)
    load_any_adapter(tuned, Path(adapter).expanduser())
    tuned.eval()
    return tuned


def share_weights(
    model: nn.Module, name: str, trust_remote_code: bool = False, quantize: int | None = None
) -> nn.Module:
    """Return a second model with the same arrays; changing the modules of one does not affect the other.

    The arguments are those of `load_tuned`.
    """
    # Lazy: the arrays in the files are never read.
    if is_vision_language_model(model):
        twin, _ = open_vision_model(name, trust_remote_code, quantize, lazy=True)
    else:
        twin, config = open_module(local_directory(name), trust_remote_code, name=name, lazy=True)
        twin, _ = quantized(twin, config, quantize, name)
    twin.update(model.parameters())
    return twin


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Replace every adapted layer with its base layer inside a `with` block, in place."""
    adapted = [(path, module) for path, module in model.named_modules() if "lora_a" in module]
    bases = [(path, base_layer(module)) for path, module in adapted]
    model.update_modules(tree_unflatten(bases))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(adapted))
