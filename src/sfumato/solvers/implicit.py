"""The inverse of any deterministic singlestep solver, found by fixed-point iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Step, Times, Wrap, linear
from sfumato.solvers._registry import register, registry
from sfumato.solvers.reversible import MOVES

TOLERANCE = 50  # roundings of the dtype


@register("implicit")
@dataclass(frozen=True)
class Implicit(Wrap):
    """Any deterministic singlestep solver D, with an inverse: x_t is where D(x_t -> s) = x_s, found by iteration.

    Forwards it is the inner solver. Backwards x <- x + (x_s - D(x)) / a from x = x_s r_t / r_s, a the linear part of a DDIM
    step and r = hypot(alpha, sigma), with Anderson's acceleration an item; where the distance grows an item goes back to
    its best place with half the step. One call of D an iteration, until all items are within ``tolerance``; an item that
    is there stays, so no item depends on its batch (the number of calls does, unless strict=False).

    inner       a solver or its spec, without noise and without history
    iterations  at most, a step
    memory      differences that Anderson's acceleration looks at; 0 is the plain fixed-point iteration
    tolerance   rms(x_s - D(x)) over max(1, rms(x_s)); default: 50 roundings of the dtype
    strict      stop there, and raise InputError where it was not reached; False: exactly that many iterations, whatever is left

    ``implicit(memory=0, iterations=1, strict=False)`` is DDIM inversion with the network asked at the noisier time.
    For an exact belief D is the gradient of a strictly convex function while sigma_s > 0, so there is one solution; a
    network under strong guidance may have none or several: 'edict' and 'bdia' need no solution of anything.
    Source: Pan, Gherardi, Xie, Huang, 2023, "Effective Real Image Editing with Accelerated Iterative Diffusion
    Inversion"; Walker, Ni, 2011, "Anderson Acceleration for Fixed-Point Iterations".
    """

    inner: Any = "ddim"
    iterations: int = 60
    memory: int = 4
    tolerance: float | None = None
    strict: bool = True
    backwards: bool = False

    reversible = True

    def __post_init__(self) -> None:
        if isinstance(self.inner, str):
            object.__setattr__(self, "inner", registry.make(self.inner))
        if self.inner.stochastic:
            raise InputError(f"the inner solver {self.inner} draws noise: give a deterministic one")
        if self.iterations < 1 or self.memory < 0 or (self.tolerance is not None and self.tolerance <= 0):
            raise InputError(f"{self}: iterations are at least 1, memory at least 0, and a tolerance is positive")

    @property
    def nfe(self) -> float:  # type: ignore[override]
        return math.nan if self.backwards else float(self.inner.nfe)

    def inverse(self) -> Implicit:
        return replace(self, backwards=not self.backwards)

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return Step(x, t)

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return self._found(st, s, denoiser, ctx) if self.backwards else self._inner(st.x, st.t, s, denoiser, ctx)

    def _inner(self, x: Any, t: Times, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        there = self.inner.step(self.inner.init(x, t, denoiser, ctx), s, denoiser, ctx)
        if there.carry:
            raise InputError(
                f"{type(self.inner).__name__} keeps a history, so its steps have no inverse: use a singlestep"
            )
        return Step(there.x, s)

    def _found(self, st: Step, noisy: Times, denoiser: Denoiser, ctx: Context) -> Step:
        y = st.x
        if not isinstance(y, Tensor):
            raise InputError("the implicit inverse is for states of one tensor")
        a, _ = denoiser.process.weights(MOVES["v"], st.t, noisy)
        radius, _ = denoiser.process.weights(_radii, st.t, noisy)
        search = _Anderson(y * _rows(1 / radius, y), self.memory, self._bound(y))
        for _ in range(self.iterations):
            left = linear(1.0, y, -1.0, self._inner(search.x, noisy, st.t, denoiser, ctx).x)
            # a is 0 where one step goes from noise to data: any length of the plain step will do, acceleration finds its own
            there = search.told(left, left / _rows(a, y).clamp(min=0.1))
            if self.strict and bool(there):
                return Step(search.best, noisy)
        if self.strict:
            far = float((search.least / self._bound(y)).max()) * self._tolerance(y)
            raise InputError(
                f"no inverse of the step to t = {st.t:.4g} from t = {noisy:.4g} within {self.iterations} iterations ({far:.1e} is "
                "left): take more steps or less guidance, allow more iterations, or use 'edict' or 'bdia', which are exact"
            )
        return Step(search.x, noisy)

    def _tolerance(self, y: Tensor) -> float:
        return TOLERANCE * torch.finfo(y.dtype).eps if self.tolerance is None else self.tolerance

    def _bound(self, y: Tensor) -> Tensor:
        return self._tolerance(y) * _rms(y).clamp(min=1.0)


class _Anderson:
    """x <- x + f(x) with Anderson's acceleration, item by item; the items that are there are left alone.

    x the states to try next, best and least the nearest so far and how far they were.
    """

    def __init__(self, x: Tensor, memory: int, bound: Tensor) -> None:
        self.x, self.best, self.memory, self.bound = x, x, memory, bound
        self.least = torch.full_like(bound, math.inf)
        self.damping = torch.ones_like(bound)
        self.before: tuple[Tensor, Tensor] | None = None
        self.step = torch.zeros_like(x)
        self.moves: list[tuple[Tensor, Tensor]] = []

    def told(self, left: Tensor, f: Tensor) -> Tensor:
        """What is left at ``x``, and its plain step: choose the next x. True where nothing has to go on."""
        x, far = self.x, _rms(left)
        done, nearer = self.least <= self.bound, far < self.least
        worse = ~nearer & (far > 2 * self.least) | ~far.isfinite()
        keep = _rows(done | ~nearer, x)
        self.best, self.least = torch.where(keep, self.best, x), torch.where(done, self.least, far.fmin(self.least))
        self.step = torch.where(keep, self.step, f)
        if self.before is not None and self.memory:
            self.moves = [*self.moves, (x - self.before[0], f - self.before[1])][-self.memory :]
        self.damping = torch.where(worse, self.damping / 2, (self.damping * 1.2).clamp(max=1.0))
        back, flags = _rows(worse, x), ~_rows(worse, x)
        self.moves = [(torch.where(flags, u, 0.0), torch.where(flags, w, 0.0)) for u, w in self.moves]
        base, move = torch.where(back, self.best, x), torch.where(back, self.step, f)
        self.before = (base, move)
        there = base + _rows(self.damping, x) * self._accelerated(move)
        self.x = torch.where(_rows(self.least <= self.bound, x), self.best, there)
        return (self.least <= self.bound).all()

    def _accelerated(self, f: Tensor) -> Tensor:
        """f - sum gamma (dx + df), with gamma the least-squares solution of df gamma = f."""
        if not self.moves:
            return f
        wide = torch.promote_types(f.dtype, torch.float64)
        df = torch.stack([w.flatten(1) for _, w in self.moves], 2).to(wide)
        dx = torch.stack([u.flatten(1) for u, _ in self.moves], 2).to(wide)
        size = df.norm(dim=1, keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        df, dx = df / size, dx / size
        gram = df.transpose(1, 2) @ df + 1e-13 * torch.eye(df.shape[2], dtype=wide, device=f.device)
        gamma = torch.linalg.solve(gram, df.transpose(1, 2) @ f.flatten(1).to(wide)[..., None])
        moved: Tensor = ((df + dx) @ gamma)[..., 0].view_as(f)
        return f - moved.to(f.dtype)


def _radii(process: Any, s: float, t: float) -> tuple[float, float]:
    """(r_s / r_t, 1)."""
    a, b = process.coef(t), process.coef(s)
    return math.hypot(b.alpha, b.sigma) / math.hypot(a.alpha, a.sigma), 1.0


def _rms(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(1).sqrt() if x.ndim > 1 else x.abs()


def _rows(c: Any, x: Tensor) -> Tensor:
    """A number, or one an item (B,), shaped to multiply x (B, *)."""
    c = torch.as_tensor(c, device=x.device)
    c = c.to(x.dtype) if c.is_floating_point() else c
    shaped: Tensor = c.view(-1, *[1] * (x.ndim - 1)) if c.ndim else c
    return shaped
