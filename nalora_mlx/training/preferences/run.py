"""What a preference run computes besides its loss: the reference, and the distance from it."""

from typing import Any

import mlx.core as mx

from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.data.batches import Batch
from nalora_mlx.ops.fast_math import vectorized
from nalora_mlx.ops.kl_divergence import tiled_kl_divergence
from nalora_mlx.runs.checkpoints import REFERENCE_FILE
from nalora_mlx.training.distributed import Workers
from nalora_mlx.training.loss import batch_arrays
from nalora_mlx.training.preferences.loss import PreferenceLoss
from nalora_mlx.training.preferences.reference import TRAIN, VALID, GoOn, Reference
from nalora_mlx.training.run_files import RunFiles

PROBED_TOKENS = 512  # at most, on which the divergence is measured


class PreferenceRun:
    """The part of a run that only preference training has.

    Args:
        loss: of the run.
        config: settings of the run.
        workers: who share batches.
    """

    def __init__(self, loss: PreferenceLoss, config: TrainingConfig, workers: Workers):
        self.loss, self.workers = loss, workers
        self.reference = Reference(loss, config, workers)
        self.window_arrays = self.reference.window_arrays

    def prepare(self, train_set: Any, valid_set: Any, files: RunFiles, go_on: GoOn) -> tuple[Any, Any] | None:
        """Return the rows with their log-probabilities under the reference, computed now or read from the checkpoint.

        Returns None if `go_on`, which is called after each batch, returns False.

        Raises:
            InputError: the checkpoint lacks what its run computed before training.
        """
        checkpoint = None if files.resume is None else files.resume / REFERENCE_FILE
        if not self.reference.prepare(train_set, valid_set, files.identity, files.output, go_on, checkpoint):
            return None
        files.reference = self.reference.file
        return self.reference.attached(train_set, TRAIN), self.reference.attached(valid_set, VALID)

    def divergence(self, batch: Batch) -> dict[str, float]:
        """Return "kl", the mean KL divergence per token from the reference, in nats, on tokens of a batch's answers.

        It is that of whole next-token distributions, KL(model || reference), after the same context. Empty if there is
        no copy of the parameters before training.
        """
        if self.reference.start is None:
            return {}
        arrays = batch_arrays(batch)
        positions = arrays["rows"][:PROBED_TOKENS], arrays["weights"][:PROBED_TOKENS]
        with self.reference.installed():
            reference = self._outputs(arrays, positions[0])
        model = self._outputs(arrays, positions[0])
        head = self.loss.head
        if head is not None and self.loss.has_tiles:
            values = tiled_kl_divergence(head.logits_for, head.vocabulary, model, reference)
        else:
            values = tiled_kl_divergence(lambda x, entries: x[:, entries], model.shape[-1], model, reference)
        counted = positions[1]
        total = self.workers.sum(mx.stack([mx.sum(mx.where(counted > 0, values, 0)), mx.sum(counted)]))
        return {"kl": float(total[0]) / max(float(total[1]), 1.0)}

    def _outputs(self, arrays: dict[str, Any], rows: mx.array) -> mx.array:
        """Return the hidden states at some positions, or the logits if the output head is not in tiles; [S, D]."""
        loss, model = self.loss, self.loss.model
        training = model.training
        model.eval()
        try:
            with vectorized(), loss.installed(arrays):
                forward = loss.head.hidden if loss.head is not None and loss.has_tiles else loss.forward
                outputs = forward(arrays["inputs"], **loss.model_arguments(arrays))
                outputs = outputs.reshape(-1, outputs.shape[-1])[rows]
                mx.eval(outputs)
        finally:
            model.train(training)
        return outputs
