"""The verbs of the library, with names resolved to objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sfumato import core, grids, solvers
from sfumato.core import Denoiser, Grid, Solver, Step

DEFAULT_SOLVER, DEFAULT_GRID = "dpm-solver++", "arctan"


def _solver(solver: str | Solver) -> Solver:
    return solvers.registry.make(solver) if isinstance(solver, str) else solver


def _grid(grid: str | Grid | None, solver: Solver) -> Grid:
    grid = grid or solver.grid or DEFAULT_GRID
    return grids.registry.make(grid) if isinstance(grid, str) else grid


def sample(
    denoiser: Denoiser,
    *,
    solver: str | Solver = DEFAULT_SOLVER,
    grid: str | Grid | None = None,
    steps: int = 20,
    **options: Any,
) -> Tensor:
    """Sample: x (B, *) at t = 0 from noise (``shape=``) or from a state (``x=``).

    solver, grid  a name, a spec such as "dpm-solver++(order=3)", or an object; grid None is the one the solver needs, or arctan
    options       shape, x, cond, seed, start, stop, ctx, grad, dtype, device: see :func:`sfumato.core.trajectory`

    Item i draws from stream (seed, i): it never depends on the batch.
    """
    chosen = _solver(solver)
    return core.sample(denoiser, chosen, _grid(grid, chosen), steps, **options)  # type: ignore[no-any-return]


def trajectory(
    denoiser: Denoiser,
    *,
    solver: str | Solver = DEFAULT_SOLVER,
    grid: str | Grid | None = None,
    steps: int = 20,
    **options: Any,
) -> Any:
    """The iterator of Steps behind :func:`sample`; takes the same arguments."""
    chosen = _solver(solver)
    return core.trajectory(denoiser, chosen, _grid(grid, chosen), steps, **options)


def invert(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    solver: str | Solver = "ddim",
    grid: str | Grid | None = None,
    steps: int = 50,
    cond: Mapping[str, Any] | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    **options: Any,
) -> Step:
    """Run time upwards from data x0 to noise: the Step to give to :func:`sample` as ``x`` to get x0 back.

    Exact to round-off for solvers with an exact inverse, otherwise to the solver's accuracy on the flipped grid.
    """
    chosen = _solver(solver)
    forward = chosen.inverse() if chosen.reversible else chosen
    run = core.trajectory(
        denoiser, forward, _grid(grid, chosen), steps, x=x0, cond=cond, start=start, stop=stop, **options
    )
    for st in run:
        last = st
    return last.restart()
