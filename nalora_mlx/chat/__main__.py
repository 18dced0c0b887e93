"""`nalora chat`: chat with a model, with or without an adapter, or with base and tuned model side by side."""

import argparse
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from nalora_mlx.arguments import Parser, add_chat_flags, add_model
from nalora_mlx.chat.loop import COMMANDS, Chat
from nalora_mlx.cli import configure_chats, note_merged, require_model
from nalora_mlx.core.errors import InputError

if TYPE_CHECKING:
    from nalora_mlx.models.conversation import Conversation


def build_parser(prog: str) -> Parser:
    """Build a parser with the single-machine flags of mlx_lm.chat, --compare, and those of the chat template."""
    listed = "; ".join(f"{command.usage}: {command.help}" for command in COMMANDS)
    parser = Parser(
        prog=prog,
        usage="--model MODEL [--adapter-path DIR] [options]",
        description=f"Chat with a model. Chat commands: {listed}. Ctrl-C stops an answer.",
        examples="""
        chat with the tuned model
          nalora chat --model Qwen/Qwen3-0.6B --adapter-path adapters
        see its answers next to those of the base model
          nalora chat --model Qwen/Qwen3-0.6B --adapter-path adapters --compare
        chat with a merged model, with sampling
          nalora chat --model tuned --temp 0.7 --system-prompt 'Answer in one sentence.'
        """,
        essentials=("model", "adapter_path", "compare", "system_prompt", "max_tokens", "temp"),
    )
    add_model(parser)
    add = parser.add_argument
    add("--adapter-path", metavar="DIR", help="directory of a trained adapter")
    add("--compare", action="store_true", help="answer with and without the adapter, side by side")
    add("--system-prompt", metavar="TEXT", help="system message")
    add(
        "--max-tokens",
        "-m",
        type=int,
        default=256,
        metavar="N",
        help="maximum length of an answer (default: 256)",
    )
    add("--temp", type=float, default=0.0, metavar="T", help="sampling temperature (default: 0, greedy)")
    add("--top-p", type=float, default=1.0, metavar="P", help="top-p sampling threshold (default: 1)")
    add(
        "--xtc-probability",
        type=float,
        default=0.0,
        metavar="P",
        help="XTC sampling probability (default: 0)",
    )
    add("--xtc-threshold", type=float, default=0.1, metavar="P", help="XTC sampling threshold (default: 0.1)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the sampler (default: 0)")
    add("--max-kv-size", type=int, metavar="N", help="maximum size of the key-value cache, in tokens")
    add(
        "--prefill-step-size",
        type=int,
        default=2048,
        metavar="N",
        help="prompt tokens processed per step (default: 2048)",
    )
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_chat_flags(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the model and chat until the input ends."""
    from nalora_mlx.core.paths import check_paths

    require_model(args.model, args.adapter_path)
    check_paths(args.model, args.adapter_path)
    if args.compare and args.adapter_path is None:
        raise InputError("--compare needs --adapter-path: it answers with and without the adapter")
    from rich.console import Console

    console = Console(highlight=False)
    with console.status(f"loading {args.model}") if sys.stdin.isatty() else nullcontext():
        tuned, base = _load(args)
    chat = Chat(console, tuned, base, _settings(args, tuned.tokenizer))
    if args.compare:
        chat.compare(True)
    if chat.interactive:
        adapter = f" with {args.adapter_path}" if args.adapter_path else ""
        compare = "/compare: the base model answers too; " if adapter and not args.compare else ""
        chat.note(f"{args.model}{adapter}\nType a message. {compare}/help: commands; Ctrl-D: end")
    chat.loop()


def _load(args: argparse.Namespace) -> "tuple[Conversation, Conversation | None]":
    """Load the model; return conversations with it and, if there is an adapter, with the base alone."""
    from nalora_mlx.adapters.comparison import load_tuned
    from nalora_mlx.models.conversation import Conversation
    from nalora_mlx.models.loading import load_model, print_notice, slow_on_cpu_notice
    from nalora_mlx.vision_models import needs_mlx_vlm, why_blind

    if slow := slow_on_cpu_notice(args.model):
        print_notice(slow)
    blind = why_blind(args.model)
    if not blind or needs_mlx_vlm(args.model, args.adapter_path):
        return _load_vision(args)
    base, tokenizer, _ = load_model(args.model, args.trust_remote_code)
    configure_chats(tokenizer, args.chat_template, args.chat_template_args, args.adapter_path)
    _require_template(args.model, tokenizer)
    base.eval()
    settings = (tokenizer, args.system_prompt, args.max_kv_size, f"{args.model} {blind}")
    if not args.adapter_path:
        return Conversation(base, *settings), None
    note_merged(args.model, args.adapter_path)
    tuned = load_tuned(base, args.model, args.adapter_path, args.trust_remote_code)
    return Conversation(tuned, *settings), Conversation(base, *settings)


def _load_vision(args: argparse.Namespace) -> "tuple[Conversation, Conversation | None]":
    """Do what `_load` does, with a model of mlx-vlm."""
    from nalora_mlx.adapters.comparison import load_tuned
    from nalora_mlx.models.vision.conversation import VisionConversation
    from nalora_mlx.vision_models import load_vision_model

    base, processor = load_vision_model(
        args.model, args.adapter_path, args.chat_template, args.chat_template_args, args.trust_remote_code
    )
    _require_template(args.model, processor.tokenizer)
    settings = (processor, args.system_prompt, args.max_kv_size)
    if not args.adapter_path:
        return VisionConversation(base, *settings), None
    tuned = load_tuned(base, args.model, args.adapter_path, args.trust_remote_code)
    return VisionConversation(tuned, *settings), VisionConversation(base, *settings)


def _require_template(model: str, tokenizer: Any) -> None:
    """Raise InputError if a tokenizer has no chat template."""
    if not tokenizer.has_chat_template:
        raise InputError(
            f"--model {model}: has no chat template; give one with --chat-template, use nalora generate, or an "
            "instruct model"
        )


def _settings(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Seed the sampler; return the arguments of mlx-lm's `stream_generate`."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(args.seed)
    sampler = make_sampler(
        args.temp,
        args.top_p,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    return {
        "max_tokens": args.max_tokens,
        "sampler": sampler,
        "prefill_step_size": args.prefill_step_size,
    }


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["chat", *sys.argv[1:]]))
