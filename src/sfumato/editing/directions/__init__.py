"""Directions in the latent spaces of a frozen denoiser: found without training, followed by a shift of its features."""

from sfumato.editing.directions.base import Direction, Latents, collect, collect_noised
from sfumato.editing.directions.jacobian import Spectrum, jacobian_directions, singular_vectors
from sfumato.editing.directions.learning import Learned, learn, load, opened
from sfumato.editing.directions.statistics import mean_difference, principal, project_out, random_like

__all__ = [
    "Direction", "Latents", "Learned", "Spectrum", "collect", "collect_noised", "jacobian_directions", "learn", "load", "mean_difference",
    "opened", "principal", "project_out", "random_like", "singular_vectors",
]  # fmt: skip
