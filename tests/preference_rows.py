"""Random tokenized preference rows, and the settings of every preference loss."""

import numpy as np

from nalora_mlx.data.preferences import PreferenceExample
from nalora_mlx.data.tokenization import Example

MODES = {
    "dpo": {"train_mode": "dpo"},
    "dpo smoothed": {"train_mode": "dpo", "label_smoothing": 0.1},
    "dpo per token": {"train_mode": "dpo", "length_normalized": True, "preference_beta": 0.5},
    "ipo": {"train_mode": "dpo", "dpo_loss": "ipo"},
    "hinge": {"train_mode": "dpo", "dpo_loss": "hinge"},
    "orpo": {"train_mode": "orpo"},
    "orpo masked": {"train_mode": "orpo"},
    "kto": {"train_mode": "kto", "desirable_weight": 1.5},
    "simpo": {"train_mode": "simpo"},
}


def preference_rows(mode, count=4, seed=0, prompt=(1, 12), answer=(2, 9), vocabulary=32, known=False):
    """Return rows with prompts and answers of random lengths; the first prompt has a single token.

    Args:
        mode: of `MODES`. "orpo" also trains on prompts, "orpo masked" does not.
        known: whether the rows have log-probabilities under the reference.
    """
    rng = np.random.default_rng(seed)

    def text(start, source):
        tokens = np.concatenate([start, rng.integers(1, vocabulary, int(rng.integers(*answer)))])
        return Example(tokens.astype(np.int32), np.arange(len(tokens)) >= len(start), source)

    rows = []
    for i in range(count):
        start = rng.integers(1, vocabulary, int(rng.integers(*prompt)) if i else prompt[0])
        chosen, rejected = (text(start, f"rows:{i + 1}") for _ in range(2))
        reference = (-9.0 - i, i - 11.0) if known and not mode.startswith(("orpo", "simpo")) else ()
        if mode == "kto":
            rows.append(PreferenceExample((chosen,), i % 2 == 1, mismatched=rejected, reference=reference))
            continue
        masks = {"orpo": np.arange(len(chosen.tokens)) > 0, "orpo masked": chosen.loss_mask}
        rows.append(PreferenceExample((chosen, rejected), sft_mask=masks.get(mode), reference=reference))
    return rows
