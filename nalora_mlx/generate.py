"""`nalora generate`: answer one prompt with mlx-lm's generator and its flags."""

import argparse
import importlib
import sys
from pathlib import Path
from unittest import mock

from nalora_mlx.cli import (
    Parser,
    add_chat_flags,
    add_forwarded,
    check_forwarded,
    forwarded_argv,
    loading_configured,
    prepare_forwarded,
)
from nalora_mlx.core.errors import InputError

# The flags of mlx_lm.generate: (names, help, type). They are repeated here because importing mlx-lm is too slow for
# --help. All are forwarded unchanged; a test checks that the list is complete but for --chat-template-config, which is
# another name of --chat-template-args.
VALUES = (
    (("--model",), "local model directory or Hugging Face repo", str),
    (("--adapter-path",), "directory of a trained adapter", str),
    (("--prompt", "-p"), "message to answer; - reads it from standard input", str),
    (("--system-prompt",), "system message", str),
    (("--prefill-response",), "start of the answer", str),
    (("--max-tokens", "-m"), "maximum length of the answer (default: 100)", int),
    (("--temp",), "sampling temperature (default: 0, greedy)", float),
    (("--top-p",), "top-p sampling threshold (default: 1)", float),
    (("--min-p",), "min-p sampling threshold (default: 0, off)", float),
    (("--top-k",), "top-k sampling cutoff (default: 0, off)", int),
    (("--xtc-probability",), "XTC sampling probability (default: 0)", float),
    (("--xtc-threshold",), "XTC sampling threshold (default: 0.1)", float),
    (("--min-tokens-to-keep",), "minimum number of tokens that min-p keeps (default: 1)", int),
    (("--seed",), "seed of the sampler", int),
    (("--verbose",), "False prints only the answer (default: True)", str),
    (("--max-kv-size",), "maximum size of the key-value cache, in tokens", int),
    (("--prefill-step-size",), "prompt tokens processed per step (default: 2048)", int),
    (("--prompt-cache-file",), "file of a saved key-value cache", str),
    (("--kv-bits",), "quantize the key-value cache to this many bits", int),
    (("--kv-group-size",), "group size of the quantized key-value cache (default: 64)", int),
    (("--quantized-kv-start",), "quantize the key-value cache from this token on (default: 5000)", int),
    (("--draft-model",), "model for speculative decoding", str),
    (("--num-draft-tokens",), "tokens drafted per step (default: 3)", int),
)
LISTS = (
    (("--extra-eos-token",), "additional end-of-sequence tokens"),
    (("--image",), "image files, in the order of their placeholders in the prompt"),
)
SWITCHES = (
    (("--trust-remote-code",), "run code that comes with the model"),
    (("--ignore-chat-template",), "use the prompt without a chat template"),
    (("--use-default-chat-template",), "use the default chat template"),
    (("--quantize-activations", "-qa"), "quantize activations with the settings of their layer"),
)


def build_parser(prog: str) -> Parser:
    """Build a parser with the flags of mlx_lm.generate, which parses them again, and those of the chat template."""
    parser = Parser(prog=prog, description="Answer one prompt with a model, with or without an adapter.")
    add_forwarded(parser, VALUES, LISTS, SWITCHES)
    add_chat_flags(parser, "--chat-template-config")
    return parser


def run(args: argparse.Namespace) -> None:
    """Check the flags and forward them to mlx_lm.generate."""
    given = vars(args)
    check_forwarded(given)
    if not Path(given.get("prompt_cache_file", ".")).exists():
        raise InputError(f"--prompt-cache-file {given['prompt_cache_file']}: no such file")
    given = prepare_forwarded(given)
    # `mlx_lm.generate` is also a function; import_module returns the module.
    mlx_lm_generate = importlib.import_module("mlx_lm.generate")
    load = loading_configured(mlx_lm_generate.load, given)
    argv = ["nalora generate", *forwarded_argv(given)]
    with mock.patch.object(sys, "argv", argv), mock.patch.object(mlx_lm_generate, "load", load):
        mlx_lm_generate.main()


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["generate", *sys.argv[1:]]))
