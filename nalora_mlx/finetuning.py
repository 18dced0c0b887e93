"""`finetune`: a whole fine-tuning job in one call from Python, as `nalora lora` does it."""

import math
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nalora_mlx.core.config import NALoRAConfig, RunConfig, load_run_config
from nalora_mlx.core.config_adapter import LORA_NAMES, NA_NAMES
from nalora_mlx.core.data_entries import ROWS_IN_MEMORY
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.parsing import reject_unknown
from nalora_mlx.core.power import keep_awake
from nalora_mlx.core.settings_without_effect import without_effect

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.runs.progress import TrainResult

Rows = Sequence[Mapping[str, Any]]
Callback = Callable[[dict[str, Any]], None]
# Settings that are arguments of `finetune`, some under another name.
ARGUMENTS = ("model", "data", "adapter_path", "train", "plan")
OTHER_NAMES = {
    "adapter_path": "is called output here",
    "train": "is not a setting: it always trains",
    "plan": "is not a setting: nalora lora --plan predicts memory",
}
SETTINGS = (*(f.name for f in fields(RunConfig) if f.name not in ARGUMENTS), *LORA_NAMES, *NA_NAMES)


@dataclass(repr=False)
class FinetuneResult:
    """What `finetune` has trained.

    Attributes:
        path: directory of the adapter, of its best version by validation loss (`best/`) and of the checkpoints.
        training: losses and counts, see `TrainResult`.
        losses: (iteration, training loss) of each report of this call.
        validation_losses: (iteration, validation loss) of each validation of this call.
        model: the tuned model, in memory.
        tokenizer: its tokenizer, in mlx-lm's wrapper.
        config: all settings of the run.
    """

    path: Path
    training: "TrainResult"
    losses: list[tuple[int, float]]
    validation_losses: list[tuple[int, float]]
    model: "nn.Module"
    tokenizer: Any
    config: RunConfig

    def __repr__(self) -> str:
        training = self.training
        return f"<FinetuneResult: {training.summary} in {training.iterations} iterations, adapter in {self.path}>"

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The content of `samples.json`: a few prompts with the "expected" answer and those "before" and "after"."""
        from nalora_mlx.runs.samples import read_samples

        return read_samples(self.path)

    def generate(
        self,
        prompt: str | list[dict[str, Any]],
        max_tokens: int = 256,
        temp: float = 0.0,
        top_p: float = 0.0,
        images: Sequence[Any] = (),
    ) -> str:
        """Return the tuned model's answer.

        Args:
            prompt: a message, or a chat as a list of messages. A model without a chat template continues a text.
            max_tokens: maximum length of the answer.
            temp: sampling temperature; 0 always takes the most likely token.
            top_p: sample from the most likely tokens with this probability in all; 0 for no limit.
            images: paths, data URIs, bytes or images of Pillow. They come before the message, or where a chat has
                parts {"type": "image"}.
        """
        from mlx_lm.sample_utils import make_sampler

        from nalora_mlx.vision_models import answer

        training = self.model.training
        self.model.eval()
        try:
            return answer(self, prompt, images, max_tokens=max_tokens, sampler=make_sampler(temp, top_p))
        finally:
            self.model.train(training)

    def fuse(self, path: str | Path = "fused_model", *flags: str) -> Path:
        """Merge the adapter into the base model's weights and write them, as `nalora fuse` does.

        Args:
            path: directory to write.
            flags: of `nalora fuse`, such as "--dequantize".

        Raises:
            InputError: the directory is in use, or the merged model would lose most of the adapter's effect.
        """
        from nalora_mlx import fuse

        target = Path(path).expanduser()
        given = ["--model", self.config.model, "--adapter-path", str(self.path), "--save-path", str(target)]
        if self.config.trust_remote_code:
            given.append("--trust-remote-code")
        fuse.run(_parse(fuse.build_parser("fuse"), [*given, *flags]))
        return target

    def report(self, output: str | Path | None = None, *flags: str) -> Path:
        """Write the HTML report of the run, as `nalora report` does; return the page.

        Args:
            output: directory to write; `report` in the run's directory if None.
            flags: of `nalora report`, such as "--open".

        Raises:
            InputError: the packages of the extra `report` are not installed.
        """
        from nalora_mlx.report import __main__ as report
        from nalora_mlx.runs.directory import REPORT

        target = self.path / REPORT if output is None else Path(output).expanduser()
        report.run(_parse(report.build_parser("report"), [str(self.path), "--output", str(target), *flags]))
        return target / report.PAGE


def _parse(parser: Any, argv: Sequence[str]) -> Any:
    """Parse flags of a command; raise InputError for a wrong one instead of ending the process."""

    def fail(message: str) -> NoReturn:
        raise InputError(message)

    parser.error = fail
    return parser.parse_args(argv)


def finetune(
    model: str | Path | None = None,
    data: str | Path | Sequence[str] | Rows | Mapping[str, Rows] | None = None,
    output: str | Path = "adapters",
    *,
    progress: bool = True,
    on_report: Callback | None = None,
    on_validation: Callback | None = None,
    on_save: Callback | None = None,
    stop: Callable[[], bool] | None = None,
    resume: bool | str | Path = False,
    **settings: Any,
) -> FinetuneResult:
    """Fine-tune a model: read rows, attach adapters, train, and save. Seeds MLX's random numbers.

    Args:
        model: directory or Hugging Face repo of the base model.
        data: a file, directory or Hugging Face dataset, several of them, or rows in memory: dicts in any supported
            format, or a mapping of "train", "valid" and "test" to such rows. A DataFrame of pandas is taken as rows.
            Without validation rows, a part of the training rows is held out.
        output: directory for the adapter. A run that is there is moved to its subdirectory `previous`.
        progress: show progress and notices.
        on_report: called after each report of the training loss with what mlx-lm's callbacks get: iteration,
            train_loss, learning_rate, iterations_per_second, tokens_per_second, trained_tokens, peak_memory (GB).
            Preference training adds train_accuracy, train_margin and its other measures.
        on_validation: called after each validation with iteration, val_loss and val_time (seconds). Preference training
            adds val_accuracy, val_margin, val_kl and its other measures.
        on_save: called after each checkpoint with iteration and path.
        stop: asked while each update runs; True ends the training after that update, saved.
        resume: continue the run in `output` with its own settings; or the path of a checkpoint.
        settings: any other setting of `nalora lora`, by its name in config files; those of the adapter by their own
            names (rank=16).

    Raises:
        InputError: an unknown setting, bad rows, a model that cannot be loaded, or a checkpoint of another run.
        FloatingPointError: too many updates in a row had a NaN or infinite loss or gradient.
        RunError: the end of the run could not be saved, or the device failed.
        KeyboardInterrupt: Ctrl-C. The update that was running is finished and saved first.
    """
    try:
        config, rows = _configure(model, data, output, resume, settings)
        return _run(config, rows, progress, stop, _callbacks(on_report, on_validation, on_save))
    except InputError as error:
        raise InputError(python_names(str(error))) from None


def _run(
    config: RunConfig,
    rows: dict[str, Rows] | None,
    progress: bool,
    stop: Callable[[], bool] | None,
    callbacks: Sequence[Callback],
) -> FinetuneResult:
    from nalora_mlx.data.checks import read_run
    from nalora_mlx.export.upload import uploading
    from nalora_mlx.training.job import Job, open_display

    losses: list[tuple[int, float]] = []
    validation_losses: list[tuple[int, float]] = []

    def collect(event: dict[str, Any]) -> None:
        if "split" in event:
            (losses if event["split"] == "train" else validation_losses).append(
                (event["step"], event["loss"])
            )

    with keep_awake(), uploading(config), open_display(quiet=not progress, phrase=python_names) as display:
        display.notices(without_effect(config))
        data = read_run(config, rows)
        display.notices(data.notices)
        job = Job(config, data, display, [collect, *callbacks], stop)
        job.run()
        if job.signal is None:
            display.note('next: result.generate("..."), result.report(), result.fuse("fused_model")')
    if job.signal == signal.SIGINT and job.result is not None and job.result.stopped:
        saved = f"saved in {job.output}; finetune(output={str(job.output)!r}, resume=True) continues"
        raise KeyboardInterrupt(saved if job.result.iterations else "stopped before the first update")
    if job.signal not in (None, signal.SIGINT):
        raise SystemExit(128 + job.signal)
    assert job.result is not None
    path = job.output.absolute()  # the current directory may change
    return FinetuneResult(path, job.result, losses, validation_losses, job.model, job.tokenizer, config)


def python_names(text: str) -> str:
    """Return a message in which flags are written as settings: mask_prompt instead of --mask-prompt."""
    settings = (*fields(RunConfig), *fields(NALoRAConfig))
    names = {"--" + f.metadata.get("flag_name", f.name.replace("_", "-")): f.name for f in settings}
    names["--adapter-path"] = "output"
    parts = re.split(r"(nalora [a-z-]+ --[^;]*)", text)  # commands stay as they are
    parts[::2] = (
        re.sub(r"(?<![\w-])--[a-z][a-z0-9-]*", lambda flag: names.get(flag[0], flag[0]), part)
        for part in parts[::2]
    )
    return "".join(parts)


def _configure(
    model: Any, data: Any, output: Any, resume: bool | str | Path, settings: Mapping[str, Any]
) -> tuple[RunConfig, dict[str, Rows] | None]:
    """Return the settings of a run, and the rows by split if they are in memory."""
    for name in settings.keys() & OTHER_NAMES.keys():
        raise InputError(f"finetune: {name} {OTHER_NAMES[name]}")
    if output is None:
        raise InputError("finetune: output is None; give a directory")
    reject_unknown(settings, SETTINGS, "finetune")
    given = {**settings, "adapter_path": str(output), "train": True}
    if model is not None:
        given["model"] = str(model)
    rows = None if data is None else _rows_by_split(data)
    if rows is not None:
        given["data"] = ROWS_IN_MEMORY
    elif data is not None:
        given["data"] = str(data) if isinstance(data, str | Path) else list(map(str, data))
    if resume:
        from nalora_mlx.runs.resume import LATEST, with_saved_settings

        given["resume"] = LATEST if resume is True else str(resume)
        config = with_saved_settings(load_run_config(None, given, where="finetune"), None, given, "finetune")
    else:
        missing = [name for name in ("model", "data") if name not in given]
        if "hf_dataset" in given and "data" in missing:
            missing.remove("data")
        if missing:
            raise InputError(f"finetune: give {' and '.join(missing)}, or resume=True to continue a run")
        config = load_run_config(None, given, where="finetune")
    config.check()
    return config, rows


def _rows_by_split(data: Any) -> dict[str, Rows] | None:
    """Return rows in memory by split; None if `data` names files or datasets."""
    from nalora_mlx.data.sources.readers import ALL_SPLIT_NAMES, SPLIT_NAMES

    if isinstance(data, str | Path):
        return None
    if isinstance(data, Mapping):
        unknown = [str(name) for name in data if name not in ALL_SPLIT_NAMES]
        if unknown or not data:
            raise InputError(
                f"finetune: data is a mapping with {listed(unknown, ', ') or 'no keys'}; give a list of dicts, or a "
                "mapping of train, valid and test to such lists"
            )
        splits = {other: name for name, others in SPLIT_NAMES.items() for other in others}
        return {splits[name]: _records(rows) for name, rows in data.items()}
    rows = _records(data)
    return None if rows and all(isinstance(row, str | Path) for row in rows) else {"train": rows}


def _records(rows: Any) -> list[Any]:
    """Return rows as a list. Empty cells of a DataFrame are left out."""
    from nalora_mlx.data.sources.tables import without_decoding

    if rows is None:
        return []
    if hasattr(rows, "iloc") and hasattr(rows, "columns"):  # of pandas
        return [
            {name: _plain(value) for name, value in row.items() if not _is_missing(value)}
            for row in rows.to_dict("records")
        ]
    try:
        return list(without_decoding(rows))
    except TypeError:
        raise InputError(
            f"finetune: data is {type(rows).__name__}; give a path, or a list of dicts"
        ) from None


def _is_missing(value: Any) -> bool:
    """Return whether a cell of a DataFrame is empty: None, NaN, NaT or NA."""
    is_null = value is None or type(value).__name__ in ("NAType", "NaTType")
    return is_null or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> Any:
    """Return a cell of a DataFrame with its arrays as lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _callbacks(
    on_report: Callback | None, on_validation: Callback | None, on_save: Callback | None
) -> list[Callback]:
    """Return listeners that pass events on to the callbacks that are given."""
    from nalora_mlx.runs.loggers import report_info, validation_info

    def report(event: dict[str, Any]) -> None:
        if on_report is not None and event.get("split") == "train":
            on_report(report_info(event))

    def validation(event: dict[str, Any]) -> None:
        if on_validation is not None and event.get("split") == "valid":
            on_validation(validation_info(event))

    def save(event: dict[str, Any]) -> None:
        if on_save is not None and event["event"] == "saved":
            on_save({"iteration": event["step"], "path": event["path"]})

    for listener, name in ((report, "on_report"), (validation, "on_validation"), (save, "on_save")):
        listener.__name__ = name  # what a message calls it if it fails
    return [report, validation, save]
