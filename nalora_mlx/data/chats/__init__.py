"""Chats as tokens: what the model reads before a turn, what it has to write, and what a chat template leaves out."""
