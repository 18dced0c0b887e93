"""Standard tasks through EleutherAI's lm_eval: several models on the same documents, paired."""

import gc
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import yaml

from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.core.optional_dependencies import install_command
from nalora_mlx.core.parsing import did_you_mean
from nalora_mlx.models.loading import print_notice

DEFAULT_FILTER = "none"  # lm_eval's name for answers as they are
LoadedTasks = dict[str, dict]  # as lm_eval loads tasks and groups


@dataclass(frozen=True)
class TaskMetric:
    """A metric of a task, or of a group of tasks.

    Attributes:
        task: name of the task or group.
        metric: name of the metric. If the task filters answers, the filter follows, as in "exact_match,strict-match".
        higher_is_better: None if the task does not say.
        values: of each model, as lm_eval aggregates them.
        documents: value of each document, whose means are `values`, in the same order for all models;
            [models, N] float64. None if `values` are no means of numbers, such as perplexities and F1.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    values: list[float]
    documents: np.ndarray | None


def load_tasks(
    names: Sequence[str],
    task_path: Path | None = None,
    num_fewshot: int | None = None,
    notify: Callable[[str], None] = print_notice,
) -> LoadedTasks:
    """Load tasks and their documents.

    Task files may name Python functions (`!function`) of files next to them, which run: trust them like a program. Code
    that comes with data sets on the Hub never runs, nor does code that a model writes.

    Args:
        names: tasks, groups and tags of lm_eval, or of `task_path`.
        task_path: directory with further task files, in lm_eval's YAML format. They come before lm_eval's own. Paths of
            data files are relative to the task file.
        num_fewshot: number of examples in a prompt; None for the task's own. Tasks without examples stay without.
        notify: called with lm_eval's warnings.

    Raises:
        InputError: lm_eval is missing, a task is unknown or cannot run, or its file or data cannot be read.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(f"standard tasks need the package lm_eval: {install_command('eval')}") from error
    from nalora_mlx.evaluate.language_model import quiet

    if task_path is not None and not task_path.is_dir():
        raise InputError(f"--task-path {task_path}: is not a directory with task files")
    with quiet(notify):
        loaded = _load_tasks(list(dict.fromkeys(names)), task_path)
        _check_and_set(loaded["tasks"], num_fewshot, notify)
    return loaded


