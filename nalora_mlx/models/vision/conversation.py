"""A chat with a vision-language model."""

from collections.abc import Generator
from typing import Any

from nalora_mlx.models.conversation import Conversation
from nalora_mlx.models.vision.generation import message_content, render_chat, stream_answer
from nalora_mlx.models.vision.processor import VisionProcessor

SOURCE = "the chat"  # what messages begin with


class VisionConversation(Conversation):
    """A chat with a model of mlx-vlm, whose generator reuses the key-value cache for the longest common prefix.

    Args:
        model: as `open_vision_model` returns it.
        processor: of the model.
        system_prompt: the system message; None without one.
        max_kv_size: maximum size of the key-value cache, in tokens.
    """

    def __init__(
        self,
        model: Any,
        processor: VisionProcessor,
        system_prompt: str | None,
        max_kv_size: int | None = None,
    ):
        self.processor = processor
        self.read_images: list[Any] = []  # of the prompt in the cache
        super().__init__(model, processor.tokenizer, system_prompt, max_kv_size, blind="")

    def _stream(self, history: list[dict[str, Any]], settings: dict[str, Any]) -> Generator[Any, None, None]:
        images = [image for message in history for image in message.get("images", ())]
        if any(old is not new for old, new in zip(self.read_images, images, strict=False)):
            self._drop_cache()  # of all images, tokens look the same
        self.read_images = images
        text = self._render(history)
        yield from stream_answer(
            self.model,
            self.processor,
            text,
            images,
            SOURCE,
            prompt_cache_state=self.cache,
            max_kv_size=self.max_kv_size,
            **settings,
        )

    def _render(self, messages: list[dict[str, Any]]) -> str:
        contents = [
            {
                "role": message["role"],
                "content": message_content(message["content"], len(message.get("images", ()))),
            }
            for message in messages
        ]
        return render_chat(self.processor, contents, SOURCE)

    def _drop_cache(self) -> None:
        from mlx_vlm.generate import PromptCacheState

        self.cache = PromptCacheState()
        self.read_images = []
