"""Services that receive a run's metrics: TensorBoard, and those of mlx-lm through its callbacks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.core.optional_dependencies import install_command, install_packages
from nalora_mlx.runs.preferences import TRL_NAMES, measures
from nalora_mlx.runs.record import record

TENSORBOARD = "tensorboard"  # name of the service, and of its directory in the run's directory
Reporter = Callable[[dict[str, Any]], None]


def reporters(config: RunConfig, warn: Callable[[str], None] = print) -> list[Reporter]:
    """Return listeners of `train` for the services in `report_to`. They connect when the run starts, not before.

    Args:
        config: the run's settings.
        warn: called with a message when a service fails for the first time. The run goes on.

    Raises:
        InputError: a service is unknown, or its package is not installed.
    """
    names = list(dict.fromkeys(n.strip().lower() for n in (config.report_to or "").split(",") if n.strip()))
    found: dict[str, Reporter] = {}
    if TENSORBOARD in names:
        found[TENSORBOARD] = TensorBoard(Path(config.adapter_path or ".").expanduser() / TENSORBOARD)
    for name in names:
        if name != TENSORBOARD:
            found[name] = MlxLmCallback(name, config)
    return [_ignore_failures(name, reporter, warn) for name, reporter in found.items()]


def _ignore_failures(name: str, reporter: Reporter, warn: Callable[[str], None]) -> Reporter:
    """Wrap a reporter so that its failures, such as a lost network connection, do not end the run."""
    failed = False

    def listen(event: dict[str, Any]) -> None:
        nonlocal failed
        try:
            reporter(event)
        except Exception as error:
            if not failed:
                failed = True
                warn(
                    f"note: --report-to {name} fails ({first_line(error)}); the run goes on, and metrics.jsonl has "
                    "all metrics"
                )

    return listen


class TensorBoard:
    """A listener of `train` that writes TensorBoard's event files.

    Args:
        directory: directory of the files; created when the run starts.

    Raises:
        InputError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise InputError(
                f"--report-to tensorboard: needs tensorboardX; {install_command('tensorboard')}"
            ) from None
        self.directory, self.writer_class = directory, SummaryWriter
        self.writer: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Write metrics events."""
        if event["event"] == "start":
            # A resumed run writes again what it had written after its checkpoint.
            purge_step = event["done"] + 1 if event["done"] else None
            self.writer = self.writer_class(str(self.directory), purge_step=purge_step)
        elif self.writer is None:
            return  # starting failed
        elif event["event"] == "end":
            self.writer.close()
        elif "split" in event:
            for tag, value in _scalars(event).items():
                self.writer.add_scalar(tag, value, event["step"])
            self.writer.flush()


def _scalars(event: dict[str, Any]) -> dict[str, float]:
    """Return the scalars of a metrics event by TensorBoard tag. Those of preference training have TRL's tags."""
    values = {f"loss/{event['split']}": event["loss"]}
    for key in ("learning_rate", "gradient_norm", "selection_change", "tokens_per_second", "peak_memory_gb"):
        values[f"training/{key}"] = event.get(key)
    for path, layer in event.get("layers", {}).items():
        values[f"misalignment/{path}"] = layer.get("misalignment")
    prefix = {"train": "train", "valid": "eval"}[event["split"]]
    values |= {f"{prefix}/{TRL_NAMES[name]}": value for name, value in measures(event).items()}
    return {tag: value for tag, value in values.items() if value is not None}


class MlxLmCallback:
    """A listener of `train` that passes metrics to one of mlx-lm's callbacks.

    Args:
        name: name of the service.
        config: the run's settings, which the service displays.

    Raises:
        InputError: mlx-lm does not support the service, or its package is not installed.
    """

    def __init__(self, name: str, config: RunConfig):
        from mlx_lm.tuner import callbacks

        known = sorted(callbacks.SUPPORT_CALLBACK)
        if name not in known:
            raise InputError(f"--report-to {name}: choose from {', '.join([*known, TENSORBOARD])}")
        if getattr(callbacks, name) is None:
            raise InputError(f"--report-to {name}: needs {name}; {install_packages(name)}")
        self.name, self.config = name, config
        self.callback: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Report metrics events."""
        if event["event"] == "start":
            from mlx_lm.tuner.callbacks import get_reporting_callbacks

            self.callback = get_reporting_callbacks(
                self.name,
                project_name=self.config.project_name,
                log_dir=self.config.adapter_path,
                config=record(self.config, {})["settings"],
            )
        elif self.callback is None:
            return  # starting failed
        elif event.get("split") == "train":
            self.callback.on_train_loss_report(report_info(event))
        elif event.get("split") == "valid":
            self.callback.on_val_loss_report(validation_info(event))


def report_info(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return what mlx-lm's callbacks get of a report of the training loss, and the measures of preference training."""
    return {
        "iteration": event["step"],
        "train_loss": event["loss"],
        "learning_rate": event["learning_rate"],
        "iterations_per_second": event["iterations_per_second"],
        "tokens_per_second": event["tokens_per_second"],
        "trained_tokens": event["tokens"],
        "peak_memory": event["peak_memory_gb"],
        **{f"train_{name}": value for name, value in measures(event).items()},
    }


def validation_info(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return what mlx-lm's callbacks get of a validation, and the measures of preference training."""
    return {
        "iteration": event["step"],
        "val_loss": event["loss"],
        "val_time": event["seconds"],
        **{f"val_{name}": value for name, value in measures(event).items()},
    }
