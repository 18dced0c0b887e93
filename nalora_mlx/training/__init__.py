"""The training loop: step, loss, importance, optimizers, evaluation, distributed workers and memory planning.

May import every package except the commands.
"""

from nalora_mlx.training.evaluation import evaluate
from nalora_mlx.training.events import Listener
from nalora_mlx.training.memory_model import BatchShape, PeakMemory
from nalora_mlx.training.memory_plan import Plan, default_budget, largest_batch, plan
from nalora_mlx.training.optimizers import build_optimizer
from nalora_mlx.training.step import TrainingStep
from nalora_mlx.training.trainer import train

__all__ = [
    "BatchShape",
    "Listener",
    "PeakMemory",
    "Plan",
    "TrainingStep",
    "build_optimizer",
    "default_budget",
    "evaluate",
    "largest_batch",
    "plan",
    "train",
]
