"""What `nalora evaluate` does: measures one model after the other, prints what it finds, and writes it at once."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.nn as nn
from rich.console import Console
from rich.text import Text

from nalora_mlx.core import storage
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError, RunError, listed
from nalora_mlx.core.locks import is_locked
from nalora_mlx.evaluate import results, table
from nalora_mlx.evaluate.checkpoints import WAIT, CheckpointRace
from nalora_mlx.evaluate.contestants import BASE
from nalora_mlx.evaluate.evaluation import Evaluation, adapter_name, describe
from nalora_mlx.evaluate.settings import EvaluationSettings
from nalora_mlx.runs.checkpoints import CHECKPOINTS, steps
from nalora_mlx.runs.display import Display
from nalora_mlx.runs.evaluations import evaluation_file, write_evaluation

PIPED_WIDTH = 160  # columns of a table, if output is piped


class Session:
    """One call of the command.

    Args:
        config: of model and data.
        settings: what is measured.
        adapters: directories.
        has_data: whether there is a test set.
        display: prints.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: EvaluationSettings,
        adapters: Sequence[Path],
        has_data: bool,
        display: Display,
    ):
        self.config, self.settings, self.adapters = config, settings, list(adapters)
        self.display = display
        self.doing, self.update = (
            "",
            lambda _: None,
        )  # what is being done, and a function that replaces the text
        self.evaluation = Evaluation(
            config, settings, has_data, lambda text: display.notices([text]), self._show_progress
        )
        self.written: list[Path] = []

    def run(self) -> None:
        """Measure, print and write.

        Raises:
            InputError: rows, metrics, models or adapters cannot be used.
            RunError: a metric failed on an answer; all else is written.
        """
        if self.settings.output is not None:
            _check_output(Path(self.settings.output).expanduser())
        with self._working(f"loading {self.config.model}"):
            self.evaluation.prepare(self.adapters)
        self.display.note(describe(self.evaluation.test_set))
        with self._working(f"measuring {BASE}"):
            self.content = self.evaluation.start()
        if self.settings.watch_checkpoints:
            self._watch(self.adapters[0].parent.parent)
        else:
            for adapter in self.adapters:
                self._measure(adapter)
            if not self.adapters:
                self._print(table.measures_table(self.content, None, self.content["base"]))
            if self.settings.tasks is not None:
                self._tasks()
        self._write()
        for path in self.written:
            self.display.note(f"written: {path}")
        if dropped := self.evaluation.measurer.dropped:
            raise RunError(f"{listed(list(dropped.values()))}; the other results are complete")

    # --- models -------------------------------------------------------------------------------------------------

    def _measure(self, adapter: Path) -> None:
        """Measure one adapter; print and write what was found."""
        name = adapter_name(adapter)
        with self._working(f"measuring {name}"):
            found = self.evaluation.compared(adapter, self.evaluation.measure(adapter))
            gc.collect()  # compiled functions refer to their model, which goes only with the cycle
        self.content["adapters"].append(found)
        self._print(table.measures_table(self.content, name, found["measures"]))
        for line in table.sentences(found["measures"]):
            self.display.note(line)
        if found["metric"] is not None:
            title = self.evaluation.title_of(found["metric"])
            for text in table.changes_text(found["answers"], found["changed"], title, self.settings.show):
                self._print(text)
        for line in table.cut_answers(found["answers"], self.content["max_tokens"]):
            self.display.notices([line])
        if found["warning"] is not None:
            self.display.note(f"warning: {found['warning']}")
        self._write()

    def _tasks(self) -> None:
        """Evaluate standard tasks; add what they give to the results of each adapter, and print it."""
        from nalora_mlx.evaluate.tasks import run_tasks

        settings, contestants = self.settings, self.evaluation.contestants

        def models() -> Iterator[tuple[str, nn.Module]]:
            yield BASE, contestants.base
            for adapter in self.adapters:
                yield adapter_name(adapter), contestants.tuned(adapter)

        assert settings.tasks is not None
        if contestants.processor is not None:
            raise InputError("--tasks: take models of mlx-lm, and this one is loaded through mlx-vlm")
        with self._working(f"tasks: {settings.tasks}"):
            found = run_tasks(
                models(),
                contestants.tokenizer,
                [name.strip() for name in settings.tasks.split(",") if name.strip()],
                task_path=None if settings.task_path is None else Path(settings.task_path).expanduser(),
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                batch_size=settings.batch_size,
                apply_chat_template=settings.chat_tasks,
                seed=settings.seed,
                notify=lambda text: self.display.notices([text]),
                on_progress=lambda name, done, count: self.update(f"tasks: {name} ({done:,} of {count:,})"),
            )
        entries = results.task_measures(found, None, settings.seed)
        self.content["base"] += entries
        if not self.adapters:
            self._print(table.measures_table(self.content, None, entries))
        for number, adapter in enumerate(self.adapters):
            entries = results.task_measures(found, number + 1, settings.seed)
            self.content["adapters"][number]["measures"] += entries
            self._print(table.measures_table(self.content, adapter_name(adapter), entries))
            for line in table.sentences(entries):
                self.display.note(line)

    def _watch(self, run: Path) -> None:
        """Measure the checkpoints of a run as they appear; print each, and at the end which is best."""
        race = CheckpointRace(self.evaluation)
        while True:
            ended = not is_locked(run)
            new = [step for step in steps(run / CHECKPOINTS) if step not in race.measured]
            for step in new:
                path = steps(run / CHECKPOINTS).get(step)
                with self._working(f"measuring step {step}"), suppress(FileNotFoundError):
                    if path is not None:
                        race.add(step, self.evaluation.measure(path))
                        gc.collect()
                if step in race.measured:
                    self.display.note(race.line(step))
                    self.content |= race.content()
                    self._write()
            if ended and not new:
                break
            if not new:
                time.sleep(WAIT)
        self._print(race.table())
        self.display.note(race.verdict())

    # --- output -------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write the result: to --output, or each adapter's to the directory of its run."""
        self.written = []
        if self.settings.output is not None:
            path = Path(self.settings.output).expanduser()
            self._write_file(path, self.content)
            return
        data, split = self.content["data"], self.content["split"]
        if self.settings.watch_checkpoints:
            path = evaluation_file(self.adapters[0].parent.parent, data, split)
            self._write_file(path.with_name(f"{path.stem}-checkpoints.json"), self.content)
            return
        for adapter, found in zip(self.adapters, self.content["adapters"], strict=False):
            self._write_file(evaluation_file(adapter, data, split), self.content | {"adapters": [found]})

    def _write_file(self, path: Path, content: dict[str, Any]) -> None:
        try:
            write_evaluation(path, content)
            self.written.append(path)
        except OSError as error:
            raise RunError(
                f"{path} could not be written ({error.strerror}); give another place with --output"
            ) from None

    def _print(self, renderable: Any) -> None:
        console, piped = self.display.console, not self.display.interactive
        if piped:  # a table should not be cut to a width that no terminal has
            console = Console(file=console.file, width=PIPED_WIDTH, highlight=False)
        with suppress(OSError):  # the terminal may be closed
            console.print(renderable, soft_wrap=piped and isinstance(renderable, Text))

    def _show_progress(self, what: str, done: int, count: int) -> None:
        self.update(f"{self.doing}: {what} ({done:,} of {count:,})")

    @contextmanager
    def _working(self, text: str) -> Iterator[None]:
        """Show what is being done while the context is open."""
        self.doing = text
        with self.display.waiting(text) as self.update:
            yield


def _check_output(path: Path) -> None:
    """Raise InputError if the file cannot be written, or exists and is no result of an evaluation."""
    if path.is_dir():
        raise InputError(f"--output {path}: is a directory; give a file")
    storage.check_writable(path.parent)
    if not path.exists():
        return
    try:
        known = {"format", "adapters"} <= storage.read_json(path).keys()
    except InputError:
        known = False
    if not known:
        raise InputError(f"--output {path}: exists and was not written by nalora evaluate; give another file")
