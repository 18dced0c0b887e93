"""`nalora chat`: chat with a model, with or without an adapter, or with base and tuned model side by side."""

import argparse
import sys
import unicodedata
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from nalora_mlx.cli import Parser, add_chat_flags, configure_chats, note_merged
from nalora_mlx.core.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from nalora_mlx.models.conversation import Conversation

MIN_COLUMNS = 80  # width of a terminal that shows two answers side by side


class Chat:
    """The loop that reads messages and commands, and prints answers.

    Args:
        console: where answers are printed. Notes go there too in an interactive chat, otherwise to standard error.
        tuned: the conversation with the model.
        base: the conversation with the model without its adapter; None if there is no adapter.
        settings: arguments of mlx-lm's `stream_generate`.
    """

    def __init__(
        self, console: "Console", tuned: "Conversation", base: "Conversation | None", settings: dict[str, Any]
    ):
        self.console, self.tuned, self.base, self.settings = console, tuned, base, settings
        self.comparing = self.ended = False
        self.interactive = sys.stdin.isatty()

    def loop(self) -> None:
        """Read lines until the input or the chat ends."""
        if self.interactive:
            with suppress(ImportError):  # line editing and history
                import readline  # noqa: F401
        while not self.ended:
            try:
                line = input("> " if self.interactive else "").rstrip()
            except EOFError:
                return
            try:
                self.handle(SHORTCUTS.get(line, line))
            except InputError as error:
                self.note(str(error))

    def handle(self, line: str) -> None:
        """Run a command or answer a message; ignore an empty line.

        Raises:
            InputError: the command is unknown or cannot be run.
        """
        if not line.startswith("/"):
            if line.strip():
                self.answer(line.strip())
            return
        name, *argument = line.split(maxsplit=1)
        for command in COMMANDS:
            if command.name == name:
                return command.method(self, *argument)
        known = ", ".join(command.name for command in COMMANDS)
        raise InputError(
            f"no command {name}; the commands are {known} (start a message with a space to send a slash)"
        )

    # --- commands ---------------------------------------------------------------------------------------------

    def set_system(self, text: str = "") -> None:
        """Set the system message, or remove it if there is no text."""
        for conversation in self._conversations():
            conversation.set_system(text)

    def toggle_comparison(self, _: str = "") -> None:
        """Start or stop answering with the base model too."""
        self.compare(not self.comparing)
        self.note("base and tuned model both answer" if self.comparing else "only the tuned model answers")

    def reset(self, _: str = "") -> None:
        """Remove all turns."""
        for conversation in self._conversations():
            conversation.reset()

    def help(self, _: str = "") -> None:
        """List the commands."""
        for command in COMMANDS:
            self.note(f"{command.usage:<14}{command.help}")

    def quit(self, _: str = "") -> None:
        """End the chat."""
        self.ended = True

    # --- answers ----------------------------------------------------------------------------------------------

    def compare(self, on: bool) -> None:
        """Switch the base model's answers on or off. The base continues from the tuned model's history.

        Raises:
            InputError: there is no base model.
        """
        if self.base is None:
            raise InputError("comparing needs --model BASE with --adapter-path ADAPTER")
        self.comparing = on
        self.base.messages = self.tuned.messages

    def answer(self, text: str) -> None:
        """Answer a message. In an interactive chat, Ctrl-C stops the answer and removes the turn."""
        speakers = {"": self.tuned}
        if self.comparing and self.base is not None:
            speakers = {"base": self.base, "tuned": self.tuned}
        before = [conversation.messages for conversation in speakers.values()]
        show = self._in_columns if self.comparing and self._has_columns() else self._one_by_one
        try:
            show(speakers, text)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            for conversation, messages in zip(speakers.values(), before, strict=True):
                conversation.messages = messages
            print()
            self.note("stopped; this turn is removed from the history")

    def note(self, text: str) -> None:
        """Print a line that is not an answer."""
        if self.interactive:
            self.console.print(text, style="dim", markup=False)
        else:
            print(text, file=sys.stderr)

    def _conversations(self) -> "list[Conversation]":
        return [self.tuned] if self.base is None else [self.tuned, self.base]

    def _one_by_one(self, speakers: "dict[str, Conversation]", text: str) -> None:
        for name, conversation in speakers.items():
            if name:
                self.console.print(f"{name}:", style="bold")
            with closing(conversation.answer(text, **self.settings)) as pieces:
                for piece in pieces:
                    print(self._printable(piece), end="", flush=True)
            print()
            if conversation.cut:
                self.note(self._cut_note())

    def _in_columns(self, speakers: "dict[str, Conversation]", text: str) -> None:
        from rich.live import Live

        answers = dict.fromkeys(speakers, "")
        with Live(
            get_renderable=lambda: _columns(answers), console=self.console, refresh_per_second=8
        ) as live:
            for name, conversation in speakers.items():
                with closing(conversation.answer(text, **self.settings)) as pieces:
                    for piece in pieces:
                        answers[name] += self._printable(piece)
                if conversation.cut:
                    answers[name] += f"\n({self._cut_note()})"
            live.refresh()

    def _has_columns(self) -> bool:
        console = self.console
        return console.is_terminal and not console.is_dumb_terminal and console.width >= MIN_COLUMNS

    def _printable(self, piece: str) -> str:
        """Remove control characters from text for a terminal."""
        if not self.console.is_terminal:
            return piece
        return "".join(c for c in piece if c in "\n\t" or unicodedata.category(c) != "Cc")

    def _cut_note(self) -> str:
        return f"cut at {self.settings['max_tokens']} tokens; raise --max-tokens for longer answers"


