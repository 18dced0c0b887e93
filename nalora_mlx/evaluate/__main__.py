"""`nalora evaluate`: compare a base model and its tuned versions on a test set, general text and standard tasks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nalora_mlx.arguments import Parser, add_settings
from nalora_mlx.cli import require_model
from nalora_mlx.core.config import RunConfig, load_run_config
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import coerce
from nalora_mlx.core.power import keep_awake
from nalora_mlx.evaluate.settings import EvaluationSettings

# Settings of the model and the data, which are those of the adapter's run if they are not given.
RUN_SETTINGS = (
    "model",
    "data",
    "mask_prompt",
    "last_turn_only",
    "max_seq_length",
    "train_mode",
    "prompt_feature",
    "completion_feature",
    "text_feature",
    "chat_feature",
    "chat_template",
    "chat_template_args",
    "quantize",
    "trust_remote_code",
)
INHERITED = [name for name in RUN_SETTINGS if name not in ("model", "trust_remote_code")]
INHERITED += ["hf_dataset", "valid_fraction", "chunk", "seed"]
OF_ROWS = ("metric", "regex", "json_schema", "choices")  # settings that need a test set
# The settings in the order of the help. Those before the bar are on the short page, too.
GROUPS = {
    "model and data": "model data split samples mask_prompt | last_turn_only max_seq_length train_mode prompt_feature "
    "completion_feature text_feature chat_feature chat_template chat_template_args quantize trust_remote_code",
    "answers": "metric regex choices max_tokens | json_schema batch_size show",
    "general text and tasks": "general tasks | max_forgetting task_path limit num_fewshot chat_tasks",
    "results": "watch_checkpoints | output seed",
}
EXAMPLES = """
did training help? on the test set of the run
  nalora evaluate --model Qwen/Qwen3-0.6B --adapter-path adapters
compare two adapters, by a metric of your own
  nalora evaluate --model Qwen/Qwen3-0.6B --adapter-path a --adapter-path b --metric score.py:score
which checkpoint is best?
  nalora evaluate --model Qwen/Qwen3-0.6B --adapter-path adapters --watch-checkpoints
a standard task, with the extra eval
  nalora evaluate --model Qwen/Qwen3-0.6B --adapter-path adapters --tasks hellaswag --limit 200
"""


def build_parser(prog: str) -> Parser:
    """Build the parser: model, adapters and data, what is measured, and where the result goes."""
    parser = Parser(
        prog=prog,
        usage="--model MODEL --adapter-path DIR --data DATA [options]",
        description="Compare a base model and its tuned versions on a test set, general text and standard tasks.",
        examples=EXAMPLES,
        essentials=[
            *" ".join(names.partition("|")[0] for names in GROUPS.values()).split(),
            "adapter_path",
        ],
    )
    for title, listed in GROUPS.items():
        group = parser.add_argument_group(title)
        names = listed.replace("|", "").split()
        of_run = [name for name in names if name in RUN_SETTINGS]
        add_settings(group, RunConfig, of_run[:1], without_default=of_run)
        if "model" in names:
            group.add_argument(
                "--adapter-path",
                action="append",
                default=[],
                type=Path,
                metavar="DIR",
                help="directory of a trained adapter; give the flag again for each further one",
            )
        add_settings(group, RunConfig, of_run[1:], without_default=of_run)
        add_settings(group, EvaluationSettings, [name for name in names if name not in of_run])
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure the base model and each adapter, print the comparison, and write it."""
    given = vars(args)
    adapters = [path.expanduser() for path in given.pop("adapter_path")]
    settings = EvaluationSettings(
        **coerce(
            {name: given[name] for name in given if name not in RUN_SETTINGS},
            EvaluationSettings,
            "command line",
        )
    )
    settings.check()
    if settings.watch_checkpoints:
        from nalora_mlx.evaluate.checkpoints import wait_for_checkpoint

        if len(adapters) != 1:
            raise InputError("--watch-checkpoints: give the directory of one run with --adapter-path")
        wait_for_checkpoint(adapters[0])
    flags = {name: value for name, value in given.items() if name in RUN_SETTINGS}
    require_model(flags.get("model"), adapters[0] if adapters else None)
    config, has_data = _configure(flags, adapters, settings)
    from nalora_mlx.evaluate.job import EvaluationJob
    from nalora_mlx.training.job import open_display

    with keep_awake(), open_display() as display:
        EvaluationJob(config, settings, adapters, has_data, display).run()


def _configure(
    flags: dict[str, Any], adapters: Sequence[Path], settings: EvaluationSettings
) -> tuple[RunConfig, bool]:
    """Return the settings of model and data, and whether there is a test set.

    What flags do not say of the data is as in the run of the first adapter. With --tasks, only --data gives a test set.

    Raises:
        InputError: paths do not exist, or there is nothing to evaluate on.
    """
    from nalora_mlx.core.paths import check_paths

    check_paths(flags["model"])
    for adapter in adapters:
        check_paths(None, str(adapter))
    if len({adapter.resolve() for adapter in adapters}) < len(adapters):
        raise InputError("--adapter-path: the same adapter is given twice; give each once")
    saved = _inherited(adapters[0]) if adapters else {}
    has_data = "data" in flags or (settings.tasks is None and ("data" in saved or "hf_dataset" in saved))
    if not has_data and settings.tasks is None:
        gone = saved.get("gone")
        reason = f"the run's data, {gone}, is not there any more" if gone else "--data is missing"
        raise InputError(
            f"{reason}; give a test set with --data (a file, or a directory with test.jsonl), or --tasks NAMES"
        )
    if not has_data and (unused := [f"--{name}" for name in OF_ROWS if getattr(settings, name) is not None]):
        raise InputError(f"{', '.join(unused)}: with --tasks, only --data gives a test set; give it, too")
    saved.pop("gone", None)
    first = str(adapters[0]) if adapters else ""
    config = load_run_config(None, flags | {"adapter_path": first, "test": True}, saved)
    config.train = False
    config.check()
    return config, has_data


def _inherited(adapter: Path) -> dict[str, Any]:
    """Return the settings of an adapter's run about its data; under "gone", its data that does not exist any more.

    mlx_lm.lora keeps its settings in adapter_config.json.
    """
    from nalora_mlx.adapters.files import read_adapter_config
    from nalora_mlx.runs.base_model import missing_data, trained_settings

    trained = trained_settings(adapter)
    if not trained:
        content = read_adapter_config(adapter)
        given = {name: content.get(name) for name in ("data", "mask_prompt", "max_seq_length")}
        given = {name: value for name, value in given.items() if value is not None}
        trained = coerce(given, RunConfig, str(adapter / "adapter_config.json"))
    saved = {name: trained[name] for name in INHERITED if trained.get(name) is not None}
    if saved.get("hf_dataset"):
        saved.pop("data", None)
    if "data" in saved and (gone := missing_data(adapter, saved["data"])):
        del saved["data"]
        saved["gone"] = ", ".join(gone)
    return saved


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
