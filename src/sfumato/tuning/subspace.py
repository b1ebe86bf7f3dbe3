"""Optimal linear subspaces: the coefficients of a few steps, by least squares against a fine solution."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sfumato.core import Context, InputError, linear, row, solve
from sfumato.solvers._integral import reading
from sfumato.solvers.scheduled import Subspace
from sfumato.tuning.steps import Choice, StepSpace, evolve
from sfumato.tuning.target import Replay, Target

RIDGE = 1e-4  # of evolved fits: with less, opposite coefficients of collinear readings throw rare unseen items far away
ROWS: dict[str, Any] = {"noise": "eps", "data": "x0", "v": "v", "line": (-1.0, 1.0), "flow": "flow"}
"""The readings that can be fitted, as rows of the belief."""


@dataclass(frozen=True)
class Fit:
    """A fitted solver, its times, and what to distrust it by.

    largest    the largest term over the state that the terms add up to: collinear readings get huge opposite ones
    condition  the worst condition number of a step's least squares (columns scaled to one)
    residual   root mean square error of each step's fit on the target it was fitted to
    """

    solver: Subspace
    times: tuple[float, ...]
    largest: float
    condition: float
    residual: tuple[float, ...]


def fit(
    target: Target,
    steps: int,
    *,
    path: str | Sequence[int] = "search",
    form: str = "noise",
    closed: bool = False,
    free: bool = False,
    ridge: float = 0.0,
) -> Fit:
    """For each of K steps: (w_i, a_i) = argmin || x(p_{i+1}) - w x_start - sum_{j <= i} a_j e(p_j) ||^2.

    path    'search' (:func:`shortest_path`), 'uniform', or the indices of the fine times to visit, 0 first
    form    'noise' | 'data' | 'v' | 'line' | 'flow': the reading e
    closed  fit each step to the student's own readings at its own states (ours: errors are then mended, not fed back);
            the publication fits to the teacher's
    free    the first step scales the start and calls nothing (ours), so K steps are K - 1 calls
    ridge   times the mean square of the columns, added to the diagonal (ours)

    The target's fine solution is the teacher. A searched path may have fewer steps than asked for. Warns where a term
    exceeds 1000 times the sum. Raises InputError for a path that is not increasing from 0 within the teacher's steps, and for
    an unknown form.
    Source: Duan et al. 2023, "Optimal Linear Subspace Search".
    """
    if form not in ROWS:
        raise InputError(f"form = {form!r}: one of {', '.join(ROWS)}")
    n = len(target.times) - 1
    chosen = _path(target, steps, path, form, n)
    visited = [*chosen, n]
    times = tuple(target.times[k] for k in visited)
    rows, (condition, largest), residual, _ = (_closed if closed else _open)(target, visited, form, ridge, free)
    if largest > 1e3:
        warnings.warn(
            f"terms of {largest:.3g} times their sum: the readings are nearly collinear; use fewer steps, closed=True or a ridge",
            stacklevel=2,
        )
    return Fit(Subspace(times, tuple(rows), form, free), times, largest, condition, tuple(residual))


def shortest_path(target: Target, steps: int, form: str = "noise", bound: float = 10.0) -> list[int]:
    """The indices of at most ``steps`` fine times whose worst single-step fit is least.

    For a bound D each step goes as far as a fit of the state there, from the state it leaves and the readings so far, has
    an RMS error of at most D (by bisection; at least one time further); the least feasible D is found by bisection.
    """
    n = len(target.times) - 1
    _valid(steps, n)
    best, low, high = list(range(0, n, -(-n // steps))), 0.0, bound
    known: dict[tuple[tuple[int, ...], int], float] = {}
    for _ in range(30):
        middle = (low + high) / 2
        found = _greedy(target, steps, form, middle, n, known)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _greedy(target: Target, steps: int, form: str, bound: float, n: int, known: dict[Any, float]) -> list[int] | None:
    """The path of the longest steps within the bound, or None where it takes more than ``steps``."""
    path = [0]
    while True:
        here, low, high = path[-1], path[-1] + 1, n
        while low < high:  # the furthest time within the bound
            middle = (low + high + 1) // 2
            key = (tuple(path), middle)
            if key not in known:
                columns = [_state(target, here), *(_reading(target, k, form) for k in path)]
                known[key] = _least_squares(torch.stack(columns, 1), _state(target, middle))[2] / math.sqrt(
                    target.x.numel()
                )
            low, high = (middle, high) if known[key] <= bound else (low, middle - 1)
        if low >= n:
            key = (tuple(path), n)
            return path if here + 1 == n or known.get(key, math.inf) <= bound else None
        path.append(low)
        if len(path) > steps:
            return None


def _state(target: Target, k: int) -> Tensor:
    """Column of the state at fine time k, in the coordinates of the factor."""
    return target.factor[:, 2 * k]


def _reading(target: Target, k: int, form: str) -> Tensor:
    """Column of the reading at fine time k."""
    c = target.process.coef(target.times[k])
    if form == "v":
        r = math.hypot(c.alpha, c.sigma)
        return target.factor[:, 2 * k + 1] / r
    u, w = solve(row(ROWS[form], c), (c.alpha, c.sigma), (-c.sigma, c.alpha))
    return u * target.factor[:, 2 * k] + w * target.factor[:, 2 * k + 1]


Rows: TypeAlias = "tuple[list[tuple[float, ...]], tuple[float, float], list[float], Tensor | None]"


def _open(target: Target, visited: Sequence[int], form: str, ridge: float, free: bool) -> Rows:
    """Each step fitted to the teacher's own readings."""
    columns, rows, worst, residual = [_state(target, 0)], [], (1.0, 0.0), []
    for here, there in zip(visited, visited[1:], strict=False):
        if here or not free:
            columns.append(_reading(target, here, form))
        found, trust, left = _least_squares(torch.stack(columns, 1), _state(target, there), ridge)
        rows.append(tuple(found.tolist()))
        worst = (max(worst[0], trust[0]), max(worst[1], trust[1]))
        residual.append(left / math.sqrt(target.x.numel()))
    return rows, worst, residual, None


