"""A tuned model held to its truth where the tuning matters, so that an export without any effect cannot pass."""

import numpy as np


def relative_error(given: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


def effect_of(tuned: np.ndarray, base: np.ndarray, tolerance: float) -> float:
    """Return how far logits of tuned and base model are apart: at least 100 times a tolerance, and in first choices."""
    effect = relative_error(base, tuned)
    assert effect >= 100 * tolerance, (
        f"the effect {effect:.2g} is too small to show anything at {tolerance:g}"
    )
    assert (tuned.argmax(-1) != base.argmax(-1)).any(), "tuned and base model choose the same tokens"
    return effect


def close(given: np.ndarray, tuned: np.ndarray, base: np.ndarray, tolerance: float) -> None:
    """Assert that logits [..., tokens, vocabulary] are the tuned model's, whose distance from the base's would show."""
    effect_of(tuned, base, tolerance)
    error = relative_error(given, tuned)
    assert error < tolerance, f"relative error {error:.2g}, not below {tolerance:g}"
