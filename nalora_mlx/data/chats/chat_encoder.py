"""Chats as tokens: every assistant turn is trained after exactly the tokens that generation would start from."""

from typing import Any, NamedTuple

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.chats.contents import RenderedText
from nalora_mlx.data.chats.placeholders import ImageTexts
from nalora_mlx.data.chats.text_encoder import TextEncoder
from nalora_mlx.data.chats.turns import ChatRenderer, Turn
from nalora_mlx.data.rows.formats import Row


class TokenSequence(NamedTuple):
    """Token ids, and whether each is supervised."""

    tokens: list[int]
    loss_mask: list[bool]


class Encoding(NamedTuple):
    """The tokens of a row.

    Attributes:
        sequences: what is trained on; empty if a chat has no assistant turn to train on.
        texts: the same as texts, and the contexts of turns that are left out.
        targets: the text that each assistant turn is trained to write, by the index of its message.
        opened: what the generation prompt opens and a turn does not have, such as "<think>"; empty for none.
        lost: number of tokens before the first turn that is left out because its context fills the maximum length.
    """

    sequences: list[TokenSequence]
    texts: list[str]
    targets: dict[int, str]
    opened: str = ""
    lost: int = 0


class ChatEncoder:
    """Encodes chats.

    Without `mask_prompt` the whole chat is one sequence and all of it is supervised. With it, every assistant turn is
    supervised, through its end-of-turn token, after the context that `generate`, `chat` and `serve` would give it.
    If the context of a turn continues the sequence of the turn before it, they share a sequence. Templates that render
    a turn differently once later turns follow (for example, without its reasoning) make several sequences of a chat.

    Args:
        tokenizer: tokenizer wrapper of mlx-lm, or a tokenizer of transformers.
        mask_prompt: supervise assistant turns only.
        last_turn_only: supervise only the last assistant turn.
        images: what images become in the text of a chat; None for models that do not see.
    """

    def __init__(
        self,
        tokenizer: Any,
        mask_prompt: bool,
        last_turn_only: bool = False,
        images: ImageTexts | None = None,
    ):
        self.text_encoder = TextEncoder(tokenizer)
        self.renderer = ChatRenderer(tokenizer, self.text_encoder, images)
        self.mask_prompt, self.last_turn_only, self.images = mask_prompt, last_turn_only, images

    def __call__(self, row: Row, max_seq_length: int) -> Encoding:
        """Encode a chat. Turns whose context has `max_seq_length` tokens or more are left out.

        Raises:
            InputError: the model has no chat template, or the template refuses the chat.
        """
        if not _has_template(self.renderer.tokenizer):
            raise InputError(
                f"{row.source}: the model has no chat template; use 'text' rows, an instruct model, or "
                "--chat-template chatml"
            )
        row = self.renderer.in_template_form(row)
        if not self.mask_prompt:
            text = self.renderer.render(row, row.messages)
            tokens = self.text_encoder.encode(text)
            return Encoding([TokenSequence(tokens, [True] * len(tokens))], [text], {})
        sequences: list[TokenSequence] = []
        texts: list[str] = []
        left_out: list[str] = []
        targets: dict[int, str] = {}
        opened = ""
        for index in self.trained_turns(row):
            turn = self.renderer.turn(row, index)
            context, target = self.text_encoder.encode_after(turn.context, turn.target)
            if len(context) >= max_seq_length:  # and so are those of later turns
                return Encoding(sequences, texts + left_out, targets, opened, len(context))
            targets[index] = turn.target
            if _is_empty(row.messages[index], turn):
                left_out.append(turn.context)
                continue
            opened = opened or turn.opened
            if not sequences or context[: len(sequences[-1].tokens)] != sequences[-1].tokens:
                sequences.append(TokenSequence([], []))
                texts.append("")
            tokens, loss_mask = sequences[-1]
            loss_mask += [False] * (len(context) - len(tokens)) + [True] * len(target)
            tokens[:] = context + target
            texts[-1] = turn.context + turn.target
        return Encoding(sequences, texts + left_out, targets, opened)

    @property
    def template(self) -> str:
        """The text of the chat template, or of all of them; empty if mlx-lm renders this model's chats in Python."""
        return str(getattr(self.renderer.tokenizer, "chat_template", None) or "")

    def trained_turns(self, row: Row) -> list[int]:
        """Return the indices of the assistant turns to train on."""
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        return [i for i in turns[-1 if self.last_turn_only else 0 :] if i not in row.untrained]


def _is_empty(message: dict[str, Any], turn: Turn) -> bool:
    """Return whether a turn has tool calls only, and the template leaves them out."""
    calls, text = message.get("tool_calls") or [], RenderedText(turn.target)
    return bool(calls) and not message.get("content") and not any(map(text.holds_call, calls))


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", None)))
