"""All the noise of a stochastic run as one latent code, led by an energy of what it draws: Langevin dynamics in that space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato import core, grids
from sfumato.core import Context, Denoiser, Grid, InputError, Solver, Streams
from sfumato.editing.recorded import NoiseMaps
from sfumato.guidance.loss import Cost
from sfumato.solvers import registry as solvers


@torch.no_grad()
def drawn(
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    solver: str | Solver = "ddpm",
    grid: str | Grid = "arctan",
    steps: int = 50,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> NoiseMaps:
    """A run from noise of ``shape`` (B, *), with the noise that it drew: its native maps, all N(0, 1).

    Raises InputError for a solver that does not draw once a step.
    """
    chosen = solvers.make(solver) if isinstance(solver, str) else solver
    times = grids.registry.make(grid) if isinstance(grid, str) else grid
    ctx = Context.of(shape[0], seed, cond=dict(cond or {}), dtype=dtype)
    run: list[core.Step] = []
    noise: list[Any] = []
    for st in core.trajectory(denoiser, chosen, times, steps, shape=tuple(shape), ctx=ctx):
        run.append(st)
        if st.index and len(ctx.run.noise) != 1:
            raise InputError(f"{chosen} draws {len(ctx.run.noise)} times a step: give one that draws once, e.g. 'ddpm'")
        noise += ctx.run.noise if st.index else []
    missing = tuple(torch.zeros_like(z) if denoiser.process.coef(st.t).sigma == 0 else None for z, st in zip(noise, run[1:], strict=True))  # fmt: skip
    states: Any = tuple(st.x for st in run)
    return NoiseMaps(denoiser.process, tuple(float(st.t) for st in run), states, tuple(noise), missing, chosen)  # type: ignore[arg-type]


def langevin(
    maps: NoiseMaps,
    denoiser: Denoiser,
    cost: Cost,
    *,
    weight: float = 1.0,
    rate: float = 0.1,
    iterations: int = 50,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> NoiseMaps:
    """Samples of p(z) ~ N(z; 0, I) exp(-weight cost(G(z))), G the run that decodes z: z <- z + rate/2 grad log p + sqrt(rate) w.

    z is the start, divided by its sigma, and the noise of every step that draws.

    cost    (x0, cond) -> (B,), as in ``guidance.loss``: one number an item, differentiable
    rate    of the unadjusted Langevin dynamics: its law is exact as rate -> 0

    One backward pass through the whole run an iteration. Any model with such a latent, one generator for all of them.
    Source: Wu, De la Torre, 2023, "Unifying Diffusion Models' Latent Space, with Applications to CycleDiffusion and
    Guidance".
    """
    if not (rate > 0 and iterations >= 1):
        raise InputError(f"rate = {rate}, iterations = {iterations}: a positive rate and at least one iteration")
    if maps.times[0] != 1.0:
        raise InputError(
            f"these maps begin at t = {maps.times[0]:g}, where the state is no pure noise: take those of a whole run"
        )
    told, streams = dict(cond or {}), Streams.of(seed, len(maps.states[0]))
    sigma = maps.process.coef(1.0).sigma
    live = [i for i, m in enumerate(maps.missing) if m is None]
    z = [maps.states[0] / sigma, *(maps.noise[i] for i in live)]

    def whole(z: Sequence[Tensor]) -> NoiseMaps:
        noise = list(maps.noise)
        for i, v in zip(live, z[1:], strict=True):
            noise[i] = v
        return replace(maps, states=(sigma * z[0], *maps.states[1:]), noise=tuple(noise))

    for j in range(iterations):
        streams.at(j)
        with torch.enable_grad():
            z = [v.detach().requires_grad_() for v in z]
            x0 = whole(z).decode(denoiser, cond=told, keep_last=False, grad=True)
            slopes = torch.autograd.grad(cost(x0, told).sum(), z)
        z = [
            v.detach() * (1 - rate / 2) - rate / 2 * weight * g + math.sqrt(rate) * streams.normal(v)
            for v, g in zip(z, slopes, strict=True)
        ]
    return whole(z)


__all__ = ["drawn", "langevin"]
