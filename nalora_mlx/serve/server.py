"""mlx-lm's HTTP server for several adapters of one base model, and with stop words that end an answer.

Requests wait in one queue. mlx-lm's generation thread batches requests for the same model, and asks the provider for
another model only when the batch is done. Its prompt caches belong to the provider's `model_key`. So a request for
another adapter waits for a new batch, and each adapter has its own prompt caches.
"""

import argparse
import dataclasses
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm import server
from mlx_lm.utils import load_adapters

from nalora_mlx.cli import loading_configured
from nalora_mlx.core.device_faults import explain, find_fault
from nalora_mlx.core.errors import InputError, RunError, merged
from nalora_mlx.serve.model_names import BASE, ServedModels
from nalora_mlx.serve.stop_words import AnswerText, StopWords

# What a provider holds of the model that it serves at present.
MODEL_STATE = ("model_key", "model", "tokenizer", "processor", "draft_model", "is_batchable")
# Parameters of the functions of mlx-lm's server that this module replaces or relies on.
EXPECTED: dict[str, tuple[str, ...]] = {
    "ModelProvider._load": ("self", "model_path", "adapter_path", "draft_model_path"),
    "ModelProvider.load": ("self", "model_path", "adapter_path", "draft_model_path"),
    "ModelProvider.reset": ("self",),
    "ResponseGenerator._run_generate": ("self",),
    "ResponseGenerator.generate": ("self", "request", "generation_args", "progress_callback"),
    "ResponseGenerator._make_state_machine": ("self", "model_key", "tokenizer", "stop_words"),
    "APIHandler.handle_completion": ("self", "request", "stop_words"),
    "APIHandler.handle_models_request": ("self",),
    "ModelDescription": ("model", "draft", "adapter"),
    "_run_http_server": ("host", "port", "response_generator", "server_class", "handler_class"),
}


def check_mlx_lm() -> None:
    """Check that mlx-lm's server has the parts that this module replaces.

    Raises:
        RunError: names what has changed.
    """
    changed = []
    for name, parameters in EXPECTED.items():
        found: Any = server
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None or tuple(inspect.signature(found).parameters) != parameters:
            changed.append(name)
    # `until_stop_word` ends an answer without a finish reason, for which the handler has this default.
    if not changed and 'finish_reason = "stop"' not in inspect.getsource(server.APIHandler.handle_completion):
        changed.append("APIHandler.handle_completion")
    if changed:
        raise RunError(
            f"nalora serve cannot extend the server of mlx-lm {mlx_lm.__version__}, which has changed "
            f"({', '.join(changed)}); install mlx-lm 0.32.2"
        )


# --- models -------------------------------------------------------------------------------------------------


class Loader:
    """Takes the place of mlx-lm's `load`: models after the first share its arrays, and have an adapter of their own.

    Args:
        load: mlx-lm's `load`.
        settings: flags of the command, for the chat template.
    """

    def __init__(self, load: Callable[..., Any], settings: Mapping[str, Any]):
        self._load, self._settings = load, settings
        self._base: nn.Module | None = None
        self._draft: Any = None

    def __call__(self, name: str, adapter_path: str | None = None, **options: Any) -> Any:
        """Load (model, tokenizer, config), or (model, tokenizer) of the draft model."""
        if "tokenizer_config" not in options:
            self._draft = self._draft or self._load(name, **options)
            return self._draft
        adapter = {} if adapter_path is None else {"adapter_path": adapter_path}
        load = loading_configured(self._load, {**self._settings, **adapter}, notices=self._base is None)
        if self._base is None:
            loaded = load(name, **adapter, **options)
            self._base = loaded[0]
            return loaded
        # Lazy: the arrays in the files are never read.
        model, tokenizer, config = load(name, lazy=True, **options)
        model.update(self._base.parameters())
        load_adapters(model, adapter_path)
        model.eval()
        return model, tokenizer, config


class Provider(server.ModelProvider):
    """Holds the base model and its adapters, all loaded at the start, and switches between them.

    Args:
        args: flags of mlx-lm's server.
        served: the models.
        address: URL to print.
    """

    def __init__(self, args: argparse.Namespace, served: ServedModels, address: str):
        super().__init__(args)
        self.served = served
        models = {BASE: self._read(f"--model {served.base}", served.adapter)}
        for name, directory in served.adapters.items():
            models[name] = self._read(f"--adapter-path {name}={directory}", directory)
        self._models = models
        self.load(BASE)
        adapters = ", ".join(served.adapters) or served.adapter
        what = f"{served.base} with {adapters}" if adapters else served.base
        print(f"serving {what} at {address} (Ctrl-C stops)", file=sys.stderr, flush=True)

    def _read(self, flag: str, adapter: str | None) -> dict[str, Any]:
        """Load a model and return its state."""
        try:
            self._load(self.served.base, adapter, self.cli_args.draft_model)
            # Another thread generates, and only this one can evaluate what is still lazy here.
            mx.eval([model.state for model in (self.model, self.draft_model) if model is not None])
        except Exception as error:
            if find_fault(error):
                raise
            lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
            raise InputError(f"{flag}: cannot be served: {' '.join(merged(lines, 3))}") from error
        return {name: getattr(self, name) for name in MODEL_STATE}

    def load(self, model_path: str, adapter_path: Any = None, draft_model_path: Any = None) -> Any:
        """Switch to a model; `model_path` is BASE or the name of an adapter. mlx-lm would load any model named here."""
        for name, value in self._models[model_path].items():
            setattr(self, name, value)
        return self.model, self.tokenizer

    def reset(self) -> None:
        """Release all models. mlx-lm calls this before it loads a model, and when it stops."""
        super().reset()
        self._models = {}


