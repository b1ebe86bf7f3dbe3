"""Declared cost and exact inverses."""

from __future__ import annotations

import math

import pytest
import torch
from sweep import CONFIGURED, PROCESSES, every_process, every_solver, keeps_grid, make, mixture, start, three_processes

from sfumato import grids
from sfumato.core import Context, InputError, trajectory


@every_process
@every_solver
def test_declared_calls_are_the_counted_ones(name: str, law: str) -> None:
    """Every inner step costs ``nfe`` calls, once the history is full; one that ends at sigma = 0 never costs more."""
    solver, process = make(name), PROCESSES[law]
    ctx = Context.of(2, 0, dtype=torch.float64)
    counts: list[float] = []
    grid = grids.get(solver.grid or "logsnr")
    for _ in trajectory(mixture().denoiser(process), solver, grid, 12, shape=(2, 2), ctx=ctx):
        counts.append(ctx.run.nfe)
    calls = [b - a for a, b in zip(counts, counts[1:], strict=False)]
    if keeps_grid(solver):
        assert len(calls) == 12
    elif not math.isnan(solver.nfe):
        finite = math.isfinite(process.coef(1.0).lam)  # where it is not, the first step is DDIM's
        assert counts[-1] == 12 * solver.nfe if finite else counts[-1] <= 12 * solver.nfe
        return
    inner = calls[4:-1]
    if math.isnan(solver.nfe):  # known only afterwards
        return
    assert sum(inner) / len(inner) == pytest.approx(solver.nfe)
    assert 0 < calls[-1] <= solver.nfe


@three_processes
@pytest.mark.parametrize("name", [name for name in CONFIGURED if make(name).reversible])
def test_inverse_is_exact(name: str, law: str) -> None:
    """Sampling and then inverting, and inverting data and then sampling: back to round-off in float64."""
    solver, process = make(name), PROCESSES[law]
    denoiser, grid = mixture().denoiser(process), grids.get("uniform")
    down, up = (solver, {"start": 1.0, "stop": 0.0}), (solver.inverse(), {"start": 0.0, "stop": 1.0})
    for (there, one), (back, other), first in (
        (down, up, start(mixture(), process, 8)),
        (up, down, mixture().sample(8)),
    ):
        *_, last = trajectory(denoiser, there, grid, 16, x=first, **one)
        *_, home = trajectory(denoiser, back, grid, 16, x=last.restart(), **other)
        assert (back.read(home) - first).abs().max() < 1e-9 * first.abs().max()


@every_solver
def test_only_reversible_solvers_have_an_inverse(name: str) -> None:
    solver = make(name)
    if solver.reversible:
        assert solver.inverse().reversible
    else:
        with pytest.raises(InputError, match="no exact inverse"):
            solver.inverse()
