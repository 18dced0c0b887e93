"""What `nalora evaluate` does: measures one model after the other, prints what it finds, and writes it at once."""

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from nalora_mlx.evaluate.evaluation import Evaluation, adapter_names, describe
from nalora_mlx.evaluate.settings import EvaluationSettings
from nalora_mlx.runs.checkpoints import CHECKPOINTS, steps
from nalora_mlx.runs.display import Display
from nalora_mlx.runs.evaluations import EVALUATIONS, evaluation_file, run_of, write_evaluation

if TYPE_CHECKING:
    from nalora_mlx.evaluate.tasks import LoadedTasks

PIPED_WIDTH = 160  # columns of a table, if output is piped


class EvaluationJob:
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
        self.doing = ""  # what is being done
        self.update: Callable[[str], None] = lambda _: None  # replaces the text that says so
        self.evaluation = Evaluation(
            config, settings, has_data, lambda text: display.notices([text]), self._show_progress
        )
        self.names = adapter_names(self.adapters)
        self.written: list[Path] = []

    def run(self) -> None:
        """Measure, print and write.

        Raises:
            InputError: rows, metrics, models or adapters cannot be used.
            RunError: a metric failed on an answer; all else is written.
        """
        if self.settings.output is not None:
            _check_output(Path(self.settings.output).expanduser())
        else:
            for adapter in self.adapters:
                storage.check_writable(run_of(adapter)[0] / EVALUATIONS)
        watches = self.settings.watch_checkpoints
        tasks = self._load_tasks() if self.settings.tasks is not None else None
        with self._working(f"loading {self.config.model}"):
            # Checkpoints may be gone by the time that the model is loaded.
            self.evaluation.prepare([] if watches else self.adapters)
        if tasks is not None and self.evaluation.contestants.processor is not None:
            raise InputError("--tasks: needs a model of mlx-lm, and this one is loaded through mlx-vlm")
        if line := describe(self.evaluation.test_set):
            self.display.note(line)
        with self._working(f"measuring {BASE}"):
            self.content = self.evaluation.start()
        broken = []
        if watches:
            broken = self._watch(self.adapters[0])
        else:
            for adapter, name in zip(self.adapters, self.names, strict=True):
                self._measure(adapter, name)
            if not self.adapters:
                self._measure_alone()
            for name in self.names[1:]:
                self._compare_with_first(name)
            if tasks is not None:
                self._run_tasks(tasks)
        self._write()
        for path in self.written:
            self.display.note(f"written: {path}")
        if not self.written:
            self.display.note("nothing is written without an adapter; --output FILE writes the result")
        if broken := broken + list(self.evaluation.measurer.dropped.values()):
            raise RunError(f"{listed(broken)}; the other results are complete")

    # --- models -------------------------------------------------------------------------------------------------

    def _measure_alone(self) -> None:
        """Print what was measured of the base model, and keep its answers."""
        evaluation, base = self.evaluation, self.content["base"]
        if base:
            self._print(table.measures_table(self.content, None, base))
        assert evaluation.base is not None
        self.content["answers"] = results.answer_records(evaluation.test_set, evaluation.base)

    def _measure(self, adapter: Path, name: str) -> None:
        """Measure one adapter; print and write what was found."""
        with self._working(f"measuring {name}"):
            found = self.evaluation.compare(adapter, name)
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

    def _compare_with_first(self, name: str) -> None:
        """Compare an adapter with the first one, row by row."""
        first = self.names[0]
        entries = self.evaluation.between(name, first)
        if not entries:
            return
        self._print(table.measures_table(self.content, name, entries, base=first))
        for line in table.sentences(entries):
            self.display.note(line)
        self.content.setdefault("between", []).append({"base": first, "tuned": name, "measures": entries})

    def _load_tasks(self) -> "LoadedTasks":
        """Load standard tasks and their documents, before anything is measured."""
        from nalora_mlx.evaluate.tasks import load_tasks

        settings = self.settings
        path = None if settings.task_path is None else Path(settings.task_path).expanduser()
        with self._working(f"loading {settings.tasks}"):
            return load_tasks(
                settings.task_names, path, settings.num_fewshot, lambda text: self.display.notices([text])
            )

    def _run_tasks(self, tasks: "LoadedTasks") -> None:
        """Evaluate standard tasks; add what they give to the results of each adapter, and print it."""
        from nalora_mlx.evaluate.tasks import run_tasks

        settings, contestants = self.settings, self.evaluation.contestants

        def models() -> Iterator[tuple[str, nn.Module]]:
            yield BASE, contestants.base
            for adapter, name in zip(self.adapters, self.names, strict=True):
                yield name, contestants.tuned(adapter)

        with self._working(f"running {settings.tasks}"):
            found = run_tasks(
                models(),
                contestants.tokenizer,
                tasks,
                limit=settings.limit,
                batch_size=settings.batch_size,
                apply_chat_template=settings.chat_tasks,
                seed=settings.seed,
                notify=lambda text: self.display.notices([text]),
                on_progress=self._show_progress,
            )
        entries = results.task_measures(found, None, settings.seed)
        self.content["base"] += entries
        if not self.adapters:
            self._print(table.measures_table(self.content, None, entries))
        for number, name in enumerate(self.names):
            entries = results.task_measures(found, number + 1, settings.seed)
            self.content["adapters"][number]["measures"] += entries
            self._print(table.measures_table(self.content, name, entries))
            for line in table.sentences(entries):
                self.display.note(line)

    def _watch(self, run: Path) -> list[str]:
        """Measure the checkpoints of a run as they appear; print each, and at the end which is best.

        Returns:
            What is wrong with checkpoints that cannot be measured. Those that the run has removed are left out.
        """
        race, broken, seen = CheckpointRace(self.evaluation), list[str](), set[int]()
        while True:
            ended = not is_locked(run)
            found = steps(run / CHECKPOINTS)
            new = [step for step in found if step not in seen]
            for step in new:
                seen.add(step)
                try:
                    with self._working(f"measuring step {step}"):
                        race.add(step, self.evaluation.measure(found[step]))
                except (InputError, OSError) as error:
                    if found[step].is_dir():
                        broken.append(str(error))
                        self.display.notices([f"step {step} is left out: {error}"])
                    continue
                gc.collect()
                self.display.note(race.line(step))
                self.content |= race.content()
                self._write()
            if ended and not new:
                break
            if not new:
                time.sleep(WAIT)
        self._print(race.table())
        self.display.note(race.verdict())
        return broken

    # --- output -------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write the result: to --output, or each adapter's to the directory of its run."""
        self.written = []
        if self.settings.output is not None:
            path = Path(self.settings.output).expanduser()
            self._write_file(path, self.content)
            return
        for adapter, found in zip(self.adapters, self.content["adapters"], strict=False):
            self._write_file(self._file(adapter), self.content | {"adapters": [found]})
        if self.settings.watch_checkpoints:
            path = self._file(self.adapters[0])
            self._write_file(path.with_name(f"{path.stem}-checkpoints.json"), self.content)

    def _file(self, adapter: Path) -> Path:
        """Return the file of an adapter's result. Other settings or other data give another file."""
        content = self.content
        known = [
            content["settings"],
            str(self.config.data),
            str(self.config.hf_dataset),
            content["max_tokens"],
        ]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
        path = evaluation_file(adapter, content["data"], content["split"])
        return path.with_name(f"{path.stem}-{digest[:6]}.json")

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
