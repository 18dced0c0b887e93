"""`nalora chat`: talk to a model, with or without an adapter, or to base and tuned model side by side."""

import argparse
import sys
import unicodedata
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import Parser
from nalora_mlx.core.errors import InputError

if TYPE_CHECKING:
    import mlx.nn as nn
    from rich.console import Console, RenderableType

    from nalora_mlx.models.conversation import Conversation

COMMANDS = {
    "/system TEXT": "set the system message, without TEXT remove it; the turns stay",
    "/compare": "let base and tuned model answer side by side; once more: the tuned one alone",
    "/reset": "forget all turns",
    "/help": "list these",
    "/quit": "end, as Ctrl-D does",
}
LETTERS = {"q": "/quit", "r": "/reset", "h": "/help"}  # mlx_lm.chat's commands
NARROW = 80  # columns; below, two answers are shown one after the other


def build_parser(prog: str) -> Parser:
    """Take the flags of mlx_lm.chat for one machine, and --compare."""
    listed = "; ".join(f"{name}: {text}" for name, text in COMMANDS.items())
    parser = Parser(prog=prog, description=f"Talk to a model. In the chat: {listed}. Ctrl-C stops an answer.")
    add = parser.add_argument
    add("--model", required=True, help="local model directory or Hugging Face repo")
    add("--adapter-path", help="directory of a trained adapter")
    add("--compare", action="store_true", help="answer with and without the adapter, side by side")
    add("--system-prompt", help="system message")
    add("--max-tokens", "-m", type=int, default=256, help="longest answer in tokens (default: 256)")
    add("--temp", type=float, default=0.0, help="sampling temperature (default: 0, greedy)")
    add("--top-p", type=float, default=1.0, help="sampling top-p (default: 1)")
    add("--xtc-probability", type=float, default=0.0, help="probability of XTC sampling (default: 0)")
    add("--xtc-threshold", type=float, default=0.1, help="threshold of XTC sampling (default: 0.1)")
    add("--seed", type=int, default=0, help="seed of the sampler (default: 0)")
    add("--max-kv-size", type=int, help="longest key-value cache in tokens")
    add("--prefill-step-size", type=int, default=2048, help="prompt tokens at a time (default: 2048)")
    add("--trust-remote-code", action="store_true", help="run code that the model brings along")
    return parser


