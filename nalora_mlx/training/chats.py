"""How a run renders chats: as its settings say, at the date of its first start."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import mlx.core as mx

from nalora_mlx.adapters.files import ADAPTER_CONFIG, read_chat_settings
from nalora_mlx.core.config import RunConfig
from nalora_mlx.models.chat_templates import (
    ChatSettings,
    choose_settings,
    configure_chat_template,
    reads_date,
)
from nalora_mlx.training.distributed import workers


def configure_run_chats(
    config: RunConfig, tokenizer: Any, start: Path | None, note: Callable[[str], None]
) -> ChatSettings:
    """Make a tokenizer render chats as a run does; return the settings to save with its adapter.

    Settings that are not given are those of the adapter that the run starts from or evaluates. The date is that of a
    resumed or evaluated run, else the current one. It is None if the template does not print it.

    Args:
        config: settings of the run.
        tokenizer: tokenizer wrapper of mlx-lm; changed in place.
        start: checkpoint to resume from, or file of adapter weights to start from; None for neither.
        note: called with each notice.

    Raises:
        InputError: there is no such template, or it is not valid, or an adapter's settings are not.
    """
    adapter = _adapter(config, start)
    saved = None if adapter is None else read_chat_settings(adapter)
    # A resumed run takes all settings as given, and the checkpoint shows whether they are the same.
    trained = saved if config.resume is None else None
    settings, notices = choose_settings(tokenizer, config.chat_template, config.chat_template_args, trained)
    configure_chat_template(tokenizer, settings)
    if reads_date(tokenizer):
        continued = config.resume is not None or not config.train
        settings = replace(settings, date=saved.date if saved and continued else _now())
        notices += configure_chat_template(tokenizer, settings)
    for notice in notices:
        note(notice)
    return settings


def _adapter(config: RunConfig, start: Path | None) -> Path | None:
    """Return the directory of the adapter that a run starts from or evaluates, if it has a config."""
    if start is not None:
        directory = start if start.is_dir() else start.parent
        return directory if (directory / ADAPTER_CONFIG).exists() else None
    if config.train or not config.adapter_path:
        return None
    return Path(config.adapter_path).expanduser()


def _now() -> str:
    """Return the local date and time, the same on all workers."""
    world = workers()
    now = datetime.now().replace(microsecond=0)
    parts = mx.array([now.year, now.month, now.day, now.hour, now.minute, now.second])
    parts = world.sum(parts if world.rank == 0 else mx.zeros_like(parts))
    return datetime(*parts.tolist()).isoformat()
