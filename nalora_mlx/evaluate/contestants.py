"""The base model and its tuned versions, from one load of the base's weights."""

import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.nn as nn

from nalora_mlx.adapters.comparison import load_tuned
from nalora_mlx.adapters.files import check_adapter, read_chat_settings
from nalora_mlx.adapters.merge_record import twice_notice
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.checks import RunData
from nalora_mlx.data.tokenization import Example, Split
from nalora_mlx.models.loading import local_directory, slow_on_cpu_notice
from nalora_mlx.models.vision.processor import VisionProcessor
from nalora_mlx.runs.base_model import trained_model
from nalora_mlx.training.chats import configure_run_chats
from nalora_mlx.training.images import (
    encode_images,
    load_run_model,
    load_run_tokenizer,
    run_processor,
)

BASE = "base"


@dataclass
class Contestants:
    """A base model and what is needed to load adapters for it, one at a time.

    Attributes:
        config: model, chat template and the like.
        base: the base model, in evaluation mode and frozen.
        tokenizer: renders chats as in training.
        processor: of a vision-language model; None for a model of mlx-lm.
    """

    config: RunConfig
    base: nn.Module
    tokenizer: Any
    processor: VisionProcessor | None
    _features: Path | None = field(default=None, init=False)  # directory of the features of images

    def tuned(self, adapter: Path) -> nn.Module:
        """Return the base model with an adapter; it shares the arrays of the base.

        Raises:
            InputError: the adapter does not fit the model.
        """
        settings = self.config
        model = load_tuned(self.base, settings.model, adapter, settings.trust_remote_code, settings.quantize)
        _prepare(model)
        return model

    def with_images(self, model: nn.Module, examples: Sequence[Example]) -> list[Example]:
        """Return examples with what a model needs besides their tokens; of a model of mlx-lm, they stay as they are.

        Features of images are in a temporary directory as long as this object lives; batches read them from there.
        Models with the same vision tower share them. Texts need something, too, if the model attends both ways in
        prompts.
        """
        if self.processor is None:
            return list(examples)
        if self._features is None:
            self._features = Path(mkdtemp(prefix="nalora-"))
            weakref.finalize(self, shutil.rmtree, self._features, ignore_errors=True)
        split = Split([replace(example, media=None) for example in examples])
        encode_images(model, self.processor, {"test": split}, self._features, lambda *_: None)
        return split.sequences


def load_contestants(
    config: RunConfig, adapters: Sequence[Path], data: RunData, notify: Callable[[str], None]
) -> Contestants:
    """Load the base model and check adapters for it.

    Args:
        config: `adapter_path` is the first adapter, or empty without any.
        adapters: directories.
        data: the test rows, which decide whether the model is loaded with its vision tower.
        notify: called with notices.

    Raises:
        InputError: the model or an adapter cannot be loaded, or adapters were trained with different chat templates.
    """
    for adapter in adapters:
        check_adapter(adapter)
    _check_chats(adapters)
    if slow := slow_on_cpu_notice(config.model, config.quantize):
        notify(slow)
    processor = run_processor(config, data, notify)
    tokenizer = load_run_tokenizer(config, processor)
    configure_run_chats(config, tokenizer, None, notify)
    base, _ = load_run_model(config, processor, notify)
    _prepare(base)
    for adapter in adapters:
        if twice := twice_notice(config.model, local_directory(config.model), adapter):
            notify(twice)
        trained = trained_model(adapter)
        if trained is not None and Path(trained).name != Path(config.model).name:
            notify(f"{adapter} was trained on {trained}, and --model is {config.model}")
    return Contestants(config, base, tokenizer, processor)


def _prepare(model: nn.Module) -> None:
    model.eval()
    model.freeze()


def _check_chats(adapters: Sequence[Path]) -> None:
    """Raise InputError if adapters were trained with different chat templates: each would need its own questions."""
    settings = [replace(read_chat_settings(adapter), date=None) for adapter in adapters]
    for adapter, found in zip(adapters, settings, strict=True):
        if found != settings[0]:
            raise InputError(
                f"--adapter-path {adapter}: trained with another chat template than {adapters[0]}; evaluate them "
                "in two commands"
            )
