"""The reference of a preference run: the model as it was before training.

With adapters that start at zero, that is the base model; with a starting adapter, the base model with that adapter. No
second model is loaded: the reference is the same model with other values of its trainable parameters.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from nalora_mlx.runs.checkpoints import REFERENCES
from nalora_mlx.runs.fingerprint import fingerprint
from nalora_mlx.training.device_memory import trim_cache
from nalora_mlx.training.distributed import Workers
from nalora_mlx.training.last_good import trainable_places
from nalora_mlx.training.loss import batch_arrays
from nalora_mlx.training.preferences.loss import PreferenceLoss
from nalora_mlx.training.schedules import run_iterations

# Names of arrays, and the prefix of the parameters before training.
TRAIN, VALID, NAME, START = "train", "valid", "name", "start."
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

    def notices(self, examples: Examples) -> list[str]:
        """Return a notice if most of what is computed before training is never used."""
        config = self.config
        used = min(run_iterations(examples, config) * config.batch_size, len(examples))
        if not self.precomputed or self.start is None or config.packing or 2 * used >= len(examples):
            return []
        return [
            f"the reference is computed for all {len(examples)} rows, and the run trains on {used} of them; "
            "--reference on-the-fly takes less time"
        ]

    # --- log-probabilities before training ------------------------------------------------------------------------

    def prepare(
        self,
        train_set: Examples,
        valid_set: Examples,
        identity: Mapping[str, Any],
        output: Path | None,
        go_on: GoOn,
        checkpoint: Path | None = None,
    ) -> bool:
        """Compute the log-probabilities of all answers, or read them from the file of a checkpoint or an earlier run.

        Training rows are computed in the batches of the first epoch, so the first losses compare equal numbers.

        Args:
            train_set, valid_set: the rows; of the latter those that are validated on.
            identity: of the run, see `runs.fingerprint`.
            output: the run's directory, in whose subdirectory `REFERENCES` the file is; None writes nothing.
            go_on: called after each batch.
            checkpoint: file in the checkpoint that the run resumes from; None for a new run.

        Returns:
            False if `go_on` ended the computation.

        Raises:
            InputError: see `load`; or the file is of other rows, and the model before training is not known.
        """
        if not self.precomputed and self.start is None:
            return True
        name, known = "", False
        if checkpoint is not None:
            saved, _, start = self.load(checkpoint).partition("-")
            key = self._key(identity, train_set)
            name, known = f"{key}-{start}", saved == key
            if not known and self.start is None:
                raise InputError(
                    f"{checkpoint} has the reference of other rows or settings, and full fine-tuning keeps no copy of "
                    "the model before training; start without --resume"
                )
        elif output is not None:
            name = f"{self._key(identity, train_set)}-{fingerprint(adapter_weights(self.loss.model))}"
        if output is not None:
            self.file = output / REFERENCES / f"{name}.safetensors"
            # Several workers compute together, and only the first one sees the file.
            if checkpoint is None and self.workers.size == 1 and self._read(self.file):
                return True
        if not known:
            with self.installed() if self.start is not None else nullcontext():
                if not self._compute(train_set, valid_set, go_on):
                    return False
        if self.file is not None:
            copied = checkpoint if known else None
            storage.write_file(self.file, storage.copy_writer(copied) if copied else self._writer(name))
        return True

    def _compute(self, train_set: Examples, valid_set: Examples, go_on: GoOn) -> bool:
        """Compute the log-probabilities of all answers under the current parameters; see `prepare`."""
        self.values = {}
        if not self.precomputed:
            return True
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
        return True

    def load(self, file: Path) -> str:
        """Read what a run computed before training, given the file in its checkpoint; return the name it had there.

        Raises:
            InputError: it is missing, damaged, or does not fit.
        """
        if not self.precomputed and self.start is None:
            return ""
        name = self._read(file)
        if not name:
            raise InputError(
                f"{file} is missing or is not what the run wrote; it holds the log-probabilities of the reference"
            )
        return name

    def _writer(self, name: str) -> storage.Writer:
        """Return a writer of the log-probabilities and the parameters before training, with a hash of them."""
        arrays = {split: mx.array(values) for split, values in self.values.items()}
        arrays |= {START + path: array for path, array in (self.start or {}).items()}
        sealed = f"{name}:{fingerprint(arrays)}".encode()
        return storage.arrays_writer(arrays | {NAME: mx.array(list(sealed), mx.uint8)})

    def _read(self, file: Path) -> str:
        """Read a file; return its name, or "" if it is missing, damaged, or does not have what this run needs."""
        try:
            arrays = storage.read_arrays(file)
        except InputError:
            return ""
        sealed = np.array(arrays.pop(NAME, mx.array([], mx.uint8))).tobytes().decode(errors="replace")
        name, _, seal = sealed.partition(":")
        start = {path.removeprefix(START): array for path, array in arrays.items() if path.startswith(START)}
        if seal != fingerprint(arrays) or start.keys() != (self.start or {}).keys():
            return ""
        self.values = {split: np.array(arrays[split]) for split in (TRAIN, VALID) if split in arrays}
        self.start = start or None
        return name

    def attached(self, examples: Examples, name: str) -> list[PreferenceExample]:
        """Return the rows of a split, `TRAIN` or `VALID`, with their log-probabilities, if these were computed."""
        values = self.values.get(name)
        return list(examples) if values is None else _attached(examples, values)

    def _key(self, identity: Mapping[str, Any], train_set: Examples) -> str:
        """Return a hash of all that the log-probabilities depend on, except the parameters before training."""
        parts: dict[str, Any] = {
            name: identity[name] for name in ("base_model", "training_data", "validation_data", "workers")
        }
        result = adapt_result(self.loss.model)
        parts["scale"] = None if result is None else result.config.scale
        parts["mode"] = self.precomputed
        parts |= {
            name: getattr(self.config, name) for name in ("batch_size", "seed", "packing", "val_batches")
        }
        parts["layout"] = train_set[0].layout
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    # --- in each iteration ----------------------------------------------------------------------------------------

    def window_arrays(self, batches: Sequence[Batch]) -> list[dict[str, mx.array]]:
        """Return what the loss reads besides each batch of an accumulation window, or of a validation. Lazy.

        1. For KTO "baseline", z = max(0, mean of log p - log p_0 over the mismatched answers of the whole window), by
           which one window of several batches gives what one large batch gives.
        2. "reference", the log-probabilities [n P] under the reference, unless the rows have them.
        3. "inputs", those of the batch, delayed until the rest is computed. Otherwise MLX would run the forward passes
           of all at once, and hold their activations.
        """
        if not self.config.has_reference:
            return [{} for _ in batches]
        shared = {"baseline": self._baseline(batches)} if self.config.train_mode == KTO else {}
        return [shared | self._batch_arrays(batch, list(shared.values())) for batch in batches]

    def _batch_arrays(self, batch: Batch, previous: list[mx.array]) -> dict[str, mx.array]:
        found = {}
        if batch.answers is not None and batch.answers.reference is None:
            found["reference"] = self._before_training(batch, previous)
            previous = [found["reference"]]
        if previous:
            found["inputs"] = mx.depends([mx.array(batch.inputs)], previous)[0]
        return found

    def _baseline(self, batches: Sequence[Batch]) -> mx.array:
        total, count = mx.array(0.0), 0
        for batch in batches:
            count += len(batch.rows)
            mismatched = None if batch.answers is None else batch.answers.mismatched
            if mismatched is None:
                continue
            reference = self._before_training(mismatched, [total])
            ratio = log_probabilities(self.loss, mismatched, [reference]) - reference
            # A broken row breaks the loss of its own batch only.
            total = total + mx.sum(mx.where(mx.isfinite(ratio), ratio, 0))
        return mx.maximum(self.workers.sum(total) / max(count, 1), 0)

    def _before_training(self, batch: Batch, previous: list[mx.array]) -> mx.array:
        """Return the log-probabilities of a batch's answers under the reference; see `log_probabilities`."""
        if batch.answers is not None and batch.answers.reference is not None:
            return mx.depends([mx.array(batch.answers.reference)], previous)[0]
        with self.installed():
            return log_probabilities(self.loss, batch, previous)

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


def log_probabilities(loss: PreferenceLoss, batch: Batch, previous: Sequence[mx.array] = ()) -> mx.array:
    """Return the log-probability of each answer of a batch under the current parameters; [n P]. Lazy.

    Nothing is computed until `previous` is.
    """
    model, arrays = loss.model, batch_arrays(batch)
    if previous:
        arrays["inputs"] = mx.depends([arrays["inputs"]], list(previous))[0]
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
            others = [rows[row] for row in answers.mismatched.answers.rows]
            values[others, each] = np.array(log_probabilities(loss, answers.mismatched))[: len(others)]
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
