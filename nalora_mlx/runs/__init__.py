"""What a training run writes to disk and shows: checkpoints, metrics, the run's record, progress, loggers.

May import all packages above it: `core`, `ops`, `data`, `models` and `adapters`."""

from nalora_mlx.runs.metrics import MetricsFile
from nalora_mlx.runs.progress import Progress, TrainResult
from nalora_mlx.runs.record import RecordFile

__all__ = ["MetricsFile", "Progress", "RecordFile", "TrainResult"]
