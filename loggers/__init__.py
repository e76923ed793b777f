"""Floor 4: where the numbers go: W&B, and a plain metrics.csv always."""

from loggers.csv_file import MetricsCSV
from loggers.wandb_run import finish_wandb, wandb_logger

__all__ = ["MetricsCSV", "finish_wandb", "wandb_logger"]
