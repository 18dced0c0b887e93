"""Checks of the data: every row is read, many are tokenized, and of a few it is shown what is trained on."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.text import Text

from nalora_mlx.core.config import DPO, ORPO, SFT, RunConfig
from nalora_mlx.core.errors import InputError, counted, merged
from nalora_mlx.core.notices import Note
from nalora_mlx.core.terminal import drawable, has_colors, marked_text

if TYPE_CHECKING:
    from nalora_mlx.data.checks import RunData
    from nalora_mlx.data.preferences import TokenizedRow
    from nalora_mlx.data.rows.formats import Row
    from nalora_mlx.data.tokenization import Split
    from nalora_mlx.doctor.model import LoadedModel
    from nalora_mlx.doctor.page import Page
    from nalora_mlx.models.vision.processor import VisionProcessor

MOST_PROBLEMS = 100  # to show, and places of each
QUICK_CHARACTERS = 2_000_000  # of each split to tokenize in a quick look: a second or two
TEMPLATE_CHARACTERS = 200  # that a chat template adds to a row, about
IMAGE_CHARACTERS = 10_000  # that take about as long as an image
MASKED_ROWS = 2  # to show if --show-masks is not given
HEAD, TAIL = 40, 80  # characters at the ends of a long piece of text to show then


def read(page: "Page", config: RunConfig) -> "RunData":
    """Read the rows. If they are preference rows and no train mode was given, set the train mode to dpo.

    Raises:
        InputError: there are none.
    """
    with page.working("reading the data"):
        from nalora_mlx.data.checks import read_rows
        from nalora_mlx.data.sources.loading import SPLITS

        names = [name for name in SPLITS if name != "test" or not config.hf_dataset]
        found = read_rows(config, names, all_needed=False)
        if not found.problems or "train_mode" in config.given:
            return found
        config.train_mode = DPO
        compared = read_rows(config, names, all_needed=False)
        if _count(compared) <= _count(found):
            config.train_mode = SFT
            return found
        note = "preference rows: --train-mode dpo (or orpo, simpo, kto) trains on them; checked as for dpo"
        compared.notices.insert(0, Note(note))
        return compared


def _count(rows: "RunData") -> int:
    return sum(len(found) for splits in rows.sources for found in splits.values())


def count_rows(page: "Page", rows: "RunData") -> None:
    """Report how many rows there are, without a tokenizer."""
    counts: dict[str, int] = {}
    for splits in rows.sources:
        for name, found in splits.items():
            counts[name] = counts.get(name, 0) + len(found)
    text = ", ".join(f"{counted(count, 'row')} for {name}" for name, count in counts.items() if count)
    if text:
        page.note(f"{text}; --model M shows their tokens and what is trained on")


def check_tokens(
    page: "Page", rows: "RunData", loaded: "LoadedModel", config: RunConfig, all_rows: bool
) -> "list[TokenizedRow]":
    """Tokenize the rows; report truncated and omitted rows and lengths. Return the training examples.

    Args:
        page: to print on.
        rows: as `read` returned them.
        loaded: the model.
        config: settings of the run.
        all_rows: tokenize all rows. Otherwise, of large data, a part that has the longest rows.
    """
    from nalora_mlx.data.checks import images_refused, tokenize
    from nalora_mlx.models.context_length import context_notices
    from nalora_mlx.models.vision.loading import sees_images
    from nalora_mlx.training.chats import configure_run_chats
    from nalora_mlx.training.schedules import length_notices

    if rows.has_images and loaded.processor is None:
        print_all(page, images_refused(rows), [])
        return []
    configure_run_chats(config, loaded.tokenizer, None, page.notice)
    if not sees_images(loaded.config):
        print_all(page, images_refused(rows), [])
        sources = [
            {name: [row for row in found if not row.images] for name, found in splits.items()}
            for splits in rows.sources
        ]
        rows = replace(rows, sources=sources)
    if not all_rows:
        rows = _sampled(page, rows)
    with page.working("tokenizing the data"):
        splits: dict[str, Split] = tokenize(rows, loaded.tokenizer, config.max_seq_length, loaded.processor)
    for split in splits.values():
        print_all(page, split.errors, split.notices)
    header, *lines = _table({name: split for name, split in splits.items() if split.sequences})
    if lines:
        page.plain(Text(header, "dim"))
    for line in lines:
        page.ok(line)
    if loaded.processor is not None:
        _describe_images(page, rows, loaded.processor)
    chats = any(row.messages for dataset in rows.sources for found in dataset.values() for row in found)
    if chats and not config.mask_prompt and config.train_mode in (SFT, ORPO):
        page.note("prompts are trained on too; --mask-prompt trains on the answers only")
    print_all(page, [], context_notices(splits, loaded.config) + length_notices(config, splits))
    return list(splits["train"].sequences)


def _describe_images(page: "Page", rows: "RunData", processor: "VisionProcessor") -> None:
    """Report how many tokens the images of the rows become."""
    counts = []
    for row in (row for splits in rows.sources for found in splits.values() for row in found):
        for image in row.images:
            with suppress(InputError):  # reported already
                tokens = processor.tokens_of(image, row.source).tokens
                counts.append(sum(token in processor.token_ids for token in tokens))
    if counts:
        counts.sort()
        low, middle, high = counts[0], counts[len(counts) // 2], counts[-1]
        each = (
            f"{low:,} tokens each" if low == high else f"{low:,} to {high:,} tokens each, median {middle:,}"
        )
        page.ok(f"{counted(len(counts), 'image')}, {each}")


def show_masks(page: "Page", examples: "Sequence[TokenizedRow]", tokenizer: Any, config: RunConfig) -> None:
    """Show the supervised parts of training rows: of as many as --show-masks says in full, or of a few in short."""
    from nalora_mlx.data.summary import mask_pieces, titled_sequences

    is_short = "show_masks" not in config.given
    shown = examples[: MASKED_ROWS if is_short else config.show_masks]
    colors = has_colors(page.console)
    if shown:
        how = "bold green" if colors else f"in {drawable('⟦ ⟧', '[[ ]]')}"
        page.note(f"what is trained on is {how}{'; --show-masks N shows whole rows' if is_short else ''}")
    for example in shown:
        for title, sequence in titled_sequences(example).items():
            pieces = mask_pieces(sequence, tokenizer)
            if is_short:
                pieces = [(_shortened(text), supervised) for text, supervised in pieces]
            page.plain(marked_text(title, pieces, colors))


def print_all(page: "Page", problems: list[str], notices: list[str]) -> None:
    """Print problems, merged if they are alike, and notices."""
    for problem in merged(problems, MOST_PROBLEMS):
        page.problem(problem)
    for notice in notices:
        page.notice(notice)


def _shortened(text: str) -> str:
    """Return a text on one line, without the middle of a long one."""
    text = text.replace("\n", drawable("↵", "\\n"))
    return text if len(text) <= HEAD + TAIL + 20 else f"{text[:HEAD]} {drawable('…', '...')} {text[-TAIL:]}"


def _table(splits: "dict[str, Split]") -> list[str]:
    """Return a header and a line for each split: rows, tokens, the supervised share, and lengths."""
    from nalora_mlx.data.summary import length_statistics

    rows = [["", "rows", "sequences", "tokens", "supervised", "shortest", "median", "95%", "longest"]]
    for name, split in splits.items():
        found = length_statistics(split.sequences)
        share = f"{found['supervised'] / found['tokens']:.0%}"
        lengths = (found[key] for key in ("shortest", "median", "p95", "longest"))
        numbers = [split.rows, found["sequences"], found["tokens"]]
        rows.append([name, *(f"{number:,}" for number in numbers), share, *(f"{n:,}" for n in lengths)])
    if all(row[1] == row[2] for row in rows[1:]):
        rows = [row[:2] + row[3:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _sampled(page: "Page", rows: "RunData") -> "RunData":
    """Return data with some rows of each large split, and report how many."""
    sources = []
    for splits in rows.sources:
        chosen = {
            name: sample(found, QUICK_CHARACTERS // len(rows.sources)) for name, found in splits.items()
        }
        for name, found in splits.items():
            if len(chosen[name]) < len(found):
                page.note(
                    f"{name}: {len(chosen[name]):,} of {counted(len(found), 'row')} tokenized, with the longest ones; "
                    "--memory takes all of them"
                )
        sources.append(chosen)
    return replace(rows, sources=sources)


def sample(rows: "Sequence[Row]", characters: int) -> "list[Row]":
    """Return rows with about as many characters in all, in their order; all rows if they have fewer.

    1. Leave out rows that alone have more than a quarter of the characters.
    2. Take the longest rows, up to a quarter of the characters.
    3. Fill up with rows at equal distances.
    """
    sizes = [
        TEMPLATE_CHARACTERS
        + len(row.text)
        + sum(len(str(message)) for message in [*row.messages, *(row.rejected or ())])
        + IMAGE_CHARACTERS * len(row.images)
        for row in rows
    ]
    if sum(sizes) <= characters:
        return list(rows)
    left = characters // 4
    usable = [i for i, size in enumerate(sizes) if size <= left]
    if not usable:
        return [rows[sizes.index(min(sizes))]]
    step = max(1, round(sum(sizes[i] for i in usable) / (characters - left)))
    chosen = set(usable[::step])
    for i in sorted(usable, key=sizes.__getitem__, reverse=True):
        left -= sizes[i]
        if left < 0:
            break
        chosen.add(i)
    return [rows[i] for i in sorted(chosen)]
