"""Objectives: batch to loss."""

from sfumato.objectives.alignment import ConditionAlignment
from sfumato.objectives.autoencoder import Autoencoding
from sfumato.objectives.contrastive import Contrastive
from sfumato.objectives.denoising import Denoising, drop
from sfumato.objectives.fokker_planck import FokkerPlanck, log_density_residual
from sfumato.objectives.times import ByLoss, LogitNormal, LogNormal, Uniform
from sfumato.objectives.weights import weight

__all__ = [
    "Autoencoding",
    "ByLoss",
    "ConditionAlignment",
    "Contrastive",
    "Denoising",
    "FokkerPlanck",
    "LogNormal",
    "LogitNormal",
    "Uniform",
    "drop",
    "log_density_residual",
    "weight",
]
