"""The `nalora export` command: convert adapters and models to the formats of other programs.

GGUF for llama.cpp, Ollama and LM Studio; PEFT for transformers and vLLM; adapters for mlx-lm. A command, so it may
import every package. Modules are imported where they are used: GGUF needs the optional package `gguf`.
"""
