"""Calls are counted as a run makes them, and the most steps within a budget are exactly that."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import grids, oracles, processes, solvers
from sfumato.core import Context, InputError, sample

LAWS = [processes.VP(), processes.Flow(), processes.EDM(), processes.DDPM()]
FINITE = [name for name in solvers.names() if math.isfinite(solvers.get(name).nfe)]


def made(solver, law, grid, steps) -> float:
    """The calls of a run on a Gaussian."""
    ctx = Context.of(2, 0, dtype=torch.float64)
    sample(oracles.Gaussian(torch.ones(3), 0.5).denoiser(law), solver, grid, steps, shape=(2, 3), ctx=ctx)
    return ctx.run.nfe


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FINITE), st.sampled_from(LAWS), st.sampled_from(["arctan", "uniform"]), st.integers(1, 12))
def test_a_run_makes_the_calls_that_were_counted_and_one_step_more_exceeds_the_budget(name, law, kind, budget):
    solver = solvers.get(name)
    grid = grids.get(solver.grid or kind)
    try:
        steps = solvers.steps_within(solver, law, grid, budget)
    except InputError:
        return
    assert solvers.calls(solver, law, grid, steps) == made(solver, law, grid, steps) <= budget
    assert solvers.calls(solver, law, grid, steps + 1) > budget


def test_an_anchored_law_is_counted_too():
    law = processes.MeanReverting()
    assert solvers.calls(solvers.get("ddim"), law, grids.get("uniform"), 5) == 5


def test_what_cannot_be_counted_is_refused():
    adaptive, grid = solvers.get("dpm-solver-adaptive"), grids.get("uniform")
    assert solvers.calls(adaptive, LAWS[0], grid, 1) == math.inf
    with pytest.raises(InputError, match="cannot say how many"):
        solvers.steps_within(adaptive, LAWS[0], grid, 20)
    with pytest.raises(InputError, match="more than 1 calls in one step"):
        solvers.steps_within(solvers.get("heun"), LAWS[0], grid, 1, 0.9, 0.1)
