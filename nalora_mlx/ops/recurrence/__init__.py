"""Recurrences in forms for training: in chunks of tokens, recomputed in the backward."""