# --- requests -----------------------------------------------------------------------------------------------


class Generator(server.ResponseGenerator):
    """Generates answers that end before a stop word, each with the model that its request names."""

    def generate(self, request: Any, generation_args: Any, progress_callback: Any = None) -> Any:
        """Queue a request; return its context and the responses, one for each token."""
        name = self.model_provider.served.find(generation_args.model.model)
        # The one of the model in use now: they have the same tokens, and differ only in the chat template.
        tokenizer = self.model_provider.tokenizer
        # Requests of one batch have equal descriptions.
        model = server.ModelDescription(model=name, draft=BASE, adapter=None)
        args = dataclasses.replace(generation_args, model=model)
        context, responses = super().generate(request, args, progress_callback)
        if args.stop_words:
            responses = until_stop_word(responses, tokenizer, args.stop_words)
        return context, responses

    def _run_generate(self) -> None:
        """Generate answers until the server stops, or until the device fails: one line says so, and requests fail."""
        try:
            self._generate()
        except Exception as error:
            self._generation_failed = True
            line = explain(error)
            if line is None:
                logging.exception("the thread that generates answers failed")
            else:
                print(f"nalora serve: failed: {line}; then start it again", file=sys.stderr, flush=True)

    def _make_state_machine(self, model_key: Any, tokenizer: Any, stop_words: list[str]) -> Any:
        """Return what ends an answer, and what finds thoughts and tool calls in its text."""
        end_tokens, text_states = super()._make_state_machine(model_key, tokenizer, [])
        return StopWords(tokenizer, stop_words) if stop_words else end_tokens, text_states


def until_stop_word(responses: Iterable[Any], tokenizer: Any, stop_words: list[str]) -> Iterator[Any]:
    """Yield the responses of an answer with its text up to the first stop word.

    The last response of a complete answer has no finish reason. The handler drops the text of one that has "stop", and
    takes that reason for an answer that ends without.
    """
    text = AnswerText(tokenizer.detokenizer, stop_words)
    for response in responses:
        is_end_token = response.finish_reason == "stop" and response.token in tokenizer.eos_token_ids
        segment = "" if is_end_token else text.add(response.token)
        if response.finish_reason is not None and not text.ended:
            segment += text.finish()
        complete = text.ended or response.finish_reason == "stop"
        yield dataclasses.replace(
            response, text=segment, finish_reason=None if complete else response.finish_reason
        )
        if complete:
            return


class Handler(server.APIHandler):
    """Answers HTTP requests; refuses those for a model that is not served."""

    def handle_completion(self, request: Any, stop_words: Any) -> None:
        """Check the model's name and the stop words, then generate an answer and send it."""
        served = self.response_generator.model_provider.served
        if served.find(self.requested_model) is None:
            self._refuse_model(self.requested_model)
        elif not isinstance(stop_words, list) or not all(isinstance(word, str) for word in stop_words):
            self._send(400, _error("stop must be a string or a list of strings", "stop", None))
        else:
            super().handle_completion(request, [word for word in stop_words if word])

    def handle_models_request(self) -> None:
        """Send the list of models, or one of them. mlx-lm lists the whole Hub cache and fails without one."""
        served = self.response_generator.model_provider.served
        models = [{"id": name, "object": "model", "created": self.created} for name in served.ids]
        name = unquote(urlsplit(self.path).path.removeprefix("/v1/models").strip("/"))
        if not name:
            self._send(200, {"object": "list", "data": models})
        elif chosen := [model for model in models if model["id"].strip("/") == name]:
            self._send(200, chosen[0])
        else:
            self._refuse_model(name)

    def _refuse_model(self, name: str) -> None:
        served = self.response_generator.model_provider.served
        message = f"the model {name!r} does not exist; this server has {', '.join(served.ids)}"
        self._send(404, _error(message, "model", "model_not_found"))

    def _send(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def _error(message: str, parameter: str, code: str | None) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    details = {"message": message, "type": "invalid_request_error", "param": parameter, "code": code}
    return {"error": details}


# --- the server ---------------------------------------------------------------------------------------------


def patches(served: ServedModels, settings: Mapping[str, Any], address: str) -> dict[str, Any]:
    """Return what takes the place of names in mlx-lm's server."""
    return {
        "load": Loader(server.load, settings),
        "ModelProvider": partial(Provider, served=served, address=address),
        "ResponseGenerator": Generator,
        "_run_http_server": partial(server._run_http_server, handler_class=Handler),
    }
