"""How data is destroyed: noising laws by their marginals and kernels."""

from sfumato.processes.affine import Affine, Anchored, MeanReverting, OrnsteinUhlenbeckVE, Residual, ResidualShift
from sfumato.processes.base import Euclidean, Gaussian, Normal
from sfumato.processes.gaussian import DDPM, EDM, VE, VP, Cosine, Flow, Table
from sfumato.processes.interpolant import Interpolant, Transport

__all__ = [
    "DDPM", "EDM", "VE", "VP", "Affine", "Anchored", "Cosine", "Euclidean", "Flow", "Gaussian", "Interpolant",
    "MeanReverting", "Normal", "OrnsteinUhlenbeckVE", "Residual", "ResidualShift", "Table", "Transport",
]  # fmt: skip
