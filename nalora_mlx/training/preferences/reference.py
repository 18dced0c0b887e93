"""The reference of a preference run: the model as it was before training.

With adapters that start at zero, that is the base model; with a starting adapter, the base model with that adapter. No
second model is loaded: the reference is the same model with other values of its trainable parameters.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.adapters.attach import adapt_result
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core import storage
from nalora_mlx.core.config import KTO, TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.batches import Batch, batches_per_epoch, evaluation_batches, first_epoch
from nalora_mlx.data.preferences import PreferenceExample
from nalora_mlx.ops.fast_math import vectorized
from nalora_mlx.runs.fingerprint import fingerprint
from nalora_mlx.training.device_memory import trim_cache
from nalora_mlx.training.distributed import Workers
from nalora_mlx.training.last_good import trainable_places
from nalora_mlx.training.loss import batch_arrays
from nalora_mlx.training.preferences.loss import PreferenceLoss

FOLDER = "reference"  # in the run's directory; later runs on the same rows use its files, too
TRAIN, VALID, START = (
    "train",
    "valid",
    "start.",
)  # names of arrays, and the prefix of the parameters before training
Examples = Sequence[PreferenceExample]
GoOn = Callable[[int, int], bool]  # takes the number of batches done, and of all; False ends the computation


class Reference:
    """The model as it was before training, and the log-probabilities of answers under it.

    Args:
        loss: of the run. Its model is as before training, unless `load` follows.
        config: settings of the run.
        workers: who share batches.

    Attributes:
        file: of the log-probabilities and the parameters before training; None if nothing is written.
    """

    def __init__(self, loss: PreferenceLoss, config: TrainingConfig, workers: Workers):
        self.loss, self.config, self.workers = loss, config, workers
        self.precomputed = config.has_reference and config.reference == "precomputed"
        self.file: Path | None = None
        self.values: dict[str, np.ndarray] = {}
        # The parameters of adapters are small. A copy of a whole model would not be.
        self.start: dict[str, mx.array] | None = None
        if adapt_result(loss.model) is not None:
            self.start = adapter_weights(loss.model)
        elif config.has_reference and not self.precomputed:
            raise InputError(
                f"reference is {config.reference}, and full fine-tuning keeps no copy of the model before training; "
                "leave --reference out"
            )

    # --- log-probabilities before training ------------------------------------------------------------------------

    def prepare(
        self,
        train_set: Examples,
        valid_set: Examples,
        identity: Mapping[str, Any],
        output: Path | None,
        go_on: GoOn,
    ) -> bool:
        """Compute the log-probabilities of all answers, or read them from the file of an earlier run.

        Training rows are computed in the batches of the first epoch, so the first losses compare equal numbers.

        Args:
            train_set, valid_set: the rows; of the latter those that are validated on.
            identity: of the run, see `runs.fingerprint`.
            output: the run's directory, in whose subdirectory `FOLDER` the file is; None writes nothing.
            go_on: called after each batch.

        Returns:
            False if `go_on` ended the computation.
        """
        if output is not None:
            self.file = output / FOLDER / f"{self._key(identity, train_set)}.safetensors"
            # Several workers compute together, and only the first one sees the file.
            if self.workers.size == 1 and self.file.exists() and self._read(self.file):
                return True
        if self.precomputed:
            config, share = self.config, self.workers.share
            training = first_epoch(train_set, config.batch_size, config.seed, config.packing, share)
            validation = evaluation_batches(valid_set, config.batch_size, -1, config.seed, share)
            count = batches_per_epoch(train_set, config.batch_size, config.packing) + len(validation)
            done = itertools.count(1)
            for name, examples, batches in ((TRAIN, train_set, training), (VALID, valid_set, validation)):
                values = row_log_probabilities(
                    self.loss, examples, batches, self.workers, lambda: go_on(next(done), count)
                )
                if values is None:
                    return False
                self.values[name] = values
        if self.file is not None:
            arrays = {name: mx.array(values) for name, values in self.values.items()}
            start = {START + name: array for name, array in (self.start or {}).items()}
            if arrays | start:
                storage.make_directory(self.file.parent)
                storage.write_file(self.file, storage.arrays_writer(arrays | start))
        return True

    def load(self, file: Path) -> None:
        """Read what a run computed before training, given the file in its checkpoint.

        Raises:
            InputError: it is missing or does not fit.
        """
        if not file.exists() or not self._read(file):
            raise InputError(
                f"{file} is missing or is not what the run wrote; it holds the log-probabilities of the reference"
            )
        self.file = file

    def attached(self, examples: Examples, name: str) -> list[PreferenceExample]:
        """Return the rows of a split, `TRAIN` or `VALID`, with their log-probabilities, if these were computed."""
        values = self.values.get(name)
        return list(examples) if values is None else _attached(examples, values)

    def _read(self, file: Path) -> bool:
        """Read the file; return whether it has all that this run needs."""
        arrays = storage.read_arrays(file)
        start = {name.removeprefix(START): array for name, array in arrays.items() if name.startswith(START)}
        values = {name: np.array(arrays[name]) for name in (TRAIN, VALID) if name in arrays}
        if bool(values) != self.precomputed or start.keys() != (self.start or {}).keys():
            return False
        self.values, self.start = values, start or None
        return True

    def _key(self, identity: Mapping[str, Any], train_set: Examples) -> str:
        """Return a hash of all that the log-probabilities depend on."""
        parts: dict[str, Any] = {
            name: identity[name] for name in ("base_model", "training_data", "validation_data", "workers")
        }
        parts["start"] = fingerprint(adapter_weights(self.loss.model))
        parts["mode"] = self.precomputed
        parts |= {
            name: getattr(self.config, name) for name in ("batch_size", "seed", "packing", "val_batches")
        }
        parts["layout"] = train_set[0].layout
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    # --- in each iteration ----------------------------------------------------------------------------------------

    def window_arrays(self, batches: Sequence[Batch]) -> list[dict[str, mx.array]]:
        """Return what the loss reads besides each batch of an accumulation window, or of a validation. Lazy.

        1. "reference", the log-probabilities [n P] under the reference, unless the rows have them.
        2. For KTO "baseline", z = max(0, mean of log p - log p_0 over the mismatched answers of the whole window), by
           which one window of several batches gives what one large batch gives.
        """
        if not self.config.has_reference:
            return [{} for _ in batches]
        more: list[dict[str, mx.array]] = [{} for _ in batches]
        for arrays, batch in zip(more, batches, strict=True):
            if batch.answers is not None and batch.answers.reference is None:
                with self.installed():
                    arrays["reference"] = log_probabilities(self.loss, batch)
        if self.config.train_mode == KTO:
            baseline = self._baseline(batches)
            for arrays in more:
                arrays["baseline"] = baseline
        return more

    def _baseline(self, batches: Sequence[Batch]) -> mx.array:
        total, count = mx.array(0.0), 0
        for batch in batches:
            count += len(batch.rows)
            answers = batch.answers
            if answers is None or answers.mismatched is None:
                continue
            mismatched = answers.mismatched
            if answers.mismatched_reference is not None:
                reference = mx.array(answers.mismatched_reference[: len(answers.rows)])
            else:
                with self.installed():
                    reference = log_probabilities(self.loss, mismatched)
            total = total + mx.sum(log_probabilities(self.loss, mismatched) - reference)
        return mx.maximum(self.workers.sum(total) / max(count, 1), 0)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Give the model its parameters of before training while the context is open."""
        assert self.start is not None
        places = trainable_places(self.loss.model)
        current = [module[name] for module, name in places]
        self.loss.model.load_weights(list(self.start.items()), strict=False)
        try:
            yield
        finally:
            for (module, name), array in zip(places, current, strict=True):
                module[name] = array


