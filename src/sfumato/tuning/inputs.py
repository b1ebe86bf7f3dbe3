"""Optimise what a frozen model is given, its noise or its conditions, through its own sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sfumato import gradients, grids, solvers
from sfumato.core import Context, Denoiser, Grid, InputError, Solver

Values: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Generator:
    """A frozen model with its sampler as one differentiable function: (noise x, conditions) -> decoded data.

    denoiser      under its guidance; solver, grid, steps: names, specs or objects, and how many
    decode        of the state, e.g. ``codec.decode``; None: the state itself
    method        how gradients come back, of :mod:`sfumato.gradients`
    residual, at  the data are x0 + residual (m - sg m) with m = E[x0 | x_t] at t = ``at``, sg the stopped gradient: the
                  value stays, and part of the gradient skips the steps below ``at``; 0 is off
    calls         [generations an item, a gradient counted as two more]
    """

    denoiser: Denoiser
    solver: str | Solver = "dpm-solver++"
    grid: str | Grid = "arctan"
    steps: int = 8
    decode: Callable[[Any], Tensor] | None = None
    method: str = "checkpoint"
    residual: float = 0.0
    at: float = 0.5
    calls: list[float] = field(default_factory=lambda: [0.0])

    @staticmethod
    def of(pipeline: Any, *, steps: int | None = None, guidance: Any = None, **options: Any) -> Generator:
        """That of a pipeline: its solver, grid and steps unless others are given, its codec decoding."""
        found = {"solver": pipeline.solver, "grid": pipeline.grid, "steps": steps or pipeline.steps}
        return Generator(pipeline.guided(guidance), **{**found, "decode": pipeline.codec.decode, **options})

    def __call__(self, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """Samples from the start x (B, *) at t = 1; gradients reach x and every tensor in ``cond``."""
        wanted = torch.is_grad_enabled() and any(v.requires_grad for v in (x, *cond.values()) if isinstance(v, Tensor))
        self.calls[0] += 3.0 if wanted else 1.0
        method = self.method if wanted else "plain"
        y = self._sampled(x, cond, method, 0.0, self.steps)
        if wanted and self.residual:
            middle = self._sampled(x, cond, method, self.at, max(1, round(self.steps * (1 - self.at))))
            mean = self.denoiser(
                middle, self.at, Context.of(len(x), None, cond=cond, dtype=x.dtype, device=x.device)
            ).mean
            y = y + self.residual * (mean - mean.detach())
        return y if self.decode is None else self.decode(y)

    def _sampled(self, x: Tensor, cond: Mapping[str, Any], method: str, stop: float, steps: int) -> Tensor:
        """The state at ``stop``, with gradients by ``method``."""
        solver: Any = solvers.registry.make(self.solver) if isinstance(self.solver, str) else self.solver
        grid: Any = solver.grid or self.grid
        grid = grids.registry.make(grid) if isinstance(grid, str) else grid
        return gradients.sample(  # type: ignore[no-any-return]
            self.denoiser,
            method=method,
            solver=solver,
            grid=grid,
            steps=steps,
            stop=stop,
            x=x,
            cond=cond,
            parameters=(),
        )


@dataclass(frozen=True)
class Found:
    """values: the best of each item (or of all, where the loss is one number); loss: theirs; history (n, B) or (n,)."""

    values: Values
    loss: Tensor
    history: Tensor


class _Best:
    """The values of the smallest loss so far, item by item; not a number is never best."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.loss: Any = None
        self.history: list[Tensor] = []

    def see(self, values: Values, loss: Tensor) -> bool:
        """Whether anything became better."""
        loss = torch.where(loss.isnan(), torch.inf, loss.detach())
        self.history.append(loss)
        if self.loss is None:
            self.values, self.loss = {k: v.detach().clone() for k, v in values.items()}, loss
            return True
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        for name, value in values.items():
            rows = better.view(-1, *[1] * (value.ndim - 1)) if better.ndim else better
            self.values[name] = torch.where(rows, value.detach(), self.values[name])
        return bool(better.any())

    def found(self) -> Found:
        """What was seen, as a result."""
        return Found(self.values, self.loss, torch.stack(self.history))


