"""`nalora COMMAND` and `python -m nalora_mlx COMMAND`."""

import sys

from nalora_mlx import __version__
from nalora_mlx.cli import COMMANDS, EXIT_USAGE, command, execute
from nalora_mlx.core.parsing import nearest


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: nalora COMMAND [flags]; nalora COMMAND --help lists the flags\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()))
        return 0 if argv else EXIT_USAGE
    if argv[0] == "--version":
        print(f"nalora {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        print(f"nalora: error: no command {name!r}{nearest(name, COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    module = command(name)
    return execute(f"nalora {name}", module.build_parser, module.run, argv[1:])


if __name__ == "__main__":
    sys.exit(main())
