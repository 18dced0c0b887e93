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


# The settings in the order of the help. Those before the bar are on the short page, too.
GROUPS = {
    "model and data": "model data mask_prompt | show_masks valid_fraction last_turn_only chunk prompt_feature "
    "completion_feature text_feature chat_feature chat_template chat_template_args trust_remote_code",
    "training": "train test preset train_mode iters epochs batch_size learning_rate | max_seq_length optimizer "
    "grad_accumulation_steps grad_clip packing seed max_bad_steps",
    "preferences (docs/preference.md)": "| preference_beta dpo_loss label_smoothing length_normalized simpo_margin "
    "desirable_weight undesirable_weight reference",
    "adapter (num_layers and lora_parameters in YAML)": "fine_tune_type num_layers rank | scale dropout keys vision "
    "projector",
    "results": "adapter_path resume | resume_adapter_file resume_anyway save_every keep_last samples push_to_hub",
    "validation and reports": "| steps_per_report steps_per_eval val_batches test_batches early_stopping report_to "
    "project_name",
    "memory": "plan quantize grad_checkpoint | grad_checkpoint_every memory_budget clear_cache_threshold wired_limit",
    "NA-LoRA (na_parameters in YAML; docs/method.md)": "| " + " ".join(NAParameters.__dataclass_fields__),
}
EXAMPLES = """
train on your own rows, with the loss on the answers only
  nalora lora --train --model Qwen/Qwen3-0.6B --data tickets.csv --mask-prompt --preset quick
see first how much memory a run needs
  nalora lora --plan --model Qwen/Qwen3-0.6B --data tickets.csv --quantize 4 --batch-size 8
continue a run from its last checkpoint, for longer
  nalora lora --resume --adapter-path adapters --iters 2000
"""
RATE_NOTICE = (
    "the learning rate is that of mlx_lm.lora, 1e-05; --preset quick learns faster, and --preset careful forgets "
    "less than quick"
)


def build_parser(prog: str) -> Parser:
    """Add a flag for every setting; the YAML-only ones are those of mlx_lm.lora."""
    essentials = " ".join(names.partition("|")[0] for names in GROUPS.values()).split()
    parser = Parser(
        prog=prog,
        usage="--model MODEL --data DATA --train [options]",
        description="Fine-tune a model with NA-LoRA, LoRA, DoRA or all of its weights, and evaluate it.",
        examples=EXAMPLES,
        essentials=[*essentials, "config"],
    )
    for title, listed in GROUPS.items():
        group = parser.add_argument_group(title)
        names = listed.replace("|", "").split()
        of_run = [name for name in names if name in RunConfig.__dataclass_fields__]
        add_settings(group, RunConfig, of_run)
        add_settings(group, NALoRAConfig, [name for name in names if name not in of_run])
        if "model" in names:
            config = "YAML file of settings, as for mlx_lm.lora; flags override it"
            group.add_argument("-c", "--config", type=Path, metavar="FILE", help=config)
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
    from nalora_mlx.runs.next_steps import next_steps
    from nalora_mlx.training.job import Job, open_display

    with keep_awake(), uploading(config), open_display() as display:
        display.notices(without_effect(config))
        if path is None and has_default_rate(config):
            display.notices([RATE_NOTICE])
        data = read_run(config)
        display.notices(data.notices)
        job = Job(config, data, display)
        job.run()
        raise_if_stopped(job)
        if job.result is not None:
            display.next_steps(next_steps(config, job.result, job.prompts))


def has_default_rate(config: RunConfig) -> bool:
    """Return whether a run trains adapters on texts and answers, and nobody has chosen its learning rate."""
    chosen = {"learning_rate", "lr_schedule", "preset", "optimizer", "optimizer_config"} & config.given.keys()
    is_new = config.train and not config.plan and config.resume is None
    return is_new and not chosen and config.fine_tune_type != "full" and not config.prefers


def raise_if_stopped(job: "Job") -> None:
    """Raise Stopped, which sets the exit status, if a signal ended the training."""
    from nalora_mlx.core.signals import Stopped
    from nalora_mlx.training.interruption import how_to_continue

    if job.signal is not None and job.result is not None:
        if not job.result.stopped:
            raise Stopped(job.signal, f"stopped after training: the adapter in {job.output} is complete")
        iterations = job.result.iterations
        saved = f"at iteration {iterations}, saved in {job.output}; {how_to_continue(job.output)}"
        raise Stopped(job.signal, f"stopped {saved if iterations else 'before the first update'}")


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["lora", *sys.argv[1:]]))
