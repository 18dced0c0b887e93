"""General text, on which a tuned model shows what it has forgotten."""

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.data.checks import read_rows, tokenize
from nalora_mlx.data.sources.loading import numbered
from nalora_mlx.data.tokenization import Example, tokenize_split

SHIPPED = "general.jsonl"


def read_general_text(
    given: str | None, tokenizer: Any, config: RunConfig, notify: Callable[[str], None]
) -> list[Example]:
    """Return general text, all of whose tokens are scored; long texts in several parts.

    Args:
        given: value of --general: a file, directory or data set in any format of --data; None for the text that the
            package ships. The value none is not passed on.
        tokenizer: of the model.
        config: maximum length and chat template.
        notify: called with notices about the user's text.

    Raises:
        InputError: the text cannot be read.
    """
    if given is None:
        lines = (files("nalora_mlx.evaluate") / SHIPPED).read_text(encoding="utf-8").splitlines()
        rows = [{"text": json.loads(line)["text"]} for line in lines]
        named = [(f"{SHIPPED}:{number}", row) for number, (_, row) in enumerate(numbered(rows), 1)]
        return list(tokenize_split(named, tokenizer, max_seq_length=config.max_seq_length).sequences)
    settings = RunConfig(
        model=config.model, data=given, test=True, chunk=True, max_seq_length=config.max_seq_length
    )
    try:
        data = read_rows(settings, ["test"], unsplit="test")
        split = tokenize(data, tokenizer, config.max_seq_length)["test"]
    except InputError as error:
        raise InputError(str(error).replace("--data", "--general")) from None
    if problems := data.problems + split.errors:
        raise InputError(f"--general: {listed(problems)}")
    for notice in split.notices:
        notify(f"--general: {notice.removeprefix('test: ')}")
    return list(split.sequences)
