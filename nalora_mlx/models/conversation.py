"""`nalora chat`: talk to a model, with or without an adapter, or to base and tuned model side by side."""

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from nalora_mlx.core.errors import InputError

if TYPE_CHECKING:
    pass


class Conversation:
    """A chat whose whole history is rendered each turn, and whose cache is kept as far as the text agrees.

    Attributes:
        messages: the system message if there is one, then the turns; a list that is replaced, never changed.
        cut: whether the last answer ended at the limit of tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, system_prompt: str | None, max_kv_size: int | None = None):
        self.model, self.tokenizer, self.max_kv_size = model, tokenizer, max_kv_size
        self.messages: list[dict[str, str]] = []
        self.cached: list[int] = []
        self.cut = False
        self._drop_cache()
        if system_prompt:
            self.set_system(system_prompt)

    @property
    def turns(self) -> list[dict[str, str]]:
        """The messages but the system message."""
        return [message for message in self.messages if message["role"] != "system"]

    def set_system(self, text: str) -> None:
        """Set the system message, or remove it if the text is empty.

        Raises:
            InputError: the chat template refuses it, or leaves it out.
        """
        from jinja2 import TemplateError

        system = [{"role": "system", "content": text}] if text else []
        turn = [{"role": "user", "content": "x"}]
        try:
            taken = not text or self._render(system + turn) != self._render(turn)
        except TemplateError:
            taken = False
        if not taken:
            raise InputError("the model's chat template takes no system message")
        self.messages = system + self.turns

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def answer(self, text: str, **settings: Any) -> Generator[str, None, None]:
        """Yield the answer to a message piece by piece; both join the history when it is whole."""
        from mlx_lm import stream_generate

        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._render(asked)
        answer, tokens, response = "", [], None
        try:
            rest = self._agree(prompt)
            for response in stream_generate(
                self.model, self.tokenizer, rest, prompt_cache=self.cache, **settings
            ):
                answer += response.text
                tokens.append(response.token)
                yield response.text
        except BaseException:  # Ctrl-C too, and a reader that goes away: what the cache holds is not known
            self._drop_cache()
            raise
        # mlx-lm feeds every token that it yields, the last one too, to be one step ahead.
        self.cached = prompt + tokens
        self.cut = response is not None and response.finish_reason == "length"
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        return list(
            self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )

    def _drop_cache(self) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self.cache = make_prompt_cache(self.model, self.max_kv_size)
        self.cached = []

    def _agree(self, prompt: list[int]) -> list[int]:
        """Trim the cache to the longest common beginning; returns the tokens still to be read, at least one."""
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
