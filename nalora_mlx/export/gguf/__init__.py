"""Models and adapters in the GGUF format, for llama.cpp and programs based on it.

May import what the commands may. `model` and `adapter` write files; `architectures` says which model types llama.cpp
computes as mlx-lm does, and how, with one table per family in `families`; `vocabulary` converts tokenizers.
"""
