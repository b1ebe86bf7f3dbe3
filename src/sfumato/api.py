"""The verbs of the library, with names resolved to objects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato import core, grids, solvers
from sfumato.core import Denoiser, Grid, InputError, Solver, Step, first, tree_map

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
    batch: int | None = None,
    **options: Any,
) -> Tensor:
    """Sample: x (B, *) at t = 0 from noise (``shape=``) or from a state (``x=``).

    solver, grid  a name, a spec such as "dpm-solver++(order=3)", or an object; grid None is the one the solver needs, or arctan
    batch         run so many items at a time (large sets stream in chunks, each item as it would be); default: all at once
    options       shape, x, cond, seed, start, stop, ctx, grad, dtype, device: see :func:`sfumato.core.trajectory`

    Item i draws from stream (seed, i): it never depends on the batch.
    """
    chosen = _solver(solver)
    run = functools.partial(core.sample, denoiser, chosen, _grid(grid, chosen), steps)
    return run(**options) if batch is None else _chunked(run, batch, **options)  # type: ignore[no-any-return]


def _chunked(
    run: Callable[..., Any],
    batch: int,
    *,
    shape: Any = None,
    x: Any = None,
    cond: Mapping[str, Any] | None = None,
    seed: Any = 0,
    **options: Any,
) -> Any:
    """``run`` on slices of the items, put together again."""
    if not (isinstance(batch, int) and batch >= 1):
        raise InputError(f"batch = {batch!r}: a whole number of items, at least 1")
    if isinstance(x, Step) or options.get("ctx") is not None:
        raise InputError("a Step or a ctx= is of all its items at once: leave out batch=")
    whole = (x is None) != (shape is None) and (len(first(x)) if shape is None else first(shape)[0])
    if not whole:  # the loop says what is wrong
        return run(shape=shape, x=x, cond=cond, seed=seed, **options)
    streams, parts = core.Streams.of(seed, whole), []

    def cut(value: Any, rows: slice) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == whole else value

    for low in range(0, whole, batch):
        rows = slice(low, min(low + batch, whole))
        n = rows.stop - low
        here = {"x": tree_map(cut, x, rows)} if shape is None else {"shape": _of_rows(shape, n)}
        part = {k: tree_map(cut, v, rows) for k, v in (cond or {}).items()}
        parts.append(run(cond=part, seed=streams.select(rows), **here, **options))
    return tree_map(lambda *leaves: torch.cat(leaves), *parts)


def _of_rows(shape: Any, n: int) -> Any:
    """The shape, or mapping of shapes, with n items."""
    return {k: _of_rows(v, n) for k, v in shape.items()} if isinstance(shape, Mapping) else (n, *shape[1:])


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
