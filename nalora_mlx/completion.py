"""`nalora completion`: print a script that lets a shell complete nalora's commands and flags, made by shtab."""

import argparse
import sys
from pathlib import Path
from typing import Any

from nalora_mlx.cli import COMMANDS, Parser, add_common, command

# Where each shell looks for completion scripts when it starts.
PLACES = {
    "bash": "~/.local/share/bash-completion/completions/nalora (needs bash-completion)",
    "zsh": "_nalora in a directory of $fpath",
    "fish": "~/.config/fish/completions/nalora.fish",
}


def build_parser(prog: str) -> Parser:
    """Build a parser that takes the shell."""
    places = "; ".join(f"{shell}: {place}" for shell, place in PLACES.items())
    parser = Parser(
        prog=prog,
        description=f"Print a completion script. Save it where your shell looks for it: {places}.",
    )
    parser.add_argument("shell", choices=tuple(PLACES), help="shell to print the script for")
    return parser


def run(args: argparse.Namespace) -> None:
    """Print the completion script."""
    import shtab

    print(shtab.complete(_whole_parser(shtab.FILE), args.shell))


def _whole_parser(file: Any) -> argparse.ArgumentParser:
    """Return one parser with all commands. Free text is completed as a file name, since most of it is paths."""
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
