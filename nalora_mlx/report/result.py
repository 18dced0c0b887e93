"""The top of a report: what the run is, its result in large numbers and in words, and a few facts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nalora_mlx.core.config import KTO
from nalora_mlx.core.errors import counted
from nalora_mlx.report.formatting import (
    format_count,
    format_duration,
    format_loss,
    format_number,
    format_pair,
    format_share,
)
from nalora_mlx.report.run_data import RunData

# Names of directories that say nothing about the model in them.
PLAIN_NAMES = frozenset(
    (
        "model",
        "models",
        "base",
        "base_model",
        "base-model",
        "fused",
        "fused_model",
        "merged",
        "mlx_model",
        "mlx",
    )
)
MEANING = "the number of equally likely next tokens the model hesitates between."  # of a perplexity
SMALL_DIFFERENCE = 1.1  # ratio of two losses up to which one run of each says little
FEW_ERRORS = 2  # standard errors of the difference of two accuracies up to which it says little
HASH_LENGTH = 40  # of a snapshot's name in the cache of the Hub


@dataclass
class Headline:
    """The result of a run: a loss before and after, as text."""

    name: str
    before: str | None
    after: str
    words: str
    detail: str = ""

    @property
    def text(self) -> str:
        """The numbers on one line."""
        return f"{self.before} → {self.after}" if self.before else self.after


def title(runs: list[RunData]) -> str:
    """Say what was trained on what, for people who have not seen the command."""
    if len(runs) > 1:
        return f"{len(runs)} fine-tuning runs compared"
    model, data = model_label(runs[0]) or "model", data_label(runs[0])
    if _name(runs[0]) is None:
        model = f"{'An' if model[0] in 'aeiou' else 'A'} {model}"
    return f"{model} fine-tuned on {data or 'its own data'}"


def subtitle(runs: list[RunData]) -> str:
    """Return the names of the runs, and what several have in common."""
    if len(runs) == 1:
        return f"Run {runs[0].name}"
    names = ", ".join(run.name for run in runs)
    shared = [label for label in (_shared(runs, model_label), _shared(runs, data_label)) if label]
    return f"{names} · {' on '.join(shared)}" if shared else names


def _shared(runs: list[RunData], label: Any) -> str | None:
    labels = {label(run) for run in runs}
    return labels.pop() if len(labels) == 1 else None


def model_label(run: RunData) -> str | None:
    """Return a name of the base model that tells something: of the Hub, of a directory, or its type and size."""
    if name := _name(run):
        return name
    kind, parameters = run.model.get("type"), run.model.get("parameters")
    if kind and parameters:
        return f"{kind} model ({format_count(parameters)} parameters)"
    return f"{kind} model" if kind else None


def _name(run: RunData) -> str | None:
    """Return the name of the base model without its owner; None for a directory whose name says nothing."""
    name = str(run.model.get("name") or run.settings.get("model") or "").rstrip("/").rsplit("/", 1)[-1]
    is_hash = len(name) == HASH_LENGTH and name.isalnum()
    return None if not name or name.lower() in PLAIN_NAMES or is_hash else name


def data_label(run: RunData) -> str | None:
    """Return the names of the data sources, without directories."""
    names = []
    for source in (run.settings.get("data"), run.settings.get("hf_dataset")):
        for entry in source if isinstance(source, list) else [source]:
            path = entry.get("path") or entry.get("name") if isinstance(entry, dict) else entry
            if path:
                names.append(Path(str(path)).name)
    names = list(dict.fromkeys(names))
    if len(names) > 2:
        return f"{names[0]} and {len(names) - 1} other data sets"
    return " and ".join(names) or None


# --- result ------------------------------------------------------------------------------------------


def headline(run: RunData) -> Headline:
    """Return the validation loss before and at its best, or the training loss if there is no validation."""
    best = run.best_validation
    if best is None:
        return _training_headline(run)
    if run.best_accuracy is not None:
        return _preference_headline(run)
    known = ~np.isnan(run.valid["loss"])
    steps, losses = run.valid["step"][known], run.valid["loss"][known]
    name, first = "Validation loss", float(losses[0])
    if steps[0] != 0:
        step, loss = best
        words = f"At its best, in iteration {step:,}{_on_rows(run)}."
        return Headline(name, None, format_loss(loss), words, f"Perplexity {_perplexity(loss)}: {MEANING}")
    if len(losses) == 1:
        return Headline(name, None, format_loss(first), f"Before training{_on_rows(run)}.")
    # A run that did not help shows what it ended with.
    step, loss = best if best[0] else (int(steps[-1]), float(losses[-1]))
    before, after = format_pair(first, loss)
    change = 1 - loss / first if first else 0.0
    share = "more than 99%" if 0.995 <= change < 1 else f"{abs(change):.0%}"
    direction = f"{share} {'lower' if change >= 0 else 'higher'}"
    place = "" if step == run.last_step else f", at iteration {step:,}"
    detail = f"Perplexity from {_perplexity(first)} to {_perplexity(loss)}: {MEANING}"
    return Headline(name, before, after, f"{direction}{_on_rows(run)}{place}.", detail)


def _preference_headline(run: RunData) -> Headline:
    """Return the validation accuracy before and at its best."""
    best, accuracies, losses = run.best_index, run.valid["accuracy"], run.valid["loss"]
    assert best is not None
    has_before = int(run.valid["step"][0]) == 0
    # A run that did not help shows what it ended with.
    shown = best if best or not has_before else len(losses) - 1
    step, rows = int(run.valid["step"][shown]), validated_rows(run)
    kind, success = "pair", "in which the model prefers the chosen answer"
    if run.preferences.train_mode == KTO:
        kind, success = "answer", "that the model judges as their labels say"
    words = f"Share of {counted(rows, kind) if rows else f'the {kind}s'} kept out of training {success}"
    name, after = "Validation accuracy", format_share(accuracies[shown])
    if not has_before or not shown:
        when = f"in iteration {step:,}" if step else "before training"
        return Headline(
            name, None, after, f"{words}, {when}.", f"Validation loss {format_number(losses[shown], 3)}."
        )
    detail = f"Validation loss from {format_number(losses[0], 3)} to {format_number(losses[shown], 3)}."
    if run.preferences.has_reference:
        detail += " Before training, the accuracy is one half by definition: it is relative to the model at that time."
    place = "" if step == run.last_step else f", at iteration {step:,}"
    return Headline(name, format_share(accuracies[0]), after, f"{words}{place}.", detail)


def _training_headline(run: RunData) -> Headline:
    name, losses = "Training loss", run.train["loss"][~np.isnan(run.train["loss"])]
    if not len(losses):
        return Headline(name, None, "-", "No loss has been recorded yet.")
    if len(losses) == 1:
        return Headline(name, None, format_loss(losses[0]), "After the first iterations.")
    before, after = format_pair(losses[0], losses[-1])
    return Headline(name, before, after, "From the first to the last report. There was no validation.")


def _on_rows(run: RunData) -> str:
    rows = validated_rows(run)
    return f" on {rows:,} rows kept out of training" if rows else " on rows kept out of training"


def validated_rows(run: RunData) -> int | None:
    """Return the number of rows of each validation; None if it is not known."""
    rows, batches, batch_size = (
        run.data.get("valid", {}).get("rows"),
        run.settings.get("val_batches"),
        run.settings.get("batch_size"),
    )
    if not rows or run.settings.get("packing"):
        return None
    return min(rows, batches * batch_size) if batches and batch_size and batches > 0 else rows


def _perplexity(loss: float) -> str:
    return format_number(math.exp(loss), 3) if loss < 20 else "above 10⁸"


def facts(run: RunData) -> list[tuple[str, str, str]]:
    """Return at most four facts: name, value, and a note."""
    settings = run.settings
    found = []
    if run.method:
        rank = "" if settings.get("fine_tune_type") == "full" else f"rank {settings.get('rank', '-')}"
        layers = settings.get("num_layers")
        depth = f"last {layers} layers" if isinstance(layers, int) and layers > 0 else "all layers"
        method = f"{run.objective} with {run.method}" if run.objective else run.method
        found.append(("Method", method, ", ".join(filter(None, (rank, depth)))))
    if model := model_label(run):
        kind, count = run.model.get("type"), run.model.get("parameters")
        note = ", ".join(filter(None, (kind, f"{format_count(count)} parameters" if count else "")))
        found.append(("Base model", model, "" if note and note.split(",")[0] in model else note))
    iterations = f"{run.last_step:,} iterations"
    rows = run.data.get("train", {}).get("rows")
    label = data_label(run)
    if rows:
        found.append(("Data", f"{rows:,} rows", f"{label}, {iterations}" if label else iterations))
    else:
        found.append(("Trained for", iterations, f"{run.tokens:,} tokens" if run.tokens else ""))
    memory = run.train["peak_memory_gb"]
    peak = "" if np.isnan(memory).all() else f"{format_number(float(np.nanmax(memory)), 2)} GB peak memory"
    if run.seconds:
        found.append(("Time", format_duration(run.seconds), peak))
    elif peak:
        found.append(("Memory", peak.removesuffix(" peak memory"), "peak"))
    return found


# --- comparison --------------------------------------------------------------------------------------


def best_runs(runs: list[RunData]) -> list[int]:
    """Return the indices of the runs with the lowest validation loss, or the highest accuracy of preference runs.

    None if fewer than two were validated, or if only some are preference runs.
    """
    if any(run.prefers for run in runs):
        accuracies = [run.best_accuracy for run in runs]
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        alike = all(run.prefers for run in runs) and len(known) > 1
        return [i for i, accuracy in enumerate(accuracies) if alike and accuracy == max(known)]
    losses = [run.best_validation[1] if run.best_validation else math.inf for run in runs]
    if sum(map(math.isfinite, losses)) < 2:
        return []
    return [i for i, loss in enumerate(losses) if loss == min(losses)]


def comparison(runs: list[RunData]) -> tuple[str, str]:
    """Say in a heading and a sentence which run is best."""
    best = best_runs(runs)
    if not best and 0 < sum(run.prefers for run in runs) < len(runs):
        return (
            "No run is best",
            "Some of the runs were trained on preferences and others on answers, so their results cannot be compared.",
        )
    if not best:
        return (
            "No run is best",
            "Fewer than two of the runs were validated, so their losses cannot be compared.",
        )
    names = " and ".join(runs[i].name for i in best)
    validation = [(run.data["valid"], validated_rows(run)) for run in runs if run.data.get("valid")]
    if any(each != validation[0] for each in validation):
        results = "accuracies" if runs[0].prefers else "losses"
        note = f"The runs were validated on different rows, so their {results} do not compare directly."
    elif runs[0].prefers:
        note = _accuracy_note(runs, best)
    else:
        losses = sorted(run.best_validation[1] for run in runs if run.best_validation)
        if len(best) > 1:
            note = f"Each reaches a validation loss of {format_loss(losses[0])}."
        else:
            low, next_best = format_pair(losses[0], losses[1])
            note = f"Its validation loss is {low}; the next best is {next_best}."
            if losses[1] < SMALL_DIFFERENCE * losses[0]:
                note += " So small a difference may be chance: train with other seeds before you rely on it."
    return (f"{names} is best" if len(best) == 1 else f"{names} are equally good"), note


def _accuracy_note(runs: list[RunData], best: list[int]) -> str:
    """Say how the best accuracy compares with the next one."""
    first, second = sorted(
        (run.best_accuracy for run in runs if run.best_accuracy is not None), reverse=True
    )[:2]
    if len(best) > 1:
        note = f"Each reaches a validation accuracy of {format_share(first)}."
    else:
        note = f"Its validation accuracy is {format_share(first)}; the next best is {format_share(second)}."
        mean, rows = (first + second) / 2, validated_rows(runs[best[0]])
        error = math.sqrt(2 * mean * (1 - mean) / rows) if rows else math.inf
        if first - second < FEW_ERRORS * error:
            note += " So small a difference may be chance: validate on more rows before you rely on it."
    modes = {run.preferences.train_mode for run in runs}
    if len(modes) > 1:
        note += " The objectives differ, and each has its own measure of what is preferred: compare the answers, too."
    return note
