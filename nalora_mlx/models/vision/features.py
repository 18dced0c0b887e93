"""Features of images: what the frozen towers make of them, computed once per image and kept on disk."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.data.media import RowMedia
from nalora_mlx.data.tokenization import Example
from nalora_mlx.models.vision.model import PROMPT, as_bits, check_embeddings
from nalora_mlx.models.vision.processor import TOKEN_TYPES, ImageTokens, VisionProcessor

FOLDER = "image_features"  # in a run's directory
Show = Callable[[int, int], None]  # takes the number of images that are done, and of all of them
_KEPT_INPUTS = 32  # rows whose processed images are kept in memory while the towers are trained


@dataclass(frozen=True)
class StoredFeatures:
    """The features of an image in a file; implements `data.media.Features`."""

    path: Path

    def load(self) -> dict[str, np.ndarray]:
        """Read them: "features" [n, D], and "deepstack" [n, K, D] of models that add features to later layers.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            return dict(load_file(self.path))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{self.path}: cannot be read ({first_line(error)}); remove the file, and continue with --resume"
            ) from None


@dataclass(frozen=True)
class ProcessedImages:
    """What the processor makes of a row's images; implements `data.media.Features`."""

    read: Callable[[], dict[str, Any]]

    def load(self) -> dict[str, Any]:
        """Process the images."""
        return self.read()


