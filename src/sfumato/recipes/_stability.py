"""Where steps stay stable: registered solvers run on the test equation, for any complex size of a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sfumato import grids, solvers
from sfumato.core import Context, Denoiser, Posterior, sample
from sfumato.processes import EDM


class Rotating(Denoiser):
    """eps = mu x for one complex mu an item, x in the plane: the test equation of stability, at equal steps of sigma."""

    def __init__(self, mu: Tensor) -> None:
        super().__init__()
        self.process, self.mu = EDM(sigma_min=1e-3, sigma_max=1.0, rho=1.0), mu

    def forward(self, x: Tensor, t: Any, ctx: Context) -> Posterior:
        ctx.run.nfe += 1
        return Posterior(torch.view_as_real(self.mu * torch.view_as_complex(x)), "eps", x, self.process.coef(t))


def growth(spec: str, z: Tensor, steps: int) -> Tensor:
    """log |x_n| after n steps of a registered solver, each of the complex size z = step times rate (N,); exactly n Re z."""
    x = torch.tensor([[1.0, 0.0]]).double().repeat(len(z), 1)
    end = sample(Rotating(-z * steps), solvers.registry.make(spec), grids.get("uniform"), steps, x=x)
    return end.norm(dim=1).log().nan_to_num(math.inf, math.inf)
