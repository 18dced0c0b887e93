"""Tables of GGUF architectures, one row per model type of mlx-lm, by family.

A row says how a model's parameters become tensors, which metadata llama.cpp reads, and which configs it would compute
differently. `architectures` merges the tables.
"""