class Chat:
    """What a person types, and what is shown of the answers.

    Args:
        console: where answers go; notes go to standard error unless a person types at a terminal.
        tuned: the conversation with the model.
        base: that with the model without its adapter, None if there is none.
        settings: of mlx-lm's generator.
    """

    def __init__(
        self, console: "Console", tuned: "Conversation", base: "Conversation | None", settings: dict[str, Any]
    ):
        self.console, self.tuned, self.base, self.settings = console, tuned, base, settings
        self.comparing = False
        self.typed = sys.stdin.isatty()

    def loop(self) -> None:
        """Take lines until the input ends, or a line ends the chat."""
        if self.typed:
            with suppress(ImportError):  # the arrow keys edit the line and bring back earlier ones
                import readline  # noqa: F401
        while True:
            try:
                line = input("> " if self.typed else "").rstrip()
            except EOFError:
                return
            line = LETTERS.get(line, line)
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.command(*line.split(maxsplit=1))
                elif line.strip():
                    self.turn(line.strip())
            except InputError as error:
                self.note(str(error))

    def command(self, name: str, text: str = "") -> None:
        """Do what a line with a slash says.

        Raises:
            InputError: there is no such command, or it cannot be done.
        """
        everyone = [self.tuned] if self.base is None else [self.tuned, self.base]
        if name == "/system":
            for conversation in everyone:
                conversation.set_system(text)
        elif name == "/reset":
            for conversation in everyone:
                conversation.reset()
        elif name == "/help":
            for command, meaning in COMMANDS.items():
                self.note(f"{command:<14}{meaning}")
        elif name == "/compare":
            self.compare(not self.comparing)
            self.note(
                "base and tuned model both answer" if self.comparing else "the tuned model answers alone"
            )
        else:
            known = ", ".join(command.split()[0] for command in COMMANDS)
            raise InputError(
                f"no command {name}; there are {known} (a message may begin with a space and a slash)"
            )

    def compare(self, on: bool) -> None:
        """Let the base answer too, from the history that there is, or no more.

        Raises:
            InputError: there is no base.
        """
        if self.base is None:
            raise InputError("comparing takes --model BASE with --adapter-path ADAPTER")
        self.comparing = on
        self.base.messages = self.tuned.messages

    def turn(self, text: str) -> None:
        """Answer a message; Ctrl-C at a terminal stops the answer and takes the message back."""
        speaking = {"base": self.base, "tuned": self.tuned} if self.comparing else {"": self.tuned}
        conversations = {name: one for name, one in speaking.items() if one is not None}
        before = [one.messages for one in conversations.values()]
        wide = self.console.is_terminal and not self.console.is_dumb_terminal and self.console.width >= NARROW
        try:
            if self.comparing and wide:
                self._in_columns(conversations, text)
            else:
                self._one_by_one(conversations, text)
        except KeyboardInterrupt:
            if not self.typed:
                raise
            for one, messages in zip(conversations.values(), before, strict=True):
                one.messages = messages
            print()
            self.note("stopped; this turn is forgotten")

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        if self.typed:
            self.console.print(text, style="dim", markup=False)
        else:
            print(text, file=sys.stderr)

    def _one_by_one(self, conversations: "dict[str, Conversation]", text: str) -> None:
        for name, conversation in conversations.items():
            if name:
                self.console.print(f"{name}:", style="bold")
            with closing(conversation.answer(text, **self.settings)) as pieces:
                for piece in pieces:
                    print(self._shown(piece), end="", flush=True)
            print()
            if conversation.cut:
                self.note(self._limit())

    def _in_columns(self, conversations: "dict[str, Conversation]", text: str) -> None:
        from rich.live import Live

        answers = dict.fromkeys(conversations, "")
        with Live(
            get_renderable=lambda: self._columns(answers), console=self.console, refresh_per_second=8
        ) as live:
            for name, conversation in conversations.items():
                with closing(conversation.answer(text, **self.settings)) as pieces:
                    for piece in pieces:
                        answers[name] += self._shown(piece)
                if conversation.cut:
                    answers[name] += f"\n({self._limit()})"
            live.refresh()

    def _columns(self, answers: dict[str, str]) -> "RenderableType":
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, expand=True, pad_edge=False)
        for name in answers:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*map(Text, answers.values()))
        return table

    def _shown(self, piece: str) -> str:
        """A piece of an answer as it is, or without what would steer the terminal."""
        if not self.console.is_terminal:
            return piece
        return "".join(c for c in piece if c in "\n\t" or unicodedata.category(c) != "Cc")

    def _limit(self) -> str:
        return f"cut at {self.settings['max_tokens']} tokens; --max-tokens is the limit"


def run(args: argparse.Namespace) -> None:
    """Load the model and answer until the input ends."""
    from nalora_mlx.core.paths import check_paths
    from nalora_mlx.models.loading import load_model

    check_paths(args.model, args.adapter_path)
    if args.compare and args.adapter_path is None:
        raise InputError("--compare takes --adapter-path, the adapter to answer with and without")
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler
    from rich.console import Console

    from nalora_mlx.adapters.files import load_any_adapter
    from nalora_mlx.models.conversation import Conversation

    model, tokenizer, _ = load_model(args.model, args.trust_remote_code)
    if not tokenizer.has_chat_template:
        raise InputError(
            f"--model {args.model}: has no chat template; use nalora generate, or an instruct model"
        )
    base = None
    if args.adapter_path:
        base, model = model, share_weights(model, args.model, args.trust_remote_code)
        load_any_adapter(model, Path(args.adapter_path).expanduser())
        base.eval()
    model.eval()
    mx.random.seed(args.seed)
    sampler = make_sampler(
        args.temp,
        args.top_p,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    settings = {
        "max_tokens": args.max_tokens,
        "sampler": sampler,
        "prefill_step_size": args.prefill_step_size,
    }
    tuned = Conversation(model, tokenizer, args.system_prompt, args.max_kv_size)
    untuned = (
        Conversation(base, tokenizer, args.system_prompt, args.max_kv_size) if base is not None else None
    )
    chat = Chat(Console(highlight=False), tuned, untuned, settings)
    if args.compare:
        chat.compare(True)
    if chat.typed:
        adapter = f" with {args.adapter_path}" if args.adapter_path else ""
        chat.note(f"{args.model}{adapter}. Type a message; /help lists the commands.")
    chat.loop()


def share_weights(model: "nn.Module", name: str, trust_remote_code: bool) -> "nn.Module":
    """The same model once more, of the same arrays: an adapter on one of them leaves the other as it is."""
    from mlx_lm import utils

    from nalora_mlx.models.loading import local_directory

    # Lazy: its own arrays are never read.
    twin, _ = utils.load_model(local_directory(name), lazy=True, trust_remote_code=trust_remote_code)
    twin.update(model.parameters())
    return twin


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["chat", *sys.argv[1:]]))
