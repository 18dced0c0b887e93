"""The `nalora chat` command: a chat with a model, or with base and tuned model side by side.

A command, so it may import every package. `loop` reads messages and commands and prints answers.
"""
