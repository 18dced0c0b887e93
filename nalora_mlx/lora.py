"""`nalora lora`: fine-tune a model with NA-LoRA, LoRA, DoRA or all of its weights, and evaluate it."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nalora_mlx.arguments import Parser, add_settings
from nalora_mlx.core.config import NALoRAConfig, NAParameters, RunConfig, load_run_config
from nalora_mlx.core.power import keep_awake
from nalora_mlx.core.settings_without_effect import without_effect
from nalora_mlx.export.upload import uploading

if TYPE_CHECKING:
    from nalora_mlx.training.job import Job


def build_parser(prog: str) -> Parser:
    """Add a flag for every setting; the YAML-only ones are those of mlx_lm.lora."""
    parser = Parser(prog=prog, description="Fine-tune a model with NA-LoRA, and evaluate it.")
    parser.add_argument(
        "-c", "--config", type=Path, help="YAML file of settings, as for mlx_lm.lora; flags override it"
    )
    add_settings(parser.add_argument_group("run"), RunConfig)
    lora = parser.add_argument_group("adapter (lora_parameters in YAML)")
    na_names = tuple(NAParameters.__dataclass_fields__)
    add_settings(lora, NALoRAConfig, skip=(*na_names, "num_layers"))
    na = parser.add_argument_group("NA-LoRA (na_parameters in YAML)")
    add_settings(na, NAParameters)
    return parser


def run(args: argparse.Namespace) -> None:
    """Read the settings and the rows, then do the job."""
    flags = vars(args)
    path = flags.pop("config")
    config = load_run_config(path, flags)
    if config.resume is not None:
        from nalora_mlx.runs.resume import with_saved_settings

        config = with_saved_settings(config, path, flags)
    config.check()
    if config.plan:
        config.train, config.test = True, False  # --plan does all that precedes training, and nothing else
    from nalora_mlx.data.checks import read_run
    from nalora_mlx.training.job import Job, open_display

    with keep_awake(), uploading(config), open_display() as display:
        display.notices(without_effect(config))
        data = read_run(config)
        display.notices(data.notices)
        job = Job(config, data, display)
        job.run()
        raise_if_stopped(job)


def raise_if_stopped(job: "Job") -> None:
    """Raise Stopped, which sets the exit status, if a signal ended the training."""
    from nalora_mlx.core.signals import Stopped
    from nalora_mlx.training.interruption import how_to_continue

    if job.signal is not None and job.result is not None:
        iterations = job.result.iterations
        saved = f"at iteration {iterations}, saved in {job.output}; {how_to_continue(job.output)}"
        raise Stopped(job.signal, f"stopped {saved if iterations else 'before the first update'}")


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["lora", *sys.argv[1:]]))
