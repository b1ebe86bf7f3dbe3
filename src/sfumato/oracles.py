"""The exact oracles under their public name: ``sf.oracles.GaussianMixture(...).denoiser(process)``."""

from sfumato.denoisers.mixtures import Mixture
from sfumato.denoisers.oracles import Distribution, Empirical, Gaussian, GaussianMixture, LinearSubspace, Oracle

__all__ = ["Distribution", "Empirical", "Gaussian", "GaussianMixture", "LinearSubspace", "Mixture", "Oracle"]
