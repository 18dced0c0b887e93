"""`nalora chat`: talk to a model, with or without an adapter."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nalora_mlx.cli import Parser
from nalora_mlx.errors import InputError

HELP = "/reset starts anew, /quit ends (q and r as in mlx_lm.chat work too)"


def build_parser(prog: str) -> Parser:
    """Take the flags of mlx_lm.chat for one machine."""
    parser = Parser(prog=prog, description=f"Talk to a model. {HELP}.")
    add = parser.add_argument
    add("--model", required=True, help="local model directory or Hugging Face repo")
    add("--adapter-path", help="directory of a trained adapter")
    add("--system-prompt", help="system message")
    add("--max-tokens", "-m", type=int, default=256, help="longest answer in tokens (default: 256)")
    add("--temp", type=float, default=0.0, help="sampling temperature (default: 0, greedy)")
    add("--top-p", type=float, default=1.0, help="sampling top-p (default: 1)")
    add("--xtc-probability", type=float, default=0.0, help="probability of XTC sampling (default: 0)")
    add("--xtc-threshold", type=float, default=0.1, help="threshold of XTC sampling (default: 0.1)")
    add("--seed", type=int, default=0, help="seed of the sampler (default: 0)")
    add("--max-kv-size", type=int, help="longest key-value cache in tokens")
    add("--prefill-step-size", type=int, default=2048, help="prompt tokens at a time (default: 2048)")
    add("--trust-remote-code", action="store_true", help="run code that the model brings along")
    return parser


class Conversation:
    """A chat whose whole history is rendered each turn, and whose cache is kept as far as the text agrees."""

    def __init__(self, model: Any, tokenizer: Any, system_prompt: str | None, max_kv_size: int | None = None):
        self.model, self.tokenizer, self.system_prompt = model, tokenizer, system_prompt
        self.max_kv_size = max_kv_size
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        from mlx_lm.models.cache import make_prompt_cache

        self.messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        self.cache = make_prompt_cache(self.model, self.max_kv_size)
        self.cached: list[int] = []

    def answer(self, text: str, **settings: Any) -> Iterator[str]:
        """Yield the answer to a message piece by piece; it joins the history when it is whole."""
        from mlx_lm import stream_generate

        self.messages.append({"role": "user", "content": text})
        prompt = list(
            self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, return_dict=False)
        )
        rest = self._agree(prompt)
        answer, tokens = "", []
        for response in stream_generate(
            self.model, self.tokenizer, rest, prompt_cache=self.cache, **settings
        ):
            answer += response.text
            tokens.append(response.token)
            yield response.text
        # mlx-lm feeds every token that it yields, the last one too, to be one step ahead.
        self.cached = prompt + tokens
        self.messages.append({"role": "assistant", "content": answer})

    def _agree(self, prompt: list[int]) -> list[int]:
        """Trim the cache to the longest common beginning; returns the tokens still to be read, at least one."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        common = 0
        for old, new in zip(self.cached, prompt[:-1], strict=False):
            if old != new:
                break
            common += 1
        surplus = len(self.cached) - common
        if surplus and can_trim_prompt_cache(self.cache):
            trim_prompt_cache(self.cache, surplus)
        elif surplus:
            self.cache, common = make_prompt_cache(self.model, self.max_kv_size), 0
        return prompt[common:]


def run(args: argparse.Namespace) -> None:
    """Load the model and answer until the input ends."""
    from nalora_mlx.models import check_paths, load_model

    check_paths(args.model, args.adapter_path)
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler
    from rich.console import Console

    from nalora_mlx.adapters import load_any_adapter

    console = Console(highlight=False)
    model, tokenizer, _ = load_model(args.model, args.trust_remote_code)
    if args.adapter_path:
        load_any_adapter(model, Path(args.adapter_path).expanduser())
    model.eval()
    if not tokenizer.has_chat_template:
        raise InputError(
            f"--model {args.model}: has no chat template; use nalora generate, or an instruct model"
        )
    mx.random.seed(args.seed)
    sampler = make_sampler(
        args.temp,
        args.top_p,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    conversation = Conversation(model, tokenizer, args.system_prompt, args.max_kv_size)
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(f"[bold]{args.model}[/bold]. {HELP}.")
    while True:
        try:
            text = (console.input("[bold]> [/bold]") if interactive else input()).strip()
        except EOFError:
            return
        if text in ("/quit", "q"):
            return
        if text in ("/reset", "r"):
            conversation.reset()
            continue
        if not text:
            continue
        for piece in conversation.answer(
            text, max_tokens=args.max_tokens, sampler=sampler, prefill_step_size=args.prefill_step_size
        ):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["chat", *sys.argv[1:]]))