def _closed(
    target: Target, visited: Sequence[int], form: str, ridge: float, free: bool, replay: Replay | None = None
) -> Rows:
    """With a replay the student is foretold: its states are coefficients over the recorded columns."""
    begun = x = target.x if replay is None else replay.start()
    past: list[Tensor] = []
    rows, worst, residual = [], (1.0, 0.0), []
    for here, there in zip(visited, visited[1:], strict=False):
        if here or not free:
            past.append(_read(target, x, target.times[here], form, replay))
        if replay is None:
            columns = torch.stack([v.double().flatten() for v in (begun, *past)], 1)
            wanted = target.states[there].double().flatten()
        else:
            columns, wanted = target.factor @ torch.cat([begun, *past]).T, _state(target, there)
        found, trust, left = _least_squares(columns, wanted, ridge)
        w, *a = found.tolist()
        x = linear(w, begun, *(v for pair in zip(a, past, strict=True) for v in pair))
        rows.append((w, *a))
        worst = (max(worst[0], trust[0]), max(worst[1], trust[1]))
        residual.append(left / math.sqrt(target.x.numel()))
    return rows, worst, residual, x


@torch.no_grad()
def _read(target: Target, x: Tensor, t: float, form: str, replay: Replay | None = None) -> Tensor:
    """The reading at a student's states, from the network or from a replay."""
    if replay is not None:
        return reading(replay(x, t, Context()), form)  # type: ignore[no-any-return]
    out = []
    for low in range(0, len(x), target.batch):
        part = x[low : low + target.batch]
        cond = {k: v[low : low + target.batch] if isinstance(v, Tensor) else v for k, v in target.cond.items()}
        ctx = Context(cond=cond, batch=len(part), dtype=x.dtype, device=x.device)
        out.append(reading(target.denoiser(part, t, ctx), form))
        target.counted["nfe"] += ctx.run.nfe * len(part)
    return torch.cat(out)


