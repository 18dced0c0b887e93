"""The loop of a chat: it reads messages and commands, and prints the answers of one or two models."""

import os
import shlex
import sys
import unicodedata
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from nalora_mlx.core.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from nalora_mlx.models.conversation import Conversation

MIN_COLUMNS = 80  # width of a terminal that shows two answers side by side
Answers = Mapping[str, Generator[str, None, None]]  # of each speaker, in pieces


class PendingImage(NamedTuple):
    """An image that the next message will have, as an image of Pillow."""

    name: str
    image: Any

    def __str__(self) -> str:
        """Return how the chat names it."""
        return f"{self.name} ({self.image.width} x {self.image.height})"


class Chat:
    """The loop that reads messages and commands, and prints answers.

    Base and tuned model each have a history of their own: the same messages of the user, and their own answers.

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
        self.pending: list[PendingImage] = []
        self.comparing = self.ended = False
        self.interactive = sys.stdin.isatty()

    def loop(self) -> None:
        """Read lines until the input or the chat ends. In an interactive chat, Ctrl-C must be typed twice to end it."""
        if self.interactive:
            with suppress(ImportError):  # line editing and history
                import readline  # noqa: F401
        interrupted = False
        while not self.ended:
            try:
                line = input("> " if self.interactive else "").rstrip()
            except EOFError:
                if self.interactive:
                    print()
                return
            except KeyboardInterrupt:
                if interrupted or not self.interactive:
                    raise
                interrupted = True
                print()
                self.note("Ctrl-D or /quit ends the chat")
                continue
            interrupted = False
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
                try:
                    self.answer(line.strip(), [image.image for image in self.pending])
                except InputError:
                    self.pending = []  # an image that the model refuses would be refused again
                    raise
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
        self.confirm(f"system message {'set' if text else 'removed'}")

    def add_image(self, path: str = "") -> None:
        """Put an image before the next message.

        Raises:
            InputError: the model does not see images, or the image cannot be read.
        """
        if self.tuned.blind:
            raise InputError(f"/image: {self.tuned.blind}")
        if not path:
            raise InputError("/image needs the path of an image: /image PATH")
        from nalora_mlx.data.images import open_image

        name = _typed_path(path)
        self.pending.append(PendingImage(name, open_image(os.path.abspath(name), "/image")))
        self.confirm(f"with the next message: {self.pending[-1]}")

    def list_images(self, _: str = "") -> None:
        """List the images that the next message will have."""
        for image in self.pending:
            self.note(f"with the next message: {image}")
        if not self.pending:
            self.note(self.tuned.blind or "no images for the next message; /image PATH adds one")

    def toggle_comparison(self, _: str = "") -> None:
        """Start or stop answering with the base model too."""
        self.compare(not self.comparing)
        both = "base and tuned model both answer, each with its own history"
        self.note(both if self.comparing else "only the tuned model answers")

    def reset(self, _: str = "") -> None:
        """Remove all turns."""
        for conversation in self._conversations():
            conversation.reset()
        self.pending = []
        self.confirm("all turns removed")

    def help(self, _: str = "") -> None:
        """List the commands."""
        for command in COMMANDS:
            self.note(f"{command.usage:<14}{command.help}")
        self.note(f"{'Ctrl-C':<14}stop an answer")

    def quit(self, _: str = "") -> None:
        """End the chat."""
        self.ended = True

    # --- answers ----------------------------------------------------------------------------------------------

    def compare(self, on: bool) -> None:
        """Switch the base model's answers on or off.

        The base model first answers the messages that it has missed. With the tuned model's answers as its history, it
        would imitate them; without a history, it would not know what the next message refers to.

        Raises:
            InputError: there is no base model.
        """
        if self.base is None:
            raise InputError("comparing needs --model BASE with --adapter-path ADAPTER")
        self.comparing = on and self._catch_up(self.base)

    def _catch_up(self, base: "Conversation") -> bool:
        """Let the base model answer what it has missed; return False if Ctrl-C stops it, and then change nothing."""
        missed, before = self.tuned.questions[len(base.questions) :], base.messages
        if not missed:
            return True
        earlier = "earlier message" if len(missed) == 1 else f"{len(missed)} earlier messages"
        self.note(f"the base model first answers your {earlier}, unseen")
        try:
            for question in missed:
                deque(base.answer(question.text, question.images, **self.settings), maxlen=0)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            base.messages = before
            print()
            return False
        return True

    def answer(self, text: str, images: Sequence[Any] = ()) -> None:
        """Answer a message. In an interactive chat, Ctrl-C stops the answer and removes the turn."""
        speakers = {"": self.tuned}
        if self.comparing and self.base is not None:
            speakers = {"base": self.base, "tuned": self.tuned}
        before = [conversation.messages for conversation in speakers.values()]
        show = self._in_columns if self.comparing and self._has_columns() else self._one_by_one
        answers = {
            name: conversation.answer(text, images, **self.settings)
            for name, conversation in speakers.items()
        }
        try:
            show(speakers, answers)
            self.pending = []
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            for conversation, messages in zip(speakers.values(), before, strict=True):
                conversation.messages = messages
            print()
            self.note("stopped; this turn is removed from the history")

    def confirm(self, text: str) -> None:
        """Print a line that only a person who types needs."""
        if self.interactive:
            self.note(text)

    def note(self, text: str) -> None:
        """Print a line that is not an answer."""
        if self.interactive:
            self.console.print(text, style="dim", markup=False)
        else:
            print(text, file=sys.stderr)

    def _conversations(self) -> "list[Conversation]":
        return [self.tuned] if self.base is None else [self.tuned, self.base]

    def _one_by_one(self, speakers: "dict[str, Conversation]", answers: Answers) -> None:
        for name, conversation in speakers.items():
            if name:
                self.console.print(f"{name}:", style="bold")
            with closing(answers[name]) as pieces:
                for piece in pieces:
                    print(self._printable(piece), end="", flush=True)
            print()
            if conversation.cut:
                self.note(self._cut_note())

    def _in_columns(self, speakers: "dict[str, Conversation]", answers: Answers) -> None:
        from rich.live import Live

        texts = dict.fromkeys(speakers, "")
        with Live(get_renderable=lambda: _columns(texts), console=self.console, refresh_per_second=8) as live:
            for name, conversation in speakers.items():
                with closing(answers[name]) as pieces:
                    for piece in pieces:
                        texts[name] += self._printable(piece)
                if conversation.cut:
                    texts[name] += f"\n({self._cut_note()})"
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


def _typed_path(text: str) -> str:
    """Return the path that a person typed, or a terminal wrote when a file was dropped on it: quoted or escaped."""
    if not os.path.exists(os.path.expanduser(text)):
        with suppress(ValueError):
            text = " ".join(shlex.split(text)) or text
    return os.path.expanduser(text)


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
    Command("/image", "PATH", "put an image before the next message; repeat it for several", Chat.add_image),
    Command("/images", "", "list the images of the next message", Chat.list_images),
    Command("/compare", "", "switch the base model's answers on or off", Chat.toggle_comparison),
    Command("/reset", "", "remove all turns", Chat.reset),
    Command("/help", "", "list the commands", Chat.help),
    Command("/quit", "", "end the chat, as Ctrl-D does", Chat.quit),
)
SHORTCUTS = {"q": "/quit", "r": "/reset", "h": "/help"}  # the commands of mlx_lm.chat
