"""`nalora doctor`: check the machine, the model and the data before a run, with a remedy for every finding."""

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nalora_mlx.arguments import Parser, add_model, add_settings
from nalora_mlx.core.config import NALoRAConfig, NAParameters, RunConfig, load_run_config
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.settings_without_effect import without_effect
from nalora_mlx.core.signals import SIGNALS, ending_at_once

if TYPE_CHECKING:
    from nalora_mlx.data.checks import RunData
    from nalora_mlx.data.preferences import TokenizedRow
    from nalora_mlx.doctor.model import LoadedModel
    from nalora_mlx.doctor.page import Page

DATA_SETTINGS = (
    "data",
    "train_mode",
    *("prompt_feature", "completion_feature", "chat_feature", "text_feature"),
    *("valid_fraction", "chunk", "mask_prompt", "last_turn_only"),
    *("max_seq_length", "show_masks"),
    *("chat_template", "chat_template_args"),
)
MEMORY_SETTINGS = ("batch_size", "grad_checkpoint", "memory_budget", "quantize", "num_layers")
ADAPTER_SETTINGS = [
    name
    for name in NALoRAConfig.__dataclass_fields__
    if name not in NAParameters.__dataclass_fields__ and name != "num_layers"
]


def build_parser(prog: str) -> Parser:
    """Build a parser for the model, the data, and the settings that decide which layers are adapted and memory use."""
    parser = Parser(
        prog=prog,
        usage="[--model MODEL] [--data DATA] [options]",
        description="Check the machine, and a run before it starts. The exit status is 0 if the run can start, 1 if "
        "a kernel is wrong on this machine, else 2.",
        examples="""
        check this machine
          nalora doctor
        check your rows, and see which tokens of two of them are trained
          nalora doctor --model Qwen/Qwen3-0.6B --data tickets.csv --mask-prompt --show-masks 2
        measure how much memory a run needs
          nalora doctor --config run.yaml --memory
        """,
        essentials=("model", "data", "mask_prompt", "show_masks", "max_seq_length", "config", "memory"),
    )
    add_model(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "-c", "--config", type=Path, metavar="FILE", help="YAML file of a run; flags override it"
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure the run's memory on a few training steps, and tokenize all rows of large data",
    )
    for title, names in (("data", DATA_SETTINGS), ("memory", MEMORY_SETTINGS)):
        add_settings(
            parser.add_argument_group(title), RunConfig, names, without_default=("data", "show_masks")
        )
    add_settings(parser.add_argument_group("adapter"), NALoRAConfig, ADAPTER_SETTINGS)
    return parser


def run(args: argparse.Namespace) -> None:
    """Print one page of checks.

    Raises:
        RunError: a kernel is wrong on this machine.
        InputError: a finding keeps the run from starting.
    """
    given = vars(args)
    name, remote = given.pop("model"), given.pop("trust_remote_code")
    path, trials = given.pop("config"), given.pop("memory")
    config = load_run_config(path, given)
    config.train = True
    config.check()
    if name is None and config.model != RunConfig.model:
        name = config.model  # from the YAML file
    if trials and name is None:
        raise InputError("--memory measures training steps of a model; give --model too")
    from rich.console import Console

    from nalora_mlx.doctor.page import Page

    with ending_at_once(_say_ended):
        has_data = path is not None or "data" in given
        check(Page(Console(highlight=False)), config, name, remote, has_data, trials)


def check(
    page: "Page", config: RunConfig, name: str | None, trust_remote_code: bool, has_data: bool, trials: bool
) -> None:
    """Print one page of checks, see `run`.

    Args:
        page: to print on.
        config: settings of the run.
        name: of the model; None to check none.
        trust_remote_code: run code that comes with the model.
        has_data: check the data that the settings name.
        trials: measure memory on a few training steps, and tokenize all rows.
    """
    from nalora_mlx.doctor import data, machine

    if notices := without_effect(config):
        with page.section("Settings"):
            for notice in notices:
                page.notice(notice)
    with page.section("Machine"):
        machine.check_machine(page)
    with page.section("Kernels"):
        machine.check_kernels(page, few=name is not None)
    rows: RunData | None = None
    unreadable: InputError | None = None
    if has_data:  # the model is loaded with its vision tower if rows have images
        try:
            rows = data.read(page, config)
        except InputError as error:
            unreadable = error
    loaded: LoadedModel | None = None
    with page.section("Model"):
        if name is None:
            page.note("none given; --model M shows what NA-LoRA would adapt")
        else:
            from nalora_mlx.doctor.model import check_model

            loaded = check_model(page, name, trust_remote_code, config, rows)
    examples: list[TokenizedRow] | None = None
    with page.section("Data"):
        if not has_data:
            page.note("none given; --data D checks its rows")
        else:
            examples = []
            if unreadable is not None:
                raise unreadable
            if rows is not None:
                data.print_all(page, rows.problems, rows.notices)
                if loaded is None:
                    data.count_rows(page, rows)
                else:
                    examples = data.check_tokens(page, rows, loaded, config, trials)
    with page.section("Masks"):
        if loaded is not None and examples:
            data.show_masks(page, examples, loaded.tokenizer, config)
    with page.section("Memory"):
        from nalora_mlx.doctor.memory import check_memory

        check_memory(page, loaded, examples, config, trials)
    with page.section("Disk"):
        machine.check_disk(page, None if loaded is None else loaded.model, config)
    with page.section("Extras"):
        machine.check_extras(page)
    is_run = loaded is not None and bool(examples)
    mode = f" --train-mode {config.train_mode}" if config.prefers and "train_mode" not in config.given else ""
    page.verdict(f"nalora lora --train{mode} with the same flags starts the run" if is_run else None)


def _say_ended(number: int) -> None:
    how = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    start = "\r\x1b[K" if sys.stderr.isatty() else ""  # clear the line that says what is being done
    print(f"{start}nalora doctor: {SIGNALS[number]}: stopped by {how}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["doctor", *sys.argv[1:]]))
