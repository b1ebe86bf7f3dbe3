"""Objectives: batch to loss."""

from sfumato.objectives.autoencoder import Autoencoding
from sfumato.objectives.contrastive import Contrastive
from sfumato.objectives.denoising import Denoising, drop
from sfumato.objectives.times import ByLoss, LogitNormal, LogNormal, Uniform
from sfumato.objectives.weights import weight

__all__ = [
    "Autoencoding",
    "ByLoss",
    "Contrastive",
    "Denoising",
    "LogNormal",
    "LogitNormal",
    "Uniform",
    "drop",
    "weight",
]
