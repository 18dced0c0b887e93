"""`nalora generate`: answer one prompt, by mlx-lm's own generator, with its flags."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from unittest import mock

from nalora_mlx.cli import Parser, add_passed_on, check_content, passed_on
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.paths import check_paths, expanded

# The flags of mlx_lm.generate: (names, what they do, type). All are handed on as they are; a test holds the two equal.
# They are repeated here because importing mlx-lm takes longer than a --help may take.
VALUES = (
    (("--model",), "local model directory or Hugging Face repo", str),
    (("--adapter-path",), "directory of a trained adapter", str),
    (("--prompt", "-p"), "the message; '-' reads it from standard input", str),
    (("--system-prompt",), "system message of the chat template", str),
    (("--prefill-response",), "beginning of the answer", str),
    (("--max-tokens", "-m"), "longest answer in tokens (100)", int),
    (("--temp",), "sampling temperature (0: greedy)", float),
    (("--top-p",), "sampling top-p (1)", float),
    (("--min-p",), "sampling min-p (0: off)", float),
    (("--top-k",), "sampling top-k (0: off)", int),
    (("--xtc-probability",), "probability of XTC sampling (0)", float),
    (("--xtc-threshold",), "threshold of XTC sampling (0.1)", float),
    (("--min-tokens-to-keep",), "fewest tokens that min-p keeps (1)", int),
    (("--seed",), "seed of the sampler", int),
    (("--chat-template-config",), "JSON of further arguments for the chat template", str),
    (("--verbose",), "False prints the answer alone (True)", str),
    (("--max-kv-size",), "longest key-value cache in tokens", int),
    (("--prefill-step-size",), "prompt tokens processed at a time (2048)", int),
    (("--prompt-cache-file",), "file of a saved key-value cache", str),
    (("--kv-bits",), "bits of a quantized key-value cache", int),
    (("--kv-group-size",), "its group size (64)", int),
    (("--quantized-kv-start",), "token from which it is quantized (5000)", int),
    (("--draft-model",), "model for speculative decoding", str),
    (("--num-draft-tokens",), "tokens that it drafts (3)", int),
)
LISTS = (
    (("--extra-eos-token",), "further tokens that end an answer"),
    (("--image",), "image files for the placeholders of the prompt, in order"),
)
SWITCHES = (
    (("--trust-remote-code",), "run code that the model brings along"),
    (("--ignore-chat-template",), "use the prompt as it is"),
    (("--use-default-chat-template",), "use the default chat template"),
    (("--quantize-activations", "-qa"), "quantize activations as their layer is"),
)


def build_parser(prog: str) -> Parser:
    """Take the flags of mlx_lm.generate, which parses them again."""
    parser = Parser(prog=prog, description="Answer one prompt with a model, with or without an adapter.")
    add_passed_on(parser, VALUES, LISTS, SWITCHES)
    return parser


def run(args: argparse.Namespace) -> None:
    """Check the paths, then hand everything to mlx_lm.generate."""
    given = vars(args)
    check_paths(given.get("model"), given.get("adapter_path"))
    check_paths(given.get("draft_model"), flag="--draft-model")
    if not Path(given.get("prompt_cache_file", ".")).exists():
        raise InputError(f"--prompt-cache-file {given['prompt_cache_file']}: no such file")
    try:
        json.loads(given.get("chat_template_config", "{}"))
    except ValueError as error:
        raise InputError(f"--chat-template-config is no JSON ({error})") from None
    check_content(given.get("model"), given.get("adapter_path"))
    check_content(given.get("draft_model"))
    for name in ("model", "adapter_path", "draft_model"):
        if name in given:
            given[name] = str(expanded(given[name]))
    # By module path: mlx_lm's own attribute of this name is a function.
    peer = importlib.import_module("mlx_lm.generate")
    with mock.patch.object(sys, "argv", ["nalora generate", *passed_on(given)]):
        peer.main()


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["generate", *sys.argv[1:]]))
