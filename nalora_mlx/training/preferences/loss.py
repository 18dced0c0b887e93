"""The preference loss of a model: log-probabilities of answers, compared with each other and with a reference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.core.config import DPO, KTO, ORPO, SIMPO, PreferenceConfig
from nalora_mlx.ops.attention import lean_attention
from nalora_mlx.ops.cross_entropy import weighted_sum
from nalora_mlx.ops.fast_math import vectorized_models
from nalora_mlx.training.loss import Arrays, Loss
from nalora_mlx.training.preferences import losses

# Means over pairs. In KTO, those of chosen answers are means over desirable rows, those of rejected ones over the
# others.
MEASURES = (
    "accuracy",  # share of pairs whose chosen answer has the higher reward; one half for equal rewards
    "chosen_reward",
    "rejected_reward",
    "chosen_logp",  # log-probability per token
    "rejected_logp",
    "accuracy_longer",  # of the pairs whose chosen answer is longer, in tokens
    "accuracy_shorter",  # of those whose chosen answer is shorter
)


class PreferenceLoss(Loss):
    """The summed loss of DPO, ORPO, KTO or SimPO over the rows of a batch, see `losses`.

    Args:
        model: see `Loss`.
        config: which loss, and its settings.
        forward: see `Loss`.
    """

    measures = MEASURES

    def __init__(
        self,
        model: nn.Module,
        config: PreferenceConfig,
        forward: Callable[[mx.array], mx.array] | None = None,
    ):
        super().__init__(model, forward)
        self.config = config
        self.log_probabilities = self.compile(lambda arrays: self._answers(arrays, False)[0])

    def __call__(
        self, arrays: Arrays, weights: mx.array | None = None, with_gradient: bool = True
    ) -> tuple[mx.array, mx.array | None]:
        """Return the loss and the (sum, count) of each of `MEASURES`, see `Loss`.

        The loss is w_0 sum_i loss_i over rows, plus w_1 times the summed cross entropy of the tokens that ORPO also
        trains on as supervised training does. In KTO, z is `arrays["baseline"]`. Without `arrays["reference"]`, the
        log-probabilities under the reference count as 0.

        `log_probabilities` computes those of the answers alone, each summed over its tokens; [n P].
        """
        weights = mx.ones(2) if weights is None else weights
        log_p, lengths, token_losses = self._answers(arrays, with_gradient)
        per_token = log_p / lengths
        ratio = log_p - arrays.get("reference", 0.0)
        if self.config.compares_per_token:
            ratio = ratio / lengths
        present = arrays["present"]
        compared = ratio if self.config.has_reference else per_token
        if self.config.train_mode == KTO:
            baseline = arrays.get("baseline", mx.array(0.0))
            row_losses = losses.kto(self.config, ratio, arrays["desirable"], baseline)
            measures = self._measures_of_labels(compared, per_token, arrays, baseline)
        else:
            loss_of = {DPO: losses.dpo, ORPO: losses.orpo, SIMPO: losses.simpo}[self.config.train_mode]
            row_losses = loss_of(self.config, compared[::2], compared[1::2])
            measures = self._measures_of_pairs(compared, per_token, lengths, present)
        loss = weighted_sum(row_losses, present * weights[0])
        if "sft_weights" in arrays:
            loss = loss + weighted_sum(token_losses, arrays["sft_weights"] * weights[1])
        return loss, mx.stop_gradient(measures)

    @contextmanager
    def installed(self, arrays: Arrays | None = None) -> Iterator[None]:
        """Make the model compute a batch exactly as a training step does, so that equal parameters give equal bits."""
        faster = vectorized_models() if self.compiled else nullcontext()
        with super().installed(arrays), faster, lean_attention():
            yield

    def _answers(self, arrays: Arrays, with_gradient: bool) -> tuple[mx.array, mx.array, mx.array]:
        """Return log p and the number of tokens of each answer, [n P], and the loss of each token, [S]."""
        token_losses = self.token_losses(arrays, with_gradient)
        count = arrays["present"].size * (1 if self.config.train_mode == KTO else 2)
        # A sum of `where`, not a scatter, whose order of additions varies on a GPU. Fillers may be NaN.
        belongs = mx.arange(count)[:, None] == arrays["answer_of"][None, :]  # [n P, S]
        log_p = -mx.sum(mx.where(belongs, token_losses[None, :], 0), axis=1)
        lengths = mx.maximum(mx.sum(belongs, axis=1), 1).astype(mx.float32)
        return log_p, lengths, token_losses

    def _measures_of_pairs(
        self, compared: mx.array, per_token: mx.array, lengths: mx.array, present: mx.array
    ) -> mx.array:
        rewards = self.config.beta_of_loss * compared
        difference = rewards[::2] - rewards[1::2]
        right = (difference > 0) + 0.5 * (difference == 0)
        longer, shorter = lengths[::2] > lengths[1::2], lengths[::2] < lengths[1::2]
        values = (right, rewards[::2], rewards[1::2], per_token[::2], per_token[1::2], right, right)
        counted = (present,) * 5 + (present * longer, present * shorter)
        return _sums_and_counts(values, counted)

    def _measures_of_labels(
        self, compared: mx.array, per_token: mx.array, arrays: Arrays, baseline: mx.array
    ) -> mx.array:
        present, desirable = arrays["present"], arrays["desirable"]
        rewards = self.config.beta_of_loss * compared
        difference = (2 * desirable - 1) * (compared - baseline)
        right = (difference > 0) + 0.5 * (difference == 0)
        wanted, unwanted, none = present * desirable, present * (1 - desirable), mx.zeros_like(present)
        values = (right, rewards, rewards, per_token, per_token, right, right)
        return _sums_and_counts(values, (present, wanted, unwanted, wanted, unwanted, none, none))


def _sums_and_counts(values: tuple[mx.array, ...], counted: tuple[mx.array, ...]) -> mx.array:
    """Return the sum and the count of each of K measures over the rows that count; [K, 2]."""
    rows, counts = mx.stack(list(values)), mx.stack(list(counted))
    return mx.stack([mx.where(counts > 0, rows, 0).sum(axis=1), counts.sum(axis=1)], axis=1)
