"""Comparing logits of tuned models where tuning matters, so that an adapter without effect cannot pass."""

import numpy as np


def relative_error(given: np.ndarray, expected: np.ndarray) -> float:
    """Return |given - expected| / |expected|, with Euclidean norms."""
    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


def effect_of(tuned: np.ndarray, base: np.ndarray, tolerance: float) -> float:
    """Return the relative distance of tuned and base logits.

    Asserts that it is at least 100 times the tolerance, and that the most likely token differs somewhere.
    """
    effect = relative_error(base, tuned)
    assert effect >= 100 * tolerance, f"the effect {effect:.2g} is too small for a tolerance of {tolerance:g}"
    assert (tuned.argmax(-1) != base.argmax(-1)).any(), "tuned and base model choose the same tokens"
    return effect


def close(given: np.ndarray, tuned: np.ndarray, base: np.ndarray, tolerance: float) -> None:
    """Assert that logits [..., tokens, vocabulary] equal the tuned model's, which must differ from the base's."""
    effect_of(tuned, base, tolerance)
    error = relative_error(given, tuned)
    assert error < tolerance, f"relative error {error:.2g}, not below {tolerance:g}"
