"""mlx-vlm's HTTP server for one vision-language model, with or without an adapter.

mlx-vlm loads any model, adapter or image that a request names, lists the models of the machine, and lets clients unload
them. Here, requests are answered by the model that was loaded at the start, images come in data URIs, and only the
routes of chats are left.
"""

import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import uvicorn
from fastapi import HTTPException
from mlx_vlm import server
from mlx_vlm.server.generation import ResponseGenerator
from mlx_vlm.vision_cache import VisionFeatureCache
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.image_references import is_data_uri, shown
from nalora_mlx.models.vision.generation import end_tokens, model_inputs, render_chat
from nalora_mlx.models.vision.processor import VisionProcessor
from nalora_mlx.serve.model_names import ServedModels
from nalora_mlx.vision_models import load_tuned_vision_model

ROUTES = ("/chat/completions", "/responses", "/messages", "/models", "/health", "/metrics")  # also under /v1
# Defaults of mlx_lm.server, which differ from those of mlx-vlm.
MAX_TOKENS, LOG_LEVEL = 512, "INFO"
SAMPLING = {"temp": ("temperature", 0.0), "top_p": ("top_p", 1.0), "top_k": ("top_k", 0)}
# Arguments of mlx-vlm's generator that are flags of mlx_lm.server, and flags that it has nothing for.
GENERATOR_FLAGS = ("kv_bits", "kv_group_size", "quantized_kv_start", "prefill_step_size")
MLX_LM_ONLY = (
    *("draft_model", "num_draft_tokens", "min_p", "prompt_concurrency", "prompt_cache_size"),
    *("prompt_cache_bytes", "use_default_chat_template"),
)
TEMPLATE_ARGUMENTS = ("enable_thinking", "reasoning_effort")  # of a request; the others are mlx-vlm's own


class Generator(ResponseGenerator):
    """Generates answers with a model that is loaded as for `nalora chat`.

    Args:
        given: flags of the command.
        adapter: directory of the adapter; None without one.
    """

    images: VisionProcessor

    def __init__(self, given: Mapping[str, Any], adapter: str | None):
        self.given = given
        settings = {name: given[name] for name in GENERATOR_FLAGS if name in given}
        super().__init__(given["model"], adapter, VisionFeatureCache(), **settings)

    def _initialize_model(self) -> None:
        """Load the model, on the thread that generates."""
        given = self.given
        self.model, self.images = load_tuned_vision_model(
            self.model_path,
            self.adapter_path,
            given["chat_template"],
            given["chat_template_args"],
            given.get("trust_remote_code", False),
        )
        self.processor, self.config = self.images.processor, self.model.config
        self.tokenizer = self.processor.tokenizer
        self.stop_tokens = end_tokens(self.model, self.images)
        self.draft_model = self.draft_kind = None
        for flag, (
            name,
            default,
        ) in SAMPLING.items():  # mlx-vlm takes them from here for requests without one
            setattr(self.config, name, given.get(flag, default))
        self.config.do_sample = True

    def _cpu_preprocess(
        self,
        prompt: str,
        images: Sequence[Any] | None = None,
        audio: Any = None,
        videos: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Return what the model reads, as in training."""
        if audio or videos:
            raise HTTPException(400, "this server takes text and images, not audio or video")
        for image in images or ():
            if not isinstance(image, str) or not is_data_uri(image):
                raise HTTPException(
                    400, f"image {shown(str(image))}: send its data instead, as data:image/png;base64,..."
                )
        try:
            inputs = model_inputs(self.images, prompt, images or (), "request")
        except InputError as error:
            raise HTTPException(400, str(error)) from None
        inputs["attention_mask"] = inputs.pop("mask")
        return inputs


def serve(given: Mapping[str, Any], served: ServedModels, host: str, port: int) -> None:
    """Load the model and serve it until Ctrl-C or SIGTERM, which raise what they raise elsewhere.

    Args:
        given: flags of the command, checked.
        served: the model and its adapter.
        host: address to listen on.
        port: port to listen on.

    Raises:
        InputError: the model or the adapter cannot be loaded.
    """
    log = logging.getLogger("mlx_vlm.server")
    log.setLevel(logging.CRITICAL)  # it writes tracebacks of errors that are raised here, too
    level = given.get("log_level", LOG_LEVEL).upper()
    generator = Generator(given, served.adapter)
    with ExitStack() as stack:
        stack.callback(generator.stop_and_join)
        generator.wait_until_ready()
        logging.basicConfig(level=level)
        log.setLevel(level)
        for patch in _patches(given, generator, served):
            stack.enter_context(patch)
        what = f"{served.base} with {served.adapter}" if served.adapter else served.base
        print(f"serving {what} at http://{host}:{port}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            _only_chats, host=host, port=port, server_header=False, log_level=level.lower()
        )
        uvicorn.Server(config).run()


def _patches(given: Mapping[str, Any], generator: Generator, served: ServedModels) -> list[Any]:
    """Return what takes the place of names in mlx-vlm's server."""
    loaded = (generator.model, generator.processor, generator.config)

    def get_cached_model(name: str, adapter_path: Any = None, *, model_kind: str = "auto") -> Any:
        if model_kind not in ("auto", "text_generation"):
            raise HTTPException(404, "this server answers chats only")
        return loaded

    def apply_chat_template(
        _processor: Any, _config: Any, messages: Any, tools: Any = None, **settings: Any
    ) -> str:
        # Of a request, mlx-vlm also passes what is off by default.
        chosen = {name: value for name, value in settings.items() if name in TEMPLATE_ARGUMENTS and value}
        try:
            return render_chat(generator.images, messages, "request", tools, chosen)
        except InputError as error:
            raise HTTPException(400, str(error)) from None

    module = importlib.import_module("mlx_vlm.server.app")  # the package has the application under its name
    origins = given.get("allowed_origins", "*").split(",")
    cors = next(entry for entry in server.app.user_middleware if entry.cls is CORSMiddleware)
    cache = {
        "model_path": served.ids[0],
        "adapter_path": served.adapter,
        "model": generator.model,
        "processor": generator.processor,
        "config": generator.config,
        "vision_cache": generator.vision_cache,
        "model_kind": "text_generation",
        "response_generator": generator,
        "apc_manager": None,
    }
    registry = server.ModelCacheRegistry()
    registry.set("text_generation", cache)
    environment = {"MLX_VLM_MAX_TOKENS": str(given.get("max_tokens", MAX_TOKENS))}
    if "decode_concurrency" in given:
        environment["MLX_VLM_MAX_NUM_SEQS"] = str(given["decode_concurrency"])
    return [
        mock.patch.multiple(
            server,
            get_cached_model=get_cached_model,
            apply_chat_template=apply_chat_template,
            scan_cache_dir=lambda: None,
        ),
        mock.patch.object(module, "discover_models", return_value=[]),
        mock.patch.dict(cors.kwargs, {"allow_origins": origins}),
        mock.patch.multiple(server.runtime, model_cache=registry, response_generator=generator),
        mock.patch.dict(os.environ, environment),
    ]


async def _only_chats(scope: Any, receive: Any, send: Any) -> None:
    """Pass requests on to mlx-vlm's application, but for those of other routes."""
    known = scope["type"] == "http" and scope["path"].removeprefix("/v1").startswith(ROUTES)
    if known or scope["type"] == "lifespan":
        await server.app(scope, receive, send)
    elif scope["type"] == "http":
        await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, send)
    else:
        await send({"type": "websocket.close"})
