"""Training: one loop for all models, exact resume."""

from enerverse.train.loop import NotFinite, Task, TrainConfig, TrainingStopped, train

__all__ = ["NotFinite", "Task", "TrainConfig", "TrainingStopped", "train"]
