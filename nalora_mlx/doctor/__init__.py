"""The `nalora doctor` command: a page of checks of this machine, and of a run before it starts.

A command, so it may import every package. `page` prints the checks with their levels, and the other modules make them:
`machine`, `model`, `data` and `memory`. Heavy modules are imported where they are used, so that the first lines appear
at once.
"""