def log_probabilities(loss: PreferenceLoss, batch: Batch) -> mx.array:
    """Return the log-probability of each answer of a batch under the current parameters; [n P]. Lazy."""
    model, arrays = loss.model, batch_arrays(batch)
    training = model.training
    model.eval()
    try:
        with vectorized():
            return loss.log_probabilities(arrays)
    finally:
        model.train(training)


def row_log_probabilities(
    loss: PreferenceLoss,
    examples: Examples,
    batches: Iterable[Batch],
    workers: Workers,
    go_on: Callable[[], bool] = lambda: True,
) -> np.ndarray | None:
    """Return the log-probabilities of rows under the current parameters: of each answer, and of the mismatched one.

    Args:
        loss: of the run.
        examples: N rows.
        batches: that hold each of them once.
        workers: hold the other shares of the batches.
        go_on: called after each batch; False ends the computation.

    Returns:
        [N, n] float32, or [N, n + 1]; None if `go_on` ended the computation.
    """
    mismatched = bool(examples) and examples[0].mismatched is not None
    each = len(examples[0].answers) if examples else 1
    values = np.zeros((len(examples), each + mismatched), np.float32)
    for batch in batches:
        answers = batch.answers
        assert answers is not None
        rows = list(answers.rows)
        if rows:
            found = np.array(log_probabilities(loss, batch))
            values[rows, :each] = found[: len(rows) * each].reshape(-1, each)
        if rows and answers.mismatched is not None:
            values[rows, each] = np.array(log_probabilities(loss, answers.mismatched))
        trim_cache(None)
        if not go_on():
            return None
    return np.array(workers.sum(mx.array(values)))


def with_log_probabilities(
    loss: PreferenceLoss, examples: Examples, config: TrainingConfig, workers: Workers
) -> list[PreferenceExample]:
    """Return rows with their log-probabilities under the current parameters."""
    batches = evaluation_batches(examples, config.batch_size, -1, config.seed, workers.share)
    values = row_log_probabilities(loss, examples, batches, workers)
    assert values is not None
    return _attached(examples, values)


def _attached(examples: Examples, values: np.ndarray) -> list[PreferenceExample]:
    pairs = zip(examples, values.tolist(), strict=True)
    return [replace(example, reference=tuple(row)) for example, row in pairs]
