"""Declared order: the slope of the error to the exact end point of the probability flow, item by item."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from sweep import DETERMINISTIC, PROCESSES, gaussian, keeps_grid, lam_times, make, mixture, start, three_processes
from torch import Tensor

from sfumato.core import Context, sample
from sfumato.grids import fixed

LOW, HIGH, LEAD = -1.5, 1.5, 14
STEPS = (48, 96)


@cache
def exact(law: str, kind: str) -> tuple[Tensor, Tensor]:
    """States at the first time and where the probability flow takes them: in closed form, or by a fine Runge-Kutta run."""
    process = PROCESSES[law]
    times = lam_times(process, 400, HIGH, LOW).tolist()
    distribution = gaussian() if kind == "gaussian" else mixture()
    x = start(distribution, process, 64, times[0])
    if kind == "gaussian":
        return x, gaussian().transport(x, process.coef(times[0]), process.coef(times[-1]))
    denoiser, ctx, y = distribution.denoiser(process), Context.of(64, None), x

    def flow(y: Tensor, t: float) -> Tensor:
        return denoiser(y, t, ctx).view("flow")

    for t, s in zip(times, times[1:], strict=False):
        h, half = s - t, (s + t) / 2
        k1 = flow(y, t)
        k2 = flow(y + h / 2 * k1, half)
        k3 = flow(y + h / 2 * k2, half)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + flow(y + h * k3, s))
    return x, y


@three_processes
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_error_falls_with_the_declared_order(name: str, law: str, kind: str) -> None:
    solver, process = make(name), PROCESSES[law]
    if getattr(solver, "taper", False):  # low orders at the end are for few steps: they leave order 2 of any
        solver = replace(solver, taper=False)
    if not keeps_grid(solver):
        pytest.skip("it chooses its own times, or needs equal ones")
    x, end = exact(law, kind)
    denoiser = (gaussian() if kind == "gaussian" else mixture()).denoiser(process)
    errors = []
    for n in STEPS:
        times = lam_times(process, n, HIGH, LOW, LEAD)
        if solver.grid == "uniform":
            times = torch.linspace(float(times[0]), float(times[-1]), n + 1, dtype=torch.float64)
        y = sample(denoiser, solver, fixed(times), len(times) - 1, x=x, start=float(times[0]), stop=float(times[-1]))
        errors.append((y - end).norm(dim=-1))
    slopes = torch.log2(errors[0] / errors[1].clamp(min=1e-15))
    assert errors[1].median() < 0.05
    assert slopes.median() >= solver.order - 0.15, f"order {slopes.median():.2f}, {solver.order} declared"
