"""Training: the loop, averages of weights, data loading and checkpoints."""

from sfumato.training.checkpoint import CheckpointError
from sfumato.training.ema import reconstruct
from sfumato.training.parallel import launch
from sfumato.training.trainer import Diverged, Trainer

__all__ = ["CheckpointError", "Diverged", "Trainer", "launch", "reconstruct"]
