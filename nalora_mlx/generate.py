"""`nalora generate`: answer one prompt with mlx-lm's generator and its flags."""

import argparse
import importlib
import sys
from pathlib import Path
from unittest import mock

from nalora_mlx.arguments import Parser, add_chat_flags, add_forwarded
from nalora_mlx.cli import (
    check_forwarded,
    forwarded_argv,
    loading_configured,
    prepare_forwarded,
    require_model,
)
from nalora_mlx.core.errors import InputError

# The flags of mlx_lm.generate: (names, value, help, type). They are repeated here because mlx-lm imports too slowly for
# --help. All are forwarded unchanged; a test checks that the list is complete but for --chat-template-config, which is
# another name of --chat-template-args.
VALUES = (
    (("--model",), "MODEL", "model: directory or Hugging Face repo", str),
    (("--adapter-path",), "DIR", "directory of a trained adapter", str),
    (("--prompt", "-p"), "TEXT", "message to answer; - reads it from standard input (default: hello)", str),
    (("--system-prompt",), "TEXT", "system message", str),
    (("--prefill-response",), "TEXT", "start of the answer", str),
    (("--max-tokens", "-m"), "N", "maximum length of the answer (default: 100)", int),
    (("--temp",), "T", "sampling temperature (default: 0, greedy)", float),
    (("--top-p",), "P", "top-p sampling threshold (default: 1)", float),
    (("--min-p",), "P", "min-p sampling threshold (default: 0, off)", float),
    (("--top-k",), "N", "top-k sampling cutoff (default: 0, off)", int),
    (("--xtc-probability",), "P", "XTC sampling probability (default: 0)", float),
    (("--xtc-threshold",), "P", "XTC sampling threshold (default: 0.1)", float),
    (("--min-tokens-to-keep",), "N", "minimum number of tokens that min-p keeps (default: 1)", int),
    (("--seed",), "N", "seed of the sampler", int),
    (("--verbose",), "True|False", "False prints only the answer (default: True)", str),
    (("--max-kv-size",), "N", "maximum size of the key-value cache, in tokens", int),
    (("--prefill-step-size",), "N", "prompt tokens processed per step (default: 2048)", int),
    (("--prompt-cache-file",), "FILE", "file of a saved key-value cache", str),
    (("--kv-bits",), "BITS", "quantize the key-value cache to this many bits", int),
    (("--kv-group-size",), "N", "group size of the quantized key-value cache (default: 64)", int),
    (("--quantized-kv-start",), "N", "quantize the key-value cache from this token on (default: 5000)", int),
    (("--draft-model",), "MODEL", "model for speculative decoding", str),
    (("--num-draft-tokens",), "N", "tokens drafted per step (default: 3)", int),
)
LISTS = (
    (("--extra-eos-token",), "TOKEN", "additional end-of-sequence tokens", str),
    (("--image",), "FILE", "image files, in the order of their placeholders in the prompt", str),
)
SWITCHES = (
    (("--trust-remote-code",), "run code that comes with the model"),
    (("--ignore-chat-template",), "use the prompt without a chat template"),
    (("--use-default-chat-template",), "use the default chat template"),
    (("--quantize-activations", "-qa"), "quantize activations with the settings of their layer"),
)


def build_parser(prog: str) -> Parser:
    """Build a parser with the flags of mlx_lm.generate, which parses them again, and those of the chat template."""
    parser = Parser(
        prog=prog,
        usage="--model MODEL --prompt TEXT [options]",
        description="Answer one prompt with a model, with or without an adapter.",
        examples="""
        ask the tuned model
          nalora generate --model Qwen/Qwen3-0.6B --adapter-path adapters --prompt 'Where is my parcel?'
        ask the base model
          nalora generate --model Qwen/Qwen3-0.6B --prompt 'Where is my parcel?'
        answer a file, and print nothing else
          nalora generate --model tuned --prompt - --max-tokens 500 --verbose False < question.txt
        """,
        essentials=("model", "adapter_path", "prompt", "system_prompt", "max_tokens", "temp", "verbose"),
    )
    add_forwarded(parser, VALUES, LISTS, SWITCHES)
    add_chat_flags(parser, "--chat-template-config")
    return parser


def run(args: argparse.Namespace) -> None:
    """Check the flags and forward them to mlx_lm.generate."""
    given = vars(args)
    require_model(given.get("model"), given.get("adapter_path"))
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