def _least_squares(columns: Tensor, wanted: Tensor, ridge: float = 0.0) -> tuple[Tensor, tuple[float, float], float]:
    """(coefficients, (condition number, largest term over the sum), norm of what is left). Columns are scaled first; singular
    values below rounding are dropped."""
    scale = columns.norm(dim=0).clamp(min=1e-300)
    u, s, vt = torch.linalg.svd(columns / scale, full_matrices=False)
    kept = s > s[0] * 1e-10
    shrunk = torch.where(kept, s / (s.square() + ridge * s.square().mean()), 0.0)
    found = (vt.T @ (shrunk * (u.T @ wanted))) / scale
    largest = (found * scale).abs().max() / wanted.norm().clamp(min=1e-300)
    return found, (float(s[0] / s[-1].clamp(min=1e-300)), float(largest)), float((wanted - columns @ found).norm())


def _path(target: Target, steps: int, path: str | Sequence[int], form: str, n: int) -> list[int]:
    """The path that was asked for, as indices of fine times; InputError for an impossible one."""
    _valid(steps, n)
    if path == "search":
        return shortest_path(target, steps, form)
    if path == "uniform":
        return [round(i * n / steps) for i in range(steps)]
    if isinstance(path, str):
        raise InputError(f"path = {path!r}: 'search', 'uniform' or indices of fine times")
    chosen = list(path)
    if not chosen or chosen[0] != 0 or chosen[-1] >= n or any(b <= a for a, b in zip(chosen, chosen[1:], strict=False)):
        raise InputError(f"a path goes up from 0 and stays below the teacher's {n} steps, not {chosen}")
    return chosen


def _valid(steps: int, n: int) -> None:
    """InputError unless there are as many fine steps as steps."""
    if not 1 <= steps <= n:
        raise InputError(f"{steps} steps of a teacher that has {n}: between 1 and {n}")


def nearest(target: Target, times: Sequence[float]) -> list[int]:
    """The path of fine times nearest in angle to given ones (without the last), each used once."""
    angles = [target.process.coef(t).angle for t in target.times[:-1]]
    out: list[int] = []
    for t in times[:-1]:
        angle = target.process.coef(t).angle
        best = min(range(len(angles)), key=lambda k: abs(angles[k] - angle))
        out.append(max(best, out[-1] + 1) if out else 0)
    return _path(target, len(out), out, "noise", len(angles))


def evolved(
    target: Target,
    nfe: int,
    *,
    form: str = "v",
    free: bool = False,
    budget: int = 30,
    rehearsals: int = 400,
    seed: int = 0,
    told: Callable[[int, int, float], None] | None = None,
) -> Fit:
    """A closed fit of ``nfe`` calls on times that are evolved among the target's fine ones, from the searched path (ours).

    The fit costs one run of ``nfe`` calls, as an evaluation does, so the search over times is no dearer than AutoDiffusion's
    and every candidate has its own best coefficients. ``rehearsals`` candidates are evolved on the target's replay first,
    without calling the network.
    """
    count, replay = nfe + free, target.replay()
    space, n = StepSpace(len(target.times) - 1, count), len(target.times) - 1

    def foretold(one: Choice) -> float:
        return _closed(target, [*one.indices, n], form, RIDGE, free, replay)[2][-1]

    def fitness(one: Choice) -> float:
        x = _closed(target, [*one.indices, n], form, RIDGE, free)[3]
        return math.inf if x is None else target.score(target.distance(x))

    path = shortest_path(target, count, form)
    start = [Choice(tuple(path))] if len(path) == count else []
    if rehearsals:
        first = evolve(foretold, space, budget=rehearsals, population=40, start=start, nudges=True, seed=seed)
        start += [one for one, _ in first.ranked[:8]]
    found = evolve(
        fitness, space, budget=budget, population=min(12, budget), start=start, nudges=True, seed=seed, told=told
    )
    return fit(target, count, path=found.best.indices, form=form, closed=True, free=free, ridge=RIDGE)
