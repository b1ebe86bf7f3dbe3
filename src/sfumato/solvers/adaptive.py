"""Steps chosen by an error estimate, for each item by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sfumato.core import Context, Denoiser, InputError, Solver, Step, Times, linear
from sfumato.core.trees import column
from sfumato.solvers._integral import reading, weights
from sfumato.solvers._registry import register


@register("dpm-solver-adaptive")
@register("dpm-solver++-adaptive", form="data")
@dataclass(frozen=True)
class Adaptive(Solver):
    """DPM-Solver-12 and -23: an embedded pair of orders (order - 1, order) whose steps in lambda follow the tolerance.

    E = rms((high - low) / max(atol, rtol max(|low|, |previous low|))) over an item; a trial with E <= 1 is accepted, and
    the next step is min(0.9 h E^(-1/order), what is left). The times of the grid are stops on the way, where the state can
    be read: 1 step is the plain method. Unlike the released code, which takes the worst item of the batch, every item has
    its own clock and its own steps, so none depends on the batch; an item that arrived waits for the others.
    An interval that ends at sigma = 0 or leaves alpha = 0 is a DDIM step. The number of calls is only known afterwards.
    Source: Lu, Zhou, Bao, Chen, Li, Zhu, 2022, "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in
    Around 10 Steps".
    """

    order: int = 3
    form: str = "noise"
    atol: float = 0.0078
    rtol: float = 0.05
    first: float = 0.05

    nfe = math.nan

    def __post_init__(self) -> None:
        if self.order not in (2, 3) or self.form not in ("data", "noise"):
            raise InputError(f"order = {self.order} is 2 or 3, form {self.form!r} 'data' or 'noise'")
        if min(self.atol, self.first) <= 0 or self.rtol < 0:
            raise InputError(f"atol and first are positive and rtol not negative, not {self}")

    def init(self, x: Any, t: Times, denoiser: Denoiser, ctx: Context) -> Step:
        return Step(x, t, (torch.full((len(x),), self.first, dtype=torch.float64), x))

    def step(self, st: Step, s: Times, denoiser: Denoiser, ctx: Context) -> Step:
        process = denoiser.process
        if not (isinstance(st.t, float) and isinstance(s, float)):
            raise InputError(
                "the grid of an adaptive solver is one clock for the batch: it makes its own for each item"
            )
        a, b = process.coef(st.t), process.coef(s)
        if math.isinf(a.lam) or math.isinf(b.lam):
            return Step(denoiser(st.x, st.t, ctx).at(b.alpha, b.sigma), s, st.carry)
        sign = math.copysign(1.0, b.lam - a.lam)
        (h, previous), x = st.carry, st.x
        at = torch.full_like(h, a.lam)
        while bool((open_ := sign * (b.lam - at) > 1e-9).any()):
            size = torch.where(open_, torch.minimum(h, sign * (b.lam - at)), self.first)
            low, high = self._pair(x, at, sign * size, denoiser, ctx)
            scale = self.rtol * torch.maximum(low.abs(), previous.abs())
            error = (
                ((high - low) / scale.clamp(min=self.atol)).reshape(len(x), -1).square().mean(1).sqrt().double().cpu()
            )
            if not bool(error[open_].isfinite().all()):
                raise InputError("an item's error estimate is not finite: the denoiser diverged, or gave NaN")
            done = open_ & (error <= 1)
            x, previous = _where(done, high, x), _where(done, low, previous)
            at = torch.where(done, at + sign * size, at)
            h = torch.where(open_, 0.9 * size * error.clamp(min=1e-8) ** (-1 / self.order), h)
        return Step(x, s, (h, previous))

    def _pair(self, x: Any, lam: Tensor, h: Tensor, denoiser: Denoiser, ctx: Context) -> tuple[Tensor, Tensor]:
        """The states of the lower and of the higher order after a step h in lambda."""
        process = denoiser.process
        shares = (0.5, 1.0) if self.order == 2 else (1 / 3, 2 / 3, 1.0)
        t, *inner, s = (_times(process, lam + share * h) for share in (0.0, *shares))
        nodes: list[tuple[Tensor, Tensor]] = [(t, reading(denoiser(x, t, ctx), self.form))]
        for u in inner:
            ahead = _move(process, x, u, nodes, self.form, "exact")
            nodes.insert(0, (u, reading(denoiser(ahead, u, ctx), self.form)))
        if self.order == 2:
            return _move(process, x, s, nodes[1:], self.form, "exact"), _move(
                process, x, s, nodes, self.form, "midpoint"
            )
        low = _move(process, x, s, nodes[1:], self.form, "midpoint")
        return low, _move(process, x, s, [nodes[0], nodes[-1]], self.form, "exact")


def _move(process: Any, x: Tensor, s: Tensor, nodes: Sequence[tuple[Tensor, Tensor]], form: str, rule: str) -> Tensor:
    """From the time of the last (oldest) node to s."""
    scale, *w = process.weights(_asked(form, rule), s, *(n for n, _ in nodes))
    return linear(scale, x, *[v for wj, (_, m) in zip(w, nodes, strict=True) for v in (wj, m)])  # type: ignore[no-any-return]


@lru_cache
def _asked(form: str, rule: str) -> Any:
    return lambda process, s, *nodes: weights(process, form, "lambda", nodes[-1], s, nodes, 0.0, rule)


def _times(process: Any, lam: Tensor) -> Tensor:
    return torch.tensor([process.time(v) for v in lam.tolist()], dtype=torch.float64, device=lam.device)


def _where(done: Tensor, new: Any, old: Any) -> Any:
    return torch.where(column(done, new).bool(), new, old)