def run_tasks(
    models: Iterable[tuple[str, nn.Module]],
    tokenizer: Any,
    tasks: LoadedTasks,
    limit: int | None = None,
    batch_size: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
    notify: Callable[[str], None] = print_notice,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[TaskMetric]:
    """Return the metrics of tasks for each model, groups before their tasks.

    Args:
        models: names and models of mlx-lm, frozen and in evaluation mode. Each is released before the next one is asked
            for, so an iterator may load one after another.
        tokenizer: tokenizer of all models, in mlx-lm's wrapper.
        tasks: from `load_tasks`.
        limit: number of documents of each task; None for all.
        batch_size: texts at a time; None for the default of the device.
        apply_chat_template: render prompts as chats, with each example as a turn.
        seed, notify: of the choice of examples; called with lm_eval's warnings.
        on_progress: called with the model's name, and how many requests are done of all of their kind.

    Raises:
        InputError: a task cannot run on this model.
    """
    from nalora_mlx.evaluate.generation import choose_batching
    from nalora_mlx.evaluate.language_model import LanguageModel, evaluate_tasks, quiet

    if apply_chat_template and not tokenizer.has_chat_template:
        raise InputError("the model has no chat template, so tasks cannot be rendered as chats")
    results, batching = [], None
    with quiet(notify):
        generates = any(task.OUTPUT_TYPE == "generate_until" for task in tasks["tasks"].values())
        for name, model in models:
            if generates and batching is None and batch_size != 1:
                batching = choose_batching(model)  # a tuned model answers as its base model does
                if batching.notice:
                    notify(batching.notice)
            report = (lambda *counts, name=name: on_progress(name, *counts)) if on_progress else None
            wrapped = LanguageModel(model, tokenizer, batch_size, apply_chat_template, report, batching)
            del model
            results.append(evaluate_tasks(wrapped, tasks, limit, seed))
            del wrapped
            gc.collect()  # compiled functions and their models refer to each other
    return _collect(results)


# --- tasks --------------------------------------------------------------------------------------------------


def _load_tasks(names: Sequence[str], task_path: Path | None) -> dict[str, dict]:
    """Return the tasks and groups of some names, as lm_eval's task manager loads them, with their data sets."""
    manager = _open_manager(names, task_path)
    index = manager.task_index
    for name in names:
        if name not in index:
            raise _unknown(name, manager, task_path)
    loaded: dict[str, dict] = {"tasks": {}, "groups": {}, "group_map": {}}
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            members = sorted({member for member in _members(name, index) if member in index})
            for member in members:
                if index[member].cfg.get("unsafe_code"):
                    raise InputError(
                        f"task {member}: runs code that the model writes, which nalora does not do"
                    )
            files = {member: index[member].yaml_path for member in members}
            for number, member in enumerate(members):
                _resolve_data_files(index[member], task_path, Path(directory) / f"{number}.yaml")
            try:
                for kind, found in manager.load([name]).items():
                    loaded[kind].update(found)
            except Exception as error:
                raise _load_error(name, error, files, index) from error
            finally:
                for member, path in files.items():
                    index[member].yaml_path = path
    return loaded


def _open_manager(names: Sequence[str], task_path: Path | None) -> Any:
    """Return lm_eval's task manager. Its own thousands of task files, which take seconds, are read only if needed."""
    from lm_eval.tasks import TaskManager

    if task_path is None:
        return TaskManager()
    manager = TaskManager(include_path=str(task_path), include_defaults=False)
    local = manager.task_index
    if all(member in local for name in names for member in _members(name, local)):
        return manager
    return TaskManager(include_path=str(task_path))


def _members(name: str, index: Mapping[str, Any], above: Collection[str] = ()) -> Iterator[str]:
    """Yield the names of the tasks in a group or tag, or of a single task. Tasks that a group defines have none."""
    entry = index.get(name)
    kind = entry.kind.name if entry else "TASK"
    if kind not in ("GROUP", "TAG") or entry is None or name in above:
        yield name
        return
    items = sorted(entry.tags) if kind == "TAG" else entry.cfg.get("task") or []
    for item in [items] if isinstance(items, str) else items:
        member = item if isinstance(item, str) else item.get("group") or item.get("task")
        if member in index or isinstance(item, str) or len(item) == 1:
            yield from _members(member, index, (*above, name))


def _resolve_data_files(entry: Any, task_path: Path | None, copy: Path) -> None:
    """Make a task file's own directory the one of its data files; lm_eval takes them from the current directory.

    The task manager then loads a file that includes the task file, with other paths.
    """
    if task_path is None or entry.yaml_path is None:
        return
    directory = entry.yaml_path.resolve().parent
    if not directory.is_relative_to(task_path.resolve()):
        return
    given = {key: entry.cfg[key] for key in ("dataset_path", "dataset_kwargs") if entry.cfg.get(key)}
    changed = dict(given)
    if str(given.get("dataset_path", "")).startswith("."):
        changed["dataset_path"] = _beside(given["dataset_path"], directory)
    if isinstance(settings := given.get("dataset_kwargs"), dict):
        paths = {key: settings[key] for key in ("data_files", "data_dir") if settings.get(key)}
        changed["dataset_kwargs"] = settings | _beside(paths, directory)
    if changed != given:
        copy.write_text(yaml.safe_dump({"include": str(entry.yaml_path.resolve())} | changed))
        entry.yaml_path = copy


def _beside(value: Any, directory: Path) -> Any:
    """Return paths, in lists and mappings too, as they are in a directory. Those that are not there stay."""
    if isinstance(value, dict):
        return {key: _beside(item, directory) for key, item in value.items()}
    if isinstance(value, list):
        return [_beside(item, directory) for item in value]
    if not isinstance(value, str) or "://" in value or Path(value).is_absolute():
        return value
    there = (directory / value).exists() or any(directory.glob(value))
    return str(directory / value) if there else value


def _check_and_set(tasks: Mapping[str, Any], num_fewshot: int | None, notify: Callable[[str], None]) -> None:
    """Set the number of examples; raise an InputError for a task that cannot run here."""
    from nalora_mlx.evaluate.language_model import generation_settings

    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"task {name}: runs code that the model writes, which nalora does not do")
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"task {name}: has images or sound; only tasks with text can run")
        if task.OUTPUT_TYPE == "generate_until":
            try:
                generation_settings(task.get_config("generation_kwargs") or {})
            except InputError as error:
                raise InputError(f"task {name}: {error}") from error
        own = task.get_config("num_fewshot")
        if num_fewshot and own == 0:
            notify(f"task {name}: its prompts have no examples, whatever their number should be")
        elif num_fewshot is not None or own is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)


