"""Nonlinearity-Aware LoRA fine-tuning with MLX."""
