"""`nalora generate`: answer one prompt with mlx-lm's generator, or about images with mlx-vlm's."""

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from nalora_mlx.arguments import Parser, add_chat_flags, add_forwarded
from nalora_mlx.cli import (
    check_forwarded,
    forwarded_argv,
    loading_configured,
    prepare_forwarded,
    require_model,
)
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.paths import expanded
from nalora_mlx.vision_models import load_tuned_vision_model, needs_mlx_vlm, why_blind

if TYPE_CHECKING:
    from nalora_mlx.models.vision.processor import VisionProcessor
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
    (
        ("--image",),
        "FILE",
        "images to ask a vision-language model about; they come before the prompt",
        str,
    ),
)
SWITCHES = (
    (("--trust-remote-code",), "run code that comes with the model"),
    (("--ignore-chat-template",), "use the prompt without a chat template"),
    (("--use-default-chat-template",), "use the default chat template"),
    (("--quantize-activations", "-qa"), "quantize activations with the settings of their layer"),
)

# Of these flags, what mlx-vlm's generator takes under the same name, and what it has nothing for.
PASSED_ON = (
    "max_tokens",
    "max_kv_size",
    "prefill_step_size",
    "kv_bits",
    "kv_group_size",
    "quantized_kv_start",
)
MLX_LM_ONLY = ("prompt_cache_file", "draft_model", "num_draft_tokens", "quantize_activations")


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
        ask about an image
          nalora generate --model Qwen/Qwen2.5-VL-3B-Instruct --image receipt.jpg --prompt 'What is the total?'
        """,
        essentials=(
            "model",
            "adapter_path",
            "prompt",
            "image",
            "system_prompt",
            "max_tokens",
            "temp",
            "verbose",
        ),
    )
    add_forwarded(parser, VALUES, LISTS, SWITCHES)
    add_chat_flags(parser, "--chat-template-config")
    return parser


def run(args: argparse.Namespace) -> None:
    """Check the flags, and forward them to mlx_lm.generate, or answer with mlx-vlm."""
    given = vars(args)
    require_model(given.get("model"), given.get("adapter_path"))
    check_forwarded(given)
    if not Path(given.get("prompt_cache_file", ".")).exists():
        raise InputError(f"--prompt-cache-file {given['prompt_cache_file']}: no such file")
    images = [str(expanded(path)) for path in given.get("image", ())]
    if images:
        _check_images(images)
    given = prepare_forwarded(given)
    if images and (blind := why_blind(given["model"])):
        raise InputError(f"--image: {given['model']} {blind}")
    if images or needs_mlx_vlm(given["model"], given.get("adapter_path")):
        _answer_with_mlx_vlm(given, images)
        return
    # `mlx_lm.generate` is also a function; import_module returns the module.
    mlx_lm_generate = importlib.import_module("mlx_lm.generate")
    load = loading_configured(mlx_lm_generate.load, given)
    argv = ["nalora generate", *forwarded_argv(given)]
    with mock.patch.object(sys, "argv", argv), mock.patch.object(mlx_lm_generate, "load", load):
        mlx_lm_generate.main()


def _check_images(paths: list[str]) -> None:
    """Raise InputError if an image cannot be read, before anything else takes time."""
    from nalora_mlx.data.images import check_image

    for path in paths:
        check_image(os.path.abspath(path), "--image")


def _answer_with_mlx_vlm(given: dict[str, Any], images: list[str]) -> None:
    """Load the model through mlx-vlm, and print its answer as mlx_lm.generate does.

    Args:
        given: the flags, checked.
        images: paths.

    Raises:
        InputError: mlx-vlm has nothing for a flag, or an image cannot be read.
    """
    if unused := [f"--{name.replace('_', '-')}" for name in MLX_LM_ONLY if name in given]:
        raise InputError(f"{listed(unused, ', ')}: mlx-vlm, which answers here, has no such flag; remove it")
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from nalora_mlx.models.vision.generation import stream_answer

    template, template_args = given.pop("chat_template"), given.pop("chat_template_args")
    args = importlib.import_module("mlx_lm.generate").setup_arg_parser().parse_args(forwarded_argv(given))
    if args.seed is not None:
        mx.random.seed(args.seed)
    model, processor = load_tuned_vision_model(
        args.model, args.adapter_path, template, template_args, args.trust_remote_code
    )
    tokenizer = processor.tokenizer
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    responses = stream_answer(
        model,
        processor,
        _prompt_text(processor, args, len(images)),
        [os.path.abspath(path) for path in images],
        "--prompt",
        sampler=sampler,
        **{name: getattr(args, name) for name in PASSED_ON},
    )
    _print_answer(responses, args.verbose)


def _prompt_text(processor: "VisionProcessor", args: argparse.Namespace, images: int) -> str:
    """Return the prompt with a placeholder for each image, which come first."""
    from nalora_mlx.models.vision.generation import message_content, plain_text, render_chat

    prompt = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    prompt = sys.stdin.read() if prompt == "-" else prompt
    tokenizer = processor.tokenizer
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        if images and processor.placeholder not in prompt:
            prompt = processor.placeholder * images + prompt
        return plain_text(tokenizer, prompt)
    messages = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
    messages.append({"role": "user", "content": message_content(prompt, images)})
    return render_chat(processor, messages, "--prompt") + (args.prefill_response or "")


def _print_answer(responses: Iterator[Any], verbose: bool) -> None:
    """Print an answer piece by piece; if verbose, between lines and with the speed, as mlx-lm prints it."""
    text, first = "", next(responses)  # what is wrong with the prompt, it raises
    if verbose:
        print("=" * 10)
    for response in chain([first], responses):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if not verbose:
        print(text)
        return
    print(f"\n{'=' * 10}")
    if not text:
        print("No text generated for this prompt")
        return
    print(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
    print(f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec")
    print(f"Peak memory: {response.peak_memory:.3f} GB")


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["generate", *sys.argv[1:]]))
