"""Tokenizers in GGUF: tokens, merges or scores, pre-tokenizer, special tokens and ends.

`tokenizer` reads a model's files, `pretokenizers` recognizes how it cuts words, and `tokenizer_check` compares the
result with mlx-lm's tokenizer.
"""
