"""What the objectives of distillation share: distances, indices, and the check that a student can be read at its times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, InputError, Solver, row, solve
from sfumato.denoisers import Parametrized
from sfumato.objectives.times import unit

METRICS = ("l2", "l1", "huber")


def distance(a: Tensor, b: Tensor, metric: str = "l2", scale: float = 1e-3) -> Tensor:
    """(B,) means over the elements of d = a - b: 'l2' d^2, 'l1' |d|, 'huber' sqrt(d^2 + scale^2) - scale."""
    d = a - b
    if metric == "l2":
        each = d.square()
    elif metric == "l1":
        each = d.abs()
    elif metric == "huber":
        each = (d.square() + scale**2).sqrt() - scale
    else:
        raise InputError(f"metric = {metric!r}: use one of {', '.join(METRICS)}")
    return each.flatten(1).mean(1)


def streams(ctx: Context) -> Any:
    """The streams of an objective's context."""
    if ctx.rng is None:
        raise InputError("an objective draws times and noise: give it a context with streams, Context.of(batch, seed)")
    return ctx.rng


def one_of(n: int, ctx: Context) -> Tensor:
    """A whole number below n for each item, int64 (B,), evenly spread over the batch."""
    return (unit(streams(ctx), stratified=True) * n).long().clamp(max=n - 1)


def falling(times: Sequence[float], least: int = 2) -> Tensor:
    """Times from noise to data as float64. Raises InputError unless they fall within [0, 1]."""
    values = torch.as_tensor(times, dtype=torch.float64)
    if values.ndim != 1 or len(values) < least or not bool((values[:-1] > values[1:]).all()):
        raise InputError(f"times = {list(times)}: at least {least}, falling from noise to data")
    if not 0 <= float(values[-1]) < float(values[0]) <= 1:
        raise InputError(f"times = {list(times)}: between 1 (noise) and 0 (data)")
    return values


def readable(denoiser: Any, times: Sequence[float]) -> None:
    """Raise InputError where the network's kind of prediction says nothing of x0 at one of these times."""
    if not isinstance(denoiser, Parametrized) or denoiser.predicts == "edm":
        return
    for t in times:
        c = denoiser.process.coef(float(t))
        try:
            solve((1.0, 0.0), (c.alpha, c.sigma), row(denoiser.predicts, c))
        except InputError as error:
            raise InputError(
                f"a student that predicts {denoiser.predicts!r} cannot be distilled at t = {float(t):g}, where alpha = "
                f"{c.alpha:g}: begin at a time below, or convert it to 'v' or 'flow'"
            ) from error


def labelled(denoiser: Any, t: Tensor) -> Parametrized:
    """The denoiser on the same weights, its network told time t (B,) whatever time it is asked at.

    Scaling of the input and meaning of the output stay those of the time it is asked at. Raises InputError for a denoiser
    that is no network.
    """
    if not isinstance(denoiser, Parametrized):
        raise InputError(f"{type(denoiser).__name__} is no network with a label of its own: give a parametrized one")
    label = t if denoiser.clock is None else denoiser.clock(t)
    made = Parametrized(
        denoiser.net, denoiser.process, denoiser.predicts, lambda _: label, denoiser.null, denoiser.data_std
    )
    return made.train(denoiser.training)


def moved(teacher: Any, solver: Solver, x: Tensor, t: Tensor, s: Tensor, substeps: int, ctx: Context) -> Tensor:
    """Where a teacher takes x from times t to s (B,), in ``substeps`` steps equal in t."""
    ctx = ctx.fork("teacher", look=True)
    st = solver.init(x, t, teacher, ctx)
    for k in range(1, substeps + 1):
        st = solver.step(st, s if k == substeps else t + (s - t) * (k / substeps), teacher, ctx)
    return solver.read(st)  # type: ignore[return-value]
