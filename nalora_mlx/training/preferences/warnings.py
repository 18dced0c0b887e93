"""Warnings of the known failures of preference training, from the measures of the validation set."""

from collections.abc import Mapping

from nalora_mlx.runs.progress import Progress

COLLAPSE = 0.5  # nats per token by which the chosen answers may become less likely
LENGTH_RIGHT, LENGTH_WRONG = 0.7, 0.5  # accuracy on pairs with a longer chosen answer, and with a shorter one
DRIFT = 1.0  # nats per token of KL divergence


def new_warnings(progress: Progress, measures: Mapping[str, float]) -> list[str]:
    """Return what the measures of a validation warn of, each kind once in a run. The first validation warns of nothing.

    - collapse: the chosen answers, too, become unlikely. The loss only asks that the rejected ones become more so.
    - length: answers are told apart by their length. Pairs with a longer chosen answer are right, others are not.
    - drift: the model is far from the reference.
    """
    if not progress.first_valid_measures:
        progress.first_valid_measures = dict(measures)
        return []
    found: dict[str, str] = {}
    fall = progress.first_valid_measures.get("chosen_logp", 0.0) - measures.get("chosen_logp", 0.0)
    if fall > COLLAPSE:
        found["collapse"] = (
            f"the chosen answers have become less likely, too, by {fall:.2f} nats per token; lower the learning rate, "
            "raise --preference-beta, or use --train-mode orpo, which also trains on them"
        )
    longer, shorter = measures.get("accuracy_longer", 0.0), measures.get("accuracy_shorter", 1.0)
    if longer >= LENGTH_RIGHT and shorter < LENGTH_WRONG:
        found["length"] = (
            f"the model prefers long answers: accuracy is {longer:.2f} where the chosen answer is the longer one, and "
            f"{shorter:.2f} where it is the shorter one; use --length-normalized or --train-mode simpo, or balance the "
            "lengths of the rows"
        )
    if measures.get("kl", 0.0) > DRIFT:
        found["drift"] = (
            f"the model has moved far from the reference, by a KL divergence of {measures['kl']:.2f} nats per token; "
            "lower the learning rate, or raise --preference-beta"
        )
    new = [kind for kind in found if kind not in progress.warned]
    progress.warned += new
    return [found[kind] for kind in new]