def _columns(answers: dict[str, str]) -> "RenderableType":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, expand=True, pad_edge=False)
    for name in answers:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*map(Text, answers.values()))
    return table


class Command(NamedTuple):
    """A chat command: a method of `Chat` that takes the text after the command's name, if there is any."""

    name: str
    argument: str
    help: str
    method: Callable[..., None]

    @property
    def usage(self) -> str:
        """The command with its argument."""
        return f"{self.name} {self.argument}".rstrip()


COMMANDS = (
    Command("/system", "TEXT", "set the system message, or remove it without TEXT", Chat.set_system),
    Command("/compare", "", "switch the base model's answers on or off", Chat.toggle_comparison),
    Command("/reset", "", "remove all turns", Chat.reset),
    Command("/help", "", "list the commands", Chat.help),
    Command("/quit", "", "end the chat, as Ctrl-D does", Chat.quit),
)
SHORTCUTS = {"q": "/quit", "r": "/reset", "h": "/help"}  # the commands of mlx_lm.chat


def build_parser(prog: str) -> Parser:
    """Build a parser with the single-machine flags of mlx_lm.chat, --compare, and those of the chat template."""
    listed = "; ".join(f"{command.usage}: {command.help}" for command in COMMANDS)
    parser = Parser(
        prog=prog, description=f"Chat with a model. Chat commands: {listed}. Ctrl-C stops an answer."
    )
    add = parser.add_argument
    add("--model", required=True, help="local model directory or Hugging Face repo")
    add("--adapter-path", help="directory of a trained adapter")
    add("--compare", action="store_true", help="answer with and without the adapter, side by side")
    add("--system-prompt", help="system message")
    add("--max-tokens", "-m", type=int, default=256, help="maximum length of an answer (default: 256)")
    add("--temp", type=float, default=0.0, help="sampling temperature (default: 0, greedy)")
    add("--top-p", type=float, default=1.0, help="top-p sampling threshold (default: 1)")
    add("--xtc-probability", type=float, default=0.0, help="XTC sampling probability (default: 0)")
    add("--xtc-threshold", type=float, default=0.1, help="XTC sampling threshold (default: 0.1)")
    add("--seed", type=int, default=0, help="seed of the sampler (default: 0)")
    add("--max-kv-size", type=int, help="maximum size of the key-value cache, in tokens")
    add(
        "--prefill-step-size", type=int, default=2048, help="prompt tokens processed per step (default: 2048)"
    )
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_chat_flags(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the model and chat until the input ends."""
    from nalora_mlx.core.paths import check_paths

    check_paths(args.model, args.adapter_path)
    if args.compare and args.adapter_path is None:
        raise InputError("--compare needs --adapter-path: it answers with and without the adapter")
    from rich.console import Console

    tuned, base = _load(args)
    chat = Chat(Console(highlight=False), tuned, base, _settings(args, tuned.tokenizer))
    if args.compare:
        chat.compare(True)
    if chat.interactive:
        adapter = f" with {args.adapter_path}" if args.adapter_path else ""
        chat.note(f"{args.model}{adapter}. Type a message; /help lists the commands.")
    chat.loop()


def _load(args: argparse.Namespace) -> "tuple[Conversation, Conversation | None]":
    """Load the model; return conversations with it and, if there is an adapter, with the base alone."""
    from nalora_mlx.adapters.comparison import load_tuned
    from nalora_mlx.models.conversation import Conversation
    from nalora_mlx.models.loading import load_model

    base, tokenizer, _ = load_model(args.model, args.trust_remote_code)
    configure_chats(tokenizer, args.chat_template, args.chat_template_args, args.adapter_path)
    if not tokenizer.has_chat_template:
        raise InputError(
            f"--model {args.model}: has no chat template; give one with --chat-template, use nalora generate, or an "
            "instruct model"
        )
    base.eval()
    settings = (tokenizer, args.system_prompt, args.max_kv_size)
    if not args.adapter_path:
        return Conversation(base, *settings), None
    note_merged(args.model, args.adapter_path)
    tuned = load_tuned(base, args.model, args.adapter_path, args.trust_remote_code)
    return Conversation(tuned, *settings), Conversation(base, *settings)


def _settings(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Seed the sampler; return the arguments of mlx-lm's `stream_generate`."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(args.seed)
    sampler = make_sampler(
        args.temp,
        args.top_p,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    return {
        "max_tokens": args.max_tokens,
        "sampler": sampler,
        "prefill_step_size": args.prefill_step_size,
    }


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["chat", *sys.argv[1:]]))
