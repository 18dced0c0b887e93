"""Records of a training run, on disk and on screen: checkpoints, metrics, run.json, progress display, loggers.

May import `core`, `ops`, `data`, `models` and `adapters`.
"""

from nalora_mlx.runs.metrics import MetricsFile
from nalora_mlx.runs.progress import Progress, TrainResult
from nalora_mlx.runs.record import RecordFile

__all__ = ["MetricsFile", "Progress", "RecordFile", "TrainResult"]
