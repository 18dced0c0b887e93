"""The checkpoints of a run compared with each other: which step is best?"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from nalora_mlx.adapters.files import ADAPTER_CONFIG
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.locks import is_locked
from nalora_mlx.evaluate import results
from nalora_mlx.evaluate.evaluation import Evaluation
from nalora_mlx.evaluate.measurement import Measured
from nalora_mlx.evaluate.statistics import Comparison, compare
from nalora_mlx.runs.checkpoints import CHECKPOINTS, steps
from nalora_mlx.runs.evaluation_rows import GENERAL, GENERAL_LOSS, LOSS, NOT_TOLD, format_value

WAIT = 10.0  # seconds between two looks for new checkpoints
BEFORE = 0  # the step of the base model, before training


def wait_for_checkpoint(run: Path) -> None:
    """Wait for the first checkpoint of a run while it goes on.

    Raises:
        InputError: the run has ended without one, or the directory is none of a run.
    """
    while True:
        running = is_locked(run)
        if steps(run / CHECKPOINTS) and (run / ADAPTER_CONFIG).exists():
            return
        if not running:
            raise InputError(f"--adapter-path {run}: has no checkpoints; give the directory of a run")
        time.sleep(WAIT)


class CheckpointRace:
    """What was measured of each checkpoint.

    The loss on the test rows decides which is best; the first metric of the answers, if the user names metrics.

    Args:
        evaluation: whose base model has been measured.

    Attributes:
        measured: what was measured, by step.
    """

    def __init__(self, evaluation: Evaluation):
        assert evaluation.base is not None
        self.evaluation = evaluation
        self.measured: dict[int, Measured] = {}
        self.entries: dict[int, list[dict[str, Any]]] = {}
        self._compared: dict[tuple[int, int, str], Comparison] = {}

    @property
    def metric(self) -> str | None:
        """The metric that decides: the first of those that the user names and no row broke; None for the loss."""
        if not self.evaluation.settings.metric or not self.evaluation.settings.answers:
            return None
        assert self.evaluation.base is not None
        dropped = self.evaluation.measurer.dropped
        return next((name for name in self.evaluation.base.values if name not in dropped), None)

    def add(self, step: int, found: Measured) -> None:
        """Add what was measured of a step."""
        self.measured[step] = found
        assert self.evaluation.base is not None
        self.entries[step] = results.measures(
            self.evaluation.test_set,
            self.evaluation.base,
            found,
            list(self.evaluation.measurer.dropped),
            self.evaluation.settings.seed,
        )

    def line(self, step: int) -> str:
        """Return what was measured of a step, in a line."""
        values = [
            f"{'general ' if entry['name'] == GENERAL_LOSS else ''}{entry['title']} "
            f"{format_value(entry['tuned'], entry['unit'])}"
            for entry in self.entries[step]
        ]
        return f"step {step}: {', '.join(values)}"

    @property
    def decisive(self) -> str:
        """Name of the measure that decides."""
        return self.metric or LOSS

    @property
    def best(self) -> int | None:
        """The best step, the earliest of equal ones; the base model is step 0. None without a checkpoint."""
        if not self.measured:
            return None
        return min((BEFORE, *self.measured), key=lambda step: (self._cost(step), step))

    def _values(self, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the decisive values of each row and their weights."""
        found = self.evaluation.base if step == BEFORE else self.measured[step]
        assert found is not None
        if self.metric is not None:
            return found.values[self.metric], None
        assert found.losses is not None  # a watched run has a test set
        return found.losses.values, found.losses.tokens

    def _cost(self, step: int) -> float:
        values, weights = self._values(step)
        if weights is None:
            return -float(values.mean())
        return float(values.sum() / weights.sum())

    def against_best(self, step: int) -> Comparison:
        """Return a step compared with the best one."""
        assert self.best is not None
        key = (step, self.best, self.decisive)
        if key not in self._compared:
            (values, weights), (best, _) = self._values(step), self._values(self.best)
            self._compared[key] = compare(
                best,
                values,
                weights,
                binary=weights is None and bool(np.isin((best, values), (0, 1)).all()),
                lower_is_better=self.metric is None,
                seed=self.evaluation.settings.seed,
            )
        return self._compared[key]

    def table(self) -> Table:
        """Return all steps as a table."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        entries = next(iter(self.entries.values()), [])
        table.add_column("step", justify="right")
        for entry in entries:
            table.add_column(
                ("general " if entry["part"] == GENERAL else "") + entry["title"], justify="right"
            )
        table.add_column("against the best")
        for step in (BEFORE, *sorted(self.measured)) if entries else ():
            values = (
                [format_value(entry["base"], entry["unit"]) for entry in entries]
                if step == BEFORE
                else [format_value(entry["tuned"], entry["unit"]) for entry in self.entries[step]]
            )
            verdict = "best" if step == self.best else self.against_best(step).told or NOT_TOLD
            name = "base" if step == BEFORE else f"{step:,}"
            table.add_row(name, *values, Text(verdict, "green" if verdict == "best" else "dim"))
        return table

    def verdict(self) -> str:
        """Say which step is best, and which others may be as good."""
        best = self.best
        if best is None:
            return "the run has no checkpoints"
        title = "loss" if self.metric is None else self.evaluation.title_of(self.metric)
        if best == BEFORE:
            return f"no checkpoint has a better {title} than the base model"
        equal = [
            str(step) for step in sorted(self.measured) if step != best and not self.against_best(step).told
        ]
        also = f"; it cannot be told from that of {listed(equal, ', ')}" if equal else ""
        return f"step {best} has the best {title}{also}"

    def content(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {
            "decided_by": self.decisive,
            "best": self.best,
            "checkpoints": [
                {
                    "step": step,
                    "measures": self.entries[step],
                    "against_best": "best" if step == self.best else self.against_best(step).told,
                }
                for step in sorted(self.measured)
            ],
        }
