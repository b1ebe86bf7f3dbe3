"""Stochastic solvers keep the marginals of the process.

On a Gaussian every step is affine in the state and in its noise, so the mean and the covariance of what a solver makes can
be computed without a single random number; mixtures are sampled.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sweep import PROCESSES, STOCHASTIC, gaussian, make, mixture, run, start, three_processes
from torch import Tensor

from sfumato import grids
from sfumato.core import Context

OF_MEANS = [name for name in STOCHASTIC if not getattr(make(name), "consistency", False)]
"""Solvers of a posterior mean; those of a consistency function keep its law instead (test_distillation_objectives)."""
LAST = 3.0
"""lambda where runs stop: a step to sigma = 0 ends in a mean, without the noise that the marginal has."""


def affine(name: str, law: str, steps: int) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of the last state, from the solver's response to every single unit of noise."""
    solver, process, g = make(name), PROCESSES[law], gaussian()
    denoiser, d = g.denoiser(process), 3
    end, draws = process.time(LAST), 0

    def respond(x: Tensor, unit: Any) -> Tensor:
        nonlocal draws
        draws = 0

        def source(ctx: Context, fresh: Any) -> Tensor:
            nonlocal draws
            draws += 1
            return unit(draws - 1)

        ctx = Context.of(len(x), 0, dtype=torch.float64, source=source)
        return run(denoiser, solver, grids.get("logsnr"), steps, x=x, stop=end, ctx=ctx)

    zero = torch.zeros(1, d, dtype=torch.float64)
    respond(zero, lambda k: zero)
    items = 1 + d + draws * d
    x, eye = torch.zeros(items, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    x[1 : 1 + d] = eye

    def unit(k: int) -> Tensor:
        noise = torch.zeros(items, d, dtype=torch.float64)
        noise[1 + d + k * d : 1 + d + (k + 1) * d] = eye
        return noise

    y = respond(x, unit)
    c, response = process.coef(1.0), y[1:] - y[0]
    spread = c.alpha**2 * g.basis @ torch.diag(g.variances) @ g.basis.T + c.sigma**2 * eye
    a, b = response[:d], response[d:]
    return y[0] + c.alpha * g.mean @ a, a.T @ spread @ a + b.T @ b


@three_processes
@pytest.mark.parametrize("name", OF_MEANS)
def test_mean_and_covariance_of_a_gaussian(name: str, law: str) -> None:
    g, c = gaussian(), PROCESSES[law].coef(PROCESSES[law].time(LAST))
    total = (c.alpha**2 * g.variances + c.sigma**2).sqrt()

    def spread(steps: int) -> Tensor:
        """The covariance with the exact one divided out; the mean is checked on the way."""
        mean, covariance = affine(name, law, steps)
        assert ((mean - c.alpha * g.mean) @ g.basis / total).abs().max() < 1e-3
        return (g.basis.T @ covariance @ g.basis) / total / total[:, None]

    coarse, fine = spread(80), spread(160)
    assert (fine - torch.eye(3)).abs().max() < 0.15
    # What a discretisation of order 1 still does wrong halves: extrapolated to no step at all, nothing is left of it.
    assert (2 * fine - coarse - torch.eye(3)).abs().max() < 0.03


def sliced(x: Tensor, y: Tensor) -> float:
    """Mean over directions of the Wasserstein-1 distance of equally many projected points."""
    angles = torch.arange(16, dtype=torch.float64) * torch.pi / 16
    directions = torch.stack([angles.cos(), angles.sin()])
    return float(((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean())


@three_processes
@pytest.mark.parametrize("name", OF_MEANS)
def test_distance_to_a_mixture_is_the_sampling_noise(name: str, law: str) -> None:
    m, process, n, steps = mixture(), PROCESSES[law], 1500, 80
    end, generator = process.time(LAST), torch.Generator().manual_seed(3)
    quick = Context.of(  # one draw for all items: this law is not about streams
        n, 0, dtype=torch.float64, source=lambda ctx, fresh: torch.randn(n, 2, dtype=torch.float64, generator=generator)
    )
    y = run(m.denoiser(process), make(name), grids.get("logsnr"), steps, x=start(m, process, n), stop=end, ctx=quick)
    exact, again = (start(m, process, n, end, seed=s) for s in (11, 12))
    assert sliced(y, exact) < 2.5 * sliced(again, exact)