# --- errors -------------------------------------------------------------------------------------------------


def _unknown(name: str, manager: Any, task_path: Path | None) -> InputError:
    """Return an error for a name that the task manager does not know: there is no such task, or its file is bad."""
    line = re.compile(rf"^(task|group):\s*['\"]?{re.escape(name)}['\"]?\s*(#.*)?$", re.MULTILINE)
    for path in sorted(task_path.rglob("*.yaml")) if task_path else []:
        if line.search(path.read_text(errors="replace")):
            try:
                manager.load([str(path)])
            except Exception as error:
                return InputError(f"{path}: cannot be read as a task file: {_shown(error)}")
    where = f"{task_path} and lm_eval have" if task_path else "lm_eval has"
    hint = did_you_mean(name, manager.all_tasks) or "; `lm_eval ls tasks` lists all"
    return InputError(f"{where} no task {name!r}{hint}")


def _load_error(
    name: str, error: Exception, files: Mapping[str, Path | None], index: Mapping[str, Any]
) -> InputError:
    """Return an error for a task that cannot be loaded."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    if any(isinstance(cause, ConnectionError) or "Connect" in type(cause).__name__ for cause in causes):
        data = {str(index[member].cfg.get("dataset_path")) for member in files}
        return InputError(
            f"task {name}: its data ({', '.join(sorted(data))}) are not on this machine, and the Hugging Face "
            f"Hub cannot be reached; connect to it, without HF_HUB_OFFLINE ({first_line(error)})"
        )
    where = f"{files[name]}: " if files.get(name) else ""
    return InputError(f"{where}task {name} cannot be loaded: {_shown(error)}")


def _shown(error: BaseException) -> str:
    """Return an error in one line. YAML errors come with their line in the file."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem or error.context} in line {error.problem_mark.line + 1}"
    return f"{type(error).__name__}: {first_line(error)}"


# --- results ------------------------------------------------------------------------------------------------


def _collect(results: Sequence[Mapping[str, Any]]) -> list[TaskMetric]:
    """Return the metrics of lm_eval's results, one for each model."""
    if not results:
        return []
    first, groups = results[0], results[0]["group_subtasks"]
    metrics = []
    for task in sorted(first["results"], key=lambda name: name not in groups):
        for key in first["results"][task]:
            metric, comma, answers = key.partition(",")
            values = [result["results"][task].get(key) for result in results]
            if not comma or metric.endswith("_stderr") or not all(map(_is_number, values)):
                continue
            found = [_document_values(result, _tasks_in(task, groups), metric, answers) for result in results]
            metrics.append(
                TaskMetric(
                    task,
                    metric if answers == DEFAULT_FILTER else key,
                    first["higher_is_better"].get(task, {}).get(metric),
                    [float(value) for value in values],
                    _paired(found, values),
                )
            )
    return metrics


def _tasks_in(task: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks of a group and of the groups in it, or a single task."""
    if task not in groups:
        return [task]
    return [leaf for member in groups[task] for leaf in _tasks_in(member, groups)]


def _document_values(
    result: Mapping[str, Any], tasks: Sequence[str], metric: str, answers: str
) -> dict[tuple[str, int], Any]:
    """Return a metric's value of each document, by task and number."""
    return {
        (task, sample["doc_id"]): sample[metric]
        for task in tasks
        for sample in result["samples"].get(task, ())
        if sample["filter"] == answers and metric in sample
    }


def _paired(found: Sequence[Mapping[tuple[str, int], Any]], values: Sequence[float]) -> np.ndarray | None:
    """Return the values of the same documents for all models, [models, N]; None unless their means are `values`."""
    documents = sorted(found[0])
    if not documents or any(sorted(other) != documents for other in found):
        return None
    rows = [[of_model[document] for document in documents] for of_model in found]
    if not all(_is_number(value) for row in rows for value in row):
        return None
    paired = np.array(rows, np.float64)
    return paired if np.allclose(paired.mean(axis=1), values, rtol=1e-9, atol=1e-12, equal_nan=True) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | np.bool_)
