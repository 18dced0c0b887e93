"""`nalora completion`: the script that lets a shell complete nalora's commands and flags, made by shtab."""

import argparse
import sys
from pathlib import Path
from typing import Any

from nalora_mlx.cli import COMMANDS, Parser, add_common, command

# Where each shell looks for the script when it starts.
PLACES = {
    "bash": "~/.local/share/bash-completion/completions/nalora (needs the package bash-completion)",
    "zsh": "a directory of $fpath, as _nalora",
    "fish": "~/.config/fish/completions/nalora.fish",
}


def build_parser(prog: str) -> Parser:
    """Take the shell."""
    places = "; ".join(f"{shell}: {place}" for shell, place in PLACES.items())
    parser = Parser(
        prog=prog,
        description=f"Print a completion script. Where it goes, to be read at each start: {places}.",
    )
    parser.add_argument("shell", choices=tuple(PLACES), help="the shell to print it for")
    return parser


def run(args: argparse.Namespace) -> None:
    """Print the script."""
    import shtab

    print(shtab.complete(_whole_parser(shtab.FILE), args.shell))


def _whole_parser(file: Any) -> argparse.ArgumentParser:
    """One parser with all commands; a value that is free text is completed as a file, since most such are paths."""
    whole = Parser(prog="nalora")
    add_common(whole)
    group = whole.add_subparsers(dest="command")
    for name, text in COMMANDS.items():
        parser = command(name).build_parser(f"nalora {name}")
        add_common(parser)
        for action in parser._actions:
            if action.nargs != 0 and not action.choices and action.type in (None, str, Path):
                action.complete = file
        group.add_parser(name, help=text, parents=[parser], add_help=False)
    return whole


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["completion", *sys.argv[1:]]))
