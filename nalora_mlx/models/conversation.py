"""Chat prompts, greedy answers, and conversations that reuse their key-value cache."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from nalora_mlx.core.errors import InputError


def render_prompt(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None, template_args: Mapping[str, Any] = {}
) -> list[int]:
    """Return the token ids of a chat, followed by the generation prompt."""
    return list(
        tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False, **template_args
        )
    )


class Answer(NamedTuple):
    """An answer as text and as token ids. The ids include the end-of-sequence token, if there is one."""

    text: str
    tokens: list[int]


def greedy_answer(model: Any, tokenizer: Any, prompt: str | list[int], max_tokens: int) -> Answer:
    """Generate an answer by greedy decoding.

    Args:
        model: the model.
        tokenizer: its tokenizer, in mlx-lm's wrapper.
        prompt: token ids, or plain text.
        max_tokens: maximum length of the answer.
    """
    from mlx_lm import stream_generate

    text, tokens = "", []
    for response in stream_generate(model, tokenizer, prompt, max_tokens=max_tokens):
        text += response.text
        tokens.append(response.token)
    return Answer(text, tokens)


def answer_chat(model: Any, tokenizer: Any, prompt: str | list[dict[str, Any]], **settings: Any) -> str:
    """Return the answer to a message or a chat. A model without a chat template continues a text.

    Args:
        model: the model.
        tokenizer: its tokenizer, in mlx-lm's wrapper.
        prompt: a message, or a chat as a list of messages.
        settings: arguments of mlx-lm's `generate`.
    """
    from mlx_lm import generate

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = render_prompt(tokenizer, messages) if tokenizer.has_chat_template else prompt
    return generate(model, tokenizer, text, **settings)


class Question(NamedTuple):
    """A message of the user: its text, and the images that come before it."""

    text: str
    images: tuple[Any, ...] = ()


class Conversation:
    """A chat with a model.

    Each turn renders the whole history and reuses the key-value cache for the longest common prefix.

    Attributes:
        messages: the system message, if there is one, and the turns. The list is replaced, never modified. The key
            "images" of a message holds what comes before its content.
        cut: whether the last answer stopped at the token limit.
        blind: why the model cannot be asked about images, as in "MODEL does not see images"; empty if it can.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system_prompt: str | None,
        max_kv_size: int | None = None,
        blind: str = "this model does not see images",
    ):
        self.model, self.tokenizer, self.max_kv_size, self.blind = model, tokenizer, max_kv_size, blind
        self.messages: list[dict[str, Any]] = []
        self.cached: list[int] = []
        self.cut = False
        self._drop_cache()
        if system_prompt:
            self.set_system(system_prompt)

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The messages without the system message."""
        return [message for message in self.messages if message["role"] != "system"]

    @property
    def questions(self) -> list[Question]:
        """The user's messages that have an answer."""
        return [
            Question(message["content"], message.get("images", ()))
            for message in self.messages
            if message["role"] == "user"
        ]

    def set_system(self, text: str) -> None:
        """Set the system message, or remove it if the text is empty.

        Raises:
            InputError: the chat template rejects or ignores system messages.
        """
        from jinja2 import TemplateError

        system = [{"role": "system", "content": text}] if text else []
        turn = [{"role": "user", "content": "x"}]
        try:
            used = not text or self._render(system + turn) != self._render(turn)
        except (TemplateError, InputError):
            used = False
        if not used:
            raise InputError("the model's chat template does not support a system message")
        self.messages = system + self.turns

    def reset(self) -> None:
        """Remove all turns, but keep the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def answer(self, text: str, images: Sequence[Any] = (), **settings: Any) -> Generator[str, None, None]:
        """Yield the answer to a message in pieces. A complete answer and its message are added to the history.

        Args:
            text: the user's message.
            images: what comes before the text, for a model that sees; see `data.images.open_image`.
            settings: arguments of mlx-lm's `stream_generate`, such as `max_tokens` and `sampler`.
        """
        message: dict[str, Any] = {"role": "user", "content": text}
        history = [*self.messages, message | {"images": tuple(images)} if images else message]
        answer, response = "", None
        try:
            with closing(self._stream(history, settings)) as responses:
                for response in responses:
                    answer += response.text
                    yield response.text
        except BaseException:  # including Ctrl-C and a closed generator: the state of the cache is unknown
            self._drop_cache()
            raise
        self.cut = response is not None and response.finish_reason == "length"
        self.messages = [*history, {"role": "assistant", "content": answer}]

    def _stream(self, history: list[dict[str, Any]], settings: dict[str, Any]) -> Generator[Any, None, None]:
        """Yield the responses of the generator, each with the next piece of the answer."""
        from mlx_lm import stream_generate

        prompt = self._render(history)
        uncached, tokens = self._reuse_cache(prompt), []
        for response in stream_generate(
            self.model, self.tokenizer, uncached, prompt_cache=self.cache, **settings
        ):
            tokens.append(response.token)
            yield response
        # mlx-lm runs one step ahead: even the last token it yields is in the cache already.
        self.cached = prompt + tokens

    def _render(self, messages: list[dict[str, Any]]) -> Any:
        return render_prompt(self.tokenizer, messages)

    def _drop_cache(self) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self.cache = make_prompt_cache(self.model, self.max_kv_size)
        self.cached = []

    def _reuse_cache(self, prompt: list[int]) -> list[int]:
        """Trim the cache to the longest common prefix; return the tokens still to be read, at least one."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        common = 0
        for old, new in zip(self.cached, prompt[:-1], strict=False):
            if old != new:
                break
            common += 1
        surplus = len(self.cached) - common
        if surplus and can_trim_prompt_cache(self.cache):
            trim_prompt_cache(self.cache, surplus)
        elif surplus:
            self._drop_cache()
            common = 0
        return prompt[common:]
