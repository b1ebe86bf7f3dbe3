"""A network for vectors that lie on an unknown linear subspace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.core.errors import InputError
from sfumato.networks.base import register
from sfumato.networks.mlp import MLP


@register("subspace-score")
class SubspaceScore(nn.Module):
    """V f(V^T x, label) with learnt orthonormal columns V (channels, rank) and a perceptron f on `rank` numbers.

    Wrapped as an 'x0' prediction its score is (alpha V f(V^T x, label) - x) / sigma^2: what leads back to the subspace,
    -(I - V V^T) x / sigma^2, is right by construction, and only `rank` dimensions are left to learn whatever `channels`
    is. The exact belief of `oracles.LinearSubspace` has this form with V its basis.

    forward(x (B, *, channels), label (B,)) -> (B, *, channels); 0 at the start. `basis` is V. width and depth are those
    of f, `scale` multiplies the label before its sinusoids. Raises InputError unless 1 <= rank <= channels.

    Source: Chen, Huang, Zhao, Wang, 2023, "Score Approximation, Estimation and Distribution Recovery of Diffusion Models
    on Low-Dimensional Data"; Chen, Mei, Fan, Wang, 2024, "An Overview of Diffusion Models".
    """

    def __init__(self, channels: int, rank: int, width: int = 128, depth: int = 3, scale: float = 1000.0) -> None:
        super().__init__()
        if not 1 <= rank <= channels:
            raise InputError(f"rank = {rank} of vectors with {channels} channels: it is from 1 to {channels}")
        self.channels = channels
        self.frame = nn.Parameter(torch.randn(channels, rank) / channels**0.5)
        self.inside = MLP(rank, width=width, depth=depth, scale=scale)

    @property
    def basis(self) -> Tensor:
        """V (channels, rank): the orthonormal columns that span the same space as the parameter `frame`."""
        q, r = torch.linalg.qr(self.frame)
        return q * r.diagonal().sign()  # the one of these bases that changes smoothly with the frame

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[-1] != self.channels:
            raise InputError(f"x is {tuple(x.shape)}; it must be (batch, ..., {self.channels})")
        basis = self.basis
        return self.inside(x @ basis, label) @ basis.T
