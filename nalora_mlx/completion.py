"""`nalora completion`: print a script that lets a shell complete nalora's commands and flags, made by shtab."""

import argparse
import sys
from pathlib import Path
from typing import Any

from nalora_mlx.arguments import Parser, add_common
from nalora_mlx.cli import COMMANDS, command

SHELLS = ("bash", "zsh", "fish")


def build_parser(prog: str) -> Parser:
    """Build a parser that takes the shell."""
    parser = Parser(
        prog=prog,
        usage="SHELL",
        description="Print a script that completes nalora's commands and flags, for a file that your shell reads.",
        examples="""
        bash, with the package bash-completion
          nalora completion bash > ~/.local/share/bash-completion/completions/nalora
        zsh, with fpath+=~/.zfunc before compinit in ~/.zshrc
          nalora completion zsh > ~/.zfunc/_nalora
        fish
          nalora completion fish > ~/.config/fish/completions/nalora.fish
        """,
    )
    shells = f"shell to print the script for: {', '.join(SHELLS)}"
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=shells)
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
