"""The `nalora serve` command: mlx-lm's HTTP server for one base model, with or without adapters.

A command, so it may import every package. `server` imports mlx-lm's server and is imported only when one starts.
"""