class ImageEncoder:
    """Gives examples with images what a batch needs of them.

    Args:
        model: as `open_vision_model` returns it, possibly with adapters.
        processor: of the model.
        directory: where features are kept.
        trained: whether the towers or the projector are trained. Pixels then go into each step.
    """

    def __init__(self, model: Any, processor: VisionProcessor, directory: Path, trained: bool = False):
        self.model, self.processor, self.directory, self.trained = model, processor, directory, trained
        self._fingerprint = ""
        self._references: dict[
            str, tuple[tuple[Any, ...], str]
        ] = {}  # digest -> images, and the source of a row
        self._inputs = lru_cache(_KEPT_INPUTS)(self._read_inputs)

    def attach(self, examples: Sequence[Example], show: Show = lambda done, of: None) -> list[Example]:
        """Return the examples, those with images with their `media`.

        Args:
            examples: as tokenized.
            show: called with the number of images that are done, and of all of them.

        Raises:
            InputError: an image cannot be read, its features do not fit its tokens, or they cannot be written.
        """
        if not self.trained:
            self._encode_missing(examples, show)
        return [replace(row, media=self._media(row)) for row in examples]

    # --- features -----------------------------------------------------------------------------------------------

    def _encode_missing(self, examples: Iterable[Example], show: Show) -> None:
        images: dict[str, tuple[Any, str, ImageTokens]] = {}
        for row in examples:
            for reference in row.images:
                tokens = self.processor.tokens_of(reference, row.source)
                images.setdefault(tokens.digest, (reference, row.source, tokens))
        missing = [entry for entry in images.values() if not _is_complete(self._path(entry[2]))]
        for done, (reference, source, tokens) in enumerate(missing):
            show(len(images) - len(missing) + done, len(images))
            arrays = self.encode(reference, source, tokens)
            path = self._path(tokens)
            try:
                storage.write_file(path, partial(_write_arrays, arrays))
            except OSError as error:
                raise InputError(
                    f"{path}: the features of an image cannot be written ({error.strerror}); free some disk space, "
                    "or choose another --adapter-path"
                ) from None
        show(len(images), len(images))

    def encode(self, reference: Any, source: str, tokens: ImageTokens) -> dict[str, np.ndarray]:
        """Return the features of an image, see `StoredFeatures.load`.

        Raises:
            InputError: the image cannot be read, or its features do not fit its tokens.
        """
        return self._run_towers(tokens.tokens, self.processor.inputs([reference], source), source)

    def _run_towers(self, tokens: Sequence[int], given: dict[str, Any], source: str) -> dict[str, np.ndarray]:
        training = self.model.training
        self.model.eval()
        ids = np.array([tokens])
        inputs = {name: as_mx(value) for name, value in given.items()}
        mask = mx.ones(ids.shape, mx.int32)
        try:
            output = self.model.get_input_embeddings(mx.array(ids), mask=mask, **inputs)
        except ValueError as error:
            raise InputError(
                f"{source}: the model's vision tower fails on an image ({first_line(error)}); "
                "resize it, or remove the row"
            ) from None
        finally:
            self.model.train(training)
        check_embeddings(self.model, output)
        positions = np.flatnonzero(np.isin(ids[0], list(self.processor.token_ids)))
        if not positions.size:
            raise InputError(f"{source}: the model's processor makes no image tokens of an image")
        features = {"features": output.inputs_embeds[0][mx.array(positions)]}
        layers = output.deepstack_visual_embeds
        if layers is not None:
            features["deepstack"] = mx.stack(list(layers), axis=1)
        mx.eval(features)
        if any(len(array) != len(positions) for array in features.values()):
            raise InputError(f"{source}: {len(positions)} tokens of an image, and features of other number")
        return {name: as_bits(array) for name, array in features.items()}

    def _path(self, tokens: ImageTokens) -> Path:
        return self.directory / FOLDER / f"{self._key(tokens)}.safetensors"

    def _key(self, tokens: ImageTokens) -> str:
        """Return a hash of an image and its tokens, the processor's settings, and the towers."""
        if not self._fingerprint:
            self._fingerprint = self.processor.fingerprint + self._tower_fingerprint()
        text = f"{tokens.digest} {tokens.tokens} {self._fingerprint}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _tower_fingerprint(self) -> str:
        """Return a hash of the features of one fixed picture, which any other weights or settings would change."""
        from PIL import Image

        y, x = np.mgrid[0:64, 0:64]
        picture = Image.fromarray(np.stack([x * 4, y * 4, (x * y) % 256], axis=-1).astype(np.uint8))
        tokens = self.processor.tokens_of(picture, "a test picture").tokens
        given = self.processor.inputs([picture], "a test picture")
        features = self._run_towers(tokens, given, "a test picture")
        return hashlib.sha256(b"".join(features[name].tobytes() for name in sorted(features))).hexdigest()

    # --- rows ---------------------------------------------------------------------------------------------------

    def _media(self, row: Example) -> RowMedia | None:
        """Return what a row needs besides its tokens; None if it has no image, or ends before the first one."""
        positions = np.flatnonzero(np.isin(row.tokens, list(self.processor.token_ids))).astype(np.int32)
        images, count = [], 0
        for reference in row.images:
            if count >= len(positions):
                break  # the row is a beginning of the chat
            images.append(tokens := self.processor.tokens_of(reference, row.source))
            count += sum(token in self.processor.token_ids for token in tokens.tokens)
        if count != len(positions):
            raise InputError(
                f"{row.source}: {len(positions)} tokens of images, and features of {count}; remove the texts that the "
                "model's tokenizer reads as image tokens"
            )
        aligned = self._aligned(row, images, positions)
        if not (images or aligned):
            return None
        references = row.images[: len(images)]
        digest = " ".join(tokens.digest for tokens in images)
        if self.trained and images:
            self._references[digest] = references, row.source
            inputs = ProcessedImages(partial(self._inputs, digest))
            return RowMedia(positions, (), aligned, inputs, digest)
        features = tuple(StoredFeatures(self._path(tokens)) for tokens in images)
        return RowMedia(positions, features, aligned, None, digest)

    def _read_inputs(self, digest: str) -> dict[str, Any]:
        references, source = self._references[digest]
        now = " ".join(self.processor.tokens_of(image, source).digest for image in references)
        if now != digest:
            raise InputError(f"{source}: an image has changed since the run began; start again")
        return self.processor.inputs(references, source)

    def _aligned(
        self, row: Example, images: Sequence[ImageTokens], positions: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return the arrays with an entry for each token that `VisionLanguageModel` takes."""
        aligned = {}
        if self.model.reads_prompts_at_once:
            first = int(np.argmax(row.loss_mask))
            aligned[PROMPT] = (np.arange(len(row.tokens)) < first).astype(np.int32)
        if not images:
            return aligned
        language_model: nn.Module = self.model.language_model
        arrays = images[0].arrays
        if hasattr(language_model, "get_rope_index") and "image_grid_thw" in arrays:
            grids = mx.array(np.concatenate([tokens.arrays["image_grid_thw"] for tokens in images]))
            ids = mx.array(row.tokens)[None]
            position_ids, _ = language_model.get_rope_index(ids, grids, None, mx.ones_like(ids))
            aligned["position_ids"] = np.array(position_ids)[:, 0].astype(np.int32)
        for name in TOKEN_TYPES:
            if name in arrays and arrays[name].any():
                kinds = np.zeros(len(row.tokens), np.int32)
                kinds[positions] = arrays[name].max()
                aligned[name] = kinds
        return aligned


def _is_complete(path: Path) -> bool:
    """Return whether a file of features is as long as its header says."""
    try:
        with safe_open(path, "np") as file:
            return "features" in file.keys()  # noqa: SIM118  (it is no mapping)
    except (OSError, SafetensorError):
        return False


def _write_arrays(arrays: dict[str, np.ndarray], path: Path) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def as_mx(value: Any) -> Any:
    """Return NumPy arrays, also in lists, as arrays of MLX."""
    if isinstance(value, np.ndarray):
        return mx.array(value)
    if isinstance(value, list | tuple) and value and isinstance(value[0], np.ndarray):
        return [mx.array(item) for item in value]
    return value
