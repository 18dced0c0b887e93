"""The one exception that a person's mistake raises; every room may use it, and it uses none."""


class InputError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do.

    The commands print it as one line and exit with status 2.
    """