def optimise(
    variables: Values,
    loss: Callable[[Values], Tensor],
    *,
    steps: int = 40,
    lr: float = 0.1,
    rule: str = "adam",
    decay: float = 0.0,
    clip: float | None = None,
    project: Callable[[Values], Values] | None = None,
    patience: int | None = None,
    target: float | None = None,
) -> Found:
    """min over the variables of loss(variables), keeping the best that was seen.

    variables  tensors by name; those given stay as they are
    loss       (B,), one an item: then each variable has B rows, the rows are B independent problems, and the best is kept
               item by item; or one number for all
    rule       'adam' (AdamW with weight decay ``decay``), or 'normalised': an item moves by lr along its gradient, in root mean
               square; it turns with the sphere, where Adam is drawn to vectors of signs
    clip       the largest norm of an item's gradient (of a variable's, for one number)
    project    what is allowed, after each step
    patience   stop after so many steps in which nothing became better
    target     stop when every loss is at most this

    steps + 1 losses are computed at most, the last one without a gradient. Raises InputError where the loss is of another
    shape or does not depend on the variables.
    """
    now = {k: v.detach().clone().requires_grad_() for k, v in variables.items()}
    if rule not in ("adam", "normalised"):
        raise InputError(f"rule = {rule!r}: use 'adam' or 'normalised'")
    leaves = list(now.values())
    optimizer: Any = (
        torch.optim.AdamW(leaves, lr, weight_decay=decay) if rule == "adam" else torch.optim.SGD(leaves, lr)
    )
    best, idle = _Best(), 0
    for step in range(steps + 1):
        last = step == steps
        with torch.set_grad_enabled(not last):
            value = loss(now)
        _check(value, now, last)
        idle = 0 if best.see(now, value) else idle + 1
        if (
            last
            or (patience is not None and idle >= patience)
            or (target is not None and bool((best.loss <= target).all()))
        ):
            break
        optimizer.zero_grad()
        value.sum().backward()
        for v in now.values():
            if v.grad is not None:
                v.grad = _sized(v.grad, value.ndim == 1, rule, clip)
        optimizer.step()
        if project is not None:
            with torch.no_grad():
                for name, v in project({k: v.detach() for k, v in now.items()}).items():
                    now[name].copy_(v)
    return best.found()


def _sized(slope: Tensor, items: bool, rule: str, clip: float | None) -> Tensor:
    """A gradient clipped, or of root mean square 1; item by item, or as a whole."""
    rows = slope.flatten(1) if items else slope.flatten()[None]
    size = rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
    if rule == "normalised":
        return (rows * (rows.shape[1] ** 0.5 / size)).view_as(slope)
    return slope if clip is None else (rows * (clip / size).clamp(max=1.0)).view_as(slope)


@torch.no_grad()
def random_search(propose: Callable[[int], Values], loss: Callable[[Values], Tensor], tries: int) -> Found:
    """The best of ``tries`` proposals ``propose(i)``, item by item where the loss is: what optimisation is compared with."""
    best = _Best()
    for i in range(tries):
        values = propose(i)
        best.see(values, loss(values))
    return best.found()


def _check(value: Tensor, variables: Values, last: bool) -> None:
    """InputError for a loss that is neither one number nor one an item, or that no gradient goes through."""
    if value.ndim > 1 or (value.ndim == 1 and any(len(v) != len(value) for v in variables.values())):
        rows = {k: tuple(v.shape) for k, v in variables.items()}
        raise InputError(
            f"a loss {tuple(value.shape)} of variables {rows}: give one number, or one an item (B,) of B rows each"
        )
    if not last and not value.requires_grad:
        raise InputError(
            "the loss does not depend on the variables through anything differentiable: use random_search, or a loss with a gradient"
        )


__all__ = ["Found", "Generator", "Values", "optimise", "random_search"]
