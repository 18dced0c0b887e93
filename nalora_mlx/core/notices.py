"""Levels of notices. A plain text is a warning: something could be better, and the text says how."""


class Note(str):
    """A notice of what was understood or done, which asks for nothing."""

    __slots__ = ()
