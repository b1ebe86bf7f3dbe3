"""What a learned field gets wrong, and what of it matters: residuals of its equation, gauge freedom, dimension of the data."""

from sfumato.analysis.fokker_planck import Gap, Tabulated, ode_sde_gap, score_residual, wasserstein2
from sfumato.analysis.gauge_freedom import (
    Decomposition,
    Flow,
    asymmetry,
    decompose,
    flow_jacobian,
    flow_log_density,
    gauge,
    gauge_residual,
    intrinsic_dimension,
    largest_gap,
    local_pca_dimension,
    maximum_likelihood_dimension,
    moved_picture,
    perturbed,
    score_jacobian,
    swirl,
)
from sfumato.denoisers import Potential
from sfumato.objectives.fokker_planck import log_density_residual
from sfumato.processes.base import sde

__all__ = [
    "Decomposition", "Flow", "Gap", "Potential", "Tabulated", "asymmetry", "decompose", "flow_jacobian", "flow_log_density", "gauge", "gauge_residual",
    "intrinsic_dimension", "largest_gap", "local_pca_dimension", "log_density_residual", "maximum_likelihood_dimension",
    "moved_picture", "ode_sde_gap", "perturbed", "score_jacobian", "score_residual", "sde", "swirl", "wasserstein2",
]  # fmt: skip
