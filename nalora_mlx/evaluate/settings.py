"""Settings of `nalora evaluate`, apart from those of the model and the data."""

import math
from dataclasses import dataclass

from nalora_mlx.core.config_fields import not_a_count, setting, too_small
from nalora_mlx.core.errors import InputError

NONE = "none"  # value of --metric and --general: leave it out
SPLITS = ("test", "valid", "train")


@dataclass
class EvaluationSettings:
    """What is measured, on how many rows, and where the result goes."""

    split: str | None = setting(
        None,
        "split of the data: test, valid or train (default: test; valid if the run's own data has no test set)",
        choices=SPLITS,
        metavar="NAME",
    )
    samples: int = setting(200, "rows to evaluate on, drawn by seed; -1 for all")
    metric: tuple[str, ...] | None = setting(
        None,
        "metrics of the answers: exact, normalized, contains, f1, rouge-l, number, json, or FILE.py:FUNCTION; none to "
        "generate no answers (default: by the rows)",
        nargs="+",
        action="extend",
        metavar="NAME",
    )
    regex: str | None = setting(None, "regular expression that whole answers should match", metavar="PATTERN")
    json_schema: str | None = setting(None, "JSON schema that answers should be valid by", metavar="FILE")
    choices: tuple[str, ...] | None = setting(
        None,
        "compare how likely these answers are; without any, all different answers of the split",
        nargs="*",
        metavar="TEXT",
    )
    max_tokens: int | None = setting(
        None, "maximum length of an answer (default: half as long again as the longest expected one)"
    )
    batch_size: int | None = setting(None, "rows at a time (default: by the device)")
    general: str | None = setting(
        None,
        "general text that shows what was forgotten: a file or data set, or none (default: a short one of the package)",
        metavar="DATA",
    )
    max_forgetting: float = setting(
        0.1,
        "rise of the loss on general text, in nats per token, from which on there is a warning",
        metavar="NATS",
    )
    tasks: str | None = setting(
        None, "standard tasks of lm_eval, separated by commas, as in hellaswag,arc_easy", metavar="NAMES"
    )
    task_path: str | None = setting(None, "directory of task files of your own for lm_eval", metavar="DIR")
    limit: int | None = setting(None, "documents of each task (default: all)")
    num_fewshot: int | None = setting(None, "examples before each document of a task (default: as it says)")
    chat_tasks: bool = setting(False, "render the documents of tasks with the chat template")
    watch_checkpoints: bool = setting(
        False, "evaluate all checkpoints of a run, and new ones while it trains; say which is best"
    )
    output: str | None = setting(
        None, "JSON file to write (default: in the directory of the adapter, for its report)", metavar="FILE"
    )
    show: int = setting(3, "rows to show whose answers became better, and worse")
    seed: int = setting(0, "seed of the drawn rows and the resampling")

    def check(self) -> None:
        """Raise InputError if there are problems; the message lists all of them."""
        found = not_a_count(self, "samples")
        found += too_small(self, 1, "max_tokens", "batch_size", "limit")
        found += too_small(self, 0, "show", "num_fewshot", "max_forgetting", "seed")
        if not math.isfinite(self.max_forgetting):
            found.append(f"max_forgetting is {self.max_forgetting}; give a number")
        if self.metric is not None and NONE in self.metric and len(self.metric) > 1:
            found.append("metric is none and others; give one or the other")
        if not self.answers and (self.regex is not None or self.json_schema is not None):
            found.append("metric is none, and regex or json_schema are of answers; leave one of them out")
        if self.choices and (
            len(set(map(str.strip, self.choices))) < len(self.choices) or "" in self.choices
        ):
            found.append("choices has an empty or a repeated text; give different ones")
        if self.tasks is not None and not self.task_names:
            found.append("tasks names no task; give names, separated by commas")
        if self.tasks is None:
            found += [
                f"{name} is given without tasks; give tasks, too"
                for name in ("task_path", "limit", "num_fewshot")
                if getattr(self, name) is not None
            ] + ["chat_tasks is given without tasks; give tasks, too"] * self.chat_tasks
        if self.watch_checkpoints and self.tasks is not None:
            found.append("watch_checkpoints and tasks cannot both be given; give one of them")
        if found:
            raise InputError("; ".join(found))

    @property
    def task_names(self) -> list[str]:
        """The names of the tasks."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]

    @property
    def answers(self) -> bool:
        """Whether models generate answers."""
        return self.metric != (NONE,)
