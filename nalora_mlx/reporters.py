"""Services that get a run's metrics: those of mlx-lm through its own callbacks, TensorBoard through tensorboardX."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nalora_mlx.config import RunConfig
from nalora_mlx.errors import InputError

TENSORBOARD = "tensorboard"  # the service, and its directory in that of a run
Reporter = Callable[[dict[str, Any]], None]


def reporters(config: RunConfig) -> list[Reporter]:
    """Listeners of `train` for the services that report_to names.

    Raises:
        InputError: no service is called that, or its package is not installed.
    """
    names = [name.strip().lower() for name in (config.report_to or "").split(",") if name.strip()]
    found: list[Reporter] = []
    if TENSORBOARD in names:
        found.append(TensorBoard(Path(config.adapter_path or ".").expanduser() / TENSORBOARD))
    others = [name for name in names if name != TENSORBOARD]
    return [*found, _peer(config, ",".join(others))] if others else found


class TensorBoard:
    """Writes TensorBoard's event files; usable as a listener of `train`.

    Args:
        directory: where they go; made when the run starts.

    Raises:
        InputError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise InputError(
                "--report-to tensorboard: needs tensorboardX; pip install 'nalora-mlx[tensorboard]'"
            ) from None
        self.directory, self.new_writer = directory, SummaryWriter
        self.writer: Any = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Write an event that has a split."""
        if event["event"] == "start":
            # What a resumed run had written after its checkpoint is told anew.
            purge = event["done"] + 1 if event["done"] else None
            self.writer = self.new_writer(str(self.directory), purge_step=purge)
        elif event["event"] == "end":
            self.writer.close()
        elif "split" in event:
            for tag, value in _scalars(event).items():
                self.writer.add_scalar(tag, value, event["step"])
            self.writer.flush()


def _scalars(event: dict[str, Any]) -> dict[str, float]:
    """What of a report is one number, by TensorBoard's tag."""
    values = {f"loss/{event['split']}": event["loss"]}
    for key in ("learning_rate", "gradient_norm", "tokens_per_second", "peak_memory_gb"):
        values[f"training/{key}"] = event.get(key)
    for path, layer in event.get("layers", {}).items():
        values[f"misalignment/{path}"] = layer.get("misalignment")
    return {tag: value for tag, value in values.items() if value is not None}


def _peer(config: RunConfig, names: str) -> Reporter:
    """mlx-lm's callback of the services, as a listener."""
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    try:
        callback = get_reporting_callbacks(
            names,
            project_name=config.project_name,
            log_dir=config.adapter_path,
            config={k: v for k, v in vars(config).items() if not isinstance(v, Path)},
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"--report-to {config.report_to}: {error}") from None

    def listen(event: dict[str, Any]) -> None:
        if event.get("split") == "train":
            callback.on_train_loss_report(
                {
                    "iteration": event["step"],
                    "train_loss": event["loss"],
                    "learning_rate": event["learning_rate"],
                    "iterations_per_second": event["iterations_per_second"],
                    "tokens_per_second": event["tokens_per_second"],
                    "trained_tokens": event["tokens"],
                    "peak_memory": event["peak_memory_gb"],
                }
            )
        elif event.get("split") == "valid":
            callback.on_val_loss_report(
                {"iteration": event["step"], "val_loss": event["loss"], "val_time": event["seconds"]}
            )

    return listen
