"""A vision-language model of mlx-vlm, called like a model of mlx-lm."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from nalora_mlx.core.errors import InputError

# What `get_input_embeddings` may return besides embeddings, if the language model takes it from there.
_SUPPORTED = {
    *("inputs_embeds", "position_ids", "rope_deltas", "per_layer_inputs"),
    *("visual_pos_masks", "deepstack_visual_embeds"),
    "attention_mask_4d",  # no language model of mlx-vlm reads it
}
# By cross-attention or with positions of pixels, to an encoder, or to a model that generates by diffusion.
_REFUSED = {"diffusion_gemma", "falcon_ocr", "florence2", "mllama", "nemotron_parse"}
PROMPT = "prompt"  # in `media`: 1 for the tokens before the answer; [B, L]
_NOT_ARGUMENTS = {"features", "index", "inputs", "deepstack", PROMPT}  # of `media`


class VisionLanguageModel:
    """Mixed into a class of mlx-vlm: the model as a function of tokens and, optionally, of images.

    Everything but the call is mlx-vlm's own, so its generation works with the model as well.
    """

    @property
    def args(self: Any) -> Any:
        """Settings of the language model."""
        return getattr(self.config, "text_config", self.config)

    @property
    def reads_prompts_at_once(self: Any) -> bool:
        """Whether each token of a prompt sees the whole prompt, as in PaliGemma. Answers are causal."""
        return getattr(self.args, "use_bidirectional_attention", None) is True

    def __call__(self: Any, tokens: mx.array, media: Mapping[str, Any] | None = None) -> mx.array:
        """Return the logits [B, L, V] that mlx-vlm computes when it reads a prompt.

        Args:
            tokens: token ids; [B, L].
            media: what images add, see `data.media_batches.collate_media`; None for text alone.
        """
        media = media or {}
        embed = self._embed_images if "inputs" in media else self._place_features
        arguments = embed(tokens, media)
        aligned = {name: array for name, array in media.items() if name not in _NOT_ARGUMENTS}
        if "position_ids" not in aligned and hasattr(self.language_model, "get_rope_index"):
            batch, length = tokens.shape
            aligned["position_ids"] = mx.broadcast_to(mx.arange(length), (3, batch, length))
        if PROMPT in media:  # else the tokens are a prompt
            aligned["mask"] = _prefix_mask(media[PROMPT])
        logits: mx.array = self.language_model(tokens, **arguments, **aligned).logits
        return logits

    def _place_features(self: Any, tokens: mx.array, media: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the language model for features that were computed before."""
        text = self.get_input_embeddings(tokens)
        arguments = {"inputs_embeds": text.inputs_embeds}
        if text.per_layer_inputs is not None:
            arguments["per_layer_inputs"] = text.per_layer_inputs
        if "features" in media:
            is_image, at = (media["index"] >= 0)[..., None], mx.maximum(media["index"], 0)
            features = as_floats(media["features"])[at]
            arguments["inputs_embeds"] = mx.where(is_image, features, text.inputs_embeds)
            if "deepstack" in media:  # [N, K, D] -> [K, B, L, D], see _add_features
                placed = mx.where(is_image[..., None], as_floats(media["deepstack"])[at], 0)
                arguments["deepstack_visual_embeds"] = placed.transpose(2, 0, 1, 3)
                arguments["visual_pos_masks"] = is_image[..., 0]
        return arguments

    def _embed_images(self: Any, tokens: mx.array, media: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the language model for images that go through the towers now, row by row."""
        rows: list[dict[str, Any]] = []
        for i, inputs in enumerate(media["inputs"]):
            row = tokens[i : i + 1]
            with differentiable_assignments():
                given = self.get_input_embeddings(row, mask=mx.ones_like(row), **(inputs or {}))
            check_embeddings(self, given)
            rows.append({name: value for name, value in given.to_dict().items() if value is not None})
        arguments: dict[str, Any] = {"inputs_embeds": mx.concatenate([row["inputs_embeds"] for row in rows])}
        if any("per_layer_inputs" in row for row in rows):
            arguments["per_layer_inputs"] = mx.concatenate([row["per_layer_inputs"] for row in rows])
        if any("deepstack_visual_embeds" in row for row in rows):
            masks = [row.get("visual_pos_masks", mx.zeros(tokens[:1].shape, mx.bool_)) for row in rows]
            layers = [row["deepstack_visual_embeds"] for row in rows if "deepstack_visual_embeds" in row]
            arguments["visual_pos_masks"] = mx.concatenate(masks)
            arguments["deepstack_visual_embeds"] = [
                mx.concatenate(list(parts)) for parts in zip(*layers, strict=True)
            ]
        return arguments


@contextmanager
def differentiable_assignments() -> Iterator[None]:
    """Make `array[:, indices, :] = values` differentiable for a list of indices, with which MLX's gradient fails.

    Some models of mlx-vlm put image features into embeddings with it.
    """
    original = mx.array.__setitem__

    def assign(array: mx.array, index: Any, value: Any) -> None:
        if isinstance(index, tuple) and len(index) == 3 and isinstance(index[1], list):
            before, indices, after = index
            if indices and before == after == slice(None):
                index = (before, mx.array(indices))
        original(array, index, value)

    mx.array.__setitem__ = assign  # type: ignore[method-assign]
    try:
        yield
    finally:
        mx.array.__setitem__ = original  # type: ignore[method-assign]


def as_bits(array: mx.array) -> np.ndarray:
    """Return an array for NumPy, which has no bfloat16: its bits as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def as_floats(array: mx.array) -> mx.array:
    """Return the array that `as_bits` was given."""
    return array.view(mx.bfloat16) if array.dtype == mx.uint16 else array


def check_type(kind: object) -> None:
    """Refuse a `model_type` whose models are known to read images in a way that `VisionLanguageModel` does not know.

    Raises:
        InputError: it is one of them.
    """
    if kind in _REFUSED:
        raise _refused(str(kind))


def _refused(kind: str) -> InputError:
    return InputError(
        f"models of type {kind} do not pass their images to a language model as embeddings, and cannot be trained on "
        "images; use another model"
    )


@cache
def _vision_class(base: Any) -> type:
    return type(base.__name__, (VisionLanguageModel, base), {})


def as_vision_language_model(model: nn.Module) -> nn.Module:
    """Make a model of mlx-vlm callable like a model of mlx-lm, in place.

    Raises:
        InputError: the model is not made of embeddings that a language model reads.
    """
    if not all(hasattr(model, name) for name in ("language_model", "get_input_embeddings", "layers")):
        raise _refused(model_type(model))
    model.__class__ = _vision_class(cast(Hashable, type(model)))
    transformer: Any = getattr(model.language_model, "model", None)
    if hasattr(transformer, "_deepstack_process"):
        transformer._deepstack_process = _add_features(transformer._deepstack_process)
    if hasattr(transformer, "_apply_blockwise_bidirectional_overlay"):
        transformer._make_masks = _make_masks(transformer)
    return model


def is_vision_language_model(model: nn.Module) -> bool:
    """Return whether a model is one of mlx-vlm."""
    return any(base.__module__.startswith("mlx_vlm.") for base in type(model).__mro__)


def trains_towers(model: nn.Module) -> bool:
    """Return whether a vision-language model has trainable parameters outside its language model."""
    return is_vision_language_model(model) and any(
        not path.startswith("language_model.") for path, _ in tree_flatten(model.trainable_parameters())
    )


def model_type(model: nn.Module) -> str:
    """Return the model_type of a model of mlx-vlm."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__module__.split(".")[-2]))


def check_embeddings(model: nn.Module, given: Any) -> None:
    """Refuse a model whose images reach the language model in a way that `VisionLanguageModel` does not know.

    Args:
        model: for the message.
        given: what `get_input_embeddings` returned for images.

    Raises:
        InputError: names what is not supported.
    """
    names = {name for name, value in given.to_dict().items() if value is not None} - _SUPPORTED
    if names:
        raise InputError(
            f"models of type {model_type(model)} pass their images on as {', '.join(sorted(names))}, which training "
            "does not support; use another model"
        )


def _add_features(original: Any) -> Any:
    """Return Qwen3-VL's addition of image features to hidden states, with a form that can be compiled.

    The original looks for the images in the values of the mask. The other form takes features [B, L, D] with zeros for
    text.
    """

    def add(hidden: mx.array, mask: mx.array, features: mx.array) -> mx.array:
        if features.ndim == 3:
            return hidden + features
        result: mx.array = original(hidden, mask, features)
        return result

    return add


def _make_masks(transformer: Any) -> Any:
    """Return Gemma 4's `_make_masks` with a form that can be compiled, for rows without a cache.

    The original looks for images in the values of the token types. Without images, the two give the same masks.
    """
    original = transformer._make_masks

    def make(hidden: mx.array, cache: Sequence[Any], token_types: mx.array | None = None) -> list[Any]:
        sees_whole_images = getattr(transformer.config, "use_bidirectional_attention", None) == "vision"
        if token_types is None or any(entry is not None for entry in cache):
            masks: list[Any] = original(hidden, cache, token_types)
            return masks
        if not sees_whole_images:
            return list(original(hidden, cache))
        windows = {"full_attention": None, "sliding_attention": transformer.window_size}
        overlaid = {
            kind: transformer._apply_blockwise_bidirectional_overlay(
                _causal_mask(hidden.shape[1], window), token_types
            )
            for kind, window in windows.items()
        }
        return [overlaid[layer.layer_type] for layer in transformer.layers]

    return make


def _causal_mask(length: int, window: int | None = None) -> mx.array:
    """Return which positions [L, L] see which: themselves and the ones before them, at most `window`."""
    positions = mx.arange(length)
    distances = positions[:, None] - positions[None]
    seen = distances >= 0
    return seen if window is None else seen & (distances < window)


def _prefix_mask(prompt: mx.array) -> mx.array:
    """Return a mask [B, 1, L, L] with which all tokens see the whole prompt, and answers are causal."""
    return _causal_mask(prompt.shape[1])[None, None] | (prompt > 0)[:, None, None]
