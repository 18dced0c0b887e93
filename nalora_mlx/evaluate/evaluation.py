"""One evaluation: the test rows and general text, measured on a base model and on its tuned versions."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nalora_mlx.adapters.files import ADAPTER_FILE
from nalora_mlx.adapters.merge_record import adapter_digest
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.data_entries import data_entries
from nalora_mlx.core.errors import InputError, counted, listed
from nalora_mlx.core.paths import distinct_names
from nalora_mlx.data.chats.chat_encoder import ChatEncoder
from nalora_mlx.data.checks import RunData, tokenize
from nalora_mlx.data.preferences import PreferenceExample
from nalora_mlx.evaluate import results
from nalora_mlx.evaluate.contestants import load_contestants
from nalora_mlx.evaluate.general_text import read_general_text
from nalora_mlx.evaluate.measurement import Measured, Measurer, OnProgress, TestSet
from nalora_mlx.evaluate.metrics import Metric
from nalora_mlx.evaluate.questions import (
    default_max_tokens,
    draw_rows,
    read_questions,
    require_expected,
)
from nalora_mlx.evaluate.settings import NONE, EvaluationSettings
from nalora_mlx.evaluate.split_rows import named_metrics, read_test_rows, with_defaults
from nalora_mlx.runs.evaluations import run_of


class Evaluation:
    """An evaluation.

    Args:
        config: of model and data; `data` may be empty.
        settings: what is measured.
        has_data: whether there is a test set.
        notify: called with notices.
        on_progress: see `Measurer`.

    Attributes:
        contestants: the models.
        test_set: what they are measured on.
        measurer: measures them.
        split: name of the split that the test rows are from.
        total: number of rows in it.
        base: what was measured of the base model.
        tuned: what was measured of the adapters that were compared with it, by name.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: EvaluationSettings,
        has_data: bool,
        notify: Callable[[str], None],
        on_progress: OnProgress,
    ):
        self.config, self.settings, self.has_data = config, settings, has_data
        self.notify, self.on_progress = notify, on_progress
        self.test_set = TestSet(batch_size=settings.batch_size)
        self.split, self.total = settings.split or "test", 0
        self.base: Measured | None = None
        self.tuned: dict[str, Measured] = {}

    def prepare(self, adapters: Sequence[Path]) -> None:
        """Read the rows, load the base model, and tokenize.

        Args:
            adapters: directories of adapters to check.

        Raises:
            InputError: rows, metrics, the model or an adapter cannot be used.
        """
        config, settings = self.config, self.settings
        metrics, data = list[Metric](), RunData(False)
        if self.has_data:
            metrics = named_metrics(settings)
            data, self.split = read_test_rows(config, settings.split, self.notify)
            self.total = draw_rows(data, self.split, settings.samples, settings.seed)
            if settings.answers:
                metrics = with_defaults(metrics, data, settings, self.split, self.notify)
        self.contestants = load_contestants(config, adapters, data, self.notify)
        if self.has_data:
            self._tokenize(data, metrics)
        if settings.general != NONE:
            tokenizer = self.contestants.tokenizer
            self.test_set.general = read_general_text(settings.general, tokenizer, config, self.notify)
        self.measurer = Measurer(self.contestants, self.test_set, self.notify, self.on_progress)

    def _tokenize(self, data: RunData, metrics: list[Metric]) -> None:
        settings, config, contestants, test = self.settings, self.config, self.contestants, self.test_set
        rows = tokenize(data, contestants.tokenizer, config.max_seq_length, contestants.processor)[self.split]
        if rows.errors:
            raise InputError(listed(rows.errors))
        for notice in rows.notices:
            self.notify(notice)
        # Of preference rows, the loss is that of the chosen answers.
        test.examples = [
            one.answers[0] if isinstance(one, PreferenceExample) else one
            for one in rows.sequences
            if not isinstance(one, PreferenceExample) or one.desirable
        ]
        if not settings.answers and settings.choices is None and not config.prefers:
            return
        encoder = ChatEncoder(contestants.tokenizer, True, True, contestants.processor)
        test.questions = read_questions(data, self.split, encoder, config, self.notify, settings.choices)
        test.metrics = metrics
        if not test.questions:
            if settings.metric:
                raise InputError(f"--metric: no row of {self.split} asks for an answer")
            self.notify(
                f"no row of {self.split} asks for an answer, as texts do not; only losses are compared"
            )
            test.metrics = []
        require_expected(test.questions, [metric.name for metric in test.metrics if metric.needs_expected])
        test.max_tokens = settings.max_tokens or default_max_tokens(test.questions)

    # --- results ------------------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        """Measure the base model; return the result so far.

        Raises:
            InputError: there is nothing to measure.
        """
        test = self.test_set
        if not test.examples and not test.questions and not test.general and self.settings.tasks is None:
            raise InputError(f"--data: no row of {self.split} can be measured; give other rows")
        self.base = self.measurer.measure(self.contestants.base)
        rows = len({example.source for example in self.test_set.examples})
        content = results.document(
            public_name(self.config.model),
            self.data_name,
            self.split,
            rows,
            self.total,
            self.test_set,
        )
        return content | {"settings": self._public_settings(), "base": self._measures(None)}

    def _public_settings(self) -> dict[str, Any]:
        """Return what was measured, without directories."""
        settings = vars(self.settings) | {
            name: getattr(self.config, name) for name in ("mask_prompt", "max_seq_length", "train_mode")
        }
        left_out = (
            "output",
            "show",
            "watch_checkpoints",
            "batch_size",
            "max_forgetting",
            "max_tokens",
            "split",
        )
        settings = {name: value for name, value in settings.items() if name not in left_out}
        settings["metric"] = [metric.name for metric in self.test_set.metrics]
        for name in ("general", "json_schema", "task_path"):
            if settings[name] is not None:
                settings[name] = public_name(settings[name])
        return {name: value for name, value in settings.items() if value is not None}

    def measure(self, adapter: Path) -> Measured:
        """Return what is measured of the base model with an adapter.

        Raises:
            InputError: the adapter does not fit the model.
        """
        return self.measurer.measure(self.contestants.tuned(adapter))

    def compare(self, adapter: Path, name: str) -> dict[str, Any]:
        """Return what is measured with an adapter, compared with the base, as JSON.

        Raises:
            InputError: the adapter does not fit the model.
        """
        digest = adapter_digest(adapter / ADAPTER_FILE)  # of the file that is read next
        tuned = self.tuned[name] = self.measure(adapter)
        assert self.base is not None
        entries = self._measures(tuned)
        records = results.answer_records(self.test_set, self.base, tuned)
        choices = results.choice_records(self.test_set, self.base, tuned)
        metric = next(iter(tuned.values), None)
        return {
            "name": name,
            "digest": digest,
            "measures": entries,
            "warning": results.forgetting(entries, self.settings.max_forgetting),
            "answers": records,
            "metric": metric,
            "changed": results.changed(records, metric) if metric else {"better": [], "worse": []},
            "choices": choices,
            "changed_choices": results.changed_choices(choices),
        }

    def between(self, name: str, other: str) -> list[dict[str, Any]]:
        """Return the measures of an adapter, compared with those of another one; the arguments are names."""
        dropped, seed = list(self.measurer.dropped), self.settings.seed
        entries = results.measures(self.test_set, self.tuned[other], self.tuned[name], dropped, seed)
        return [entry for entry in entries if "difference" in entry]

    def _measures(self, tuned: Measured | None) -> list[dict[str, Any]]:
        assert self.base is not None
        dropped = list(self.measurer.dropped)
        return results.measures(self.test_set, self.base, tuned, dropped, self.settings.seed)

    @property
    def data_name(self) -> str | None:
        """The names of the test sets, without directories; None without one."""
        if not self.test_set.examples:
            return None
        if self.config.hf_dataset:
            found = self.config.hf_dataset
            entries: Sequence[Mapping[str, Any]] = found if isinstance(found, list) else [found]
        else:
            entries = data_entries(self.config.data)
        return ", ".join(public_name(entry["path"]) for entry in entries)

    def title_of(self, metric: str) -> str:
        """Return the title of a metric of the answers."""
        return next(found.title for found in self.test_set.metrics if found.name == metric)


def public_name(name: str) -> str:
    """Return a name on the Hub as it is, and the last part of a path."""
    return Path(name).expanduser().absolute().name if os.path.exists(os.path.expanduser(name)) else name


def adapter_names(adapters: Sequence[Path]) -> list[str]:
    """Return short names of adapters: those of their runs, followed by "best" or a step."""
    found = [run_of(adapter) for adapter in adapters]
    runs = list(dict.fromkeys(run.expanduser() for run, _ in found))
    names = dict(zip(runs, distinct_names(runs), strict=True))
    return ["/".join(filter(None, (names[run.expanduser()], part))) for run, part in found]


def describe(test: TestSet) -> str:
    """Return what will be measured, in a line."""
    parts = []
    if test.examples:
        parts.append(f"loss of {counted(len(test.examples), 'sequence')}")
    if test.metrics:
        parts.append(
            f"{counted(len(test.questions), 'answer')} of at most {counted(test.max_tokens, 'token')}"
        )
    if test.general:
        parts.append(
            f"{counted(sum(text.supervised_tokens for text in test.general), 'token')} of general text"
        )
    return ", ".join(parts)
