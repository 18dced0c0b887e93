"""The training loop: step, loss, importance, optimizers, evaluation, distributed workers and memory planning.

May import every package except the commands."""

from nalora_mlx.training.evaluation import evaluate
from nalora_mlx.training.optimizers import build_optimizer
from nalora_mlx.training.step import TrainingStep
from nalora_mlx.training.trainer import train

__all__ = ["TrainingStep", "build_optimizer", "evaluate", "train"]
