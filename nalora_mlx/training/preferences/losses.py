"""The preference losses as functions of the log-probabilities of answers.

For each row, w and l are the chosen and the rejected answer, log p is the log-probability of an answer's tokens under
the model and log p_0 under the reference, and r = log p - log p_0 is the log-ratio. sigma is the logistic function.

All functions map arrays [P] to losses [P], in float32.
"""

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.core.config import PreferenceConfig


def dpo(config: PreferenceConfig, chosen: mx.array, rejected: mx.array) -> mx.array:
    """Return the loss of DPO for log-ratios, which IPO and `length_normalized` take per token.

    sigmoid: -(1 - e) log sigma(beta d) - e log sigma(-beta d) with d = r_w - r_l and label smoothing e
    hinge: max(0, 1 - beta d)
    ipo: (d - 1 / (2 beta))^2

    Source: DPO (arXiv 2305.18290), label smoothing in its conservative form; hinge as in SLiC (arXiv 2305.10425); IPO
    (arXiv 2310.12036), per token as its authors compute it.
    """
    beta, difference = config.beta_of_loss, chosen - rejected
    if config.dpo_loss == "hinge":
        return nn.relu(1 - beta * difference)
    if config.dpo_loss == "ipo":
        return mx.square(difference - 1 / (2 * beta))
    return _smoothed(beta * difference, config.label_smoothing)


def simpo(config: PreferenceConfig, chosen: mx.array, rejected: mx.array) -> mx.array:
    """Return the loss of SimPO for log-probabilities per token: -log sigma(beta (log p_w - log p_l) - gamma).

    With label smoothing e, (1 - e) times that, and e times -log sigma of the negative argument.

    Source: SimPO (arXiv 2405.14734).
    """
    difference = config.beta_of_loss * (chosen - rejected) - config.simpo_margin
    return _smoothed(difference, config.label_smoothing)


def orpo(config: PreferenceConfig, chosen: mx.array, rejected: mx.array) -> mx.array:
    """Return the odds ratio loss of ORPO: -beta log sigma(log odds_w - log odds_l) with odds = p / (1 - p).

    Takes log-probabilities per token, log p. The supervised loss that ORPO adds is not part of it.

    Source: ORPO (arXiv 2403.07691), where beta is called lambda.
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -config.beta_of_loss * nn.log_sigmoid(log_odds)


def kto(config: PreferenceConfig, ratio: mx.array, desirable: mx.array, baseline: mx.array) -> mx.array:
    """Return the loss of KTO for log-ratios r of single answers.

    w (1 - sigma(beta (r - z))) for desirable answers and v (1 - sigma(beta (z - r))) for the others, with their weights
    w and v, and z the estimate of the KL divergence from the reference.

    Args:
        config: settings.
        ratio: r; [P].
        desirable: labels, 1 or 0; [P].
        baseline: z, a scalar without a gradient.

    Source: KTO (arXiv 2402.01306).
    """
    sign = 2 * desirable - 1
    weight = mx.where(desirable > 0, config.desirable_weight, config.undesirable_weight)
    return weight * (1 - mx.sigmoid(config.beta_of_loss * sign * (ratio - baseline)))


def _smoothed(x: mx.array, smoothing: float) -> mx.array:
    """Return -(1 - e) log sigma(x) - e log sigma(-x)."""
    loss = -nn.log_sigmoid(x)
    return loss if not smoothing else (1 - smoothing) * loss - smoothing * nn.log_sigmoid(-x)


def _log1mexp(x: mx.array) -> mx.array:
    """Return log(1 - exp(x)) for x < 0, accurate near 0 and far from it."""
    x = mx.minimum(x, -1e-7)  # a probability of 1 has infinite odds
    near = x > -0.6931472
    return mx.where(
        near, mx.log(-mx.expm1(mx.where(near, x, -1.0))), mx.log1p(-mx.exp(mx.where(near, -1.0, x)))
    )
